/* store_sqlite_admin.c - token administration of the embedded store: each change with its AuditLog
 * row in the same transaction, and never a key in it. See store_sqlite.h. */
#include "store_sqlite.h"

#include <stdio.h>
#include <string.h>

#define THRESHOLD_DEFAULT 0.8
#define DETAIL_SIZE 256
#define STATUS_SIZE 65 /* 16 characters */

static struct store_value sql_limit(int64_t limit)
{
    return limit < 0 ? sql_text(NULL) : sql_int(limit);
}

static void describe_limit(int64_t limit, char out[32])
{
    if (limit < 0)
        snprintf(out, 32, "none");
    else
        snprintf(out, 32, "%lld", (long long)limit);
}

static enum err_code no_such_token(int64_t token_id, struct err *err)
{
    return err_set(err, ERR_NO_SUCH_ROW, "there is no token %lld", (long long)token_id);
}

/* ---- add ---- */

/* The row was added without a key, and Disabled: seals the key for its TokenID, and activates it. */
static enum err_code add_sealed_key(struct sqlite_tx *tx, int64_t token_id, const char *api_key,
                                    const struct store_sealer *sealer, struct err *err)
{
    static const char sql[] =
        "UPDATE TokenMaster SET ApiKey = ?2, Status = 'Active' WHERE TokenID = ?1";
    char sealed[STORE_API_KEY_SIZE];
    enum err_code code = sealer->seal(sealer->context, token_id, api_key, sealed, err);

    if (code != ERR_NONE)
        return code;
    return SQLITE_RUN(tx->db, NULL, err, sql, sql_int(token_id), sql_text(sealed));
}

static enum err_code add(struct sqlite_tx *tx, const char *actor,
                         const struct store_new_token *token, int64_t *token_id, struct err *err)
{
    static const char sql_token[] =
        "INSERT INTO TokenMaster"
        " (CompanyID, CompanyName, ApiKey, Provider, TotalTokenLimit, Status, CreatedAt, UpdatedAt)"
        " VALUES (?1, ?2, ?3, ?4, ?5, ?7, ?6, ?6)";
    static const char sql_summary[] =
        "INSERT INTO TokenUsageSummary (TokenID, TotalRemainingTokens, Threshold, LastUpdated)"
        " VALUES (?1, ?2, ?3, ?4)";
    const struct store_sealer *sealer = token->sealer;
    const char *provider = token->provider != NULL ? token->provider : "Gemini";
    double threshold = token->threshold > 0 ? token->threshold : THRESHOLD_DEFAULT;
    char limit[32];
    char detail[2 * DETAIL_SIZE];
    enum err_code code = SQLITE_RUN(
        tx->db, NULL, err, sql_token, sql_text(token->company_id), sql_text(token->company_name),
        sql_text(sealer == NULL ? token->api_key : ""), sql_text(provider), sql_limit(token->limit),
        sql_text(tx->now), sql_text(sealer == NULL ? "Active" : "Disabled"));

    if (code != ERR_NONE)
        return code;
    *token_id = sqlite3_last_insert_rowid(tx->db->handle);
    if (sealer != NULL)
        code = add_sealed_key(tx, *token_id, token->api_key, sealer, err);
    if (code != ERR_NONE)
        return code;
    code = SQLITE_RUN(tx->db, NULL, err, sql_summary, sql_int(*token_id), sql_limit(token->limit),
                      sql_real(threshold), sql_text(tx->now));
    if (code != ERR_NONE)
        return code;
    describe_limit(token->limit, limit);
    snprintf(detail, sizeof detail, "limit %s, threshold %g, provider %s", limit, threshold,
             provider);
    return sqlite_audit(tx, actor, "token added", *token_id, NULL, detail, err);
}

enum err_code sqlite_token_add(void *self, const char *actor, const struct store_new_token *token,
                               int64_t *token_id, struct err *err)
{
    struct store_sqlite *store = self;
    struct sqlite_tx tx;

    *token_id = 0;
    if (store_check_new_token(actor, token, err) != ERR_NONE ||
        sqlite_begin(store, &tx, err) != ERR_NONE)
        return err->code;
    return sqlite_end(store, add(&tx, actor, token, token_id, err), err);
}

/* ---- status ---- */

