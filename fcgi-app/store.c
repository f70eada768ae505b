/* store.c - the store: a driver, a batch for each of a request's two round trips, and the outbox.
 * See store.h.
 *
 * What store.c adds to a driver: waiting together (a lane is a batch and what it carries), one repeat
 * of a call whose outcome is unknown, items run one by one where a whole batch was refused, and for
 * settlements a place to go when the store is away. A settlement ends in exactly one of these: the
 * store; the outbox; the outbox's dead table, where the store refuses it; standard error.
 *
 * A settlement must not overtake its own reservation. Only reservations for the fallback key can wait
 * in the outbox, so settlements for that key look there first and line up behind theirs. */
#include "store.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "batch.h"
#include "buf.h"
#include "log.h"
#include "metrics.h"
#include "notify.h"
#include "outbox.h"
#include "outbox_entry.h"
#include "seal.h"
#include "store_driver.h"

#define DRAIN_EVERY_MS 3000
#define DRAIN_PAUSE_MAX_MS 30000
#define EXPIRE_EVERY_MS 60000
#define OUTBOX_PATIENCE_MS 6000 /* of the background thread with the outbox's file */
#define ALARM_MAX ((size_t)64 * 1024)

/* A kind of work that travels together. */
struct lane {
    struct store *store;
    enum err_code (*carry)(struct store *store, void **items, size_t count, struct err *err);
    void (*fail)(void *item, const struct err *err);
    struct batch *batch;
};

struct store {
    const struct store_driver *driver;
    void *self;
    struct lane acquires, settlements;
    int64_t query_timeout_ms;
    struct seal *seal; /* NULL: keys are not sealed */
    char *state_dir;
    pthread_mutex_t lock;  /* guards what follows */
    struct outbox *outbox; /* NULL until it is needed; then it stays */
    pthread_cond_t wake;
    bool has_thread;
    pthread_t thread;
    atomic_bool stopping;
    atomic_bool answers; /* did it, when it was asked last? */
    store_go_on *go_on;  /* see store_watch; NULL: nobody watches */
    void *go_on_context;
};

static const struct store_driver *const drivers[] = {
    [DRIVER_SQLITE] = &store_sqlite,
    [DRIVER_MSSQL] = &store_mssql,
};

static const struct store_driver *find_driver(const struct config *config, struct err *err)
{
    const struct store_driver *driver = NULL;

    if (config->store.driver >= 0 &&
        (size_t)config->store.driver < sizeof drivers / sizeof drivers[0])
        driver = drivers[config->store.driver];
    if (driver == NULL)
        err_set(err, ERR_CONFIG, "store.driver: this program is built without that driver");
    return driver;
}

/* ---- batches ---- */

static enum err_code carry_acquires(struct store *store, void **items, size_t count,
                                    struct err *err)
{
    struct store_acquire *acquires[BATCH_MAX];

    for (size_t i = 0; i < count; i++)
        acquires[i] = items[i];
    return store->driver->acquire(store->self, acquires, count, err);
}

static void fail_acquire(void *item, const struct err *err)
{
    struct store_acquire *acquire = item;
    acquire->code = err->code;
    acquire->err = *err;
}

static enum err_code carry_settlements(struct store *store, void **items, size_t count,
                                       struct err *err)
{
    struct store_settlement *settlements[BATCH_MAX];

    for (size_t i = 0; i < count; i++)
        settlements[i] = items[i];
    return store->driver->settle(store->self, settlements, count, err);
}

static void fail_settlement(void *item, const struct err *err)
{
    struct store_settlement *settlement = item;
    settlement->code = err->code;
    settlement->err = *err;
}

/* Can one item have failed the whole batch? */
static bool may_be_one_of_many(enum err_code code)
{
    return code == ERR_BAD_VALUE || code == ERR_INTERNAL;
}

/* Runs the items in one transaction, and writes the outcome into those that it fails as a whole. */
static enum err_code carry(struct lane *lane, void **items, size_t count)
{
    struct err err = {.message = ""};

    err.code = lane->carry(lane->store, items, count, &err);
    for (size_t i = 0; err.code != ERR_NONE && i < count; i++)
        lane->fail(items[i], &err);
    return err.code;
}

