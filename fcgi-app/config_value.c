/* config_value.c - the types of a configuration's values. See config_value.h.
 *
 * All that is not text is read as a double first: the largest, a size, is far below 2^53. */
#include "config_value.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

#include "text.h"
#include "url.h"

#define VALUE_MAX 4096 /* bytes */
#define LETTERS "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
#define DIGITS "0123456789"

/* The larger unit first: numbers are written in the largest that fits. */
static const struct unit {
    enum value_kind kind;
    const char *suffix;
    double factor;
} units[] = {
    {VALUE_INTEGER, "", 1},
    {VALUE_REAL, "", 1},
    {VALUE_SIZE, "G", 1024.0 * 1024 * 1024},
    {VALUE_SIZE, "M", 1024.0 * 1024},
    {VALUE_SIZE, "K", 1024},
    {VALUE_SIZE, "", 1},
    {VALUE_DURATION, "h", VALUE_HOUR},
    {VALUE_DURATION, "m", VALUE_MINUTE},
    {VALUE_DURATION, "s", VALUE_SECOND},
    {VALUE_DURATION, "ms", 1},
    {VALUE_DURATION, "", VALUE_SECOND},
};

#define UNIT_COUNT (sizeof units / sizeof units[0])

bool value_is_text(const struct value_type *type)
{
    return type->kind >= VALUE_TEXT;
}

struct value_shown value_show(const char *text)
{
    struct value_shown shown = {""};
    size_t max = sizeof shown.text - sizeof "...";
    size_t len = strnlen(text, max);

    memcpy(shown.text, text, len);
    if (text_fault(text, len, 0, max) != NULL)
        for (size_t i = 0; i < len; i++)
            if (!isprint((unsigned char)text[i]))
                shown.text[i] = '?';
    if (text[len] != '\0')
        memcpy(shown.text + len, "...", sizeof "...");
    return shown;
}

/* ---- reading ---- */

/* digits[.digits] and a unit. Not strtod alone: it reads "inf", "0x10" and, in some locales, "1,5" */
static bool parse_number(const struct value_type *type, const char *text, double *number)
{
    size_t whole = strspn(text, DIGITS);
    size_t fraction = text[whole] == '.' ? strspn(text + whole + 1, DIGITS) : 0;
    size_t len = whole + (fraction > 0 ? fraction + 1 : 0);
    bool may_be_fraction = type->kind == VALUE_REAL || type->kind == VALUE_DURATION;
    char digits[20] = "";

    if (whole == 0 || len >= sizeof digits || (fraction > 0 && !may_be_fraction))
        return false;
    memcpy(digits, text, len);
    for (size_t i = 0; i < UNIT_COUNT; i++) {
        if (units[i].kind == type->kind && strcasecmp(text + len, units[i].suffix) == 0) {
            *number = strtod(digits, NULL) * units[i].factor;
            if (type->kind == VALUE_DURATION)
                *number = round(*number);
            return *number >= type->min && *number <= type->max;
        }
    }
    return false;
}

static bool parse_word(const char *const *words, const char *text, double *number)
{
    for (size_t i = 0; words[i] != NULL; i++) {
        if (strcasecmp(text, words[i]) == 0) {
            *number = (double)i;
            return true;
        }
    }
    return false;
}

static bool parse_yes_no(const char *text, double *number)
{
    static const char *const words[] = {"no", "yes", "false", "true", "off", "on", "0", "1", NULL};

    if (!parse_word(words, text, number))
        return false;
    *number = fmod(*number, 2);
    return true;
}

/* A number of that type, as one would write it. */
static const char *format_number(const struct value_type *type, double number, char out[32])
{
    for (size_t i = 0; i < UNIT_COUNT; i++) {
        if (units[i].kind == type->kind && fmod(number, units[i].factor) == 0 && number != 0) {
            snprintf(out, 32, "%.15g%s", number / units[i].factor, units[i].suffix);
            return out;
        }
    }
    snprintf(out, 32, "%.15g", number);
    return out;
}

/* "\"x\" is not one of sqlite or mssql" */
static enum err_code refuse_word(const struct value_type *type, const char *text, struct err *err)
{
    char list[128];
    size_t len = (size_t)snprintf(list, sizeof list, "%s", type->words[0]);

    for (size_t i = 1; type->words[i] != NULL && len < sizeof list; i++)
        len += (size_t)snprintf(list + len, sizeof list - len, "%s%s",
                                type->words[i + 1] == NULL ? " or " : ", ", type->words[i]);
    return err_set(err, ERR_CONFIG, "\"%s\" is not one of %s", value_show(text).text, list);
}

const char *value_range(const struct value_type *type, char out[VALUE_RANGE_SIZE])
{
    char min[32];
    char max[32];

    if (type->kind > VALUE_REAL)
        return "";
    snprintf(out, VALUE_RANGE_SIZE, "from %s to %s", format_number(type, type->min, min),
             format_number(type, type->max, max));
    return out;
}

/* "\"x\" is not a whole number from 1 to 1024" */
static enum err_code refuse_number(const struct value_type *type, const char *text, struct err *err)
{
    static const char *const names[] = {
        [VALUE_INTEGER] = "a whole number",
        [VALUE_SIZE] = "a size like 512K or 50M,",
        [VALUE_DURATION] = "a duration like 10s, 500ms or 2m,",
        [VALUE_REAL] = "a number",
    };
    char range[VALUE_RANGE_SIZE];

