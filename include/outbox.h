/* outbox.h - the journal of what could not reach the store: settlements, and the fallback's
 * reservations.
 *
 * A SQLite file in state_dir (WAL, synchronous=FULL), shared by the processes of a host: what append
 * returned ERR_NONE for survives a power cut. Entries are replayed in the order in which they came,
 * each until the store takes it; since settling and reserving are idempotent, one that is replayed
 * twice counts once. What the store refuses for its data moves to the dead table and blocks nobody.
 * All calls are safe from any thread. */
#ifndef EXTRACT_OUTBOX_H
#define EXTRACT_OUTBOX_H

#include <stdbool.h>

#include "buf.h"
#include "err.h"
#include "store.h"

struct outbox;

/* Opens or creates state_dir/outbox.db. Errors: ERR_STORAGE_FULL, ERR_CONFIG (not writable). */
struct outbox *outbox_open(const char *state_dir, struct err *err) MUST_CHECK;
void outbox_close(struct outbox *outbox);
/* Is there one in state_dir? Creates nothing. */
bool outbox_exists(const char *state_dir);

/* Durable when they return ERR_NONE. Errors: ERR_STORAGE_FULL. */
enum err_code outbox_append_settlement(struct outbox *outbox,
                                       const struct store_settlement *settlement,
                                       struct err *err) MUST_CHECK;
enum err_code outbox_append_reservation(struct outbox *outbox,
                                        const struct store_acquire *reservation,
                                        struct err *err) MUST_CHECK;
/* Straight to the dead table; reason: what the store said. */
enum err_code outbox_append_dead(struct outbox *outbox, const struct store_settlement *settlement,
                                 const char *reason, struct err *err) MUST_CHECK;

/* Does an entry of this request wait? Then its settlement must line up behind it. */
bool outbox_holds(struct outbox *outbox, const char *request_id);

enum err_code outbox_status(struct outbox *outbox, struct store_outbox_status *status,
                            struct err *err) MUST_CHECK;

/* How entries are replayed: settle and reserve return the store's verdict on one. ERR_BAD_VALUE
 * kills the entry, as the 20th ERR_INTERNAL in one process does; any other error ends the drain, as
 * go_on (may be NULL) does when it says false.
 * What entries say in milliseconds from now (cooldown, expiry) is shortened by the time they waited;
 * a reservation keeps at least a minute, in which its settlement, which stands behind it, follows. */
struct outbox_replay {
    enum err_code (*settle)(void *context, struct store_settlement *settlement, struct err *err);
    enum err_code (*reserve)(void *context, struct store_acquire *reservation, struct err *err);
    bool (*go_on)(void *context);
    void *context;
};

/* Replays what waits, oldest first; only one process of a host at a time (the others return at once
 * with *replayed 0). */
enum err_code outbox_drain(struct outbox *outbox, const struct outbox_replay *replay,
                           int64_t *replayed, struct err *err) MUST_CHECK;

/* Appends the settlement as the JSON object that an entry holds: all its numbers, never a key. */
void outbox_write_settlement(struct buf *out, const struct store_settlement *settlement);

#endif