static void run_lane(void *context, void **items, size_t count)
{
    struct lane *lane = context;
    int64_t start_us = clock_monotonic_us();

    enum err_code code = carry(lane, items, count);
    if (may_be_one_of_many(code) && count > 1) {
        /* One of them fails its neighbours, and nothing of the batch has happened: each alone. */
        for (size_t i = 0; i < count; i++)
            (void)carry(lane, &items[i], 1);
    }
    atomic_store(&lane->store->answers, code != ERR_STORE_UNAVAILABLE);
    metrics_add(METRIC_STORE_BATCHES, 1);
    metrics_add(METRIC_STORE_ITEMS, (int64_t)count);
    metrics_observe(METRIC_STORE_DURATION, clock_monotonic_us() - start_us);
}

/* ---- opening and closing ---- */

static bool open_lane(struct lane *lane, struct store *store, int leaders)
{
    lane->store = store;
    lane->batch = batch_new(leaders, run_lane, lane);
    return lane->batch != NULL;
}

struct store *store_open_with(const struct store_driver *driver, const struct config *config,
                              struct err *err)
{
    pthread_condattr_t monotonic;
    struct store *store = calloc(1, sizeof *store);

    if (store == NULL) {
        err_set(err, ERR_INTERNAL, "no memory for the store");
        return NULL;
    }
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&store->wake, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&store->lock, NULL);
    store->driver = driver;
    store->acquires = (struct lane){.carry = carry_acquires, .fail = fail_acquire};
    store->settlements = (struct lane){.carry = carry_settlements, .fail = fail_settlement};
    store->query_timeout_ms = config->store.query_timeout_ms;
    store->state_dir = strdup(config->server.state_dir);
    if (config->seal.key_file[0] != '\0' &&
        (store->seal = seal_open(config->seal.key_file, err)) == NULL)
        goto failed;
    store->self = driver->open(config, false, err);
    if (store->self == NULL)
        goto failed;
    int leaders = driver->leaders(store->self);
    if (store->state_dir == NULL || !open_lane(&store->acquires, store, leaders) ||
        !open_lane(&store->settlements, store, leaders)) {
        err_set(err, ERR_INTERNAL, "no memory for the store");
        goto failed;
    }
    return store;
failed:
    store_close(store);
    return NULL;
}

struct store *store_open(const struct config *config, struct err *err)
{
    const struct store_driver *driver = find_driver(config, err);
    return driver == NULL ? NULL : store_open_with(driver, config, err);
}

void store_watch(struct store *store, store_go_on *go_on, void *context)
{
    store->go_on = go_on;
    store->go_on_context = context;
}

enum err_code store_migrate(const struct config *config, int *version, struct err *err)
{
    struct err local = {.message = ""};
    const struct store_driver *driver;

    if (err == NULL)
        err = &local;
    driver = find_driver(config, err);
    if (driver == NULL)
        return ERR_CONFIG;
    void *self = driver->open(config, true, err);
    if (self == NULL)
        return err->code;
    *version = driver->schema_version(self);
    driver->close(self);
    return ERR_NONE;
}

void store_close(struct store *store)
{
    if (store == NULL)
        return;
    if (store->has_thread) {
        pthread_mutex_lock(&store->lock);
        atomic_store(&store->stopping, true);
        pthread_cond_signal(&store->wake);
        pthread_mutex_unlock(&store->lock);
        pthread_join(store->thread, NULL);
    }
    outbox_close(store->outbox);
    batch_free(store->settlements.batch);
    batch_free(store->acquires.batch);
    if (store->self != NULL)
        store->driver->close(store->self);
    pthread_cond_destroy(&store->wake);
    pthread_mutex_destroy(&store->lock);
    seal_close(store->seal);
    free(store->state_dir);
    free(store);
}

/* The outbox, opened by the first who needs it. NULL: err says why. */
static struct outbox *need_outbox(struct store *store, struct err *err)
{
    pthread_mutex_lock(&store->lock);
    if (store->outbox == NULL)
        store->outbox = outbox_open(store->state_dir, err);
    struct outbox *outbox = store->outbox;
    pthread_mutex_unlock(&store->lock);
    return outbox;
}

