/* store_mssql_call.c - a call of a procedure on SQL Server, or a transaction of some, on whichever
 * connection is free, repeated where that can help; and what SQL Server's errors mean here. See
 * store_mssql.h.
 *
 * All that is known of error numbers stands in one table: the code that an error becomes, whether a
 * repeat can help, and what it means in words that hold no data. A new number is a new row.
 * https://learn.microsoft.com/sql/relational-databases/errors-events/database-engine-events-and-errors
 * https://learn.microsoft.com/azure/azure-sql/database/troubleshoot-common-errors-issues */
#include "store_mssql.h"

#include <stdio.h>

#include "clock.h"

#define AT_ONCE_MAX 3
#define PAUSE_MIN_MS 50
#define PAUSE_MAX_MS 1000
#define SEVERITY_RESOURCES 17 /* and above: not the caller's fault */

enum retry {
    RETRY_NEVER,
    RETRY_AT_ONCE, /* a few times */
    RETRY_LATER    /* with pauses, as long as there is time */
};

/* What a number is about, beside its code: what is to be done, explain_server knows. */
enum about { ABOUT_CALL, ABOUT_DATABASE, ABOUT_LOGIN, ABOUT_PASSWORD, ABOUT_RIGHTS };

static const struct known_error {
    int number;
    enum err_code code;
    enum retry retry;
    enum about about;
    const char *means;
} known_errors[] = {
    /* not now */
    {1205, ERR_STORE_UNAVAILABLE, RETRY_AT_ONCE, ABOUT_CALL,
     "deadlocks, again and again: try again"},
    {50010, ERR_STORE_UNAVAILABLE, RETRY_AT_ONCE, ABOUT_CALL, "the lock for disabling is busy"},
    {3960, ERR_STORE_UNAVAILABLE, RETRY_AT_ONCE, ABOUT_CALL,
     "update conflicts, again and again: try again"},
    {1222, ERR_STORE_UNAVAILABLE, RETRY_LATER, ABOUT_CALL, "a lock was not had in time"},
    {701, ERR_STORE_UNAVAILABLE, RETRY_LATER, ABOUT_CALL, "it is out of memory"},
    {8645, ERR_STORE_UNAVAILABLE, RETRY_LATER, ABOUT_CALL, "it is out of memory"},
    {8651, ERR_STORE_UNAVAILABLE, RETRY_LATER, ABOUT_CALL, "it is out of memory"},
    {3906, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_CALL, "the database is read-only"},
    {3908, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_CALL, "the database is being recovered"},
    {924, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_CALL, "the database is in single-user mode"},
    {976, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_CALL,
     "this is a secondary replica: name the "
     "listener as store.server"},
    {978, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_CALL,
     "this is a read-only replica: name the "
     "listener as store.server"},
    {983, ERR_STORE_UNAVAILABLE, RETRY_LATER, ABOUT_CALL, "the database changes its role"},
    {40197, ERR_STORE_UNAVAILABLE, RETRY_LATER, ABOUT_CALL, "the service is being reconfigured"},
    {40501, ERR_STORE_UNAVAILABLE, RETRY_LATER, ABOUT_CALL, "the service is busy"},
    {40613, ERR_STORE_UNAVAILABLE, RETRY_LATER, ABOUT_CALL, "the database is not available"},
    {40143, ERR_STORE_UNAVAILABLE, RETRY_LATER, ABOUT_CALL, "the service is being reconfigured"},
    {49918, ERR_STORE_UNAVAILABLE, RETRY_LATER, ABOUT_CALL, "not enough resources"},
    {49919, ERR_STORE_UNAVAILABLE, RETRY_LATER, ABOUT_CALL, "not enough resources"},
    {49920, ERR_STORE_UNAVAILABLE, RETRY_LATER, ABOUT_CALL, "not enough resources"},
    {10928, ERR_STORE_UNAVAILABLE, RETRY_LATER, ABOUT_CALL, "the limit of requests is reached"},
    {10929, ERR_STORE_UNAVAILABLE, RETRY_LATER, ABOUT_CALL, "the limit of requests is reached"},
    {4060, ERR_STORE_UNAVAILABLE, RETRY_LATER, ABOUT_DATABASE, "cannot be opened"},
    {911, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_DATABASE, "does not exist"},
    {916, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_DATABASE, "may not be opened"},
    /* the same procedure, for the same request, in two transactions at a time: one has written */
    {2601, ERR_INTERNAL, RETRY_AT_ONCE, ABOUT_CALL, "a row exists already"},
    {2627, ERR_INTERNAL, RETRY_AT_ONCE, ABOUT_CALL, "a row exists already"},
    /* among it lock timeouts, and a failure that does not come twice in a session */
    {MSSQL_NO_NUMBER, ERR_STORE_UNAVAILABLE, RETRY_AT_ONCE, ABOUT_CALL,
     "an error without a number"},
    /* full */
    {1105, ERR_STORAGE_FULL, RETRY_NEVER, ABOUT_CALL, "the database is full: make room in it"},
    {1101, ERR_STORAGE_FULL, RETRY_NEVER, ABOUT_CALL, "the database is full: make room in it"},
    {9002, ERR_STORAGE_FULL, RETRY_NEVER, ABOUT_CALL,
     "the transaction log is full: back it up, or let it grow"},
    {40544, ERR_STORAGE_FULL, RETRY_NEVER, ABOUT_CALL,
     "the database has reached its size quota: delete, or raise it"},
    /* the login */
    {18456, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_PASSWORD,
     "no such login, or another password"},
    {40532, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_PASSWORD, "no such login"},
    {18452, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_LOGIN,
     "it takes Windows logins only: allow SQL Server's own there, too"},
    {18470, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_LOGIN,
     "it is disabled: enable it there (ALTER LOGIN)"},
    {18486, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_LOGIN,
     "it is locked: unlock it there (ALTER LOGIN)"},
    {18487, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_LOGIN,
     "its password has expired: set another there (ALTER LOGIN)"},
    {18488, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_LOGIN,
     "its password must be changed: set another there (ALTER LOGIN)"},
    {4064, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_LOGIN,
     "its default database is gone: give it another there (ALTER LOGIN)"},
    {40615, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_LOGIN,
     "its firewall keeps this host out: add a rule there"},
    /* the schema, and rights in it */
    {2812, ERR_SCHEMA, RETRY_NEVER, ABOUT_CALL, "a procedure is missing"},
    {201, ERR_SCHEMA, RETRY_NEVER, ABOUT_CALL, "a procedure has other parameters"},
    {8144, ERR_SCHEMA, RETRY_NEVER, ABOUT_CALL, "a procedure has other parameters"},
    {8145, ERR_SCHEMA, RETRY_NEVER, ABOUT_CALL, "a procedure has other parameters"},
    {207, ERR_SCHEMA, RETRY_NEVER, ABOUT_CALL, "a column is missing"},
    {208, ERR_SCHEMA, RETRY_NEVER, ABOUT_CALL, "a table or view is missing"},
    {229, ERR_SCHEMA, RETRY_NEVER, ABOUT_RIGHTS, "the login lacks a right"},
    {230, ERR_SCHEMA, RETRY_NEVER, ABOUT_RIGHTS, "the login lacks a right"},
    {262, ERR_SCHEMA, RETRY_NEVER, ABOUT_RIGHTS, "the login lacks a right"},
    {297, ERR_SCHEMA, RETRY_NEVER, ABOUT_RIGHTS, "the login lacks a right"},
    {300, ERR_SCHEMA, RETRY_NEVER, ABOUT_RIGHTS, "the login lacks a right"},
    {1088, ERR_SCHEMA, RETRY_NEVER, ABOUT_RIGHTS, "the login lacks a right"},
    {2760, ERR_SCHEMA, RETRY_NEVER, ABOUT_RIGHTS, "the login lacks a right"},
    {3704, ERR_SCHEMA, RETRY_NEVER, ABOUT_RIGHTS, "the login lacks a right"},
    {15247, ERR_SCHEMA, RETRY_NEVER, ABOUT_RIGHTS, "the login lacks a right"},
    {15151, ERR_SCHEMA, RETRY_NEVER, ABOUT_RIGHTS, "the login lacks a right"},
    /* the data */
    {8152, ERR_BAD_VALUE, RETRY_NEVER, ABOUT_CALL, "a text is too long for its column"},
    {2628, ERR_BAD_VALUE, RETRY_NEVER, ABOUT_CALL, "a text is too long for its column"},
    {547, ERR_BAD_VALUE, RETRY_NEVER, ABOUT_CALL, "a value breaks a rule of the schema"},
    {515, ERR_BAD_VALUE, RETRY_NEVER, ABOUT_CALL, "a value is missing"},
    {245, ERR_BAD_VALUE, RETRY_NEVER, ABOUT_CALL, "a value is of another type"},
    {8114, ERR_BAD_VALUE, RETRY_NEVER, ABOUT_CALL, "a value is of another type"},
    {241, ERR_BAD_VALUE, RETRY_NEVER, ABOUT_CALL, "a value is no time"},
    {242, ERR_BAD_VALUE, RETRY_NEVER, ABOUT_CALL, "a value is no time"},
    {220, ERR_BAD_VALUE, RETRY_NEVER, ABOUT_CALL, "a number is too large"},
    {8115, ERR_BAD_VALUE, RETRY_NEVER, ABOUT_CALL, "a number is too large"},
    {13609, ERR_BAD_VALUE, RETRY_NEVER, ABOUT_CALL, "the values cannot be read"},
};

