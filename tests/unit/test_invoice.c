/* test_invoice.c - what is made of Gemini's text: shape, sums, IBAN. What comes out is compared as
 * JSON, warnings as one line "code pointer;" each. */
#include <json.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "embed.h"
#include "invoice.h"

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))
#define TEXT(s) (s), sizeof(s) - 1

static struct invoice_schema *schema;

/* ---- helpers ---- */

static struct invoice_schema *load_schema(const char *path, struct err *err)
{
    char file[128];
    struct config config = {.gemini = {.schema_file = file}};
    snprintf(file, sizeof file, "%s", path);
    return invoice_schema_load(&config, err);
}

static int set_up_all(void **state)
{
    struct err err;
    (void)state;
    schema = load_schema("", &err);
    return schema != NULL ? 0 : -1;
}

static int tear_down_all(void **state)
{
    (void)state;
    invoice_schema_free(schema);
    invoice_schema_free(NULL);
    return 0;
}

/* Parses a copy with nothing behind it. */
static bool parse(struct invoice *invoice, const struct invoice_schema *with, const char *text,
                  size_t len)
{
    char *copy = malloc(len > 0 ? len : 1);
    assert_non_null(copy);
    memcpy(copy, text, len);
    bool parsed = invoice_parse(invoice, with, copy, len);
    free(copy);
    return parsed;
}

static void list_warnings(struct buf *out, const struct invoice *invoice)
{
    for (size_t i = 0; i < json_object_array_length(invoice->warnings); i++) {
        json_object *warning = json_object_array_get_idx(invoice->warnings, i);
        buf_printf(out, "%s %s;", json_object_get_string(json_object_object_get(warning, "code")),
                   json_object_get_string(json_object_object_get(warning, "field")));
        const char *detail = json_object_get_string(json_object_object_get(warning, "detail"));
        assert_true(detail != NULL && detail[0] != '\0');
    }
}

/* data NULL: not compared. */
static void expect(const struct invoice_schema *with, const char *text, const char *data,
                   const char *warnings)
{
    struct invoice invoice;
    struct buf found;

    if (!parse(&invoice, with, text, strlen(text)))
        fail_msg("not parsed: %s", text);
    buf_init(&found, 100000);
    list_warnings(&found, &invoice);
    const char *json = json_object_to_json_string_ext(
        invoice.data, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE);
    if (data != NULL && strcmp(json, data) != 0)
        fail_msg("%s\n-> %s", text, json);
    if (strcmp(buf_str(&found), warnings) != 0)
        fail_msg("%s\n-> %s", text, buf_str(&found));
    buf_reset(&found);
    invoice_reset(&invoice);
}

/* ---- the shape ---- */

