/* test_gauges.c - what /metrics says of the store: counted, kept for a while, and never waited for long. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "gauges.h"
#include "store_driver.h"

/* ---- a store that says what the test wants, or nothing ---- */

static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool open; /* false: pings wait */
    int pings, queries;
    enum err_code ping, tokens, reservations;
    int open_count, unsettled_count;
} far = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static void *far_open(const struct config *config, bool migrate, struct err *err)
{
    (void)config;
    (void)migrate;
    (void)err;
    return &far;
}

static void far_close(void *self)
{
    (void)self;
}

static int far_leaders(void *self)
{
    (void)self;
    return 1;
}

static enum err_code far_ping(void *self, struct err *err)
{
    (void)self;
    pthread_mutex_lock(&far.lock);
    far.pings++;
    pthread_cond_broadcast(&far.changed);
    while (!far.open)
        pthread_cond_wait(&far.changed, &far.lock);
    enum err_code code = err_set(err, far.ping, "%s", "");
    pthread_mutex_unlock(&far.lock);
    return code;
}

static struct store_value integer(int64_t n)
{
    return (struct store_value){.type = STORE_INTEGER, .integer = n};
}

static struct store_value text_value(const char *text)
{
    return (struct store_value){.type = STORE_TEXT, .text = text};
}

static enum err_code give_tokens(store_row *row, void *context, struct err *err)
{
    static const char *const names[] = {"Status", "Count", "Unlimited", "OverThreshold", "Cooling"};
    const struct store_value rows[][5] = {
        {text_value("Active"), integer(3), integer(9), integer(2), integer(1)},
        {text_value("active"), integer(1), integer(9), integer(0), integer(0)},
        {text_value("Exceeded"), integer(4), integer(9), integer(4), integer(0)},
        {text_value("On \"hold\""), integer(5), integer(9), {.type = STORE_NULL}, integer(0)},
        {{.type = STORE_NULL}, integer(6), integer(9), integer(0), integer(0)},
    };

    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        row(context, 5, names, rows[i]);
    return err_set(err, far.tokens, "%s", "");
}

static enum err_code far_query(void *self, enum store_view view, const struct store_filter *filter,
                               store_row *row, void *context, struct err *err)
{
    static const char *const names[] = {"ReservationID", "State"};
    (void)self;

    pthread_mutex_lock(&far.lock);
    far.queries++;
    pthread_cond_broadcast(&far.changed);
    pthread_mutex_unlock(&far.lock);
    if (view == VIEW_TOKENS_BY_STATUS)
        return give_tokens(row, context, err);
    assert_int_equal(view, VIEW_RESERVATIONS);
    assert_int_equal(filter->limit, GAUGES_ROWS_MAX);
    for (int i = 0; i < far.open_count + far.unsettled_count; i++) {
        const struct store_value values[] = {integer(i),
                                             text_value(i < far.open_count ? "open" : "unsettled")};
        row(context, 2, names, values);
    }
    return err_set(err, far.reservations, "%s", "");
}

static const struct store_driver far_driver = {.name = "fake",
                                               .open = far_open,
                                               .close = far_close,
                                               .leaders = far_leaders,
                                               .ping = far_ping,
                                               .query = far_query};

static void far_gate(bool open)
{
    pthread_mutex_lock(&far.lock);
    far.open = open;
    pthread_cond_broadcast(&far.changed);
    pthread_mutex_unlock(&far.lock);
}

static int far_pings(void)
{
    pthread_mutex_lock(&far.lock);
    int pings = far.pings;
    pthread_mutex_unlock(&far.lock);
    return pings;
}

/* ---- the gauges of such a store ---- */

static struct store *store;
static struct gauges *gauges;
static struct buf text;

#define LONG_MS 60000
#define IMPATIENT_MS 200

static int start(int64_t wait_ms, int64_t serve_ms)
{
    static char none[] = "", directory[] = "/nonexistent";
    const struct config config = {.server = {.state_dir = directory},
                                  .store = {.query_timeout_ms = 1000},
                                  .seal = {.key_file = none}};
    struct err err;

    far.open = true;
    far.pings = far.queries = far.open_count = far.unsettled_count = 0;
    far.ping = far.tokens = far.reservations = ERR_NONE;
    store = store_open_with(&far_driver, &config, &err);
    gauges = gauges_start(store, store, wait_ms, serve_ms, &err);
    return store == NULL || gauges == NULL;
}

static int set_up(void **state)
{
    (void)state;
    return start(LONG_MS, LONG_MS);
}

static int set_up_impatient(void **state)
{
    (void)state;
    return start(IMPATIENT_MS, LONG_MS);
}

static int set_up_impatient_and_forgetful(void **state)
{
    (void)state;
    return start(IMPATIENT_MS, 0);
}

static int set_up_forgetful(void **state)
{
    (void)state;
    return start(LONG_MS, 0);
}

static int tear_down(void **state)
{
    (void)state;
    gauges_stop(gauges);
    store_close(store);
    buf_reset(&text);
    return 0;
}

static const char *ask(void)
{
    buf_reset(&text);
    buf_init(&text, 1 << 20);
    buf_append_char(&text, '\n');
    gauges_write(gauges, &text);
    return buf_str(&text);
}

