/* test_grace.c - client keys that are kept for an outage of the store. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>
#include <sqlite3.h>

#include "grace.h"
#include "log.h"

#define HOUR INT64_C(3600000)
#define ONE "1111111111111111111111111111111111111111111111111111111111111111"
#define TWO "2222222222222222222222222222222222222222222222222222222222222222"

static char directory[64], path[96];
static int warnings;

static void count_warnings(struct log_entry *take_entry, void *context)
{
    (void)context;
    warnings += take_entry->level == LOG_WARNING;
    free(take_entry);
}

static int set_up(void **state)
{
    (void)state;
    snprintf(directory, sizeof directory, "/tmp/test_grace.XXXXXX");
    if (mkdtemp(directory) == NULL)
        return -1;
    snprintf(path, sizeof path, "%s/clients.db", directory);
    warnings = 0;
    log_set_sink(count_warnings, NULL);
    return 0;
}

static int tear_down(void **state)
{
    char command[128];

    (void)state;
    log_set_sink(NULL, NULL);
    snprintf(command, sizeof command, "rm -r %s", directory);
    return system(command); /* NOLINT(cert-env33-c): the name is ours */
}

static struct grace *open_grace(int64_t grace_ms)
{
    struct err err = {0};
    struct grace *grace = grace_open(directory, grace_ms, &err);

    if (grace == NULL)
        fail_msg("%s", err.message);
    return grace;
}

static void run_sql(const char *sql)
{
    sqlite3 *db = NULL;

    assert_int_equal(sqlite3_open(path, &db), SQLITE_OK);
    assert_int_equal(sqlite3_exec(db, sql, NULL, NULL, NULL), SQLITE_OK);
    sqlite3_close(db);
}

static int count_keys(void)
{
    sqlite3 *db = NULL;
    sqlite3_stmt *row = NULL;
    int count = -1;

    assert_int_equal(sqlite3_open(path, &db), SQLITE_OK);
    sqlite3_prepare_v2(db, "SELECT COUNT(*) FROM ConfirmedKeys", -1, &row, NULL);
    if (sqlite3_step(row) == SQLITE_ROW)
        count = sqlite3_column_int(row, 0);
    sqlite3_finalize(row);
    sqlite3_close(db);
    return count;
}

static void what_was_confirmed_is_found(void **state)
{
    const struct store_client_key clients[] = {{"a1", "Käufer & Söhne", false}, {"b2", "", true}};
    struct grace *grace = open_grace(HOUR), *another = open_grace(HOUR);
    struct store_client_key found = {.id = ""};
    struct stat st;

    (void)state;
    assert_false(grace_find(grace, ONE, &found));
    grace_remember(grace, ONE, &clients[0]);
    grace_remember(grace, TWO, &clients[1]);
    assert_true(grace_find(another, ONE, &found)); /* another process of the pool */
    assert_string_equal(found.id, "a1");
    assert_string_equal(found.company_id, "Käufer & Söhne");
    assert_false(found.is_admin);
    assert_true(grace_find(another, TWO, &found));
    assert_string_equal(found.id, "b2");
    assert_true(found.is_admin);
    grace_remember(another, ONE, &clients[1]); /* the newest holds */
    assert_true(grace_find(grace, ONE, &found));
    assert_string_equal(found.id, "b2");
    grace_forget(grace, ONE);
    assert_false(grace_find(another, ONE, &found));
    assert_true(grace_find(another, TWO, &found));
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0600);
    grace_close(grace);
    grace_close(another);
    grace = open_grace(HOUR); /* after a restart */
    assert_true(grace_find(grace, TWO, &found));
    grace_close(grace);
}

