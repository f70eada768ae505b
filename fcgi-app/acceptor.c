/* acceptor.c - takes connections from the listener, and deals their requests out. See server_inside.h.
 *
 * The pool's processes share the listener, and the kernel wakes one that waits for it (EPOLLEXCLUSIVE).
 * An acceptor without an idle worker does not wait for it but pauses for 20 ms, and again while another
 * process of the pool can do better (MAX_PAUSES at the most: that process may be stuck); a connection
 * that is still there after that is everybody's, and is taken.
 *
 * A connection that has not spoken yet waits in an epoll of its own (heads), and counts like a request:
 * it may want a worker any moment. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "clock.h"
#include "log.h"
#include "metrics.h"
#include "notify.h"
#include "server_inside.h"

#define PAUSE_MS 20
#define MAX_PAUSES 25
#define HEAD_MS 2000 /* in which a peer must have sent its request's head */
#define IDLE_MS 2000 /* after which an idle acceptor is heard of again */

/* Reads the head of a connection that has sent something, and deals the request out. */
static void read_and_dispatch(struct server *server, struct slot *slot)
{
    if (connection_read_head(&slot->connection)) {
        server_dispatch(server, slot);
        return;
    }
    server_read_until(server, slot, 0);
    server_give_back(server, slot);
}

static void drop(struct server *server, struct slot *slot)
{
    server_read_until(server, slot, 0);
    connection_drop(&slot->connection);
    server_give_back(server, slot);
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
    struct slot *slot = server_take_free(server);
    struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP, .data.ptr = slot};

    notify_beat(NOTIFY_ACCEPTOR, HEAD_MS + IDLE_MS);
    if (slot == NULL) { /* each is bounded in time: one will be free soon */
        poll(NULL, 0, PAUSE_MS);
        return false;
    }
    int error = connection_accept(&slot->connection, SERVER_LISTENER);
    if (error != 0) {
        server_give_back(server, slot);
        bool exhausted = error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM;
        if (exhausted && !server->exhausted)
            log_error(NULL, strerror(error), "no connection can be accepted");
        server->exhausted = exhausted;
        if (exhausted)
            poll(NULL, 0, PAUSE_MS);
        return false;
    }
    server->exhausted = false;
    server_read_until(server, slot, clock_monotonic_ms() + HEAD_MS);
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

/* The drain has begun: who was accepted may still speak, for as long as anybody may (the watchdog ends
 * the reading of one that is late). A web server that has just connected takes an end for a fault. */
static void end_silent(struct server *server)
{
    struct epoll_event event;

    while (server->silent > 0)
        if (epoll_wait(server->heads, &event, 1, -1) > 0)
            wake_silent(server, event.data.ptr);
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
        if (all && server_queue_is_full(server) &&
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

        notify_beat(NOTIFY_ACCEPTOR, HEAD_MS + IDLE_MS);
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
        int n = epoll_wait(server->epoll, &event, 1, idle ? IDLE_MS : 0);
        if (n > 0 && handle_event(server, &event, idle))
            return;
    }
}

void acceptor_run(struct server *server)
{
    notify_ready();
    accept_until_drain(server);
    notify_end(NOTIFY_ACCEPTOR);
    end_silent(server);
}

static enum err_code watch_fd(struct server *server, int fd, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.fd = fd};
    return epoll_ctl(server->epoll, EPOLL_CTL_ADD, fd, &event) == 0 ? ERR_NONE : ERR_INTERNAL;
}

enum err_code acceptor_open(struct server *server, struct err *err)
{
    /* O_NONBLOCK belongs to all who have the listener, and systemd takes it away each time it starts a
     * process with StandardInput=socket, whatever NonBlocking= says. This it leaves alone. */
    const struct timeval patience = {.tv_usec = PAUSE_MS * 1000};
    int flags = fcntl(SERVER_LISTENER, F_GETFL);

    server->epoll = epoll_create1(EPOLL_CLOEXEC);
    server->heads = epoll_create1(EPOLL_CLOEXEC);
    server->idle_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (server->epoll < 0 || server->heads < 0 || server->idle_fd < 0 || flags < 0 ||
        fcntl(SERVER_LISTENER, F_SETFL, flags | O_NONBLOCK) != 0 ||
        setsockopt(SERVER_LISTENER, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) != 0 ||
        watch_fd(server, SERVER_LISTENER, EPOLLIN | EPOLLEXCLUSIVE) != ERR_NONE ||
        watch_fd(server, server->heads, EPOLLIN) != ERR_NONE ||
        watch_fd(server, server->drain_fd, EPOLLIN) != ERR_NONE)
        return err_set(err, ERR_INTERNAL, "the listening socket cannot be watched: %s",
                       strerror(errno));
    return ERR_NONE;
}

void acceptor_close(struct server *server)
{
    const int fds[] = {server->epoll, server->heads, server->idle_fd};

    for (size_t i = 0; i < sizeof fds / sizeof *fds; i++)
        if (fds[i] >= 0)
            close(fds[i]);
}