/* The outbox, where there is one; looking creates none. NULL with ERR_NONE: there is none. */
static enum err_code find_outbox(struct store *store, struct outbox **outbox, struct err *err)
{
    struct err local = {.message = ""};

    if (err == NULL)
        err = &local;
    pthread_mutex_lock(&store->lock);
    *outbox = store->outbox;
    pthread_mutex_unlock(&store->lock);
    if (*outbox != NULL || !outbox_exists(store->state_dir))
        return ERR_NONE;
    *outbox = need_outbox(store, err);
    return *outbox == NULL ? err->code : ERR_NONE;
}

/* ---- acquire ---- */

enum err_code store_set_duplicate(struct err *err, bool first_is_done, const char *first_request_id)
{
    enum err_code code = first_is_done ? ERR_ALREADY_PROCESSED : ERR_REQUEST_IN_PROGRESS;
    return err_set(err, code, "%s Its request_id is %s.", err_info(code)->detail, first_request_id);
}

/* An acquire has failed and may have reserved all the same: the outbox sees to it that this does not
 * stay. Where it cannot, the reservation will expire and show as unsettled. */
static void release_unheard(struct store *store, const struct store_acquire *a)
{
    struct err why = {.message = ""};
    const struct store_settlement release = {
        .request_id = a->request_id,
        .company_id = a->company_id,
        .branch = a->branch,
        .requested_by = a->requested_by,
        .token_source = "store",
        .logged_ms = clock_wall_ms(),
        .idempotency =
            a->idempotency_key != NULL && a->sequence == 1 ? STORE_KEY_FREE : STORE_KEY_NONE,
        .release_sequence = a->sequence,
    };
    struct outbox *outbox = need_outbox(store, &why);

    if (outbox == NULL || outbox_append_settlement(outbox, &release, &why) != ERR_NONE)
        log_warning(a->request_id, why.message,
                    "a reservation whose outcome is unknown cannot be released by the outbox: it "
                    "will show as unsettled");
}

/* Opens the key that was granted, in place. */
static void unseal(struct store *store, struct store_acquire *a)
{
    if (a->code == ERR_NONE && a->grant == GRANT_TOKEN && a->token_id != 0 &&
        seal_unseal(store->seal, a->token_id, a->api_key, a->api_key, sizeof a->api_key, &a->err) !=
            ERR_NONE)
        a->grant = GRANT_UNREADABLE;
}

/* The round trip, repeated once where its outcome is unknown: it is idempotent on (request_id,
 * sequence). *maybe_reserved: it failed, and may have reserved all the same. */
static void acquire_in_store(struct store *store, struct store_acquire *acquire,
                             int64_t deadline_ms, bool *maybe_reserved)
{
    bool in_time = true;

    *maybe_reserved = false;
    for (int tries = 0; tries < 2 && in_time; tries++) {
        void *item = acquire;
        acquire->maybe_reserved = false;
        acquire->code = err_set(&acquire->err, ERR_STORE_UNAVAILABLE,
                                "the store had no place before the deadline");
        in_time = batch_submit(store->acquires.batch, &item, 1, deadline_ms, NULL) == ERR_NONE &&
                  clock_monotonic_ms() < deadline_ms;
        *maybe_reserved = acquire->code != ERR_NONE && (*maybe_reserved || acquire->maybe_reserved);
        if (acquire->code != ERR_STORE_UNAVAILABLE)
            break;
    }
}

enum err_code store_acquire(struct store *store, struct store_acquire *acquire, int64_t deadline_ms)
{
    bool maybe_reserved;

    acquire_in_store(store, acquire, deadline_ms, &maybe_reserved);
    if (maybe_reserved)
        release_unheard(store, acquire);
    unseal(store, acquire);
    return acquire->code;
}

enum err_code store_reserve_offline(struct store *store, const struct store_acquire *acquire,
                                    struct err *err)
{
    struct err why = {.message = ""};
    struct outbox *outbox = need_outbox(store, &why);

