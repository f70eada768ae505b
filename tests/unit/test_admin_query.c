/* test_admin_query.c - what a GET /admin/… asks for: parameters, formats, cursors. What each refusal says
 * is tested through a real web server (e2e/test_admin.py). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "admin_query.h"
#include "clock.h"

#define COUNT(array) (sizeof(array) / sizeof(array)[0])
#define T0 INT64_C(1795349601123) /* 2026-11-22T12:13:21.123Z */

static struct arena arena;

static int set_up(void **state)
{
    (void)state;
    arena_init(&arena);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    arena_reset(&arena);
    return 0;
}

static struct admin_query good(const char *path, const char *query)
{
    struct admin_query parsed;
    struct err err = {.message = ""};

    if (admin_query_parse(&arena, path, query, "", &parsed, &err) != ERR_NONE)
        fail_msg("%s?%s: %s", path, query, err.message);
    return parsed;
}

static void bad(const char *path, const char *query, const char *said)
{
    struct admin_query parsed;
    struct err err = {.message = ""};

    if (admin_query_parse(&arena, path, query, "", &parsed, &err) != ERR_BAD_REQUEST)
        fail_msg("%s?%s is accepted", path, query);
    if (strstr(err.message, said) == NULL)
        fail_msg("%s?%s: %s", path, query, err.message);
}

static void test_nothing(void **state)
{
    struct admin_query q = good("/admin/errors", "");
    (void)state;

    assert_int_equal(q.view->view, VIEW_ERRORS);
    assert_int_equal(q.limit, ADMIN_LIMIT_DEFAULT);
    assert_false(q.csv);
    assert_int_equal(q.skip, 0);
    assert_null(q.filter.company_id);
    assert_null(q.filter.request_id);
    assert_int_equal(q.filter.since_ms | q.filter.until_ms | q.filter.before_id, 0);
}

static void test_everything(void **state)
{
    struct admin_query q = good(
        "/admin/usage", "since=2026-11-22T12%3A13%3A21.123Z&until=2026-11-22T14:13:21.123%2b02:00"
                        "&company=K%C3%A4ufer+%26%20S%c3%B6hne&request_id=r-1&by=user&limit=7"
                        "&format=csv&cursor=");
    (void)state;

    assert_int_equal(q.view->view, VIEW_USAGE_BY_USER);
    assert_int_equal(q.limit, 7);
    assert_true(q.csv);
    assert_true(q.filter.since_ms == T0 && q.filter.until_ms == T0);
    assert_string_equal(q.filter.company_id, "Käufer & Söhne");
    assert_string_equal(q.filter.request_id, "r-1");
}

/* The driver must be able to filter each view as the parser lets it be. */
static void test_views(void **state)
{
    static const struct {
        const char *path, *query;
        enum store_view view;
    } cases[] = {
        {"/admin/tokens", "", VIEW_TOKENS},
        {"/admin/tokens", "by=token", VIEW_TOKENS},
        {"/admin/tokens", "by=status", VIEW_TOKENS_BY_STATUS},
        {"/admin/usage", "", VIEW_USAGE_BY_DAY},
        {"/admin/usage", "by=day", VIEW_USAGE_BY_DAY},
        {"/admin/usage", "by=company", VIEW_USAGE_BY_COMPANY},
        {"/admin/usage", "by=branch", VIEW_USAGE_BY_BRANCH},
        {"/admin/usage", "by=user", VIEW_USAGE_BY_USER},
        {"/admin/usage", "by=token", VIEW_USAGE_BY_TOKEN},
        {"/admin/errors", "", VIEW_ERRORS},
        {"/admin/retries", "", VIEW_RETRIES},
        {"/admin/unsettled", "", VIEW_UNSETTLED},
        {"/admin/outbox", "", VIEW_OUTBOX},
        {"/admin/outbox", "by=entry", VIEW_OUTBOX},
        {"/admin/outbox", "by=state", VIEW_OUTBOX_BY_STATE},
    };
    (void)state;

    for (size_t i = 0; i < COUNT(cases); i++)
        assert_int_equal(good(cases[i].path, cases[i].query).view->view, cases[i].view);
}

