/* gauges.c - what /metrics says of the store. See gauges.h.
 *
 * One read serves all who ask while it is under way, and those of the next few seconds. Who asks waits
 * until wait_ms after the read's begin, not after the question: a store that hangs holds one scrape, and
 * none of those that follow. What a read brings later than that serves nobody: the store is then too slow
 * for extractions too. */
#include "gauges.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

#include "clock.h"
#include "metrics.h"

/* As the contract spells them; the store may hold any case, and whatever somebody wrote by hand. */
static const char *const statuses[] = {"Active", "Expired", "Exceeded", "Disabled", "other"};

#define STATUS_COUNT (sizeof statuses / sizeof statuses[0])

/* What the store said. */
struct figures {
    bool is_up;
    bool has_tokens;
    bool has_reservations;
    struct {
        int64_t count, over_threshold, cooling;
    } tokens[STATUS_COUNT];
    int64_t open, unsettled;
};

struct gauges {
    struct store *store, *reader;
    int64_t wait_ms, serve_ms;
    pthread_t thread;
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t wanted, done;
    bool stopping;
    bool is_reading;
    int64_t begun_ms, ended_ms; /* the last read's, monotonic; 0: none */
    struct figures figures;
};

/* ---- reading ---- */

static const struct store_value *find(const char *name, size_t columns, const char *const *names,
                                      const struct store_value *values)
{
    static const struct store_value none = {.type = STORE_NULL};

    for (size_t i = 0; i < columns; i++)
        if (strcmp(names[i], name) == 0)
            return &values[i];
    return &none;
}

static int64_t number(const char *name, size_t columns, const char *const *names,
                      const struct store_value *values)
{
    const struct store_value *v = find(name, columns, names, values);
    return v->type == STORE_INTEGER ? v->integer : 0;
}

static bool take_status(void *context, size_t columns, const char *const *names,
                        const struct store_value *values)
{
    struct figures *f = context;
    const struct store_value *status = find("Status", columns, names, values);
    size_t i = 0;

    while (i < STATUS_COUNT - 1 &&
           (status->type != STORE_TEXT || strcasecmp(status->text, statuses[i]) != 0))
        i++;
    f->tokens[i].count += number("Count", columns, names, values);
    f->tokens[i].over_threshold += number("OverThreshold", columns, names, values);
    f->tokens[i].cooling += number("Cooling", columns, names, values);
    return true;
}

static bool take_reservation(void *context, size_t columns, const char *const *names,
                             const struct store_value *values)
{
    struct figures *f = context;
    const struct store_value *state = find("State", columns, names, values);
    bool is_open = state->type == STORE_TEXT && strcasecmp(state->text, "open") == 0;

    f->open += is_open;
    f->unsettled += !is_open;
    return true;
}

static void read_figures(struct gauges *g, struct figures *f)
{
    const struct store_filter all = {.limit = GAUGES_ROWS_MAX};
    struct err err = {.message = ""};

    *f = (struct figures){.is_up = store_ping(g->store, &err) == ERR_NONE};
    if (!f->is_up)
        return;
    f->has_tokens =
        store_query(g->reader, VIEW_TOKENS_BY_STATUS, &all, take_status, f, &err) == ERR_NONE;
    f->has_reservations =
        store_query(g->reader, VIEW_RESERVATIONS, &all, take_reservation, f, &err) == ERR_NONE;
}

static void *run(void *context)
{
    struct gauges *g = context;
    struct figures figures;

    pthread_mutex_lock(&g->lock);
    for (;;) {
        while (!g->is_reading && !g->stopping)
            pthread_cond_wait(&g->wanted, &g->lock);
        if (g->stopping)
            break;
        pthread_mutex_unlock(&g->lock);
        read_figures(g, &figures);
        pthread_mutex_lock(&g->lock);
        g->figures = figures;
        g->ended_ms = clock_monotonic_ms();
        g->is_reading = false;
        pthread_cond_broadcast(&g->done);
    }
    pthread_mutex_unlock(&g->lock);
    return NULL;
}

/* ---- asking ---- */

/* Under the lock: those of now, or none. */
static struct figures ask(struct gauges *g)
{
    int64_t now = clock_monotonic_ms();

