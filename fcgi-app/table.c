/* table.c - rows of the store, for people or for machines. See table.h.
 *
 * Cells are kept with their type: JSON needs it, and so does the side to which a column is aligned.
 * Texts belong to the table's arena. */
#include "table.h"

#include <stdlib.h>
#include <string.h>
#include <unictype.h>
#include <unistr.h>

#include "buf.h"

#define GAP 2                    /* spaces between columns */
#define INDENT 4                 /* spaces before what stands below a row */
#define LAST_MIN 24              /* columns of a text that is broken into lines in its place */
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

/* Where the column of that name is; table->columns: nowhere. */
static size_t find_column(const struct table *table, const char *name, size_t len)
{
    size_t column = 0;

    while (column < table->columns &&
           (strncmp(table->names[column], name, len) != 0 || table->names[column][len] != '\0'))
        column++;
    return column;
}

const struct store_value *table_cell(const struct table *table, size_t row, const char *name)
{
    size_t column = find_column(table, name, strlen(name));
    return column < table->columns ? &table->cells[row * table->columns + column] : NULL;
}

/* A column as it is printed. */
struct shown {
    size_t column;      /* of the table */
    const char **texts; /* the name, then a cell a row */
    size_t width;
    bool right;
};

/* What is printed, and where. */
struct printing {
    const struct table *table;
    const struct table_style *style;
    FILE *out;
    struct arena arena;
    struct shown *columns;
    size_t count;
    size_t below; /* a column of the table; as many as it has: none */
};

static struct shown show_column(const struct table *table, size_t column, struct arena *arena)
{
    struct shown shown = {.column = column,
                          .texts = arena_alloc(arena, (table->rows + 1) * sizeof(char *))};
    bool numbers = false;
    bool words = false;

    shown.texts[0] = escape(arena, table->names[column]);
    shown.width = terminal_width(shown.texts[0]);
    for (size_t row = 0; row < table->rows; row++) {
        const struct store_value *cell = &table->cells[row * table->columns + column];
        const char *text = cell_text(arena, cell);

        shown.texts[row + 1] = text;
        if (terminal_width(text) > shown.width)
            shown.width = terminal_width(text);
        words = words || cell->type == STORE_TEXT;
        numbers = numbers || cell->type == STORE_INTEGER || cell->type == STORE_REAL;
    }
    shown.right = numbers && !words;
    return shown;
}

/* The columns of the layout, in its order. */
static size_t show_columns(const struct table *table, const struct table_layout *layout,
                           struct arena *arena, struct shown *columns)
{
    const char *name = layout != NULL ? layout->columns : NULL;
    size_t count = 0;

    if (name == NULL) {
        for (; count < table->columns; count++)
            columns[count] = show_column(table, count, arena);
        return count;
    }
    while (*name != '\0' && count < table->columns) {
        size_t len = strcspn(name, " ");
        size_t column = find_column(table, name, len);

        if (column < table->columns)
            columns[count++] = show_column(table, column, arena);
        name += len;
        name += strspn(name, " ");
    }
    return count;
}

/* line 0: the names. */
static enum paint paint_of(const struct printing *p, size_t column, size_t line)
{
    if (p->style->paint == NULL || line == 0)
        return PAINT_NONE;
    if (p->table->cells[(line - 1) * p->table->columns + column].type == STORE_NULL)
        return PAINT_DIM;
    return p->style->paint(p->table, line - 1, p->table->names[column]);
}

/* What follows a row on a line of its own; NULL: nothing. */
static const char *text_below(struct printing *p, size_t row)
{
    const struct store_value *cell;

    if (p->below >= p->table->columns)
        return NULL;
    cell = &p->table->cells[row * p->table->columns + p->below];
    return cell->type == STORE_NULL ? NULL : cell_text(&p->arena, cell);
}

/* ---- in columns ---- */

/* Where the last column begins. */
static size_t last_begins(const struct printing *p)
{
    size_t at = 0;

    for (size_t i = 0; i + 1 < p->count; i++)
        at += p->columns[i].width + GAP;
    return at;
}

/* Has the terminal room for all columns, the last one perhaps in several lines? */
static bool fits(const struct printing *p)
{
    const struct shown *last = &p->columns[p->count - 1];
    size_t needed = !last->right && last->width > LAST_MIN ? LAST_MIN : last->width;

    return p->style->columns == 0 || last_begins(p) + needed <= p->style->columns;
}

static void print_cell(const struct printing *p, size_t i, size_t line, size_t at)
{
    const struct shown *column = &p->columns[i];
    const char *text = column->texts[line];
    enum paint paint = paint_of(p, column->column, line);
    int padding = (int)(column->width - terminal_width(text));
    bool last = i + 1 == p->count;

    if (column->right)
        fprintf(p->out, "%*s%s%s%s%*s", padding, "", terminal_paint(paint), text,
                terminal_unpaint(paint), last ? 0 : GAP, "");
    else if (last)
        terminal_write(p->out, text, paint, at, p->style->columns);
    else
        fprintf(p->out, "%s%s%s%*s", terminal_paint(paint), text, terminal_unpaint(paint),
                padding + GAP, "");
}

static void print_aligned(struct printing *p)
{
    size_t at = last_begins(p);

    for (size_t line = 0; line <= p->table->rows; line++) {
        const char *below = line > 0 ? text_below(p, line - 1) : NULL;

        for (size_t i = 0; i < p->count; i++)
            print_cell(p, i, line, at);
        fputc('\n', p->out);
        if (below != NULL) {
            fprintf(p->out, "%*s", INDENT, "");
            terminal_write(p->out, below, paint_of(p, p->below, line), INDENT, p->style->columns);
            fputc('\n', p->out);
        }
    }
}

