/* text.h - Unicode text that comes from outside: form fields, log messages. By libunistring. */
#ifndef EXTRACT_TEXT_H
#define EXTRACT_TEXT_H

#include <stdbool.h>
#include <stddef.h>

#include "buf.h"

/* What is wrong with a text field by the contract's rule (UTF-8, min to max bytes, no control
 * character, no white space at either end); NULL when nothing is. The phrase completes the sentence
 * "companyID …", for example "must not be empty". */
const char *text_fault(const char *s, size_t len, size_t min, size_t max);

/* The text folded for comparison without regard to case (Unicode full case folding, NFC). */
char *text_fold(struct arena *a, const char *s);

/* Appends s for a log: control characters become \xNN, line ends \n and \r, a backslash \\, and
 * invalid UTF-8 \xNN, so that one entry is one line and cannot forge another. */
void text_escape(struct buf *b, const char *s, size_t len);

#endif
