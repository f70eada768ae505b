/* batch.h - work that waits together travels together.
 *
 * Whoever comes while no run is under way leads one: takes all that wait (at most BATCH_MAX) and runs
 * them in one go; a lone item goes at once. Who comes during a run waits, and is either carried by the
 * next leader or leads the next batch itself. Where a run takes long, others begin beside it, so that
 * one that is held up does not hold up everybody; right after one that carried many, the next waits a
 * moment for more, since a run costs nearly the same whatever it carries. One who waits leaves at its
 * own deadline, unless a leader has taken its item: then it stays until that run ends, which the run
 * function bounds. */
#ifndef EXTRACT_BATCH_H
#define EXTRACT_BATCH_H

#include <stddef.h>
#include <stdint.h>

#include "err.h"

#define BATCH_MAX 64
#define BATCH_MANY 4

struct batch_times {
    /* How long the run begun last must have been under way, for another to begin beside it; 0: none
     * waits for that. */
    int64_t patience_ms;
    /* How long a run waits for more, if the last one carried BATCH_MANY or more and ended less than
     * lately_ms ago. */
    int64_t gather_ms, lately_ms;
};

struct batch;

/* Runs count items in one go and leaves each one's outcome inside it. */
typedef void batch_run(void *context, void **items, size_t count);

/* leaders: how many runs may be under way at the same time. NULL without memory. */
struct batch *batch_new(int leaders, struct batch_times times, batch_run *run,
                        void *context) MUST_CHECK;
void batch_free(struct batch *batch);

/* Carries count items (the caller's until return), all in the same run where they fit.
 * Returns ERR_NONE once all were run, ERR_STORE_UNAVAILABLE when the deadline (monotonic) came
 * first: then none of those not yet taken was run, and *ran (may be NULL) tells how many were. */
enum err_code batch_submit(struct batch *batch, void **items, size_t count, int64_t deadline_ms,
                           size_t *ran) MUST_CHECK;

#endif
