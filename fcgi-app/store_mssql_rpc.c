/* store_mssql_rpc.c - one call of a procedure on SQL Server, by db-lib (FreeTDS). See store_mssql.h.
 *
 * A call that ends any other way than by reading all that the server says leaves a connection that
 * nobody may use again. The watch (store_mssql_watch.c) sees to it that it ends.
 *
 * Text: up to 4,000 bytes of UTF-8 travel as NVARCHAR, more as NTEXT, which procedures take for
 * NVARCHAR(MAX). db-lib sends empty text as NULL. */
#include <stdio.h>
#include <string.h>
#include <unistr.h>

#include "clock.h"
#include "store_mssql_conn.h"

#define NVARCHAR_MAX 4000
#define COLUMNS_MAX 64
#define FAILED_RESULTS_MAX 64

/* ---- parameters ---- */

/* Text that is UTF-8; invalid bytes become U+FFFD. */
static const char *valid_text(struct arena *arena, const char *s)
{
    static const char replacement[] = "\xEF\xBF\xBD";
    size_t len = strlen(s);
    size_t out = 0;
    char *copy;

    if (u8_check((const uint8_t *)s, len) == NULL)
        return s;
    copy = arena_alloc(arena, 3 * len + 1);
    for (size_t i = 0; i < len;) {
        ucs4_t c;
        int n = u8_mbtoucr(&c, (const uint8_t *)s + i, len - i);
        if (n > 0)
            memcpy(copy + out, s + i, (size_t)n);
        else
            memcpy(copy + out, replacement, 3);
        out += n > 0 ? (size_t)n : 3;
        i += n > 0 ? (size_t)n : 1;
    }
    copy[out] = '\0';
    return copy;
}

/* db-lib keeps the address until the call is sent, and does not write there. */
static bool add_param(struct mssql_conn *conn, struct arena *arena, const struct mssql_param *param)
{
    const struct store_value *value = &param->value;
    bool is_null = value->type == STORE_NULL;
    const char *text;
    size_t len;

    switch (param->type) {
    case STORE_INTEGER:
        return dbrpcparam(conn->dbproc, param->name, 0, SYBINT8, -1, is_null ? 0 : -1,
                          (BYTE *)(uintptr_t)&value->integer) == SUCCEED;
    case STORE_REAL:
        return dbrpcparam(conn->dbproc, param->name, 0, SYBFLT8, -1, is_null ? 0 : -1,
                          (BYTE *)(uintptr_t)&value->real) == SUCCEED;
    case STORE_TEXT:
    case STORE_NULL:
        break;
    }
    text = is_null ? "" : valid_text(arena, value->text);
    len = strlen(text);
    if (len > INT32_MAX / 4)
        return false;
    return dbrpcparam(conn->dbproc, param->name, 0, len > NVARCHAR_MAX ? SYBNTEXT : SYBVARCHAR, -1,
                      (DBINT)len, (BYTE *)(uintptr_t)text) == SUCCEED;
}

/* ---- rows ---- */

/* Any type that is no text, number or NULL: as db-lib writes it. */
static void append_converted(struct buf *row, DBPROCESS *dbproc, int column)
{
    char text[256];
    DBINT len = dbconvert(dbproc, dbcoltype(dbproc, column), dbdata(dbproc, column),
                          dbdatlen(dbproc, column), SYBCHAR, (BYTE *)text, sizeof text - 1);

    buf_append(row, text, len > 0 ? (size_t)len : 0);
}

