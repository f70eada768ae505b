/* store_sqlite.c - the embedded store: one SQLite file, for one host, evaluation and tests.
 *
 * Any number of processes share the file; WAL lets readers go on while one writes. A process has one
 * connection that writes (a batch is one transaction, one fsync) and a few that read. What was
 * answered survives a power cut (store_sqlite_db.c). The rows are for people, too: a DBA may look
 * at them, and add tokens, with the sqlite3 shell while the service runs.
 *
 * Here: opening, the schema, log entries and retry attempts. The rest: see store_sqlite.h. */
#include "store_sqlite.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "buf.h"
#include "embed.h"

/* What sql/setup_sqlite.sql sets up. */
#define SCHEMA_VERSION 4
#define SCHEMA_MAJOR 1
#define RETRY_PAUSE_MS 10
#define PING_TIMEOUT_MS 1000
#define WRITTEN_LATELY_MS 1000

/* ---- the schema ---- */

static enum err_code read_version(struct sqlite_db *db, int *version, int *major, struct err *err)
{
    static const char sql_exists[] =
        "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'SchemaVersion'";
    static const char sql_version[] =
        "SELECT Version, Major FROM SchemaVersion WHERE SchemaVersionID = 1";
    sqlite3_stmt *row = NULL;
    enum err_code code = sqlite_first_row(db, &row, err, sql_exists, NULL, 0);
    bool exists = row != NULL;

    *version = 0;
    *major = 0;
    sqlite3_reset(row);
    if (code != ERR_NONE || !exists)
        return code;
    code = sqlite_first_row(db, &row, err, sql_version, NULL, 0);
    if (row != NULL) {
        *version = sqlite3_column_int(row, 0);
        *major = sqlite3_column_int(row, 1);
    }
    sqlite3_reset(row);
    return code;
}

/* Changing to WAL takes the file for itself for a moment, and SQLite does not wait for that. */
static enum err_code use_wal(struct sqlite_db *db, int64_t deadline_ms, struct err *err)
{
    static const char sql[] = "PRAGMA journal_mode = WAL";
    sqlite3_stmt *row = NULL;
    enum err_code code = ERR_NONE;

    while ((code = sqlite_first_row(db, &row, err, sql, NULL, 0)) == ERR_STORE_UNAVAILABLE &&
           clock_monotonic_ms() < deadline_ms)
        clock_sleep_until(clock_monotonic_ms() + RETRY_PAUSE_MS);
    if (row != NULL && strcmp((const char *)sqlite3_column_text(row, 0), "wal") != 0)
        code = err_set(err, ERR_CONFIG, "store.path: SQLite cannot use a write-ahead log there");
    sqlite3_reset(row);
    return code;
}

/* The columns that tables of older versions lack: the script's CREATE TABLE leaves those as they are. */
static enum err_code add_columns(struct sqlite_db *db, struct err *err)
{
    static const struct {
        const char *table, *column, *statement;
    } columns[] = {
        {"TokenUsageLogs", "TraceID", "ALTER TABLE TokenUsageLogs ADD COLUMN TraceID TEXT"},
        {"ApplicationLogs", "TraceID", "ALTER TABLE ApplicationLogs ADD COLUMN TraceID TEXT"},
    };
    static const char sql_lacks[] =
        "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?1"
        " AND NOT EXISTS (SELECT 1 FROM pragma_table_info(?1) WHERE name = ?2)";
    enum err_code code = ERR_NONE;

    for (size_t i = 0; code == ERR_NONE && i < sizeof columns / sizeof columns[0]; i++) {
        sqlite3_stmt *row = NULL;
        code = SQLITE_FIRST_ROW(db, &row, err, sql_lacks, sql_text(columns[i].table),
                                sql_text(columns[i].column));
        bool lacks = row != NULL;
        sqlite3_reset(row);
        if (lacks)
            code = sqlite_exec(db, columns[i].statement, err);
    }
    return code;
}

