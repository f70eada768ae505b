/* store.c - the store: a driver, a batch for each of a request's two round trips, and the outbox.
 * See store.h. store_outbox.c replays the outbox, store_keys.c looks after sealed keys.
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
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "buf.h"
#include "clock.h"
#include "log.h"
#include "metrics.h"
#include "outbox.h"
#include "outbox_entry.h"
#include "seal.h"
#include "store_inside.h"

#define ALARM_MAX ((size_t)64 * 1024)

/* A batch costs a server nearly the same whether it carries two items or twenty: four at a time took one
 * three times the processor time of one at a time. So another begins only where the last one seems to be
 * held up, by somebody's lock or a server that is far away. */
#define LEADER_PATIENCE_MS 50
/* Who comes in such a while after many may be one of many. */
#define LATELY_MS 50

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

static bool open_lane(struct lane *lane, struct store *store)
{
    const struct batch_times times = {.patience_ms = LEADER_PATIENCE_MS,
                                      .gather_ms = store->driver->gather_ms,
                                      .lately_ms = LATELY_MS};

    lane->store = store;
    lane->batch = batch_new(store->driver->leaders(store->self), times, run_lane, lane);
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
    if (store->state_dir == NULL || !open_lane(&store->acquires, store) ||
        !open_lane(&store->settlements, store)) {
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

bool store_goes_on(struct store *store, int64_t done)
{
    return store->go_on == NULL || store->go_on(store->go_on_context, done);
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
    store_stop_background(store);
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
    struct outbox *outbox = store_need_outbox(store, &why);

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

void store_try_acquire(struct store *store, struct store_acquire *acquire, int64_t deadline_ms,
                       bool *maybe_reserved)
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

    store_try_acquire(store, acquire, deadline_ms, &maybe_reserved);
    if (maybe_reserved)
        release_unheard(store, acquire);
    unseal(store, acquire);
    return acquire->code;
}

enum err_code store_reserve_offline(struct store *store, const struct store_acquire *acquire,
                                    struct err *err)
{
    struct err why = {.message = ""};
    struct outbox *outbox = store_need_outbox(store, &why);

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
    struct outbox *outbox = store_need_outbox(store, &outbox_says);
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

    return s->token_id == 0 && store_find_outbox(store, &outbox, NULL) == ERR_NONE &&
           outbox != NULL && outbox_holds(outbox, s->request_id);
}

void store_try_settle(struct store *store, void **items, size_t count, int64_t deadline_ms)
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

void store_prepare_settlement(struct store_settlement *s)
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
        store_prepare_settlement(s);
        if (must_line_up(store, s))
            err_set(&s->err, s->code, "its reservation waits there");
        else
            items[n++] = s;
    }
    store_try_settle(store, items, n, deadline_ms);
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

enum err_code store_token_set_status(struct store *store, const char *actor, int64_t token_id,
                                     const char *status, const char *reason, struct err *err)
{
    return store->driver->token_set_status(store->self, actor, token_id, status, reason, err);
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

enum err_code store_query(struct store *store, enum store_view view,
                          const struct store_filter *filter, store_row *row, void *context,
                          struct err *err)
{
    if (view == VIEW_OUTBOX || view == VIEW_OUTBOX_BY_STATE)
        return store_query_outbox(store, view, filter, row, context, err);
    return store->driver->query(store->self, view, filter, row, context, err);
}
