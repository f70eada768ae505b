/* test_record.c - log entries as they are made, and their way to the store or to standard error. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "log.h"
#include "metrics.h"
#include "record.h"
#include "store_driver.h"

/* ---- a store that keeps what it is given, or fails ---- */

#define KEPT_MAX 20000

static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool open;           /* false: calls wait */
    int inside;          /* calls that wait */
    enum err_code fails; /* each call's verdict */
    int64_t fails_until_ms;
    const char *refuses; /* a message that is refused, with the whole batch */
    char *messages[KEPT_MAX];
    enum log_level levels[KEPT_MAX];
    size_t message_count, attempt_count;
    struct store_retry_attempt last_attempt;
    size_t calls, again_calls, most_entries, most_attempts;
} far = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static void far_reset(void)
{
    for (size_t i = 0; i < far.message_count; i++)
        free(far.messages[i]);
    far.open = true;
    far.inside = 0;
    far.fails = ERR_NONE;
    far.fails_until_ms = 0;
    far.refuses = NULL;
    far.message_count = far.attempt_count = far.calls = far.again_calls = 0;
    far.most_entries = far.most_attempts = 0;
}

static void far_fail(enum err_code code, int64_t for_ms)
{
    pthread_mutex_lock(&far.lock);
    far.fails = code;
    far.fails_until_ms = for_ms == 0 ? 0 : clock_monotonic_ms() + for_ms;
    pthread_mutex_unlock(&far.lock);
}

static enum err_code far_verdict(struct log_entry *const *entries, size_t count, struct err *err)
{
    if (far.fails != ERR_NONE &&
        (far.fails_until_ms == 0 || clock_monotonic_ms() < far.fails_until_ms))
        return err_set(err, far.fails, "the store says no");
    for (size_t i = 0; far.refuses != NULL && i < count; i++)
        if (strcmp(entries[i]->message, far.refuses) == 0)
            return err_set(err, ERR_BAD_VALUE, "one is refused");
    return ERR_NONE;
}

static enum err_code far_record(void *self, struct log_entry *const *entries, size_t entry_count,
                                const struct store_retry_attempt *const *attempts,
                                size_t attempt_count, bool again, struct err *err)
{
    (void)self;
    pthread_mutex_lock(&far.lock);
    far.calls++;
    far.again_calls += again;
    far.inside++;
    pthread_cond_broadcast(&far.changed);
    while (!far.open)
        pthread_cond_wait(&far.changed, &far.lock);
    far.inside--;
    if (entry_count > far.most_entries)
        far.most_entries = entry_count;
    if (attempt_count > far.most_attempts)
        far.most_attempts = attempt_count;
    enum err_code code = far_verdict(entries, entry_count, err);
    for (size_t i = 0; code == ERR_NONE && i < entry_count; i++) {
        far.levels[far.message_count] = entries[i]->level;
        far.messages[far.message_count++] = strdup(entries[i]->message);
    }
    for (size_t i = 0; code == ERR_NONE && i < attempt_count; i++) {
        far.last_attempt = *attempts[i];
        far.attempt_count++;
    }
    pthread_mutex_unlock(&far.lock);
    return code;
}

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

static const struct store_driver far_driver = {.name = "fake",
                                               .open = far_open,
                                               .close = far_close,
                                               .leaders = far_leaders,
                                               .record = far_record};

static void far_gate(bool open)
{
    pthread_mutex_lock(&far.lock);
    far.open = open;
    pthread_cond_broadcast(&far.changed);
    pthread_mutex_unlock(&far.lock);
}

static void far_await_inside(void)
{
    pthread_mutex_lock(&far.lock);
    while (far.inside == 0)
        pthread_cond_wait(&far.changed, &far.lock);
    pthread_mutex_unlock(&far.lock);
}

/* ---- standard error, caught in a file ---- */

static char caught[1 << 22];
static int real_stderr = -1;

static void catch_stderr(void)
{
    FILE *file = tmpfile();

    assert_non_null(file);
    fflush(stderr);
    real_stderr = dup(STDERR_FILENO);
    assert_int_equal(dup2(fileno(file), STDERR_FILENO), STDERR_FILENO);
    fclose(file);
    fcntl(STDERR_FILENO, F_SETFL, fcntl(STDERR_FILENO, F_GETFL) | O_APPEND);
}

/* Ends it: what was written is in caught. */
static void release_stderr(void)
{
    ssize_t n = pread(STDERR_FILENO, caught, sizeof caught - 1, 0);

    dup2(real_stderr, STDERR_FILENO);
    close(real_stderr);
    assert_true(n >= 0);
    caught[n] = '\0';
}

