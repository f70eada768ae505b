/* ctl_token.c - extractctl token ...: tokens and their API keys. See ctl.h.
 *
 * An API key comes from standard input only and is shown to nobody. Each change is written to
 * AuditLog with who made it. */
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <termios.h>
#include <unistd.h>

#include "ctl.h"

#define LIMIT_MAX INT64_C(1000000000000000)

/* ---- the API key ---- */

static void interrupted(int number)
{
    (void)number; /* only so that read() returns */
}

/* One line of standard input, without its end. -1: interrupted, unreadable or too long. */
static ssize_t read_line(char *line, size_t size)
{
    size_t len = 0;

    for (;;) {
        char c;
        ssize_t n = read(STDIN_FILENO, &c, 1);
        if (n < 0 || len + 1 >= size)
            return -1;
        if (n == 0 || c == '\n')
            break;
        line[len++] = c;
    }
    line[len] = '\0';
    return (ssize_t)len;
}

/* As read_line, from a terminal that does not show what is typed, whatever ends it. */
static ssize_t prompt_line(char *line, size_t size)
{
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGTSTP};
    struct sigaction old[sizeof numbers / sizeof numbers[0]];
    struct sigaction action = {.sa_handler = interrupted}; /* no SA_RESTART */
    struct termios shown;
    struct termios hidden;
    ssize_t len;

    if (tcgetattr(STDIN_FILENO, &shown) != 0)
        return -1;
    hidden = shown;
    hidden.c_lflag &= ~(tcflag_t)ECHO;
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        sigaction(numbers[i], &action, &old[i]);
    fputs("API key (not shown): ", stderr);
    tcsetattr(STDIN_FILENO, TCSAFLUSH, &hidden);
    len = read_line(line, size);
    tcsetattr(STDIN_FILENO, TCSAFLUSH, &shown);
    fputc('\n', stderr);
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        sigaction(numbers[i], &old[i], NULL);
    return len;
}

/* The key, trimmed, or says what is wrong. The caller wipes it. */
static int read_key(char key[STORE_API_KEY_SIZE])
{
    char line[STORE_API_KEY_SIZE + 64];
    ssize_t got =
        isatty(STDIN_FILENO) ? prompt_line(line, sizeof line) : read_line(line, sizeof line);
    char *start = line;
    size_t len;
    bool ok = false;

    if (got >= 0) {
        start += strspn(line, " \t\r");
        len = strlen(start);
        while (len > 0 && strchr(" \t\r", start[len - 1]) != NULL)
            len--;
        ok = len >= 1 && len < STORE_API_KEY_SIZE && strlen(line) == (size_t)got;
        for (size_t i = 0; i < len; i++)
            ok = ok && start[i] > ' ' && start[i] <= '~';
        if (ok) {
            memcpy(key, start, len);
            key[len] = '\0';
        }
    }
    explicit_bzero(line, sizeof line);
    if (!ok)
        fputs(CTL_NAME ": the API key must be one line of standard input, 1 to 1024 visible ASCII "
                       "characters\n",
              stderr);
    return ok ? EXIT_OK : EXIT_USAGE;
}

/* ---- values from the command line ---- */

/* "none" is -1. */
static bool parse_limit(const char *text, int64_t *limit)
{
    *limit = -1;
    return strcasecmp(text, "none") == 0 || ctl_parse_integer(text, 0, LIMIT_MAX, limit);
}

/* --threshold, a share: 0 < t <= 1. 0: not given. */
static int read_threshold(const struct ctl *ctl, double *threshold)
{
    const char *text = ctl->values[FLAG_THRESHOLD];
    char *end = NULL;

    *threshold = 0;
    if (text == NULL)
        return EXIT_OK;
    if (text[strspn(text, "0123456789.")] == '\0')
        *threshold = strtod(text, &end);
    return end != NULL && *end == '\0' && *threshold > 0 && *threshold <= 1
               ? EXIT_OK
               : ctl_usage_error(ctl, "--threshold must be above 0 and at most 1, like 0.8");
}

/* TOKENID, then the store. */
static int open_token(struct ctl *ctl, int64_t *id)
{
    if (!ctl_parse_integer(ctl->arguments[0], 1, INT64_MAX, id))
        return ctl_usage_error(ctl, "TOKENID must be a whole number, as `token list` shows it");
    return ctl_open_store(ctl);
}

/* ---- the commands ---- */

