/* test_multipart.c - forms good and bad, whole and cut anywhere. A parsed form is compared as one
 * line: "name=data;" for each part, with \xNN for what is not printable ASCII. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "multipart.h"

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))
#define BODY(s) (s), sizeof(s) - 1
#define TYPE "multipart/form-data; boundary=b"
#define HEAD(disposition) "--b\r\nContent-Disposition: " disposition "\r\n"
#define PART(name, data) HEAD("form-data; name=\"" name "\"") "\r\n" data "\r\n"
#define END "--b--\r\n"

/* ---- helpers ---- */

static void describe(struct buf *out, const char *s, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        if (s[i] >= ' ' && s[i] <= '~')
            buf_append_char(out, s[i]);
        else
            buf_printf(out, "\\x%02X", (unsigned char)s[i]);
    }
}

/* Parses a copy with nothing before or behind it, so that a sanitizer sees who leaves it. */
static enum err_code parse(const char *type, const char *body, size_t len, struct buf *form,
                           struct err *err)
{
    struct multipart_part parts[MULTIPART_MAX_PARTS];
    struct find_marks delimiter;
    char *copy = malloc(len > 0 ? len : 1);
    size_t count = 0;
    struct arena arena;

    assert_non_null(copy);
    memcpy(copy, body, len);
    arena_init(&arena);
    *err = (struct err){0};
    enum err_code code = multipart_delimiter(type, &delimiter, err);
    if (code == ERR_NONE) {
        find_marks_look(&delimiter, copy, len / 2); /* the rest is found while it is parsed */
        count = 1000;
        code = multipart_parse(&arena, &delimiter, copy, len, parts, &count, err);
    }
    assert_true(code == ERR_NONE ||
                (code == ERR_BAD_REQUEST && err->code == code && err->message[0] != '\0'));
    assert_true(count <= MULTIPART_MAX_PARTS);
    for (size_t i = 0; code == ERR_NONE && i < count; i++) {
        assert_true(parts[i].data >= copy && parts[i].data + parts[i].len <= copy + len);
        describe(form, parts[i].name, strlen(parts[i].name));
        buf_append_char(form, '=');
        describe(form, parts[i].data, parts[i].len);
        buf_append_char(form, ';');
    }
    arena_reset(&arena);
    free(copy);
    return code;
}

/* expected NULL: refused. */
static void expect(const char *what, const char *type, const char *body, size_t len,
                   const char *expected)
{
    struct err err;
    struct buf form;

    buf_init(&form, 100000);
    enum err_code code = parse(type, body, len, &form, &err);
    if (expected == NULL ? code == ERR_NONE : code != ERR_NONE)
        fail_msg("%s: %s", what, code == ERR_NONE ? "not refused" : err.message);
    if (expected != NULL && strcmp(buf_str(&form), expected) != 0)
        fail_msg("%s: %s", what, buf_str(&form));
    buf_reset(&form);
}

/* ---- whole forms ---- */

