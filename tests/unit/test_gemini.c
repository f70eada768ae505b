/* test_gemini.c - what Gemini's answers mean, as a table; and what is sent, to a server in a thread of
 * the test that keeps each request and answers, or fails, as it was told. */
#include <arpa/inet.h>
#include <json.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "clock.h"
#include "embed.h"
#include "gemini.h"
#include "invoice.h"

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))

/* ---- answers ---- */

/* The JSON of a good answer round parts, and round an error's details. */
#define CANDIDATE(parts, finish)                                          \
    "{\"candidates\":[{\"content\":{\"role\":\"model\",\"parts\":[" parts \
    "]},\"finishReason\":\"" finish                                       \
    "\"}],\"usageMetadata\":{\"totalTokenCount\":9},\"modelVersion\":\"gemini-x\"}"
#define PART(text) "{\"text\":\"" text "\"}"
#define ERROR(code, status, message, details)                                        \
    "{\"error\":{\"code\":" code ",\"message\":\"" message "\",\"status\":\"" status \
    "\",\"details\":[" details "]}}"
#define TYPE(name) "{\"@type\":\"type.googleapis.com/google.rpc." name "\","
#define RETRY(delay) TYPE("RetryInfo") "\"retryDelay\":\"" delay "\"}"
#define REASON(reason) TYPE("ErrorInfo") "\"reason\":\"" reason "\",\"domain\":\"googleapis.com\"}"
#define QUOTA(id) \
    TYPE("QuotaFailure") "\"violations\":[{\"quotaId\":\"" id "\",\"quotaValue\":\"50\"}]}"
#define HTML "<!DOCTYPE html><html><title>Error 502 (Server Error)!!1</title></html>"
#define DAY RETRY_MAX_HINT_MS