static const struct {
    const char *text, *data, *warnings;
} shapes[] = {
    {"{}", "{}", ""},
    {" \r\n{ } \n", "{}", ""},
    {"{\"invoice_number\":\"R-1\",\"currency\":null}",
     "{\"invoice_number\":\"R-1\",\"currency\":null}", ""},
    {"{\"vendor\":{\"name\":\"M\xC3\xBCller\"},\"line_items\":[],\"totals\":null}",
     "{\"vendor\":{\"name\":\"M\xC3\xBCller\"},\"line_items\":[],\"totals\":null}", ""},
    {"{\"invoice_number\":\"\\u00e9\\n\\\"\"}", "{\"invoice_number\":\"\xC3\xA9\\n\\\"\"}", ""},

    /* unknown fields, at each level */
    {"{\"x\":1,\"currency\":\"EUR\"}", "{\"currency\":\"EUR\"}", "unknown_field /x;"},
    {"{\"vendor\":{\"x\":{\"y\":1},\"name\":\"A\"}}", "{\"vendor\":{\"name\":\"A\"}}",
     "unknown_field /vendor/x;"},
    {"{\"line_items\":[{\"unit\":\"h\"},{\"x\":1},{\"y\":null,\"unit\":\"h\"}]}",
     "{\"line_items\":[{\"unit\":\"h\"},{},{\"unit\":\"h\"}]}",
     "unknown_field /line_items/1/x;unknown_field /line_items/2/y;"},
    {"{\"a/b\":1,\"c~d\":1,\"~1\":1,\"\":1}", "{}",
     "unknown_field /a~1b;unknown_field /c~0d;unknown_field /~01;unknown_field /;"},
    {"{\"totals\":{\"a/~\":1}}", "{\"totals\":{}}", "unknown_field /totals/a~1~0;"},
    {"{\"Currency\":\"EUR\"}", "{}", "unknown_field /Currency;"},

    /* other types */
    {"{\"invoice_number\":12}", "{\"invoice_number\":\"12\"}", "wrong_type /invoice_number;"},
    {"{\"invoice_number\":true}", "{\"invoice_number\":\"true\"}", "wrong_type /invoice_number;"},
    {"{\"invoice_number\":[\"1\"]}", "{\"invoice_number\":null}", "wrong_type /invoice_number;"},
    {"{\"invoice_number\":{\"a\":1}}", "{\"invoice_number\":null}", "wrong_type /invoice_number;"},
    {"{\"vendor\":\"A\"}", "{\"vendor\":null}", "wrong_type /vendor;"},
    {"{\"vendor\":[]}", "{\"vendor\":null}", "wrong_type /vendor;"},
    {"{\"line_items\":{}}", "{\"line_items\":null}", "wrong_type /line_items;"},
    {"{\"line_items\":[\"A\",{\"unit\":1},null]}", "{\"line_items\":[null,{\"unit\":\"1\"},null]}",
     "wrong_type /line_items/0;wrong_type /line_items/1/unit;"},

    /* numbers, digit by digit */
    {"{\"totals\":{\"total\":1234.50}}", "{\"totals\":{\"total\":\"1234.50\"}}",
     "wrong_type /totals/total;"},
    {"{\"totals\":{\"total\":-0.10}}", "{\"totals\":{\"total\":\"-0.10\"}}",
     "wrong_type /totals/total;"},
    {"{\"totals\":{\"total\":0.1234567890123456789}}",
     "{\"totals\":{\"total\":\"0.1234567890123456789\"}}", "wrong_type /totals/total;"},
    {"{\"totals\":{\"total\":1e2}}", "{\"totals\":{\"total\":\"1e2\"}}",
     "wrong_type /totals/total;"},
    {"{\"totals\":{\"total\":9223372036854775807}}",
     "{\"totals\":{\"total\":\"9223372036854775807\"}}", "wrong_type /totals/total;"},
    {"{\"totals\":{\"total\":18446744073709551615}}",
     "{\"totals\":{\"total\":\"18446744073709551615\"}}", ""},
    {"{\"totals\":{\"total\":-9223372036854775808}}",
     "{\"totals\":{\"total\":\"-9223372036854775808\"}}", ""},
};

static void test_shape(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT(shapes); i++)
        expect(schema, shapes[i].text, shapes[i].data, shapes[i].warnings);
}

/* A number that no 64 bits hold is kept too, not turned into another one. */
static void test_number_of_many_digits(void **state)
{
    (void)state;
    expect(schema, "{\"invoice_number\":20260000000000000000001}",
           "{\"invoice_number\":\"20260000000000000000001\"}", "");
}

static void test_negative_number_of_many_digits(void **state)
{
    (void)state;
    expect(schema, "{\"totals\":{\"total\":-20260000000000000000001}}",
           "{\"totals\":{\"total\":\"-20260000000000000000001\"}}", "");
}

