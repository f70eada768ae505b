/* record.c - the recorder: log entries and retry attempts go to the store in the background.
 * See record.h.
 *
 * Callers put what they have into a bounded queue under a lock that nobody holds during I/O. One
 * thread takes from both queues and writes them in one transaction. After the first of a batch it
 * waits a moment for others: gathering, so that a busy second costs about ten transactions and not
 * thousands. Where the store stays away, what was taken goes to the outbox, or, where that fails too,
 * to standard error; until the store answers again a batch is tried once only, so that an outage never
 * holds the queue up for long.
 *
 * The recorder never logs: its own entries (how many were dropped, why something went to standard
 * error) are made here and written where the others are. */
#include "record.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "clock.h"
#include "metrics.h"

#define ENTRIES_MAX 8192
#define ATTEMPTS_MAX 2048
#define ENTRIES_AT_ONCE 256
#define ATTEMPTS_AT_ONCE 64
#define GATHER_MS 100
#define RETRY_FOR_MS 2000 /* how long a batch is offered to a store that is away */
#define RETRY_EVERY_MS 100

/* A bounded queue of pointers: a ring. */
struct queue {
    void **items;
    size_t size, first, count;
    uint64_t entered, ended; /* since the start; ended: written, or gone to standard error */
    int64_t dropped;         /* since it was last said */
};

struct recorder {
    struct store *store;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t wake;  /* the thread: there is something to do */
    pthread_cond_t ended; /* who flushes: a batch has ended */
    struct queue entries, attempts;
    int flushing;
    bool stopping;
    int64_t stop_ms;    /* monotonic; when stopping */
    bool store_is_away; /* the thread's own */
};

/* What was taken for one transaction; one entry more, to say how many were dropped. */
struct load {
    void *entries[ENTRIES_AT_ONCE + 1];
    void *attempts[ATTEMPTS_AT_ONCE];
    size_t entry_count, attempt_count;
    size_t entries_taken; /* without that one */
};

static bool queue_init(struct queue *q, size_t size)
{
    *q = (struct queue){.size = size, .items = calloc(size, sizeof *q->items)};
    return q->items != NULL;
}

static void queue_put(struct queue *q, void *take_item)
{
    if (q->count == q->size) {
        q->dropped++;
        metrics_add(METRIC_LOG_DROPPED, 1);
        free(take_item);
        return;
    }
    q->items[(q->first + q->count++) % q->size] = take_item;
    q->entered++;
}

static size_t queue_take(struct queue *q, void **items, size_t max)
{
    size_t n = 0;

    while (n < max && q->count > 0) {
        items[n++] = q->items[q->first];
        q->first = (q->first + 1) % q->size;
        q->count--;
    }
    return n;
}

/* ---- from any thread ---- */

/* The thread is woken by the first that comes and when a batch is full, not by each. */
static void put(struct recorder *r, struct queue *q, size_t at_once, void *take_item)
{
    pthread_mutex_lock(&r->lock);
    bool was_empty = r->entries.count + r->attempts.count == 0;
    queue_put(q, take_item);
    if (was_empty || q->count >= at_once)
        pthread_cond_signal(&r->wake);
    pthread_mutex_unlock(&r->lock);
}

void recorder_log(struct log_entry *take_entry, void *recorder)
{
    struct recorder *r = recorder;
    put(r, &r->entries, ENTRIES_AT_ONCE, take_entry);
}

void recorder_retry(struct recorder *r, const struct store_retry_attempt *attempt)
{
    struct store_retry_attempt *copy = malloc(sizeof *copy);

    if (copy == NULL) {
        pthread_mutex_lock(&r->lock);
        r->attempts.dropped++;
        pthread_mutex_unlock(&r->lock);
        metrics_add(METRIC_LOG_DROPPED, 1);
        return;
    }
    *copy = *attempt;
    put(r, &r->attempts, ATTEMPTS_AT_ONCE, copy);
}

void recorder_flush(struct recorder *r)
{
    pthread_mutex_lock(&r->lock);
    uint64_t entries = r->entries.entered, attempts = r->attempts.entered;
    r->flushing++;
    pthread_cond_signal(&r->wake);
    while (r->entries.ended < entries || r->attempts.ended < attempts)
        pthread_cond_wait(&r->ended, &r->lock);
    r->flushing--;
    pthread_mutex_unlock(&r->lock);
}

/* ---- the thread ---- */

/* Waits for a signal until the monotonic time given. False: it has come. */
static bool wait_until(struct recorder *r, int64_t until_ms)
{
    struct timespec until = {.tv_sec = (time_t)(until_ms / 1000),
                             .tv_nsec = (long)(until_ms % 1000) * 1000000};
    return pthread_cond_timedwait(&r->wake, &r->lock, &until) != ETIMEDOUT;
}