    if (outbox != NULL)
        why.code = outbox_append_reservation(outbox, acquire, &why);
    if (outbox != NULL && why.code == ERR_NONE)
        return ERR_NONE;
    if (why.code == ERR_REQUEST_IN_PROGRESS || why.code == ERR_ALREADY_PROCESSED) {
        *err = why;
        return why.code;
    }
    log_error(acquire->request_id, why.message, "the outbox does not take a reservation");
    return err_set(err, ERR_STORAGE_FULL, "%s", err_info(ERR_STORAGE_FULL)->detail);
}

/* ---- settle ---- */

/* The last place for a settlement: one line that holds all its numbers. */
static void raise_alarm(struct store_settlement *s, const char *store_says, const char *outbox_says)
{
    struct buf line;

    buf_init(&line, ALARM_MAX);
    buf_append_str(&line, "{\"unsettled\": ");
    entry_write_settlement(&line, s);
    buf_append_str(&line, "}\n");
    while (buf_ok(&line) && write(STDERR_FILENO, line.data, line.len) < 0 && errno == EINTR)
        ;
    buf_reset(&line);
    metrics_add(METRIC_UNSETTLED_ALARMS, 1);
    log_critical(s->request_id, outbox_says,
                 "usage of token %lld is recorded on standard error only: the store said: %s",
                 (long long)s->token_id, store_says);
    s->code = err_set(&s->err, ERR_STORAGE_FULL, "%s", err_info(ERR_STORAGE_FULL)->detail);
}

/* What the store did not take goes to the outbox, whatever the reason; but what it refuses for the
 * data itself, which it will refuse again, to the outbox's dead table. */
static void journal(struct store *store, struct store_settlement *s)
{
    bool refused = s->code == ERR_BAD_VALUE;
    struct err store_says = s->err;
    struct err outbox_says = {.message = ""};
    struct outbox *outbox = need_outbox(store, &outbox_says);
    enum err_code code = ERR_STORAGE_FULL;

    if (outbox != NULL)
        code = refused ? outbox_append_dead(outbox, s, store_says.message, &outbox_says)
                       : outbox_append_settlement(outbox, s, &outbox_says);
    if (code != ERR_NONE) {
        raise_alarm(s, store_says.message, outbox_says.message);
        return;
    }
    if (refused)
        log_critical(s->request_id, store_says.message,
                     "the store refuses the settlement of token %lld: it is in the outbox's dead "
                     "table",
                     (long long)s->token_id);
    else
        log_warning(s->request_id, store_says.message,
                    "the settlement of token %lld waits in the outbox", (long long)s->token_id);
    s->code = err_set(&s->err, ERR_NONE, "%s", "");
}

/* Does its reservation still wait in the outbox? */
static bool must_line_up(struct store *store, const struct store_settlement *s)
{
    struct outbox *outbox = NULL;

    return s->token_id == 0 && find_outbox(store, &outbox, NULL) == ERR_NONE && outbox != NULL &&
           outbox_holds(outbox, s->request_id);
}

/* Settles up to BATCH_MAX in the store, twice where the outcome is unknown: it is idempotent. */
static void settle_in_store(struct store *store, void **items, size_t count, int64_t deadline_ms)
{
    bool in_time = true;

    for (int tries = 0; tries < 2 && count > 0 && in_time; tries++) {
        in_time =
            batch_submit(store->settlements.batch, items, count, deadline_ms, NULL) == ERR_NONE &&
            clock_monotonic_ms() < deadline_ms;
        size_t open = 0;
        for (size_t i = 0; i < count; i++) {
            struct store_settlement *s = items[i];
            if (s->code == ERR_STORE_UNAVAILABLE)
                items[open++] = s;
        }
        count = open;
    }
}

static void prepare_settlement(struct store_settlement *s)
{
    s->code = err_set(&s->err, ERR_STORE_UNAVAILABLE, "the store had no place before the deadline");
    s->threshold_crossed = s->exceeded = s->disabling_stopped = false;
}

