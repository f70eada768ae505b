/* table.c - rows of the store, for people or for machines. See table.h.
 *
 * Cells are kept with their type: JSON needs it, and so does the side to which a column is aligned.
 * Texts belong to the table's arena. */
#include "table.h"

#include <stdlib.h>
#include <string.h>
#include <unictype.h>
#include <unistr.h>
#include <uniwidth.h>

#include "buf.h"

#define GAP 2                    /* spaces between columns */
#define JSON_ROW_MAX (256 << 10) /* bytes */

struct table {
    struct arena arena;
    size_t columns;
    const char **names;
    struct store_value *cells; /* row after row */
    size_t rows;
    size_t capacity; /* in rows */
    bool failed;
};

struct table *table_new(void)
{
    struct table *table = calloc(1, sizeof *table);
    if (table != NULL)
        arena_init(&table->arena);
    return table;
}

void table_free(struct table *table)
{
    if (table == NULL)
        return;
    arena_reset(&table->arena);
    free(table->cells);
    free(table);
}

size_t table_rows(const struct table *table)
{
    return table->rows;
}

static void take_names(struct table *table, size_t columns, const char *const *names)
{
    table->columns = columns;
    table->names = arena_alloc(&table->arena, columns * sizeof *table->names);
    for (size_t i = 0; i < columns; i++)
        table->names[i] = arena_strdup(&table->arena, names[i]);
}

/* Room for one row more. */
static bool grow(struct table *table)
{
    size_t capacity = table->capacity == 0 ? 64 : 2 * table->capacity;
    struct store_value *cells;

    if (table->rows < table->capacity)
        return true;
    cells = reallocarray(table->cells, capacity, table->columns * sizeof *cells);
    if (cells == NULL)
        return false;
    table->cells = cells;
    table->capacity = capacity;
    return true;
}

bool table_row(void *context, size_t columns, const char *const *names,
               const struct store_value *values)
{
    struct table *table = context;
    struct store_value *row;

    if (table->names == NULL)
        take_names(table, columns, names);
    if (columns != table->columns || !grow(table)) {
        table->failed = true;
        return false;
    }
    row = table->cells + table->rows * columns;
    for (size_t i = 0; i < columns; i++) {
        row[i] = values[i];
        if (values[i].type == STORE_TEXT)
            row[i].text = arena_strdup(&table->arena, values[i].text);
    }
    table->rows++;
    return true;
}

/* ---- for people ---- */

/* Control characters, line and paragraph separators, and what turns the direction of writing. */
static bool disturbs(ucs4_t c)
{
    return uc_is_general_category_withtable(c, UC_CATEGORY_MASK_Cc | UC_CATEGORY_MASK_Zl |
                                                   UC_CATEGORY_MASK_Zp) ||
           uc_is_property_bidi_control(c);
}

/* Unlike text_escape this leaves a backslash alone: what is in the log was escaped already. */
static char *escape(struct arena *arena, const char *text)
{
    size_t len = strlen(text);
    size_t out_len = 0;
    char *out = arena_alloc(arena, 4 * len + 1);

    for (size_t i = 0; i < len;) {
        ucs4_t c;
        int n = u8_mbtoucr(&c, (const uint8_t *)text + i, len - i);
        size_t count = n > 0 ? (size_t)n : 1;
        bool as_it_is = n > 0 && !disturbs(c);

        for (size_t end = i + count; i < end; i++) {
            if (as_it_is)
                out[out_len++] = text[i];
            else
                out_len += (size_t)snprintf(out + out_len, 5, "\\x%02X", (unsigned char)text[i]);
        }
    }
    return out;
}

static const char *cell_text(struct arena *arena, const struct store_value *value)
{
    switch (value->type) {
    case STORE_NULL:
        break;
    case STORE_INTEGER:
        return arena_printf(arena, "%lld", (long long)value->integer);
    case STORE_REAL:
        return arena_printf(arena, "%.15g", value->real);
    case STORE_TEXT:
        return escape(arena, value->text);
    }
    return "-";
}

