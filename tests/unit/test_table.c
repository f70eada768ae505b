/* test_table.c - columns for people: alignment, width, what may not reach a terminal, layouts; and
 * JSON for machines. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "table.h"

#define TEXT(s)                         \
    {                                   \
        .type = STORE_TEXT, .text = (s) \
    }
#define INTEGER(n)                            \
    {                                         \
        .type = STORE_INTEGER, .integer = (n) \
    }
#define REAL(x)                         \
    {                                   \
        .type = STORE_REAL, .real = (x) \
    }
#define NOTHING            \
    {                      \
        .type = STORE_NULL \
    }

/* ---- helpers ---- */

static const char *const names[] = {"Name", "Count", "Note"};

static struct table *table_of(const struct store_value (*rows)[3], size_t count)
{
    struct table *table = table_new();

    assert_non_null(table);
    for (size_t i = 0; i < count; i++)
        assert_true(table_row(table, 3, names, rows[i]));
    assert_int_equal(table_rows(table), count);
    return table;
}

/* Prints the table, for people or as JSON, and frees it. */
static void expect(struct table *table, bool json, const struct table_layout *layout,
                   const char *expected)
{
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);

    assert_non_null(out);
    assert_true(json ? table_print_json(table, out) : table_print(table, layout, NULL, out));
    assert_int_equal(fclose(out), 0);
    assert_string_equal(text, expected);
    free(text);
    table_free(table);
}

/* What one text looks like in a column of its own. */
static void expect_text(const char *text, const char *expected)
{
    const char *const name[] = {"A"};
    const struct store_value value[] = {TEXT(text)};
    struct table *table = table_new();
    char whole[256];

    assert_non_null(table);
    assert_true(table_row(table, 1, name, value));
    snprintf(whole, sizeof whole, "A\n%s\n", expected);
    expect(table, false, NULL, whole);
}

/* ---- for people ---- */

static void test_alignment(void **state)
{
    static const struct store_value rows[][3] = {
        {TEXT("a"), INTEGER(-12345678), TEXT("first")},
        {TEXT("longer"), NOTHING, NOTHING},
        {NOTHING, REAL(0.5), TEXT("")},
    };
    (void)state;

    expect(table_of(rows, 3), false, NULL,
           "Name        Count  Note\n"
           "a       -12345678  first\n"
           "longer          -  -\n"
           "-             0.5  \n");
}

/* A column with a word in it is no column of numbers; one of nothing is none either. */
static void test_mixed_columns(void **state)
{
    static const struct store_value rows[][3] = {
        {INTEGER(1), TEXT("2"), NOTHING},
        {INTEGER(100000), INTEGER(3), NOTHING},
    };
    (void)state;

    expect(table_of(rows, 2), false, NULL,
           "  Name  Count  Note\n"
           "     1  2      -\n"
           "100000  3      -\n");
}

static void test_numbers_last(void **state)
{
    static const struct store_value rows[][3] = {{NOTHING, NOTHING, INTEGER(1)}};
    (void)state;
    expect(table_of(rows, 1), false, NULL, "Name  Count  Note\n-     -         1\n");
}

/* East Asian characters take two columns, combining ones none. */
static void test_width(void **state)
{
    static const struct store_value rows[][3] = {
        {TEXT("\xE6\x97\xA5\xE6\x9C\xAC\xE5\x95\x86\xE4\xBA\x8B"), INTEGER(1), TEXT("x")},
        {TEXT("Mu\xCC\x88ller"), INTEGER(2), TEXT("x")},
        {TEXT("\xC3\xA9t\xC3\xA9"), INTEGER(3), TEXT("x")},
        {TEXT("\xEF\xBD\xB1\xEF\xBD\xB2"), INTEGER(4), TEXT("x")}, /* halfwidth katakana */
    };
    (void)state;

    expect(table_of(rows, 4), false, NULL,
           "Name      Count  Note\n"
           "\xE6\x97\xA5\xE6\x9C\xAC\xE5\x95\x86\xE4\xBA\x8B      1  x\n"
           "Mu\xCC\x88ller        2  x\n"
           "\xC3\xA9t\xC3\xA9           3  x\n"
           "\xEF\xBD\xB1\xEF\xBD\xB2            4  x\n");
}

