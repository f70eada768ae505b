/* store_mssql_pool.c - a process's connections to SQL Server. See store_mssql.h.
 *
 * Whoever needs a connection takes one that is unused, or waits for one. Logins run in threads of
 * their own, so that whoever waits leaves at its own deadline whatever a login is at: the resolver, a
 * server that does not answer, TLS. A login that ends late leaves its connection to others.
 *
 * Where there is no connection and the last login failed, one login at a time is tried, and from the
 * second failure on not before a pause. Whoever comes in the pause fails at once with what the last
 * login said; whoever comes during a login waits for its outcome, but no longer than a server that is
 * there needs for one. So an absent server costs a request little time, one that is back refuses
 * nobody, and a wrong password does not fill the server's log or lock the account. */
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "clock.h"
#include "store_mssql.h"

#define AGE_MAX_MS 600000 /* then made anew: a failed-over or rebalanced server gets its share */
#define LOGINS_MAX 4      /* at a time: a server that has just come back has enough to do */
#define PAUSE_MIN_MS 100
#define PAUSE_MAX_MS 1000
#define PAUSE_REFUSED_MS 5000 /* after a login that the server understood and refused */
#define PROMPT_LOGIN_MS 1000  /* what a login takes where the server is there */
#define CLOSE_WAIT_MS 2000

struct mssql_pool {
    struct mssql_target target;
    struct mssql_watch *watch;
    int size;
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t changed;
    struct mssql_conn *idle[MSSQL_POOL_MAX]; /* the last one was used last */
    int idle_count;
    int open;              /* idle, taken, or in a login */
    int logging_in;        /* of these */
    int waiting;           /* callers */
    int failures;          /* of logins, since one succeeded */
    int64_t failed_ms;     /* when the last of them did */
    int64_t last_login_ms; /* when it began, whatever became of it */
    int64_t no_login_before_ms;
    struct mssql_failure last_failure;
    bool is_abandoned; /* closed while a login hangs, whose thread then destroys it */
};

struct mssql_pool *mssql_pool_new(struct mssql_target *take_target, int size)
{
    struct mssql_pool *pool = calloc(1, sizeof *pool);
    pthread_condattr_t monotonic;

    if (pool == NULL)
        return NULL;
    pool->watch = mssql_watch_start();
    if (pool->watch == NULL) {
        free(pool);
        return NULL;
    }
    pool->target = *take_target;
    *take_target = (struct mssql_target){.encrypt = 0};
    pool->size = size < 1 ? 1 : size > MSSQL_POOL_MAX ? MSSQL_POOL_MAX : size;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&pool->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    return pool;
}

const struct mssql_target *mssql_pool_target(const struct mssql_pool *pool)
{
    return &pool->target;
}

/* Under the lock. The caller looks what is so. */
static void wait_change(struct mssql_pool *pool, int64_t until_ms)
{
    struct timespec until = {.tv_sec = (time_t)(until_ms / 1000),
                             .tv_nsec = (long)(until_ms % 1000) * 1000000};

    pthread_cond_timedwait(&pool->changed, &pool->lock, &until);
}

/* Under the lock: takes the unused ones out. Their memory is the caller's array. */
static int take_all_idle(struct mssql_pool *pool, struct mssql_conn **conns)
{
    int count = pool->idle_count;

    for (int i = 0; i < count; i++)
        conns[i] = pool->idle[i];
    pool->idle_count = 0;
    pool->open -= count;
    return count;
}

static void close_all(struct mssql_conn **conns, int count)
{
    for (int i = 0; i < count; i++)
        mssql_close(conns[i]);
}

