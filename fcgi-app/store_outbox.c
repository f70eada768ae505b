/* store_outbox.c - the store's outbox: what waits there is replayed, by a command or every few seconds by
 * the background thread, which also expires the reservations of dead processes. See store.h. */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "clock.h"
#include "log.h"
#include "metrics.h"
#include "notify.h"
#include "outbox.h"
#include "store_inside.h"

#define DRAIN_EVERY_MS 3000
#define DRAIN_PAUSE_MAX_MS 30000
#define EXPIRE_EVERY_MS 60000
#define OUTBOX_PATIENCE_MS 6000 /* of the background thread with the outbox's file */

/* ---- the file ---- */

struct outbox *store_need_outbox(struct store *store, struct err *err)
{
    pthread_mutex_lock(&store->lock);
    if (store->outbox == NULL)
        store->outbox = outbox_open(store->state_dir, err);
    struct outbox *outbox = store->outbox;
    pthread_mutex_unlock(&store->lock);
    return outbox;
}

enum err_code store_find_outbox(struct store *store, struct outbox **outbox, struct err *err)
{
    struct err local = {.message = ""};

    if (err == NULL)
        err = &local;
    pthread_mutex_lock(&store->lock);
    *outbox = store->outbox;
    pthread_mutex_unlock(&store->lock);
    if (*outbox != NULL || !outbox_exists(store->state_dir))
        return ERR_NONE;
    *outbox = store_need_outbox(store, err);
    return *outbox == NULL ? err->code : ERR_NONE;
}

/* ---- replaying ---- */

static enum err_code replay_settlement(void *context, struct store_settlement *s, struct err *err)
{
    struct store *store = context;
    void *item = s;

    store_prepare_settlement(s);
    store_try_settle(store, &item, 1, clock_monotonic_ms() + store->query_timeout_ms);
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

    store_try_acquire(store, acquire, clock_monotonic_ms() + store->query_timeout_ms,
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

static bool go_on(void *context, int64_t replayed)
{
    struct store *store = context;

    beat(store);
    return !atomic_load(&store->stopping) && store_goes_on(store, replayed);
}

enum err_code store_outbox_drain(struct store *store, int64_t *replayed, struct err *err)
{
    const struct outbox_replay replay = {.settle = replay_settlement,
                                         .reserve = replay_reservation,
                                         .record = replay_records,
                                         .go_on = go_on,
                                         .context = store};
    struct outbox *outbox = NULL;
    enum err_code code = store_find_outbox(store, &outbox, err);

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
    struct outbox *outbox = store_need_outbox(store, err);
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
    enum err_code code = store_find_outbox(store, &outbox, err);

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

enum err_code store_query_outbox(struct store *store, enum store_view view,
                                 const struct store_filter *filter, store_row *row, void *context,
                                 struct err *err)
{
    struct store_outbox_status status = {0};
    struct outbox *outbox = NULL;
    enum err_code code = store_find_outbox(store, &outbox, err);

    if (code == ERR_NONE && view == VIEW_OUTBOX)
        return outbox == NULL ? ERR_NONE : outbox_query(outbox, filter, row, context, err);
    if (code == ERR_NONE && outbox != NULL)
        code = outbox_status(outbox, &status, err);
    if (code == ERR_NONE)
        outbox_show_status(&status, row, context);
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
    if (store_need_outbox(store, err) == NULL)
        return err->code;
    if (pthread_create(&store->thread, NULL, run_background, store) != 0)
        return err_set(err, ERR_INTERNAL, "cannot start the store's thread");
    store->has_thread = true;
    return ERR_NONE;
}

void store_stop_background(struct store *store)
{
    if (store == NULL || !store->has_thread)
        return;
    pthread_mutex_lock(&store->lock);
    atomic_store(&store->stopping, true);
    pthread_cond_signal(&store->wake);
    pthread_mutex_unlock(&store->lock);
    pthread_join(store->thread, NULL);
    store->has_thread = false;
}
