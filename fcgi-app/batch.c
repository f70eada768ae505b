/* batch.c - work that waits together travels together. See batch.h.
 *
 * Callers stand in one queue, each with its items. There are as many leader's places as runs may be
 * under way. A caller that finds all places free leads at once, and so does one that finds a place free
 * while the run begun last takes long; otherwise it waits until its items were carried by a leader, a
 * leader that has finished hands its place over, or that run has come to take long. A leader takes what
 * stands at the head of the queue, whole callers where they fit, its own items among them or not.
 *
 * Invariant, whenever the lock is free: if all places are free, nobody is in the queue; and whoever is in
 * it while one is free holds a place (and has not woken up yet, or gathers) or looks again in time.
 *
 * Who waits is called under the lock, but woken after it: else all whom a run has carried would wake up
 * only to wait for the lock. Who was carried does not need it any more. A caller's memory is its stack:
 * it stays until no run holds an item of its, and until it was woken if it was called. */
#include "batch.h"

#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "clock.h"
#include "tsan.h"

enum call { NOT_CALLED, CALLED_TO_LEAD, CALLED_AS_DONE };

struct waiter {
    struct waiter *next; /* in the queue; later among those to be woken */
    void **items;
    size_t count;
    size_t taken;   /* items that a run has taken; in the queue while taken < count */
    size_t done;    /* items whose run has ended */
    bool leads;     /* holds a leader's place */
    enum call call; /* the first of what it is called for; set once, until it has woken up */
    sem_t wake;
};

struct batch {
    pthread_mutex_t lock;
    struct waiter *first, **last; /* the queue */
    size_t queued;                /* items in it that no run has taken */
    int places, free_places;
    struct batch_times times;
    int64_t begun_ms; /* when the last run began, or began to gather */
    size_t carried;   /* by the run that was the last to take items */
    int64_t ended_ms; /* when a run ended last */
    batch_run *run;
    void *context;
};

struct batch *batch_new(int leaders, struct batch_times times, batch_run *run, void *context)
{
    struct batch *b = calloc(1, sizeof *b);

    if (b == NULL)
        return NULL;
    pthread_mutex_init(&b->lock, NULL);
    b->last = &b->first;
    b->places = b->free_places = leaders < 1 ? 1 : leaders;
    b->times = times;
    b->run = run;
    b->context = context;
    return b;
}

void batch_free(struct batch *b)
{
    if (b == NULL)
        return;
    pthread_mutex_destroy(&b->lock);
    free(b);
}

static void enqueue(struct batch *b, struct waiter *w)
{
    *b->last = w;
    b->last = &w->next;
    b->queued += w->count;
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
    b->queued -= w->count - w->taken;
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
    b->queued -= n;
    return n;
}

/* ---- calling and waking ---- */

/* Under the lock. Adds w to those to be woken, unless it is to wake up already. */
static void call(struct waiter *w, enum call why, struct waiter **woken)
{
    if (w->call != NOT_CALLED)
        return;
    w->call = why;
    if (why == CALLED_AS_DONE) { /* one that is called to lead is in the queue, and wakes alone */
        w->next = *woken;
        *woken = w;
    }
}

/* Without the lock. Each of them may be gone as soon as it is woken. */
static void wake_one(struct waiter *w)
{
    if (w == NULL)
        return;
    TSAN_RELEASE(&w->wake);
    sem_post(&w->wake);
}

static void wake_all(struct waiter *woken)
{
    while (woken != NULL) {
        struct waiter *next = woken->next;
        wake_one(woken);
        woken = next;
    }
}

/* Under the lock. May a run begin, beside those that are under way? */
static bool may_begin(const struct batch *b)
{
    return b->free_places == b->places ||
           (b->free_places > 0 && clock_monotonic_ms() - b->begun_ms >= b->times.patience_ms);
}

static void take_place(struct batch *b, struct waiter *w)
{
    b->free_places--;
    w->leads = true;
}

/* Under the lock. Leaves the place, and gives it to the first in the queue that has none if it may begin.
 * Returns whom to wake, or NULL. */
static struct waiter *pass_on(struct batch *b, struct waiter *from)
{
    struct waiter *w = b->first;

    from->leads = false;
    b->free_places++;
    while (w != NULL && w->leads)
        w = w->next;
    if (w == NULL || !may_begin(b))
        return NULL;
    take_place(b, w);
    if (w == from || w->call != NOT_CALLED)
        return NULL;
    call(w, CALLED_TO_LEAD, NULL);
    return w;
}

/* ---- leading ---- */

/* Where many came together just now, more are on their way: waits for them, up to the deadline, until a
 * run is full, or until another leader has taken what is self's. Holds the lock at the beginning and at
 * the end. */
static void gather(struct batch *b, const struct waiter *self, int64_t deadline_ms)
{
    int64_t now = clock_monotonic_ms(), until = now + b->times.gather_ms;

    if (b->carried < BATCH_MANY || now - b->ended_ms >= b->times.lately_ms)
        return;
    if (until > deadline_ms)
        until = deadline_ms;
    while (b->queued < BATCH_MAX && self->taken < self->count && now < until) {
        pthread_mutex_unlock(&b->lock);
        clock_sleep_until(now + 1);
        now = clock_monotonic_ms();
        pthread_mutex_lock(&b->lock);
    }
}

/* One run, unless other leaders take what is self's while it gathers: then somebody else may lead. Holds
 * the lock at the beginning and at the end. */