static const struct known_error *find_error(int number)
{
    for (size_t i = 0; i < sizeof known_errors / sizeof known_errors[0]; i++)
        if (known_errors[i].number == number)
            return &known_errors[i];
    return NULL;
}

static bool is_about(const struct mssql_failure *failure, enum about about)
{
    const struct known_error *error =
        failure->cause == MSSQL_SERVER ? find_error(failure->number) : NULL;

    return error != NULL && error->about == about;
}

bool mssql_is_login_refused(const struct mssql_failure *failure)
{
    return is_about(failure, ABOUT_LOGIN) || is_about(failure, ABOUT_PASSWORD);
}

bool mssql_lacks_right(const struct mssql_failure *failure)
{
    return is_about(failure, ABOUT_RIGHTS);
}

/* ---- words: what is wrong, and after a colon what to do about it ---- */

static enum err_code explain_server(const struct mssql_target *target,
                                    const struct mssql_failure *failure, struct err *err)
{
    const struct known_error *error = find_error(failure->number);
    const char *place = target->place;
    int number = failure->number;

    if (failure->text[0] != '\0')
        return err_set(err, error != NULL ? error->code : ERR_INTERNAL,
                       "SQL Server (%s): %s (error %d)", place, failure->text, number);
    if (error == NULL)
        return err_set(err,
                       failure->at_login || failure->severity >= SEVERITY_RESOURCES
                           ? ERR_STORE_UNAVAILABLE
                           : ERR_INTERNAL,
                       "SQL Server (%s): error %d, severity %d, line %d: its error log says more",
                       place, number, failure->severity, failure->line);
    switch (error->about) {
    case ABOUT_PASSWORD:
        return err_set(err, error->code,
                       "SQL Server (%s) refuses login %s (error %d): %s: correct %s; its error log "
                       "says more",
                       place, target->user, number, error->means, target->login_key);
    case ABOUT_LOGIN:
        return err_set(err, error->code, "SQL Server (%s) refuses login %s (error %d): %s", place,
                       target->user, number, error->means);
    case ABOUT_DATABASE:
        return err_set(err, error->code,
                       "SQL Server (%s): database %s %s (error %d): correct %s, or see that it "
                       "exists, is online and has a user for login %s",
                       place, target->database, error->means, number, target->database_key,
                       target->user);
    case ABOUT_RIGHTS:
        return err_set(err, error->code,
                       "SQL Server (%s): login %s may not do this (error %d): make its user a "
                       "member of role extract_app (for extractctl: extract_admin; for "
                       "store.reader_user: extract_reader)",
                       place, target->user, number);
    case ABOUT_CALL:
        break;
    }
    return err_set(err, error->code, "SQL Server (%s): %s (error %d)%s", place, error->means,
                   number, error->code == ERR_SCHEMA ? ": run `extractctl migrate`" : "");
}

