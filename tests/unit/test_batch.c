/* test_batch.c - what waits together travels together, and nobody waits for ever. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "batch.h"
#include "clock.h"

#define NEVER INT64_MAX
#define AN_HOUR 3600000
#define RUNS_MAX 64

struct item {
    int runs;
    bool is_bad;
    enum err_code code;
    pthread_t thread; /* that ran it */
};

/* The far end: counts runs, and holds them back while the gate is closed. */
struct far_end {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int open; /* so many runs may still pass; -1: all */
    int inside, most_inside;
    int runs;
    size_t sizes[RUNS_MAX];
};

static void far_end_init(struct far_end *f, int open)
{
    *f = (struct far_end){.open = open};
    pthread_mutex_init(&f->lock, NULL);
    pthread_cond_init(&f->changed, NULL);
}

static void run_items(void *context, void **items, size_t count)
{
    struct far_end *f = context;

    pthread_mutex_lock(&f->lock);
    if (f->runs < RUNS_MAX)
        f->sizes[f->runs] = count;
    f->runs++;
    if (++f->inside > f->most_inside)
        f->most_inside = f->inside;
    pthread_cond_broadcast(&f->changed);
    while (f->open == 0)
        pthread_cond_wait(&f->changed, &f->lock);
    if (f->open > 0)
        f->open--;
    f->inside--;
    pthread_mutex_unlock(&f->lock);
    for (size_t i = 0; i < count; i++) {
        struct item *item = items[i];
        item->runs++;
        item->code = item->is_bad ? ERR_BAD_VALUE : ERR_NONE;
        item->thread = pthread_self();
    }
}

static void let_pass(struct far_end *f, int runs)
{
    pthread_mutex_lock(&f->lock);
    f->open = runs;
    pthread_cond_broadcast(&f->changed);
    pthread_mutex_unlock(&f->lock);
}

static void await_inside(struct far_end *f, int runs, int inside)
{
    pthread_mutex_lock(&f->lock);
    while (f->runs < runs || f->inside < inside)
        pthread_cond_wait(&f->changed, &f->lock);
    pthread_mutex_unlock(&f->lock);
}

/* A thread that submits its items once. */
struct caller {
    struct batch *batch;
    struct item items[BATCH_MAX + 1];
    size_t count, ran;
    int64_t deadline_ms;
    enum err_code code;
    pthread_t thread;
    _Atomic pid_t tid;
    atomic_bool returned;
};

static void *call(void *arg)
{
    struct caller *c = arg;
    void *items[BATCH_MAX + 1];

    for (size_t i = 0; i < c->count; i++)
        items[i] = &c->items[i];
    atomic_store(&c->tid, gettid());
    c->code = batch_submit(c->batch, items, c->count, c->deadline_ms, &c->ran);
    atomic_store(&c->returned, true);
    return NULL;
}

static bool sleeps(pid_t tid)
{
    char path[64], state = '?';

    snprintf(path, sizeof path, "/proc/self/task/%d/stat", (int)tid);
    FILE *stat = fopen(path, "r");
    if (stat == NULL)
        return false;
    if (fscanf(stat, "%*d (%*[^)]) %c", &state) != 1)
        state = '?';
    fclose(stat);
    return state == 'S';
}

/* Starts a caller and comes back when it waits: asleep, and still so a moment later. */
static void start(struct caller *c, struct batch *batch, size_t count, int64_t deadline_ms)
{
    *c = (struct caller){.batch = batch, .count = count, .deadline_ms = deadline_ms};
    assert_int_equal(pthread_create(&c->thread, NULL, call, c), 0);
    for (int asleep = 0; asleep < 3;) {
        usleep(500);
        pid_t tid = atomic_load(&c->tid);
        asleep = tid != 0 && sleeps(tid) ? asleep + 1 : 0;
    }
}

static void join(struct caller *c)
{
    pthread_join(c->thread, NULL);
}