static const struct {
    const char *what, *body;
    size_t len;
    const char *form; /* NULL: refused */
} forms[] = {
    {"one order", BODY(PART("file", "F") PART("companyID", "NT047") PART("username", "eva") END),
     "file=F;companyID=NT047;username=eva;"},
    {"another order",
     BODY(PART("username", "eva") PART("companyID", "NT047") PART("file", "F") END),
     "username=eva;companyID=NT047;file=F;"},
    {"a field twice: the caller's matter", BODY(PART("a", "1") PART("a", "2") END), "a=1;a=2;"},
    {"no part at all", BODY(END), ""},
    {"nothing after the closing delimiter", BODY(PART("a", "1") "--b--"), "a=1;"},
    {"epilogue", BODY(PART("a", "1") END "junk\r\n--b\r\nmore"), "a=1;"},
    {"preamble", BODY("This is a form.\r\n--c\r\n" PART("a", "1") END), "a=1;"},
    {"preamble of an empty line", BODY("\r\n" PART("a", "1") END), "a=1;"},
    {"preamble with a boundary inside a line", BODY("see --b\r\n" PART("a", "1") END), "a=1;"},
    {"blanks after a delimiter",
     BODY("--b \t\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n" END), "a=1;"},
    {"other header lines",
     BODY("--b\r\nX-A: 1\r\nContent-Type: application/pdf\r\nContent-Disposition: form-data; "
          "name=\"file\"; filename=\"a.pdf\"\r\nContent-Length: 1\r\n\r\nF\r\n" END),
     "file=F;"},

    {"case does not matter",
     BODY("--b\r\nCONTENT-disposition: Form-DATA; NAME=\"a\"\r\n\r\n1\r\n" END), "a=1;"},
    {"the name's own case does", BODY(PART("A", "1") END), "A=1;"},
    {"the boundary's case does",
     BODY("--B\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n--B--"), NULL},
    {"no blank after the colon",
     BODY("--b\r\nContent-Disposition:form-data;name=a\r\n\r\n1\r\n" END), "a=1;"},
    {"blanks round everything",
     BODY("--b\r\nContent-Disposition: \t form-data \t; \t name = \t\"a\" \t; \r\n\r\n1\r\n" END),
     "a=1;"},

    {"unquoted name", BODY(HEAD("form-data; name=companyID") "\r\n1\r\n" END), "companyID=1;"},
    {"name after filename",
     BODY(HEAD("form-data; filename=\"x.pdf\"; name=\"file\"") "\r\nF\r\n" END), "file=F;"},
    {"a quote as browsers write it", BODY(PART("a%22b", "1") END), "a\"b=1;"},
    {"a quote escaped", BODY(PART("a\\\"b", "1") END), "a\"b=1;"},
    {"a backslash escaped", BODY(PART("a\\\\b", "1") END), "a\\b=1;"},
    {"a backslash left as it is", BODY(PART("a\\b", "1") END), "a\\b=1;"},
    {"other percent signs are text", BODY(PART("100%%2%41%0D%0A", "1") END), "100%%2%41%0D%0A=1;"},
    {"a name in UTF-8",
     BODY(PART("stra\xC3\x9F"
               "e",
               "1") END),
     "stra\\xC3\\x9Fe=1;"},
    {"a file name that imitates a name",
     BODY(HEAD("form-data; name=\"file\"; filename=\"x; name=\\\"companyID\\\"\"") "\r\nF\r\n" END),
     "file=F;"},
    {"a file name of a path",
     BODY(HEAD("form-data; name=\"file\"; filename=\"C:\\scan\\a.pdf\"") "\r\nF\r\n" END),
     "file=F;"},
    {"filename* is ignored",
     BODY(HEAD(
         "form-data; name=\"file\"; filename=\"x.pdf\"; filename*=UTF-8''%C3%A9.pdf") "\r\nF\r"
                                                                                      "\n" END),
     "file=F;"},
    {"name* is not the name", BODY(HEAD("form-data; name*=UTF-8''a") "\r\n1\r\n" END), NULL},

    {"an empty part", BODY(PART("a", "") PART("b", "2") END), "a=;b=2;"},
    {"an empty part without a line of its own",
     BODY(HEAD("form-data; name=a") "\r\n" PART("b", "2") END), "a=;b=2;"},
    {"line ends in the data", BODY(PART("a", "\r\n1\r\n\r\n") END),
     "a=\\x0D\\x0A1\\x0D\\x0A\\x0D\\x0A;"},
    {"NUL bytes in the data",
     BODY(PART("a", "\0"
                    "1\0\0") END),
     "a=\\x001\\x00\\x00;"},
    {"bytes that are no text", BODY(PART("a", "\xFF\xD8\xFF\r") END), "a=\\xFF\\xD8\\xFF\\x0D;"},

    {"alike: a delimiter itself", BODY(PART("a", "x\r\n--b\r\n--b") END), NULL},
    {"alike: not at a line's beginning", BODY(PART("a", "x--b--y") END), "a=x--b--y;"},
    {"alike: after a bare line feed", BODY(PART("a", "1\n--b\n--b--\n") END),
     "a=1\\x0A--b\\x0A--b--\\x0A;"},
    {"alike: after a bare carriage return", BODY(PART("a", "1\r--b--") END), "a=1\\x0D--b--;"},
    {"alike: one dash", BODY(PART("a", "1\r\n-b\r\n-b--") END), "a=1\\x0D\\x0A-b\\x0D\\x0A-b--;"},
    {"alike: three dashes", BODY(PART("a", "1\r\n---b") END), "a=1\\x0D\\x0A---b;"},
    {"alike: another boundary", BODY(PART("a", "1\r\n--B\r\n--c") END),
     "a=1\\x0D\\x0A--B\\x0D\\x0A--c;"},
    {"alike: two readers would differ", BODY(PART("a", "1\r\n--bx") END), NULL},
    {"alike: one dash behind", BODY(PART("a", "1\r\n--b-\r\n") END), NULL},

    {"transfer encoding binary",
     BODY(HEAD("form-data; name=a") "Content-Transfer-Encoding: binary\r\n\r\n1\r\n" END), "a=1;"},
    {"transfer encoding 8bit",
     BODY(HEAD("form-data; name=a") "content-transfer-encoding:8BIT\r\n\r\n1\r\n" END), "a=1;"},
    {"transfer encoding 7bit",
     BODY("--b\r\nContent-Transfer-Encoding: 7bit\r\nContent-Disposition: form-data; "
          "name=a\r\n\r\n1\r\n" END),
     "a=1;"},
    {"transfer encoding base64",
     BODY(HEAD("form-data; name=a") "Content-Transfer-Encoding: base64\r\n\r\nMQ==\r\n" END), NULL},
    {"transfer encoding quoted-printable",
     BODY(HEAD("form-data; name=a") "CONTENT-TRANSFER-ENCODING: Quoted-Printable\r\n\r\n1\r\n" END),
     NULL},
    {"transfer encoding empty",
     BODY(HEAD("form-data; name=a") "Content-Transfer-Encoding:\r\n\r\n1\r\n" END), NULL},

    {"empty body", BODY(""), NULL},
    {"no boundary in it", BODY("companyID=NT047&username=eva"), NULL},
    {"line feeds alone", BODY("--b\nContent-Disposition: form-data; name=\"a\"\n\n1\n--b--\n"),
     NULL},
    {"line feeds alone in the header",
     BODY("--b\r\nContent-Disposition: form-data; name=\"a\"\n\n1\r\n" END), NULL},
    {"no closing delimiter", BODY(PART("a", "1") "--b\r\n"), NULL},
    {"no name", BODY(HEAD("form-data") "\r\n1\r\n" END), NULL},
    {"only a file name", BODY(HEAD("form-data; filename=\"name\"") "\r\n1\r\n" END), NULL},
    {"no disposition", BODY("--b\r\nContent-Type: text/plain\r\n\r\n1\r\n" END), NULL},
    {"no header", BODY("--b\r\n\r\n1\r\n" END), NULL},
    {"another disposition", BODY(HEAD("attachment; name=\"a\"") "\r\n1\r\n" END), NULL},
    {"a disposition that only begins alike", BODY(HEAD("form-data2; name=\"a\"") "\r\n1\r\n" END),
     NULL},
    {"two dispositions",
     BODY(HEAD(
         "form-data; name=\"a\"") "Content-Disposition: form-data; name=\"c\"\r\n\r\n1\r\n" END),
     NULL},
    {"name twice", BODY(HEAD("form-data; name=\"a\"; name=\"c\"") "\r\n1\r\n" END), NULL},
    {"name twice, the same",
     BODY(HEAD("form-data; name=\"a\"; filename=x; NAME=a") "\r\n1\r\n" END), NULL},
    {"a quote that does not end", BODY(HEAD("form-data; name=\"a") "\r\n1\r\n" END), NULL},
    {"a quote that ends escaped", BODY(HEAD("form-data; name=\"a\\\"") "\r\n1\r\n" END), NULL},
    {"text after a quoted name", BODY(HEAD("form-data; name=\"a\"b") "\r\n1\r\n" END), NULL},
    {"no semicolon", BODY(HEAD("form-data name=\"a\"") "\r\n1\r\n" END), NULL},
    {"a parameter without a value", BODY(HEAD("form-data; name") "\r\n1\r\n" END), NULL},
    {"an empty unquoted value", BODY(HEAD("form-data; name=; filename=x") "\r\n1\r\n" END), NULL},
    {"a NUL in a name", BODY(PART("a\0z", "1") END), NULL},
    {"a control character in a name", BODY(PART("a\x01z", "1") END), NULL},
    {"a folded header line",
     BODY("--b\r\nContent-Disposition: form-data;\r\n name=\"a\"\r\n\r\n1\r\n" END), NULL},
};