/* Why is there no login though there is a connection? */
enum tls_fault {
    TLS_UNKNOWN,
    TLS_MISSING,   /* the server has none */
    TLS_UNTRUSTED, /* its certificate is nobody's that is known here */
    TLS_OTHER_NAME /* its certificate is for another name */
};

static enum err_code explain_tls(const struct mssql_target *target, enum tls_fault fault,
                                 struct err *err)
{
    const char *place = target->place;

    switch (fault) {
    case TLS_MISSING:
        return err_set(err, ERR_STORE_UNAVAILABLE,
                       "SQL Server (%s) offers no TLS that can be used: give it a certificate, or "
                       "do without (%s)",
                       place, target->encrypt_key);
    case TLS_UNTRUSTED:
        return err_set(err, ERR_STORE_UNAVAILABLE,
                       "the certificate of SQL Server (%s) has expired, or is not signed by a CA "
                       "that store.ca_file (%s) names: name there the file of its CA",
                       place, target->ca_file);
    case TLS_OTHER_NAME:
        return err_set(err, ERR_STORE_UNAVAILABLE,
                       "the certificate of SQL Server (%s) is not for the name %s: write the name "
                       "that it is for as %s",
                       place, target->server.host, target->server_key);
    case TLS_UNKNOWN:
        break;
    }
    return err_set(err, ERR_STORE_UNAVAILABLE,
                   "SQL Server (%s) answers, but there is no login: see that TLS can be used (%s) "
                   "and that its certificate is trusted (store.ca_file)",
                   place, target->encrypt_key);
}

