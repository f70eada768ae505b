/* clock.h - time, and the identifiers made from it. Durations are in milliseconds. */
#ifndef EXTRACT_CLOCK_H
#define EXTRACT_CLOCK_H

#include <stdbool.h>
#include <stdint.h>

#define CLOCK_TEXT_SIZE 25 /* "2026-11-22T12:13:21.123Z" and NUL */
#define UUID_TEXT_SIZE 37  /* 36 characters and NUL */
#define CLOCK_WALL_MAX \
    INT64_C(253402300799999) /* the end of the year 9999, which has four digits */

/* Monotonic time: for deadlines and durations. */
int64_t clock_monotonic_ms(void);
int64_t clock_monotonic_us(void); /* in microseconds: to measure what takes a few milliseconds */
/* Milliseconds since 1970-01-01 UTC: for rows that people read. */
int64_t clock_wall_ms(void);
/* Sleeps until the monotonic time given. Not cut short by signals. */
void clock_sleep_until(int64_t monotonic_ms);

/* ISO 8601 in UTC with milliseconds. */
void clock_format(int64_t wall_ms, char out[CLOCK_TEXT_SIZE]);

/* A time as people write it: the part of ISO 8601 that they use (a date, perhaps with a time, perhaps
 * with a zone; UTC without one), or how long ago. *wall_ms is above 0. False: it is none of these. */
bool clock_parse(const char *text, int64_t *wall_ms);
#define CLOCK_TIMES "2026-01-31, 2026-01-31T12:00:00Z, 24h or 7d" /* examples, for messages */

/* Milliseconds from wall_ms to the next midnight in America/Los_Angeles, where Google's quota day
 * begins (https://ai.google.dev/gemini-api/docs/rate-limits). United States daylight saving time as
 * it has been since 2007 (15 U.S.C. 260a): second Sunday of March to first Sunday of November, 02:00. */
int64_t clock_ms_to_quota_day(int64_t wall_ms);

/* Random bits from the kernel; never fails on Linux 3.17 and later. */
uint64_t clock_random(void);

/* A new UUIDv7 (RFC 9562 section 5.7): sorts by time, as index keys like it. */
void uuid_v7(char out[UUID_TEXT_SIZE]);

#endif
