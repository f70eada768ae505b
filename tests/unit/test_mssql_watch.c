/* test_mssql_watch.c - calls and logins that take longer than they may. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "clock.h"
#include "store_mssql.h"

#define PATIENCE_MS 30000

/* A connection to itself: [0] as FreeTDS has it, [1] the server's end. */
static void connect_pair(int ends[2])
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof at;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int idle_s = 40;
    int interval_s = 2;

    assert_int_equal(0, bind(listener, (const struct sockaddr *)&at, sizeof at));
    assert_int_equal(0, listen(listener, 1));
    assert_int_equal(0, getsockname(listener, (struct sockaddr *)&at, &size));
    ends[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(0, connect(ends[0], (const struct sockaddr *)&at, sizeof at));
    ends[1] = accept(listener, NULL, NULL);
    assert_true(ends[1] >= 0);
    close(listener);
    setsockopt(ends[0], IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof idle_s);
    setsockopt(ends[0], IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof interval_s);
}

static bool is_reset(int fd)
{
    struct pollfd pollfd = {.fd = fd, .events = POLLIN};
    char byte;

    return poll(&pollfd, 1, PATIENCE_MS) == 1 && read(fd, &byte, 1) < 0;
}

static bool is_whole(int ends[2])
{
    char byte = 'x';

    return write(ends[1], &byte, 1) == 1 && read(ends[0], &byte, 1) == 1;
}

static void close_pair(int ends[2])
{
    close(ends[0]);
    close(ends[1]);
}

static void a_call_ends_at_its_deadline(void **state)
{
    (void)state;
    struct mssql_watch *watch = mssql_watch_start();
    struct mssql_guard guards[2];
    int late[2];
    int early[2];
    connect_pair(late);
    connect_pair(early);
    mssql_guard_init(&guards[0], watch, dup(late[0]));
    mssql_guard_init(&guards[1], watch, dup(early[0]));
    mssql_guard_arm(&guards[0], clock_monotonic_ms() + 20);
    mssql_guard_arm(&guards[1], clock_monotonic_ms() + 20);
    assert_false(mssql_guard_disarm(&guards[1]));
    assert_true(is_reset(late[0]));
    assert_true(mssql_guard_disarm(&guards[0]));
    assert_true(is_whole(early));
    mssql_guard_reset(&guards[0]);
    mssql_guard_reset(&guards[1]);
    mssql_watch_stop(watch);
    close_pair(late);
    close_pair(early);
}

/* The server's end is closed, and whoever waits for an answer takes no notice. */
static void a_call_ends_with_its_connection(void **state)
{
    (void)state;
    struct mssql_watch *watch = mssql_watch_start();
    struct mssql_guard guard;
    struct pollfd ended;
    int ends[2];
    connect_pair(ends);
    mssql_guard_init(&guard, watch, dup(ends[0]));
    mssql_guard_arm(&guard, clock_monotonic_ms() + PATIENCE_MS);
    close(ends[1]);
    ended = (struct pollfd){.fd = ends[0], .events = 0};
    assert_int_equal(1, poll(&ended, 1, PATIENCE_MS)); /* an error, not an end */
    assert_false(mssql_guard_disarm(&guard));
    mssql_guard_reset(&guard);
    mssql_watch_stop(watch);
    close(ends[0]);
}

/* Is the file locked, as another process sees it? */
static bool is_locked(int fd)
{
    int status = 0;
    pid_t pid = fork();

    if (pid == 0) {
        struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
        _exit(fcntl(fd, F_GETLK, &lock) == 0 && lock.l_type != F_UNLCK ? 0 : 1);
    }
    assert_int_equal(pid, waitpid(pid, &status, 0));
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/* A login's socket is found among all that the process has open. The outbox and the embedded store are
 * there, too, whose locks would end with any descriptor of theirs that is closed. */
static void a_login_is_found_and_files_stay_locked(void **state)
{
    (void)state;
    struct mssql_watch *watch = mssql_watch_start();
    struct mssql_guard guards[2];
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    char path[] = "/tmp/test_watch.XXXXXX";
    int file = mkstemp(path);
    int ours[2];
    int login[2];
    assert_true(file >= 0);
    assert_int_equal(0, fcntl(file, F_SETLK, &lock));
    connect_pair(ours);
    connect_pair(login);
    mssql_guard_init(&guards[0], watch, dup(ours[0]));
    mssql_guard_init(&guards[1], watch, -1);
    mssql_guard_arm(&guards[1], clock_monotonic_ms());
    assert_true(is_reset(login[0]));
    assert_true(mssql_guard_disarm(&guards[1]));
    assert_true(is_whole(ours));
    assert_true(is_locked(file));
    mssql_guard_reset(&guards[0]);
    mssql_guard_reset(&guards[1]);
    mssql_watch_stop(watch);
    close_pair(ours);
    close_pair(login);
    close(file);
    unlink(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_call_ends_at_its_deadline),
        cmocka_unit_test(a_call_ends_with_its_connection),
        cmocka_unit_test(a_login_is_found_and_files_stay_locked),
    };
    return cmocka_run_group_tests_name("store_mssql_watch", tests, NULL, NULL);
}