static const struct row {
    const char *what;
    int http_status;
    const char *retry_after, *body;
    enum retry_class retry_class; /* were its text the JSON asked for */
    const char *text;             /* NULL: none */
    const char *message;          /* a part of it; NULL: whatever */
    const char *status, *reason;
    int64_t hint_ms; /* 0 in this table: none */
    bool daily;
} rows[] = {
    /* good ones */
    {"an answer", 200, NULL, CANDIDATE(PART("{}"), "STOP"), RETRY_SUCCESS, .text = "{}"},
    {"a line end behind it", 200, NULL, CANDIDATE(PART("{}"), "STOP") " \r\n\n", RETRY_SUCCESS,
     .text = "{}"},
    {"parts joined", 200, NULL, CANDIDATE(PART("{\\\"a\\\":") "," PART("") "," PART("1}"), "STOP"),
     RETRY_SUCCESS, .text = "{\"a\":1}"},
    {"thoughts skipped", 200, NULL,
     CANDIDATE(
         "{\"text\":\"hm\",\"thought\":true}," PART("{") ",{\"thought\":false,\"text\":\"}\"}",
         "STOP"),
     RETRY_SUCCESS, .text = "{}"},
    {"other parts skipped", 200, NULL,
     CANDIDATE(
         "{\"inlineData\":{}},null,5,{\"text\":7}," PART("{}") ",{\"thoughtSignature\":\"x\"}",
         "STOP"),
     RETRY_SUCCESS, .text = "{}"},
    {"the first candidate only", 200, NULL,
     "{\"candidates\":[{\"content\":{\"parts\":[" PART(
         "1") "]},\"finishReason\":\"STOP\"},"
              "{\"content\":{\"parts\":[" PART("2") "]},\"finishReason\":\"SAFETY\"}]}",
     RETRY_SUCCESS, .text = "1"},
    {"fields that are not known", 200, NULL,
     "{\"x\":[],\"candidates\":[{\"y\":1,\"content\":{\"parts\":[" PART(
         "{}") "]},\"finishReason\":\"STOP\"}]}",
     RETRY_SUCCESS, .text = "{}"},
    {"an empty feedback", 200, NULL,
     "{\"promptFeedback\":{},\"candidates\":[{\"content\":{\"parts\":[" PART(
         "{}") "]},\"finishReason\":\"STOP\"}]}",
     RETRY_SUCCESS, .text = "{}"},
    {"characters of all planes", 200, NULL,
     CANDIDATE(PART("\\u00e9\xC3\xA9\\ud83d\\ude00"), "STOP"), RETRY_SUCCESS,
     .text = "\xC3\xA9\xC3\xA9\xF0\x9F\x98\x80"},

    /* blocked, cut, empty */
    {"MAX_TOKENS", 200, NULL, CANDIDATE(PART("{\\\"a"), "MAX_TOKENS"), RETRY_NO_ANSWER,
     .message = "MAX_TOKENS"},
    {"SAFETY", 200, NULL, CANDIDATE(PART("{}"), "SAFETY"), RETRY_NO_ANSWER, .message = "SAFETY"},
    {"RECITATION", 200, NULL, CANDIDATE("", "RECITATION"), RETRY_NO_ANSWER,
     .message = "RECITATION"},
    {"MALFORMED_RESPONSE", 200, NULL, CANDIDATE(PART("{}"), "MALFORMED_RESPONSE"),
     .retry_class = RETRY_NO_ANSWER},
    {"a reason of the future", 200, NULL, CANDIDATE(PART("{}"), "STOPPED"), RETRY_NO_ANSWER,
     .message = "STOPPED"},
    {"a very long reason", 200, NULL,
     CANDIDATE(PART("{}"), "STOP_STOP_STOP_STOP_STOP_STOP_STOP_STOP_STOP_STOP"),
     .retry_class = RETRY_NO_ANSWER},
    {"no reason", 200, NULL, "{\"candidates\":[{\"content\":{\"parts\":[" PART("{}") "]}}]}",
     RETRY_NO_ANSWER, .message = "missing"},
    {"no text", 200, NULL, CANDIDATE(PART(""), "STOP"), RETRY_NO_ANSWER, .message = "no text"},
    {"no parts", 200, NULL,
     "{\"candidates\":[{\"content\":{\"role\":\"model\"},\"finishReason\":\"STOP\"}]}",
     RETRY_NO_ANSWER, .message = "no text"},
    {"no content", 200, NULL, "{\"candidates\":[{\"finishReason\":\"STOP\"}]}",
     .retry_class = RETRY_NO_ANSWER},
    {"thoughts alone", 200, NULL, CANDIDATE("{\"text\":\"hm\",\"thought\":true}", "STOP"),
     .retry_class = RETRY_NO_ANSWER},
    {"a blocked prompt", 200, NULL,
     "{\"promptFeedback\":{\"blockReason\":\"PROHIBITED_CONTENT\"},\"usageMetadata\":{"
     "\"totalTokenCount\":9}}",
     RETRY_NO_ANSWER, .message = "PROHIBITED_CONTENT"},
    {"a blocked prompt with a candidate", 200, NULL,
     "{\"promptFeedback\":{\"blockReason\":\"OTHER\"},\"candidates\":[{\"content\":{\"parts\":"
     "[" PART("{}") "]},\"finishReason\":\"STOP\"}]}",
     RETRY_NO_ANSWER, .message = "OTHER"},
    {"no candidate", 200, NULL, "{\"candidates\":[],\"usageMetadata\":{}}", RETRY_NO_ANSWER,
     .message = "no candidate"},
    {"usage alone", 200, NULL, "{\"usageMetadata\":{\"totalTokenCount\":9}}",
     .retry_class = RETRY_NO_ANSWER},
    {"a candidate that is none", 200, NULL, "{\"candidates\":[\"STOP\"]}",
     .retry_class = RETRY_NO_ANSWER},

    /* a 200 that is no answer at all: cut short */
    {"empty body", 200, NULL, "", .retry_class = RETRY_TRANSIENT},
    {"an empty object", 200, NULL, "{}", .retry_class = RETRY_TRANSIENT},
    {"another object", 200, NULL, "{\"models\":[]}", .retry_class = RETRY_TRANSIENT},
    {"an array", 200, NULL, "[" CANDIDATE(PART("{}"), "STOP") "]", .retry_class = RETRY_TRANSIENT},
    {"candidates that are none", 200, NULL, "{\"candidates\":{}}", .retry_class = RETRY_TRANSIENT},
    {"null", 200, NULL, "null", .retry_class = RETRY_TRANSIENT},
    {"HTML", 200, NULL, HTML, .retry_class = RETRY_TRANSIENT},
    {"two answers", 200, NULL, CANDIDATE(PART("{}"), "STOP") CANDIDATE(PART("{}"), "STOP"),
     .retry_class = RETRY_TRANSIENT},
    {"cut in its text", 200, NULL, "{\"candidates\":[{\"content\":{\"parts\":[{\"text\":\"{",
     .retry_class = RETRY_TRANSIENT},

    /* errors in all shapes */
    {"an error", 503, NULL, ERROR("503", "UNAVAILABLE", "The model is overloaded.", "") "\n",
     RETRY_TRANSIENT, .message = "HTTP 503 UNAVAILABLE: The model is overloaded.",
     .status = "UNAVAILABLE"},
    {"in an array", 503, NULL, "[" ERROR("503", "UNAVAILABLE", "Busy.", "") "]\n", RETRY_TRANSIENT,
     .message = "Busy.", .status = "UNAVAILABLE"},
    {"without details", 500, NULL,
     "{\"error\":{\"code\":500,\"message\":\"m\",\"status\":\"INTERNAL\"}}", RETRY_TRANSIENT,
     .message = "HTTP 500 INTERNAL: m", .status = "INTERNAL"},
    {"an empty error", 500, NULL, "{\"error\":{}}", .retry_class = RETRY_TRANSIENT},
    {"an error that is a word", 400, NULL, "{\"error\":\"invalid_grant\"}",
     .retry_class = RETRY_INVALID_INPUT},
    {"an empty array", 500, NULL, "[]", .retry_class = RETRY_TRANSIENT},
    {"HTML of a proxy", 502, NULL, HTML, RETRY_TRANSIENT, .message = "HTTP 502"},
    {"HTML that refuses", 403, NULL, "<html>API_KEY_INVALID reported as leaked</html>",
     .retry_class = RETRY_KEY_DOUBTFUL},
    {"cut short", 400, NULL, "{\"error\":{\"details\":[" REASON("API_KEY_INVALID"),
     .retry_class = RETRY_INVALID_INPUT},
    {"details of other types", 400, NULL,
     ERROR("400", "S", "m", "null,7,\"x\",[],{},{\"@type\":7},{\"@type\":\"\"}"),
     RETRY_INVALID_INPUT, .status = "S"},
    {"a key's reason", 400, NULL,
     ERROR("400", "INVALID_ARGUMENT", "API key not valid.", REASON("API_KEY_INVALID")),
     RETRY_KEY_INVALID, .message = "HTTP 400 INVALID_ARGUMENT API_KEY_INVALID: API key not valid.",
     .status = "INVALID_ARGUMENT", .reason = "API_KEY_INVALID"},
    {"a key's reason, in an array", 400, NULL,
     "[" ERROR("400", "S", "m", REASON("API_KEY_EXPIRED")) "]", RETRY_KEY_INVALID, .status = "S",
     .reason = "API_KEY_EXPIRED"},
    {"a reason among others", 403, NULL,
     ERROR("403", "S", "m",
           TYPE("Help") "\"links\":[]}," REASON("CONSUMER_SUSPENDED") "," REASON("LATER")),
     RETRY_KEY_INVALID, .status = "S", .reason = "CONSUMER_SUSPENDED"},
    {"a reason outside ErrorInfo", 400, NULL,
     ERROR("400", "S", "m", TYPE("Help") "\"reason\":\"API_KEY_INVALID\"}"), RETRY_INVALID_INPUT,
     .status = "S"},
    {"a leaked key", 403, NULL,
     ERROR("403", "PERMISSION_DENIED", "Your API key was reported as leaked.", ""),
     RETRY_KEY_INVALID, .status = "PERMISSION_DENIED"},
    {"used up", 402, NULL, ERROR("402", "RESOURCE_EXHAUSTED", "m", RETRY("5s")), RETRY_KEY_USED_UP,
     .status = "RESOURCE_EXHAUSTED", .hint_ms = 5000},
    {"no such model", 404, NULL, ERROR("404", "NOT_FOUND", "models/x is not found", ""),
     RETRY_REJECTED, .status = "NOT_FOUND"},

    /* hints */
    {"a delay with a fraction", 429, NULL,
     ERROR("429", "RESOURCE_EXHAUSTED", "m", RETRY("45.837906927s")), RETRY_RATE_LIMITED,
     .status = "RESOURCE_EXHAUSTED", .hint_ms = 45838},
    {"a delay", 429, NULL, ERROR("429", "S", "m", QUOTA("PerMinutePerProject") "," RETRY("26s")),
     RETRY_RATE_LIMITED, .status = "S", .hint_ms = 26000},
    {"a millisecond", 429, NULL, ERROR("429", "S", "m", RETRY("0.001s")), RETRY_RATE_LIMITED,
     .status = "S", .hint_ms = 1},
    {"a tenth of a millisecond, not none", 429, NULL, ERROR("429", "S", "m", RETRY("0.0001s")),
     RETRY_RATE_LIMITED, .status = "S", .hint_ms = 1},
    {"a huge delay", 429, NULL, ERROR("429", "S", "m", RETRY("315576000000s")), RETRY_RATE_LIMITED,
     .status = "S", .hint_ms = DAY},
    {"digits without end", 429, NULL,
     ERROR("429", "S", "m", RETRY("99999999999999999999999999999999999999s")), RETRY_RATE_LIMITED,
     .status = "S", .hint_ms = DAY},
    {"no hint", 429, NULL, ERROR("429", "S", "m", ""), RETRY_RATE_LIMITED, .status = "S"},
    {"garbage", 429, NULL, ERROR("429", "S", "m", RETRY("soon")), RETRY_RATE_LIMITED,
     .status = "S"},
    {"no unit", 429, NULL, ERROR("429", "S", "m", RETRY("26")), RETRY_RATE_LIMITED, .status = "S"},
    {"another unit", 429, NULL, ERROR("429", "S", "m", RETRY("26ms")), RETRY_RATE_LIMITED,
     .status = "S"},
    {"a unit alone", 429, NULL, ERROR("429", "S", "m", RETRY("s")), RETRY_RATE_LIMITED,
     .status = "S"},
    {"an empty delay", 429, NULL, ERROR("429", "S", "m", RETRY("")), RETRY_RATE_LIMITED,
     .status = "S"},
    {"a negative delay", 429, NULL, ERROR("429", "S", "m", RETRY("-5s")), RETRY_RATE_LIMITED,
     .status = "S"},
    {"not a number", 429, NULL, ERROR("429", "S", "m", RETRY("nans")), RETRY_RATE_LIMITED,
     .status = "S"},
    {"a number for a text", 429, NULL,
     ERROR("429", "S", "m", TYPE("RetryInfo") "\"retryDelay\":26}"), RETRY_RATE_LIMITED,
     .status = "S"},
    {"a delay elsewhere", 429, NULL, ERROR("429", "S", "m", TYPE("Help") "\"retryDelay\":\"26s\"}"),
     RETRY_RATE_LIMITED, .status = "S"},
    {"a header in seconds", 429, "17", HTML, RETRY_RATE_LIMITED, .hint_ms = 17000},
    {"a header that is a huge number", 503, "99999999999999999999", HTML, RETRY_TRANSIENT,
     .hint_ms = DAY},
    {"a header of garbage", 429, "soon", HTML, .retry_class = RETRY_RATE_LIMITED},
    {"an empty header", 429, "", HTML, .retry_class = RETRY_RATE_LIMITED},
    {"a header and a longer delay", 429, "10", ERROR("429", "S", "m", RETRY("26s")),
     RETRY_RATE_LIMITED, .status = "S", .hint_ms = 26000},
    {"a delay and a longer header", 429, "60", ERROR("429", "S", "m", RETRY("26s")),
     RETRY_RATE_LIMITED, .status = "S", .hint_ms = 60000},
    {"a header beside a garbled delay", 429, "10", ERROR("429", "S", "m", RETRY("soon")),
     RETRY_RATE_LIMITED, .status = "S", .hint_ms = 10000},

    /* quotas of a day */
    {"a daily quota", 429, NULL,
     ERROR("429", "S", "m",
           QUOTA("GenerateRequestsPerDayPerProjectPerModel-FreeTier") "," RETRY("26s")),
     RETRY_DAILY_QUOTA, .status = "S", .hint_ms = 26000, .daily = true},
    {"one of several", 429, NULL,
     ERROR("429", "S", "m",
           TYPE("QuotaFailure") "\"violations\":[null,{\"quotaId\":\"XPerMinute\"},{\"quotaId\":"
                                "\"XPerDay\"}]}"),
     RETRY_DAILY_QUOTA, .status = "S", .daily = true},
    {"a minute's quota", 429, NULL,
     ERROR("429", "S", "m", QUOTA("GenerateRequestsPerMinutePerProject")), RETRY_RATE_LIMITED,
     .status = "S"},
    {"a day only in the message", 429, NULL, ERROR("429", "S", "quota PerDay", RETRY("1s")),
     RETRY_RATE_LIMITED, .status = "S", .hint_ms = 1000},
    {"a day that is part of a word", 429, NULL,
     ERROR("429", "S", "m", QUOTA("SundayPerMinuteToDay")), .retry_class = RETRY_RATE_LIMITED,
     .status = "S"},
    {"no violation", 429, NULL, ERROR("429", "S", "m", TYPE("QuotaFailure") "\"violations\":[]}"),
     RETRY_RATE_LIMITED, .status = "S"},
};

