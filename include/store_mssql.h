/* store_mssql.h - the inside of the store on SQL Server, for its own files (store_mssql*.c) only.
 *
 *   store_mssql.c          open, close, ping, log entries; the driver's table of functions
 *   store_mssql_target.c   where to log in and as whom, from the configuration or DBConnection.txt
 *   store_mssql_conn.c     one connection: db-lib; logins, TLS, calls, errors and messages
 *   store_mssql_watch.c    ends calls and logins that take longer than they may
 *   store_mssql_pool.c     the connections of a process
 *   store_mssql_call.c     a call on any connection: repeated where that helps; what errors mean
 *   store_mssql_schema.c   the schema's version; setting it up
 *   store_mssql_request.c  acquire and settle
 *   store_mssql_admin.c    administration: tokens, client keys
 *   store_mssql_query.c    views for people
 *
 * Only conn knows db-lib. All SQL that leaves the process, but for fixed session settings, the ends of
 * transactions and the setup script, is calls of the procedures of sql/setup_database.sql, with
 * parameters. */
#ifndef EXTRACT_STORE_MSSQL_H
#define EXTRACT_STORE_MSSQL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "buf.h"
#include "connection_string.h"
#include "store_check.h"

/* ---- store_mssql_target.c ---- */

/* Where to log in, and as whom. Texts are the target's own; the password is not among them: it is
 * read for each login, and so may be changed while the service runs. */
struct mssql_target {
    struct connection_server server;
    char place[CONNECTION_HOST_SIZE + 24]; /* "host:port", for messages */
    char database[CONNECTION_TEXT_SIZE];
    char user[CONNECTION_TEXT_SIZE];
    char application[CONNECTION_TEXT_SIZE];
    char workstation[CONNECTION_TEXT_SIZE];
    char *password_file;     /* NULL: without a password */
    bool is_connection_file; /* password_file is a DBConnection.txt */
    int encrypt;             /* enum config_encrypt */
    char *ca_file;           /* "system"; "": the certificate is not checked */
    bool any_name;           /* the certificate may be for another host */
    int64_t timeout_ms;      /* of a call */
    int login_timeout_s;
    char section[40]; /* of freetds.conf */
    /* what a person corrects, for messages: "store.user and store.password_file" */
    const char *server_key;
    const char *database_key;
    const char *login_key;
    const char *password_key; /* not of a connection_file */
    const char *encrypt_key;
};

/* Errors: ERR_CONFIG. mssql_target_reset in either case. */
enum err_code mssql_target_init(struct mssql_target *target, const struct config *config,
                                struct err *err) MUST_CHECK;
void mssql_target_reset(struct mssql_target *target);
/* The password, which the caller wipes. Errors: ERR_CONFIG. */
enum err_code mssql_target_password(const struct mssql_target *target,
                                    char password[CONNECTION_TEXT_SIZE],
                                    struct err *err) MUST_CHECK;

/* ---- store_mssql_conn.c ---- */

enum mssql_cause {
    MSSQL_SERVER,      /* the server says no: number tells why */
    MSSQL_UNREACHABLE, /* no connection */
    MSSQL_BROKEN,      /* the connection broke */
    MSSQL_TIMEOUT,     /* no answer in time */
    MSSQL_BUSY,        /* no connection became free in time */
    MSSQL_REFUSED,     /* TLS or the protocol itself failed */
    MSSQL_LOCAL        /* here: no memory, a password file that cannot be read, ... */
};

/* What Babelfish, which speaks for PostgreSQL, says of all that it has no number for. */
#define MSSQL_NO_NUMBER 33557097

/* Why a login or a call did not succeed. */
struct mssql_failure {
    enum mssql_cause cause;
    int number; /* the server's error number; 0: none came */
    int severity;
    int line;       /* of the procedure or batch */
    int library;    /* db-lib's error number; 0: none */
    bool must_drop; /* the connection cannot be used any more */
    bool has_rows;  /* rows were handed out before */
    bool at_login;
    char text[400]; /* the server's words where they are our own script's (50000 to 59999), or what
                       happened here; "" else */
};

struct mssql_conn;
struct mssql_watch;

/* Before all else; may be called again. Errors: ERR_INTERNAL, ERR_CONFIG. */
enum err_code mssql_library_start(struct err *err) MUST_CHECK;
/* Tells db-lib of the target. Errors: ERR_CONFIG, ERR_INTERNAL. */
enum err_code mssql_library_add(struct mssql_target *target, struct err *err) MUST_CHECK;

/* Logs in, and makes the session settings. NULL: failure says why. Takes at most login_timeout_s
 * once the server's name is resolved. */
struct mssql_conn *mssql_login(const struct mssql_target *target, struct mssql_watch *watch,
                               struct mssql_failure *failure) MUST_CHECK;