static void destroy(struct mssql_pool *pool)
{
    struct mssql_conn *conns[MSSQL_POOL_MAX];

    close_all(conns, take_all_idle(pool, conns));
    mssql_watch_stop(pool->watch);
    mssql_target_reset(&pool->target);
    pthread_cond_destroy(&pool->changed);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

void mssql_pool_free(struct mssql_pool *pool)
{
    int64_t until_ms = clock_monotonic_ms() + CLOSE_WAIT_MS;

    if (pool == NULL)
        return;
    pthread_mutex_lock(&pool->lock);
    while (pool->logging_in > 0 && clock_monotonic_ms() < until_ms)
        wait_change(pool, until_ms);
    pool->is_abandoned = pool->logging_in > 0;
    bool is_last = !pool->is_abandoned;
    pthread_mutex_unlock(&pool->lock);
    if (is_last)
        destroy(pool);
}

/* ---- logins ---- */

/* One login may break without consequences. */
static int64_t pause_after(const struct mssql_failure *failure, int failures)
{
    int64_t pause_ms = failures == 1 ? 0 : PAUSE_MIN_MS;

    if (mssql_is_login_refused(failure))
        return PAUSE_REFUSED_MS;
    for (int i = 2; i < failures && pause_ms < PAUSE_MAX_MS; i++)
        pause_ms *= 2;
    return pause_ms < PAUSE_MAX_MS ? pause_ms : PAUSE_MAX_MS;
}

/* Under the lock. Logins that fail together are one failure. */
static void take_failure(struct mssql_pool *pool, const struct mssql_failure *failure,
                         int64_t began_ms)
{
    int64_t now_ms = clock_monotonic_ms();

    if (pool->failures == 0 || began_ms >= pool->failed_ms)
        pool->failures++;
    pool->failed_ms = now_ms;
    pool->last_failure = *failure;
    pool->no_login_before_ms = now_ms + pause_after(failure, pool->failures);
}

static void *run_login(void *context)
{
    struct mssql_pool *pool = context;
    struct mssql_failure failure;
    int64_t began_ms = clock_monotonic_ms();
    struct mssql_conn *conn = mssql_login(&pool->target, pool->watch, &failure);

    pthread_mutex_lock(&pool->lock);
    pool->logging_in--;
    if (conn != NULL) {
        pool->failures = 0;
        pool->idle[pool->idle_count++] = conn;
    } else {
        pool->open--;
        take_failure(pool, &failure, began_ms);
    }
    pthread_cond_broadcast(&pool->changed);
    bool is_last = pool->is_abandoned && pool->logging_in == 0;
    pthread_mutex_unlock(&pool->lock);
    if (is_last)
        destroy(pool);
    return NULL;
}

/* Under the lock. */
static bool start_login(struct mssql_pool *pool)
{
    pthread_attr_t detached;
    pthread_t thread;
    int error;

    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    error = pthread_create(&thread, &detached, run_login, pool);
    pthread_attr_destroy(&detached);
    if (error != 0)
        return false;
    pool->open++;
    pool->logging_in++;
    pool->last_login_ms = clock_monotonic_ms();
    return true;
}

/* ---- taking and giving ---- */

/* Under the lock: there is no connection, and the last login failed. */
static bool is_lost(const struct mssql_pool *pool)
{
    return pool->failures > 0 && pool->open == pool->logging_in;
}

static void not_after(int64_t *until_ms, int64_t at_ms)
{
    *until_ms = at_ms < *until_ms ? at_ms : *until_ms;
}

enum step { STEP_WAIT, STEP_LOGIN, STEP_FAIL };

/* Under the lock: what does a caller do that finds no unused connection? It waits until *until_ms at
 * the longest, and then asks again. */
static enum step next_step(const struct mssql_pool *pool, int64_t *until_ms)
{
    int64_t now_ms = clock_monotonic_ms();
    bool may_log_in = now_ms >= pool->no_login_before_ms;

    if (is_lost(pool) && pool->logging_in > 0) {
        int64_t prompt_ms = pool->last_login_ms + PROMPT_LOGIN_MS;
        not_after(until_ms, prompt_ms);
        return now_ms < prompt_ms ? STEP_WAIT : STEP_FAIL;
    }
    if (is_lost(pool))
        return may_log_in ? STEP_LOGIN : STEP_FAIL;
    if (pool->open == pool->size || pool->logging_in >= pool->waiting ||
        pool->logging_in >= LOGINS_MAX)
        return STEP_WAIT;
    if (may_log_in)
        return STEP_LOGIN;
    not_after(until_ms, pool->no_login_before_ms);
    return STEP_WAIT;
}

/* Under the lock: an unused connection that still lives. The dead and the old go to the graveyard. */
static struct mssql_conn *pop_idle(struct mssql_pool *pool, struct mssql_conn **graveyard,
                                   int *buried)
{
    while (pool->idle_count > 0 && *buried < MSSQL_POOL_MAX) {
        struct mssql_conn *conn = pool->idle[--pool->idle_count];
        if (mssql_age_ms(conn) < AGE_MAX_MS && mssql_is_alive(conn))
            return conn;
        pool->open--;
        graveyard[(*buried)++] = conn;
    }
    return NULL;
}

static bool fail_local(struct mssql_failure *failure, enum mssql_cause cause)
{
    *failure = (struct mssql_failure){.cause = cause};
    return false;
}

/* Under the lock. */
static bool wait_turn(struct mssql_pool *pool, int64_t deadline_ms, struct mssql_conn **graveyard,
                      int *buried, struct mssql_conn **conn, struct mssql_failure *failure)
{
    while ((*conn = pop_idle(pool, graveyard, buried)) == NULL) {
        int64_t until_ms = deadline_ms;
        enum step step = next_step(pool, &until_ms);
        if (step == STEP_WAIT && clock_monotonic_ms() < deadline_ms) {
            wait_change(pool, until_ms);
        } else if (step == STEP_LOGIN) {
            if (!start_login(pool))
                return fail_local(failure, MSSQL_LOCAL);
        } else if (is_lost(pool)) {
            *failure = pool->last_failure;
            return false;
        } else {
            return fail_local(failure, pool->open > pool->logging_in ? MSSQL_BUSY : MSSQL_TIMEOUT);
        }
    }
    return true;
}

bool mssql_pool_take(struct mssql_pool *pool, int64_t deadline_ms, struct mssql_conn **conn,
                     struct mssql_failure *failure)
{
    struct mssql_conn *graveyard[MSSQL_POOL_MAX];
    int buried = 0;
    bool ok;

    pthread_mutex_lock(&pool->lock);
    pool->waiting++;
    ok = wait_turn(pool, deadline_ms, graveyard, &buried, conn, failure);
    pool->waiting--;
    pthread_mutex_unlock(&pool->lock);
    close_all(graveyard, buried);
    return ok;
}

void mssql_pool_give(struct mssql_pool *pool, struct mssql_conn *conn)
{
    pthread_mutex_lock(&pool->lock);
    pool->idle[pool->idle_count++] = conn;
    pthread_cond_signal(&pool->changed);
    pthread_mutex_unlock(&pool->lock);
}

void mssql_pool_drop(struct mssql_pool *pool, struct mssql_conn *conn, bool and_unused)
{
    struct mssql_conn *graveyard[MSSQL_POOL_MAX];
    int buried = 0;

    pthread_mutex_lock(&pool->lock);
    if (and_unused)
        buried = take_all_idle(pool, graveyard);
    pool->open--;
    pthread_cond_broadcast(&pool->changed); /* each of them may log in now */
    pthread_mutex_unlock(&pool->lock);
    mssql_close(conn);
    close_all(graveyard, buried);
}
