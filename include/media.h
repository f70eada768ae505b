/* media.h - what kind of file this is, by its bytes, and whether it is whole.
 *
 * Never stricter than ordinary readers: bytes after the end are fine, what a viewer would open
 * passes. The point is to refuse, before anything is spent, what no reader could open. */
#ifndef EXTRACT_MEDIA_H
#define EXTRACT_MEDIA_H

#include <stdint.h>

#include "err.h"
#include "find.h"

enum media_kind { MEDIA_PDF, MEDIA_PNG, MEDIA_JPEG, MEDIA_WEBP, MEDIA_HEIC, MEDIA_HEIF };

/* Finds the kind and checks the structure.
 * Errors: ERR_INVALID_FILE (empty or damaged), ERR_UNSUPPORTED_MEDIA_TYPE (a kind that Gemini does
 * not read). err's message says what was seen: for the log, not for the client. */
enum err_code media_check(const unsigned char *data, size_t len, enum media_kind *kind,
                          struct err *err) MUST_CHECK;

/* "application/pdf", … */
const char *media_type(enum media_kind kind) __attribute__((returns_nonnull));

/* With which a PDF's page objects begin, among others. */
#define MEDIA_PAGE_MARK "/Type"

/* A guess, on the high side, at the tokens that an extraction from this file uses: by a PDF's pages
 * where they can be counted, by its bytes where not. marks: where MEDIA_PAGE_MARK stands in body, in
 * which the file lies. */
int64_t media_estimate_tokens(enum media_kind kind, const unsigned char *data, size_t len,
                              const struct find_marks *marks, const char *body);

#endif
