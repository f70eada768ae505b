/* extract.c - POST /extract, in the order in which it happens:
 *
 *   1. look who calls, before anything of theirs is read          authenticate
 *      read the upload, parse the form, check the fields          read_form
 *   2. check that the company is the caller's                      check_company
 *      and that the file is one that Gemini reads                  media_check
 *   3. acquire a token of the company                              acquire
 *   4. call Gemini with the retry policy                           call_until_done
 *   5. settle the usage                                            tokens_settle
 *   6. record failed attempts and log entries (in the background)  record_attempt, log_end
 *   7. answer                                                      answer_success, answer_failure
 *
 * Whatever happens after step 3 passes through step 5. A client that hangs up changes nothing: nobody
 * looks before step 7. */
#include "extract.h"

#include <json.h>
#include <stdio.h>
#include <string.h>

#include "auth.h"
#include "clock.h"
#include "log.h"
#include "media.h"
#include "metrics.h"
#include "multipart.h"
#include "record.h"
#include "retry.h"
#include "share.h"
#include "text.h"
#include "token.h"
#include "upload.h"

#define MAX_TEXT 256

/* What is looked for in an upload while it comes in. */
enum { MARK_DELIMITER, MARK_PAGE, MARKS };

struct extraction {
    struct worker *worker;
    struct app *app;
    struct request *request;
    int64_t deadline_ms;
    struct upload upload;
    struct find_marks marks[MARKS];
    struct store_client_key client; /* id empty: auth.mode is none */
    /* the form */
    const char *company, *user, *branch; /* NULL until read */
    const unsigned char *file;
    size_t file_len;
    enum media_kind kind;
    /* the calls */
    struct retry_policy policy;
    struct tokens tokens;
    int attempts;  /* calls to Gemini */
    int retries;   /* of policy.max_retries */
    int bad_texts; /* answers that were not the JSON asked for */
    char model[sizeof((struct gemini_answer *)0)->model]; /* as the last answer that said it */
    /* the last call */
    struct gemini_answer answer;
    struct invoice invoice;        /* where it was a success */
    enum retry_class class;        /* of what came back */
    const struct retry_rule *rule; /* NULL before the first call */
    int64_t token_id;              /* with which it was made */
    bool unrecorded;               /* it failed, and RetryAttempts does not know yet */
    /* the end */
    struct err err; /* for the log; what the client is told follows from its code */
    int retry_after_s;
};

/* ---- 1. and 2. the caller ---- */

static enum err_code authenticate(struct extraction *x)
{
    struct request *request = x->request;
    enum err_code code = ERR_NONE;

    if (x->app->config->auth.mode == AUTH_BEARER)
        code = auth_check(x->app->auth, request->authorization, &x->client, &x->retry_after_s,
                          &x->err);
    explicit_bzero(request->authorization, strlen(request->authorization));
    if (code != ERR_NONE)
        request_drain(request);
    return code;
}

/* Is the company the key's? folded: the company of the form. */
static enum err_code check_company(struct extraction *x, const char *folded)
{
    if (x->client.id[0] == '\0' ||
        strcmp(text_fold(&x->request->arena, x->client.company_id), folded) == 0)
        return ERR_NONE;
    return err_set(&x->err, ERR_FORBIDDEN, "client key %s is not one of this company's",
                   x->client.id);
}

/* ---- 1. the form ---- */

static enum err_code take_text(struct extraction *x, const struct multipart_part *part, size_t min,
                               const char **field)
{
    if (*field != NULL)
        return err_set(&x->err, ERR_BAD_REQUEST, "%s is given twice.", part->name);
    const char *fault = text_fault(part->data, part->len, min, MAX_TEXT);
    if (fault != NULL)
        return err_set(&x->err, ERR_BAD_REQUEST, "%s %s.", part->name, fault);
    *field = arena_strndup(&x->request->arena, part->data, part->len);
    return ERR_NONE;
}

static enum err_code take_part(struct extraction *x, const struct multipart_part *part)
{
    if (strcmp(part->name, "companyID") == 0)
        return take_text(x, part, 1, &x->company);
    if (strcmp(part->name, "username") == 0)
        return take_text(x, part, 1, &x->user);
    if (strcmp(part->name, "branch") == 0)
        return take_text(x, part, 0, &x->branch);
    if (strcmp(part->name, "file") != 0)
        return ERR_NONE; /* a field that is not ours */
    if (x->file != NULL)
        return err_set(&x->err, ERR_BAD_REQUEST, "file is given twice.");
    x->file = (const unsigned char *)part->data;
    x->file_len = part->len;
    return ERR_NONE;
}

