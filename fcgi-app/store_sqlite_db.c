/* store_sqlite_db.c - connections, statements, errors, the writers' queue and transactions of the
 * embedded store. See store_sqlite.h.
 *
 * SQLite lets one writer in at a time, and its busy handler polls. So the writers of a process take
 * a mutex, and those of the host then wait for each other on flock() of a file beside the database,
 * where the kernel wakes them in turn. SQLite's own locks still decide (others may use the database
 * without ours, a DBA's shell for one), so that queue is about speed only; a lock that a process
 * holds ends with the process. All waits of a transaction share one deadline.
 *
 * A commit is durable once its log is on the disk. SQLite would wait for that within the turn
 * (synchronous = FULL); here the turn ends first (NORMAL), and the next writer is at work while this one
 * waits for the disk. Nobody is answered before. Others may see what could still be lost in a power cut,
 * but then whatever they build on it stands behind it in the log, and is lost with it. What leaves the
 * log for the database was made durable by SQLite.
 *
 * flock() has no timeout. Where it must wait, a timer of this thread alone sends a signal every few
 * milliseconds, which does nothing but end the wait with EINTR; outside that wait the signal never
 * arrives, because others in the thread (libfcgi) would take an interrupted read for its end. */
#include "store_sqlite.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

#include "text.h"
#include "tsan.h"

#define TICK_SIGNAL (SIGRTMIN + 1)
#define TICK_NS 50000000L

#ifndef sigev_notify_thread_id /* named by glibc from 2.38 on */
#define sigev_notify_thread_id _sigev_un._tid
#endif

/* ---- errors ---- */

static enum err_code code_of(int result)
{
    switch (result & 0xff) { /* the primary code; the rest tells more */
    case SQLITE_OK:
    case SQLITE_ROW:
    case SQLITE_DONE:
        return ERR_NONE;
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
    case SQLITE_CANTOPEN:
    case SQLITE_IOERR:
    case SQLITE_PROTOCOL:  /* locks of the log could not be had in time */
    case SQLITE_READONLY:  /* the file system has become so */
    case SQLITE_INTERRUPT: /* a query past its deadline */
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
    case SQLITE_NOMEM:
        return ERR_STORE_UNAVAILABLE;
    case SQLITE_FULL:
        return ERR_STORAGE_FULL;
    case SQLITE_CONSTRAINT:
    case SQLITE_MISMATCH:
    case SQLITE_TOOBIG:
        return ERR_BAD_VALUE;
    default:
        return ERR_INTERNAL;
    }
}

enum err_code sqlite_failed(struct err *err, int result)
{
    /* Not sqlite3_errmsg: it may quote. */
    return err_set(err, code_of(result), "embedded store: %s (SQLite %d)", sqlite3_errstr(result),
                   result);
}

/* ---- connections ---- */

static bool is_ascii(const char *s)
{
    for (; *s != '\0'; s++)
        if ((unsigned char)*s >= 0x80)
            return false;
    return true;
}

/* SQL: extract_fold(text). */
static void fold(sqlite3_context *context, int count, sqlite3_value **values)
{
    const char *s = (const char *)sqlite3_value_text(values[0]);
    char lower[STORE_TEXT_SIZE];
    struct arena arena;

    (void)count;
    if (s == NULL)
        return; /* NULL */
    if (strlen(s) < sizeof lower && is_ascii(s)) {
        size_t n = 0;
        for (; s[n] != '\0'; n++) {
            lower[n] = s[n];
            if (s[n] >= 'A' && s[n] <= 'Z')
                lower[n] = (char)(s[n] | 0x20);
        }
        sqlite3_result_text(context, lower, (int)n, SQLITE_TRANSIENT);
        return;
    }
    arena_init(&arena);
    sqlite3_result_text(context, text_fold(&arena, s), -1, SQLITE_TRANSIENT);
    arena_reset(&arena);
}