static struct batch *new_patient_batch(int leaders, int64_t patience_ms, struct far_end *f)
{
    struct batch *batch =
        batch_new(leaders, (struct batch_times){.patience_ms = patience_ms}, run_items, f);
    assert_non_null(batch);
    return batch;
}

/* Where it gathers it does so until a run is full. */
static struct batch *new_gathering_batch(int leaders, struct far_end *f)
{
    struct batch *batch = batch_new(
        leaders, (struct batch_times){.gather_ms = AN_HOUR, .lately_ms = AN_HOUR}, run_items, f);
    assert_non_null(batch);
    return batch;
}

static struct batch *new_batch(int leaders, struct far_end *f)
{
    return new_patient_batch(leaders, 0, f);
}

static void test_lone_item_goes_at_once(void **state)
{
    struct far_end f;
    struct item item = {0};
    void *items[] = {&item};
    size_t ran = 0;
    (void)state;

    far_end_init(&f, -1);
    struct batch *batch = new_batch(1, &f);
    /* A deadline in the past bounds waiting only. */
    assert_int_equal(batch_submit(batch, items, 1, 0, &ran), ERR_NONE);
    assert_int_equal(ran, 1);
    assert_int_equal(item.runs, 1);
    assert_true(pthread_equal(item.thread, pthread_self()));
    assert_int_equal(batch_submit(batch, items, 0, 0, NULL), ERR_NONE);
    assert_int_equal(f.runs, 1);
    batch_free(batch);
}

static void test_waiting_items_travel_together(void **state)
{
    struct far_end f;
    struct caller first, *waiting = calloc(10, sizeof *waiting);
    (void)state;

    far_end_init(&f, 0);
    struct batch *batch = new_batch(1, &f);
    start(&first, batch, 1, NEVER);
    for (int i = 0; i < 10; i++)
        start(&waiting[i], batch, 1, NEVER);
    let_pass(&f, -1);
    join(&first);
    for (int i = 0; i < 10; i++) {
        join(&waiting[i]);
        assert_int_equal(waiting[i].code, ERR_NONE);
        assert_int_equal(waiting[i].items[0].runs, 1);
        /* The first that waited leads. */
        assert_true(pthread_equal(waiting[i].items[0].thread, waiting[0].thread));
    }
    assert_int_equal(f.runs, 2);
    assert_int_equal(f.sizes[1], 10);
    batch_free(batch);
    free(waiting);
}

static void test_65_need_two_runs(void **state)
{
    struct far_end f;
    struct caller first, *waiting = calloc(BATCH_MAX + 1, sizeof *waiting);
    (void)state;

    far_end_init(&f, 0);
    struct batch *batch = new_batch(1, &f);
    start(&first, batch, 1, NEVER);
    for (int i = 0; i <= BATCH_MAX; i++)
        start(&waiting[i], batch, 1, NEVER);
    let_pass(&f, -1);
    join(&first);
    for (int i = 0; i <= BATCH_MAX; i++) {
        join(&waiting[i]);
        assert_int_equal(waiting[i].items[0].runs, 1);
    }
    assert_int_equal(f.runs, 3);
    assert_int_equal(f.sizes[1], BATCH_MAX);
    assert_int_equal(f.sizes[2], 1);
    batch_free(batch);
    free(waiting);
}

static void test_one_caller_with_65(void **state)
{
    struct far_end f;
    struct caller *c = calloc(1, sizeof *c);
    (void)state;

    far_end_init(&f, -1);
    struct batch *batch = new_batch(1, &f);
    c->batch = batch;
    c->count = BATCH_MAX + 1;
    c->deadline_ms = NEVER;
    call(c);
    assert_int_equal(c->code, ERR_NONE);
    assert_int_equal(c->ran, BATCH_MAX + 1);
    assert_int_equal(f.runs, 2);
    assert_int_equal(f.sizes[0], BATCH_MAX);
    /* With its deadline gone by, what is not yet taken is not run. */
    c->deadline_ms = 0;
    call(c);
    assert_int_equal(c->code, ERR_STORE_UNAVAILABLE);
    assert_int_equal(c->ran, BATCH_MAX);
    assert_int_equal(c->items[BATCH_MAX].runs, 1);
    /* And its place is free again. */
    c->count = 1;
    call(c);
    assert_int_equal(c->code, ERR_NONE);
    batch_free(batch);
    free(c);
}

