/* outbox.c - the journal of what could not reach the store. See outbox.h.
 *
 * state_dir/outbox.db holds two tables: Outbox, what waits, replayed in the order of Seq, and
 * OutboxDead, what the store refused for its data or failed at again and again, left for people (to try one again:
 * INSERT INTO Outbox (Kind, RequestID, TokenID, Payload, CreatedAt) SELECT … FROM OutboxDead).
 * An entry is removed only after the store has taken it; a crash in between replays it once more,
 * which counts once. state_dir/outbox.lock (flock) is held by the one process that replays; the lock
 * is taken anew each time, so it also keeps apart the threads of a process. The directory itself is
 * locked while the file is opened or closed: switching to WAL does not wait for others by itself.
 *
 * A payload is a JSON object; one table of fields writes and reads it. */
#include "outbox.h"

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <limits.h>
#include <pthread.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "clock.h"
#include "log.h"
#include "strict_json.h"

#define BUSY_MS 5000 /* how long an append waits for other processes' */
#define PAYLOAD_MAX ((size_t)64 * 1024)
#define PAYLOAD_DEPTH 2 /* an object of values */
#define KIND_SETTLEMENT "settlement"
#define KIND_RESERVATION "reservation"
#define RESERVATION_MIN_MS 60000
#define FAILURES_MAX 20 /* of an entry, with ERR_INTERNAL */

struct outbox {
    pthread_mutex_t lock; /* one connection */
    sqlite3 *db;
    int directory;
    /* The entry that failed last with ERR_INTERNAL, and how often. Only the oldest is ever tried, so
     * one place suffices. Each process counts its own attempts (one every few seconds): many of them
     * do not give an entry less time. */
    int64_t failing_seq;
    int failures;
};

/* Kind: settlement or reservation. CreatedAt: milliseconds since 1970-01-01 UTC. AUTOINCREMENT: the
 * order must survive deletions. */
static const char schema[] =
    "CREATE TABLE IF NOT EXISTS Outbox ("
    " Seq INTEGER PRIMARY KEY AUTOINCREMENT, Kind TEXT NOT NULL, RequestID TEXT NOT NULL,"
    " TokenID INTEGER, Payload TEXT NOT NULL, CreatedAt INTEGER NOT NULL,"
    " Attempts INTEGER NOT NULL DEFAULT 0, LastError TEXT);"
    "CREATE INDEX IF NOT EXISTS IX_Outbox_RequestID ON Outbox (RequestID);"
    "CREATE TABLE IF NOT EXISTS OutboxDead ("
    " Seq INTEGER PRIMARY KEY AUTOINCREMENT, Kind TEXT NOT NULL, RequestID TEXT NOT NULL,"
    " TokenID INTEGER, Payload TEXT NOT NULL, CreatedAt INTEGER NOT NULL,"
    " Attempts INTEGER NOT NULL DEFAULT 0, LastError TEXT);";

/* ---- payloads ---- */

enum field_type { FIELD_TEXT, FIELD_INT, FIELD_INT64 };

struct field {
    const char *name;
    enum field_type type;
    size_t offset;
};

_Static_assert(sizeof(enum store_fault) == sizeof(int), "an enum is read and written as an int");

#define COUNT(array) (sizeof(array) / sizeof(array)[0])
#define SETTLEMENT(name, type, member)                        \
    {                                                         \
        name, type, offsetof(struct store_settlement, member) \
    }
#define RESERVATION(name, type, member)                    \
    {                                                      \
        name, type, offsetof(struct store_acquire, member) \
    }

