/* server.c - FastCGI in and out. See server.h. The only file with <fcgiapp.h>.
 *
 * Connections live in a fixed number of slots: one for each worker, each place in the queue, and
 * SPARE for what is answered at once or refused; without a free slot nothing is accepted. A slot
 * travels: free -> (acceptor reads the request's head) -> a lane -> (a thread answers) -> free.
 *
 * Three lanes, each a list with its threads:
 *   work     the bounded queue; the workers
 *   at once  health, metrics, unknown paths
 *   refused  what the queue has no room for; its thread also takes from the queue whatever has waited
 *            past queue_wait
 * All of it is under one mutex, which is never held during I/O.
 *
 * Letting others go first: the listener is shared, and the kernel wakes one process that waits for it
 * (EPOLLEXCLUSIVE). An acceptor without an idle worker does not wait for it but pauses for 20 ms, and
 * again while another process of the pool has an idle worker (MAX_PAUSES at the most: that process may
 * be stuck); a connection that is still there after that is everybody's, and is taken. */
#include "server.h"

#include <errno.h>
#include <fcgiapp.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "log.h"
#include "metrics.h"
#include "request.h"
#include "route.h"

#define LISTENER 0
#define PAUSE_MS 20
#define MAX_PAUSES 25
#define SPARE_SLOTS 64
#define AT_ONCE_THREADS 2
#define REFUSING_THREADS 2
/* Seconds of silence: of a web server that writes a head, and an upload. */
#define HEAD_PATIENCE_S 2
#define BODY_PATIENCE_S 60
#define STACK_SIZE (512 * 1024)

struct slot {
    struct slot *next;
    FCGX_Request fcgi;
    struct request request;
};

struct lane {
    struct slot *first, **last;
    int count;
    pthread_cond_t some; /* CLOCK_MONOTONIC */
};

struct server {
    struct app *app;
    int epoll, drain_fd, idle_fd;
    struct slot *slots;
    pthread_mutex_t mutex;
    pthread_cond_t slot_free;
    struct slot *free;
    struct lane work, at_once, refused;
    int idle_workers;
    bool pausing; /* the acceptor wants to hear of the next idle worker */
    bool closing; /* nothing more is accepted */
};

/* ---- lanes; all under the mutex ---- */

static void lane_init(struct lane *lane)
{
    pthread_condattr_t monotonic;

    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&lane->some, &monotonic);
    pthread_condattr_destroy(&monotonic);
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

/* ---- a request's head, its body, its answer ---- */

static const char *parameter(const struct slot *slot, const char *name)
{
    const char *value = FCGX_GetParam(name, slot->fcgi.envp);
    return value == NULL ? "" : value;
}

static size_t read_stdin(void *io, void *into, size_t size)
{
    FCGX_Request *fcgi = io;
    char *at = into;
    size_t done = 0;

    while (done < size) {
        size_t want = size - done < 1 << 30 ? size - done : 1 << 30;
        int n = FCGX_GetStr(at + done, (int)want, fcgi->in);
        if (n <= 0)
            break;
        done += (size_t)n;
    }
    return done;
}

/* A whole number that is not negative; -1 for anything else. */
static int64_t parse_length(const char *s)
{
    int64_t n = 0;

    if (*s == '\0')
        return -1;
    for (; *s != '\0'; s++) {
        if (*s < '0' || *s > '9' || n > INT64_MAX / 10 - 10)
            return -1;
        n = n * 10 + (*s - '0');
    }
    return n;
}

/* The path without query, from whichever of the usual parameters the web server sends. */
static const char *find_path(struct slot *slot)
{
    const char *path = parameter(slot, "DOCUMENT_URI");

    if (*path == '\0')
        path = parameter(slot, "REQUEST_URI");
    if (*path == '\0')
        path = parameter(slot, "SCRIPT_NAME");
    return arena_strndup(&slot->request.arena, path, strcspn(path, "?"));
}

static void read_head(struct slot *slot)
{
    struct request *request = &slot->request;

    arena_init(&request->arena);
    uuid_v7(request->id);
    request->accepted_ms = clock_monotonic_ms();
    request->method = parameter(slot, "REQUEST_METHOD");
    request->path = find_path(slot);
    request->content_type = parameter(slot, "CONTENT_TYPE");
    request->content_length = parse_length(parameter(slot, "CONTENT_LENGTH"));
    request->body_file = parameter(slot, "REQUEST_BODY_FILE");
    request->proxy_request_id = parameter(slot, "PROXY_REQUEST_ID");
    request->peer = parameter(slot, "REMOTE_ADDR");
    request->read = read_stdin;
    request->io = &slot->fcgi;
}

