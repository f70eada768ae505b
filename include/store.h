/* store.h - where tokens, usage, retries and log entries are kept.
 *
 * One interface, whatever the driver: "sqlite" (embedded: one host, evaluation, tests) and, for
 * production, SQL Server. What requests need at the same moment travels in one batch (batch.h); each
 * item has an outcome of its own. All calls are safe from any thread, block no longer than
 * store.query_timeout (plus the wait for a place in a batch), and keep no pointer past their return.
 *
 * Errors everywhere: ERR_STORE_UNAVAILABLE (not reached in time, or broken off: the outcome is
 * unknown, the call may be repeated), ERR_STORAGE_FULL, ERR_BAD_VALUE (the data itself is refused),
 * ERR_SCHEMA, ERR_INTERNAL. */
#ifndef EXTRACT_STORE_H
#define EXTRACT_STORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "clock.h"
#include "config.h"
#include "err.h"
#include "log.h"
#include "usage.h"

#define STORE_TEXT_SIZE 257     /* names: 256 bytes and NUL */
#define STORE_API_KEY_SIZE 1025 /* an API key, perhaps sealed, and NUL */

struct store;

/* Opens the store of the configuration. Sets the schema up where it is missing or older and
 * store.auto_create allows it. Errors: ERR_SCHEMA (naming `extractctl migrate`), ERR_CONFIG, the above. */
struct store *store_open(const struct config *config, struct err *err) MUST_CHECK;
/* The same with a driver of the caller's (store_driver.h): for tests. */
struct store_driver;
struct store *store_open_with(const struct store_driver *driver, const struct config *config,
                              struct err *err) MUST_CHECK;
/* What a service does beside its requests: replays the outbox every few seconds, expires
 * reservations every minute, in a thread. Opens the outbox now, which is otherwise opened when it is
 * first needed: a tool works without a state_dir that it can write.
 * Errors: ERR_CONFIG (server.state_dir), ERR_STORAGE_FULL, ERR_INTERNAL. */
enum err_code store_start_background(struct store *store, struct err *err) MUST_CHECK;
/* Ends that thread, once it has finished what it is at; store_close does, too. NULL: nothing. */
void store_stop_background(struct store *store);
void store_close(struct store *store);

/* For a tool that watches what takes long: called before each step of store_seal_keys, store_check_keys
 * and store_outbox_drain with how many are done. When it says false, the rest is left as it is, and the
 * call returns as after its last step. */
typedef bool store_go_on(void *context, int64_t done);
void store_watch(struct store *store, store_go_on *go_on, void *context);

/* Creates or upgrades the schema, whatever auto_create says. *version becomes the schema's version. */
enum err_code store_migrate(const struct config *config, int *version, struct err *err) MUST_CHECK;

/* Can the store be read and written now? Waits at most a second for its turn to write. */
enum err_code store_ping(struct store *store, struct err *err) MUST_CHECK;

/* ---- client keys ---- */

#define STORE_CLIENT_KEY_ID_SIZE 33
#define STORE_HASH_SIZE 65 /* SHA-256 in hexadecimal and NUL */

/* A key that opens the service to a front end, or, is_admin, to an administrator. */
struct store_client_key {
    char id[STORE_CLIENT_KEY_ID_SIZE];
    char company_id[STORE_TEXT_SIZE]; /* empty: an administrator's */
    bool is_admin;
};

/* Whose key has this hash (STORE_HASH_SIZE)? Errors: ERR_NO_SUCH_ROW (unknown, or revoked). */
enum err_code store_client_key_find(struct store *store, const char *hash,
                                    struct store_client_key *key, struct err *err) MUST_CHECK;

/* ---- acquire and settle: the two round trips of a request ---- */

/* What a failed call tells about a token. */
enum store_fault {
    STORE_FAULT_NONE,
    STORE_FAULT_COOLDOWN, /* usable again after cooldown_ms, by the store's clock */
    STORE_FAULT_DISABLE,  /* Status Disabled, with the reason; not when three companies' tokens are
                             at fault within a minute: then it cools for 10 minutes */
    STORE_FAULT_EXCEED    /* Status Exceeded, with the reason */
};

struct store_token_fault {
    enum store_fault fault;
    int64_t cooldown_ms;
    const char *reason; /* what Gemini said; goes to StatusReason; may be NULL */
};

struct store_exclusion {
    int64_t token_id;
    bool at_fault; /* false: merely tried already, it may serve again after a wait */
};

