/* test_retry.c - the contract's retry policy as a table: what came back, and all that follows. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "clock.h"
#include "retry.h"

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))

/* What follows from a class; the names on the right are those of the metric. */
static const struct follows {
    enum retry_class retry_class;
    enum retry_action action;
    enum retry_effect effect;
    enum err_code final;
    bool is_retryable;
    const char *name;
} rules[] = {
    {RETRY_SUCCESS, RETRY_DONE, RETRY_TOKEN_KEEPS, ERR_NONE, false, "success"},
    {RETRY_TRANSIENT, RETRY_SAME, RETRY_TOKEN_KEEPS, ERR_UPSTREAM_UNAVAILABLE, true, "transient"},
    {RETRY_RATE_LIMITED, RETRY_OTHER, RETRY_TOKEN_COOLS_HINT, ERR_UPSTREAM_RATE_LIMITED, true,
     "rate_limited"},
    {RETRY_DAILY_QUOTA, RETRY_OTHER, RETRY_TOKEN_COOLS_QUOTA_DAY, ERR_UPSTREAM_RATE_LIMITED, false,
     "daily_quota"},
    {RETRY_KEY_INVALID, RETRY_OTHER, RETRY_TOKEN_DISABLED, ERR_TOKEN_UNAVAILABLE, false,
     "key_invalid"},
    {RETRY_KEY_DOUBTFUL, RETRY_OTHER, RETRY_TOKEN_COOLS_10_MIN, ERR_UPSTREAM_RATE_LIMITED, false,
     "key_doubtful"},
    {RETRY_KEY_USED_UP, RETRY_OTHER, RETRY_TOKEN_EXCEEDED, ERR_TOKEN_UNAVAILABLE, false,
     "key_used_up"},
    {RETRY_INVALID_INPUT, RETRY_STOP, RETRY_TOKEN_KEEPS, ERR_INVALID_FILE, false, "invalid_input"},
    {RETRY_REJECTED, RETRY_STOP, RETRY_TOKEN_KEEPS, ERR_UPSTREAM_REJECTED, false, "rejected"},
    {RETRY_NO_ANSWER, RETRY_STOP, RETRY_TOKEN_KEEPS, ERR_INVALID_FILE, false, "no_answer"},
    {RETRY_BAD_TEXT, RETRY_SAME_ONCE, RETRY_TOKEN_KEEPS, ERR_INVALID_ANSWER, true, "bad_text"},
};

#define HTTP(n) .complete = true, .sent_whole = true, .http_status = (n)
#define GOOGLE(n) HTTP(n), .google_error = true

