/* store_mssql_admin.c - administration on SQL Server, of tokens and of client keys: one procedure each,
 * which writes its AuditLog row in the same transaction. See store_mssql.h.
 *
 * A token whose key is to be sealed takes two, for only the first tells its TokenID: they share one
 * transaction, so that nobody ever sees the token without its key. */
#include "store_mssql.h"

#include <stdio.h>
#include <string.h>

/* Code and Message; and TokenID, of a procedure that adds. */
struct outcome {
    enum err_code code;
    struct err *err;
    int64_t token_id;
};

static bool take_outcome(void *context, size_t columns, const char *const *names,
                         const struct store_value *values)
{
    struct outcome *outcome = context;
    const char *code = mssql_column_text(values, columns, 0);
    const char *message = mssql_column_text(values, columns, 1);

    (void)names;
    if (code != NULL && strcmp(code, "ok") == 0) {
        outcome->code = ERR_NONE;
        outcome->token_id = mssql_column_int(values, columns, 2);
        return false;
    }
    outcome->code = code == NULL                       ? ERR_INTERNAL
                    : strcmp(code, "no_such_row") == 0 ? ERR_NO_SUCH_ROW
                    : strcmp(code, "bad_value") == 0   ? ERR_BAD_VALUE
                                                       : ERR_INTERNAL;
    err_set(outcome->err, outcome->code, "%s",
            message != NULL ? message : "the procedure gives no outcome");
    return false;
}

static enum err_code change(struct store_mssql *store, const char *procedure,
                            const struct mssql_param *params, size_t count, int64_t *token_id,
                            struct err *err)
{
    struct outcome outcome = {.code = ERR_INTERNAL, .err = err};
    const struct mssql_call call = {.procedure = procedure,
                                    .params = params,
                                    .count = count,
                                    .row = take_outcome,
                                    .context = &outcome,
                                    .once = true};

    err_set(err, ERR_INTERNAL, "the procedure gives no outcome");
    if (mssql_call(store, &call, err) != ERR_NONE)
        return err->code;
    if (token_id != NULL)
        *token_id = outcome.token_id;
    if (outcome.code == ERR_NONE)
        *err = (struct err){.message = ""};
    return outcome.code;
}

#define CHANGE(store, procedure, token_id, err, ...)                                       \
    change((store), (procedure), (const struct mssql_param[]){__VA_ARGS__},                \
           sizeof((const struct mssql_param[]){__VA_ARGS__}) / sizeof(struct mssql_param), \
           (token_id), (err))

/* ---- add ---- */

struct addition {
    const char *actor;
    const struct store_new_token *token;
    int64_t token_id;
    enum err_code code; /* what came of it where the server was no obstacle */
    struct err err;
};

#define NEW_TOKEN_PARAMS 8

static void describe_token(const struct addition *a, struct mssql_param params[NEW_TOKEN_PARAMS])
{
    const struct store_new_token *token = a->token;
    bool pending = token->sealer != NULL;
    size_t n = 0;

    params[n++] = mssql_text("@Actor", a->actor);
    params[n++] = mssql_text("@CompanyID", token->company_id);
    params[n++] = mssql_text("@CompanyName", token->company_name);
    params[n++] = mssql_text("@Provider", token->provider != NULL ? token->provider : "Gemini");
    params[n++] = mssql_text("@ApiKey", pending ? NULL : token->api_key);
    params[n++] = mssql_int_or_null("@TotalTokenLimit", token->limit < 0, token->limit);
    params[n++] = mssql_real_or_null("@Threshold", token->threshold <= 0, token->threshold);
    params[n++] = mssql_int("@Pending", pending);
}

/* One of the two procedures. True: the server was no obstacle, and a->code is what it says. */
static bool add_step(struct addition *a, struct mssql_conn *conn, const char *procedure,
                     const struct mssql_param *params, size_t count, int64_t deadline_ms,
                     struct mssql_failure *failure)
{
    struct outcome outcome = {.code = ERR_INTERNAL, .err = &a->err};
    const struct mssql_call call = {.procedure = procedure,
                                    .params = params,
                                    .count = count,
                                    .row = take_outcome,
                                    .context = &outcome};

