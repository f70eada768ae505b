/* store_mssql_watch.c - ends what takes longer than it may: calls and logins inside db-lib. See
 * store_mssql.h.
 *
 * db-lib's own time limits count seconds, from one packet to the next. And there is a case in which
 * they never end: where the server closes the TLS session (close_notify) while an answer is waited
 * for, FreeTDS 1.3 reads nothing again and again, at full speed (src/tds/net.c, tds_goodread: a read
 * of 0 bytes goes on). shutdown() of the socket does not help, for it stays readable. What helps is an
 * error: connect() to AF_UNSPEC resets a TCP connection, after which poll() reports POLLERR and every
 * read fails (tcp_disconnect in Linux; connect(2)). It is done at the deadline of a call, and before,
 * where a connection was closed by the server for a while and the call has not ended.
 *
 * db-lib closes its descriptor when it likes, and its number may be another file's a moment later. So
 * nothing is ever done to a descriptor of db-lib's, but to a duplicate, which is ours and keeps the
 * socket what it is. Of a login that is under way nobody tells the descriptor: sockets are looked for
 * by what FreeTDS sets on them, and each is duplicated first and judged then. In the worst case
 * another login that began later ends with it, and is tried again. */
#include <dirent.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "store_mssql.h"

#define SEARCH_AGAIN_MS 250
#define LOOK_EVERY_MS 200      /* while calls are under way */
#define FREETDS_KEEP_IDLE_S 40 /* src/tds/net.c, tds_setup_socket */
#define FREETDS_KEEP_INTERVAL_S 2

struct mssql_watch {
    pthread_t thread;
    pthread_cond_t wake;
    int64_t wake_ms; /* monotonic */
    bool stopping;
};

/* All that db-lib has open in this process, of every store: none of it is a login under way. */
static struct {
    pthread_mutex_t lock;
    struct mssql_guard *first;
} guards = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* ---- sockets ---- */

static void reset_connection(int fd)
{
    const struct sockaddr nowhere = {.sa_family = AF_UNSPEC};
    (void)!connect(fd, &nowhere, sizeof nowhere);
}

static bool has_option(int fd, int level, int option, int value)
{
    int found = -1;
    socklen_t size = sizeof found;

    return getsockopt(fd, level, option, &found, &size) == 0 && found == value;
}

/* Under the lock. */
static bool is_guarded(int fd)
{
    struct stat here;
    struct stat there;

    if (fstat(fd, &here) != 0)
        return true;
    for (const struct mssql_guard *g = guards.first; g != NULL; g = g->next)
        if (g->fd >= 0 && fstat(g->fd, &there) == 0 && here.st_ino == there.st_ino &&
            here.st_dev == there.st_dev)
            return true;
    return false;
}

/* A duplicate of the descriptor where it is a socket; -1: it is none. A file's is never closed: the
 * process's locks on the file, SQLite's, would end with any descriptor of it (fcntl(2)). So files are
 * passed over; one that has just taken a socket's number, which next to never happens, stays open. */
static int duplicate_socket(int fd)
{
    struct stat status;
    int copy =
        fstat(fd, &status) == 0 && S_ISSOCK(status.st_mode) ? fcntl(fd, F_DUPFD_CLOEXEC, 0) : -1;

    return copy >= 0 && fstat(copy, &status) == 0 && S_ISSOCK(status.st_mode) ? copy : -1;
}

static bool is_of_freetds(int fd)
{
    return has_option(fd, SOL_SOCKET, SO_PROTOCOL, IPPROTO_TCP) &&
           has_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, FREETDS_KEEP_IDLE_S) &&
           has_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, FREETDS_KEEP_INTERVAL_S);
}

/* Under the lock: resets what looks like the socket of a login. */
static void reset_logins(void)
{
    DIR *directory = opendir("/proc/self/fd");
    const struct dirent *entry;

    while (directory != NULL && (entry = readdir(directory)) != NULL) {
        int fd =
            entry->d_name[0] == '.' ? -1 : duplicate_socket((int)strtol(entry->d_name, NULL, 10));
        if (fd < 0)
            continue;
        if (is_of_freetds(fd) && !is_guarded(fd))
            reset_connection(fd);
        close(fd);
    }
    if (directory != NULL)
        closedir(directory);
}

/* ---- the thread ---- */

/* Has the server ended a connection, now and when it was looked at before? A call that goes on all the
 * same is one that reads nothing. */