/* Visible ASCII, as the contract says. */
static bool is_idempotency_key(const char *key)
{
    size_t n = 0;

    while (key[n] > ' ' && key[n] <= '~')
        n++;
    return n >= 1 && n <= STORE_IDEMPOTENCY_MAX && key[n] == '\0';
}

static enum err_code read_form(struct extraction *x)
{
    struct multipart_part parts[MULTIPART_MAX_PARTS];
    struct request *request = x->request;
    size_t count;

    if (request->idempotency_key != NULL && !is_idempotency_key(request->idempotency_key)) {
        request_drain(request);
        return err_set(&x->err, ERR_BAD_REQUEST,
                       "Idempotency-Key must have 1 to %d visible ASCII characters.",
                       STORE_IDEMPOTENCY_MAX);
    }
    enum err_code code =
        multipart_delimiter(request->content_type, &x->marks[MARK_DELIMITER], &x->err);
    if (code != ERR_NONE) {
        request_drain(request);
        return code;
    }
    find_marks_init(&x->marks[MARK_PAGE], MEDIA_PAGE_MARK, sizeof MEDIA_PAGE_MARK - 1);
    code = upload_open(&x->upload, request, x->app->config, x->marks, MARKS, &x->err);
    if (code != ERR_NONE)
        return code;
    metrics_add(METRIC_UPLOAD_BYTES, (int64_t)x->upload.len);
    code = multipart_parse(&request->arena, &x->marks[MARK_DELIMITER], x->upload.data,
                           x->upload.len, parts, &count, &x->err);
    for (size_t i = 0; code == ERR_NONE && i < count; i++)
        code = take_part(x, &parts[i]);
    if (code != ERR_NONE)
        return code;
    const char *missing = x->file == NULL      ? "file"
                          : x->company == NULL ? "companyID"
                          : x->user == NULL    ? "username"
                                               : NULL;
    if (missing != NULL)
        return err_set(&x->err, ERR_BAD_REQUEST, "%s is missing.", missing);
    if (x->branch == NULL)
        x->branch = "";
    return ERR_NONE;
}

/* ---- 3. and 4. tokens, calls, waits ---- */

/* Every failed attempt goes to RetryAttempts, with the wait that follows it. */
static void record_attempt(struct extraction *x, int64_t delay_ms)
{
    if (!x->unrecorded || x->rule == NULL)
        return;
    x->unrecorded = false;
    struct store_retry_attempt attempt = {.wall_ms = clock_wall_ms(),
                                          .attempt = x->attempts,
                                          .token_id = x->token_id,
                                          .is_retryable = x->rule->is_retryable,
                                          .status_code = x->answer.outcome.http_status,
                                          .delay_ms = delay_ms};

    snprintf(attempt.request_id, sizeof attempt.request_id, "%s", x->request->id);
    snprintf(attempt.company_id, sizeof attempt.company_id, "%s", x->tokens.company);
    snprintf(attempt.error_message, sizeof attempt.error_message, "%s", x->answer.outcome.message);
    recorder_retry(x->app->recorder, &attempt);
}

/* The last failure's own row; 504 where the deadline has passed meanwhile. */
static enum err_code fail(struct extraction *x)
{
    bool late = x->rule == NULL || clock_monotonic_ms() >= x->deadline_ms;

    record_attempt(x, 0);
    return err_set(&x->err, late ? ERR_DEADLINE_EXCEEDED : x->rule->final, "%s",
                   x->answer.outcome.message);
}

/* There is no token to go on with. What the last call brought belongs to the cause chain. */
static enum err_code give_up(struct extraction *x)
{
    if (x->unrecorded) {
        struct err cause = {.code = x->err.code};
        snprintf(cause.message, sizeof cause.message, "%s", x->answer.outcome.message);
        err_prefix(&cause, "%s", x->err.message);
        x->err = cause;
    }
    record_attempt(x, 0);
    return x->err.code;
}

/* Few workers may wait long for one company's quota: a quarter of them, but at least one. */
static bool begin_long_wait(struct app *app)
{
    int quarter = app->config->server.threads / 4;

    if (atomic_fetch_add(&app->long_waits, 1) < (quarter < 1 ? 1 : quarter))
        return true;
    atomic_fetch_sub(&app->long_waits, 1);
    return false;
}

