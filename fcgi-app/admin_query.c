/* admin_query.c - what a GET /admin/… asks for. See admin_query.h. */
#include "admin_query.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "clock.h"
#include "text.h"

#define SKIP_MAX 1000000
#define TEXT_MAX (STORE_TEXT_SIZE - 1)
#define REQUEST_ID_MAX 64
#define QUERY_MAX 4096 /* bytes; nginx's headers may be longer */

/* ---- what can be asked for ---- */

enum { OF_COMPANY = 1, OF_TIME = 2, OF_REQUEST = 4, OF_ALL = 7 }; /* struct admin_view, takes */

#define USAGE(name, store_view, ...)                                                 \
    {                                                                                \
        .path = "/admin/usage", .by = (name), .view = (store_view), .takes = OF_ALL, \
        .file_name = "usage.csv", .columns = {                                       \
            __VA_ARGS__,                                                             \
            "Requests",                                                              \
            "RequestCount",                                                          \
            "InputTokens",                                                           \
            "OutputTokens",                                                          \
            "TextPromptTokens",                                                      \
            "ImagePromptTokens",                                                     \
            "TextCandidatesTokens",                                                  \
            "ThoughtsTokens",                                                        \
            "CachedTokens",                                                          \
            "TotalTokensUsed",                                                       \
            "UnknownCalls"                                                           \
        }                                                                            \
    }

/* A path's first row is what it shows unless `by` says otherwise. A new column is a name here, where the
 * view has it; a new path also a row of route.c. */
static const struct admin_view views[] = {
    {.path = "/admin/tokens",
     .by = "token",
     .view = VIEW_TOKENS,
     .takes = OF_COMPANY | OF_TIME,
     .id = "TokenID",
     .file_name = "tokens.csv",
     .columns = {"TokenID", "CompanyID", "CompanyName", "Provider", "ApiKey", "Status",
                 "StatusReason", "TotalTokenLimit", "TotalUsedTokens", "TotalRemainingTokens",
                 "ReservedTokens", "Threshold", "ThresholdCrossedAt", "CooldownUntil", "CreatedAt",
                 "UpdatedAt", "LastUpdated"}},
    {.path = "/admin/tokens",
     .by = "status",
     .view = VIEW_TOKENS_BY_STATUS,
     .takes = OF_COMPANY,
     .file_name = "tokens.csv",
     .columns = {"Status", "Count", "Unlimited", "TotalTokenLimit", "TotalUsedTokens",
                 "TotalRemainingTokens", "ReservedTokens", "OverThreshold", "Cooling"}},
    USAGE("day", VIEW_USAGE_BY_DAY, "Day"),
    USAGE("company", VIEW_USAGE_BY_COMPANY, "CompanyID"),
    USAGE("branch", VIEW_USAGE_BY_BRANCH, "CompanyID", "Branch"),
    USAGE("user", VIEW_USAGE_BY_USER, "CompanyID", "RequestedBy"),
    USAGE("token", VIEW_USAGE_BY_TOKEN, "CompanyID", "TokenID", "TokenSource"),
    {.path = "/admin/errors",
     .view = VIEW_ERRORS,
     .takes = OF_ALL,
     .id = "LogID",
     .file_name = "errors.csv",
     .columns = {"LogID", "Timestamp", "LogLevel", "Logger", "Message", "Exception", "Module",
                 "FunctionName", "LineNumber", "RequestID", "Host", "TraceID"}},
    {.path = "/admin/retries",
     .view = VIEW_RETRIES,
     .takes = OF_ALL,
     .id = "RetryID",
     .file_name = "retries.csv",
     .columns = {"RetryID", "TokenID", "CompanyID", "Attempt", "ErrorMessage", "IsRetryable",
                 "Timestamp", "RequestID", "StatusCode", "DelayMs"}},
    {.path = "/admin/unsettled",
     .view = VIEW_UNSETTLED,
     .takes = OF_ALL,
     .id = "ReservationID",
     .file_name = "unsettled.csv",
     .columns = {"ReservationID", "RequestID", "Sequence", "TokenID", "CompanyID", "Branch",
                 "RequestedBy", "EstimatedTokens", "State", "UnknownCalls", "TokenSource", "Host",
                 "ProcessID", "CreatedAt", "ExpiresAt"}},
    {.path = "/admin/outbox",
     .by = "entry",
     .view = VIEW_OUTBOX,
     .takes = OF_ALL,
     .file_name = "outbox.csv",
     .columns = {"State", "Kind", "RequestID", "TokenID", "CompanyID", "Branch", "RequestedBy",
                 "TotalTokensUsed", "CreatedAt", "Attempts", "LastError"}},
    {.path = "/admin/outbox",
     .by = "state",
     .view = VIEW_OUTBOX_BY_STATE,
     .file_name = "outbox.csv",
     .columns = {"State", "Count", "OldestSeconds", "Host"}},
};

