/* store_mssql_request.c - acquire and settle on SQL Server: a batch is one JSON array to one
 * procedure, one transaction, one row back for each item. See store_mssql.h, and struct store_acquire
 * and struct store_settlement in store.h.
 *
 * The procedures decide everything; here, items become JSON and rows become outcomes. An item that is
 * refused here is not sent; "i", its place in the caller's array, finds it again. */
#include "store_mssql.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "log.h"

#define ITEMS_MAX ((size_t)16 * 1024 * 1024)
#define CHOICE_MASK ((UINT64_C(1) << 62) - 1)
#define MODEL_MAX 256

/* ---- JSON ---- */

/* Adds ,"name":"text", cut between characters so that it has at most max bytes. */
static void add_cut(struct buf *json, const char *name, const char *text, size_t max)
{
    buf_printf(json, ",\"%s\":", name);
    buf_append_json(json, text, store_text_cut(text, max));
}

static void add_text(struct buf *json, const char *name, const char *text)
{
    add_cut(json, name, text, SIZE_MAX - 1);
}

static void add_int(struct buf *json, const char *name, int64_t n)
{
    buf_printf(json, ",\"%s\":%lld", name, (long long)n);
}

static void begin_item(struct buf *json, size_t i)
{
    buf_printf(json, "%s{\"i\":%zu", json->len == 0 ? "[" : ",\n", i);
}

static void add_fault(struct buf *json, const struct store_token_fault *fault)
{
    static const char *const names[] = {
        [STORE_FAULT_NONE] = "none",
        [STORE_FAULT_COOLDOWN] = "cooldown",
        [STORE_FAULT_DISABLE] = "disable",
        [STORE_FAULT_EXCEED] = "exceed",
    };
    bool has_reason = fault->reason != NULL && fault->reason[0] != '\0';

    add_text(json, "fault", names[fault->fault]);
    add_int(json, "cooldownMs", fault->cooldown_ms);
    add_cut(json, "reason", has_reason ? fault->reason : "no reason given", STORE_REASON_MAX);
}

/* The process that an open reservation belongs to. */
static void end_item(struct buf *json)
{
    add_text(json, "host", log_host());
    add_int(json, "processId", getpid());
    buf_append_char(json, '}');
}

/* ---- batches ---- */

/* What is sent as a batch. */
struct kind {
    const char *procedure;
    /* Appends item i; or does not, where it is refused already. */
    void (*add)(struct buf *json, const void *items, size_t i);
    store_row *take; /* a row about an item; its context is a struct sent */
};

struct sent {
    const void *items;
    size_t count;
};

/* Which item is the row about? False: about none. */
static bool find_item(const struct sent *sent, const struct store_value *values, size_t columns,
                      size_t *i)
{
    int64_t number = columns > 0 && values[0].type == STORE_INTEGER ? values[0].integer : -1;

    *i = (size_t)number;
    return number >= 0 && *i < sent->count;
}

/* Code and Message of a row. */
static enum err_code read_code(const struct store_value *values, size_t columns, struct err *err)
{
    const char *code = mssql_column_text(values, columns, 1);
    const char *message = mssql_column_text(values, columns, 2);

    *err = (struct err){.message = ""};
    if (code != NULL && strcmp(code, "ok") == 0)
        return ERR_NONE;
    return err_set(err,
                   code != NULL && strcmp(code, "bad_value") == 0 ? ERR_BAD_VALUE : ERR_INTERNAL,
                   "%s", message != NULL ? message : "the procedure gives no outcome");
}

/* The outcome of an item until a row tells it. */
static enum err_code expect_row(struct err *err)
{
    return err_set(err, ERR_INTERNAL, "the procedure has left this item out");
}

/* *perhaps_happened: it failed, and may have happened all the same. */
static enum err_code send_batch(struct store_mssql *store, const struct kind *kind,
                                const void *items, size_t count, bool *perhaps_happened,
                                struct err *err)
{
    struct sent sent = {items, count};
    struct buf json;
    enum err_code code = ERR_NONE;

    *perhaps_happened = false;
    buf_init(&json, ITEMS_MAX);
    for (size_t i = 0; i < count; i++)
        kind->add(&json, items, i);
    buf_append_char(&json, ']');
    if (!buf_ok(&json)) {
        code = err_set(err, ERR_INTERNAL, "a batch is too large");
    } else {
        const struct mssql_call call = {.procedure = kind->procedure,
                                        .row = kind->take,
                                        .context = &sent,
                                        .perhaps_happened = perhaps_happened,
                                        MSSQL_PARAMS(mssql_text("@Items", buf_str(&json)))};
        code = mssql_call(store, &call, err);
    }
    buf_reset(&json);
    return code;
}