enum store_grant {
    GRANT_TOKEN,       /* token_id, api_key and company_id are set and reserved */
    GRANT_NO_TOKEN,    /* no token at all, or an unknown company */
    GRANT_EXPIRED,     /* no Active token, the newest is Expired */
    GRANT_UNAVAILABLE, /* the newest is Exceeded or Disabled; or used up; or all left are at fault */
    GRANT_COOLING,     /* there is one, but not now: usable again after first_usable_ms */
    GRANT_BUSY,        /* room is only lacking because of reservations in flight */
    GRANT_DUPLICATE,   /* another request has this idempotency key: first_request_id */
    GRANT_UNREADABLE   /* token_id is reserved, but its sealed key does not open: err says why */
};

/* What becomes of a request's idempotency key when the request is settled. */
enum store_idempotency {
    STORE_KEY_NONE, /* it has none */
    STORE_KEY_FREE, /* nothing was spent: the same key may come again */
    STORE_KEY_DONE
};

#define STORE_IDEMPOTENCY_MAX 128 /* bytes of an idempotency key: visible ASCII */
#define STORE_IDEMPOTENCY_MS INT64_C(86400000)

/* One acquire: records the fault of the token before, closes (or keeps) its reservation, chooses
 * and reserves the next. Idempotent on (request_id, sequence). */
struct store_acquire {
    /* in; borrowed until store_acquire returns */
    const char *request_id;
    int sequence; /* 1 for the first acquire of a request */
    const char *company_id;
    const char *branch;
    const char *requested_by;
    int64_t estimate_tokens;
    int64_t expires_ms; /* after this long the reservation counts as that of a dead process */
    uint64_t choice;    /* a random number: which of the usable tokens */
    const struct store_exclusion *excluded;
    size_t excluded_count;
    int64_t previous_token_id; /* 0: none */
    struct store_token_fault previous;
    bool previous_spent;         /* its reservation stays open: a settlement will follow */
    bool fallback_if_none;       /* a known company without an Active token gets a reservation with
                              token_id 0 for the fallback key */
    const char *idempotency_key; /* of the company, for 24 h; NULL: none */
    bool fallback_only;          /* replayed from the outbox: only reserve for the fallback key */
    /* out */
    enum err_code code;
    struct err err;
    enum store_grant grant;
    int64_t token_id; /* 0: reserved for the fallback key */
    char api_key[STORE_API_KEY_SIZE];
    char company_id_stored[STORE_TEXT_SIZE]; /* the store's spelling */
    int64_t first_usable_ms;                 /* GRANT_COOLING */
    char first_request_id[UUID_TEXT_SIZE];   /* GRANT_DUPLICATE */
    bool first_is_done;                      /* GRANT_DUPLICATE */
    bool maybe_reserved; /* it has failed, and perhaps reserved all the same: nobody heard */
    bool busy_too; /* GRANT_COOLING: another token only lacks room for reservations in flight */
    bool
        disabling_stopped; /* the guard against disabling a fleet has just set in: log it, CRITICAL */
};

/* Sets ERR_ALREADY_PROCESSED or ERR_REQUEST_IN_PROGRESS, naming the first request, and returns it. */
enum err_code store_set_duplicate(struct err *err, bool first_is_done,
                                  const char *first_request_id);

/* Returns acquire->code. Leaves a queue at deadline_ms (monotonic) with ERR_STORE_UNAVAILABLE. Where
 * it fails so, a reservation that it may have made is released through the outbox. */
enum err_code store_acquire(struct store *store, struct store_acquire *acquire,
                            int64_t deadline_ms) MUST_CHECK;

/* One settlement: what a request did with one token. Idempotent on (request_id, token_id).
 *  request_count > 0            a usage row, the sums, the reservation is settled
 *  else unknown_calls > 0       no row: the reservation becomes unsettled
 *  else                         the reservation is released
 * release_sequence > 0: of an acquire whose answer nobody heard; whatever it has reserved, or will
 * yet reserve, is released. All else but the request's own texts is then 0. */
