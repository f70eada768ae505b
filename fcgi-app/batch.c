/* batch.c - work that waits together travels together. See batch.h.
 *
 * Callers stand in one queue, each with its items. There are as many leader's places as runs may be
 * under way. A caller that finds a place leads at once; otherwise it waits until its items were
 * carried by a leader, or a leader that has finished hands its place over. A leader takes what
 * stands at the head of the queue, whole callers where they fit, its own items among them or not.
 *
 * Invariant, whenever the lock is free: if a place is free, every caller in the queue holds one
 * (it was given a place and has not woken up yet). So nobody waits while a place is empty.
 *
 * A caller's memory is its stack: it stays until no run holds an item of its. */
#include "batch.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "clock.h"

struct waiter {
    struct waiter *next;
    void **items;
    size_t count;
    size_t taken; /* items that a run has taken; in the queue while taken < count */
    size_t done;  /* items whose run has ended */
    bool leads;   /* holds a leader's place */
    pthread_cond_t wake;
};

struct batch {
    pthread_mutex_t lock;
    pthread_condattr_t monotonic;
    struct waiter *first, **last; /* the queue */
    int free_places;
    batch_run *run;
    void *context;
};

struct batch *batch_new(int leaders, batch_run *run, void *context)
{
    struct batch *b = calloc(1, sizeof *b);

    if (b == NULL)
        return NULL;
    pthread_mutex_init(&b->lock, NULL);
    pthread_condattr_init(&b->monotonic);
    pthread_condattr_setclock(&b->monotonic, CLOCK_MONOTONIC);
    b->last = &b->first;
    b->free_places = leaders < 1 ? 1 : leaders;
    b->run = run;
    b->context = context;
    return b;
}

void batch_free(struct batch *b)
{
    if (b == NULL)
        return;
    pthread_condattr_destroy(&b->monotonic);
    pthread_mutex_destroy(&b->lock);
    free(b);
}

static void enqueue(struct batch *b, struct waiter *w)
{
    *b->last = w;
    b->last = &w->next;
}

static void unlink_waiter(struct batch *b, struct waiter *w)
{
    struct waiter **at = &b->first;

    while (*at != NULL && *at != w)
        at = &(*at)->next;
    if (*at == NULL)
        return;
    *at = w->next;
    if (b->last == &w->next)
        b->last = at;
}

/* Takes items from the head of the queue into run; owners are those they belong to. A caller whose
 * items do not all fit into what is left waits for the next run; one with more than a whole run
 * starts only with a run of its own. */
static size_t take(struct batch *b, void **run, struct waiter **owners)
{
    size_t n = 0;

    while (b->first != NULL && n < BATCH_MAX) {
        struct waiter *w = b->first;
        if (n > 0 && w->count - w->taken > BATCH_MAX - n)
            break;
        while (w->taken < w->count && n < BATCH_MAX) {
            owners[n] = w;
            run[n++] = w->items[w->taken++];
        }
        if (w->taken < w->count)
            break;
        b->first = w->next;
        if (b->first == NULL)
            b->last = &b->first;
    }
    return n;
}

/* Gives the place to the first in the queue that has none, or leaves it empty. */
static void pass_on(struct batch *b, struct waiter *from)
{
    struct waiter *w = b->first;

    from->leads = false;
    while (w != NULL && w->leads)
        w = w->next;
    if (w == NULL) {
        b->free_places++;
        return;
    }
    w->leads = true;
    pthread_cond_signal(&w->wake);
}

/* One run, with the lock released meanwhile. */
static void lead(struct batch *b, struct waiter *self)
{
    void *run[BATCH_MAX];
    struct waiter *owners[BATCH_MAX];
    size_t n = take(b, run, owners);

    pthread_mutex_unlock(&b->lock);
    b->run(b->context, run, n);
    pthread_mutex_lock(&b->lock);
    for (size_t i = 0; i < n; i++) {
        struct waiter *w = owners[i];
        if (++w->done == w->count && w != self)
            pthread_cond_signal(&w->wake);
    }
    pass_on(b, self);
}

/* Waits to be woken, until the deadline unless a run holds items of self. True: too late. */
static bool wait_turn(struct batch *b, struct waiter *self, int64_t deadline_ms)
{
    if (self->taken > self->done) {
        pthread_cond_wait(&self->wake, &b->lock);
        return false;
    }
    if (deadline_ms < 0)
        deadline_ms = 0;
    struct timespec until = {.tv_sec = (time_t)(deadline_ms / 1000),
                             .tv_nsec = (long)(deadline_ms % 1000) * 1000000};
    return pthread_cond_timedwait(&self->wake, &b->lock, &until) == ETIMEDOUT &&
           self->taken == self->done;
}

enum err_code batch_submit(struct batch *b, void **items, size_t count, int64_t deadline_ms,
                           size_t *ran)
{
    struct waiter self = {.items = items, .count = count};
    bool late = false;

    pthread_cond_init(&self.wake, &b->monotonic);
    pthread_mutex_lock(&b->lock);
    if (count > 0)
        enqueue(b, &self);
    if (count > 0 && b->free_places > 0) {
        b->free_places--;
        self.leads = true;
        lead(b,
             &self); /* whatever the deadline: it bounds the waiting, and this one does not wait */
    }
    while (self.done < count && !late) {
        if (!self.leads)
            late = wait_turn(b, &self, deadline_ms);
        else if (self.taken == count)
            pass_on(b, &self); /* another leader was faster */
        else if (self.taken == self.done && clock_monotonic_ms() >= deadline_ms)
            late = true;
        else
            lead(b, &self);
    }
    if (late)
        unlink_waiter(b, &self);
    if (self.leads)
        pass_on(b, &self);
    pthread_mutex_unlock(&b->lock);
    pthread_cond_destroy(&self.wake);
    if (ran != NULL)
        *ran = self.done;
    return self.done == count ? ERR_NONE : ERR_STORE_UNAVAILABLE;
}
