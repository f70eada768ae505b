/* test_base.c - what everything stands on: the table of errors to the letter, buffers, arenas, time,
 * identifiers, text. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>

#include <cmocka.h>

#include "buf.h"
#include "clock.h"
#include "err.h"
#include "text.h"

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))
#define LITERAL(s) (s), sizeof(s) - 1
#define HOUR INT64_C(3600000)

/* A copy with nothing behind it, so that a sanitizer sees who reads past the end. */
static char *exact(const char *s, size_t len)
{
    char *copy = malloc(len > 0 ? len : 1);
    assert_non_null(copy);
    memcpy(copy, s, len);
    return copy;
}

/* ---- err ---- */

static const char failed[] = "Failed to process invoice";

static const struct {
    enum err_code code;
    int status;
    const char *name;
    const char *detail; /* NULL: the contract does not give its words */
    bool retryable, retry_after;
} contract[] = {
    {ERR_TOKEN_EXPIRED, 403, "token_expired",
     "Your AI token has expired. Please renew your subscription.", false, false},
    {ERR_TOKEN_UNAVAILABLE, 403, "token_unavailable",
     "Your AI token is no longer available or has been disabled. Please contact support.", false,
     false},
    {ERR_NO_ACTIVE_TOKEN, 403, "no_active_token",
     "No active token found for your company. Please contact support.", false, false},
    {ERR_INVALID_FILE, 422, "invalid_file", failed, false, false},
    {ERR_UNSUPPORTED_MEDIA_TYPE, 415, "unsupported_media_type", failed, false, false},
    {ERR_BAD_REQUEST, 400, "bad_request", NULL, false, false},
    {ERR_FILE_TOO_LARGE, 413, "file_too_large", NULL, false, false},
    {ERR_UNAUTHENTICATED, 401, "unauthenticated", NULL, false, false},
    {ERR_FORBIDDEN, 403, "forbidden", NULL, false, false},
    {ERR_REQUEST_IN_PROGRESS, 409, "request_in_progress", NULL, true, false},
    {ERR_ALREADY_PROCESSED, 409, "already_processed", NULL, false, false},
    {ERR_RATE_LIMITED, 429, "rate_limited", NULL, true, true},
    {ERR_UPSTREAM_UNAVAILABLE, 502, "upstream_unavailable", failed, true, true},
    {ERR_UPSTREAM_REJECTED, 502, "upstream_rejected", failed, false, false},
    {ERR_INVALID_ANSWER, 502, "invalid_answer", failed, true, false},
    {ERR_UPSTREAM_RATE_LIMITED, 503, "upstream_rate_limited", NULL, true, true},
    {ERR_TOKEN_BUSY, 503, "token_busy", NULL, true, true},
    {ERR_DEADLINE_EXCEEDED, 504, "deadline_exceeded", NULL, true, false},
    {ERR_STORE_UNAVAILABLE, 503, "store_unavailable", NULL, true, true},
    {ERR_STORAGE_FULL, 503, "storage_full", NULL, true, true},
    {ERR_OVERLOADED, 503, "overloaded", NULL, true, true},
    {ERR_INTERNAL, 500, "internal_error", NULL, false, false},
    {ERR_NOT_FOUND, 404, "not_found", NULL, false, false},
    {ERR_METHOD_NOT_ALLOWED, 405, "method_not_allowed", NULL, false, false},
};

static void test_err_table(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT(contract); i++) {
        const struct err_info *info = err_info(contract[i].code);
        assert_string_equal(info->name, contract[i].name);
        if (info->status != contract[i].status || info->retryable != contract[i].retryable ||
            (info->retry_after_s > 0) != contract[i].retry_after)
            fail_msg("%s: %d, retryable %d, Retry-After %d", info->name, info->status,
                     info->retryable, info->retry_after_s);
        if (contract[i].detail != NULL)
            assert_string_equal(info->detail, contract[i].detail);
        assert_true(strlen(info->detail) > 0 && strlen(info->title) > 0);
    }
}

