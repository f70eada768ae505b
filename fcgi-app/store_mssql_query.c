/* store_mssql_query.c - reading the store on SQL Server for people: one row of a table for each view.
 * See store_mssql.h. */
#include "store_mssql.h"

#include "clock.h"

#define ROWS_DEFAULT 1000

/* A filter that a view lacks is refused: rows that it should have kept out would pass for an
 * answer. */
enum filters { BY_COMPANY = 1, BY_REQUEST = 2, BY_TIME = 4, BY_ID = 8, BY_ALL = 15 };

struct view {
    const char *procedure;
    unsigned filters;
    const char *by;   /* @By; NULL: no such parameter */
    const char *flag; /* a parameter that is 0 or 1; NULL: none */
    int flag_value;
};

static const struct view views[] = {
    [VIEW_TOKENS] = {"dbo.usp_ListTokens", BY_COMPANY | BY_TIME | BY_ID, NULL, NULL, 0},
    [VIEW_USAGE_BY_DAY] = {"dbo.usp_UsageReport", BY_COMPANY | BY_REQUEST | BY_TIME, "day", NULL,
                           0},
    [VIEW_USAGE_BY_BRANCH] = {"dbo.usp_UsageReport", BY_COMPANY | BY_REQUEST | BY_TIME, "branch",
                              NULL, 0},
    [VIEW_USAGE_BY_USER] = {"dbo.usp_UsageReport", BY_COMPANY | BY_REQUEST | BY_TIME, "user", NULL,
                            0},
    [VIEW_USAGE_BY_TOKEN] = {"dbo.usp_UsageReport", BY_COMPANY | BY_REQUEST | BY_TIME, "token",
                             NULL, 0},
    [VIEW_LOGS] = {"dbo.usp_ListLogs", BY_ALL, NULL, "@ErrorsOnly", 0},
    [VIEW_ERRORS] = {"dbo.usp_ListLogs", BY_ALL, NULL, "@ErrorsOnly", 1},
    [VIEW_RETRIES] = {"dbo.usp_ListRetries", BY_ALL, NULL, NULL, 0},
    [VIEW_RESERVATIONS] = {"dbo.usp_ListReservations", BY_ALL, NULL, "@UnsettledOnly", 0},
    [VIEW_UNSETTLED] = {"dbo.usp_ListReservations", BY_ALL, NULL, "@UnsettledOnly", 1},
    [VIEW_TOKENS_BY_STATUS] = {"dbo.usp_CountTokens", BY_COMPANY, NULL, NULL, 0},
    [VIEW_AUDIT] = {"dbo.usp_ListAudit", BY_ALL, NULL, NULL, 0},
};

static enum err_code check_filter(const struct view *view, const struct store_filter *f,
                                  struct err *err)
{
    const char *missing = NULL;

    if (f->company_id != NULL && (view->filters & BY_COMPANY) == 0)
        missing = "company";
    else if (f->request_id != NULL && (view->filters & BY_REQUEST) == 0)
        missing = "request";
    else if ((f->since_ms != 0 || f->until_ms != 0) && (view->filters & BY_TIME) == 0)
        missing = "time";
    else if (f->before_id != 0 && (view->filters & BY_ID) == 0)
        missing = "ID";
    if (missing != NULL)
        return err_set(err, ERR_BAD_VALUE, "this view cannot be filtered by %s", missing);
    return ERR_NONE;
}

enum err_code mssql_query(void *self, enum store_view view, const struct store_filter *filter,
                          store_row *row, void *context, struct err *err)
{
    struct mssql_param params[8];
    struct mssql_call call = {.params = params, .row = row, .context = context, .row_once = true};
    char since[CLOCK_TEXT_SIZE];
    char until[CLOCK_TEXT_SIZE];
    const struct view *v;

    if ((size_t)view >= sizeof views / sizeof views[0])
        return err_set(err, ERR_BAD_VALUE, "no such view");
    v = &views[view];
    if (check_filter(v, filter, err) != ERR_NONE)
        return err->code;
    clock_format(filter->since_ms, since);
    clock_format(filter->until_ms, until);
    call.procedure = v->procedure;
    params[call.count++] = mssql_text("@CompanyID", filter->company_id);
    params[call.count++] = mssql_text("@RequestID", filter->request_id);
    params[call.count++] = mssql_text("@Since", filter->since_ms != 0 ? since : NULL);
    params[call.count++] = mssql_text("@Until", filter->until_ms != 0 ? until : NULL);
    params[call.count++] =
        mssql_int_or_null("@BeforeID", filter->before_id == 0, filter->before_id);
    params[call.count++] = mssql_int("@Rows", filter->limit > 0 ? filter->limit : ROWS_DEFAULT);
    if (v->by != NULL)
        params[call.count++] = mssql_text("@By", v->by);
    if (v->flag != NULL)
        params[call.count++] = mssql_int(v->flag, v->flag_value);
    return mssql_call(self, &call, err);
}