static void look(struct mssql_guard *guard)
{
    struct pollfd fd = {.fd = guard->fd, .events = POLLRDHUP};
    bool was_ending = guard->is_ending;

    guard->is_ending = poll(&fd, 1, 0) > 0;
    if (was_ending && guard->is_ending)
        reset_connection(guard->fd);
}

static void fire(struct mssql_guard *guard, int64_t now_ms)
{
    guard->fired = true;
    if (guard->fd >= 0) {
        reset_connection(guard->fd);
        guard->deadline_ms = INT64_MAX;
    } else {
        reset_logins();
        guard->deadline_ms = now_ms + SEARCH_AGAIN_MS;
    }
}

/* Under the lock: wakes in time for the guard. True: that is earlier than it was. */
static bool plan(struct mssql_watch *watch, const struct mssql_guard *guard, int64_t now_ms)
{
    int64_t look_ms = now_ms + LOOK_EVERY_MS;
    int64_t wake_ms = guard->fd >= 0 && look_ms < guard->deadline_ms ? look_ms : guard->deadline_ms;

    if (guard->deadline_ms == INT64_MAX || wake_ms >= watch->wake_ms)
        return false;
    watch->wake_ms = wake_ms;
    return true;
}

static void *run_watch(void *context)
{
    struct mssql_watch *watch = context;

    pthread_mutex_lock(&guards.lock);
    while (!watch->stopping) {
        int64_t now_ms = clock_monotonic_ms();
        watch->wake_ms = INT64_MAX;
        for (struct mssql_guard *g = guards.first; g != NULL; g = g->next) {
            if (g->watch != watch || g->deadline_ms == INT64_MAX)
                continue;
            if (g->deadline_ms <= now_ms)
                fire(g, now_ms);
            else if (g->fd >= 0)
                look(g);
            plan(watch, g, now_ms);
        }
        struct timespec until = {.tv_sec = (time_t)(watch->wake_ms / 1000),
                                 .tv_nsec = (long)(watch->wake_ms % 1000) * 1000000};
        if (watch->wake_ms == INT64_MAX)
            pthread_cond_wait(&watch->wake, &guards.lock);
        else
            pthread_cond_timedwait(&watch->wake, &guards.lock, &until);
    }
    pthread_mutex_unlock(&guards.lock);
    return NULL;
}

struct mssql_watch *mssql_watch_start(void)
{
    struct mssql_watch *watch = calloc(1, sizeof *watch);
    pthread_condattr_t monotonic;

    if (watch == NULL)
        return NULL;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&watch->wake, &monotonic);
    pthread_condattr_destroy(&monotonic);
    if (pthread_create(&watch->thread, NULL, run_watch, watch) == 0)
        return watch;
    pthread_cond_destroy(&watch->wake);
    free(watch);
    return NULL;
}

void mssql_watch_stop(struct mssql_watch *watch)
{
    if (watch == NULL)
        return;
    pthread_mutex_lock(&guards.lock);
    watch->stopping = true;
    pthread_cond_signal(&watch->wake);
    pthread_mutex_unlock(&guards.lock);
    pthread_join(watch->thread, NULL);
    pthread_cond_destroy(&watch->wake);
    free(watch);
}

/* ---- guards ---- */

void mssql_guard_init(struct mssql_guard *guard, struct mssql_watch *watch, int fd)
{
    *guard = (struct mssql_guard){.watch = watch, .fd = fd, .deadline_ms = INT64_MAX};
    pthread_mutex_lock(&guards.lock);
    guard->next = guards.first;
    guards.first = guard;
    pthread_mutex_unlock(&guards.lock);
}

void mssql_guard_reset(struct mssql_guard *guard)
{
    struct mssql_guard **at = &guards.first;

    pthread_mutex_lock(&guards.lock);
    while (*at != NULL && *at != guard)
        at = &(*at)->next;
    if (*at != NULL)
        *at = guard->next;
    pthread_mutex_unlock(&guards.lock);
    if (guard->fd >= 0)
        close(guard->fd);
    guard->fd = -1;
}

void mssql_guard_arm(struct mssql_guard *guard, int64_t deadline_ms)
{
    pthread_mutex_lock(&guards.lock);
    guard->deadline_ms = deadline_ms;
    guard->is_ending = false;
    if (plan(guard->watch, guard, clock_monotonic_ms()))
        pthread_cond_signal(&guard->watch->wake);
    pthread_mutex_unlock(&guards.lock);
}

bool mssql_guard_disarm(struct mssql_guard *guard)
{
    pthread_mutex_lock(&guards.lock);
    guard->deadline_ms = INT64_MAX;
    bool fired = guard->fired;
    pthread_mutex_unlock(&guards.lock);
    return fired;
}
