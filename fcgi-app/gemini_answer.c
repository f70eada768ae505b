/* gemini_answer.c - what Gemini answers: Google's JSON, or whatever came instead. See gemini.h. */
#include "gemini.h"

#include <curl/curl.h> /* curl_getdate */
#include <json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistr.h>

#include "clock.h"

void gemini_answer_init(struct gemini_answer *answer)
{
    *answer = (struct gemini_answer){.outcome.retry_after_ms = -1};
    buf_init(&answer->text, GEMINI_ANSWER_MAX);
}

void gemini_answer_reset(struct gemini_answer *answer)
{
    buf_reset(&answer->text);
    gemini_answer_init(answer);
}

/* The member of a JSON object, where it has the type; else NULL. */
static json_object *member(json_object *object, const char *name, json_type type)
{
    json_object *value = NULL;

    if (!json_object_is_type(object, json_type_object) ||
        !json_object_object_get_ex(object, name, &value) || !json_object_is_type(value, type))
        return NULL;
    return value;
}

static const char *string_member(json_object *object, const char *name)
{
    json_object *value = member(object, name, json_type_string);
    return value == NULL ? "" : json_object_get_string(value);
}

/* What is not UTF-8, a character that was cut at the end too, becomes question marks. */
static void make_valid(char *s)
{
    ucs4_t c;
    int n;

    for (size_t len = strlen(s); len > 0; s += n, len -= (size_t)n)
        if ((n = u8_mbtoucr(&c, (const uint8_t *)s, len)) <= 0) {
            *s = '?';
            n = 1;
        }
}

static void copy(char *out, size_t size, const char *s)
{
    snprintf(out, size, "%s", s);
    make_valid(out);
}

/* Decimal seconds that end with suffix, as milliseconds rounded up; -1 for anything else (strtod
 * alone would also take signs, hexadecimal and "inf"). */
static int64_t parse_seconds_ms(const char *s, const char *suffix)
{
    size_t n = strspn(s, "0123456789.");

    if (n == 0 || s[0] == '.' || strcmp(s + n, suffix) != 0)
        return -1;
    char *end;
    double seconds = strtod(s, &end);
    if (end != s + n)
        return -1;
    return seconds > RETRY_MAX_HINT_MS / 1000.0 ? RETRY_MAX_HINT_MS
                                                : (int64_t)(seconds * 1000 + 0.999);
}

/* A Retry-After header: seconds or an HTTP date (RFC 9110 section 10.2.3); -1 without one. */
static int64_t parse_retry_after_ms(const char *value)
{
    if (value == NULL)
        return -1;
    int64_t ms = parse_seconds_ms(value, "");
    if (ms >= 0)
        return ms;
    int64_t date = curl_getdate(value, NULL), now_ms = clock_wall_ms();
    if (date == -1)
        return -1;
    if (date > (now_ms + RETRY_MAX_HINT_MS) / 1000) /* in the year 300000000, too */
        return RETRY_MAX_HINT_MS;
    ms = date * 1000 - now_ms;
    return ms < 0 ? 0 : ms;
}

/* One of an error's details (google.rpc.ErrorInfo, RetryInfo, QuotaFailure). */
static void read_detail(struct retry_outcome *o, json_object *detail)
{
    const char *type = string_member(detail, "@type");
    const char *name = strrchr(type, '.');

    name = name == NULL ? type : name + 1;
    if (strcmp(name, "ErrorInfo") == 0 && o->reason[0] == '\0') {
        copy(o->reason, sizeof o->reason, string_member(detail, "reason"));
    } else if (strcmp(name, "RetryInfo") == 0) {
        int64_t ms = parse_seconds_ms(string_member(detail, "retryDelay"), "s");
        if (ms > o->retry_after_ms)
            o->retry_after_ms = ms;
    } else if (strcmp(name, "QuotaFailure") == 0) {
        json_object *violations = member(detail, "violations", json_type_array);
        size_t n = violations == NULL ? 0 : json_object_array_length(violations);
        for (size_t i = 0; i < n; i++) {
            json_object *violation = json_object_array_get_idx(violations, i);
            if (strcasestr(string_member(violation, "quotaId"), "PerDay") != NULL)
                o->daily_quota = true;
        }
    }
}