#define VIEW_COUNT (sizeof views / sizeof views[0])

/* by NULL: the path's first. NULL: the path has no such. */
static const struct admin_view *find_view(const char *path, const char *by)
{
    for (size_t i = 0; i < VIEW_COUNT; i++)
        if (strcmp(views[i].path, path) == 0 &&
            (by == NULL || (views[i].by != NULL && strcmp(views[i].by, by) == 0)))
            return &views[i];
    return NULL;
}

/* ---- the URL's parameters ---- */

/* The filters first. */
enum { SINCE, UNTIL, COMPANY, REQUEST_ID, BY, LIMIT, CURSOR, FORMAT, PARAMETERS };

static const char *const names[PARAMETERS] = {"since", "until", "company", "request_id",
                                              "by",    "limit", "cursor",  "format"};

/* -1: it is none. */
static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* application/x-www-form-urlencoded. NULL: a % without its two digits, or a byte 0. */
static char *decode(struct arena *arena, const char *text, size_t len)
{
    char *out = arena_strndup(arena, text, len), *to = out;

    for (size_t i = 0; i < len; i++) {
        char c = text[i];
        if (c == '+') {
            c = ' ';
        } else if (c == '%') {
            int high = i + 2 < len ? hex_digit(text[i + 1]) : -1;
            int low = i + 2 < len ? hex_digit(text[i + 2]) : -1;
            if (high < 0 || low < 0 || high + low == 0)
                return NULL;
            c = (char)(high << 4 | low);
            i += 2;
        }
        *to++ = c;
    }
    *to = '\0';
    return out;
}

static enum err_code unknown_parameter(const char *name, struct err *err)
{
    struct buf shown;

    buf_init(&shown, 256);
    text_escape(&shown, name, strnlen(name, 40));
    err_set(err, ERR_BAD_REQUEST,
            "%s is not a parameter: use since, until, company, request_id, by, limit, cursor or "
            "format.",
            buf_str(&shown));
    buf_reset(&shown);
    return ERR_BAD_REQUEST;
}

static enum err_code take_parameter(struct arena *arena, const char *text, size_t len,
                                    const char *values[PARAMETERS], struct err *err)
{
    size_t name_len = strcspn(text, "=&") < len ? strcspn(text, "=&") : len;
    size_t value_at = name_len < len ? name_len + 1 : len;
    const char *name = decode(arena, text, name_len);
    const char *value = decode(arena, text + value_at, len - value_at);
    int which = 0;

    if (name == NULL || value == NULL)
        return err_set(err, ERR_BAD_REQUEST,
                       "the query has a %% that two hexadecimal digits must follow, not 00: "
                       "write a %% itself as %%25.");
    while (which < PARAMETERS && strcmp(names[which], name) != 0)
        which++;
    if (which == PARAMETERS)
        return unknown_parameter(name, err);
    if (values[which] != NULL)
        return err_set(err, ERR_BAD_REQUEST, "%s is given twice: leave one out.", names[which]);
    values[which] = value;
    return ERR_NONE;
}

/* An empty value is none, as a form sends it. */
static enum err_code split(struct arena *arena, const char *query, const char *values[PARAMETERS],
                           struct err *err)
{
    if (strnlen(query, QUERY_MAX + 1) > QUERY_MAX)
        return err_set(err, ERR_BAD_REQUEST, "the query must have at most %d bytes.", QUERY_MAX);
    while (*query != '\0') {
        size_t len = strcspn(query, "&");
        if (len > 0 && take_parameter(arena, query, len, values, err) != ERR_NONE)
            return err->code;
        query += len + (query[len] == '&');
    }
    for (size_t i = 0; i < PARAMETERS; i++)
        if (values[i] != NULL && values[i][0] == '\0')
            values[i] = NULL;
    return ERR_NONE;
}

