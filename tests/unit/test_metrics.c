/* test_metrics.c - sums over processes that come, go and die. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "metrics.h"
#include "retry.h"

static char directory[64];

static const char *in_directory(const char *name)
{
    static char path[512];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return path;
}

static int set_up(void **state)
{
    (void)state;
    snprintf(directory, sizeof directory, "/tmp/test_metrics.XXXXXX");
    return mkdtemp(directory) == NULL;
}

static int tear_down(void **state)
{
    (void)state;
    metrics_close();
    unlink(in_directory("metrics"));
    return rmdir(directory);
}

static struct buf text;

/* The value of a series in the text written now; -1: it is not there. */
static double value_of(const char *series)
{
    char start[128];

    buf_reset(&text);
    buf_init(&text, 1 << 20);
    buf_append_char(&text, '\n');
    metrics_write(&text);
    assert_true(buf_ok(&text));
    snprintf(start, sizeof start, "\n%s ", series);
    const char *at = strstr(buf_str(&text), start);
    return at == NULL ? -1 : strtod(at + strlen(start), NULL);
}

#define assert_value(series, value) assert_int_equal((long long)value_of(series), (value))

static void open_metrics(void)
{
    struct err err = {.message = ""};
    if (metrics_open(directory, &err) != ERR_NONE)
        fail_msg("%s", err.message);
}

/* A process that counts n unknown calls, is in n requests, and lives until it is told to end. */
struct process {
    pid_t pid;
    int hold; /* closed: it ends; killed: it dies */
};

static struct process start_process(int n)
{
    int ready[2], hold[2];
    char byte;

    assert_int_equal(pipe2(ready, O_CLOEXEC), 0);
    assert_int_equal(pipe2(hold, O_CLOEXEC), 0);
    pid_t pid = fork();
    if (pid == 0) {
        struct err err;
        metrics_close();
        close(hold[1]);
        if (metrics_open(directory, &err) != ERR_NONE)
            _exit(1);
        metrics_add(METRIC_UNKNOWN_CALLS, n);
        metrics_add(METRIC_IN_FLIGHT, n);
        if (write(ready[1], "r", 1) != 1 || read(hold[0], &byte, 1) != 0)
            _exit(1);
        _exit(0);
    }
    assert_true(pid > 0);
    close(ready[1]);
    close(hold[0]);
    assert_int_equal(read(ready[0], &byte, 1), 1);
    close(ready[0]);
    return (struct process){pid, hold[1]};
}

static void end_process(struct process p, int signal)
{
    int status;

    if (signal != 0)
        kill(p.pid, signal);
    close(p.hold);
    assert_int_equal(waitpid(p.pid, &status, 0), p.pid);
    assert_true(signal != 0 || (WIFEXITED(status) && WEXITSTATUS(status) == 0));
}

static void test_private_until_opened(void **state)
{
    (void)state;
    double before = value_of("extract_unknown_calls_total");
    metrics_add(METRIC_UNKNOWN_CALLS, 2);
    metrics_add(METRIC_WORKERS, 3);
    metrics_add(METRIC_COUNT, 1); /* no such metric */
    metrics_add(-1, 1);
    assert_value("extract_unknown_calls_total", (long long)before + 2);
    assert_value("extract_processes", 1);
    open_metrics();
    metrics_add(METRIC_UNKNOWN_CALLS, 1);
    assert_value("extract_unknown_calls_total", (long long)before + 3);
    assert_value("extract_workers", 3);
    metrics_close();
    assert_value("extract_unknown_calls_total", 0);
}

static void test_processes_sum(void **state)
{
    (void)state;
    open_metrics();
    metrics_add(METRIC_UNKNOWN_CALLS, 1);
    metrics_add(METRIC_IN_FLIGHT, 1);
    struct process a = start_process(10), b = start_process(100);
    assert_value("extract_unknown_calls_total", 111);
    assert_value("extract_requests_in_flight", 111);
    assert_value("extract_processes", 3);
    end_process(a, SIGKILL);
    /* What it counted stays, what it was doing has gone. */
    assert_value("extract_unknown_calls_total", 111);
    assert_value("extract_requests_in_flight", 101);
    assert_value("extract_processes", 2);
    end_process(b, 0);
    assert_value("extract_unknown_calls_total", 111);
    assert_value("extract_requests_in_flight", 1);
    assert_value("extract_processes", 1);
}