/* A number with decimals that are all 0 is whole: sums of BIGINT are DECIMAL to some servers. */
static void read_decimal(DBPROCESS *dbproc, int column, struct store_value *value)
{
    DBNUMERIC number;
    DBFLT8 real = 0;
    DBBIGINT integer = 0;

    memset(&number, 0, sizeof number);
    memcpy(&number, dbdata(dbproc, column), (size_t)dbdatlen(dbproc, column));
    if (number.scale == 0 &&
        dbconvert(dbproc, SYBNUMERIC, (BYTE *)&number, -1, SYBINT8, (BYTE *)&integer, -1) > 0) {
        *value = (struct store_value){.type = STORE_INTEGER, .integer = integer};
        return;
    }
    if (dbconvert(dbproc, SYBNUMERIC, (BYTE *)&number, -1, SYBFLT8, (BYTE *)&real, -1) > 0)
        *value = (struct store_value){.type = STORE_REAL, .real = real};
}

/* Text is appended to conn->row; value->integer tells where until the whole row is there. */
static void read_value(struct mssql_conn *conn, int column, struct store_value *value)
{
    DBPROCESS *dbproc = conn->dbproc;
    const BYTE *data = dbdata(dbproc, column);
    DBBIGINT integer = 0;
    DBFLT8 real = 0;

    *value = (struct store_value){.type = STORE_NULL};
    if (data == NULL)
        return;
    switch (dbcoltype(dbproc, column)) {
    case SYBBIT:
    case SYBINT1:
    case SYBINT2:
    case SYBINT4:
    case SYBINT8:
        dbconvert(dbproc, dbcoltype(dbproc, column), data, dbdatlen(dbproc, column), SYBINT8,
                  (BYTE *)&integer, -1);
        *value = (struct store_value){.type = STORE_INTEGER, .integer = integer};
        return;
    case SYBREAL:
    case SYBFLT8:
        dbconvert(dbproc, dbcoltype(dbproc, column), data, dbdatlen(dbproc, column), SYBFLT8,
                  (BYTE *)&real, -1);
        *value = (struct store_value){.type = STORE_REAL, .real = real};
        return;
    case SYBNUMERIC:
    case SYBDECIMAL:
        read_decimal(dbproc, column, value);
        return;
    default:
        break;
    }
    *value = (struct store_value){.type = STORE_TEXT, .integer = (int64_t)conn->row.len};
    switch (dbcoltype(dbproc, column)) {
    case SYBCHAR:
    case SYBVARCHAR:
    case SYBNVARCHAR:
    case SYBTEXT:
    case SYBNTEXT:
        buf_append(&conn->row, data, (size_t)dbdatlen(dbproc, column));
        break;
    default:
        append_converted(&conn->row, dbproc, column);
    }
    buf_append_char(&conn->row, '\0');
}

/* False: no more rows are wanted. */
static bool hand_out(struct mssql_conn *conn, const struct mssql_call *call,
                     struct mssql_failure *failure)
{
    struct store_value values[COLUMNS_MAX];
    const char *names[COLUMNS_MAX];
    int columns = dbnumcols(conn->dbproc);

    buf_clear(&conn->row);
    for (int i = 0; i < columns && i < COLUMNS_MAX; i++) {
        names[i] = dbcolname(conn->dbproc, i + 1);
        read_value(conn, i + 1, &values[i]);
    }
    if (columns > COLUMNS_MAX || !buf_ok(&conn->row)) {
        failure->cause = MSSQL_LOCAL;
        failure->must_drop = true;
        snprintf(failure->text, sizeof failure->text, "a row has too many columns or bytes");
        return false;
    }
    for (int i = 0; i < columns; i++)
        if (values[i].type == STORE_TEXT)
            values[i].text = buf_str(&conn->row) + values[i].integer;
    failure->has_rows = true;
    return call->row(call->context, (size_t)columns, names, values);
}

/* As hand_out, without counting the time that the caller spends on a row. */
static bool hand_out_untimed(struct mssql_conn *conn, const struct mssql_call *call,
                             int64_t *deadline_ms, struct mssql_failure *failure)
{
    int64_t start_ms = clock_monotonic_ms();
    bool wanted;

    if (mssql_guard_disarm(&conn->guard))
        return false;
    wanted = hand_out(conn, call, failure);
    *deadline_ms += clock_monotonic_ms() - start_ms;
    mssql_guard_arm(&conn->guard, *deadline_ms);
    return wanted;
}

