/* step_clock.c - a wall clock that a test can set: preloaded into the service alone. The seconds by which it is wrong stand in
 * the file that STEP_CLOCK names, as an int64_t, and may change at any moment. Monotonic time goes on, as on a real host.
 * (libfaketime would do the same, but gets timed waits of threads on the monotonic clock wrong.) */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static _Atomic int64_t none;
static _Atomic int64_t *step = &none;

__attribute__((constructor)) static void map_step(void)
{
    const char *path = getenv("STEP_CLOCK");
    int fd = path == NULL ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    void *map = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *step, PROT_READ, MAP_SHARED, fd, 0);

    if (map == MAP_FAILED)
        abort();
    step = map;
    close(fd);
}

int clock_gettime(clockid_t which, struct timespec *t)
{
    int result = (int)syscall(SYS_clock_gettime, which, t);

    if (result == 0 && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE))
        t->tv_sec += atomic_load(step);
    return result;
}

int gettimeofday(struct timeval *restrict tv, void *restrict zone)
{
    struct timespec t;

    (void)zone;
    clock_gettime(CLOCK_REALTIME, &t);
    *tv = (struct timeval){.tv_sec = t.tv_sec, .tv_usec = t.tv_nsec / 1000};
    return 0;
}

time_t time(time_t *out)
{
    struct timespec t;

    clock_gettime(CLOCK_REALTIME, &t);
    if (out != NULL)
        *out = t.tv_sec;
    return t.tv_sec;
}
