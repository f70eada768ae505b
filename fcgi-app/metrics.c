/* metrics.c - counters, histograms and gauges, summed over all processes of the pool. See metrics.h.
 *
 * The file: a page that says what it is (a fingerprint of what each place of a slot counts, made from
 * the tables below), then a page for each slot. A slot is claimed by a write lock
 * on its bytes that belongs to the open file (F_OFD_SETLK, fcntl(2)): the kernel drops it when the
 * process dies, and F_OFD_GETLK tells which slots are held by others. A new file appears under its
 * name complete (rename), under a lock on the directory, so that two processes that start together
 * do not each make one. All of the file has its room from the start: a mapping that finds no room
 * later is a SIGBUS.
 *
 * The counters are the module's only state: in private memory until a slot is mapped. */
#include "metrics.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "retry.h"

#define MAGIC "EXTRACTM"
#define LAYOUT 2 /* of the file; what the places of a slot count, the fingerprint says */
#define SLOTS 256
#define PAGE 4096
#define FILE_SIZE ((off_t)PAGE * (SLOTS + 1))

struct header {
    char magic[8];
    int32_t layout;
    int32_t metrics; /* METRIC_COUNT */
    uint64_t fingerprint;
};

struct slot {
    _Atomic int64_t values[METRIC_COUNT];
};

_Static_assert(sizeof(struct slot) <= PAGE, "a slot is one page");
_Static_assert((int)RETRY_CLASS_COUNT <= METRIC_CLASSES_MAX, "each class has its counter");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "processes can only share atomics without locks");

/* ---- what is counted ---- */

/* Metrics without labels. */
static const struct family {
    int metric;
    bool in_seconds; /* counted in microseconds */
    const char *name;
    const char *help;
} families[] = {
    {METRIC_UNKNOWN_CALLS, false, "extract_unknown_calls_total",
     "Calls to Gemini that may have been billed without an answer that tells how much."},
    {METRIC_GEMINI_US, true, "extract_gemini_seconds_total", "Time spent in calls to Gemini."},
    {METRIC_STORE_BATCHES, false, "extract_store_batches_total",
     "Batches of acquires or settlements that went to the store."},
    {METRIC_STORE_ITEMS, false, "extract_store_batch_items_total",
     "Acquires and settlements in those batches."},
    {METRIC_STORE_US, true, "extract_store_seconds_total", "Time spent in those batches."},
    {METRIC_LOG_WRITTEN, false, "extract_log_entries_total",
     "Log entries written to the store, or to standard error in its place."},
    {METRIC_LOG_DROPPED, false, "extract_log_entries_dropped_total",
     "Log entries and retry attempts dropped because their queue was full."},
    {METRIC_UPLOAD_BYTES, false, "extract_upload_bytes_total", "Bytes of uploads read."},
    {METRIC_UNSETTLED_ALARMS, false, "extract_unsettled_alarms_total",
     "Settlements that neither store nor outbox took: on standard error only."},
    {METRIC_IN_FLIGHT, false, "extract_requests_in_flight", "Extractions that a worker serves."},
    {METRIC_QUEUED, false, "extract_requests_queued", "Extractions that wait for a worker."},
    {METRIC_HINT_WAITERS, false, "extract_hint_waiters",
     "Workers that wait for a rate limit to end."},
    {METRIC_WORKERS, false, "extract_workers", "Worker threads."},
};

static const struct {
    int metric;
    const char *kind;
} token_kinds[] = {
    {METRIC_TOKENS_INPUT, "input"},       {METRIC_TOKENS_OUTPUT, "output"},
    {METRIC_TOKENS_THOUGHTS, "thoughts"}, {METRIC_TOKENS_CACHED, "cached"},
    {METRIC_TOKENS_TOTAL, "total"},
};

/* Durations. A bucket counts what took longer than the bound before it, up to its own. */
static const struct histogram {
    int sum;     /* its metric */
    int buckets; /* the first one's; after that of the last bound, one for what is slower */
    const char *name;
    const char *help;
    struct {
        int64_t us;
        const char *le;
    } bounds[METRIC_BUCKETS_MAX - 1];
} histograms[METRIC_HISTOGRAM_COUNT] = {
    [METRIC_GEMINI_DURATION] = {METRIC_GEMINI_US,
                                METRIC_GEMINI_BUCKETS,
                                "extract_gemini_duration_seconds",
                                "How long calls to Gemini took, also those that failed.",
                                {{250000, "0.25"},
                                 {500000, "0.5"},
                                 {1000000, "1"},
                                 {2000000, "2"},
                                 {3000000, "3"},
                                 {5000000, "5"},
                                 {8000000, "8"},
                                 {13000000, "13"},
                                 {20000000, "20"},
                                 {30000000, "30"},
                                 {45000000, "45"},
                                 {60000000, "60"},
                                 {90000000, "90"},
                                 {120000000, "120"}}},
    [METRIC_STORE_DURATION] = {METRIC_STORE_US,
                               METRIC_STORE_BUCKETS,
                               "extract_store_duration_seconds",
                               "How long batches of acquires or settlements took in the store.",
                               {{1000, "0.001"},
                                {2500, "0.0025"},
                                {5000, "0.005"},
                                {10000, "0.01"},
                                {25000, "0.025"},
                                {50000, "0.05"},
                                {100000, "0.1"},
                                {250000, "0.25"},
                                {500000, "0.5"},
                                {1000000, "1"},
                                {2500000, "2.5"},
                                {5000000, "5"},
                                {10000000, "10"}}},
};

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