static void test_err_without_a_row(void **state)
{
    (void)state;
    assert_ptr_equal(err_info(ERR_CODE_COUNT), err_info(ERR_INTERNAL));
    assert_ptr_equal(err_info((enum err_code)1000000), err_info(ERR_INTERNAL));
    assert_ptr_equal(err_info((enum err_code) - 1), err_info(ERR_INTERNAL));
    for (int code = ERR_NONE; code < ERR_CODE_COUNT; code++)
        assert_true(code == ERR_INTERNAL ||
                    err_info((enum err_code)code) != err_info(ERR_INTERNAL));
}

static void test_err_messages(void **state)
{
    struct err err = {0};
    char text[1000];
    (void)state;

    assert_int_equal(err_set(NULL, ERR_CONFIG, "%d", 1), ERR_CONFIG);
    assert_int_equal(err_set(&err, ERR_CONFIG, "line %d", 7), ERR_CONFIG);
    assert_int_equal(err.code, ERR_CONFIG);
    assert_string_equal(err.message, "line 7");
    assert_int_equal(err_prefix(&err, "file %s", "a.conf"), ERR_CONFIG);
    assert_string_equal(err.message, "file a.conf: line 7");

    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    (void)err_set(&err, ERR_INTERNAL, "%s", text);
    assert_int_equal(strlen(err.message), sizeof err.message - 1);
    (void)err_prefix(&err, "why");
    assert_int_equal(strlen(err.message), sizeof err.message - 1);
    assert_int_equal(strncmp(err.message, "why: xxx", 8), 0);
    (void)err_prefix(&err, "%s", text);
    assert_int_equal(strlen(err.message), sizeof err.message - 1);
}

/* ---- buf ---- */

static void test_buf_grows_to_its_maximum(void **state)
{
    struct buf b;
    (void)state;

    buf_init(&b, 1000);
    assert_string_equal(buf_str(&b), "");
    for (int i = 0; i < 999; i++)
        buf_append_char(&b, 'x');
    buf_append(&b, "", 0);
    buf_append_str(&b, "y");
    assert_true(buf_ok(&b));
    assert_int_equal(b.len, 1000);
    assert_int_equal(strlen(buf_str(&b)), 1000);
    buf_append(&b, "", 0);
    assert_true(buf_ok(&b));
    buf_append_char(&b, 'z');
    assert_false(buf_ok(&b));
    buf_reset(&b);
}

static void test_buf_failure_is_sticky(void **state)
{
    struct buf b;
    (void)state;

    buf_init(&b, 4);
    buf_append_str(&b, "ab");
    buf_append_str(&b, "cde");
    assert_false(buf_ok(&b));
    buf_append_str(&b, "c"); /* would fit again, were it not for the gap */
    buf_printf(&b, "%d", 1);
    buf_append_json(&b, NULL, 0);
    assert_false(buf_ok(&b));
    assert_int_equal(b.len, 2);
    assert_string_equal(buf_str(&b), "");
    buf_clear(&b);
    assert_true(buf_ok(&b));
    assert_int_equal(b.len, 0);
    buf_append_str(&b, "abcd");
    assert_string_equal(buf_str(&b), "abcd");
    buf_wipe(&b);
    assert_null(b.data);
    buf_append_str(&b, "abcde");
    assert_false(buf_ok(&b)); /* the maximum outlives a reset */
    buf_reset(&b);
}

static void test_buf_printf(void **state)
{
    static const size_t lengths[] = {0, 1, 254, 255, 256, 257, 1000};
    struct buf b;
    char text[1001];
    (void)state;

    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    for (size_t i = 0; i < COUNT(lengths); i++) {
        buf_init(&b, lengths[i] + 2);
        buf_printf(&b, "<%.*s>", (int)lengths[i], text);
        assert_true(buf_ok(&b));
        assert_int_equal(b.len, lengths[i] + 2);
        assert_int_equal(strlen(buf_str(&b)), lengths[i] + 2);
        assert_int_equal(b.data[b.len - 1], '>');
        buf_reset(&b);
        buf_init(&b, lengths[i] + 1);
        buf_printf(&b, "<%.*s>", (int)lengths[i], text);
        assert_false(buf_ok(&b));
        buf_reset(&b);
    }
}

