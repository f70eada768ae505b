/* notify.c - tells the service manager how the process is. See notify.h.
 *
 * The protocol is a datagram of lines (sd_notify(3)), which systemd promises to keep. libsystemd would
 * bring compression and cryptography libraries into a process that holds keys, to send it.
 *
 * A thread is late when it has missed what it said by half of the watchdog's time: a busy machine is
 * not a fault. */
#include "notify.h"

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "clock.h"
#include "log.h"

#define STATUS_EVERY_MS 5000 /* or more often, as the watchdog wants to hear */
#define MESSAGE_SIZE 512

/* Read-only after notify_open. */
static struct {
    int socket; /* -1: nobody listens */
    struct sockaddr_un address;
    socklen_t address_size;
    int64_t watchdog_ms; /* 0: none */
} manager = {.socket = -1};

static const char *const names[NOTIFY_THREAD_COUNT] = {
    [NOTIFY_ACCEPTOR] = "the acceptor",
    [NOTIFY_BACKGROUND] = "the store's background thread",
};
static _Atomic int64_t due_ms[NOTIFY_THREAD_COUNT]; /* monotonic; 0: not expected */

/* ---- the manager ---- */

/* A whole number that is not negative; else fallback. */
static int64_t number_of(const char *name, int64_t fallback)
{
    const char *text = getenv(name);
    char *end = NULL;

    if (text == NULL || *text < '0' || *text > '9')
        return fallback;
    errno = 0;
    long long number = strtoll(text, &end, 10);
    return errno == 0 && *end == '\0' ? number : fallback;
}

void notify_open(void)
{
    const char *path = getenv("NOTIFY_SOCKET");
    size_t len = path == NULL ? 0 : strlen(path);

    if (len == 0)
        return;
    if ((*path != '/' && *path != '@') || len >= sizeof manager.address.sun_path) {
        log_warning(NULL, NULL,
                    "NOTIFY_SOCKET is not a socket's path: the manager is told nothing");
        return;
    }
    manager.address.sun_family = AF_UNIX;
    memcpy(manager.address.sun_path, path, len);
    manager.address_size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len);
    if (*path == '@')
        manager.address.sun_path[0] = '\0'; /* the abstract namespace; its names have no end mark */
    else
        manager.address_size++;
    manager.socket = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (number_of("WATCHDOG_PID", getpid()) == getpid())
        manager.watchdog_ms = number_of("WATCHDOG_USEC", 0) / 1000;
}

void notify_close(void)
{
    if (manager.socket >= 0)
        close(manager.socket);
    manager.socket = -1;
    manager.watchdog_ms = 0;
}

static void tell(const char *message, int flags)
{
    const struct sockaddr *address = (const struct sockaddr *)&manager.address;

    while (manager.socket >= 0 &&
           sendto(manager.socket, message, strlen(message), flags | MSG_NOSIGNAL, address,
                  manager.address_size) < 0 &&
           errno == EINTR)
        ;
}

int64_t notify_interval_ms(void)
{
    int64_t often_ms = (manager.watchdog_ms + 3) / 4;

    if (manager.socket < 0)
        return -1;
    return often_ms > 0 && often_ms < STATUS_EVERY_MS ? often_ms : STATUS_EVERY_MS;
}

void notify_ready(void)
{
    tell("READY=1\nSTATUS=serving", 0);
}

void notify_stopping(int64_t within_ms)
{
    char message[MESSAGE_SIZE];

    snprintf(message, sizeof message, "STOPPING=1\nEXTEND_TIMEOUT_USEC=%lld",
             (long long)within_ms * 1000);
    tell(message, MSG_DONTWAIT);
}

/* ---- the threads ---- */

void notify_beat(enum notify_thread thread, int64_t within_ms)
{
    atomic_store_explicit(&due_ms[thread], clock_monotonic_ms() + within_ms, memory_order_relaxed);
}

void notify_end(enum notify_thread thread)
{
    atomic_store_explicit(&due_ms[thread], 0, memory_order_relaxed);
}

/* A thread that is late, and since when it should have been heard of; NULL: there is none. */
static const char *find_late(int64_t *late_ms)
{
    int64_t now_ms = clock_monotonic_ms();

    for (int i = 0; i < NOTIFY_THREAD_COUNT; i++) {
        int64_t due = atomic_load_explicit(&due_ms[i], memory_order_relaxed);
        *late_ms = now_ms - due;
        if (due != 0 && *late_ms > manager.watchdog_ms / 2)
            return names[i];
    }
    return NULL;
}

/* Never waits for the manager: the next one says the same. */
void notify_alive(const char *status)
{
    char message[MESSAGE_SIZE];
    int64_t late_ms = 0;
    const char *late = manager.watchdog_ms > 0 ? find_late(&late_ms) : NULL;

    if (late != NULL)
        snprintf(message, sizeof message, "STATUS=stuck: %s should have been heard of %lld s ago",
                 late, (long long)late_ms / 1000);
    else
        snprintf(message, sizeof message, "%sSTATUS=%s",
                 manager.watchdog_ms > 0 ? "WATCHDOG=1\n" : "", status);
    tell(message, MSG_DONTWAIT);
}
