/* store_sqlite_acquire.c - choosing and reserving a token. See store_sqlite.h and struct
 * store_acquire in store.h.
 *
 * SQL finds the company's Active tokens with what they used and reserve; classify() then sorts them
 * and is the only place that knows why one cannot serve; decide() draws the conclusion. Since the
 * whole runs in one write transaction, nothing changes between looking and reserving.
 *
 * Of a company with many tokens only a few are looked at (store_sqlite_many.c): chance names them, each
 * as likely as another, and the first that can serve is taken. */
#include "store_sqlite.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MANY 4 /* tokens of a company; reading more takes longer than remembering them */
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

/* What a granted token needs to be used. */
struct credentials {
    char company_id[STORE_TEXT_SIZE]; /* as the token spells it */
    char api_key[STORE_API_KEY_SIZE];
};

struct candidates {
    struct candidate *all; /* in TokenID order */
    size_t count;
    size_t room;
    struct credentials last; /* of the last one; the keys of the others are not kept */
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

/* False: they can't be used. */
static bool copy_credentials(struct credentials *c, sqlite3_stmt *row, int company, int key)
{
    const char *company_id = (const char *)sqlite3_column_text(row, company);
    size_t key_len = 0;
    const char *api_key = find_key(row, key, &key_len);

    if (!store_text_fits(company_id, 1, STORE_TEXT_SIZE - 1) || api_key == NULL)
        return false;
    memcpy(c->company_id, company_id, strlen(company_id) + 1);
    memcpy(c->api_key, api_key, key_len);
    c->api_key[key_len] = '\0';
    return true;
}

/* ---- looking ---- */

static enum err_code add_candidate(struct candidates *found, sqlite3_stmt *row, int64_t now_ms,
                                   struct err *err)
{
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
        .has_key = copy_credentials(&found->last, row, 6, 7),
    };
    return ERR_NONE;
}

