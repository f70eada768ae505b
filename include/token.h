/* token.h - the tokens of one request: which one it holds, which it has tried, what each one used. */
#ifndef EXTRACT_TOKEN_H
#define EXTRACT_TOKEN_H

#include <stdbool.h>
#include <stdint.h>

#include "app.h"
#include "gemini.h"
#include "store.h"

/* What the request did with one token. */
struct token_use {
    int64_t id;    /* 0: the fallback key */
    bool open;     /* its reservation waits for a settlement */
    bool at_fault; /* never again in this request */
    bool tried;    /* not again before a wait */
    int request_count;
    int unknown_calls;
    struct usage usage;
    struct store_token_fault fault; /* not yet told to the store */
};

struct tokens {
    struct app *app;
    struct arena *arena;
    const char *request_id, *branch, *user;
    const char *client_key_id;   /* NULL: none */
    const char *idempotency_key; /* NULL: none */
    const char *trace_id;        /* NULL: none */
    const char *company;         /* as the client wrote it, then as the store does */
    int64_t estimate;
    int64_t deadline_ms;
    int sequence;
    struct token_use *uses;
    size_t count, capacity;
    struct token_use *current; /* NULL: none held */
    char api_key[STORE_API_KEY_SIZE];
};

enum token_result {
    TOKENS_HELD,    /* current and api_key are set, reserved, and untried since the last wait */
    TOKENS_COOLING, /* one will be usable after *wait_ms */
    TOKENS_NONE     /* err says why */
};

/* What the store needs to know of the request; all borrowed for the life of tokens. */
void tokens_init(struct tokens *tokens, struct app *app, struct arena *arena,
                 const char *request_id, const char *company, const char *branch, const char *user,
                 const char *client_key_id, const char *idempotency_key, const char *trace_id,
                 int64_t estimate, int64_t deadline_ms);
/* Wipes the key. */
void tokens_reset(struct tokens *tokens);

/* Acquires a token, another one than those at fault or tried. fault (may be NULL): what the call
 * with the current one has shown. at_fault: do not use the current one again in this request. */
enum token_result tokens_acquire(struct tokens *tokens, const struct store_token_fault *fault,
                                 bool at_fault, int64_t *wait_ms, struct err *err) MUST_CHECK;

/* A wait is over: what was merely tried may serve again. */
void tokens_waited(struct tokens *tokens);

/* Counts a call with the current token. */
void tokens_count(struct tokens *tokens, const struct gemini_answer *answer);

/* The usage over all tokens; *spent: was anything used, or may it have been? */
struct usage tokens_usage(const struct tokens *tokens, bool *spent);

/* Settles what is open, in one round trip; logs what the store noticed (threshold, limit). */
void tokens_settle(struct tokens *tokens, const char *model, int64_t duration_ms);

#endif
