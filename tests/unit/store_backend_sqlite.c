/* store_backend_sqlite.c - the embedded store's database for test_store.c: a file. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "store_backend.h"

struct store_fixture fixture;

void backend_make_directory(void)
{
    static char empty[] = "";
    const char *tmp = getenv("TMPDIR");

    snprintf(fixture.directory, sizeof fixture.directory, "%.40s/test_store.XXXXXX",
             tmp != NULL ? tmp : "/tmp");
    assert_non_null(mkdtemp(fixture.directory));
    fixture.config = (struct config){0};
    fixture.config.server.state_dir = fixture.directory;
    fixture.config.seal.key_file = (char *)(uintptr_t) "";
    fixture.config.server.runtime_dir = fixture.directory;
    fixture.config.store.path = empty;
    fixture.config.store.server = empty;
    fixture.config.store.database = empty;
    fixture.config.store.user = empty;
    fixture.config.store.password_file = empty;
    fixture.config.store.admin_user = empty;
    fixture.config.store.reader_user = empty;
    fixture.config.store.admin_password_file = empty;
    fixture.config.store.ca_file = empty;
    fixture.config.store.connection_file = empty;
    fixture.config.store.auto_create = true;
    fixture.config.store.query_timeout_ms = 5000;
}

void backend_remove_directory(void)
{
    DIR *directory = opendir(fixture.directory);
    char path[512];

    for (struct dirent *e; directory != NULL && (e = readdir(directory)) != NULL;) {
        snprintf(path, sizeof path, "%s/%s", fixture.directory, e->d_name);
        if (e->d_name[0] != '.')
            unlink(path);
    }
    if (directory != NULL)
        closedir(directory);
    rmdir(fixture.directory);
}

static void create(void)
{
    backend_make_directory();
    snprintf(fixture.path, sizeof fixture.path, "%s/store.db", fixture.directory);
    fixture.config.store.path = fixture.path;
}

static void attach(void)
{
    assert_int_equal(SQLITE_OK, sqlite3_open(fixture.path, &fixture.raw));
    sqlite3_busy_timeout(fixture.raw, 5000);
}

static void destroy(void)
{
    sqlite3_close(fixture.raw);
    fixture.raw = NULL;
    backend_remove_directory();
}

static void exec(const char *sql)
{
    char *message = NULL;

    if (sqlite3_exec(fixture.raw, sql, NULL, NULL, &message) != SQLITE_OK)
        fail_msg("%s: %s", sql, message);
}

static void row(const char *sql, char *out, size_t size)
{
    sqlite3_stmt *statement = NULL;
    size_t len = 0;

    if (sqlite3_prepare_v2(fixture.raw, sql, -1, &statement, NULL) != SQLITE_OK)
        fail_msg("%s: %s", sql, sqlite3_errmsg(fixture.raw));
    int result = sqlite3_step(statement);
    out[0] = '\0';
    for (int i = 0; result == SQLITE_ROW && i < sqlite3_column_count(statement); i++) {
        const char *text = (const char *)sqlite3_column_text(statement, i);
        int n = snprintf(out + len, size - len, "%s%s", i > 0 ? "|" : "", text ? text : "NULL");
        assert_true(n >= 0 && (size_t)n < size - len);
        len += (size_t)n;
    }
    sqlite3_finalize(statement);
    if (result != SQLITE_ROW && result != SQLITE_DONE)
        fail_msg("%s: %s", sql, sqlite3_errmsg(fixture.raw));
}

static void widen_keys(void)
{
    /* TEXT has room */
}

static bool unescapes_json(void)
{
    return true;
}

const struct backend sqlite_backend = {
    .name = "sqlite",
    .driver = &store_sqlite,
    .create = create,
    .attach = attach,
    .destroy = destroy,
    .exec = exec,
    .row = row,
    .widen_keys = widen_keys,
    .unescapes_json = unescapes_json,
    .a_minute_ago = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-61 seconds')",
    .in_an_hour = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '+1 hour')",
};
