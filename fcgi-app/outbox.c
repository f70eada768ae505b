/* outbox.c - the journal of what could not reach the store. See outbox.h.
 *
 * state_dir/outbox.db holds three tables. Outbox: what waits, replayed in the order of Seq.
 * OutboxDead: what the store refused for its data or failed at again and again, left for people (to try one again:
 * INSERT INTO Outbox (Kind, RequestID, TokenID, Payload, CreatedAt) SELECT … FROM OutboxDead).
 * OutboxRecords holds log entries and retry attempts, which make room, the oldest first, when they
 * come to more than RECORDS_MAX_BYTES; settlements never do.
 *
 * Here: the file, and what goes in. What goes out: outbox_replay.c. */
#include "outbox.h"

#include <json-c/json.h>
#include <limits.h>
#include <pthread.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "clock.h"
#include "outbox_entry.h"
#include "outbox_inside.h"

#define BUSY_MS 5000 /* how long an append waits for other processes' */
#define PAYLOAD_MAX ((size_t)128 * 1024)
#define RECORDS_MAX_BYTES (64 * 1024 * 1024) /* of log entries and retry attempts */
#define RECORDS_AT_ONCE "256"                /* that make room */

/* Kind: settlement or reservation; of a record: log or attempt. CreatedAt: milliseconds since 1970-01-01 UTC. AUTOINCREMENT: the
 * order must survive deletions. */
static const char setup[] =
    "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
    "CREATE TABLE IF NOT EXISTS Outbox ("
    " Seq INTEGER PRIMARY KEY AUTOINCREMENT, Kind TEXT NOT NULL, RequestID TEXT NOT NULL,"
    " TokenID INTEGER, Payload TEXT NOT NULL, CreatedAt INTEGER NOT NULL,"
    " Attempts INTEGER NOT NULL DEFAULT 0, LastError TEXT);"
    "CREATE INDEX IF NOT EXISTS IX_Outbox_RequestID ON Outbox (RequestID);"
    "CREATE INDEX IF NOT EXISTS IX_Outbox_IdempotencyKey"
    " ON Outbox (json_extract(Payload, '$.idempotency_key')) WHERE Kind = 'reservation';"
    "CREATE TABLE IF NOT EXISTS OutboxDead ("
    " Seq INTEGER PRIMARY KEY AUTOINCREMENT, Kind TEXT NOT NULL, RequestID TEXT NOT NULL,"
    " TokenID INTEGER, Payload TEXT NOT NULL, CreatedAt INTEGER NOT NULL,"
    " Attempts INTEGER NOT NULL DEFAULT 0, LastError TEXT);"
    "CREATE TABLE IF NOT EXISTS OutboxRecords ("
    " Seq INTEGER PRIMARY KEY AUTOINCREMENT, Kind TEXT NOT NULL, Payload TEXT NOT NULL,"
    " Bytes INTEGER NOT NULL, CreatedAt INTEGER NOT NULL);"
    "CREATE INDEX IF NOT EXISTS IX_OutboxRecords_Bytes ON OutboxRecords (Bytes);";

/* ---- opening ---- */

struct outbox *outbox_open(const char *state_dir, struct err *err)
{
    struct outbox *outbox = calloc(1, sizeof *outbox);

    if (outbox == NULL) {
        err_set(err, ERR_STORAGE_FULL, "no memory for the outbox");
        return NULL;
    }
    pthread_mutex_init(&outbox->lock, NULL);
    if (state_db_open(&outbox->file, state_dir, "outbox.db", setup, BUSY_MS, err) != ERR_NONE ||
        state_db_create_file(&outbox->file, "outbox.lock", err) != ERR_NONE) {
        outbox_close(outbox);
        return NULL;
    }
    return outbox;
}

void outbox_close(struct outbox *outbox)
{
    if (outbox == NULL)
        return;
    state_db_close(&outbox->file);
    pthread_mutex_destroy(&outbox->lock);
    free(outbox);
}

bool outbox_exists(const char *state_dir)
{
    char path[PATH_MAX];
    struct stat st;

    return state_dir[0] != '\0' &&
           snprintf(path, sizeof path, "%s/outbox.db", state_dir) < (int)sizeof path &&
           stat(path, &st) == 0;
}

