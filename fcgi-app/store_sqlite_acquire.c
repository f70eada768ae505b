/* store_sqlite_acquire.c - choosing and reserving a token. See store_sqlite.h and struct
 * store_acquire in store.h.
 *
 * SQL finds the company's Active tokens with what they used and reserve; classify() then sorts them
 * and is the only place that knows why one cannot serve; decide() draws the conclusion. Since the
 * whole runs in one write transaction, nothing changes between looking and reserving. */
#include "store_sqlite.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MANY 32 /* tokens of a company */
#define TRIES 4

struct candidate {
    int64_t token_id;
    int64_t limit;
    bool limited;
    bool has_summary;
    bool has_key; /* one that can be sent */
    int64_t used;
    int64_t reserved;
    int64_t cooling_ms; /* how long it still cools down; 0 or less: not */
};

struct candidates {
    struct candidate *all; /* in TokenID order */
    size_t count;
    size_t room;
};

enum fitness {
    FIT_USABLE,
    FIT_COOLING, /* usable after a wait, or tried already by this request */
    FIT_BUSY,    /* room is only lacking because of reservations */
    FIT_NEVER    /* used up, at fault, or without a key */
};

/* How the company's name is compared. The first uses the index, but folds ASCII only. */
#define COMPANY_ASCII "t.CompanyID = ?1"
#define COMPANY_UNICODE "extract_fold(t.CompanyID) = extract_fold(?1)"

static const char *choose_sql(const char *company_id, const char *ascii, const char *unicode)
{
    for (; *company_id != '\0'; company_id++)
        if ((unsigned char)*company_id >= 0x80)
            return unicode;
    return ascii;
}

/* ---- keys ---- */

static bool is_blank(char c)
{
    return (unsigned char)c <= ' ' || c == 0x7F;
}

/* The key in that column, without the line end or other white space that a key pasted by hand often
 * brings. NULL: what is left is not 1 to 1024 visible ASCII characters, and could not be sent. */
static const char *find_key(sqlite3_stmt *row, int column, size_t *len)
{
    const char *key = (const char *)sqlite3_column_text(row, column);
    size_t n = key == NULL ? 0 : (size_t)sqlite3_column_bytes(row, column); /* with any NUL */

    while (n > 0 && is_blank(key[n - 1]))
        n--;
    for (; n > 0 && is_blank(*key); key++)
        n--;
    *len = n;
    if (n == 0 || n > STORE_API_KEY_SIZE - 1)
        return NULL;
    for (size_t i = 0; i < n; i++)
        if (is_blank(key[i]) || (unsigned char)key[i] > '~')
            return NULL;
    return key;
}

/* ---- looking ---- */

static enum err_code add_candidate(struct candidates *found, sqlite3_stmt *row, int64_t now_ms,
                                   struct err *err)
{
    size_t key_len;

    if (found->count == found->room) {
        size_t room = found->room == 0 ? 16 : 2 * found->room;
        struct candidate *more = realloc(found->all, room * sizeof *more);
        if (more == NULL)
            return err_set(err, ERR_INTERNAL, "no memory");
        found->all = more;
        found->room = room;
    }
    found->all[found->count++] = (struct candidate){
        .token_id = sqlite3_column_int64(row, 0),
        .limited = sqlite3_column_type(row, 1) != SQLITE_NULL,
        .limit = sqlite3_column_int64(row, 1),
        .has_summary = sqlite3_column_int(row, 2) != 0,
        .used = sqlite3_column_int64(row, 3),
        .reserved = sqlite3_column_int64(row, 4),
        .cooling_ms =
            sqlite3_column_type(row, 5) == SQLITE_NULL ? 0 : sqlite3_column_int64(row, 5) - now_ms,
        .has_key = find_key(row, 6, &key_len) != NULL,
    };
    return ERR_NONE;
}

