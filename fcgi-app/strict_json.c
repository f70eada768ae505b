/* strict_json.c - JSON as RFC 8259 has it, and nothing else. See strict_json.h.
 *
 * json-c, even when it is told to be strict, takes names in single quotes, NaN, "1.", bytes that are
 * not UTF-8, ends at a NUL byte, and makes 9223372036854775807 of a longer integer. So the text is
 * looked through token by token first; what passes is what json-c and the RFC read alike. */
#include "strict_json.h"

#include <json.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <unistr.h>

#include "buf.h"

static const char largest[] = "9223372036854775807"; /* that json-c keeps as it is */
#define MAX_TEXT (64 * 1024 * 1024)

static size_t digits(const char *s, const char *end)
{
    size_t n = 0;

    while (s + n < end && s[n] >= '0' && s[n] <= '9')
        n++;
    return n;
}

/* The length of the number at s (RFC 8259 section 6); 0 where it is none. */
static size_t number_length(const char *s, const char *end, bool *is_long_integer)
{
    const char *at = s + (*s == '-');
    size_t whole = digits(at, end), more;

    *is_long_integer = false;
    if (whole == 0 || (whole > 1 && *at == '0'))
        return 0;
    at += whole;
    if (at == end || (*at != '.' && *at != 'e' && *at != 'E')) {
        const size_t most = sizeof largest - 1;
        *is_long_integer = whole > most || (whole == most && memcmp(at - whole, largest, most) > 0);
        return (size_t)(at - s);
    }
    if (*at == '.') {
        if ((more = digits(++at, end)) == 0)
            return 0;
        at += more;
    }
    if (at < end && (*at == 'e' || *at == 'E')) {
        at++;
        at += at < end && (*at == '+' || *at == '-');
        if ((more = digits(at, end)) == 0)
            return 0;
        at += more;
    }
    return (size_t)(at - s);
}

/* The length of the string at s with its quotes; 0 where it does not end or holds a control
 * character. Escapes are json-c's matter. */
static size_t string_length(const char *s, const char *end)
{
    for (const char *at = s + 1; at < end; at++) {
        if (*at == '"')
            return (size_t)(at + 1 - s);
        if ((unsigned char)*at < ' ')
            return 0;
        if (*at == '\\')
            at++;
    }
    return 0;
}

static size_t word_length(const char *s, const char *end)
{
    static const char *const words[] = {"true", "false", "null"};

    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        size_t n = strlen(words[i]);
        if ((size_t)(end - s) >= n && memcmp(s, words[i], n) == 0)
            return n;
    }
    return 0;
}

/* Looks through the text token by token; false at the first that RFC 8259 does not know. What json-c
 * would not keep goes in quotes: then copy has the text up to *rest, the last of those. */
static bool check_tokens(struct buf *copy, const char *s, const char *end, const char **rest)
{
    bool after_quoted = false; /* but for white space */

    for (*rest = s; s < end;) {
        bool quote = false;
        size_t n;

        if (*s == '"')
            n = string_length(s, end);
        else if (*s == '-' || (*s >= '0' && *s <= '9'))
            n = number_length(s, end, &quote);
        else if (*s != '\0' && strchr(" \t\r\n{}[]:,", *s) != NULL)
            n = 1;
        else
            n = word_length(s, end);
        if (n == 0 || (*s == ':' && after_quoted)) /* a number is no name, quoted or not */
            return false;
        after_quoted = quote || (after_quoted && strchr(" \t\r\n", *s) != NULL);
        if (quote) {
            buf_append(copy, *rest, (size_t)(s - *rest));
            buf_append_char(copy, '"');
            buf_append(copy, s, n);
            buf_append_char(copy, '"');
            *rest = s + n;
        }
        s += n;
    }
    return buf_ok(copy);
}

static json_object *parse(json_tokener *tokener, const char *text, size_t len)
{
    json_object *root;

    json_tokener_set_flags(tokener, JSON_TOKENER_STRICT);
    root = json_tokener_parse_ex(tokener, text, (int)len);
    if (json_tokener_get_error(tokener) == json_tokener_continue)
        root =
            json_tokener_parse_ex(tokener, "", 1); /* a number ends where something else begins */
    if (json_tokener_get_error(tokener) == json_tokener_success)
        return root;
    json_object_put(root);
    return NULL;
}

struct json_object *strict_json_parse(const char *text, size_t len, int depth)
{
    json_tokener *tokener = json_tokener_new_ex(depth);
    const char *end = text + len, *rest = text;
    json_object *root = NULL;
    struct buf copy;

    buf_init(&copy, MAX_TEXT);
    if (tokener != NULL && len > 0 && len <= MAX_TEXT &&
        u8_check((const uint8_t *)text, len) == NULL && check_tokens(&copy, text, end, &rest)) {
        if (rest == text) {
            root = parse(tokener, text, len);
        } else {
            buf_append(&copy, rest, (size_t)(end - rest));
            if (buf_ok(&copy))
                root = parse(tokener, copy.data, copy.len);
        }
    }
    json_tokener_free(tokener);
    buf_reset(&copy);
    return root;
}
