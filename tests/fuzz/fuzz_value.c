/* fuzz_value.c - any text as one value of the configuration: the first byte chooses its type. What is
 * accepted must be within its bounds, and, printed and read again, be the same. A URL that is accepted must
 * be the same URL for libcurl, which will use it: what two readers see differently leads elsewhere. */
#include <arpa/inet.h>
#include <curl/curl.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "config_value.h"
#include "support.h"
#include "url.h"

static const char *const words[] = {"sqlite", "mssql", "other", NULL};

/* Bounds as keys have them. */
static const struct value_type types[] = {
    {VALUE_INTEGER, 0, 1e9, NULL, NULL},
    {VALUE_INTEGER, 1, 1024, NULL, NULL},
    {VALUE_SIZE, 1024, 1024.0 * 1024 * 1024, NULL, NULL},
    {VALUE_DURATION, 0, 720 * VALUE_HOUR, NULL, NULL},
    {VALUE_DURATION, 10, 10 * VALUE_MINUTE, NULL, NULL},
    {VALUE_REAL, 0.01, 1, NULL, NULL},
    {VALUE_REAL, 1, 100, NULL, NULL},
    {VALUE_YES_NO, 0, 0, NULL, NULL},
    {VALUE_WORD, 0, 0, words, NULL},
    {VALUE_TEXT, 0, 0, NULL, NULL},
    {VALUE_TEXT, 0, 0, NULL, value_fault_model},
    {VALUE_FILE, 0, 0, NULL, NULL},
    {VALUE_TEXT, 0, 0, NULL, value_fault_base_url},
    {VALUE_URL, 0, 0, NULL, value_fault_proxy},
};

union place {
    int integer;
    int64_t number;
    double real;
    bool yes;
    char *text;
};

static bool is_within(const struct value_type *type, const union place *place)
{
    switch (type->kind) {
    case VALUE_INTEGER:
        return place->integer >= type->min && place->integer <= type->max;
    case VALUE_SIZE:
    case VALUE_DURATION:
        return (double)place->number >= type->min && (double)place->number <= type->max;
    case VALUE_REAL:
        return place->real >= type->min && place->real <= type->max;
    case VALUE_WORD:
        return place->integer >= 0 && words[place->integer] != NULL;
    default:
        return true;
    }
}

static bool is_same(const struct value_type *type, const union place *a, const union place *b)
{
    switch (type->kind) {
    case VALUE_INTEGER:
    case VALUE_WORD:
        return a->integer == b->integer;
    case VALUE_SIZE:
    case VALUE_DURATION:
        return a->number == b->number;
    case VALUE_REAL: /* printed with 15 digits */
        return a->real - b->real < 1e-12 && b->real - a->real < 1e-12;
    case VALUE_YES_NO:
        return a->yes == b->yes;
    case VALUE_URL: /* masked */
        return true;
    default:
        return strcmp(a->text, b->text) == 0;
    }
}

static char *print(const struct value_type *type, const union place *place)
{
    char *text = NULL;
    size_t len;
    FILE *f = open_memstream(&text, &len);

    CHECK(f != NULL);
    value_print(type, place, f);
    CHECK(fclose(f) == 0);
    return text;
}

/* ---- URLs ---- */

static char *part(CURLU *handle, CURLUPart which)
{
    char *text = NULL;
    return curl_url_get(handle, which, &text, 0) == CURLUE_OK ? text : NULL;
}

/* libcurl writes addresses in their plain form, however they were written. */
static bool is_same_host(char *curls, const struct url *url)
{
    struct in6_addr six[2];
    struct in_addr four[2];

    if ((curls[0] == '[') != url->bracketed)
        return false;
    if (url->bracketed) {
        curls[strlen(curls) - 1] = '\0';
        return inet_pton(AF_INET6, curls + 1, &six[0]) == 1 &&
               inet_pton(AF_INET6, url->host, &six[1]) == 1 &&
               memcmp(&six[0], &six[1], sizeof six[0]) == 0;
    }
    if (inet_pton(AF_INET, curls, &four[0]) == 1)
        return inet_aton(url->host, &four[1]) != 0 && four[0].s_addr == four[1].s_addr;
    return strcasecmp(curls, url->host) == 0;
}

/* By libcurl's word. */
static bool is_loopback(const char *host)
{
    return strcasecmp(host, "localhost") == 0 || strcmp(host, "[::1]") == 0 ||
           strncmp(host, "127.", 4) == 0;
}

/* Of libcurl: what is between scheme and path must be just what url_split saw. */
static void check_url(const char *text, bool may_have_user, const char *printed)
{
    struct url url, masked;
    CURLU *handle = curl_url();

    CHECK(handle != NULL && url_split(text, &url));
    CHECK(curl_url_set(handle, CURLUPART_URL, text, CURLU_NON_SUPPORT_SCHEME) == CURLUE_OK);
    char *scheme = part(handle, CURLUPART_SCHEME), *host = part(handle, CURLUPART_HOST),
         *user = part(handle, CURLUPART_USER), *password = part(handle, CURLUPART_PASSWORD),
         *query = part(handle, CURLUPART_QUERY);
    CHECK(scheme != NULL && strcasecmp(scheme, url.scheme) == 0);
    CHECK(host != NULL && (strcmp(scheme, "http") != 0 || may_have_user || is_loopback(host)));
    CHECK(is_same_host(host, &url)); /* cuts the host */
    CHECK(url.has_user == (user != NULL) && (may_have_user || user == NULL));
    CHECK(may_have_user || query == NULL);

    CHECK(url_split(printed, &masked) && strcmp(masked.host, url.host) == 0);
    CHECK(curl_url_set(handle, CURLUPART_URL, printed, CURLU_NON_SUPPORT_SCHEME) == CURLUE_OK);
    char *shown = part(handle, CURLUPART_PASSWORD);
    CHECK(shown == NULL ? password == NULL : strcmp(shown, "***") == 0);
    curl_free(shown);
    curl_free(query);
    curl_free(password);
    curl_free(user);
    curl_free(host);
    curl_free(scheme);
    curl_url_cleanup(handle);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input input = {data, size};
    const struct value_type *type = &types[fuzz_byte(&input) % (sizeof types / sizeof *types)];
    union place place = {0}, again = {0};
    struct err err = {.message = ""};
    struct arena arena;

    arena_init(&arena);
    char *text = fuzz_text(&input, '\0');
    struct value_shown shown = value_show(text);
    CHECK(fuzz_is_line(shown.text));
    if (value_set(type, &place, text, &arena, &err) == ERR_NONE) {
        char *printed = print(type, &place);
        CHECK(is_within(type, &place) && fuzz_is_line(printed));
        CHECK(value_set(type, &again, printed, &arena, &err) == ERR_NONE);
        CHECK(is_same(type, &place, &again));
        if (*text != '\0' && (type->fault == value_fault_base_url || type->kind == VALUE_URL))
            check_url(text, type->kind == VALUE_URL, printed);
        free(printed);
    } else {
        CHECK(err.message[0] != '\0' && fuzz_is_line(err.message));
    }
    free(text);
    arena_reset(&arena);
    return 0;
}