/* Google's error, {"error":{…}}, sometimes in an array of one. False where it is not one. */
static bool read_error(struct retry_outcome *o, json_object *root)
{
    if (json_object_is_type(root, json_type_array))
        root = json_object_array_get_idx(root, 0);
    json_object *error = member(root, "error", json_type_object);
    if (error == NULL)
        return false;
    o->google_error = true;
    copy(o->status, sizeof o->status, string_member(error, "status"));
    json_object *details = member(error, "details", json_type_array);
    size_t n = details == NULL ? 0 : json_object_array_length(details);
    for (size_t i = 0; i < n; i++)
        read_detail(o, json_object_array_get_idx(details, i));
    snprintf(o->message, sizeof o->message, "HTTP %d %s%s%s: %s", o->http_status, o->status,
             o->reason[0] != '\0' ? " " : "", o->reason, string_member(error, "message"));
    return true;
}

/* The text parts of the first candidate, joined; thoughts are not part of the answer. */
static void read_text(struct buf *text, json_object *candidate)
{
    json_object *content = member(candidate, "content", json_type_object);
    json_object *parts = content == NULL ? NULL : member(content, "parts", json_type_array);
    size_t n = parts == NULL ? 0 : json_object_array_length(parts);

    for (size_t i = 0; i < n; i++) {
        json_object *part = json_object_array_get_idx(parts, i);
        json_object *thought = member(part, "thought", json_type_boolean);
        json_object *words = member(part, "text", json_type_string);
        if (words != NULL && (thought == NULL || !json_object_get_boolean(thought)))
            buf_append(text, json_object_get_string(words),
                       (size_t)json_object_get_string_len(words));
    }
}

/* A 200's body. */
static void read_candidate(struct gemini_answer *answer, json_object *root)
{
    struct retry_outcome *o = &answer->outcome;
    json_object *usage = member(root, "usageMetadata", json_type_object);
    json_object *feedback = member(root, "promptFeedback", json_type_object);
    json_object *candidates = member(root, "candidates", json_type_array);
    json_object *first = candidates == NULL ? NULL : json_object_array_get_idx(candidates, 0);
    const char *block = feedback == NULL ? "" : string_member(feedback, "blockReason");

    o->understood = usage != NULL || feedback != NULL || candidates != NULL;
    if (!o->understood) {
        copy(o->message, sizeof o->message, "HTTP 200: not an answer of generateContent");
        return;
    }
    answer->has_usage = usage != NULL;
    usage_parse(&answer->usage, usage);
    copy(answer->model, sizeof answer->model, string_member(root, "modelVersion"));
    if (first != NULL) {
        copy(answer->finish_reason, sizeof answer->finish_reason,
             string_member(first, "finishReason"));
        read_text(&answer->text, first);
    }
    if (block[0] != '\0')
        snprintf(o->message, sizeof o->message, "HTTP 200: the prompt was blocked: %s", block);
    else if (first == NULL)
        copy(o->message, sizeof o->message, "HTTP 200: no candidate");
    else if (strcmp(answer->finish_reason, "STOP") != 0)
        snprintf(o->message, sizeof o->message, "HTTP 200: finishReason %s",
                 answer->finish_reason[0] == '\0' ? "missing" : answer->finish_reason);
    else if (answer->text.len == 0)
        copy(o->message, sizeof o->message, "HTTP 200: no text");
    else
        return;
    o->blocked = true;
}

void gemini_read_answer(struct gemini_answer *answer, int http_status, const char *retry_after,
                        const char *body, size_t len)
{
    struct retry_outcome *o = &answer->outcome;
    json_object *root = NULL;
    json_tokener *tokener = json_tokener_new_ex(64);

    o->complete = true;
    o->http_status = http_status;
    o->retry_after_ms = parse_retry_after_ms(retry_after);
    snprintf(o->message, sizeof o->message, "HTTP %d, and no JSON that tells more", http_status);
    if (tokener != NULL && len > 0 && len <= GEMINI_ANSWER_MAX) {
        json_tokener_set_flags(tokener, JSON_TOKENER_STRICT);
        root = json_tokener_parse_ex(tokener, body, (int)len);
    }
    if (root != NULL && http_status == 200)
        read_candidate(answer, root);
    else if (root != NULL)
        read_error(o, root);
    make_valid(o->message);
    json_object_put(root);
    json_tokener_free(tokener);
}
