/* text.c - Unicode text that comes from outside. See text.h. */
#include "text.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unicase.h>
#include <unictype.h>
#include <uninorm.h>
#include <unistr.h>

static bool is_control(ucs4_t c)
{
    return uc_is_general_category_withtable(c, UC_CATEGORY_MASK_Cc | UC_CATEGORY_MASK_Zl |
                                                   UC_CATEGORY_MASK_Zp);
}

const char *text_fault(const char *s, size_t len, size_t min, size_t max)
{
    const uint8_t *p = (const uint8_t *)s;

    if (len < min)
        return "must not be empty";
    if (len > max)
        return "is too long: at most 256 bytes of UTF-8";
    if (len == 0)
        return NULL;
    if (u8_check(p, len) != NULL)
        return "must be UTF-8";
    for (size_t i = 0; i < len;) {
        ucs4_t c;
        int n = u8_mbtouc_unsafe(&c, p + i, len - i);
        bool at_end = i == 0 || i + (size_t)n == len;
        if (is_control(c))
            return "must not have control characters";
        if (at_end && uc_is_property_white_space(c))
            return "must not begin or end with a space";
        i += (size_t)n;
    }
    return NULL;
}

char *text_fold(struct arena *a, const char *s)
{
    size_t len = 0;
    uint8_t *folded = u8_casefold((const uint8_t *)s, strlen(s), NULL, UNINORM_NFC, NULL, &len);
    char *copy = folded == NULL ? arena_strdup(a, s) : arena_strndup(a, (const char *)folded, len);
    free(folded);
    return copy;
}

/* How many bytes at the beginning stand for themselves in escaped text: visible ASCII and the space. */
static size_t plain_run(const char *s, size_t len)
{
    size_t n = 0;

    while (n < len && s[n] >= ' ' && s[n] <= '~' && s[n] != '\\')
        n++;
    return n;
}

void text_escape(struct buf *b, const char *s, size_t len)
{
    for (size_t i = 0; i < len;) {
        ucs4_t c;
        size_t plain = plain_run(s + i, len - i);
        if (plain > 0) {
            buf_append(b, s + i, plain);
            i += plain;
            continue;
        }
        int n = u8_mbtoucr(&c, (const uint8_t *)s + i, len - i);
        if (n <= 0) {
            buf_printf(b, "\\x%02X", (unsigned char)s[i]);
            n = 1;
        } else if (c == '\\') {
            buf_append_str(b, "\\\\");
        } else if (c == '\n') {
            buf_append_str(b, "\\n");
        } else if (c == '\r') {
            buf_append_str(b, "\\r");
        } else if (is_control(c)) {
            for (int k = 0; k < n; k++)
                buf_printf(b, "\\x%02X", (unsigned char)s[i + (size_t)k]);
        } else {
            buf_append(b, s + i, (size_t)n);
        }
        i += (size_t)n;
    }
}
