/* test_outbox.c - what could not reach the store: kept, replayed once, in order, or put where people
 * see it. First the outbox alone, then a store whose driver fails. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sqlite3.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "batch.h"
#include "clock.h"
#include "log.h"
#include "metrics.h"
#include "outbox.h"
#include "store_driver.h"

static char directory[64];

static const char *in_directory(const char *name)
{
    static char path[512];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return path;
}

static int set_up(void **state)
{
    (void)state;
    snprintf(directory, sizeof directory, "/tmp/test_outbox.XXXXXX");
    return mkdtemp(directory) == NULL;
}

static int tear_down(void **state)
{
    static const char *const names[] = {"outbox.db", "outbox.db-wal", "outbox.db-shm",
                                        "outbox.lock"};
    (void)state;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        unlink(in_directory(names[i]));
    return rmdir(directory);
}

static struct outbox *open_outbox(void)
{
    struct err err = {.message = ""};
    struct outbox *outbox = outbox_open(directory, &err);
    if (outbox == NULL)
        fail_msg("%s", err.message);
    return outbox;
}

/* Log entries, counted by level. */
static atomic_int logged[LOG_CRITICAL + 1];

static void count_entry(struct log_entry *take_entry, void *context)
{
    (void)context;
    atomic_fetch_add(&logged[take_entry->level], 1);
    free(take_entry);
}

/* Text may be set in a test; nothing writes through it. */
static struct store_settlement a_settlement(const char *request_id)
{
    return (struct store_settlement){.request_id = request_id,
                                     .token_id = 42,
                                     .company_id = "NT047",
                                     .branch = "",
                                     .requested_by = "J\xC3\xBCrgen \"J\"",
                                     .token_source = "store",
                                     .request_count = 1,
                                     .usage = {.input_tokens = 10, .total_tokens = 11}};
}

static struct store_acquire a_reservation(const char *request_id)
{
    return (struct store_acquire){.request_id = request_id,
                                  .sequence = 1,
                                  .company_id = "NT047",
                                  .branch = "Main",
                                  .requested_by = "anna",
                                  .estimate_tokens = 8000,
                                  .expires_ms = 300000,
                                  .api_key = "AIzaVerySecret"};
}

static void append(struct outbox *outbox, const char *request_id)
{
    struct store_settlement s = a_settlement(request_id);
    assert_int_equal(outbox_append_settlement(outbox, &s, NULL), ERR_NONE);
}

static struct store_outbox_status status_of(struct outbox *outbox)
{
    struct store_outbox_status status;
    assert_int_equal(outbox_status(outbox, &status, NULL), ERR_NONE);
    return status;
}

/* Runs SQL on the file and returns the first column of the first row. */
static char *sql(const char *text)
{
    static char result[512];
    sqlite3 *db;
    sqlite3_stmt *statement;

    assert_int_equal(sqlite3_open(in_directory("outbox.db"), &db), SQLITE_OK);
    assert_int_equal(sqlite3_prepare_v2(db, text, -1, &statement, NULL), SQLITE_OK);
    result[0] = '\0';
    if (sqlite3_step(statement) == SQLITE_ROW)
        snprintf(result, sizeof result, "%s", (const char *)sqlite3_column_text(statement, 0));
    sqlite3_finalize(statement);
    sqlite3_close(db);
    return result;
}

/* ---- replaying into memory ---- */

#define TAKEN_MAX 4096
#define RECORDS_KEPT 8

/* What the store was given, by request, and its verdicts. */
static struct taken {
    char ids[TAKEN_MAX][UUID_TEXT_SIZE];
    int count;
    const char *fails; /* a request whose entry gets this verdict */
    enum err_code verdict;
    struct store_settlement settlement; /* the last; its text is gone */
    struct store_acquire reservation;
    int stop_after;        /* go_on says no then; -1: never */
    struct outbox *second; /* drained from within */
    /* log entries and retry attempts */
    const char *refuses; /* a message that gets the verdict, with all that came with it */
    char messages[RECORDS_KEPT][32];
    size_t messages_count, attempts_count, calls;
    struct store_retry_attempt attempt;
} taken;

static void taken_reset(void)
{
    taken = (struct taken){.stop_after = -1};
}

static enum err_code take(const char *request_id, struct err *err)
{
    if (taken.second != NULL) {
        struct outbox_replay none = {0}; /* would crash if it were used */
        int64_t replayed = 99;
        assert_int_equal(outbox_drain(taken.second, &none, &replayed, NULL), ERR_NONE);
        assert_int_equal(replayed, 0);
    }
    if (taken.fails != NULL && strcmp(taken.fails, request_id) == 0)
        return err_set(err, taken.verdict, "verdict on %s", request_id);
    snprintf(taken.ids[taken.count++], UUID_TEXT_SIZE, "%s", request_id);
    return ERR_NONE;
}

static void (*check_settlement)(const struct store_settlement *s);
static void (*check_reservation)(const struct store_acquire *a);
static void (*check_log)(const struct log_entry *entry);

static enum err_code take_settlement(void *context, struct store_settlement *s, struct err *err)
{
    assert_ptr_equal(context, &taken);
    taken.settlement = *s;
    if (check_settlement != NULL)
        check_settlement(s);
    return take(s->request_id, err);
}

static enum err_code take_reservation(void *context, struct store_acquire *a, struct err *err)
{
    assert_ptr_equal(context, &taken);
    assert_true(a->fallback_only);
    taken.reservation = *a;
    if (check_reservation != NULL)
        check_reservation(a);
    return take(a->request_id, err);
}

static enum err_code take_records(void *context, struct log_entry *const *entries,
                                  size_t entry_count,
                                  const struct store_retry_attempt *const *attempts,
                                  size_t attempt_count, struct err *err)
{
    assert_ptr_equal(context, &taken);
    for (size_t i = 0; taken.refuses != NULL && i < entry_count; i++)
        if (strcmp(entries[i]->message, taken.refuses) == 0)
            return err_set(err, taken.verdict, "one is refused");
    taken.calls++;
    for (size_t i = 0; i < entry_count; i++)
        snprintf(taken.messages[taken.messages_count++ % RECORDS_KEPT], 32, "%s",
                 entries[i]->message);
    if (entry_count > 0 && check_log != NULL)
        check_log(entries[0]);
    if (attempt_count > 0)
        taken.attempt = *attempts[attempt_count - 1];
    taken.attempts_count += attempt_count;
    return ERR_NONE;
}

static bool go_on(void *context)
{
    assert_ptr_equal(context, &taken);
    return taken.stop_after < 0 || taken.count < taken.stop_after;
}

static const struct outbox_replay replay = {.settle = take_settlement,
                                            .reserve = take_reservation,
                                            .record = take_records,
                                            .go_on = go_on,
                                            .context = &taken};

static enum err_code drain(struct outbox *outbox, int64_t *replayed)
{
    struct err err = {.message = ""};
    return outbox_drain(outbox, &replay, replayed, &err);
}

/* ---- the outbox alone ---- */