static void test_forms(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT(forms); i++)
        expect(forms[i].what, TYPE, forms[i].body, forms[i].len, forms[i].form);
}

/* WHATWG: of the control characters browsers escape only the two of a line end. */
static void test_tab_in_a_file_name(void **state)
{
    (void)state;
    expect("a tab", TYPE,
           BODY(HEAD("form-data; name=\"file\"; filename=\"a\tb.pdf\"") "\r\nF\r\n" END),
           "file=F;");
}

/* ---- the Content-Type ---- */

static void test_content_types(void **state)
{
    static const struct {
        const char *type;
        bool good;
    } cases[] = {
        {"multipart/form-data; boundary=b", true},
        {"multipart/form-data;boundary=b", true},
        {"multipart/form-data ; boundary = b ;", true},
        {"multipart/form-data; boundary=\"b\"", true},
        {"multipart/form-data; charset=utf-8; boundary=b", true},
        {"multipart/form-data; boundary=b; charset=\"utf-8\"", true},
        {"Multipart/Form-DATA; BOUNDARY=b", true},
        {"multipart/form-data; boundary=\"\\b\"", false},
        {"multipart/form-data; boundary=B", false},
        {"", false},
        {"multipart/form-data", false},
        {"multipart/form-data; charset=utf-8", false},
        {"multipart/form-data; boundary", false},
        {"multipart/form-data; boundary=", false},
        {"multipart/form-data; boundary=\"\"", false},
        {"multipart/form-data; boundary=\"b", false},
        {"multipart/form-data; boundary=\"b \"", false},
        {"multipart/form-data; boundary=\"b\x7F\"", false},
        {"multipart/form-data; boundary=\"b\xC3\xA9\"", false},
        {"multipart/form-data; boundary=b; boundary=b", false},
        {"multipart/form-data; boundary=b; boundary=c", false},
        {"multipart/form-data, boundary=b", false},
        {"multipart/form-data2; boundary=b", false},
        {"multipart/mixed; boundary=b", false},
        {"application/x-www-form-urlencoded", false},
        {"application/pdf; boundary=b", false},
        {"text/plain", false},
    };
    (void)state;

    for (size_t i = 0; i < COUNT(cases); i++)
        expect(cases[i].type, cases[i].type, BODY(PART("a", "1") END),
               cases[i].good ? "a=1;" : NULL);
}