    err_set(&a->err, ERR_INTERNAL, "the procedure gives no outcome");
    if (!mssql_rpc(conn, &call, deadline_ms, failure))
        return false;
    a->code = outcome.code;
    if (a->code == ERR_NONE && a->token_id == 0)
        a->token_id = outcome.token_id;
    return true;
}

static enum mssql_steps add_sealed(struct mssql_conn *conn, void *context, int64_t deadline_ms,
                                   struct mssql_failure *failure)
{
    struct addition *a = context;
    const struct store_sealer *sealer = a->token->sealer;
    struct mssql_param params[NEW_TOKEN_PARAMS];
    char sealed[STORE_API_KEY_SIZE];
    bool ok;

    a->token_id = 0;
    describe_token(a, params);
    if (!add_step(a, conn, "dbo.usp_AddToken", params, NEW_TOKEN_PARAMS, deadline_ms, failure))
        return MSSQL_FAILED;
    if (a->code == ERR_NONE)
        a->code = sealer->seal(sealer->context, a->token_id, a->token->api_key, sealed, &a->err);
    if (a->code != ERR_NONE)
        return MSSQL_ROLL_BACK;
    params[0] = mssql_int("@TokenID", a->token_id);
    params[1] = mssql_text("@ApiKey", sealed);
    ok = add_step(a, conn, "dbo.usp_ActivateToken", params, 2, deadline_ms, failure);
    explicit_bzero(sealed, sizeof sealed);
    return !ok ? MSSQL_FAILED : a->code == ERR_NONE ? MSSQL_COMMIT : MSSQL_ROLL_BACK;
}

enum err_code mssql_token_add(void *self, const char *actor, const struct store_new_token *token,
                              int64_t *token_id, struct err *err)
{
    struct addition a = {.actor = actor, .token = token, .code = ERR_INTERNAL};
    struct mssql_param params[NEW_TOKEN_PARAMS];

    *token_id = 0;
    if (store_check_new_token(actor, token, err) != ERR_NONE)
        return err->code;
    if (token->sealer == NULL) {
        describe_token(&a, params);
        return change(self, "dbo.usp_AddToken", params, NEW_TOKEN_PARAMS, token_id, err);
    }
    if (mssql_transact(self, add_sealed, &a, err) != ERR_NONE)
        return err->code;
    if (a.code != ERR_NONE)
        return err_set(err, a.code, "%s", a.err.message);
    *token_id = a.token_id;
    return ERR_NONE;
}

/* ---- status, key and limit ---- */

enum err_code mssql_token_set_status(void *self, const char *actor, int64_t token_id,
                                     const char *status, const char *reason, struct err *err)
{
    if (store_check_status(actor, &status, reason, err) != ERR_NONE)
        return err->code;
    return CHANGE(self, "dbo.usp_SetTokenStatus", NULL, err, mssql_text("@Actor", actor),
                  mssql_int("@TokenID", token_id), mssql_text("@Status", status),
                  mssql_text("@Reason", reason));
}

enum err_code mssql_token_set_key(void *self, const char *actor, int64_t token_id,
                                  const char *api_key, struct err *err)
{
    if (store_check_key(actor, api_key, err) != ERR_NONE)
        return err->code;
    return CHANGE(self, "dbo.usp_SetTokenKey", NULL, err, mssql_text("@Actor", actor),
                  mssql_int("@TokenID", token_id), mssql_text("@ApiKey", api_key));
}

/* A page of keys as it comes in. */
struct key_page {
    struct store_token_key *keys;
    size_t max;
    size_t count;
    int64_t last_id; /* of those that are too long, too */
};

static bool take_key(void *context, size_t columns, const char *const *names,
                     const struct store_value *values)
{
    struct key_page *page = context;
    const char *api_key = mssql_column_text(values, columns, 1);
    struct store_token_key *key = &page->keys[page->count];

    (void)names;
    page->last_id = mssql_column_int(values, columns, 0);
    if (!store_text_fits(api_key, 0, STORE_API_KEY_SIZE - 1))
        return true;
    key->token_id = page->last_id;
    snprintf(key->api_key, sizeof key->api_key, "%s", api_key != NULL ? api_key : "");
    return ++page->count < page->max;
}