int ctl_token_add(struct ctl *ctl)
{
    char key[STORE_API_KEY_SIZE];
    struct store_new_token token = {
        .company_id = ctl->values[FLAG_COMPANY],
        .company_name = ctl->values[FLAG_COMPANY_NAME],
        .provider = ctl->values[FLAG_PROVIDER],
        .api_key = key,
        .limit = -1,
    };
    struct err err = {0};
    int64_t id = 0;
    enum err_code code;
    int status = read_threshold(ctl, &token.threshold);

    if (status == EXIT_OK && ctl_given(ctl, FLAG_LIMIT) &&
        !parse_limit(ctl->values[FLAG_LIMIT], &token.limit))
        return ctl_usage_error(ctl, "--limit must be a whole number or none");
    if (status == EXIT_OK)
        status = ctl_open_store(ctl);
    if (status == EXIT_OK)
        status = read_key(key);
    if (status != EXIT_OK)
        return status;
    code = store_token_add(ctl->store, ctl->actor, &token, &id, &err);
    explicit_bzero(key, sizeof key);
    if (code != ERR_NONE)
        return ctl_store_error(ctl, &err);
    if (ctl_given(ctl, FLAG_JSON))
        return ctl_show_row(ctl, &(struct ctl_cell){"TokenID", ctl_integer(id)}, 1);
    return printf("%" PRId64 "\n", id) > 0 && fflush(stdout) == 0 ? EXIT_OK : EXIT_NO;
}

int ctl_token_list(struct ctl *ctl)
{
    static const struct table_layout layout = {
        .columns = "TokenID CompanyID Status TotalTokenLimit TotalUsedTokens TotalRemainingTokens"
                   " ReservedTokens CooldownUntil StatusReason",
    };
    return ctl_show_view(ctl, VIEW_TOKENS, &layout);
}

int ctl_token_set_status(struct ctl *ctl)
{
    static const char *const words[] = {"Active", "Expired", "Exceeded", "Disabled"};
    const char *word = NULL;
    struct err err = {0};
    int64_t id = 0;
    int status;

    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
        if (strcasecmp(ctl->arguments[1], words[i]) == 0)
            word = words[i];
    if (word == NULL)
        return ctl_usage_error(ctl, "STATUS must be Active, Expired, Exceeded or Disabled");
    status = open_token(ctl, &id);
    if (status != EXIT_OK)
        return status;
    if (store_token_set_status(ctl->store, ctl->actor, id, word, ctl->values[FLAG_REASON], &err) !=
        ERR_NONE)
        return ctl_store_error(ctl, &err);
    const struct ctl_cell cells[] = {{"TokenID", ctl_integer(id)}, {"Status", ctl_text(word)}};
    return ctl_show_row(ctl, cells, 2);
}

int ctl_token_set_key(struct ctl *ctl)
{
    char key[STORE_API_KEY_SIZE];
    struct err err = {0};
    int64_t id = 0;
    enum err_code code;
    int status = open_token(ctl, &id);

    if (status == EXIT_OK)
        status = read_key(key);
    if (status != EXIT_OK)
        return status;
    code = store_token_set_key(ctl->store, ctl->actor, id, key, &err);
    explicit_bzero(key, sizeof key);
    if (code != ERR_NONE)
        return ctl_store_error(ctl, &err);
    const struct ctl_cell cells[] = {{"TokenID", ctl_integer(id)},
                                     {"ApiKey", ctl_text("replaced")}};
    return ctl_show_row(ctl, cells, 2);
}

int ctl_token_set_limit(struct ctl *ctl)
{
    struct err err = {0};
    int64_t id = 0;
    int64_t limit;
    double threshold;
    int status = read_threshold(ctl, &threshold);

    if (status == EXIT_OK && !parse_limit(ctl->arguments[1], &limit))
        return ctl_usage_error(ctl, "the limit must be a whole number or none");
    if (status == EXIT_OK)
        status = open_token(ctl, &id);
    if (status != EXIT_OK)
        return status;
    if (store_token_set_limit(ctl->store, ctl->actor, id, limit, threshold, &err) != ERR_NONE)
        return ctl_store_error(ctl, &err);
    const struct ctl_cell cells[] = {
        {"TokenID", ctl_integer(id)},
        {"TotalTokenLimit", limit < 0 ? ctl_null() : ctl_integer(limit)},
    };
    return ctl_show_row(ctl, cells, 2);
}

int ctl_seal(struct ctl *ctl)
{
    struct err err = {0};
    int sealed = 0, unreadable = 0;
    int status = ctl_open_config(ctl);

    if (status == EXIT_OK && ctl->config->seal.key_file[0] == '\0')
        return ctl_usage_error(ctl, "seal.key_file is not configured: there is no key to seal by");
    if (status == EXIT_OK)
        status = ctl_open_store(ctl);
    if (status != EXIT_OK)
        return status;
    if (store_seal_keys(ctl->store, ctl->actor, &sealed, &unreadable, &err) != ERR_NONE)
        return ctl_store_error(ctl, &err);
    const struct ctl_cell cells[] = {{"Sealed", ctl_integer(sealed)},
                                     {"Unreadable", ctl_integer(unreadable)}};
    status = ctl_show_row(ctl, cells, 2);
    return unreadable > 0 ? EXIT_NO : status;
}
