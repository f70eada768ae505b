/* invoice.h - the invoice: its schema, and the checks of what Gemini answered. */
#ifndef EXTRACT_INVOICE_H
#define EXTRACT_INVOICE_H

#include <stdbool.h>
#include <stddef.h>

#include "buf.h"
#include "config.h"
#include "err.h"

struct json_object;
struct invoice_schema;

/* The schema of gemini.schema_file, or the one compiled in. Errors: ERR_CONFIG. */
struct invoice_schema *invoice_schema_load(const struct config *config, struct err *err) MUST_CHECK;
void invoice_schema_free(struct invoice_schema *schema);
/* As JSON text, for the request. Borrowed. */
const char *invoice_schema_text(const struct invoice_schema *schema);

struct invoice {
    struct json_object *data;     /* the invoice */
    struct json_object *warnings; /* array of {code, field, detail}; field is a JSON Pointer */
};

/* Parses text and checks it against the schema: unknown fields are dropped, values of another type
 * become strings or null, sums and IBANs are checked; all of that only warns.
 * Returns false where text is not a JSON object. The result is released by invoice_reset. */
bool invoice_parse(struct invoice *invoice, const struct invoice_schema *schema, const char *text,
                   size_t len) MUST_CHECK;
void invoice_reset(struct invoice *invoice);

/* ISO 13616: check digits by modulo 97, spaces ignored. */
bool invoice_iban_ok(const char *iban);

#endif
