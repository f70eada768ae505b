/* outbox_replay.c - what the outbox holds goes to the store. See outbox.h.
 *
 * An entry is removed only after the store has taken it; a crash in between replays it once more,
 * which counts once. state_dir/outbox.lock (flock) is held by the one process that replays; the lock
 * is taken anew each time, so it also keeps apart the threads of a process.
 *
 * Entries go in the order of Seq. Where the store answers and yet fails at one, those of its token
 * wait behind it, and the others pass. Log entries and retry attempts come last, many at once. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "clock.h"
#include "log.h"
#include "outbox_entry.h"
#include "outbox_inside.h"
#include "strict_json.h"

#define RESERVATION_MIN_MS 60000
#define FAILURES_MAX 20 /* of an entry, with ERR_INTERNAL */
#define RECORDS_AT_ONCE 64
#define PAYLOAD_DEPTH 2 /* an object of values */

struct entry {
    int64_t seq; /* 0: there is none */
    int64_t token_id;
    int64_t created_ms;
    bool is_reservation;
    char request_id[UUID_TEXT_SIZE];
    struct json_object *payload; /* NULL: not JSON */
};

/* One run through the outbox. */
struct drain {
    struct outbox *outbox;
    const struct outbox_replay *replay;
    int64_t replayed;
    int64_t stuck[OUTBOX_STUCK_MAX]; /* tokens */
    size_t stuck_count;
    struct err why_stuck;
};

/* ---- settlements and reservations ---- */

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
    entry->token_id = sqlite3_column_int64(statement, 5);
}

/* The oldest after that one. */
static enum err_code next_entry(struct outbox *outbox, int64_t after_seq, struct entry *entry,
                                struct err *err)
{
    static const char sql[] = "SELECT Seq, Kind, RequestID, Payload, CreatedAt, TokenID "
                              "FROM Outbox WHERE Seq > ?1 ORDER BY Seq LIMIT 1";
    enum err_code code = ERR_NONE;

    *entry = (struct entry){0};
    pthread_mutex_lock(&outbox->lock);
    sqlite3_stmt *statement = outbox_prepare(outbox, sql);
    sqlite3_bind_int64(statement, 1, after_seq);
    int rc = sqlite3_step(statement);
    if (rc == SQLITE_ROW)
        read_entry(statement, entry);
    else if (rc != SQLITE_DONE)
        code = outbox_sql_error(outbox, err);
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
    int64_t waited = outbox_waited_ms(entry->created_ms);
    return ms < waited ? 0 : ms - waited;
}

static enum err_code replay_settlement(const struct entry *entry,
                                       const struct outbox_replay *replay, struct err *err)
{
    struct store_settlement s;

    if (!entry_read_settlement(entry->payload, &s))
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
    struct store_acquire a;

    if (!entry_read_reservation(entry->payload, &a))
        return unreadable(err);
    a.fallback_only = true;
    a.expires_ms = left_ms(a.expires_ms, entry);
    if (a.expires_ms < RESERVATION_MIN_MS)
        a.expires_ms = RESERVATION_MIN_MS;
    return replay->reserve(replay->context, &a, err);
}

static enum err_code bury(struct outbox *outbox, int64_t seq, const char *reason, struct err *err)
{
    enum err_code code = outbox_execute(outbox, "BEGIN IMMEDIATE", 0, NULL, err);

    if (code != ERR_NONE)
        return code;
    code = outbox_execute(outbox,
                          "INSERT INTO OutboxDead "
                          "(Kind, RequestID, TokenID, Payload, CreatedAt, Attempts, LastError) "
                          "SELECT Kind, RequestID, TokenID, Payload, CreatedAt, Attempts + 1, ?2 "
                          "FROM Outbox WHERE Seq = ?1",
                          seq, reason, err);
    if (code == ERR_NONE)
        code = outbox_execute(outbox, "DELETE FROM Outbox WHERE Seq = ?1", seq, NULL, err);
    if (code == ERR_NONE)
        code = outbox_execute(outbox, "COMMIT", 0, NULL, err);
    if (code != ERR_NONE)
        sqlite3_exec(outbox->file.db, "ROLLBACK", NULL, NULL, NULL);
    return code;
}