static void test_callers_are_not_split(void **state)
{
    struct far_end f;
    struct caller first, *waiting = calloc(3, sizeof *waiting);
    (void)state;

    far_end_init(&f, 0);
    struct batch *batch = new_batch(1, &f);
    start(&first, batch, 1, NEVER);
    for (int i = 0; i < 3; i++)
        start(&waiting[i], batch, 30, NEVER);
    let_pass(&f, -1);
    join(&first);
    for (int i = 0; i < 3; i++)
        join(&waiting[i]);
    assert_int_equal(f.runs, 3);
    assert_int_equal(f.sizes[1], 60);
    assert_int_equal(f.sizes[2], 30);
    batch_free(batch);
    free(waiting);
}

static void test_waiter_leaves_at_its_deadline(void **state)
{
    struct far_end f;
    struct caller first, *late = calloc(1, sizeof *late), *patient = calloc(1, sizeof *patient);
    (void)state;

    far_end_init(&f, 0);
    struct batch *batch = new_batch(1, &f);
    start(&first, batch, 1, NEVER);
    int64_t deadline_ms = clock_monotonic_ms() + 100;
    start(late, batch, 1, deadline_ms);
    start(patient, batch, 1, NEVER);
    join(late); /* while the first run is still under way */
    assert_true(clock_monotonic_ms() >= deadline_ms);
    assert_int_equal(late->code, ERR_STORE_UNAVAILABLE);
    assert_int_equal(late->ran, 0);
    let_pass(&f, -1);
    join(&first);
    join(patient);
    assert_int_equal(patient->code, ERR_NONE);
    assert_int_equal(late->items[0].runs, 0);
    assert_int_equal(f.sizes[1], 1);
    batch_free(batch);
    free(late);
    free(patient);
}

static void test_taken_item_stays_past_its_deadline(void **state)
{
    struct far_end f;
    struct caller first, *leader = calloc(1, sizeof *leader), *carried = calloc(1, sizeof *carried);
    (void)state;

    far_end_init(&f, 0);
    struct batch *batch = new_batch(1, &f);
    start(&first, batch, 1, NEVER);
    start(leader, batch, 1, NEVER);
    int64_t deadline_ms = clock_monotonic_ms() + 300;
    start(carried, batch, 1, deadline_ms);
    let_pass(&f, 1);
    await_inside(&f, 2, 1);
    assert_int_equal(f.sizes[1], 2);
    clock_sleep_until(deadline_ms + 50);
    assert_false(atomic_load(&carried->returned));
    let_pass(&f, -1);
    join(&first);
    join(leader);
    join(carried);
    assert_int_equal(carried->code, ERR_NONE);
    assert_int_equal(carried->items[0].runs, 1);
    batch_free(batch);
    free(leader);
    free(carried);
}

static void test_as_many_leaders_as_places(void **state)
{
    struct far_end f;
    struct caller *c = calloc(4, sizeof *c);
    (void)state;

    far_end_init(&f, 0);
    struct batch *batch = new_batch(2, &f);
    for (int i = 0; i < 4; i++)
        start(&c[i], batch, 1, NEVER);
    await_inside(&f, 2, 2);
    assert_int_equal(f.runs, 2);
    let_pass(&f, -1);
    for (int i = 0; i < 4; i++)
        join(&c[i]);
    assert_int_equal(f.most_inside, 2);
    /* The two that waited travelled together, or the second place took one of them. */
    assert_in_range(f.runs, 3, 4);
    batch_free(batch);
    free(c);
}