static void test_refused(void **state)
{
    static const struct {
        const char *path, *query, *said;
    } cases[] = {
        {"/admin/errors", "limit=0", "limit must be a whole number from 1 to 1000"},
        {"/admin/errors", "limit=1001", "limit must be"},
        {"/admin/errors", "limit=10000000000000000000000", "limit must be"},
        {"/admin/errors", "limit=+1", "limit must be"},
        {"/admin/errors", "limit=1.0", "limit must be"},
        {"/admin/errors", "since=1", "since must be a time like 2026-01-31"},
        {"/admin/errors", "until=2026-02-29", "until must be a time"},
        {"/admin/errors", "since=10000-01-01", "since must be a time"},
        {"/admin/errors", "since=-1d", "since must be a time"},
        {"/admin/errors", "company=%20a", "company "},
        {"/admin/errors", "company=%C3", "company "},
        {"/admin/errors", "request_id=a%7F", "request_id "},
        {"/admin/tokens", "request_id=a", "does not go with /admin/tokens by token"},
        {"/admin/tokens", "by=status&until=1d", "until does not go with /admin/tokens by status"},
        {"/admin/outbox", "by=state&company=a", "company does not go with"},
        {"/admin/usage", "by=week", "day, company, branch, user, token"},
        {"/admin/errors", "by=day", "by is not a parameter of /admin/errors"},
        {"/admin/errors", "format=CSV", "format must be json or csv"},
        {"/admin/errors", "%", "%25"},
        {"/admin/errors", "company=a%2", "%25"},
        {"/admin/errors", "company=a%2&limit=1", "%25"},
        {"/admin/errors", "company=%g0", "%25"},
        {"/admin/errors", "company=%\x10\x11", "%25"},
        {"/admin/errors", "company=%00", "%25"},
        {"/admin/errors", "limit=1&limit=1", "limit is given twice"},
        {"/admin/errors", "limit=&limit=1", "limit is given twice"},
        {"/admin/errors", "Limit=1", "Limit is not a parameter"},
        {"/admin/errors", "=1", " is not a parameter"},
        {"/admin/errors", "a%0Ab", "a\\nb is not a parameter"},
    };
    (void)state;

    for (size_t i = 0; i < COUNT(cases); i++)
        bad(cases[i].path, cases[i].query, cases[i].said);
}

static void test_longest(void **state)
{
    char query[4100];
    (void)state;

    memset(query, '&', sizeof query);
    query[4096] = '\0';
    good("/admin/errors", query);
    query[4096] = '&';
    query[4097] = '\0';
    bad("/admin/errors", query, "at most 4096 bytes");
}

static void test_formats(void **state)
{
    static const struct {
        const char *query, *accept;
        bool csv;
    } cases[] = {
        {"", "", false},
        {"", "*/*", false},
        {"", "text/csv", true},
        {"", " ,, Text/CSV ; charset=utf-8", true},
        {"", "text/*", false},
        {"", "text/csv;q=0", false},
        {"", "text/csv;q=0.000", false},
        {"", "text/csv;q=0.001", true},
        {"", "text/csv,application/json", false},
        {"", "application/json;q=0.999,text/csv", true},
        {"", "application/json;q=0.9,text/csv;q=0.95", true},
        {"", "application/json;q=0.95,text/csv;q=0.9", false},
        {"", "text/csv;q=", true},
        {"", "text/csv;q=1e999", true},
        {"", "text/csv;q=0.99999999999999999999", true},
        {"", "text/csvx, x/text/csv", false},
        {"", ",;,;", false},
        {"format=json", "text/csv", false},
        {"format=csv", "application/json", true},
    };
    struct admin_query q;
    struct err err;
    (void)state;

    for (size_t i = 0; i < COUNT(cases); i++) {
        assert_int_equal(ERR_NONE, admin_query_parse(&arena, "/admin/errors", cases[i].query,
                                                     cases[i].accept, &q, &err));
        if (q.csv != cases[i].csv)
            fail_msg("%s %s", cases[i].query, cases[i].accept);
    }
}

/* ---- cursors ---- */

static const char *next(const char *path, const char *query, int64_t rows, int64_t last_id)
{
    struct admin_query q = good(path, query);
    char cursor[ADMIN_CURSOR_SIZE];

    admin_query_next(&q, rows, last_id, cursor);
    assert_int_equal(strlen(cursor), ADMIN_CURSOR_SIZE - 1);
    return arena_printf(&arena, "%s&cursor=%s", query, cursor);
}

