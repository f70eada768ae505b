/* test_terminal.c - when colours are wanted, and how texts are broken into lines. */
#include <pty.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "terminal.h"

/* A terminal of so many columns, and a pipe. */
static int terminal_fd, other_end, pipe_fds[2];

static int open_terminal(void **state)
{
    struct winsize size = {.ws_row = 24, .ws_col = 72};
    (void)state;
    return openpty(&other_end, &terminal_fd, NULL, NULL, &size) | pipe(pipe_fds);
}

static int close_terminal(void **state)
{
    (void)state;
    return close(other_end) | close(terminal_fd) | close(pipe_fds[0]) | close(pipe_fds[1]);
}

static void set(const char *name, const char *value)
{
    assert_int_equal(value != NULL ? setenv(name, value, 1) : unsetenv(name), 0);
}

static void test_color(void **state)
{
    static const struct {
        const char *term, *no_color;
        bool on_terminal;
    } cases[] = {
        {"xterm", NULL, true}, {"xterm", "", true}, {"xterm", "1", false}, {"xterm", "0", false},
        {"dumb", NULL, false}, {"", NULL, false},   {NULL, NULL, false},
    };
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        set("TERM", cases[i].term);
        set("NO_COLOR", cases[i].no_color);
        assert_int_equal(terminal_wants_color(COLOR_AUTO, terminal_fd), cases[i].on_terminal);
        assert_false(terminal_wants_color(COLOR_AUTO, pipe_fds[1]));
        assert_true(terminal_wants_color(COLOR_ALWAYS, terminal_fd));
        assert_true(terminal_wants_color(COLOR_ALWAYS, pipe_fds[1]));
        assert_false(terminal_wants_color(COLOR_NEVER, terminal_fd));
    }
}

static void test_columns(void **state)
{
    (void)state;
    assert_int_equal(terminal_columns(terminal_fd), 72);
    assert_int_equal(terminal_columns(pipe_fds[1]), 0);
}

static void test_lines(void **state)
{
    static const struct {
        const char *text;
        size_t indent, columns;
        const char *expected;
    } cases[] = {
        {"", 0, 20, ""},
        {"one two three four", 0, 0, "one two three four"},
        {"one two three four", 0, 18, "one two three four"},
        {"one two three four", 0, 17, "one two three\nfour"},
        {"one two three four", 4, 17, "one two three\n    four"},
        {"one two three four", 8, 17,
         "one two three four"}, /* less than 10: left to the terminal */
        {"a  b              c", 0, 10, "a  b\nc"},
        {"/etc/extract-fcgi/x.conf is it", 0, 12, "/etc/extract-fcgi/x.conf\nis it"},
        {"try --config FILE", 0, 10, "try\n--config\nFILE"},
        {"0123456789", 0, 10, "0123456789"},
        {"01234567890123456789", 0, 10, "01234567890123456789"},
        {"M\xC3\xBCller & S\xC3\xB6hne", 0, 14, "M\xC3\xBCller & S\xC3\xB6hne"},
    };
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char *text = NULL;
        size_t size = 0;
        FILE *out = open_memstream(&text, &size);

        assert_non_null(out);
        terminal_write(out, cases[i].text, PAINT_NONE, cases[i].indent, cases[i].columns);
        assert_int_equal(fclose(out), 0);
        assert_string_equal(text, cases[i].expected);
        free(text);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_color),
        cmocka_unit_test(test_columns),
        cmocka_unit_test(test_lines),
    };
    return cmocka_run_group_tests(tests, open_terminal, close_terminal);
}