/* All usable tokens cool down; the first is usable after hint_ms. Waits for it where the retries, the
 * deadline and the other requests allow; else the error that tokens_acquire has set stands. */
static enum err_code wait_for_hint(struct extraction *x, int64_t hint_ms)
{
    int64_t now = clock_monotonic_ms();
    bool retry = x->unrecorded;

    if (x->err.code != ERR_TOKEN_BUSY)
        x->retry_after_s = hint_ms <= 1000 ? 1 : (int)((hint_ms + 999) / 1000);
    /* "At once" would be as fast as Gemini refuses. */
    int64_t wait = hint_ms == 0 && retry ? retry_backoff_ms(&x->policy, x->retries, clock_random())
                                         : retry_hint_wait_ms(hint_ms, clock_random());
    bool is_long = wait > x->policy.max_delay_ms;
    if ((retry && x->retries >= x->policy.max_retries) || !retry_fits(now, wait, x->deadline_ms) ||
        (is_long && !begin_long_wait(x->app)))
        return give_up(x);
    x->retry_after_s = 0;
    x->retries += retry;
    record_attempt(x, wait);
    metrics_add(METRIC_HINT_WAITERS, 1);
    clock_sleep_until(now + wait);
    metrics_add(METRIC_HINT_WAITERS, -1);
    if (is_long)
        atomic_fetch_sub(&x->app->long_waits, 1);
    tokens_waited(&x->tokens);
    return ERR_NONE;
}

/* Acquires a token; where all cool down, waits. fault (may be NULL): what the last call has shown of
 * the one held. */
static enum err_code acquire(struct extraction *x, const struct store_token_fault *fault,
                             bool at_fault)
{
    int64_t hint_ms = 0;

    for (;;) {
        enum err_code code;
        switch (tokens_acquire(&x->tokens, fault, at_fault, &hint_ms, &x->err)) {
        case TOKENS_HELD:
            record_attempt(x, 0);
            return ERR_NONE;
        case TOKENS_NONE:
            return give_up(x);
        case TOKENS_COOLING:
            if ((code = wait_for_hint(x, hint_ms)) != ERR_NONE)
                return code;
        }
        fault = NULL;
    }
}

/* The same token again, after a backoff. */
static enum err_code back_off(struct extraction *x)
{
    int64_t delay = retry_backoff_ms(&x->policy, x->retries, clock_random());
    int64_t now = clock_monotonic_ms();

    if (x->retries >= x->policy.max_retries || !retry_fits(now, delay, x->deadline_ms))
        return fail(x);
    x->retries++;
    record_attempt(x, delay);
    clock_sleep_until(now + delay);
    return ERR_NONE;
}

/* Another token at once; what the last call has shown of this one goes to the store on the way. */
static enum err_code change_token(struct extraction *x)
{
    int64_t backoff = retry_backoff_ms(&x->policy, x->retries, clock_random());
    int64_t cooldown = retry_cooldown_ms(&x->answer.outcome, x->rule, backoff, clock_wall_ms());
    bool disable = x->rule->effect == RETRY_TOKEN_DISABLED && x->app->config->retry.auto_disable;
    bool exceed = x->rule->effect == RETRY_TOKEN_EXCEEDED;
    const struct store_token_fault fault = {.fault = disable  ? STORE_FAULT_DISABLE
                                                     : exceed ? STORE_FAULT_EXCEED
                                                              : STORE_FAULT_COOLDOWN,
                                            .cooldown_ms = cooldown,
                                            .reason = x->answer.outcome.message};

    if (x->token_id != 0)
        return acquire(x, &fault, disable || exceed || x->rule->effect == RETRY_TOKEN_DISABLED);
    /* The fallback key has no other beside it, and no row that could cool down. */
    if (x->rule->effect != RETRY_TOKEN_COOLS_HINT)
        return fail(x);
    err_set(&x->err, x->rule->final, "%s", x->answer.outcome.message);
    return wait_for_hint(x, cooldown);
}

/* What the policy says to a failed call: ERR_NONE to call again, after whatever wait there was. */
static enum err_code next_step(struct extraction *x)
{
    switch (x->rule->action) {
    case RETRY_SAME_ONCE:
        return x->bad_texts++ == 0 ? back_off(x) : fail(x);
    case RETRY_SAME:
        return back_off(x);
    case RETRY_OTHER:
        return change_token(x);
    case RETRY_DONE:
    case RETRY_STOP:
        break;
    }
    return fail(x);
}

