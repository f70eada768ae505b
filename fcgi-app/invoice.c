/* invoice.c - the invoice: its schema, and the checks of what Gemini answered. See invoice.h.
 *
 * Two passes over the parsed answer: shape (whatever the schema says: unknown fields, types), then
 * meaning (the fields that the contract names, where they exist: sums, IBAN). Amounts are decimal
 * strings and are compared exactly, in units of 10^-4; an amount too long for that is not compared. */
#include "invoice.h"

#include <ctype.h>
#include <json.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "embed.h"
#include "strict_json.h"

#define MAX_SCHEMA (1024 * 1024)
#define MAX_DEPTH 16
#define MAX_WARNINGS 100
#define MAX_POINTER 1024

struct invoice_schema {
    json_object *root;
    struct buf text; /* compact, as it is sent */
};

/* ---- the schema ---- */

/* Only what the checks below rely on; what else a schema may say is Gemini's to judge. */
static bool schema_is_sound(json_object *schema, int depth)
{
    json_object *types = NULL, *properties = NULL, *items = NULL;

    if (!json_object_is_type(schema, json_type_object) || depth > MAX_DEPTH)
        return false;
    if (json_object_object_get_ex(schema, "type", &types) &&
        !json_object_is_type(types, json_type_string)) {
        if (!json_object_is_type(types, json_type_array))
            return false;
        for (size_t i = 0; i < json_object_array_length(types); i++)
            if (!json_object_is_type(json_object_array_get_idx(types, i), json_type_string))
                return false;
    }
    if (json_object_object_get_ex(schema, "items", &items) && !schema_is_sound(items, depth + 1))
        return false;
    if (!json_object_object_get_ex(schema, "properties", &properties))
        return true;
    if (!json_object_is_type(properties, json_type_object))
        return false;
    json_object_object_foreach(properties, name, property)
    {
        (void)name;
        if (!schema_is_sound(property, depth + 1))
            return false;
    }
    return true;
}

static json_object *schema_file(const char *path, struct err *err)
{
    struct buf text;
    char block[4096];
    size_t n;
    json_object *root = NULL;

    buf_init(&text, MAX_SCHEMA);
    FILE *f = fopen(path, "re");
    if (f == NULL) {
        err_set(err, ERR_CONFIG, "gemini.schema_file: %s cannot be read", path);
        return NULL;
    }
    while ((n = fread(block, 1, sizeof block, f)) > 0)
        buf_append(&text, block, n);
    if (ferror(f) == 0 && buf_ok(&text))
        root = strict_json_parse(buf_str(&text), text.len, 4 * MAX_DEPTH);
    fclose(f);
    buf_reset(&text);
    if (!schema_is_sound(root, 0) || !json_object_object_get_ex(root, "properties", NULL)) {
        json_object_put(root);
        err_set(err, ERR_CONFIG,
                "gemini.schema_file: %s must hold a JSON schema of an object with properties, at "
                "most 1 MB",
                path);
        return NULL;
    }
    return root;
}

struct invoice_schema *invoice_schema_load(const struct config *config, struct err *err)
{
    const char *path = config->gemini.schema_file;
    struct invoice_schema *schema = calloc(1, sizeof *schema);

    if (schema == NULL) {
        err_set(err, ERR_INTERNAL, "out of memory");
        return NULL;
    }
    buf_init(&schema->text, MAX_SCHEMA);
    schema->root =
        path[0] != '\0' ? schema_file(path, err) : json_tokener_parse(embed_invoice_schema);
    if (schema->root == NULL) {
        free(schema);
        return NULL;
    }
    buf_append_str(&schema->text,
                   json_object_to_json_string_ext(schema->root, JSON_C_TO_STRING_NOSLASHESCAPE));
    return schema;
}

void invoice_schema_free(struct invoice_schema *schema)
{
    if (schema == NULL)
        return;
    json_object_put(schema->root);
    buf_reset(&schema->text);
    free(schema);
}