/* Reads a copy with nothing behind it. */
static void read_answer(struct gemini_answer *answer, int http_status, const char *retry_after,
                        const char *body, size_t len)
{
    char *copy = malloc(len > 0 ? len : 1);
    assert_non_null(copy);
    memcpy(copy, body, len);
    gemini_answer_init(answer);
    gemini_read_answer(answer, http_status, retry_after, copy, len);
    free(copy);
    assert_true(answer->outcome.complete);
    assert_int_equal(answer->outcome.http_status, http_status);
    assert_false(answer->outcome.text_ok);
}

static void test_answers(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT(rows); i++) {
        const struct row *r = &rows[i];
        struct gemini_answer answer;
        read_answer(&answer, r->http_status, r->retry_after, r->body, strlen(r->body));
        struct retry_outcome *o = &answer.outcome;
        assert_false(o->sent_whole);
        o->text_ok = true;
        enum retry_class found = retry_classify(o);
        if (found != r->retry_class)
            fail_msg("%s: %s", r->what, retry_rule(found)->name);
        if (r->text != NULL && strcmp(buf_str(&answer.text), r->text) != 0)
            fail_msg("%s: text %s", r->what, buf_str(&answer.text));
        if (r->message != NULL && strstr(o->message, r->message) == NULL)
            fail_msg("%s: message %s", r->what, o->message);
        if (strcmp(o->status, r->status == NULL ? "" : r->status) != 0 ||
            strcmp(o->reason, r->reason == NULL ? "" : r->reason) != 0)
            fail_msg("%s: status %s, reason %s", r->what, o->status, o->reason);
        if (o->retry_after_ms != (r->hint_ms == 0 ? -1 : r->hint_ms))
            fail_msg("%s: hint %lld", r->what, (long long)o->retry_after_ms);
        if (o->daily_quota != r->daily)
            fail_msg("%s: daily %d", r->what, o->daily_quota);
        gemini_answer_reset(&answer);
    }
}

static void test_hints_of_zero(void **state)
{
    struct gemini_answer answer;
    (void)state;

    read_answer(&answer, 429, "0", HTML, strlen(HTML));
    assert_int_equal(answer.outcome.retry_after_ms, 0);
    static const char none[] = ERROR("429", "S", "m", RETRY("0s"));
    read_answer(&answer, 429, NULL, none, sizeof none - 1);
    assert_int_equal(answer.outcome.retry_after_ms, 0);
}

/* Words that C reads as numbers are garbage here. */
static void test_hints_that_c_reads(void **state)
{
    static const char *const delays[] = {"infs", "infinitys", "0x10s", "1e3s", " 5s", "+5s"};
    static const char *const headers[] = {"nan", "inf", "0x10", "-5", "1e3"};
    struct gemini_answer answer;
    char body[200];
    (void)state;

    for (size_t i = 0; i < COUNT(delays); i++) {
        snprintf(body, sizeof body, "{\"error\":{\"details\":[" RETRY("%s") "]}}", delays[i]);
        read_answer(&answer, 429, NULL, body, strlen(body));
        if (answer.outcome.retry_after_ms != -1)
            fail_msg("retryDelay %s: %lld", delays[i], (long long)answer.outcome.retry_after_ms);
    }
    for (size_t i = 0; i < COUNT(headers); i++) {
        read_answer(&answer, 429, headers[i], HTML, strlen(HTML));
        if (answer.outcome.retry_after_ms != -1)
            fail_msg("Retry-After %s: %lld", headers[i], (long long)answer.outcome.retry_after_ms);
    }
}