static void check_whole_settlement(const struct store_settlement *s)
{
    assert_string_equal(s->request_id, "r1");
    assert_int_equal(s->token_id, INT64_C(9007199254740993)); /* beyond a double's integers */
    assert_string_equal(s->company_id, "NT\xC3\xA9");
    assert_string_equal(s->branch, "Main \"1\"");
    assert_string_equal(s->requested_by, "anna");
    assert_string_equal(s->client_key_id, "key-1");
    assert_string_equal(s->token_source, "fallback");
    assert_null(s->model);
    assert_int_equal(s->usage.input_tokens, 1);
    assert_int_equal(s->usage.output_tokens, 2);
    assert_int_equal(s->usage.text_prompt_tokens, 3);
    assert_int_equal(s->usage.image_prompt_tokens, 4);
    assert_int_equal(s->usage.text_candidates_tokens, 5);
    assert_int_equal(s->usage.thoughts_tokens, 6);
    assert_int_equal(s->usage.cached_tokens, 7);
    assert_int_equal(s->usage.total_tokens, 8);
    assert_int_equal(s->request_count, 9);
    assert_int_equal(s->unknown_calls, 10);
    assert_int_equal(s->duration_ms, 11);
    assert_int_equal(s->logged_ms, INT64_C(1795349601123));
    assert_int_equal(s->fault.fault, STORE_FAULT_DISABLE);
    assert_int_equal(s->fault.cooldown_ms, 12);
    assert_string_equal(s->fault.reason, "leaked");
    assert_string_equal(s->trace_id, "4bf92f3577b34da6a3ce929d0e0e4736");
}

static void check_whole_reservation(const struct store_acquire *a)
{
    assert_string_equal(a->request_id, "r2");
    assert_int_equal(a->sequence, 3);
    assert_string_equal(a->company_id, "NT047");
    assert_string_equal(a->branch, "Main");
    assert_string_equal(a->requested_by, "anna");
    assert_int_equal(a->estimate_tokens, 8000);
    assert_in_range(a->expires_ms, 290000, 300000);
    assert_string_equal(a->api_key, "");
}

static void test_nothing_is_lost_on_the_way(void **state)
{
    struct store_settlement s = {
        .request_id = "r1",
        .token_id = INT64_C(9007199254740993),
        .company_id = "NT\xC3\xA9",
        .branch = "Main \"1\"",
        .requested_by = "anna",
        .client_key_id = "key-1",
        .token_source = "fallback",
        .usage = {1, 2, 3, 4, 5, 6, 7, 8},
        .request_count = 9,
        .unknown_calls = 10,
        .duration_ms = 11,
        .logged_ms = INT64_C(1795349601123),
        .fault = {STORE_FAULT_DISABLE, 12, "leaked"},
        .trace_id = "4bf92f3577b34da6a3ce929d0e0e4736",
    };
    struct store_acquire a = a_reservation("r2");
    int64_t replayed = 0;
    (void)state;

    taken_reset();
    a.sequence = 3;
    struct outbox *outbox = open_outbox();
    assert_int_equal(outbox_append_settlement(outbox, &s, NULL), ERR_NONE);
    assert_int_equal(outbox_append_reservation(outbox, &a, NULL), ERR_NONE);
    assert_int_equal(status_of(outbox).waiting, 2);
    assert_true(status_of(outbox).oldest_ms > 0);
    assert_true(outbox_holds(outbox, "r2"));
    assert_false(outbox_holds(outbox, "r3"));
    check_settlement = check_whole_settlement;
    check_reservation = check_whole_reservation;
    assert_int_equal(drain(outbox, &replayed), ERR_NONE);
    check_settlement = NULL;
    check_reservation = NULL;
    assert_int_equal(replayed, 2);
    assert_int_equal(status_of(outbox).waiting, 0);
    assert_int_equal(status_of(outbox).oldest_ms, 0);
    assert_false(outbox_holds(outbox, "r2"));
    outbox_close(outbox);
}

static bool files_contain(const char *needle)
{
    static char content[1 << 20];
    bool found = false;
    struct dirent *entry;
    DIR *dir = opendir(directory);

    assert_non_null(dir);
    while ((entry = readdir(dir)) != NULL) {
        int fd = open(in_directory(entry->d_name), O_RDONLY);
        ssize_t n = read(fd, content, sizeof content);
        found = found || (n > 0 && memmem(content, (size_t)n, needle, strlen(needle)) != NULL);
        close(fd);
    }
    closedir(dir);
    return found;
}