/* A place is free, but what waits may as well travel with the next run. */
static void test_none_begins_beside_one_that_is_quick(void **state)
{
    struct far_end f;
    struct caller *c = calloc(4, sizeof *c);
    (void)state;

    far_end_init(&f, 0);
    struct batch *batch = new_patient_batch(3, 3600000, &f);
    for (int i = 0; i < 4; i++)
        start(&c[i], batch, 1, NEVER);
    await_inside(&f, 1, 1);
    assert_int_equal(f.runs, 1);
    let_pass(&f, -1);
    for (int i = 0; i < 4; i++) {
        join(&c[i]);
        assert_int_equal(c[i].code, ERR_NONE);
    }
    assert_int_equal(f.most_inside, 1);
    assert_int_equal(f.runs, 2);
    assert_int_equal(f.sizes[1], 3);
    batch_free(batch);
    free(c);
}

/* The first never ends by itself: who waits begins beside it, one after the other, as places are left. */
static void test_one_that_is_held_up_holds_up_nobody(void **state)
{
    struct far_end f;
    struct caller *c = calloc(4, sizeof *c);
    (void)state;

    far_end_init(&f, 0);
    struct batch *batch = new_patient_batch(3, 5, &f);
    start(&c[0], batch, 1, NEVER);
    for (int i = 1; i < 3; i++) {
        start(&c[i], batch, 1, NEVER);
        await_inside(&f, i + 1, i + 1);
    }
    int64_t deadline_ms = clock_monotonic_ms() + 100;
    start(&c[3], batch, 1, deadline_ms); /* no place is left for it */
    join(&c[3]);
    assert_int_equal(c[3].code, ERR_STORE_UNAVAILABLE);
    assert_int_equal(c[3].items[0].runs, 0);
    let_pass(&f, -1);
    for (int i = 0; i < 3; i++) {
        join(&c[i]);
        assert_int_equal(c[i].code, ERR_NONE);
    }
    assert_int_equal(f.runs, 3);
    batch_free(batch);
    free(c);
}

static void test_many_wait_for_more(void **state)
{
    struct far_end f;
    struct caller *c = calloc(3, sizeof *c);
    (void)state;

    far_end_init(&f, -1);
    struct batch *batch = new_gathering_batch(1, &f);
    c[0] = (struct caller){.batch = batch, .count = BATCH_MANY, .deadline_ms = NEVER};
    call(&c[0]); /* nobody came before: at once */
    assert_int_equal(f.runs, 1);
    start(&c[1], batch, 1, NEVER);
    assert_int_equal(f.runs, 1);
    start(&c[2], batch, BATCH_MAX - 2, NEVER);
    assert_int_equal(f.runs, 1);
    c[0].count = 1; /* the last that has room */
    call(&c[0]);
    join(&c[1]);
    join(&c[2]);
    assert_int_equal(f.runs, 2);
    assert_int_equal(f.sizes[1], BATCH_MAX);
    batch_free(batch);
    free(c);
}

static void test_long_ago_is_over(void **state)
{
    struct far_end f;
    struct caller *c = calloc(1, sizeof *c);
    (void)state;

    far_end_init(&f, -1);
    struct batch *batch =
        batch_new(1, (struct batch_times){.gather_ms = AN_HOUR, .lately_ms = 1}, run_items, &f);
    *c = (struct caller){.batch = batch, .count = BATCH_MANY, .deadline_ms = NEVER};
    call(c);
    clock_sleep_until(clock_monotonic_ms() + 1);
    call(c); /* at once: nobody else comes */
    assert_int_equal(f.runs, 2);
    batch_free(batch);
    free(c);
}