static void test_not_an_object(void **state)
{
    static const struct {
        const char *text;
        size_t len;
    } texts[] = {
        {TEXT("")},
        {TEXT(" ")},
        {TEXT("null")},
        {TEXT("[]")},
        {TEXT("[{}]")},
        {TEXT("\"{}\"")},
        {TEXT("1")},
        {TEXT("{")},
        {TEXT("{\"a\":")},
        {TEXT("{\"currency\":\"EUR\"")},
        {TEXT("{} x")},
        {TEXT("{}{}")},
        {TEXT("{},")},
        {TEXT("{\"a\":1,}")},
        {TEXT("{'a':1}")},
        {TEXT("{\"a\":NaN}")},
        {TEXT("{\"a\":-01}")},
        {TEXT("{\"a\":1.}")},
        {TEXT("{\"currency\":\"a\nb\"}")},
        {TEXT("{a:1}")},
        {TEXT("{\"a\":01}")},
        {TEXT("{} // as you asked")},
        {TEXT("/* JSON */ {}")},
        {TEXT("```json\n{}\n```")},
        {TEXT("Here is the invoice: {}")},
        {TEXT("\xEF\xBB\xBF{}")},
    };
    struct invoice invoice;
    (void)state;

    for (size_t i = 0; i < COUNT(texts); i++) {
        if (parse(&invoice, schema, texts[i].text, texts[i].len))
            fail_msg("parsed: %s", texts[i].text);
        assert_null(invoice.data);
        invoice_reset(&invoice);
    }
}

static void test_not_utf8(void **state)
{
    static const char *const texts[] = {
        "{\"currency\":\"\xFF\"}",
        "{\"currency\":\"\xC3\"}",
        "{\"caf\xE9\":1}",
        "{\"currency\":\"\xF8\x88\x80\x80\x80\"}",
        "{\"currency\":\"\xC0\xAF\"}",         /* overlong */
        "{\"currency\":\"\xED\xA0\x80\"}",     /* a surrogate */
        "{\"currency\":\"\xF4\x90\x80\x80\"}", /* above U+10FFFF */
    };
    struct invoice invoice;
    (void)state;

    for (size_t i = 0; i < COUNT(texts); i++)
        if (parse(&invoice, schema, texts[i], strlen(texts[i])))
            fail_msg("parsed: text %zu", i);
}

static void test_nul_ends_nothing(void **state)
{
    struct invoice invoice;
    (void)state;
    assert_false(parse(&invoice, schema, TEXT("{\"currency\":\"EUR\"}\0, and more")));
    assert_false(parse(&invoice, schema, TEXT("{\"currency\":\"EUR\"}\0")));
    assert_false(parse(&invoice, schema, TEXT("{\"currency\":\0\"EUR\"}")));
}

static void test_cut_anywhere(void **state)
{
    static const char text[] = "{\"vendor\":{\"name\":\"M\xC3\xBCller\",\"iban\":null},\"line_"
                               "items\":[{\"amount\":\"1.00\"}],"
                               "\"totals\":{\"subtotal\":\"1.00\",\"tax\":-1.5e1,\"total\":true}}";
    struct invoice invoice;
    (void)state;

    for (size_t n = 0; n < sizeof text - 1; n++)
        if (parse(&invoice, schema, text, n))
            fail_msg("%zu bytes were enough", n);
    assert_true(parse(&invoice, schema, text, sizeof text - 1));
    invoice_reset(&invoice);
}

static void nest(struct buf *b, int depth)
{
    buf_clear(b);
    buf_append_str(b, "{\"a\":");
    for (int i = 0; i < depth; i++)
        buf_append_str(b, "[");
    for (int i = 0; i < depth; i++)
        buf_append_str(b, "]");
    buf_append_str(b, "}");
}

static void test_nesting(void **state)
{
    struct invoice invoice;
    struct buf b;
    (void)state;

    buf_init(&b, 10000000);
    nest(&b, 10);
    expect(schema, buf_str(&b), "{}", "unknown_field /a;");
    nest(&b, 1000000);
    assert_false(invoice_parse(&invoice, schema, b.data, b.len));
    buf_reset(&b);
}