static void write_response(struct slot *slot, const struct response *response)
{
    FCGX_Stream *out = slot->fcgi.out;
    const char *body = buf_str(&response->body);

    FCGX_FPrintF(
        out, "Status: %d\r\nContent-Type: %s\r\nContent-Length: %ld\r\nX-Request-ID: %s\r\n",
        response->status, response->content_type, (long)response->body.len, slot->request.id);
    if (response->retry_after_s > 0)
        FCGX_FPrintF(out, "Retry-After: %d\r\n", response->retry_after_s);
    if (response->allow != NULL)
        FCGX_FPrintF(out, "Allow: %s\r\n", response->allow);
    FCGX_PutS("Cache-Control: no-store\r\n\r\n", out);
    FCGX_PutStr(body, (int)response->body.len, out);
}

/* Writes the answer, ends the request and gives its slot back. */
static void finish(struct server *server, struct slot *slot, struct response *response)
{
    write_response(slot, response);
    response_reset(response);
    FCGX_Finish_r(&slot->fcgi);
    arena_reset(&slot->request.arena);
    pthread_mutex_lock(&server->mutex);
    slot->next = server->free;
    server->free = slot;
    pthread_cond_signal(&server->slot_free);
    pthread_mutex_unlock(&server->mutex);
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
    metrics_add(METRIC_IN_FLIGHT, 1);
    route_work(worker, &slot->request, &response);
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
        route_at_once(server->app, &slot->request, &response);
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
        int64_t until = server->work.first->request.accepted_ms + queue_wait;
        if (clock_monotonic_ms() >= until) {
            metrics_add(METRIC_QUEUED, -1);
            return lane_take(&server->work);
        }
        struct timespec t = {.tv_sec = until / 1000, .tv_nsec = (long)(until % 1000) * 1000000};
        pthread_cond_timedwait(&server->refused.some, &server->mutex, &t);
    }
    return lane_take(&server->refused);
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
        request_drain(&slot->request);
        response_problem(&response, &slot->request, ERR_OVERLOADED, NULL, 0, false);
        metrics_add(METRIC_REQUESTS + ERR_OVERLOADED, 1);
        log_warning(slot->request.id, NULL,
                    "overloaded: the queue is full, or queue_wait has passed");
        finish(server, slot, &response);
        pthread_mutex_lock(&server->mutex);
    }
    pthread_mutex_unlock(&server->mutex);
    return NULL;
}

/* ---- the acceptor ---- */