static void test_what_disturbs_a_terminal(void **state)
{
    (void)state;
    expect_text("a\x1B[31mred", "a\\x1B[31mred");
    expect_text("a\nb\r\tc\x7F", "a\\x0Ab\\x0D\\x09c\\x7F");
    expect_text("a\xC2\x9B"
                "31m",
                "a\\xC2\\x9B31m"); /* CSI in one character */
    expect_text("a\xE2\x80\xA8"
                "b",
                "a\\xE2\\x80\\xA8b"); /* line separator */
    expect_text("a\xE2\x80\xAE"
                "b",
                "a\\xE2\\x80\\xAEb");        /* right-to-left override */
    expect_text("a\xFF\xC3", "a\\xFF\\xC3"); /* not UTF-8 */
    expect_text("a\\nb \xE2\x80\xA6 \xF0\x9F\x98\x80", "a\\nb \xE2\x80\xA6 \xF0\x9F\x98\x80");
}

/* The escape counts in the width, and a name is no safer than a cell. */
static void test_escaped_width(void **state)
{
    const char *const evil[] = {"A\x1B", "B"};
    const struct store_value first[] = {TEXT("\x01"), TEXT("x")};
    const struct store_value second[] = {TEXT("12345678"), TEXT("x")};
    struct table *table = table_new();
    (void)state;

    assert_non_null(table);
    assert_true(table_row(table, 2, evil, first));
    assert_true(table_row(table, 2, evil, second));
    expect(table, false, NULL,
           "A\\x1B     B\n"
           "\\x01      x\n"
           "12345678  x\n");
}

static void test_layout(void **state)
{
    static const struct store_value rows[][3] = {
        {TEXT("one"), INTEGER(1), TEXT("because\nof this")},
        {TEXT("two"), INTEGER(22), NOTHING},
    };
    static const struct table_layout chosen = {.columns = "Count Name"};
    static const struct table_layout below = {.columns = "Name Count", .below = "Note"};
    static const struct table_layout all_below = {.below = "Note"};
    static const struct table_layout unknown = {.columns = "Nam Name Names  Not", .below = "Not"};
    (void)state;

    expect(table_of(rows, 2), false, &chosen, "Count  Name\n    1  one\n   22  two\n");
    expect(table_of(rows, 2), false, &below,
           "Name  Count\n"
           "one       1\n"
           "    because\\x0Aof this\n"
           "two      22\n");
    expect(table_of(rows, 1), false, &all_below,
           "Name  Count  Note\n"
           "one       1  because\\x0Aof this\n"
           "    because\\x0Aof this\n");
    expect(table_of(rows, 2), false, &unknown, "Name\none\ntwo\n");
}

/* ---- on a terminal ---- */

static enum paint paint_words(const struct table *table, size_t row, const char *name)
{
    const struct store_value *cell = table_cell(table, row, name);

    assert_non_null(cell);
    assert_true(cell->type != STORE_NULL);
    assert_null(table_cell(table, row, "Nam"));
    if (cell->type != STORE_TEXT)
        return PAINT_NONE;
    return strncmp(cell->text, "bad", 3) == 0 ? PAINT_ALARM : PAINT_NONE;
}

/* Prints the table for a terminal, and frees it. */
static void expect_styled(struct table *table, bool colors, size_t columns,
                          const struct table_layout *layout, const char *expected)
{
    const struct table_style style = {.paint = colors ? paint_words : NULL, .columns = columns};
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);

    assert_non_null(out);
    assert_true(table_print(table, layout, &style, out));
    assert_int_equal(fclose(out), 0);
    assert_string_equal(text, expected);
    free(text);
    table_free(table);
}

#define RED(s) "\033[1;31m" s "\033[0m"
#define DIM(s) "\033[2m" s "\033[0m"

/* Colours take no room: what is beside them stands where it stands without. */
static void test_colors(void **state)
{
    static const struct store_value rows[][3] = {
        {TEXT("bad\xE6\x97\xA5"), INTEGER(1), TEXT("x")},
        {TEXT("longest"), NOTHING, TEXT("bad")},
    };
    (void)state;

    expect_styled(table_of(rows, 2), true, 0, NULL,
                  "Name     Count  Note\n" RED("bad\xE6\x97\xA5") "        1  x\n"
                                                                  "longest      " DIM("-") "  " RED(
                                                                      "bad") "\n");
    expect_styled(table_of(rows, 2), false, 80, NULL,
                  "Name     Count  Note\n"
                  "bad\xE6\x97\xA5        1  x\n"
                  "longest      -  bad\n");
}

