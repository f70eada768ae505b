/* test_connection.c - what makes a head, byte by byte; the rest is tested through a real web server. */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmocka.h>

#include "connection.h"

#define BEGIN "\1\1\0\1\0\10\0\0\0\1\0\0\0\0\0\0"
#define PARAMS "\1\4\0\1\0\27\0\0\16\7REQUEST_METHODOPTIONS" /* 23 bytes */
#define PARAMS_END "\1\4\0\1\0\0\0\0"
#define STDIN_END "\1\5\0\1\0\0\0\0"

/* Stands before libc's for libfcgi, too, which calls it where it then waits for the peer to close. */
static int ended_sending;

int shutdown(int fd, int how)
{
    ended_sending += how == SHUT_WR;
    return (int)syscall(SYS_shutdown, fd, how);
}

static int set_up_all(void **state)
{
    struct err err;
    (void)state;
    signal(SIGPIPE, SIG_IGN);
    return connection_init(&err) == ERR_NONE ? 0 : -1;
}

/* Sends the bytes and no more; the connection's other end. */
static int send_head(struct connection *c, const char *bytes, size_t len)
{
    int pair[2];

    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    assert_int_equal(send(pair[0], bytes, len, 0), len);
    shutdown(pair[0], SHUT_WR);
    *c = (struct connection){.fd = pair[1]};
    return pair[0];
}

static void test_whole(void **state)
{
    static const char head[] = BEGIN PARAMS PARAMS_END STDIN_END;
    struct connection c;
    struct response response;
    char byte;
    (void)state;

    int peer = send_head(&c, head, sizeof head - 1);
    assert_true(connection_read_head(&c));
    assert_string_equal(c.request.method, "OPTIONS");
    assert_string_equal(c.request.path, "");
    assert_int_equal(c.request.content_length, -1);
    response_init(&response);
    connection_answer(&c, &response);
    assert_int_equal(recv(peer, &byte, 1, 0), 1);
    close(peer);
}

/* Is the descriptor closed? And nobody has waited for the peer, who has not closed yet. */
static bool is_closed_at_once(const char *bytes, size_t len, bool *closed)
{
    struct connection c;
    struct response response;

    int peer = send_head(&c, bytes, len);
    assert_true(connection_read_head(&c));
    response_init(&response);
    ended_sending = 0;
    connection_answer(&c, &response);
    *closed = fcntl(c.fd, F_GETFD) < 0 && errno == EBADF;
    close(peer);
    return ended_sending == 0;
}

/* Only who has sent all, and whose all was read, needs no care at the end. */
static void test_closed(void **state)
{
    static const char whole[] = BEGIN PARAMS PARAMS_END STDIN_END;
    static const char unread[] = BEGIN PARAMS PARAMS_END "\1\5\0\1\0\4\0\0more" STDIN_END;
    bool closed;
    (void)state;

    assert_true(is_closed_at_once(whole, sizeof whole - 1, &closed));
    assert_true(closed);
    assert_false(
        is_closed_at_once(unread, sizeof unread - 1, &closed)); /* a body that nobody read */
    assert_true(closed);
    assert_false(is_closed_at_once(whole, sizeof whole - 9, &closed)); /* its end did not come */
    assert_true(closed);
}

/* The web server died, or is none. Wherever the head breaks off, nobody may take it for a request. */
static void test_broken_off(void **state)
{
    static const char head[] = BEGIN PARAMS PARAMS_END;
    struct connection c;
    char byte;
    (void)state;

    for (size_t len = 0; len < sizeof head - 1; len++) {
        int peer = send_head(&c, head, len);
        if (connection_read_head(&c))
            fail_msg("a request after %zu bytes", len);
        assert_int_equal(recv(peer, &byte, 1, 0), 0); /* closed, without an answer */
        close(peer);
    }
}