static void test_many_warnings(void **state)
{
    struct invoice invoice;
    struct buf b;
    (void)state;

    buf_init(&b, 1000000);
    buf_append_str(&b, "{\"line_items\":[");
    for (int i = 0; i < 5000; i++)
        buf_printf(&b, "%s{\"x\":1}", i > 0 ? "," : "");
    buf_append_str(&b, "]}");
    assert_true(invoice_parse(&invoice, schema, b.data, b.len));
    assert_in_range(json_object_array_length(invoice.warnings), 50,
                    200); /* an answer stays small */
    assert_int_equal(json_object_array_length(json_object_object_get(invoice.data, "line_items")),
                     5000);
    invoice_reset(&invoice);

    buf_clear(&b); /* a pointer too long to be written spoils none of those after it */
    buf_append_str(&b, "{\"vendor\":{\"");
    for (int i = 0; i < 5000; i++)
        buf_append_char(&b, 'x');
    buf_append_str(&b, "\":1,\"y\":1}}");
    assert_true(invoice_parse(&invoice, schema, b.data, b.len));
    assert_int_equal(json_object_array_length(invoice.warnings), 2);
    assert_string_equal(json_object_get_string(json_object_object_get(
                            json_object_array_get_idx(invoice.warnings, 1), "field")),
                        "/vendor/y");
    invoice_reset(&invoice);
    buf_reset(&b);
}

/* ---- sums ---- */

#define LINES(a, b) "\"line_items\":[{\"amount\":" a "},{\"amount\":" b "}]"
#define TOTALS(subtotal, discount, tax, total)                                     \
    "\"totals\":{\"subtotal\":" subtotal ",\"discount\":" discount ",\"tax\":" tax \
    ",\"total\":" total "}"
#define LINES_WARN "sum_mismatch /totals/subtotal;"
#define TOTAL_WARN "sum_mismatch /totals/total;"