/* The last text goes on in its own column, the one below a row under its own beginning. */
static void test_last_column_is_broken(void **state)
{
    static const struct store_value rows[][3] = {
        {TEXT("a"), INTEGER(1), TEXT("bad luck with /a/path/that-is-long and --an-option")},
        {TEXT("b"), INTEGER(22), TEXT("short")},
    };
    static const struct table_layout below = {.columns = "Name Count", .below = "Note"};
    (void)state;

    expect_styled(
        table_of(rows, 2), true, 38, NULL,
        "Name  Count  Note\n"
        "a         1  " RED(
            "bad luck with") "\n"
                             "             " RED(
                                 "/a/path/that-is-long and") "\n"
                                                             "             " RED(
                                                                 "--an-option") "\n"
                                                                                "b        22  "
                                                                                "short\n");
    expect_styled(table_of(rows, 2), false, 38, &below,
                  "Name  Count\n"
                  "a         1\n"
                  "    bad luck with /a/path/that-is-long\n"
                  "    and --an-option\n"
                  "b        22\n"
                  "    short\n");
}

static void test_too_narrow_for_columns(void **state)
{
    static const struct store_value rows[][3] = {
        {TEXT("bad"), INTEGER(1),
         TEXT("\xE6\x97\xA5\xE6\x9C\xAC\xE5\x95\x86\xE4\xBA\x8B"
              "\xE6\x97\xA5\xE6\x9C\xAC\xE5\x95\x86\xE4\xBA\x8B")},
        {TEXT("b"), NOTHING, NOTHING},
    };
    static const struct table_layout below = {.columns = "Name Count", .below = "Note"};
    static const struct store_value wide[][3] = {
        {TEXT("a name of twenty char"), INTEGER(1), TEXT("and a note that says a lot")}};
    (void)state;

    expect_styled(table_of(wide, 1), false, 40, NULL,
                  "Name   a name of twenty char\n"
                  "Count  1\n"
                  "Note   and a note that says a lot\n");
    expect_styled(table_of(rows, 2), false, 10, &below,
                  "Name   bad\n"
                  "Count  1\n"
                  "Note   \xE6\x97\xA5\xE6\x9C\xAC\xE5\x95\x86\xE4\xBA\x8B"
                  "\xE6\x97\xA5\xE6\x9C\xAC\xE5\x95\x86\xE4\xBA\x8B\n"
                  "\n"
                  "Name   b\n"
                  "Count  -\n");
    expect_styled(table_of(rows, 2), true, 17, NULL,
                  DIM("Name") "   " RED("bad") "\n" DIM("Count") "  1\n" DIM(
                      "Note") "   "
                              "\xE6\x97\xA5\xE6\x9C\xAC\xE5\x95\x86\xE4\xBA\x8B\xE6\x97\xA5\n"
                              "       \xE6\x9C\xAC\xE5\x95\x86\xE4\xBA\x8B\n"
                              "\n" DIM("Name") "   b\n" DIM("Count") "  " DIM("-") "\n" DIM(
                                  "Note") "   " DIM("-") "\n");
}

/* ---- for machines ---- */

static void test_json(void **state)
{
    static const struct store_value rows[][3] = {
        {TEXT("a\"b\\c\n\x1B"), INTEGER(INT64_MIN), TEXT("\xE6\x97\xA5")},
        {TEXT("\xFF"), REAL(0.1), NOTHING},
        {REAL((double)NAN), REAL((double)INFINITY), INTEGER(INT64_MAX)},
    };
    (void)state;

    expect(table_of(rows, 3), true, NULL,
           "[\n"
           "  {\"Name\": \"a\\\"b\\\\c\\u000a\\u001b\", \"Count\": -9223372036854775808, "
           "\"Note\": \"\xE6\x97\xA5\"},\n"
           "  {\"Name\": \"\xEF\xBF\xBD\", \"Count\": 0.1, \"Note\": null},\n"
           "  {\"Name\": null, \"Count\": null, \"Note\": 9223372036854775807}\n"
           "]\n");
}

/* ---- few rows, many rows, bad rows ---- */

