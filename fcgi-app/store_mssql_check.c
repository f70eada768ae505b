/* store_mssql_check.c - what may come in, looked at before a batch goes to SQL Server, so that one bad
 * item cannot fail its neighbours. The rules are the embedded store's. See store_mssql.h. */
#include "store_mssql.h"

#include <string.h>
#include <strings.h>

#include "text.h"

/* Input beyond these is refused: it cannot be meant, and sums must not overflow. */
#define COUNT_MAX INT64_C(1000000000000000) /* tokens, calls */
#define SPAN_MAX INT64_C(31622400000)       /* 366 days, in milliseconds */
#define WALL_MAX INT64_C(253402300799999)   /* the end of the year 9999 */
#define ID_MAX_BYTES 64                     /* request and key identifiers */
#define TEXT_MAX_BYTES (STORE_TEXT_SIZE - 1)

/* Has s (NULL: 0 bytes) at least min and at most max bytes? */
static bool fits(const char *s, size_t min, size_t max)
{
    size_t len = s == NULL ? 0 : strnlen(s, max + 1);
    return len >= min && len <= max;
}

static enum err_code verdict(const char *what, struct err *err)
{
    return what == NULL ? ERR_NONE : err_set(err, ERR_BAD_VALUE, "%s", what);
}

static const char *fault_of(const struct store_token_fault *fault)
{
    return fault->cooldown_ms < 0 || fault->cooldown_ms > SPAN_MAX
               ? "a cooldown must be 0 to 366 days"
               : NULL;
}

/* ---- requests ---- */

enum err_code mssql_check_acquire(const struct store_acquire *a, struct err *err)
{
    const char *what = fault_of(&a->previous);

    if (!fits(a->request_id, 1, ID_MAX_BYTES))
        what = "request_id must have 1 to 64 bytes";
    else if (!fits(a->company_id, 1, TEXT_MAX_BYTES))
        what = "company_id must have 1 to 256 bytes";
    else if (!fits(a->branch, 0, TEXT_MAX_BYTES) || !fits(a->requested_by, 0, TEXT_MAX_BYTES))
        what = "branch and requested_by must have at most 256 bytes";
    else if (a->sequence < 1)
        what = "sequence must be 1 or more";
    else if (a->estimate_tokens < 0 || a->estimate_tokens > COUNT_MAX)
        what = "estimate_tokens must be 0 to 10^15";
    else if (a->expires_ms < 0 || a->expires_ms > SPAN_MAX)
        what = "expires_ms must be 0 to 366 days";
    else if (a->previous_token_id < 0)
        what = "previous_token_id must not be negative";
    return verdict(what, err);
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

enum err_code mssql_check_settlement(const struct store_settlement *s, struct err *err)
{
    const char *what = fault_of(&s->fault);

    if (!fits(s->request_id, 1, ID_MAX_BYTES))
        what = "request_id must have 1 to 64 bytes";
    else if (s->token_id < 0)
        what = "token_id must not be negative";
    else if (!fits(s->company_id, 1, TEXT_MAX_BYTES))
        what = "company_id must have 1 to 256 bytes";
    else if (!fits(s->branch, 0, TEXT_MAX_BYTES) || !fits(s->requested_by, 0, TEXT_MAX_BYTES))
        what = "branch and requested_by must have at most 256 bytes";
    else if (!fits(s->client_key_id, 0, ID_MAX_BYTES))
        what = "client_key_id must have at most 64 bytes";
    else if (s->token_source == NULL ||
             (strcmp(s->token_source, "store") != 0 && strcmp(s->token_source, "fallback") != 0))
        what = "token_source must be store or fallback";
    else if (!counts_fit(&s->usage))
        what = "each count of tokens must be 0 to 10^15";
    else if (s->request_count < 0 || s->unknown_calls < 0)
        what = "counts of calls must not be negative";
    else if (s->duration_ms < 0)
        what = "duration_ms must not be negative";
    else if (s->logged_ms < 0 || s->logged_ms > WALL_MAX)
        what = "logged_ms is no time";
    return verdict(what, err);
}

/* ---- administration ---- */

/* NULL, or what is wrong: "must not be empty". */
static const char *name_fault(const char *s, size_t min)
{
    return s == NULL ? (min > 0 ? "must not be empty" : NULL)
                     : text_fault(s, strlen(s), min, TEXT_MAX_BYTES);
}

enum err_code mssql_check_actor(const char *actor, struct err *err)
{
    const char *fault = name_fault(actor, 1);
    return fault == NULL ? ERR_NONE : err_set(err, ERR_BAD_VALUE, "the actor's name %s", fault);
}

/* An API key goes into an HTTP header: visible ASCII. */
enum err_code mssql_check_key(const char *key, struct err *err)
{
    if (!fits(key, 1, STORE_API_KEY_SIZE - 1))
        return err_set(err, ERR_BAD_VALUE, "an API key must have 1 to %d bytes",
                       STORE_API_KEY_SIZE - 1);
    for (; *key != '\0'; key++)
        if (*key <= ' ' || *key > '~')
            return err_set(err, ERR_BAD_VALUE,
                           "an API key must not have spaces or characters beyond ASCII");
    return ERR_NONE;
}

enum err_code mssql_check_limit(int64_t limit, double threshold, struct err *err)
{
    if (limit < -1 || limit > COUNT_MAX)
        return err_set(err, ERR_BAD_VALUE, "a limit must be 0 to 10^15, or none");
    if (!(threshold >= 0 && threshold <= 1)) /* NaN, too */
        return err_set(err, ERR_BAD_VALUE, "a threshold must be above 0 and at most 1");
    return ERR_NONE;
}

enum err_code mssql_check_new_token(const struct store_new_token *token, struct err *err)
{
    const char *fault = NULL;

    if ((fault = name_fault(token->company_id, 1)) != NULL)
        return err_set(err, ERR_BAD_VALUE, "CompanyID %s", fault);
    if ((fault = name_fault(token->company_name, 0)) != NULL)
        return err_set(err, ERR_BAD_VALUE, "CompanyName %s", fault);
    if ((fault = name_fault(token->provider, 0)) != NULL)
        return err_set(err, ERR_BAD_VALUE, "Provider %s", fault);
    if (mssql_check_key(token->api_key, err) != ERR_NONE)
        return err->code;
    return mssql_check_limit(token->limit, token->threshold, err);
}

enum err_code mssql_check_status(const char *status, const char *reason, const char **known,
                                 struct err *err)
{
    static const char *const all[] = {"Active", "Expired", "Exceeded", "Disabled"};
    const char *fault = name_fault(reason, 0);

    *known = NULL;
    for (size_t i = 0; status != NULL && i < sizeof all / sizeof all[0]; i++)
        if (strcasecmp(status, all[i]) == 0)
            *known = all[i];
    if (*known == NULL)
        return err_set(err, ERR_BAD_VALUE,
                       "a status must be Active, Expired, Exceeded or Disabled");
    return fault == NULL ? ERR_NONE : err_set(err, ERR_BAD_VALUE, "the reason %s", fault);
}
