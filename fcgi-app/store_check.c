/* store_check.c - what may come into a store, whatever its driver. See store_check.h. */
#include "store_check.h"

#include <string.h>
#include <strings.h>

#include "text.h"
#include "trace.h"

/* Input beyond these is refused: it cannot be meant, and sums must not overflow. */
#define COUNT_MAX INT64_C(1000000000000000) /* tokens */
#define SPAN_MAX INT64_C(31622400000)       /* 366 days, in milliseconds */
#define ID_MAX_BYTES 64                     /* request and key identifiers */
#define TEXT_MAX_BYTES (STORE_TEXT_SIZE - 1)

bool store_text_fits(const char *s, size_t min, size_t max)
{
    size_t len = s == NULL ? 0 : strnlen(s, max + 1);
    return len >= min && len <= max;
}

size_t store_text_cut(const char *s, size_t max)
{
    size_t len = s == NULL ? 0 : strnlen(s, max + 1);

    if (len > max)
        for (len--; len > 0 && ((unsigned char)s[len] & 0xC0) == 0x80; len--)
            ;
    return len;
}

/* ---- acquires and settlements; each check returns NULL, or what is wrong ---- */

static const char *names_fault(const char *request_id, const char *company_id, const char *branch,
                               const char *requested_by)
{
    if (!store_text_fits(request_id, 1, ID_MAX_BYTES))
        return "request_id must have 1 to 64 bytes";
    if (!store_text_fits(company_id, 1, TEXT_MAX_BYTES))
        return "company_id must have 1 to 256 bytes";
    if (!store_text_fits(branch, 0, TEXT_MAX_BYTES) ||
        !store_text_fits(requested_by, 0, TEXT_MAX_BYTES))
        return "branch and requested_by must have at most 256 bytes";
    return NULL;
}

static const char *cooldown_fault(const struct store_token_fault *fault)
{
    return fault->cooldown_ms < 0 || fault->cooldown_ms > SPAN_MAX
               ? "a cooldown must be 0 to 366 days"
               : NULL;
}

static const char *acquire_fault(const struct store_acquire *a)
{
    const char *fault = names_fault(a->request_id, a->company_id, a->branch, a->requested_by);

    if (fault != NULL)
        return fault;
    if (a->sequence < 1)
        return "sequence must be 1 or more";
    if (a->estimate_tokens < 0 || a->estimate_tokens > COUNT_MAX)
        return "estimate_tokens must be 0 to 10^15";
    if (a->expires_ms < 0 || a->expires_ms > SPAN_MAX)
        return "expires_ms must be 0 to 366 days";
    if (a->previous_token_id < 0)
        return "previous_token_id must not be negative";
    if (a->idempotency_key != NULL &&
        !store_text_fits(a->idempotency_key, 1, STORE_IDEMPOTENCY_MAX))
        return "idempotency_key must have 1 to 128 bytes";
    return cooldown_fault(&a->previous);
}

static bool counts_fit(const struct usage *u)
{
    const int64_t counts[] = {u->input_tokens,           u->output_tokens,
                              u->text_prompt_tokens,     u->image_prompt_tokens,
                              u->text_candidates_tokens, u->thoughts_tokens,
                              u->cached_tokens,          u->total_tokens};

    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++)
        if (counts[i] < 0 || counts[i] > COUNT_MAX)
            return false;
    return true;
}

static const char *settlement_fault(const struct store_settlement *s)
{
    const char *fault = names_fault(s->request_id, s->company_id, s->branch, s->requested_by);

    if (fault != NULL)
        return fault;
    if (s->token_id < 0)
        return "token_id must not be negative";
    if (!store_text_fits(s->client_key_id, 0, ID_MAX_BYTES))
        return "client_key_id must have at most 64 bytes";
    if (s->trace_id != NULL && !store_text_fits(s->trace_id, 1, TRACE_ID_SIZE - 1))
        return "trace_id must have 1 to 32 bytes";
    if (s->token_source == NULL ||
        (strcmp(s->token_source, "store") != 0 && strcmp(s->token_source, "fallback") != 0))
        return "token_source must be store or fallback";
    if (!counts_fit(&s->usage))
        return "each count of tokens must be 0 to 10^15";
    if (s->request_count < 0 || s->unknown_calls < 0)
        return "counts of calls must not be negative";
    if (s->duration_ms < 0)
        return "duration_ms must not be negative";
    if (s->logged_ms < 0 || s->logged_ms > CLOCK_WALL_MAX)
        return "logged_ms is no time";
    if (s->release_sequence < 0)
        return "release_sequence must not be negative";
    return cooldown_fault(&s->fault);
}

