/* store_backend.h - what test_store.c needs to know of a driver's database: how to make one, and how
 * to look at its rows. */
#ifndef EXTRACT_TESTS_STORE_BACKEND_H
#define EXTRACT_TESTS_STORE_BACKEND_H

#include <sqlite3.h>

#include "store_driver.h"

/* The database of the running test. */
struct store_fixture {
    char directory[64]; /* of this test alone, removed with all files in it */
    char path[128];     /* embedded: the file */
    char database[64];  /* SQL Server: its name */
    struct config config;
    sqlite3 *raw; /* embedded: a connection of the test's own */
};
extern struct store_fixture fixture;

struct backend {
    const char *name;
    const struct store_driver *driver;
    void (*create)(void); /* an empty database, and the configuration for it */
    void (*attach)(void); /* after the driver has created its schema */
    void (*destroy)(void);
    /* SQL that any of the databases understands; names in the usual place, no LIMIT, no IIF. */
    void (*exec)(const char *sql);
    /* The columns of the first row as text, "|" between them, "NULL" for NULL; "" without a row. */
    void (*row)(const char *sql, char *out, size_t size);
    /* Makes room for keys of any length, as older tables have it; views of them are gone then. */
    void (*widen_keys)(void);
    /* Does its JSON have \" and \\ for quotes and backslashes? Not every server that speaks T-SQL does. */
    bool (*unescapes_json)(void);
    const char *a_minute_ago; /* SQL, in the form of the tables */
    const char *in_an_hour;
};

extern const struct backend sqlite_backend;
extern const struct backend mssql_backend;

/* Makes fixture.directory; an empty configuration (no member NULL) for the driver. */
void backend_make_directory(void);
void backend_remove_directory(void);

/* The server for mssql_backend: that of MSSQL_SERVER, MSSQL_USER and MSSQL_PASSWORD_FILE, or, where
 * these are not set, tests/tds_server, started now. For cmocka: group setup and teardown. */
int mssql_server_start(void **state);
int mssql_server_stop(void **state);
/* Is it tests/tds_server, whose faults can be ordered? */
bool mssql_server_is_ours(void);
/* Orders one (tests/tds_server/README.md): a JSON object. The answer, valid until the next call. */
const char *mssql_server_control(const char *command);
/* Runs a T-SQL script in the test's database as tsql does: an error ends its batch only. Returns the
 * exit status of the tool. */
int mssql_run_script(const char *path);
/* Ends ours at once, as a power cut would; and starts it again at the same address, with its data. */
void mssql_server_kill(void);
void mssql_server_restart(void);

#endif
