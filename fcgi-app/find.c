/* find.c - where something short stands in large data. See find.h. */
#include "find.h"

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* Sixteen bytes that gcc and clang compare at once on any processor. */
typedef unsigned char bytes16 __attribute__((vector_size(16)));
typedef unsigned char bytes16_at __attribute__((vector_size(16), aligned(1), may_alias));

#define BLOCK 64

/* Does first stand anywhere in the block, with last so far behind it as in what is looked for? */
static bool may_begin(const unsigned char *block, size_t distance, bytes16 first, bytes16 last)
{
    bytes16 any = {0};
    uint64_t halves[2];

    for (size_t i = 0; i < BLOCK; i += sizeof any)
        any |= (bytes16)((*(const bytes16_at *)(block + i) == first) &
                         (*(const bytes16_at *)(block + i + distance) == last));
    memcpy(halves, &any, sizeof halves);
    return (halves[0] | halves[1]) != 0;
}

const void *find_bytes(const void *data, size_t len, const void *what, size_t n)
{
    const unsigned char *at = data, *end = at + len;
    const unsigned char *begin = what;
    const bytes16 first = (bytes16){0} + begin[0], last = (bytes16){0} + begin[n - 1];

    for (; (size_t)(end - at) >= BLOCK + n - 1; at += BLOCK) {
        const void *found =
            may_begin(at, n - 1, first, last) ? memmem(at, BLOCK + n - 1, what, n) : NULL;
        if (found != NULL)
            return found;
    }
    return memmem(at, (size_t)(end - at), what, n);
}

/* ---- marks ---- */

void find_marks_init(struct find_marks *marks, const void *what, size_t n)
{
    marks->n = n;
    marks->seen = marks->count = 0;
    memcpy(marks->what, what, n);
}

void find_marks_look(struct find_marks *marks, const char *data, size_t len)
{
    while (len - marks->seen >= marks->n && marks->count < FIND_MARKS) {
        const char *found =
            find_bytes(data + marks->seen, len - marks->seen, marks->what, marks->n);
        if (found == NULL) {
            marks->seen = len - marks->n + 1; /* the next may begin in what is here already */
            return;
        }
        marks->at[marks->count] = (size_t)(found - data);
        marks->seen = marks->at[marks->count++] + 1;
    }
}

const char *find_marks_next(const struct find_marks *marks, const char *data, size_t len,
                            const char *from)
{
    size_t begin = (size_t)(from - data);

    for (size_t i = 0; i < marks->count; i++)
        if (marks->at[i] >= begin)
            return marks->at[i] + marks->n <= len ? data + marks->at[i] : NULL;
    if (begin < marks->seen)
        begin = marks->seen;
    return begin >= len ? NULL : find_bytes(data + begin, len - begin, marks->what, marks->n);
}
