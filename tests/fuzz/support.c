/* support.c - what the fuzz targets share. See support.h. */
#include "support.h"

#include <json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unictype.h>
#include <unistd.h>
#include <unistr.h>

#include "log.h"
#include "strict_json.h"

#define OWN_DEPTH 64

void fuzz_fail(const char *condition, const char *file, int line, const char *function)
{
    fprintf(stderr, "%s:%d: %s: does not hold: %s\n", file, line, function, condition);
    abort();
}

uint8_t fuzz_byte(struct fuzz_input *input)
{
    if (input->left == 0)
        return 0;
    input->left--;
    return *input->at++;
}

int64_t fuzz_int64(struct fuzz_input *input)
{
    uint64_t number = 0;

    for (int i = 0; i < 8; i++)
        number = number << 8 | fuzz_byte(input);
    return (int64_t)number;
}

static char *take(struct fuzz_input *input, size_t len)
{
    char *text = malloc(len + 1); /* of that very size: a step too far is seen */

    CHECK(text != NULL);
    if (len > 0)
        memcpy(text, input->at, len);
    text[len] = '\0';
    input->at += len;
    input->left -= len;
    return text;
}

char *fuzz_text(struct fuzz_input *input, char end)
{
    const uint8_t *found = input->left > 0 ? memchr(input->at, end, input->left) : NULL;
    char *text = take(input, found == NULL ? input->left : (size_t)(found - input->at));

    if (found != NULL)
        fuzz_byte(input);
    return text;
}

char *fuzz_rest(struct fuzz_input *input)
{
    return take(input, input->left);
}

const char *fuzz_file(int place, const void *data, size_t size)
{
    static struct {
        int fd;
        char path[32];
    } files[2] = {{.fd = -1}, {.fd = -1}};

    if (files[place].fd < 0) {
        files[place].fd = memfd_create("fuzz", MFD_CLOEXEC);
        CHECK(fchmod(files[place].fd, 0600) == 0);
        snprintf(files[place].path, sizeof files[place].path, "/proc/self/fd/%d", files[place].fd);
    }
    CHECK(files[place].fd >= 0 && ftruncate(files[place].fd, 0) == 0);
    CHECK(pwrite(files[place].fd, data, size, 0) == (ssize_t)size);
    return files[place].path;
}

static void check_entry(struct log_entry *take_entry, void *context)
{
    (void)context;
    CHECK(fuzz_is_line(take_entry->message) && strlen(take_entry->message) <= 4000);
    CHECK(take_entry->exception == NULL ||
          (fuzz_is_line(take_entry->exception) && strlen(take_entry->exception) <= 16000));
    free(take_entry);
}

void fuzz_check_log(void)
{
    log_set_sink(check_entry, NULL);
}

bool fuzz_is_utf8(const char *s, size_t len)
{
    return len == 0 || u8_check((const uint8_t *)s, len) == NULL;
}

bool fuzz_is_line(const char *s)
{
    const uint8_t *at = (const uint8_t *)s;
    ucs4_t c;

    if (!fuzz_is_utf8(s, strlen(s)))
        return false;
    while ((at = u8_next(&c, at)) != NULL)
        if (uc_is_general_category_withtable(c, UC_CATEGORY_MASK_Cc | UC_CATEGORY_MASK_Zl |
                                                    UC_CATEGORY_MASK_Zp))
            return false;
    return true;
}

struct json_object *fuzz_parse_own(const char *json, size_t len)
{
    struct json_object *parsed = strict_json_parse(json, len, OWN_DEPTH);

    CHECK(parsed != NULL);
    return parsed;
}
