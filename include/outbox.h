/* outbox.h - the journal of what could not reach the store: settlements, the fallback's reservations,
 * log entries and retry attempts.
 *
 * A SQLite file in state_dir (WAL, synchronous=FULL), shared by the processes of a host: what append
 * returned ERR_NONE for survives a power cut. Entries are replayed in the order in which they came,
 * each until the store takes it; since settling and reserving are idempotent, one that is replayed
 * twice counts once. What the store refuses for its data moves to the dead table and blocks nobody.
 * All calls are safe from any thread. */
#ifndef EXTRACT_OUTBOX_H
#define EXTRACT_OUTBOX_H

#include <stdbool.h>

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
/* Also ERR_REQUEST_IN_PROGRESS and ERR_ALREADY_PROCESSED: another request waits here with the same
 * idempotency key. */
enum err_code outbox_append_reservation(struct outbox *outbox,
                                        const struct store_acquire *reservation,
                                        struct err *err) MUST_CHECK;
/* Straight to the dead table; reason: what the store said. */
enum err_code outbox_append_dead(struct outbox *outbox, const struct store_settlement *settlement,
                                 const char *reason, struct err *err) MUST_CHECK;

/* Log entries and retry attempts, in one transaction. Beyond 64 MiB of them the oldest go: *dropped,
 * how many. */
enum err_code outbox_append_records(struct outbox *outbox, struct log_entry *const *entries,
                                    size_t entry_count,
                                    const struct store_retry_attempt *const *attempts,
                                    size_t attempt_count, int64_t *dropped,
                                    struct err *err) MUST_CHECK;

/* Does an entry of this request wait? Then its settlement must line up behind it. */
bool outbox_holds(struct outbox *outbox, const char *request_id);

enum err_code outbox_status(struct outbox *outbox, struct store_outbox_status *status,
                            struct err *err) MUST_CHECK;

/* Hands out the settlements and reservations that are dead or wait, newest first, to row; by company,
 * request and time, without a limit. Others of the process wait meanwhile. Errors: ERR_STORAGE_FULL. */
enum err_code outbox_query(struct outbox *outbox, const struct store_filter *filter, store_row *row,
                           void *context, struct err *err) MUST_CHECK;
/* The status as rows: one for what waits, for records and for what is dead. */
void outbox_show_status(const struct store_outbox_status *status, store_row *row, void *context);

/* How entries are replayed: each function returns the store's verdict. ERR_BAD_VALUE kills an entry,
 * as the 20th ERR_INTERNAL in one process does; before that, others of its token wait and the rest
 * passes. Any other error ends the drain, as go_on (may be NULL; asked before each step, with how many are
 * replayed) does when it says false.
 * What entries say in milliseconds from now (cooldown, expiry) is shortened by the time they waited;
 * a reservation keeps at least a minute, in which its settlement, which stands behind it, follows.
 * Records may have reached the store already: it must not keep them twice. */
struct outbox_replay {
    enum err_code (*settle)(void *context, struct store_settlement *settlement, struct err *err);
    enum err_code (*reserve)(void *context, struct store_acquire *reservation, struct err *err);
    enum err_code (*record)(void *context, struct log_entry *const *entries, size_t entry_count,
                            const struct store_retry_attempt *const *attempts, size_t attempt_count,
                            struct err *err);
    bool (*go_on)(void *context, int64_t replayed);
    void *context;
};

/* Replays what waits, oldest first; only one process of a host at a time (the others return at once
 * with *replayed 0). */
enum err_code outbox_drain(struct outbox *outbox, const struct outbox_replay *replay,
                           int64_t *replayed, struct err *err) MUST_CHECK;

#endif
