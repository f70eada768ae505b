/* store_sqlite_fault.c - what a failed call does to a token: it cools down, or loses its status.
 *
 * Only an Active token loses its status: whoever comes second, or finds it expired meanwhile,
 * changes nothing. Disabling has a guard: where tokens of two other companies were found at fault
 * within the last minute, it is not the keys (a proxy, Google itself), and disabling would take a
 * fleet down; the token cools down instead. See store_sqlite.h. */
#include "store_sqlite.h"

#include <stdio.h>
#include <string.h>

#define GUARD_WINDOW_MS 60000
#define GUARD_OTHERS 2 /* other companies with a token at fault, from which on disabling stops */
#define GUARD_COOLDOWN_MS 600000
#define TEXT_SIZE 1000 /* a reason with the words around it */
#define STOPPED "disabling stopped"

static enum err_code cool(struct sqlite_tx *tx, int64_t token_id, int64_t cooldown_ms,
                          const char *reason, struct err *err)
{
    /* By time, not by text: a cooldown that was set by hand may be written another way. What took a
     * token its status stays readable. */
    static const char sql[] =
        "UPDATE TokenMaster"
        " SET CooldownUntil = CASE WHEN julianday(CooldownUntil) > julianday(?2)"
        "                          THEN CooldownUntil ELSE ?2 END,"
        "     StatusReason = CASE WHEN Status = 'Active' THEN ?3 ELSE StatusReason END,"
        "     UpdatedAt = CASE WHEN Status = 'Active' THEN ?4 ELSE UpdatedAt END"
        " WHERE TokenID = ?1";
    char until[CLOCK_TEXT_SIZE];

    clock_format(tx->now_ms + cooldown_ms, until);
    return SQLITE_RUN(tx->db, NULL, err, sql, sql_int(token_id), sql_text(until), sql_text(reason),
                      sql_text(tx->now));
}

static enum err_code lose_status(struct sqlite_tx *tx, int64_t token_id, const char *status,
                                 const char *reason, const char *request_id, struct err *err)
{
    static const char sql[] = "UPDATE TokenMaster"
                              " SET Status = ?2, StatusReason = ?3, UpdatedAt = ?4"
                              " WHERE TokenID = ?1 AND Status = 'Active'";
    char detail[TEXT_SIZE];
    int changed = 0;
    enum err_code code = SQLITE_RUN(tx->db, &changed, err, sql, sql_int(token_id), sql_text(status),
                                    sql_text(reason), sql_text(tx->now));

    if (code != ERR_NONE || changed == 0)
        return code;
    snprintf(detail, sizeof detail, "Active to %s: %s", status, reason);
    return sqlite_audit(tx, SQLITE_ACTOR, "token status changed", token_id, request_id, detail,
                        err);
}

static enum err_code is_active(struct sqlite_tx *tx, int64_t token_id, bool *active,
                               struct err *err)
{
    static const char sql[] = "SELECT 1 FROM TokenMaster WHERE TokenID = ?1 AND Status = 'Active'";
    sqlite3_stmt *row = NULL;
    enum err_code code = SQLITE_FIRST_ROW(tx->db, &row, err, sql, sql_int(token_id));

    *active = row != NULL;
    sqlite3_reset(row);
    return code;
}

/* How many companies besides the token's own had a token at fault within the last minute? And has
 * somebody been told already that disabling stopped? */
static enum err_code look_around(struct sqlite_tx *tx, int64_t token_id, int64_t *others,
                                 bool *told, struct err *err)
{
    static const char sql[] =
        "SELECT (SELECT COUNT(DISTINCT extract_fold(t.CompanyID)) FROM TokenMaster t"
        "        WHERE SUBSTR(t.StatusReason, 1, 9) = 'at fault:'"
        "          AND julianday(t.UpdatedAt) >= julianday(?2)"
        "          AND extract_fold(t.CompanyID) <>"
        "              (SELECT extract_fold(CompanyID) FROM TokenMaster WHERE TokenID = ?1)),"
        "       EXISTS (SELECT 1 FROM AuditLog WHERE Timestamp >= ?2 AND Action = '" STOPPED "')";
    char since[CLOCK_TEXT_SIZE];
    sqlite3_stmt *row = NULL;
    enum err_code code = ERR_NONE;

    clock_format(tx->now_ms - GUARD_WINDOW_MS, since);
    code = SQLITE_FIRST_ROW(tx->db, &row, err, sql, sql_int(token_id), sql_text(since));
    if (row != NULL) {
        *others = sqlite3_column_int64(row, 0);
        *told = sqlite3_column_int(row, 1) != 0;
        sqlite3_reset(row);
    }
    return code;
}

static enum err_code disable(struct sqlite_tx *tx, int64_t token_id, const char *reason,
                             const char *request_id, bool *stopped, struct err *err)
{
    char text[TEXT_SIZE];
    int64_t others = 0;
    bool active = false;
    bool told = false;
    enum err_code code = is_active(tx, token_id, &active, err);

    if (code != ERR_NONE || !active)
        return code;
    code = look_around(tx, token_id, &others, &told, err);
    if (code != ERR_NONE)
        return code;
    if (others < GUARD_OTHERS) {
        snprintf(text, sizeof text, "at fault: %s", reason);
        return lose_status(tx, token_id, "Disabled", text, request_id, err);
    }
    snprintf(text, sizeof text,
             "at fault: %s (not disabled: tokens of several companies at fault within a minute)",
             reason);
    code = cool(tx, token_id, GUARD_COOLDOWN_MS, text, err);
    if (code != ERR_NONE || told)
        return code;
    *stopped = true;
    return sqlite_audit(tx, SQLITE_ACTOR, STOPPED, token_id, request_id, text, err);
}

enum err_code sqlite_apply_fault(struct sqlite_tx *tx, int64_t token_id,
                                 const struct store_token_fault *fault, const char *request_id,
                                 bool *disabling_stopped, struct err *err)
{
    char reason[STORE_REASON_MAX + 1] = "no reason given";
    size_t len = store_text_cut(fault->reason, STORE_REASON_MAX);

    if (len > 0)
        snprintf(reason, sizeof reason, "%.*s", (int)len, fault->reason);
    switch (fault->fault) {
    case STORE_FAULT_NONE:
        break;
    case STORE_FAULT_COOLDOWN:
        return cool(tx, token_id, fault->cooldown_ms, reason, err);
    case STORE_FAULT_DISABLE:
        return disable(tx, token_id, reason, request_id, disabling_stopped, err);
    case STORE_FAULT_EXCEED:
        return lose_status(tx, token_id, "Exceeded", reason, request_id, err);
    }
    return ERR_NONE;
}