static void test_not_fastcgi(void **state)
{
    static const char *const heads[] = {
        "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "\2\1xxxxxxxxxxxxxx",
    };
    static const char version[] = BEGIN PARAMS "\2\4\0\1\0\0\0\0" STDIN_END;
    static const char type[] = BEGIN PARAMS "\1\5\0\1\0\0\0\0";
    struct connection c;
    (void)state;

    for (size_t i = 0; i < sizeof heads / sizeof heads[0]; i++) {
        int peer = send_head(&c, heads[i], strlen(heads[i]));
        assert_false(connection_read_head(&c));
        close(peer);
    }
    int peer = send_head(&c, version, sizeof version - 1);
    assert_false(connection_read_head(&c));
    close(peer);
    peer = send_head(&c, type, sizeof type - 1); /* the body begins, and the head has not ended */
    assert_false(connection_read_head(&c));
    close(peer);
}

/* ---- a trace ---- */

#define TRACE_A "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
#define TRACE_B "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"

/* One record of parameters, each "NAME=value". */
static size_t add_params(char *head, const char *const *params)
{
    size_t len = 8;

    for (; *params != NULL; params++) {
        const char *value = strchr(*params, '=') + 1;
        size_t name_len = (size_t)(value - *params) - 1, value_len = strlen(value);
        head[len++] = (char)name_len;
        head[len++] = (char)value_len;
        memcpy(head + len, *params, name_len);
        memcpy(head + len + name_len, value, value_len);
        len += name_len + value_len;
    }
    memcpy(head, "\1\4\0\1", 4);
    head[4] = (char)((len - 8) >> 8);
    head[5] = (char)((len - 8) & 255);
    head[6] = head[7] = 0;
    return len;
}

/* Whatever web server is before us: one that hands on a header twice hands on none. */
static void test_trace(void **state)
{
    static const struct {
        const char *params[5];
        const char *id, *trace_state;
    } cases[] = {
        {{"REQUEST_METHOD=POST"}, "", NULL},
        {{"HTTP_TRACEPARENT=" TRACE_A}, "4bf92f3577b34da6a3ce929d0e0e4736", NULL},
        {{"HTTP_TRACEPARENT=" TRACE_A, "HTTP_TRACESTATE=a=1"},
         "4bf92f3577b34da6a3ce929d0e0e4736",
         "a=1"},
        {{"HTTP_TRACEPARENT=" TRACE_A, "HTTP_TRACEPARENT=" TRACE_B, "HTTP_TRACESTATE=a=1"},
         "",
         NULL},
        {{"HTTP_TRACEPARENT=" TRACE_A, "HTTP_TRACEPARENT=" TRACE_A}, "", NULL},
        {{"HTTP_TRACEPARENT=" TRACE_A ", " TRACE_B}, "", NULL}, /* as nginx from 1.23 joins them */
        {{"HTTP_TRACEPARENT=" TRACE_A, "HTTP_TRACESTATE=a=1", "HTTP_TRACESTATE=b=2"},
         "4bf92f3577b34da6a3ce929d0e0e4736",
         NULL},
        {{"HTTP_TRACEPARENT=", "HTTP_TRACESTATE=a=1"}, "", NULL},
        {{"HTTP_TRACEPARENT_X=" TRACE_B, "HTTP_TRACEPARENT=" TRACE_A},
         "4bf92f3577b34da6a3ce929d0e0e4736",
         NULL},
    };
    struct response response;
    struct connection c;
    char head[512];
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        memcpy(head, BEGIN, 16);
        size_t len = 16 + add_params(head + 16, cases[i].params);
        memcpy(head + len, PARAMS_END STDIN_END, 16);
        int peer = send_head(&c, head, len + 16);
        assert_true(connection_read_head(&c));
        assert_string_equal(c.request.trace.id, cases[i].id);
        const char *id = request_trace_id(&c.request);
        assert_string_equal(id == NULL ? "" : id, cases[i].id);
        if (cases[i].trace_state == NULL)
            assert_null(c.request.trace.state);
        else
            assert_string_equal(c.request.trace.state, cases[i].trace_state);
        response_init(&response);
        connection_answer(&c, &response);
        close(peer);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_whole),      cmocka_unit_test(test_closed),
        cmocka_unit_test(test_broken_off), cmocka_unit_test(test_not_fastcgi),
        cmocka_unit_test(test_trace),
    };
    return cmocka_run_group_tests(tests, set_up_all, NULL);
}
