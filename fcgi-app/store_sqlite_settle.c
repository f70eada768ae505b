/* store_sqlite_settle.c - usage rows, the sums beside them, and the end of reservations. See
 * store_sqlite.h and struct store_settlement in store.h.
 *
 * The usage row is what makes a settlement happen once: where it exists, nothing is done. All else
 * that a settlement changes is in the same transaction. A reservation leaves the state 'open' once,
 * and only then is its estimate taken off ReservedTokens. */
#include "store_sqlite.h"

#include <stdio.h>
#include <string.h>

/* What the rows say before a settlement changes them. Nobody else writes until it is done. */
struct before {
    bool settled;   /* there is a usage row */
    bool has_token; /* the token is still in TokenMaster */
    bool has_summary;
    bool limited;
    bool crossed; /* the threshold was crossed already */
    int64_t limit;
    int64_t used;    /* with what this settlement adds */
    int64_t pending; /* reservations that are open or unsettled */
    int64_t last_id; /* the last of those */
    int64_t open_tokens;
    double threshold;
    char company[STORE_TEXT_SIZE]; /* the store's spelling, as far as it is known */
};

/* ---- looking ---- */

static void copy_company(struct before *b, sqlite3_stmt *row, int column)
{
    const char *company = (const char *)sqlite3_column_text(row, column);

    if (store_text_fits(company, 1, STORE_TEXT_SIZE - 1))
        memcpy(b->company, company, strlen(company) + 1);
}

static void add_reservation(struct before *b, sqlite3_stmt *row)
{
    const int64_t id = sqlite3_column_int64(row, 1);

    b->pending++;
    b->last_id = id > b->last_id ? id : b->last_id;
    b->open_tokens += sqlite3_column_int64(row, 2);
    copy_company(b, row, 3);
}

static void add_token(struct before *b, sqlite3_stmt *row)
{
    b->has_token = true;
    copy_company(b, row, 5);
    b->limited = sqlite3_column_type(row, 6) != SQLITE_NULL;
    b->limit = sqlite3_column_int64(row, 6);
    b->has_summary = sqlite3_column_int(row, 7) != 0;
    b->used = sqlite3_column_int64(row, 8);
    b->threshold = sqlite3_column_double(row, 9);
    b->crossed = sqlite3_column_int(row, 10) != 0;
}

/* A row for each reservation; one row without any. */
static enum err_code look(struct sqlite_tx *tx, const struct store_settlement *s, struct before *b,
                          struct err *err)
{
    static const char sql[] =
        "SELECT EXISTS (SELECT 1 FROM TokenUsageLogs"
        "               WHERE RequestID = ?1 AND IFNULL(TokenID, 0) = ?2),"
        " r.ReservationID, CASE r.State WHEN 'open' THEN r.EstimatedTokens END, r.CompanyID,"
        " t.TokenID, t.CompanyID, t.TotalTokenLimit,"
        " s.TokenID IS NOT NULL, s.TotalUsedTokens + ?3, s.Threshold,"
        " s.ThresholdCrossedAt IS NOT NULL"
        " FROM (SELECT 1)"
        " LEFT JOIN TokenReservations r"
        "   ON r.RequestID = ?1 AND IFNULL(r.TokenID, 0) = ?2 AND r.ClosedAt IS NULL"
        " LEFT JOIN TokenMaster t ON t.TokenID = ?2"
        " LEFT JOIN TokenUsageSummary s ON s.TokenID = ?2";
    sqlite3_stmt *row = NULL;
    int result = SQLITE_ROW;
    enum err_code code = SQLITE_FIRST_ROW(tx->db, &row, err, sql, sql_text(s->request_id),
                                          sql_int(s->token_id), sql_int(s->usage.total_tokens));

    *b = (struct before){0};
    memcpy(b->company, s->company_id, strlen(s->company_id) + 1);
    while (row != NULL && result == SQLITE_ROW) {
        b->settled = sqlite3_column_int(row, 0) != 0;
        if (sqlite3_column_type(row, 1) != SQLITE_NULL)
            add_reservation(b, row);
        if (sqlite3_column_type(row, 4) != SQLITE_NULL)
            add_token(b, row);
        result = sqlite3_step(row);
    }
    if (code == ERR_NONE && result != SQLITE_ROW && result != SQLITE_DONE)
        code = sqlite_failed(err, result);
    sqlite3_reset(row);
    return code;
}