static bool is_idle(const struct recorder *r)
{
    return r->entries.count == 0 && r->attempts.count == 0;
}

static void gather(struct recorder *r)
{
    int64_t until_ms = clock_monotonic_ms() + GATHER_MS;

    while (!r->stopping && r->flushing == 0 && r->entries.count < ENTRIES_AT_ONCE &&
           r->attempts.count < ATTEMPTS_AT_ONCE && wait_until(r, until_ms))
        ;
}

/* Under the lock. The entry that says what was dropped comes last: it is about what came after. */
static void take_load(struct recorder *r, struct load *load)
{
    load->entries_taken = queue_take(&r->entries, load->entries, ENTRIES_AT_ONCE);
    load->entry_count = load->entries_taken;
    load->attempt_count = queue_take(&r->attempts, load->attempts, ATTEMPTS_AT_ONCE);
    if (r->entries.dropped == 0 && r->attempts.dropped == 0)
        return;
    struct log_entry *entry =
        log_entry_new(LOG_WARNING, __FILE__, __LINE__, __func__, NULL, NULL,
                      "%lld log entries and %lld retry attempts were dropped: the queue was full",
                      (long long)r->entries.dropped, (long long)r->attempts.dropped);
    if (entry == NULL)
        return;
    load->entries[load->entry_count++] = entry;
    r->entries.dropped = r->attempts.dropped = 0;
}

enum where { TO_STORE, TO_STORE_AGAIN, TO_OUTBOX };

static enum err_code record(struct recorder *r, enum where where, void *const *entries,
                            size_t entry_count, void *const *attempts, size_t attempt_count,
                            struct err *err)
{
    struct log_entry *typed_entries[ENTRIES_AT_ONCE + 1];
    const struct store_retry_attempt *typed_attempts[ATTEMPTS_AT_ONCE];

    for (size_t i = 0; i < entry_count; i++)
        typed_entries[i] = entries[i];
    for (size_t i = 0; i < attempt_count; i++)
        typed_attempts[i] = attempts[i];
    if (where == TO_OUTBOX)
        return store_record_offline(r->store, typed_entries, entry_count, typed_attempts,
                                    attempt_count, err);
    return store_record(r->store, typed_entries, entry_count, typed_attempts, attempt_count,
                        where == TO_STORE_AGAIN, err);
}

static void attempt_to_stderr(const struct store_retry_attempt *a)
{
    struct log_entry *entry = log_entry_new(
        LOG_WARNING, __FILE__, __LINE__, __func__, a->request_id, a->error_message,
        "attempt %d of company %s with token %lld failed: status %d, %s, next after %lld ms",
        a->attempt, a->company_id, (long long)a->token_id, a->status_code,
        a->is_retryable ? "retryable" : "not retryable", (long long)a->delay_ms);
    if (entry == NULL)
        return;
    entry->wall_ms = a->wall_ms;
    log_to_stderr(entry);
    free(entry);
}

static void load_to_stderr(const struct load *load)
{
    for (size_t i = 0; i < load->entry_count; i++)
        log_to_stderr(load->entries[i]);
    for (size_t i = 0; i < load->attempt_count; i++)
        attempt_to_stderr(load->attempts[i]);
}

static void say_why(const struct load *load, const struct err *err)
{
    struct log_entry *entry =
        log_entry_new(LOG_ERROR, __FILE__, __LINE__, __func__, NULL, err->message,
                      "%zu log entries and %zu retry attempts go to standard error",
                      load->entry_count, load->attempt_count);
    if (entry != NULL)
        log_to_stderr(entry);
    free(entry);
}

/* The store did not take the load: the outbox keeps it, or else standard error has it. */
static void keep_for_later(struct recorder *r, const struct load *load, const struct err *why)
{
    struct err err = {.message = ""};

    if (record(r, TO_OUTBOX, load->entries, load->entry_count, load->attempts, load->attempt_count,
               &err) == ERR_NONE)
        return;
    err_prefix(&err, "%s", why->message);
    say_why(load, &err);
    load_to_stderr(load);
}

/* Each alone, for one of them was refused; standard error takes that one. */
static void write_singly(struct recorder *r, struct load *load)
{
    struct err err = {.message = ""};
    enum err_code code = ERR_NONE;

    for (size_t i = 0; i < load->entry_count; i++) {
        if (code != ERR_STORE_UNAVAILABLE)
            code = record(r, TO_STORE_AGAIN, &load->entries[i], 1, NULL, 0, &err);
        if (code != ERR_NONE)
            log_to_stderr(load->entries[i]);
    }
    for (size_t i = 0; i < load->attempt_count; i++) {
        if (code != ERR_STORE_UNAVAILABLE)
            code = record(r, TO_STORE_AGAIN, NULL, 0, &load->attempts[i], 1, &err);
        if (code != ERR_NONE)
            attempt_to_stderr(load->attempts[i]);
    }
    r->store_is_away = code == ERR_STORE_UNAVAILABLE;
}

