/* config_value.h - the types of a configuration's values: how each is written, what is allowed and
 * what it becomes. Private to config.c, which says which key has which type. */
#ifndef EXTRACT_CONFIG_VALUE_H
#define EXTRACT_CONFIG_VALUE_H

#include <stdbool.h>
#include <stdio.h>

#include "buf.h"
#include "err.h"

#define VALUE_SECOND 1e3 /* in milliseconds, as min and max of a duration are */
#define VALUE_MINUTE 60e3
#define VALUE_HOUR 3600e3

enum value_kind {                /* those with a range first */
                  VALUE_INTEGER, /* int */
                  VALUE_SIZE,    /* int64_t, bytes; written so, or with K, M, G: times 1024 */
                  VALUE_DURATION, /* int64_t, milliseconds; written in seconds, or with ms, s, m, h; fractions too */
                  VALUE_REAL,   /* double */
                  VALUE_YES_NO, /* bool */
                  VALUE_WORD,   /* int, the place in a list */
                  VALUE_TEXT,   /* char * */
                  VALUE_URL,    /* char *; its password is printed as *** */
                  VALUE_FILE    /* char *, the name of a file */
};

struct value_type {
    enum value_kind kind;
    double min; /* of numbers, sizes and durations */
    double max;
    const char *const *words;               /* VALUE_WORD: in the order of its enum, NULL-ended */
    const char *(*fault)(const char *text); /* texts: one of those below, or NULL */
};

/* Reads text into place, where what the type's kind says is kept; a text is copied to the arena.
 * An empty text has no fault. ERR_CONFIG: it does not fit, and the message says what would. */
enum err_code value_set(const struct value_type *type, void *place, const char *text,
                        struct arena *arena, struct err *err) MUST_CHECK;

/* Writes what value_set would read. */
void value_print(const struct value_type *type, const void *place, FILE *out);

/* "from 1 to 1024", in out; "" where any value of that type will do. */
#define VALUE_RANGE_SIZE 80
const char *value_range(const struct value_type *type, char out[VALUE_RANGE_SIZE]);

bool value_is_text(const struct value_type *type);

/* Foreign text made fit for a message: cut, and '?' for what no terminal should see. */
struct value_shown {
    char text[68];
};
struct value_shown value_show(const char *text);

/* What is wrong with a text, to complete "[section] key: ..."; NULL when nothing is. */
const char *value_fault_base_url(const char *text);
const char *value_fault_proxy(const char *text);
const char *value_fault_model(const char *text);

/* Why the file cannot be read; NULL when it can. */
const char *value_fault_file(const char *path);

#endif
