/* buf.h - growing buffers with a hard maximum, and arenas.
 *
 * A buffer that would pass its maximum, or finds no memory, becomes "failed": later appends do
 * nothing, so callers append freely and look once, with buf_ok(), at the end. */
#ifndef EXTRACT_BUF_H
#define EXTRACT_BUF_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>

#include "err.h"

struct buf {
    char *data; /* always followed by a NUL byte once anything was appended; else NULL */
    size_t len;
    size_t cap;
    size_t max; /* bytes, without the NUL */
    bool failed;
};

/* An empty buffer that never holds more than max bytes. Allocates nothing yet. */
void buf_init(struct buf *b, size_t max);
/* Frees the memory; the buffer may be used again with the same maximum. */
void buf_reset(struct buf *b);
/* As buf_reset, after overwriting the content: for secrets. */
void buf_wipe(struct buf *b);
/* Empties the buffer and keeps its memory. Clears "failed". */
void buf_clear(struct buf *b);
void buf_append(struct buf *b, const void *data, size_t len);
void buf_append_str(struct buf *b, const char *s);
void buf_append_char(struct buf *b, char c);
void buf_printf(struct buf *b, const char *format, ...) PRINTF_LIKE(2, 3);
/* Appends text as a JSON string with its quotes. Invalid UTF-8 becomes U+FFFD. NULL becomes null. */
void buf_append_json(struct buf *b, const char *s, size_t len);
/* The content as a C string; "" while empty or failed. Borrowed. */
const char *buf_str(const struct buf *b) __attribute__((returns_nonnull));
static inline bool buf_ok(const struct buf *b)
{
    return !b->failed;
}

/* An arena: memory that belongs to one request and goes with it. */
struct arena {
    struct arena_chunk *chunks;
};

void arena_init(struct arena *a);
/* Frees all that was allocated from it. */
void arena_reset(struct arena *a);
/* Zeroed memory, aligned for anything. Aborts when the machine has no memory left: an arena holds
 * kilobytes, and a process without kilobytes cannot even refuse. */
void *arena_alloc(struct arena *a, size_t size) __attribute__((returns_nonnull));
char *arena_strndup(struct arena *a, const char *s, size_t len) __attribute__((returns_nonnull));
char *arena_strdup(struct arena *a, const char *s) __attribute__((returns_nonnull));
char *arena_printf(struct arena *a, const char *format, ...) PRINTF_LIKE(2, 3)
    __attribute__((returns_nonnull));

#endif