#define WRONG "\xEF\xBF\xBD"

static void test_buf_json(void **state)
{
    static const struct {
        const char *in;
        size_t len;
        const char *out;
    } cases[] = {
        {NULL, 0, "null"},
        {LITERAL(""), "\"\""},
        {LITERAL("a \"b\" \\c/"), "\"a \\\"b\\\" \\\\c/\""},
        {LITERAL("\0\x01\b\t\n\r\x1F\x7F"),
         "\"\\u0000\\u0001\\u0008\\u0009\\u000a\\u000d\\u001f\\u007f\""},
        {LITERAL("\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80"),
         "\"\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\""},
        {LITERAL("a\xFFz"), "\"a" WRONG "z\""},
        {LITERAL("a\x80z"), "\"a" WRONG "z\""},
        {LITERAL("\xC0\xAF"), "\"" WRONG WRONG "\""},                     /* overlong */
        {LITERAL("\xED\xA0\x80"), "\"" WRONG WRONG WRONG "\""},           /* a surrogate */
        {LITERAL("\xF4\x90\x80\x80"), "\"" WRONG WRONG WRONG WRONG "\""}, /* above U+10FFFF */
        {LITERAL("a\xC3"), "\"a" WRONG "\""},                             /* cut short */
        {LITERAL("\xC3\""), "\"" WRONG "\\\"\""}, /* the quote is still escaped */
        {LITERAL("\xE2\x82"), "\"" WRONG WRONG "\""},
    };
    (void)state;

    for (size_t i = 0; i < COUNT(cases); i++) {
        struct buf b;
        char *in = cases[i].in == NULL ? NULL : exact(cases[i].in, cases[i].len);
        buf_init(&b, 1000);
        buf_append_json(&b, in, cases[i].len);
        assert_string_equal(buf_str(&b), cases[i].out);
        assert_int_equal(b.len, strlen(cases[i].out));
        buf_reset(&b);
        free(in);
    }
}

/* ---- arena ---- */

static void test_arena(void **state)
{
    struct arena a;
    char *text[200];
    (void)state;

    arena_init(&a);
    for (size_t i = 0; i < COUNT(text); i++) {
        size_t size = i * 97 % 5000 + 1; /* small ones, and some larger than a chunk */
        text[i] = arena_alloc(&a, size);
        assert_int_equal((uintptr_t)text[i] % _Alignof(max_align_t), 0);
        for (size_t k = 0; k < size; k++)
            assert_int_equal(text[i][k], 0);
        memset(text[i], (int)i, size);
    }
    for (size_t i = 0; i < COUNT(text); i++) /* none lies in another */
        for (size_t k = 0; k < i * 97 % 5000 + 1; k++)
            if (text[i][k] != (char)i)
                fail_msg("block %zu was overwritten", i);
    assert_non_null(arena_alloc(&a, 0));
    assert_string_equal(arena_strdup(&a, "one"), "one");
    assert_string_equal(arena_strndup(&a, "two and more", 3), "two");
    assert_string_equal(arena_strndup(&a, NULL, 0), "");
    assert_string_equal(arena_printf(&a, "%s-%d", "three", 3), "three-3");
    assert_string_equal(arena_printf(&a, "%s", ""), "");
    assert_int_equal(strlen(arena_printf(&a, "%10000d", 1)), 10000);
    arena_reset(&a);
    arena_reset(&a);
    assert_string_equal(arena_strdup(&a, "again"), "again");
    arena_reset(&a);
}

/* ---- clock ---- */