static const struct field settlement_fields[] = {
    SETTLEMENT("request_id", FIELD_TEXT, request_id),
    SETTLEMENT("token_id", FIELD_INT64, token_id),
    SETTLEMENT("company_id", FIELD_TEXT, company_id),
    SETTLEMENT("branch", FIELD_TEXT, branch),
    SETTLEMENT("requested_by", FIELD_TEXT, requested_by),
    SETTLEMENT("client_key_id", FIELD_TEXT, client_key_id),
    SETTLEMENT("token_source", FIELD_TEXT, token_source),
    SETTLEMENT("model", FIELD_TEXT, model),
    SETTLEMENT("input_tokens", FIELD_INT64, usage.input_tokens),
    SETTLEMENT("output_tokens", FIELD_INT64, usage.output_tokens),
    SETTLEMENT("text_prompt_tokens", FIELD_INT64, usage.text_prompt_tokens),
    SETTLEMENT("image_prompt_tokens", FIELD_INT64, usage.image_prompt_tokens),
    SETTLEMENT("text_candidates_tokens", FIELD_INT64, usage.text_candidates_tokens),
    SETTLEMENT("thoughts_tokens", FIELD_INT64, usage.thoughts_tokens),
    SETTLEMENT("cached_tokens", FIELD_INT64, usage.cached_tokens),
    SETTLEMENT("total_tokens", FIELD_INT64, usage.total_tokens),
    SETTLEMENT("request_count", FIELD_INT, request_count),
    SETTLEMENT("unknown_calls", FIELD_INT, unknown_calls),
    SETTLEMENT("duration_ms", FIELD_INT64, duration_ms),
    SETTLEMENT("logged_ms", FIELD_INT64, logged_ms),
    SETTLEMENT("fault", FIELD_INT, fault.fault),
    SETTLEMENT("fault_cooldown_ms", FIELD_INT64, fault.cooldown_ms),
    SETTLEMENT("fault_reason", FIELD_TEXT, fault.reason),
};

static const struct field reservation_fields[] = {
    RESERVATION("request_id", FIELD_TEXT, request_id),
    RESERVATION("sequence", FIELD_INT, sequence),
    RESERVATION("company_id", FIELD_TEXT, company_id),
    RESERVATION("branch", FIELD_TEXT, branch),
    RESERVATION("requested_by", FIELD_TEXT, requested_by),
    RESERVATION("estimate_tokens", FIELD_INT64, estimate_tokens),
    RESERVATION("expires_ms", FIELD_INT64, expires_ms),
};

/* memcpy: what lies at an offset is read by its type, not by a cast of the record's. */
static void write_field(struct buf *out, const struct field *field, const void *record)
{
    const char *at = (const char *)record + field->offset;
    const char *text;
    int64_t number;
    int small;

    switch (field->type) {
    case FIELD_TEXT:
        memcpy(&text, at, sizeof text);
        buf_append_json(out, text, text == NULL ? 0 : strlen(text));
        break;
    case FIELD_INT:
        memcpy(&small, at, sizeof small);
        buf_printf(out, "%d", small);
        break;
    case FIELD_INT64:
        memcpy(&number, at, sizeof number);
        buf_printf(out, "%lld", (long long)number);
        break;
    }
}

static void write_record(struct buf *out, const struct field *fields, size_t count,
                         const void *record)
{
    for (size_t i = 0; i < count; i++) {
        buf_printf(out, "%s\"%s\": ", i == 0 ? "{" : ", ", fields[i].name);
        write_field(out, &fields[i], record);
    }
    buf_append_char(out, '}');
}

void outbox_write_settlement(struct buf *out, const struct store_settlement *settlement)
{
    write_record(out, settlement_fields, COUNT(settlement_fields), settlement);
}

/* Text stays the JSON object's. False: the value has another type than the field. */
static bool read_field(struct json_object *json, const struct field *field, void *record)
{
    char *at = (char *)record + field->offset;
    struct json_object *value = NULL;

    if (!json_object_object_get_ex(json, field->name, &value) || value == NULL)
        return field->type == FIELD_TEXT; /* NULL, as in the zeroed record */
    if (field->type == FIELD_TEXT) {
        const char *text = json_object_get_string(value);
        memcpy(at, &text, sizeof text);
        return json_object_is_type(value, json_type_string) &&
               strlen(text) == (size_t)json_object_get_string_len(value); /* no \u0000 */
    }
    int64_t number = json_object_get_int64(value);
    int small = (int)number;
    if (field->type == FIELD_INT)
        memcpy(at, &small, sizeof small);
    else
        memcpy(at, &number, sizeof number);
    return json_object_is_type(value, json_type_int) &&
           (field->type == FIELD_INT64 || (number >= INT_MIN && number <= INT_MAX));
}

static bool read_record(struct json_object *json, const struct field *fields, size_t count,
                        void *record)
{
    bool ok = json_object_is_type(json, json_type_object);

    for (size_t i = 0; ok && i < count; i++)
        ok = read_field(json, &fields[i], record);
    return ok;
}

/* ---- opening ---- */

/* Is there no room, rather than no right? */
static bool is_full(int rc)
{
    return (rc & 0xff) == SQLITE_FULL || (rc & 0xff) == SQLITE_IOERR ||
           (rc & 0xff) == SQLITE_NOMEM || (rc & 0xff) == SQLITE_BUSY;
}

