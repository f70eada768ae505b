/* fuzz_fallback.c - any bytes as appSetting.txt. A key that is found must stand there as it is, be fit for
 * an HTTP header, and appear in no message. */
#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "fallback.h"
#include "support.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *path = fuzz_file(0, data, size);
    struct err err = {.message = ""};
    char *key = NULL;

    if (fallback_load(path, &key, &err) != ERR_NONE) {
        CHECK(key == NULL && err.code == ERR_CONFIG && strstr(err.message, path) != NULL);
        CHECK(strlen(err.message) < 160); /* there is no room for a line of it */
        return 0;
    }
    size_t len = strlen(key);
    CHECK(len > 0 && len < 1024 && memmem(data, size, key, len) != NULL);
    for (size_t i = 0; i < len; i++)
        CHECK(isgraph((unsigned char)key[i]));
    free(key);
    return 0;
}
