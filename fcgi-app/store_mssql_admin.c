/* store_mssql_admin.c - token administration on SQL Server: one procedure each, which writes its
 * AuditLog row in the same transaction. See store_mssql.h. */
#include "store_mssql.h"

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

enum err_code mssql_token_add(void *self, const char *actor, const struct store_new_token *token,
                              int64_t *token_id, struct err *err)
{
    *token_id = 0;
    if (store_check_new_token(actor, token, err) != ERR_NONE)
        return err->code;
    return CHANGE(self, "dbo.usp_AddToken", token_id, err, mssql_text("@Actor", actor),
                  mssql_text("@CompanyID", token->company_id),
                  mssql_text("@CompanyName", token->company_name),
                  mssql_text("@Provider", token->provider != NULL ? token->provider : "Gemini"),
                  mssql_text("@ApiKey", token->api_key),
                  mssql_int_or_null("@TotalTokenLimit", token->limit < 0, token->limit),
                  mssql_real_or_null("@Threshold", token->threshold <= 0, token->threshold));
}

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
