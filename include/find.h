/* find.h - where something short stands in large data.
 *
 * To look through a large upload costs what its bytes take from memory to the processor. So what will
 * be asked for is looked for while the upload comes in and is in the processor's cache still; where it
 * stood is marked. The marks only save looking: with all, some or none of them the answer is the same. */
#ifndef EXTRACT_FIND_H
#define EXTRACT_FIND_H

#include <stddef.h>

#define FIND_WHAT_MAX 80
#define FIND_MARKS 128

/* As memmem(), for large data in which the first byte of what, with its last byte so far behind it, is
 * rare: several times as fast for short ones. n is at least 1. */
const void *find_bytes(const void *data, size_t len, const void *what, size_t n);

/* Where what stands in data of which the first seen bytes were looked at. */
struct find_marks {
    char what[FIND_WHAT_MAX];
    size_t n;    /* bytes of what */
    size_t seen; /* no other begins before here */
    size_t count;
    size_t at[FIND_MARKS];
};

/* n is 1 to FIND_WHAT_MAX. */
void find_marks_init(struct find_marks *marks, const void *what, size_t n);

/* The data has grown to len bytes: looks at what is new, as long as there is room for marks. */
void find_marks_look(struct find_marks *marks, const char *data, size_t len);

/* The first that begins at from or later and ends within len bytes of data, the same data as was looked
 * at (more or less of it by now); NULL: none. */
const char *find_marks_next(const struct find_marks *marks, const char *data, size_t len,
                            const char *from);

#endif