void mssql_close(struct mssql_conn *conn);
/* Since the login. */
int64_t mssql_age_ms(const struct mssql_conn *conn);
/* Did the server, or the network, not end it while it was unused? */
bool mssql_is_alive(const struct mssql_conn *conn);

/* A parameter. Texts are UTF-8 (what is not is made so) of any length; an empty one arrives as
 * NULL. */
struct mssql_param {
    const char *name; /* "@Items" */
    struct store_value value;
    enum store_type type; /* of a NULL, too */
};

static inline struct mssql_param mssql_text(const char *name, const char *s)
{
    return (struct mssql_param){
        name, {.type = s == NULL ? STORE_NULL : STORE_TEXT, .text = s}, STORE_TEXT};
}
static inline struct mssql_param mssql_int(const char *name, int64_t n)
{
    return (struct mssql_param){name, {.type = STORE_INTEGER, .integer = n}, STORE_INTEGER};
}
static inline struct mssql_param mssql_int_or_null(const char *name, bool is_null, int64_t n)
{
    return (struct mssql_param){
        name, {.type = is_null ? STORE_NULL : STORE_INTEGER, .integer = n}, STORE_INTEGER};
}
static inline struct mssql_param mssql_real_or_null(const char *name, bool is_null, double x)
{
    return (struct mssql_param){
        name, {.type = is_null ? STORE_NULL : STORE_REAL, .real = x}, STORE_REAL};
}

struct mssql_call {
    const char *procedure;
    const struct mssql_param *params;
    size_t count;
    store_row *row; /* for each row of every result; NULL: none is wanted */
    void *context;
    int *status;   /* what the procedure returns; may be NULL */
    bool row_once; /* rows cannot be taken back: not repeated once one was handed out */
    bool once;     /* not idempotent: not repeated where it is unknown whether it happened */
    /* Of one that failed for good: may it have happened, this time or before a repeat? May be NULL. */
    bool *perhaps_happened;
};

/* One call, until deadline_ms (monotonic); the time that row() takes does not count. False: failure
 * says why. */
bool mssql_rpc(struct mssql_conn *conn, const struct mssql_call *call, int64_t deadline_ms,
               struct mssql_failure *failure) MUST_CHECK;
/* One batch of SQL, whose results are thrown away; what it prints is logged. */
bool mssql_batch(struct mssql_conn *conn, const char *sql, int64_t deadline_ms,
                 struct mssql_failure *failure) MUST_CHECK;

/* ---- store_mssql_watch.c ---- */

/* A thread that watches deadlines. NULL: it cannot be started. */
struct mssql_watch *mssql_watch_start(void) MUST_CHECK;
/* When all its guards are gone. */
void mssql_watch_stop(struct mssql_watch *watch);

/* Of one connection or login. The members are the watch's. */
struct mssql_guard {
    struct mssql_guard *next;
    struct mssql_watch *watch;
    int fd; /* a duplicate, the guard's; -1: of a login under way */
    int64_t deadline_ms;
    bool is_ending; /* the server has closed the connection */
    bool fired;
};

/* Takes fd over. */
void mssql_guard_init(struct mssql_guard *guard, struct mssql_watch *watch, int take_fd);
void mssql_guard_reset(struct mssql_guard *guard);
/* From deadline_ms (monotonic) on the connection is reset, for good, so that whoever reads from it or
 * writes to it gets an error; and earlier, where the server has closed it and nobody took notice. */
void mssql_guard_arm(struct mssql_guard *guard, int64_t deadline_ms);
/* Was it reset for its deadline? */
bool mssql_guard_disarm(struct mssql_guard *guard);

/* ---- store_mssql_pool.c ---- */

#define MSSQL_POOL_MAX 256

struct mssql_pool;

/* Takes what the target holds over. Opens no connection yet. NULL without memory or threads. */
struct mssql_pool *mssql_pool_new(struct mssql_target *take_target, int size) MUST_CHECK;
const struct mssql_target *mssql_pool_target(const struct mssql_pool *pool);
/* When all connections were given back. */
void mssql_pool_free(struct mssql_pool *pool);
/* A connection for the calling thread alone, until deadline_ms (monotonic). False: failure says
 * why. */
bool mssql_pool_take(struct mssql_pool *pool, int64_t deadline_ms, struct mssql_conn **conn,
                     struct mssql_failure *failure) MUST_CHECK;
/* One that can serve again. */
void mssql_pool_give(struct mssql_pool *pool, struct mssql_conn *conn);
/* One that cannot; and the unused ones, too: what broke one has mostly broken all. */
void mssql_pool_drop(struct mssql_pool *pool, struct mssql_conn *conn, bool and_unused);

/* ---- store_mssql_call.c ---- */

