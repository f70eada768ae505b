/* test_rate.c - requests a minute of a key, over processes. Time is the tests' own. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "rate.h"

static char directory[] = "/tmp/test_rate.XXXXXX";
static char path[64];

static int set_up_all(void **state)
{
    (void)state;
    if (mkdtemp(directory) == NULL)
        return -1;
    snprintf(path, sizeof path, "%s/rates", directory);
    return 0;
}

static int tear_down_all(void **state)
{
    (void)state;
    return rmdir(directory);
}

static int remove_file(void **state)
{
    (void)state;
    unlink(path);
    return 0;
}

static struct rate *open_rate(int per_minute)
{
    struct err err = {0};
    struct rate *rate = rate_open(directory, per_minute, &err);

    if (rate == NULL)
        fail_msg("%s", err.message);
    return rate;
}

static void a_minutes_requests_may_come_at_once(void **state)
{
    struct rate *rate = open_rate(60);

    (void)state;
    for (int i = 0; i < 60; i++)
        assert_int_equal(rate_take(rate, "a", 5000000), 0);
    assert_int_equal(rate_take(rate, "a", 5000000), 1000);
    assert_int_equal(rate_take(rate, "a", 5000400), 600);
    assert_int_equal(rate_take(rate, "b", 5000000), 0); /* another key's bucket is its own */
    /* then one a second */
    assert_int_equal(rate_take(rate, "a", 5001000), 0);
    assert_int_equal(rate_take(rate, "a", 5001000), 1000);
    /* a refusal takes nothing, and a minute fills it again */
    for (int i = 0; i < 60; i++)
        assert_int_equal(rate_take(rate, "a", 5061000), 0);
    assert_true(rate_take(rate, "a", 5061000) > 0);
    rate_close(rate);
}

static void processes_share_the_buckets(void **state)
{
    struct rate *one = open_rate(2), *two = open_rate(2);
    struct stat st;

    (void)state;
    assert_int_equal(rate_take(one, "a", 1000000), 0);
    assert_int_equal(rate_take(two, "a", 1000000), 0);
    assert_int_equal(rate_take(one, "a", 1000000), 30000);
    assert_int_equal(rate_take(two, "a", 1000000), 30000);
    rate_close(one);
    rate_close(two);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0600);
    one = open_rate(2); /* a process that starts anew */
    assert_int_equal(rate_take(one, "a", 1000000), 30000);
    rate_close(one);
}

static void a_file_from_before_a_restart_refuses_nobody(void **state)
{
    struct rate *rate = open_rate(1);

    (void)state;
    assert_int_equal(rate_take(rate, "a", 900000000), 0);
    assert_int_equal(rate_take(rate, "a", 900000000), 60000);
    assert_int_equal(rate_take(rate, "a", 1000), 0); /* time began anew */
    assert_int_equal(rate_take(rate, "a", 1000), 60000);
    rate_close(rate);
}

static void without_a_limit_there_is_no_file(void **state)
{
    struct rate *rate = open_rate(0);

    (void)state;
    for (int i = 0; i < 1000; i++)
        assert_int_equal(rate_take(rate, "a", 1), 0);
    rate_close(rate);
    assert_int_not_equal(access(path, F_OK), 0);
}

static void a_directory_that_is_not_there_is_named(void **state)
{
    struct err err = {0};

    (void)state;
    assert_null(rate_open("/nowhere/at/all", 1, &err));
    assert_int_equal(err.code, ERR_CONFIG);
    assert_string_equal(err.message,
                        "server.runtime_dir: cannot use /nowhere/at/all/rates: No such "
                        "file or directory");
    assert_int_equal(symlink("/etc/hostname", path), 0);
    assert_null(rate_open(directory, 1, &err));
    rate_close(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(a_minutes_requests_may_come_at_once, remove_file),
        cmocka_unit_test_teardown(processes_share_the_buckets, remove_file),
        cmocka_unit_test_teardown(a_file_from_before_a_restart_refuses_nobody, remove_file),
        cmocka_unit_test_teardown(without_a_limit_there_is_no_file, remove_file),
        cmocka_unit_test_teardown(a_directory_that_is_not_there_is_named, remove_file),
    };
    return cmocka_run_group_tests(tests, set_up_all, tear_down_all);
}