/* ---- one below the other, for a terminal that is too narrow ---- */

static void print_named(const struct printing *p, const char *name, const char *text,
                        enum paint paint, size_t width)
{
    enum paint dim = p->style->paint != NULL ? PAINT_DIM : PAINT_NONE;

    fprintf(p->out, "%s%s%s%*s", terminal_paint(dim), name, terminal_unpaint(dim),
            (int)(width - terminal_width(name) + GAP), "");
    terminal_write(p->out, text, paint, width + GAP, p->style->columns);
    fputc('\n', p->out);
}

static void print_records(struct printing *p)
{
    const char *below_name =
        p->below < p->table->columns ? escape(&p->arena, p->table->names[p->below]) : "";
    size_t width = terminal_width(below_name);

    for (size_t i = 0; i < p->count; i++)
        if (terminal_width(p->columns[i].texts[0]) > width)
            width = terminal_width(p->columns[i].texts[0]);
    for (size_t line = 1; line <= p->table->rows; line++) {
        const char *below = text_below(p, line - 1);

        if (line > 1)
            fputc('\n', p->out);
        for (size_t i = 0; i < p->count; i++)
            print_named(p, p->columns[i].texts[0], p->columns[i].texts[line],
                        paint_of(p, p->columns[i].column, line), width);
        if (below != NULL)
            print_named(p, below_name, below, paint_of(p, p->below, line), width);
    }
}

bool table_print(const struct table *table, const struct table_layout *layout,
                 const struct table_style *style, FILE *out)
{
    static const struct table_style plain = {.paint = NULL};
    const char *below = layout != NULL && layout->below != NULL ? layout->below : "";
    struct printing p = {.table = table, .style = style != NULL ? style : &plain, .out = out};

    if (table->failed)
        return false;
    if (table->rows > 0) {
        arena_init(&p.arena);
        p.columns = arena_alloc(&p.arena, table->columns * sizeof *p.columns);
        p.count = show_columns(table, layout, &p.arena, p.columns);
        p.below = find_column(table, below, strlen(below));
        if (p.count == 0 || fits(&p))
            print_aligned(&p);
        else
            print_records(&p);
        arena_reset(&p.arena);
    }
    return fflush(out) == 0 && !ferror(out);
}

/* ---- for machines ---- */

static void append_real(struct buf *b, double real, const char *none)
{
    if (real - real == 0) /* neither JSON nor CSV has NaN or infinity */
        buf_printf(b, "%.15g", real);
    else
        buf_append_str(b, none);
}

static void append_json(struct buf *b, const struct store_value *value)
{
    switch (value->type) {
    case STORE_NULL:
        buf_append_str(b, "null");
        break;
    case STORE_INTEGER:
        buf_printf(b, "%lld", (long long)value->integer);
        break;
    case STORE_REAL:
        append_real(b, value->real, "null");
        break;
    case STORE_TEXT:
        buf_append_json(b, value->text, strlen(value->text));
        break;
    }
}

void table_append_json(struct buf *b, size_t columns, const char *const *names,
                       const struct store_value *values)
{
    buf_append_char(b, '{');
    for (size_t i = 0; i < columns; i++) {
        if (i > 0)
            buf_append_str(b, ", ");
        buf_append_json(b, names[i], strlen(names[i]));
        buf_append_str(b, ": ");
        append_json(b, &values[i]);
    }
    buf_append_char(b, '}');
}

bool table_print_json(const struct table *table, FILE *out)
{
    struct buf line;
    bool ok = !table->failed;

    if (!ok)
        return false;
    buf_init(&line, JSON_ROW_MAX);
    fputc('[', out);
    for (size_t row = 0; row < table->rows && ok; row++) {
        buf_clear(&line);
        buf_append_str(&line, row == 0 ? "\n  " : ",\n  ");
        table_append_json(&line, table->columns, table->names, table->cells + row * table->columns);
        ok = buf_ok(&line);
        fputs(buf_str(&line), out);
    }
    fputs(table->rows > 0 ? "\n]\n" : "]\n", out);
    buf_reset(&line);
    return fflush(out) == 0 && !ferror(out) && ok;
}

/* A text that begins so may be a formula to a spreadsheet, or hide one (OWASP, "CSV Injection"). */
static bool is_formula(const char *text)
{
    return *text != '\0' && strchr("=+-@\t\r", *text) != NULL;
}

static void append_csv_text(struct buf *b, const char *text)
{
    bool formula = is_formula(text);

    if (!formula && text[strcspn(text, ",\"\r\n")] == '\0') {
        buf_append_str(b, text);
        return;
    }
    buf_append_str(b, formula ? "\"'" : "\"");
    for (const char *quote; (quote = strchr(text, '"')) != NULL; text = quote + 1) {
        buf_append(b, text, (size_t)(quote - text));
        buf_append_str(b, "\"\"");
    }
    buf_append_str(b, text);
    buf_append_char(b, '"');
}

void table_append_csv(struct buf *b, size_t columns, const struct store_value *values)
{
    for (size_t i = 0; i < columns; i++) {
        if (i > 0)
            buf_append_char(b, ',');
        switch (values[i].type) {
        case STORE_NULL:
            break;
        case STORE_INTEGER:
            buf_printf(b, "%lld", (long long)values[i].integer);
            break;
        case STORE_REAL:
            append_real(b, values[i].real, "");
            break;
        case STORE_TEXT:
            append_csv_text(b, values[i].text);
            break;
        }
    }
    buf_append_str(b, "\r\n");
}
