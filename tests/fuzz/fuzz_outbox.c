/* fuzz_outbox.c - any text as an entry of the outbox, replayed to the store on SQL Server. Three bytes say
 * what kind of entry it is, when it was made and what the store answers; the payload follows. What the store
 * takes must have been fit for it, and an entry that is written again must be read as the same. */
#include <json.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "log.h"
#include "mssql_double.h"
#include "outbox.h"
#include "outbox_entry.h"
#include "strict_json.h"
#include "support.h"

static char directory[] = "/dev/shm/fuzz_outbox.XXXXXX";
static struct outbox *outbox;
static sqlite3 *db; /* the same file */

static void remove_directory(void)
{
    static const char *const names[] = {"outbox.db", "outbox.db-wal", "outbox.db-shm",
                                        "outbox.lock"};
    char path[64];

    sqlite3_close(db);
    outbox_close(outbox);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(path, sizeof path, "%s/%s", directory, names[i]);
        unlink(path);
    }
    rmdir(directory);
}

static void open_outbox(void)
{
    struct err err = {.message = ""};
    char path[64];

    CHECK(mkdtemp(directory) != NULL);
    outbox = outbox_open(directory, &err);
    if (outbox == NULL)
        fuzz_fail(err.message, __FILE__, __LINE__, __func__);
    snprintf(path, sizeof path, "%s/outbox.db", directory);
    CHECK(sqlite3_open(path, &db) == SQLITE_OK);
    atexit(remove_directory);
}

static void execute(const char *sql)
{
    CHECK(sqlite3_exec(db, sql, NULL, NULL, NULL) == SQLITE_OK);
}

enum kind { SETTLEMENT, RESERVATION, LOG, ATTEMPT, UNKNOWN, KIND_COUNT };
static const char *const kinds[] = {"settlement", "reservation", "log", "attempt", "another"};

static bool is_record(enum kind kind)
{
    return kind == LOG || kind == ATTEMPT;
}

/* False where the file does not take it: an index looks into the payloads of reservations. */
static bool put_entry(enum kind kind, const char *payload, size_t len, int64_t created_ms)
{
    static sqlite3_stmt *inserts[2]; /* as long as the process */
    static const char *const sql[] = {
        "INSERT INTO Outbox (RequestID, Kind, Payload, CreatedAt) VALUES ('r', ?1, ?2, ?3)",
        "INSERT INTO OutboxRecords (Bytes, Kind, Payload, CreatedAt) VALUES (1, ?1, ?2, ?3)"};
    sqlite3_stmt **insert = &inserts[is_record(kind)];

    if (*insert == NULL)
        CHECK(sqlite3_prepare_v2(db, sql[is_record(kind)], -1, insert, NULL) == SQLITE_OK);
    sqlite3_bind_text(*insert, 1, kinds[kind], -1, SQLITE_STATIC);
    sqlite3_bind_text(*insert, 2, payload, (int)len, SQLITE_STATIC);
    sqlite3_bind_int64(*insert, 3, created_ms);
    bool put = sqlite3_step(*insert) == SQLITE_DONE;
    CHECK(put || kind == RESERVATION);
    sqlite3_reset(*insert);
    return put;
}

/* In log_to_stderr's place (the linker's --wrap): where log entries go that the store refuses. */
void __wrap_log_to_stderr(const struct log_entry *entry);

void __wrap_log_to_stderr(const struct log_entry *entry)
{
    CHECK(entry->message != NULL && entry->module != NULL && entry->function != NULL);
    CHECK(entry->level >= LOG_DEBUG && entry->level <= LOG_CRITICAL);
}

/* ---- the store ---- */

static struct {
    enum err_code verdict;
    int taken;       /* by the store */
    int64_t said_ms; /* what the entry says that is left */
    struct buf last; /* what was taken, as it is written again */
} store;

/* A row for each item: ok. */
static void answer_ok(void *context, const struct mssql_call *call, struct json_object *items)
{
    static const char *const names[] = {"i", "Code", "Message", "Grant"};

    (void)context;
    for (size_t i = 0; items != NULL && i < json_object_array_length(items); i++) {
        const struct store_value row[] = {{.type = STORE_INTEGER, .integer = (int64_t)i},
                                          {.type = STORE_TEXT, .text = "ok"},
                                          {.type = STORE_NULL},
                                          {.type = STORE_TEXT, .text = "token"}};
        call->row(call->context, 4, names, row);
    }
}

static enum err_code refuse(struct err *err)
{
    return err_set(err, store.verdict, "the store says no");
}

static void take(void)
{
    store.taken++;
    CHECK(buf_ok(&store.last));
    json_object_put(fuzz_parse_own(buf_str(&store.last), store.last.len));
}

static enum err_code settle(void *context, struct store_settlement *s, struct err *err)
{
    (void)context;
    CHECK(s->fault.fault != STORE_FAULT_COOLDOWN ||
          (s->fault.cooldown_ms > 0 && s->fault.cooldown_ms <= store.said_ms));
    if (store.verdict != ERR_NONE)
        return refuse(err);
    CHECK(mssql_settle(NULL, &s, 1, err) == ERR_NONE);
    if (s->code != ERR_NONE)
        return err_set(err, s->code, "%s", s->err.message);
    buf_clear(&store.last);
    entry_write_settlement(&store.last, s);
    take();
    return ERR_NONE;
}