static int64_t utc(int year, int month, int day, int hour, int minute, int second, int ms)
{
    struct tm tm = {.tm_year = year - 1900,
                    .tm_mon = month - 1,
                    .tm_mday = day,
                    .tm_hour = hour,
                    .tm_min = minute,
                    .tm_sec = second};
    return (int64_t)timegm(&tm) * 1000 + ms;
}

static void test_clock_format(void **state)
{
    static const struct {
        int64_t ms;
        const char *text;
    } cases[] = {
        {0, "1970-01-01T00:00:00.000Z"},
        {1, "1970-01-01T00:00:00.001Z"},
        {INT64_C(951782399999), "2000-02-28T23:59:59.999Z"},
        {INT64_C(951782400000), "2000-02-29T00:00:00.000Z"},
        {INT64_C(1795349601123), "2026-11-22T12:13:21.123Z"},
    };
    char text[CLOCK_TEXT_SIZE];
    (void)state;

    for (size_t i = 0; i < COUNT(cases); i++) {
        clock_format(cases[i].ms, text);
        assert_string_equal(text, cases[i].text);
    }
}

static void test_clock_parse(void **state)
{
    static const struct {
        const char *text;
        int64_t ms; /* 0: refused */
    } cases[] = {
        {"2026-11-22", INT64_C(1795305600000)},
        {"2026-11-22T12:13", INT64_C(1795349580000)},
        {"2026-11-22 12:13:21Z", INT64_C(1795349601000)},
        {"2026-11-22T12:13:21.123Z", INT64_C(1795349601123)},
        {"2026-11-22T14:13:21.123+02:00", INT64_C(1795349601123)},
        {"2026-11-22T07:13:21.123-0500", 0},
        {"2026-11-22T07:13:21.123-05:00", INT64_C(1795349601123)},
        {"9999-12-31T23:59:59.999Z", CLOCK_WALL_MAX},
        {"10000-01-01", 0},
        {"1970-01-01", 0},
        {"2026-02-29", 0},
        {"2026-11-22T24:00", 0},
        {"2026-11-22T12:13:21.12Z", 0},
        {"2026-11-22T12", 0},
        {"2026-11-22T12:13:21Zx", 0},
        {"2026-11-22T12:13+15:00", 0},
        {"", 0},
        {"h", 0},
        {"24", 0},
        {"24hh", 0},
        {"-1h", 0},
        {"1000000h", 0},
        {"999999w", 0},
    };
    int64_t ms;
    (void)state;

    for (size_t i = 0; i < COUNT(cases); i++) {
        if (clock_parse(cases[i].text, &ms) != (cases[i].ms != 0) ||
            (cases[i].ms != 0 && ms != cases[i].ms))
            fail_msg("%s", cases[i].text);
    }
    int64_t before = clock_wall_ms();
    assert_true(clock_parse("2d", &ms));
    assert_in_range(ms, before - 2 * INT64_C(86400000), clock_wall_ms() - 2 * INT64_C(86400000));
}

