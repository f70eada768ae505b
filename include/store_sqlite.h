/* store_sqlite.h - the inside of the embedded store, for its own files (store_sqlite*.c) only.
 *
 *   store_sqlite.c          open, schema, log entries; the driver's table of functions
 *   store_sqlite_file.c     the files; following when somebody replaces the database
 *   store_sqlite_db.c       connections, statements, errors, the writers' queue, transactions
 *   store_sqlite_rows.c     rows that several operations write
 *   store_sqlite_acquire.c  choosing and reserving a token
 *   store_sqlite_many.c     where to look among the many tokens of a company
 *   store_sqlite_fault.c    what a failed call does to a token
 *   store_sqlite_settle.c   usage rows and sums; reservations whose process died
 *   store_sqlite_admin.c    token administration
 *   store_sqlite_client.c   client keys
 *   store_sqlite_query.c    views for people
 *
 * Every function that can fail returns the code that it also puts into err (never NULL here). */
#ifndef EXTRACT_STORE_SQLITE_H
#define EXTRACT_STORE_SQLITE_H

#include <pthread.h>
#include <sqlite3.h>
#include <stdatomic.h>
#include <sys/types.h>

#include "store_check.h"

#define SQLITE_READERS 2
#define SQLITE_CACHE_SIZE 64 /* more than the service has statements; one more ends the oldest */

/* The actor of AuditLog rows that the service writes on its own. */
#define SQLITE_ACTOR "extract-fcgi"
/* SQL that is true for tokens that this service can use. */
#define SQLITE_PROVIDER_SERVED                                                       \
    "(t.Provider IS NULL OR t.Provider = '' OR t.Provider = 'Google' COLLATE NOCASE" \
    " OR t.Provider = 'Gemini' COLLATE NOCASE)"

/* SQL: what the rows say that token t has used. */
#define SQLITE_USED_BY_ROWS                                                 \
    "((SELECT IFNULL(SUM(u.TotalTokensUsed), 0) FROM TokenUsageLogs u"      \
    "  WHERE u.TokenID = t.TokenID)"                                        \
    " + (SELECT IFNULL(SUM(m.TotalTokensUsed), 0) FROM TokenUsageMonthly m" \
    "    WHERE IFNULL(m.TokenID, 0) = t.TokenID))"

/* Which file it is, whatever its name. All 0: none. */
struct sqlite_file {
    dev_t device;
    ino_t inode;
};

/* Those of a company's tokens that could serve a moment ago. */
struct sqlite_usable {
    int64_t until_ms; /* monotonic; known so long */
    char company_id[STORE_TEXT_SIZE];
    size_t count;
    int64_t token_ids[];
};

#define SQLITE_USABLE_PLACES 256

/* A connection with its prepared statements. Used by one thread at a time. */
struct sqlite_db {
    sqlite3 *handle; /* NULL: not connected */
    struct sqlite_file file;
    struct {
        const char *sql; /* compared by address: statements are constants */
        sqlite3_stmt *statement;
    } cache[SQLITE_CACHE_SIZE];
    size_t cached;
    size_t oldest; /* where the next one goes, once all places are taken */
    struct sqlite_usable *usable[SQLITE_USABLE_PLACES]; /* of companies with many tokens */
};

struct sqlite_reader {
    pthread_mutex_t mutex;
    struct sqlite_db db;
    int64_t deadline_ms; /* monotonic; a query that passes it is interrupted */
};

struct store_sqlite {
    int64_t timeout_ms;
    _Atomic int version; /* of the schema */
    char *path;
    int lock_fd;                  /* the writers of this host queue on its flock */
    _Atomic int64_t written_ms;   /* monotonic; the last commit; 0: none */
    pthread_mutex_t writer_mutex; /* before those of readers */
    pthread_rwlock_t log_lock;    /* after writer_mutex: log_fd stays open while it is held */
    int log_fd;                   /* the writers' log, to bring it to the disk */
    atomic_bool log_in_doubt;     /* the disk has refused that once */
    struct sqlite_db writer;
    struct sqlite_reader readers[SQLITE_READERS];
};

/* A write transaction under way. now: its time, in every row that it writes. */
struct sqlite_tx {
    struct sqlite_db *db;
    int64_t now_ms;
    char now[CLOCK_TEXT_SIZE];
};

/* ---- store_sqlite_file.c ---- */

/* Creates the file, for its owner only, where it is missing. */
enum err_code sqlite_create_file(const char *path, struct err *err) MUST_CHECK;
/* Is the directory that is to hold the file there? Else ERR_STORE_UNAVAILABLE, naming it. */
enum err_code sqlite_check_directory(const char *path, struct err *err) MUST_CHECK;
/* Which file has that name now? None: ERR_STORE_UNAVAILABLE. */
enum err_code sqlite_file_at(const char *path, struct sqlite_file *file,
                             struct err *err) MUST_CHECK;
