/* store_sqlite_rows.c - the rows that several operations of the embedded store write. Each in its
 * one way, so that what must always be true of them is looked after in one place:
 *   ReservedTokens of a token   = sum of EstimatedTokens of its reservations in state 'open'
 *   TotalUsedTokens of a token  = sum of its TokenUsageMonthly and TokenUsageLogs
 * See store_sqlite.h. */
#include "store_sqlite.h"

#include <unistd.h>

enum err_code sqlite_ensure_summary(struct sqlite_tx *tx, int64_t token_id, struct err *err)
{
    static const char sql[] =
        "INSERT OR IGNORE INTO TokenUsageSummary"
        " (TokenID, TotalUsedTokens, TotalRemainingTokens, ReservedTokens, LastUpdated)"
        " SELECT TokenID, Used, TotalTokenLimit - Used, Reserved, ?2"
        " FROM (SELECT t.TokenID, t.TotalTokenLimit,"
        "              " SQLITE_USED_BY_ROWS " AS Used,"
        "              (SELECT IFNULL(SUM(r.EstimatedTokens), 0) FROM TokenReservations r"
        "               WHERE r.State = 'open' AND r.ClosedAt IS NULL"
        "                 AND r.TokenID = t.TokenID) AS Reserved"
        "       FROM TokenMaster t WHERE t.TokenID = ?1"
        /* not left to IGNORE: the sum over the token's rows comes before that */
        "         AND NOT EXISTS (SELECT 1 FROM TokenUsageSummary s WHERE s.TokenID = ?1))";

    return SQLITE_RUN(tx->db, NULL, err, sql, sql_int(token_id), sql_text(tx->now));
}

enum err_code sqlite_unreserve(struct sqlite_tx *tx, int64_t token_id, int64_t tokens,
                               struct err *err)
{
    static const char sql[] = "UPDATE TokenUsageSummary"
                              " SET ReservedTokens = MAX(0, ReservedTokens - ?2)"
                              " WHERE TokenID = ?1";

    if (token_id == 0 || tokens == 0)
        return ERR_NONE;
    return SQLITE_RUN(tx->db, NULL, err, sql, sql_int(token_id), sql_int(tokens));
}

enum err_code sqlite_insert_reservation(struct sqlite_tx *tx, const struct sqlite_reservation *r,
                                        struct err *err)
{
    static const char sql[] =
        "INSERT INTO TokenReservations (RequestID, Sequence, TokenID, CompanyID, Branch,"
        " RequestedBy, EstimatedTokens, State, UnknownCalls, TokenSource, Host, ProcessID,"
        " CreatedAt, ExpiresAt, ClosedAt)"
        " VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14,"
        "         CASE WHEN ?8 = 'released' THEN ?13 END)";
    char expires[CLOCK_TEXT_SIZE];

    clock_format(tx->now_ms + r->expires_ms, expires);
    return SQLITE_RUN(tx->db, NULL, err, sql, sql_text(r->request_id), sql_int(r->sequence),
                      sql_id(r->token_id), sql_text(r->company_id), sql_text(r->branch),
                      sql_text(r->requested_by), sql_int(r->estimate_tokens), sql_text(r->state),
                      sql_int(r->unknown_calls), sql_text(r->token_id == 0 ? "fallback" : "store"),
                      sql_text(log_host()), sql_int(getpid()), sql_text(tx->now),
                      sql_text(expires));
}

enum err_code sqlite_audit(struct sqlite_tx *tx, const char *actor, const char *action,
                           int64_t token_id, const char *request_id, const char *detail,
                           struct err *err)
{
    static const char sql[] =
        "INSERT INTO AuditLog"
        " (Timestamp, Actor, Action, ObjectType, ObjectID, CompanyID, RequestID, Detail)"
        " VALUES (?1, ?2, ?3, 'TokenMaster', CAST(?4 AS TEXT),"
        "         (SELECT CompanyID FROM TokenMaster WHERE TokenID = ?4), ?5, SUBSTR(?6, 1, 2000))";

    return SQLITE_RUN(tx->db, NULL, err, sql, sql_text(tx->now), sql_text(actor), sql_text(action),
                      sql_int(token_id), sql_text(request_id), sql_text(detail));
}