static void test_quota_day(void **state)
{
    const struct {
        int64_t now, wait;
    } cases[] = {
        {utc(2026, 7, 1, 6, 59, 59, 999), 1},
        {utc(2026, 7, 1, 7, 0, 0, 0), 24 * HOUR},
        {utc(2026, 12, 1, 8, 0, 0, 0), 24 * HOUR},
        {utc(2026, 12, 1, 7, 59, 59, 0), 1000},
        {utc(2027, 1, 1, 0, 0, 0, 0), 8 * HOUR}, /* there, the old year's last afternoon */
        /* spring: the 8th of March has 23 hours */
        {utc(2026, 3, 7, 8, 0, 0, 0), 24 * HOUR},
        {utc(2026, 3, 8, 7, 59, 59, 999), 1},
        {utc(2026, 3, 8, 8, 0, 0, 0), 23 * HOUR},
        {utc(2026, 3, 8, 9, 59, 59, 999), 21 * HOUR + 1},
        {utc(2026, 3, 8, 10, 0, 0, 0), 21 * HOUR},
        {utc(2026, 3, 9, 7, 0, 0, 0), 24 * HOUR},
        /* autumn: the 1st of November has 25 hours */
        {utc(2026, 10, 31, 7, 0, 0, 0), 24 * HOUR},
        {utc(2026, 11, 1, 7, 0, 0, 0), 25 * HOUR},
        {utc(2026, 11, 1, 8, 59, 59, 999), 23 * HOUR + 1},
        {utc(2026, 11, 1, 9, 0, 0, 0), 23 * HOUR},
        {utc(2026, 11, 2, 7, 59, 59, 999), 1},
        {utc(2026, 11, 2, 8, 0, 0, 0), 24 * HOUR},
    };
    (void)state;

    for (size_t i = 0; i < COUNT(cases); i++) {
        int64_t wait = clock_ms_to_quota_day(cases[i].now);
        if (wait != cases[i].wait)
            fail_msg("case %zu: %lld, not %lld", i, (long long)wait, (long long)cases[i].wait);
    }
}

/* The C library knows the same rule by another way: every hour of some years. */
static void test_quota_day_by_the_c_library(void **state)
{
    (void)state;
    setenv("TZ", "PST8PDT,M3.2.0/2,M11.1.0/2", 1);
    tzset();
    for (int64_t now = utc(2025, 12, 30, 0, 30, 0, 0); now < utc(2030, 1, 3, 0, 0, 0, 0);
         now += HOUR) {
        time_t seconds = (time_t)(now / 1000);
        struct tm tm;
        localtime_r(&seconds, &tm);
        tm.tm_mday++;
        tm.tm_hour = tm.tm_min = tm.tm_sec = 0;
        tm.tm_isdst = -1;
        int64_t expected = (int64_t)mktime(&tm) * 1000 - now;
        if (clock_ms_to_quota_day(now) != expected)
            fail_msg("at %lld: %lld, not %lld", (long long)now,
                     (long long)clock_ms_to_quota_day(now), (long long)expected);
    }
    unsetenv("TZ");
    tzset();
}

static void on_alarm(int number)
{
    (void)number;
}

static void test_sleep(void **state)
{
    struct sigaction action = {.sa_handler = on_alarm};
    struct itimerval every = {{0, 3000}, {0, 3000}}, never = {{0, 0}, {0, 0}};
    int64_t begun = clock_monotonic_ms();
    (void)state;

    clock_sleep_until(begun - 1000);
    assert_true(clock_monotonic_ms() < begun + 500);
    assert_int_equal(sigaction(SIGALRM, &action, NULL), 0);
    assert_int_equal(setitimer(ITIMER_REAL, &every, NULL), 0);
    begun = clock_monotonic_ms();
    clock_sleep_until(begun + 40);
    int64_t ended = clock_monotonic_ms();
    assert_int_equal(setitimer(ITIMER_REAL, &never, NULL), 0);
    assert_true(ended >= begun + 40);
}

static void test_uuid(void **state)
{
    enum { N = 200 };
    static char ids[N][UUID_TEXT_SIZE];
    (void)state;

    for (size_t i = 0; i < N; i++) {
        int64_t before = clock_wall_ms();
        uuid_v7(ids[i]);
        int64_t after = clock_wall_ms();
        assert_int_equal(strlen(ids[i]), 36);
        for (size_t k = 0; k < 36; k++) {
            bool dash = k == 8 || k == 13 || k == 18 || k == 23;
            assert_true(dash ? ids[i][k] == '-' : strchr("0123456789abcdef", ids[i][k]) != NULL);
        }
        assert_int_equal(ids[i][14], '7');           /* version */
        assert_non_null(strchr("89ab", ids[i][19])); /* variant */
        char digits[13];
        snprintf(digits, sizeof digits, "%.8s%.4s", ids[i], ids[i] + 9);
        int64_t ms = strtoll(digits, NULL, 16);
        assert_true(ms >= before && ms <= after);
        for (size_t k = 0; k < i; k++)
            assert_string_not_equal(ids[i], ids[k]);
    }
    for (size_t i = 0; i < 5; i++) { /* they sort by time */
        uuid_v7(ids[0]);
        clock_sleep_until(clock_monotonic_ms() + 2);
        uuid_v7(ids[1]);
        assert_true(strcmp(ids[0], ids[1]) < 0);
    }
    assert_true(clock_random() != clock_random());
}