static enum err_code set_up(struct sqlite_db *db, struct err *err)
{
    enum err_code code = sqlite_exec(db, "BEGIN EXCLUSIVE", err);

    if (code != ERR_NONE)
        return code;
    code = add_columns(db, err);
    if (code == ERR_NONE &&
        sqlite3_exec(db->handle, embed_setup_sqlite, NULL, NULL, NULL) != SQLITE_OK)
        /* The text is ours, so SQLite's own words (a table that is in the way) hold no data. */
        code = err_set(err, ERR_SCHEMA, "setting up the schema: %s", sqlite3_errmsg(db->handle));
    if (code == ERR_NONE)
        code = sqlite_exec(db, "COMMIT", err);
    if (code != ERR_NONE && sqlite3_get_autocommit(db->handle) == 0)
        sqlite3_exec(db->handle, "ROLLBACK", NULL, NULL, NULL);
    return code;
}

static enum err_code check_version(struct store_sqlite *store, bool may_set_up, int *version,
                                   struct err *err)
{
    int major = 0;
    enum err_code code = read_version(&store->writer, version, &major, err);

    if (code == ERR_NONE && major > SCHEMA_MAJOR)
        code = err_set(err, ERR_SCHEMA,
                       "the schema (version %d) is newer than this program understands", *version);
    if (code == ERR_NONE && *version < SCHEMA_VERSION && !may_set_up)
        code = err_set(err, ERR_SCHEMA, "the schema is %s: run `extractctl migrate`",
                       *version == 0 ? "missing" : "older than this program needs");
    return code;
}

enum err_code sqlite_prepare_schema(struct store_sqlite *store, bool may_set_up,
                                    int64_t deadline_ms, struct err *err)
{
    int version = 0;
    enum err_code code = check_version(store, may_set_up, &version, err);

    if (code == ERR_NONE)
        code = use_wal(&store->writer, deadline_ms, err);
    if (code == ERR_NONE && version < SCHEMA_VERSION)
        code = set_up(&store->writer, err);
    if (code == ERR_NONE) /* once more: reading opens the log */
        code = check_version(store, false, &version, err);
    if (code == ERR_NONE)
        atomic_store(&store->version, version);
    return code;
}

/* ---- open and close ---- */

static void store_sqlite_close(void *self)
{
    struct store_sqlite *store = self;

    if (store == NULL)
        return;
    sqlite_leave(store);
    for (int i = 0; i < SQLITE_READERS; i++)
        pthread_mutex_destroy(&store->readers[i].mutex);
    pthread_rwlock_destroy(&store->log_lock);
    pthread_mutex_destroy(&store->writer_mutex);
    if (store->lock_fd >= 0)
        close(store->lock_fd);
    free(store->path);
    free(store);
}

static enum err_code open_files(struct store_sqlite *store, const char *path, bool may_set_up,
                                struct err *err)
{
    struct buf lock_path;
    enum err_code code = ERR_NONE;

    buf_init(&lock_path, 4096);
    buf_printf(&lock_path, "%s.lock", path);
    if (path[0] == '\0' || !buf_ok(&lock_path)) {
        code = err_set(err, ERR_CONFIG, "store.path is empty or too long");
    } else if (sqlite_check_directory(path, err) != ERR_NONE) {
        code = err->code;
    } else if (!may_set_up && access(path, F_OK) != 0 && errno == ENOENT) {
        code = err_set(err, ERR_SCHEMA, "%s does not exist: run `extractctl migrate`", path);
    } else {
        code = sqlite_create_file(path, err);
        if (code == ERR_NONE)
            code = sqlite_create_file(buf_str(&lock_path), err);
        if (code == ERR_NONE)
            store->lock_fd = open(buf_str(&lock_path), O_RDWR | O_CLOEXEC | O_NOFOLLOW);
        if (code == ERR_NONE && store->lock_fd < 0)
            code = err_set(err, ERR_STORE_UNAVAILABLE, "cannot open %s: %s", buf_str(&lock_path),
                           strerror(errno));
    }
    buf_reset(&lock_path);
    return code;
}

