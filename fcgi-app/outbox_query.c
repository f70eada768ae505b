/* outbox_query.c - what the outbox holds, for people. See outbox.h. */
#include <string.h>

#include "clock.h"
#include "log.h"
#include "outbox_inside.h"
#include "text.h"

enum {
    STATE,
    KIND,
    REQUEST_ID,
    TOKEN_ID,
    COMPANY_ID,
    BRANCH,
    USER,
    TOKENS,
    CREATED_AT,
    ATTEMPTS,
    LAST_ERROR,
    COLUMNS
};

static const char *const names[COLUMNS] = {
    "State",           "Kind",      "RequestID", "TokenID",  "CompanyID", "Branch", "RequestedBy",
    "TotalTokensUsed", "CreatedAt", "Attempts",  "LastError"};

static struct store_value text_or_null(const char *text)
{
    return (struct store_value){.type = text == NULL ? STORE_NULL : STORE_TEXT, .text = text};
}

static struct store_value integer(int64_t n)
{
    return (struct store_value){.type = STORE_INTEGER, .integer = n};
}

/* ---- entries ---- */

/* The filter has no limit here: the reader ends it. */
static sqlite3_stmt *prepare(struct outbox *outbox, const char *table,
                             const struct store_filter *filter)
{
    struct buf sql;

    buf_init(&sql, 2048);
    buf_printf(&sql,
               "SELECT Kind, RequestID, NULLIF(TokenID, 0), CreatedAt, Attempts, LastError,"
               " json_extract(Payload, '$.company_id'), json_extract(Payload, '$.branch'),"
               " json_extract(Payload, '$.requested_by'),"
               " IFNULL(json_extract(Payload, '$.total_tokens'),"
               "        json_extract(Payload, '$.estimate_tokens'))"
               " FROM (SELECT Seq, Kind, RequestID, TokenID, CreatedAt, Attempts, LastError,"
               "       CASE WHEN json_valid(Payload) THEN Payload ELSE '{}' END AS Payload FROM %s)"
               " WHERE (?1 IS NULL OR RequestID = ?1) AND CreatedAt >= ?2"
               " AND (?3 = 0 OR CreatedAt < ?3) ORDER BY Seq DESC",
               table);
    sqlite3_stmt *statement = outbox_prepare(outbox, buf_str(&sql));
    buf_reset(&sql);
    if (filter->request_id != NULL)
        outbox_bind_text(statement, 1, filter->request_id);
    sqlite3_bind_int64(statement, 2, filter->since_ms);
    sqlite3_bind_int64(statement, 3, filter->until_ms);
    return statement;
}

static const char *column_text(sqlite3_stmt *statement, int column)
{
    return (const char *)sqlite3_column_text(statement, column);
}

/* Is it an entry of this company (folded; NULL: of any)? */
static bool is_of(const char *company, sqlite3_stmt *statement)
{
    const char *own = column_text(statement, 6);
    struct arena arena;
    bool same;

    if (company == NULL || own == NULL)
        return company == NULL;
    arena_init(&arena);
    same = strcmp(text_fold(&arena, own), company) == 0;
    arena_reset(&arena);
    return same;
}

static bool hand_out(sqlite3_stmt *statement, const char *state, store_row *row, void *context)
{
    char created[CLOCK_TEXT_SIZE];
    struct store_value values[COLUMNS] = {
        [STATE] = text_or_null(state),
        [KIND] = text_or_null(column_text(statement, 0)),
        [REQUEST_ID] = text_or_null(column_text(statement, 1)),
        [COMPANY_ID] = text_or_null(column_text(statement, 6)),
        [BRANCH] = text_or_null(column_text(statement, 7)),
        [USER] = text_or_null(column_text(statement, 8)),
        [TOKENS] = integer(sqlite3_column_int64(statement, 9)),
        [CREATED_AT] = text_or_null(created),
        [ATTEMPTS] = integer(sqlite3_column_int64(statement, 4)),
        [LAST_ERROR] = text_or_null(column_text(statement, 5)),
    };

    clock_format(sqlite3_column_int64(statement, 3), created);
    if (sqlite3_column_type(statement, 2) != SQLITE_NULL)
        values[TOKEN_ID] = integer(sqlite3_column_int64(statement, 2));
    return row(context, COLUMNS, names, values);
}

enum err_code outbox_query(struct outbox *outbox, const struct store_filter *filter, store_row *row,
                           void *context, struct err *err)
{
    static const struct {
        const char *state, *table;
    } parts[] = {{"dead", "OutboxDead"}, {"waiting", "Outbox"}};
    enum err_code code = ERR_NONE;
    const char *company = NULL;
    struct arena arena;
    bool more = true;

    arena_init(&arena);
    if (filter->company_id != NULL)
        company = text_fold(&arena, filter->company_id);
    pthread_mutex_lock(&outbox->lock);
    for (size_t i = 0; i < 2 && more && code == ERR_NONE; i++) {
        sqlite3_stmt *statement = prepare(outbox, parts[i].table, filter);
        int result = SQLITE_DONE;

        while (more && (result = sqlite3_step(statement)) == SQLITE_ROW)
            if (is_of(company, statement))
                more = hand_out(statement, parts[i].state, row, context);
        if (more && result != SQLITE_DONE)
            code = outbox_sql_error(outbox, err);
        sqlite3_finalize(statement);
    }
    pthread_mutex_unlock(&outbox->lock);
    arena_reset(&arena);
    return code;
}

/* ---- how many there are ---- */

void outbox_show_status(const struct store_outbox_status *status, store_row *row, void *context)
{
    static const char *const columns[] = {"State", "Count", "OldestSeconds", "Host"};
    const struct {
        const char *state;
        int64_t count;
    } parts[] = {
        {"waiting", status->waiting}, {"records", status->records}, {"dead", status->dead}};
    bool more = true;

    for (size_t i = 0; i < 3 && more; i++) {
        struct store_value values[] = {text_or_null(parts[i].state), integer(parts[i].count),
                                       text_or_null(NULL), text_or_null(log_host())};
        if (i == 0 && status->waiting > 0)
            values[2] = integer(status->oldest_ms / 1000);
        more = row(context, 4, columns, values);
    }
}
