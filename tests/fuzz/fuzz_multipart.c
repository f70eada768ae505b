/* fuzz_multipart.c - a form from outside: the first line is the Content-Type, the rest the body. What is
 * accepted is written again, with another boundary, and must be read as the same form. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "multipart.h"
#include "support.h"

#define NAME_MAX_BYTES 256

/* Can the name only have stood there without quotes? (In quotes %22 is read as one.) */
static bool is_token(const char *name)
{
    return strstr(name, "%22") != NULL;
}

static void write_name(struct buf *form, const char *name)
{
    if (is_token(name)) {
        buf_append_str(form, name);
        return;
    }
    buf_append_char(form, '"');
    for (; *name != '\0'; name++) {
        if (*name == '"' || *name == '\\')
            buf_append_char(form, '\\');
        buf_append_char(form, *name);
    }
    buf_append_char(form, '"');
}

static void write_form(struct buf *form, const char *boundary, const struct multipart_part *parts,
                       size_t count)
{
    for (size_t i = 0; i < count; i++) {
        buf_printf(form, "%s--%s\r\nContent-Disposition: form-data; name=", i > 0 ? "\r\n" : "",
                   boundary);
        write_name(form, parts[i].name);
        buf_append_str(form, "\r\n\r\n");
        buf_append(form, parts[i].data, parts[i].len);
    }
    buf_printf(form, "%s--%s--\r\n", count > 0 ? "\r\n" : "", boundary);
}

/* Half of the delimiters found before, half while it is parsed. */
static enum err_code parse(struct arena *arena, const char *type, const char *body, size_t len,
                           struct multipart_part *parts, size_t *count, struct err *err)
{
    struct find_marks delimiter;
    enum err_code code = multipart_delimiter(type, &delimiter, err);

    if (code != ERR_NONE)
        return code;
    find_marks_look(&delimiter, body, len / 2);
    return multipart_parse(arena, &delimiter, body, len, parts, count, err);
}

static void check_again(struct arena *arena, const struct multipart_part *parts, size_t count,
                        const char *body, size_t len)
{
    struct multipart_part again[MULTIPART_MAX_PARTS];
    char boundary[32], type[80];
    struct buf form;
    size_t number = 0, again_count = 0;
    struct err err;

    do
        snprintf(boundary, sizeof boundary, "again%zu", number++);
    while (memmem(body, len, boundary, strlen(boundary)) != NULL);
    snprintf(type, sizeof type, "multipart/form-data; boundary=%s", boundary);
    buf_init(&form, 2 * len + 16384);
    write_form(&form, boundary, parts, count);
    CHECK(buf_ok(&form));
    CHECK(parse(arena, type, form.data, form.len, again, &again_count, &err) == ERR_NONE);
    CHECK(again_count == count);
    for (size_t i = 0; i < count; i++)
        CHECK(strcmp(again[i].name, parts[i].name) == 0 && again[i].len == parts[i].len &&
              memcmp(again[i].data, parts[i].data, parts[i].len) == 0);
    buf_reset(&form);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct multipart_part parts[MULTIPART_MAX_PARTS];
    struct fuzz_input input = {data, size};
    struct arena arena;
    struct err err = {.message = ""};
    size_t count = 0;

    arena_init(&arena);
    char *type = fuzz_text(&input, '\n');
    size_t len = input.left;
    char *body = fuzz_rest(&input);
    enum err_code code = parse(&arena, type, body, len, parts, &count, &err);
    CHECK(code == ERR_NONE || code == ERR_BAD_REQUEST);
    CHECK(code == ERR_NONE || (err.message[0] != '\0' && fuzz_is_line(err.message)));
    CHECK(count <= MULTIPART_MAX_PARTS);
    if (code == ERR_NONE) {
        const char *end = body; /* parts lie in the body, one after the other */
        for (size_t i = 0; i < count; i++) {
            CHECK(parts[i].data >= end && parts[i].len <= (size_t)(body + len - parts[i].data));
            CHECK(strlen(parts[i].name) <= NAME_MAX_BYTES);
            end = parts[i].data + parts[i].len;
        }
        check_again(&arena, parts, count, body, len);
    }
    free(body);
    free(type);
    arena_reset(&arena);
    return 0;
}
