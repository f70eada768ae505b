/* support.h - what the fuzz targets share: taking an input apart, checks that end the run, and what
 * foreign text looks like once it is harmless. */
#ifndef EXTRACT_FUZZ_SUPPORT_H
#define EXTRACT_FUZZ_SUPPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Ends the run where it does not hold: libFuzzer keeps the input. */
#define CHECK(condition) \
    ((condition) ? (void)0 : fuzz_fail(#condition, __FILE__, __LINE__, __func__))
void fuzz_fail(const char *condition, const char *file, int line, const char *function)
    __attribute__((noreturn));

/* What is left of an input. */
struct fuzz_input {
    const uint8_t *at;
    size_t left;
};

/* The next byte; 0 behind the end. */
uint8_t fuzz_byte(struct fuzz_input *input);
/* The next eight bytes as a number; behind the end they are 0. */
int64_t fuzz_int64(struct fuzz_input *input);
/* Up to the next byte end, which is taken, too, or all that is left. The caller's, to free(). */
char *fuzz_text(struct fuzz_input *input, char end);
/* All that is left. The caller's, to free(). */
char *fuzz_rest(struct fuzz_input *input);

/* The name under which a file in memory, which holds just that, can be opened. Two at most: place is 0
 * or 1. Good until the next call for the same place. */
const char *fuzz_file(int place, const void *data, size_t size);

/* Log entries go nowhere from now on; each is checked before: fuzz_is_line, and within its bounds. */
void fuzz_check_log(void);

bool fuzz_is_utf8(const char *s, size_t len);
/* UTF-8 without control characters and without line or paragraph separators. */
bool fuzz_is_line(const char *s);

struct json_object;
/* strict_json_parse of what the program itself has written; it must be JSON. The caller's. */
struct json_object *fuzz_parse_own(const char *json, size_t len);

#endif
