/* token.c - the tokens of one request. See token.h.
 *
 * A use is open from its reservation to its settlement. Acquiring another token closes the one
 * before, in the same round trip, unless something was spent on it: then it stays open until the
 * request's settlement. A fault is kept with the use until the store has heard of it. */
#include "token.h"

#include <string.h>

#include "clock.h"
#include "log.h"
#include "metrics.h"

/* A process that died holds its reservations this long past the request's deadline. */
#define RESERVATION_GRACE_MS 60000

void tokens_init(struct tokens *tokens, struct app *app, struct arena *arena,
                 const char *request_id, const char *company, const char *branch, const char *user,
                 const char *client_key_id, const char *idempotency_key, const char *trace_id,
                 int64_t estimate, int64_t deadline_ms)
{
    *tokens = (struct tokens){.app = app,
                              .arena = arena,
                              .request_id = request_id,
                              .company = company,
                              .branch = branch,
                              .user = user,
                              .client_key_id = client_key_id,
                              .idempotency_key = idempotency_key,
                              .trace_id = trace_id,
                              .estimate = estimate,
                              .deadline_ms = deadline_ms};
}

void tokens_reset(struct tokens *tokens)
{
    explicit_bzero(tokens->api_key, sizeof tokens->api_key);
}

static bool spent(const struct token_use *use)
{
    return use->request_count > 0 || use->unknown_calls > 0;
}

/* The use of a token, made where it is the first. */
static struct token_use *use_of(struct tokens *tokens, int64_t id)
{
    for (size_t i = 0; i < tokens->count; i++)
        if (tokens->uses[i].id == id)
            return &tokens->uses[i];
    if (tokens->count == tokens->capacity) {
        size_t capacity = tokens->capacity == 0 ? 4 : 2 * tokens->capacity;
        struct token_use *uses = arena_alloc(tokens->arena, capacity * sizeof *uses);
        if (tokens->count > 0)
            memcpy(uses, tokens->uses, tokens->count * sizeof *uses);
        tokens->uses = uses;
        tokens->capacity = capacity;
    }
    struct token_use *use = &tokens->uses[tokens->count++];
    *use = (struct token_use){.id = id};
    return use;
}

static void hold(struct tokens *tokens, int64_t id, const char *api_key)
{
    size_t n = api_key == NULL ? 0 : strlen(api_key);

    tokens->current = use_of(tokens, id);
    tokens->current->open = true;
    tokens->current->tried = true;
    if (n >= sizeof tokens->api_key)
        n = sizeof tokens->api_key - 1;
    if (n > 0)
        memcpy(tokens->api_key, api_key, n);
    tokens->api_key[n] = '\0';
}

/* The store is away: the fallback key serves, where there is one and the outbox takes its
 * reservation. */
static enum token_result hold_offline(struct tokens *tokens, const struct store_acquire *acquire,
                                      struct err *err)
{
    struct app *app = tokens->app;
    struct store_acquire offline = *acquire;

    if (app->fallback_key == NULL) {
        *err = acquire->err;
        return TOKENS_NONE;
    }
    offline.sequence = ++tokens->sequence; /* what that acquire may have reserved is released */
    if (store_reserve_offline(app->store, &offline, err) != ERR_NONE)
        return TOKENS_NONE;
    log_warning(tokens->request_id, acquire->err.message,
                "the store cannot be reached; the fallback key serves");
    hold(tokens, 0, app->fallback_key);
    return TOKENS_HELD;
}

static enum token_result refuse(enum err_code code, struct err *err)
{
    err_set(err, code, "%s", err_info(code)->detail);
    return TOKENS_NONE;
}

static enum token_result take_grant(struct tokens *tokens, struct store_acquire *acquire,
                                    int64_t *wait_ms, struct err *err)
{
    if (acquire->company_id_stored[0] != '\0')
        tokens->company = arena_strdup(tokens->arena, acquire->company_id_stored);
    switch (acquire->grant) {
    case GRANT_TOKEN:
        hold(tokens, acquire->token_id,
             acquire->token_id == 0 ? tokens->app->fallback_key : acquire->api_key);
        return TOKENS_HELD;
    case GRANT_COOLING:
        *wait_ms = acquire->first_usable_ms;
        err_set(err, acquire->busy_too ? ERR_TOKEN_BUSY : ERR_UPSTREAM_RATE_LIMITED, "%s",
                err_info(acquire->busy_too ? ERR_TOKEN_BUSY : ERR_UPSTREAM_RATE_LIMITED)->detail);
        return TOKENS_COOLING;
    case GRANT_BUSY:
        return refuse(ERR_TOKEN_BUSY, err);
    case GRANT_DUPLICATE:
        store_set_duplicate(err, acquire->first_is_done, acquire->first_request_id);
        return TOKENS_NONE;
    case GRANT_UNREADABLE:
        hold(tokens, acquire->token_id, NULL);
        *err = acquire->err;
        return TOKENS_NONE;
    case GRANT_EXPIRED:
        return refuse(ERR_TOKEN_EXPIRED, err);
    case GRANT_UNAVAILABLE:
        return refuse(ERR_TOKEN_UNAVAILABLE, err);
    case GRANT_NO_TOKEN:
        break;
    }
    return refuse(ERR_NO_ACTIVE_TOKEN, err);
}