static void it_ends_with_the_grace(void **state)
{
    const struct store_client_key client = {"a1", "A", false};
    struct grace *grace = open_grace(HOUR);
    struct store_client_key found;

    (void)state;
    grace_remember(grace, ONE, &client);
    run_sql("UPDATE ConfirmedKeys SET ConfirmedAt = ConfirmedAt - 3590000");
    assert_true(grace_find(grace, ONE, &found));
    run_sql("UPDATE ConfirmedKeys SET ConfirmedAt = ConfirmedAt - 20000");
    assert_false(grace_find(grace, ONE, &found));
    run_sql("UPDATE ConfirmedKeys SET ConfirmedAt = ConfirmedAt + 7200000"); /* the future */
    assert_false(grace_find(grace, ONE, &found));
    /* what is over makes room */
    grace_remember(grace, TWO, &client);
    assert_int_equal(count_keys(), 1);
    assert_true(grace_find(grace, TWO, &found));
    grace_close(grace);
}

static void without_grace_there_is_no_file(void **state)
{
    const struct store_client_key client = {"a1", "A", false};
    struct grace *grace = open_grace(0);
    struct store_client_key found;

    (void)state;
    grace_remember(grace, ONE, &client);
    grace_forget(grace, ONE);
    assert_false(grace_find(grace, ONE, &found));
    grace_close(grace);
    grace_close(NULL);
    assert_int_not_equal(access(path, F_OK), 0);
}

static void what_fails_is_said_once(void **state)
{
    const struct store_client_key client = {"a1", "A", false};
    struct grace *grace = open_grace(HOUR);
    struct store_client_key found;

    (void)state;
    run_sql("DROP TABLE ConfirmedKeys");
    grace_remember(grace, ONE, &client);
    grace_remember(grace, ONE, &client);
    assert_false(grace_find(grace, ONE, &found));
    assert_int_equal(warnings, 1);
    grace_close(grace);
}

static void a_state_dir_that_does_not_serve_is_named(void **state)
{
    struct err err = {0};
    FILE *file = fopen(path, "w");

    (void)state;
    assert_null(grace_open("/nowhere/at/all", HOUR, &err));
    assert_int_equal(err.code, ERR_CONFIG);
    assert_non_null(strstr(err.message, "server.state_dir: /nowhere/at/all: "));
    assert_non_null(file);
    for (int i = 0; i < 1000; i++)
        fputs("no database", file);
    fclose(file);
    assert_null(grace_open(directory, HOUR, &err));
    assert_int_equal(err.code, ERR_CONFIG);
    assert_non_null(strstr(err.message, path));
}

/* As a pool's processes do, where the file is not there yet. */
static void processes_may_open_it_at_once(void **state)
{
    pid_t pids[6];
    int gate[2];

    (void)state;
    for (int round = 0; round < 40; round++) {
        assert_int_equal(pipe(gate), 0);
        for (size_t i = 0; i < sizeof pids / sizeof pids[0]; i++) {
            pids[i] = fork();
            assert_true(pids[i] >= 0);
            if (pids[i] == 0) {
                struct err err = {0};
                char go;
                close(gate[1]);
                bool ok = read(gate[0], &go, 1) == 0 && grace_open(directory, HOUR, &err) != NULL;
                _exit(ok ? 0 : 1); /* without closing it: as kill -9 does */
            }
        }
        close(gate[0]);
        close(gate[1]);
        for (size_t i = 0; i < sizeof pids / sizeof pids[0]; i++) {
            int status = 0;
            assert_int_equal(waitpid(pids[i], &status, 0), pids[i]);
            assert_int_equal(status, 0);
        }
        assert_int_equal(unlink(path), 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(what_was_confirmed_is_found, set_up, tear_down),
        cmocka_unit_test_setup_teardown(it_ends_with_the_grace, set_up, tear_down),
        cmocka_unit_test_setup_teardown(without_grace_there_is_no_file, set_up, tear_down),
        cmocka_unit_test_setup_teardown(what_fails_is_said_once, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_state_dir_that_does_not_serve_is_named, set_up,
                                        tear_down),
        cmocka_unit_test_setup_teardown(processes_may_open_it_at_once, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
