/* store_mssql_call.c - a call of a procedure on SQL Server, on whichever connection is free, repeated
 * where that can help; and what SQL Server's errors mean here. See store_mssql.h.
 *
 * All that is known of error numbers stands in one table: the code that an error becomes, whether a
 * repeat can help, and what it means in words that hold no data. A new number is a new row.
 * https://learn.microsoft.com/sql/relational-databases/errors-events/database-engine-events-and-errors
 * https://learn.microsoft.com/azure/azure-sql/database/troubleshoot-common-errors-issues */
#include "store_mssql.h"

#include <string.h>

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

/* What a number is about, beside its code. */
enum about { ABOUT_CALL, ABOUT_LOGIN, ABOUT_RIGHTS };

static const struct known_error {
    int number;
    enum err_code code;
    enum retry retry;
    enum about about;
    const char *means;
} known_errors[] = {
    /* not now */
    {1205, ERR_STORE_UNAVAILABLE, RETRY_AT_ONCE, ABOUT_CALL, "deadlocks, again and again"},
    {50010, ERR_STORE_UNAVAILABLE, RETRY_AT_ONCE, ABOUT_CALL, "the lock for disabling is busy"},
    {3960, ERR_STORE_UNAVAILABLE, RETRY_AT_ONCE, ABOUT_CALL, "update conflicts, again and again"},
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
    {4060, ERR_STORE_UNAVAILABLE, RETRY_LATER, ABOUT_CALL,
     "the database cannot be opened: it does not exist, is not online, or the login has no user in "
     "it"},
    {911, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_CALL, "there is no such database"},
    /* the same procedure, for the same request, in two transactions at a time: one has written */
    {2601, ERR_INTERNAL, RETRY_AT_ONCE, ABOUT_CALL, "a row exists already"},
    {2627, ERR_INTERNAL, RETRY_AT_ONCE, ABOUT_CALL, "a row exists already"},
    /* among it lock timeouts, and a failure that does not come twice in a session */
    {MSSQL_NO_NUMBER, ERR_STORE_UNAVAILABLE, RETRY_AT_ONCE, ABOUT_CALL,
     "an error without a number"},
    /* full */
    {1105, ERR_STORAGE_FULL, RETRY_NEVER, ABOUT_CALL, "the database is full"},
    {1101, ERR_STORAGE_FULL, RETRY_NEVER, ABOUT_CALL, "the database is full"},
    {9002, ERR_STORAGE_FULL, RETRY_NEVER, ABOUT_CALL, "the database's transaction log is full"},
    {40544, ERR_STORAGE_FULL, RETRY_NEVER, ABOUT_CALL, "the database has reached its size quota"},
    /* the login */
    {18456, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_LOGIN,
     "wrong login or password, or the login may not open the database"},
    {18452, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_LOGIN, "it takes Windows logins only"},
    {18470, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_LOGIN, "the login is disabled"},
    {18486, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_LOGIN, "the login is locked"},
    {18487, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_LOGIN, "the password has expired"},
    {18488, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_LOGIN, "the password must be changed"},
    {4064, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_LOGIN, "the login's default database is gone"},
    {916, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_LOGIN, "the login has no user in the database"},
    {40532, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_LOGIN, "wrong login"},
    {40615, ERR_STORE_UNAVAILABLE, RETRY_NEVER, ABOUT_LOGIN, "its firewall keeps this host out"},
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
    return is_about(failure, ABOUT_LOGIN);
}

bool mssql_lacks_right(const struct mssql_failure *failure)
{
    return is_about(failure, ABOUT_RIGHTS);
}

/* ---- words ---- */

static enum err_code explain_server(const struct mssql_target *target,
                                    const struct mssql_failure *failure, struct err *err)
{
    const struct known_error *error = find_error(failure->number);
    int number = failure->number;

    if (failure->text[0] != '\0')
        return err_set(err, error != NULL ? error->code : ERR_INTERNAL,
                       "SQL Server (%s): %s (error %d)", target->place, failure->text, number);
    if (error == NULL)
        return err_set(err,
                       failure->at_login || failure->severity >= SEVERITY_RESOURCES
                           ? ERR_STORE_UNAVAILABLE
                           : ERR_INTERNAL,
                       "SQL Server (%s): error %d, severity %d, line %d", target->place, number,
                       failure->severity, failure->line);
    if (error->about == ABOUT_LOGIN)
        return err_set(err, error->code,
                       "SQL Server (%s) refuses login %s: %s (error %d; its error log says more)",
                       target->place, target->user, error->means, number);
    if (error->about == ABOUT_RIGHTS)
        return err_set(err, error->code,
                       "SQL Server (%s): login %s may not do this (error %d): make its user a "
                       "member of role extract_app, for extractctl of extract_admin",
                       target->place, target->user, number);
    if (error->code == ERR_SCHEMA)
        return err_set(err, error->code, "SQL Server (%s): %s (error %d): run `extractctl migrate`",
                       target->place, error->means, number);
    return err_set(err, error->code, "SQL Server (%s): %s (error %d)", target->place, error->means,
                   number);
}