static enum err_code set_status(struct sqlite_tx *tx, const char *actor, int64_t token_id,
                                const char *status, const char *reason, struct err *err)
{
    static const char sql_old[] =
        "SELECT SUBSTR(Status, 1, 16) FROM TokenMaster WHERE TokenID = ?1";
    static const char sql_set[] =
        "UPDATE TokenMaster"
        " SET Status = ?2, StatusReason = SUBSTR(?3, 1, 1000), UpdatedAt = ?4,"
        "     CooldownUntil = CASE WHEN ?2 = 'Active' THEN NULL ELSE CooldownUntil END"
        " WHERE TokenID = ?1";
    char detail[2 * DETAIL_SIZE];
    sqlite3_stmt *row = NULL;
    enum err_code code = SQLITE_FIRST_ROW(tx->db, &row, err, sql_old, sql_int(token_id));

    if (code != ERR_NONE)
        return code;
    if (row == NULL)
        return no_such_token(token_id, err);
    snprintf(detail, sizeof detail, "%s to %s%s%s", (const char *)sqlite3_column_text(row, 0),
             status, reason != NULL ? ": " : "", reason != NULL ? reason : "");
    sqlite3_reset(row);
    code = SQLITE_RUN(tx->db, NULL, err, sql_set, sql_int(token_id), sql_text(status),
                      sql_text(reason), sql_text(tx->now));
    if (code != ERR_NONE)
        return code;
    return sqlite_audit(tx, actor, "token status changed", token_id, NULL, detail, err);
}

enum err_code sqlite_token_set_status(void *self, const char *actor, int64_t token_id,
                                      const char *status, const char *reason, struct err *err)
{
    struct store_sqlite *store = self;
    struct sqlite_tx tx;

    if (store_check_status(actor, &status, reason, err) != ERR_NONE ||
        sqlite_begin(store, &tx, err) != ERR_NONE)
        return err->code;
    return sqlite_end(store, set_status(&tx, actor, token_id, status, reason, err), err);
}

/* ---- key ---- */

/* expected: change it only from that; NULL: whatever it is. */
static enum err_code set_key(struct sqlite_tx *tx, const char *actor, int64_t token_id,
                             const char *api_key, const char *expected, struct err *err)
{
    static const char sql[] = "UPDATE TokenMaster SET ApiKey = ?2, UpdatedAt = ?3"
                              " WHERE TokenID = ?1 AND ApiKey = IFNULL(?4, ApiKey)";
    int changed = 0;
    enum err_code code = SQLITE_RUN(tx->db, &changed, err, sql, sql_int(token_id),
                                    sql_text(api_key), sql_text(tx->now), sql_text(expected));

    if (code != ERR_NONE)
        return code;
    if (changed == 0)
        return no_such_token(token_id, err);
    return sqlite_audit(tx, actor, expected == NULL ? "token key changed" : "token key sealed",
                        token_id, NULL, NULL, err);
}

enum err_code sqlite_token_set_key(void *self, const char *actor, int64_t token_id,
                                   const char *api_key, struct err *err)
{
    struct store_sqlite *store = self;
    struct sqlite_tx tx;

    if (store_check_key(actor, api_key, err) != ERR_NONE ||
        sqlite_begin(store, &tx, err) != ERR_NONE)
        return err->code;
    return sqlite_end(store, set_key(&tx, actor, token_id, api_key, NULL, err), err);
}

enum err_code sqlite_token_keys(void *self, int64_t after_id, struct store_token_key *keys,
                                size_t max, size_t *count, struct err *err)
{
    static const char sql[] = "SELECT TokenID, ApiKey FROM TokenMaster"
                              " WHERE TokenID > ?1 AND LENGTH(CAST(ApiKey AS BLOB)) < ?2"
                              " ORDER BY TokenID";
    struct store_sqlite *store = self;
    struct sqlite_reader *reader = NULL;
    sqlite3_stmt *row = NULL;
    enum err_code code = sqlite_reader_take(store, &reader, err);

    *count = 0;
    if (code != ERR_NONE || reader == NULL)
        return code;
    code = SQLITE_FIRST_ROW(&reader->db, &row, err, sql, sql_int(after_id),
                            sql_int(STORE_API_KEY_SIZE));
    for (int result = SQLITE_ROW; row != NULL && result == SQLITE_ROW && *count < max;
         result = sqlite3_step(row)) {
        struct store_token_key *key = &keys[(*count)++];
        key->token_id = sqlite3_column_int64(row, 0);
        snprintf(key->api_key, sizeof key->api_key, "%s",
                 (const char *)sqlite3_column_text(row, 1));
    }
    sqlite3_reset(row);
    sqlite_reader_give(reader);
    return code;
}

enum err_code sqlite_token_reseal(void *self, const char *actor, const struct store_token_key *key,
                                  const char *sealed, struct err *err)
{
    struct store_sqlite *store = self;
    struct sqlite_tx tx;

    if (store_check_key(actor, sealed, err) != ERR_NONE ||
        sqlite_begin(store, &tx, err) != ERR_NONE)
        return err->code;
    return sqlite_end(store, set_key(&tx, actor, key->token_id, sealed, key->api_key, err), err);
}

/* ---- limit ---- */