static void settle_some(struct store *store, struct store_settlement *settlements, size_t count,
                        int64_t deadline_ms)
{
    void *items[BATCH_MAX];
    size_t n = 0;

    for (size_t i = 0; i < count; i++) {
        struct store_settlement *s = &settlements[i];
        prepare_settlement(s);
        if (must_line_up(store, s))
            err_set(&s->err, s->code, "its reservation waits there");
        else
            items[n++] = s;
    }
    settle_in_store(store, items, n, deadline_ms);
    for (size_t i = 0; i < count; i++)
        if (settlements[i].code != ERR_NONE)
            journal(store, &settlements[i]);
}

enum err_code store_settle(struct store *store, struct store_settlement *settlements, size_t count,
                           int64_t deadline_ms)
{
    enum err_code code = ERR_NONE;

    for (size_t done = 0; done < count; done += BATCH_MAX) {
        size_t some = count - done < BATCH_MAX ? count - done : BATCH_MAX;
        settle_some(store, settlements + done, some, deadline_ms);
    }
    for (size_t i = 0; i < count && code == ERR_NONE; i++)
        code = settlements[i].code;
    return code;
}

/* ---- the outbox ---- */

static enum err_code replay_settlement(void *context, struct store_settlement *s, struct err *err)
{
    struct store *store = context;
    void *item = s;

    prepare_settlement(s);
    settle_in_store(store, &item, 1, clock_monotonic_ms() + store->query_timeout_ms);
    if (s->code != ERR_NONE)
        return err_set(err, s->code, "%s", s->err.message);
    /* Nobody waits for this settlement's outcome any more who would say so. */
    if (s->threshold_crossed)
        log_warning(s->request_id, NULL, "token %lld of company %s has crossed its threshold",
                    (long long)s->token_id, s->company_id);
    if (s->exceeded)
        log_warning(s->request_id, NULL, "token %lld of company %s has reached its limit",
                    (long long)s->token_id, s->company_id);
    if (s->disabling_stopped)
        log_critical(s->request_id, NULL,
                     "tokens of three companies at fault within a minute: disabling stops");
    return ERR_NONE;
}

static enum err_code replay_reservation(void *context, struct store_acquire *acquire,
                                        struct err *err)
{
    struct store *store = context;
    bool maybe_reserved; /* it will be replayed again */

    acquire_in_store(store, acquire, clock_monotonic_ms() + store->query_timeout_ms,
                     &maybe_reserved);
    return acquire->code == ERR_NONE ? ERR_NONE
                                     : err_set(err, acquire->code, "%s", acquire->err.message);
}

static enum err_code replay_records(void *context, struct log_entry *const *entries,
                                    size_t entry_count,
                                    const struct store_retry_attempt *const *attempts,
                                    size_t attempt_count, struct err *err)
{
    struct store *store = context;
    return store_record(store, entries, entry_count, attempts, attempt_count, true, err);
}

/* Until the next one: a settlement of the outbox that is repeated, each time with a login. */
static void beat(const struct store *store)
{
    notify_beat(NOTIFY_BACKGROUND, 4 * store->query_timeout_ms + OUTBOX_PATIENCE_MS);
}

static bool watched(struct store *store, int64_t done)
{
    return store->go_on == NULL || store->go_on(store->go_on_context, done);
}

static bool go_on(void *context, int64_t replayed)
{
    struct store *store = context;

    beat(store);
    return !atomic_load(&store->stopping) && watched(store, replayed);
}

enum err_code store_outbox_drain(struct store *store, int64_t *replayed, struct err *err)
{
    const struct outbox_replay replay = {.settle = replay_settlement,
                                         .reserve = replay_reservation,
                                         .record = replay_records,
                                         .go_on = go_on,
                                         .context = store};
    struct outbox *outbox = NULL;
    enum err_code code = find_outbox(store, &outbox, err);

    *replayed = 0;
    if (code != ERR_NONE || outbox == NULL)
        return code;
    return outbox_drain(outbox, &replay, replayed, err);
}