struct store_mssql {
    struct mssql_pool *pool;
    const struct mssql_target *target; /* the pool's */
    int64_t timeout_ms;
    int pool_size;
    int version; /* of the schema */
};

/* Calls, within store.query_timeout, and again where a repeat can help. */
enum err_code mssql_call(struct store_mssql *store, const struct mssql_call *call,
                         struct err *err) MUST_CHECK;
/* The same; false: failure says why. */
bool mssql_try(struct store_mssql *store, const struct mssql_call *call,
               struct mssql_failure *failure) MUST_CHECK;
/* What the steps of a transaction end in. */
enum mssql_steps { MSSQL_COMMIT, MSSQL_ROLL_BACK, MSSQL_FAILED /* failure says why */ };
typedef enum mssql_steps mssql_steps_run(struct mssql_conn *conn, void *context,
                                         int64_t deadline_ms, struct mssql_failure *failure);
/* Calls run within a transaction on one connection; again, from the start, where that can help and
 * nothing can have happened. ERR_NONE: committed, or rolled back as run wanted it. */
enum err_code mssql_transact(struct store_mssql *store, mssql_steps_run *run, void *context,
                             struct err *err) MUST_CHECK;
/* The code of a failure, with a message that holds no data. */
enum err_code mssql_explain(const struct store_mssql *store, const struct mssql_failure *failure,
                            struct err *err);
/* The same for a store that cannot be opened: takes its time to look what is wrong with TLS. */
enum err_code mssql_explain_opening(const struct store_mssql *store,
                                    const struct mssql_failure *failure, struct err *err);
/* Did the server understand the login and refuse it? */
bool mssql_is_login_refused(const struct mssql_failure *failure);
/* Does it say that the login may not do this? */
bool mssql_lacks_right(const struct mssql_failure *failure);

/* The parameters of a call. */
#define MSSQL_PARAMS(...)                                \
    .params = (const struct mssql_param[]){__VA_ARGS__}, \
    .count = sizeof((const struct mssql_param[]){__VA_ARGS__}) / sizeof(struct mssql_param)

/* ---- store_mssql_schema.c ---- */

/* Finds the schema's version, and sets the schema up where that is needed and allowed. Errors:
 * ERR_SCHEMA, ERR_STORE_UNAVAILABLE. */
enum err_code mssql_ensure_schema(struct store_mssql *store, bool may_set_up,
                                  struct err *err) MUST_CHECK;

/* ---- the driver's functions; see store_driver.h ---- */

enum err_code mssql_acquire(void *self, struct store_acquire *const *items, size_t count,
                            struct err *err) MUST_CHECK;
enum err_code mssql_settle(void *self, struct store_settlement *const *items, size_t count,
                           struct err *err) MUST_CHECK;
enum err_code mssql_token_add(void *self, const char *actor, const struct store_new_token *token,
                              int64_t *token_id, struct err *err) MUST_CHECK;
enum err_code mssql_token_set_status(void *self, const char *actor, int64_t token_id,
                                     const char *status, const char *reason,
                                     struct err *err) MUST_CHECK;
enum err_code mssql_token_set_key(void *self, const char *actor, int64_t token_id,
                                  const char *api_key, struct err *err) MUST_CHECK;
enum err_code mssql_token_keys(void *self, int64_t after_id, struct store_token_key *keys,
                               size_t max, size_t *count, struct err *err) MUST_CHECK;
enum err_code mssql_token_reseal(void *self, const char *actor, const struct store_token_key *key,
                                 const char *sealed, struct err *err) MUST_CHECK;
enum err_code mssql_token_set_limit(void *self, const char *actor, int64_t token_id, int64_t limit,
                                    double threshold, struct err *err) MUST_CHECK;
enum err_code mssql_client_key_find(void *self, const char *hash, struct store_client_key *key,
                                    struct err *err) MUST_CHECK;
enum err_code mssql_client_key_add(void *self, const char *actor,
                                   const struct store_new_client_key *key,
                                   struct err *err) MUST_CHECK;
enum err_code mssql_client_key_revoke(void *self, const char *actor, const char *id,
                                      struct err *err) MUST_CHECK;
enum err_code mssql_query(void *self, enum store_view view, const struct store_filter *filter,
                          store_row *row, void *context, struct err *err) MUST_CHECK;

/* ---- rows ---- */

/* Column at of a row, as it is expected; NULL, 0 or "" where it is something else. */
static inline const char *mssql_column_text(const struct store_value *values, size_t columns,
                                            size_t at)
{
    return at < columns && values[at].type == STORE_TEXT ? values[at].text : NULL;
}
static inline int64_t mssql_column_int(const struct store_value *values, size_t columns, size_t at)
{
    return at < columns && values[at].type == STORE_INTEGER ? values[at].integer : 0;
}

#endif