/* ---- acquire ---- */

static void add_acquire(struct buf *json, const void *items, size_t i)
{
    struct store_acquire *a = ((struct store_acquire *const *)items)[i];

    if (a->code != ERR_NONE)
        return;
    a->code = expect_row(&a->err);
    begin_item(json, i);
    add_text(json, "requestId", a->request_id);
    add_int(json, "sequence", a->sequence);
    add_text(json, "companyId", a->company_id);
    add_text(json, "branch", a->branch);
    add_text(json, "requestedBy", a->requested_by);
    add_int(json, "estimate", a->estimate_tokens);
    add_int(json, "expiresMs", a->expires_ms);
    add_int(json, "choice", (int64_t)(a->choice & CHOICE_MASK));
    add_int(json, "previousTokenId", a->previous_token_id);
    add_fault(json, &a->previous);
    add_int(json, "previousSpent", a->previous_spent);
    add_int(json, "fallbackIfNone", a->fallback_if_none);
    add_int(json, "fallbackOnly", a->fallback_only);
    add_text(json, "idempotencyKey", a->idempotency_key);
    buf_append_str(json, ",\"excluded\":[");
    for (size_t n = 0; n < a->excluded_count; n++)
        buf_printf(json, "%s{\"t\":%lld,\"f\":%d}", n > 0 ? "," : "",
                   (long long)a->excluded[n].token_id, a->excluded[n].at_fault);
    buf_append_char(json, ']');
    end_item(json);
}

static bool read_grant(const char *word, enum store_grant *grant)
{
    static const char *const words[] = {
        [GRANT_TOKEN] = "token",         [GRANT_NO_TOKEN] = "no_token",
        [GRANT_EXPIRED] = "expired",     [GRANT_UNAVAILABLE] = "unavailable",
        [GRANT_COOLING] = "cooling",     [GRANT_BUSY] = "busy",
        [GRANT_DUPLICATE] = "duplicate",
    };

    for (size_t i = 0; word != NULL && i < sizeof words / sizeof words[0]; i++) {
        if (strcmp(word, words[i]) == 0) {
            *grant = (enum store_grant)i;
            return true;
        }
    }
    return false;
}

/* Copies a text that must fit with its NUL. NULL is "". */
static bool copy_text(char *out, size_t size, const char *text)
{
    size_t len = text == NULL ? 0 : strlen(text);

    if (len >= size)
        return false;
    if (len > 0)
        memcpy(out, text, len);
    out[len] = '\0';
    return true;
}

/* i, Code, Message, Grant, TokenID, ApiKey, CompanyID, FirstUsableMs, BusyToo, DisablingStopped,
 * FirstRequestID, FirstIsDone */
static enum err_code read_acquired(struct store_acquire *a, const struct store_value *values,
                                   size_t columns, struct err *err)
{
    const char *api_key = mssql_column_text(values, columns, 5);
    const char *first = mssql_column_text(values, columns, 10);

    if (read_code(values, columns, err) != ERR_NONE)
        return err->code;
    if (!read_grant(mssql_column_text(values, columns, 3), &a->grant))
        return err_set(err, ERR_INTERNAL, "the procedure gives an unknown outcome");
    a->token_id = mssql_column_int(values, columns, 4);
    a->first_usable_ms = mssql_column_int(values, columns, 7);
    a->busy_too = mssql_column_int(values, columns, 8) != 0;
    a->disabling_stopped = mssql_column_int(values, columns, 9) != 0;
    snprintf(a->first_request_id, sizeof a->first_request_id, "%s", first != NULL ? first : "");
    a->first_is_done = mssql_column_int(values, columns, 11) != 0;
    if (!copy_text(a->company_id_stored, sizeof a->company_id_stored,
                   mssql_column_text(values, columns, 6)) ||
        !copy_text(a->api_key, sizeof a->api_key, api_key) ||
        (a->grant == GRANT_TOKEN && a->token_id != 0 && a->api_key[0] == '\0'))
        return err_set(err, ERR_BAD_VALUE, "token %lld has no usable CompanyID or ApiKey",
                       (long long)a->token_id);
    return ERR_NONE;
}