enum err_code store_record_offline(struct store *store, struct log_entry *const *entries,
                                   size_t entry_count,
                                   const struct store_retry_attempt *const *attempts,
                                   size_t attempt_count, struct err *err)
{
    struct outbox *outbox = need_outbox(store, err);
    int64_t dropped = 0;

    if (outbox == NULL)
        return err->code;
    enum err_code code =
        outbox_append_records(outbox, entries, entry_count, attempts, attempt_count, &dropped, err);
    metrics_add(METRIC_LOG_DROPPED, dropped);
    return code;
}

enum err_code store_outbox_status(struct store *store, struct store_outbox_status *status,
                                  struct err *err)
{
    struct outbox *outbox = NULL;
    enum err_code code = find_outbox(store, &outbox, err);

    *status = (struct store_outbox_status){0};
    if (code != ERR_NONE || outbox == NULL)
        return code;
    return outbox_status(outbox, status, err);
}

enum err_code store_outbox_look(const struct config *config, struct store_outbox_status *status,
                                struct err *err)
{
    *status = (struct store_outbox_status){0};
    if (!outbox_exists(config->server.state_dir))
        return ERR_NONE;
    struct outbox *outbox = outbox_open(config->server.state_dir, err);
    if (outbox == NULL)
        return err->code;
    enum err_code code = outbox_status(outbox, status, err);
    outbox_close(outbox);
    return code;
}

/* ---- in the background ---- */

/* Says what failed when it begins to fail, not every few seconds. An absent store is said by those
 * whom it fails. */
static void report(enum err_code *last, const struct err *err, const char *what)
{
    if (err->code != *last && err->code != ERR_NONE && err->code != ERR_STORE_UNAVAILABLE)
        log_error(NULL, err->message, "%s", what);
    *last = err->code;
}

/* The drain that is done every few seconds; ever more seldom while it finds the store away. */
struct drainer {
    enum err_code last;
    int64_t pause_ms;
    int64_t next_ms; /* monotonic */
};

static void drain(struct store *store, struct drainer *d)
{
    struct err err = {.message = ""};
    int64_t replayed = 0;

    if (clock_monotonic_ms() < d->next_ms && !atomic_exchange(&store->answers, false))
        return;
    err.code = store_outbox_drain(store, &replayed, &err);
    if (replayed > 0)
        log_info(NULL, "%lld entries of the outbox have reached the store", (long long)replayed);
    report(&d->last, &err, "the outbox cannot be replayed");
    if (err.code != ERR_STORE_UNAVAILABLE)
        d->pause_ms = 0;
    else if (d->pause_ms < DRAIN_PAUSE_MAX_MS)
        d->pause_ms = 2 * d->pause_ms + DRAIN_EVERY_MS;
    d->next_ms = clock_monotonic_ms() + d->pause_ms;
}

static void expire(struct store *store, enum err_code *last)
{
    struct err err = {.message = ""};
    int expired = 0;

    err.code = store_expire_reservations(store, &expired, &err);
    if (err.code == ERR_NONE && expired > 0)
        log_warning(NULL, NULL, "%d reservations of ended processes are unsettled now", expired);
    report(last, &err, "reservations cannot be expired");
}

static void *run_background(void *arg)
{
    struct store *store = arg;
    struct drainer drainer = {.last = ERR_NONE};
    enum err_code last_expiry = ERR_NONE;
    int64_t next_expiry_ms = clock_monotonic_ms();

    while (!atomic_load(&store->stopping)) {
        beat(store);
        drain(store, &drainer);
        beat(store);
        if (clock_monotonic_ms() >= next_expiry_ms) {
            expire(store, &last_expiry);
            next_expiry_ms = clock_monotonic_ms() + EXPIRE_EVERY_MS;
        }
        int64_t until_ms = clock_monotonic_ms() + DRAIN_EVERY_MS;
        struct timespec until = {.tv_sec = (time_t)(until_ms / 1000),
                                 .tv_nsec = (long)(until_ms % 1000) * 1000000};
        beat(store); /* twice as long as it waits */
        pthread_mutex_lock(&store->lock);
        while (!atomic_load(&store->stopping) &&
               pthread_cond_timedwait(&store->wake, &store->lock, &until) != ETIMEDOUT)
            ;
        pthread_mutex_unlock(&store->lock);
    }
    notify_end(NOTIFY_BACKGROUND);
    return NULL;
}

