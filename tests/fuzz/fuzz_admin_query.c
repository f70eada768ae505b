/* fuzz_admin_query.c - any query string, path and Accept header of a GET /admin/…: what is accepted is fit
 * for the store, a cursor fits the query that it was given for and no other, and a refusal is one line. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "admin_query.h"
#include "clock.h"
#include "support.h"
#include "text.h"

static void check_filter(const struct store_filter *f)
{
    CHECK(f->company_id == NULL ||
          text_fault(f->company_id, strlen(f->company_id), 1, 256) == NULL);
    CHECK(f->request_id == NULL || text_fault(f->request_id, strlen(f->request_id), 1, 64) == NULL);
    CHECK(f->since_ms >= 0 && f->since_ms <= CLOCK_WALL_MAX);
    CHECK(f->until_ms >= 0 && f->until_ms <= CLOCK_WALL_MAX);
    CHECK(f->before_id >= 0);
}

static void check_query(const struct admin_query *q, const char *path)
{
    CHECK(strcmp(q->view->path, path) == 0);
    CHECK(q->limit >= 1 && q->limit <= ADMIN_LIMIT_MAX);
    CHECK(q->skip >= 0 && q->skip <= 1000000);
    CHECK(q->view->id == NULL ? q->filter.before_id == 0 : q->skip == 0);
    check_filter(&q->filter);
}

/* The next page, and that of a query with another company. */
static void check_next(struct arena *arena, const struct admin_query *q, const char *query)
{
    char cursor[ADMIN_CURSOR_SIZE];
    struct admin_query next;
    struct err err;

    admin_query_next(q, q->limit, 4711, cursor);
    const char *same = arena_printf(arena, "%s&cursor=%s", query, cursor);
    const char *other = arena_printf(arena, "%s&company=another&cursor=%s", query, cursor);
    if (strlen(other) > 4096 || strstr(query, "cursor") != NULL || strchr(query, '%') != NULL)
        return;
    CHECK(admin_query_parse(arena, q->view->path, same, "", &next, &err) == ERR_NONE);
    CHECK(next.view == q->view);
    CHECK(q->view->id == NULL ? next.skip == q->skip + q->limit : next.filter.before_id == 4711);
    CHECK(next.filter.since_ms == q->filter.since_ms);
    CHECK(q->filter.until_ms == 0 || next.filter.until_ms == q->filter.until_ms);
    check_query(&next, q->view->path);
    CHECK(admin_query_parse(arena, q->view->path, other, "", &next, &err) == ERR_BAD_REQUEST ||
          (q->filter.company_id != NULL && strcmp(q->filter.company_id, "another") == 0));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const paths[] = {"/admin/tokens",  "/admin/usage",     "/admin/errors",
                                        "/admin/retries", "/admin/unsettled", "/admin/outbox"};
    struct fuzz_input input = {data, size};
    const char *path = paths[fuzz_byte(&input) % 6];
    char *query = fuzz_text(&input, '\n'), *accept = fuzz_rest(&input);
    struct admin_query q;
    struct arena arena;
    struct err err = {.message = ""};

    arena_init(&arena);
    if (admin_query_parse(&arena, path, query, accept, &q, &err) == ERR_NONE) {
        check_query(&q, path);
        check_next(&arena, &q, query);
    } else {
        CHECK(err.code == ERR_BAD_REQUEST && fuzz_is_line(err.message) && err.message[0] != '\0');
    }
    arena_reset(&arena);
    free(query);
    free(accept);
    return 0;
}
