/* fuzz_media.c - any bytes as a file. Ordinary readers ignore what stands behind a picture's end, so
 * bytes that are added there must not change the verdict. */
#include <stdlib.h>
#include <string.h>

#include "media.h"
#include "support.h"

static enum err_code examine(const uint8_t *data, size_t size, enum media_kind *kind)
{
    struct err err = {.message = ""};
    enum err_code code = media_check(data, size, kind, &err);

    CHECK(code == ERR_NONE || code == ERR_INVALID_FILE || code == ERR_UNSUPPORTED_MEDIA_TYPE);
    CHECK(code == ERR_NONE || (err.message[0] != '\0' && fuzz_is_line(err.message)));
    return code;
}

static void check_with_tail(const uint8_t *data, size_t size, enum media_kind kind)
{
    static const char tail[] = "\0 bytes behind the end";
    enum media_kind again = (enum media_kind) - 1;
    uint8_t *longer = malloc(size + sizeof tail);

    CHECK(longer != NULL);
    memcpy(longer, data, size);
    memcpy(longer + size, tail, sizeof tail);
    /* but a PDF's end is looked for within the last bytes only */
    CHECK(examine(longer, size + sizeof tail, &again) == ERR_NONE || kind == MEDIA_PDF);
    CHECK(again == kind);
    free(longer);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    enum media_kind kind = (enum media_kind) - 1;
    struct find_marks marks;

    find_marks_init(&marks, MEDIA_PAGE_MARK, strlen(MEDIA_PAGE_MARK));
    find_marks_look(&marks, (const char *)data, size / 2);
    if (examine(data, size, &kind) == ERR_NONE) {
        CHECK(strncmp(media_type(kind), kind == MEDIA_PDF ? "application/" : "image/", 6) == 0);
        check_with_tail(data, size, kind);
    }
    for (int k = MEDIA_PDF; k <= MEDIA_HEIF; k++) {
        int64_t tokens =
            media_estimate_tokens((enum media_kind)k, data, size, &marks, (const char *)data);
        CHECK(tokens >= 1000 && tokens <= 10000000);
    }
    return 0;
}