static struct store_exclusion *exclusions(struct tokens *tokens, size_t *count)
{
    struct store_exclusion *list = arena_alloc(tokens->arena, (tokens->count + 1) * sizeof *list);

    *count = 0;
    for (size_t i = 0; i < tokens->count; i++) {
        const struct token_use *use = &tokens->uses[i];
        if (use->id != 0 && (use->at_fault || use->tried))
            list[(*count)++] = (struct store_exclusion){use->id, use->at_fault};
    }
    return list;
}

/* *unreadable: one is held, and TOKENS_NONE returned, because its key does not open. */
static enum token_result acquire_one(struct tokens *tokens, const struct store_token_fault *fault,
                                     bool at_fault, int64_t *wait_ms, bool *unreadable,
                                     struct err *err)
{
    struct app *app = tokens->app;
    const struct config *config = app->config;
    struct token_use *previous = tokens->current;
    struct store_acquire acquire = {
        .request_id = tokens->request_id,
        .sequence = ++tokens->sequence,
        .company_id = tokens->company,
        .branch = tokens->branch,
        .requested_by = tokens->user,
        .estimate_tokens = tokens->estimate,
        .expires_ms = config->server.deadline_ms + RESERVATION_GRACE_MS,
        .choice = clock_random(),
        .idempotency_key = tokens->idempotency_key,
        .fallback_if_none =
            app->fallback_key != NULL && config->fallback.when == FALLBACK_NO_ACTIVE_TOKEN,
    };

    if (previous != NULL) {
        if (fault != NULL)
            previous->fault = *fault;
        previous->at_fault = previous->at_fault || at_fault;
        acquire.previous_token_id = previous->id;
        acquire.previous = previous->fault;
        acquire.previous_spent = spent(previous);
    }
    acquire.excluded = exclusions(tokens, &acquire.excluded_count);

    enum err_code code = store_acquire(app->store, &acquire, tokens->deadline_ms);
    enum token_result result;
    if (code == ERR_STORE_UNAVAILABLE) {
        result = hold_offline(tokens, &acquire, err);
    } else if (code != ERR_NONE) {
        *err = acquire.err;
        result = TOKENS_NONE;
    } else {
        if (previous != NULL) {
            previous->fault = (struct store_token_fault){0};
            previous->open = spent(previous);
        }
        tokens->current = NULL;
        result = take_grant(tokens, &acquire, wait_ms, err);
    }
    *unreadable = acquire.code == ERR_NONE && acquire.grant == GRANT_UNREADABLE;
    if (acquire.disabling_stopped)
        log_critical(
            tokens->request_id, NULL,
            "tokens of three companies were at fault within a minute: disabling has stopped, "
            "since the fault is hardly the keys'; look at Gemini's messages in RetryAttempts");
    explicit_bzero(acquire.api_key, sizeof acquire.api_key);
    return result;
}

/* A token whose key does not open is not at fault: perhaps only this host lacks the sealing key. So
 * nothing is said of it to the store, and the request goes on to another. */
enum token_result tokens_acquire(struct tokens *tokens, const struct store_token_fault *fault,
                                 bool at_fault, int64_t *wait_ms, struct err *err)
{
    struct err why_unreadable = {.code = ERR_NONE};
    bool unreadable;
    enum token_result result = acquire_one(tokens, fault, at_fault, wait_ms, &unreadable, err);

    while (unreadable) {
        why_unreadable = *err;
        log_critical(tokens->request_id, err->message, "token %lld of %s cannot be used",
                     (long long)tokens->current->id, tokens->company);
        result = acquire_one(tokens, NULL, true, wait_ms, &unreadable, err);
    }
    if (result == TOKENS_NONE && why_unreadable.code != ERR_NONE &&
        err->code == ERR_TOKEN_UNAVAILABLE)
        *err = why_unreadable;
    return result;
}