static const struct {
    const char *what;
    struct retry_outcome outcome;
    enum retry_class retry_class;
} outcomes[] = {
    {"connection refused, TLS failure", {.message = "Connection refused"}, RETRY_TRANSIENT},
    {"timeout after the request was sent", {.sent_whole = true}, RETRY_TRANSIENT},
    {"broken off after the status line", {.sent_whole = true, .http_status = 200}, RETRY_TRANSIENT},
    {"408", {HTTP(408)}, RETRY_TRANSIENT},
    {"500", {GOOGLE(500), .status = "INTERNAL"}, RETRY_TRANSIENT},
    {"502", {HTTP(502)}, RETRY_TRANSIENT},
    {"503", {GOOGLE(503), .status = "UNAVAILABLE"}, RETRY_TRANSIENT},
    {"504", {GOOGLE(504), .status = "DEADLINE_EXCEEDED"}, RETRY_TRANSIENT},
    {"200, an answer cut short", {HTTP(200)}, RETRY_TRANSIENT},

    {"429",
     {GOOGLE(429), .status = "RESOURCE_EXHAUSTED", .retry_after_ms = 26000},
     RETRY_RATE_LIMITED},
    {"429 of a proxy", {HTTP(429), .retry_after_ms = -1}, RETRY_RATE_LIMITED},
    {"429, quota of a day", {GOOGLE(429), .daily_quota = true}, RETRY_DAILY_QUOTA},
    {"the code before a field: 503 with a daily quota",
     {GOOGLE(503), .daily_quota = true},
     RETRY_TRANSIENT},

    {"400 API_KEY_INVALID", {GOOGLE(400), .reason = "API_KEY_INVALID"}, RETRY_KEY_INVALID},
    {"400 API_KEY_EXPIRED", {GOOGLE(400), .reason = "API_KEY_EXPIRED"}, RETRY_KEY_INVALID},
    {"401 API_KEY_INVALID", {GOOGLE(401), .reason = "API_KEY_INVALID"}, RETRY_KEY_INVALID},
    {"403 API_KEY_SERVICE_BLOCKED",
     {GOOGLE(403), .reason = "API_KEY_SERVICE_BLOCKED"},
     RETRY_KEY_INVALID},
    {"403 CONSUMER_SUSPENDED", {GOOGLE(403), .reason = "CONSUMER_SUSPENDED"}, RETRY_KEY_INVALID},
    {"400 CONSUMER_SUSPENDED", {GOOGLE(400), .reason = "CONSUMER_SUSPENDED"}, RETRY_KEY_INVALID},
    {"403 leaked",
     {GOOGLE(403), .status = "PERMISSION_DENIED",
      .message = "Your API key was Reported As Leaked. Please use another API key."},
     RETRY_KEY_INVALID},
    {"403 without Google's JSON", {HTTP(403), .reason = "API_KEY_INVALID"}, RETRY_KEY_DOUBTFUL},
    {"403 of a proxy that says leaked",
     {HTTP(403), .message = "reported as leaked"},
     RETRY_KEY_DOUBTFUL},
    {"403 PERMISSION_DENIED", {GOOGLE(403), .status = "PERMISSION_DENIED"}, RETRY_KEY_DOUBTFUL},
    {"403 another reason", {GOOGLE(403), .reason = "SERVICE_DISABLED"}, RETRY_KEY_DOUBTFUL},
    {"403 a reason that only resembles",
     {GOOGLE(403), .reason = "NO_API_KEY_INVALID"},
     RETRY_KEY_DOUBTFUL},
    {"401", {GOOGLE(401), .status = "UNAUTHENTICATED"}, RETRY_KEY_DOUBTFUL},
    {"401 of a proxy", {HTTP(401)}, RETRY_KEY_DOUBTFUL},
    {"a field before a keyword: 403 with a word in its message",
     {GOOGLE(403), .reason = "SERVICE_DISABLED", .message = "API_KEY_INVALID"},
     RETRY_KEY_DOUBTFUL},

    {"402, although its status says RESOURCE_EXHAUSTED",
     {GOOGLE(402), .status = "RESOURCE_EXHAUSTED"},
     RETRY_KEY_USED_UP},
    {"402 with a daily quota and a bad key",
     {GOOGLE(402), .daily_quota = true, .reason = "API_KEY_INVALID"},
     RETRY_KEY_USED_UP},

    {"400 INVALID_ARGUMENT", {GOOGLE(400), .status = "INVALID_ARGUMENT"}, RETRY_INVALID_INPUT},
    {"400 FAILED_PRECONDITION",
     {GOOGLE(400), .status = "FAILED_PRECONDITION"},
     RETRY_INVALID_INPUT},
    {"400 of a proxy", {HTTP(400), .reason = "API_KEY_INVALID"}, RETRY_INVALID_INPUT},
    {"404", {GOOGLE(404), .status = "NOT_FOUND"}, RETRY_REJECTED},
    {"404 with a key's reason", {GOOGLE(404), .reason = "API_KEY_INVALID"}, RETRY_REJECTED},
    {"413", {HTTP(413)}, RETRY_REJECTED},
    {"302", {HTTP(302)}, RETRY_REJECTED},
    {"418", {HTTP(418)}, RETRY_REJECTED},
    {"204", {HTTP(204)}, RETRY_REJECTED},

    {"200 blocked, cut or empty",
     {HTTP(200), .understood = true, .blocked = true},
     RETRY_NO_ANSWER},
    {"200 blocked, with text",
     {HTTP(200), .understood = true, .blocked = true, .text_ok = true},
     RETRY_NO_ANSWER},
    {"200 with other text", {HTTP(200), .understood = true}, RETRY_BAD_TEXT},
    {"200", {HTTP(200), .understood = true, .text_ok = true}, RETRY_SUCCESS},
};

