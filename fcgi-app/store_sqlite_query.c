/* store_sqlite_query.c - reading the embedded store for people: one row of a table for each view.
 *
 * Readers have connections of their own and never wait for a writer (WAL). A query that takes longer
 * than store.query_timeout is interrupted; the time that the caller spends on the rows does not
 * count. See store_sqlite.h. */
#include "store_sqlite.h"

#include "buf.h"

#define COLUMNS_MAX 32
#define STEPS_BETWEEN_LOOKS 10000 /* of SQLite's virtual machine: a millisecond or less */

/* ---- readers ---- */

static int past_deadline(void *context)
{
    const struct sqlite_reader *reader = context;
    return clock_monotonic_ms() >= reader->deadline_ms;
}

/* One that is free, or the first as soon as it is. NULL: err says why. */
static struct sqlite_reader *lock_reader(struct store_sqlite *store, struct err *err)
{
    int64_t deadline_ms = clock_monotonic_ms() + store->timeout_ms;

    for (int i = 0; i < SQLITE_READERS; i++)
        if (pthread_mutex_trylock(&store->readers[i].mutex) == 0)
            return &store->readers[i];
    if (sqlite_lock_mutex(&store->readers[0].mutex, deadline_ms) == 0)
        return &store->readers[0];
    err_set(err, ERR_STORE_UNAVAILABLE, "embedded store: all readers are busy");
    return NULL;
}

enum err_code sqlite_reader_take(struct store_sqlite *store, struct sqlite_reader **reader,
                                 struct err *err)
{
    for (int tries = 0; tries < 2; tries++) {
        struct sqlite_file file;
        if (sqlite_file_at(store->path, &file, err) != ERR_NONE)
            return ERR_STORE_UNAVAILABLE;
        struct sqlite_reader *taken = lock_reader(store, err);
        if (taken == NULL)
            return ERR_STORE_UNAVAILABLE;
        if (sqlite_same_file(file, taken->db.file)) {
            taken->deadline_ms = clock_monotonic_ms() + store->timeout_ms;
            sqlite3_progress_handler(taken->db.handle, STEPS_BETWEEN_LOOKS, past_deadline, taken);
            *reader = taken;
            return ERR_NONE;
        }
        sqlite_reader_give(taken); /* following takes all readers */
        enum err_code code = sqlite_follow_now(store, err);
        if (code != ERR_NONE)
            return code;
    }
    return err_set(err, ERR_STORE_UNAVAILABLE, "embedded store: the file is being replaced");
}

void sqlite_reader_give(struct sqlite_reader *reader)
{
    pthread_mutex_unlock(&reader->mutex);
}

/* ---- the views ---- */

#define SAME_COMPANY(column) "extract_fold(" column ") = extract_fold(?1)"

#define USAGE_SUMS                                                                         \
    "COUNT(*) AS Requests, SUM(RequestCount) AS RequestCount,"                             \
    " SUM(InputTokens) AS InputTokens, SUM(OutputTokens) AS OutputTokens,"                 \
    " SUM(TextPromptTokens) AS TextPromptTokens,"                                          \
    " SUM(ImagePromptTokens) AS ImagePromptTokens,"                                        \
    " SUM(TextCandidatesTokens) AS TextCandidatesTokens,"                                  \
    " SUM(ThoughtsTokens) AS ThoughtsTokens, SUM(CachedTokens) AS CachedTokens,"           \
    " SUM(TotalTokensUsed) AS TotalTokensUsed, SUM(UnknownCalls) AS UnknownCalls"          \
    " FROM (SELECT u.*, IFNULL(u.CompanyID, t.CompanyID) AS Company FROM TokenUsageLogs u" \
    "       LEFT JOIN TokenMaster t ON t.TokenID = u.TokenID)"

/* What remains, remains of a limit: without one there is none. OverThreshold counts also what is used
 * up. Cooling: not to be used at this moment. */
#define TOKEN_SUMS                                                                       \
    "COUNT(*) AS Count, SUM(TotalTokenLimit IS NULL) AS Unlimited,"                      \
    " SUM(TotalTokenLimit) AS TotalTokenLimit, SUM(TotalUsedTokens) AS TotalUsedTokens," \
    " SUM(ReservedTokens) AS ReservedTokens,"                                            \
    " SUM(TotalRemainingTokens) AS TotalRemainingTokens,"                                \
    " SUM(IFNULL(TotalUsedTokens >= Threshold * TotalTokenLimit, 0)) AS OverThreshold,"  \
    " SUM(IFNULL(CooldownUntil > strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), 0)) AS Cooling"  \
    " FROM vw_TokenStatus"

/* Which filters there are, store_check_filter knows. */
struct view {
    const char *select;
    const char *where;   /* NULL: all rows */
    const char *company; /* the condition; NULL: no such filter */
    const char *request; /* column; NULL: no such filter */
    const char *time;    /* expression in ISO 8601; NULL: no such filter */
    const char *id;      /* column; NULL: cannot be paged */
    const char *group;   /* NULL: none */
    const char *order;
};