static void test_boundaries(void **state)
{
    char boundary[72], type[200], body[500];
    (void)state;

    for (int quoted = 0; quoted < 2; quoted++) {
        for (int n = 69; n <= 71; n++) { /* RFC 2046: at most 70 */
            memset(boundary, '-', sizeof boundary);
            boundary[n - 1] = 'z';
            boundary[n] = '\0';
            const char *quote = quoted ? "\"" : "";
            snprintf(type, sizeof type, "multipart/form-data; boundary=%s%s%s", quote, boundary,
                     quote);
            int len = snprintf(body, sizeof body,
                               "--%s\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n--%s--",
                               boundary, boundary);
            expect(type, type, body, (size_t)len, n <= 70 ? "a=1;" : NULL);
        }
    }
    /* what no boundary may hold, even where the body agrees */
    expect("a space last", "multipart/form-data; boundary=\"b \"",
           BODY("--b \r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n--b --"), NULL);
    expect("no ASCII", "multipart/form-data; boundary=\"\xC3\xA9\"",
           BODY("--\xC3\xA9\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n--\xC3\xA9--"),
           NULL);
    expect("a space inside", "multipart/form-data; boundary=\"a b:(c)?\"",
           BODY("--a b:(c)?\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n--a b:(c)?--"),
           "a=1;");
}

/* ---- limits ---- */

static void test_too_many_parts(void **state)
{
    (void)state;
    for (int n = MULTIPART_MAX_PARTS - 1; n <= MULTIPART_MAX_PARTS + 1; n++) {
        struct buf body, form;
        struct err err;
        buf_init(&body, 100000);
        buf_init(&form, 100000);
        for (int i = 0; i < n; i++)
            buf_append_str(&body, PART("a", "1"));
        buf_append_str(&body, END);
        enum err_code code = parse(TYPE, buf_str(&body), body.len, &form, &err);
        assert_int_equal(code, n <= MULTIPART_MAX_PARTS ? ERR_NONE : ERR_BAD_REQUEST);
        assert_int_equal(form.len, code == ERR_NONE ? 4 * n : 0);
        buf_reset(&body);
        buf_reset(&form);
    }
}

