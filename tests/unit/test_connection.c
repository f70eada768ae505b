/* test_connection.c - what makes a head, byte by byte; the rest is tested through a real web server. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

#include "connection.h"

#define BEGIN "\1\1\0\1\0\10\0\0\0\1\0\0\0\0\0\0"
#define PARAMS "\1\4\0\1\0\27\0\0\16\7REQUEST_METHODOPTIONS" /* 23 bytes */
#define PARAMS_END "\1\4\0\1\0\0\0\0"
#define STDIN_END "\1\5\0\1\0\0\0\0"

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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_whole),
        cmocka_unit_test(test_broken_off),
        cmocka_unit_test(test_not_fastcgi),
    };
    return cmocka_run_group_tests(tests, set_up_all, NULL);
}