static const struct view views[] = {
    [VIEW_TOKENS] = {.select = "SELECT * FROM vw_TokenStatus",
                     .company = SAME_COMPANY("CompanyID"),
                     .time = "strftime('%Y-%m-%dT%H:%M:%fZ', CreatedAt)",
                     .id = "TokenID",
                     .order = "TokenID DESC"},
    [VIEW_USAGE_BY_DAY] = {.select = "SELECT SUBSTR(LoggedAt, 1, 10) AS Day, " USAGE_SUMS,
                           .company = SAME_COMPANY("Company"),
                           .request = "RequestID",
                           .time = "LoggedAt",
                           .group = "SUBSTR(LoggedAt, 1, 10)",
                           .order = "Day DESC"},
    [VIEW_USAGE_BY_COMPANY] = {.select = "SELECT Company AS CompanyID, " USAGE_SUMS,
                               .company = SAME_COMPANY("Company"),
                               .request = "RequestID",
                               .time = "LoggedAt",
                               .group = "Company COLLATE NOCASE",
                               .order = "TotalTokensUsed DESC, CompanyID"},
    [VIEW_USAGE_BY_BRANCH] = {.select = "SELECT Company AS CompanyID, Branch, " USAGE_SUMS,
                              .company = SAME_COMPANY("Company"),
                              .request = "RequestID",
                              .time = "LoggedAt",
                              .group = "Company COLLATE NOCASE, Branch",
                              .order = "TotalTokensUsed DESC, CompanyID, Branch"},
    [VIEW_USAGE_BY_USER] = {.select = "SELECT Company AS CompanyID, RequestedBy, " USAGE_SUMS,
                            .company = SAME_COMPANY("Company"),
                            .request = "RequestID",
                            .time = "LoggedAt",
                            .group = "Company COLLATE NOCASE, RequestedBy",
                            .order = "TotalTokensUsed DESC, CompanyID, RequestedBy"},
    [VIEW_USAGE_BY_TOKEN] = {.select =
                                 "SELECT Company AS CompanyID, TokenID, TokenSource, " USAGE_SUMS,
                             .company = SAME_COMPANY("Company"),
                             .request = "RequestID",
                             .time = "LoggedAt",
                             .group = "Company COLLATE NOCASE, TokenID",
                             .order = "TotalTokensUsed DESC, CompanyID, TokenID"},
    /* A log entry has no company but that of its request. */
    [VIEW_LOGS] = {.select = "SELECT * FROM ApplicationLogs",
                   .company = "RequestID IN (SELECT RequestID FROM TokenReservations"
                              " WHERE " SAME_COMPANY("CompanyID") ")",
                   .request = "RequestID",
                   .time = "Timestamp",
                   .id = "LogID",
                   .order = "LogID DESC"},
    [VIEW_ERRORS] = {.select = "SELECT * FROM ApplicationLogs",
                     .where = "LogLevel IN ('ERROR', 'CRITICAL')",
                     .company = "RequestID IN (SELECT RequestID FROM TokenReservations"
                                " WHERE " SAME_COMPANY("CompanyID") ")",
                     .request = "RequestID",
                     .time = "Timestamp",
                     .id = "LogID",
                     .order = "LogID DESC"},
    [VIEW_RETRIES] = {.select = "SELECT * FROM RetryAttempts",
                      .company = SAME_COMPANY("CompanyID"),
                      .request = "RequestID",
                      .time = "Timestamp",
                      .id = "RetryID",
                      .order = "RetryID DESC"},
    [VIEW_RESERVATIONS] = {.select = "SELECT * FROM TokenReservations",
                           .where = "State IN ('open', 'unsettled') AND ClosedAt IS NULL",
                           .company = SAME_COMPANY("CompanyID"),
                           .request = "RequestID",
                           .time = "CreatedAt",
                           .id = "ReservationID",
                           .order = "ReservationID DESC"},
    [VIEW_UNSETTLED] = {.select = "SELECT * FROM vw_UnsettledRequests",
                        .company = SAME_COMPANY("CompanyID"),
                        .request = "RequestID",
                        .time = "CreatedAt",
                        .id = "ReservationID",
                        .order = "ReservationID DESC"},
    [VIEW_TOKENS_BY_STATUS] = {.select = "SELECT Status, " TOKEN_SUMS,
                               .company = SAME_COMPANY("CompanyID"),
                               .group = "Status",
                               .order = "Status"},
    [VIEW_CLIENT_KEYS] = {.select = "SELECT ClientKeyID, CompanyID, IsAdmin, Label, CreatedAt,"
                                    " RevokedAt FROM ClientKeys",
                          .company = SAME_COMPANY("CompanyID"),
                          .time = "CreatedAt",
                          .order = "CreatedAt DESC, ClientKeyID"},
    [VIEW_AUDIT] = {.select = "SELECT * FROM AuditLog",
                    .company = SAME_COMPANY("CompanyID"),
                    .request = "RequestID",
                    .time = "Timestamp",
                    .id = "AuditID",
                    .order = "AuditID DESC"},
};