/* The rows of one result. *wanted: whether they go on. False: the connection is lost. */
static bool read_rows(struct mssql_conn *conn, const struct mssql_call *call, bool *wanted,
                      int64_t *deadline_ms, struct mssql_failure *failure)
{
    STATUS status;

    while ((status = dbnextrow(conn->dbproc)) != NO_MORE_ROWS) {
        if (status != REG_ROW)
            return false;
        if (!*wanted || failure->number != 0)
            continue;
        *wanted = call->row_once ? hand_out_untimed(conn, call, deadline_ms, failure)
                                 : hand_out(conn, call, failure);
        if (failure->must_drop)
            return false;
    }
    return true;
}

/* Reads all that the server says. False: the connection is lost, or errors have no end. */
static bool read_results(struct mssql_conn *conn, const struct mssql_call *call,
                         int64_t deadline_ms, struct mssql_failure *failure)
{
    bool wanted = call->row != NULL;
    int failed = dbsqlok(conn->dbproc) != SUCCEED;
    RETCODE code;

    while (!failure->must_drop && (code = dbresults(conn->dbproc)) != NO_MORE_RESULTS) {
        if (code == SUCCEED) {
            if (!read_rows(conn, call, &wanted, &deadline_ms, failure))
                return false;
        } else if (++failed > FAILED_RESULTS_MAX || dbdead(conn->dbproc)) {
            return false;
        }
    }
    return !failure->must_drop;
}

/* ---- the whole ---- */

static void begin(struct mssql_conn *conn, int64_t deadline_ms, struct mssql_failure *failure)
{
    *failure = (struct mssql_failure){.cause = MSSQL_LOCAL};
    conn->failure = failure;
    mssql_guard_arm(&conn->guard, deadline_ms);
}

static bool end(struct mssql_conn *conn, bool ok, struct mssql_failure *failure)
{
    bool late = mssql_guard_disarm(&conn->guard);

    if (!ok || late || dbdead(conn->dbproc))
        failure->must_drop = true;
    if (late && failure->number == 0)
        failure->cause = MSSQL_TIMEOUT;
    else if (failure->must_drop && failure->number == 0 && failure->library == 0 &&
             failure->text[0] == '\0')
        failure->cause = MSSQL_BROKEN;
    conn->failure = NULL;
    buf_wipe(&conn->row);
    return !failure->must_drop && failure->number == 0;
}

bool mssql_rpc(struct mssql_conn *conn, const struct mssql_call *call, int64_t deadline_ms,
               struct mssql_failure *failure)
{
    struct arena arena;
    bool ok;

    begin(conn, deadline_ms, failure);
    arena_init(&arena);
    ok = dbrpcinit(conn->dbproc, call->procedure, 0) == SUCCEED;
    for (size_t i = 0; i < call->count && ok; i++)
        ok = add_param(conn, &arena, &call->params[i]);
    ok = ok && dbrpcsend(conn->dbproc) == SUCCEED;
    arena_reset(&arena);
    ok = ok && read_results(conn, call, deadline_ms, failure);
    if (ok && call->status != NULL)
        *call->status = dbhasretstat(conn->dbproc) ? (int)dbretstatus(conn->dbproc) : 0;
    return end(conn, ok, failure);
}

bool mssql_batch(struct mssql_conn *conn, const char *sql, int64_t deadline_ms,
                 struct mssql_failure *failure)
{
    static const struct mssql_call nothing = {.row = NULL};
    bool ok;

    begin(conn, deadline_ms, failure);
    conn->prints = true;
    ok = dbcmd(conn->dbproc, sql) == SUCCEED && dbsqlsend(conn->dbproc) == SUCCEED &&
         read_results(conn, &nothing, deadline_ms, failure);
    conn->prints = false;
    return end(conn, ok, failure);
}