/* The company's Active tokens, by a statement of CANDIDATES. */
static enum err_code read_candidates(struct sqlite_tx *tx, struct candidates *found,
                                     struct err *err, const char *sql,
                                     const struct store_value *values, size_t count)
{
    sqlite3_stmt *row = NULL;
    int result = SQLITE_ROW;
    enum err_code code = sqlite_first_row(tx->db, &row, err, sql, values, count);

    found->count = 0;
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

#define CANDIDATES(which, order)                                                        \
    "SELECT t.TokenID, t.TotalTokenLimit, s.TokenID IS NOT NULL,"                       \
    " IFNULL(s.TotalUsedTokens, " SQLITE_USED_BY_ROWS "), IFNULL(s.ReservedTokens, 0)," \
    " CAST(ROUND((julianday(t.CooldownUntil) - 2440587.5) * 86400000.0) AS INTEGER),"   \
    " t.CompanyID, t.ApiKey"                                                            \
    " FROM TokenMaster t LEFT JOIN TokenUsageSummary s ON s.TokenID = t.TokenID"        \
    " WHERE " which " AND t.Status = 'Active' AND " SQLITE_PROVIDER_SERVED order

/* All of them. */
static enum err_code find_candidates(struct sqlite_tx *tx, const char *company_id,
                                     struct candidates *found, struct err *err)
{
    static const char ascii[] = CANDIDATES(COMPANY_ASCII, " ORDER BY t.TokenID");
    static const char unicode[] = CANDIDATES(COMPANY_UNICODE, " ORDER BY t.TokenID");

    return read_candidates(tx, found, err, choose_sql(company_id, ascii, unicode),
                           SQLITE_PARAMS(sql_text(company_id)));
}

/* The one with this TokenID, where it is one. (+: by its row, not by the index of companies.) */
static enum err_code find_one(struct sqlite_tx *tx, const char *company_id, int64_t token_id,
                              struct candidates *found, struct err *err)
{
    static const char ascii[] = CANDIDATES("t.TokenID = ?2 AND +" COMPANY_ASCII, "");
    static const char unicode[] = CANDIDATES("t.TokenID = ?2 AND " COMPANY_UNICODE, "");

    return read_candidates(tx, found, err, choose_sql(company_id, ascii, unicode),
                           SQLITE_PARAMS(sql_text(company_id), sql_int(token_id)));
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

/* Which of many could serve somebody, for a while. */
static void keep_usable(struct sqlite_tx *tx, const char *company_id,
                        const struct candidates *found)
{
    static const struct store_acquire somebody = {0};
    struct sqlite_usable *usable = sqlite_keep_usable(tx->db, company_id, found->count);

    for (size_t i = 0; usable != NULL && i < found->count; i++)
        if (classify(&found->all[i], &somebody) == FIT_USABLE)
            usable->token_ids[usable->count++] = found->all[i].token_id;
}

/* Looks at a few of many. *chosen: NULL where all must be looked at. */
static enum err_code try_some(struct sqlite_tx *tx, const struct store_acquire *a,
                              struct candidates *found, const struct candidate **chosen,
                              struct err *err)
{
    const struct sqlite_usable *usable = sqlite_recall_usable(tx->db, a->company_id);
    const uint64_t count = usable == NULL ? 0 : usable->count;
    enum err_code code = ERR_NONE;
    uint64_t choice = a->choice;

    *chosen = NULL;
    for (int i = 0; i < TRIES && count > 0 && code == ERR_NONE && *chosen == NULL; i++) {
        code = find_one(tx, a->company_id, usable->token_ids[choice % count], found, err);
        if (code == ERR_NONE && found->count == 1 && classify(&found->all[0], a) == FIT_USABLE)
            *chosen = &found->all[0];
        choice = choice * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        choice ^= choice >> 32; /* another random number; the upper half is the random one */
    }
    return code;
}

/* Looks at all. *chosen: NULL where none can serve, with a->grant saying why if some are Active. */
static enum err_code try_all(struct sqlite_tx *tx, struct store_acquire *a,
                             struct candidates *found, const struct candidate **chosen,
                             struct err *err)
{
    enum err_code code = find_candidates(tx, a->company_id, found, err);

    *chosen = NULL;
    if (code != ERR_NONE || found->count == 0)
        return code;
    if (found->count > MANY)
        keep_usable(tx, a->company_id, found);
    *chosen = decide(found, a);
    if (*chosen == NULL || *chosen == &found->all[found->count - 1])
        return ERR_NONE;
    code = find_one(tx, a->company_id, (*chosen)->token_id, found, err); /* for its key */
    *chosen = &found->all[0];
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

static void use_credentials(struct store_acquire *a, const struct credentials *c)
{
    memcpy(a->company_id_stored, c->company_id, strlen(c->company_id) + 1);
    memcpy(a->api_key, c->api_key, strlen(c->api_key) + 1);
}

static enum err_code reserve_token(struct sqlite_tx *tx, struct store_acquire *a,
                                   const struct candidate *chosen, struct err *err)
{
    static const char sql[] = "UPDATE TokenUsageSummary"
                              " SET ReservedTokens = ReservedTokens + ?2 WHERE TokenID = ?1";
    enum err_code code = ERR_NONE;

    if (!chosen->has_summary)
        code = sqlite_ensure_summary(tx, chosen->token_id, err);
    if (code == ERR_NONE)
        code = SQLITE_RUN(tx->db, NULL, err, sql, sql_int(chosen->token_id),
                          sql_int(a->estimate_tokens));
    return code == ERR_NONE ? reserve(tx, a, chosen->token_id, err) : code;
}

/* What a token that was granted before needs to be used. */
static enum err_code copy_token(struct store_acquire *a, sqlite3_stmt *row, struct err *err)
{
    struct credentials credentials;

    if (!copy_credentials(&credentials, row, 1, 2))
        return err_set(err, ERR_BAD_VALUE, "token %lld has no usable CompanyID or ApiKey",
                       (long long)a->token_id);
    use_credentials(a, &credentials);
    explicit_bzero(&credentials, sizeof credentials);
    return ERR_NONE;
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
        code = copy_token(a, row, err);
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
        code = try_all(tx, a, &found, &chosen, err);
    if (code == ERR_NONE && chosen != NULL) {
        use_credentials(a, &found.last);
        code = reserve_token(tx, a, chosen, err);
    }
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
    explicit_bzero(&found.last, sizeof found.last);
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