/* HOST\INSTANCE can fail where HOST,PORT does not. */
static const char *about_instance(const struct mssql_target *target)
{
    return target->server.instance[0] != '\0'
               ? " (SQL Server Browser tells the port of an instance, by UDP 1434: HOST,PORT does "
                 "without)"
               : "";
}

enum err_code mssql_explain(const struct store_mssql *store, const struct mssql_failure *failure,
                            struct err *err)
{
    const struct mssql_target *target = store->target;
    bool has_text = failure->text[0] != '\0';

    switch (failure->cause) {
    case MSSQL_SERVER:
        return explain_server(target, failure, err);
    case MSSQL_REFUSED:
        return explain_tls(target, TLS_UNKNOWN, err);
    case MSSQL_UNREACHABLE:
        return err_set(err, ERR_STORE_UNAVAILABLE,
                       "SQL Server (%s) cannot be reached%s%s: see that it is up, or correct %s%s",
                       target->place, has_text ? ": " : "", failure->text, target->server_key,
                       about_instance(target));
    case MSSQL_TIMEOUT:
        return err_set(err, ERR_STORE_UNAVAILABLE,
                       "SQL Server (%s) does not answer in time: see that it is up, or correct "
                       "%s%s",
                       target->place, target->server_key, about_instance(target));
    case MSSQL_BROKEN:
        if (failure->at_login)
            return err_set(err, ERR_STORE_UNAVAILABLE,
                           "SQL Server (%s): the connection broke during the login: see its error "
                           "log, or correct %s",
                           target->place, target->server_key);
        return err_set(err, ERR_STORE_UNAVAILABLE,
                       "SQL Server (%s): the connection broke: see its error log", target->place);
    case MSSQL_BUSY:
        return err_set(err, ERR_STORE_UNAVAILABLE,
                       "SQL Server (%s): no connection became free in time (store.pool_size)",
                       target->place);
    case MSSQL_LOCAL:
        break;
    }
    if (has_text)
        return err_set(err, ERR_STORE_UNAVAILABLE, "SQL Server (%s): %s", target->place,
                       failure->text);
    return err_set(err, ERR_STORE_UNAVAILABLE, "SQL Server (%s): the client failed (FreeTDS %d)",
                   target->place, failure->library);
}