enum err_code sqlite_connect(struct sqlite_db *db, const char *path, struct sqlite_file file,
                             int64_t timeout_ms, struct err *err)
{
    struct sqlite_file opened = {0};
    int result =
        sqlite3_open_v2(path, &db->handle,
                        SQLITE_OPEN_READWRITE | SQLITE_OPEN_NOMUTEX | SQLITE_OPEN_EXRESCODE, NULL);

    if (result != SQLITE_OK)
        return sqlite_failed(err, result);
    /* It was there before and is there after: so it is what was opened in between. */
    if (sqlite_file_at(path, &opened, err) != ERR_NONE)
        return err->code;
    if (!sqlite_same_file(opened, file))
        return err_set(err, ERR_STORE_UNAVAILABLE,
                       "embedded store: the file was replaced while it was opened");
    db->file = file;
    result = sqlite3_busy_timeout(db->handle, (int)timeout_ms);
    if (result == SQLITE_OK)
        result = sqlite3_create_function_v2(db->handle, "extract_fold", 1,
                                            SQLITE_UTF8 | SQLITE_DETERMINISTIC | SQLITE_DIRECTONLY,
                                            NULL, fold, NULL, NULL, NULL);
    if (result != SQLITE_OK)
        return sqlite_failed(err, result);
    return sqlite_exec(db, "PRAGMA foreign_keys = ON; PRAGMA synchronous = NORMAL", err);
}

void sqlite_disconnect(struct sqlite_db *db)
{
    for (size_t i = 0; i < db->cached; i++)
        sqlite3_finalize(db->cache[i].statement);
    sqlite_forget_usable(db);
    sqlite3_close(db->handle);
    *db = (struct sqlite_db){0};
}

/* ---- statements ---- */

enum err_code sqlite_exec(struct sqlite_db *db, const char *sql, struct err *err)
{
    int result = sqlite3_exec(db->handle, sql, NULL, NULL, NULL);
    return result == SQLITE_OK ? ERR_NONE : sqlite_failed(err, result);
}

/* Where a new statement is kept: in the place of the oldest that nobody reads from, once all are taken.
 * SQLITE_CACHE_SIZE: nowhere. */
static size_t find_place(struct sqlite_db *db)
{
    if (db->cached < SQLITE_CACHE_SIZE)
        return db->cached++;
    for (size_t i = 0; i < SQLITE_CACHE_SIZE; i++) {
        size_t place = db->oldest;
        db->oldest = (db->oldest + 1) % SQLITE_CACHE_SIZE;
        if (!sqlite3_stmt_busy(db->cache[place].statement)) {
            sqlite3_finalize(db->cache[place].statement);
            return place;
        }
    }
    return SQLITE_CACHE_SIZE;
}

static enum err_code prepared(struct sqlite_db *db, const char *sql, sqlite3_stmt **statement,
                              struct err *err)
{
    for (size_t i = 0; i < db->cached; i++) {
        if (db->cache[i].sql == sql) {
            *statement = db->cache[i].statement;
            return ERR_NONE;
        }
    }
    int result =
        sqlite3_prepare_v3(db->handle, sql, -1, SQLITE_PREPARE_PERSISTENT, statement, NULL);
    if (result != SQLITE_OK)
        return sqlite_failed(err, result);
    size_t place = find_place(db);
    if (place == SQLITE_CACHE_SIZE) {
        sqlite3_finalize(*statement);
        return err_set(err, ERR_INTERNAL, "embedded store: all statements are in use");
    }
    db->cache[place].sql = sql;
    db->cache[place].statement = *statement;
    return ERR_NONE;
}

static int bind(sqlite3_stmt *statement, int at, const struct store_value *value)
{
    switch (value->type) {
    case STORE_INTEGER:
        return sqlite3_bind_int64(statement, at, value->integer);
    case STORE_REAL:
        return sqlite3_bind_double(statement, at, value->real);
    case STORE_TEXT:
        return sqlite3_bind_text(statement, at, value->text, -1, SQLITE_STATIC);
    case STORE_NULL:
        break;
    }
    return sqlite3_bind_null(statement, at);
}

