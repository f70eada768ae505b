/* store_mssql.c - the store on SQL Server: production. See store_driver.h and store_mssql.h.
 *
 * Everything is done by stored procedures (sql/setup_database.sql), which are the other half of this
 * driver: a call is one round trip and one transaction. The login needs the right to execute them and
 * no other.
 *
 * Here: opening, log entries and retry attempts. The rest: see store_mssql.h. */
#include "store_mssql.h"

#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "log.h"

#define POOL_DEFAULT 4
#define RECORDS_MAX ((size_t)64 * 1024 * 1024)
/* A call's own cost is that of a dozen items, and Gemini takes seconds: see tests/bench/README.md. */
#define GATHER_MS 4

/* ---- open and close ---- */

static void store_mssql_close(void *self)
{
    struct store_mssql *store = self;

    if (store == NULL)
        return;
    mssql_pool_free(store->pool);
    free(store);
}

static enum err_code open_pool(struct store_mssql *store, const struct config *config,
                               struct err *err)
{
    struct mssql_target target;
    enum err_code code = mssql_target_init(&target, config, err);

    if (code == ERR_NONE)
        code = mssql_library_start(err);
    if (code == ERR_NONE)
        code = mssql_library_add(&target, err);
    if (code == ERR_NONE) {
        store->pool = mssql_pool_new(&target, store->pool_size);
        if (store->pool == NULL)
            code = err_set(err, ERR_INTERNAL, "no memory or threads");
        else
            store->target = mssql_pool_target(store->pool);
    }
    mssql_target_reset(&target);
    return code;
}

static void *store_mssql_open(const struct config *config, bool migrate, struct err *err)
{
    struct store_mssql *store = calloc(1, sizeof *store);
    enum err_code code;

    if (store == NULL) {
        err_set(err, ERR_INTERNAL, "no memory");
        return NULL;
    }
    store->timeout_ms = config->store.query_timeout_ms;
    store->pool_size = config->store.pool_size > 0 ? config->store.pool_size : POOL_DEFAULT;
    code = open_pool(store, config, err);
    /* A reader comes after the service, which has looked, and may read as little as that. */
    if (code == ERR_NONE && config->store.login != LOGIN_READER)
        code = mssql_ensure_schema(store, migrate || config->store.auto_create, err);
    if (code != ERR_NONE) {
        store_mssql_close(store);
        return NULL;
    }
    return store;
}

static int store_mssql_leaders(void *self)
{
    const struct store_mssql *store = self;
    return store->pool_size;
}

static int store_mssql_schema_version(void *self)
{
    const struct store_mssql *store = self;
    return store->version;
}

static enum err_code store_mssql_ping(void *self, struct err *err)
{
    const struct mssql_call call = {.procedure = "dbo.usp_Ping"};
    return mssql_call(self, &call, err);
}

/* ---- log entries and retry attempts ---- */

static void add_text(struct buf *json, const char *name, const char *text)
{
    buf_printf(json, ",\"%s\":", name);
    buf_append_json(json, text, text == NULL ? 0 : strlen(text));
}

static void begin_record(struct buf *json, int64_t wall_ms)
{
    char when[CLOCK_TEXT_SIZE];

    clock_format(wall_ms, when);
    buf_printf(json, "%s{\"timestamp\":\"%s\"", json->len == 1 ? "" : ",\n", when);
}

static void add_entry(struct buf *json, const struct log_entry *e)
{
    begin_record(json, e->wall_ms);
    add_text(json, "level", log_level_name(e->level));
    add_text(json, "logger", e->logger);
    add_text(json, "message", e->message);
    add_text(json, "exception", e->exception);
    add_text(json, "module", e->module);
    add_text(json, "function", e->function);
    buf_printf(json, ",\"line\":%d", e->line);
    add_text(json, "requestId", e->request_id);
    add_text(json, "traceId", e->trace_id);
    add_text(json, "host", log_host());
    buf_append_char(json, '}');
}

static void add_attempt(struct buf *json, const struct store_retry_attempt *a)
{
    begin_record(json, a->wall_ms);
    buf_printf(json,
               ",\"tokenId\":%lld,\"attempt\":%d,\"isRetryable\":%d,\"statusCode\":%d,"
               "\"delayMs\":%lld",
               (long long)a->token_id, a->attempt, a->is_retryable, a->status_code,
               (long long)a->delay_ms);
    add_text(json, "companyId", a->company_id);
    add_text(json, "errorMessage", a->error_message);
    add_text(json, "requestId", a->request_id);
    buf_append_char(json, '}');
}

static enum err_code store_mssql_record(void *self, struct log_entry *const *entries,
                                        size_t entry_count,
                                        const struct store_retry_attempt *const *attempts,
                                        size_t attempt_count, bool again, struct err *err)
{
    struct buf entry_json, attempt_json;
    enum err_code code = ERR_NONE;

    if (entry_count + attempt_count == 0)
        return ERR_NONE;
    buf_init(&entry_json, RECORDS_MAX);
    buf_init(&attempt_json, RECORDS_MAX);
    buf_append_char(&entry_json, '[');
    for (size_t i = 0; i < entry_count; i++)
        add_entry(&entry_json, entries[i]);
    buf_append_char(&entry_json, ']');
    buf_append_char(&attempt_json, '[');
    for (size_t i = 0; i < attempt_count; i++)
        add_attempt(&attempt_json, attempts[i]);
    buf_append_char(&attempt_json, ']');
    if (!buf_ok(&entry_json) || !buf_ok(&attempt_json)) {
        code = err_set(err, ERR_INTERNAL, "no memory for log entries");
    } else {
        const struct mssql_call call = {
            .procedure = "dbo.usp_RecordLogs",
            .once = !again,
            MSSQL_PARAMS(mssql_text("@Entries", buf_str(&entry_json)),
                         mssql_text("@Attempts", buf_str(&attempt_json)),
                         mssql_int("@Again", again))};
        code = mssql_call(self, &call, err);
    }
    buf_reset(&entry_json);
    buf_reset(&attempt_json);
    return code;
}

/* ---- reservations whose process died ---- */

static bool take_expired(void *context, size_t columns, const char *const *names,
                         const struct store_value *values)
{
    (void)names;
    *(int *)context = (int)mssql_column_int(values, columns, 0);
    return false;
}

static enum err_code store_mssql_expire(void *self, int *expired, struct err *err)
{
    const struct mssql_call call = {
        .procedure = "dbo.usp_ExpireReservations", .row = take_expired, .context = expired};

    *expired = 0;
    return mssql_call(self, &call, err);
}

const struct store_driver store_mssql = {
    .name = "mssql",
    .open = store_mssql_open,
    .close = store_mssql_close,
    .leaders = store_mssql_leaders,
    .gather_ms = GATHER_MS,
    .schema_version = store_mssql_schema_version,
    .ping = store_mssql_ping,
    .acquire = mssql_acquire,
    .settle = mssql_settle,
    .record = store_mssql_record,
    .expire_reservations = store_mssql_expire,
    .token_add = mssql_token_add,
    .token_set_status = mssql_token_set_status,
    .token_set_key = mssql_token_set_key,
    .token_keys = mssql_token_keys,
    .token_reseal = mssql_token_reseal,
    .token_set_limit = mssql_token_set_limit,
    .client_key_find = mssql_client_key_find,
    .client_key_add = mssql_client_key_add,
    .client_key_revoke = mssql_client_key_revoke,
    .query = mssql_query,
};
