/* ctl_work.c - what may take long: a line that says so, and the signals that interrupt it. See ctl.h.
 *
 * Meanwhile a thread draws the line and takes the signals, which are blocked for all others: nobody's
 * system call is interrupted, and there is no handler that may do next to nothing. The line is
 * taken away before anything else is written: log entries pass here, the commands end the work
 * first. Where the thread cannot be had, signals do what they do otherwise, and no line is drawn. */
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/poll.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "clock.h"
#include "ctl.h"
#include "log.h"

#define SHOW_AFTER_MS 500
#define DRAW_EVERY_MS 200
#define TELL_TIME_MS 3000 /* after this long the line says how long */

struct ctl_work {
    const struct ctl *ctl;
    enum ctl_work_kind kind;
    char what[200];
    int64_t begun_ms;
    bool draws; /* standard error is a terminal that can take the line away again */
    atomic_llong done, total;
    atomic_int signal;
    sigset_t signals, mask_before;
    int signal_fd, end_fd;
    pthread_t thread;
    pthread_mutex_t lock; /* guards what follows, and the order of what is written */
    bool shown;
    char line[400];
};

/* ---- the line; under the lock ---- */

static void hide(struct ctl_work *work)
{
    if (work->shown)
        fputs("\r\033[K", stderr);
    work->shown = false;
}

/* Cut so that it stays one line. */
static void write_cut(struct ctl_work *work, const char *text)
{
    size_t columns = terminal_columns(STDERR_FILENO);
    char cut[sizeof work->line];

    snprintf(cut, sizeof cut, "%s", text);
    for (size_t len = strlen(cut); columns > 0 && terminal_width(cut) >= columns;) {
        while (--len > 0 && ((unsigned char)cut[len] & 0xC0) == 0x80)
            ; /* the rest of a character */
        cut[len] = '\0';
    }
    if (!work->shown || strcmp(cut, work->line) != 0)
        fprintf(stderr, "\r%s\033[K", cut);
    memcpy(work->line, cut, sizeof cut);
    work->shown = true;
}

static void draw(struct ctl_work *work)
{
    long long done = atomic_load(&work->done), total = atomic_load(&work->total);
    int64_t ms = clock_monotonic_ms() - work->begun_ms;
    char count[64] = "", time[32] = "", line[sizeof work->line];

    if (!work->draws || (ms < SHOW_AFTER_MS && atomic_load(&work->signal) == 0))
        return;
    if (total > 0)
        snprintf(count, sizeof count, ": %lld of %lld", done, total);
    else if (done > 0)
        snprintf(count, sizeof count, ": %lld", done);
    if (ms >= TELL_TIME_MS)
        snprintf(time, sizeof time, " (%lld s)", (long long)ms / 1000);
    snprintf(line, sizeof line, "%s%s%s%s ...",
             atomic_load(&work->signal) != 0 ? "interrupted, ends after this step: " : "",
             work->what, count, time);
    write_cut(work, line);
}

/* A log_sink. */
static void log_above(struct log_entry *take_entry, void *context)
{
    struct ctl_work *work = context;

    pthread_mutex_lock(&work->lock);
    hide(work);
    fflush(stderr);
    log_to_stderr(take_entry);
    pthread_mutex_unlock(&work->lock);
    free(take_entry);
}

/* ---- signals ---- */

/* As if there had been no thread. */
static void end_by(int number, const sigset_t *signals)
{
    signal(number, SIG_DFL);
    pthread_sigmask(SIG_UNBLOCK, signals, NULL);
    raise(number);
}

static void take_signal(struct ctl_work *work)
{
    struct signalfd_siginfo info;

    if (read(work->signal_fd, &info, sizeof info) != (ssize_t)sizeof info)
        return;
    if (work->kind == WORK_STEPS && atomic_load(&work->signal) == 0) {
        atomic_store(&work->signal, (int)info.ssi_signo);
        return;
    }
    hide(work);
    if (work->kind == WORK_CHANGES)
        ctl_error(work->ctl,
                  "interrupted while %s: it is changed as a whole or not at all; look which",
                  work->what);
    if (work->kind == WORK_SETUP)
        ctl_error(work->ctl, "interrupted while %s: run it again, it does what is left",
                  work->what);
    fflush(stderr);
    end_by((int)info.ssi_signo, &work->signals);
}

