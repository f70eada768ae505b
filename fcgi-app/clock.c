/* clock.c - time, and the identifiers made from it. See clock.h. */
#include "clock.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>
#include <time.h>

#define DAY_MS INT64_C(86400000)
#define HOUR_MS INT64_C(3600000)

static int64_t read_clock(clockid_t which)
{
    struct timespec t;
    clock_gettime(which, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

int64_t clock_monotonic_ms(void)
{
    return read_clock(CLOCK_MONOTONIC);
}

int64_t clock_wall_ms(void)
{
    return read_clock(CLOCK_REALTIME);
}

void clock_sleep_until(int64_t monotonic_ms)
{
    struct timespec t = {.tv_sec = monotonic_ms / 1000,
                         .tv_nsec = (long)(monotonic_ms % 1000) * 1000000};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
        ;
}

void clock_format(int64_t wall_ms, char out[CLOCK_TEXT_SIZE])
{
    time_t seconds = (time_t)(wall_ms / 1000);
    char date[32];
    struct tm tm;

    gmtime_r(&seconds, &tm);
    strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S", &tm);
    snprintf(out, CLOCK_TEXT_SIZE, "%.19s.%03uZ", date, (unsigned)(wall_ms % 1000) % 1000u);
}

/* Days since 1970-01-01 of the nth Sunday (from 1) of a month. */
static int64_t nth_sunday(int year, int month, int n)
{
    struct tm tm = {.tm_year = year - 1900, .tm_mon = month - 1, .tm_mday = 1};
    int64_t first = (int64_t)timegm(&tm) / (DAY_MS / 1000);
    int64_t weekday = (first + 4) % 7; /* 1970-01-01 was a Thursday; 0 is Sunday */
    return first + (7 - weekday) % 7 + 7 * (n - 1);
}

/* How far Los Angeles is behind UTC: 8 hours, 7 in daylight saving time. */
static int64_t los_angeles_behind_ms(int64_t wall_ms)
{
    time_t seconds = (time_t)(wall_ms / 1000);
    struct tm tm;

    gmtime_r(&seconds, &tm);
    int year = tm.tm_year + 1900; /* both changes are far from New Year: UTC's year will do */
    int64_t start = nth_sunday(year, 3, 2) * DAY_MS + 2 * HOUR_MS + 8 * HOUR_MS;
    int64_t end = nth_sunday(year, 11, 1) * DAY_MS + 2 * HOUR_MS + 7 * HOUR_MS;
    return wall_ms >= start && wall_ms < end ? 7 * HOUR_MS : 8 * HOUR_MS;
}

int64_t clock_ms_to_quota_day(int64_t wall_ms)
{
    int64_t local = wall_ms - los_angeles_behind_ms(wall_ms);
    int64_t next_local = (local / DAY_MS + 1) * DAY_MS;
    /* The clock changes at 02:00, so the offset at midnight is that of an hour before it. */
    int64_t behind = los_angeles_behind_ms(next_local + 8 * HOUR_MS - HOUR_MS);
    return next_local + behind - wall_ms;
}

static void random_bytes(void *out, size_t size)
{
    /* Up to 256 bytes come whole, once the kernel's pool is ready (getrandom(2)). */
    while (getrandom(out, size, 0) != (ssize_t)size)
        if (errno != EINTR)
            abort();
}

uint64_t clock_random(void)
{
    uint64_t n;
    random_bytes(&n, sizeof n);
    return n;
}

void uuid_v7(char out[UUID_TEXT_SIZE])
{
    uint64_t r[2];
    uint64_t ms = (uint64_t)clock_wall_ms();

    random_bytes(r, sizeof r);
    snprintf(out, UUID_TEXT_SIZE, "%08x-%04x-7%03x-%04x-%012llx", (unsigned)(ms >> 16 & 0xffffffff),
             (unsigned)(ms & 0xffff), (unsigned)(r[0] & 0xfff),
             (unsigned)(0x8000 | (r[0] >> 12 & 0x3fff)),
             (unsigned long long)(r[1] & 0xffffffffffff));
}