const char *invoice_schema_text(const struct invoice_schema *schema)
{
    return buf_str(&schema->text);
}

/* ---- warnings ---- */

static void warn(json_object *warnings, const char *code, const char *field, const char *detail)
{
    if (json_object_array_length(warnings) >= MAX_WARNINGS)
        return;
    json_object *warning = json_object_new_object();
    json_object_object_add(warning, "code", json_object_new_string(code));
    json_object_object_add(warning, "field", json_object_new_string(field));
    json_object_object_add(warning, "detail", json_object_new_string(detail));
    json_object_array_add(warnings, warning);
}

/* The way from the answer's root to a value, innermost first. */
struct step {
    const struct step *up; /* NULL: the root */
    const char *name;      /* of a member; NULL: an array's element */
    size_t index;
};

/* Appends the way as a JSON Pointer (RFC 6901: ~ becomes ~0, / becomes ~1). */
static void append_pointer(struct buf *pointer, const struct step *step)
{
    if (step == NULL)
        return;
    append_pointer(pointer, step->up);
    buf_append_char(pointer, '/');
    if (step->name == NULL)
        buf_printf(pointer, "%zu", step->index);
    for (const char *c = step->name; c != NULL && *c != '\0'; c++) {
        if (*c == '~')
            buf_append_str(pointer, "~0");
        else if (*c == '/')
            buf_append_str(pointer, "~1");
        else
            buf_append_char(pointer, *c);
    }
}

static void warn_at(json_object *warnings, const char *code, const struct step *step,
                    const char *detail)
{
    struct buf pointer;

    buf_init(&pointer, MAX_POINTER);
    append_pointer(&pointer, step);
    warn(warnings, code, buf_str(&pointer), detail);
    buf_reset(&pointer);
}

/* ---- the shape ---- */

/* Does the schema allow the type? Without "type" it allows all. */
static bool allows(json_object *schema, const char *type)
{
    json_object *types;

    if (!json_object_object_get_ex(schema, "type", &types))
        return true;
    if (json_object_is_type(types, json_type_string))
        return strcmp(json_object_get_string(types), type) == 0;
    for (size_t i = 0;
         json_object_is_type(types, json_type_array) && i < json_object_array_length(types); i++)
        if (strcmp(json_object_get_string(json_object_array_get_idx(types, i)), type) == 0)
            return true;
    return false;
}

static bool fits(json_object *schema, json_object *value)
{
    switch (json_object_get_type(value)) {
    case json_type_null:
        return true; /* everything is nullable */
    case json_type_boolean:
        return allows(schema, "boolean");
    case json_type_int:
        return allows(schema, "integer") || allows(schema, "number");
    case json_type_double:
        return allows(schema, "number");
    case json_type_string:
        return allows(schema, "string");
    case json_type_array:
        return allows(schema, "array");
    case json_type_object:
        return allows(schema, "object");
    }
    return false;
}

static json_object *shape_value(json_object *warnings, const struct step *at, json_object *schema,
                                json_object *value, int depth);

/* Leaves the members that the schema knows, in the answer's order. */
static void shape_object(json_object *warnings, const struct step *at, json_object *schema,
                         json_object *object, int depth)
{
    json_object *properties;
    bool known = json_object_object_get_ex(schema, "properties", &properties);

    json_object_object_foreach(object, name, value)
    {
        json_object *property = NULL;
        const struct step step = {.up = at, .name = name};
        if (known && !json_object_object_get_ex(properties, name, &property)) {
            warn_at(warnings, "unknown_field", &step,
                    "The schema does not know this field; it was dropped.");
            json_object_object_del(object, name);
        } else {
            json_object *shaped = shape_value(warnings, &step, property, value, depth + 1);
            if (shaped != value)
                json_object_object_add(object, name, shaped);
        }
    }
}

