/* admin_query.h - what a GET /admin/… asks for, read from its URL and its Accept header. Pure: no I/O.
 *
 * Pages: a page ends with a cursor, which says where the next one begins and, for what would otherwise
 * move meanwhile ("24h", a total that grows), from when and until when. It fits the query that it was given
 * for and no other. Rows with an ID go on below the last one; others are counted. */
#ifndef EXTRACT_ADMIN_QUERY_H
#define EXTRACT_ADMIN_QUERY_H

#include <stdbool.h>
#include <stdint.h>

#include "buf.h"
#include "err.h"
#include "store.h"

#define ADMIN_LIMIT_DEFAULT 100 /* rows of a page */
#define ADMIN_LIMIT_MAX 1000
#define ADMIN_COLUMNS_MAX 20
#define ADMIN_CURSOR_SIZE 57 /* and NUL */

/* A kind of rows that a path shows. */
struct admin_view {
    const char *path;
    const char *by; /* the parameter that chooses it; NULL: its path has no other */
    enum store_view view;
    unsigned takes;        /* of the filters; admin_query.c says which */
    const char *id;        /* the column that pages go by; NULL: rows are counted */
    const char *file_name; /* of CSV */
    const char *columns[ADMIN_COLUMNS_MAX]; /* that are shown, in this order; no others ever are */
};

struct admin_query {
    const struct admin_view *view;
    struct store_filter filter; /* texts are the arena's; without a limit */
    int limit;                  /* rows of this page */
    int64_t skip;               /* rows before it */
    bool csv;
    uint32_t fingerprint; /* of all that a cursor must be used with again */
};

/* path: one of the routes'. query: what follows the ?, "" for nothing. Errors: ERR_BAD_REQUEST, the
 * message naming the parameter, what it may be and what to do. */
enum err_code admin_query_parse(struct arena *arena, const char *path, const char *query,
                                const char *accept, struct admin_query *out,
                                struct err *err) MUST_CHECK;

/* The cursor of the page after this one, which had so many rows and ended with the row of last_id. */
void admin_query_next(const struct admin_query *query, int64_t rows, int64_t last_id,
                      char out[ADMIN_CURSOR_SIZE]);

#endif
