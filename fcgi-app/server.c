/* server.c - the queue and the threads. See server.h; acceptor.c brings the connections, connection.c
 * speaks FastCGI with them, server_inside.h says what they share.
 *
 * Four lanes, each a list with its threads:
 *   work     the bounded queue; the workers
 *   at once  health, metrics, unknown paths
 *   reading  administrators' queries, which may take as long as the store does; bounded, too
 *   refused  what the queue has no room for, and whatever else comes with a body that nobody wants;
 *            its threads also take from the queue what has waited past queue_wait
 * All of it is under one mutex, which is never held during I/O.
 *
 * No peer can hold a thread: each slot says until when its peer may take to send (a head and what
 * nobody wants to read: two seconds; an upload: the request's deadline), and the watchdog ends the
 * reading of one that is late. */
#include "server.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>

#include "clock.h"
#include "log.h"
#include "metrics.h"
#include "route.h"
#include "server_inside.h"

#define SPARE_SLOTS 64
#define AT_ONCE_THREADS 2
#define READING_THREADS 2
#define READING_MAX 16 /* that wait */
#define REFUSING_THREADS 2
#define DRAIN_MS 2000
#define WATCH_EVERY_MS 250
#define STACK_SIZE (512 * 1024)

/* ---- lanes; all under the mutex ---- */