static size_t count_lines(const char *text)
{
    size_t n = 0;
    for (; *text != '\0'; text++)
        n += *text == '\n';
    return n;
}

/* ---- log.c ---- */

static struct log_entry *last_entry;

static void keep_entry(struct log_entry *take_entry, void *context)
{
    assert_ptr_equal(context, &last_entry);
    free(last_entry);
    last_entry = take_entry;
}

static void forget_entry(void)
{
    log_set_sink(NULL, NULL);
    free(last_entry);
    last_entry = NULL;
}

static void test_entry_is_whole(void **state)
{
    (void)state;
    log_set_sink(keep_entry, &last_entry);
    int64_t before_ms = clock_wall_ms();
    log_write(LOG_ERROR, "fcgi-app/gemini.c", 123, "gemini_call", "the-id", NULL,
              "cause: deeper\nline", "answer %d: caf\xC3\xA9 \x1B[0m \xFF\\", 7);
    assert_non_null(last_entry);
    assert_string_equal(last_entry->logger, "gemini");
    assert_string_equal(last_entry->module, "gemini.c");
    assert_string_equal(last_entry->function, "gemini_call");
    assert_int_equal(last_entry->line, 123);
    assert_int_equal(last_entry->level, LOG_ERROR);
    assert_string_equal(last_entry->request_id, "the-id");
    assert_string_equal(last_entry->message, "answer 7: caf\xC3\xA9 \\x1B[0m \\xFF\\\\");
    assert_string_equal(last_entry->exception, "cause: deeper\\nline");
    assert_in_range(last_entry->wall_ms, before_ms, clock_wall_ms());
    assert_null(last_entry->trace_id);
    LOG_TRACED(LOG_WARNING, "the-id", "the-trace", "cause", "message");
    assert_string_equal(last_entry->request_id, "the-id");
    assert_string_equal(last_entry->trace_id, "the-trace");
    assert_string_equal(last_entry->exception, "cause");
    assert_string_equal(last_entry->message, "message");
    log_info(NULL, "plain");
    assert_null(last_entry->request_id);
    assert_null(last_entry->trace_id);
    assert_null(last_entry->exception);
    assert_string_equal(last_entry->logger, "test_record");
    forget_entry();
}

static void test_long_texts_are_cut(void **state)
{
    char text[20001];
    (void)state;

    log_set_sink(keep_entry, &last_entry);
    memset(text, 'x', sizeof text);
    memcpy(text + 3998, "\xE2\x82\xAC", 3); /* a euro sign across the limit */
    text[sizeof text - 1] = '\0';
    log_error(NULL, text, "%s", text);
    assert_int_equal(strlen(last_entry->message), 3998);
    assert_int_equal(strlen(last_entry->exception), 16000);
    memset(text, '\x01', sizeof text - 1); /* four bytes each, escaped */
    log_error(NULL, text, "y%s", text);
    assert_int_equal(strlen(last_entry->message), 3997);
    assert_string_equal(last_entry->message + 3997 - 4, "\\x01");
    assert_int_equal(strlen(last_entry->exception), 16000);
    memset(text, 'z', 4000);
    text[4000] = '\0';
    log_error(NULL, NULL, "%s", text);
    assert_int_equal(strlen(last_entry->message), 4000);
    forget_entry();
}

static void test_level_filters(void **state)
{
    (void)state;
    log_set_sink(keep_entry, &last_entry);
    log_debug(NULL, "too low");
    assert_null(last_entry);
    log_set_level(LOG_ERROR);
    log_warning(NULL, NULL, "too low");
    assert_null(last_entry);
    log_error(NULL, NULL, "high enough");
    assert_non_null(last_entry);
    log_set_level(LOG_INFO);
    forget_entry();
    assert_string_equal(log_level_name(LOG_CRITICAL), "CRITICAL");
}

static void test_line_on_stderr(void **state)
{
    (void)state;
    catch_stderr();
    log_write(LOG_ERROR, "gemini.c", 123, "gemini_call", "request-id", NULL, "exception",
              "message");
    log_write(LOG_INFO, "gemini.c", 124, "gemini_call", NULL, NULL, NULL, "another");
    release_stderr();
    char *second = strchr(caught, '\n');
    assert_non_null(second);
    *second++ = '\0';
    assert_int_equal(caught[10], 'T'); /* 2026-11-22T12:13:21.123Z */
    assert_string_equal(caught + 23,
                        "Z ERROR gemini gemini.c:123 gemini_call [request-id] message: exception");
    assert_string_equal(second + 23, "Z INFO gemini gemini.c:124 gemini_call another\n");
}

