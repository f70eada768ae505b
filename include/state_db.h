/* state_db.h - the SQLite databases of this host that outlive its processes, in server.state_dir.
 *
 * Any number of processes may open one at once, also the first time: the directory itself is locked
 * (flock) while a database is created, opened or closed, since SQLite does not wait for others by
 * itself where it changes to a write-ahead log. */
#ifndef EXTRACT_STATE_DB_H
#define EXTRACT_STATE_DB_H

#include <sqlite3.h>

#include "err.h"

struct state_db {
    int directory; /* a descriptor; -1: not open */
    sqlite3 *db;   /* for one thread at a time */
};

/* Opens state_dir/name, and creates it, for its owner only (of the directory, where root does it).
 * setup: SQL for each opening. busy_ms: how long a statement waits for other processes' locks. The
 * caller closes also after an error. ERR_CONFIG: the directory does not serve; ERR_STORAGE_FULL: it
 * is full, or the database busy. */
enum err_code state_db_open(struct state_db *state, const char *state_dir, const char *name,
                            const char *setup, int busy_ms, struct err *err) MUST_CHECK;
/* Creates another file there in the same way, unless there is one. */
enum err_code state_db_create_file(const struct state_db *state, const char *name,
                                   struct err *err) MUST_CHECK;
void state_db_close(struct state_db *state);

#endif
