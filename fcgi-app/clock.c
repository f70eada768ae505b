/* clock.c - time, and the identifiers made from it. See clock.h. */
#include "clock.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

int64_t clock_monotonic_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
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

static char *put(char *out, int n, int digits, char after)
{
    for (int i = digits - 1; i >= 0; i--, n /= 10)
        out[i] = (char)('0' + n % 10);
    out[digits] = after;
    return out + digits + 1;
}

/* By hand: strftime and snprintf take ten times as long, and each row has a time. */
void clock_format(int64_t wall_ms, char out[CLOCK_TEXT_SIZE])
{
    time_t seconds = (time_t)(wall_ms / 1000);
    struct tm tm;

    gmtime_r(&seconds, &tm);
    out = put(out, tm.tm_year + 1900, 4, '-');
    out = put(out, tm.tm_mon + 1, 2, '-');
    out = put(out, tm.tm_mday, 2, 'T');
    out = put(out, tm.tm_hour, 2, ':');
    out = put(out, tm.tm_min, 2, ':');
    out = put(out, tm.tm_sec, 2, '.');
    out = put(out, (int)(wall_ms % 1000), 3, 'Z');
    *out = '\0';
}

/* "24h": that long ago. */
static bool parse_ago(const char *text, int64_t *wall_ms)
{
    static const char units[] = "smhdw";
    static const int64_t seconds[] = {1, 60, 3600, 24 * 3600, 7 * 24 * 3600};
    size_t digits = strspn(text, "0123456789");
    const char *unit = text[digits] != '\0' ? strchr(units, text[digits]) : NULL;

    if (digits == 0 || digits > 6 || unit == NULL || text[digits + 1] != '\0')
        return false;
    *wall_ms = clock_wall_ms() - strtol(text, NULL, 10) * seconds[unit - units] * 1000;
    return *wall_ms > 0;
}

/* strptime, which must take exactly len characters. NULL: it does not. */
static const char *take(const char *text, size_t len, const char *format, struct tm *tm)
{
    const char *end = strptime(text, format, tm);
    return end == text + len ? end : NULL;
}

/* The part of ISO 8601 that people write: a date, perhaps with a time, perhaps with a zone; UTC
 * without one. */
static bool parse_iso(const char *text, int64_t *wall_ms)
{
    struct tm tm = {0};
    struct tm check;
    long ms = 0;
    time_t seconds;

    text = take(text, 10, "%Y-%m-%d", &tm);
    if (text != NULL && (*text == 'T' || *text == ' ')) {
        text = take(text + 1, 5, "%H:%M", &tm);
        if (text != NULL && *text == ':')
            text = take(text + 1, 2, "%S", &tm);
        if (text != NULL && *text == '.' && strspn(text + 1, "0123456789") == 3) {
            ms = strtol(text + 1, NULL, 10);
            text += 4;
        }
        if (text != NULL && *text != '\0')
            text = take(text, *text == 'Z' ? 1 : 6, "%z", &tm);
    }
    if (text == NULL || *text != '\0' || labs(tm.tm_gmtoff) >= 15 * 3600)
        return false;
    check = tm;
    seconds = timegm(&check); /* makes the 31st of February a day in March: then it differs */
    if (check.tm_mday != tm.tm_mday || check.tm_hour != tm.tm_hour || check.tm_sec != tm.tm_sec)
        return false;
    *wall_ms = ((int64_t)seconds - tm.tm_gmtoff) * 1000 + ms;
    return *wall_ms > 0;
}

bool clock_parse(const char *text, int64_t *wall_ms)
{
    return parse_ago(text, wall_ms) || parse_iso(text, wall_ms);
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