static size_t width(const char *text)
{
    int n = u8_strwidth((const uint8_t *)text, "UTF-8");
    return n > 0 ? (size_t)n : 0;
}

static void print_cell(const char *text, size_t column_width, bool right, bool last, FILE *out)
{
    size_t text_width = width(text);
    int padding = column_width > text_width ? (int)(column_width - text_width) : 0;

    if (right)
        fprintf(out, "%*s%s%*s", padding, "", text, last ? 0 : GAP, "");
    else
        fprintf(out, "%s%*s", text, last ? 0 : padding + GAP, "");
}

static void print_aligned(const struct table *table, FILE *out)
{
    struct arena arena;
    const char **texts;
    size_t *widths;
    bool *right;

    arena_init(&arena);
    texts = arena_alloc(&arena, (table->rows + 1) * table->columns * sizeof *texts);
    widths = arena_alloc(&arena, table->columns * sizeof *widths);
    right = arena_alloc(&arena, table->columns * sizeof *right);
    for (size_t column = 0; column < table->columns; column++) {
        bool numbers = false;
        bool words = false;

        texts[column] = escape(&arena, table->names[column]);
        widths[column] = width(texts[column]);
        for (size_t row = 0; row < table->rows; row++) {
            size_t cell = row * table->columns + column;
            const char *text = cell_text(&arena, &table->cells[cell]);

            texts[table->columns + cell] = text;
            if (width(text) > widths[column])
                widths[column] = width(text);
            words = words || table->cells[cell].type == STORE_TEXT;
            numbers = numbers || table->cells[cell].type == STORE_INTEGER ||
                      table->cells[cell].type == STORE_REAL;
        }
        right[column] = numbers && !words;
    }
    for (size_t row = 0; row <= table->rows; row++) {
        for (size_t column = 0; column < table->columns; column++)
            print_cell(texts[row * table->columns + column], widths[column], right[column],
                       column + 1 == table->columns, out);
        fputc('\n', out);
    }
    arena_reset(&arena);
}

/* ---- for machines ---- */

static void append_json(struct buf *b, const struct store_value *value)
{
    switch (value->type) {
    case STORE_NULL:
        buf_append_str(b, "null");
        break;
    case STORE_INTEGER:
        buf_printf(b, "%lld", (long long)value->integer);
        break;
    case STORE_REAL: /* JSON has no NaN and no infinity */
        if (value->real - value->real == 0)
            buf_printf(b, "%.15g", value->real);
        else
            buf_append_str(b, "null");
        break;
    case STORE_TEXT:
        buf_append_json(b, value->text, strlen(value->text));
        break;
    }
}

static bool print_json(const struct table *table, FILE *out)
{
    struct buf line;
    bool ok = true;

    buf_init(&line, JSON_ROW_MAX);
    fputc('[', out);
    for (size_t row = 0; row < table->rows && ok; row++) {
        buf_clear(&line);
        buf_append_str(&line, row == 0 ? "\n  {" : ",\n  {");
        for (size_t column = 0; column < table->columns; column++) {
            if (column > 0)
                buf_append_str(&line, ", ");
            buf_append_json(&line, table->names[column], strlen(table->names[column]));
            buf_append_str(&line, ": ");
            append_json(&line, &table->cells[row * table->columns + column]);
        }
        buf_append_char(&line, '}');
        ok = buf_ok(&line);
        fputs(buf_str(&line), out);
    }
    fputs(table->rows > 0 ? "\n]\n" : "]\n", out);
    buf_reset(&line);
    return ok;
}

bool table_print(const struct table *table, bool json, FILE *out)
{
    bool ok = !table->failed;

    if (!ok)
        return false;
    if (json)
        ok = print_json(table, out);
    else if (table->rows > 0)
        print_aligned(table, out);
    return fflush(out) == 0 && !ferror(out) && ok;
}