static const struct {
    const char *text, *warnings;
} sums[] = {
    /* lines to subtotal */
    {"{" LINES("\"1.10\"", "\"2.20\"") ",\"totals\":{\"subtotal\":\"3.30\"}}", ""},
    {"{" LINES("\"1.10\"", "\"2.20\"") ",\"totals\":{\"subtotal\":\"3.31\"}}",
     ""}, /* a cent: rounding */
    {"{" LINES("\"1.10\"", "\"2.20\"") ",\"totals\":{\"subtotal\":\"3.29\"}}", ""},
    {"{" LINES("\"1.10\"", "\"2.20\"") ",\"totals\":{\"subtotal\":\"3.32\"}}", LINES_WARN},
    {"{" LINES("\"1.10\"", "\"2.20\"") ",\"totals\":{\"subtotal\":\"3.3101\"}}", LINES_WARN},
    {"{" LINES("\"1.10\"", "\"2.20\"") ",\"totals\":{\"subtotal\":\"33.0\"}}", LINES_WARN},
    {"{" LINES("\"100\"", "\"-20.00\"") ",\"totals\":{\"subtotal\":\"80\"}}", ""},
    {"{" LINES("\"-1.00\"", "\"-2.00\"") ",\"totals\":{\"subtotal\":\"-3.00\"}}", ""},
    {"{" LINES("\"+1.00\"", "\"2.\"") ",\"totals\":{\"subtotal\":\"3.0000000\"}}", ""},
    {"{" LINES("\"0.3333\"", "\"0.6667\"") ",\"totals\":{\"subtotal\":\"1.00\"}}", ""},
    /* 0.1 + 0.2 and large amounts are exact */
    {"{" LINES("\"999999999999.99\"",
               "\"0.01\"") ",\"totals\":{\"subtotal\":\"1000000000000.00\"}}",
     ""},
    {"{" LINES("\"99999999999.99\"", "\"0.05\"") ",\"totals\":{\"subtotal\":\"100000000000.00\"}}",
     LINES_WARN},
    /* only where all is there */
    {"{" LINES("\"1.00\"", "null") ",\"totals\":{\"subtotal\":\"9.00\"}}", ""},
    {"{" LINES("\"1.00\"", "\"abc\"") ",\"totals\":{\"subtotal\":\"9.00\"}}", ""},
    {"{" LINES("\"1.00\"", "\"1,00\"") ",\"totals\":{\"subtotal\":\"9.00\"}}", ""},
    {"{" LINES("\"1.00\"", "\"1.00 EUR\"") ",\"totals\":{\"subtotal\":\"9.00\"}}", ""},
    {"{" LINES("\"1.00\"", "\"\"") ",\"totals\":{\"subtotal\":\"9.00\"}}", ""},
    {"{" LINES("\"1.00\"", "\"-\"") ",\"totals\":{\"subtotal\":\"9.00\"}}", ""},
    {"{" LINES("\"1.00\"", "\".\"") ",\"totals\":{\"subtotal\":\"9.00\"}}", ""},
    {"{" LINES("\"1.00\"", "\"1.0.0\"") ",\"totals\":{\"subtotal\":\"9.00\"}}", ""},
    {"{" LINES("\"1.00\"", "\"--1\"") ",\"totals\":{\"subtotal\":\"9.00\"}}", ""},
    {"{" LINES("\"1.00\"", "\"0.00001\"") ",\"totals\":{\"subtotal\":\"9.00\"}}", ""},
    {"{" LINES(
         "\"1.00\"",
         "\"99999999999999999999999999999999999999999999\"") ",\"totals\":{\"subtotal\":\"9.00\"}}",
     ""},
    {"{" LINES("\"1.00\"", "\"18446744073709551617\"") ",\"totals\":{\"subtotal\":\"9.00\"}}", ""},
    {"{\"line_items\":[],\"totals\":{\"subtotal\":\"9.00\"}}", ""},
    {"{\"line_items\":null,\"totals\":{\"subtotal\":\"9.00\"}}", ""},
    {"{\"line_items\":[null],\"totals\":{\"subtotal\":\"9.00\"}}", ""},
    {"{" LINES("\"1.00\"", "\"1.00\"") "}", ""},
    {"{" LINES("\"1.00\"", "\"1.00\"") ",\"totals\":null}", ""},
    {"{" LINES("\"1.00\"", "\"1.00\"") ",\"totals\":{\"subtotal\":null,\"total\":\"9.00\"}}", ""},

    /* subtotal - discount + tax to total */
    {"{" TOTALS("\"100.00\"", "null", "\"19.00\"", "\"119.00\"") "}", ""},
    {"{" TOTALS("\"100.00\"", "null", "\"19.00\"", "\"119.01\"") "}", ""},
    {"{" TOTALS("\"100.00\"", "null", "\"19.00\"", "\"118.99\"") "}", ""},
    {"{" TOTALS("\"100.00\"", "null", "\"19.00\"", "\"119.02\"") "}", TOTAL_WARN},
    {"{" TOTALS("\"100.00\"", "null", "\"19.00\"", "\"118.98\"") "}", TOTAL_WARN},
    {"{" TOTALS("\"100.00\"", "\"10.00\"", "\"17.10\"", "\"107.10\"") "}", ""},
    {"{" TOTALS("\"100.00\"", "\"-10.00\"", "\"17.10\"", "\"107.10\"") "}",
     ""}, /* printed with its sign */
    {"{" TOTALS("\"100.00\"", "\"10.00\"", "\"17.10\"", "\"117.10\"") "}", TOTAL_WARN},
    {"{" TOTALS("\"-100.00\"", "null", "\"-19.00\"", "\"-119.00\"") "}", ""}, /* a credit note */
    {"{" TOTALS("\"100.00\"", "\"a lot\"", "\"19.00\"", "\"1.00\"") "}", ""},
    {"{" TOTALS("null", "null", "\"19.00\"", "\"1.00\"") "}", ""},
    {"{" TOTALS("\"100.00\"", "null", "null", "\"1.00\"") "}", ""},
    {"{" TOTALS("\"100.00\"", "null", "\"19.00\"", "null") "}", ""},
    {"{" TOTALS("\"100.00\"", "null", "\"19.00\"", "\"\"") "}", ""},
    {"{" TOTALS("\"100.00\"", "null", "\"19.00\"", "\"999999999999999999999999\"") "}", ""},
    {"{\"totals\":{\"subtotal\":\"100.00\",\"tax\":\"19.00\",\"total\":\"1.00\"}}", TOTAL_WARN},
    {"{\"totals\":{\"total\":\"1.00\"}}", ""},
    {"{\"totals\":{}}", ""},
    /* both, and numbers that were made into strings */
    {"{" LINES("\"1.00\"", "\"1.00\"") "," TOTALS("\"3.00\"", "null", "\"1.00\"", "\"9.00\"") "}",
     LINES_WARN TOTAL_WARN},
    {"{\"totals\":{\"subtotal\":100,\"tax\":\"19.00\",\"total\":\"1.00\"}}",
     "wrong_type /totals/subtotal;" TOTAL_WARN},
};