/* ---- what they say ---- */

static enum err_code choose_view(const char *path, const char *by, struct admin_query *out,
                                 struct err *err)
{
    char choices[80] = "";

    out->view = find_view(path, by);
    if (out->view != NULL)
        return ERR_NONE;
    for (size_t i = 0, n = 0; i < VIEW_COUNT; i++)
        if (views[i].by != NULL && strcmp(views[i].path, path) == 0)
            n += (size_t)snprintf(choices + n, sizeof choices - n, "%s%s", n > 0 ? ", " : "",
                                  views[i].by);
    if (choices[0] == '\0')
        return err_set(err, ERR_BAD_REQUEST, "by is not a parameter of %s: leave it out.", path);
    return err_set(err, ERR_BAD_REQUEST, "by must be one of: %s.", choices);
}

static enum err_code read_time(const char *name, const char *text, int64_t *wall_ms,
                               struct err *err)
{
    if (text == NULL || clock_parse(text, wall_ms))
        return ERR_NONE;
    return err_set(err, ERR_BAD_REQUEST,
                   "%s must be a time like " CLOCK_TIMES ", in UTC unless it says otherwise "
                   "(+02:00 is %%2B02:00 in a URL).",
                   name);
}

static enum err_code read_text(const char *name, const char *text, size_t max, const char **out,
                               struct err *err)
{
    const char *fault = text == NULL ? NULL : text_fault(text, strlen(text), 1, max);

    *out = text;
    return fault == NULL ? ERR_NONE
                         : err_set(err, ERR_BAD_REQUEST,
                                   "%s %s: it is UTF-8 text of 1 to %zu bytes.", name, fault, max);
}

static enum err_code read_filter(const char *const values[PARAMETERS], struct admin_query *out,
                                 struct err *err)
{
    const unsigned wanted[] = {
        [SINCE] = OF_TIME, [UNTIL] = OF_TIME, [COMPANY] = OF_COMPANY, [REQUEST_ID] = OF_REQUEST};
    const struct admin_view *view = out->view;

    for (size_t i = SINCE; i <= REQUEST_ID; i++)
        if (values[i] != NULL && (view->takes & wanted[i]) == 0)
            return err_set(err, ERR_BAD_REQUEST, "%s does not go with %s%s%s: leave it out.",
                           names[i], view->path, view->by != NULL ? " by " : "",
                           view->by != NULL ? view->by : "");
    if (read_time("since", values[SINCE], &out->filter.since_ms, err) != ERR_NONE ||
        read_time("until", values[UNTIL], &out->filter.until_ms, err) != ERR_NONE ||
        read_text("company", values[COMPANY], TEXT_MAX, &out->filter.company_id, err) != ERR_NONE)
        return err->code;
    return read_text("request_id", values[REQUEST_ID], REQUEST_ID_MAX, &out->filter.request_id,
                     err);
}

static enum err_code read_limit(const char *text, struct admin_query *out, struct err *err)
{
    size_t digits = text == NULL ? 0 : strspn(text, "0123456789");
    long n = text == NULL ? ADMIN_LIMIT_DEFAULT : strtol(text, NULL, 10);

    if (text != NULL && (digits == 0 || digits > 4 || text[digits] != '\0'))
        n = 0;
    if (n < 1 || n > ADMIN_LIMIT_MAX)
        return err_set(err, ERR_BAD_REQUEST,
                       "limit must be a whole number from 1 to %d: more rows are on the next page "
                       "(cursor).",
                       ADMIN_LIMIT_MAX);
    out->limit = (int)n;
    return ERR_NONE;
}

/* The weight (RFC 9110 section 12.4.2) of a range in an Accept header, in thousandths. */
static int weight(const char *range, size_t len)
{
    static const int place[] = {100, 10, 1};
    const char *q = memmem(range, len, "q=", 2);
    int n = 0;

    if (q == NULL || q[2] != '0')
        return 1000;
    for (size_t i = 0; i < 3 && q[3] == '.' && q[4 + i] >= '0' && q[4 + i] <= '9'; i++)
        n += place[i] * (q[4 + i] - '0');
    return n;
}

