/* retry.h - the retry policy: pure, without I/O, clock or random numbers of its own.
 *
 * What came back from Gemini (struct retry_outcome) falls into one class (enum retry_class); each
 * class has one rule (struct retry_rule), a row of the table in retry.c: what happens to the token,
 * what is tried next, and what the client is told when nothing is left to try. A new rule is a new
 * class, a row there and a line in retry_classify. */
#ifndef EXTRACT_RETRY_H
#define EXTRACT_RETRY_H

#include <stdbool.h>
#include <stdint.h>

#include "err.h"

/* What is known of a call when it has ended. */
struct retry_outcome {
    bool complete;          /* a whole HTTP answer was read */
    bool sent_whole;        /* the request's last byte had been handed to the network */
    int http_status;        /* 0 unless complete */
    bool google_error;      /* the body is an error in Google's JSON */
    char status[64];        /* its "status": "RESOURCE_EXHAUSTED" */
    char reason[64];        /* ErrorInfo.reason: "API_KEY_INVALID" */
    char message[400];      /* its message, or what the network said; shown in RetryAttempts */
    int64_t retry_after_ms; /* RetryInfo.retryDelay or Retry-After, the longer; -1 without either */
    bool daily_quota;       /* a QuotaFailure names a quota per day */
    bool understood;        /* a 200 whose body is a generateContent answer */
    bool blocked;           /* such an answer that is blocked, cut or empty */
    bool text_ok;           /* its text is the JSON that was asked for */
};

enum retry_class {
    RETRY_SUCCESS,
    RETRY_TRANSIENT,     /* timeout, broken connection, 408, 5xx, an answer cut short */
    RETRY_RATE_LIMITED,  /* 429 */
    RETRY_DAILY_QUOTA,   /* 429 for a quota per day */
    RETRY_KEY_INVALID,   /* Google's JSON says that the key is bad */
    RETRY_KEY_DOUBTFUL,  /* any other 401 or 403 */
    RETRY_KEY_USED_UP,   /* 402 */
    RETRY_INVALID_INPUT, /* any other 400 */
    RETRY_REJECTED,      /* 404, 413, and whatever else is not known */
    RETRY_NO_ANSWER,     /* 200, blocked, cut or empty */
    RETRY_BAD_TEXT,      /* 200, text that is not the JSON asked for */
    RETRY_CLASS_COUNT
};

enum retry_action {
    RETRY_DONE,      /* success */
    RETRY_STOP,      /* answer at once */
    RETRY_SAME,      /* the same token, after a backoff */
    RETRY_SAME_ONCE, /* the same token after a backoff, but only once a request */
    RETRY_OTHER      /* another token at once; uses up no retry */
};

/* What happens to the token in the store. */
enum retry_effect {
    RETRY_TOKEN_KEEPS,
    RETRY_TOKEN_COOLS_HINT, /* as long as the hint says; without one, as long as the backoff */
    RETRY_TOKEN_COOLS_QUOTA_DAY,
    RETRY_TOKEN_COOLS_10_MIN,
    RETRY_TOKEN_DISABLED, /* with the reason; only cooled for 10 minutes where auto_disable=no */
    RETRY_TOKEN_EXCEEDED
};

struct retry_rule {
    const char *name; /* the metric's label: "rate_limited" */
    enum retry_action action;
    enum retry_effect effect;
    enum err_code final; /* what the client is told when nothing is left to try */
    bool
        is_retryable; /* RetryAttempts.IsRetryable: would the same call with the same token help? */
};

struct retry_policy {
    int max_retries;
    int64_t initial_delay_ms;
    int64_t max_delay_ms;
    double backoff_multiplier;
    bool jitter;
};

#define RETRY_MIN_ATTEMPT_MS 5000  /* no attempt starts with less than this left */
#define RETRY_DOUBTFUL_MS 600000   /* a token that is perhaps at fault cools for 10 minutes */
#define RETRY_MAX_HINT_MS 86400000 /* hints are believed up to a day */

/* The HTTP code decides before the status field, a field before a keyword. */
enum retry_class retry_classify(const struct retry_outcome *outcome);

const struct retry_rule *retry_rule(enum retry_class retry_class) __attribute__((returns_nonnull));

/* The wait before retry number retries_done + 1: initial_delay * multiplier^retries_done, +-50 % where
 * jitter is on, and never more than max_delay. random: 64 random bits. */
int64_t retry_backoff_ms(const struct retry_policy *policy, int retries_done, uint64_t random);

/* A hint is waited with 0 to 10 % more, so that those who wait do not come back together. */
int64_t retry_hint_wait_ms(int64_t hint_ms, uint64_t random);

/* How long the token cools down after this outcome; 0 where it keeps or loses its status.
 * wall_ms finds the next quota day; backoff_ms stands in for a missing hint. */
int64_t retry_cooldown_ms(const struct retry_outcome *outcome, const struct retry_rule *rule,
                          int64_t backoff_ms, int64_t wall_ms);

/* Would an attempt that starts after wait_ms still have RETRY_MIN_ATTEMPT_MS before the deadline? */
bool retry_fits(int64_t now_ms, int64_t wait_ms, int64_t deadline_ms);

/* May the call have been billed without our knowing how much? Sent whole, and no answer that tells. */
bool retry_unknown_call(const struct retry_outcome *outcome);

#endif