static enum err_code open_error(struct outbox *outbox, const char *state_dir, struct err *err)
{
    bool full = is_full(sqlite3_errcode(outbox->db));

    return err_set(err, full ? ERR_STORAGE_FULL : ERR_CONFIG,
                   "server.state_dir: cannot use %s/outbox.db: %s", state_dir,
                   sqlite3_errmsg(outbox->db));
}

/* Root, who sets a host up, leaves files that the service can use. */
static int give_to_directory_owner(int fd, int directory)
{
    struct stat st;

    if (geteuid() != 0)
        return 0;
    return fstat(directory, &st) != 0 ? -1 : fchown(fd, st.st_uid, st.st_gid);
}

/* Creates the file with its mode, which SQLite's -wal and -shm inherit. One that exists is not
 * opened: closing it again would drop the locks of another connection of this process (fcntl(2)). */
static enum err_code create_file(int directory, const char *state_dir, const char *name,
                                 struct err *err)
{
    enum err_code code = ERR_NONE;
    int fd = openat(directory, name, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);

    if (fd < 0 && errno == EEXIST)
        return ERR_NONE;
    if (fd < 0 || give_to_directory_owner(fd, directory) != 0 ||
        fsync(directory) != 0) /* the name must survive a power cut as well */
        code =
            err_set(err, errno == ENOSPC || errno == EDQUOT ? ERR_STORAGE_FULL : ERR_CONFIG,
                    "server.state_dir: cannot create %s/%s: %s", state_dir, name, strerror(errno));
    if (fd >= 0)
        close(fd);
    return code;
}

static enum err_code open_database(struct outbox *outbox, const char *state_dir, struct err *err)
{
    static const char setup[] = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;";
    char path[PATH_MAX];

    if (snprintf(path, sizeof path, "%s/outbox.db", state_dir) >= (int)sizeof path)
        return err_set(err, ERR_CONFIG, "server.state_dir is too long");
    if (sqlite3_open_v2(path, &outbox->db, SQLITE_OPEN_READWRITE, NULL) != SQLITE_OK)
        return open_error(outbox, state_dir, err);
    sqlite3_busy_timeout(outbox->db, BUSY_MS);
    if (sqlite3_db_readonly(outbox->db, "main") != 0)
        return err_set(err, ERR_CONFIG, "server.state_dir: %s is not writable", path);
    if (sqlite3_exec(outbox->db, setup, NULL, NULL, NULL) != SQLITE_OK ||
        sqlite3_exec(outbox->db, schema, NULL, NULL, NULL) != SQLITE_OK)
        return open_error(outbox, state_dir, err);
    return ERR_NONE;
}

static int flock_wait(int fd, int operation)
{
    int rc;

    do
        rc = flock(fd, operation);
    while (rc != 0 && errno == EINTR);
    return rc;
}

static enum err_code open_locked(struct outbox *outbox, const char *state_dir, struct err *err)
{
    if (flock_wait(outbox->directory, LOCK_EX) != 0)
        return err_set(err, ERR_CONFIG, "server.state_dir: cannot lock %s: %s", state_dir,
                       strerror(errno));
    enum err_code code = create_file(outbox->directory, state_dir, "outbox.lock", err);
    if (code == ERR_NONE)
        code = create_file(outbox->directory, state_dir, "outbox.db", err);
    if (code == ERR_NONE)
        code = open_database(outbox, state_dir, err);
    flock_wait(outbox->directory, LOCK_UN);
    return code;
}

struct outbox *outbox_open(const char *state_dir, struct err *err)
{
    struct outbox *outbox = NULL;
    int directory;

    if (state_dir[0] == '\0') {
        err_set(err, ERR_CONFIG, "server.state_dir is not set");
        return NULL;
    }
    directory = open(state_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0) {
        err_set(err, ERR_CONFIG, "server.state_dir: %s: %s", state_dir, strerror(errno));
        return NULL;
    }
    outbox = calloc(1, sizeof *outbox);
    if (outbox == NULL) {
        close(directory);
        err_set(err, ERR_STORAGE_FULL, "no memory for the outbox");
        return NULL;
    }
    outbox->directory = directory;
    pthread_mutex_init(&outbox->lock, NULL);
    if (open_locked(outbox, state_dir, err) != ERR_NONE) {
        outbox_close(outbox);
        return NULL;
    }
    return outbox;
}

