/* server.c - the acceptor, the queue, the workers. See server.h; connection.h speaks FastCGI.
 *
 * Connections live in a fixed number of slots: one for each worker, each place in the queue, and
 * SPARE_SLOTS for what is answered at once or refused; without a free slot nothing is accepted. A slot
 * travels: free -> (accepted) -> a lane -> (a thread answers) -> free. One that is silent at first
 * waits in the acceptor's epoll until it speaks.
 *
 * Three lanes, each a list with its threads:
 *   work     the bounded queue; the workers
 *   at once  health, metrics, unknown paths
 *   refused  what the queue has no room for, and whatever else comes with a body that nobody wants;
 *            its threads also take from the queue what has waited past queue_wait
 * All of it is under one mutex, which is never held during I/O.
 *
 * No peer can hold a thread: each slot says until when its peer may take to send (a head and what
 * nobody wants to read: HEAD_MS and DRAIN_MS; an upload: the request's deadline), and the watchdog ends
 * the reading of one that is late.
 *
 * Letting others go first: the listener is shared, and the kernel wakes one process that waits for it
 * (EPOLLEXCLUSIVE). An acceptor without an idle worker does not wait for it but pauses for 20 ms, and
 * again while another process of the pool can do better (MAX_PAUSES at the most: that process may be
 * stuck); a connection that is still there after that is everybody's, and is taken. */
#include "server.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "connection.h"
#include "log.h"
#include "metrics.h"
#include "route.h"

#define LISTENER 0
#define PAUSE_MS 20
#define MAX_PAUSES 25
#define SPARE_SLOTS 64
#define AT_ONCE_THREADS 2
#define REFUSING_THREADS 2
#define HEAD_MS 2000
#define DRAIN_MS 2000
#define WATCH_EVERY_MS 250
#define STACK_SIZE (512 * 1024)

struct slot {
    struct slot *next;
    struct connection connection;
    int64_t read_until_ms; /* monotonic; 0: nothing is read */
    bool silent;           /* in the acceptor's epoll; the acceptor's own */
};

struct lane {
    struct slot *first, **last;
    int count;
    pthread_cond_t some; /* CLOCK_MONOTONIC */
};

struct server {
    struct app *app;
    int epoll, drain_fd, idle_fd;
    int heads; /* an epoll of the silent connections, itself in epoll */
    struct slot *slots;
    size_t slot_count;
    pthread_mutex_t mutex;
    struct slot *free;
    size_t used; /* slots that are not free */
    struct lane work, at_once, refused;
    pthread_cond_t watch; /* the watchdog: the first slot is used; CLOCK_MONOTONIC */
    int idle_workers;
    /* the acceptor's own */
    bool exhausted; /* of descriptors or memory: said once */
    int silent;     /* connections accepted that have not spoken: each may want a worker */
    int left;       /* how often a full queue has left a connection to others */
    /* under the mutex */
    bool pausing; /* the acceptor wants to hear of the next idle worker */
    bool closing; /* nothing more is accepted */
    bool ended;   /* and all is answered */
};

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