/* Has the entry failed for nobody's fault so often that its token's others shall pass? Under the lock. */
static bool has_failed_enough(struct outbox *outbox, int64_t seq)
{
    size_t place = 0;

    for (size_t i = 0; i < OUTBOX_STUCK_MAX; i++) {
        if (outbox->failing[i].seq == seq)
            return ++outbox->failing[i].failures >= FAILURES_MAX;
        if (outbox->failing[i].seq < outbox->failing[place].seq)
            place = i;
    }
    outbox->failing[place].seq = seq; /* instead of the oldest */
    outbox->failing[place].failures = 1;
    return false;
}

/* Does with the entry what the store's verdict asks for. ERR_NONE: it is gone. */
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
    bool failed = verdict == ERR_INTERNAL && has_failed_enough(outbox, entry->seq);
    if (verdict == ERR_NONE)
        code = outbox_execute(outbox, "DELETE FROM Outbox WHERE Seq = ?1", entry->seq, NULL, err);
    else if (verdict == ERR_BAD_VALUE || failed)
        code = bury(outbox, entry->seq, reason, err);
    else if (outbox_execute(outbox, failed_again, entry->seq, reason, &second) != ERR_NONE)
        err_prefix(err, "%s", second.message);
    pthread_mutex_unlock(&outbox->lock);
    if (verdict != ERR_NONE && code == ERR_NONE)
        log_critical(entry->request_id, reason,
                     "the store %s a %s of the outbox: moved to its dead table",
                     failed ? "fails again and again at" : "refuses",
                     entry->is_reservation ? KIND_RESERVATION : KIND_SETTLEMENT);
    return code;
}

static bool is_stuck(const struct drain *d, int64_t token_id)
{
    for (size_t i = 0; i < d->stuck_count; i++)
        if (d->stuck[i] == token_id)
            return true;
    return false;
}

static enum err_code replay_entry(struct drain *d, const struct entry *entry, struct err *err)
{
    err_set(err, ERR_NONE, "%s", "");
    enum err_code verdict = entry->is_reservation ? replay_reservation(entry, d->replay, err)
                                                  : replay_settlement(entry, d->replay, err);
    enum err_code code = conclude(d->outbox, entry, verdict, err);
    d->replayed += code == ERR_NONE && verdict == ERR_NONE;
    if (code != ERR_INTERNAL || d->stuck_count == OUTBOX_STUCK_MAX)
        return code;
    d->stuck[d->stuck_count++] = entry->token_id;
    d->why_stuck = *err;
    return ERR_NONE;
}

static bool may_go_on(const struct drain *d)
{
    return d->replay->go_on == NULL || d->replay->go_on(d->replay->context, d->replayed);
}

static enum err_code drain_entries(struct drain *d, struct err *err)
{
    struct entry entry;
    int64_t after_seq = 0;
    enum err_code code = ERR_NONE;

    while (code == ERR_NONE && may_go_on(d)) {
        code = next_entry(d->outbox, after_seq, &entry, err);
        if (code != ERR_NONE || entry.seq == 0)
            break;
        after_seq = entry.seq;
        if (!is_stuck(d, entry.token_id))
            code = replay_entry(d, &entry, err);
        json_object_put(entry.payload);
    }
    return code;
}

/* ---- log entries and retry attempts ---- */

/* What is replayed at once; pointers of the entries are to the payloads. */
struct records {
    struct log_entry entries[RECORDS_AT_ONCE];
    struct store_retry_attempt attempts[RECORDS_AT_ONCE];
    size_t entry_count, attempt_count;
    struct json_object *payloads[RECORDS_AT_ONCE];
    size_t payload_count;
    int64_t last_seq; /* 0: there are none */
};

/* One that cannot be read is left out, and goes with the others. */
static void take_record(struct records *r, const char *kind, const char *payload, size_t len)
{
    struct json_object *json = strict_json_parse(payload, len, PAYLOAD_DEPTH);
    bool is_log = strcmp(kind, KIND_LOG) == 0;

    if (is_log && entry_read_log(json, &r->entries[r->entry_count]))
        r->entry_count++;
    else if (!is_log && entry_read_attempt(json, &r->attempts[r->attempt_count]))
        r->attempt_count++;
    else
        log_error(NULL, NULL, "a %s of the outbox cannot be read: it is lost",
                  is_log ? "log entry" : "retry attempt");
    r->payloads[r->payload_count++] = json;
}