/* ---- record.c ---- */

static struct store *store;
static struct recorder *recorder;

static char directory[64];

static int set_up_in(const char *state_dir)
{
    struct config config = {.server = {.state_dir = (char *)(uintptr_t)state_dir},
                            .seal = {.key_file = (char *)(uintptr_t) ""}};
    struct err err;

    far_reset();
    store = store_open_with(&far_driver, &config, &err);
    assert_non_null(store);
    recorder = recorder_start(store, &err);
    assert_non_null(recorder);
    log_set_sink(recorder_log, recorder);
    return 0;
}

/* Without a state_dir, and so without an outbox. */
static int set_up(void **state)
{
    (void)state;
    return set_up_in("");
}

static int set_up_with_outbox(void **state)
{
    (void)state;
    snprintf(directory, sizeof directory, "/tmp/test_record.XXXXXX");
    return mkdtemp(directory) == NULL ? -1 : set_up_in(directory);
}

static int tear_down(void **state)
{
    (void)state;
    recorder_stop(recorder, 10000);
    store_close(store);
    far_reset();
    return 0;
}

static int tear_down_with_outbox(void **state)
{
    static const char *const names[] = {"outbox.db", "outbox.db-wal", "outbox.db-shm",
                                        "outbox.lock"};
    char path[128];

    tear_down(state);
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        snprintf(path, sizeof path, "%s/%s", directory, names[i]);
        unlink(path);
    }
    return rmdir(directory);
}

static struct store_retry_attempt an_attempt(int number)
{
    return (struct store_retry_attempt){.token_id = 42,
                                        .wall_ms = 1000,
                                        .attempt = number,
                                        .is_retryable = true,
                                        .status_code = 503,
                                        .delay_ms = 1500,
                                        .request_id = "the-request",
                                        .company_id = "NT047",
                                        .error_message = "overloaded"};
}

static void test_order_and_batches(void **state)
{
    char expected[32];
    (void)state;

    far_gate(false);
    log_info(NULL, "entry 0");
    far_await_inside();
    for (int i = 1; i <= 1000; i++)
        log_info(NULL, "entry %d", i);
    for (int i = 1; i <= 100; i++) {
        struct store_retry_attempt attempt = an_attempt(i);
        recorder_retry(recorder, &attempt);
    }
    far_gate(true);
    recorder_flush(recorder);
    assert_int_equal(far.message_count, 1001);
    for (int i = 0; i <= 1000; i++) {
        snprintf(expected, sizeof expected, "entry %d", i);
        assert_string_equal(far.messages[i], expected);
    }
    assert_int_equal(far.attempt_count, 100);
    assert_int_equal(far.last_attempt.attempt, 100);
    assert_string_equal(far.last_attempt.company_id, "NT047");
    assert_int_equal(far.most_entries, 256);
    assert_int_equal(far.most_attempts, 64);
    assert_int_equal(far.calls, 1 + 4);
}

static void test_what_comes_together_is_written_together(void **state)
{
    (void)state;
    log_info(NULL, "first");
    recorder_flush(recorder);
    for (int i = 0; i < 10; i++) {
        usleep(1000);
        log_info(NULL, "entry %d", i);
    }
    while (true) { /* without a flush, which would cut the gathering short */
        pthread_mutex_lock(&far.lock);
        size_t count = far.message_count;
        pthread_mutex_unlock(&far.lock);
        if (count == 11)
            break;
        usleep(1000);
    }
    assert_in_range(far.calls, 2, 6);
}