static void test_slots_are_used_again(void **state)
{
    (void)state;
    for (int i = 0; i < 300; i++) {
        open_metrics();
        metrics_add(METRIC_UPLOAD_BYTES, 1);
        metrics_add(METRIC_QUEUED, 1);
        metrics_close();
    }
    open_metrics();
    assert_value("extract_upload_bytes_total", 300);
    assert_value("extract_requests_queued", 0);
    assert_value("extract_processes", 1);
    /* The next process after one that died takes its slot, with gauges at zero. */
    for (int i = 0; i < 3; i++)
        end_process(start_process(5), SIGKILL);
    struct process p = start_process(5);
    assert_value("extract_unknown_calls_total", 20);
    assert_value("extract_requests_in_flight", 5);
    end_process(p, 0);
}

static void test_processes_that_start_together(void **state)
{
    enum { PROCESSES = 20 };
    int go[2];
    pid_t pids[PROCESSES];
    (void)state;

    assert_int_equal(pipe2(go, O_CLOEXEC), 0);
    for (int i = 0; i < PROCESSES; i++) {
        pids[i] = fork();
        assert_true(pids[i] >= 0);
        if (pids[i] == 0) {
            struct err err;
            char byte;
            close(go[1]);
            if (read(go[0], &byte, 1) != 0 || metrics_open(directory, &err) != ERR_NONE)
                _exit(1);
            metrics_add(METRIC_UNKNOWN_CALLS, 1);
            _exit(0);
        }
    }
    close(go[0]);
    close(go[1]);
    for (int i = 0; i < PROCESSES; i++) {
        int status;
        assert_int_equal(waitpid(pids[i], &status, 0), pids[i]);
        assert_int_equal(status, 0);
    }
    open_metrics();
    assert_value("extract_unknown_calls_total", PROCESSES);
}

static void test_all_slots_taken(void **state)
{
    struct flock all = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    struct err err = {.message = ""};
    (void)state;

    open_metrics();
    metrics_close();
    int fd = open(in_directory("metrics"), O_RDWR | O_CLOEXEC);
    assert_int_equal(fcntl(fd, F_OFD_SETLK, &all), 0);
    assert_int_equal(metrics_open(directory, &err), ERR_CONFIG);
    assert_non_null(strstr(err.message, directory));
    metrics_add(METRIC_UNKNOWN_CALLS, 1); /* counts in private */
    close(fd);
    open_metrics();
    assert_value("extract_unknown_calls_total", 1);
}