static void test_cursor_by_id(void **state)
{
    struct admin_query first = good("/admin/errors", "since=24h&company=a");
    char cursor[ADMIN_CURSOR_SIZE];
    (void)state;

    first.filter.since_ms -= 60000; /* asked a minute ago */
    admin_query_next(&first, 100, 4711, cursor);
    struct admin_query q =
        good("/admin/errors", arena_printf(&arena, "since=24h&company=a&cursor=%s", cursor));
    assert_true(q.filter.since_ms == first.filter.since_ms);
    assert_int_equal(q.filter.before_id, 4711);
    assert_int_equal(q.skip, 0);
    assert_int_equal(q.filter.until_ms, 0); /* new IDs are above it anyway */
    q = good("/admin/errors", next("/admin/errors", "", 1, INT64_MAX));
    assert_true(q.filter.before_id == INT64_MAX);
}

static void test_cursor_by_count(void **state)
{
    int64_t before = clock_wall_ms();
    const char *query = next("/admin/usage", "by=branch&limit=5", 5, 0);
    struct admin_query q = good("/admin/usage", query);
    char cursor[ADMIN_CURSOR_SIZE];
    (void)state;

    assert_int_equal(q.skip, 5);
    assert_int_equal(q.filter.before_id, 0);
    assert_in_range(q.filter.until_ms, before, clock_wall_ms());
    int64_t until_ms = q.filter.until_ms;
    admin_query_next(&q, 5, 0, cursor);
    q = good("/admin/usage", arena_printf(&arena, "by=branch&cursor=%s", cursor));
    assert_int_equal(q.skip, 10);
    assert_true(q.filter.until_ms == until_ms);
    q = good("/admin/usage", next("/admin/usage", "by=user&until=2026-11-22", 5, 0));
    assert_true(q.filter.until_ms == T0 - T0 % INT64_C(86400000));
    q = good("/admin/tokens", next("/admin/tokens", "by=status", 1, 0)); /* no times there */
    assert_int_equal(q.filter.until_ms, 0);
}

static void test_cursor_stays_with_its_query(void **state)
{
    static const char *const changed[] = {"company=b", "since=2d", "request_id=r", "until=1h"};
    const char *cursor = strstr(next("/admin/errors", "", 1, 9), "cursor=");
    (void)state;

    good("/admin/errors", cursor);
    good("/admin/errors", arena_printf(&arena, "limit=3&format=csv&%s", cursor));
    bad("/admin/retries", cursor, "begin again without it");
    for (size_t i = 0; i < COUNT(changed); i++)
        bad("/admin/errors", arena_printf(&arena, "%s&%s", changed[i], cursor), "cursor ");
    cursor = strstr(next("/admin/usage", "by=user", 1, 0), "cursor=");
    bad("/admin/usage", arena_printf(&arena, "by=branch&%s", cursor), "cursor ");
}

static void test_cursor_made_up(void **state)
{
    const char *whole = strstr(next("/admin/errors", "", 1, 9), "cursor=");
    struct {
        size_t at;
        char c;
    } changes[] = {{7, '\0'}, {8, 'G'}, {15, 'f'}, {30, 'A'}, {31, 'f'}, {47, 'f'}, {33, 'f'}};
    (void)state;

    for (size_t i = 0; i < COUNT(changes); i++) {
        char *made = arena_strdup(&arena, whole);
        made[changes[i].at] = changes[i].c;
        if (i == 0)
            good("/admin/errors", made);
        else
            bad("/admin/errors", made, "cursor ");
    }
    bad("/admin/errors", arena_printf(&arena, "%s0", whole), "cursor ");
    char *zero = arena_strdup(&arena, whole); /* position 0 */
    memset(zero + 15, '0', 16);
    bad("/admin/errors", zero, "cursor ");
    bad("/admin/usage", next("/admin/usage", "by=user", 1000001, 0), "cursor "); /* too far */
    good("/admin/usage", next("/admin/usage", "by=user", 1000000, 0));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_nothing, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_everything, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_views, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_refused, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_longest, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_formats, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_cursor_by_id, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_cursor_by_count, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_cursor_stays_with_its_query, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_cursor_made_up, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
