/* admin.c - GET /admin/…: one page of a view, as JSON or CSV. See admin.h.
 *
 *   1. look who calls                                 authenticate
 *   2. read what is asked for                         admin_query_parse
 *   3. read the rows of the page into the answer      read_page
 *   4. end the answer, or say what went wrong         admin_handle, refuse
 *
 * The rows are copied while the store hands them out, so that no reader of an answer holds a connection
 * to the store. A page also ends where it has become large. */
#include "admin.h"

#include <string.h>

#include "admin_query.h"
#include "clock.h"
#include "log.h"
#include "table.h"

#define PAGE_MAX (4 * 1024 * 1024) /* bytes, after which a page ends */

struct page {
    const struct admin_query *query;
    struct buf *out;
    size_t columns;
    int at[ADMIN_COLUMNS_MAX]; /* where each one is in the store's rows; -1: it lacks it */
    int id_at;
    int64_t seen; /* rows, with those before the page */
    int64_t rows;
    int64_t last_id;
    bool has_next;
};

/* ---- 1. who calls ---- */

static enum err_code authenticate(struct app *app, struct request *request,
                                  struct store_client_key *client, int *retry_after_s,
                                  struct err *err)
{
    enum err_code code = auth_check(app->auth, request->authorization, client, retry_after_s, err);

    explicit_bzero(request->authorization, strlen(request->authorization));
    if (code != ERR_NONE || client->is_admin)
        return code;
    return err_set(err, ERR_FORBIDDEN, "client key %s is not an administrator's", client->id);
}

/* ---- 3. the page ---- */

static int find(const char *name, size_t columns, const char *const *names)
{
    for (size_t i = 0; name != NULL && i < columns; i++)
        if (strcmp(names[i], name) == 0)
            return (int)i;
    return -1;
}

static void write_csv_head(struct page *page)
{
    struct store_value names[ADMIN_COLUMNS_MAX];

    for (size_t i = 0; i < page->columns; i++)
        names[i] = (struct store_value){.type = STORE_TEXT, .text = page->query->view->columns[i]};
    table_append_csv(page->out, page->columns, names);
}

static void begin_page(struct page *page, const struct request *request)
{
    while (page->columns < ADMIN_COLUMNS_MAX && page->query->view->columns[page->columns] != NULL)
        page->columns++;
    if (page->query->csv)
        write_csv_head(page);
    else
        buf_printf(page->out, "{\"request_id\": \"%s\", \"rows\": [", request->id);
}

static bool take_row(void *context, size_t columns, const char *const *names,
                     const struct store_value *values)
{
    struct page *page = context;
    const struct admin_view *view = page->query->view;
    struct store_value shown[ADMIN_COLUMNS_MAX];

    if (page->seen == 0) {
        page->id_at = find(view->id, columns, names);
        for (size_t i = 0; i < page->columns; i++)
            page->at[i] = find(view->columns[i], columns, names);
    }
    if (page->seen++ < page->query->skip)
        return true;
    page->has_next = page->rows == page->query->limit || page->out->len >= PAGE_MAX;
    if (page->has_next)
        return false;
    for (size_t i = 0; i < page->columns; i++)
        shown[i] =
            page->at[i] >= 0 ? values[page->at[i]] : (struct store_value){.type = STORE_NULL};
    if (page->query->csv) {
        table_append_csv(page->out, page->columns, shown);
    } else {
        buf_append_str(page->out, page->rows > 0 ? ",\n  " : "\n  ");
        table_append_json(page->out, page->columns, view->columns, shown);
    }
    if (page->id_at >= 0)
        page->last_id = values[page->id_at].integer;
    page->rows++;
    return true;
}

static enum err_code read_page(struct app *app, struct page *page, struct err *err)
{
    const struct admin_query *query = page->query;
    enum store_view view = query->view->view;
    struct store_filter filter = query->filter;
    bool is_outbox = view == VIEW_OUTBOX || view == VIEW_OUTBOX_BY_STATE;

    filter.limit = (int)query->skip + query->limit + 1; /* one more, to know whether there is one */
    return store_query(is_outbox ? app->store : app->reader, view, &filter, take_row, page, err);
}

/* ---- 4. the answer ---- */

static void refuse(struct request *request, struct response *response, enum err_code code,
                   int retry_after_s, const struct err *err)
{
    const char *detail = code == ERR_BAD_REQUEST ? err->message
                         : code == ERR_FORBIDDEN
                             ? "This needs an administrator's client key (extractctl client-key "
                               "add --admin)."
                             : NULL;

    code = err_for_client(code);
    response_problem(response, request, code, detail, retry_after_s, false);
    LOG_TRACED(response->status >= 500 ? LOG_ERROR : LOG_WARNING, request->id,
               request_trace_id(request), err->message, "%s: path=%s ms=%lld peer=%s %s",
               err_info(code)->name, request->path,
               (long long)(clock_monotonic_ms() - request->accepted_ms), request->peer,
               request_other_ids(request));
}

void admin_handle(struct app *app, struct request *request, struct response *response)
{
    struct store_client_key client;
    struct admin_query query;
    struct page page = {.query = &query, .out = &response->body};
    char cursor[ADMIN_CURSOR_SIZE];
    struct err err = {.message = ""};
    int retry_after_s = 0;
    enum err_code code = authenticate(app, request, &client, &retry_after_s, &err);

    if (code == ERR_NONE)
        code = admin_query_parse(&request->arena, request->path, request->query, request->accept,
                                 &query, &err);
    if (code == ERR_NONE) {
        begin_page(&page, request);
        code = read_page(app, &page, &err);
    }
    if (code == ERR_NONE && !buf_ok(page.out))
        code = err_set(&err, ERR_INTERNAL, "the answer is too large");
    if (code != ERR_NONE) {
        refuse(request, response, code, retry_after_s, &err);
        return;
    }
    if (page.has_next) {
        admin_query_next(&query, page.rows, page.last_id, cursor);
        response->next_cursor = arena_strdup(&request->arena, cursor);
    }
    if (query.csv) {
        response->content_type = "text/csv; charset=utf-8; header=present";
        response->file_name = query.view->file_name;
    } else {
        buf_printf(page.out, "%s], \"next_cursor\": %s%s%s}", page.rows > 0 ? "\n" : "",
                   page.has_next ? "\"" : "", page.has_next ? cursor : "null",
                   page.has_next ? "\"" : "");
    }
}