/* ?1 company, ?2 request, ?3 since, ?4 until, ?5 before, ?6 limit. The text holds constants only. */
static void compose(struct buf *sql, const struct view *view, const struct store_filter *f)
{
    buf_printf(sql, "%s WHERE %s", view->select, view->where != NULL ? view->where : "1");
    if (f->company_id != NULL)
        buf_printf(sql, " AND %s", view->company);
    if (f->request_id != NULL)
        buf_printf(sql, " AND %s = ?2", view->request);
    if (f->since_ms != 0)
        buf_printf(sql, " AND %s >= ?3", view->time);
    if (f->until_ms != 0)
        buf_printf(sql, " AND %s < ?4", view->time);
    if (f->before_id != 0)
        buf_printf(sql, " AND %s < ?5", view->id);
    if (view->group != NULL)
        buf_printf(sql, " GROUP BY %s", view->group);
    buf_printf(sql, " ORDER BY %s LIMIT ?6", view->order);
}

static int bind_filter(sqlite3_stmt *statement, const struct store_filter *f)
{
    char since[CLOCK_TEXT_SIZE];
    char until[CLOCK_TEXT_SIZE];
    int result = sqlite3_bind_text(statement, 1, f->company_id, -1, SQLITE_STATIC);

    clock_format(f->since_ms, since);
    clock_format(f->until_ms, until);
    if (result == SQLITE_OK)
        result = sqlite3_bind_text(statement, 2, f->request_id, -1, SQLITE_STATIC);
    if (result == SQLITE_OK)
        result = sqlite3_bind_text(statement, 3, since, -1, SQLITE_TRANSIENT);
    if (result == SQLITE_OK)
        result = sqlite3_bind_text(statement, 4, until, -1, SQLITE_TRANSIENT);
    if (result == SQLITE_OK)
        result = sqlite3_bind_int64(statement, 5, f->before_id);
    if (result == SQLITE_OK)
        result = sqlite3_bind_int(statement, 6, f->limit > 0 ? f->limit : STORE_ROWS_DEFAULT);
    return result;
}

/* ---- rows ---- */

static void read_value(sqlite3_stmt *statement, int column, struct store_value *value)
{
    *value = (struct store_value){.type = STORE_NULL};
    switch (sqlite3_column_type(statement, column)) {
    case SQLITE_NULL:
        return;
    case SQLITE_INTEGER:
        *value = sql_int(sqlite3_column_int64(statement, column));
        return;
    case SQLITE_FLOAT:
        *value = sql_real(sqlite3_column_double(statement, column));
        return;
    default:
        *value = sql_text((const char *)sqlite3_column_text(statement, column));
    }
}

/* Only once there is a row: the first step prepares the statement anew where the schema has changed. 0: too
 * many. */
static int read_names(sqlite3_stmt *statement, const char *names[COLUMNS_MAX])
{
    int columns = sqlite3_column_count(statement);

    for (int i = 0; i < columns && columns <= COLUMNS_MAX; i++)
        names[i] = sqlite3_column_name(statement, i);
    return columns <= COLUMNS_MAX ? columns : 0;
}

static enum err_code hand_out(struct sqlite_reader *reader, sqlite3_stmt *statement, store_row *row,
                              void *context, struct err *err)
{
    struct store_value values[COLUMNS_MAX];
    const char *names[COLUMNS_MAX];
    int result = SQLITE_DONE, columns = 0;
    bool more = true;

    while (more && (result = sqlite3_step(statement)) == SQLITE_ROW) {
        if (columns == 0 && (columns = read_names(statement, names)) == 0)
            return err_set(err, ERR_INTERNAL, "embedded store: COLUMNS_MAX is too small");
        for (int i = 0; i < columns; i++)
            read_value(statement, i, &values[i]);
        int64_t start_ms = clock_monotonic_ms();
        more = row(context, (size_t)columns, names, values);
        reader->deadline_ms += clock_monotonic_ms() - start_ms;
    }
    return !more || result == SQLITE_DONE ? ERR_NONE : sqlite_failed(err, result);
}

enum err_code sqlite_query(void *self, enum store_view view, const struct store_filter *filter,
                           store_row *row, void *context, struct err *err)
{
    struct store_sqlite *store = self;
    struct sqlite_reader *reader = NULL;
    sqlite3_stmt *statement = NULL;
    struct buf sql;
    int result = SQLITE_OK;
    enum err_code code = ERR_NONE;

    if (store_check_filter(view, filter, err) != ERR_NONE)
        return err->code;
    buf_init(&sql, 8192);
    compose(&sql, &views[view], filter);
    if (!buf_ok(&sql)) {
        code = err_set(err, ERR_INTERNAL, "no memory");
        goto out;
    }
    code = sqlite_reader_take(store, &reader, err);
    if (code != ERR_NONE || reader == NULL)
        goto out;
    result = sqlite3_prepare_v2(reader->db.handle, buf_str(&sql), -1, &statement, NULL);
    if (result == SQLITE_OK)
        result = bind_filter(statement, filter);
    if (result == SQLITE_OK)
        code = hand_out(reader, statement, row, context, err);
    else
        code = sqlite_failed(err, result);
    sqlite3_finalize(statement);
    sqlite_reader_give(reader);
out:
    buf_reset(&sql);
    return code;
}