/* ---- looking what is wrong with TLS ---- */

/* How far does a login come that nobody has, over TLS? MSSQL_SERVER: the server has judged it. */
static enum mssql_cause try_tls(const struct mssql_target *target, bool checks_ca,
                                struct mssql_watch *watch)
{
    char no_ca[] = "";
    struct mssql_target nobody = *target;
    struct mssql_failure failure;
    struct mssql_conn *conn;
    bool is_in;

    snprintf(nobody.user, sizeof nobody.user, "extract-fcgi-tls-check");
    nobody.password_file = NULL;
    nobody.encrypt = ENCRYPT_REQUIRE;
    nobody.any_name = true;
    if (!checks_ca)
        nobody.ca_file = no_ca;
    if (mssql_library_add(&nobody, NULL) != ERR_NONE)
        return MSSQL_LOCAL;
    conn = mssql_login(&nobody, watch, &failure);
    is_in = conn != NULL;
    mssql_close(conn);
    return is_in ? MSSQL_SERVER : failure.cause;
}

/* Takes up to two logins, of nobody, which fail. */
static enum tls_fault find_tls_fault(const struct mssql_target *target)
{
    struct mssql_watch *watch = mssql_watch_start();
    enum tls_fault fault = TLS_UNKNOWN;
    enum mssql_cause cause;

    if (watch == NULL)
        return fault;
    cause = try_tls(target, false, watch);
    if (cause == MSSQL_REFUSED) {
        fault = TLS_MISSING;
    } else if (cause == MSSQL_SERVER && target->ca_file[0] != '\0') {
        cause = try_tls(target, true, watch);
        fault = cause == MSSQL_SERVER    ? TLS_OTHER_NAME
                : cause == MSSQL_REFUSED ? TLS_UNTRUSTED
                                         : TLS_UNKNOWN;
    }
    mssql_watch_stop(watch);
    return fault;
}

enum err_code mssql_explain_opening(const struct store_mssql *store,
                                    const struct mssql_failure *failure, struct err *err)
{
    if (failure->cause == MSSQL_REFUSED)
        return explain_tls(store->target, find_tls_fault(store->target), err);
    return mssql_explain(store, failure, err);
}

/* ---- calling ---- */

/* Is it unknown whether it happened? What an error of the server ended, on a connection that goes on,
 * was taken back (XACT_ABORT). */
static bool is_unknown(const struct mssql_failure *failure)
{
    return failure->must_drop && !failure->at_login;
}

static enum retry retry_of(const struct mssql_call *call, const struct mssql_failure *failure)
{
    const struct known_error *error;

    if ((call->row_once && failure->has_rows) || (call->once && is_unknown(failure)))
        return RETRY_NEVER;
    if (failure->cause == MSSQL_BROKEN)
        return RETRY_AT_ONCE;
    error = failure->cause == MSSQL_SERVER ? find_error(failure->number) : NULL;
    return error != NULL ? error->retry : RETRY_NEVER;
}

/* May the connection serve again? An error that nobody expects may leave a transaction open, and what
 * the next call does in it would be lost. */
static bool is_clean(const struct mssql_failure *failure)
{
    return !failure->must_drop && failure->number != MSSQL_NO_NUMBER &&
           find_error(failure->number) != NULL;
}

static bool call_once(struct store_mssql *store, const struct mssql_call *call, int64_t deadline_ms,
                      struct mssql_failure *failure)
{
    struct mssql_conn *conn = NULL;
    bool ok;

    *failure = (struct mssql_failure){.cause = MSSQL_LOCAL};
    if (!mssql_pool_take(store->pool, deadline_ms, &conn, failure))
        return false;
    ok = mssql_rpc(conn, call, deadline_ms, failure);
    if (ok || is_clean(failure))
        mssql_pool_give(store->pool, conn);
    else
        mssql_pool_drop(store->pool, conn, failure->cause == MSSQL_BROKEN);
    return ok;
}