static enum err_code reserve(void *context, struct store_acquire *a, struct err *err)
{
    (void)context;
    CHECK(a->fallback_only && a->expires_ms >= 60000);
    CHECK(a->expires_ms <= store.said_ms || a->expires_ms == 60000); /* time only passes */
    if (store.verdict != ERR_NONE)
        return refuse(err);
    CHECK(mssql_acquire(NULL, &a, 1, err) == ERR_NONE);
    if (a->code != ERR_NONE)
        return err_set(err, a->code, "%s", a->err.message);
    buf_clear(&store.last);
    entry_write_reservation(&store.last, a);
    take();
    return ERR_NONE;
}

static enum err_code record(void *context, struct log_entry *const *entries, size_t entry_count,
                            const struct store_retry_attempt *const *attempts, size_t attempt_count,
                            struct err *err)
{
    (void)context;
    CHECK(entry_count + attempt_count <= 1);
    if (store.verdict != ERR_NONE)
        return refuse(err);
    enum err_code code =
        store_mssql.record(NULL, entries, entry_count, attempts, attempt_count, true, err);
    if (code != ERR_NONE || entry_count + attempt_count == 0)
        return code;
    buf_clear(&store.last);
    if (entry_count == 1)
        entry_write_log(&store.last, entries[0]);
    else
        entry_write_attempt(&store.last, attempts[0]);
    take();
    return ERR_NONE;
}

static int64_t number(struct json_object *object, const char *name)
{
    struct json_object *value = NULL;

    return json_object_is_type(object, json_type_object) &&
                   json_object_object_get_ex(object, name, &value)
               ? json_object_get_int64(value)
               : 0;
}

/* The longest time that a payload says. */
static int64_t said_ms(const char *payload, size_t len)
{
    struct json_object *json = strict_json_parse(payload, len, 8);
    int64_t cooldown = number(json, "fault_cooldown_ms"), expires = number(json, "expires_ms");

    json_object_put(json);
    return cooldown > expires ? cooldown : expires;
}

static struct store_outbox_status status(void)
{
    struct store_outbox_status s;
    CHECK(outbox_status(outbox, &s, NULL) == ERR_NONE);
    CHECK(s.waiting >= 0 && s.oldest_ms >= 0);
    return s;
}

static void drain(void)
{
    const struct outbox_replay replay = {.settle = settle, .reserve = reserve, .record = record};
    struct err err = {.message = ""};
    int64_t replayed = 0;
    int before = store.taken;

    enum err_code code = outbox_drain(outbox, &replay, &replayed, &err);
    CHECK(replayed == store.taken - before);
    CHECK(code == ERR_NONE || code == store.verdict);
}

/* It is in one place. */
static void check_place(enum kind kind)
{
    struct store_outbox_status s = status();

    if (!is_record(kind))
        CHECK(s.waiting + s.dead + store.taken == 1);
    else if (store.verdict == ERR_NONE || store.verdict == ERR_BAD_VALUE)
        CHECK(s.records == 0); /* what cannot be read, or is refused, is said and goes */
    else
        CHECK(s.records + store.taken <= 1);
}

/* Once more, as it was written. */
static void replay_again(enum kind kind)
{
    char *first = strdup(buf_str(&store.last));

    CHECK(first != NULL);
    CHECK(put_entry(kind, first, strlen(first), clock_wall_ms()));
    drain();
    CHECK(store.taken == 2);
    /* but a cooldown and a reservation have become shorter */
    if (strstr(first, "\"fault\": 1,") == NULL && kind != RESERVATION)
        CHECK(strcmp(first, buf_str(&store.last)) == 0);
    free(first);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const enum err_code verdicts[] = {ERR_NONE, ERR_NONE, ERR_BAD_VALUE, ERR_INTERNAL,
                                             ERR_STORE_UNAVAILABLE};
    const int64_t now = clock_wall_ms();
    const int64_t times[] = {now, now - 3600000, now + 3600000, 0, INT64_MAX, INT64_MIN};
    struct mssql_double sql_server = {.answer = answer_ok};
    struct fuzz_input input = {data, size};

    if (outbox == NULL)
        open_outbox();
    fuzz_check_log();
    mssql_double_use(&sql_server);
    enum kind kind = fuzz_byte(&input) % KIND_COUNT;
    int64_t created_ms = times[fuzz_byte(&input) % 6];
    store.verdict = verdicts[fuzz_byte(&input) % 5];
    store.taken = 0;
    buf_init(&store.last, 1 << 20);
    size = input.left;
    char *payload = fuzz_rest(&input);

    store.said_ms = said_ms(payload, size);
    if (put_entry(kind, payload, size, created_ms)) {
        drain();
        check_place(kind);
        if (store.taken == 1)
            replay_again(kind);
    }
    free(payload);
    buf_reset(&store.last);
    execute("DELETE FROM Outbox");
    execute("DELETE FROM OutboxDead");
    execute("DELETE FROM OutboxRecords");
    return 0;
}
