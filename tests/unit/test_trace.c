/* test_trace.c - traceparent and tracestate: what is taken over, what is as good as none, what is sent. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "trace.h"

#define ID "4bf92f3577b34da6a3ce929d0e0e4736"
#define SPAN "00f067aa0ba902b7"
#define ZERO_ID "00000000000000000000000000000000"
#define ZERO_SPAN "0000000000000000"

static void test_parent(void **state)
{
    static const struct {
        const char *parent;
        const char *id; /* NULL: as good as none */
        unsigned flags;
    } cases[] = {
        {"00-" ID "-" SPAN "-01", ID, 1},
        {"00-" ID "-" SPAN "-00", ID, 0},
        {"00-" ID "-" SPAN "-02", ID, 2},
        {"00-" ID "-" SPAN "-03", ID, 3},
        {"00-" ID "-" SPAN "-ff", ID, 3}, /* flags that nobody knows are sent as zero */
        {"00-" ID "-" SPAN "-f8", ID, 0},
        {"00-00000000000000000000000000000001-0000000000000001-00",
         "00000000000000000000000000000001", 0},
        {"00-ffffffffffffffffffffffffffffffff-ffffffffffffffff-01",
         "ffffffffffffffffffffffffffffffff", 1},

        /* higher versions: what 00 has, and anything behind another dash */
        {"01-" ID "-" SPAN "-01", ID, 1},
        {"cc-" ID "-" SPAN "-03", ID, 1},
        {"01-" ID "-" SPAN "-01-", ID, 1},
        {"fe-" ID "-" SPAN "-01-what the future brings, \xFF", ID, 1},
        {"01-" ID "-" SPAN "-01.", NULL, 0},
        {"01-" ID "-" SPAN "-011", NULL, 0},
        {"01-" ID "-" SPAN "-01 ", NULL, 0},
        {"01-" ID "-" SPAN "-0", NULL, 0},
        {"01-" ZERO_ID "-" SPAN "-01", NULL, 0},

        {"ff-" ID "-" SPAN "-01", NULL, 0},
        {"ff-" ID "-" SPAN "-01-x", NULL, 0},
        {"FE-" ID "-" SPAN "-01", NULL, 0},
        {"0g-" ID "-" SPAN "-01", NULL, 0},
        {".0-" ID "-" SPAN "-01", NULL, 0},
        {"0-" ID "-" SPAN "-01-", NULL, 0},

        /* 00 has 55 characters */
        {"00-" ID "-" SPAN "-01-", NULL, 0},
        {"00-" ID "-" SPAN "-01-x", NULL, 0},
        {"00-" ID "-" SPAN "-011", NULL, 0},
        {"00-" ID "-" SPAN "-0", NULL, 0},
        {"00-" ID "-" SPAN "-", NULL, 0},
        {"00-" ID "-" SPAN, NULL, 0},
        {"00-" ID "-" SPAN "-01 ", NULL, 0},
        {" 00-" ID "-" SPAN "-01", NULL, 0},
        {"00-" ID "-" SPAN "-01, 00-" ID "-" SPAN "-01", NULL, 0},
        {"00", NULL, 0},
        {"0", NULL, 0},
        {"", NULL, 0},
        {NULL, NULL, 0},

        {"00-" ZERO_ID "-" SPAN "-01", NULL, 0},
        {"00-" ID "-" ZERO_SPAN "-01", NULL, 0},
        {"00-4BF92f3577b34da6a3ce929d0e0e4736-" SPAN "-01", NULL, 0},
        {"00-" ID "-00F067aa0ba902b7-01", NULL, 0},
        {"00-" ID "-" SPAN "-0A", NULL, 0},
        {"00-" ID "-" SPAN "-A0", NULL, 0},
        {"00-gbf92f3577b34da6a3ce929d0e0e4736-" SPAN "-01", NULL, 0},
        {"00-4bf92f3577b34da6a3ce929d0e0e473.-" SPAN "-01", NULL, 0},
        {"00-" ID "-.0f067aa0ba902b7-01", NULL, 0},
        {"00-" ID "-" SPAN "-.0", NULL, 0},
        {"00-" ID "-" SPAN "-0.", NULL, 0},

        /* dashes where they belong */
        {"00_" ID "-" SPAN "-01", NULL, 0},
        {"00-" ID "_" SPAN "-01", NULL, 0},
        {"00-" ID "-" SPAN "_01", NULL, 0},
        {"000" ID "-" SPAN "-01", NULL, 0},
        {"00-" ID "0" SPAN "-01", NULL, 0},
        {"00-" ID "-" SPAN "001", NULL, 0},
    };
    struct trace trace;
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        memset(&trace, 'x', sizeof trace);
        bool read = trace_read(&trace, cases[i].parent, "a=1");
        if (read != (cases[i].id != NULL))
            fail_msg("%s: %d", cases[i].parent, read);
        assert_string_equal(trace.id, read ? cases[i].id : "");
        assert_int_equal(trace.flags, cases[i].flags);
        assert_int_equal(trace.state != NULL, read);
    }
}

static void test_state(void **state)
{
    static const char parent[] = "00-" ID "-" SPAN "-01";
    static const char *const kept[] = {"a=1", "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE",
                                       "a=1, b=2 ,\tc=~!", "x"};
    static const char *const left_out[] = {"",     "a=\x7F",     "a=1\r\nX-Evil: 1",
                                           "a=\n", "a=\xC3\xA9", "\x01"};
    char text[TRACE_STATE_MAX + 2];
    struct trace trace;
    (void)state;

    for (size_t i = 0; i < sizeof kept / sizeof kept[0]; i++) {
        assert_true(trace_read(&trace, parent, kept[i]));
        assert_ptr_equal(trace.state, kept[i]);
    }
    for (size_t i = 0; i < sizeof left_out / sizeof left_out[0]; i++) {
        assert_true(trace_read(&trace, parent, left_out[i]));
        assert_null(trace.state);
    }
    assert_true(trace_read(&trace, parent, NULL));
    assert_null(trace.state);

    memset(text, 'a', sizeof text);
    text[TRACE_STATE_MAX] = '\0';
    assert_true(trace_read(&trace, parent, text));
    assert_ptr_equal(trace.state, text);
    text[TRACE_STATE_MAX] = 'a';
    text[TRACE_STATE_MAX + 1] = '\0';
    assert_true(trace_read(&trace, parent, text));
    assert_null(trace.state);
}

/* What is sent can be read again, and has another span each time. */
static void test_sent(void **state)
{
    static const char *const parents[] = {"00-" ID "-" SPAN "-01", "00-" ID "-" SPAN "-00",
                                          "00-" ID "-" SPAN "-03", "01-" ID "-" SPAN "-01-x"};
    char sent[TRACE_PARENT_SIZE], before[TRACE_PARENT_SIZE] = "";
    struct trace trace, again;
    (void)state;

    for (size_t i = 0; i < 1000; i++) {
        const char *parent = parents[i % 4];
        assert_true(trace_read(&trace, parent, NULL));
        trace_parent(&trace, sent);
        assert_true(trace_read(&again, sent, NULL));
        assert_string_equal(again.id, ID);
        assert_int_equal(again.flags, trace.flags);
        assert_int_equal(strncmp(sent, "00-", 3), 0);
        assert_int_not_equal(strncmp(sent + 36, parent + 36, 16), 0);
        assert_int_not_equal(strncmp(sent + 36, before + 36, 16), 0);
        memcpy(before, sent, sizeof before);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_parent),
        cmocka_unit_test(test_state),
        cmocka_unit_test(test_sent),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
