/* fuzz_invoice.c - any bytes as the text that Gemini wrote. What is accepted must be JSON in UTF-8, and
 * come out the same when it is read once more. */
#include <json.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistr.h>

#include "invoice.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct invoice_schema *load(void)
{
    static char none[] = "";
    struct config config = {.gemini = {.schema_file = none}};
    struct err err;
    return invoice_schema_load(&config, &err);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct invoice_schema *schema;
    struct invoice first, second;

    if (schema == NULL && (schema = load()) == NULL)
        abort();
    if (!invoice_parse(&first, schema, (const char *)data, size))
        return 0;
    char *text = strdup(json_object_to_json_string(first.data));
    if (u8_check((const uint8_t *)text, strlen(text)) != NULL ||
        json_object_array_length(first.warnings) > 1000 ||
        !invoice_parse(&second, schema, text, strlen(text)) ||
        strcmp(text, json_object_to_json_string(second.data)) != 0)
        abort();
    free(text);
    invoice_reset(&second);
    invoice_reset(&first);
    return 0;
}