/* The deadline of one that leads is also its own. */
static void test_none_waits_beyond_its_deadline(void **state)
{
    struct far_end f;
    struct caller *c = calloc(1, sizeof *c);
    (void)state;

    far_end_init(&f, -1);
    struct batch *batch = new_gathering_batch(1, &f);
    *c = (struct caller){.batch = batch, .count = BATCH_MANY, .deadline_ms = NEVER};
    call(c);
    c->count = 1;
    c->deadline_ms = clock_monotonic_ms() + 2;
    call(c);
    assert_int_equal(c->code, ERR_NONE);
    assert_int_equal(f.runs, 2);
    batch_free(batch);
    free(c);
}

static void test_few_do_not_wait(void **state)
{
    struct far_end f;
    struct caller *c = calloc(1, sizeof *c);
    (void)state;

    far_end_init(&f, -1);
    struct batch *batch = new_gathering_batch(1, &f);
    *c = (struct caller){.batch = batch, .count = BATCH_MANY - 1, .deadline_ms = NEVER};
    for (int i = 0; i < 3; i++)
        call(c);
    assert_int_equal(f.runs, 3);
    batch_free(batch);
    free(c);
}

static void test_nothing_left_after_gathering(void **state)
{
    struct far_end f;
    struct caller *c = calloc(5, sizeof *c);
    (void)state;

    far_end_init(&f, -1);
    struct batch *batch = new_gathering_batch(2, &f);
    c[0] = (struct caller){.batch = batch, .count = BATCH_MANY, .deadline_ms = NEVER};
    call(&c[0]);
    start(&c[1], batch, 1, NEVER); /* these two hold a place each */
    start(&c[2], batch, 1, NEVER);
    c[0].count = BATCH_MAX - 2;
    call(&c[0]);
    join(&c[1]);
    join(&c[2]);
    assert_int_equal(f.runs, 2);
    assert_int_equal(f.sizes[1], BATCH_MAX);
    let_pass(&f, 0);
    start(&c[3], batch, BATCH_MAX, NEVER); /* full at once; both places are free again */
    start(&c[4], batch, BATCH_MAX, NEVER);
    await_inside(&f, 4, 2);
    let_pass(&f, -1);
    join(&c[3]);
    join(&c[4]);
    batch_free(batch);
    free(c);
}

static void test_one_fails_alone(void **state)
{
    struct far_end f;
    struct item items[3] = {{0}, {.is_bad = true}, {0}};
    void *pointers[] = {&items[0], &items[1], &items[2]};
    (void)state;

    far_end_init(&f, -1);
    struct batch *batch = new_batch(1, &f);
    assert_int_equal(batch_submit(batch, pointers, 3, NEVER, NULL), ERR_NONE);
    assert_int_equal(f.runs, 1);
    assert_int_equal(items[0].code, ERR_NONE);
    assert_int_equal(items[1].code, ERR_BAD_VALUE);
    assert_int_equal(items[2].code, ERR_NONE);
    batch_free(batch);
}

/* Many threads with short deadlines: each item runs exactly once or, if its caller left, never. */
#define STRESS_THREADS 16
#define STRESS_CALLS 3000
#define STRESS_LEADERS 2

struct stress {
    struct batch *batch;
    atomic_int inside, too_many, wrong, ran, left;
    atomic_bool meet; /* a run waits until there are as many as places */
};

static void run_stress(void *context, void **items, size_t count)
{
    struct stress *s = context;

    if (atomic_fetch_add(&s->inside, 1) >= STRESS_LEADERS || count == 0 || count > BATCH_MAX)
        atomic_fetch_add(&s->too_many, 1);
    for (size_t i = 0; i < count; i++)
        ((struct item *)items[i])->runs++;
    while (atomic_load(&s->meet) && atomic_load(&s->inside) < STRESS_LEADERS)
        usleep(100);
    atomic_store(&s->meet, false);
    if (clock_random() % 4 == 0) /* until the next millisecond: runs end at the same moment */
        clock_sleep_until(clock_monotonic_ms() + 1);
    atomic_fetch_sub(&s->inside, 1);
}