/* RFC 4180; a cell that a spreadsheet would calculate is none any more. */
static void test_csv(void **state)
{
    static const struct {
        const char *text, *cell;
    } cases[] = {
        {"plain", "plain"},
        {"", ""},
        {" a b ", " a b "},
        {"1,5", "\"1,5\""},
        {"say \"no\"", "\"say \"\"no\"\"\""},
        {"\"", "\"\"\"\""},
        {"two\nlines", "\"two\nlines\""},
        {"two\rlines", "\"two\rlines\""},
        {"=1+1", "\"'=1+1\""},
        {"+1", "\"'+1\""},
        {"-1", "\"'-1\""},
        {"@A1", "\"'@A1\""},
        {"\t=1", "\"'\t=1\""},
        {"\r=1", "\"'\r=1\""},
        {"=\"a\",b", "\"'=\"\"a\"\",b\""},
        {"a=1", "a=1"},
        {"'=1", "'=1"},
        {"\xC3\xA4", "\xC3\xA4"},
    };
    struct buf line;
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const struct store_value row[] = {TEXT(cases[i].text)};
        buf_init(&line, 100);
        table_append_csv(&line, 1, row);
        assert_memory_equal(buf_str(&line), cases[i].cell, strlen(cases[i].cell));
        assert_string_equal(buf_str(&line) + strlen(cases[i].cell), "\r\n");
        buf_reset(&line);
    }
    const struct store_value row[] = {INTEGER(-15), NOTHING, REAL(-0.25), REAL(NAN), NOTHING};
    buf_init(&line, 100);
    table_append_csv(&line, 5, row);
    assert_string_equal(buf_str(&line), "-15,,-0.25,,\r\n");
    buf_reset(&line);
}

static void test_no_rows(void **state)
{
    (void)state;
    expect(table_new(), false, NULL, "");
    expect(table_new(), true, NULL, "[]\n");
    table_free(NULL);
}

/* Rows keep what they were given, however often the table grew and whatever became of the texts. */
static void test_many_rows(void **state)
{
    struct table *table = table_new();
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    const char *line;
    (void)state;

    assert_non_null(table);
    assert_non_null(out);
    for (int i = 1000; i < 2000; i++) {
        char name[8] = "Name";
        char cell[16];
        const char *const borrowed[] = {name};
        struct store_value value = {.type = STORE_TEXT, .text = cell};

        snprintf(cell, sizeof cell, "row%d", i);
        assert_true(table_row(table, 1, borrowed, &value));
        memset(name, 'x', sizeof name - 1);
    }
    assert_true(table_print(table, NULL, NULL, out));
    assert_int_equal(fclose(out), 0);
    assert_int_equal(strncmp(text, "Name\n", 5), 0);
    line = text + 5;
    for (int i = 1000; i < 2000; i++, line += 8) {
        char expected[16];
        snprintf(expected, sizeof expected, "row%d\n", i);
        assert_memory_equal(line, expected, 8);
    }
    assert_int_equal(*line, '\0');
    free(text);
    table_free(table);
}

static void test_rows_of_different_shape(void **state)
{
    static const struct store_value row[] = {INTEGER(1), INTEGER(2), INTEGER(3)};
    struct table *table = table_new();
    FILE *out = fopen("/dev/null", "w");
    (void)state;

    assert_non_null(table);
    assert_non_null(out);
    assert_true(table_row(table, 3, names, row));
    assert_false(table_row(table, 2, names, row));
    assert_false(table_print(table, NULL, NULL, out));
    assert_false(table_print_json(table, out));
    fclose(out);
    table_free(table);
}

static void test_full_disk(void **state)
{
    static const struct store_value rows[][3] = {{INTEGER(1), INTEGER(2), INTEGER(3)}};
    struct table *table = table_of(rows, 1);
    FILE *out = fopen("/dev/full", "w");
    (void)state;

    assert_non_null(out);
    assert_false(table_print(table, NULL, NULL, out));
    clearerr(out);
    assert_false(table_print_json(table, out));
    fclose(out);
    table_free(table);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_alignment),
        cmocka_unit_test(test_mixed_columns),
        cmocka_unit_test(test_numbers_last),
        cmocka_unit_test(test_width),
        cmocka_unit_test(test_what_disturbs_a_terminal),
        cmocka_unit_test(test_escaped_width),
        cmocka_unit_test(test_layout),
        cmocka_unit_test(test_colors),
        cmocka_unit_test(test_last_column_is_broken),
        cmocka_unit_test(test_too_narrow_for_columns),
        cmocka_unit_test(test_json),
        cmocka_unit_test(test_csv),
        cmocka_unit_test(test_no_rows),
        cmocka_unit_test(test_many_rows),
        cmocka_unit_test(test_rows_of_different_shape),
        cmocka_unit_test(test_full_disk),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
