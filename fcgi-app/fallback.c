/* fallback.c - the key that serves where the store has none: appSetting.txt. See fallback.h. */
#include "fallback.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_LINE 4096

/* Takes white space and what JSON puts around a value off both ends, in place. */
static char *trim(char *s)
{
    static const char ends[] = " \t\r\n\"',;}";
    size_t n;

    s += strspn(s, " \t\r\n\"'{");
    n = strlen(s);
    while (n > 0 && strchr(ends, s[n - 1]) != NULL)
        s[--n] = '\0';
    return s;
}

static bool is_key(const char *s)
{
    size_t n = strlen(s);

    for (const char *p = s; *p != '\0'; p++)
        if (!isgraph((unsigned char)*p))
            return false;
    return n > 0 && n < 1024;
}

/* The value of "name = value" or "name: value" where the name holds API_KEY; NULL otherwise. */
static char *named_value(char *line)
{
    size_t name = strcspn(line, "=:");

    if (line[name] == '\0')
        return NULL;
    line[name] = '\0';
    bool wanted = strcasestr(line, "API_KEY") != NULL || strcasestr(line, "APIKEY") != NULL;
    return wanted ? trim(line + name + 1) : NULL;
}

enum err_code fallback_load(const char *path, char **key, struct err *err)
{
    char line[MAX_LINE], *found = NULL, *bare = NULL;
    int lines = 0;
    FILE *f = fopen(path, "re");

    *key = NULL;
    if (f == NULL)
        return err_set(err, ERR_CONFIG, "fallback.key_file: %s cannot be read", path);
    while (found == NULL && fgets(line, sizeof line, f) != NULL) {
        char *text = trim(line + (strncmp(line, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0));
        if (*text == '\0' || *text == '#' || *text == ';')
            continue;
        lines++;
        if (bare == NULL && is_key(text) && strpbrk(text, "=:") == NULL)
            bare = strdup(text);
        char *value = named_value(text);
        if (value != NULL && is_key(value))
            found = strdup(value);
    }
    fclose(f);
    explicit_bzero(line, sizeof line);
    if (found == NULL && lines == 1) {
        found = bare;
        bare = NULL;
    }
    if (bare != NULL)
        explicit_bzero(bare, strlen(bare));
    free(bare);
    if (found == NULL)
        return err_set(err, ERR_CONFIG,
                       "fallback.key_file: %s holds neither a bare key nor a line whose name holds "
                       "API_KEY",
                       path);
    *key = found;
    return ERR_NONE;
}