static void lane_put(struct lane *lane, struct slot *slot)
{
    slot->next = NULL;
    *lane->last = slot;
    lane->last = &slot->next;
    lane->count++;
    pthread_cond_signal(&lane->some);
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

/* A free slot, or NULL. */
static struct slot *take_free(struct server *server)
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

static void give_back(struct server *server, struct slot *slot)
{
    pthread_mutex_lock(&server->mutex);
    slot->next = server->free;
    server->free = slot;
    server->used--;
    pthread_mutex_unlock(&server->mutex);
}

/* Until when the peer may take to send; 0: it is not read from, and its descriptor may close. */
static void read_until(struct server *server, struct slot *slot, int64_t until_ms)
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
    read_until(server, slot, 0);
    connection_answer(&slot->connection, response);
    give_back(server, slot);
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
    read_until(server, slot,
               slot->connection.request.accepted_ms + server->app->config->server.deadline_ms);
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

static void *at_once_main(void *argument)
{
    struct server *server = argument;
    struct response response;
    struct slot *slot;

    pthread_mutex_lock(&server->mutex);
    for (;;) {
        while (server->at_once.first == NULL && !server->closing)
            pthread_cond_wait(&server->at_once.some, &server->mutex);
        if ((slot = lane_take(&server->at_once)) == NULL)
            break;
        pthread_mutex_unlock(&server->mutex);
        response_init(&response);
        read_until(server, slot, clock_monotonic_ms() + DRAIN_MS);
        route_at_once(server->app, &slot->connection.request, &response);
        finish(server, slot, &response);
        pthread_mutex_lock(&server->mutex);
    }
    pthread_mutex_unlock(&server->mutex);
    return NULL;
}

/* The next one to refuse: refused already, or first in the queue and past queue_wait. Waits for one;
 * NULL when the server closes (what is queued then is still served). */
static struct slot *next_refused(struct server *server)
{
    int64_t queue_wait = server->app->config->server.queue_wait_ms;

    while (server->refused.first == NULL && !server->closing) {
        if (server->work.first == NULL) {
            pthread_cond_wait(&server->refused.some, &server->mutex);
            continue;
        }
        int64_t until = server->work.first->connection.request.accepted_ms + queue_wait;
        if (clock_monotonic_ms() >= until) {
            metrics_add(METRIC_QUEUED, -1);
            return lane_take(&server->work);
        }
        struct timespec t = as_timespec(until);
        pthread_cond_timedwait(&server->refused.some, &server->mutex, &t);
    }
    return lane_take(&server->refused);
}

static void refuse(struct app *app, struct request *request, struct response *response)
{
    if (route_lane(request) == ROUTE_AT_ONCE) {
        route_at_once(app, request, response);
        return;
    }
    request_drain(request);
    response_problem(response, request, ERR_OVERLOADED, NULL, 0, false);
    metrics_add(METRIC_REQUESTS + ERR_OVERLOADED, 1);
    log_warning(request->id, NULL, "overloaded: the queue is full, or queue_wait has passed");
}

static void *refusing_main(void *argument)
{
    struct server *server = argument;
    struct response response;
    struct slot *slot;

    pthread_mutex_lock(&server->mutex);
    while ((slot = next_refused(server)) != NULL) {
        pthread_mutex_unlock(&server->mutex);
        response_init(&response);
        read_until(server, slot, clock_monotonic_ms() + DRAIN_MS);
        refuse(server->app, &slot->connection.request, &response);
        finish(server, slot, &response);
        pthread_mutex_lock(&server->mutex);
    }
    pthread_mutex_unlock(&server->mutex);
    return NULL;
}

/* ---- the acceptor ---- */

static bool queue_is_full(struct server *server)
{
    pthread_mutex_lock(&server->mutex);
    bool full = server->work.count >= server->app->config->server.queue + server->idle_workers;
    pthread_mutex_unlock(&server->mutex);
    return full;
}

static void dispatch(struct server *server, struct slot *slot)
{
    enum route_lane lane = route_lane(&slot->connection.request);

    pthread_mutex_lock(&server->mutex);
    slot->read_until_ms = 0;
    if (lane == ROUTE_AT_ONCE) {
        bool has_body = slot->connection.request.content_length > 0;
        lane_put(has_body ? &server->refused : &server->at_once, slot);
    } else if (server->work.count < server->app->config->server.queue + server->idle_workers) {
        lane_put(&server->work, slot);
        metrics_add(METRIC_QUEUED, 1);
        if (server->work.first == slot) /* a new first one: when is it past queue_wait? */
            pthread_cond_signal(&server->refused.some);
    } else {
        lane_put(&server->refused, slot);
    }
    pthread_mutex_unlock(&server->mutex);
}

/* Reads the head of a connection that has sent something, and deals the request out. */
static void read_and_dispatch(struct server *server, struct slot *slot)
{
    if (connection_read_head(&slot->connection)) {
        dispatch(server, slot);
        return;
    }
    read_until(server, slot, 0);
    give_back(server, slot);
}

static void drop(struct server *server, struct slot *slot)
{
    server->silent -= slot->silent;
    slot->silent = false;
    read_until(server, slot, 0);
    connection_drop(&slot->connection);
    give_back(server, slot);
}

/* One that was silent has spoken, or was late. */
static void wake_silent(struct server *server, struct slot *slot)
{
    server->silent--;
    slot->silent = false;
    epoll_ctl(server->heads, EPOLL_CTL_DEL, slot->connection.fd, NULL);
    read_and_dispatch(server, slot);
}

/* Accepts one connection. False: there is none, or it can't be had now. */
static bool accept_one(struct server *server)
{
    struct slot *slot = take_free(server);
    struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP, .data.ptr = slot};

    if (slot == NULL) { /* each is bounded in time: one will be free soon */
        poll(NULL, 0, PAUSE_MS);
        return false;
    }
    int error = connection_accept(&slot->connection, LISTENER);
    if (error != 0) {
        give_back(server, slot);
        bool exhausted = error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM;
        if (exhausted && !server->exhausted)
            log_error(NULL, strerror(error), "no connection can be accepted");
        server->exhausted = exhausted;
        if (exhausted)
            poll(NULL, 0, PAUSE_MS);
        return false;
    }
    server->exhausted = false;
    read_until(server, slot, clock_monotonic_ms() + HEAD_MS);
    if (connection_has_data(&slot->connection)) {
        read_and_dispatch(server, slot);
    } else if (epoll_ctl(server->heads, EPOLL_CTL_ADD, slot->connection.fd, &event) == 0) {
        server->silent++;
        slot->silent = true;
    } else {
        drop(server, slot);
    }
    return true;
}

