/* test_sqlite_db.c - a connection of the embedded store and its prepared statements. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "store_sqlite.h"

#define MANY (2 * SQLITE_CACHE_SIZE + 1)

struct fixture {
    char directory[64], path[80];
    struct sqlite_db db;
    char statements[MANY][32];
};

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof *f);
    struct sqlite_file file;
    struct err err;

    assert_non_null(f);
    *state = f;
    snprintf(f->directory, sizeof f->directory, "/tmp/test_sqlite_db.XXXXXX");
    assert_non_null(mkdtemp(f->directory));
    snprintf(f->path, sizeof f->path, "%s/store.db", f->directory);
    assert_int_equal(ERR_NONE, sqlite_create_file(f->path, &err));
    assert_int_equal(ERR_NONE, sqlite_file_at(f->path, &file, &err));
    assert_int_equal(ERR_NONE, sqlite_connect(&f->db, f->path, file, 1000, &err));
    for (int i = 0; i < MANY; i++)
        snprintf(f->statements[i], sizeof f->statements[i], "SELECT %d", i);
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;

    sqlite_disconnect(&f->db);
    unlink(f->path);
    assert_int_equal(0, rmdir(f->directory));
    free(f);
    return 0;
}

static void assert_selects(struct fixture *f, int i)
{
    sqlite3_stmt *row = NULL;
    struct err err = {.message = ""};

    if (sqlite_first_row(&f->db, &row, &err, f->statements[i], NULL, 0) != ERR_NONE)
        fail_msg("statement %d: %s", i, err.message);
    assert_int_equal(i, sqlite3_column_int(row, 0));
    sqlite3_reset(row);
}

/* A process that runs for years comes by all statements there are. */
static void test_more_statements_than_places(void **state)
{
    struct fixture *f = *state;

    for (int round = 0; round < 2; round++)
        for (int i = 0; i < MANY; i++)
            assert_selects(f, i);
    assert_int_equal(SQLITE_CACHE_SIZE, f->db.cached);
}

/* Who reads rows goes on, whatever is prepared meanwhile. */
static void test_rows_being_read_stay(void **state)
{
    static const char sql[] = "SELECT 7 UNION ALL SELECT 8";
    struct fixture *f = *state;
    sqlite3_stmt *row = NULL;
    struct err err = {.message = ""};

    assert_int_equal(ERR_NONE, sqlite_first_row(&f->db, &row, &err, sql, NULL, 0));
    for (int i = 0; i < MANY; i++)
        assert_selects(f, i);
    assert_int_equal(7, sqlite3_column_int(row, 0));
    assert_int_equal(SQLITE_ROW, sqlite3_step(row));
    assert_int_equal(8, sqlite3_column_int(row, 0));
    sqlite3_reset(row);
}

/* All places hold rows that are read: an error, and none of them is harmed. */
static void test_no_place(void **state)
{
    struct fixture *f = *state;
    sqlite3_stmt *rows[SQLITE_CACHE_SIZE], *row = NULL;
    struct err err = {.message = ""};

    for (int i = 0; i < SQLITE_CACHE_SIZE; i++)
        assert_int_equal(ERR_NONE,
                         sqlite_first_row(&f->db, &rows[i], &err, f->statements[i], NULL, 0));
    assert_int_equal(ERR_INTERNAL, sqlite_first_row(&f->db, &row, &err,
                                                    f->statements[SQLITE_CACHE_SIZE], NULL, 0));
    assert_null(row);
    for (int i = 0; i < SQLITE_CACHE_SIZE; i++) {
        assert_int_equal(i, sqlite3_column_int(rows[i], 0));
        sqlite3_reset(rows[i]);
    }
    assert_selects(f, SQLITE_CACHE_SIZE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_more_statements_than_places, setup, teardown),
        cmocka_unit_test_setup_teardown(test_rows_being_read_stay, setup, teardown),
        cmocka_unit_test_setup_teardown(test_no_place, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