/* ---- statements: each under the lock; see outbox_inside.h ---- */

enum err_code outbox_sql_error(struct outbox *outbox, struct err *err)
{
    return err_set(err, ERR_STORAGE_FULL, "outbox: %s", sqlite3_errmsg(outbox->file.db));
}

sqlite3_stmt *outbox_prepare(struct outbox *outbox, const char *sql)
{
    sqlite3_stmt *statement = NULL;

    if (sqlite3_prepare_v2(outbox->file.db, sql, -1, &statement, NULL) != SQLITE_OK)
        return NULL; /* finalizing, binding and stepping NULL are all harmless (SQLITE_MISUSE) */
    return statement;
}

void outbox_bind_text(sqlite3_stmt *statement, int at, const char *text)
{
    sqlite3_bind_text(statement, at, text, -1, SQLITE_STATIC);
}

/* Runs a statement that gives no rows, and finalizes it. */
static enum err_code finish(struct outbox *outbox, sqlite3_stmt *take_statement, struct err *err)
{
    enum err_code code = ERR_NONE;

    if (take_statement == NULL || sqlite3_step(take_statement) != SQLITE_DONE)
        code = outbox_sql_error(outbox, err);
    sqlite3_finalize(take_statement);
    return code;
}

enum err_code outbox_execute(struct outbox *outbox, const char *sql, int64_t seq, const char *text,
                             struct err *err)
{
    sqlite3_stmt *statement = outbox_prepare(outbox, sql);

    if (statement != NULL) {
        sqlite3_bind_int64(statement, 1, seq);
        if (text != NULL)
            outbox_bind_text(statement, 2, text);
    }
    return finish(outbox, statement, err);
}

/* Under the lock. last_error NULL: it waits; else it is dead. */
static enum err_code insert(struct outbox *outbox, const char *kind, const char *request_id,
                            int64_t token_id, const struct buf *payload, const char *last_error,
                            struct err *err)
{
    static const char waiting[] = "INSERT INTO Outbox "
                                  "(Kind, RequestID, TokenID, Payload, CreatedAt, LastError) "
                                  "VALUES (?1, ?2, NULLIF(?3, 0), ?4, ?5, ?6)";
    static const char dead[] = "INSERT INTO OutboxDead "
                               "(Kind, RequestID, TokenID, Payload, CreatedAt, LastError) "
                               "VALUES (?1, ?2, NULLIF(?3, 0), ?4, ?5, ?6)";

    if (!buf_ok(payload))
        return err_set(err, ERR_STORAGE_FULL, "outbox: no memory for an entry");
    sqlite3_stmt *statement = outbox_prepare(outbox, last_error == NULL ? waiting : dead);
    if (statement != NULL) {
        outbox_bind_text(statement, 1, kind);
        outbox_bind_text(statement, 2, request_id);
        sqlite3_bind_int64(statement, 3, token_id);
        outbox_bind_text(statement, 4, buf_str(payload));
        sqlite3_bind_int64(statement, 5, clock_wall_ms());
        outbox_bind_text(statement, 6, last_error);
    }
    return finish(outbox, statement, err);
}

static enum err_code append_settlement(struct outbox *outbox, const struct store_settlement *s,
                                       const char *last_error, struct err *err)
{
    struct buf payload;

    buf_init(&payload, PAYLOAD_MAX);
    entry_write_settlement(&payload, s);
    pthread_mutex_lock(&outbox->lock);
    enum err_code code =
        insert(outbox, KIND_SETTLEMENT, s->request_id, s->token_id, &payload, last_error, err);
    pthread_mutex_unlock(&outbox->lock);
    buf_reset(&payload);
    return code;
}

enum err_code outbox_append_settlement(struct outbox *outbox,
                                       const struct store_settlement *settlement, struct err *err)
{
    return append_settlement(outbox, settlement, NULL, err);
}

enum err_code outbox_append_dead(struct outbox *outbox, const struct store_settlement *settlement,
                                 const char *reason, struct err *err)
{
    return append_settlement(outbox, settlement, reason, err);
}

/* Does another request of the company wait here with the same idempotency key? The store, which
 * would know, is away. ERR_NONE: none. */