static void test_header_too_long(void **state)
{
    static const char disposition[] = "Content-Disposition: form-data; name=a\r\n";
    (void)state;

    for (int over = -1; over <= 1; over++) {
        struct buf body;
        /* the header's lines, the empty one with them, take just so many bytes */
        int filler = MULTIPART_MAX_HEADER + over - (int)sizeof disposition + 1 - 2 - 2 - 3;
        buf_init(&body, 100000);
        buf_printf(&body, "--b\r\n%sX: %*d\r\n\r\n1\r\n" END, disposition, filler, 0);
        expect("a long header", TYPE, buf_str(&body), body.len, over <= 0 ? "a=1;" : NULL);
        buf_reset(&body);
    }
}

static void test_name_too_long(void **state)
{
    char name[258], expected[300];
    (void)state;

    for (size_t n = 256; n <= 257; n++) {
        struct buf body;
        memset(name, 'n', n);
        name[n] = '\0';
        snprintf(expected, sizeof expected, "%s=1;", name);
        buf_init(&body, 100000);
        buf_printf(&body, HEAD("form-data; name=\"%s\"") "\r\n1\r\n" END, name);
        expect("a long name", TYPE, buf_str(&body), body.len, n <= 256 ? expected : NULL);
        buf_reset(&body);
    }
}

/* ---- cut short ---- */

/* Wherever an upload stops before its closing delimiter is whole, it is refused. */
static void test_truncated_anywhere(void **state)
{
    static const char body[] =
        "preamble\r\n" PART("file", "%PDF-1.4\r\n--B\r\n\0%%EOF") PART("companyID", "NT047")
            HEAD("form-data; name=\"branch\"") "Content-Type: text/plain\r\n\r\n" PART(
                "username", "eva") "--b--";
    struct buf form;
    struct err err;
    (void)state;

    buf_init(&form, 1000);
    for (size_t n = 0; n < sizeof body - 1; n++)
        if (parse(TYPE, body, n, &form, &err) != ERR_BAD_REQUEST)
            fail_msg("%zu of %zu bytes were enough", n, sizeof body - 1);
    assert_int_equal(form.len, 0);
    assert_int_equal(parse(TYPE, body, sizeof body - 1, &form, &err), ERR_NONE);
    assert_string_equal(buf_str(&form), "file=%PDF-1.4\\x0D\\x0A--B\\x0D\\x0A\\x00%%EOF;"
                                        "companyID=NT047;branch=;username=eva;");
    buf_reset(&form);
}

static void test_messages_name_the_fault(void **state)
{
    static const struct {
        const char *type, *body, *word;
    } cases[] = {
        {"text/plain", "", "multipart/form-data"},
        {"multipart/form-data", "", "boundary"},
        {TYPE, "", "begin"},
        {TYPE, PART("a", "1"), "not complete"},
        {TYPE, HEAD("form-data") "\r\n1\r\n" END, "name"},
        {TYPE, HEAD("form-data; name=a") "Content-Transfer-Encoding: base64\r\n\r\n1\r\n" END,
         "Content-Transfer-Encoding"},
    };
    struct buf form;
    struct err err;
    (void)state;

    buf_init(&form, 1000);
    for (size_t i = 0; i < COUNT(cases); i++) {
        assert_int_equal(parse(cases[i].type, cases[i].body, strlen(cases[i].body), &form, &err),
                         ERR_BAD_REQUEST);
        if (strstr(err.message, cases[i].word) == NULL)
            fail_msg("\"%s\" does not say \"%s\"", err.message, cases[i].word);
    }
    buf_reset(&form);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_forms),
        cmocka_unit_test(test_tab_in_a_file_name),
        cmocka_unit_test(test_content_types),
        cmocka_unit_test(test_boundaries),
        cmocka_unit_test(test_too_many_parts),
        cmocka_unit_test(test_header_too_long),
        cmocka_unit_test(test_name_too_long),
        cmocka_unit_test(test_truncated_anywhere),
        cmocka_unit_test(test_messages_name_the_fault),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
