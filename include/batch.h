/* batch.h - work that waits together travels together.
 *
 * Whoever comes and finds a free leader's place leads: takes all that wait (at most BATCH_MAX) and
 * runs them in one go; a lone item goes at once. Who finds no place waits, and is either carried by
 * a leader or leads the next batch itself. One who waits leaves at its own deadline, unless a leader
 * has taken its item: then it stays until that run ends, which the run function bounds. */
#ifndef EXTRACT_BATCH_H
#define EXTRACT_BATCH_H

#include <stddef.h>
#include <stdint.h>

#include "err.h"

#define BATCH_MAX 64

struct batch;

/* Runs count items in one go and leaves each one's outcome inside it. */
typedef void batch_run(void *context, void **items, size_t count);

/* leaders: how many runs may be under way at the same time. NULL without memory. */
struct batch *batch_new(int leaders, batch_run *run, void *context) MUST_CHECK;
void batch_free(struct batch *batch);

/* Carries count items (the caller's until return), all in the same run where they fit.
 * Returns ERR_NONE once all were run, ERR_STORE_UNAVAILABLE when the deadline (monotonic) came
 * first: then none of those not yet taken was run, and *ran (may be NULL) tells how many were. */
enum err_code batch_submit(struct batch *batch, void **items, size_t count, int64_t deadline_ms,
                           size_t *ran) MUST_CHECK;

#endif