/* ---- text ---- */

#define EMPTY "must not be empty"
#define LONG "is too long: at most 256 bytes of UTF-8"
#define UTF8 "must be UTF-8"
#define CONTROL "must not have control characters"
#define SPACE "must not begin or end with a space"

static void test_text_fault(void **state)
{
    static const struct {
        const char *text;
        size_t len;
        const char *fault;
    } cases[] = {
        {LITERAL(""), EMPTY},
        {LITERAL("a"), NULL},
        {LITERAL("NT047"), NULL},
        {LITERAL("M\xC3\xBCller & S\xC3\xB6hne"), NULL},
        {LITERAL("\xE6\x9D\xB1\xE4\xBA\xAC \xF0\x9F\x98\x80"), NULL},
        {LITERAL("a\xC2\xA0z"), NULL}, /* a no-break space inside is text */
        {LITERAL(" a"), SPACE},
        {LITERAL("a "), SPACE},
        {LITERAL(" "), SPACE},
        {LITERAL("\xC2\xA0"
                 "a"),
         SPACE}, /* no-break space */
        {LITERAL("a\xC2\xA0"), SPACE},
        {LITERAL("\xE3\x80\x80"
                 "a"),
         SPACE},                           /* ideographic space */
        {LITERAL("a\xE2\x80\x83"), SPACE}, /* em space */
        {LITERAL("a\tz"), CONTROL},
        {LITERAL("a\nz"), CONTROL},
        {LITERAL("\na"), CONTROL},
        {LITERAL("a\0z"), CONTROL},
        {LITERAL("a\x7Fz"), CONTROL},
        {LITERAL("a\xC2\x80z"), CONTROL}, /* the C1 controls */
        {LITERAL("a\xC2\x85z"), CONTROL},
        {LITERAL("a\xC2\x9Fz"), CONTROL},
        {LITERAL("a\xE2\x80\xA8z"), CONTROL}, /* line separator */
        {LITERAL("a\xE2\x80\xA9z"), CONTROL}, /* paragraph separator */
        {LITERAL("a\xFFz"), UTF8},
        {LITERAL("a\xC0\xAFz"), UTF8},       /* an overlong "/" */
        {LITERAL("\xE0\x80\xAF"), UTF8},     /* in three bytes */
        {LITERAL("\xF0\x80\x80\xAF"), UTF8}, /* in four */
        {LITERAL("\xC0\x80"), UTF8},         /* an overlong NUL */
        {LITERAL("\xED\xA0\x80"), UTF8},     /* a surrogate */
        {LITERAL("\xF4\x90\x80\x80"), UTF8}, /* above U+10FFFF */
        {LITERAL("a\xC3"), UTF8},            /* cut short */
        {LITERAL("caf\xE9"), UTF8},          /* Latin-1 */
    };
    char text[258];
    (void)state;

    for (size_t i = 0; i < COUNT(cases); i++) {
        char *copy = exact(cases[i].text, cases[i].len);
        const char *fault = text_fault(copy, cases[i].len, 1, 256);
        if (fault != cases[i].fault &&
            (fault == NULL || cases[i].fault == NULL || strcmp(fault, cases[i].fault) != 0))
            fail_msg("case %zu, %s: %s", i, cases[i].text, fault == NULL ? "no fault" : fault);
        free(copy);
    }
    assert_null(text_fault("", 0, 0, 256)); /* branch may be empty */
    memset(text, 'x', sizeof text);
    assert_null(text_fault(text, 256, 1, 256));
    assert_string_equal(text_fault(text, 257, 1, 256), LONG);
    for (size_t i = 0; i < 256; i += 2) /* bytes count, not characters */
        memcpy(text + i, "\xC3\xA9", 2);
    assert_null(text_fault(text, 256, 1, 256));
    memcpy(text + 256, "\xC3\xA9", 2);
    assert_string_equal(text_fault(text, 258, 1, 256), LONG);
}