/* The drain has begun: what was accepted and speaks now is served still, the rest was silent. */
static void end_silent(struct server *server)
{
    for (size_t i = 0; i < server->slot_count; i++) {
        struct slot *slot = &server->slots[i];
        if (slot->silent && connection_has_data(&slot->connection))
            wake_silent(server, slot);
        else if (slot->silent)
            drop(server, slot);
    }
}

/* Is there a worker with nothing to do and nothing in the queue for it? If not, the next worker that
 * becomes idle will write to idle_fd. */
static bool has_idle_worker(struct server *server)
{
    eventfd_t ignored;

    eventfd_read(server->idle_fd, &ignored);
    pthread_mutex_lock(&server->mutex);
    bool idle = server->idle_workers > server->work.count + server->silent;
    server->pausing = !idle;
    pthread_mutex_unlock(&server->mutex);
    return idle;
}

static bool draining(const struct server *server)
{
    struct pollfd drain = {.fd = server->drain_fd, .events = POLLIN};
    return poll(&drain, 1, 0) > 0;
}

/* Accepts what waits: as long as there is an idle worker for it, or, where others have been let go
 * first, all of it; but a full process leaves to one with room in its queue what it would refuse. */
static void accept_waiting(struct server *server, bool all)
{
    do {
        if (all && queue_is_full(server) &&
            metrics_room_elsewhere(server->app->config->server.queue) &&
            server->left++ < MAX_PAUSES)
            return;
        if (!accept_one(server))
            return;
    } while ((all || has_idle_worker(server)) && !draining(server));
}

static void wake_one_silent(struct server *server)
{
    struct epoll_event event;

    if (epoll_wait(server->heads, &event, 1, 0) > 0)
        wake_silent(server, event.data.ptr);
}

/* Handles what epoll tells. True: the drain begins. */
static bool handle_event(struct server *server, const struct epoll_event *event, bool idle)
{
    if (event->data.fd == server->drain_fd)
        return true;
    if (event->data.fd == server->heads)
        wake_one_silent(server);
    else
        accept_waiting(server, !idle);
    return false;
}