static void put_file(const void *data, size_t size)
{
    int fd = open(in_directory("metrics"), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    assert_int_equal(write(fd, data, size), (ssize_t)size);
    close(fd);
}

static void test_foreign_file_is_refused(void **state)
{
    struct err err = {.message = ""};
    (void)state;

    put_file("this is something else altogether", 33);
    assert_int_equal(metrics_open(directory, &err), ERR_CONFIG);
    assert_non_null(strstr(err.message, in_directory("metrics")));
    struct stat st;
    assert_int_equal(stat(in_directory("metrics"), &st), 0);
    assert_int_equal(st.st_size, 33);
    assert_int_equal(metrics_open("/nonexistent/directory", &err), ERR_CONFIG);
    assert_non_null(strstr(err.message, "/nonexistent/directory"));
    assert_int_equal(metrics_open("", &err), ERR_CONFIG);
}

/* Opens the file, which is to be replaced by another. */
static void open_replacing(void)
{
    struct stat before, after;

    int fd = open(in_directory("metrics"), O_RDONLY | O_CLOEXEC); /* its inode stays taken */
    assert_int_equal(fstat(fd, &before), 0);
    open_metrics();
    assert_int_equal(stat(in_directory("metrics"), &after), 0);
    assert_true(before.st_ino != after.st_ino);
    close(fd);
}

static void test_other_layout_is_replaced(void **state)
{
    struct stat after;
    (void)state;

    open_metrics();
    metrics_add(METRIC_UNKNOWN_CALLS, 1000);
    metrics_close();
    int fd = open(in_directory("metrics"), O_WRONLY | O_CLOEXEC);
    assert_int_equal(pwrite(fd, "\x63", 1, 8), 1); /* layout 99 */
    close(fd);
    open_replacing();
    metrics_close();
    assert_int_equal(truncate(in_directory("metrics"), 4096), 0);
    open_replacing();
    assert_int_equal(stat(in_directory("metrics"), &after), 0);
    assert_int_equal(after.st_mode & 0777, 0600);
    /* The next one takes the new file as it is. */
    struct process p = start_process(7);
    assert_value("extract_processes", 2);
    assert_value("extract_unknown_calls_total", 7);
    end_process(p, 0);
}

/* The file as another version, which counts otherwise in the same places, would have left it. */
static void test_other_meaning_is_replaced(void **state)
{
    uint64_t fingerprint;
    (void)state;

    open_metrics();
    metrics_add(METRIC_UNKNOWN_CALLS, 1000);
    metrics_close();
    int fd = open(in_directory("metrics"), O_RDWR | O_CLOEXEC);
    assert_int_equal(pread(fd, &fingerprint, sizeof fingerprint, 16), sizeof fingerprint);
    assert_int_not_equal(fingerprint, 0);
    fingerprint ^= 1;
    assert_int_equal(pwrite(fd, &fingerprint, sizeof fingerprint, 16), sizeof fingerprint);
    close(fd);
    struct stat before, after;
    fd = open(in_directory("metrics"), O_RDONLY | O_CLOEXEC);
    assert_int_equal(fstat(fd, &before), 0);
    open_replacing();
    assert_value("extract_unknown_calls_total", 0);
    /* Who has the other one open goes on with it: it is as it was. */
    assert_int_equal(fstat(fd, &after), 0);
    assert_int_equal(before.st_size, after.st_size);
    assert_int_equal(after.st_nlink, 0);
    close(fd);
}

#define BUCKET(name, le) name "_bucket{le=\"" le "\"}"

static void test_histograms(void **state)
{
    static const char store[] = "extract_store_duration_seconds";
    (void)state;

    open_metrics();
    assert_value(BUCKET("extract_store_duration_seconds", "+Inf"), 0);
    metrics_observe(METRIC_STORE_DURATION, 0);
    metrics_observe(METRIC_STORE_DURATION, 1000); /* a bound belongs to its bucket */
    metrics_observe(METRIC_STORE_DURATION, 1001);
    metrics_observe(METRIC_STORE_DURATION, 10000000);
    metrics_observe(METRIC_STORE_DURATION, 10000001);
    assert_value(BUCKET("extract_store_duration_seconds", "0.001"), 2);
    assert_value(BUCKET("extract_store_duration_seconds", "0.0025"), 3);
    assert_value(BUCKET("extract_store_duration_seconds", "5"), 3);
    assert_value(BUCKET("extract_store_duration_seconds", "10"), 4);
    assert_value(BUCKET("extract_store_duration_seconds", "+Inf"), 5);
    assert_value("extract_store_duration_seconds_count", 5);
    assert_true(value_of("extract_store_duration_seconds_sum") == 20.002002);
    assert_true(value_of("extract_store_seconds_total") == 20.002002);
    assert_value("extract_gemini_duration_seconds_count", 0);
    metrics_observe(METRIC_GEMINI_DURATION, 250000);
    metrics_observe(METRIC_GEMINI_DURATION, 121000000);
    assert_value(BUCKET("extract_gemini_duration_seconds", "0.25"), 1);
    assert_value(BUCKET("extract_gemini_duration_seconds", "120"), 1);
    assert_value("extract_gemini_duration_seconds_count", 2);
    assert_value("extract_store_duration_seconds_count", 5);
    /* Bounds rise, and what is counted below them never falls. */
    double last = -1, bound = -1;
    for (const char *at = buf_str(&text); (at = strstr(at, store)) != NULL; at += sizeof store) {
        if (strncmp(at + sizeof store - 1, "_bucket{le=\"", 12) != 0)
            continue;
        double le = strtod(at + sizeof store + 11, NULL); /* infinite, too */
        double n = strtod(strchr(at, '}') + 1, NULL);
        assert_true(le > bound && n >= last);
        bound = le;
        last = n;
    }
    assert_true(last == 5);
}

static void test_histograms_of_processes_sum(void **state)
{
    (void)state;
    open_metrics();
    metrics_observe(METRIC_GEMINI_DURATION, 1500000);
    for (int i = 0; i < 2; i++) {
        pid_t pid = fork();
        if (pid == 0) {
            struct err err;
            if (metrics_open(directory, &err) == ERR_NONE)
                metrics_observe(METRIC_GEMINI_DURATION, 4000000);
            kill(getpid(), SIGKILL);
        }
        assert_int_equal(waitpid(pid, NULL, 0), pid);
    }
    assert_value(BUCKET("extract_gemini_duration_seconds", "2"), 1);
    assert_value(BUCKET("extract_gemini_duration_seconds", "5"), 3);
    assert_value("extract_gemini_duration_seconds_count", 3);
    assert_true(value_of("extract_gemini_duration_seconds_sum") == 9.5);
}

static void test_text(void **state)
{
    (void)state;
    open_metrics();
    metrics_add(METRIC_REQUESTS + ERR_NONE, 3);
    metrics_add(METRIC_REQUESTS + ERR_TOKEN_EXPIRED, 2);
    metrics_add(METRIC_ATTEMPTS + RETRY_RATE_LIMITED, 4);
    metrics_add(METRIC_TOKENS_INPUT, 1000);
    metrics_add(METRIC_TOKENS_TOTAL, 1100);
    metrics_add(METRIC_RETRIES + RETRY_RATE_LIMITED, 3);
    metrics_observe(METRIC_GEMINI_DURATION, 12034000);
    metrics_observe(METRIC_STORE_DURATION, 5000);
    metrics_add(METRIC_LOG_WRITTEN, 6);
    metrics_add(METRIC_HINT_WAITERS, 2);
    metrics_add(METRIC_HINT_WAITERS, -1);
    assert_value("extract_requests_total{code=\"success\"}", 3);
    assert_value("extract_requests_total{code=\"token_expired\"}", 2);
    assert_value("extract_requests_total{code=\"overloaded\"}", 0);
    assert_value("extract_attempts_total{class=\"rate_limited\"}", 4);
    assert_value("extract_attempts_total{class=\"success\"}", 0);
    assert_value("extract_retries_total{class=\"rate_limited\"}", 3);
    assert_value("extract_retries_total{class=\"success\"}", 0);
    assert_value("extract_tokens_total{kind=\"input\"}", 1000);
    assert_value("extract_tokens_total{kind=\"total\"}", 1100);
    assert_true(value_of("extract_gemini_seconds_total") == 12.034);
    assert_true(value_of("extract_store_seconds_total") == 0.005);
    assert_value("extract_log_entries_total", 6);
    assert_value("extract_log_entries_dropped_total", 0);
    assert_value("extract_unsettled_alarms_total", 0);
    assert_value("extract_hint_waiters", 1);
    assert_value("extract_build_info{version=\"" EXTRACT_VERSION "\"}", 1);
    const char *whole = buf_str(&text);
    assert_non_null(strstr(whole, "\n# TYPE extract_requests_total counter\n"));
    assert_non_null(strstr(whole, "\n# TYPE extract_requests_in_flight gauge\n"));
    assert_null(strstr(whole, "bad_value")); /* what a client never sees */
    assert_non_null(strstr(whole, "\n# TYPE extract_gemini_duration_seconds histogram\n"));
    /* Every series belongs to the family announced before it (a histogram has three). */
    const char *family = "";
    for (const char *line = whole + 1; *line != '\0'; line = strchr(line, '\n') + 1) {
        if (strncmp(line, "# TYPE ", 7) == 0)
            family = line + 7;
        else if (line[0] != '#')
            assert_memory_equal(line, family, strcspn(family, " "));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_private_until_opened, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_processes_sum, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_slots_are_used_again, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_processes_that_start_together, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_all_slots_taken, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_foreign_file_is_refused, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_other_layout_is_replaced, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_other_meaning_is_replaced, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_histograms, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_histograms_of_processes_sum, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_text, set_up, tear_down),
    };
    alarm(120);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    buf_reset(&text);
    return failed;
}