enum err_code store_start_background(struct store *store, struct err *err)
{
    struct err local = {.message = ""};

    if (err == NULL)
        err = &local;
    if (need_outbox(store, err) == NULL)
        return err->code;
    if (pthread_create(&store->thread, NULL, run_background, store) != 0)
        return err_set(err, ERR_INTERNAL, "cannot start the store's thread");
    store->has_thread = true;
    return ERR_NONE;
}

/* ---- what goes to the driver as it is ---- */

enum err_code store_ping(struct store *store, struct err *err)
{
    return store->driver->ping(store->self, err);
}

enum err_code store_record(struct store *store, struct log_entry *const *entries,
                           size_t entry_count, const struct store_retry_attempt *const *attempts,
                           size_t attempt_count, bool again, struct err *err)
{
    return store->driver->record(store->self, entries, entry_count, attempts, attempt_count, again,
                                 err);
}

enum err_code store_expire_reservations(struct store *store, int *expired, struct err *err)
{
    *expired = 0;
    return store->driver->expire_reservations(store->self, expired, err);
}

static enum err_code seal_new_key(void *context, int64_t token_id, const char *api_key,
                                  char out[STORE_API_KEY_SIZE], struct err *err)
{
    return seal_seal(context, token_id, api_key, out, STORE_API_KEY_SIZE, err);
}

enum err_code store_token_add(struct store *store, const char *actor,
                              const struct store_new_token *token, int64_t *token_id,
                              struct err *err)
{
    const struct store_sealer sealer = {.seal = seal_new_key, .context = store->seal};
    struct store_new_token sealed = *token;

    if (store->seal != NULL)
        sealed.sealer = &sealer;
    return store->driver->token_add(store->self, actor, &sealed, token_id, err);
}

enum err_code store_token_set_status(struct store *store, const char *actor, int64_t token_id,
                                     const char *status, const char *reason, struct err *err)
{
    return store->driver->token_set_status(store->self, actor, token_id, status, reason, err);
}

enum err_code store_token_set_key(struct store *store, const char *actor, int64_t token_id,
                                  const char *api_key, struct err *err)
{
    char sealed[STORE_API_KEY_SIZE];

    if (store->seal == NULL)
        return store->driver->token_set_key(store->self, actor, token_id, api_key, err);
    if (seal_seal(store->seal, token_id, api_key, sealed, sizeof sealed, err) != ERR_NONE)
        return err->code;
    return store->driver->token_set_key(store->self, actor, token_id, sealed, err);
}

/* Without what a key pasted by hand often brings, as acquire takes it. */
static void trim(char *key)
{
    size_t begin = 0, end = strlen(key);

    while (end > 0 && (unsigned char)key[end - 1] <= ' ')
        end--;
    while (begin < end && (unsigned char)key[begin] <= ' ')
        begin++;
    memmove(key, key + begin, end - begin);
    key[end - begin] = '\0';
}

/* Calls look with each token's key, until it does not return ERR_NONE. */
static enum err_code each_key(struct store *store,
                              enum err_code (*look)(struct store *store,
                                                    const struct store_token_key *key,
                                                    void *context, struct err *err),
                              void *context, struct err *err)
{
    struct store_token_key keys[16];
    size_t count = 0;
    int64_t after_id = 0, done = 0;
    enum err_code code = ERR_NONE;
    bool more = true;

    while (more) {
        code = store->driver->token_keys(store->self, after_id, keys, sizeof keys / sizeof keys[0],
                                         &count, err);
        more = code == ERR_NONE && count > 0;
        for (size_t i = 0; more && i < count; i++) {
            more = watched(store, done++);
            if (more)
                code = look(store, &keys[i], context, err);
            more = more && code == ERR_NONE;
            after_id = keys[i].token_id;
        }
        explicit_bzero(keys, sizeof keys);
    }
    return code;
}

struct resealing {
    const char *actor;
    int *sealed, *unreadable;
};

/* Seals one key anew, unless it is sealed by the key of now. */
static enum err_code reseal(struct store *store, const struct store_token_key *key, void *context,
                            struct err *err)
{
    const struct resealing *r = context;
    char plain[STORE_API_KEY_SIZE], sealed[STORE_API_KEY_SIZE];