static void test_no_key_and_no_other_reader(void **state)
{
    struct store_acquire a = a_reservation("r1");
    struct stat st;
    (void)state;

    struct outbox *outbox = open_outbox();
    assert_int_equal(outbox_append_reservation(outbox, &a, NULL), ERR_NONE);
    assert_true(files_contain("NT047"));
    assert_false(files_contain("AIzaVerySecret"));
    assert_int_equal(stat(in_directory("outbox.db"), &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    assert_int_equal(stat(in_directory("outbox.db-wal"), &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    assert_string_equal(sql("PRAGMA journal_mode"), "wal");
    outbox_close(outbox);
}

static void test_bad_directories(void **state)
{
    struct err err = {.message = ""};
    (void)state;

    assert_null(outbox_open("/nonexistent/directory", &err));
    assert_int_equal(err.code, ERR_CONFIG);
    assert_non_null(strstr(err.message, "/nonexistent/directory"));
    assert_null(outbox_open("", &err));
    assert_int_equal(err.code, ERR_CONFIG);
    assert_false(outbox_exists(directory));
    assert_int_equal(mkdir(in_directory("outbox.db"), 0700), 0);
    assert_null(outbox_open(directory, &err));
    assert_int_equal(err.code, ERR_CONFIG);
    assert_int_equal(rmdir(in_directory("outbox.db")), 0);
}

/* Runs body in a process of its own; returns its wait status. */
static int in_process(void (*body)(void))
{
    int status;
    pid_t pid = fork();

    if (pid == 0) {
        body();
        _exit(0);
    }
    assert_true(pid > 0);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return status;
}

static void append_and_die(void)
{
    struct store_settlement s = a_settlement("r1");
    struct outbox *outbox = outbox_open(directory, NULL);

    if (outbox == NULL || outbox_append_settlement(outbox, &s, NULL) != ERR_NONE)
        _exit(1);
    raise(SIGKILL);
}

static void test_survives_kill(void **state)
{
    int64_t replayed = 0;
    (void)state;

    taken_reset();
    int status = in_process(append_and_die);
    assert_true(WIFSIGNALED(status));
    assert_true(outbox_exists(directory));
    struct outbox *outbox = open_outbox();
    assert_int_equal(status_of(outbox).waiting, 1);
    assert_int_equal(drain(outbox, &replayed), ERR_NONE);
    assert_int_equal(replayed, 1);
    assert_string_equal(taken.ids[0], "r1");
    outbox_close(outbox);
}

/* Dies between the store's yes and the removal: the entry is replayed again. */
static enum err_code take_and_die(void *context, struct store_settlement *s, struct err *err)
{
    (void)context;
    (void)s;
    (void)err;
    raise(SIGKILL);
    return ERR_NONE;
}

static void drain_and_die(void)
{
    struct outbox_replay deadly = {.settle = take_and_die};
    struct outbox *outbox = outbox_open(directory, NULL);
    int64_t replayed;

    if (outbox == NULL || outbox_drain(outbox, &deadly, &replayed, NULL) == ERR_NONE)
        _exit(1);
}

static void test_killed_drainer_holds_nothing_up(void **state)
{
    int64_t replayed = 0;
    (void)state;

    taken_reset();
    struct outbox *outbox = open_outbox();
    append(outbox, "r1");
    assert_true(WIFSIGNALED(in_process(drain_and_die)));
    assert_int_equal(drain(outbox, &replayed), ERR_NONE);
    assert_int_equal(replayed, 1);
    outbox_close(outbox);
}

static void test_order_and_failure(void **state)
{
    struct store_acquire a = a_reservation("r2");
    int64_t replayed = 0;
    (void)state;

    taken_reset();
    struct outbox *outbox = open_outbox();
    append(outbox, "r1");
    assert_int_equal(outbox_append_reservation(outbox, &a, NULL), ERR_NONE);
    append(outbox, "r3");
    append(outbox, "r4");
    taken.fails = "r3";
    taken.verdict = ERR_STORE_UNAVAILABLE;
    assert_int_equal(drain(outbox, &replayed), ERR_STORE_UNAVAILABLE);
    assert_int_equal(replayed, 2);
    assert_int_equal(drain(outbox, &replayed), ERR_STORE_UNAVAILABLE);
    assert_int_equal(replayed, 0);
    assert_int_equal(status_of(outbox).waiting, 2);
    assert_string_equal(sql("SELECT Attempts FROM Outbox WHERE RequestID = 'r3'"), "2");
    assert_string_equal(sql("SELECT LastError FROM Outbox WHERE RequestID = 'r3'"),
                        "verdict on r3");
    assert_string_equal(sql("SELECT Attempts FROM Outbox WHERE RequestID = 'r4'"), "0");
    taken.fails = NULL;
    assert_int_equal(drain(outbox, &replayed), ERR_NONE);
    assert_int_equal(replayed, 2);
    for (int i = 0; i < 4; i++) {
        char expected[] = {'r', (char)('1' + i), '\0'};
        assert_string_equal(taken.ids[i], expected);
    }
    assert_int_equal(taken.count, 4);
    outbox_close(outbox);
}

static void test_refused_entry_dies(void **state)
{
    struct store_settlement s = a_settlement("r9");
    int64_t replayed = 0;
    (void)state;

    taken_reset();
    struct outbox *outbox = open_outbox();
    append(outbox, "r1");
    append(outbox, "r2");
    append(outbox, "r3");
    sql("UPDATE Outbox SET Payload = replace(Payload, '\"token_id\": 42', '\"token_id\": \"42\"') "
        "WHERE RequestID = 'r3'");
    append(outbox, "r4");
    sql("UPDATE Outbox SET Payload = 'not JSON' WHERE RequestID = 'r4'");
    append(outbox, "r6");
    sql("UPDATE Outbox SET Payload = replace(Payload, '\"branch\": \"\"', '\"branch\": 5') "
        "WHERE RequestID = 'r6'");
    append(outbox, "r7");
    sql("UPDATE Outbox SET Payload = replace(Payload, '\"unknown_calls\": 0', "
        "'\"unknown_calls\": 4294967296') WHERE RequestID = 'r7'");
    append(outbox, "r8");
    sql("UPDATE Outbox SET Payload = replace(Payload, '\"fault\": 0', '\"fault\": 4') "
        "WHERE RequestID = 'r8'");
    append(outbox, "ra");
    sql("UPDATE Outbox SET Payload = replace(Payload, '\"fault\": 0', '\"fault\": -1') "
        "WHERE RequestID = 'ra'");
    append(outbox, "rb");
    sql("UPDATE Outbox SET Payload = replace(Payload, 'NT047', 'NT047\\u0000') "
        "WHERE RequestID = 'rb'");
    append(outbox, "rc");
    sql("UPDATE Outbox SET Payload = replace(Payload, 'NT047', CAST(x'FF' AS TEXT)) "
        "WHERE RequestID = 'rc'");
    append(outbox, "r5");
    taken.fails = "r2";
    taken.verdict = ERR_BAD_VALUE;
    assert_int_equal(drain(outbox, &replayed), ERR_NONE);
    assert_int_equal(replayed, 2);
    assert_int_equal(taken.count, 2);
    assert_string_equal(taken.ids[1], "r5");
    assert_int_equal(status_of(outbox).waiting, 0);
    assert_int_equal(status_of(outbox).dead, 9);
    assert_string_equal(sql("SELECT LastError FROM OutboxDead WHERE RequestID = 'r2'"),
                        "verdict on r2");
    assert_string_equal(sql("SELECT TokenID FROM OutboxDead WHERE RequestID = 'r2'"), "42");
    assert_int_equal(outbox_append_dead(outbox, &s, "refused at once", NULL), ERR_NONE);
    assert_int_equal(status_of(outbox).dead, 10);
    assert_false(outbox_holds(outbox, "r9"));
    outbox_close(outbox);
}

/* Nobody's data, and yet it never gets through: it must not hold up the others for ever. */
static void test_internal_errors_kill_in_the_end(void **state)
{
    int64_t replayed = 0;
    (void)state;

    taken_reset();
    log_set_sink(count_entry, NULL);
    atomic_store(&logged[LOG_CRITICAL], 0);
    struct outbox *outbox = open_outbox();
    append(outbox, "r1");
    append(outbox, "r2");
    taken.fails = "r1";
    taken.verdict = ERR_STORE_UNAVAILABLE; /* however long: that is no fault of the entry */
    for (int i = 0; i < 50; i++)
        assert_int_equal(drain(outbox, &replayed), ERR_STORE_UNAVAILABLE);
    taken.verdict = ERR_INTERNAL;
    for (int i = 0; i < 19; i++) {
        assert_int_equal(drain(outbox, &replayed), ERR_INTERNAL);
        assert_int_equal(replayed, 0);
        assert_int_equal(status_of(outbox).dead, 0);
    }
    assert_int_equal(atomic_load(&logged[LOG_CRITICAL]), 0);
    assert_int_equal(drain(outbox, &replayed), ERR_NONE);
    assert_int_equal(replayed, 1); /* r2 */
    assert_int_equal(status_of(outbox).waiting, 0);
    assert_int_equal(status_of(outbox).dead, 1);
    assert_int_equal(atomic_load(&logged[LOG_CRITICAL]), 1);
    assert_string_equal(sql("SELECT LastError || Attempts FROM OutboxDead"), "verdict on r170");

    /* each entry has its own count; other codes wait for ever */
    append(outbox, "r3");
    taken.fails = "r3";
    for (int i = 0; i < 19; i++)
        assert_int_equal(drain(outbox, &replayed), ERR_INTERNAL);
    taken.fails = NULL;
    assert_int_equal(drain(outbox, &replayed), ERR_NONE);
    append(outbox, "r4");
    taken.fails = "r4";
    assert_int_equal(drain(outbox, &replayed), ERR_INTERNAL);
    taken.verdict = ERR_SCHEMA;
    for (int i = 0; i < 50; i++)
        assert_int_equal(drain(outbox, &replayed), ERR_SCHEMA);
    assert_int_equal(status_of(outbox).waiting, 1);
    assert_int_equal(status_of(outbox).dead, 1);
    outbox_close(outbox);
    log_set_sink(NULL, NULL);
}

/* The order is kept for each token; others do not wait for one that is stuck. */
static void test_other_tokens_pass_one_that_is_stuck(void **state)
{
    struct store_settlement other = a_settlement("r3");
    int64_t replayed = 0;
    (void)state;

    taken_reset();
    other.token_id = 43;
    struct outbox *outbox = open_outbox();
    append(outbox, "r1");
    append(outbox, "r2"); /* of the same token */
    assert_int_equal(outbox_append_settlement(outbox, &other, NULL), ERR_NONE);
    taken.fails = "r1";
    taken.verdict = ERR_INTERNAL;
    assert_int_equal(drain(outbox, &replayed), ERR_INTERNAL);
    assert_int_equal(replayed, 1);
    assert_string_equal(taken.ids[0], "r3");
    taken.fails = NULL;
    assert_int_equal(drain(outbox, &replayed), ERR_NONE);
    assert_int_equal(replayed, 2);
    assert_string_equal(taken.ids[1], "r1");
    assert_string_equal(taken.ids[2], "r2");
    outbox_close(outbox);
}

static void append_a_traced_log(struct outbox *outbox)
{
    struct log_entry entry = {.level = LOG_INFO,
                              .logger = "extract",
                              .message = "traced",
                              .module = "extract.c",
                              .function = "log_end",
                              .trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"};
    struct log_entry *const entries[] = {&entry};
    struct err err = {.message = ""};
    int64_t dropped = 0;

    assert_int_equal(outbox_append_records(outbox, entries, 1, NULL, 0, &dropped, &err), ERR_NONE);
}

static void check_no_trace(const struct store_settlement *s)
{
    assert_null(s->trace_id);
}

static void check_log_without_trace(const struct log_entry *e)
{
    assert_null(e->trace_id);
}

/* What an older version has left is read. */
static void test_members_that_came_later_may_be_missing(void **state)
{
    int64_t replayed = 0;
    (void)state;

    taken_reset();
    struct outbox *outbox = open_outbox();
    append(outbox, "r1");
    sql("UPDATE Outbox SET Payload = json_remove(Payload, '$.idempotency', '$.release_sequence',"
        " '$.trace_id')");
    append_a_traced_log(outbox);
    sql("UPDATE OutboxRecords SET Payload = json_remove(Payload, '$.trace_id')");
    check_settlement = check_no_trace;
    check_log = check_log_without_trace;
    assert_int_equal(drain(outbox, &replayed), ERR_NONE);
    check_settlement = NULL;
    check_log = NULL;
    assert_int_equal(replayed, 2);
    assert_string_equal(taken.messages[0], "traced");
    outbox_close(outbox);
}

/* ---- idempotency keys ---- */

static enum err_code reserve_with_key(struct outbox *outbox, const char *request_id,
                                      const char *company, const char *key, struct err *err)
{
    struct store_acquire a = a_reservation(request_id);

    a.company_id = company;
    a.idempotency_key = key;
    return outbox_append_reservation(outbox, &a, err);
}

static void test_an_idempotency_key_waits_once(void **state)
{
    struct store_settlement s = a_settlement("r1");
    struct err err = {.message = ""};
    int64_t replayed = 0;
    (void)state;

    taken_reset();
    struct outbox *outbox = open_outbox();
    assert_int_equal(reserve_with_key(outbox, "r1", "NT047", "k", &err), ERR_NONE);
    assert_int_equal(reserve_with_key(outbox, "r2", "nt047", "k", &err), ERR_REQUEST_IN_PROGRESS);
    assert_non_null(strstr(err.message, "Its request_id is r1."));
    assert_int_equal(reserve_with_key(outbox, "r1", "NT047", "k", &err), ERR_NONE); /* its own */
    assert_int_equal(reserve_with_key(outbox, "r3", "NT048", "k", &err), ERR_NONE);
    assert_int_equal(reserve_with_key(outbox, "r4", "NT047", "l", &err), ERR_NONE);
    assert_int_equal(reserve_with_key(outbox, "r5", "NT047", NULL, &err), ERR_NONE);
    assert_int_equal(outbox_append_settlement(outbox, &s, NULL), ERR_NONE);
    assert_int_equal(reserve_with_key(outbox, "r2", "NT047", "k", &err), ERR_ALREADY_PROCESSED);
    assert_int_equal(status_of(outbox).waiting, 6);
    assert_int_equal(drain(outbox, &replayed), ERR_NONE);
    assert_int_equal(reserve_with_key(outbox, "r2", "NT047", "k", &err), ERR_NONE);
    outbox_close(outbox);
}

/* ---- log entries and retry attempts ---- */

static struct log_entry a_log(const char *message)
{
    return (struct log_entry){.wall_ms = INT64_C(1795349601123),
                              .level = LOG_WARNING,
                              .logger = "gemini",
                              .message = message,
                              .module = "gemini.c",
                              .function = "gemini_call",
                              .line = 123};
}

static enum err_code append_logs(struct outbox *outbox, struct log_entry *first,
                                 struct log_entry *second,
                                 const struct store_retry_attempt *attempt, int64_t *dropped)
{
    struct log_entry *const entries[] = {first, second};
    const struct store_retry_attempt *const attempts[] = {attempt};
    struct err err = {.message = ""};

    return outbox_append_records(outbox, entries, second == NULL ? 1 : 2, attempts, attempt != NULL,
                                 dropped, &err);
}

static void check_whole_log(const struct log_entry *e)
{
    assert_int_equal(e->wall_ms, INT64_C(1795349601123));
    assert_int_equal(e->level, LOG_WARNING);
    assert_string_equal(e->logger, "gemini");
    assert_string_equal(e->message, "one \"quoted\" \\n");
    assert_string_equal(e->exception, "the cause");
    assert_string_equal(e->module, "gemini.c");
    assert_string_equal(e->function, "gemini_call");
    assert_int_equal(e->line, 123);
    assert_string_equal(e->request_id, "r1");
    assert_string_equal(e->trace_id, "4bf92f3577b34da6a3ce929d0e0e4736");
}

static void test_records_come_back_whole(void **state)
{
    struct log_entry one = a_log("one \"quoted\" \\n"), two = a_log("two");
    const struct store_retry_attempt attempt = {.token_id = INT64_C(9007199254740993),
                                                .wall_ms = INT64_C(1795349601124),
                                                .attempt = 2,
                                                .is_retryable = true,
                                                .status_code = 503,
                                                .delay_ms = 1500,
                                                .request_id = "r1",
                                                .company_id = "NT\xC3\xA9",
                                                .error_message = "overloaded"};
    int64_t replayed = 0, dropped = 99;
    (void)state;

    taken_reset();
    one.exception = "the cause";
    one.request_id = "r1";
    one.trace_id = "4bf92f3577b34da6a3ce929d0e0e4736";
    struct outbox *outbox = open_outbox();
    append(outbox, "r1");
    assert_int_equal(append_logs(outbox, &one, &two, &attempt, &dropped), ERR_NONE);
    assert_int_equal(dropped, 0);
    assert_int_equal(status_of(outbox).waiting, 1);
    assert_int_equal(status_of(outbox).records, 3);
    check_log = check_whole_log;
    assert_int_equal(drain(outbox, &replayed), ERR_NONE);
    check_log = NULL;
    assert_int_equal(replayed, 4);
    assert_int_equal(taken.calls, 1); /* together */
    assert_string_equal(taken.messages[1], "two");
    assert_int_equal(taken.attempts_count, 1);
    assert_memory_equal(&taken.attempt, &attempt, sizeof attempt);
    assert_int_equal(status_of(outbox).records, 0);
    outbox_close(outbox);
}

static void test_records_wait_for_the_store(void **state)
{
    struct log_entry one = a_log("one"), two = a_log("two");
    int64_t replayed = 0, dropped = 0;
    (void)state;

    taken_reset();
    struct outbox *outbox = open_outbox();
    assert_int_equal(append_logs(outbox, &one, &two, NULL, &dropped), ERR_NONE);
    taken.refuses = "two";
    taken.verdict = ERR_STORE_UNAVAILABLE;
    for (int i = 0; i < 30; i++)
        assert_int_equal(drain(outbox, &replayed), ERR_STORE_UNAVAILABLE);
    assert_int_equal(status_of(outbox).records, 2);
    taken.refuses = NULL;
    assert_int_equal(drain(outbox, &replayed), ERR_NONE);
    assert_int_equal(replayed, 2);
    outbox_close(outbox);
}

static void test_a_refused_record_goes_alone(void **state)
{
    struct log_entry one = a_log("one"), two = a_log("two"), three = a_log("three");
    int64_t replayed = 0, dropped = 0;
    (void)state;

    taken_reset();
    log_set_sink(count_entry, NULL);
    atomic_store(&logged[LOG_ERROR], 0);
    struct outbox *outbox = open_outbox();
    assert_int_equal(append_logs(outbox, &one, &two, NULL, &dropped), ERR_NONE);
    assert_int_equal(append_logs(outbox, &three, NULL, NULL, &dropped), ERR_NONE);
    sql("INSERT INTO OutboxRecords (Kind, Payload, Bytes, CreatedAt) VALUES ('log', '{}', 2, 1)");
    taken.refuses = "two";
    taken.verdict = ERR_BAD_VALUE;
    assert_int_equal(drain(outbox, &replayed), ERR_NONE);
    assert_int_equal(replayed, 2);
    assert_int_equal(taken.messages_count, 2);
    assert_string_equal(taken.messages[0], "one");
    assert_string_equal(taken.messages[1], "three");
    assert_int_equal(status_of(outbox).records, 0);
    assert_in_range(atomic_load(&logged[LOG_ERROR]), 2, 4); /* the refused, the unreadable */
    outbox_close(outbox);
    log_set_sink(NULL, NULL);
}

static void test_the_oldest_records_make_room(void **state)
{
    static char text[100000];
    struct log_entry first = a_log("first"), big = a_log(text), last = a_log("last");
    int64_t replayed = 0, dropped = 0, sum = 0;
    (void)state;

    taken_reset();
    memset(text, 'x', sizeof text - 1);
    struct outbox *outbox = open_outbox();
    append(outbox, "r1");
    assert_int_equal(append_logs(outbox, &first, NULL, NULL, &dropped), ERR_NONE);
    for (int i = 0; i < 700; i++) { /* 70 MB */
        assert_int_equal(append_logs(outbox, &big, NULL, NULL, &dropped), ERR_NONE);
        sum += dropped;
    }
    assert_int_equal(append_logs(outbox, &last, NULL, NULL, &dropped), ERR_NONE);
    assert_true(sum > 0);
    assert_int_equal(status_of(outbox).records, 702 - sum);
    assert_true(atoll(sql("SELECT SUM(LENGTH(Payload)) FROM OutboxRecords")) <= 64 * 1024 * 1024);
    assert_int_equal(drain(outbox, &replayed), ERR_NONE);
    assert_int_equal(replayed, 703 - sum); /* and the settlement, which never goes */
    assert_string_equal(taken.messages[(taken.messages_count - 1) % RECORDS_KEPT], "last");
    outbox_close(outbox);
}

static void test_one_drainer_at_a_time(void **state)
{
    int64_t replayed = 0;
    (void)state;

    taken_reset();
    struct outbox *outbox = open_outbox();
    taken.second = open_outbox();
    append(outbox, "r1");
    append(outbox, "r2");
    assert_int_equal(drain(outbox, &replayed), ERR_NONE);
    assert_int_equal(replayed, 2);
    assert_int_equal(taken.count, 2);
    outbox_close(taken.second);
    outbox_close(outbox);
}

static void test_drain_can_be_told_to_stop(void **state)
{
    int64_t replayed = 0;
    (void)state;

    taken_reset();
    taken.stop_after = 2;
    struct outbox *outbox = open_outbox();
    append(outbox, "r1");
    append(outbox, "r2");
    append(outbox, "r3");
    assert_int_equal(drain(outbox, &replayed), ERR_NONE);
    assert_int_equal(replayed, 2);
    assert_int_equal(status_of(outbox).waiting, 1);
    outbox_close(outbox);
}

static void test_what_waited_is_shortened(void **state)
{
    struct store_settlement s = a_settlement("r1");
    struct store_acquire a = a_reservation("r2");
    int64_t replayed = 0;
    (void)state;

    taken_reset();
    struct outbox *outbox = open_outbox();
    s.fault = (struct store_token_fault){STORE_FAULT_COOLDOWN, 100000, "rate limit"};
    assert_int_equal(outbox_append_settlement(outbox, &s, NULL), ERR_NONE);
    assert_int_equal(outbox_append_reservation(outbox, &a, NULL), ERR_NONE);
    sql("UPDATE Outbox SET CreatedAt = CreatedAt - 60000");
    assert_int_equal(drain(outbox, &replayed), ERR_NONE);
    assert_int_equal(taken.settlement.fault.fault, STORE_FAULT_COOLDOWN);
    assert_in_range(taken.settlement.fault.cooldown_ms, 30000, 40000);
    assert_in_range(taken.reservation.expires_ms, 230000, 240000);
    assert_int_equal(outbox_append_settlement(outbox, &s, NULL), ERR_NONE);
    assert_int_equal(outbox_append_reservation(outbox, &a, NULL), ERR_NONE);
    sql("UPDATE Outbox SET CreatedAt = CreatedAt - 3600000");
    assert_int_equal(drain(outbox, &replayed), ERR_NONE);
    assert_int_equal(taken.settlement.fault.fault, STORE_FAULT_NONE);
    assert_int_equal(taken.reservation.expires_ms, 60000);
    outbox_close(outbox);
}

/* A clock that was set, or a time that is none, neither lengthens nor overflows. */
static void test_clock_was_set(void **state)
{
    static const struct {
        const char *created;
        bool is_new; /* as if it had not waited */
    } rows[] = {{"CreatedAt + 3600000", true},
                {"9223372036854775807", true},
                {"0", false},
                {"-9223372036854775807", false}};
    struct store_settlement s = a_settlement("r1");
    struct store_acquire a = a_reservation("r2");
    int64_t replayed = 0;
    char text[100];
    (void)state;

    taken_reset();
    struct outbox *outbox = open_outbox();
    s.fault = (struct store_token_fault){STORE_FAULT_COOLDOWN, 100000, "rate limit"};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        assert_int_equal(outbox_append_settlement(outbox, &s, NULL), ERR_NONE);
        assert_int_equal(outbox_append_reservation(outbox, &a, NULL), ERR_NONE);
        snprintf(text, sizeof text, "UPDATE Outbox SET CreatedAt = %s", rows[i].created);
        sql(text);
        assert_true(status_of(outbox).oldest_ms >= 1);
        assert_true(rows[i].is_new == (status_of(outbox).oldest_ms == 1));
        assert_int_equal(drain(outbox, &replayed), ERR_NONE);
        assert_int_equal(replayed, 2);
        assert_int_equal(taken.settlement.fault.fault,
                         rows[i].is_new ? STORE_FAULT_COOLDOWN : STORE_FAULT_NONE);
        assert_int_equal(taken.settlement.fault.cooldown_ms, rows[i].is_new ? 100000 : 0);
        assert_int_equal(taken.reservation.expires_ms, rows[i].is_new ? a.expires_ms : 60000);
    }
    outbox_close(outbox);
}

#define APPENDERS 4
#define APPENDS 50

static void append_many(void)
{
    struct outbox *outbox = outbox_open(directory, NULL);
    char id[32];

    for (int i = 0; i < APPENDS; i++) {
        snprintf(id, sizeof id, "%d-%d", (int)getpid(), i);
        struct store_settlement s = a_settlement(id);
        if (outbox == NULL || outbox_append_settlement(outbox, &s, NULL) != ERR_NONE)
            _exit(1);
    }
    outbox_close(outbox);
}

/* Processes that open, append and close at the same time, while another replays. */
static void test_processes_append_together(void **state)
{
    pid_t pids[APPENDERS];
    int64_t replayed = 0;
    (void)state;

    taken_reset();
    for (int i = 0; i < APPENDERS; i++) {
        pids[i] = fork();
        assert_true(pids[i] >= 0);
        if (pids[i] == 0) {
            append_many();
            _exit(0);
        }
    }
    struct outbox *outbox = open_outbox();
    assert_int_equal(drain(outbox, &replayed), ERR_NONE);
    for (int i = 0; i < APPENDERS; i++) {
        int status;
        assert_int_equal(waitpid(pids[i], &status, 0), pids[i]);
        assert_int_equal(status, 0);
    }
    assert_int_equal(drain(outbox, &replayed), ERR_NONE);
    assert_int_equal(taken.count, APPENDERS * APPENDS);
    outbox_close(outbox);
}

static void append_without_room(void)
{
    struct store_settlement s = a_settlement("r1");
    struct rlimit none = {8192, 8192};
    struct err err = {.message = ""};
    struct outbox *outbox = outbox_open(directory, NULL);

    signal(SIGXFSZ, SIG_IGN);
    if (outbox == NULL || setrlimit(RLIMIT_FSIZE, &none) != 0)
        _exit(1);
    if (outbox_append_settlement(outbox, &s, &err) != ERR_STORAGE_FULL || err.message[0] == '\0')
        _exit(2);
}

static void test_no_room_is_said(void **state)
{
    (void)state;
    assert_int_equal(in_process(append_without_room), 0);
    struct outbox *outbox = open_outbox();
    assert_int_equal(status_of(outbox).waiting, 0);
    outbox_close(outbox);
}

/* ---- a store with an outbox ---- */

/* The driver: what it is told to say, and what it has seen. */
static struct far {
    pthread_mutex_t lock;
    enum err_code settle_fails; /* the whole call's code */
    int settle_fails_times;     /* for so many calls; -1: for ever */
    const char *refuses;        /* this request is refused: alone by its item's code, */
    bool refuses_all;           /* or with the whole batch */
    enum err_code acquire_fails;
    int acquire_fails_times;
    int settle_calls, acquire_calls, expire_calls;
    size_t largest_batch;
    int settled, reserved;
    char last_settled[UUID_TEXT_SIZE];
    bool crosses;
} far = {.lock = PTHREAD_MUTEX_INITIALIZER};

static bool fails_now(int *times)
{
    if (*times > 0)
        (*times)--;
    else if (*times == 0)
        return false;
    return true;
}

static enum err_code settle_locked(struct store_settlement *const *items, size_t count,
                                   struct err *err)
{
    far.settle_calls++;
    if (count > far.largest_batch)
        far.largest_batch = count;
    if (far.settle_fails != ERR_NONE && fails_now(&far.settle_fails_times))
        return err_set(err, far.settle_fails, "the store says no");
    for (size_t i = 0; far.refuses_all && i < count; i++)
        if (strcmp(items[i]->request_id, far.refuses) == 0)
            return err_set(err, ERR_INTERNAL, "a row fails its neighbours");
    for (size_t i = 0; i < count; i++) {
        if (far.refuses != NULL && strcmp(items[i]->request_id, far.refuses) == 0) {
            items[i]->code = err_set(&items[i]->err, ERR_BAD_VALUE, "a bad row");
            continue;
        }
        items[i]->code = ERR_NONE;
        items[i]->threshold_crossed = far.crosses;
        far.settled++;
        snprintf(far.last_settled, sizeof far.last_settled, "%s", items[i]->request_id);
    }
    return ERR_NONE;
}

static enum err_code far_settle(void *self, struct store_settlement *const *items, size_t count,
                                struct err *err)
{
    (void)self;
    pthread_mutex_lock(&far.lock);
    enum err_code code = settle_locked(items, count, err);
    pthread_mutex_unlock(&far.lock);
    return code;
}

static enum err_code far_acquire(void *self, struct store_acquire *const *items, size_t count,
                                 struct err *err)
{
    enum err_code code = ERR_NONE;
    (void)self;

    pthread_mutex_lock(&far.lock);
    far.acquire_calls++;
    if (far.acquire_fails != ERR_NONE && fails_now(&far.acquire_fails_times))
        code = err_set(err, far.acquire_fails, "the store says no");
    for (size_t i = 0; code == ERR_NONE && i < count; i++) {
        items[i]->code = ERR_NONE;
        items[i]->grant = GRANT_TOKEN;
        items[i]->token_id = items[i]->fallback_only ? 0 : 7;
        far.reserved += items[i]->fallback_only;
    }
    pthread_mutex_unlock(&far.lock);
    return code;
}

static enum err_code far_expire(void *self, int *expired, struct err *err)
{
    (void)self;
    (void)err;
    pthread_mutex_lock(&far.lock);
    far.expire_calls++;
    pthread_mutex_unlock(&far.lock);
    *expired = 2;
    return ERR_NONE;
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
    return 2;
}

static const struct store_driver far_driver = {
    .name = "fake",
    .open = far_open,
    .close = far_close,
    .leaders = far_leaders,
    .acquire = far_acquire,
    .settle = far_settle,
    .expire_reservations = far_expire,
};

static struct store *open_store(char *state_dir)
{
    struct config config = {.server = {.state_dir = state_dir},
                            .seal = {.key_file = (char *)(uintptr_t) ""},
                            .store = {.query_timeout_ms = 5000}};
    struct err err = {.message = ""};
    struct store *store = store_open_with(&far_driver, &config, &err);

    if (store == NULL)
        fail_msg("%s", err.message);
    return store;
}

static int set_up_store(void **state)
{
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

    far = (struct far){.lock = lock};
    for (int i = 0; i <= LOG_CRITICAL; i++)
        atomic_store(&logged[i], 0);
    log_set_sink(count_entry, NULL);
    return set_up(state);
}

static int tear_down_store(void **state)
{
    log_set_sink(NULL, NULL);
    return tear_down(state);
}

static enum err_code settle(struct store *store, struct store_settlement *s, size_t count)
{
    return store_settle(store, s, count, clock_monotonic_ms() + 5000);
}

static struct store_outbox_status store_status(struct store *store)
{
    struct store_outbox_status status;
    assert_int_equal(store_outbox_status(store, &status, NULL), ERR_NONE);
    return status;
}

static void test_settled_without_an_outbox(void **state)
{
    struct store_settlement s[2] = {a_settlement("r1"), a_settlement("r2")};
    int64_t replayed = 99;
    (void)state;

    struct store *store = open_store(directory);
    far.crosses = true;
    assert_int_equal(settle(store, s, 2), ERR_NONE);
    assert_int_equal(far.settle_calls, 1);
    assert_int_equal(far.settled, 2);
    assert_true(s[1].threshold_crossed);
    /* Looking makes no outbox, as a tool of root's must not. */
    assert_int_equal(store_status(store).waiting, 0);
    assert_int_equal(store_outbox_drain(store, &replayed, NULL), ERR_NONE);
    assert_int_equal(replayed, 0);
    assert_false(outbox_exists(directory));
    store_close(store);
}

static void test_unknown_outcome_is_repeated_once(void **state)
{
    struct store_settlement s = a_settlement("r1");
    struct store_acquire a = a_reservation("r1");
    (void)state;

    struct store *store = open_store(directory);
    far.settle_fails = far.acquire_fails = ERR_STORE_UNAVAILABLE;
    far.settle_fails_times = far.acquire_fails_times = 1;
    assert_int_equal(settle(store, &s, 1), ERR_NONE);
    assert_int_equal(far.settle_calls, 2);
    assert_int_equal(far.settled, 1);
    assert_false(outbox_exists(directory));
    assert_int_equal(store_acquire(store, &a, clock_monotonic_ms() + 5000), ERR_NONE);
    assert_int_equal(far.acquire_calls, 2);
    assert_int_equal(a.token_id, 7);
    far.acquire_fails_times = 2;
    assert_int_equal(store_acquire(store, &a, clock_monotonic_ms() + 5000), ERR_STORE_UNAVAILABLE);
    assert_int_equal(far.acquire_calls, 4);
    assert_string_equal(a.err.message, "the store says no");
    /* Not past the deadline. */
    far.acquire_fails_times = 2;
    assert_int_equal(store_acquire(store, &a, clock_monotonic_ms()), ERR_STORE_UNAVAILABLE);
    assert_int_equal(far.acquire_calls, 5);
    store_close(store);
}

static void test_store_away_goes_to_the_outbox(void **state)
{
    static const enum err_code codes[] = {ERR_STORE_UNAVAILABLE, ERR_STORAGE_FULL, ERR_INTERNAL,
                                          ERR_CONFIG, ERR_SCHEMA};
    enum { CODES = sizeof codes / sizeof codes[0] };
    struct store_settlement s[2] = {a_settlement("r1"), a_settlement("r2")};
    int64_t replayed = 0;
    (void)state;

    struct store *store = open_store(directory);
    for (size_t i = 0; i < CODES; i++) {
        far.settle_fails = codes[i];
        far.settle_fails_times = -1;
        assert_int_equal(settle(store, s, 2), ERR_NONE);
        assert_int_equal(s[0].code, ERR_NONE);
        assert_int_equal(store_status(store).waiting, 2 * (i + 1));
    }
    assert_int_equal(store_status(store).dead, 0);
    assert_int_equal(atomic_load(&logged[LOG_WARNING]), 2 * CODES);
    assert_int_equal(atomic_load(&logged[LOG_CRITICAL]), 0);
    assert_int_equal(store_outbox_drain(store, &replayed, NULL), ERR_SCHEMA);
    assert_int_equal(replayed, 0);
    far.settle_fails = ERR_NONE;
    far.crosses = true; /* nobody but the store can say so now */
    assert_int_equal(store_outbox_drain(store, &replayed, NULL), ERR_NONE);
    assert_int_equal(replayed, 2 * CODES);
    assert_int_equal(far.settled, 2 * CODES);
    assert_int_equal(atomic_load(&logged[LOG_WARNING]), 4 * CODES);
    store_close(store);
}

static void test_no_place_before_the_deadline(void **state)
{
    struct store_settlement s = a_settlement("r1");
    (void)state;

    struct store *store = open_store(directory);
    far.settle_fails = ERR_STORE_UNAVAILABLE;
    far.settle_fails_times = -1;
    assert_int_equal(store_settle(store, &s, 1, clock_monotonic_ms()), ERR_NONE);
    assert_int_equal(far.settle_calls, 1);
    assert_int_equal(store_status(store).waiting, 1);
    store_close(store);
}

static void test_refused_settlement_is_dead(void **state)
{
    struct store_settlement s[3] = {a_settlement("r1"), a_settlement("r2"), a_settlement("r3")};
    (void)state;

    struct store *store = open_store(directory);
    far.refuses = "r2";
    assert_int_equal(settle(store, s, 3), ERR_NONE);
    assert_int_equal(far.settle_calls, 1);
    assert_int_equal(far.settled, 2);
    assert_int_equal(store_status(store).dead, 1);
    assert_int_equal(store_status(store).waiting, 0);
    assert_int_equal(atomic_load(&logged[LOG_CRITICAL]), 1);
    assert_string_equal(sql("SELECT LastError FROM OutboxDead"), "a bad row");
    /* One that fails its neighbours fails alone after all; whether it's the data, who knows. */
    far.refuses_all = true;
    far.settle_calls = far.settled = 0;
    assert_int_equal(settle(store, s, 3), ERR_NONE);
    assert_int_equal(far.settle_calls, 4);
    assert_int_equal(far.settled, 2);
    assert_int_equal(store_status(store).dead, 1);
    assert_int_equal(store_status(store).waiting, 1);
    assert_int_equal(atomic_load(&logged[LOG_CRITICAL]), 1);
    int64_t replayed = 0;
    for (int i = 0; i < 19; i++)
        assert_int_equal(store_outbox_drain(store, &replayed, NULL), ERR_INTERNAL);
    assert_int_equal(store_outbox_drain(store, &replayed, NULL), ERR_NONE);
    assert_int_equal(store_status(store).dead, 2);
    assert_int_equal(store_status(store).waiting, 0);
    assert_int_equal(atomic_load(&logged[LOG_CRITICAL]), 2);
    store_close(store);
}

static void test_many_settlements_at_once(void **state)
{
    enum { MANY = BATCH_MAX + 6 };
    static char ids[MANY][16];
    static struct store_settlement s[MANY];
    (void)state;

    for (int i = 0; i < MANY; i++) {
        snprintf(ids[i], sizeof ids[i], "r%d", i);
        s[i] = a_settlement(ids[i]);
    }
    struct store *store = open_store(directory);
    assert_int_equal(settle(store, s, MANY), ERR_NONE);
    assert_int_equal(far.settled, MANY);
    assert_int_equal(far.largest_batch, BATCH_MAX);
    store_close(store);
}

/* What was written to standard error meanwhile. */
static char caught[65536];

static int catch_stderr(void)
{
    FILE *file = tmpfile();
    int real = dup(STDERR_FILENO);

    assert_non_null(file);
    dup2(fileno(file), STDERR_FILENO);
    fclose(file);
    return real;
}

static void release_stderr(int real)
{
    ssize_t n = pread(STDERR_FILENO, caught, sizeof caught - 1, 0);

    dup2(real, STDERR_FILENO);
    close(real);
    caught[n < 0 ? 0 : n] = '\0';
}

static int64_t alarms(void)
{
    static const char series[] = "\nextract_unsettled_alarms_total ";
    struct buf text;

    buf_init(&text, 1 << 20);
    metrics_write(&text);
    const char *at = strstr(buf_str(&text), series);
    int64_t n = at == NULL ? -1 : strtoll(at + sizeof series - 1, NULL, 10);
    buf_reset(&text);
    return n;
}

static void test_last_resort_is_stderr(void **state)
{
    static char nowhere[] = "/nonexistent/directory";
    struct store_settlement s[2] = {a_settlement("r1"), a_settlement("r2")};
    struct store_acquire a = a_reservation("r3");
    struct err err = {.message = ""};
    (void)state;

    struct store *store = open_store(nowhere);
    int64_t before = alarms();
    int real = catch_stderr();
    far.settle_fails = ERR_STORE_UNAVAILABLE;
    far.settle_fails_times = 4;
    far.refuses = "r2";
    enum err_code code = settle(store, &s[0], 1);
    far.settle_fails = ERR_NONE;
    enum err_code refused = settle(store, &s[1], 1);
    release_stderr(real);
    assert_int_equal(code, ERR_STORAGE_FULL);
    assert_int_equal(refused, ERR_STORAGE_FULL);
    assert_int_equal(s[0].code, ERR_STORAGE_FULL);
    assert_non_null(strstr(caught, "{\"unsettled\": {\"request_id\": \"r1\", \"token_id\": 42, "));
    assert_non_null(strstr(caught, "\"total_tokens\": 11, "));
    assert_non_null(strstr(caught, "{\"unsettled\": {\"request_id\": \"r2\", "));
    assert_int_equal(alarms(), before + 2);
    assert_int_equal(atomic_load(&logged[LOG_CRITICAL]), 2);
    /* A client may be told this: nothing about paths. */
    assert_int_equal(store_reserve_offline(store, &a, &err), ERR_STORAGE_FULL);
    assert_null(strstr(err.message, "/"));
    assert_int_equal(store_start_background(store, &err), ERR_CONFIG);
    store_close(store);
}

static void test_settlement_waits_behind_its_reservation(void **state)
{
    struct store_acquire a = a_reservation("r1");
    struct store_settlement s = a_settlement("r1"), other = a_settlement("r2");
    struct err err = {.message = ""};
    int64_t replayed = 0;
    (void)state;

    struct store *store = open_store(directory);
    assert_int_equal(store_reserve_offline(store, &a, &err), ERR_NONE);
    s.token_id = other.token_id = 0;
    assert_int_equal(settle(store, &s, 1), ERR_NONE);
    assert_int_equal(far.settled, 0);
    assert_int_equal(settle(store, &other, 1), ERR_NONE);
    assert_int_equal(far.settled, 1);
    assert_int_equal(store_status(store).waiting, 2);
    assert_int_equal(store_outbox_drain(store, &replayed, NULL), ERR_NONE);
    assert_int_equal(replayed, 2);
    assert_int_equal(far.reserved, 1);
    assert_int_equal(far.settled, 2);
    assert_string_equal(far.last_settled, "r1");
    store_close(store);
}

static int settled_now(void)
{
    pthread_mutex_lock(&far.lock);
    int n = far.settled;
    pthread_mutex_unlock(&far.lock);
    return n;
}

static int expire_calls_now(void)
{
    pthread_mutex_lock(&far.lock);
    int n = far.expire_calls;
    pthread_mutex_unlock(&far.lock);
    return n;
}

static void test_background_drains_and_expires(void **state)
{
    struct store_settlement s = a_settlement("r1");
    struct err err = {.message = ""};
    (void)state;

    struct store *store = open_store(directory);
    far.settle_fails = ERR_STORE_UNAVAILABLE;
    far.settle_fails_times = 2;
    assert_int_equal(settle(store, &s, 1), ERR_NONE);
    assert_int_equal(settled_now(), 0);
    assert_int_equal(store_start_background(store, &err), ERR_NONE);
    int64_t until_ms = clock_monotonic_ms() + 10000;
    while ((settled_now() == 0 || expire_calls_now() == 0) && clock_monotonic_ms() < until_ms)
        usleep(10000);
    assert_int_equal(settled_now(), 1);
    assert_int_equal(expire_calls_now(), 1);
    /* And again, by itself. */
    pthread_mutex_lock(&far.lock);
    far.settle_fails_times = 2;
    pthread_mutex_unlock(&far.lock);
    s.request_id = "r2";
    assert_int_equal(settle(store, &s, 1), ERR_NONE);
    until_ms = clock_monotonic_ms() + 10000;
    while (settled_now() == 1 && clock_monotonic_ms() < until_ms)
        usleep(10000);
    assert_int_equal(settled_now(), 2);
    usleep(200000); /* the thread waits for its next turn again */
    int64_t start_ms = clock_monotonic_ms();
    store_close(store);
    assert_true(clock_monotonic_ms() - start_ms < 1000);
    assert_int_equal(expire_calls_now(), 1);
    assert_int_equal(atomic_load(&logged[LOG_INFO]), 2);
    assert_int_equal(atomic_load(&logged[LOG_WARNING]), 3); /* two settlements, one expiry */
}

#define ALONE(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)
#define WITH_STORE(test) cmocka_unit_test_setup_teardown(test, set_up_store, tear_down_store)

int main(void)
{
    const struct CMUnitTest tests[] = {
        ALONE(test_nothing_is_lost_on_the_way),
        ALONE(test_no_key_and_no_other_reader),
        ALONE(test_bad_directories),
        ALONE(test_survives_kill),
        ALONE(test_killed_drainer_holds_nothing_up),
        ALONE(test_order_and_failure),
        ALONE(test_refused_entry_dies),
        ALONE(test_internal_errors_kill_in_the_end),
        ALONE(test_other_tokens_pass_one_that_is_stuck),
        ALONE(test_members_that_came_later_may_be_missing),
        ALONE(test_an_idempotency_key_waits_once),
        ALONE(test_records_come_back_whole),
        ALONE(test_records_wait_for_the_store),
        ALONE(test_a_refused_record_goes_alone),
        ALONE(test_the_oldest_records_make_room),
        ALONE(test_one_drainer_at_a_time),
        ALONE(test_drain_can_be_told_to_stop),
        ALONE(test_what_waited_is_shortened),
        ALONE(test_clock_was_set),
        ALONE(test_processes_append_together),
        ALONE(test_no_room_is_said),
        WITH_STORE(test_settled_without_an_outbox),
        WITH_STORE(test_unknown_outcome_is_repeated_once),
        WITH_STORE(test_store_away_goes_to_the_outbox),
        WITH_STORE(test_no_place_before_the_deadline),
        WITH_STORE(test_refused_settlement_is_dead),
        WITH_STORE(test_many_settlements_at_once),
        WITH_STORE(test_last_resort_is_stderr),
        WITH_STORE(test_settlement_waits_behind_its_reservation),
        WITH_STORE(test_background_drains_and_expires),
    };
    alarm(120);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