/* ---- reservations ---- */

/* Ends all that the request still has with the token. What they hold of it is the caller's to take
 * back. */
static enum err_code close_reservations(struct sqlite_tx *tx, const struct store_settlement *s,
                                        const struct before *b, const char *state, struct err *err)
{
#define CLOSE "UPDATE TokenReservations SET State = ?1, ClosedAt = ?2, UnknownCalls = ?3"
    /* One row by its ID: where there may be several, SQLite copies each page before. */
    static const char sql_one[] = CLOSE " WHERE ReservationID = ?4";
    static const char sql_all[] =
        CLOSE " WHERE RequestID = ?4 AND TokenID IS ?5 AND ClosedAt IS NULL";

    if (b->pending == 0)
        return ERR_NONE;
    if (b->pending == 1)
        return SQLITE_RUN(tx->db, NULL, err, sql_one, sql_text(state), sql_text(tx->now),
                          sql_int(s->unknown_calls), sql_int(b->last_id));
    return SQLITE_RUN(tx->db, NULL, err, sql_all, sql_text(state), sql_text(tx->now),
                      sql_int(s->unknown_calls), sql_text(s->request_id), sql_id(s->token_id));
}

/* Nothing was spent. */
static enum err_code release(struct sqlite_tx *tx, const struct store_settlement *s,
                             const struct before *b, struct err *err)
{
    enum err_code code = sqlite_unreserve(tx, s->token_id, b->open_tokens, err);

    return code == ERR_NONE ? close_reservations(tx, s, b, "released", err) : code;
}

/* A settlement for which there is no reservation (its acquire never reached this database) leaves
 * one, numbered below those of acquires. */
static enum err_code insert_lost(struct sqlite_tx *tx, const struct store_settlement *s,
                                 const struct before *b, struct err *err)
{
    static const char sql[] = "SELECT MIN(0, IFNULL(MIN(Sequence), 0)) - 1"
                              " FROM TokenReservations WHERE RequestID = ?1";
    struct sqlite_reservation lost = {
        .request_id = s->request_id,
        .token_id = s->token_id,
        .company_id = b->company,
        .branch = s->branch,
        .requested_by = s->requested_by,
        .state = "unsettled",
        .unknown_calls = s->unknown_calls,
    };
    sqlite3_stmt *row = NULL;
    enum err_code code = SQLITE_FIRST_ROW(tx->db, &row, err, sql, sql_text(s->request_id));

    if (row != NULL)
        lost.sequence = sqlite3_column_int64(row, 0);
    sqlite3_reset(row);
    return code == ERR_NONE ? sqlite_insert_reservation(tx, &lost, err) : code;
}

/* One row stands for all of the request's unknown calls with the token: the last. Those before it
 * are released, so that nobody counts them twice. */
static enum err_code leave_unsettled(struct sqlite_tx *tx, const struct store_settlement *s,
                                     const struct before *b, struct err *err)
{
    static const char sql[] =
        "UPDATE TokenReservations"
        " SET State = CASE WHEN ReservationID = ?3 THEN 'unsettled' ELSE 'released' END,"
        "     UnknownCalls = CASE WHEN ReservationID = ?3 THEN ?4 ELSE 0 END,"
        "     ClosedAt = CASE WHEN ReservationID = ?3 THEN NULL ELSE ?5 END"
        " WHERE RequestID = ?1 AND TokenID IS ?2 AND ClosedAt IS NULL";
    enum err_code code = sqlite_unreserve(tx, s->token_id, b->open_tokens, err);

    if (code != ERR_NONE)
        return code;
    if (b->pending == 0)
        return insert_lost(tx, s, b, err);
    return SQLITE_RUN(tx->db, NULL, err, sql, sql_text(s->request_id), sql_id(s->token_id),
                      sql_int(b->last_id), sql_int(s->unknown_calls), sql_text(tx->now));
}

/* An acquire that nobody heard of: what it reserved is released. Where it has not come yet, a row in
 * its place makes it reserve nothing when it does. */