static void test_what_the_store_says(void **state)
{
    (void)state;
    far.open_count = 2;
    far.unsettled_count = 3;
    const char *said = ask();
    const char *const lines[] = {
        "extract_store_up 1",
        "extract_api_tokens{status=\"Active\"} 4",
        "extract_api_tokens{status=\"Expired\"} 0",
        "extract_api_tokens{status=\"Exceeded\"} 4",
        "extract_api_tokens{status=\"Disabled\"} 0",
        "extract_api_tokens{status=\"other\"} 11",
        "extract_api_tokens_over_threshold{status=\"Active\"} 2",
        "extract_api_tokens_over_threshold{status=\"other\"} 0",
        "extract_api_tokens_cooling{status=\"Active\"} 1",
        "extract_reservations{state=\"open\"} 2",
        "extract_reservations{state=\"unsettled\"} 3",
    };
    for (size_t i = 0; i < sizeof lines / sizeof lines[0]; i++) {
        char line[128];
        snprintf(line, sizeof line, "\n%s\n", lines[i]);
        if (strstr(said, line) == NULL)
            fail_msg("%s is missing in%s", lines[i], said);
    }
}

static void test_it_serves_for_a_while(void **state)
{
    (void)state;
    ask();
    far.open_count = 7;
    const char *said = ask();
    assert_non_null(strstr(said, "{state=\"open\"} 0\n"));
    assert_int_equal(far.pings, 1);
    assert_int_equal(far.queries, 2);
}

static void test_it_asks_again_after_that(void **state)
{
    (void)state;
    ask();
    far.open_count = 7;
    assert_non_null(strstr(ask(), "{state=\"open\"} 7\n"));
    assert_int_equal(far.pings, 2);
    far.ping = ERR_STORE_UNAVAILABLE;
    assert_null(strstr(ask(), "extract_reservations"));
}

static void test_a_store_that_is_away(void **state)
{
    (void)state;
    far.ping = ERR_STORE_UNAVAILABLE;
    const char *said = ask();
    assert_non_null(strstr(said, "\nextract_store_up 0\n"));
    assert_null(strstr(said, "extract_api_tokens"));
    assert_null(strstr(said, "extract_reservations"));
    assert_int_equal(far.queries, 0);
}

static void test_a_view_that_fails(void **state)
{
    (void)state;
    far.tokens = ERR_STORE_UNAVAILABLE;
    const char *said = ask();
    assert_non_null(strstr(said, "\nextract_store_up 1\n"));
    assert_null(strstr(said, "extract_api_tokens"));
    assert_non_null(strstr(said, "extract_reservations"));
}

static void far_await_queries(int n)
{
    pthread_mutex_lock(&far.lock);
    while (far.queries < n)
        pthread_cond_wait(&far.changed, &far.lock);
    pthread_mutex_unlock(&far.lock);
}

/* The first who asks waits as long as the store may take, the others not at all (each would otherwise add
 * to the time after which the alarm ends the tests), and the store is not asked again before it has
 * answered. What it says then is too late. */
static void test_a_store_that_hangs(void **state)
{
    (void)state;
    far_gate(false);
    int64_t begun = clock_monotonic_ms();
    assert_non_null(strstr(ask(), "\nextract_store_up 0\n"));
    assert_true(clock_monotonic_ms() - begun >= IMPATIENT_MS);
    for (int i = 0; i < 1000; i++)
        assert_null(strstr(ask(), "extract_api_tokens"));
    assert_int_equal(far_pings(), 1);
    far_gate(true);
    far_await_queries(2);
    for (int i = 0; i < 20000; i++)
        assert_non_null(strstr(ask(), "\nextract_store_up 0\n"));
}

/* What it had said before serves no longer, either. */
static void test_a_store_that_begins_to_hang(void **state)
{
    (void)state;
    while (strstr(ask(), "\nextract_store_up 1\n") == NULL) /* a busy machine */
        ;
    far_gate(false);
    const char *said = ask();
    assert_non_null(strstr(said, "\nextract_store_up 0\n"));
    assert_null(strstr(said, "extract_api_tokens"));
    far_gate(true);
}

static void *ask_once(void *out)
{
    gauges_write(gauges, out);
    return NULL;
}

static void test_who_asks_together_is_served_together(void **state)
{
    enum { ASKING = 8 };
    pthread_t threads[ASKING];
    struct buf answers[ASKING];
    (void)state;

    far_gate(false);
    for (int i = 0; i < ASKING; i++) {
        buf_init(&answers[i], 1 << 20);
        assert_int_equal(pthread_create(&threads[i], NULL, ask_once, &answers[i]), 0);
    }
    pthread_mutex_lock(&far.lock);
    while (far.pings == 0)
        pthread_cond_wait(&far.changed, &far.lock);
    pthread_mutex_unlock(&far.lock);
    far_gate(true);
    for (int i = 0; i < ASKING; i++) {
        pthread_join(threads[i], NULL);
        buf_reset(&answers[i]);
    }
    assert_int_equal(far.pings, 1);
    assert_int_equal(far.queries, 2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_what_the_store_says, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_it_serves_for_a_while, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_it_asks_again_after_that, set_up_forgetful, tear_down),
        cmocka_unit_test_setup_teardown(test_a_store_that_is_away, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_a_view_that_fails, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_a_store_that_hangs, set_up_impatient, tear_down),
        cmocka_unit_test_setup_teardown(test_a_store_that_begins_to_hang,
                                        set_up_impatient_and_forgetful, tear_down),
        cmocka_unit_test_setup_teardown(test_who_asks_together_is_served_together, set_up,
                                        tear_down),
    };
    alarm(120);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