static void test_retry_after_date(void **state)
{
    struct gemini_answer answer;
    time_t now = time(NULL);
    char date[64];
    struct tm tm;
    (void)state;

    for (int ahead = -100; ahead <= 100; ahead += 100) {
        time_t then = now + ahead;
        gmtime_r(&then, &tm);
        strftime(date, sizeof date, "%a, %d %b %Y %H:%M:%S GMT", &tm);
        read_answer(&answer, 503, date, HTML, strlen(HTML));
        if (ahead == 100)
            assert_in_range(answer.outcome.retry_after_ms, 90000, 100000);
        else
            assert_int_equal(answer.outcome.retry_after_ms, 0);
    }
    read_answer(&answer, 503, "Fri, 31 Dec 2100 23:59:59 GMT", HTML, strlen(HTML));
    assert_int_equal(answer.outcome.retry_after_ms, DAY);
    read_answer(&answer, 503, "26 Nov 299999993", HTML, strlen(HTML)); /* 2^63 ms are less */
    assert_int_equal(answer.outcome.retry_after_ms, DAY);
    read_answer(&answer, 503, "Sat, 31 Dec 1583 23:59:59 GMT", HTML, strlen(HTML));
    assert_int_equal(answer.outcome.retry_after_ms, 0);
}

static void test_fields_of_an_answer(void **state)
{
    static const char whole[] = CANDIDATE(PART("{}"), "STOP");
    static const char bare[] = "{\"candidates\":[]}";
    struct gemini_answer answer;
    (void)state;

    read_answer(&answer, 200, NULL, whole, sizeof whole - 1);
    assert_string_equal(answer.model, "gemini-x");
    assert_string_equal(answer.finish_reason, "STOP");
    assert_true(answer.has_usage);
    assert_int_equal(answer.usage.total_tokens, 9);
    gemini_answer_reset(&answer);
    assert_int_equal(answer.usage.total_tokens, 0);
    assert_int_equal(answer.outcome.retry_after_ms, -1);
    read_answer(&answer, 200, NULL, bare, sizeof bare - 1);
    assert_string_equal(answer.model, "");
    assert_string_equal(answer.finish_reason, "");
    assert_false(answer.has_usage);
    gemini_answer_reset(&answer);
}

/* A blocked or cut answer was paid for as well. */
static void test_usage_of_a_blocked_answer(void **state)
{
    static const char *const bodies[] = {CANDIDATE("", "MAX_TOKENS"),
                                         CANDIDATE(PART("x"), "SAFETY"),
                                         ("{\"promptFeedback\":{\"blockReason\":\"OTHER\"},"
                                          "\"usageMetadata\":{\"totalTokenCount\":9}}")};
    (void)state;

    for (size_t i = 0; i < COUNT(bodies); i++) {
        struct gemini_answer answer;
        read_answer(&answer, 200, NULL, bodies[i], strlen(bodies[i]));
        assert_true(answer.outcome.blocked && answer.has_usage);
        assert_int_equal(answer.usage.total_tokens, 9);
        gemini_answer_reset(&answer);
    }
}

/* Wherever the body breaks off: never an answer, and never understood. */
static void test_cut_anywhere(void **state)
{
    static const char good[] = CANDIDATE(PART("{\\\"a\\\":1}"), "STOP");
    static const char bad[] =
        "[" ERROR("429", "RESOURCE_EXHAUSTED", "m", QUOTA("XPerDay") "," RETRY("26s")) "]";
    struct gemini_answer answer;
    (void)state;

    for (size_t n = 0; n < sizeof good - 1; n++) {
        read_answer(&answer, 200, NULL, good, n);
        assert_false(answer.outcome.understood);
        gemini_answer_reset(&answer);
    }
    for (size_t n = 0; n < sizeof bad - 1; n++) {
        read_answer(&answer, 429, NULL, bad, n);
        assert_false(answer.outcome.google_error);
        assert_int_equal(answer.outcome.retry_after_ms, -1);
        gemini_answer_reset(&answer);
    }
}

static void test_nesting(void **state)
{
    struct gemini_answer answer;
    struct buf b;
    (void)state;

    buf_init(&b, 3000000);
    for (int object = 0; object < 2; object++) {
        buf_clear(&b);
        buf_append_str(&b, "{\"error\":{},\"candidates\":");
        for (int i = 0; i < 300000; i++)
            buf_append_str(&b, object ? "{\"a\":" : "[");
        buf_append_str(&b, "1");
        for (int i = 0; i < 300000; i++)
            buf_append_str(&b, object ? "}" : "]");
        buf_append_str(&b, "}");
        assert_true(buf_ok(&b));
        read_answer(&answer, 200, NULL, b.data, b.len);
        assert_false(answer.outcome.understood);
        read_answer(&answer, 500, NULL, b.data, b.len);
        assert_false(answer.outcome.google_error);
        assert_int_equal(retry_classify(&answer.outcome), RETRY_TRANSIENT);
        gemini_answer_reset(&answer);
    }
    buf_reset(&b);
}

static void test_long_fields(void **state)
{
    struct gemini_answer answer;
    struct buf b;
    (void)state;

    buf_init(&b, 100000);
    for (int status = 200; status <= 400; status += 200) {
        char word[3001];
        memset(word, 'w', sizeof word - 1);
        word[sizeof word - 1] = '\0';
        buf_clear(&b);
        if (status == 200)
            buf_printf(&b,
                       "{\"modelVersion\":\"%s\",\"candidates\":[{\"finishReason\":\"%s\"}],"
                       "\"promptFeedback\":{\"blockReason\":\"%s\"}}",
                       word, word, word);
        else
            buf_printf(&b, ERROR("400", "%s", "%s", REASON("%s")), word, word, word);
        read_answer(&answer, status, NULL, b.data, b.len);
        assert_true(strlen(answer.outcome.message) < sizeof answer.outcome.message);
        assert_int_equal(strlen(answer.model), status == 200 ? sizeof answer.model - 1 : 0);
        assert_int_equal(strlen(answer.outcome.status),
                         status == 200 ? 0 : sizeof answer.outcome.status - 1);
        gemini_answer_reset(&answer);
    }
    buf_reset(&b);
}

/* ---- usage ---- */

#define DETAIL(modality, n) "{\"modality\":\"" modality "\",\"tokenCount\":" n "}"

