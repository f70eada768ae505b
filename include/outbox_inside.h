/* outbox_inside.h - what outbox.c and outbox_replay.c share; nobody else includes this. */
#ifndef EXTRACT_OUTBOX_INSIDE_H
#define EXTRACT_OUTBOX_INSIDE_H

#include <pthread.h>
#include <sqlite3.h>

#include "outbox.h"
#include "state_db.h"

#define KIND_SETTLEMENT "settlement"
#define KIND_RESERVATION "reservation"
#define KIND_LOG "log"
#define KIND_ATTEMPT "attempt"

/* Tokens whose oldest entry cannot be replayed at the moment, though the store answers. */
#define OUTBOX_STUCK_MAX 32

struct outbox {
    pthread_mutex_t lock; /* one connection */
    struct state_db file;
    /* Entries that failed with ERR_INTERNAL, and how often. Each process counts its own attempts (one
     * every few seconds): many of them do not give an entry less time. */
    struct {
        int64_t seq; /* 0: free */
        int failures;
    } failing[OUTBOX_STUCK_MAX];
};

/* ---- outbox.c: statements, each under the lock ---- */

/* ERR_STORAGE_FULL, with what SQLite said last. */
enum err_code outbox_sql_error(struct outbox *outbox, struct err *err);
/* NULL where it cannot be prepared: finalizing, binding and stepping NULL are all harmless
 * (SQLITE_MISUSE). */
sqlite3_stmt *outbox_prepare(struct outbox *outbox, const char *sql);
void outbox_bind_text(sqlite3_stmt *statement, int at, const char *text);
/* Runs a statement without rows: ?1 is seq, ?2 text, unless NULL. */
enum err_code outbox_execute(struct outbox *outbox, const char *sql, int64_t seq, const char *text,
                             struct err *err) MUST_CHECK;

/* How long an entry has waited; 0 where it seems to come from the future: the clock was set back. */
int64_t outbox_waited_ms(int64_t created_ms);

#endif
