/* test_fallback.c - the ways in which a file may hold the fallback key. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "fallback.h"

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))
#define KEY "AIzaSy-0123_abc"
#define BOM "\xEF\xBB\xBF"

static char directory[] = "/tmp/test_fallback.XXXXXX";
static char path[64];

static int set_up_all(void **state)
{
    (void)state;
    if (mkdtemp(directory) == NULL)
        return -1;
    snprintf(path, sizeof path, "%s/appSetting.txt", directory);
    return 0;
}

static int tear_down_all(void **state)
{
    (void)state;
    unlink(path);
    return rmdir(directory);
}

/* expected NULL: refused. */
static void expect(const char *content, size_t len, const char *expected)
{
    struct err err = {0};
    char *key = (char *)1;
    FILE *file = fopen(path, "w");

    assert_non_null(file);
    assert_int_equal(fwrite(content, 1, len, file), len);
    assert_int_equal(fclose(file), 0);
    enum err_code code = fallback_load(path, &key, &err);
    if (expected != NULL && (code != ERR_NONE || strcmp(key, expected) != 0))
        fail_msg("%s\n-> %s", content, code == ERR_NONE ? key : err.message);
    if (expected == NULL) {
        if (code != ERR_CONFIG || key != NULL)
            fail_msg("not refused: %s", content);
        assert_int_equal(err.code, ERR_CONFIG);
        assert_non_null(strstr(err.message, path));
        if (len > 3 && strstr(err.message, content) != NULL)
            fail_msg("the message shows the content: %s", err.message);
    }
    free(key);
}

static const struct {
    const char *content, *key; /* key NULL: refused */
} files[] = {
    /* a bare key */
    {KEY, KEY},
    {KEY "\n", KEY},
    {KEY "\r\n", KEY},
    {"  " KEY " \t\n\n", KEY},
    {"\n\n" KEY "\n", KEY},
    {BOM KEY "\r\n", KEY},
    {"\"" KEY "\"\n", KEY},
    {"# the key of the German office\n; until May\n" KEY "\n", KEY},
    /* a name and a value */
    {"KEY=" KEY "\n", NULL},
    {"API_KEY=" KEY, KEY},
    {"GEMINI_API_KEY=" KEY "\n", KEY},
    {"GEMINI_API_KEY = " KEY " \r\n", KEY},
    {"gemini_api_key: " KEY "\n", KEY},
    {"Google_Api_Key_1='" KEY "'\n", KEY},
    {"export GEMINI_API_KEY=\"" KEY "\"\n", KEY},
    {"GeminiApiKey=" KEY ";\n", KEY},
    {BOM "API_KEY=" KEY "\r\n", KEY},
    {"API_KEY=abc=def==\n", "abc=def=="},
    {"API_KEY=abc:def\n", "abc:def"},
    /* as JSON */
    {"\"GEMINI_API_KEY\": \"" KEY "\",\n", KEY},
    {"{\n  \"Model\": \"gemini\",\n  \"GEMINI_API_KEY\": \"" KEY "\",\n  \"Retries\": 3\n}\n", KEY},
    {"{\r\n\t\"API_KEY\" : \"" KEY "\"\r\n}\r\n", KEY},
    /* several lines */
    {"MODEL=gemini-1\nGEMINI_API_KEY=" KEY "\nPORT=8000\n", KEY},
    {"# GEMINI_API_KEY=old\nGEMINI_API_KEY=" KEY "\n", KEY},
    {"; GEMINI_API_KEY=old\n  # API_KEY=old\nGEMINI_API_KEY=" KEY "\n", KEY},
    {"API_KEY=" KEY "\nAPI_KEY=second\n", KEY},
    {"API_KEY=\nAPI_KEY=" KEY "\n", KEY},
    {"[gemini]\nAPI_KEY=" KEY "\n", KEY},
    {"word\nAPI_KEY=" KEY "\n", KEY},
    /* none */
    {"", NULL},
    {"\n\n \t\r\n", NULL},
    {BOM, NULL},
    {"# " KEY "\n", NULL},
    {"# API_KEY=" KEY "\n", NULL},
    {"API_KEY=\n", NULL},
    {"API_KEY=\"\"\n", NULL},
    {"API_KEY=two words\n", NULL},
    {"API_KEY\n" KEY "\n", NULL},
    {"one\ntwo\n", NULL}, /* which of the two? */
    {"MODEL=gemini\n", NULL},
    {"MODEL=gemini\n" KEY "\n", NULL},
    {"url=https://example.org/?API_KEY=x\n", NULL},
    {"two words\n", NULL},
    {"caf\xC3\xA9-key\n", NULL},
};

static void test_files(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT(files); i++)
        expect(files[i].content, strlen(files[i].content), files[i].key);
}

static void test_json_on_one_line(void **state)
{
    static const char *const lines[] = {
        "{\"GEMINI_API_KEY\": \"" KEY "\"}\n",
        "{ \"GEMINI_API_KEY\" : \"" KEY "\" }",
    };
    (void)state;

    for (size_t i = 0; i < COUNT(lines); i++)
        expect(lines[i], strlen(lines[i]), KEY);
}

static void test_length(void **state)
{
    static char content[5000];
    (void)state;

    memset(content, 'k', sizeof content - 1);
    expect(content, 1023, (content[1023] = '\0', content));
    content[1023] = 'k';
    expect(content, 1024, NULL);
    expect(content, sizeof content - 1, NULL);
}

static void test_no_file(void **state)
{
    struct err err;
    char *key = NULL;
    (void)state;

    unlink(path);
    assert_int_equal(fallback_load(path, &key, &err), ERR_CONFIG);
    assert_non_null(strstr(err.message, path));
    assert_null(key);
    assert_int_equal(fallback_load(directory, &key, &err), ERR_CONFIG);
    assert_null(key);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_json_on_one_line),
        cmocka_unit_test(test_length),
        cmocka_unit_test(test_no_file),
    };
    return cmocka_run_group_tests(tests, set_up_all, tear_down_all);
}