static void test_text_fold(void **state)
{
    static const char *const same[][2] = {
        {"NT047", "nt047"},
        {"", ""},
        {"M\xC3\x9CLLER", "m\xC3\xBCller"},
        {"Stra\xC3\x9F"
         "e",
         "STRASSE"},
        {"\xCE\xA3\xCE\xA3", "\xCF\x83\xCF\x82"}, /* sigma, also at a word's end */
        {"cafe\xCC\x81", "CAF\xC3\x89"},          /* combined and composed */
        {"\xD0\x96", "\xD0\xB6"},                 /* Cyrillic */
        {"\xFFz", "\xFFz"},                       /* not UTF-8: as it is */
    };
    static const char *const different[][2] = {
        {"NT047", "NT047 "},
        {"NT047", "NT048"},
        {"e", "\xC3\xA9"},
        {"I", "\xC4\xB1"}, /* the Turkish i without a dot */
    };
    struct arena a;
    (void)state;

    arena_init(&a);
    for (size_t i = 0; i < COUNT(same); i++)
        assert_string_equal(text_fold(&a, same[i][0]), text_fold(&a, same[i][1]));
    for (size_t i = 0; i < COUNT(different); i++)
        assert_string_not_equal(text_fold(&a, different[i][0]), text_fold(&a, different[i][1]));
    arena_reset(&a);
}

static void test_text_escape(void **state)
{
    static const struct {
        const char *in;
        size_t len;
        const char *out;
    } cases[] = {
        {LITERAL(""), ""},
        {LITERAL("plain \xC3\xA9 \"quoted\""), "plain \xC3\xA9 \"quoted\""},
        {LITERAL("a\nb\rc\\n"), "a\\nb\\rc\\\\n"},
        {LITERAL("\0\t\x1B[31m\x7F"), "\\x00\\x09\\x1B[31m\\x7F"},
        {LITERAL("\xC2\x9B"
                 "31m"),
         "\\xC2\\x9B31m"}, /* a terminal's C1 escape */
        {LITERAL("a\xE2\x80\xA8z"), "a\\xE2\\x80\\xA8z"},
        {LITERAL("\xFF\xC3"), "\\xFF\\xC3"},
        {LITERAL("\xC0\x8A"), "\\xC0\\x8A"}, /* an overlong line end */
    };
    (void)state;

    for (size_t i = 0; i < COUNT(cases); i++) {
        struct buf b;
        char *in = exact(cases[i].in, cases[i].len);
        buf_init(&b, 1000);
        text_escape(&b, in, cases[i].len);
        assert_string_equal(buf_str(&b), cases[i].out);
        buf_reset(&b);
        free(in);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_err_table),
        cmocka_unit_test(test_err_without_a_row),
        cmocka_unit_test(test_err_messages),
        cmocka_unit_test(test_buf_grows_to_its_maximum),
        cmocka_unit_test(test_buf_failure_is_sticky),
        cmocka_unit_test(test_buf_printf),
        cmocka_unit_test(test_buf_json),
        cmocka_unit_test(test_arena),
        cmocka_unit_test(test_clock_format),
        cmocka_unit_test(test_clock_parse),
        cmocka_unit_test(test_quota_day),
        cmocka_unit_test(test_quota_day_by_the_c_library),
        cmocka_unit_test(test_sleep),
        cmocka_unit_test(test_uuid),
        cmocka_unit_test(test_text_fault),
        cmocka_unit_test(test_text_fold),
        cmocka_unit_test(test_text_escape),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