static enum err_code look_for_first(struct outbox *outbox, const struct store_acquire *r,
                                    struct err *err)
{
    static const char sql[] =
        "SELECT r.RequestID, EXISTS (SELECT 1 FROM Outbox s WHERE s.RequestID = r.RequestID"
        "                            AND s.Kind = '" KIND_SETTLEMENT "')"
        " FROM Outbox r WHERE r.Kind = '" KIND_RESERVATION "'"
        " AND json_extract(r.Payload, '$.idempotency_key') = ?1"
        " AND json_extract(r.Payload, '$.company_id') = ?2 COLLATE NOCASE"
        " AND r.RequestID <> ?3 LIMIT 1";
    enum err_code code = ERR_NONE;

    if (r->idempotency_key == NULL)
        return ERR_NONE;
    sqlite3_stmt *row = outbox_prepare(outbox, sql);
    outbox_bind_text(row, 1, r->idempotency_key);
    outbox_bind_text(row, 2, r->company_id);
    outbox_bind_text(row, 3, r->request_id);
    int rc = sqlite3_step(row);
    if (rc == SQLITE_ROW)
        code = store_set_duplicate(err, sqlite3_column_int(row, 1) != 0,
                                   (const char *)sqlite3_column_text(row, 0));
    else if (rc != SQLITE_DONE)
        code = outbox_sql_error(outbox, err);
    sqlite3_finalize(row);
    return code;
}

enum err_code outbox_append_reservation(struct outbox *outbox,
                                        const struct store_acquire *reservation, struct err *err)
{
    struct buf payload;

    buf_init(&payload, PAYLOAD_MAX);
    entry_write_reservation(&payload, reservation);
    pthread_mutex_lock(&outbox->lock);
    enum err_code code = outbox_execute(outbox, "BEGIN IMMEDIATE", 0, NULL, err);
    if (code == ERR_NONE) {
        code = look_for_first(outbox, reservation, err);
        if (code == ERR_NONE)
            code =
                insert(outbox, KIND_RESERVATION, reservation->request_id, 0, &payload, NULL, err);
        if (code == ERR_NONE)
            code = outbox_execute(outbox, "COMMIT", 0, NULL, err);
        if (code != ERR_NONE)
            (void)sqlite3_exec(outbox->file.db, "ROLLBACK", NULL, NULL, NULL);
    }
    pthread_mutex_unlock(&outbox->lock);
    buf_reset(&payload);
    return code;
}

int64_t outbox_waited_ms(int64_t created_ms)
{
    int64_t now_ms = clock_wall_ms();
    return created_ms >= now_ms ? 0 : created_ms < 0 ? now_ms : now_ms - created_ms;
}

bool outbox_holds(struct outbox *outbox, const char *request_id)
{
    pthread_mutex_lock(&outbox->lock);
    sqlite3_stmt *statement =
        outbox_prepare(outbox, "SELECT 1 FROM Outbox WHERE RequestID = ?1 LIMIT 1");
    if (statement != NULL)
        outbox_bind_text(statement, 1, request_id);
    bool holds = statement != NULL && sqlite3_step(statement) == SQLITE_ROW;
    sqlite3_finalize(statement);
    pthread_mutex_unlock(&outbox->lock);
    return holds;
}

enum err_code outbox_status(struct outbox *outbox, struct store_outbox_status *status,
                            struct err *err)
{
    static const char sql[] = "SELECT COUNT(*), MIN(CreatedAt), (SELECT COUNT(*) FROM OutboxDead), "
                              "(SELECT COUNT(*) FROM OutboxRecords) FROM Outbox";
    enum err_code code = ERR_NONE;

    *status = (struct store_outbox_status){0};
    pthread_mutex_lock(&outbox->lock);
    sqlite3_stmt *statement = outbox_prepare(outbox, sql);
    if (statement != NULL && sqlite3_step(statement) == SQLITE_ROW) {
        int64_t age_ms = outbox_waited_ms(sqlite3_column_int64(statement, 1));
        status->waiting = sqlite3_column_int64(statement, 0);
        status->dead = sqlite3_column_int64(statement, 2);
        status->records = sqlite3_column_int64(statement, 3);
        if (status->waiting > 0)
            status->oldest_ms = age_ms < 1 ? 1 : age_ms;
    } else {
        code = outbox_sql_error(outbox, err);
    }
    sqlite3_finalize(statement);
    pthread_mutex_unlock(&outbox->lock);
    return code;
}

