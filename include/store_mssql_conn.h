/* store_mssql_conn.h - a connection's inside, for the two files that know db-lib. See store_mssql.h. */
#ifndef EXTRACT_STORE_MSSQL_CONN_H
#define EXTRACT_STORE_MSSQL_CONN_H

#include <sqlfront.h>
#include <sybdb.h>

#include "store_mssql.h"

#define MSSQL_ROW_MAX ((size_t)4 * 1024 * 1024) /* bytes of text in one row */

/* Used by one thread at a time. */
struct mssql_conn {
    DBPROCESS *dbproc;
    struct mssql_failure *failure; /* of the call under way; NULL between calls */
    bool prints;                   /* what the server prints is logged */
    struct mssql_guard guard;
    int64_t login_ms; /* monotonic */
    struct buf row;   /* the texts of a row; may hold a key: wiped after each call */
};

#endif