/* One call; its outcome's rule becomes x->rule. */
static void call_once(struct extraction *x)
{
    int64_t left = x->deadline_ms - clock_monotonic_ms();
    int64_t timeout = x->app->config->gemini.timeout_ms;
    const struct gemini_call call = {.api_key = x->tokens.api_key,
                                     .mime_type = media_type(x->kind),
                                     .file = x->file,
                                     .file_len = x->file_len,
                                     .timeout_ms = left < timeout ? left : timeout,
                                     .trace = &x->request->trace};
    struct retry_outcome *outcome = &x->answer.outcome;

    if (x->attempts++ > 0)
        metrics_add(METRIC_RETRIES + (int)x->class, 1);
    x->token_id = x->tokens.current->id;
    gemini_answer_reset(&x->answer);
    gemini_call(x->worker->gemini, &call, &x->answer);
    if (outcome->understood && !outcome->blocked) {
        outcome->text_ok = invoice_parse(&x->invoice, x->app->schema, buf_str(&x->answer.text),
                                         x->answer.text.len);
        if (!outcome->text_ok)
            snprintf(outcome->message, sizeof outcome->message,
                     "HTTP 200: the text is not the JSON asked for");
    }
    if (x->answer.model[0] != '\0')
        memcpy(x->model, x->answer.model, sizeof x->model);
    tokens_count(&x->tokens, &x->answer);
    if (outcome->understood && !x->answer.has_usage)
        log_warning(x->request->id, NULL,
                    "Gemini's answer has no usageMetadata: its usage is unknown");
    x->class = retry_classify(outcome);
    metrics_add(METRIC_ATTEMPTS + (int)x->class, 1);
    x->rule = retry_rule(x->class);
    x->unrecorded = x->rule->action != RETRY_DONE;
}

static enum err_code call_until_done(struct extraction *x)
{
    enum err_code code = ERR_NONE;

    while (code == ERR_NONE) {
        if (!retry_fits(clock_monotonic_ms(), 0, x->deadline_ms))
            return fail(x);
        call_once(x);
        if (x->rule->action == RETRY_DONE)
            break;
        code = next_step(x);
    }
    return code;
}

/* ---- the steps ---- */

static enum err_code run(struct extraction *x)
{
    struct request *request = x->request;
    const struct config *config = x->app->config;
    enum err_code code;

    if ((code = authenticate(x)) != ERR_NONE || (code = read_form(x)) != ERR_NONE)
        return code;
    const char *folded = text_fold(&request->arena, x->company);
    if ((code = check_company(x, folded)) != ERR_NONE ||
        (code = media_check(x->file, x->file_len, &x->kind, &x->err)) != ERR_NONE)
        return code;
    if (!share_enter(x->app->share, folded))
        return err_set(&x->err, ERR_RATE_LIMITED, "the company holds its share of the workers");

    int64_t begun = clock_monotonic_ms();
    int64_t guess =
        media_estimate_tokens(x->kind, x->file, x->file_len, &x->marks[MARK_PAGE], x->upload.data);
    int64_t reserve = config->gemini.reserve_tokens;
    tokens_init(&x->tokens, x->app, &request->arena, request->id, x->company, x->branch, x->user,
                x->client.id[0] == '\0' ? NULL : x->client.id, request->idempotency_key,
                request_trace_id(request), guess > reserve ? guess : reserve, x->deadline_ms);
    if ((code = acquire(x, NULL, false)) == ERR_NONE)
        code = call_until_done(x);
    tokens_settle(&x->tokens, x->model[0] == '\0' ? NULL : x->model, clock_monotonic_ms() - begun);
    tokens_reset(&x->tokens);
    share_leave(x->app->share, folded);
    return code;
}

/* ---- 6. and 7. the end ---- */