/* How much a type is wanted; 0 where the header does not name it. */
static int preference(const char *accept, const char *type)
{
    while (*accept != '\0') {
        accept += strspn(accept, " \t,");
        size_t len = strcspn(accept, ","), own = strcspn(accept, " \t;,");
        if (own == strlen(type) && strncasecmp(accept, type, own) == 0)
            return weight(accept + own, len - own);
        accept += len;
    }
    return 0;
}

static enum err_code read_format(const char *format, const char *accept, struct admin_query *out,
                                 struct err *err)
{
    if (format != NULL && strcmp(format, "csv") != 0 && strcmp(format, "json") != 0)
        return err_set(err, ERR_BAD_REQUEST, "format must be json or csv.");
    out->csv = format != NULL
                   ? strcmp(format, "csv") == 0
                   : preference(accept, "text/csv") > preference(accept, "application/json");
    return ERR_NONE;
}

/* ---- cursors: fingerprint, position, since, until; each in hexadecimal ---- */

/* FNV-1a. */
static uint32_t add_text(uint32_t hash, const char *text)
{
    if (text == NULL)
        text = "";
    for (size_t i = 0; i == 0 || text[i - 1] != '\0'; i++) /* with its NUL */
        hash = (hash ^ (unsigned char)text[i]) * 16777619U;
    return hash;
}

static uint32_t fingerprint(const struct admin_view *view, const char *const values[PARAMETERS])
{
    uint32_t hash = add_text(2166136261U, view->path);

    hash = add_text(hash, view->by);
    for (int i = SINCE; i <= REQUEST_ID; i++)
        hash = add_text(hash, values[i]);
    return hash;
}

static int64_t read_hex(const char *at, size_t digits)
{
    uint64_t n = 0;

    for (size_t i = 0; i < digits; i++)
        n = n << 4 | (unsigned)hex_digit(at[i]);
    return n > INT64_MAX ? -1 : (int64_t)n;
}

static bool read_cursor(const char *text, struct admin_query *out)
{
    if (strlen(text) != ADMIN_CURSOR_SIZE - 1 ||
        strspn(text, "0123456789abcdef") != ADMIN_CURSOR_SIZE - 1)
        return false;
    int64_t position = read_hex(text + 8, 16);
    int64_t since_ms = read_hex(text + 24, 16);
    int64_t until_ms = read_hex(text + 40, 16);
    if (read_hex(text, 8) != out->fingerprint || position < 1 || since_ms < 0 ||
        since_ms > CLOCK_WALL_MAX || until_ms < 0 || until_ms > CLOCK_WALL_MAX)
        return false;
    out->filter.since_ms = since_ms;
    out->filter.until_ms = until_ms;
    if (out->view->id != NULL)
        out->filter.before_id = position;
    else
        out->skip = position;
    return out->skip <= SKIP_MAX;
}

void admin_query_next(const struct admin_query *query, int64_t rows, int64_t last_id,
                      char out[ADMIN_CURSOR_SIZE])
{
    bool counted = query->view->id == NULL;
    int64_t until_ms = query->filter.until_ms;

    if (counted && until_ms == 0 && (query->view->takes & OF_TIME) != 0)
        until_ms = clock_wall_ms(); /* what comes from now on must not move the others */
    snprintf(out, ADMIN_CURSOR_SIZE, "%08x%016llx%016llx%016llx", query->fingerprint,
             (unsigned long long)(counted ? query->skip + rows : last_id),
             (unsigned long long)query->filter.since_ms, (unsigned long long)until_ms);
}

/* ---- all of it ---- */

enum err_code admin_query_parse(struct arena *arena, const char *path, const char *query,
                                const char *accept, struct admin_query *out, struct err *err)
{
    const char *values[PARAMETERS] = {NULL};

    *out = (struct admin_query){.view = NULL};
    if (split(arena, query, values, err) != ERR_NONE ||
        choose_view(path, values[BY], out, err) != ERR_NONE ||
        read_filter(values, out, err) != ERR_NONE ||
        read_limit(values[LIMIT], out, err) != ERR_NONE ||
        read_format(values[FORMAT], accept, out, err) != ERR_NONE)
        return err->code;
    out->fingerprint = fingerprint(out->view, values);
    if (values[CURSOR] != NULL && !read_cursor(values[CURSOR], out))
        return err_set(err, ERR_BAD_REQUEST,
                       "cursor is none that this query has given (but for limit and format all "
                       "parameters must stay): begin again without it.");
    return ERR_NONE;
}