/* The sums follow the limit: what remains, and whether the threshold counts as crossed. */
static enum err_code set_summary(struct sqlite_tx *tx, int64_t token_id, int64_t limit,
                                 double threshold, struct err *err)
{
    static const char sql[] =
        "UPDATE TokenUsageSummary"
        " SET TotalRemainingTokens = ?2 - TotalUsedTokens,"
        "     Threshold = IFNULL(?3, Threshold),"
        "     ThresholdCrossedAt ="
        "         CASE WHEN TotalUsedTokens >= ?2"
        "                   OR CAST(TotalUsedTokens AS REAL) / ?2 >= IFNULL(?3, Threshold)"
        "              THEN IFNULL(ThresholdCrossedAt, ?4) END,"
        "     LastUpdated = ?4"
        " WHERE TokenID = ?1";

    return SQLITE_RUN(tx->db, NULL, err, sql, sql_int(token_id), sql_limit(limit),
                      threshold > 0 ? sql_real(threshold) : sql_text(NULL), sql_text(tx->now));
}

/* The token's status, cut to what a record holds; "" without such a token. */
static enum err_code read_status(struct sqlite_tx *tx, int64_t token_id, char out[STATUS_SIZE],
                                 struct err *err)
{
    static const char sql[] = "SELECT SUBSTR(Status, 1, 16) FROM TokenMaster WHERE TokenID = ?1";
    sqlite3_stmt *row = NULL;
    enum err_code code = SQLITE_FIRST_ROW(tx->db, &row, err, sql, sql_int(token_id));

    out[0] = '\0';
    if (row != NULL)
        snprintf(out, STATUS_SIZE, "%s", (const char *)sqlite3_column_text(row, 0));
    sqlite3_reset(row);
    return code;
}

/* An Exceeded token with room again is Active; an Active one without is Exceeded. The first also by
 * the schema's trigger, when the limit was raised. */
static enum err_code follow_limit(struct sqlite_tx *tx, int64_t token_id, struct err *err)
{
#define ROOM                                            \
    "(t.TotalTokenLimit IS NULL OR t.TotalTokenLimit >" \
    " (SELECT s.TotalUsedTokens FROM TokenUsageSummary s WHERE s.TokenID = t.TokenID))"
    static const char sql_active[] =
        "UPDATE TokenMaster AS t SET Status = 'Active', StatusReason = NULL"
        " WHERE t.TokenID = ?1 AND t.Status = 'Exceeded' AND " ROOM;
    static const char sql_exceeded[] =
        "UPDATE TokenMaster AS t SET Status = 'Exceeded', StatusReason = 'limit reached'"
        " WHERE t.TokenID = ?1 AND t.Status = 'Active' AND NOT " ROOM;
    enum err_code code = SQLITE_RUN(tx->db, NULL, err, sql_active, sql_int(token_id));

    return code == ERR_NONE ? SQLITE_RUN(tx->db, NULL, err, sql_exceeded, sql_int(token_id)) : code;
}

static enum err_code set_limit(struct sqlite_tx *tx, const char *actor, int64_t token_id,
                               int64_t limit, double threshold, struct err *err)
{
    static const char sql[] =
        "UPDATE TokenMaster SET TotalTokenLimit = ?2, UpdatedAt = ?3 WHERE TokenID = ?1";
    char detail[DETAIL_SIZE];
    char limit_text[32];
    char threshold_text[64] = "";
    char before[STATUS_SIZE];
    char after[STATUS_SIZE];
    int changed = 0;
    enum err_code code = read_status(tx, token_id, before, err);

    if (code == ERR_NONE)
        code = SQLITE_RUN(tx->db, &changed, err, sql, sql_int(token_id), sql_limit(limit),
                          sql_text(tx->now));
    if (code == ERR_NONE && changed == 0)
        return no_such_token(token_id, err);
    if (code == ERR_NONE)
        code = sqlite_ensure_summary(tx, token_id, err);
    if (code == ERR_NONE)
        code = set_summary(tx, token_id, limit, threshold, err);
    if (code == ERR_NONE)
        code = follow_limit(tx, token_id, err);
    if (code == ERR_NONE)
        code = read_status(tx, token_id, after, err);
    if (code != ERR_NONE)
        return code;
    describe_limit(limit, limit_text);
    if (threshold > 0)
        snprintf(threshold_text, sizeof threshold_text, ", threshold %g", threshold);
    bool same = strcmp(before, after) == 0;
    snprintf(detail, sizeof detail, "limit %s%s%s%s", limit_text, threshold_text,
             same ? "" : ", now ", same ? "" : after);
    return sqlite_audit(tx, actor, "token limit changed", token_id, NULL, detail, err);
}

enum err_code sqlite_token_set_limit(void *self, const char *actor, int64_t token_id, int64_t limit,
                                     double threshold, struct err *err)
{
    struct store_sqlite *store = self;
    struct sqlite_tx tx;

    if (store_check_limit(actor, limit, threshold, err) != ERR_NONE ||
        sqlite_begin(store, &tx, err) != ERR_NONE)
        return err->code;
    return sqlite_end(store, set_limit(&tx, actor, token_id, limit, threshold, err), err);
}