#define CANDIDATES(which)                                                               \
    "SELECT t.TokenID, t.TotalTokenLimit, s.TokenID IS NOT NULL,"                       \
    " IFNULL(s.TotalUsedTokens, " SQLITE_USED_BY_ROWS "), IFNULL(s.ReservedTokens, 0)," \
    " CAST(ROUND((julianday(t.CooldownUntil) - 2440587.5) * 86400000.0) AS INTEGER),"   \
    " t.ApiKey"                                                                         \
    " FROM TokenMaster t LEFT JOIN TokenUsageSummary s ON s.TokenID = t.TokenID"        \
    " WHERE " which " AND t.Status = 'Active' AND " SQLITE_PROVIDER_SERVED " ORDER BY t.TokenID"

/* The company's Active tokens. */
static enum err_code find_candidates(struct sqlite_tx *tx, const char *company_id,
                                     struct candidates *found, struct err *err)
{
    static const char ascii[] = CANDIDATES(COMPANY_ASCII);
    static const char unicode[] = CANDIDATES(COMPANY_UNICODE);
    sqlite3_stmt *row = NULL;
    int result = SQLITE_ROW;
    enum err_code code = SQLITE_FIRST_ROW(tx->db, &row, err, choose_sql(company_id, ascii, unicode),
                                          sql_text(company_id));

    while (row != NULL && code == ERR_NONE && result == SQLITE_ROW) {
        code = add_candidate(found, row, tx->now_ms, err);
        if (code == ERR_NONE)
            result = sqlite3_step(row);
    }
    if (code == ERR_NONE && result != SQLITE_ROW && result != SQLITE_DONE)
        code = sqlite_failed(err, result);
    sqlite3_reset(row);
    return code;
}

/* The nth of the company's Active tokens, if it is one of Gemini. Walks the index only. */
static enum err_code find_nth(struct sqlite_tx *tx, const char *company_id, uint64_t nth,
                              struct candidates *found, struct err *err)
{
    static const char sql[] =
        CANDIDATES("t.TokenID = (SELECT TokenID FROM TokenMaster t WHERE " COMPANY_ASCII
                   " AND Status = 'Active' ORDER BY TokenID LIMIT 1 OFFSET ?2)");
    sqlite3_stmt *row = NULL;
    enum err_code code =
        SQLITE_FIRST_ROW(tx->db, &row, err, sql, sql_text(company_id), sql_int((int64_t)nth));

    if (row != NULL)
        code = add_candidate(found, row, tx->now_ms, err);
    sqlite3_reset(row);
    return code;
}

/* How many tokens of the company are Active, of whatever provider; 0 where no index tells. */
static enum err_code count_active(struct sqlite_tx *tx, const char *company_id, uint64_t *count,
                                  struct err *err)
{
    static const char sql[] =
        "SELECT COUNT(*) FROM TokenMaster t WHERE " COMPANY_ASCII " AND t.Status = 'Active'";
    sqlite3_stmt *row = NULL;
    enum err_code code = ERR_NONE;

    *count = 0;
    if (choose_sql(company_id, sql, NULL) == NULL)
        return ERR_NONE;
    code = SQLITE_FIRST_ROW(tx->db, &row, err, sql, sql_text(company_id));
    if (row != NULL)
        *count = (uint64_t)sqlite3_column_int64(row, 0);
    sqlite3_reset(row);
    return code;
}

/* What is said of a company none of whose tokens is Active: its newest token decides. Without any
 * row *known stays false; rows of other providers give the spelling, but do not count. */
