/* grace.h - client keys that the store has confirmed lately, kept on this host: while the store is
 * away they stay valid for auth.offline_grace, in all processes of the pool and across restarts.
 *
 * A SQLite file in state_dir, of hashes only. It helps and is never needed: what fails here is logged
 * and otherwise does nothing. All calls are safe from any thread. */
#ifndef EXTRACT_GRACE_H
#define EXTRACT_GRACE_H

#include <stdbool.h>

#include "store.h"

struct grace;

/* grace_ms 0: none is kept. Errors: ERR_CONFIG (server.state_dir), ERR_STORAGE_FULL, ERR_INTERNAL. */
struct grace *grace_open(const char *state_dir, int64_t grace_ms, struct err *err) MUST_CHECK;
void grace_close(struct grace *grace);

/* The store has confirmed this key now; or it no longer knows it. hash: STORE_HASH_SIZE. */
void grace_remember(struct grace *grace, const char *hash, const struct store_client_key *key);
void grace_forget(struct grace *grace, const char *hash);

/* Was the key confirmed within the grace? */
bool grace_find(struct grace *grace, const char *hash, struct store_client_key *key) MUST_CHECK;

#endif
