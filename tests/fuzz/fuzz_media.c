/* fuzz_media.c - any bytes as a file. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "media.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    enum media_kind kind = (enum media_kind) - 1;
    struct err err;

    switch (media_check(data, size, &kind, &err)) {
    case ERR_NONE:
        if (strchr(media_type(kind), '/') == NULL || strstr(media_type(kind), "octet") != NULL)
            abort();
        break;
    case ERR_INVALID_FILE:
    case ERR_UNSUPPORTED_MEDIA_TYPE:
        break;
    default:
        abort();
    }
    for (int k = MEDIA_PDF; k <= MEDIA_PNG; k++) {
        int64_t tokens = media_estimate_tokens((enum media_kind)k, data, size);
        if (tokens < 1000 || tokens > 10000000)
            abort();
    }
    return 0;
}
