/* count_io.c - for LD_PRELOAD: counts what a program copies, and what it waits for the disk.
 *
 * Copies made by the memcpy family, bytes that cross into the kernel and back, fsyncs and their time:
 * summed over all processes that have the same file BENCH_COUNTS (a struct counts, mapped). Copies
 * that a compiler put in line, and those inside the C library, are not seen. */
#include <dlfcn.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct counts {
    _Atomic int64_t copied, copies; /* bytes, calls */
    _Atomic int64_t in, reads;      /* read, recv, … */
    _Atomic int64_t out, writes;    /* write, send, … */
    _Atomic int64_t fsync_ns, fsyncs;
};

static struct counts nowhere, *counts = &nowhere;

__attribute__((constructor)) static void map_counts(void)
{
    const char *path = getenv("BENCH_COUNTS");
    int fd = path == NULL ? -1 : open(path, O_RDWR | O_CLOEXEC);
    void *map =
        fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *counts, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    if (map != MAP_FAILED)
        counts = map;
    if (fd >= 0)
        close(fd);
}

static void add(_Atomic int64_t *to, int64_t n, _Atomic int64_t *calls)
{
    if (n > 0)
        atomic_fetch_add_explicit(to, n, memory_order_relaxed);
    atomic_fetch_add_explicit(calls, 1, memory_order_relaxed);
}

/* ---- in memory. The copy itself is one instruction: it can't call what it stands for ---- */

void *__memcpy_chk(void *restrict to, const void *restrict from, size_t n, size_t room);
void *__memmove_chk(void *to, const void *from, size_t n, size_t room);

static void *copy(void *to, const void *from, size_t n)
{
    void *begin = to;

    add(&counts->copied, (int64_t)n, &counts->copies);
#if defined(__x86_64__)
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
#else
    for (volatile size_t i = 0; i < n; i++)
        ((char *)to)[i] = ((const char *)from)[i];
#endif
    return begin;
}

void *memcpy(void *restrict to, const void *restrict from, size_t n)
{
    return copy(to, from, n);
}

void *__memcpy_chk(void *restrict to, const void *restrict from, size_t n, size_t room)
{
    if (n > room)
        abort();
    return copy(to, from, n);
}

void *memmove(void *to, const void *from, size_t n)
{
    if ((uintptr_t)to - (uintptr_t)from >= n)
        return copy(to, from, n);
    add(&counts->copied, (int64_t)n, &counts->copies);
    for (volatile size_t i = n; i > 0; i--)
        ((char *)to)[i - 1] = ((const char *)from)[i - 1];
    return to;
}

void *__memmove_chk(void *to, const void *from, size_t n, size_t room)
{
    if (n > room)
        abort();
    return memmove(to, from, n);
}

/* ---- into the kernel and back ---- */

#define NEXT(name) (__extension__(__typeof__(&name)) dlsym(RTLD_NEXT, #name))

#define COUNTED(type, name, parameters, arguments, bytes, calls) \
    type name parameters                                         \
    {                                                            \
        static __typeof__(&name) next;                           \
        if (next == NULL)                                        \
            next = NEXT(name);                                   \
        type crossed = next arguments;                           \
        add(&counts->bytes, crossed, &counts->calls);            \
        return crossed;                                          \
    }

COUNTED(ssize_t, read, (int fd, void *p, size_t n), (fd, p, n), in, reads)
COUNTED(ssize_t, pread64, (int fd, void *p, size_t n, off64_t at), (fd, p, n, at), in, reads)
COUNTED(ssize_t, recv, (int fd, void *p, size_t n, int f), (fd, p, n, f), in, reads)
COUNTED(ssize_t, recvmsg, (int fd, struct msghdr *m, int f), (fd, m, f), in, reads)
COUNTED(ssize_t, readv, (int fd, const struct iovec *v, int n), (fd, v, n), in, reads)
COUNTED(ssize_t, write, (int fd, const void *p, size_t n), (fd, p, n), out, writes)
COUNTED(ssize_t, pwrite64, (int fd, const void *p, size_t n, off64_t at), (fd, p, n, at), out,
        writes)
COUNTED(ssize_t, send, (int fd, const void *p, size_t n, int f), (fd, p, n, f), out, writes)
COUNTED(ssize_t, sendmsg, (int fd, const struct msghdr *m, int f), (fd, m, f), out, writes)
COUNTED(ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n), out, writes)

/* ---- to the disk ---- */

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

#define TIMED(name)                                                \
    int name(int fd)                                               \
    {                                                              \
        static __typeof__(&name) next;                             \
        if (next == NULL)                                          \
            next = NEXT(name);                                     \
        int64_t begun = now_ns();                                  \
        int result = next(fd);                                     \
        add(&counts->fsync_ns, now_ns() - begun, &counts->fsyncs); \
        return result;                                             \
    }

TIMED(fsync)
TIMED(fdatasync)
