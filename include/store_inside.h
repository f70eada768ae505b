/* store_inside.h - what store.c, store_outbox.c and store_keys.c share; nobody else includes this. */
#ifndef EXTRACT_STORE_INSIDE_H
#define EXTRACT_STORE_INSIDE_H

#include <pthread.h>
#include <stdatomic.h>

#include "batch.h"
#include "store.h"
#include "store_driver.h"

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

/* Does who watches (store_watch) want it to go on? done: how many so far. */
bool store_goes_on(struct store *store, int64_t done) MUST_CHECK;

/* The outbox, opened by the first who needs it. NULL: err says why. */
struct outbox *store_need_outbox(struct store *store, struct err *err);
/* The outbox, where there is one; looking creates none. NULL with ERR_NONE: there is none. err: may be
 * NULL. */
enum err_code store_find_outbox(struct store *store, struct outbox **outbox,
                                struct err *err) MUST_CHECK;
/* The outbox's views: VIEW_OUTBOX, VIEW_OUTBOX_BY_STATE. */
enum err_code store_query_outbox(struct store *store, enum store_view view,
                                 const struct store_filter *filter, store_row *row, void *context,
                                 struct err *err) MUST_CHECK;

/* The round trip of an acquire, repeated once where its outcome is unknown: it is idempotent on
 * (request_id, sequence). *maybe_reserved: it failed, and may have reserved all the same. */
void store_try_acquire(struct store *store, struct store_acquire *acquire, int64_t deadline_ms,
                       bool *maybe_reserved);
/* Settles up to BATCH_MAX in the store, each prepared before, twice where the outcome is unknown: it is
 * idempotent. Each one's code tells. */
void store_prepare_settlement(struct store_settlement *settlement);
void store_try_settle(struct store *store, void **settlements, size_t count, int64_t deadline_ms);

#endif