static void condition_init(pthread_cond_t *condition)
{
    pthread_condattr_t monotonic;

    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(condition, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

static void lane_init(struct lane *lane)
{
    condition_init(&lane->some);
    lane->last = &lane->first;
}

/* Who waits for it is to be woken after the mutex is free again: else it would wait for that, too. */
static void lane_put(struct lane *lane, struct slot *slot)
{
    slot->next = NULL;
    *lane->last = slot;
    lane->last = &slot->next;
    lane->count++;
}

static struct slot *lane_take(struct lane *lane)
{
    struct slot *slot = lane->first;

    if (slot == NULL)
        return NULL;
    lane->first = slot->next;
    if (lane->first == NULL)
        lane->last = &lane->first;
    lane->count--;
    return slot;
}

/* ---- slots ---- */

struct slot *server_take_free(struct server *server)
{
    pthread_mutex_lock(&server->mutex);
    struct slot *slot = server->free;
    if (slot != NULL) {
        server->free = slot->next;
        if (server->used++ == 0)
            pthread_cond_signal(&server->watch);
    }
    pthread_mutex_unlock(&server->mutex);
    return slot;
}

void server_give_back(struct server *server, struct slot *slot)
{
    pthread_mutex_lock(&server->mutex);
    slot->next = server->free;
    server->free = slot;
    server->used--;
    pthread_mutex_unlock(&server->mutex);
}

void server_read_until(struct server *server, struct slot *slot, int64_t until_ms)
{
    pthread_mutex_lock(&server->mutex);
    slot->read_until_ms = until_ms;
    pthread_mutex_unlock(&server->mutex);
}

static struct timespec as_timespec(int64_t monotonic_ms)
{
    return (struct timespec){.tv_sec = monotonic_ms / 1000,
                             .tv_nsec = (long)(monotonic_ms % 1000) * 1000000};
}

/* Ends the reading of those that are late. The mutex keeps a descriptor from closing meanwhile. */
static void *watchdog_main(void *argument)
{
    struct server *server = argument;

    pthread_mutex_lock(&server->mutex);
    while (!server->ended) {
        if (server->used == 0) {
            pthread_cond_wait(&server->watch, &server->mutex);
            continue;
        }
        int64_t now = clock_monotonic_ms();
        for (size_t i = 0; i < server->slot_count; i++) {
            struct slot *slot = &server->slots[i];
            if (slot->read_until_ms != 0 && now >= slot->read_until_ms) {
                slot->read_until_ms = 0;
                connection_stop_reading(&slot->connection);
            }
        }
        struct timespec next = as_timespec(now + WATCH_EVERY_MS);
        pthread_cond_timedwait(&server->watch, &server->mutex, &next);
    }
    pthread_mutex_unlock(&server->mutex);
    return NULL;
}

/* Writes the answer, ends the request and gives its slot back. */
static void finish(struct server *server, struct slot *slot, struct response *response)
{
    server_read_until(server, slot, 0);
    connection_answer(&slot->connection, response);
    server_give_back(server, slot);
}

/* ---- the threads ---- */

struct worker_start {
    struct server *server;
    struct worker worker;
};

static void work_one(struct server *server, struct worker *worker, struct slot *slot)
{
    struct response response;

    response_init(&response);
    server_read_until(server, slot,
                      slot->connection.request.accepted_ms +
                          server->app->config->server.deadline_ms);
    metrics_add(METRIC_IN_FLIGHT, 1);
    route_work(worker, &slot->connection.request, &response);
    metrics_add(METRIC_IN_FLIGHT, -1);
    finish(server, slot, &response);
}

static void *worker_main(void *argument)
{
    struct worker_start *start = argument;
    struct server *server = start->server;
    struct slot *slot;

    pthread_mutex_lock(&server->mutex);
    for (;;) {
        server->idle_workers++;
        if (server->pausing && server->work.first == NULL) {
            server->pausing = false;
            eventfd_write(server->idle_fd, 1);
        }
        while (server->work.first == NULL && !server->closing)
            pthread_cond_wait(&server->work.some, &server->mutex);
        server->idle_workers--;
        if ((slot = lane_take(&server->work)) == NULL)
            break;
        metrics_add(METRIC_QUEUED, -1);
        pthread_mutex_unlock(&server->mutex);
        work_one(server, &start->worker, slot);
        pthread_mutex_lock(&server->mutex);
    }
    pthread_mutex_unlock(&server->mutex);
    return NULL;
}

static void serve_lane(struct server *server, struct lane *lane)
{
    struct response response;
    struct slot *slot;

    pthread_mutex_lock(&server->mutex);
    for (;;) {
        while (lane->first == NULL && !server->closing)
            pthread_cond_wait(&lane->some, &server->mutex);
        if ((slot = lane_take(lane)) == NULL)
            break;
        pthread_mutex_unlock(&server->mutex);
        response_init(&response);
        server_read_until(server, slot, clock_monotonic_ms() + DRAIN_MS);
        route_other(server->app, &slot->connection.request, &response);
        finish(server, slot, &response);
        pthread_mutex_lock(&server->mutex);
    }
    pthread_mutex_unlock(&server->mutex);
}

static void *at_once_main(void *argument)
{
    struct server *server = argument;
    serve_lane(server, &server->at_once);
    return NULL;
}

static void *reading_main(void *argument)
{
    struct server *server = argument;
    serve_lane(server, &server->reading);
    return NULL;
}

/* When it is past queue_wait (monotonic). */
static int64_t late_at(const struct server *server, const struct slot *slot)
{
    return slot->connection.request.accepted_ms + server->app->config->server.queue_wait_ms;
}

/* The next one to refuse: refused already, or first in the queue and past queue_wait. Waits for one;
 * NULL when the server closes (what is queued then is still served). */
static struct slot *next_refused(struct server *server)
{
    while (server->refused.first == NULL && !server->closing) {
        if (server->work.first == NULL) {
            pthread_cond_wait(&server->refused.some, &server->mutex);
            continue;
        }
        int64_t until = late_at(server, server->work.first);
        if (clock_monotonic_ms() >= until) {
            metrics_add(METRIC_QUEUED, -1);
            return lane_take(&server->work);
        }
        struct timespec t = as_timespec(until);
        server->looks_at_ms = until;
        pthread_cond_timedwait(&server->refused.some, &server->mutex, &t);
        server->looks_at_ms = INT64_MAX;
    }
    return lane_take(&server->refused);
}

static void refuse(struct app *app, struct request *request, struct response *response)
{
    if (route_lane(request) == ROUTE_AT_ONCE) {
        route_other(app, request, response);
        return;
    }
    request_drain(request);
    response_problem(response, request, ERR_OVERLOADED, NULL, 0, false);
    metrics_add(METRIC_REQUESTS + ERR_OVERLOADED, 1);
    LOG_TRACED(LOG_WARNING, request->id, request_trace_id(request), NULL,
               "overloaded: the queue is full, or queue_wait has passed; %s",
               request_other_ids(request));
}

static void *refusing_main(void *argument)
{
    struct server *server = argument;
    struct response response;
    struct slot *slot;

    pthread_mutex_lock(&server->mutex);
    while ((slot = next_refused(server)) != NULL) {
        if (server->work.first != NULL && server->looks_at_ms == INT64_MAX)
            pthread_cond_signal(&server->refused.some); /* another is to look meanwhile */
        pthread_mutex_unlock(&server->mutex);
        response_init(&response);
        server_read_until(server, slot, clock_monotonic_ms() + DRAIN_MS);
        refuse(server->app, &slot->connection.request, &response);
        finish(server, slot, &response);
        pthread_mutex_lock(&server->mutex);
    }
    pthread_mutex_unlock(&server->mutex);
    return NULL;
}

/* ---- for the acceptor ---- */

bool server_queue_is_full(struct server *server)
{
    pthread_mutex_lock(&server->mutex);
    bool full = server->work.count >= server->app->config->server.queue + server->idle_workers;
    pthread_mutex_unlock(&server->mutex);
    return full;
}

/* Under the mutex. */
static struct lane *choose_lane(struct server *server, const struct request *request)
{
    switch (route_lane(request)) {
    case ROUTE_AT_ONCE:
        return request->content_length > 0 ? &server->refused : &server->at_once;
    case ROUTE_READER:
        return server->reading.count < READING_MAX ? &server->reading : &server->refused;
    case ROUTE_WORKER:
        break;
    }
    return server->work.count < server->app->config->server.queue + server->idle_workers
               ? &server->work
               : &server->refused;
}

void server_dispatch(struct server *server, struct slot *slot)
{
    bool is_early = false; /* it is late before anybody looks whether the first in the queue is */

    pthread_mutex_lock(&server->mutex);
    struct lane *lane = choose_lane(server, &slot->connection.request);
    slot->read_until_ms = 0;
    lane_put(lane, slot);
    if (lane == &server->work) {
        metrics_add(METRIC_QUEUED, 1);
        is_early = late_at(server, slot) < server->looks_at_ms;
    }
    pthread_mutex_unlock(&server->mutex);
    pthread_cond_signal(&lane->some);
    if (is_early)
        pthread_cond_signal(&server->refused.some);
}

/* ---- start and end ---- */

enum err_code server_check(struct err *err)
{
    int listening = 0;
    socklen_t size = sizeof listening;

    if (getsockopt(SERVER_LISTENER, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) != 0 ||
        !listening)
        return err_set(
            err, ERR_CONFIG,
            "standard input is not a listening socket: start the program by systemd "
            "(extract-fcgi.socket), or by spawn-fcgi -n -s SOCKET -- /path/to/extract-fcgi");
    return ERR_NONE;
}

static void server_free(struct server *server)
{
    acceptor_close(server);
    pthread_cond_destroy(&server->work.some);
    pthread_cond_destroy(&server->at_once.some);
    pthread_cond_destroy(&server->reading.some);
    pthread_cond_destroy(&server->refused.some);
    pthread_cond_destroy(&server->watch);
    pthread_mutex_destroy(&server->mutex);
    free(server->slots);
    free(server);
}

static struct server *server_new(struct app *app, int drain_fd, struct err *err)
{
    struct server *server = calloc(1, sizeof *server);
    size_t count =
        (size_t)app->config->server.threads + (size_t)app->config->server.queue + SPARE_SLOTS;

    if (server == NULL || (server->slots = calloc(count, sizeof *server->slots)) == NULL) {
        free(server);
        err_set(err, ERR_INTERNAL, "out of memory");
        return NULL;
    }
    server->app = app;
    server->epoll = server->heads = server->idle_fd = -1;
    server->drain_fd = drain_fd;
    server->looks_at_ms = INT64_MAX;
    server->slot_count = count;
    for (size_t i = 0; i < count; i++) {
        server->slots[i].next = server->free;
        server->free = &server->slots[i];
    }
    pthread_mutex_init(&server->mutex, NULL);
    condition_init(&server->watch);
    lane_init(&server->work);
    lane_init(&server->at_once);
    lane_init(&server->reading);
    lane_init(&server->refused);
    if (connection_init(err) == ERR_NONE && acceptor_open(server, err) == ERR_NONE)
        return server;
    server_free(server);
    return NULL;
}

/* The threads of a server; joined in the end. */
struct threads {
    pthread_t *list;
    int count;
    pthread_t watchdog; /* ends last */
    bool has_watchdog;
};

static bool start_thread(pthread_t *thread, void *(*main)(void *), void *argument)
{
    pthread_attr_t attributes;

    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_SIZE);
    bool started = pthread_create(thread, &attributes, main, argument) == 0;
    pthread_attr_destroy(&attributes);
    return started;
}

static bool start_listed(struct threads *threads, void *(*main)(void *), void *argument)
{
    bool started = start_thread(&threads->list[threads->count], main, argument);
    threads->count += started;
    return started;
}

static bool start_threads(struct server *server, struct threads *threads,
                          struct worker_start *workers)
{
    int count = server->app->config->server.threads;
    bool ok = start_thread(&threads->watchdog, watchdog_main, server);

    threads->has_watchdog = ok;
    for (int i = 0; ok && i < count; i++) {
        workers[i] = (struct worker_start){server, {server->app, NULL}};
        workers[i].worker.gemini = gemini_client_new(server->app->gemini);
        ok = workers[i].worker.gemini != NULL && start_listed(threads, worker_main, &workers[i]);
    }
    for (int i = 0; ok && i < AT_ONCE_THREADS; i++)
        ok = start_listed(threads, at_once_main, server);
    for (int i = 0; ok && i < READING_THREADS; i++)
        ok = start_listed(threads, reading_main, server);
    for (int i = 0; ok && i < REFUSING_THREADS; i++)
        ok = start_listed(threads, refusing_main, server);
    return ok;
}

static void end_threads(struct server *server, struct threads *threads,
                        struct worker_start *workers)
{
    pthread_mutex_lock(&server->mutex);
    server->closing = true;
    pthread_cond_broadcast(&server->work.some);
    pthread_cond_broadcast(&server->at_once.some);
    pthread_cond_broadcast(&server->reading.some);
    pthread_cond_broadcast(&server->refused.some);
    pthread_mutex_unlock(&server->mutex);
    for (int i = 0; i < threads->count; i++)
        pthread_join(threads->list[i], NULL);
    pthread_mutex_lock(&server->mutex);
    server->ended = true;
    pthread_cond_signal(&server->watch);
    pthread_mutex_unlock(&server->mutex);
    if (threads->has_watchdog)
        pthread_join(threads->watchdog, NULL);
    for (int i = 0; i < server->app->config->server.threads; i++)
        gemini_client_free(workers[i].worker.gemini);
}

enum err_code server_run(struct app *app, int drain_fd, struct err *err)
{
    int count = app->config->server.threads;
    struct server *server = server_new(app, drain_fd, err);

    if (server == NULL)
        return err->code;
    struct threads threads = {0};
    struct worker_start *workers = calloc((size_t)count, sizeof *workers);
    threads.list = calloc((size_t)count + AT_ONCE_THREADS + READING_THREADS + REFUSING_THREADS,
                          sizeof *threads.list);
    enum err_code code = ERR_NONE;
    if (workers == NULL || threads.list == NULL) {
        code = err_set(err, ERR_INTERNAL, "out of memory");
    } else {
        if (start_threads(server, &threads, workers)) {
            metrics_add(METRIC_WORKERS, count);
            acceptor_run(server);
            metrics_add(METRIC_WORKERS, -count); /* they take nothing new */
        } else {
            code = err_set(err, ERR_INTERNAL, "the threads cannot be started: %s", strerror(errno));
        }
        end_threads(server, &threads, workers);
    }
    free(threads.list);
    free(workers);
    server_free(server);
    return code;
}