static void *run(void *arg)
{
    struct ctl_work *work = arg;
    struct pollfd fds[] = {{.fd = work->end_fd, .events = POLLIN},
                           {.fd = work->signal_fd, .events = POLLIN}};

    while (poll(fds, 2, DRAW_EVERY_MS) >= 0 && fds[0].revents == 0) {
        pthread_mutex_lock(&work->lock);
        if (fds[1].revents != 0)
            take_signal(work);
        draw(work);
        fflush(stderr);
        pthread_mutex_unlock(&work->lock);
    }
    return NULL;
}

/* Those that somebody sends to end a program, unless whoever started it has ignored them (nohup). */
static void choose_signals(sigset_t *signals)
{
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP};
    struct sigaction action;

    sigemptyset(signals);
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        if (sigaction(numbers[i], NULL, &action) == 0 && action.sa_handler != SIG_IGN)
            sigaddset(signals, numbers[i]);
}

/* ---- begin and end ---- */

static void release(struct ctl_work *work)
{
    pthread_sigmask(SIG_SETMASK, &work->mask_before, NULL);
    if (work->signal_fd >= 0)
        close(work->signal_fd);
    if (work->end_fd >= 0)
        close(work->end_fd);
    pthread_mutex_destroy(&work->lock);
    free(work);
}

void ctl_work_begin(struct ctl *ctl, enum ctl_work_kind kind, const char *format, ...)
{
    struct ctl_work *work = calloc(1, sizeof *work);
    const char *term = getenv("TERM");
    va_list args;

    if (work == NULL)
        return;
    work->ctl = ctl;
    work->kind = kind;
    va_start(args, format);
    vsnprintf(work->what, sizeof work->what, format, args);
    va_end(args);
    for (char *c = work->what; *c != '\0'; c++)
        if ((unsigned char)*c < ' ' || *c == 0x7F)
            *c = '?'; /* of a path in the configuration */
    work->begun_ms = clock_monotonic_ms();
    work->draws =
        isatty(STDERR_FILENO) && term != NULL && *term != '\0' && strcmp(term, "dumb") != 0;
    pthread_mutex_init(&work->lock, NULL);
    choose_signals(&work->signals);
    pthread_sigmask(SIG_BLOCK, &work->signals, &work->mask_before);
    work->signal_fd = signalfd(-1, &work->signals, SFD_CLOEXEC | SFD_NONBLOCK);
    work->end_fd = eventfd(0, EFD_CLOEXEC);
    if (work->signal_fd < 0 || work->end_fd < 0 ||
        pthread_create(&work->thread, NULL, run, work) != 0) {
        release(work);
        return;
    }
    log_set_sink(log_above, work);
    ctl->work = work;
}

void ctl_work_count(struct ctl *ctl, int64_t done, int64_t total)
{
    if (ctl->work == NULL)
        return;
    atomic_store(&ctl->work->done, done);
    atomic_store(&ctl->work->total, total);
}

bool ctl_work_go_on(const struct ctl *ctl)
{
    return ctl->work == NULL || atomic_load(&ctl->work->signal) == 0;
}

void ctl_work_end(struct ctl *ctl)
{
    struct ctl_work *work = ctl->work;
    struct signalfd_siginfo late;

    if (work == NULL)
        return;
    ctl->work = NULL;
    log_set_sink(NULL, NULL);
    eventfd_write(work->end_fd, 1);
    pthread_join(work->thread, NULL);
    hide(work);
    fflush(stderr);
    if (atomic_load(&work->signal) != 0)
        ctl->signal = atomic_load(&work->signal);
    if (read(work->signal_fd, &late, sizeof late) == (ssize_t)sizeof late)
        ctl->signal = (int)late.ssi_signo; /* all is done: say so first */
    release(work);
}