static void test_usage(void **state)
{
    static const struct {
        const char *what, *json;
        struct usage usage;
    } cases[] = {
        {"all of it",
         "{\"promptTokenCount\":1200,\"candidatesTokenCount\":300,\"thoughtsTokenCount\":50,"
         "\"cachedContentTokenCount\":100,\"totalTokenCount\":1550,"
         "\"promptTokensDetails\":[" DETAIL("TEXT", "90") "," DETAIL("IMAGE", "1000") "," DETAIL(
             "DOCUMENT", "110") "],"
                                "\"candidatesTokensDetails\":[" DETAIL("TEXT", "290") "," DETAIL(
                                    "IMAGE", "10") "]}",
         {1200, 300, 90, 1110, 290, 50, 100, 1550}},
        {"total is not summed up anew",
         "{\"promptTokenCount\":1,\"candidatesTokenCount\":2,\"thoughtsTokenCount\":4,"
         "\"toolUsePromptTokenCount\":8,\"totalTokenCount\":15}",
         {1, 2, 0, 0, 2, 4, 0, 15}},
        {"without details",
         "{\"promptTokenCount\":10,\"candidatesTokenCount\":3,\"totalTokenCount\":13}",
         {10, 3, 0, 0, 3, 0, 0, 13}},
        {"empty details",
         "{\"candidatesTokenCount\":3,\"candidatesTokensDetails\":[],\"promptTokensDetails\":[]}",
         {0, 3, 0, 0, 3, 0, 0, 0}},
        {"no text among the details",
         "{\"candidatesTokenCount\":3,\"candidatesTokensDetails\":[" DETAIL("IMAGE", "3") "]}",
         {0, 3, 0, 0, 0, 0, 0, 0}},
        {"other modalities",
         "{\"promptTokensDetails\":[" DETAIL("AUDIO", "1") "," DETAIL("VIDEO", "2") "," DETAIL(
             "text", "4") "]}",
         {0}},
        {"a modality twice",
         "{\"promptTokensDetails\":[" DETAIL("TEXT", "1") "," DETAIL("TEXT", "2") "]}",
         {.text_prompt_tokens = 3}},
        {"empty", "{}", {0}},
        {"negative", "{\"promptTokenCount\":-1,\"totalTokenCount\":-9223372036854775808}", {0}},
        {"the most that is believed",
         "{\"totalTokenCount\":1000000000000}",
         {.total_tokens = 1000000000000}},
        {"absurd",
         "{\"totalTokenCount\":1000000000001,\"promptTokenCount\":9223372036854775807,"
         "\"candidatesTokenCount\":99999999999999999999,\"thoughtsTokenCount\":5}",
         {.thoughts_tokens = 5}},
        {"other types",
         "{\"promptTokenCount\":\"5\",\"totalTokenCount\":5.5,\"candidatesTokenCount\":null,"
         "\"thoughtsTokenCount\":[5],\"promptTokensDetails\":{},\"candidatesTokensDetails\":5}",
         {0}},
        {"details of other types",
         "{\"candidatesTokenCount\":3,\"candidatesTokensDetails\":[null,5,{},{\"modality\":5,"
         "\"tokenCount\":1},"
         "{\"modality\":\"TEXT\"},{\"modality\":\"TEXT\",\"tokenCount\":\"1\"}," DETAIL("TEXT",
                                                                                        "2") "]}",
         {0, 3, 0, 0, 2, 0, 0, 0}},
    };
    (void)state;

    for (size_t i = 0; i < COUNT(cases); i++) {
        struct gemini_answer answer;
        char body[1000];
        snprintf(body, sizeof body, "{\"usageMetadata\":%s}", cases[i].json);
        read_answer(&answer, 200, NULL, body, strlen(body));
        assert_true(answer.has_usage);
        if (memcmp(&answer.usage, &cases[i].usage, sizeof answer.usage) != 0)
            fail_msg(
                "%s: input %lld, output %lld, text %lld, image %lld, text out %lld, thoughts %lld, "
                "cached %lld, total %lld",
                cases[i].what, (long long)answer.usage.input_tokens,
                (long long)answer.usage.output_tokens, (long long)answer.usage.text_prompt_tokens,
                (long long)answer.usage.image_prompt_tokens,
                (long long)answer.usage.text_candidates_tokens,
                (long long)answer.usage.thoughts_tokens, (long long)answer.usage.cached_tokens,
                (long long)answer.usage.total_tokens);
        gemini_answer_reset(&answer);
    }
}

static void test_usage_add(void **state)
{
    struct usage sum = {1, 2, 3, 4, 5, 6, 7, 8}, more = {10, 20, 30, 40, 50, 60, 70, 80};
    struct usage expected = {11, 22, 33, 44, 55, 66, 77, 88};
    (void)state;

    usage_add(&sum, &more);
    assert_memory_equal(&sum, &expected, sizeof sum);
    usage_parse(&sum, NULL);
    assert_int_equal(sum.total_tokens, 0);
}

/* ---- a server ---- */

enum behaviour {
    ANSWER,         /* with the text that it was told */
    CLOSE,          /* reads the request and closes */
    CLOSE_ON_REUSE, /* answers a connection's first request, reads the next and closes */
    CLOSE_EARLY,    /* reads the head and closes */
    HANG,           /* reads the request and says nothing */
    CUT,            /* answers less than it announces */
    FLOOD           /* answers without end */
};

struct server {
    int listener, port;
    pthread_t thread;
    atomic_int behaviour, connections, begun, requests;
    pthread_mutex_t mutex; /* of what follows */
    char response[1000];   /* whole, with its head */
    struct buf head, body; /* the last request */
};

static void send_all(int fd, const char *data, size_t len)
{
    while (len > 0) {
        ssize_t n = send(fd, data, len, MSG_NOSIGNAL);
        if (n <= 0)
            return;
        data += n;
        len -= (size_t)n;
    }
}

/* Reads a request; false when the client closed. */
static bool read_request(struct server *server, int fd, bool head_only)
{
    static char block[65536];
    size_t head = 0, body = 0;
    struct buf b;

    buf_init(&b, 80000000);
    while (head == 0 || b.len < head + body) {
        ssize_t n = recv(fd, block, sizeof block, 0);
        if (n <= 0) {
            buf_reset(&b);
            return false;
        }
        if (b.len == 0)
            atomic_fetch_add(&server->begun, 1);
        buf_append(&b, block, (size_t)n);
        const char *end = head > 0 ? NULL : strstr(buf_str(&b), "\r\n\r\n");
        if (end != NULL) {
            head = (size_t)(end + 4 - b.data);
            const char *length = strcasestr(b.data, "\r\nContent-Length:");
            body = length == NULL || head_only ? 0 : (size_t)strtoll(length + 17, NULL, 10);
        }
    }
    pthread_mutex_lock(&server->mutex);
    buf_clear(&server->head);
    buf_clear(&server->body);
    buf_append(&server->head, b.data, head);
    buf_append(&server->body, b.data + head, b.len - head);
    pthread_mutex_unlock(&server->mutex);
    atomic_fetch_add(&server->requests, 1);
    buf_reset(&b);
    return true;
}

static void serve_connection(struct server *server, int fd)
{
    static char flood[100000];
    int behaviour = atomic_load(&server->behaviour);

    for (int served = 0; read_request(server, fd, behaviour == CLOSE_EARLY); served++) {
        behaviour = atomic_load(&server->behaviour);
        if (behaviour == CLOSE || behaviour == CLOSE_EARLY ||
            (behaviour == CLOSE_ON_REUSE && served > 0)) {
            return;
        } else if (behaviour == HANG) {
            char c;
            while (recv(fd, &c, 1, 0) > 0)
                ;
            return;
        } else if (behaviour == CUT) {
            static const char cut[] =
                "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{\"candidates\":[";
            send_all(fd, cut, sizeof cut - 1);
            return;
        } else if (behaviour == FLOOD) {
            static const char head[] = "HTTP/1.1 200 OK\r\nContent-Length: 20000000\r\n\r\n";
            send_all(fd, head, sizeof head - 1);
            memset(flood, ' ', sizeof flood);
            for (int i = 0; i < 200; i++)
                send_all(fd, flood, sizeof flood);
            return;
        }
        char response[sizeof server->response];
        pthread_mutex_lock(&server->mutex);
        memcpy(response, server->response, sizeof response);
        pthread_mutex_unlock(&server->mutex);
        send_all(fd, response, strlen(response));
    }
}