static void accept_until_drain(struct server *server)
{
    for (int pauses = 0;; pauses++) {
        struct pollfd pause[] = {{.fd = server->drain_fd, .events = POLLIN},
                                 {.fd = server->heads, .events = POLLIN},
                                 {.fd = server->idle_fd, .events = POLLIN}};
        struct epoll_event event;
        bool idle = has_idle_worker(server);

        if (!idle) { /* let others go first */
            int woken = poll(pause, 3, PAUSE_MS);
            if (pause[0].revents != 0)
                return;
            if (pause[1].revents != 0)
                wake_one_silent(server);
            if (woken > 0 || (pauses < MAX_PAUSES && metrics_room_elsewhere(0)))
                continue;
        } else {
            server->left = 0;
        }
        pauses = 0;
        int n = epoll_wait(server->epoll, &event, 1, idle ? -1 : 0);
        if (n > 0 && handle_event(server, &event, idle))
            return;
    }
}

/* ---- start and end ---- */

enum err_code server_check(struct err *err)
{
    int listening = 0;
    socklen_t size = sizeof listening;

    if (getsockopt(LISTENER, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) != 0 || !listening)
        return err_set(
            err, ERR_CONFIG,
            "standard input is not a listening socket: start the program by systemd "
            "(extract-fcgi.socket), or by spawn-fcgi -n -s SOCKET -- /path/to/extract-fcgi");
    return ERR_NONE;
}

static enum err_code watch_fd(struct server *server, int fd, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.fd = fd};
    return epoll_ctl(server->epoll, EPOLL_CTL_ADD, fd, &event) == 0 ? ERR_NONE : ERR_INTERNAL;
}

static struct server *server_new(struct app *app, int drain_fd, struct err *err)
{
    struct server *server = calloc(1, sizeof *server);
    size_t count =
        (size_t)app->config->server.threads + (size_t)app->config->server.queue + SPARE_SLOTS;
    int flags = fcntl(LISTENER, F_GETFL);

    if (server == NULL || (server->slots = calloc(count, sizeof *server->slots)) == NULL) {
        free(server);
        err_set(err, ERR_INTERNAL, "out of memory");
        return NULL;
    }
    server->app = app;
    server->drain_fd = drain_fd;
    server->slot_count = count;
    for (size_t i = 0; i < count; i++) {
        server->slots[i].next = server->free;
        server->free = &server->slots[i];
    }
    pthread_mutex_init(&server->mutex, NULL);
    condition_init(&server->watch);
    lane_init(&server->work);
    lane_init(&server->at_once);
    lane_init(&server->refused);
    server->epoll = epoll_create1(EPOLL_CLOEXEC);
    server->heads = epoll_create1(EPOLL_CLOEXEC);
    server->idle_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (server->epoll < 0 || server->heads < 0 || server->idle_fd < 0 ||
        fcntl(LISTENER, F_SETFL, flags | O_NONBLOCK) != 0 || FCGX_Init() != 0 ||
        watch_fd(server, LISTENER, EPOLLIN | EPOLLEXCLUSIVE) != ERR_NONE ||
        watch_fd(server, server->heads, EPOLLIN) != ERR_NONE ||
        watch_fd(server, drain_fd, EPOLLIN) != ERR_NONE)
        err_set(err, ERR_INTERNAL, "the listening socket cannot be watched: %s", strerror(errno));
    else
        return server;
    free(server->slots);
    free(server);
    return NULL;
}

static void server_free(struct server *server)
{
    close(server->epoll);
    close(server->heads);
    close(server->idle_fd);
    pthread_cond_destroy(&server->work.some);
    pthread_cond_destroy(&server->at_once.some);
    pthread_cond_destroy(&server->refused.some);
    pthread_cond_destroy(&server->watch);
    pthread_mutex_destroy(&server->mutex);
    free(server->slots);
    free(server);
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
    threads.list = calloc((size_t)count + AT_ONCE_THREADS + REFUSING_THREADS, sizeof *threads.list);
    enum err_code code = ERR_NONE;
    if (workers == NULL || threads.list == NULL) {
        code = err_set(err, ERR_INTERNAL, "out of memory");
    } else {
        if (start_threads(server, &threads, workers)) {
            metrics_add(METRIC_WORKERS, count);
            accept_until_drain(server);
            metrics_add(METRIC_WORKERS, -count); /* they take nothing new */
            end_silent(server);
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