static void test_store_away_goes_to_stderr(void **state)
{
    struct store_retry_attempt attempt = an_attempt(2);
    (void)state;

    catch_stderr();
    far_fail(ERR_STORE_UNAVAILABLE, 0);
    int64_t start_ms = clock_monotonic_ms();
    log_error("the-request", "why", "lost");
    recorder_retry(recorder, &attempt);
    recorder_flush(recorder);
    assert_in_range(clock_monotonic_ms() - start_ms, 2000, 6000); /* it was offered for 2 s */
    assert_true(far.calls >= 5);
    /* After that, no batch waits as long. */
    start_ms = clock_monotonic_ms();
    log_info(NULL, "lost as well");
    recorder_flush(recorder);
    assert_true(clock_monotonic_ms() - start_ms < 1000);
    /* And when the store is back it has them again. */
    far_fail(ERR_NONE, 0);
    log_info(NULL, "kept");
    recorder_flush(recorder);
    release_stderr();
    assert_non_null(strstr(caught, "[the-request] lost: why\n"));
    assert_non_null(strstr(caught, "lost as well\n"));
    assert_non_null(strstr(caught, "[the-request] attempt 2 of company NT047 with token 42 failed: "
                                   "status 503, retryable, next after 1500 ms: overloaded\n"));
    assert_non_null(strstr(caught, "1970-01-01T00:00:01.000Z WARNING record"));
    assert_non_null(strstr(caught, "the store says no"));
    assert_null(strstr(caught, "kept"));
    assert_int_equal(far.message_count, 1);
    assert_string_equal(far.messages[0], "kept");
}

/* Not what lies between the members. */
static bool is_same(const struct store_retry_attempt *a, const struct store_retry_attempt *b)
{
    return a->token_id == b->token_id && a->wall_ms == b->wall_ms && a->attempt == b->attempt &&
           a->is_retryable == b->is_retryable && a->status_code == b->status_code &&
           a->delay_ms == b->delay_ms && strcmp(a->request_id, b->request_id) == 0 &&
           strcmp(a->company_id, b->company_id) == 0 &&
           strcmp(a->error_message, b->error_message) == 0;
}

static void test_store_away_goes_to_the_outbox(void **state)
{
    struct store_retry_attempt attempt = an_attempt(2);
    struct store_outbox_status outbox;
    struct err err;
    int64_t replayed = 0;
    (void)state;

    catch_stderr();
    far_fail(ERR_STORE_UNAVAILABLE, 0);
    log_error("the-request", "why", "kept here");
    recorder_retry(recorder, &attempt);
    recorder_flush(recorder);
    assert_int_equal(far.again_calls, far.calls - 1); /* all but the first */
    assert_int_equal(store_outbox_status(store, &outbox, &err), ERR_NONE);
    assert_int_equal(outbox.records, 2);
    assert_int_equal(outbox.waiting, 0);
    far_fail(ERR_NONE, 0);
    size_t again_before = far.again_calls;
    assert_int_equal(store_outbox_drain(store, &replayed, &err), ERR_NONE);
    assert_int_equal(replayed, 2);
    assert_int_equal(far.again_calls, again_before + 1);
    release_stderr();
    assert_string_equal(caught, "");
    assert_int_equal(far.message_count, 1);
    assert_string_equal(far.messages[0], "kept here");
    assert_int_equal(far.attempt_count, 1);
    assert_true(is_same(&far.last_attempt, &attempt));
}

static void test_short_absence_loses_nothing(void **state)
{
    (void)state;
    catch_stderr();
    far_fail(ERR_STORE_UNAVAILABLE, 300);
    log_info(NULL, "patient");
    recorder_flush(recorder);
    release_stderr();
    assert_string_equal(caught, "");
    assert_int_equal(far.message_count, 1);
}

static void test_refused_entry_goes_alone(void **state)
{
    struct store_retry_attempt attempt = an_attempt(1);
    (void)state;

    catch_stderr();
    far_gate(false);
    far.refuses = "bad";
    log_info(NULL, "first");
    far_await_inside();
    log_info(NULL, "good");
    log_info(NULL, "bad");
    log_info(NULL, "good too");
    recorder_retry(recorder, &attempt);
    far_gate(true);
    recorder_flush(recorder);
    release_stderr();
    assert_int_equal(far.message_count, 3);
    assert_string_equal(far.messages[2], "good too");
    assert_int_equal(far.attempt_count, 1);
    assert_int_equal(count_lines(caught), 1);
    assert_non_null(strstr(caught, "bad\n"));
}

static long long dropped_so_far(void)
{
    static const char series[] = "\nextract_log_entries_dropped_total ";
    struct buf text;

    buf_init(&text, 1 << 20);
    metrics_write(&text);
    const char *at = strstr(buf_str(&text), series);
    long long n = at == NULL ? -1 : strtoll(at + sizeof series - 1, NULL, 10);
    buf_reset(&text);
    return n;
}