static void test_sums(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT(sums); i++)
        expect(schema, sums[i].text, NULL, sums[i].warnings);
}

static void test_what_a_sum_says(void **state)
{
    static const char text[] = "{" LINES("\"1000\"", "\"234.5678\"") "," TOTALS(
        "\"-0.05\"", "null", "\"0\"", "\"7.1\"") "}";
    struct invoice invoice;
    const char *all;
    (void)state;

    assert_true(parse(&invoice, schema, TEXT(text)));
    all = json_object_to_json_string(invoice.warnings);
    assert_non_null(strstr(all, "1234.5678"));
    assert_non_null(strstr(all, "says -0.05."));
    assert_non_null(strstr(all, "says 7.10."));
    invoice_reset(&invoice);
}

/* ---- IBAN ---- */

static void test_iban(void **state)
{
    static const char *const good[] = {
        "DE89370400440532013000",
        "DE89 3704 0044 0532 0130 00",
        "de89370400440532013000",
        "GB29NWBK60161331926819",
        "FR1420041010050500013M02606",
        "CH9300762011623852957",
        "NO9386011117947",
        "MT84MALT011000012345MTLCAST001S",
        "LC55HEMM000100010012001200023015",
        "PL61109010140000071219812874",
    };
    static const char *const bad[] = {
        "",
        " ",
        "DE",
        "DE88370400440532013000",
        "DE89370400440532013001",
        "ED89370400440532013000",
        "DE8937040044053201300",
        "DE89-3704-0044-0532-0130-00",
        "1289370400440532013000",
        "NO751234567", /* fits modulo 97, but no IBAN is so short */
        "DEAA370400440532013000",
        "DE89370400440532013000\xC3\xA9",
        "NO93860111179",
        "\u0414E89370400440532013000",
        "DE89370400440532013000000000000000000000000000000000",
    };
    char text[200];
    (void)state;

    for (size_t i = 0; i < COUNT(good); i++) {
        if (!invoice_iban_ok(good[i]))
            fail_msg("%s is good", good[i]);
        snprintf(text, sizeof text, "{\"vendor\":{\"iban\":\"%s\"}}", good[i]);
        expect(schema, text, text, "");
    }
    for (size_t i = 0; i < COUNT(bad); i++) {
        if (invoice_iban_ok(bad[i]))
            fail_msg("%s is bad", bad[i]);
        snprintf(text, sizeof text, "{\"vendor\":{\"iban\":\"%s\"}}", bad[i]);
        expect(schema, text, text, bad[i][0] == '\0' ? "" : "iban_invalid /vendor/iban;");
    }
    expect(schema, "{\"vendor\":{\"iban\":null}}", NULL, "");
    expect(schema, "{\"vendor\":{}}", NULL, "");
    expect(schema, "{\"vendor\":null}", NULL, "");
}