bool sqlite_same_file(struct sqlite_file a, struct sqlite_file b);
/* Opens all connections, to that file. The caller has the host's lock, and leaves also after an error. */
enum err_code sqlite_come_to(struct store_sqlite *store, struct sqlite_file file, bool may_set_up,
                             int64_t deadline_ms, struct err *err) MUST_CHECK;
/* Closes them, whatever has become of the file; takes the host's lock. No other thread uses the store. */
void sqlite_leave(struct store_sqlite *store);
/* Opens the connections anew where another file has the database's name now. The caller has the
 * writers' mutex and the host's lock. ERR_STORE_UNAVAILABLE: there is no file, or no store in it. */
enum err_code sqlite_follow(struct store_sqlite *store, int64_t deadline_ms,
                            struct err *err) MUST_CHECK;

/* ---- store_sqlite.c ---- */

/* Has the writer's database a schema that this program works with? Sets one up where that may be, and
 * changes to a log (which is open afterwards). */
enum err_code sqlite_prepare_schema(struct store_sqlite *store, bool may_set_up,
                                    int64_t deadline_ms, struct err *err) MUST_CHECK;

/* ---- store_sqlite_db.c ---- */

/* Opens a connection to the file, as long as it has that path; the caller disconnects also after an
 * error. The SQL function extract_fold(text) folds case for comparison (text_fold). */
enum err_code sqlite_connect(struct sqlite_db *db, const char *path, struct sqlite_file file,
                             int64_t timeout_ms, struct err *err) MUST_CHECK;
void sqlite_disconnect(struct sqlite_db *db);

/* Maps SQLite's result code to ours, with a message that holds no data. */
enum err_code sqlite_failed(struct err *err, int result);
/* Runs SQL without parameters or results. */
enum err_code sqlite_exec(struct sqlite_db *db, const char *sql, struct err *err) MUST_CHECK;

/* Parameters of statements. A NULL text or an ID of 0 is NULL. */
static inline struct store_value sql_int(int64_t n)
{
    return (struct store_value){.type = STORE_INTEGER, .integer = n};
}
static inline struct store_value sql_real(double n)
{
    return (struct store_value){.type = STORE_REAL, .real = n};
}
static inline struct store_value sql_text(const char *s)
{
    return (struct store_value){.type = s == NULL ? STORE_NULL : STORE_TEXT, .text = s};
}
static inline struct store_value sql_id(int64_t id)
{
    return (struct store_value){.type = id == 0 ? STORE_NULL : STORE_INTEGER, .integer = id};
}

/* Runs a constant statement. *row becomes its first row (the caller ends with sqlite3_reset), or
 * NULL without one. Texts must live until then. */
enum err_code sqlite_first_row(struct sqlite_db *db, sqlite3_stmt **row, struct err *err,
                               const char *sql, const struct store_value *values,
                               size_t count) MUST_CHECK;
/* The same without rows. *changed (may be NULL): how many rows it changed. */
enum err_code sqlite_run(struct sqlite_db *db, int *changed, struct err *err, const char *sql,
                         const struct store_value *values, size_t count) MUST_CHECK;

#define SQLITE_PARAMS(...)                     \
    (const struct store_value[]){__VA_ARGS__}, \
        sizeof((const struct store_value[]){__VA_ARGS__}) / sizeof(struct store_value)
#define SQLITE_FIRST_ROW(db, row, err, sql, ...) \
    sqlite_first_row((db), (row), (err), (sql), SQLITE_PARAMS(__VA_ARGS__))
#define SQLITE_RUN(db, changed, err, sql, ...) \
    sqlite_run((db), (changed), (err), (sql), SQLITE_PARAMS(__VA_ARGS__))

/* Takes the mutex; returns ETIMEDOUT at deadline_ms (monotonic). */
int sqlite_lock_mutex(pthread_mutex_t *mutex, int64_t deadline_ms) MUST_CHECK;
/* Waits, at most until deadline_ms, for the turn among the host's writers. */
enum err_code sqlite_host_lock(struct store_sqlite *store, int64_t deadline_ms,
                               struct err *err) MUST_CHECK;
void sqlite_host_unlock(struct store_sqlite *store);

/* Begins a write transaction; after ERR_NONE the caller must end it. */
enum err_code sqlite_begin(struct store_sqlite *store, struct sqlite_tx *tx,
                           struct err *err) MUST_CHECK;
/* Commits when code is ERR_NONE, else rolls back. Returns code, or why the commit failed. */
enum err_code sqlite_end(struct store_sqlite *store, enum err_code code,
                         struct err *err) MUST_CHECK;
/* Begins a write transaction and rolls it back. */
/* Did the disk refuse what was committed? Then it is there, but may be lost. */
bool sqlite_in_doubt(struct store_sqlite *store);
enum err_code sqlite_try_write(struct store_sqlite *store, int64_t deadline_ms,
                               struct err *err) MUST_CHECK;
/* sqlite_follow for those who are not about to write, and have no reader. */
enum err_code sqlite_follow_now(struct store_sqlite *store, struct err *err) MUST_CHECK;

/* One item of a batch. Returns its code; err says why. Comes again for the same item, with nothing of
 * the first time in the database, where another one was refused. */
