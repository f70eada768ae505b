/* fuzz_invoice.c - any bytes as the text that Gemini wrote, or, where there is a NUL byte, a schema file
 * before it and the text behind. What is accepted must be JSON in UTF-8, hold nothing that the schema
 * does not allow, and come out the same when it is read once more. */
#include <json.h>
#include <stdlib.h>
#include <string.h>

#include "invoice.h"
#include "support.h"

static const char *const codes[] = {"unknown_field", "wrong_type", "too_deep", "sum_mismatch",
                                    "iban_invalid"};

static struct invoice_schema *load(const char *path, struct err *err)
{
    char *copy = strdup(path);
    struct config config = {.gemini = {.schema_file = copy}};
    struct invoice_schema *schema = invoice_schema_load(&config, err);

    free(copy);
    return schema;
}

static const char *member(struct json_object *object, const char *name)
{
    struct json_object *value = NULL;

    CHECK(json_object_object_get_ex(object, name, &value));
    CHECK(json_object_is_type(value, json_type_string));
    return json_object_get_string(value);
}

/* A JSON Pointer (RFC 6901), or "" for one that would be too long. */
static bool is_pointer(const char *s)
{
    if (*s != '\0' && *s != '/')
        return false;
    for (; *s != '\0'; s++)
        if (*s == '~' && s[1] != '0' && s[1] != '1')
            return false;
    return true;
}

static void check_warnings(struct json_object *warnings)
{
    CHECK(json_object_array_length(warnings) <= 100);
    for (size_t i = 0; i < json_object_array_length(warnings); i++) {
        struct json_object *warning = json_object_array_get_idx(warnings, i);
        const char *code = member(warning, "code");
        bool known = false;
        for (size_t k = 0; k < sizeof codes / sizeof *codes; k++)
            known = known || strcmp(code, codes[k]) == 0;
        CHECK(known && is_pointer(member(warning, "field")));
        CHECK(fuzz_is_line(member(warning, "detail")));
    }
}

static bool warns(const struct invoice *invoice, const char *code)
{
    for (size_t i = 0; i < json_object_array_length(invoice->warnings); i++)
        if (strcmp(member(json_object_array_get_idx(invoice->warnings, i), "code"), code) == 0)
            return true;
    return false;
}

/* Does the schema, where it names properties, know each of the value's? schema NULL: it says nothing. */
static void check_known(struct json_object *schema, struct json_object *value)
{
    struct json_object *properties = NULL, *items = NULL;

    if (json_object_is_type(value, json_type_array)) {
        if (schema != NULL)
            json_object_object_get_ex(schema, "items", &items);
        for (size_t i = 0; i < json_object_array_length(value); i++)
            check_known(items, json_object_array_get_idx(value, i));
    }
    if (!json_object_is_type(value, json_type_object))
        return;
    if (schema != NULL)
        json_object_object_get_ex(schema, "properties", &properties);
    json_object_object_foreach(value, name, member_value)
    {
        struct json_object *property = NULL;
        CHECK(properties == NULL || json_object_object_get_ex(properties, name, &property));
        check_known(property, member_value);
    }
}

static void check_invoice(const struct invoice_schema *schema, const char *text, size_t size)
{
    const char *schema_text = invoice_schema_text(schema);
    struct invoice first, second;

    if (!invoice_parse(&first, schema, text, size))
        return;
    struct json_object *rules = fuzz_parse_own(schema_text, strlen(schema_text));
    check_known(rules, first.data);
    json_object_put(rules);
    char *written = strdup(json_object_to_json_string(first.data));
    CHECK(fuzz_is_utf8(written, strlen(written)));
    check_warnings(first.warnings);
    CHECK(invoice_parse(&second, schema, written, strlen(written)));
    CHECK(strcmp(written, json_object_to_json_string(second.data)) == 0);
    /* what did not fit was dropped or mended */
    CHECK(!warns(&second, "unknown_field") && !warns(&second, "wrong_type"));
    free(written);
    invoice_reset(&second);
    invoice_reset(&first);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct invoice_schema *built_in;
    struct err err = {.message = ""};
    struct fuzz_input input = {data, size};
    const uint8_t *nul = size > 0 ? memchr(data, '\0', size) : NULL;
    struct invoice_schema *schema = NULL;

    if (built_in == NULL)
        CHECK((built_in = load("", &err)) != NULL);
    if (nul != NULL) {
        schema = load(fuzz_file(0, data, (size_t)(nul - data)), &err);
        CHECK(schema != NULL || (err.code == ERR_CONFIG && fuzz_is_line(err.message)));
        if (schema == NULL)
            return 0;
        input.at = nul + 1;
        input.left = (size_t)(data + size - input.at);
    }
    size = input.left;
    char *text = fuzz_rest(&input);
    check_invoice(schema != NULL ? schema : built_in, text, size);
    free(text);
    invoice_schema_free(schema);
    return 0;
}