static enum err_code look_at_newest(struct sqlite_tx *tx, const char *company_id,
                                    char stored[STORE_TEXT_SIZE], bool *known, bool *expired,
                                    struct err *err)
{
#define NEWEST(company)                                                              \
    "SELECT t.CompanyID, " SQLITE_PROVIDER_SERVED " AS Served, t.Status = 'Expired'" \
    " FROM TokenMaster t WHERE " company                                             \
    " ORDER BY Served DESC, julianday(t.CreatedAt) DESC, t.TokenID DESC LIMIT 1"
    static const char ascii[] = NEWEST(COMPANY_ASCII);
    static const char unicode[] = NEWEST(COMPANY_UNICODE);
    sqlite3_stmt *row = NULL;
    enum err_code code = SQLITE_FIRST_ROW(tx->db, &row, err, choose_sql(company_id, ascii, unicode),
                                          sql_text(company_id));

    *known = false;
    *expired = false;
    if (row != NULL) {
        const char *spelling = (const char *)sqlite3_column_text(row, 0);
        if (store_text_fits(spelling, 1, STORE_TEXT_SIZE - 1))
            memcpy(stored, spelling, strlen(spelling) + 1);
        *known = sqlite3_column_int(row, 1) != 0;
        *expired = sqlite3_column_int(row, 2) != 0;
    }
    sqlite3_reset(row);
    return code;
}

/* ---- deciding ---- */

static enum fitness classify(const struct candidate *c, const struct store_acquire *a)
{
    bool tried = false;

    for (size_t i = 0; i < a->excluded_count; i++) {
        if (a->excluded[i].token_id == c->token_id) {
            if (a->excluded[i].at_fault)
                return FIT_NEVER;
            tried = true;
        }
    }
    if (!c->has_key || (c->limited && c->used >= c->limit))
        return FIT_NEVER;
    if (c->cooling_ms > 0)
        return FIT_COOLING;
    if (c->limited && c->reserved > 0 && a->estimate_tokens > c->limit - c->used - c->reserved)
        return FIT_BUSY;
    return tried ? FIT_COOLING : FIT_USABLE;
}

/* The token to use, or NULL, with a->grant and what belongs to it saying why. Some are Active. */
static const struct candidate *decide(const struct candidates *found, struct store_acquire *a)
{
    size_t counts[FIT_NEVER + 1] = {0};
    int64_t first_ms = INT64_MAX;

    for (size_t i = 0; i < found->count; i++) {
        const struct candidate *c = &found->all[i];
        enum fitness fitness = classify(c, a);
        counts[fitness]++;
        if (fitness == FIT_COOLING) {
            int64_t wait_ms = c->cooling_ms > 0 ? c->cooling_ms : 0;
            first_ms = wait_ms < first_ms ? wait_ms : first_ms;
        }
    }
    if (counts[FIT_USABLE] > 0) {
        size_t nth = (size_t)(a->choice % counts[FIT_USABLE]);
        for (size_t i = 0;; i++)
            if (classify(&found->all[i], a) == FIT_USABLE && nth-- == 0)
                return &found->all[i];
    }
    if (counts[FIT_COOLING] > 0) {
        a->grant = GRANT_COOLING;
        a->first_usable_ms = first_ms;
        a->busy_too = counts[FIT_BUSY] > 0;
    } else {
        a->grant = counts[FIT_BUSY] > 0 ? GRANT_BUSY : GRANT_UNAVAILABLE;
    }
    return NULL;
}

/* Of a company with many tokens not all are looked at where one of those that chance names first can
 * serve: reading a thousand would take longer than all the rest. Each that is usable is as likely as
 * another either way. *chosen: NULL where all must be looked at. */
static enum err_code try_some(struct sqlite_tx *tx, const struct store_acquire *a,
                              struct candidates *found, const struct candidate **chosen,
                              struct err *err)
{
    uint64_t active = 0;
    enum err_code code = count_active(tx, a->company_id, &active, err);

    *chosen = NULL;
    for (uint64_t i = 0; i < TRIES && active > MANY && code == ERR_NONE && *chosen == NULL; i++) {
        found->count = 0;
        code = find_nth(tx, a->company_id, (a->choice + i * (active / TRIES)) % active, found, err);
        if (code == ERR_NONE && found->count == 1 && classify(&found->all[0], a) == FIT_USABLE)
            *chosen = &found->all[0];
    }
    if (*chosen == NULL)
        found->count = 0;
    return code;
}