/* ---- log entries and retry attempts ---- */

static enum err_code insert_record(struct outbox *outbox, const char *kind,
                                   const struct buf *payload, struct err *err)
{
    if (!buf_ok(payload))
        return err_set(err, ERR_STORAGE_FULL, "outbox: no memory for an entry");
    sqlite3_stmt *statement =
        outbox_prepare(outbox, "INSERT INTO OutboxRecords (Kind, Payload, Bytes, CreatedAt) "
                               "VALUES (?1, ?2, ?3, ?4)");
    outbox_bind_text(statement, 1, kind);
    outbox_bind_text(statement, 2, buf_str(payload));
    sqlite3_bind_int64(statement, 3, (int64_t)payload->len);
    sqlite3_bind_int64(statement, 4, clock_wall_ms());
    return finish(outbox, statement, err);
}

static enum err_code insert_records(struct outbox *outbox, struct log_entry *const *entries,
                                    size_t entry_count,
                                    const struct store_retry_attempt *const *attempts,
                                    size_t attempt_count, struct err *err)
{
    struct buf payload;
    enum err_code code = ERR_NONE;

    buf_init(&payload, PAYLOAD_MAX);
    for (size_t i = 0; code == ERR_NONE && i < entry_count; i++) {
        buf_clear(&payload);
        entry_write_log(&payload, entries[i]);
        code = insert_record(outbox, KIND_LOG, &payload, err);
    }
    for (size_t i = 0; code == ERR_NONE && i < attempt_count; i++) {
        buf_clear(&payload);
        entry_write_attempt(&payload, attempts[i]);
        code = insert_record(outbox, KIND_ATTEMPT, &payload, err);
    }
    buf_reset(&payload);
    return code;
}

static enum err_code sum_bytes(struct outbox *outbox, int64_t *bytes, struct err *err)
{
    sqlite3_stmt *row = outbox_prepare(outbox, "SELECT IFNULL(SUM(Bytes), 0) FROM OutboxRecords");
    enum err_code code = sqlite3_step(row) == SQLITE_ROW ? ERR_NONE : outbox_sql_error(outbox, err);

    if (code == ERR_NONE)
        *bytes = sqlite3_column_int64(row, 0);
    sqlite3_finalize(row);
    return code;
}

/* The oldest go while there are too many. */
static enum err_code make_room(struct outbox *outbox, int64_t *dropped, struct err *err)
{
    int64_t bytes = 0;
    enum err_code code = sum_bytes(outbox, &bytes, err);

    while (code == ERR_NONE && bytes > RECORDS_MAX_BYTES) {
        code = outbox_execute(outbox,
                              "DELETE FROM OutboxRecords WHERE Seq IN (SELECT Seq FROM "
                              "OutboxRecords ORDER BY Seq LIMIT " RECORDS_AT_ONCE ")",
                              0, NULL, err);
        *dropped += sqlite3_changes(outbox->file.db);
        if (code == ERR_NONE)
            code = sum_bytes(outbox, &bytes, err);
    }
    return code;
}

enum err_code outbox_append_records(struct outbox *outbox, struct log_entry *const *entries,
                                    size_t entry_count,
                                    const struct store_retry_attempt *const *attempts,
                                    size_t attempt_count, int64_t *dropped, struct err *err)
{
    *dropped = 0;
    pthread_mutex_lock(&outbox->lock);
    enum err_code code = outbox_execute(outbox, "BEGIN IMMEDIATE", 0, NULL, err);
    if (code == ERR_NONE) {
        code = insert_records(outbox, entries, entry_count, attempts, attempt_count, err);
        if (code == ERR_NONE)
            code = make_room(outbox, dropped, err);
        if (code == ERR_NONE)
            code = outbox_execute(outbox, "COMMIT", 0, NULL, err);
        if (code != ERR_NONE)
            (void)sqlite3_exec(outbox->file.db, "ROLLBACK", NULL, NULL, NULL);
    }
    pthread_mutex_unlock(&outbox->lock);
    return code;
}