static void log_end(struct extraction *x, enum err_code code, const struct usage *usage)
{
    struct request *request = x->request;
    const char *trace_id = request_trace_id(request);
    int64_t ms = clock_monotonic_ms() - request->accepted_ms;
    const char *company = x->tokens.company != NULL ? x->tokens.company /* the store's spelling */
                          : x->company != NULL      ? x->company
                                                    : "-";
    const char *user = x->user == NULL ? "-" : x->user;

    if (code == ERR_NONE) {
        LOG_TRACED(LOG_INFO, request->id, trace_id, NULL,
                   "extracted: company=%s user=%s type=%s bytes=%zu attempts=%d tokens=%lld "
                   "model=%s ms=%lld %s",
                   x->tokens.company, user, media_type(x->kind), x->file_len, x->attempts,
                   (long long)usage->total_tokens, x->answer.model, (long long)ms,
                   request_other_ids(request));
        return;
    }
    LOG_TRACED(err_info(code)->status >= 500 ? LOG_ERROR : LOG_WARNING, request->id, trace_id,
               x->err.message, "%s: company=%s user=%s attempts=%d tokens=%lld ms=%lld peer=%s %s",
               err_info(code)->name, company, user, x->attempts, (long long)usage->total_tokens,
               (long long)ms, request->peer, request_other_ids(request));
}

static void answer_success(struct extraction *x, const struct usage *usage,
                           struct response *response)
{
    const int flags = JSON_C_TO_STRING_SPACED | JSON_C_TO_STRING_NOSLASHESCAPE;
    struct buf *b = &response->body;

    buf_printf(b, "{\"status\": \"success\", \"request_id\": \"%s\", \"data\": ", x->request->id);
    buf_append_str(b, json_object_to_json_string_ext(x->invoice.data, flags));
    buf_printf(b,
               ", \"usage\": {\"input_tokens\": %lld, \"output_tokens\": %lld, "
               "\"text_prompt_tokens\": %lld, \"image_prompt_tokens\": %lld, "
               "\"text_candidates_tokens\": %lld, \"thoughts_tokens\": %lld, "
               "\"cached_tokens\": %lld, \"total_tokens\": %lld}, \"model\": ",
               (long long)usage->input_tokens, (long long)usage->output_tokens,
               (long long)usage->text_prompt_tokens, (long long)usage->image_prompt_tokens,
               (long long)usage->text_candidates_tokens, (long long)usage->thoughts_tokens,
               (long long)usage->cached_tokens, (long long)usage->total_tokens);
    const char *model = x->model[0] == '\0' ? x->app->config->gemini.model : x->model;
    buf_append_json(b, model, strlen(model));
    buf_printf(b, ", \"attempts\": %d, \"warnings\": ", x->attempts);
    buf_append_str(b, json_object_to_json_string_ext(x->invoice.warnings, flags));
    buf_append_char(b, '}');
}

/* The client is told the code's own words; only what is wrong with its own request is said in ours. */
static enum err_code answer_failure(struct extraction *x, enum err_code code, bool spent,
                                    struct response *response)
{
    code = err_for_client(code);
    bool ours = code == ERR_BAD_REQUEST || code == ERR_FILE_TOO_LARGE ||
                code == ERR_REQUEST_IN_PROGRESS || code == ERR_ALREADY_PROCESSED;
    response_problem(response, x->request, code, ours ? x->err.message : NULL, x->retry_after_s,
                     spent);
    return code;
}

void extract_handle(struct worker *worker, struct request *request, struct response *response)
{
    const struct config *config = worker->app->config;
    struct extraction x = {.worker = worker,
                           .app = worker->app,
                           .request = request,
                           .deadline_ms = request->accepted_ms + config->server.deadline_ms,
                           .policy = {.max_retries = config->retry.max_retries,
                                      .initial_delay_ms = config->retry.initial_delay_ms,
                                      .max_delay_ms = config->retry.max_delay_ms,
                                      .backoff_multiplier = config->retry.backoff_multiplier,
                                      .jitter = config->retry.jitter}};
    bool spent;

    gemini_answer_init(&x.answer);
    enum err_code code = run(&x);
    struct usage usage = tokens_usage(&x.tokens, &spent);
    if (code == ERR_NONE)
        answer_success(&x, &usage, response);
    if (code == ERR_NONE && !buf_ok(&response->body))
        code = err_set(&x.err, ERR_INTERNAL, "the answer is too large");
    if (code != ERR_NONE)
        code = answer_failure(&x, code, spent, response);
    log_end(&x, code, &usage);
    metrics_add(METRIC_REQUESTS + (int)code, 1);
    upload_close(&x.upload);
    gemini_answer_reset(&x.answer);
    invoice_reset(&x.invoice);
}
