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

/* For people: a line of names, then a line a row, numbers to the right, NULL as "-", what would
 * disturb a terminal escaped, columns aligned by the width of their characters; nothing for a table
 * without rows. layout NULL: all columns. False when the rows could not be held or written. */
bool table_print(const struct table *table, const struct table_layout *layout,
                 FILE *out) MUST_CHECK;

/* For machines: one JSON array with an object a row, all columns. False as above. */
bool table_print_json(const struct table *table, FILE *out) MUST_CHECK;

/* One row by itself, as an object of JSON. */
void table_append_json(struct buf *b, size_t columns, const char *const *names,
                       const struct store_value *values);
/* One row as a line of CSV (RFC 4180), NULL as an empty cell. A text that a spreadsheet could take for a
 * formula (it begins with = + - @, a tab or a CR) gets a ' before it. */
void table_append_csv(struct buf *b, size_t columns, const struct store_value *values);

#endif