/* Every single digit that is read wrongly, and every two neighbours swapped, is noticed. */
static void test_iban_misread(void **state)
{
    static const char good[] = "DE89370400440532013000";
    char iban[sizeof good];
    (void)state;

    for (size_t i = 2; i < sizeof good - 1; i++) {
        memcpy(iban, good, sizeof good);
        for (char c = '0'; c <= '9'; c++) {
            iban[i] = c;
            assert_int_equal(invoice_iban_ok(iban), c == good[i]);
        }
        if (i + 2 < sizeof good && i != 3 && good[i] != good[i + 1]) {
            memcpy(iban, good, sizeof good);
            iban[i] = good[i + 1];
            iban[i + 1] = good[i];
            assert_false(invoice_iban_ok(iban));
        }
    }
}

/* ---- the schema ---- */

static void test_schema_compiled_in(void **state)
{
    static const char *const fields[] = {
        "document_type", "invoice_number", "issue_date", "due_date",   "currency", "purchase_order",
        "payment_terms", "vendor",         "customer",   "line_items", "taxes",    "totals"};
    json_object *sent = json_tokener_parse(invoice_schema_text(schema));
    json_object *source = json_tokener_parse(embed_invoice_schema), *properties;
    (void)state;

    assert_non_null(sent);
    assert_true(json_object_equal(sent, source));
    assert_null(strstr(invoice_schema_text(schema), "\\/"));
    assert_true(json_object_object_get_ex(sent, "properties", &properties));
    assert_int_equal(json_object_object_length(properties), COUNT(fields));
    for (size_t i = 0; i < COUNT(fields); i++)
        assert_true(json_object_object_get_ex(properties, fields[i], NULL));
    json_object_put(sent);
    json_object_put(source);
}

static char path[] = "/tmp/test_invoice.XXXXXX";

/* A schema file with that text; NULL where it is refused. */
static struct invoice_schema *schema_of(const char *text, struct err *err)
{
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_true(fputs(text, file) >= 0);
    assert_int_equal(fclose(file), 0);
    *err = (struct err){0};
    return load_schema(path, err);
}

static int set_up_file(void **state)
{
    (void)state;
    int fd = mkstemp(path);
    return fd < 0 ? -1 : close(fd);
}

static int tear_down_file(void **state)
{
    (void)state;
    unlink(path);
    memcpy(path + sizeof path - 7, "XXXXXX", 6);
    return 0;
}

static void test_schema_file(void **state)
{
    static const struct {
        const char *text, *data, *warnings;
    } cases[] = {
        {"{\"n\":1,\"f\":1.5,\"b\":true,\"any\":{\"x\":[1]},\"list\":[1,\"2\",null],\"o\":{\"x\":1}"
         "}",
         "{\"n\":1,\"f\":1.5,\"b\":true,\"any\":{\"x\":[1]},\"list\":[1,null,null],\"o\":{\"x\":1}"
         "}",
         "wrong_type /list/1;"},
        {"{\"n\":1.5,\"f\":2,\"b\":1,\"extra\":1}", "{\"n\":null,\"f\":2,\"b\":null}",
         "wrong_type /n;wrong_type /b;unknown_field /extra;"},
        {"{\"totals\":{\"subtotal\":1,\"tax\":1,\"total\":9},\"vendor\":\"x\"}",
         "{\"totals\":{\"subtotal\":1,\"tax\":1,\"total\":9},\"vendor\":\"x\"}", ""},
    };
    struct err err;
    struct invoice_schema *own =
        schema_of("{\"type\":\"object\",\"properties\":{\"n\":{\"type\":\"integer\","
                  "\"description\":\"m/s\"},\"f\":{\"type\":\"number\"},"
                  "\"b\":{\"type\":\"boolean\"},\"any\":{},\"list\":{\"type\":\"array\",\"items\":{"
                  "\"type\":\"integer\"}},"
                  "\"o\":{\"type\":\"object\"},\"totals\":{},\"vendor\":{\"type\":[\"string\"]}}}",
                  &err);
    (void)state;

    assert_non_null(own);
    assert_non_null(strstr(invoice_schema_text(own), "m/s"));
    for (size_t i = 0; i < COUNT(cases); i++)
        expect(own, cases[i].text, cases[i].data, cases[i].warnings);
    invoice_schema_free(own);
}