static bool take_acquired(void *context, size_t columns, const char *const *names,
                          const struct store_value *values)
{
    const struct sent *sent = context;
    struct store_acquire *a;
    size_t i;

    (void)names;
    if (!find_item(sent, values, columns, &i))
        return true;
    a = ((struct store_acquire *const *)sent->items)[i];
    store_clear_acquire(a);
    a->code = read_acquired(a, values, columns, &a->err);
    if (a->code != ERR_NONE)
        store_clear_acquire(a);
    return true;
}

enum err_code mssql_acquire(void *self, struct store_acquire *const *items, size_t count,
                            struct err *err)
{
    static const struct kind acquires = {"dbo.usp_AcquireTokens", add_acquire, take_acquired};
    bool perhaps_happened = false;
    enum err_code code = ERR_NONE;

    if (store_admit_acquires(items, count) > 0)
        code = send_batch(self, &acquires, items, count, &perhaps_happened, err);
    if (code == ERR_NONE)
        return ERR_NONE;
    store_fail_acquires(items, count, err);
    for (size_t i = 0; i < count; i++)
        items[i]->maybe_reserved = perhaps_happened && items[i]->code != ERR_BAD_VALUE;
    return code;
}

/* ---- settle ---- */

static void add_settlement(struct buf *json, const void *items, size_t i)
{
    struct store_settlement *s = ((struct store_settlement *const *)items)[i];
    const struct usage *u = &s->usage;
    char logged[CLOCK_TEXT_SIZE];

    if (s->code != ERR_NONE)
        return;
    s->code = expect_row(&s->err);
    clock_format(s->logged_ms != 0 ? s->logged_ms : clock_wall_ms(), logged);
    begin_item(json, i);
    add_text(json, "requestId", s->request_id);
    add_int(json, "tokenId", s->token_id);
    add_text(json, "companyId", s->company_id);
    add_text(json, "branch", s->branch);
    add_text(json, "requestedBy", s->requested_by);
    add_text(json, "clientKeyId", s->client_key_id);
    add_text(json, "traceId", s->trace_id);
    add_text(json, "tokenSource", s->token_source);
    add_cut(json, "model", s->model, MODEL_MAX);
    add_int(json, "inputTokens", u->input_tokens);
    add_int(json, "outputTokens", u->output_tokens);
    add_int(json, "textPromptTokens", u->text_prompt_tokens);
    add_int(json, "imagePromptTokens", u->image_prompt_tokens);
    add_int(json, "textCandidatesTokens", u->text_candidates_tokens);
    add_int(json, "thoughtsTokens", u->thoughts_tokens);
    add_int(json, "cachedTokens", u->cached_tokens);
    add_int(json, "totalTokens", u->total_tokens);
    add_int(json, "requestCount", s->request_count);
    add_int(json, "unknownCalls", s->unknown_calls);
    add_int(json, "durationMs", s->duration_ms);
    add_text(json, "loggedAt", logged);
    add_int(json, "idempotency", s->idempotency);
    add_int(json, "releaseSequence", s->release_sequence);
    add_fault(json, &s->fault);
    end_item(json);
}

/* i, Code, Message, ThresholdCrossed, Exceeded, DisablingStopped */
static bool take_settled(void *context, size_t columns, const char *const *names,
                         const struct store_value *values)
{
    const struct sent *sent = context;
    struct store_settlement *s;
    size_t i;

    (void)names;
    if (!find_item(sent, values, columns, &i))
        return true;
    s = ((struct store_settlement *const *)sent->items)[i];
    store_clear_settlement(s);
    s->code = read_code(values, columns, &s->err);
    if (s->code == ERR_NONE) {
        s->threshold_crossed = mssql_column_int(values, columns, 3) != 0;
        s->exceeded = mssql_column_int(values, columns, 4) != 0;
        s->disabling_stopped = mssql_column_int(values, columns, 5) != 0;
    }
    return true;
}

enum err_code mssql_settle(void *self, struct store_settlement *const *items, size_t count,
                           struct err *err)
{
    static const struct kind settlements = {"dbo.usp_SettleUsage", add_settlement, take_settled};
    bool perhaps_happened;
    enum err_code code = ERR_NONE;

    if (store_admit_settlements(items, count) > 0)
        code = send_batch(self, &settlements, items, count, &perhaps_happened, err);
    if (code != ERR_NONE)
        store_fail_settlements(items, count, err);
    return code;
}