    return err_set(err, ERR_CONFIG, "\"%s\" is not %s %s", value_show(text).text, names[type->kind],
                   value_range(type, range));
}

/* What no value of any kind may be. */
static const char *fault_of_any(const char *text)
{
    size_t len = strlen(text);
    const char *fault = NULL;

    if (len > VALUE_MAX)
        return "is too long: at most 4096 bytes";
    fault = text_fault(text, len, 0, VALUE_MAX);
    if (fault != NULL)
        return fault;
    for (size_t i = 0; i < len; i++)
        if (text[i] == ';' && (i == 0 || isspace((unsigned char)text[i - 1])))
            return "must not have a ; at its begin or after a space: that begins a comment";
    return NULL;
}

enum err_code value_set(const struct value_type *type, void *place, const char *text,
                        struct arena *arena, struct err *err)
{
    const char *fault = fault_of_any(text);
    double number = 0;

    if (fault == NULL && type->fault != NULL && *text != '\0')
        fault = type->fault(text);
    if (fault != NULL)
        return err_set(err, ERR_CONFIG, "%s", fault);

    switch (type->kind) {
    case VALUE_INTEGER:
    case VALUE_SIZE:
    case VALUE_DURATION:
    case VALUE_REAL:
        if (!parse_number(type, text, &number))
            return refuse_number(type, text, err);
        if (type->kind == VALUE_INTEGER)
            *(int *)place = (int)number;
        else if (type->kind == VALUE_REAL)
            *(double *)place = number;
        else
            *(int64_t *)place = (int64_t)number;
        break;
    case VALUE_YES_NO:
        if (!parse_yes_no(text, &number))
            return err_set(err, ERR_CONFIG, "\"%s\" is not yes or no", value_show(text).text);
        *(bool *)place = number != 0;
        break;
    case VALUE_WORD:
        if (!parse_word(type->words, text, &number))
            return refuse_word(type, text, err);
        *(int *)place = (int)number;
        break;
    case VALUE_TEXT:
    case VALUE_URL:
    case VALUE_FILE:
        *(char **)place = arena_strdup(arena, text);
        break;
    }
    return ERR_NONE;
}

/* ---- printing ---- */

void value_print(const struct value_type *type, const void *place, FILE *out)
{
    char number[32];

    switch (type->kind) {
    case VALUE_INTEGER:
        fprintf(out, "%d", *(const int *)place);
        break;
    case VALUE_SIZE:
    case VALUE_DURATION:
        fputs(format_number(type, (double)*(const int64_t *)place, number), out);
        break;
    case VALUE_REAL:
        fputs(format_number(type, *(const double *)place, number), out);
        break;
    case VALUE_YES_NO:
        fputs(*(const bool *)place ? "yes" : "no", out);
        break;
    case VALUE_WORD:
        fputs(type->words[*(const int *)place], out);
        break;
    case VALUE_URL:
        url_print_masked(*(char *const *)place, out);
        break;
    case VALUE_TEXT:
    case VALUE_FILE:
        fputs(*(char *const *)place, out);
        break;
    }
}

/* ---- what is wrong with a text ---- */

const char *value_fault_base_url(const char *text)
{
    struct url url;

    if (!url_split(text, &url))
        return "must be https://host, with an optional port and path";
    if (url.has_user)
        return "must have no user or password";
    if (url.path[strspn(url.path, LETTERS DIGITS "-._~/")] != '\0')
        return "must have a plain path: letters, digits and -._~/, no query and no fragment";
    if (strcmp(url.scheme, "https") == 0)
        return NULL;
    if (strcmp(url.scheme, "http") != 0)
        return "must begin with https:// (or http:// on loopback)";
    return url_is_loopback(&url)
               ? NULL
               : "must be https:// unless the host is 127.0.0.1, ::1 or localhost";
}

const char *value_fault_proxy(const char *text)
{
    static const char *const schemes[] = {"http", "https", "socks5", "socks5h"};
    struct url url;

    if (!url_split(text, &url) || (url.path[0] != '\0' && strcmp(url.path, "/") != 0))
        return "must be a URL like http://proxy.example:3128";
    for (size_t i = 0; i < sizeof schemes / sizeof schemes[0]; i++)
        if (strcmp(url.scheme, schemes[i]) == 0)
            return NULL;
    return "must begin with http://, https://, socks5:// or socks5h://";
}

const char *value_fault_model(const char *text)
{
    size_t len = strspn(text, LETTERS DIGITS "-._");

    return len <= 128 && text[len] == '\0'
               ? NULL
               : "must be a model's name: 1 to 128 of A-Z a-z 0-9 . _ -";
}

const char *value_fault_file(const char *path)
{
    const char *fault = NULL;
    struct stat status;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);

    if (fd < 0 || fstat(fd, &status) != 0)
        fault = strerror(errno);
    else if (!S_ISREG(status.st_mode))
        fault = "not a regular file";
    if (fd >= 0)
        close(fd);
    return fault;
}
