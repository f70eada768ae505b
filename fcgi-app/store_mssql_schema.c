/* store_mssql_schema.c - the schema on SQL Server: its version, and setting it up. See store_mssql.h.
 *
 * sql/setup_database.sql is compiled in, and run as sqlcmd would: split at its GO lines, batch by
 * batch. It is idempotent, and what a batch did stays when a later one fails; the version is the last
 * that it writes. An application lock lets one process at a time do it: of ten that start at once,
 * nine find it done. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "clock.h"
#include "embed.h"
#include "log.h"
#include "store_mssql.h"

/* What sql/setup_database.sql sets up. */
#define SCHEMA_VERSION 6
#define SCHEMA_MAJOR 1
#define NO_SUCH_PROCEDURE 2812
#define LOCK_WAIT_MS 120000
#define BATCH_MS INT64_C(1800000) /* an upgrade may copy a large table */
#define SCRIPT_MAX ((size_t)4 * 1024 * 1024)

struct version {
    int version; /* 0: there is no schema */
    int major;
};

static bool take_version(void *context, size_t columns, const char *const *names,
                         const struct store_value *values)
{
    struct version *version = context;

    (void)names;
    version->version = (int)mssql_column_int(values, columns, 0);
    version->major = (int)mssql_column_int(values, columns, 1);
    return false;
}

static const char version_procedure[] = "dbo.usp_SchemaVersion";

/* On conn, or on any for NULL. */
static bool read_version(struct store_mssql *store, struct mssql_conn *conn,
                         struct version *version, struct mssql_failure *failure)
{
    const struct mssql_call call = {
        .procedure = version_procedure, .row = take_version, .context = version};
    int64_t deadline_ms = clock_monotonic_ms() + store->timeout_ms;
    bool ok;

    *version = (struct version){.version = 0};
    ok = conn != NULL ? mssql_rpc(conn, &call, deadline_ms, failure)
                      : mssql_try(store, &call, failure);
    return ok || (failure->cause == MSSQL_SERVER &&
                  (failure->number == NO_SUCH_PROCEDURE || failure->number == MSSQL_NO_NUMBER));
}

static enum err_code judge(struct store_mssql *store, const struct version *version,
                           struct err *err)
{
    store->version = version->version;
    if (version->major > SCHEMA_MAJOR)
        return err_set(err, ERR_SCHEMA,
                       "the schema (version %d) is newer than this program understands",
                       version->version);
    return ERR_NONE;
}

/* ---- the script ---- */

static bool is_go(const char *line, size_t len)
{
    while (len > 0 && (*line == ' ' || *line == '\t')) {
        line++;
        len--;
    }
    while (len > 0 && strchr(" \t\r", line[len - 1]) != NULL)
        len--;
    return len == 2 && strncasecmp(line, "GO", 2) == 0;
}

/* Where the script is read. */
struct script {
    const char *at;
    int line;  /* of at, from 1 */
    int first; /* line of the batch read last */
};

/* The next batch, without its GO line, into batch. False: there is none. */
static bool next_batch(struct script *script, struct buf *batch)
{
    const char *begin = script->at;
    const char *line = begin;

    buf_clear(batch);
    script->first = script->line;
    while (*line != '\0') {
        size_t len = strcspn(line, "\n");
        script->at = line + len + (line[len] == '\n');
        script->line++;
        if (is_go(line, len)) {
            buf_append(batch, begin, (size_t)(line - begin));
            return true;
        }
        line = script->at;
    }
    buf_append(batch, begin, (size_t)(line - begin));
    return line != begin;
}

static bool is_blank(const struct buf *batch)
{
    const char *text = buf_str(batch);
    return text[strspn(text, " \t\r\n")] == '\0';
}

/* What went wrong with a batch of the script. */
static enum err_code batch_failed(const struct store_mssql *store,
                                  const struct mssql_failure *failure, int first_line,
                                  struct err *err)
{
    enum err_code code = mssql_explain(store, failure, err);

    if (mssql_lacks_right(failure))
        return err_set(err, ERR_SCHEMA,
                       "login %s may not create or change the schema (error %d): run `extractctl "
                       "migrate` with a store.admin_user who may",
                       store->target->user, failure->number);
    if ((code != ERR_STORE_UNAVAILABLE && code != ERR_STORAGE_FULL) ||
        failure->number == MSSQL_NO_NUMBER)
        err->code = ERR_SCHEMA;
    if (failure->text[0] != '\0') /* the script says itself what is in its way */
        return err_set(err, err->code, "%s", failure->text);
    return err_prefix(err, "setup_database.sql, line %d", first_line + failure->line - 1);
}

