/* grace.c - client keys that outlive an outage of the store. See grace.h.
 *
 * Times are wall time, since the file outlives the host's uptime; one that lies in the future (the
 * clock was set back) does not count. */
#include "grace.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "log.h"
#include "state_db.h"

#define BUSY_MS 1000

struct grace {
    pthread_mutex_t lock; /* one connection */
    struct state_db file; /* without a database: none is kept */
    int64_t grace_ms;
    bool complained;
};

/* What is lost here in a power cut is learned again from the store. */
static const char setup[] =
    "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;"
    "CREATE TABLE IF NOT EXISTS ConfirmedKeys ("
    " KeyHash TEXT PRIMARY KEY, ClientKeyID TEXT NOT NULL, CompanyID TEXT NOT NULL,"
    " IsAdmin INTEGER NOT NULL, ConfirmedAt INTEGER NOT NULL) WITHOUT ROWID;";

struct grace *grace_open(const char *state_dir, int64_t grace_ms, struct err *err)
{
    struct grace *grace = calloc(1, sizeof *grace);

    if (grace == NULL) {
        err_set(err, ERR_INTERNAL, "out of memory");
        return NULL;
    }
    pthread_mutex_init(&grace->lock, NULL);
    grace->grace_ms = grace_ms;
    grace->file.directory = -1;
    if (grace_ms > 0 &&
        state_db_open(&grace->file, state_dir, "clients.db", setup, BUSY_MS, err) != ERR_NONE) {
        grace_close(grace);
        return NULL;
    }
    return grace;
}

void grace_close(struct grace *grace)
{
    if (grace == NULL)
        return;
    state_db_close(&grace->file);
    pthread_mutex_destroy(&grace->lock);
    free(grace);
}

/* ---- statements: under the lock ---- */

/* Binding and stepping NULL, and what is bound beyond a statement's parameters, do nothing. */
static sqlite3_stmt *prepare(struct grace *grace, const char *sql, const char *hash)
{
    sqlite3_stmt *statement = NULL;

    sqlite3_prepare_v2(grace->file.db, sql, -1, &statement, NULL);
    sqlite3_bind_text(statement, 1, hash, -1, SQLITE_STATIC);
    sqlite3_bind_int64(statement, 2, clock_wall_ms());
    sqlite3_bind_int64(statement, 3, grace->grace_ms);
    return statement;
}

static void finish(struct grace *grace, sqlite3_stmt *take_statement)
{
    if (sqlite3_step(take_statement) == SQLITE_DONE)
        grace->complained = false;
    else if (!grace->complained) {
        grace->complained = true;
        log_warning(NULL, sqlite3_errmsg(grace->file.db),
                    "client keys that the store has confirmed cannot be kept for its next outage");
    }
    sqlite3_finalize(take_statement);
}

void grace_remember(struct grace *grace, const char *hash, const struct store_client_key *key)
{
    static const char sql_old[] = "DELETE FROM ConfirmedKeys"
                                  " WHERE ConfirmedAt NOT BETWEEN ?2 - ?3 AND ?2";
    static const char sql[] =
        "INSERT INTO ConfirmedKeys"
        " (KeyHash, ConfirmedAt, ClientKeyID, CompanyID, IsAdmin)"
        " VALUES (?1, ?2, ?4, ?5, ?6)"
        " ON CONFLICT (KeyHash) DO UPDATE"
        " SET ConfirmedAt = ?2, ClientKeyID = ?4, CompanyID = ?5, IsAdmin = ?6";

    if (grace->file.db == NULL)
        return;
    pthread_mutex_lock(&grace->lock);
    finish(grace, prepare(grace, sql_old, hash));
    sqlite3_stmt *statement = prepare(grace, sql, hash);
    sqlite3_bind_text(statement, 4, key->id, -1, SQLITE_STATIC);
    sqlite3_bind_text(statement, 5, key->company_id, -1, SQLITE_STATIC);
    sqlite3_bind_int(statement, 6, key->is_admin);
    finish(grace, statement);
    pthread_mutex_unlock(&grace->lock);
}

void grace_forget(struct grace *grace, const char *hash)
{
    if (grace->file.db == NULL)
        return;
    pthread_mutex_lock(&grace->lock);
    finish(grace, prepare(grace, "DELETE FROM ConfirmedKeys WHERE KeyHash = ?1", hash));
    pthread_mutex_unlock(&grace->lock);
}

bool grace_find(struct grace *grace, const char *hash, struct store_client_key *key)
{
    static const char sql[] = "SELECT ClientKeyID, CompanyID, IsAdmin FROM ConfirmedKeys"
                              " WHERE KeyHash = ?1 AND ConfirmedAt BETWEEN ?2 - ?3 AND ?2";

    if (grace->file.db == NULL)
        return false;
    pthread_mutex_lock(&grace->lock);
    sqlite3_stmt *row = prepare(grace, sql, hash);
    bool found = sqlite3_step(row) == SQLITE_ROW;
    if (found) {
        snprintf(key->id, sizeof key->id, "%s", (const char *)sqlite3_column_text(row, 0));
        snprintf(key->company_id, sizeof key->company_id, "%s",
                 (const char *)sqlite3_column_text(row, 1));
        key->is_admin = sqlite3_column_int(row, 2) != 0;
    }
    sqlite3_finalize(row);
    pthread_mutex_unlock(&grace->lock);
    return found;
}
