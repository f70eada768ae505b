/* server_inside.h - what server.c and acceptor.c share; nobody else includes this.
 *
 * Connections live in a fixed number of slots: one for each worker, each place in the queue, and some
 * for what is answered at once or refused; without a free slot nothing is accepted. A slot travels:
 * free -> (the acceptor: accepted, its head read) -> a lane -> (a thread answers) -> free. */
#ifndef EXTRACT_SERVER_INSIDE_H
#define EXTRACT_SERVER_INSIDE_H

#include <pthread.h>

#include "app.h"
#include "connection.h"

#define SERVER_LISTENER 0 /* the listening socket's descriptor */

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
    int drain_fd;
    struct slot *slots;
    size_t slot_count;

    pthread_mutex_t mutex; /* over what follows */
    struct slot *free;
    size_t used; /* slots that are not free */
    struct lane work, at_once, reading, refused;
    int64_t looks_at_ms;  /* when a thread looks at the queue's first; INT64_MAX: when told */
    pthread_cond_t watch; /* the watchdog: the first slot is used; CLOCK_MONOTONIC */
    int idle_workers;
    bool pausing; /* the acceptor wants to hear of the next idle worker, by idle_fd */
    bool closing; /* nothing more is accepted */
    bool ended;   /* and all is answered */

    /* the acceptor's own */
    int epoll, idle_fd;
    int heads;      /* an epoll of the silent connections, itself in epoll */
    int silent;     /* how many: connections accepted that have not spoken yet */
    bool exhausted; /* of descriptors or memory: said once */
    int left;       /* how often a full queue has left a connection to others */
};

/* A free slot, or NULL. */
struct slot *server_take_free(struct server *server);
void server_give_back(struct server *server, struct slot *slot);

/* Until when (monotonic) the slot's peer may take to send; 0: it is not read from, and its descriptor
 * may close. */
void server_read_until(struct server *server, struct slot *slot, int64_t until_ms);

/* Puts a slot whose head was read into its lane. */
void server_dispatch(struct server *server, struct slot *slot);

/* Is the queue full, and no worker idle that would make room at once? */
bool server_queue_is_full(struct server *server);

/* Opens what the acceptor waits with. Errors: ERR_INTERNAL. */
enum err_code acceptor_open(struct server *server, struct err *err) MUST_CHECK;
void acceptor_close(struct server *server);

/* Accepts and dispatches until drain_fd becomes readable. */
void acceptor_run(struct server *server);

#endif
