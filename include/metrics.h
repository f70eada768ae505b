/* metrics.h - counters, histograms and gauges, summed over all processes of the pool.
 *
 * The processes share one small mapped file in runtime_dir, with a slot for each. A process claims a
 * slot with a lock that the kernel drops when it dies; the next process that claims the slot goes on
 * counting where the last one stopped, so that a sum over the slots never falls. Gauges of a slot
 * that nobody holds do not count. The file says what each place of a slot counts: a program that
 * counts otherwise (another version, while processes are restarted one by one) takes a new file. */
#ifndef EXTRACT_METRICS_H
#define EXTRACT_METRICS_H

#include <stdbool.h>
#include <stdint.h>

#include "buf.h"
#include "err.h"

#define METRIC_CLASSES_MAX 16
#define METRIC_BUCKETS_MAX 16

enum metric {
    /* one counter per outcome: METRIC_REQUESTS + enum err_code; ERR_NONE is success */
    METRIC_REQUESTS,
    METRIC_ATTEMPTS = METRIC_REQUESTS + ERR_CODE_COUNT,    /* + enum retry_class */
    METRIC_RETRIES = METRIC_ATTEMPTS + METRIC_CLASSES_MAX, /* + that of the call before */
    METRIC_TOKENS_INPUT = METRIC_RETRIES + METRIC_CLASSES_MAX,
    METRIC_TOKENS_OUTPUT,
    METRIC_TOKENS_THOUGHTS,
    METRIC_TOKENS_CACHED,
    METRIC_TOKENS_TOTAL,
    METRIC_UNKNOWN_CALLS,
    METRIC_GEMINI_US, /* by metrics_observe, as the buckets are */
    METRIC_GEMINI_BUCKETS,
    METRIC_STORE_US = METRIC_GEMINI_BUCKETS + METRIC_BUCKETS_MAX,
    METRIC_STORE_BUCKETS,
    METRIC_STORE_BATCHES = METRIC_STORE_BUCKETS + METRIC_BUCKETS_MAX,
    METRIC_STORE_ITEMS,
    METRIC_LOG_WRITTEN,
    METRIC_LOG_DROPPED,
    METRIC_UPLOAD_BYTES,
    METRIC_UNSETTLED_ALARMS, /* usage that reached standard error only */
    METRIC_COUNTERS_END,
    /* gauges */
    METRIC_IN_FLIGHT = METRIC_COUNTERS_END,
    METRIC_QUEUED,
    METRIC_HINT_WAITERS,
    METRIC_WORKERS,
    METRIC_COUNT
};

enum metric_histogram { METRIC_GEMINI_DURATION, METRIC_STORE_DURATION, METRIC_HISTOGRAM_COUNT };

/* Maps runtime_dir/metrics and claims a slot. Errors: ERR_CONFIG (directory missing or not
 * writable, all slots taken). Until then, and without it, the functions below count in private memory. */
enum err_code metrics_open(const char *runtime_dir, struct err *err) MUST_CHECK;
void metrics_close(void);

void metrics_add(int metric, int64_t n);
/* Counts one more that took so many microseconds. */
void metrics_observe(enum metric_histogram histogram, int64_t us);
/* This process's own value. */
int64_t metrics_own(int metric);

/* Could another process of the pool take a request: does it have a worker without work, or room in its
 * queue of this size? */
bool metrics_room_elsewhere(int queue);

/* Appends the sums in the Prometheus text format. */
void metrics_write(struct buf *out);
/* For what others add to it. kind: "gauge", "counter", "histogram". */
void metrics_write_head(struct buf *out, const char *name, const char *kind, const char *help);
void metrics_write_sample(struct buf *out, const char *name, const char *label, const char *value,
                          int64_t n);

#endif