    if (seal_is_current(store->seal, key->api_key))
        return ERR_NONE;
    if (seal_unseal(store->seal, key->token_id, key->api_key, plain, sizeof plain, err) !=
        ERR_NONE) {
        ++*r->unreadable;
        return ERR_NONE;
    }
    trim(plain);
    if (plain[0] == '\0')
        return ERR_NONE;
    enum err_code code = seal_seal(store->seal, key->token_id, plain, sealed, sizeof sealed, err);
    explicit_bzero(plain, sizeof plain);
    if (code == ERR_NONE)
        code = store->driver->token_reseal(store->self, r->actor, key, sealed, err);
    *r->sealed += code == ERR_NONE;
    return code == ERR_NO_SUCH_ROW ? ERR_NONE : code; /* changed by another meanwhile */
}

enum err_code store_seal_keys(struct store *store, const char *actor, int *sealed, int *unreadable,
                              struct err *err)
{
    struct resealing r = {.actor = actor, .sealed = sealed, .unreadable = unreadable};

    *sealed = *unreadable = 0;
    if (store->seal == NULL)
        return err_set(err, ERR_CONFIG,
                       "seal.key_file is not configured: there is no key to seal by");
    return each_key(store, reseal, &r, err);
}

struct key_check {
    store_key_row *row;
    void *context;
};

static enum err_code check_key(struct store *store, const struct store_token_key *key,
                               void *context, struct err *err)
{
    const struct key_check *check = context;
    char plain[STORE_API_KEY_SIZE];
    struct err why = {.message = ""};
    const char *fault = NULL;

    (void)err;
    if (!seal_is_sealed(key->api_key))
        fault = "";
    else if (seal_unseal(store->seal, key->token_id, key->api_key, plain, sizeof plain, &why) !=
             ERR_NONE)
        fault = why.message;
    explicit_bzero(plain, sizeof plain);
    check->row(check->context, key->token_id, fault);
    return ERR_NONE;
}

enum err_code store_check_keys(struct store *store, store_key_row *row, void *context,
                               struct err *err)
{
    struct key_check check = {.row = row, .context = context};
    return each_key(store, check_key, &check, err);
}

enum err_code store_token_set_limit(struct store *store, const char *actor, int64_t token_id,
                                    int64_t limit, double threshold, struct err *err)
{
    return store->driver->token_set_limit(store->self, actor, token_id, limit, threshold, err);
}

enum err_code store_client_key_find(struct store *store, const char *hash,
                                    struct store_client_key *key, struct err *err)
{
    return store->driver->client_key_find(store->self, hash, key, err);
}

enum err_code store_client_key_add(struct store *store, const char *actor,
                                   const struct store_new_client_key *key, struct err *err)
{
    return store->driver->client_key_add(store->self, actor, key, err);
}

enum err_code store_client_key_revoke(struct store *store, const char *actor, const char *id,
                                      struct err *err)
{
    return store->driver->client_key_revoke(store->self, actor, id, err);
}

static enum err_code query_outbox(struct store *store, enum store_view view,
                                  const struct store_filter *filter, store_row *row, void *context,
                                  struct err *err)
{
    struct store_outbox_status status = {0};
    struct outbox *outbox = NULL;
    enum err_code code = find_outbox(store, &outbox, err);

    if (code == ERR_NONE && view == VIEW_OUTBOX)
        return outbox == NULL ? ERR_NONE : outbox_query(outbox, filter, row, context, err);
    if (code == ERR_NONE && outbox != NULL)
        code = outbox_status(outbox, &status, err);
    if (code == ERR_NONE)
        outbox_show_status(&status, row, context);
    return code;
}

enum err_code store_query(struct store *store, enum store_view view,
                          const struct store_filter *filter, store_row *row, void *context,
                          struct err *err)
{
    if (view == VIEW_OUTBOX || view == VIEW_OUTBOX_BY_STATE)
        return query_outbox(store, view, filter, row, context, err);
    return store->driver->query(store->self, view, filter, row, context, err);
}