static void test_full_queue_counts_and_says_so(void **state)
{
    long long before = dropped_so_far();
    enum { SENT = 9000, ATTEMPTS = 2100 };
    long long dropped = 0, dropped_attempts = 0;
    int notes = 0;
    (void)state;

    far_gate(false);
    log_info(NULL, "first");
    far_await_inside();
    for (int i = 0; i < SENT; i++)
        log_info(NULL, "entry %d", i);
    for (int i = 0; i < ATTEMPTS; i++) {
        struct store_retry_attempt attempt = an_attempt(i);
        recorder_retry(recorder, &attempt);
    }
    far_gate(true);
    recorder_flush(recorder);
    for (size_t i = 0; i < far.message_count; i++)
        if (far.levels[i] == LOG_WARNING) {
            notes++;
            assert_int_equal(sscanf(far.messages[i],
                                    "%lld log entries and %lld retry attempts were dropped",
                                    &dropped, &dropped_attempts),
                             2);
        }
    assert_int_equal(notes, 1);
    assert_int_equal(dropped, SENT - 8192);
    assert_int_equal(dropped_attempts, ATTEMPTS - 2048);
    assert_int_equal(dropped_so_far() - before, dropped + dropped_attempts);
    assert_int_equal((long long)far.message_count - notes + dropped, 1 + SENT);
    assert_int_equal((long long)far.attempt_count + dropped_attempts, ATTEMPTS);
}

static void test_stop_writes_the_rest(void **state)
{
    struct err err;
    (void)state;

    for (int i = 0; i < 600; i++)
        log_info(NULL, "entry %d", i);
    recorder_stop(recorder, 10000);
    assert_int_equal(far.message_count, 600);
    /* The log is back on standard error. */
    catch_stderr();
    log_info(NULL, "after");
    release_stderr();
    assert_non_null(strstr(caught, "after\n"));
    recorder = recorder_start(store, &err);
    assert_non_null(recorder);
}

static void test_stop_without_store_ends_in_time(void **state)
{
    struct err err;
    (void)state;

    catch_stderr();
    far_fail(ERR_STORE_UNAVAILABLE, 0);
    int64_t start_ms = clock_monotonic_ms();
    for (int i = 0; i < 600; i++)
        log_info(NULL, "entry %d", i);
    recorder_stop(recorder, 300);
    assert_true(clock_monotonic_ms() - start_ms < 1500);
    release_stderr();
    assert_int_equal(far.message_count, 0);
    assert_non_null(strstr(caught, "entry 0\n"));
    assert_non_null(strstr(caught, "entry 599\n"));
    recorder = recorder_start(store, &err);
    assert_non_null(recorder);
}

#define THREADS 8
#define EACH 500

static void *log_many(void *arg)
{
    for (int i = 0; i < EACH; i++) {
        struct store_retry_attempt attempt = an_attempt(i);
        log_info(NULL, "thread %d entry %d", *(int *)arg, i);
        if (i % 4 == 0)
            recorder_retry(recorder, &attempt);
        if (i % 100 == 0)
            recorder_flush(recorder);
    }
    return NULL;
}

static void test_many_threads(void **state)
{
    pthread_t threads[THREADS];
    int numbers[THREADS], next[THREADS] = {0};
    (void)state;

    for (int i = 0; i < THREADS; i++) {
        numbers[i] = i;
        assert_int_equal(pthread_create(&threads[i], NULL, log_many, &numbers[i]), 0);
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    recorder_flush(recorder);
    assert_int_equal(far.message_count, THREADS * EACH);
    assert_int_equal(far.attempt_count, THREADS * EACH / 4);
    for (size_t i = 0; i < far.message_count; i++) {
        int thread = 0, entry = -1;
        assert_int_equal(sscanf(far.messages[i], "thread %d entry %d", &thread, &entry), 2);
        assert_int_equal(entry, next[thread]++); /* each thread's own order */
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_entry_is_whole),
        cmocka_unit_test(test_long_texts_are_cut),
        cmocka_unit_test(test_level_filters),
        cmocka_unit_test(test_line_on_stderr),
        cmocka_unit_test_setup_teardown(test_order_and_batches, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_what_comes_together_is_written_together, set_up,
                                        tear_down),
        cmocka_unit_test_setup_teardown(test_store_away_goes_to_stderr, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_store_away_goes_to_the_outbox, set_up_with_outbox,
                                        tear_down_with_outbox),
        cmocka_unit_test_setup_teardown(test_short_absence_loses_nothing, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_refused_entry_goes_alone, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_full_queue_counts_and_says_so, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_stop_writes_the_rest, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_stop_without_store_ends_in_time, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_many_threads, set_up, tear_down),
    };
    alarm(120); /* a lost wake-up shall fail, not hang */
    return cmocka_run_group_tests(tests, NULL, NULL);
}