/* The library reads NaN, Infinity and "1.", which are no JSON: they must not come out again as such. */
static void test_no_number(void **state)
{
    static const char *const texts[] = {"{\"f\":NaN}", "{\"f\":Infinity}", "{\"f\":-Infinity}",
                                        "{\"f\":1e999}", "{\"f\":1.}"};
    struct err err;
    struct invoice_schema *own = schema_of("{\"properties\":{\"f\":{\"type\":\"number\"}}}", &err);
    (void)state;

    assert_non_null(own);
    for (size_t i = 0; i < COUNT(texts); i++) {
        struct invoice invoice;
        if (!parse(&invoice, own, texts[i], strlen(texts[i])))
            continue;
        const char *json = json_object_to_json_string(invoice.data);
        if (strstr(json, "NaN") != NULL || strstr(json, "Inf") != NULL ||
            strstr(json, "1. ") != NULL)
            fail_msg("%s", json);
        invoice_reset(&invoice);
    }
    invoice_schema_free(own);
}

static void test_schema_file_refused(void **state)
{
    static const char *const texts[] = {
        "",
        "x",
        "{",
        "[]",
        "\"properties\"",
        "{}",
        "{\"type\":\"object\"}",
        "{\"properties\":[]}",
        "{\"properties\":null}",
        "null",
    };
    static char large[1100000];
    struct err err;
    (void)state;

    for (size_t i = 0; i < COUNT(texts); i++) {
        if (schema_of(texts[i], &err) != NULL)
            fail_msg("not refused: %s", texts[i]);
        assert_int_equal(err.code, ERR_CONFIG);
        assert_non_null(strstr(err.message, path));
    }
    memset(large, ' ', sizeof large - 1);
    memcpy(large, "{\"properties\":{}}", 17);
    assert_null(schema_of(large, &err));
    unlink(path);
    assert_null(load_schema(path, &err));
    assert_int_equal(err.code, ERR_CONFIG);
    assert_non_null(strstr(err.message, path));
}

/* A type list that a hand has written wrongly allows nothing more, and harms nobody. */
static void test_schema_file_with_odd_types(void **state)
{
    struct err err;
    struct invoice_schema *own =
        schema_of("{\"properties\":{\"a\":{\"type\":[null,5,\"string\"]},\"b\":{\"type\":{}},\"c\":"
                  "{\"properties\":[]},"
                  "\"d\":{\"type\":\"array\",\"items\":5},\"e\":7,\"f\":null}}",
                  &err);
    (void)state;

    if (own == NULL)
        return; /* refused: as good */
    expect(own, "{\"a\":\"x\",\"c\":{},\"d\":[1],\"e\":1,\"f\":1}",
           "{\"a\":\"x\",\"c\":{},\"d\":[1],\"e\":1,\"f\":1}", "");
    invoice_schema_free(own);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shape),
        cmocka_unit_test(test_number_of_many_digits),
        cmocka_unit_test(test_negative_number_of_many_digits),
        cmocka_unit_test(test_not_an_object),
        cmocka_unit_test(test_not_utf8),
        cmocka_unit_test(test_nul_ends_nothing),
        cmocka_unit_test(test_cut_anywhere),
        cmocka_unit_test(test_nesting),
        cmocka_unit_test(test_many_warnings),
        cmocka_unit_test(test_sums),
        cmocka_unit_test(test_what_a_sum_says),
        cmocka_unit_test(test_iban),
        cmocka_unit_test(test_iban_misread),
        cmocka_unit_test(test_schema_compiled_in),
        cmocka_unit_test_setup_teardown(test_schema_file, set_up_file, tear_down_file),
        cmocka_unit_test_setup_teardown(test_no_number, set_up_file, tear_down_file),
        cmocka_unit_test_setup_teardown(test_schema_file_refused, set_up_file, tear_down_file),
        cmocka_unit_test_setup_teardown(test_schema_file_with_odd_types, set_up_file,
                                        tear_down_file),
    };
    return cmocka_run_group_tests(tests, set_up_all, tear_down_all);
}