static void *stress(void *arg)
{
    struct stress *s = arg;

    for (int i = 0; i < STRESS_CALLS; i++) {
        struct item items[3] = {{0}};
        void *pointers[] = {&items[0], &items[1], &items[2]};
        uint64_t random = clock_random();
        size_t count = 1 + random % 3, ran = 99;
        int64_t deadline_ms = clock_monotonic_ms() + (int64_t)(random >> 8) % 3;
        enum err_code code = batch_submit(s->batch, pointers, count, deadline_ms, &ran);
        for (size_t k = 0; k < count; k++)
            if (items[k].runs != (code == ERR_NONE))
                atomic_fetch_add(&s->wrong, 1);
        if (ran != (code == ERR_NONE ? count : 0))
            atomic_fetch_add(&s->wrong, 1);
        atomic_fetch_add(code == ERR_NONE ? &s->ran : &s->left, 1);
    }
    return NULL;
}

static void *submit_one(void *arg)
{
    struct stress *s = arg;
    struct item item = {0};
    void *pointers[] = {&item};

    if (batch_submit(s->batch, pointers, 1, NEVER, NULL) != ERR_NONE)
        atomic_fetch_add(&s->wrong, 1);
    return NULL;
}

static void stress_with(struct batch_times times)
{
    struct stress s = {0};
    pthread_t threads[STRESS_THREADS];

    s.batch = batch_new(STRESS_LEADERS, times, run_stress, &s);
    assert_non_null(s.batch);
    for (int i = 0; i < STRESS_THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, stress, &s), 0);
    for (int i = 0; i < STRESS_THREADS; i++)
        pthread_join(threads[i], NULL);
    assert_int_equal(atomic_load(&s.wrong), 0);
    assert_int_equal(atomic_load(&s.too_many), 0);
    assert_int_equal(atomic_load(&s.ran) + atomic_load(&s.left), STRESS_THREADS * STRESS_CALLS);
    assert_true(atomic_load(&s.ran) > 0);
    /* No place was lost on the way. */
    atomic_store(&s.meet, true);
    for (int i = 0; i < STRESS_LEADERS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, submit_one, &s), 0);
    for (int i = 0; i < STRESS_LEADERS; i++)
        pthread_join(threads[i], NULL);
    assert_int_equal(atomic_load(&s.wrong), 0);
    batch_free(s.batch);
}

static void test_stress(void **state)
{
    (void)state;
    stress_with((struct batch_times){0});
}

static void test_stress_with_patience(void **state)
{
    (void)state;
    stress_with((struct batch_times){.patience_ms = 2});
}

static void test_stress_while_gathering(void **state)
{
    (void)state;
    stress_with((struct batch_times){.patience_ms = 2, .gather_ms = 1, .lately_ms = 2});
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lone_item_goes_at_once),
        cmocka_unit_test(test_waiting_items_travel_together),
        cmocka_unit_test(test_65_need_two_runs),
        cmocka_unit_test(test_one_caller_with_65),
        cmocka_unit_test(test_callers_are_not_split),
        cmocka_unit_test(test_waiter_leaves_at_its_deadline),
        cmocka_unit_test(test_taken_item_stays_past_its_deadline),
        cmocka_unit_test(test_as_many_leaders_as_places),
        cmocka_unit_test(test_none_begins_beside_one_that_is_quick),
        cmocka_unit_test(test_one_that_is_held_up_holds_up_nobody),
        cmocka_unit_test(test_many_wait_for_more),
        cmocka_unit_test(test_long_ago_is_over),
        cmocka_unit_test(test_none_waits_beyond_its_deadline),
        cmocka_unit_test(test_few_do_not_wait),
        cmocka_unit_test(test_nothing_left_after_gathering),
        cmocka_unit_test(test_one_fails_alone),
        cmocka_unit_test(test_stress),
        cmocka_unit_test(test_stress_with_patience),
        cmocka_unit_test(test_stress_while_gathering),
    };
    alarm(120); /* a lost wake-up shall fail, not hang */
    return cmocka_run_group_tests(tests, NULL, NULL);
}