enum err_code sqlite_first_row(struct sqlite_db *db, sqlite3_stmt **row, struct err *err,
                               const char *sql, const struct store_value *values, size_t count)
{
    sqlite3_stmt *statement = NULL;
    int result = SQLITE_OK;

    *row = NULL;
    if (prepared(db, sql, &statement, err) != ERR_NONE)
        return err->code;
    for (size_t i = 0; i < count && result == SQLITE_OK; i++)
        result = bind(statement, (int)i + 1, &values[i]);
    if (result == SQLITE_OK)
        result = sqlite3_step(statement);
    if (result == SQLITE_ROW) {
        *row = statement;
        return ERR_NONE;
    }
    sqlite3_reset(statement);
    return result == SQLITE_DONE ? ERR_NONE : sqlite_failed(err, result);
}

enum err_code sqlite_run(struct sqlite_db *db, int *changed, struct err *err, const char *sql,
                         const struct store_value *values, size_t count)
{
    sqlite3_stmt *row = NULL;
    enum err_code code = sqlite_first_row(db, &row, err, sql, values, count);

    if (row != NULL)
        sqlite3_reset(row);
    if (changed != NULL)
        *changed = code == ERR_NONE ? sqlite3_changes(db->handle) : 0;
    return code;
}

/* ---- the writers' queue ---- */

static void on_tick(int signal_number)
{
    (void)signal_number;
}

static int start_ticks(timer_t *timer)
{
    struct sigaction action = {.sa_handler = on_tick}; /* no SA_RESTART: flock() is to return */
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = TICK_SIGNAL};
    /* Again and again: a tick that comes just before flock() is lost. */
    struct itimerspec every = {.it_value.tv_nsec = TICK_NS, .it_interval.tv_nsec = TICK_NS};

    event.sigev_notify_thread_id = gettid();
    if (sigaction(TICK_SIGNAL, &action, NULL) != 0 ||
        timer_create(CLOCK_MONOTONIC, &event, timer) != 0)
        return -1;
    if (timer_settime(*timer, 0, &every, NULL) != 0) {
        timer_delete(*timer);
        return -1;
    }
    return 0;
}