static enum err_code release_unheard(struct sqlite_tx *tx, const struct store_settlement *s,
                                     struct err *err)
{
    static const char sql_find[] =
        "SELECT IFNULL(TokenID, 0), EstimatedTokens, State = 'open' FROM TokenReservations"
        " WHERE RequestID = ?1 AND Sequence = ?2";
    static const char sql_close[] =
        "UPDATE TokenReservations SET State = 'released', ClosedAt = ?3, UnknownCalls = 0"
        " WHERE RequestID = ?1 AND Sequence = ?2 AND ClosedAt IS NULL";
    const struct sqlite_reservation none = {.request_id = s->request_id,
                                            .sequence = s->release_sequence,
                                            .company_id = s->company_id,
                                            .branch = s->branch,
                                            .requested_by = s->requested_by,
                                            .state = "released"};
    sqlite3_stmt *row = NULL;
    enum err_code code = SQLITE_FIRST_ROW(tx->db, &row, err, sql_find, sql_text(s->request_id),
                                          sql_int(s->release_sequence));

    if (code == ERR_NONE && row == NULL)
        return sqlite_insert_reservation(tx, &none, err);
    if (row == NULL)
        return code;
    int64_t token_id = sqlite3_column_int64(row, 0);
    int64_t tokens = sqlite3_column_int(row, 2) != 0 ? sqlite3_column_int64(row, 1) : 0;
    sqlite3_reset(row);
    code = sqlite_unreserve(tx, token_id, tokens, err);
    if (code != ERR_NONE)
        return code;
    return SQLITE_RUN(tx->db, NULL, err, sql_close, sql_text(s->request_id),
                      sql_int(s->release_sequence), sql_text(tx->now));
}

/* ---- usage ---- */

static enum err_code insert_usage(struct sqlite_tx *tx, const struct store_settlement *s,
                                  const struct before *b, struct err *err)
{
    static const char sql[] =
        "INSERT INTO TokenUsageLogs (TokenID, Branch, RequestedBy, InputTokens, OutputTokens,"
        " TextPromptTokens, ImagePromptTokens, TextCandidatesTokens, TotalTokensUsed,"
        " RequestCount, LoggedAt, RequestID, CompanyID, ClientKeyID, TokenSource, ThoughtsTokens,"
        " CachedTokens, UnknownCalls, Model, DurationMs, TraceID)"
        " VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18,"
        "         SUBSTR(?19, 1, 256), ?20, ?21)";
    const struct usage *u = &s->usage;
    char logged[CLOCK_TEXT_SIZE];

    clock_format(s->logged_ms != 0 ? s->logged_ms : tx->now_ms, logged);
    return SQLITE_RUN(tx->db, NULL, err, sql, sql_id(s->token_id), sql_text(s->branch),
                      sql_text(s->requested_by), sql_int(u->input_tokens),
                      sql_int(u->output_tokens), sql_int(u->text_prompt_tokens),
                      sql_int(u->image_prompt_tokens), sql_int(u->text_candidates_tokens),
                      sql_int(u->total_tokens), sql_int(s->request_count), sql_text(logged),
                      sql_text(s->request_id), sql_text(b->company), sql_text(s->client_key_id),
                      sql_text(s->token_source), sql_int(u->thoughts_tokens),
                      sql_int(u->cached_tokens), sql_int(s->unknown_calls), sql_text(s->model),
                      sql_int(s->duration_ms), sql_text(s->trace_id));
}

static enum err_code exceed(struct sqlite_tx *tx, struct store_settlement *s,
                            const struct before *b, struct err *err)
{
    static const char sql[] = "UPDATE TokenMaster"
                              " SET Status = 'Exceeded', StatusReason = ?2, UpdatedAt = ?3"
                              " WHERE TokenID = ?1 AND Status = 'Active'";
    char reason[64];
    int changed = 0;
    enum err_code code = ERR_NONE;

    snprintf(reason, sizeof reason, "limit of %lld tokens reached", (long long)b->limit);
    code = SQLITE_RUN(tx->db, &changed, err, sql, sql_int(s->token_id), sql_text(reason),
                      sql_text(tx->now));
    s->exceeded = changed > 0;
    if (code != ERR_NONE || changed == 0)
        return code;
    return sqlite_audit(tx, SQLITE_ACTOR, "token status changed", s->token_id, s->request_id,
                        "Active to Exceeded: limit reached", err);
}

