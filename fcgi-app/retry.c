/* retry.c - the retry policy: one table of rules, and the pure arithmetic of waiting.
 *
 * The HTTP code decides before the status field, a field before a keyword: an exhausted prepaid
 * credit (402) also says RESOURCE_EXHAUSTED, and an invalid key is a 400. */
#include "retry.h"

#include <string.h>

#include "clock.h"

/* clang-format off */
static const struct retry_rule rules[RETRY_CLASS_COUNT] = {
    /*                       name             action           the token                    told in the end            retryable */
    [RETRY_SUCCESS]       = {"success",       RETRY_DONE,      RETRY_TOKEN_KEEPS,           ERR_NONE,                  false},
    [RETRY_TRANSIENT]     = {"transient",     RETRY_SAME,      RETRY_TOKEN_KEEPS,           ERR_UPSTREAM_UNAVAILABLE,  true},
    [RETRY_RATE_LIMITED]  = {"rate_limited",  RETRY_OTHER,     RETRY_TOKEN_COOLS_HINT,      ERR_UPSTREAM_RATE_LIMITED, true},
    [RETRY_DAILY_QUOTA]   = {"daily_quota",   RETRY_OTHER,     RETRY_TOKEN_COOLS_QUOTA_DAY, ERR_UPSTREAM_RATE_LIMITED, false},
    [RETRY_KEY_INVALID]   = {"key_invalid",   RETRY_OTHER,     RETRY_TOKEN_DISABLED,        ERR_TOKEN_UNAVAILABLE,     false},
    [RETRY_KEY_DOUBTFUL]  = {"key_doubtful",  RETRY_OTHER,     RETRY_TOKEN_COOLS_10_MIN,    ERR_UPSTREAM_RATE_LIMITED, false},
    [RETRY_KEY_USED_UP]   = {"key_used_up",   RETRY_OTHER,     RETRY_TOKEN_EXCEEDED,        ERR_TOKEN_UNAVAILABLE,     false},
    [RETRY_INVALID_INPUT] = {"invalid_input", RETRY_STOP,      RETRY_TOKEN_KEEPS,           ERR_INVALID_FILE,          false},
    [RETRY_REJECTED]      = {"rejected",      RETRY_STOP,      RETRY_TOKEN_KEEPS,           ERR_UPSTREAM_REJECTED,     false},
    [RETRY_NO_ANSWER]     = {"no_answer",     RETRY_STOP,      RETRY_TOKEN_KEEPS,           ERR_INVALID_FILE,          false},
    [RETRY_BAD_TEXT]      = {"bad_text",      RETRY_SAME_ONCE, RETRY_TOKEN_KEEPS,           ERR_INVALID_ANSWER,        true},
};
/* clang-format on */

/* Does Google itself say that the key is bad? Only its JSON counts: a proxy's 403 must not disable
 * a token. */
static bool key_is_bad(const struct retry_outcome *o)
{
    return o->google_error && (strncmp(o->reason, "API_KEY_", 8) == 0 ||
                               strcmp(o->reason, "CONSUMER_SUSPENDED") == 0 ||
                               strcasestr(o->message, "reported as leaked") != NULL);
}

static enum retry_class classify_answer(const struct retry_outcome *o)
{
    if (!o->understood)
        return RETRY_TRANSIENT; /* HTML, or JSON that broke off: an answer cut short */
    if (o->blocked)
        return RETRY_NO_ANSWER;
    return o->text_ok ? RETRY_SUCCESS : RETRY_BAD_TEXT;
}

enum retry_class retry_classify(const struct retry_outcome *o)
{
    if (!o->complete)
        return RETRY_TRANSIENT;
    switch (o->http_status) {
    case 200:
        return classify_answer(o);
    case 400:
        return key_is_bad(o) ? RETRY_KEY_INVALID : RETRY_INVALID_INPUT;
    case 401:
    case 403:
        return key_is_bad(o) ? RETRY_KEY_INVALID : RETRY_KEY_DOUBTFUL;
    case 402:
        return RETRY_KEY_USED_UP;
    case 429:
        return o->daily_quota ? RETRY_DAILY_QUOTA : RETRY_RATE_LIMITED;
    case 408:
    case 500:
    case 502:
    case 503:
    case 504:
        return RETRY_TRANSIENT;
    default:
        return RETRY_REJECTED;
    }
}

const struct retry_rule *retry_rule(enum retry_class retry_class)
{
    return &rules[retry_class < RETRY_CLASS_COUNT ? retry_class : RETRY_REJECTED];
}

/* A number from 0 to 1, made from random bits. */
static double unit(uint64_t random)
{
    return (double)(random >> 11) / (double)(UINT64_C(1) << 53);
}

int64_t retry_backoff_ms(const struct retry_policy *policy, int retries_done, uint64_t random)
{
    double delay = (double)policy->initial_delay_ms;
    double max = (double)policy->max_delay_ms;

    for (int i = 0; i < retries_done && delay < max; i++)
        delay *= policy->backoff_multiplier;
    if (delay > max)
        delay = max;
    if (policy->jitter)
        delay *= 0.5 + unit(random);
    return (int64_t)(delay > max ? max : delay);
}

int64_t retry_hint_wait_ms(int64_t hint_ms, uint64_t random)
{
    return hint_ms + (int64_t)((double)hint_ms * 0.1 * unit(random));
}

int64_t retry_cooldown_ms(const struct retry_outcome *outcome, const struct retry_rule *rule,
                          int64_t backoff_ms, int64_t wall_ms)
{
    switch (rule->effect) {
    case RETRY_TOKEN_COOLS_HINT:
        if (outcome->retry_after_ms < 0)
            return backoff_ms;
        return outcome->retry_after_ms < RETRY_MAX_HINT_MS ? outcome->retry_after_ms
                                                           : RETRY_MAX_HINT_MS;
    case RETRY_TOKEN_COOLS_QUOTA_DAY:
        return clock_ms_to_quota_day(wall_ms);
    case RETRY_TOKEN_COOLS_10_MIN:
    case RETRY_TOKEN_DISABLED: /* where disabling is off */
        return RETRY_DOUBTFUL_MS;
    case RETRY_TOKEN_KEEPS:
    case RETRY_TOKEN_EXCEEDED:
        break;
    }
    return 0;
}

bool retry_fits(int64_t now_ms, int64_t wait_ms, int64_t deadline_ms)
{
    return deadline_ms - now_ms - RETRY_MIN_ATTEMPT_MS >= wait_ms;
}

bool retry_unknown_call(const struct retry_outcome *o)
{
    return o->sent_whole && (!o->complete || (o->http_status == 200 && !o->understood));
}
