/* gauges.h - what /metrics says of the store: API tokens by status, reservations.
 *
 * A thread of its own reads it when somebody asks, and it serves for a few seconds; so neither a slow
 * store holds a scrape, nor do many scrapes load the store. */
#ifndef EXTRACT_GAUGES_H
#define EXTRACT_GAUGES_H

#include "buf.h"
#include "err.h"
#include "store.h"

#define GAUGES_WAIT_MS 1000   /* how long the store may take */
#define GAUGES_SERVE_MS 5000  /* how long what was read serves */
#define GAUGES_ROWS_MAX 10000 /* reservations that are counted, the newest; more are not told */

struct gauges;

/* Starts the thread. store: is it there? reader: by which one reads; may be the same. Both are
 * borrowed until gauges_stop. A store that takes longer than wait_ms counts as away; what was read
 * serves for serve_ms. NULL: err says why. Errors: ERR_INTERNAL. */
struct gauges *gauges_start(struct store *store, struct store *reader, int64_t wait_ms,
                            int64_t serve_ms, struct err *err) MUST_CHECK;
/* Waits for a read that is under way. NULL is fine. */
void gauges_stop(struct gauges *gauges);

/* Appends in the Prometheus text format extract_store_up and, where that is 1, the others. Waits at most
 * wait_ms. */
void gauges_write(struct gauges *gauges, struct buf *out);

#endif
