/* multipart.h - multipart/form-data (RFC 7578), parsed in place: parts point into the body. */
#ifndef EXTRACT_MULTIPART_H
#define EXTRACT_MULTIPART_H

#include "buf.h"
#include "err.h"
#include "find.h"

#define MULTIPART_MAX_PARTS 32
#define MULTIPART_MAX_HEADER 8192 /* bytes of one part's header lines */

struct multipart_part {
    const char *name; /* decoded; belongs to the arena */
    const char *data; /* borrowed from the body; not terminated */
    size_t len;
};

/* What stands between the parts, by the boundary that content_type names (RFC 2046 section 5.1): to be
 * looked for in the body, while it comes in or later.
 * Errors: ERR_BAD_REQUEST, the message naming the fault, fit for the client. */
enum err_code multipart_delimiter(const char *content_type, struct find_marks *delimiter,
                                  struct err *err) MUST_CHECK;

/* Splits body at the delimiters. Fills parts (room for MULTIPART_MAX_PARTS) and *count. Strict where
 * leniency would let two readers see different forms: a body that ends before the closing delimiter, a
 * part without a name, a transfer encoding other than identity are refused.
 * Errors: ERR_BAD_REQUEST, the message naming the fault, fit for the client. */
enum err_code multipart_parse(struct arena *arena, const struct find_marks *delimiter,
                              const char *body, size_t len, struct multipart_part *parts,
                              size_t *count, struct err *err) MUST_CHECK;

#endif