static void shape_array(json_object *warnings, const struct step *at, json_object *schema,
                        json_object *array, int depth)
{
    json_object *items = NULL;

    json_object_object_get_ex(schema, "items", &items);
    for (size_t i = 0; i < json_object_array_length(array); i++) {
        json_object *value = json_object_array_get_idx(array, i);
        const struct step step = {.up = at, .index = i};
        json_object *shaped = shape_value(warnings, &step, items, value, depth + 1);
        if (shaped != value)
            json_object_array_put_idx(array, i, shaped);
    }
}

/* Returns value, shaped in its place, or what is to take its place, a new reference; NULL is JSON's
 * null. A NULL schema allows all. */
static json_object *shape_value(json_object *warnings, const struct step *at, json_object *schema,
                                json_object *value, int depth)
{
    if (value == NULL)
        return NULL;
    if (depth > MAX_DEPTH) {
        warn_at(warnings, "too_deep", at, "Nested too deeply; it was dropped.");
        return NULL;
    }
    if (!fits(schema, value)) {
        bool scalar = !json_object_is_type(value, json_type_object) &&
                      !json_object_is_type(value, json_type_array);
        if (scalar && allows(schema, "string")) {
            /* json-c keeps a number as it was written */
            const char *text = json_object_to_json_string(value);
            warn_at(warnings, "wrong_type", at, "Made into a string.");
            return json_object_new_string(text);
        }
        warn_at(warnings, "wrong_type", at,
                "Not of the type that the schema asks for; it was dropped.");
        return NULL;
    }
    if (json_object_is_type(value, json_type_object))
        shape_object(warnings, at, schema, value, depth);
    else if (json_object_is_type(value, json_type_array))
        shape_array(warnings, at, schema, value, depth);
    return value;
}

/* ---- the meaning ---- */

#define UNITS 10000 /* amounts are compared in units of 10^-4 */
#define DECIMALS 4
#define TOLERANCE (UNITS / 100) /* one cent: what rounding may do */

/* A decimal string as units; false for anything else, for more decimals than 4 that are not zeros,
 * and for amounts above 10^12. */
static bool parse_amount(const char *s, int64_t *units)
{
    const bool negative = *s == '-';
    int64_t n = 0;
    int decimals = -1, digits = 0;

    if (*s == '-' || *s == '+')
        s++;
    for (; *s != '\0'; s++) {
        if (*s == '.' && decimals < 0) {
            decimals = 0;
            continue;
        }
        if (!isdigit((unsigned char)*s))
            return false;
        digits++;
        if (decimals >= DECIMALS) {
            if (*s != '0')
                return false;
            continue;
        }
        n = n * 10 + (*s - '0');
        if (decimals >= 0)
            decimals++;
        if (n > INT64_C(1000000000000) * UNITS)
            return false;
    }
    for (int i = decimals < 0 ? 0 : decimals; i < DECIMALS; i++) {
        n *= 10;
        if (n > INT64_C(1000000000000) * UNITS)
            return false;
    }
    *units = negative ? -n : n;
    return digits > 0;
}

static bool amount_member(json_object *object, const char *name, int64_t *units)
{
    json_object *value = NULL;

    return json_object_is_type(object, json_type_object) &&
           json_object_object_get_ex(object, name, &value) &&
           json_object_is_type(value, json_type_string) &&
           parse_amount(json_object_get_string(value), units);
}

static json_object *child(json_object *object, const char *name, json_type type)
{
    json_object *value = NULL;

    if (!json_object_is_type(object, json_type_object) ||
        !json_object_object_get_ex(object, name, &value) || !json_object_is_type(value, type))
        return NULL;
    return value;
}

/* "1234.50" from units, with two decimals at least. */
static const char *format_units(int64_t units, char out[32])
{
    uint64_t n = units < 0 ? (uint64_t)-units : (uint64_t)units;
    int len = snprintf(out, 32, "%s%llu.%04llu", units < 0 ? "-" : "",
                       (unsigned long long)(n / UNITS), (unsigned long long)(n % UNITS));

    for (int zeros = 0; zeros < 2 && out[len - 1] == '0'; zeros++)
        out[--len] = '\0';
    return out;
}

