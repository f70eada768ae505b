/* strict_json.h - JSON as RFC 8259 has it, and nothing else. */
#ifndef EXTRACT_STRICT_JSON_H
#define EXTRACT_STRICT_JSON_H

#include <stddef.h>

struct json_object;

/* Parses text, which may nest depth levels. NULL where it is not one whole JSON value (or null, which
 * json-c has no object for). Integers too long for 64 bits become strings, so that no digit is lost.
 * The caller owns the result. */
struct json_object *strict_json_parse(const char *text, size_t len, int depth);

#endif