static struct slot private_slot;
static struct slot *_Atomic own_slot = &private_slot;
static unsigned char *mapping; /* the whole file; NULL while counting in private */
static int file = -1;
static int own_index = -1;

void metrics_add(int metric, int64_t n)
{
    if (metric < 0 || metric >= METRIC_COUNT)
        return;
    struct slot *slot = atomic_load_explicit(&own_slot, memory_order_relaxed);
    atomic_fetch_add_explicit(&slot->values[metric], n, memory_order_relaxed);
}

static size_t bound_count(const struct histogram *h)
{
    size_t n = 0;

    while (n < COUNT(h->bounds) && h->bounds[n].us > 0)
        n++;
    return n;
}

void metrics_observe(enum metric_histogram histogram, int64_t us)
{
    const struct histogram *h = &histograms[histogram];
    size_t bounds = bound_count(h), i = 0;

    while (i < bounds && us > h->bounds[i].us)
        i++;
    metrics_add(h->buckets + (int)i, 1);
    metrics_add(h->sum, us);
}

int64_t metrics_own(int metric)
{
    struct slot *slot = atomic_load_explicit(&own_slot, memory_order_relaxed);
    return atomic_load_explicit(&slot->values[metric], memory_order_relaxed);
}

/* ---- the file ---- */

/* FNV-1a, of a text with its end, and of the place that counts what it names. */
static void mix(uint64_t *hash, const char *name, int place)
{
    char text[128];
    int len = snprintf(text, sizeof text, "%s=%d", name, place);

    for (int i = 0; i <= len && i < (int)sizeof text; i++)
        *hash = (*hash ^ (unsigned char)text[i]) * UINT64_C(0x100000001b3);
}

/* Another one wherever a place may mean something else. */
static uint64_t fingerprint(void)
{
    uint64_t hash = UINT64_C(0xcbf29ce484222325);

    for (int code = 0; code < ERR_CODE_COUNT; code++)
        mix(&hash, err_info((enum err_code)code)->name, METRIC_REQUESTS + code);
    for (int c = 0; c < RETRY_CLASS_COUNT; c++) {
        mix(&hash, retry_rule((enum retry_class)c)->name, METRIC_ATTEMPTS + c);
        mix(&hash, retry_rule((enum retry_class)c)->name, METRIC_RETRIES + c);
    }
    for (size_t i = 0; i < COUNT(token_kinds); i++)
        mix(&hash, token_kinds[i].kind, token_kinds[i].metric);
    for (size_t i = 0; i < COUNT(families); i++)
        mix(&hash, families[i].name, families[i].metric);
    for (size_t i = 0; i < COUNT(histograms); i++)
        for (size_t b = 0; b < bound_count(&histograms[i]); b++)
            mix(&hash, histograms[i].bounds[b].le, histograms[i].buckets + (int)b);
    return hash;
}

static struct header this_header(void)
{
    struct header header = {
        .layout = LAYOUT, .metrics = METRIC_COUNT, .fingerprint = fingerprint()};
    memcpy(header.magic, MAGIC, sizeof header.magic);
    return header;
}