static enum err_code read_records(struct outbox *outbox, size_t most, struct records *r,
                                  struct err *err)
{
    static const char sql[] = "SELECT Seq, Kind, Payload FROM OutboxRecords ORDER BY Seq LIMIT ?1";
    int rc;

    r->entry_count = r->attempt_count = r->payload_count = 0;
    r->last_seq = 0;
    pthread_mutex_lock(&outbox->lock);
    sqlite3_stmt *row = outbox_prepare(outbox, sql);
    sqlite3_bind_int64(row, 1, (int64_t)most);
    while ((rc = sqlite3_step(row)) == SQLITE_ROW) {
        r->last_seq = sqlite3_column_int64(row, 0);
        take_record(r, (const char *)sqlite3_column_text(row, 1),
                    (const char *)sqlite3_column_text(row, 2),
                    (size_t)sqlite3_column_bytes(row, 2));
    }
    enum err_code code = rc == SQLITE_DONE ? ERR_NONE : outbox_sql_error(outbox, err);
    sqlite3_finalize(row);
    pthread_mutex_unlock(&outbox->lock);
    return code;
}

static enum err_code offer_records(const struct drain *d, struct records *r, struct err *err)
{
    struct log_entry *entries[RECORDS_AT_ONCE];
    const struct store_retry_attempt *attempts[RECORDS_AT_ONCE];

    for (size_t i = 0; i < r->entry_count; i++)
        entries[i] = &r->entries[i];
    for (size_t i = 0; i < r->attempt_count; i++)
        attempts[i] = &r->attempts[i];
    return d->replay->record(d->replay->context, entries, r->entry_count, attempts,
                             r->attempt_count, err);
}

static enum err_code forget_records(struct outbox *outbox, int64_t last_seq, struct err *err)
{
    pthread_mutex_lock(&outbox->lock);
    enum err_code code =
        outbox_execute(outbox, "DELETE FROM OutboxRecords WHERE Seq <= ?1", last_seq, NULL, err);
    pthread_mutex_unlock(&outbox->lock);
    return code;
}

/* Where the store refuses some, they go one by one, and the one that it refuses to standard error. */
static enum err_code drain_records(struct drain *d, struct records *r, struct err *err)
{
    size_t most = RECORDS_AT_ONCE;
    enum err_code code = ERR_NONE;

    r->payload_count = 0;

    while (code == ERR_NONE && may_go_on(d)) {
        code = read_records(d->outbox, most, r, err);
        if (code != ERR_NONE || r->last_seq == 0)
            break;
        code = offer_records(d, r, err);
        size_t count = r->entry_count + r->attempt_count;
        if (code == ERR_BAD_VALUE && most > 1) {
            most = 1;
            code = ERR_NONE;
        } else if (code == ERR_NONE || code == ERR_BAD_VALUE) {
            if (code == ERR_BAD_VALUE && r->entry_count > 0)
                log_to_stderr(&r->entries[0]);
            if (code == ERR_BAD_VALUE)
                log_error(NULL, err->message, "the store refuses a record of the outbox");
            d->replayed += code == ERR_NONE ? (int64_t)count : 0;
            code = forget_records(d->outbox, r->last_seq, err);
        }
        for (size_t i = 0; i < r->payload_count; i++)
            json_object_put(r->payloads[i]);
        r->payload_count = 0;
    }
    for (size_t i = 0; i < r->payload_count; i++)
        json_object_put(r->payloads[i]);
    return code;
}

/* ---- the whole ---- */

/* *fd: -1 while another replays. */
static enum err_code lock_replay(struct outbox *outbox, int *fd, struct err *err)
{
    enum err_code code = ERR_NONE;

    *fd = openat(outbox->file.directory, "outbox.lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
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
    struct drain d = {.outbox = outbox, .replay = replay};
    struct records *records = NULL;
    struct err local;
    int fd;

    *replayed = 0;
    if (err == NULL)
        err = &local;
    enum err_code code = lock_replay(outbox, &fd, err);
    if (fd < 0)
        return code;
    code = drain_entries(&d, err);
    if (code == ERR_NONE && (records = malloc(sizeof *records)) != NULL)
        code = drain_records(&d, records, err);
    free(records);
    close(fd);
    *replayed = d.replayed;
    if (code == ERR_NONE && d.stuck_count > 0) {
        *err = d.why_stuck;
        code = ERR_INTERNAL;
    }
    return code;
}