static void *serve(void *context)
{
    struct server *server = context;
    int fd;

    while ((fd = accept(server->listener, NULL, NULL)) >= 0) {
        atomic_fetch_add(&server->connections, 1);
        serve_connection(server, fd);
        close(fd);
    }
    return NULL;
}

static void start_server(struct server *server)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof address;

    *server = (struct server){.listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    assert_true(server->listener >= 0);
    assert_int_equal(bind(server->listener, (struct sockaddr *)&address, sizeof address), 0);
    assert_int_equal(listen(server->listener, 16), 0);
    assert_int_equal(getsockname(server->listener, (struct sockaddr *)&address, &len), 0);
    server->port = ntohs(address.sin_port);
    buf_init(&server->head, 40000000);
    buf_init(&server->body, 40000000);
    pthread_mutex_init(&server->mutex, NULL);
    assert_int_equal(pthread_create(&server->thread, NULL, serve, server), 0);
}

static void stop_server(struct server *server)
{
    shutdown(server->listener, SHUT_RDWR);
    pthread_join(server->thread, NULL);
    close(server->listener);
    buf_reset(&server->head);
    buf_reset(&server->body);
    pthread_mutex_destroy(&server->mutex);
}

/* ---- all that a call needs ---- */

#define OK_BODY CANDIDATE(PART("{}"), "STOP") "\n"

struct fixture {
    struct server server;
    struct config config;
    struct invoice_schema *schema;
    struct gemini *gemini;
    struct gemini_client *client;
    char url[64], model[16], prompt_file[64], none[1];
    const struct trace *trace; /* of the calls; NULL: none */
};

static void set_response(struct fixture *f, const char *status_line, const char *headers,
                         const char *body)
{
    pthread_mutex_lock(&f->server.mutex);
    snprintf(f->server.response, sizeof f->server.response,
             "HTTP/1.1 %s\r\n%sContent-Length: %zu\r\n\r\n%s", status_line, headers, strlen(body),
             body);
    pthread_mutex_unlock(&f->server.mutex);
}

static void open_gemini(struct fixture *f)
{
    struct err err = {0};
    f->gemini = gemini_new(&f->config, f->schema, &err);
    if (f->gemini == NULL)
        fail_msg("%s", err.message);
    f->client = gemini_client_new(f->gemini);
    assert_non_null(f->client);
}

static void close_gemini(struct fixture *f)
{
    gemini_client_free(f->client);
    gemini_free(f->gemini);
    f->client = NULL;
    f->gemini = NULL;
}

static int set_up(void **state)
{
    static struct fixture f;
    struct err err;

    memset(&f, 0, sizeof f);
    start_server(&f.server);
    snprintf(f.url, sizeof f.url, "http://127.0.0.1:%d", f.server.port);
    memcpy(f.model, "gemini-x", 9);
    f.config.gemini.base_url = f.url;
    f.config.gemini.model = f.model;
    f.config.gemini.connect_timeout_ms = 2000;
    f.config.gemini.proxy = f.config.gemini.prompt_file = f.config.gemini.schema_file =
        f.config.gemini.ca_file = f.none;
    f.schema = invoice_schema_load(&f.config, &err);
    assert_non_null(f.schema);
    set_response(&f, "200 OK", "", OK_BODY);
    open_gemini(&f);
    *state = &f;
    return 0;
}

static int tear_down(void **state)
{
    struct fixture *f = *state;
    close_gemini(f);
    gemini_client_free(NULL);
    gemini_free(NULL);
    invoice_schema_free(f->schema);
    stop_server(&f->server);
    return 0;
}

static void call(struct fixture *f, const char *mime_type, const unsigned char *file, size_t len,
                 int64_t timeout_ms, struct gemini_answer *answer)
{
    struct gemini_call c = {.api_key = "the-key",
                            .mime_type = mime_type,
                            .file = file,
                            .file_len = len,
                            .timeout_ms = timeout_ms,
                            .trace = f->trace};
    gemini_answer_init(answer);
    gemini_call(f->client, &c, answer);
}

/* ---- what is sent ---- */

static void encode(struct buf *out, const unsigned char *data, size_t len)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < len; i += 3) {
        unsigned n = (unsigned)data[i] << 16 | (i + 1 < len ? (unsigned)data[i + 1] << 8 : 0) |
                     (i + 2 < len ? data[i + 2] : 0);
        buf_append_char(out, digits[n >> 18]);
        buf_append_char(out, digits[n >> 12 & 63]);
        buf_append_char(out, i + 1 < len ? digits[n >> 6 & 63] : '=');
        buf_append_char(out, i + 2 < len ? digits[n & 63] : '=');
    }
}

static json_object *object_of(const char *name, json_object *value)
{
    json_object *object = json_object_new_object();
    json_object_object_add(object, name, value);
    return object;
}

/* The request that the contract with Google asks for, made in another way. */
static json_object *expected_request(const char *mime_type, const unsigned char *file, size_t len,
                                     const char *prompt, int max_output_tokens)
{
    struct buf base64;
    buf_init(&base64, 2 * len + 8);
    encode(&base64, file, len);
    json_object *data = object_of("mimeType", json_object_new_string(mime_type));
    json_object_object_add(data, "data", json_object_new_string(buf_str(&base64)));
    json_object *parts = json_object_new_array();
    json_object_array_add(parts, object_of("inlineData", data));
    json_object_array_add(parts, object_of("text", json_object_new_string(prompt)));
    json_object *content = object_of("role", json_object_new_string("user"));
    json_object_object_add(content, "parts", parts);
    json_object *contents = json_object_new_array();
    json_object_array_add(contents, content);
    json_object *config = object_of("responseMimeType", json_object_new_string("application/json"));
    json_object_object_add(config, "responseJsonSchema", json_tokener_parse(embed_invoice_schema));
    if (max_output_tokens > 0)
        json_object_object_add(config, "maxOutputTokens", json_object_new_int(max_output_tokens));
    json_object *root = object_of("contents", contents);
    json_object_object_add(root, "generationConfig", config);
    buf_reset(&base64);
    return root;
}

static const char *header(struct server *server, const char *name)
{
    static char value[200];
    char wanted[100];
    snprintf(wanted, sizeof wanted, "\r\n%s: ", name);
    const char *at = strcasestr(buf_str(&server->head), wanted);
    if (at == NULL)
        return "";
    at += strlen(wanted);
    snprintf(value, sizeof value, "%.*s", (int)strcspn(at, "\r"), at);
    return value;
}