static void dispatch(struct server *server, struct slot *slot)
{
    read_head(slot);
    enum route_lane lane = route_lane(&slot->request);
    pthread_mutex_lock(&server->mutex);
    if (lane == ROUTE_AT_ONCE) {
        lane_put(&server->at_once, slot);
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

/* A free slot, or NULL when the server drains. */
static struct slot *take_free(struct server *server)
{
    pthread_mutex_lock(&server->mutex);
    while (server->free == NULL)
        pthread_cond_wait(&server->slot_free, &server->mutex);
    struct slot *slot = server->free;
    server->free = slot->next;
    pthread_mutex_unlock(&server->mutex);
    return slot;
}

static void give_back(struct server *server, struct slot *slot)
{
    pthread_mutex_lock(&server->mutex);
    slot->next = server->free;
    server->free = slot;
    pthread_mutex_unlock(&server->mutex);
}

/* Is there a worker with nothing to do and nothing in the queue for it? If not, the next worker that
 * becomes idle will write to idle_fd. */
static bool has_idle_worker(struct server *server)
{
    eventfd_t ignored;

    eventfd_read(server->idle_fd, &ignored);
    pthread_mutex_lock(&server->mutex);
    bool idle = server->idle_workers > server->work.count;
    server->pausing = !idle;
    pthread_mutex_unlock(&server->mutex);
    return idle;
}

static void set_patience(int fd, int seconds)
{
    const struct timeval patience = {.tv_sec = seconds};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
}

/* Accepts a connection and reads its request's head. libfcgi would accept by itself, but then wait
 * without end for a head that does not come, and nobody else would be accepted meanwhile: it is given
 * the connection as if it were one that it has kept. Returns 0, EBADMSG where the head is none, or
 * accept's errno. */
static int accept_one(struct slot *slot)
{
    int fd = accept4(LISTENER, NULL, NULL, SOCK_CLOEXEC);

    if (fd < 0)
        return errno;
    set_patience(fd, HEAD_PATIENCE_S);
    FCGX_InitRequest(&slot->fcgi, -1, FCGI_FAIL_ACCEPT_ON_INTR);
    slot->fcgi.ipcFd = fd;
    slot->fcgi.keepConnection = 1;
    if (FCGX_Accept_r(&slot->fcgi) < 0) /* it has closed fd, and could not accept another */
        return EBADMSG;
    set_patience(fd, BODY_PATIENCE_S);
    return 0;
}

/* Accepts what waits: as long as there is an idle worker for it, or, where others have been let go
 * first, all of it. */
static void accept_waiting(struct server *server, bool all)
{
    for (;;) {
        struct slot *slot = take_free(server);
        int error = accept_one(slot);
        if (error != 0) {
            give_back(server, slot);
            if (error == EBADMSG)
                continue;
            if (error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM) {
                log_error(NULL, strerror(error), "no connection can be accepted");
                poll(NULL, 0, PAUSE_MS);
            }
            return;
        }
        dispatch(server, slot);
        struct pollfd drain = {.fd = server->drain_fd, .events = POLLIN};
        if ((!all && !has_idle_worker(server)) || poll(&drain, 1, 0) > 0)
            return;
    }
}

static void accept_until_drain(struct server *server)
{
    for (int pauses = 0;; pauses++) {
        struct pollfd pause[] = {{.fd = server->drain_fd, .events = POLLIN},
                                 {.fd = server->idle_fd, .events = POLLIN}};
        struct epoll_event event;
        bool idle = has_idle_worker(server);

        if (!idle) { /* let others go first */
            int woken = poll(pause, 2, PAUSE_MS);
            if (pause[0].revents != 0)
                return;
            if (woken > 0 || (pauses < MAX_PAUSES && metrics_idle_elsewhere()))
                continue;
        }
        pauses = 0;
        int n = epoll_wait(server->epoll, &event, 1, idle ? -1 : 0);
        if (n > 0 && event.data.fd == server->drain_fd)
            return;
        if (n > 0)
            accept_waiting(server, !idle);
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

static enum err_code watch(struct server *server, int fd, uint32_t events)
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
    for (size_t i = 0; i < count; i++) {
        server->slots[i].next = server->free;
        server->free = &server->slots[i];
    }
    pthread_mutex_init(&server->mutex, NULL);
    pthread_cond_init(&server->slot_free, NULL);
    lane_init(&server->work);
    lane_init(&server->at_once);
    lane_init(&server->refused);
    server->epoll = epoll_create1(EPOLL_CLOEXEC);
    server->idle_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (server->epoll < 0 || server->idle_fd < 0 ||
        fcntl(LISTENER, F_SETFL, flags | O_NONBLOCK) != 0 || FCGX_Init() != 0 ||
        watch(server, LISTENER, EPOLLIN | EPOLLEXCLUSIVE) != ERR_NONE ||
        watch(server, drain_fd, EPOLLIN) != ERR_NONE)
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
    close(server->idle_fd);
    pthread_cond_destroy(&server->work.some);
    pthread_cond_destroy(&server->at_once.some);
    pthread_cond_destroy(&server->refused.some);
    pthread_cond_destroy(&server->slot_free);
    pthread_mutex_destroy(&server->mutex);
    free(server->slots);
    free(server);
}

/* The threads of a server; joined in the end. */
struct threads {
    pthread_t *list;
    int count;
};

static bool start_thread(struct threads *threads, void *(*main)(void *), void *argument)
{
    pthread_attr_t attributes;

    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_SIZE);
    bool started = pthread_create(&threads->list[threads->count], &attributes, main, argument) == 0;
    pthread_attr_destroy(&attributes);
    threads->count += started;
    return started;
}

static bool start_threads(struct server *server, struct threads *threads,
                          struct worker_start *workers)
{
    int count = server->app->config->server.threads;
    bool ok = true;

    for (int i = 0; ok && i < count; i++) {
        workers[i] = (struct worker_start){server, {server->app, NULL}};
        workers[i].worker.gemini = gemini_client_new(server->app->gemini);
        ok = workers[i].worker.gemini != NULL && start_thread(threads, worker_main, &workers[i]);
    }
    for (int i = 0; ok && i < AT_ONCE_THREADS; i++)
        ok = start_thread(threads, at_once_main, server);
    for (int i = 0; ok && i < REFUSING_THREADS; i++)
        ok = start_thread(threads, refusing_main, server);
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