static void compare(json_object *warnings, const char *field, const char *what, int64_t computed,
                    int64_t stated)
{
    char a[32], b[32], detail[160];
    int64_t difference = computed - stated;

    if (difference <= TOLERANCE && difference >= -TOLERANCE)
        return;
    snprintf(detail, sizeof detail, "%s is %s, the document says %s.", what,
             format_units(computed, a), format_units(stated, b));
    warn(warnings, "sum_mismatch", field, detail);
}

static void check_sums(json_object *data, json_object *warnings)
{
    json_object *lines = child(data, "line_items", json_type_array);
    json_object *totals = child(data, "totals", json_type_object);
    int64_t subtotal, discount = 0, tax, total, amount, sum = 0;
    size_t n = lines == NULL ? 0 : json_object_array_length(lines), known = 0;

    while (known < n && known < 100000 &&
           amount_member(json_object_array_get_idx(lines, known), "amount", &amount)) {
        sum += amount;
        known++;
        if (sum > INT64_MAX / 2 || sum < INT64_MIN / 2)
            return;
    }
    if (!amount_member(totals, "subtotal", &subtotal))
        return;
    if (n > 0 && known == n)
        compare(warnings, "/totals/subtotal", "The sum of the lines", sum, subtotal);
    if (child(totals, "discount", json_type_string) != NULL &&
        !amount_member(totals, "discount", &discount))
        return;
    if (discount < 0) /* printed with its sign */
        discount = -discount;
    if (amount_member(totals, "tax", &tax) && amount_member(totals, "total", &total))
        compare(warnings, "/totals/total", "Subtotal - discount + tax", subtotal - discount + tax,
                total);
}

bool invoice_iban_ok(const char *iban)
{
    char packed[35];
    size_t n = 0;
    unsigned rest = 0;

    for (; *iban != '\0'; iban++) {
        if (*iban == ' ')
            continue;
        if (n == sizeof packed - 1 || !isalnum((unsigned char)*iban))
            return false;
        packed[n++] = (char)toupper((unsigned char)*iban);
    }
    packed[n] = '\0';
    if (n < 15 || !isalpha((unsigned char)packed[0]) || !isalpha((unsigned char)packed[1]) ||
        !isdigit((unsigned char)packed[2]) || !isdigit((unsigned char)packed[3]))
        return false;
    for (size_t i = 0; i < n; i++) { /* the first four characters are read last */
        char c = packed[(i + 4) % n];
        unsigned value = isdigit((unsigned char)c) ? (unsigned)(c - '0') : (unsigned)(c - 'A') + 10;
        rest = (rest * (value < 10 ? 10 : 100) + value) % 97;
    }
    return rest == 1;
}

static void check_iban(json_object *data, json_object *warnings)
{
    json_object *vendor = child(data, "vendor", json_type_object);
    json_object *iban = child(vendor, "iban", json_type_string);

    if (iban != NULL && json_object_get_string_len(iban) > 0 &&
        !invoice_iban_ok(json_object_get_string(iban)))
        warn(warnings, "iban_invalid", "/vendor/iban", "The IBAN's check digits do not fit.");
}

/* ---- the answer ---- */

bool invoice_parse(struct invoice *invoice, const struct invoice_schema *schema, const char *text,
                   size_t len)
{
    *invoice = (struct invoice){0};
    json_object *root = strict_json_parse(text, len, 2 * MAX_DEPTH);
    if (!json_object_is_type(root, json_type_object)) {
        json_object_put(root);
        return false;
    }
    invoice->data = root;
    invoice->warnings = json_object_new_array();
    shape_object(invoice->warnings, NULL, schema->root, root, 0);
    check_sums(invoice->data, invoice->warnings);
    check_iban(invoice->data, invoice->warnings);
    return true;
}

void invoice_reset(struct invoice *invoice)
{
    json_object_put(invoice->data);
    json_object_put(invoice->warnings);
    *invoice = (struct invoice){0};
}