static void check_request(struct fixture *f, const char *mime_type, const unsigned char *file,
                          size_t len, const char *prompt, int max_output_tokens)
{
    struct server *server = &f->server;
    pthread_mutex_lock(&server->mutex);
    json_object *sent = json_tokener_parse(buf_str(&server->body));
    json_object *expected = expected_request(mime_type, file, len, prompt, max_output_tokens);
    bool equal = json_object_equal(sent, expected) != 0;
    json_object_put(sent);
    json_object_put(expected);
    long long said = atoll(header(server, "Content-Length"));
    size_t got = server->body.len, text = strlen(buf_str(&server->body));
    pthread_mutex_unlock(&server->mutex);
    if (!equal)
        fail_msg("%s, %zu bytes: another request", mime_type, len);
    if (said != (long long)got || got != text)
        fail_msg("%s, %zu bytes: Content-Length %lld, %zu bytes, %zu of text", mime_type, len, said,
                 got, text);
}

/* Sizes round each place where pieces meet: groups of 3, the block of 48 KB, libcurl's buffers. The
 * type's length shifts all that follows. */
static void test_request_body(void **state)
{
    static const size_t sizes[] = {0,     1,     2,      3,      4,     5,     6,     7,
                                   8,     9,     10,     2999,   3000,  3001,  12287, 12288,
                                   12289, 49151, 49152,  49153,  98303, 98304, 98305, 98306,
                                   98307, 98308, 200000, 204800, 204801};
    static const char *const types[] = {"a/b", "a/bc", "image/png", "application/pdf"};
    static unsigned char file[204801];
    struct fixture *f = *state;

    for (size_t i = 0; i < sizeof file; i++)
        file[i] = (unsigned char)(i * 2654435761u >> 13);
    for (size_t i = 0; i < COUNT(sizes); i++) {
        for (size_t k = 0; k < COUNT(types); k++) {
            unsigned char *copy = malloc(sizes[i] + (sizes[i] == 0));
            struct gemini_answer answer;
            assert_non_null(copy);
            memcpy(copy, file, sizes[i]);
            call(f, types[k], copy, sizes[i], 5000, &answer);
            free(copy);
            if (answer.outcome.http_status != 200)
                fail_msg("%zu bytes: %s", sizes[i], answer.outcome.message);
            assert_true(answer.outcome.complete && answer.outcome.sent_whole);
            assert_string_equal(buf_str(&answer.text), "{}");
            assert_true(answer.duration_ms >= 0 && answer.duration_ms < 5000);
            gemini_answer_reset(&answer);
            check_request(f, types[k], file, sizes[i], embed_prompt, 0);
        }
    }
    assert_int_equal(atomic_load(&f->server.connections), 1); /* one connection serves all */
}

static void test_request_head(void **state)
{
    struct fixture *f = *state;
    struct gemini_answer answer;

    call(f, "image/png", (const unsigned char *)"x", 1, 5000, &answer);
    gemini_answer_reset(&answer);
    assert_int_equal(strncmp(buf_str(&f->server.head),
                             "POST /v1beta/models/gemini-x:generateContent HTTP/1.1\r\n", 55),
                     0);
    assert_string_equal(header(&f->server, "x-goog-api-key"), "the-key");
    assert_string_equal(header(&f->server, "Content-Type"), "application/json");
    assert_string_equal(header(&f->server, "Expect"), "");
    assert_string_equal(header(&f->server, "Authorization"), "");
    assert_string_equal(header(&f->server, "Transfer-Encoding"), "");
    assert_string_equal(header(&f->server, "traceparent"), "");
    assert_string_equal(header(&f->server, "tracestate"), "");
}

/* Each call is a span of its own in the client's trace. */
static void test_trace(void **state)
{
    static const char sent[] = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    struct fixture *f = *state;
    struct gemini_answer answer;
    struct trace trace, again;
    char first[TRACE_PARENT_SIZE];

    assert_true(trace_read(&trace, sent, "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7"));
    f->trace = &trace;
    call(f, "image/png", (const unsigned char *)"x", 1, 5000, &answer);
    gemini_answer_reset(&answer);
    snprintf(first, sizeof first, "%s", header(&f->server, "traceparent"));
    assert_true(trace_read(&again, first, NULL));
    assert_string_equal(again.id, trace.id);
    assert_int_equal(again.flags, 1);
    assert_string_not_equal(first, sent);
    assert_string_equal(header(&f->server, "tracestate"),
                        "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7");

    trace.state = NULL;
    call(f, "image/png", (const unsigned char *)"x", 1, 5000, &answer);
    gemini_answer_reset(&answer);
    assert_true(trace_read(&again, header(&f->server, "traceparent"), NULL));
    assert_string_equal(again.id, trace.id);
    assert_string_not_equal(header(&f->server, "traceparent"), first);
    assert_string_equal(header(&f->server, "tracestate"), "");

    trace_read(&trace, NULL, NULL);
    call(f, "image/png", (const unsigned char *)"x", 1, 5000, &answer);
    gemini_answer_reset(&answer);
    assert_string_equal(header(&f->server, "traceparent"), "");
    f->trace = NULL;
}

/* Neither the proxy of the environment nor a body in the way of "Expect: 100-continue". */
static void test_environment(void **state)
{
    static unsigned char file[2000000];
    struct fixture *f = *state;
    struct gemini_answer answer;

    setenv("http_proxy", "http://127.0.0.1:1", 1);
    setenv("all_proxy", "http://127.0.0.1:1", 1);
    call(f, "image/png", file, sizeof file, 5000, &answer);
    unsetenv("http_proxy");
    unsetenv("all_proxy");
    assert_int_equal(answer.outcome.http_status, 200);
    assert_string_equal(header(&f->server, "Expect"), "");
    gemini_answer_reset(&answer);
}

static void test_prompt_and_limit(void **state)
{
    static const char prompt[] = "Read \"it\":\n\tall of it \xC3\xA9\\";
    struct fixture *f = *state;
    struct gemini_answer answer;
    struct err err;
    char name[] = "/tmp/test_gemini.XXXXXX";
    int fd = mkstemp(name);

    assert_true(fd >= 0);
    close_gemini(f);
    f->config.gemini.prompt_file = name;
    assert_null(gemini_new(&f->config, f->schema, &err)); /* empty */
    assert_int_equal(err.code, ERR_CONFIG);
    assert_non_null(strstr(err.message, name));
    assert_int_equal(write(fd, prompt, sizeof prompt - 1), sizeof prompt - 1);
    close(fd);
    f->config.gemini.max_output_tokens = 4096;
    open_gemini(f);
    call(f, "image/png", (const unsigned char *)"xy", 2, 5000, &answer);
    gemini_answer_reset(&answer);
    check_request(f, "image/png", (const unsigned char *)"xy", 2, prompt, 4096);
    unlink(name);
    assert_null(gemini_new(&f->config, f->schema, &err)); /* missing */
    assert_int_equal(err.code, ERR_CONFIG);
}

/* ---- what comes back ---- */