enum err_code mssql_explain(const struct store_mssql *store, const struct mssql_failure *failure,
                            struct err *err)
{
    const struct mssql_target *target = store->target;
    bool has_text = failure->text[0] != '\0';

    switch (failure->cause) {
    case MSSQL_SERVER:
        return explain_server(target, failure, err);
    case MSSQL_UNREACHABLE:
        return err_set(err, ERR_STORE_UNAVAILABLE, "SQL Server (%s) cannot be reached%s%s",
                       target->place, has_text ? ": " : "", failure->text);
    case MSSQL_BROKEN:
        return err_set(err, ERR_STORE_UNAVAILABLE, "SQL Server (%s): the connection broke",
                       target->place);
    case MSSQL_TIMEOUT:
        return err_set(err, ERR_STORE_UNAVAILABLE, "SQL Server (%s) does not answer in time",
                       target->place);
    case MSSQL_BUSY:
        return err_set(err, ERR_STORE_UNAVAILABLE,
                       "SQL Server (%s): no connection became free in time", target->place);
    case MSSQL_REFUSED:
        return err_set(err, ERR_STORE_UNAVAILABLE,
                       "SQL Server (%s) answers, but there is no login%s", target->place,
                       target->encrypt == ENCRYPT_OFF ? ": perhaps it requires TLS (store.encrypt)"
                       : target->ca_file[0] == '\0'
                           ? ": perhaps it offers no TLS (store.encrypt)"
                           : ": perhaps it offers no TLS, or its certificate is not for this name "
                             "or not one that store.ca_file trusts");
    case MSSQL_LOCAL:
        break;
    }
    return err_set(err, ERR_STORE_UNAVAILABLE, "SQL Server (%s): %s (FreeTDS %d)", target->place,
                   has_text ? failure->text : "the client failed", failure->library);
}

/* ---- calling ---- */

static enum retry retry_of(const struct mssql_call *call, const struct mssql_failure *failure)
{
    const struct known_error *error;

    if (call->row_once && failure->has_rows)
        return RETRY_NEVER;
    if (failure->cause == MSSQL_BROKEN)
        return call->once ? RETRY_NEVER : RETRY_AT_ONCE;
    error = failure->cause == MSSQL_SERVER ? find_error(failure->number) : NULL;
    return error != NULL ? error->retry : RETRY_NEVER;
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
    mssql_pool_give(store->pool, conn, ok ? NULL : failure);
    return ok;
}

bool mssql_try(struct store_mssql *store, const struct mssql_call *call,
               struct mssql_failure *failure)
{
    int64_t deadline_ms = clock_monotonic_ms() + store->timeout_ms;
    int64_t pause_ms = PAUSE_MIN_MS;
    int at_once = 0;
    int broken = 0;

    while (!call_once(store, call, deadline_ms, failure)) {
        enum retry retry = retry_of(call, failure);
        int64_t now_ms = clock_monotonic_ms();
        if (retry == RETRY_NEVER || now_ms >= deadline_ms)
            return false;
        broken += failure->cause == MSSQL_BROKEN;
        if (broken > 1 || (retry == RETRY_AT_ONCE && ++at_once > AT_ONCE_MAX))
            return false;
        if (retry == RETRY_LATER) {
            if (now_ms + pause_ms >= deadline_ms)
                return false;
            clock_sleep_until(now_ms + pause_ms);
            pause_ms = 2 * pause_ms < PAUSE_MAX_MS ? 2 * pause_ms : PAUSE_MAX_MS;
        }
    }
    return true;
}

enum err_code mssql_call(struct store_mssql *store, const struct mssql_call *call, struct err *err)
{
    struct mssql_failure failure;

    return mssql_try(store, call, &failure) ? ERR_NONE : mssql_explain(store, &failure, err);
}