/* Puts a new file in the place of whatever has the name. -1: errno says why. */
static int create_file(int directory)
{
    char name[] = "metrics.new"; /* the directory is locked: nobody else uses the name */
    struct header header = this_header();
    int fd = openat(directory, name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

    if (fd < 0)
        return -1;
    int rc = posix_fallocate(fd, 0, FILE_SIZE);
    if (rc == 0 && pwrite(fd, &header, sizeof header, 0) != (ssize_t)sizeof header)
        rc = errno;
    if (rc == 0 && renameat(directory, name, directory, "metrics") != 0)
        rc = errno;
    if (rc == 0)
        return fd;
    unlinkat(directory, name, 0);
    close(fd);
    errno = rc;
    return -1;
}

/* Opens the pool's file; makes it where there is none, or one of another version. */
static enum err_code open_file(int directory, const char *runtime_dir, int *fd, struct err *err)
{
    struct header found = {.layout = 0}, wanted = this_header();
    struct stat st;

    *fd = openat(directory, "metrics", O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (*fd < 0 && errno == ENOENT)
        *fd = create_file(directory);
    if (*fd < 0)
        goto failed;
    if (pread(*fd, &found, sizeof found, 0) != (ssize_t)sizeof found ||
        memcmp(found.magic, wanted.magic, sizeof found.magic) != 0)
        return err_set(err, ERR_CONFIG,
                       "server.runtime_dir: %s/metrics is not a metrics file: remove it",
                       runtime_dir);
    if (memcmp(&found, &wanted, sizeof found) == 0 && fstat(*fd, &st) == 0 &&
        st.st_size == FILE_SIZE)
        return ERR_NONE;
    /* Processes of the other version go on with theirs, which has no name any more. */
    close(*fd);
    *fd = create_file(directory);
    if (*fd >= 0)
        return ERR_NONE;
failed:
    return err_set(err, ERR_CONFIG, "server.runtime_dir: cannot use %s/metrics: %s", runtime_dir,
                   strerror(errno));
}

static struct flock slot_lock(int index)
{
    return (struct flock){.l_type = F_WRLCK,
                          .l_whence = SEEK_SET,
                          .l_start = (off_t)PAGE * (index + 1),
                          .l_len = PAGE};
}

/* Locks the first slot that nobody holds. -1: there is none. */
static int claim_slot(int fd)
{
    for (int i = 0; i < SLOTS; i++) {
        struct flock lock = slot_lock(i);
        if (fcntl(fd, F_OFD_SETLK, &lock) == 0)
            return i;
    }
    return -1;
}

static bool is_held_by_another(int index)
{
    struct flock lock = slot_lock(index);
    return fcntl(file, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

static struct slot *slot_at(int index)
{
    return (struct slot *)(void *)(mapping + (size_t)PAGE * (size_t)(index + 1));
}

bool metrics_room_elsewhere(int queue)
{
    for (int i = 0; mapping != NULL && i < SLOTS; i++) {
        _Atomic int64_t *values = slot_at(i)->values;
        int64_t workers = atomic_load_explicit(&values[METRIC_WORKERS], memory_order_relaxed);
        if (i == own_index || workers <= 0)
            continue;
        int64_t busy = atomic_load_explicit(&values[METRIC_IN_FLIGHT], memory_order_relaxed) +
                       atomic_load_explicit(&values[METRIC_QUEUED], memory_order_relaxed);
        if (busy < workers + queue && is_held_by_another(i))
            return true;
    }
    return false;
}

static bool is_gauge(int metric)
{
    return metric >= METRIC_COUNTERS_END;
}

/* Counts go on where the slot's last holder stopped, its gauges went with it. */
static void take_over(struct slot *slot)
{
    for (int i = 0; i < METRIC_COUNT; i++) {
        if (is_gauge(i))
            atomic_store(&slot->values[i], 0);
        atomic_fetch_add(&slot->values[i], atomic_exchange(&private_slot.values[i], 0));
    }
    atomic_store(&own_slot, slot);
}

static enum err_code map_file(int directory, const char *runtime_dir, struct err *err)
{
    void *map = MAP_FAILED;
    int fd = -1, index = -1;
    enum err_code code = open_file(directory, runtime_dir, &fd, err);

    if (code != ERR_NONE)
        goto out;
    index = claim_slot(fd);
    if (index < 0) {
        code = err_set(err, ERR_CONFIG, "server.runtime_dir: all %d slots of %s/metrics are taken",
                       SLOTS, runtime_dir);
        goto out;
    }
    map = mmap(NULL, (size_t)FILE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
        code = err_set(err, ERR_CONFIG, "server.runtime_dir: cannot map %s/metrics: %s",
                       runtime_dir, strerror(errno));
        goto out;
    }
    mapping = map;
    file = fd;
    own_index = index;
    take_over(slot_at(index));
    return ERR_NONE;
out:
    if (fd >= 0)
        close(fd);
    return code;
}

enum err_code metrics_open(const char *runtime_dir, struct err *err)
{
    int directory;

    metrics_close();
    if (runtime_dir[0] == '\0')
        return err_set(err, ERR_CONFIG, "server.runtime_dir is not set");
    directory = open(runtime_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0)
        return err_set(err, ERR_CONFIG, "server.runtime_dir: %s: %s", runtime_dir, strerror(errno));
    while (flock(directory, LOCK_EX) != 0 && errno == EINTR)
        ;
    enum err_code code = map_file(directory, runtime_dir, err);
    close(directory);
    return code;
}

void metrics_close(void)
{
    if (mapping == NULL)
        return;
    atomic_store(&own_slot, &private_slot);
    munmap(mapping, (size_t)FILE_SIZE);
    close(file); /* and with it the lock on the slot */
    mapping = NULL;
    file = own_index = -1;
}

/* ---- the text ---- */

static void add_slot(const struct slot *slot, bool with_gauges, int64_t sums[METRIC_COUNT])
{
    for (int i = 0; i < METRIC_COUNT; i++)
        if (with_gauges || !is_gauge(i))
            sums[i] += atomic_load_explicit(&slot->values[i], memory_order_relaxed);
}

/* Sums all slots; returns how many processes there are. */
static int sum_slots(int64_t sums[METRIC_COUNT])
{
    int processes = 0;

    if (mapping == NULL) {
        add_slot(&private_slot, true, sums);
        return 1;
    }
    for (int i = 0; i < SLOTS; i++) {
        bool is_held = i == own_index || is_held_by_another(i);
        add_slot(slot_at(i), is_held, sums);
        processes += is_held;
    }
    return processes;
}

void metrics_write_head(struct buf *out, const char *name, const char *kind, const char *help)
{
    buf_printf(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind);
}

void metrics_write_sample(struct buf *out, const char *name, const char *label, const char *value,
                          int64_t n)
{
    buf_printf(out, "%s{%s=\"%s\"} %lld\n", name, label, value, (long long)n);
}

static void write_seconds(struct buf *out, const char *name, int64_t us)
{
    buf_printf(out, "%s %lld.%06lld\n", name, (long long)us / 1000000, (long long)us % 1000000);
}

static void write_families(struct buf *out, const int64_t sums[METRIC_COUNT])
{
    for (size_t i = 0; i < COUNT(families); i++) {
        const struct family *f = &families[i];
        metrics_write_head(out, f->name, is_gauge(f->metric) ? "gauge" : "counter", f->help);
        if (f->in_seconds)
            write_seconds(out, f->name, sums[f->metric]);
        else
            buf_printf(out, "%s %lld\n", f->name, (long long)sums[f->metric]);
    }
}

/* The count is that of the buckets, so that the two always agree. */
static void write_histograms(struct buf *out, const int64_t sums[METRIC_COUNT])
{
    for (size_t i = 0; i < COUNT(histograms); i++) {
        const struct histogram *h = &histograms[i];
        size_t bounds = bound_count(h);
        long long count = 0;
        char name[64];

        metrics_write_head(out, h->name, "histogram", h->help);
        snprintf(name, sizeof name, "%s_bucket", h->name);
        for (size_t b = 0; b <= bounds; b++) {
            count += sums[h->buckets + (int)b];
            metrics_write_sample(out, name, "le", b < bounds ? h->bounds[b].le : "+Inf", count);
        }
        snprintf(name, sizeof name, "%s_sum", h->name);
        write_seconds(out, name, sums[h->sum]);
        buf_printf(out, "%s_count %lld\n", h->name, count);
    }
}

static void write_classes(struct buf *out, const char *name, const char *help,
                          const int64_t sums[RETRY_CLASS_COUNT])
{
    metrics_write_head(out, name, "counter", help);
    for (int c = 0; c < RETRY_CLASS_COUNT; c++)
        metrics_write_sample(out, name, "class", retry_rule((enum retry_class)c)->name, sums[c]);
}

void metrics_write(struct buf *out)
{
    int64_t sums[METRIC_COUNT] = {0};
    int processes = sum_slots(sums);

    metrics_write_head(out, "extract_requests_total", "counter", "Extractions, by outcome.");
    for (int code = ERR_NONE; code < ERR_CONFIG; code++)
        metrics_write_sample(out, "extract_requests_total", "code",
                             err_info((enum err_code)code)->name, sums[METRIC_REQUESTS + code]);
    write_classes(out, "extract_attempts_total", "Calls to Gemini, by what came back.",
                  &sums[METRIC_ATTEMPTS]);
    write_classes(out, "extract_retries_total",
                  "Calls to Gemini made again, by what had come back from the one before.",
                  &sums[METRIC_RETRIES]);
    metrics_write_head(out, "extract_tokens_total", "counter", "Gemini's tokens, by kind.");
    for (size_t i = 0; i < COUNT(token_kinds); i++)
        metrics_write_sample(out, "extract_tokens_total", "kind", token_kinds[i].kind,
                             sums[token_kinds[i].metric]);
    write_families(out, sums);
    write_histograms(out, sums);
    metrics_write_head(out, "extract_processes", "gauge", "Processes of the pool.");
    buf_printf(out, "extract_processes %d\n", processes);
    metrics_write_head(out, "extract_build_info", "gauge", "The version that answers.");
    metrics_write_sample(out, "extract_build_info", "version", EXTRACT_VERSION, 1);
}