static void test_classes(void **state)
{
    bool seen[RETRY_CLASS_COUNT] = {false};
    (void)state;

    for (size_t i = 0; i < COUNT(outcomes); i++) {
        enum retry_class found = retry_classify(&outcomes[i].outcome);
        if (found != outcomes[i].retry_class)
            fail_msg("%s: %s", outcomes[i].what, retry_rule(found)->name);
        seen[found] = true;
    }
    for (size_t i = 0; i < COUNT(seen); i++)
        assert_true(seen[i]);
}

static void test_rules(void **state)
{
    (void)state;
    assert_int_equal(COUNT(rules), RETRY_CLASS_COUNT);
    for (size_t i = 0; i < COUNT(rules); i++) {
        const struct retry_rule *rule = retry_rule(rules[i].retry_class);
        assert_string_equal(rule->name, rules[i].name);
        if (rule->action != rules[i].action || rule->effect != rules[i].effect ||
            rule->final != rules[i].final || rule->is_retryable != rules[i].is_retryable)
            fail_msg("%s: action %d, effect %d, %s, retryable %d", rule->name, (int)rule->action,
                     (int)rule->effect, err_info(rule->final)->name, rule->is_retryable);
    }
    assert_ptr_equal(retry_rule(RETRY_CLASS_COUNT), retry_rule(RETRY_REJECTED));
}

/* ---- waits ---- */

static void test_backoff(void **state)
{
    static const struct {
        struct retry_policy policy;
        int64_t delays[8]; /* before the first retry, the second, … */
    } cases[] = {
        {{3, 1000, 30000, 2.0, false}, {1000, 2000, 4000, 8000, 16000, 30000, 30000, 30000}},
        {{3, 1000, 30000, 1.5, false}, {1000, 1500, 2250, 3375, 5062, 7593, 11390, 17085}},
        {{3, 500, 30000, 1.0, false}, {500, 500, 500, 500, 500, 500, 500, 500}},
        {{3, 5000, 2000, 2.0, false}, {2000, 2000, 2000, 2000, 2000, 2000, 2000, 2000}},
        {{3, 0, 30000, 2.0, false}, {0, 0, 0, 0, 0, 0, 0, 0}},
        {{3, 1000, 0, 2.0, false}, {0, 0, 0, 0, 0, 0, 0, 0}},
    };
    (void)state;

    for (size_t i = 0; i < COUNT(cases); i++) {
        struct retry_policy policy = cases[i].policy;
        for (int n = 0; n < 8; n++) {
            int64_t delay = cases[i].delays[n], max = policy.max_delay_ms;
            int64_t longest = delay * 3 / 2 < max ? delay * 3 / 2 : max;
            policy.jitter = false;
            assert_int_equal(retry_backoff_ms(&policy, n, 0), delay);
            assert_int_equal(retry_backoff_ms(&policy, n, UINT64_MAX), delay);
            policy.jitter = true; /* +-50 %, and max_delay is never passed */
            int64_t least = retry_backoff_ms(&policy, n, 0),
                    middle = retry_backoff_ms(&policy, n, UINT64_C(1) << 63),
                    most = retry_backoff_ms(&policy, n, UINT64_MAX);
            assert_in_range(least, delay / 2, delay / 2 + 1);
            assert_in_range(middle, delay, delay + 1);
            assert_in_range(most, longest - (delay > 0), longest + (longest < max));
        }
    }
    assert_int_equal(retry_backoff_ms(&cases[0].policy, 2000000000, 0), 30000);
}

static void test_hint_wait(void **state)
{
    static const int64_t hints[] = {0, 1, 9, 1000, 45838, RETRY_MAX_HINT_MS};
    (void)state;

    for (size_t i = 0; i < COUNT(hints); i++) {
        int64_t hint = hints[i], last = hint;
        assert_int_equal(retry_hint_wait_ms(hint, 0), hint);
        for (uint64_t random = 0; random < 16; random++) { /* grows with the random number */
            int64_t wait = retry_hint_wait_ms(hint, random << 60);
            assert_in_range(wait, last, hint + hint / 10);
            last = wait;
        }
        assert_in_range(retry_hint_wait_ms(hint, UINT64_MAX), hint + hint / 10 - (hint >= 10),
                        hint + hint / 10);
    }
    assert_int_equal(retry_hint_wait_ms(1000, UINT64_C(1) << 63), 1050);
}