typedef enum err_code sqlite_do_item(struct sqlite_tx *tx, const void *items, size_t i,
                                     struct err *err);
/* A batch, in one transaction. What an item did that is refused (ERR_BAD_VALUE) is undone, and the
 * others go on; any other error undoes all, and is returned. */
enum err_code sqlite_run_batch(struct store_sqlite *store, sqlite_do_item *do_item,
                               const void *items, size_t count, struct err *err) MUST_CHECK;

/* ---- store_sqlite_rows.c ---- */

/* Makes the token's missing TokenUsageSummary row from what was used and reserved so far. */
enum err_code sqlite_ensure_summary(struct sqlite_tx *tx, int64_t token_id,
                                    struct err *err) MUST_CHECK;
/* Takes back what was reserved; nothing for token 0. */
enum err_code sqlite_unreserve(struct sqlite_tx *tx, int64_t token_id, int64_t tokens,
                               struct err *err) MUST_CHECK;

struct sqlite_reservation {
    const char *request_id;
    int64_t sequence;
    int64_t token_id; /* 0: the fallback key */
    const char *company_id;
    const char *branch;
    const char *requested_by;
    int64_t estimate_tokens;
    int64_t expires_ms;
    const char *state;
    int unknown_calls;
};

enum err_code sqlite_insert_reservation(struct sqlite_tx *tx, const struct sqlite_reservation *r,
                                        struct err *err) MUST_CHECK;

/* An AuditLog row about a token; its company is looked up. request_id and detail may be NULL. */
enum err_code sqlite_audit(struct sqlite_tx *tx, const char *actor, const char *action,
                           int64_t token_id, const char *request_id, const char *detail,
                           struct err *err) MUST_CHECK;

/* ---- store_sqlite_many.c ---- */

/* What is known of the company, spelled so; NULL: nothing. Valid until the next of these calls. */
const struct sqlite_usable *sqlite_recall_usable(struct sqlite_db *db, const char *company_id);
/* Room for so many, for the caller to fill; replaces what was known. NULL: no memory. */
struct sqlite_usable *sqlite_keep_usable(struct sqlite_db *db, const char *company_id, size_t room);
void sqlite_forget_usable(struct sqlite_db *db);

/* ---- store_sqlite_fault.c ---- */

/* Applies the fault to the token. Sets *disabling_stopped where the guard has just set in. */
enum err_code sqlite_apply_fault(struct sqlite_tx *tx, int64_t token_id,
                                 const struct store_token_fault *fault, const char *request_id,
                                 bool *disabling_stopped, struct err *err) MUST_CHECK;

/* ---- the driver's functions; see store_driver.h ---- */

enum err_code sqlite_acquire(void *self, struct store_acquire *const *items, size_t count,
                             struct err *err) MUST_CHECK;
enum err_code sqlite_settle(void *self, struct store_settlement *const *items, size_t count,
                            struct err *err) MUST_CHECK;
enum err_code sqlite_expire_reservations(void *self, int *expired, struct err *err) MUST_CHECK;
enum err_code sqlite_token_add(void *self, const char *actor, const struct store_new_token *token,
                               int64_t *token_id, struct err *err) MUST_CHECK;
enum err_code sqlite_token_reseal(void *self, const char *actor, const struct store_token_key *key,
                                  const char *sealed, struct err *err) MUST_CHECK;
enum err_code sqlite_token_keys(void *self, int64_t after_id, struct store_token_key *keys,
                                size_t max, size_t *count, struct err *err) MUST_CHECK;
enum err_code sqlite_token_set_status(void *self, const char *actor, int64_t token_id,
                                      const char *status, const char *reason,
                                      struct err *err) MUST_CHECK;
enum err_code sqlite_token_set_key(void *self, const char *actor, int64_t token_id,
                                   const char *api_key, struct err *err) MUST_CHECK;
enum err_code sqlite_token_set_limit(void *self, const char *actor, int64_t token_id, int64_t limit,
                                     double threshold, struct err *err) MUST_CHECK;
enum err_code sqlite_client_key_find(void *self, const char *hash, struct store_client_key *key,
                                     struct err *err) MUST_CHECK;
enum err_code sqlite_client_key_add(void *self, const char *actor,
                                    const struct store_new_client_key *key,
                                    struct err *err) MUST_CHECK;
enum err_code sqlite_client_key_revoke(void *self, const char *actor, const char *id,
                                       struct err *err) MUST_CHECK;
enum err_code sqlite_query(void *self, enum store_view view, const struct store_filter *filter,
                           store_row *row, void *context, struct err *err) MUST_CHECK;

/* ---- store_sqlite_query.c: reading ---- */

/* A reader for the calling thread, of the file that is there now; sqlite_reader_give returns it. */
enum err_code sqlite_reader_take(struct store_sqlite *store, struct sqlite_reader **reader,
                                 struct err *err) MUST_CHECK;
void sqlite_reader_give(struct sqlite_reader *reader);

#endif
