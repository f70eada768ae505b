/* fuzz_outbox.c - any text as an entry of the outbox, replayed to the store on SQL Server. Three bytes say
 * what kind of entry it is, when it was made and what the store answers; the payload follows. What the store
 * takes must have been fit for it, and an entry that is written again must be read as the same. */
#include <json.h>
#include <limits.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "mssql_double.h"
#include "outbox.h"
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

static void put_entry(const char *kind, const char *payload, size_t len, int64_t created_ms)
{
    static sqlite3_stmt *insert; /* as long as the process */

    if (insert == NULL)
        CHECK(sqlite3_prepare_v2(db,
                                 "INSERT INTO Outbox (Kind, RequestID, Payload, CreatedAt) "
                                 "VALUES (?1, 'r', ?2, ?3)",
                                 -1, &insert, NULL) == SQLITE_OK);
    sqlite3_bind_text(insert, 1, kind, -1, SQLITE_STATIC);
    sqlite3_bind_text(insert, 2, payload, (int)len, SQLITE_STATIC);
    sqlite3_bind_int64(insert, 3, created_ms);
    CHECK(sqlite3_step(insert) == SQLITE_DONE && sqlite3_reset(insert) == SQLITE_OK);
}

/* ---- the store ---- */

static struct {
    enum err_code verdict;
    int settled, reserved; /* taken by the store */
    int64_t said_ms;       /* what the entry says that is left */
    char *last;            /* as the settlement was written again */
} store;

/* A row for each item: ok. */
static void answer_ok(void *context, const struct mssql_call *call, struct json_object *items)
{
    static const char *const names[] = {"i", "Code", "Message", "Grant"};

    (void)context;
    for (size_t i = 0; i < json_object_array_length(items); i++) {
        const struct store_value row[] = {{.type = STORE_INTEGER, .integer = (int64_t)i},
                                          {.type = STORE_TEXT, .text = "ok"},
                                          {.type = STORE_NULL},
                                          {.type = STORE_TEXT, .text = "token"}};
        call->row(call->context, 4, names, row);
    }
}

static enum err_code settle(void *context, struct store_settlement *s, struct err *err)
{
    struct buf again;

    (void)context;
    CHECK(s->fault.fault != STORE_FAULT_COOLDOWN ||
          (s->fault.cooldown_ms > 0 && s->fault.cooldown_ms <= store.said_ms));
    if (store.verdict != ERR_NONE)
        return err_set(err, store.verdict, "the store says no");
    enum err_code code = mssql_settle(NULL, &s, 1, err);
    CHECK(code == ERR_NONE);
    if (s->code != ERR_NONE)
        return err_set(err, s->code, "%s", s->err.message);
    store.settled++;
    buf_init(&again, 1 << 20);
    outbox_write_settlement(&again, s);
    json_object_put(fuzz_parse_own(buf_str(&again), again.len));
    free(store.last);
    CHECK((store.last = strdup(buf_str(&again))) != NULL);
    buf_reset(&again);
    return ERR_NONE;
}

static enum err_code reserve(void *context, struct store_acquire *a, struct err *err)
{
    (void)context;
    CHECK(a->fallback_only && a->expires_ms >= 60000);
    CHECK(a->expires_ms <= store.said_ms || a->expires_ms == 60000); /* time only passes */
    if (store.verdict != ERR_NONE)
        return err_set(err, store.verdict, "the store says no");
    enum err_code code = mssql_acquire(NULL, &a, 1, err);
    CHECK(code == ERR_NONE);
    if (a->code != ERR_NONE)
        return err_set(err, a->code, "%s", a->err.message);
    store.reserved++;
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
    const struct outbox_replay replay = {.settle = settle, .reserve = reserve};
    struct err err = {.message = ""};
    int64_t replayed = 0;
    int before = store.settled + store.reserved;

    enum err_code code = outbox_drain(outbox, &replay, &replayed, &err);
    CHECK(replayed == store.settled + store.reserved - before);
    CHECK(code == ERR_NONE || code == store.verdict);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const kinds[] = {"settlement", "reservation", "settlement", "another"};
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
    const char *kind = kinds[fuzz_byte(&input) % 4];
    int64_t created_ms = times[fuzz_byte(&input) % 6];
    store.verdict = verdicts[fuzz_byte(&input) % 5];
    store.settled = store.reserved = 0;
    size = input.left;
    char *payload = fuzz_rest(&input);

    store.said_ms = said_ms(payload, size);
    put_entry(kind, payload, size, created_ms);
    drain();
    struct store_outbox_status s = status();
    CHECK(s.waiting + s.dead + store.settled + store.reserved == 1);
    if (store.settled == 1) { /* once more, as it was written */
        char *first = strdup(store.last);
        CHECK(first != NULL);
        put_entry(kind, first, strlen(first), now);
        drain();
        CHECK(store.settled == 2);
        if (strstr(first, "\"fault\": 1,") == NULL) /* a cooldown has become shorter */
            CHECK(strcmp(first, store.last) == 0);
        free(first);
    }
    free(payload);
    execute("DELETE FROM Outbox");
    execute("DELETE FROM OutboxDead");
    return 0;
}
