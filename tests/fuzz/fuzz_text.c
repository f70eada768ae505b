/* fuzz_text.c - any bytes as text from outside: as a form's field, folded as a company's name is, and in
 * each place where it may come out again (log entries, answers, tables). One entry must stay one line,
 * nothing may reach a terminal that it would obey, and JSON must hold what went in. */
#include <json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "log.h"
#include "request.h"
#include "support.h"
#include "table.h"
#include "text.h"

#define FIELD_MAX 256

static void check_field(const char *s, size_t len)
{
    if (text_fault(s, len, 1, FIELD_MAX) != NULL)
        return;
    CHECK(len >= 1 && len <= FIELD_MAX && memchr(s, '\0', len) == NULL && fuzz_is_line(s));
    CHECK(text_fault(s, len, 0, FIELD_MAX) == NULL && *s != ' ' && s[len - 1] != ' ');
}

static void check_fold(const char *s)
{
    struct arena arena;

    arena_init(&arena);
    const char *once = text_fold(&arena, s), *twice = text_fold(&arena, once);
    CHECK(strcmp(once, twice) == 0);
    CHECK(!fuzz_is_utf8(s, strlen(s)) || fuzz_is_utf8(once, strlen(once)));
    for (const char *c = once; fuzz_is_utf8(s, strlen(s)) && *c != '\0'; c++)
        CHECK(*c < 'A' || *c > 'Z');
    arena_reset(&arena);
}

/* ---- escaping ---- */

/* What text_escape has made of it, undone. */
static void unescape(struct buf *out, const char *s)
{
    while (*s != '\0') {
        unsigned byte;
        if (*s != '\\') {
            buf_append_char(out, *s++);
            continue;
        }
        if (s[1] == 'x') {
            CHECK(sscanf(s + 2, "%2X", &byte) == 1);
            buf_append_char(out, (char)byte);
            s += 4;
            continue;
        }
        CHECK(s[1] == 'n' || s[1] == 'r' || s[1] == '\\');
        buf_append_char(out, s[1] == 'n' ? '\n' : s[1] == 'r' ? '\r' : '\\');
        s += 2;
    }
}

static void check_escape(const char *s, size_t len)
{
    struct buf escaped, back;

    buf_init(&escaped, 4 * len);
    buf_init(&back, len);
    text_escape(&escaped, s, len);
    CHECK(buf_ok(&escaped) && strlen(buf_str(&escaped)) == escaped.len);
    CHECK(fuzz_is_line(buf_str(&escaped)));
    unescape(&back, buf_str(&escaped));
    CHECK(buf_ok(&back) && back.len == len && (len == 0 || memcmp(back.data, s, len) == 0));
    buf_reset(&back);
    buf_reset(&escaped);
}

/* ---- places ---- */

/* In a JSON string; invalid UTF-8 becomes U+FFFD. */
static void check_string(struct json_object *value, const char *s, size_t len)
{
    CHECK(json_object_is_type(value, json_type_string));
    CHECK(!fuzz_is_utf8(s, len) ||
          ((size_t)json_object_get_string_len(value) == len &&
           (len == 0 || memcmp(json_object_get_string(value), s, len) == 0)));
}

static void check_json(const char *s, size_t len)
{
    struct json_object *array, *value;
    struct buf json;

    buf_init(&json, 6 * len + 4);
    buf_append_char(&json, '[');
    buf_append_json(&json, s, len);
    buf_append_char(&json, ']');
    CHECK(buf_ok(&json));
    array = fuzz_parse_own(json.data, json.len);
    value = json_object_array_get_idx(array, 0);
    check_string(value, s, len);
    json_object_put(array);
    buf_reset(&json);
}

static void check_log(const char *s)
{
    struct log_entry *entry =
        log_entry_new(LOG_ERROR, __FILE__, __LINE__, __func__, NULL, s, "%s", s);

    CHECK(entry != NULL && fuzz_is_line(entry->message) && fuzz_is_line(entry->exception));
    CHECK(strlen(entry->message) <= 4000 && strlen(entry->exception) <= 16000);
    free(entry);
}

static void check_problem(const char *s)
{
    struct request request = {.id = "00000000-0000-7000-8000-000000000000"};
    struct json_object *problem, *detail = NULL;
    struct response response;

    response_init(&response);
    response_problem(&response, &request, ERR_BAD_REQUEST, s, 0, false);
    problem = fuzz_parse_own(buf_str(&response.body), response.body.len);
    CHECK(json_object_object_get_ex(problem, "detail", &detail));
    check_string(detail, s, strlen(s));
    json_object_put(problem);
    response_reset(&response);
}

static void check_err(const char *s)
{
    struct err err = {.message = ""};

    CHECK(err_set(&err, ERR_CONFIG, "%s", s) == ERR_CONFIG);
    CHECK(err_prefix(&err, "%s", s) == ERR_CONFIG);
    CHECK(memchr(err.message, '\0', sizeof err.message) != NULL);
}

/* ---- tables ---- */

static char *print(const struct table *table, bool json, size_t columns)
{
    static const struct table_layout layout = {"Text Number None Missing", "Text"};
    const struct table_style style = {.columns = columns};
    char *text = NULL;
    size_t len;
    FILE *out = open_memstream(&text, &len);

    CHECK(out != NULL);
    CHECK(json ? table_print_json(table, out) : table_print(table, &layout, &style, out));
    CHECK(fclose(out) == 0);
    return text;
}

/* Returns how many lines a terminal so wide shows. */
static int check_lines(const struct table *table, size_t columns)
{
    char *text = print(table, false, columns);
    int lines = 0;

    for (char *line = text, *end; (end = strchr(line, '\n')) != NULL; line = end + 1, lines++) {
        *end = '\0';
        CHECK(fuzz_is_line(line));
        /* right-to-left override, left-to-right isolate */
        CHECK(strstr(line, "\xE2\x80\xAE") == NULL && strstr(line, "\xE2\x81\xA6") == NULL);
    }
    free(text);
    return lines;
}

static void check_table(const char *s)
{
    static const char *const names[] = {"Text", "Number", "None"};
    const struct store_value row[] = {{.type = STORE_TEXT, .text = s},
                                      {.type = STORE_INTEGER, .integer = INT64_MIN},
                                      {.type = STORE_NULL}};
    struct table *table = table_new();
    struct json_object *array, *value = NULL;

    CHECK(table != NULL && table_row(table, 3, names, row));
    CHECK(check_lines(table, 0) == 3); /* names, the row, and what stands below it */
    CHECK(check_lines(table, 30) >= 3 && check_lines(table, 1) >= 3);
    char *text = print(table, true, 0);
    array = fuzz_parse_own(text, strlen(text));
    CHECK(json_object_object_get_ex(json_object_array_get_idx(array, 0), "Text", &value));
    check_string(value, s, strlen(s));
    json_object_put(array);
    free(text);
    table_free(table);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input input = {data, size};
    char *s = fuzz_rest(&input);

    check_field(s, size);
    check_escape(s, size);
    check_json(s, size);
    check_fold(s);
    check_log(s);
    check_problem(s);
    check_err(s);
    check_table(s);
    free(s);
    return 0;
}
