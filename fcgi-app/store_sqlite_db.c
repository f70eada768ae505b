/* store_sqlite_db.c - connections, statements, errors, the writers' queue and transactions of the
 * embedded store. See store_sqlite.h.
 *
 * SQLite lets one writer in at a time, and its busy handler polls. So the writers of a process take
 * a mutex, and those of the host then wait for each other on flock() of a file beside the database,
 * where the kernel wakes them in turn. SQLite's own locks still decide (others may use the database
 * without ours, a DBA's shell for one), so that queue is about speed only; a lock that a process
 * holds ends with the process. All waits of a transaction share one deadline.
 *
 * flock() has no timeout. Where it must wait, a timer of this thread alone sends a signal every few
 * milliseconds, which does nothing but end the wait with EINTR; outside that wait the signal never
 * arrives, because others in the thread (libfcgi) would take an interrupted read for its end. */
#include "store_sqlite.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "text.h"

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

bool sqlite_text_fits(const char *s, size_t min, size_t max)
{
    size_t len = s == NULL ? 0 : strnlen(s, max + 1);
    return len >= min && len <= max;
}

/* ---- connections ---- */

/* The owner of the directory: the service, where an administrator sets it up as root. */
static int give_to_directory_owner(int fd, const char *path)
{
    char *copy = strdup(path); /* dirname() writes into it */
    struct stat directory;
    int result = -1;

    if (copy != NULL && stat(dirname(copy), &directory) == 0)
        result = fchown(fd, directory.st_uid, directory.st_gid);
    free(copy);
    return result;
}

enum err_code sqlite_create_file(const char *path, struct err *err)
{
    /* O_EXCL: closing a descriptor of a database that is in use would drop SQLite's locks. */
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    enum err_code code = ERR_NONE;

    if (fd < 0 && errno == EEXIST)
        return ERR_NONE;
    if (fd < 0 || (geteuid() == 0 && give_to_directory_owner(fd, path) != 0))
        code = err_set(
            err, errno == ENOSPC || errno == EDQUOT ? ERR_STORAGE_FULL : ERR_STORE_UNAVAILABLE,
            "cannot create %s: %s", path, strerror(errno));
    if (fd >= 0)
        close(fd);
    return code;
}

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

enum err_code sqlite_connect(struct sqlite_db *db, const char *path, int64_t timeout_ms,
                             struct err *err)
{
    int result =
        sqlite3_open_v2(path, &db->handle,
                        SQLITE_OPEN_READWRITE | SQLITE_OPEN_NOMUTEX | SQLITE_OPEN_EXRESCODE, NULL);

    if (result == SQLITE_OK)
        result = sqlite3_busy_timeout(db->handle, (int)timeout_ms);
    if (result == SQLITE_OK)
        result = sqlite3_create_function_v2(db->handle, "extract_fold", 1,
                                            SQLITE_UTF8 | SQLITE_DETERMINISTIC | SQLITE_DIRECTONLY,
                                            NULL, fold, NULL, NULL, NULL);
    if (result != SQLITE_OK)
        return sqlite_failed(err, result);
    return sqlite_exec(db, "PRAGMA foreign_keys = ON; PRAGMA synchronous = FULL", err);
}

void sqlite_disconnect(struct sqlite_db *db)
{
    for (size_t i = 0; i < db->cached; i++)
        sqlite3_finalize(db->cache[i].statement);
    sqlite3_close(db->handle);
    *db = (struct sqlite_db){0};
}

/* ---- statements ---- */

enum err_code sqlite_exec(struct sqlite_db *db, const char *sql, struct err *err)
{
    int result = sqlite3_exec(db->handle, sql, NULL, NULL, NULL);
    return result == SQLITE_OK ? ERR_NONE : sqlite_failed(err, result);
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
    if (db->cached == SQLITE_CACHE_SIZE)
        return err_set(err, ERR_INTERNAL, "embedded store: SQLITE_CACHE_SIZE is too small");
    int result =
        sqlite3_prepare_v3(db->handle, sql, -1, SQLITE_PREPARE_PERSISTENT, statement, NULL);
    if (result != SQLITE_OK)
        return sqlite_failed(err, result);
    db->cache[db->cached].sql = sql;
    db->cache[db->cached].statement = *statement;
    db->cached++;
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

int sqlite_lock_mutex(pthread_mutex_t *mutex, int64_t timeout_ms)
{
    struct timespec until;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += (time_t)(timeout_ms / 1000);
    until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    return pthread_mutex_timedlock(mutex, &until);
}

enum err_code sqlite_begin(struct store_sqlite *store, struct sqlite_tx *tx, struct err *err)
{
    int64_t deadline_ms = clock_monotonic_ms() + store->timeout_ms;
    int error = sqlite_lock_mutex(&store->writer_mutex, store->timeout_ms);

    if (error != 0)
        return err_set(err, ERR_STORE_UNAVAILABLE, "embedded store: no turn to write: %s",
                       strerror(error));
    if (sqlite_host_lock(store, deadline_ms, err) != ERR_NONE)
        goto unlock_mutex;
    int64_t left_ms = deadline_ms - clock_monotonic_ms();
    sqlite3_busy_timeout(store->writer.handle, left_ms > 1 ? (int)left_ms : 1);
    if (sqlite_exec(&store->writer, "BEGIN IMMEDIATE", err) != ERR_NONE)
        goto unlock_host;
    tx->db = &store->writer;
    tx->now_ms = clock_wall_ms();
    clock_format(tx->now_ms, tx->now);
    return ERR_NONE;

unlock_host:
    sqlite_host_unlock(store);
unlock_mutex:
    pthread_mutex_unlock(&store->writer_mutex);
    return err->code;
}

enum err_code sqlite_end(struct store_sqlite *store, enum err_code code, struct err *err)
{
    struct sqlite_db *db = &store->writer;

    if (code == ERR_NONE)
        code = sqlite_exec(db, "COMMIT", err);
    if (code != ERR_NONE && sqlite3_get_autocommit(db->handle) == 0)
        sqlite3_exec(db->handle, "ROLLBACK", NULL, NULL, NULL); /* err says why already */
    sqlite_host_unlock(store);
    pthread_mutex_unlock(&store->writer_mutex);
    return code;
}

enum err_code sqlite_mark(struct sqlite_tx *tx, struct err *err)
{
    return sqlite_run(tx->db, NULL, err, "SAVEPOINT item", NULL, 0);
}

enum err_code sqlite_keep(struct sqlite_tx *tx, struct err *err)
{
    return sqlite_run(tx->db, NULL, err, "RELEASE item", NULL, 0);
}

enum err_code sqlite_undo(struct sqlite_tx *tx, struct err *err)
{
    enum err_code code = sqlite_run(tx->db, NULL, err, "ROLLBACK TO item", NULL, 0);
    return code == ERR_NONE ? sqlite_keep(tx, err) : code;
}