static void test_cooldowns(void **state)
{
    const int64_t backoff = 1234, noon = INT64_C(1795377600000); /* 2026-11-22 20:00 UTC */
    const struct {
        enum retry_class retry_class;
        int64_t hint, cooldown;
    } cases[] = {
        {RETRY_RATE_LIMITED, 26000, 26000},
        {RETRY_RATE_LIMITED, 0, 0},
        {RETRY_RATE_LIMITED, -1, backoff},
        {RETRY_RATE_LIMITED, RETRY_MAX_HINT_MS, RETRY_MAX_HINT_MS},
        {RETRY_RATE_LIMITED, RETRY_MAX_HINT_MS + 1, RETRY_MAX_HINT_MS},
        {RETRY_RATE_LIMITED, INT64_MAX, RETRY_MAX_HINT_MS},
        {RETRY_DAILY_QUOTA, 26000, INT64_C(12) * 3600000},
        {RETRY_KEY_DOUBTFUL, 26000, 600000},
        {RETRY_KEY_DOUBTFUL, -1, 600000},
        {RETRY_KEY_INVALID, -1, 600000},
        {RETRY_KEY_USED_UP, 26000, 0},
        {RETRY_TRANSIENT, 26000, 0},
        {RETRY_INVALID_INPUT, 26000, 0},
        {RETRY_SUCCESS, -1, 0},
    };
    (void)state;

    for (size_t i = 0; i < COUNT(cases); i++) {
        const struct retry_rule *rule = retry_rule(cases[i].retry_class);
        struct retry_outcome outcome = {.retry_after_ms = cases[i].hint};
        int64_t cooldown = retry_cooldown_ms(&outcome, rule, backoff, noon);
        if (cooldown != cases[i].cooldown)
            fail_msg("%s, hint %lld: %lld", rule->name, (long long)cases[i].hint,
                     (long long)cooldown);
    }
}

static void test_fits(void **state)
{
    static const struct {
        int64_t now, wait, deadline;
        bool fits;
    } cases[] = {
        {0, 0, 5000, true},        {0, 0, 4999, false},
        {0, 115000, 120000, true}, {0, 115001, 120000, false},
        {1000, 0, 6000, true},     {1001, 0, 6000, false},
        {7000, 0, 6000, false},    {1000, 1000, 7000, true},
        {1000, 1001, 7000, false}, {0, INT64_MAX, 120000, false},
    };
    (void)state;

    for (size_t i = 0; i < COUNT(cases); i++)
        if (retry_fits(cases[i].now, cases[i].wait, cases[i].deadline) != cases[i].fits)
            fail_msg("case %zu", i);
}

/* ---- calls that may have been billed ---- */

static void test_unknown_calls(void **state)
{
    static const struct {
        const char *what;
        struct retry_outcome outcome;
        bool unknown;
    } cases[] = {
        {"never connected", {.message = "refused"}, false},
        {"broken while it was sent", {.complete = false, .sent_whole = false}, false},
        {"refused before all was sent", {.complete = true, .http_status = 413}, false},
        {"sent, no answer", {.sent_whole = true}, true},
        {"sent, half an answer", {.sent_whole = true, .http_status = 200}, true},
        {"sent, an answer that tells nothing", {HTTP(200)}, true},
        {"sent, an answer", {HTTP(200), .understood = true, .text_ok = true}, false},
        {"sent, a blocked answer", {HTTP(200), .understood = true, .blocked = true}, false},
        {"sent, an error", {GOOGLE(503)}, false},
        {"sent, a proxy's error", {HTTP(502)}, false},
    };
    (void)state;

    for (size_t i = 0; i < COUNT(cases); i++)
        if (retry_unknown_call(&cases[i].outcome) != cases[i].unknown)
            fail_msg("%s", cases[i].what);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_classes),       cmocka_unit_test(test_rules),
        cmocka_unit_test(test_backoff),       cmocka_unit_test(test_hint_wait),
        cmocka_unit_test(test_cooldowns),     cmocka_unit_test(test_fits),
        cmocka_unit_test(test_unknown_calls),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