struct store_settlement {
    /* in; borrowed until store_settle returns */
    const char *request_id;
    int64_t token_id; /* 0: the fallback key; NULL in the rows */
    const char *company_id;
    const char *branch;
    const char *requested_by;
    const char *client_key_id; /* NULL: none */
    const char *trace_id;      /* NULL: none */
    const char *token_source;  /* "store" or "fallback" */
    const char *model;         /* as Gemini named it; NULL: unknown */
    struct usage usage;
    int request_count; /* calls answered with usage */
    int unknown_calls;
    int64_t duration_ms;
    int64_t logged_ms; /* wall time of the end of the request, for one that is settled later */
    struct store_token_fault fault; /* where the last call showed one and no acquire followed */
    enum store_idempotency idempotency;
    int release_sequence;
    /* out */
    enum err_code code;
    struct err err;
    bool threshold_crossed; /* this settlement crossed it: log a WARNING */
    bool exceeded;          /* this settlement reached the limit */
    bool disabling_stopped;
};

/* Settles all; returns ERR_NONE where each one's code is ERR_NONE, else the first other code.
 * What can't reach the store in time is journalled in the outbox, and that is ERR_NONE too; what not
 * even the outbox takes goes to standard error as one line of JSON, and the reservation will become
 * unsettled: ERR_STORAGE_FULL. */
enum err_code store_settle(struct store *store, struct store_settlement *settlements, size_t count,
                           int64_t deadline_ms) MUST_CHECK;

/* Reserves for the fallback key while the store is away: durable in the outbox when it returns.
 * Uses request_id, sequence, company_id, branch, requested_by, estimate_tokens, expires_ms and
 * idempotency_key. Errors: ERR_STORAGE_FULL; ERR_REQUEST_IN_PROGRESS or ERR_ALREADY_PROCESSED, as
 * far as this host knows. */
enum err_code store_reserve_offline(struct store *store, const struct store_acquire *acquire,
                                    struct err *err) MUST_CHECK;

/* What the outbox holds. */
struct store_outbox_status {
    int64_t waiting;   /* settlements and reservations that wait for the store */
    int64_t records;   /* log entries and retry attempts that do */
    int64_t dead;      /* entries that the store refused for good */
    int64_t oldest_ms; /* age of the oldest that waits; 0: none */
};

/* An outbox that does not exist yet is empty, and stays so: neither call creates it. */
enum err_code store_outbox_status(struct store *store, struct store_outbox_status *status,
                                  struct err *err) MUST_CHECK;
/* The same without a store, which may be away. */
enum err_code store_outbox_look(const struct config *config, struct store_outbox_status *status,
                                struct err *err) MUST_CHECK;
/* Replays what waits, now. *replayed: how many. Also done in the background every few seconds. */
enum err_code store_outbox_drain(struct store *store, int64_t *replayed,
                                 struct err *err) MUST_CHECK;

/* ---- in the background ---- */

struct store_retry_attempt {
    int64_t token_id; /* 0: NULL */
    int64_t wall_ms;
    int attempt; /* 1 for the first call of the request */
    bool is_retryable;
    int status_code;  /* 0: NULL, no answer */
    int64_t delay_ms; /* the wait that followed; 0: none */
    char request_id[UUID_TEXT_SIZE];
    char company_id[STORE_TEXT_SIZE];
    char error_message[512];
};

/* All in one transaction. again: an earlier call with them may have succeeded; those that are there
 * are not kept twice. */
enum err_code store_record(struct store *store, struct log_entry *const *entries,
                           size_t entry_count, const struct store_retry_attempt *const *attempts,
                           size_t attempt_count, bool again, struct err *err) MUST_CHECK;
/* Into the outbox, for a store that is away. Errors: ERR_STORAGE_FULL, ERR_CONFIG. */
enum err_code store_record_offline(struct store *store, struct log_entry *const *entries,
                                   size_t entry_count,
                                   const struct store_retry_attempt *const *attempts,
                                   size_t attempt_count, struct err *err) MUST_CHECK;

/* Reservations past their time (their process died) become unsettled, with an unknown call; their
 * requests' idempotency keys count as done, and keys older than 24 h go. *expired: how many
 * reservations. Any process may call it, about once a minute. */
enum err_code store_expire_reservations(struct store *store, int *expired,
                                        struct err *err) MUST_CHECK;

/* ---- administration; each change writes an AuditLog row in the same transaction ---- */

/* How a driver seals the API key of a token that it is about to add, in the same transaction: only
 * then is there a TokenID to bind it to. */
struct store_sealer {
    enum err_code (*seal)(void *context, int64_t token_id, const char *api_key,
                          char out[STORE_API_KEY_SIZE], struct err *err);
    void *context;
};

struct store_new_token {
    const char *company_id;
    const char *company_name; /* NULL: none */
    const char *provider;     /* NULL: 'Gemini' */
    const char *api_key;
    int64_t limit;                     /* -1: none */
    double threshold;                  /* share of the limit, 0 < t <= 1; 0: the default 0.8 */
    const struct store_sealer *sealer; /* for drivers; callers leave it NULL */
};

