/* rate.h - how many requests a minute a client key may make (auth.key_rate), counted over all processes
 * of the pool.
 *
 * A token bucket that holds a minute's requests, kept as the time at which it would be full again
 * (GCRA, ITU-T I.371). The buckets lie in a file in runtime_dir that the pool's processes map: a fixed
 * number of them, chosen by the key's name; keys that meet in one share it, which only ever makes it
 * stricter. */
#ifndef EXTRACT_RATE_H
#define EXTRACT_RATE_H

#include <stdint.h>

#include "err.h"

struct rate;

/* per_minute 0: no limit. Errors: ERR_CONFIG (server.runtime_dir). */
struct rate *rate_open(const char *runtime_dir, int per_minute, struct err *err) MUST_CHECK;
void rate_close(struct rate *rate);

/* Takes one from the key's bucket at the monotonic time now_ms. 0, or milliseconds until there is one
 * to take. */
int64_t rate_take(struct rate *rate, const char *key, int64_t now_ms) MUST_CHECK;

#endif