static enum err_code run_script(struct store_mssql *store, struct mssql_conn *conn,
                                struct mssql_failure *failure, struct err *err)
{
    struct script script = {.at = embed_setup_database, .line = 1};
    enum err_code code = ERR_NONE;
    struct buf batch;

    buf_init(&batch, SCRIPT_MAX);
    while (code == ERR_NONE && next_batch(&script, &batch)) {
        if (!buf_ok(&batch))
            code = err_set(err, ERR_INTERNAL, "no memory for the setup script");
        else if (!is_blank(&batch) &&
                 !mssql_batch(conn, buf_str(&batch), clock_monotonic_ms() + BATCH_MS, failure))
            code = batch_failed(store, failure, script.first, err);
    }
    buf_reset(&batch);
    return code;
}

/* ---- the lock ---- */

static enum err_code take_lock(struct store_mssql *store, struct mssql_conn *conn,
                               struct mssql_failure *failure, struct err *err)
{
    int status = -999;
    const struct mssql_call call = {.procedure = "sp_getapplock",
                                    .status = &status,
                                    MSSQL_PARAMS(mssql_text("@Resource", "extract-fcgi setup"),
                                                 mssql_text("@LockMode", "Exclusive"),
                                                 mssql_text("@LockOwner", "Session"),
                                                 mssql_int("@LockTimeout", LOCK_WAIT_MS))};

    if (!mssql_rpc(conn, &call, clock_monotonic_ms() + LOCK_WAIT_MS + store->timeout_ms, failure))
        return mssql_explain(store, failure, err);
    if (status < 0)
        return err_set(err, ERR_STORE_UNAVAILABLE,
                       "another process has been setting up the schema for %d seconds",
                       LOCK_WAIT_MS / 1000);
    return ERR_NONE;
}

static enum err_code set_up_locked(struct store_mssql *store, struct mssql_conn *conn,
                                   struct mssql_failure *failure, struct err *err)
{
    struct version version;
    enum err_code code = take_lock(store, conn, failure, err);

    if (code != ERR_NONE)
        return code;
    if (!read_version(store, conn, &version, failure))
        return mssql_explain(store, failure, err);
    if (version.version < SCHEMA_VERSION) {
        log_info(NULL, "setting up the schema of database %s on SQL Server (%s)",
                 store->target->database, store->target->place);
        code = run_script(store, conn, failure, err);
        if (code == ERR_NONE && !read_version(store, conn, &version, failure))
            code = mssql_explain(store, failure, err);
        if (code == ERR_NONE && version.version < SCHEMA_VERSION)
            code = err_set(err, ERR_SCHEMA, "the setup script has left no schema");
    }
    return code == ERR_NONE ? judge(store, &version, err) : code;
}

/* On a connection that is not used again: the script changes its settings, and the lock ends with
 * it. */
static enum err_code set_up(struct store_mssql *store, struct err *err)
{
    struct mssql_failure failure = {.cause = MSSQL_LOCAL};
    struct mssql_conn *conn = NULL;
    enum err_code code;

    if (!mssql_pool_take(store->pool, clock_monotonic_ms() + store->timeout_ms, &conn, &failure))
        return mssql_explain(store, &failure, err);
    code = set_up_locked(store, conn, &failure, err);
    mssql_pool_drop(store->pool, conn, false);
    return code;
}

enum err_code mssql_ensure_schema(struct store_mssql *store, bool may_set_up, struct err *err)
{
    struct mssql_failure failure;
    struct version version;

    if (!read_version(store, NULL, &version, &failure))
        return mssql_explain_opening(store, &failure, err);
    if (judge(store, &version, err) != ERR_NONE)
        return err->code;
    if (version.version >= SCHEMA_VERSION)
        return ERR_NONE;
    if (!may_set_up)
        return err_set(err, ERR_SCHEMA, "the schema is %s: run `extractctl migrate`",
                       version.version == 0 ? "missing" : "older than this program needs");
    return set_up(store, err);
}