    if (!g->is_reading && (g->ended_ms == 0 || now - g->ended_ms >= g->serve_ms)) {
        g->is_reading = true;
        g->begun_ms = now;
        pthread_cond_signal(&g->wanted);
    }
    int64_t until_ms = g->begun_ms + g->wait_ms;
    const struct timespec until = {.tv_sec = (time_t)(until_ms / 1000),
                                   .tv_nsec = (long)(until_ms % 1000) * 1000000};
    while (g->is_reading && pthread_cond_timedwait(&g->done, &g->lock, &until) == 0)
        ;
    return g->is_reading || g->ended_ms > until_ms ? (struct figures){.is_up = false} : g->figures;
}

static void write_tokens(struct buf *out, const struct figures *f)
{
    metrics_write_head(out, "extract_api_tokens", "gauge", "API tokens in the store, by status.");
    for (size_t i = 0; i < STATUS_COUNT; i++)
        metrics_write_sample(out, "extract_api_tokens", "status", statuses[i], f->tokens[i].count);
    metrics_write_head(out, "extract_api_tokens_over_threshold", "gauge",
                       "Those that have used more of their limit than their threshold.");
    for (size_t i = 0; i < STATUS_COUNT; i++)
        metrics_write_sample(out, "extract_api_tokens_over_threshold", "status", statuses[i],
                             f->tokens[i].over_threshold);
    metrics_write_head(out, "extract_api_tokens_cooling", "gauge",
                       "Those that are not to be used at this moment, after a rate limit.");
    for (size_t i = 0; i < STATUS_COUNT; i++)
        metrics_write_sample(out, "extract_api_tokens_cooling", "status", statuses[i],
                             f->tokens[i].cooling);
}

void gauges_write(struct gauges *g, struct buf *out)
{
    pthread_mutex_lock(&g->lock);
    struct figures f = ask(g);
    pthread_mutex_unlock(&g->lock);

    metrics_write_head(out, "extract_store_up", "gauge",
                       "1: the store could be read and written, within a second. 0: no; "
                       "what is read from it is then left out.");
    buf_printf(out, "extract_store_up %d\n", f.is_up);
    if (f.has_tokens)
        write_tokens(out, &f);
    if (!f.has_reservations)
        return;
    metrics_write_head(out, "extract_reservations", "gauge",
                       "Reservations in the store: of requests in flight (open), and of calls that "
                       "may have been billed and are in no sum (unsettled).");
    metrics_write_sample(out, "extract_reservations", "state", "open", f.open);
    metrics_write_sample(out, "extract_reservations", "state", "unsettled", f.unsettled);
}

/* ---- starting and stopping ---- */

struct gauges *gauges_start(struct store *store, struct store *reader, int64_t wait_ms,
                            int64_t serve_ms, struct err *err)
{
    pthread_condattr_t monotonic;
    struct gauges *g = calloc(1, sizeof *g);

    if (g == NULL) {
        err_set(err, ERR_INTERNAL, "out of memory");
        return NULL;
    }
    g->store = store;
    g->reader = reader;
    g->wait_ms = wait_ms;
    g->serve_ms = serve_ms;
    pthread_mutex_init(&g->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&g->wanted, NULL);
    pthread_cond_init(&g->done, &monotonic);
    pthread_condattr_destroy(&monotonic);
    if (pthread_create(&g->thread, NULL, run, g) == 0)
        return g;
    err_set(err, ERR_INTERNAL, "the thread of /metrics cannot be started");
    pthread_cond_destroy(&g->done);
    pthread_cond_destroy(&g->wanted);
    pthread_mutex_destroy(&g->lock);
    free(g);
    return NULL;
}

void gauges_stop(struct gauges *g)
{
    if (g == NULL)
        return;
    pthread_mutex_lock(&g->lock);
    g->stopping = true;
    pthread_cond_signal(&g->wanted);
    pthread_mutex_unlock(&g->lock);
    pthread_join(g->thread, NULL);
    pthread_cond_destroy(&g->done);
    pthread_cond_destroy(&g->wanted);
    pthread_mutex_destroy(&g->lock);
    free(g);
}