/* Turns what the token had reserved into what was used, and draws the conclusions. */
static enum err_code add_usage(struct sqlite_tx *tx, struct store_settlement *s,
                               const struct before *b, struct err *err)
{
    static const char sql[] = "UPDATE TokenUsageSummary"
                              " SET TotalUsedTokens = TotalUsedTokens + ?2,"
                              "     TotalRemainingTokens = ?3 - (TotalUsedTokens + ?2),"
                              "     ReservedTokens = MAX(0, ReservedTokens - ?4),"
                              "     ThresholdCrossedAt = IFNULL(ThresholdCrossedAt, ?5),"
                              "     LastUpdated = ?6"
                              " WHERE TokenID = ?1";
    /* Divided, not multiplied: 7 of 100 is 0.07 exactly as it is written. */
    const bool used_up = b->limited && b->used >= b->limit;
    const bool crossed =
        used_up || (b->limited && (double)b->used / (double)b->limit >= b->threshold);
    enum err_code code =
        SQLITE_RUN(tx->db, NULL, err, sql, sql_int(s->token_id), sql_int(s->usage.total_tokens),
                   b->limited ? sql_int(b->limit) : sql_text(NULL), sql_int(b->open_tokens),
                   sql_text(crossed ? tx->now : NULL), sql_text(tx->now));

    s->threshold_crossed = crossed && !b->crossed;
    return code == ERR_NONE && used_up ? exceed(tx, s, b, err) : code;
}

static enum err_code settle_usage(struct sqlite_tx *tx, struct store_settlement *s,
                                  struct before *b, struct err *err)
{
    enum err_code code = ERR_NONE;

    if (s->token_id != 0 && !b->has_token)
        return err_set(err, ERR_BAD_VALUE, "token %lld was deleted", (long long)s->token_id);
    /* Before the usage row: a summary that is made now sums up what was there. */
    if (s->token_id != 0 && !b->has_summary) {
        code = sqlite_ensure_summary(tx, s->token_id, err);
        if (code == ERR_NONE)
            code = look(tx, s, b, err);
    }
    if (code == ERR_NONE)
        code = insert_usage(tx, s, b, err);
    if (code == ERR_NONE)
        code = close_reservations(tx, s, b, "settled", err);
    if (code == ERR_NONE && s->token_id != 0)
        code = add_usage(tx, s, b, err);
    return code;
}

/* ---- idempotency keys ---- */

static enum err_code settle_key(struct sqlite_tx *tx, const struct store_settlement *s,
                                struct err *err)
{
    static const char sql_free[] =
        "DELETE FROM IdempotencyKeys WHERE RequestID = ?1 AND State = 'in_progress'";
    static const char sql_done[] = "UPDATE IdempotencyKeys SET State = 'done' WHERE RequestID = ?1";

    if (s->idempotency == STORE_KEY_NONE)
        return ERR_NONE;
    return s->idempotency == STORE_KEY_FREE
               ? SQLITE_RUN(tx->db, NULL, err, sql_free, sql_text(s->request_id))
               : SQLITE_RUN(tx->db, NULL, err, sql_done, sql_text(s->request_id));
}

/* ---- the whole ---- */

static enum err_code settle_one(struct sqlite_tx *tx, struct store_settlement *s, struct err *err)
{
    struct before before;

    enum err_code code = settle_key(tx, s, err);

    if (code == ERR_NONE && s->release_sequence > 0)
        return release_unheard(tx, s, err);
    if (code == ERR_NONE)
        code = look(tx, s, &before, err);
    if (code != ERR_NONE || before.settled)
        return code;
    if (s->request_count > 0)
        code = settle_usage(tx, s, &before, err);
    else if (s->unknown_calls > 0)
        code = leave_unsettled(tx, s, &before, err);
    else
        code = release(tx, s, &before, err);
    if (code == ERR_NONE && s->token_id != 0)
        code = sqlite_apply_fault(tx, s->token_id, &s->fault, s->request_id, &s->disabling_stopped,
                                  err);
    return code;
}