enum err_code mssql_token_keys(void *self, int64_t after_id, struct store_token_key *keys,
                               size_t max, size_t *count, struct err *err)
{
    struct key_page page = {.keys = keys, .max = max, .last_id = after_id};
    enum err_code code;

    *count = 0;
    do { /* a page of keys that are all too long is not the end */
        const struct mssql_call call = {
            .procedure = "dbo.usp_ListTokenKeys",
            .row = take_key,
            .context = &page,
            .row_once = true,
            MSSQL_PARAMS(mssql_int("@AfterID", page.last_id), mssql_int("@Rows", (int64_t)max))};
        after_id = page.last_id;
        code = mssql_call(self, &call, err);
    } while (code == ERR_NONE && page.count == 0 && page.last_id > after_id);
    if (code == ERR_NONE)
        *count = page.count;
    return code;
}

enum err_code mssql_token_reseal(void *self, const char *actor, const struct store_token_key *key,
                                 const char *sealed, struct err *err)
{
    if (store_check_key(actor, sealed, err) != ERR_NONE)
        return err->code;
    return CHANGE(self, "dbo.usp_ResealToken", NULL, err, mssql_text("@Actor", actor),
                  mssql_int("@TokenID", key->token_id), mssql_text("@ApiKey", sealed),
                  mssql_text("@Expected", key->api_key));
}

enum err_code mssql_token_set_limit(void *self, const char *actor, int64_t token_id, int64_t limit,
                                    double threshold, struct err *err)
{
    if (store_check_limit(actor, limit, threshold, err) != ERR_NONE)
        return err->code;
    return CHANGE(self, "dbo.usp_SetTokenLimit", NULL, err, mssql_text("@Actor", actor),
                  mssql_int("@TokenID", token_id),
                  mssql_int_or_null("@TotalTokenLimit", limit < 0, limit),
                  mssql_real_or_null("@Threshold", threshold <= 0, threshold));
}

/* ---- client keys ---- */

/* A row of usp_FindClientKey. */
struct found_key {
    bool found;
    bool usable;
    struct store_client_key key;
};

static bool take_client_key(void *context, size_t columns, const char *const *names,
                            const struct store_value *values)
{
    struct found_key *f = context;
    const char *id = mssql_column_text(values, columns, 0);
    const char *company_id = mssql_column_text(values, columns, 1);
    struct store_client_key *key = &f->key;

    (void)names;
    f->found = true;
    key->is_admin = mssql_column_int(values, columns, 2) != 0;
    f->usable = store_text_fits(id, 1, sizeof key->id - 1) &&
                store_text_fits(company_id, key->is_admin ? 0 : 1, sizeof key->company_id - 1);
    if (f->usable) {
        snprintf(key->id, sizeof key->id, "%s", id);
        snprintf(key->company_id, sizeof key->company_id, "%s",
                 company_id != NULL ? company_id : "");
    }
    return false;
}

enum err_code mssql_client_key_find(void *self, const char *hash, struct store_client_key *key,
                                    struct err *err)
{
    struct found_key f = {.found = false};
    const struct mssql_call call = {.procedure = "dbo.usp_FindClientKey",
                                    .row = take_client_key,
                                    .context = &f,
                                    MSSQL_PARAMS(mssql_text("@KeyHash", hash))};

    if (mssql_call(self, &call, err) != ERR_NONE)
        return err->code;
    if (!f.found)
        return err_set(err, ERR_NO_SUCH_ROW, "the client key is unknown or was revoked");
    if (!f.usable)
        return err_set(err, ERR_INTERNAL, "a client key has no usable ClientKeyID or CompanyID");
    *key = f.key;
    return ERR_NONE;
}

enum err_code mssql_client_key_add(void *self, const char *actor,
                                   const struct store_new_client_key *key, struct err *err)
{
    if (store_check_new_client_key(actor, key, err) != ERR_NONE)
        return err->code;
    return CHANGE(self, "dbo.usp_AddClientKey", NULL, err, mssql_text("@Actor", actor),
                  mssql_text("@ClientKeyID", key->id), mssql_text("@KeyHash", key->hash),
                  mssql_text("@CompanyID", key->company_id), mssql_text("@Label", key->label));
}

enum err_code mssql_client_key_revoke(void *self, const char *actor, const char *id,
                                      struct err *err)
{
    if (store_check_client_key_id(actor, id, err) != ERR_NONE)
        return err->code;
    return CHANGE(self, "dbo.usp_RevokeClientKey", NULL, err, mssql_text("@Actor", actor),
                  mssql_text("@ClientKeyID", id));
}