/* Under the host's lock: of ten processes that start at once, one sets the schema up and nine find it
 * done. */
static enum err_code open_database(struct store_sqlite *store, bool may_set_up, struct err *err)
{
    int64_t deadline_ms = clock_monotonic_ms() + store->timeout_ms;
    struct sqlite_file file = {0};
    enum err_code code = sqlite_host_lock(store, deadline_ms, err);

    if (code != ERR_NONE)
        return code;
    code = sqlite_file_at(store->path, &file, err);
    if (code == ERR_NONE)
        code = sqlite_come_to(store, file, may_set_up, deadline_ms, err);
    sqlite_host_unlock(store);
    return code;
}

static void *store_sqlite_open(const struct config *config, bool migrate, struct err *err)
{
    struct store_sqlite *store = calloc(1, sizeof *store);
    const char *path = config->store.path;
    bool may_set_up = migrate || config->store.auto_create;
    enum err_code code = ERR_NONE;

    if (store == NULL || (store->path = strdup(path)) == NULL) {
        free(store);
        err_set(err, ERR_INTERNAL, "no memory");
        return NULL;
    }
    store->lock_fd = -1;
    store->log_fd = -1;
    store->timeout_ms = config->store.query_timeout_ms;
    pthread_mutex_init(&store->writer_mutex, NULL);
    pthread_rwlock_init(&store->log_lock, NULL);
    for (int i = 0; i < SQLITE_READERS; i++)
        pthread_mutex_init(&store->readers[i].mutex, NULL);
    code = open_files(store, path, may_set_up, err);
    if (code == ERR_NONE)
        code = open_database(store, may_set_up, err);
    if (code != ERR_NONE) {
        store_sqlite_close(store);
        return NULL;
    }
    return store;
}

/* One writer at a time; batches that wait for it grow. */
static int store_sqlite_leaders(void *self)
{
    (void)self;
    return 1;
}

static int store_sqlite_schema_version(void *self)
{
    struct store_sqlite *store = self;
    return atomic_load(&store->version);
}

static enum err_code read_something(struct store_sqlite *store, struct err *err)
{
    static const char sql[] = "SELECT Version FROM SchemaVersion WHERE SchemaVersionID = 1";
    struct sqlite_reader *reader = NULL;
    sqlite3_stmt *row = NULL;
    enum err_code code = sqlite_reader_take(store, &reader, err);

    if (code != ERR_NONE)
        return code;
    code = sqlite_first_row(&reader->db, &row, err, sql, NULL, 0);
    if (code == ERR_NONE && row == NULL)
        code = err_set(err, ERR_SCHEMA, "the schema is missing: run `extractctl migrate`");
    sqlite3_reset(row);
    sqlite_reader_give(reader);
    return code;
}

static bool written_lately(struct store_sqlite *store)
{
    int64_t written_ms = atomic_load(&store->written_ms);
    return written_ms != 0 && clock_monotonic_ms() - written_ms < WRITTEN_LATELY_MS;
}

/* Can it be read, and written? A process that does write need not try. */
static enum err_code store_sqlite_ping(void *self, struct err *err)
{
    struct store_sqlite *store = self;
    int64_t wait_ms = store->timeout_ms < PING_TIMEOUT_MS ? store->timeout_ms : PING_TIMEOUT_MS;
    enum err_code code = read_something(store, err);

    if (code != ERR_NONE || written_lately(store))
        return code;
    code = sqlite_try_write(store, clock_monotonic_ms() + wait_ms, err);
    if (code != ERR_NONE && written_lately(store)) /* a long queue that moves */
        code = err_set(err, ERR_NONE, "%s", "");
    return code;
}

/* ---- log entries and retry attempts ---- */

/* again: unless it is there already. A plain INSERT where that need not be asked: SQLite sets up a
 * table on the side to select from the one that it inserts into. */
