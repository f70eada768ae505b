/* fuzz_json.c - any bytes as JSON. strict_json_parse must accept what RFC 8259 does, and nothing else: a
 * second reader, written from the RFC's grammar and sharing no code with it, has to agree. What is
 * accepted must be written and read again as the same. */
#include <json.h>
#include <stdlib.h>
#include <string.h>

#include "strict_json.h"
#include "support.h"

#define DEPTH 16 /* as for an invoice's text, half */

/* ---- the second reader ---- */

struct reader {
    const char *at, *end;
    char open[DEPTH]; /* the brackets that are open */
    int depth;
    bool too_deep; /* a value in so many brackets */
};

static bool is_next(const struct reader *r, const char *characters)
{
    return r->at < r->end && *r->at != '\0' && strchr(characters, *r->at) != NULL;
}

static bool take(struct reader *r, const char *characters)
{
    bool is = is_next(r, characters);
    r->at += is;
    return is;
}

static void skip_space(struct reader *r)
{
    while (take(r, " \t\n\r"))
        ;
}

static bool take_word(struct reader *r, const char *word)
{
    size_t len = strlen(word);
    bool is = (size_t)(r->end - r->at) >= len && memcmp(r->at, word, len) == 0;

    r->at += is ? len : 0;
    return is;
}

static bool take_digits(struct reader *r)
{
    bool any = false;

    while (take(r, "0123456789"))
        any = true;
    return any;
}

static bool take_number(struct reader *r)
{
    take(r, "-");
    if (!take(r, "0") && !(is_next(r, "123456789") && take_digits(r)))
        return false;
    if (take(r, ".") && !take_digits(r))
        return false;
    if (!take(r, "eE"))
        return true;
    take(r, "+-");
    return take_digits(r);
}

static bool take_string(struct reader *r)
{
    if (!take(r, "\""))
        return false;
    while (r->at < r->end && *r->at != '"') {
        if ((unsigned char)*r->at < 0x20)
            return false;
        if (*r->at++ != '\\')
            continue;
        if (take(r, "u")) {
            for (int i = 0; i < 4; i++)
                if (!take(r, "0123456789abcdefABCDEF"))
                    return false;
        } else if (!take(r, "\"\\/bfnrt")) {
            return false;
        }
    }
    return take(r, "\"");
}

static bool take_scalar(struct reader *r)
{
    if (is_next(r, "\""))
        return take_string(r);
    return take_word(r, "true") || take_word(r, "false") || take_word(r, "null") || take_number(r);
}

static bool take_name(struct reader *r)
{
    skip_space(r);
    if (!take_string(r))
        return false;
    skip_space(r);
    return take(r, ":");
}

/* The brackets that end behind a value, and the comma; *more: another value must follow. */
static bool take_ends(struct reader *r, bool *more)
{
    for (skip_space(r); r->depth > 0; skip_space(r)) {
        char open = r->open[r->depth - 1];
        if (take(r, ",")) {
            *more = true;
            return open == '[' || take_name(r);
        }
        if (!take(r, open == '[' ? "]" : "}"))
            return false;
        r->depth--;
    }
    *more = false;
    return r->at == r->end;
}

static bool is_json(struct reader *r)
{
    bool more = true;

    while (more) {
        skip_space(r);
        char open = r->at < r->end ? *r->at : '\0';
        r->too_deep = r->depth >= DEPTH && open != ']' && open != '}';
        if (r->too_deep)
            return true; /* whatever follows */
        if (open != '[' && open != '{') {
            if (!take_scalar(r) || !take_ends(r, &more))
                return false;
            continue;
        }
        r->at++;
        r->open[r->depth++] = open;
        skip_space(r);
        if (is_next(r, open == '[' ? "]" : "}")) {
            if (!take_ends(r, &more))
                return false;
        } else if (open == '{' && !take_name(r)) {
            return false;
        }
    }
    return true;
}

/* ---- both ---- */

static char *written(struct json_object *value)
{
    char *text = strdup(json_object_to_json_string_ext(value, JSON_C_TO_STRING_PLAIN));
    CHECK(text != NULL);
    return text;
}

static void check_again(struct json_object *value)
{
    char *text = written(value);
    struct json_object *again = fuzz_parse_own(text, strlen(text));
    char *text_again = written(again);

    CHECK(fuzz_is_utf8(text, strlen(text)));
    CHECK(strcmp(text, text_again) == 0);
    json_object_put(again);
    free(text_again);
    free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input input = {data, size};
    char *text = fuzz_rest(&input);
    struct reader reader = {.at = text, .end = text + size};
    struct json_object *value = strict_json_parse(text, size, DEPTH);
    bool is = is_json(&reader) && fuzz_is_utf8(text, size);

    CHECK(value == NULL || (is && !reader.too_deep));
    if (is && !reader.too_deep && value == NULL) { /* json-c has no object for null */
        reader = (struct reader){.at = text, .end = text + size};
        skip_space(&reader);
        CHECK(take_word(&reader, "null"));
    }
    if (value != NULL)
        check_again(value);
    json_object_put(value);
    free(text);
    return 0;
}
