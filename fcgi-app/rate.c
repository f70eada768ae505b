/* rate.c - how many requests a minute a client key may make. See rate.h.
 *
 * Monotonic time is the same in all processes of a host and begins anew when it starts, as runtime_dir
 * does. A bucket from the future (a file that outlived a restart) counts as full. */
#include "rate.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define BUCKETS 4096
#define FILE_SIZE ((size_t)BUCKETS * sizeof(_Atomic int64_t))
#define MINUTE_US INT64_C(60000000)

_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "processes can only share atomics without locks");

struct rate {
    int64_t each_us;          /* what one request takes from a bucket of MINUTE_US */
    _Atomic int64_t *buckets; /* when each is full again, in microseconds; NULL: no limit */
};

static enum err_code map_file(struct rate *rate, const char *runtime_dir, struct err *err)
{
    int directory = open(runtime_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int fd = -1;
    void *mapping = MAP_FAILED;

    if (directory >= 0)
        fd = openat(directory, "rates", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    /* Room from the start: a mapping that finds none later is a SIGBUS. */
    if (fd >= 0 && (errno = posix_fallocate(fd, 0, (off_t)FILE_SIZE)) == 0)
        mapping = mmap(NULL, FILE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapping == MAP_FAILED)
        err_set(err, ERR_CONFIG, "server.runtime_dir: cannot use %s/rates: %s", runtime_dir,
                strerror(errno));
    else
        rate->buckets = mapping;
    if (fd >= 0)
        close(fd);
    if (directory >= 0)
        close(directory);
    return mapping == MAP_FAILED ? ERR_CONFIG : ERR_NONE;
}

struct rate *rate_open(const char *runtime_dir, int per_minute, struct err *err)
{
    struct rate *rate = calloc(1, sizeof *rate);

    if (rate == NULL) {
        err_set(err, ERR_INTERNAL, "out of memory");
        return NULL;
    }
    if (per_minute <= 0)
        return rate;
    rate->each_us = MINUTE_US / per_minute;
    if (map_file(rate, runtime_dir, err) != ERR_NONE) {
        rate_close(rate);
        return NULL;
    }
    return rate;
}

void rate_close(struct rate *rate)
{
    if (rate != NULL && rate->buckets != NULL)
        munmap((void *)rate->buckets, FILE_SIZE);
    free(rate);
}

/* FNV-1a: names are not an attacker's to choose. */
static size_t bucket_of(const char *key)
{
    uint64_t hash = UINT64_C(14695981039346656037);

    for (; *key != '\0'; key++)
        hash = (hash ^ (unsigned char)*key) * UINT64_C(1099511628211);
    return (size_t)((hash ^ hash >> 32) % BUCKETS);
}

int64_t rate_take(struct rate *rate, const char *key, int64_t now_ms)
{
    int64_t now = now_ms * 1000;

    if (rate->buckets == NULL)
        return 0;
    _Atomic int64_t *bucket = &rate->buckets[bucket_of(key)];
    int64_t full = atomic_load(bucket);
    for (;;) {
        int64_t from = full < now || full > now + MINUTE_US ? now : full;
        int64_t missing = from + rate->each_us - now - MINUTE_US;
        if (missing > 0)
            return (missing + 999) / 1000;
        if (atomic_compare_exchange_weak(bucket, &full, from + rate->each_us))
            return 0;
    }
}
