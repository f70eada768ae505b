/* outbox.h - the journal of what could not reach the store: settlements, and the fallback's
 * reservations.
 *
 * A SQLite file in state_dir (WAL, synchronous=FULL), shared by the processes of a host: what append
 * returned ERR_NONE for survives a power cut. Entries are replayed in the order in which they came,
 * each until the store takes it; since settling and reserving are idempotent, one that is replayed
 * twice counts once. What the store refuses for its data moves to the dead table and blocks nobody. */
#ifndef EXTRACT_OUTBOX_H
#define EXTRACT_OUTBOX_H

#include "err.h"
#include "store.h"

struct outbox;

/* Opens or creates state_dir/outbox.db. Errors: ERR_STORAGE_FULL, ERR_CONFIG (not writable). */
struct outbox *outbox_open(const char *state_dir, struct err *err) MUST_CHECK;
void outbox_close(struct outbox *outbox);

/* Durable when they return ERR_NONE. Errors: ERR_STORAGE_FULL. */
enum err_code outbox_append_settlement(struct outbox *outbox,
                                       const struct store_settlement *settlement,
                                       struct err *err) MUST_CHECK;
enum err_code outbox_append_reservation(struct outbox *outbox,
                                        const struct store_acquire *reservation,
                                        struct err *err) MUST_CHECK;

enum err_code outbox_status(struct outbox *outbox, struct store_outbox_status *status,
                            struct err *err) MUST_CHECK;

/* How entries are replayed: returns the store's verdict on one. ERR_BAD_VALUE kills the entry,
 * any other error ends the drain. */
struct outbox_replay {
    enum err_code (*settle)(void *context, struct store_settlement *settlement, struct err *err);
    enum err_code (*reserve)(void *context, struct store_acquire *reservation, struct err *err);
    void *context;
};

/* Replays what waits, oldest first; only one process of a host at a time (the others return at once
 * with *replayed 0). */
enum err_code outbox_drain(struct outbox *outbox, const struct outbox_replay *replay,
                           int64_t *replayed, struct err *err) MUST_CHECK;

#endif