/* The repeats of something, until the time is over. */
struct repeats {
    int64_t deadline_ms;
    int64_t pause_ms;
    int at_once;
    int broken;
};

static struct repeats begin_repeats(const struct store_mssql *store)
{
    return (struct repeats){.deadline_ms = clock_monotonic_ms() + store->timeout_ms,
                            .pause_ms = PAUSE_MIN_MS};
}

/* Is there another try? Pauses where there is to be a pause before it. */
static bool is_repeated(struct repeats *r, enum retry retry, const struct mssql_failure *failure)
{
    int64_t now_ms = clock_monotonic_ms();

    if (retry == RETRY_NEVER || now_ms >= r->deadline_ms)
        return false;
    r->broken += failure->cause == MSSQL_BROKEN;
    if (r->broken > 1 || (retry == RETRY_AT_ONCE && ++r->at_once > AT_ONCE_MAX))
        return false;
    if (retry == RETRY_LATER) {
        if (now_ms + r->pause_ms >= r->deadline_ms)
            return false;
        clock_sleep_until(now_ms + r->pause_ms);
        r->pause_ms = 2 * r->pause_ms < PAUSE_MAX_MS ? 2 * r->pause_ms : PAUSE_MAX_MS;
    }
    return true;
}

bool mssql_try(struct store_mssql *store, const struct mssql_call *call,
               struct mssql_failure *failure)
{
    struct repeats repeats = begin_repeats(store);
    bool perhaps_happened = false;
    bool ok;

    do {
        ok = call_once(store, call, repeats.deadline_ms, failure);
        perhaps_happened = !ok && (perhaps_happened || is_unknown(failure));
    } while (!ok && is_repeated(&repeats, retry_of(call, failure), failure));
    if (call->perhaps_happened != NULL)
        *call->perhaps_happened = perhaps_happened;
    return ok;
}

enum err_code mssql_call(struct store_mssql *store, const struct mssql_call *call, struct err *err)
{
    struct mssql_failure failure;

    return mssql_try(store, call, &failure) ? ERR_NONE : mssql_explain(store, &failure, err);
}

/* ---- transactions ---- */

/* Where it is not committed the connection is closed, and with it the transaction is over, whatever
 * became of it. */
static bool transact_once(struct store_mssql *store, mssql_steps_run *run, void *context,
                          int64_t deadline_ms, bool *committing, struct mssql_failure *failure)
{
    struct mssql_failure ignored;
    struct mssql_conn *conn = NULL;
    enum mssql_steps steps = MSSQL_FAILED;

    *committing = false;
    *failure = (struct mssql_failure){.cause = MSSQL_LOCAL};
    if (!mssql_pool_take(store->pool, deadline_ms, &conn, failure))
        return false;
    if (mssql_batch(conn, "BEGIN TRANSACTION", deadline_ms, failure))
        steps = run(conn, context, deadline_ms, failure);
    *committing = steps == MSSQL_COMMIT;
    if (*committing && mssql_batch(conn, "COMMIT TRANSACTION", deadline_ms, failure)) {
        mssql_pool_give(store->pool, conn);
        return true;
    }
    if (steps == MSSQL_ROLL_BACK) /* so that its locks are gone before the caller goes on */
        (void)!mssql_batch(conn, "ROLLBACK TRANSACTION", deadline_ms, &ignored);
    mssql_pool_drop(store->pool, conn, failure->cause == MSSQL_BROKEN);
    return steps == MSSQL_ROLL_BACK;
}

enum err_code mssql_transact(struct store_mssql *store, mssql_steps_run *run, void *context,
                             struct err *err)
{
    static const struct mssql_call any = {.procedure = NULL};
    struct repeats repeats = begin_repeats(store);
    struct mssql_failure failure;
    bool committing, ok;

    do {
        ok = transact_once(store, run, context, repeats.deadline_ms, &committing, &failure);
    } while (!ok && !(committing && is_unknown(&failure)) &&
             is_repeated(&repeats, retry_of(&any, &failure), &failure));
    return ok ? ERR_NONE : mssql_explain(store, &failure, err);
}
