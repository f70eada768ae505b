/* notify.h - tells the service manager how the process is. systemd's protocol (sd_notify(3)), on the
 * socket that NOTIFY_SOCKET names; without one nothing is said.
 *
 * The watchdog hears of the process only while each thread that it cannot serve without is heard of:
 * with each beat such a thread says how long it may take until the next. */
#ifndef EXTRACT_NOTIFY_H
#define EXTRACT_NOTIFY_H

#include <stdint.h>

enum notify_thread {
    NOTIFY_ACCEPTOR,   /* takes connections */
    NOTIFY_BACKGROUND, /* the store's: replays the outbox, under the host's lock */
    NOTIFY_THREAD_COUNT
};

/* Reads NOTIFY_SOCKET, and WATCHDOG_USEC where it is meant for this process. Before any thread. */
void notify_open(void);
void notify_close(void);

/* How often notify_alive wants to be called; -1: never. */
int64_t notify_interval_ms(void);

/* READY=1: requests are served from now on. */
void notify_ready(void);
/* STOPPING=1: what was accepted is finished, within within_ms at the most. */
void notify_stopping(int64_t within_ms);
/* WATCHDOG=1 and the status, one line for people; or, where a thread is late, a status that says so. */
void notify_alive(const char *status);

/* The thread goes on, and will be heard of again within within_ms. Costs next to nothing. */
void notify_beat(enum notify_thread thread, int64_t within_ms);
/* It has ended, in order. */
void notify_end(enum notify_thread thread);

#endif