void tokens_waited(struct tokens *tokens)
{
    for (size_t i = 0; i < tokens->count; i++)
        tokens->uses[i].tried = false;
}

void tokens_count(struct tokens *tokens, const struct gemini_answer *answer)
{
    struct token_use *use = tokens->current;

    if (answer->has_usage) {
        use->request_count++;
        usage_add(&use->usage, &answer->usage);
        metrics_add(METRIC_TOKENS_INPUT, answer->usage.input_tokens);
        metrics_add(METRIC_TOKENS_OUTPUT, answer->usage.output_tokens);
        metrics_add(METRIC_TOKENS_THOUGHTS, answer->usage.thoughts_tokens);
        metrics_add(METRIC_TOKENS_CACHED, answer->usage.cached_tokens);
        metrics_add(METRIC_TOKENS_TOTAL, answer->usage.total_tokens);
    } else if (retry_unknown_call(&answer->outcome) || answer->outcome.understood) {
        use->unknown_calls++;
        metrics_add(METRIC_UNKNOWN_CALLS, 1);
    }
}

struct usage tokens_usage(const struct tokens *tokens, bool *any)
{
    struct usage sum = {0};

    *any = false;
    for (size_t i = 0; i < tokens->count; i++) {
        usage_add(&sum, &tokens->uses[i].usage);
        *any = *any || spent(&tokens->uses[i]);
    }
    return sum;
}

static void log_settled(const struct tokens *tokens, const struct store_settlement *s)
{
    if (s->threshold_crossed)
        log_warning(tokens->request_id, NULL,
                    "token %lld of %s has used its threshold of the limit", (long long)s->token_id,
                    tokens->company);
    if (s->exceeded)
        log_warning(tokens->request_id, NULL, "token %lld of %s has reached its limit: Exceeded",
                    (long long)s->token_id, tokens->company);
    if (s->disabling_stopped)
        log_critical(
            tokens->request_id, NULL,
            "tokens of three companies were at fault within a minute: disabling has stopped");
    if (s->request_count == 0 && s->unknown_calls > 0)
        log_warning(tokens->request_id, NULL,
                    "%d call(s) with token %lld of %s got no answer that tells their usage: the "
                    "reservation stays unsettled",
                    s->unknown_calls, (long long)s->token_id, tokens->company);
}

/* What becomes of the idempotency key: where nothing was spent, it may come again. */
static enum store_idempotency settle_key(const struct tokens *tokens)
{
    bool any;

    if (tokens->idempotency_key == NULL)
        return STORE_KEY_NONE;
    tokens_usage(tokens, &any);
    return any ? STORE_KEY_DONE : STORE_KEY_FREE;
}

void tokens_settle(struct tokens *tokens, const char *model, int64_t duration_ms)
{
    struct store_settlement *list = arena_alloc(tokens->arena, (tokens->count + 1) * sizeof *list);
    const enum store_idempotency idempotency = settle_key(tokens);
    size_t n = 0;

    for (size_t i = 0; i < tokens->count; i++) {
        struct token_use *use = &tokens->uses[i];
        /* The key is settled with a token, be it one that was released before. */
        bool for_the_key = idempotency != STORE_KEY_NONE && n == 0 && i + 1 == tokens->count;
        if (!use->open && !for_the_key)
            continue;
        use->open = false;
        list[n++] = (struct store_settlement){.request_id = tokens->request_id,
                                              .token_id = use->id,
                                              .company_id = tokens->company,
                                              .branch = tokens->branch,
                                              .requested_by = tokens->user,
                                              .client_key_id = tokens->client_key_id,
                                              .trace_id = tokens->trace_id,
                                              .token_source = use->id == 0 ? "fallback" : "store",
                                              .model = model,
                                              .usage = use->usage,
                                              .request_count = use->request_count,
                                              .unknown_calls = use->unknown_calls,
                                              .duration_ms = duration_ms,
                                              .logged_ms = clock_wall_ms(),
                                              .fault = use->fault,
                                              .idempotency = idempotency};
    }
    if (n == 0)
        return;
    /* Whatever the request's deadline: what was used must be written down. */
    int64_t deadline = clock_monotonic_ms() + 2 * tokens->app->config->store.query_timeout_ms;
    if (store_settle(tokens->app->store, list, n, deadline) != ERR_NONE)
        log_error(tokens->request_id, NULL,
                  "usage could not be recorded; it stands on standard error, and the reservation "
                  "will show as unsettled");
    for (size_t i = 0; i < n; i++)
        log_settled(tokens, &list[i]);
}