/* ---- batches ---- */

/* The item's first outcome; true: it may go on. */
static bool admit(const char *fault, enum err_code *code, struct err *err)
{
    *err = (struct err){.message = ""};
    *code = fault == NULL ? ERR_NONE : err_set(err, ERR_BAD_VALUE, "%s", fault);
    return fault == NULL;
}

void store_clear_acquire(struct store_acquire *a)
{
    a->grant = GRANT_NO_TOKEN;
    a->token_id = 0;
    a->first_usable_ms = 0;
    a->first_request_id[0] = '\0';
    a->first_is_done = false;
    a->maybe_reserved = false;
    a->busy_too = false;
    a->disabling_stopped = false;
    explicit_bzero(a->api_key, sizeof a->api_key);
    a->company_id_stored[0] = '\0';
}

size_t store_admit_acquires(struct store_acquire *const *items, size_t count)
{
    size_t admitted = 0;

    for (size_t i = 0; i < count; i++) {
        store_clear_acquire(items[i]);
        admitted += admit(acquire_fault(items[i]), &items[i]->code, &items[i]->err);
    }
    return admitted;
}

void store_fail_acquires(struct store_acquire *const *items, size_t count, const struct err *err)
{
    for (size_t i = 0; i < count; i++) {
        if (items[i]->code == ERR_BAD_VALUE)
            continue;
        store_clear_acquire(items[i]);
        items[i]->code = err->code;
        items[i]->err = *err;
    }
}

void store_clear_settlement(struct store_settlement *s)
{
    s->threshold_crossed = false;
    s->exceeded = false;
    s->disabling_stopped = false;
}

size_t store_admit_settlements(struct store_settlement *const *items, size_t count)
{
    size_t admitted = 0;

    for (size_t i = 0; i < count; i++) {
        store_clear_settlement(items[i]);
        admitted += admit(settlement_fault(items[i]), &items[i]->code, &items[i]->err);
    }
    return admitted;
}

void store_fail_settlements(struct store_settlement *const *items, size_t count,
                            const struct err *err)
{
    for (size_t i = 0; i < count; i++) {
        if (items[i]->code == ERR_BAD_VALUE)
            continue;
        store_clear_settlement(items[i]);
        items[i]->code = err->code;
        items[i]->err = *err;
    }
}

/* ---- administration ---- */

static enum err_code check_name(const char *what, const char *s, size_t min, struct err *err)
{
    const char *fault = s == NULL ? (min > 0 ? "must not be empty" : NULL)
                                  : text_fault(s, strlen(s), min, TEXT_MAX_BYTES);

    return fault == NULL ? ERR_NONE : err_set(err, ERR_BAD_VALUE, "%s %s", what, fault);
}

/* Who changes something, for AuditLog. */
static enum err_code check_actor(const char *actor, struct err *err)
{
    return check_name("the actor's name", actor, 1, err);
}

enum err_code store_check_key(const char *actor, const char *key, struct err *err)
{
    if (check_actor(actor, err) != ERR_NONE)
        return err->code;
    if (!store_text_fits(key, 1, STORE_API_KEY_SIZE - 1))
        return err_set(err, ERR_BAD_VALUE, "an API key must have 1 to %d bytes",
                       STORE_API_KEY_SIZE - 1);
    for (; *key != '\0'; key++) /* it goes into an HTTP header */
        if (*key <= ' ' || *key > '~')
            return err_set(err, ERR_BAD_VALUE,
                           "an API key must not have spaces or characters beyond ASCII");
    return ERR_NONE;
}

enum err_code store_check_limit(const char *actor, int64_t limit, double threshold, struct err *err)
{
    if (check_actor(actor, err) != ERR_NONE)
        return err->code;
    if (limit < -1 || limit > COUNT_MAX)
        return err_set(err, ERR_BAD_VALUE, "a limit must be 0 to 10^15, or none");
    if (!(threshold >= 0 && threshold <= 1)) /* NaN, too */
        return err_set(err, ERR_BAD_VALUE, "a threshold must be above 0 and at most 1");
    return ERR_NONE;
}

enum err_code store_check_new_token(const char *actor, const struct store_new_token *token,
                                    struct err *err)
{
    if (check_name("CompanyID", token->company_id, 1, err) != ERR_NONE ||
        check_name("CompanyName", token->company_name, 0, err) != ERR_NONE ||
        check_name("Provider", token->provider, 0, err) != ERR_NONE ||
        store_check_key(actor, token->api_key, err) != ERR_NONE)
        return err->code;
    return store_check_limit(actor, token->limit, token->threshold, err);
}