/* ---- idempotency keys ---- */

/* Has another request of the company come with this key? company: as its newest token spells it. */
static enum err_code find_first(struct sqlite_tx *tx, struct store_acquire *a, const char *company,
                                struct err *err)
{
#define FIRST(company)                                                     \
    "SELECT RequestID, State = 'done' FROM IdempotencyKeys WHERE " company \
    " AND IdempotencyKey = ?2 AND RequestID <> ?3 AND ExpiresAt > ?4"
    static const char ascii[] = FIRST("CompanyID = ?1");
    static const char unicode[] = FIRST("extract_fold(CompanyID) = extract_fold(?1)");
    sqlite3_stmt *row = NULL;
    enum err_code code =
        SQLITE_FIRST_ROW(tx->db, &row, err, choose_sql(company, ascii, unicode), sql_text(company),
                         sql_text(a->idempotency_key), sql_text(a->request_id), sql_text(tx->now));

    if (row != NULL) {
        snprintf(a->first_request_id, sizeof a->first_request_id, "%s",
                 (const char *)sqlite3_column_text(row, 0));
        a->first_is_done = sqlite3_column_int(row, 1) != 0;
        a->grant = GRANT_DUPLICATE;
    }
    sqlite3_reset(row);
    return code;
}

/* The key is this request's from now on; what fallback_only brings later than another changes
 * nothing. */
static enum err_code take_key(struct sqlite_tx *tx, const struct store_acquire *a,
                              const char *company, struct err *err)
{
    static const char sql[] =
        "INSERT INTO IdempotencyKeys (CompanyID, IdempotencyKey, RequestID, CreatedAt, ExpiresAt)"
        " VALUES (?1, ?2, ?3, ?4, ?5)"
        " ON CONFLICT (CompanyID, IdempotencyKey) DO UPDATE"
        " SET RequestID = ?3, State = 'in_progress', CreatedAt = ?4, ExpiresAt = ?5"
        " WHERE ExpiresAt <= ?4";
    char expires[CLOCK_TEXT_SIZE];

    clock_format(tx->now_ms + STORE_IDEMPOTENCY_MS, expires);
    return SQLITE_RUN(tx->db, NULL, err, sql, sql_text(company), sql_text(a->idempotency_key),
                      sql_text(a->request_id), sql_text(tx->now), sql_text(expires));
}

/* ---- reserving ---- */

static enum err_code reserve(struct sqlite_tx *tx, struct store_acquire *a, int64_t token_id,
                             struct err *err)
{
    const struct sqlite_reservation reservation = {
        .request_id = a->request_id,
        .sequence = a->sequence,
        .token_id = token_id,
        .company_id = a->company_id_stored,
        .branch = a->branch,
        .requested_by = a->requested_by,
        .estimate_tokens = a->estimate_tokens,
        .expires_ms = a->expires_ms,
        .state = "open",
    };

    a->grant = GRANT_TOKEN;
    a->token_id = token_id;
    return sqlite_insert_reservation(tx, &reservation, err);
}

/* Reads what a granted token needs to be used: the spelling of its company, and the key. */
static enum err_code copy_token(struct store_acquire *a, sqlite3_stmt *row, int company, int key,
                                struct err *err)
{
    const char *company_id = (const char *)sqlite3_column_text(row, company);
    size_t key_len = 0;
    const char *api_key = find_key(row, key, &key_len);

    if (!store_text_fits(company_id, 1, STORE_TEXT_SIZE - 1) || api_key == NULL)
        return err_set(err, ERR_BAD_VALUE, "token %lld has no usable CompanyID or ApiKey",
                       (long long)sqlite3_column_int64(row, 0));
    memcpy(a->company_id_stored, company_id, strlen(company_id) + 1);
    memcpy(a->api_key, api_key, key_len);
    a->api_key[key_len] = '\0';
    return ERR_NONE;
}