static bool is_over(struct recorder *r)
{
    pthread_mutex_lock(&r->lock);
    bool over = r->stopping && clock_monotonic_ms() >= r->stop_ms;
    pthread_mutex_unlock(&r->lock);
    return over;
}

static void pause_retry(struct recorder *r)
{
    int64_t until_ms = clock_monotonic_ms() + RETRY_EVERY_MS;

    pthread_mutex_lock(&r->lock);
    while (wait_until(r, until_ms))
        ;
    pthread_mutex_unlock(&r->lock);
}

/* Offers the load to the store for a while. */
static enum err_code offer(struct recorder *r, const struct load *load, struct err *err)
{
    int64_t until_ms = clock_monotonic_ms() + (r->store_is_away ? 0 : RETRY_FOR_MS);
    enum where where = TO_STORE;
    enum err_code code =
        err_set(err, ERR_STORE_UNAVAILABLE, "the program ends before the store took them");

    while (!is_over(r)) {
        code = record(r, where, load->entries, load->entry_count, load->attempts,
                      load->attempt_count, err);
        where = TO_STORE_AGAIN; /* perhaps it has taken them, and could not say so */
        if (code != ERR_STORE_UNAVAILABLE || clock_monotonic_ms() >= until_ms)
            break;
        pause_retry(r);
    }
    r->store_is_away = code == ERR_STORE_UNAVAILABLE;
    return code;
}

static void write_load(struct recorder *r, struct load *load, bool crowded)
{
    struct err err = {.message = ""};
    enum err_code code;

    if (crowded)
        code = err_set(&err, ERR_STORE_UNAVAILABLE, "the store is away and the queue half full");
    else
        code = offer(r, load, &err);
    if (code == ERR_BAD_VALUE) {
        write_singly(r, load);
    } else if (code != ERR_NONE) {
        keep_for_later(r, load, &err);
    }
    metrics_add(METRIC_LOG_WRITTEN, (int64_t)load->entry_count);
    for (size_t i = 0; i < load->entry_count; i++)
        free(load->entries[i]);
    for (size_t i = 0; i < load->attempt_count; i++)
        free(load->attempts[i]);
}

static void *run_recorder(void *arg)
{
    struct recorder *r = arg;
    struct load load;

    pthread_mutex_lock(&r->lock);
    for (;;) {
        while (is_idle(r) && !r->stopping)
            pthread_cond_wait(&r->wake, &r->lock);
        if (is_idle(r))
            break;
        gather(r);
        bool crowded = r->store_is_away && r->entries.count > ENTRIES_MAX / 2;
        take_load(r, &load);
        pthread_mutex_unlock(&r->lock);
        write_load(r, &load, crowded);
        pthread_mutex_lock(&r->lock);
        r->entries.ended += load.entries_taken;
        r->attempts.ended += load.attempt_count;
        pthread_cond_broadcast(&r->ended);
    }
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

/* ---- starting and stopping ---- */

static void recorder_free(struct recorder *r)
{
    pthread_cond_destroy(&r->ended);
    pthread_cond_destroy(&r->wake);
    pthread_mutex_destroy(&r->lock);
    free(r->attempts.items);
    free(r->entries.items);
    free(r);
}

struct recorder *recorder_start(struct store *store, struct err *err)
{
    pthread_condattr_t monotonic;
    struct recorder *r = calloc(1, sizeof *r);

    if (r == NULL) {
        err_set(err, ERR_INTERNAL, "no memory for the recorder");
        return NULL;
    }
    r->store = store;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&r->wake, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_cond_init(&r->ended, NULL);
    pthread_mutex_init(&r->lock, NULL);
    if (!queue_init(&r->entries, ENTRIES_MAX) || !queue_init(&r->attempts, ATTEMPTS_MAX)) {
        err_set(err, ERR_INTERNAL, "no memory for the recorder");
        goto failed;
    }
    if (pthread_create(&r->thread, NULL, run_recorder, r) != 0) {
        err_set(err, ERR_INTERNAL, "cannot start the recorder's thread");
        goto failed;
    }
    return r;
failed:
    recorder_free(r);
    return NULL;
}

void recorder_stop(struct recorder *r, int64_t timeout_ms)
{
    if (r == NULL)
        return;
    log_set_sink(NULL, NULL); /* nobody is in recorder_log any more when it returns */
    pthread_mutex_lock(&r->lock);
    r->stopping = true;
    r->stop_ms = clock_monotonic_ms() + timeout_ms;
    pthread_cond_signal(&r->wake);
    pthread_mutex_unlock(&r->lock);
    pthread_join(r->thread, NULL);
    recorder_free(r);
}