enum err_code store_check_status(const char *actor, const char **status, const char *reason,
                                 struct err *err)
{
    static const char *const all[] = {"Active", "Expired", "Exceeded", "Disabled"};
    const char *known = NULL;

    if (check_actor(actor, err) != ERR_NONE || check_name("the reason", reason, 0, err) != ERR_NONE)
        return err->code;
    for (size_t i = 0; *status != NULL && i < sizeof all / sizeof all[0]; i++)
        if (strcasecmp(*status, all[i]) == 0)
            known = all[i];
    if (known == NULL)
        return err_set(err, ERR_BAD_VALUE,
                       "a status must be Active, Expired, Exceeded or Disabled");
    *status = known;
    return ERR_NONE;
}

/* ---- client keys ---- */

static bool is_hexadecimal(const char *s, size_t len)
{
    return strlen(s) == len && strspn(s, "0123456789abcdef") == len;
}

static enum err_code check_client_key_id(const char *id, struct err *err)
{
    size_t len = strlen(id);

    return len > 0 && len < STORE_CLIENT_KEY_ID_SIZE && is_hexadecimal(id, len)
               ? ERR_NONE
               : err_set(err, ERR_BAD_VALUE,
                         "a client key's ID is 1 to 32 hexadecimal digits, as `client-key list` "
                         "shows it");
}

enum err_code store_check_new_client_key(const char *actor, const struct store_new_client_key *key,
                                         struct err *err)
{
    if (check_actor(actor, err) != ERR_NONE || check_client_key_id(key->id, err) != ERR_NONE ||
        (key->company_id != NULL && check_name("CompanyID", key->company_id, 1, err) != ERR_NONE) ||
        check_name("the label", key->label, 0, err) != ERR_NONE)
        return err->code;
    if (!is_hexadecimal(key->hash, STORE_HASH_SIZE - 1))
        return err_set(err, ERR_BAD_VALUE, "a client key's hash must be SHA-256 in hexadecimal");
    return ERR_NONE;
}

enum err_code store_check_client_key_id(const char *actor, const char *id, struct err *err)
{
    if (check_actor(actor, err) != ERR_NONE)
        return err->code;
    return check_client_key_id(id, err);
}

/* ---- queries ---- */

enum { BY_COMPANY = 1, BY_REQUEST = 2, BY_TIME = 4, BY_ID = 8, BY_ALL = 15 };

/* A filter that a view lacks is refused: rows that it should have kept out would pass for an answer. */
static const unsigned filters[] = {
    [VIEW_TOKENS] = BY_COMPANY | BY_TIME | BY_ID,
    [VIEW_USAGE_BY_DAY] = BY_COMPANY | BY_REQUEST | BY_TIME,
    [VIEW_USAGE_BY_COMPANY] = BY_COMPANY | BY_REQUEST | BY_TIME,
    [VIEW_USAGE_BY_BRANCH] = BY_COMPANY | BY_REQUEST | BY_TIME,
    [VIEW_USAGE_BY_USER] = BY_COMPANY | BY_REQUEST | BY_TIME,
    [VIEW_USAGE_BY_TOKEN] = BY_COMPANY | BY_REQUEST | BY_TIME,
    [VIEW_LOGS] = BY_ALL,
    [VIEW_ERRORS] = BY_ALL,
    [VIEW_RETRIES] = BY_ALL,
    [VIEW_RESERVATIONS] = BY_ALL,
    [VIEW_UNSETTLED] = BY_ALL,
    [VIEW_TOKENS_BY_STATUS] = BY_COMPANY,
    [VIEW_CLIENT_KEYS] = BY_COMPANY | BY_TIME,
    [VIEW_AUDIT] = BY_ALL,
};

enum err_code store_check_filter(enum store_view view, const struct store_filter *filter,
                                 struct err *err)
{
    const char *missing = NULL;

    if ((size_t)view >= sizeof filters / sizeof filters[0])
        return err_set(err, ERR_BAD_VALUE, "no such view");
    if (filter->company_id != NULL && (filters[view] & BY_COMPANY) == 0)
        missing = "company";
    else if (filter->request_id != NULL && (filters[view] & BY_REQUEST) == 0)
        missing = "request";
    else if ((filter->since_ms != 0 || filter->until_ms != 0) && (filters[view] & BY_TIME) == 0)
        missing = "time";
    else if (filter->before_id != 0 && (filters[view] & BY_ID) == 0)
        missing = "ID";
    if (missing != NULL)
        return err_set(err, ERR_BAD_VALUE, "this view cannot be filtered by %s", missing);
    return ERR_NONE;
}
