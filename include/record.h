/* record.h - the recorder: log entries and retry attempts go to the store in the background.
 *
 * Two bounded queues and one thread, which writes what has gathered in one transaction. What the store
 * does not take goes to the outbox, and where that fails to standard error. What a full queue drops is
 * counted, and the count is itself logged once there is room: nothing is dropped silently. A process
 * that is killed takes with it what it logged in its last tenth of a second, but no usage: that is
 * settled before the answer. */
#ifndef EXTRACT_RECORD_H
#define EXTRACT_RECORD_H

#include "err.h"
#include "log.h"
#include "store.h"

struct recorder;

/* Starts the thread. The caller points the log at it: log_set_sink(recorder_log, recorder). */
struct recorder *recorder_start(struct store *store, struct err *err) MUST_CHECK;

/* Points the log at standard error again; writes what is left, the rest to standard error once
 * timeout_ms is over (one call to the store that is under way is waited for); ends the thread and
 * frees the recorder. Nobody may be in recorder_retry or recorder_flush any more. */
void recorder_stop(struct recorder *recorder, int64_t timeout_ms);

/* A log_sink. */
void recorder_log(struct log_entry *take_entry, void *recorder);

/* Copies the attempt. */
void recorder_retry(struct recorder *recorder, const struct store_retry_attempt *attempt);

/* Waits until all that was queued before has been written or has gone to standard error. */
void recorder_flush(struct recorder *recorder);

#endif
