/* find.c - where something short stands in large data. See find.h. */
#include "find.h"

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* Where the processor compares 32 bytes at once, a copy of the function that does so is taken when the
 * program starts: too early for a sanitizer, of which clang says nothing by these names. */
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

/* As many bytes as gcc and clang compare at once, in one step or in two. */
typedef unsigned char bytes __attribute__((vector_size(32)));
typedef unsigned char bytes_at __attribute__((vector_size(32), aligned(1), may_alias));
typedef uint64_t words __attribute__((vector_size(32)));

#define BLOCK 64

/* The first block in which first stands anywhere, with last so far behind it as in what is looked for; or
 * where no whole one is left: end less n bytes is the last place where it may begin. */
FOR_EACH_PROCESSOR
static const unsigned char *skip(const unsigned char *at, const unsigned char *end, size_t n,
                                 unsigned char first, unsigned char last)
{
    const bytes firsts = (bytes){0} + first, lasts = (bytes){0} + last;

    for (; (size_t)(end - at) >= BLOCK + n - 1; at += BLOCK) {
        bytes any = {0};
        for (size_t i = 0; i < BLOCK; i += sizeof any)
            any |= (bytes)((*(const bytes_at *)(at + i) == firsts) &
                           (*(const bytes_at *)(at + i + n - 1) == lasts));
        const words w = (words)any;
        if ((w[0] | w[1] | w[2] | w[3]) != 0)
            break;
    }
    return at;
}

const void *find_bytes(const void *data, size_t len, const void *what, size_t n)
{
    const unsigned char *at = data, *end = at + len, *begin = what;

    for (;;) {
        at = skip(at, end, n, begin[0], begin[n - 1]);
        bool is_whole = (size_t)(end - at) >= BLOCK + n - 1;
        const void *found = memmem(at, is_whole ? BLOCK + n - 1 : (size_t)(end - at), what, n);
        if (found != NULL || !is_whole)
            return found;
        at += BLOCK;
    }
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

    for (size_t i = 0; begin < marks->seen && i < marks->count; i++)
        if (marks->at[i] >= begin)
            return marks->at[i] + marks->n <= len ? data + marks->at[i] : NULL;
    if (begin < marks->seen)
        begin = marks->seen;
    return begin >= len ? NULL : find_bytes(data + begin, len - begin, marks->what, marks->n);
}
