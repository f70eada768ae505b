/* store_mssql_query.c - reading the store on SQL Server for people: one row of a table for each view.
 * See store_mssql.h. */
#include "store_mssql.h"

#include "clock.h"

/* Which filters there are, store_check_filter knows. */
static const struct view {
    const char *procedure;
    const char *by;   /* @By; NULL: no such parameter */
    const char *flag; /* a parameter that is 0 or 1; NULL: none */
    int flag_value;
} views[] = {
    [VIEW_TOKENS] = {"dbo.usp_ListTokens", NULL, NULL, 0},
    [VIEW_USAGE_BY_DAY] = {"dbo.usp_UsageReport", "day", NULL, 0},
    [VIEW_USAGE_BY_COMPANY] = {"dbo.usp_UsageReport", "company", NULL, 0},
    [VIEW_USAGE_BY_BRANCH] = {"dbo.usp_UsageReport", "branch", NULL, 0},
    [VIEW_USAGE_BY_USER] = {"dbo.usp_UsageReport", "user", NULL, 0},
    [VIEW_USAGE_BY_TOKEN] = {"dbo.usp_UsageReport", "token", NULL, 0},
    [VIEW_LOGS] = {"dbo.usp_ListLogs", NULL, "@ErrorsOnly", 0},
    [VIEW_ERRORS] = {"dbo.usp_ListLogs", NULL, "@ErrorsOnly", 1},
    [VIEW_RETRIES] = {"dbo.usp_ListRetries", NULL, NULL, 0},
    [VIEW_RESERVATIONS] = {"dbo.usp_ListReservations", NULL, "@UnsettledOnly", 0},
    [VIEW_UNSETTLED] = {"dbo.usp_ListReservations", NULL, "@UnsettledOnly", 1},
    [VIEW_TOKENS_BY_STATUS] = {"dbo.usp_CountTokens", NULL, NULL, 0},
    [VIEW_CLIENT_KEYS] = {"dbo.usp_ListClientKeys", NULL, NULL, 0},
    [VIEW_AUDIT] = {"dbo.usp_ListAudit", NULL, NULL, 0},
};

enum err_code mssql_query(void *self, enum store_view view, const struct store_filter *filter,
                          store_row *row, void *context, struct err *err)
{
    struct mssql_param params[8];
    struct mssql_call call = {.params = params, .row = row, .context = context, .row_once = true};
    char since[CLOCK_TEXT_SIZE];
    char until[CLOCK_TEXT_SIZE];
    const struct view *v;

    if (store_check_filter(view, filter, err) != ERR_NONE)
        return err->code;
    v = &views[view];
    clock_format(filter->since_ms, since);
    clock_format(filter->until_ms, until);
    call.procedure = v->procedure;
    params[call.count++] = mssql_text("@CompanyID", filter->company_id);
    params[call.count++] = mssql_text("@RequestID", filter->request_id);
    params[call.count++] = mssql_text("@Since", filter->since_ms != 0 ? since : NULL);
    params[call.count++] = mssql_text("@Until", filter->until_ms != 0 ? until : NULL);
    params[call.count++] =
        mssql_int_or_null("@BeforeID", filter->before_id == 0, filter->before_id);
    params[call.count++] =
        mssql_int("@Rows", filter->limit > 0 ? filter->limit : STORE_ROWS_DEFAULT);
    if (v->by != NULL)
        params[call.count++] = mssql_text("@By", v->by);
    if (v->flag != NULL)
        params[call.count++] = mssql_int(v->flag, v->flag_value);
    return mssql_call(self, &call, err);
}