static void lead(struct batch *b, struct waiter *self, int64_t deadline_ms)
{
    void *run[BATCH_MAX];
    struct waiter *owners[BATCH_MAX];
    struct waiter *woken = NULL;

    b->begun_ms = clock_monotonic_ms();
    gather(b, self, deadline_ms);
    size_t n = self->taken < self->count ? take(b, run, owners) : 0;
    if (n > 0) {
        b->carried = n;
        pthread_mutex_unlock(&b->lock);
        b->run(b->context, run, n);
        pthread_mutex_lock(&b->lock);
        b->ended_ms = clock_monotonic_ms();
    }
    for (size_t i = 0; i < n; i++) {
        struct waiter *w = owners[i];
        if (++w->done == w->count && w != self)
            call(w, CALLED_AS_DONE, &woken);
    }
    struct waiter *leader = pass_on(b, self);
    pthread_mutex_unlock(&b->lock);
    wake_one(leader);
    wake_all(woken);
    pthread_mutex_lock(&b->lock);
}

/* ---- waiting ---- */

static void be_woken(struct waiter *self)
{
    while (sem_wait(&self->wake) != 0)
        ;
    TSAN_ACQUIRE(&self->wake);
}

/* Until woken, or until the deadline. True: woken. */
static bool be_woken_until(struct waiter *self, int64_t deadline_ms)
{
    const struct timespec until = {.tv_sec = (time_t)(deadline_ms / 1000),
                                   .tv_nsec = (long)(deadline_ms % 1000) * 1000000};
    int result;

    while ((result = sem_clockwait(&self->wake, CLOCK_MONOTONIC, &until)) != 0 && errno == EINTR)
        ;
    if (result != 0)
        return false;
    TSAN_ACQUIRE(&self->wake);
    return true;
}

/* Without the lock. True: all was carried, and the lock is not needed again. */
static bool answer_call(struct batch *b, struct waiter *self)
{
    if (self->call == CALLED_AS_DONE)
        return true;
    pthread_mutex_lock(&b->lock);
    self->call = NOT_CALLED;
    return false;
}

enum outcome { CARRIED, LATE, AWAKE };

/* When somebody who waits has to look whether it may begin by itself. */
static int64_t look_again_ms(const struct batch *b)
{
    int64_t now = clock_monotonic_ms();
    int64_t long_at = b->begun_ms + b->times.patience_ms;

    return long_at > now ? long_at : now + b->times.patience_ms;
}

/* Waits to be woken, until the deadline or until it is time to look again, unless a run holds items of
 * self. Takes the lock over, and gives it back unless CARRIED. */
static enum outcome wait_turn(struct batch *b, struct waiter *self, int64_t deadline_ms)
{
    bool is_bounded = self->taken == self->done;
    int64_t until_ms = look_again_ms(b);

    if (until_ms > deadline_ms || b->times.patience_ms == 0 || b->places == 1)
        until_ms = deadline_ms;
    pthread_mutex_unlock(&b->lock);
    if (!is_bounded) {
        be_woken(self);
        return answer_call(b, self) ? CARRIED : AWAKE;
    }
    if (be_woken_until(self, until_ms < 0 ? 0 : until_ms))
        return answer_call(b, self) ? CARRIED : AWAKE;
    pthread_mutex_lock(&b->lock);
    if (self->call == NOT_CALLED) {
        if (self->taken != self->done)
            return AWAKE;
        if (until_ms == deadline_ms)
            return LATE;
        if (may_begin(b))
            take_place(b, self);
        return AWAKE;
    }
    pthread_mutex_unlock(&b->lock); /* called just now: whoever did it still holds on to self */
    be_woken(self);
    return answer_call(b, self) ? CARRIED : AWAKE;
}

/* Until all is done or it is too late. Holds the lock at the beginning, and at the end unless CARRIED. */
static enum outcome take_part(struct batch *b, struct waiter *self, int64_t deadline_ms)
{
    enum outcome outcome = AWAKE;

    while (self->done < self->count && outcome == AWAKE) {
        if (!self->leads) {
            outcome = wait_turn(b, self, deadline_ms);
        } else if (self->taken == self->count) { /* another leader was faster */
            struct waiter *leader = pass_on(b, self);
            pthread_mutex_unlock(&b->lock);
            wake_one(leader);
            pthread_mutex_lock(&b->lock);
        } else if (self->taken == self->done && clock_monotonic_ms() >= deadline_ms) {
            outcome = LATE;
        } else {
            lead(b, self, deadline_ms);
        }
    }
    return outcome;
}

/* Under the lock, which it gives up. */
static void leave(struct batch *b, struct waiter *self, enum outcome outcome)
{
    struct waiter *leader = NULL;

    if (outcome == LATE)
        unlink_waiter(b, self);
    if (self->leads)
        leader = pass_on(b, self);
    bool is_called = self->call != NOT_CALLED;
    pthread_mutex_unlock(&b->lock);
    wake_one(leader);
    if (is_called)
        be_woken(self);
}

enum err_code batch_submit(struct batch *b, void **items, size_t count, int64_t deadline_ms,
                           size_t *ran)
{
    struct waiter self = {.items = items, .count = count};
    enum outcome outcome = AWAKE;

    sem_init(&self.wake, 0, 0);
    pthread_mutex_lock(&b->lock);
    if (count > 0)
        enqueue(b, &self);
    if (count > 0 && may_begin(b)) {
        take_place(b, &self);
        lead(b, &self, deadline_ms); /* even if it is over: it bounds waiting for others */
    }
    outcome = take_part(b, &self, deadline_ms);
    if (outcome != CARRIED)
        leave(b, &self, outcome);
    sem_destroy(&self.wake);
    if (ran != NULL)
        *ran = self.done;
    return self.done == count ? ERR_NONE : ERR_STORE_UNAVAILABLE;
}
