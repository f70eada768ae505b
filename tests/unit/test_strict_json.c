/* test_strict_json.c - what is JSON by RFC 8259, and what only looks like it. */
#include <json.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "strict_json.h"

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))
#define DEPTH 4

/* Parses a copy with nothing behind it, and writes it again; NULL where it is not taken. */
static const char *parse(const char *text, size_t len)
{
    static char written[256];
    char *copy = malloc(len > 0 ? len : 1);
    assert_non_null(copy);
    memcpy(copy, text, len);
    struct json_object *value = strict_json_parse(copy, len, DEPTH);
    if (value != NULL)
        snprintf(written, sizeof written, "%s",
                 json_object_to_json_string_ext(value, JSON_C_TO_STRING_PLAIN));
    json_object_put(value);
    free(copy);
    return value != NULL ? written : NULL;
}

static void test_taken(void **state)
{
    static const struct {
        const char *text, *written; /* NULL: as it is */
    } rows[] = {
        /* a value need be no object; the text may end with it */
        {"5", NULL},
        {"-0.5e+10", NULL},
        {"0", NULL},
        {"\"x\"", NULL},
        {"true", NULL},
        {" [ ]\r\n\t", "[]"},
        {"{}", NULL},
        {"[[[[]]]]", NULL},
        {"{\"a\":{\"b\":[1,null,\"\\u00e9\\ud83d\\ude00\"]}}",
         "{\"a\":{\"b\":[1,null,\"\xC3\xA9\xF0\x9F\x98\x80\"]}}"},
        {"[9223372036854775807,9223372036854775808,-99999999999999999999]",
         "[9223372036854775807,\"9223372036854775808\",\"-99999999999999999999\"]"},
        {"[1.50,1e5,12345678901234567890.5]", NULL},
    };
    (void)state;

    for (size_t i = 0; i < COUNT(rows); i++) {
        const char *written = parse(rows[i].text, strlen(rows[i].text));
        if (written == NULL)
            fail_msg("not taken: %s", rows[i].text);
        assert_string_equal(written, rows[i].written == NULL ? rows[i].text : rows[i].written);
    }
}

static void test_refused(void **state)
{
    static const char *const texts[] = {"",
                                        " ",
                                        "null", /* json-c has no object for it */
                                        "[",
                                        "]",
                                        "{",
                                        "[1",
                                        "[1,",
                                        "[1,]",
                                        "[,1]",
                                        "[1 2]",
                                        "{\"a\"}",
                                        "{\"a\":}",
                                        "{\"a\":1,}",
                                        "{a:1}",
                                        "{'a':1}",
                                        "'a'",
                                        "{1:2}",
                                        "{99999999999999999999:1}",
                                        "{\"a\":1,-99999999999999999999 \t\r\n:1}",
                                        "\"",
                                        "\"a",
                                        "\"\\",
                                        "\"\\x\"",
                                        "\"\\u12\"",
                                        "\"\\u12g4\"",
                                        "\"\t\"",
                                        "01",
                                        "-",
                                        "-a",
                                        "+1",
                                        "1.",
                                        ".5",
                                        "1e",
                                        "1e+",
                                        "0x10",
                                        "1,5",
                                        "NaN",
                                        "Infinity",
                                        "-Infinity",
                                        "True",
                                        "nul",
                                        "truer",
                                        "[1] 2",
                                        "{}{}",
                                        "1 2",
                                        "/**/1",
                                        "\xEF\xBB\xBF{}",
                                        "\"\xFF\"",
                                        "\"\xED\xA0\x80\"",
                                        "[[[[[]]]]]"};
    (void)state;

    for (size_t i = 0; i < COUNT(texts); i++)
        if (parse(texts[i], strlen(texts[i])) != NULL)
            fail_msg("taken: %s", texts[i]);
    assert_null(parse("1\0", 2));
    assert_null(parse("[1\0]", 4));
    assert_null(parse("\"\0\"", 3));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_taken),
        cmocka_unit_test(test_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