/* flock() with a deadline. Returns 0 or an errno. */
static int flock_until(int fd, int64_t deadline_ms)
{
    const struct timespec at_once = {0};
    sigset_t tick;
    sigset_t before;
    timer_t timer;
    int error = 0;

    sigemptyset(&tick);
    sigaddset(&tick, TICK_SIGNAL);
    pthread_sigmask(SIG_BLOCK, &tick, &before);
    if (start_ticks(&timer) != 0) {
        error = errno;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        return error;
    }
    pthread_sigmask(SIG_UNBLOCK, &tick, NULL);
    while (flock(fd, LOCK_EX) != 0) {
        error = errno != EINTR ? errno : clock_monotonic_ms() >= deadline_ms ? ETIMEDOUT : 0;
        if (error != 0)
            break;
    }
    pthread_sigmask(SIG_BLOCK, &tick, NULL);
    timer_delete(timer);
    while (sigtimedwait(&tick, NULL, &at_once) == TICK_SIGNAL)
        ;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

enum err_code sqlite_host_lock(struct store_sqlite *store, int64_t deadline_ms, struct err *err)
{
    int error = flock(store->lock_fd, LOCK_EX | LOCK_NB) == 0 ? 0 : errno;

    if (error == EWOULDBLOCK || error == EINTR)
        error = flock_until(store->lock_fd, deadline_ms);
    if (error == 0)
        return ERR_NONE;
    return err_set(err, ERR_STORE_UNAVAILABLE, "embedded store: no turn to write: %s",
                   strerror(error));
}

void sqlite_host_unlock(struct store_sqlite *store)
{
    flock(store->lock_fd, LOCK_UN);
}

/* ---- transactions ---- */

int sqlite_lock_mutex(pthread_mutex_t *mutex, int64_t deadline_ms)
{
    const struct timespec until = {.tv_sec = (time_t)(deadline_ms / 1000),
                                   .tv_nsec = (long)(deadline_ms % 1000) * 1000000};

    TSAN_BEFORE_LOCK(mutex);
    int error = pthread_mutex_clocklock(mutex, CLOCK_MONOTONIC, &until);
    TSAN_AFTER_LOCK(mutex, error == 0);
    return error;
}

/* The turn of this thread among those of the process, then of the process on the host. */
static enum err_code take_turn(struct store_sqlite *store, int64_t deadline_ms, struct err *err)
{
    int error = sqlite_lock_mutex(&store->writer_mutex, deadline_ms);
    enum err_code code = ERR_NONE;

    if (error != 0)
        return err_set(err, ERR_STORE_UNAVAILABLE, "embedded store: no turn to write: %s",
                       strerror(error));
    code = sqlite_host_lock(store, deadline_ms, err);
    if (code != ERR_NONE)
        pthread_mutex_unlock(&store->writer_mutex);
    return code;
}

static void end_turn(struct store_sqlite *store)
{
    sqlite_host_unlock(store);
    pthread_mutex_unlock(&store->writer_mutex);
}

static void roll_back(struct sqlite_db *db)
{
    if (sqlite3_get_autocommit(db->handle) == 0)
        sqlite3_exec(db->handle, "ROLLBACK", NULL, NULL, NULL); /* why is said already */
}

/* What the disk has refused once it may have lost: from then on the log proves nothing, so all that it
 * holds goes to the database. */
static enum err_code settle_doubt(struct store_sqlite *store, struct err *err)
{
    if (!atomic_load(&store->log_in_doubt))
        return ERR_NONE;
    int result =
        sqlite3_wal_checkpoint_v2(store->writer.handle, NULL, SQLITE_CHECKPOINT_FULL, NULL, NULL);
    if (result != SQLITE_OK)
        return sqlite_failed(err, result);
    atomic_store(&store->log_in_doubt, false);
    return ERR_NONE;
}

static enum err_code begin_until(struct store_sqlite *store, int64_t deadline_ms, struct err *err)
{
    enum err_code code = take_turn(store, deadline_ms, err);

    if (code != ERR_NONE)
        return code;
    code = sqlite_follow(store, deadline_ms, err);
    if (code == ERR_NONE) {
        int64_t left_ms = deadline_ms - clock_monotonic_ms();
        sqlite3_busy_timeout(store->writer.handle, left_ms > 1 ? (int)left_ms : 1);
        code = settle_doubt(store, err);
    }
    if (code == ERR_NONE)
        code = sqlite_run(&store->writer, NULL, err, "BEGIN IMMEDIATE", NULL, 0);
    if (code != ERR_NONE)
        end_turn(store);
    return code;
}

/* Ends the turn of one who has committed, and then waits for the disk. The log stays open meanwhile. */
static enum err_code end_durably(struct store_sqlite *store, struct err *err)
{
    pthread_rwlock_rdlock(&store->log_lock);
    end_turn(store);
    int error = fdatasync(store->log_fd) == 0 ? 0 : errno;
    pthread_rwlock_unlock(&store->log_lock);
    if (error == 0)
        return ERR_NONE;
    atomic_store(&store->log_in_doubt, true);
    return err_set(err,
                   error == ENOSPC || error == EDQUOT ? ERR_STORAGE_FULL : ERR_STORE_UNAVAILABLE,
                   "embedded store: the log cannot be brought to the disk: %s", strerror(error));
}

enum err_code sqlite_begin(struct store_sqlite *store, struct sqlite_tx *tx, struct err *err)
{
    enum err_code code = begin_until(store, clock_monotonic_ms() + store->timeout_ms, err);

    if (code != ERR_NONE)
        return code;
    tx->db = &store->writer;
    tx->now_ms = clock_wall_ms();
    clock_format(tx->now_ms, tx->now);
    return ERR_NONE;
}

enum err_code sqlite_end(struct store_sqlite *store, enum err_code code, struct err *err)
{
    if (code == ERR_NONE)
        code = sqlite_run(&store->writer, NULL, err, "COMMIT", NULL, 0);
    if (code != ERR_NONE) {
        roll_back(&store->writer);
        end_turn(store);
        return code;
    }
    atomic_store(&store->written_ms, clock_monotonic_ms());
    return end_durably(store, err);
}

bool sqlite_in_doubt(struct store_sqlite *store)
{
    return atomic_load(&store->log_in_doubt);
}

enum err_code sqlite_try_write(struct store_sqlite *store, int64_t deadline_ms, struct err *err)
{
    enum err_code code = begin_until(store, deadline_ms, err);

    if (code != ERR_NONE)
        return code;
    roll_back(&store->writer);
    end_turn(store);
    return ERR_NONE;
}

enum err_code sqlite_follow_now(struct store_sqlite *store, struct err *err)
{
    int64_t deadline_ms = clock_monotonic_ms() + store->timeout_ms;
    enum err_code code = take_turn(store, deadline_ms, err);

    if (code != ERR_NONE)
        return code;
    code = sqlite_follow(store, deadline_ms, err);
    end_turn(store);
    return code;
}

/* ---- batches ---- */

static enum err_code keep(struct sqlite_tx *tx, struct err *err)
{
    return sqlite_run(tx->db, NULL, err, "RELEASE item", NULL, 0);
}

static enum err_code undo(struct sqlite_tx *tx, struct err *err)
{
    enum err_code code = sqlite_run(tx->db, NULL, err, "ROLLBACK TO item", NULL, 0);
    return code == ERR_NONE ? keep(tx, err) : code;
}

/* By itself, so that it can be undone. Returns an error only where the whole batch must end. */
static enum err_code run_item(struct sqlite_tx *tx, sqlite_do_item *do_item, const void *items,
                              size_t i, struct err *err)
{
    struct err why = {.message = ""};
    enum err_code code = sqlite_run(tx->db, NULL, err, "SAVEPOINT item", NULL, 0);

    if (code != ERR_NONE)
        return code;
    code = do_item(tx, items, i, &why);
    if (code == ERR_NONE)
        return keep(tx, err);
    if (code == ERR_BAD_VALUE)
        return undo(tx, err);
    *err = why;
    return code;
}

/* As if none were refused: without the marks that could undo one alone, for which SQLite copies each
 * page. *refused: one was, and all must be done again. */
static enum err_code run_plainly(struct sqlite_tx *tx, sqlite_do_item *do_item, const void *items,
                                 size_t count, bool *refused, struct err *err)
{
    enum err_code code = ERR_NONE;

    *refused = false;
    for (size_t i = 0; i < count && code == ERR_NONE; i++)
        code = do_item(tx, items, i, err);
    if (code != ERR_BAD_VALUE)
        return code;
    *refused = true;
    roll_back(tx->db);
    return sqlite_run(tx->db, NULL, err, "BEGIN IMMEDIATE", NULL, 0);
}

enum err_code sqlite_run_batch(struct store_sqlite *store, sqlite_do_item *do_item,
                               const void *items, size_t count, struct err *err)
{
    struct sqlite_tx tx;
    bool refused = false;
    enum err_code code = sqlite_begin(store, &tx, err);

    if (code != ERR_NONE)
        return code;
    code = run_plainly(&tx, do_item, items, count, &refused, err);
    for (size_t i = 0; i < count && code == ERR_NONE && refused; i++)
        code = run_item(&tx, do_item, items, i, err);
    return sqlite_end(store, code, err);
}
