/* fuzz_multipart.c - a form from outside: the first line is the Content-Type, the rest the body. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "multipart.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct multipart_part parts[MULTIPART_MAX_PARTS];
    const uint8_t *line = memchr(data, '\n', size);
    size_t n = line == NULL ? 0 : (size_t)(line - data), count = 0;
    const char *body = (const char *)data + (line == NULL ? 0 : n + 1);
    size_t len = size - (size_t)(body - (const char *)data);
    struct arena arena;
    struct err err;

    arena_init(&arena);
    const char *type = line == NULL ? "multipart/form-data; boundary=b"
                                    : arena_strndup(&arena, (const char *)data, n);
    enum err_code code = multipart_parse(&arena, type, body, len, parts, &count, &err);
    if (count > MULTIPART_MAX_PARTS || (code != ERR_NONE && code != ERR_BAD_REQUEST))
        abort();
    const char *end = body; /* parts lie in the body, one after the other */
    for (size_t i = 0; code == ERR_NONE && i < count; i++) {
        if (parts[i].data < end || parts[i].len > (size_t)(body + len - parts[i].data) ||
            strlen(parts[i].name) > 256)
            abort();
        end = parts[i].data + parts[i].len;
    }
    arena_reset(&arena);
    return 0;
}