static enum err_code settle_item(struct sqlite_tx *tx, const void *items, size_t i, struct err *err)
{
    struct store_settlement *s = ((struct store_settlement *const *)items)[i];

    store_clear_settlement(s);
    if (s->code == ERR_NONE)
        s->code = settle_one(tx, s, &s->err);
    if (s->code != ERR_NONE)
        store_clear_settlement(s);
    *err = s->err;
    return s->code;
}

enum err_code sqlite_settle(void *self, struct store_settlement *const *items, size_t count,
                            struct err *err)
{
    enum err_code code = ERR_NONE;

    if (store_admit_settlements(items, count) > 0)
        code = sqlite_run_batch(self, settle_item, items, count, err);
    if (code != ERR_NONE)
        store_fail_settlements(items, count, err);
    return code;
}

/* ---- reservations whose process died, idempotency keys that are over ---- */

static enum err_code any_expired(struct store_sqlite *store, bool *any, struct err *err)
{
    static const char sql[] = "SELECT 1 WHERE EXISTS (SELECT 1 FROM TokenReservations"
                              "     WHERE State = 'open' AND ClosedAt IS NULL AND ExpiresAt < ?1)"
                              " OR EXISTS (SELECT 1 FROM IdempotencyKeys WHERE ExpiresAt < ?1)";
    struct sqlite_reader *reader = NULL;
    sqlite3_stmt *row = NULL;
    char now[CLOCK_TEXT_SIZE];
    enum err_code code = sqlite_reader_take(store, &reader, err);

    if (code != ERR_NONE)
        return code;
    clock_format(clock_wall_ms(), now);
    code = SQLITE_FIRST_ROW(&reader->db, &row, err, sql, sql_text(now));
    *any = row != NULL;
    sqlite3_reset(row);
    sqlite_reader_give(reader);
    return code;
}

static enum err_code expire(struct sqlite_tx *tx, int *expired, struct err *err)
{
#define EXPIRED "State = 'open' AND ClosedAt IS NULL AND ExpiresAt < ?1"
    static const char sql_sums[] =
        "UPDATE TokenUsageSummary"
        " SET ReservedTokens = MAX(0, ReservedTokens -"
        "     (SELECT SUM(r.EstimatedTokens) FROM TokenReservations r"
        "      WHERE " EXPIRED " AND r.TokenID = TokenUsageSummary.TokenID))"
        " WHERE TokenID IN (SELECT TokenID FROM TokenReservations WHERE " EXPIRED ")";
    static const char sql_states[] = "UPDATE TokenReservations"
                                     " SET State = 'unsettled', UnknownCalls = UnknownCalls + 1"
                                     " WHERE " EXPIRED;
    /* What its request may have spent counts as done. */
    static const char sql_keys[] =
        "UPDATE IdempotencyKeys SET State = 'done'"
        " WHERE RequestID IN (SELECT RequestID FROM TokenReservations WHERE " EXPIRED ")";
    static const char sql_old_keys[] = "DELETE FROM IdempotencyKeys WHERE ExpiresAt < ?1";
    enum err_code code = SQLITE_RUN(tx->db, NULL, err, sql_sums, sql_text(tx->now));

    if (code == ERR_NONE)
        code = SQLITE_RUN(tx->db, NULL, err, sql_keys, sql_text(tx->now));
    if (code == ERR_NONE)
        code = SQLITE_RUN(tx->db, NULL, err, sql_old_keys, sql_text(tx->now));
    if (code == ERR_NONE)
        code = SQLITE_RUN(tx->db, expired, err, sql_states, sql_text(tx->now));
    return code;
}

enum err_code sqlite_expire_reservations(void *self, int *expired, struct err *err)
{
    struct store_sqlite *store = self;
    struct sqlite_tx tx;
    bool any = false;
    enum err_code code = any_expired(store, &any, err);

    *expired = 0;
    if (code != ERR_NONE || !any) /* without any there is no need to queue as a writer */
        return code;
    code = sqlite_begin(store, &tx, err);
    if (code != ERR_NONE)
        return code;
    code = sqlite_end(store, expire(&tx, expired, err), err);
    if (code != ERR_NONE)
        *expired = 0;
    return code;
}