static void test_statuses(void **state)
{
    static const struct {
        const char *line, *headers, *body;
        enum retry_class retry_class;
        int64_t hint_ms;
    } cases[] = {
        {"503 Service Unavailable", "", HTML, RETRY_TRANSIENT, -1},
        {"429 Too Many Requests", "Retry-After: 7\r\n", HTML, RETRY_RATE_LIMITED, 7000},
        {"429 Too Many Requests", "retry-after:  8 \r\n", ERROR("429", "S", "m", RETRY("2s")),
         RETRY_RATE_LIMITED, 8000},
        {"302 Found", "Location: /elsewhere\r\n", "", RETRY_REJECTED, -1},
        {"400 Bad Request", "", ERROR("400", "S", "m", REASON("API_KEY_INVALID")),
         RETRY_KEY_INVALID, -1},
        {"200 OK", "", OK_BODY, RETRY_BAD_TEXT, -1},
    };
    struct fixture *f = *state;

    for (size_t i = 0; i < COUNT(cases); i++) {
        struct gemini_answer answer;
        set_response(f, cases[i].line, cases[i].headers, cases[i].body);
        call(f, "image/png", (const unsigned char *)"x", 1, 5000, &answer);
        assert_true(answer.outcome.complete && answer.outcome.sent_whole);
        assert_int_equal(retry_classify(&answer.outcome), cases[i].retry_class);
        assert_int_equal(answer.outcome.retry_after_ms, cases[i].hint_ms);
        gemini_answer_reset(&answer);
    }
    assert_int_equal(atomic_load(&f->server.requests), COUNT(cases)); /* no redirect was followed */
}

static void test_broken_answers(void **state)
{
    static const struct {
        enum behaviour behaviour;
        bool sent_whole;
    } cases[] = {{CLOSE, true}, {CUT, true}, {HANG, true}, {FLOOD, true}, {CLOSE_EARLY, false}};
    static unsigned char file[20000000];
    struct fixture *f = *state;

    for (size_t i = 0; i < COUNT(cases); i++) {
        struct gemini_answer answer;
        int64_t begun = clock_monotonic_ms();
        int before = atomic_load(&f->server.requests);
        atomic_store(&f->server.behaviour, (int)cases[i].behaviour);
        call(f, "image/png", file, cases[i].sent_whole ? 1000 : sizeof file,
             cases[i].behaviour == HANG ? 300 : 5000, &answer);
        int64_t took = clock_monotonic_ms() - begun;
        if (answer.outcome.complete || answer.outcome.http_status != 0 ||
            answer.outcome.message[0] == '\0' || answer.outcome.sent_whole != cases[i].sent_whole)
            fail_msg("behaviour %d: complete %d, status %d, sent whole %d: %s",
                     (int)cases[i].behaviour, answer.outcome.complete, answer.outcome.http_status,
                     answer.outcome.sent_whole, answer.outcome.message);
        assert_int_equal(retry_classify(&answer.outcome), RETRY_TRANSIENT);
        assert_int_equal(retry_unknown_call(&answer.outcome), cases[i].sent_whole);
        if (cases[i].behaviour == HANG)
            assert_in_range(took, 290, 2000);
        assert_int_equal(atomic_load(&f->server.requests), before + 1);
        gemini_answer_reset(&answer);
    }
    /* and the client is as good as before */
    struct gemini_answer answer;
    atomic_store(&f->server.behaviour, ANSWER);
    call(f, "image/png", file, 10, 5000, &answer);
    assert_int_equal(answer.outcome.http_status, 200);
    gemini_answer_reset(&answer);
}

/* A kept connection that dies under a request that was sent whole: an error, not a second copy. */
static void test_no_silent_second_copy(void **state)
{
    static unsigned char file[100000];
    struct fixture *f = *state;
    struct gemini_answer answer;

    atomic_store(&f->server.behaviour, CLOSE_ON_REUSE);
    call(f, "image/png", file, sizeof file, 5000, &answer);
    assert_int_equal(answer.outcome.http_status, 200);
    gemini_answer_reset(&answer);
    assert_int_equal(atomic_load(&f->server.requests), 1);
    call(f, "image/png", file, sizeof file, 5000, &answer);
    assert_false(answer.outcome.complete);
    assert_true(answer.outcome.sent_whole);
    assert_true(retry_unknown_call(&answer.outcome));
    gemini_answer_reset(&answer);
    close_gemini(f);
    stop_server(&f->server); /* now it has seen all that was sent */
    assert_int_equal(atomic_load(&f->server.begun), 2);
    assert_int_equal(atomic_load(&f->server.requests), 2);
    start_server(&f->server); /* for the tear-down */
}

static void test_nobody_there(void **state)
{
    struct fixture *f = *state;
    struct gemini_answer answer;

    close_gemini(f);
    stop_server(&f->server);
    open_gemini(f);
    call(f, "image/png", (const unsigned char *)"x", 1, 5000, &answer);
    assert_false(answer.outcome.complete);
    assert_false(answer.outcome.sent_whole);
    assert_int_equal(answer.outcome.retry_after_ms, -1);
    assert_true(answer.outcome.message[0] != '\0');
    assert_null(strstr(answer.outcome.message, "the-key"));
    gemini_answer_reset(&answer);
    start_server(&f->server); /* for the tear-down */
}

static void test_probe(void **state)
{
    struct fixture *f = *state;
    struct err err;
    char detail[200];

    set_response(f, "403 Forbidden", "", HTML);
    assert_int_equal(gemini_probe(&f->config, detail, sizeof detail, &err), ERR_NONE);
    assert_non_null(strstr(detail, "403"));
    assert_int_equal(
        strncmp(buf_str(&f->server.head), "GET /v1beta/models/gemini-x HTTP/1.1\r\n", 37), 0);
    assert_string_equal(header(&f->server, "x-goog-api-key"), "");
    atomic_store(&f->server.behaviour, CLOSE);
    assert_int_equal(gemini_probe(&f->config, detail, sizeof detail, &err),
                     ERR_UPSTREAM_UNAVAILABLE);
    assert_int_equal(err.code, ERR_UPSTREAM_UNAVAILABLE);
}

#define WITH_SERVER(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_answers),
        cmocka_unit_test(test_hints_of_zero),
        cmocka_unit_test(test_hints_that_c_reads),
        cmocka_unit_test(test_retry_after_date),
        cmocka_unit_test(test_fields_of_an_answer),
        cmocka_unit_test(test_usage_of_a_blocked_answer),
        cmocka_unit_test(test_cut_anywhere),
        cmocka_unit_test(test_nesting),
        cmocka_unit_test(test_long_fields),
        cmocka_unit_test(test_usage),
        cmocka_unit_test(test_usage_add),
        WITH_SERVER(test_request_body),
        WITH_SERVER(test_request_head),
        WITH_SERVER(test_trace),
        WITH_SERVER(test_environment),
        WITH_SERVER(test_prompt_and_limit),
        WITH_SERVER(test_statuses),
        WITH_SERVER(test_broken_answers),
        WITH_SERVER(test_no_silent_second_copy),
        WITH_SERVER(test_nobody_there),
        WITH_SERVER(test_probe),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