static enum err_code reserve_token(struct sqlite_tx *tx, struct store_acquire *a,
                                   const struct candidate *chosen, struct err *err)
{
    static const char sql_token[] =
        "SELECT TokenID, CompanyID, ApiKey FROM TokenMaster WHERE TokenID = ?1";
    static const char sql_sum[] = "UPDATE TokenUsageSummary"
                                  " SET ReservedTokens = ReservedTokens + ?2 WHERE TokenID = ?1";
    sqlite3_stmt *row = NULL;
    enum err_code code = SQLITE_FIRST_ROW(tx->db, &row, err, sql_token, sql_int(chosen->token_id));

    if (row != NULL)
        code = copy_token(a, row, 1, 2, err);
    sqlite3_reset(row);
    if (code == ERR_NONE && !chosen->has_summary)
        code = sqlite_ensure_summary(tx, chosen->token_id, err);
    if (code == ERR_NONE)
        code = SQLITE_RUN(tx->db, NULL, err, sql_sum, sql_int(chosen->token_id),
                          sql_int(a->estimate_tokens));
    return code == ERR_NONE ? reserve(tx, a, chosen->token_id, err) : code;
}

/* The same acquire came before: the same answer. *granted: whether that was so. */
static enum err_code grant_again(struct sqlite_tx *tx, struct store_acquire *a, bool *granted,
                                 struct err *err)
{
    static const char sql[] = "SELECT r.TokenID, r.CompanyID, t.ApiKey"
                              " FROM TokenReservations r"
                              " LEFT JOIN TokenMaster t ON t.TokenID = r.TokenID"
                              " WHERE r.RequestID = ?1 AND r.Sequence = ?2";
    sqlite3_stmt *row = NULL;
    enum err_code code =
        SQLITE_FIRST_ROW(tx->db, &row, err, sql, sql_text(a->request_id), sql_int(a->sequence));

    *granted = row != NULL;
    if (row == NULL)
        return code;
    a->grant = GRANT_TOKEN;
    a->token_id = sqlite3_column_int64(row, 0);
    if (a->token_id != 0) {
        code = copy_token(a, row, 1, 2, err);
    } else {
        const char *company_id = (const char *)sqlite3_column_text(row, 1);
        if (store_text_fits(company_id, 1, STORE_TEXT_SIZE - 1))
            memcpy(a->company_id_stored, company_id, strlen(company_id) + 1);
    }
    sqlite3_reset(row);
    return code;
}

/* Closes the reservation of the token that this request gave up without having spent anything: the
 * last one only; an earlier one that is still open waits for a settlement. */
static enum err_code release_previous(struct sqlite_tx *tx, const struct store_acquire *a,
                                      struct err *err)
{
    static const char sql_find[] = "SELECT ReservationID, EstimatedTokens FROM TokenReservations"
                                   " WHERE RequestID = ?1 AND TokenID = ?2 AND State = 'open'"
                                   " ORDER BY Sequence DESC LIMIT 1";
    static const char sql_close[] = "UPDATE TokenReservations"
                                    " SET State = 'released', ClosedAt = ?2"
                                    " WHERE ReservationID = ?1";
    sqlite3_stmt *row = NULL;
    enum err_code code = SQLITE_FIRST_ROW(tx->db, &row, err, sql_find, sql_text(a->request_id),
                                          sql_int(a->previous_token_id));

    if (row == NULL)
        return code;
    int64_t reservation_id = sqlite3_column_int64(row, 0);
    int64_t tokens = sqlite3_column_int64(row, 1);
    sqlite3_reset(row);
    code = SQLITE_RUN(tx->db, NULL, err, sql_close, sql_int(reservation_id), sql_text(tx->now));
    return code == ERR_NONE ? sqlite_unreserve(tx, a->previous_token_id, tokens, err) : code;
}

