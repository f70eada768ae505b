/* store_sqlite_client.c - the client keys of the embedded store: only their hashes. See
 * store_sqlite.h. */
#include "store_sqlite.h"

#include <stdio.h>

#include "store_check.h"

/* ---- find ---- */

enum err_code sqlite_client_key_find(void *self, const char *hash, struct store_client_key *key,
                                     struct err *err)
{
    static const char sql[] = "SELECT ClientKeyID, IFNULL(CompanyID, ''), IsAdmin FROM ClientKeys"
                              " WHERE KeyHash = ?1 AND RevokedAt IS NULL";
    struct store_sqlite *store = self;
    struct sqlite_reader *reader = NULL;
    sqlite3_stmt *row = NULL;
    enum err_code code = sqlite_reader_take(store, &reader, err);

    if (code != ERR_NONE || reader == NULL)
        return code;
    code = SQLITE_FIRST_ROW(&reader->db, &row, err, sql, sql_text(hash));
    if (row != NULL) {
        snprintf(key->id, sizeof key->id, "%s", (const char *)sqlite3_column_text(row, 0));
        snprintf(key->company_id, sizeof key->company_id, "%s",
                 (const char *)sqlite3_column_text(row, 1));
        key->is_admin = sqlite3_column_int(row, 2) != 0;
    } else if (code == ERR_NONE) {
        code = err_set(err, ERR_NO_SUCH_ROW, "the client key is unknown or was revoked");
    }
    sqlite3_reset(row);
    sqlite_reader_give(reader);
    return code;
}

/* ---- changes ---- */

static enum err_code audit(struct sqlite_tx *tx, const char *actor, const char *action,
                           const char *id, const char *detail, struct err *err)
{
    static const char sql[] =
        "INSERT INTO AuditLog (Timestamp, Actor, Action, ObjectType, ObjectID, CompanyID, Detail)"
        " VALUES (?1, ?2, ?3, 'ClientKeys', ?4,"
        "         (SELECT CompanyID FROM ClientKeys WHERE ClientKeyID = ?4), ?5)";

    return SQLITE_RUN(tx->db, NULL, err, sql, sql_text(tx->now), sql_text(actor), sql_text(action),
                      sql_text(id), sql_text(detail));
}

static enum err_code add(struct sqlite_tx *tx, const char *actor,
                         const struct store_new_client_key *key, struct err *err)
{
    static const char sql_taken[] =
        "SELECT 1 FROM ClientKeys WHERE ClientKeyID = ?1 OR KeyHash = ?2";
    static const char sql_add[] =
        "INSERT INTO ClientKeys (ClientKeyID, KeyHash, CompanyID, IsAdmin, Label, CreatedAt)"
        " VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
    sqlite3_stmt *row = NULL;
    enum err_code code =
        SQLITE_FIRST_ROW(tx->db, &row, err, sql_taken, sql_text(key->id), sql_text(key->hash));
    bool taken = row != NULL;

    sqlite3_reset(row);
    if (code != ERR_NONE)
        return code;
    if (taken)
        return err_set(err, ERR_BAD_VALUE, "there is such a client key already");
    code = SQLITE_RUN(tx->db, NULL, err, sql_add, sql_text(key->id), sql_text(key->hash),
                      sql_text(key->company_id), sql_int(key->company_id == NULL),
                      sql_text(key->label), sql_text(tx->now));
    if (code != ERR_NONE)
        return code;
    return audit(tx, actor, "client key added", key->id, key->label, err);
}

enum err_code sqlite_client_key_add(void *self, const char *actor,
                                    const struct store_new_client_key *key, struct err *err)
{
    struct store_sqlite *store = self;
    struct sqlite_tx tx;

    if (store_check_new_client_key(actor, key, err) != ERR_NONE ||
        sqlite_begin(store, &tx, err) != ERR_NONE)
        return err->code;
    return sqlite_end(store, add(&tx, actor, key, err), err);
}

static enum err_code revoke(struct sqlite_tx *tx, const char *actor, const char *id,
                            struct err *err)
{
    static const char sql_found[] = "SELECT 1 FROM ClientKeys WHERE ClientKeyID = ?1";
    static const char sql_revoke[] = "UPDATE ClientKeys SET RevokedAt = ?2"
                                     " WHERE ClientKeyID = ?1 AND RevokedAt IS NULL";
    sqlite3_stmt *row = NULL;
    int changed = 0;
    enum err_code code = SQLITE_FIRST_ROW(tx->db, &row, err, sql_found, sql_text(id));
    bool found = row != NULL;

    sqlite3_reset(row);
    if (code == ERR_NONE && !found)
        return err_set(err, ERR_NO_SUCH_ROW, "there is no client key %s", id);
    if (code == ERR_NONE)
        code = SQLITE_RUN(tx->db, &changed, err, sql_revoke, sql_text(id), sql_text(tx->now));
    if (code != ERR_NONE || changed == 0)
        return code;
    return audit(tx, actor, "client key revoked", id, NULL, err);
}

enum err_code sqlite_client_key_revoke(void *self, const char *actor, const char *id,
                                       struct err *err)
{
    struct store_sqlite *store = self;
    struct sqlite_tx tx;

    if (store_check_client_key_id(actor, id, err) != ERR_NONE ||
        sqlite_begin(store, &tx, err) != ERR_NONE)
        return err->code;
    return sqlite_end(store, revoke(&tx, actor, id, err), err);
}