void outbox_close(struct outbox *outbox)
{
    if (outbox == NULL)
        return;
    flock_wait(outbox->directory, LOCK_EX);
    sqlite3_close(outbox->db);
    close(outbox->directory);
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

/* ---- statements: each under the lock ---- */

static enum err_code sql_error(struct outbox *outbox, struct err *err)
{
    return err_set(err, ERR_STORAGE_FULL, "outbox: %s", sqlite3_errmsg(outbox->db));
}

static sqlite3_stmt *prepare(struct outbox *outbox, const char *sql)
{
    sqlite3_stmt *statement = NULL;

    if (sqlite3_prepare_v2(outbox->db, sql, -1, &statement, NULL) != SQLITE_OK)
        return NULL; /* finalizing, binding and stepping NULL are all harmless (SQLITE_MISUSE) */
    return statement;
}

static void bind_text(sqlite3_stmt *statement, int at, const char *text)
{
    sqlite3_bind_text(statement, at, text, -1, SQLITE_STATIC);
}

/* Runs a statement that gives no rows, and finalizes it. */
static enum err_code finish(struct outbox *outbox, sqlite3_stmt *take_statement, struct err *err)
{
    enum err_code code = ERR_NONE;

    if (take_statement == NULL || sqlite3_step(take_statement) != SQLITE_DONE)
        code = sql_error(outbox, err);
    sqlite3_finalize(take_statement);
    return code;
}

static enum err_code execute(struct outbox *outbox, const char *sql, int64_t seq, const char *text,
                             struct err *err)
{
    sqlite3_stmt *statement = prepare(outbox, sql);

    if (statement != NULL) {
        sqlite3_bind_int64(statement, 1, seq);
        if (text != NULL)
            bind_text(statement, 2, text);
    }
    return finish(outbox, statement, err);
}

/* One statement is one transaction. last_error NULL: it waits; else it is dead. */
static enum err_code append(struct outbox *outbox, const char *kind, const char *request_id,
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
    pthread_mutex_lock(&outbox->lock);
    sqlite3_stmt *statement = prepare(outbox, last_error == NULL ? waiting : dead);
    if (statement != NULL) {
        bind_text(statement, 1, kind);
        bind_text(statement, 2, request_id);
        sqlite3_bind_int64(statement, 3, token_id);
        bind_text(statement, 4, buf_str(payload));
        sqlite3_bind_int64(statement, 5, clock_wall_ms());
        bind_text(statement, 6, last_error);
    }
    enum err_code code = finish(outbox, statement, err);
    pthread_mutex_unlock(&outbox->lock);
    return code;
}

static enum err_code append_settlement(struct outbox *outbox, const struct store_settlement *s,
                                       const char *last_error, struct err *err)
{
    struct buf payload;

    buf_init(&payload, PAYLOAD_MAX);
    outbox_write_settlement(&payload, s);
    enum err_code code =
        append(outbox, KIND_SETTLEMENT, s->request_id, s->token_id, &payload, last_error, err);
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

enum err_code outbox_append_reservation(struct outbox *outbox,
                                        const struct store_acquire *reservation, struct err *err)
{
    struct buf payload;

    buf_init(&payload, PAYLOAD_MAX);
    write_record(&payload, reservation_fields, COUNT(reservation_fields), reservation);
    enum err_code code =
        append(outbox, KIND_RESERVATION, reservation->request_id, 0, &payload, NULL, err);
    buf_reset(&payload);
    return code;
}

/* How long an entry has waited; 0 where it seems to come from the future: the clock was set back. */
static int64_t waited_ms(int64_t created_ms)
{
    int64_t now_ms = clock_wall_ms();
    return created_ms >= now_ms ? 0 : created_ms < 0 ? now_ms : now_ms - created_ms;
}

bool outbox_holds(struct outbox *outbox, const char *request_id)
{
    pthread_mutex_lock(&outbox->lock);
    sqlite3_stmt *statement = prepare(outbox, "SELECT 1 FROM Outbox WHERE RequestID = ?1 LIMIT 1");
    if (statement != NULL)
        bind_text(statement, 1, request_id);
    bool holds = statement != NULL && sqlite3_step(statement) == SQLITE_ROW;
    sqlite3_finalize(statement);
    pthread_mutex_unlock(&outbox->lock);
    return holds;
}

enum err_code outbox_status(struct outbox *outbox, struct store_outbox_status *status,
                            struct err *err)
{
    static const char sql[] = "SELECT COUNT(*), MIN(CreatedAt), (SELECT COUNT(*) FROM OutboxDead) "
                              "FROM Outbox";
    enum err_code code = ERR_NONE;

    *status = (struct store_outbox_status){0};
    pthread_mutex_lock(&outbox->lock);
    sqlite3_stmt *statement = prepare(outbox, sql);
    if (statement != NULL && sqlite3_step(statement) == SQLITE_ROW) {
        int64_t age_ms = waited_ms(sqlite3_column_int64(statement, 1));
        status->waiting = sqlite3_column_int64(statement, 0);
        status->dead = sqlite3_column_int64(statement, 2);
        if (status->waiting > 0)
            status->oldest_ms = age_ms < 1 ? 1 : age_ms;
    } else {
        code = sql_error(outbox, err);
    }
    sqlite3_finalize(statement);
    pthread_mutex_unlock(&outbox->lock);
    return code;
}

/* ---- replaying ---- */

struct entry {
    int64_t seq; /* 0: there is none */
    int64_t created_ms;
    bool is_reservation;
    char request_id[UUID_TEXT_SIZE];
    struct json_object *payload; /* NULL: not JSON */
};

static void read_entry(sqlite3_stmt *statement, struct entry *entry)
{
    const char *kind = (const char *)sqlite3_column_text(statement, 1);
    const char *request_id = (const char *)sqlite3_column_text(statement, 2);
    const char *payload = (const char *)sqlite3_column_text(statement, 3);

    entry->seq = sqlite3_column_int64(statement, 0);
    entry->is_reservation = kind != NULL && strcmp(kind, KIND_RESERVATION) == 0;
    snprintf(entry->request_id, sizeof entry->request_id, "%s",
             request_id == NULL ? "" : request_id);
    entry->payload =
        strict_json_parse(payload, (size_t)sqlite3_column_bytes(statement, 3), PAYLOAD_DEPTH);
    entry->created_ms = sqlite3_column_int64(statement, 4);
}

static enum err_code oldest(struct outbox *outbox, struct entry *entry, struct err *err)
{
    static const char sql[] = "SELECT Seq, Kind, RequestID, Payload, CreatedAt FROM Outbox "
                              "ORDER BY Seq LIMIT 1";
    enum err_code code = ERR_NONE;

    *entry = (struct entry){0};
    pthread_mutex_lock(&outbox->lock);
    sqlite3_stmt *statement = prepare(outbox, sql);
    int rc = statement == NULL ? SQLITE_ERROR : sqlite3_step(statement);
    if (rc == SQLITE_ROW)
        read_entry(statement, entry);
    else if (rc != SQLITE_DONE)
        code = sql_error(outbox, err);
    sqlite3_finalize(statement);
    pthread_mutex_unlock(&outbox->lock);
    return code;
}

static enum err_code unreadable(struct err *err)
{
    return err_set(err, ERR_BAD_VALUE, "outbox: the entry's payload cannot be read");
}

/* What is left of a time that was said when the entry was made. */
static int64_t left_ms(int64_t ms, const struct entry *entry)
{
    int64_t waited = waited_ms(entry->created_ms);
    return ms < waited ? 0 : ms - waited;
}

static enum err_code replay_settlement(const struct entry *entry,
                                       const struct outbox_replay *replay, struct err *err)
{
    struct store_settlement s = {0};

    if (!read_record(entry->payload, settlement_fields, COUNT(settlement_fields), &s) ||
        (unsigned)s.fault.fault > STORE_FAULT_EXCEED)
        return unreadable(err);
    if (s.fault.fault == STORE_FAULT_COOLDOWN) {
        s.fault.cooldown_ms = left_ms(s.fault.cooldown_ms, entry);
        if (s.fault.cooldown_ms == 0)
            s.fault.fault = STORE_FAULT_NONE;
    }
    return replay->settle(replay->context, &s, err);
}

static enum err_code replay_reservation(const struct entry *entry,
                                        const struct outbox_replay *replay, struct err *err)
{
    struct store_acquire a = {.fallback_only = true};

    if (!read_record(entry->payload, reservation_fields, COUNT(reservation_fields), &a))
        return unreadable(err);
    a.expires_ms = left_ms(a.expires_ms, entry);
    if (a.expires_ms < RESERVATION_MIN_MS)
        a.expires_ms = RESERVATION_MIN_MS;
    return replay->reserve(replay->context, &a, err);
}

static enum err_code bury(struct outbox *outbox, int64_t seq, const char *reason, struct err *err)
{
    enum err_code code = ERR_STORAGE_FULL;

    if (sqlite3_exec(outbox->db, "BEGIN IMMEDIATE", NULL, NULL, NULL) != SQLITE_OK)
        return sql_error(outbox, err);
    code = execute(outbox,
                   "INSERT INTO OutboxDead "
                   "(Kind, RequestID, TokenID, Payload, CreatedAt, Attempts, LastError) "
                   "SELECT Kind, RequestID, TokenID, Payload, CreatedAt, Attempts + 1, ?2 "
                   "FROM Outbox WHERE Seq = ?1",
                   seq, reason, err);
    if (code == ERR_NONE)
        code = execute(outbox, "DELETE FROM Outbox WHERE Seq = ?1", seq, NULL, err);
    if (code == ERR_NONE && sqlite3_exec(outbox->db, "COMMIT", NULL, NULL, NULL) != SQLITE_OK)
        code = sql_error(outbox, err);
    if (code != ERR_NONE)
        sqlite3_exec(outbox->db, "ROLLBACK", NULL, NULL, NULL);
    return code;
}

/* Has the entry failed for nobody's fault so often that others shall pass? */
static bool has_failed_enough(struct outbox *outbox, const struct entry *entry,
                              enum err_code verdict)
{
    if (verdict != ERR_INTERNAL)
        return false;
    if (outbox->failing_seq != entry->seq)
        outbox->failures = 0;
    outbox->failing_seq = entry->seq;
    return ++outbox->failures >= FAILURES_MAX;
}

/* Does with the entry what the store's verdict asks for. */
static enum err_code conclude(struct outbox *outbox, const struct entry *entry,
                              enum err_code verdict, struct err *err)
{
    static const char failed_again[] =
        "UPDATE Outbox SET Attempts = Attempts + 1, LastError = ?2 WHERE Seq = ?1";
    struct err second;
    char reason[sizeof err->message];
    enum err_code code = verdict;

    snprintf(reason, sizeof reason, "%s", err->message);
    pthread_mutex_lock(&outbox->lock);
    bool failed = has_failed_enough(outbox, entry, verdict);
    if (verdict == ERR_NONE)
        code = execute(outbox, "DELETE FROM Outbox WHERE Seq = ?1", entry->seq, NULL, err);
    else if (verdict == ERR_BAD_VALUE || failed)
        code = bury(outbox, entry->seq, reason, err);
    else if (execute(outbox, failed_again, entry->seq, reason, &second) != ERR_NONE)
        err_prefix(err, "%s", second.message);
    pthread_mutex_unlock(&outbox->lock);
    if (verdict != ERR_NONE && code == ERR_NONE)
        log_critical(entry->request_id, reason,
                     "the store %s a %s of the outbox: moved to its dead table",
                     failed ? "fails again and again at" : "refuses",
                     entry->is_reservation ? KIND_RESERVATION : KIND_SETTLEMENT);
    return code;
}

/* *fd: -1 while another replays. */
static enum err_code lock_replay(struct outbox *outbox, int *fd, struct err *err)
{
    enum err_code code = ERR_NONE;

    *fd = openat(outbox->directory, "outbox.lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (*fd >= 0 && flock(*fd, LOCK_EX | LOCK_NB) == 0)
        return ERR_NONE;
    if (*fd < 0 || errno != EWOULDBLOCK)
        code = err_set(err, ERR_STORAGE_FULL, "outbox.lock: %s", strerror(errno));
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
    return code;
}

enum err_code outbox_drain(struct outbox *outbox, const struct outbox_replay *replay,
                           int64_t *replayed, struct err *err)
{
    struct err local;
    struct entry entry;
    enum err_code code;
    int fd;

    *replayed = 0;
    if (err == NULL)
        err = &local;
    code = lock_replay(outbox, &fd, err);
    if (fd < 0)
        return code;
    while ((code = oldest(outbox, &entry, err)) == ERR_NONE && entry.seq != 0 &&
           (replay->go_on == NULL || replay->go_on(replay->context))) {
        err_set(err, ERR_NONE, "%s", "");
        enum err_code verdict = entry.is_reservation ? replay_reservation(&entry, replay, err)
                                                     : replay_settlement(&entry, replay, err);
        json_object_put(entry.payload);
        entry.payload = NULL;
        code = conclude(outbox, &entry, verdict, err);
        if (code != ERR_NONE)
            break;
        *replayed += verdict == ERR_NONE;
    }
    json_object_put(entry.payload); /* of one that go_on left alone */
    close(fd);
    return code;
}