enum err_code store_token_add(struct store *store, const char *actor,
                              const struct store_new_token *token, int64_t *token_id,
                              struct err *err) MUST_CHECK;
/* status: Active, Expired, Exceeded or Disabled. reason may be NULL. Active ends a cooldown.
 * Errors here and below: ERR_NO_SUCH_ROW, ERR_BAD_VALUE. */
enum err_code store_token_set_status(struct store *store, const char *actor, int64_t token_id,
                                     const char *status, const char *reason,
                                     struct err *err) MUST_CHECK;
enum err_code store_token_set_key(struct store *store, const char *actor, int64_t token_id,
                                  const char *api_key, struct err *err) MUST_CHECK;
/* Seals by the sealing key of now each API key that is plain, or sealed by an older one. *sealed: how
 * many; *unreadable: how many are sealed by a key that is not there. Errors: ERR_CONFIG (no
 * seal.key_file). */
enum err_code store_seal_keys(struct store *store, const char *actor, int *sealed, int *unreadable,
                              struct err *err) MUST_CHECK;
/* Looks at each API key as a request would: called with the token and its fault: NULL: it is sealed
 * and opens; "": it is plain; else why it does not open. */
typedef void store_key_row(void *context, int64_t token_id, const char *fault);
enum err_code store_check_keys(struct store *store, store_key_row *row, void *context,
                               struct err *err) MUST_CHECK;
/* limit -1: none. threshold 0: unchanged. An Exceeded token with room again becomes Active. */
enum err_code store_token_set_limit(struct store *store, const char *actor, int64_t token_id,
                                    int64_t limit, double threshold, struct err *err) MUST_CHECK;

struct store_new_client_key {
    const char *id;
    const char *hash;       /* of the key, which the store never sees */
    const char *company_id; /* NULL: an administrator's key */
    const char *label;      /* for people; NULL: none */
};

enum err_code store_client_key_add(struct store *store, const char *actor,
                                   const struct store_new_client_key *key,
                                   struct err *err) MUST_CHECK;
/* Revoking a revoked key changes nothing. */
enum err_code store_client_key_revoke(struct store *store, const char *actor, const char *id,
                                      struct err *err) MUST_CHECK;

/* ---- queries: what extractctl and the administration pages show ---- */

enum store_view {
    VIEW_TOKENS, /* vw_TokenStatus; the key only by its last four characters */
    VIEW_USAGE_BY_DAY,
    VIEW_USAGE_BY_COMPANY,
    VIEW_USAGE_BY_BRANCH,
    VIEW_USAGE_BY_USER,
    VIEW_USAGE_BY_TOKEN,
    VIEW_LOGS,
    VIEW_ERRORS, /* ERROR and CRITICAL only */
    VIEW_RETRIES,
    VIEW_RESERVATIONS,     /* all that are open or unsettled */
    VIEW_UNSETTLED,        /* vw_UnsettledRequests */
    VIEW_TOKENS_BY_STATUS, /* status, count, sums */
    VIEW_CLIENT_KEYS,      /* never the hash */
    VIEW_AUDIT,
    /* of this host's outbox: also while the store is away, and no driver is asked */
    VIEW_OUTBOX,         /* what is dead or waits; never limited */
    VIEW_OUTBOX_BY_STATE /* state, count, age */
};

/* Unset members: NULL, 0 or -1 as said. */
struct store_filter {
    const char *company_id;
    const char *request_id;
    int64_t since_ms;  /* wall time; 0: no bound */
    int64_t until_ms;  /* 0: no bound */
    int64_t before_id; /* rows with a smaller ID than this (paging); 0: from the newest */
    int limit;         /* rows; 0: 1,000 */
};

enum store_type { STORE_NULL, STORE_INTEGER, STORE_REAL, STORE_TEXT };

struct store_value {
    enum store_type type;
    int64_t integer;
    double real;
    const char *text; /* STORE_TEXT; times as ISO 8601 in UTC */
};

/* Called for each row; names and values are borrowed for the call. Return false to stop. */
typedef bool store_row(void *context, size_t columns, const char *const *names,
                       const struct store_value *values);

/* Reads a view. Nothing of it is held once this returns. */
enum err_code store_query(struct store *store, enum store_view view,
                          const struct store_filter *filter, store_row *row, void *context,
                          struct err *err) MUST_CHECK;

#endif