/* ---- the whole ---- */

static enum err_code choose_and_reserve(struct sqlite_tx *tx, struct store_acquire *a,
                                        struct err *err)
{
    struct candidates found = {0};
    const struct candidate *chosen = NULL;
    bool known = false;
    bool expired = false;
    enum err_code code = ERR_NONE;

    if (!a->fallback_only)
        code = try_some(tx, a, &found, &chosen, err);
    if (code == ERR_NONE && !a->fallback_only && chosen == NULL)
        code = find_candidates(tx, a->company_id, &found, err);
    if (code == ERR_NONE && chosen == NULL && found.count > 0)
        chosen = decide(&found, a);
    if (code == ERR_NONE && chosen != NULL)
        code = reserve_token(tx, a, chosen, err);
    if (code != ERR_NONE || chosen != NULL)
        goto out;
    code = look_at_newest(tx, a->company_id, a->company_id_stored, &known, &expired, err);
    if (code != ERR_NONE || found.count > 0)
        goto out;
    if (a->fallback_only || (a->fallback_if_none && known))
        code = reserve(tx, a, 0, err);
    else
        a->grant = !known ? GRANT_NO_TOKEN : expired ? GRANT_EXPIRED : GRANT_UNAVAILABLE;
out:
    free(found.all);
    return code;
}

/* The same for a request with an idempotency key, which it takes with its first token. */
static enum err_code choose_once(struct sqlite_tx *tx, struct store_acquire *a, struct err *err)
{
    char company[STORE_TEXT_SIZE];
    bool known, expired;

    snprintf(company, sizeof company, "%s", a->company_id);
    enum err_code code = look_at_newest(tx, a->company_id, company, &known, &expired, err);
    if (code == ERR_NONE && !a->fallback_only)
        code = find_first(tx, a, company, err);
    if (code != ERR_NONE || a->grant == GRANT_DUPLICATE)
        return code;
    code = choose_and_reserve(tx, a, err);
    return code == ERR_NONE && a->grant == GRANT_TOKEN ? take_key(tx, a, company, err) : code;
}

static enum err_code acquire_one(struct sqlite_tx *tx, struct store_acquire *a, struct err *err)
{
    bool granted = false;
    enum err_code code = ERR_NONE;

    memcpy(a->company_id_stored, a->company_id, strlen(a->company_id) + 1);
    code = grant_again(tx, a, &granted, err);
    if (code != ERR_NONE || granted)
        return code;
    if (a->previous_token_id != 0) {
        code = sqlite_apply_fault(tx, a->previous_token_id, &a->previous, a->request_id,
                                  &a->disabling_stopped, err);
        if (code == ERR_NONE && !a->previous_spent)
            code = release_previous(tx, a, err);
    }
    if (code != ERR_NONE)
        return code;
    return a->idempotency_key == NULL ? choose_and_reserve(tx, a, err) : choose_once(tx, a, err);
}

static enum err_code acquire_item(struct sqlite_tx *tx, const void *items, size_t i,
                                  struct err *err)
{
    struct store_acquire *a = ((struct store_acquire *const *)items)[i];

    store_clear_acquire(a);
    if (a->code == ERR_NONE)
        a->code = acquire_one(tx, a, &a->err);
    if (a->code != ERR_NONE)
        store_clear_acquire(a);
    *err = a->err;
    return a->code;
}

enum err_code sqlite_acquire(void *self, struct store_acquire *const *items, size_t count,
                             struct err *err)
{
    enum err_code code = ERR_NONE;

    if (store_admit_acquires(items, count) > 0)
        code = sqlite_run_batch(self, acquire_item, items, count, err);
    if (code != ERR_NONE)
        store_fail_acquires(items, count, err);
    for (size_t i = 0; code != ERR_NONE && i < count; i++)
        items[i]->maybe_reserved = sqlite_in_doubt(self);
    return code;
}