static enum err_code insert_entry(struct sqlite_tx *tx, const struct log_entry *e, bool again,
                                  struct err *err)
{
#define INSERT_ENTRY                                                                        \
    "INSERT INTO ApplicationLogs (Timestamp, LogLevel, Logger, Message, Exception, Module," \
    " FunctionName, LineNumber, RequestID, Host, TraceID)"
    static const char sql[] = INSERT_ENTRY " VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)";
    static const char sql_again[] = INSERT_ENTRY
        " SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11"
        " WHERE NOT EXISTS (SELECT 1 FROM ApplicationLogs"
        "     WHERE Timestamp = ?1 AND Message = ?4 AND Module = ?6 AND LineNumber = ?8"
        "       AND RequestID IS ?9 AND Host = ?10)";
    char when[CLOCK_TEXT_SIZE];

    clock_format(e->wall_ms, when);
    return SQLITE_RUN(tx->db, NULL, err, again ? sql_again : sql, sql_text(when),
                      sql_text(log_level_name(e->level)), sql_text(e->logger), sql_text(e->message),
                      sql_text(e->exception), sql_text(e->module), sql_text(e->function),
                      sql_int(e->line), sql_text(e->request_id), sql_text(log_host()),
                      sql_text(e->trace_id));
}

static enum err_code insert_attempt(struct sqlite_tx *tx, const struct store_retry_attempt *a,
                                    bool again, struct err *err)
{
    static const char sql[] =
        "INSERT INTO RetryAttempts (TokenID, CompanyID, Attempt, ErrorMessage, IsRetryable,"
        " Timestamp, RequestID, StatusCode, DelayMs)"
        " SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9"
        " WHERE ?10 = 0 OR NOT EXISTS (SELECT 1 FROM RetryAttempts"
        "     WHERE Timestamp = ?6 AND RequestID = ?7 AND Attempt = ?3)";
    char when[CLOCK_TEXT_SIZE];

    clock_format(a->wall_ms, when);
    return SQLITE_RUN(tx->db, NULL, err, sql, sql_id(a->token_id), sql_text(a->company_id),
                      sql_int(a->attempt), sql_text(a->error_message), sql_int(a->is_retryable),
                      sql_text(when), sql_text(a->request_id), sql_id(a->status_code),
                      sql_int(a->delay_ms), sql_int(again));
}

static enum err_code store_sqlite_record(void *self, struct log_entry *const *entries,
                                         size_t entry_count,
                                         const struct store_retry_attempt *const *attempts,
                                         size_t attempt_count, bool again, struct err *err)
{
    struct store_sqlite *store = self;
    struct sqlite_tx tx;
    enum err_code code = ERR_NONE;

    if (entry_count + attempt_count == 0)
        return ERR_NONE;
    code = sqlite_begin(store, &tx, err);
    if (code != ERR_NONE)
        return code;
    for (size_t i = 0; i < entry_count && code == ERR_NONE; i++)
        code = insert_entry(&tx, entries[i], again, err);
    for (size_t i = 0; i < attempt_count && code == ERR_NONE; i++)
        code = insert_attempt(&tx, attempts[i], again, err);
    return sqlite_end(store, code, err);
}

const struct store_driver store_sqlite = {
    .name = "sqlite",
    .open = store_sqlite_open,
    .close = store_sqlite_close,
    .leaders = store_sqlite_leaders,
    .schema_version = store_sqlite_schema_version,
    .ping = store_sqlite_ping,
    .acquire = sqlite_acquire,
    .settle = sqlite_settle,
    .record = store_sqlite_record,
    .expire_reservations = sqlite_expire_reservations,
    .token_add = sqlite_token_add,
    .token_set_status = sqlite_token_set_status,
    .token_set_key = sqlite_token_set_key,
    .token_keys = sqlite_token_keys,
    .token_reseal = sqlite_token_reseal,
    .token_set_limit = sqlite_token_set_limit,
    .client_key_find = sqlite_client_key_find,
    .client_key_add = sqlite_client_key_add,
    .client_key_revoke = sqlite_client_key_revoke,
    .query = sqlite_query,
};
