/* test_share.c - how many workers one company may hold. */
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "share.h"

static void test_share(void **state)
{
    struct share *share = share_new(2);
    (void)state;

    assert_non_null(share);
    assert_true(share_enter(share, "a"));
    assert_true(share_enter(share, "a"));
    assert_false(share_enter(share, "a"));
    assert_true(share_enter(share, "b")); /* another company's share is its own */
    assert_true(share_enter(share, "aa"));
    assert_true(share_enter(share, ""));
    share_leave(share, "a");
    assert_true(share_enter(share, "a")); /* a refusal takes no place */
    assert_false(share_enter(share, "a"));
    share_leave(share, "a");
    share_leave(share, "a");
    share_leave(share, "b"); /* the last of a company in the midst of others */
    assert_true(share_enter(share, "b"));
    assert_true(share_enter(share, "a"));
    assert_true(share_enter(share, "a"));
    assert_false(share_enter(share, "a"));
    assert_true(share_enter(share, "aa"));
    assert_false(share_enter(share, "aa"));
    share_leave(share, "never came");
    share_free(share); /* with holders left */
    share_free(NULL);
}

static void test_at_least_one(void **state)
{
    (void)state;
    for (int most = -1; most <= 1; most++) {
        struct share *share = share_new(most);
        assert_non_null(share);
        assert_true(share_enter(share, "a"));
        assert_false(share_enter(share, "a"));
        share_leave(share, "a");
        assert_true(share_enter(share, "a"));
        share_free(share);
    }
}

/* ---- many threads ---- */

#define MOST 3

struct crowd {
    struct share *share;
    atomic_int inside[2], most[2], entered[2];
};

static void *come_and_go(void *context)
{
    static const char *const names[] = {"a", "b"};
    struct crowd *crowd = context;

    for (int i = 0; i < 4000; i++) {
        int which = i % 2;
        if (!share_enter(crowd->share, names[which]))
            continue;
        int now = atomic_fetch_add(&crowd->inside[which], 1) + 1;
        int most = atomic_load(&crowd->most[which]);
        while (now > most && !atomic_compare_exchange_weak(&crowd->most[which], &most, now))
            ;
        atomic_fetch_add(&crowd->entered[which], 1);
        sched_yield();
        atomic_fetch_sub(&crowd->inside[which], 1);
        share_leave(crowd->share, names[which]);
    }
    return NULL;
}

static void test_threads(void **state)
{
    struct crowd crowd = {.share = share_new(MOST)};
    pthread_t threads[8];
    (void)state;

    assert_non_null(crowd.share);
    for (size_t i = 0; i < 8; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, come_and_go, &crowd), 0);
    for (size_t i = 0; i < 8; i++)
        assert_int_equal(pthread_join(threads[i], NULL), 0);
    for (int i = 0; i < 2; i++) {
        assert_true(atomic_load(&crowd.entered[i]) > 0);
        assert_in_range(atomic_load(&crowd.most[i]), 1, MOST);
    }
    for (int i = 0; i < MOST; i++) /* all have left */
        assert_true(share_enter(crowd.share, "a"));
    assert_false(share_enter(crowd.share, "a"));
    share_free(crowd.share);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_share),
        cmocka_unit_test(test_at_least_one),
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
