/* table.h - rows of the store, for people (aligned columns) or for machines (JSON, CSV).
 *
 * Rows are gathered first, since the width of a column is known only after the last one. */
#ifndef EXTRACT_TABLE_H
#define EXTRACT_TABLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#include "buf.h"
#include "err.h"
#include "store.h"
#include "terminal.h"

struct table;

/* NULL without memory. */
struct table *table_new(void) MUST_CHECK;
void table_free(struct table *table);

/* Copies a row; a store_row, for store_query. All rows have the columns of the first one.
 * False, and a table that cannot be printed, without memory. */
bool table_row(void *table, size_t columns, const char *const *names,
               const struct store_value *values);

size_t table_rows(const struct table *table);

/* What people see of a table. Names that the table lacks are passed over. */
struct table_layout {
    const char *columns; /* names with a space between; NULL: all */
    const char *below;   /* where this one is not NULL, it follows on a line of its own; or NULL */
};

/* The cell of a row (from 0) in the column of that name; NULL: there is no such column. */
const struct store_value *table_cell(const struct table *table, size_t row, const char *name);

/* Where people see it. */
struct table_style {
    /* The colour of a cell that is not NULL; without a function nothing is coloured. */
    enum paint (*paint)(const struct table *table, size_t row, const char *name);
    size_t columns; /* of the terminal; 0: lines may have any length */
};

/* For people: a line of names, then a line a row, numbers to the right, NULL as "-", what would
 * disturb a terminal escaped, columns aligned by the width of their characters; nothing for a table
 * without rows. A text in the last column is broken into lines where the terminal is too narrow; where
 * that does not help, cells stand one below the other, each after its name, with an empty line between
 * rows. layout NULL: all columns; style NULL: neither colours nor a limit. False when the rows could
 * not be held or written. */
bool table_print(const struct table *table, const struct table_layout *layout,
                 const struct table_style *style, FILE *out) MUST_CHECK;

/* For machines: one JSON array with an object a row, all columns. False as above. */
bool table_print_json(const struct table *table, FILE *out) MUST_CHECK;

/* One row by itself, as an object of JSON. */
void table_append_json(struct buf *b, size_t columns, const char *const *names,
                       const struct store_value *values);
/* One row as a line of CSV (RFC 4180), NULL as an empty cell. A text that a spreadsheet could take for a
 * formula (it begins with = + - @, a tab or a CR) gets a ' before it. */
void table_append_csv(struct buf *b, size_t columns, const struct store_value *values);

#endif
