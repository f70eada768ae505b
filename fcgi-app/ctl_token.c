/* ctl_token.c - extractctl token ...: tokens and their API keys. See ctl.h.
 *
 * An API key comes from standard input only and is shown to nobody. Each change is written to
 * AuditLog with who made it. */
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/signalfd.h>
#include <termios.h>
#include <unistd.h>

#include "ctl.h"

#define LIMIT_MAX INT64_C(1000000000000000)

/* ---- the API key ---- */

/* One line of standard input, without its end. -1: unreadable, too long, or signal_fd (-1: none) has
 * something. */
static ssize_t read_line(char *line, size_t size, int signal_fd)
{
    struct pollfd fds[] = {{.fd = STDIN_FILENO, .events = POLLIN},
                           {.fd = signal_fd, .events = POLLIN}};
    size_t len = 0;

    for (;;) {
        char c;
        if (poll(fds, 2, -1) < 0 || fds[1].revents != 0)
            return -1;
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

/* As read_line, from a terminal that does not show what is typed, and that is as before whatever ends
 * it. *number: the signal that did, for the caller to end by; 0: none. */
static ssize_t prompt_line(char *line, size_t size, int *number)
{
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGTSTP};
    struct signalfd_siginfo info;
    sigset_t signals, before;
    struct termios shown;
    struct termios hidden;
    ssize_t len = -1;
    int signal_fd;

    sigemptyset(&signals);
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        sigaddset(&signals, numbers[i]);
    signal_fd = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signal_fd < 0 || tcgetattr(STDIN_FILENO, &shown) != 0)
        goto out;
again:
    hidden = shown;
    hidden.c_lflag &= ~(tcflag_t)ECHO;
    pthread_sigmask(SIG_BLOCK, &signals, &before);
    fputs("API key (not shown): ", stderr);
    tcsetattr(STDIN_FILENO, TCSAFLUSH, &hidden);
    len = read_line(line, size, signal_fd);
    tcsetattr(STDIN_FILENO, TCSAFLUSH, &shown);
    fputc('\n', stderr);
    *number = read(signal_fd, &info, sizeof info) == (ssize_t)sizeof info ? (int)info.ssi_signo : 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (*number == SIGTSTP) {
        raise(SIGTSTP);
        goto again;
    }
out:
    if (signal_fd >= 0)
        close(signal_fd);
    return len;
}

/* The key, trimmed, or says what is wrong. The caller wipes it. */
static int read_key(struct ctl *ctl, char key[STORE_API_KEY_SIZE])
{
    char line[STORE_API_KEY_SIZE + 64] = "";
    ssize_t got = isatty(STDIN_FILENO) ? prompt_line(line, sizeof line, &ctl->signal)
                                       : read_line(line, sizeof line, -1);
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
    if (ctl->signal != 0)
        return EXIT_USAGE; /* nothing was changed */
    if (!ok)
        ctl_error(ctl,
                  "the API key must be one line of standard input, 1 to %d visible ASCII "
                  "characters",
                  STORE_API_KEY_SIZE - 1);
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

static void begin_change(struct ctl *ctl, int64_t id)
{
    ctl_work_begin(ctl, WORK_CHANGES, "changing token %" PRId64, id);
}

/* Of a command that names a token. */
static int token_error(const struct ctl *ctl, const struct err *err)
{
    int status = ctl_store_error(ctl, err);

    if (err->code == ERR_NO_SUCH_ROW)
        ctl_next(ctl, "see which there are: `" CTL_NAME " token list`");
    return status;
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
        status = read_key(ctl, key);
    if (status != EXIT_OK)
        return status;
    ctl_work_begin(ctl, WORK_CHANGES, "adding a token to company %s", token.company_id);
    code = store_token_add(ctl->store, ctl->actor, &token, &id, &err);
    ctl_work_end(ctl);
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
    enum err_code code;
    int status;

    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
        if (strcasecmp(ctl->arguments[1], words[i]) == 0)
            word = words[i];
    if (word == NULL)
        return ctl_usage_error(ctl, "STATUS must be Active, Expired, Exceeded or Disabled");
    status = open_token(ctl, &id);
    if (status != EXIT_OK)
        return status;
    begin_change(ctl, id);
    code = store_token_set_status(ctl->store, ctl->actor, id, word, ctl->values[FLAG_REASON], &err);
    ctl_work_end(ctl);
    if (code != ERR_NONE)
        return token_error(ctl, &err);
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
        status = read_key(ctl, key);
    if (status != EXIT_OK)
        return status;
    begin_change(ctl, id);
    code = store_token_set_key(ctl->store, ctl->actor, id, key, &err);
    ctl_work_end(ctl);
    explicit_bzero(key, sizeof key);
    if (code != ERR_NONE)
        return token_error(ctl, &err);
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
    enum err_code code;
    int status = read_threshold(ctl, &threshold);

    if (status == EXIT_OK && !parse_limit(ctl->arguments[1], &limit))
        return ctl_usage_error(ctl, "the limit must be a whole number or none");
    if (status == EXIT_OK)
        status = open_token(ctl, &id);
    if (status != EXIT_OK)
        return status;
    begin_change(ctl, id);
    code = store_token_set_limit(ctl->store, ctl->actor, id, limit, threshold, &err);
    ctl_work_end(ctl);
    if (code != ERR_NONE)
        return token_error(ctl, &err);
    const struct ctl_cell cells[] = {
        {"TokenID", ctl_integer(id)},
        {"TotalTokenLimit", limit < 0 ? ctl_null() : ctl_integer(limit)},
    };
    return ctl_show_row(ctl, cells, 2);
}

/* ---- seal ---- */

struct sealing {
    struct ctl *ctl;
    int64_t total;
};

/* A store_row: Status and how many. */
static bool add_tokens(void *context, size_t columns, const char *const *names,
                       const struct store_value *values)
{
    struct sealing *sealing = context;

    (void)names;
    if (columns >= 2)
        sealing->total += values[1].integer;
    return true;
}

/* A store_go_on. */
static bool watch_seal(void *context, int64_t done)
{
    const struct sealing *sealing = context;

    ctl_work_count(sealing->ctl, done, sealing->total);
    return ctl_work_go_on(sealing->ctl);
}

/* Each key by itself: what is sealed stays sealed, whatever stops the rest. */
int ctl_seal(struct ctl *ctl)
{
    const struct store_filter all = {0};
    struct sealing sealing = {.ctl = ctl};
    struct err err = {0};
    int sealed = 0, unreadable = 0;
    enum err_code code;
    int status = ctl_open_config(ctl);

    if (status == EXIT_OK && ctl->config->seal.key_file[0] == '\0')
        return ctl_usage_error(ctl, "seal.key_file is not configured: there is no key to seal by");
    if (status == EXIT_OK)
        status = ctl_open_store(ctl);
    if (status != EXIT_OK)
        return status;
    ctl_work_begin(ctl, WORK_STEPS, "sealing API keys");
    store_watch(ctl->store, watch_seal, &sealing);
    code = store_query(ctl->store, VIEW_TOKENS_BY_STATUS, &all, add_tokens, &sealing, &err);
    if (code == ERR_NONE)
        code = store_seal_keys(ctl->store, ctl->actor, &sealed, &unreadable, &err);
    ctl_work_end(ctl);
    if (code != ERR_NONE) {
        if (sealed > 0)
            ctl_note(ctl, "sealed before that, and left so: %d", sealed);
        return ctl_store_error(ctl, &err);
    }
    const struct ctl_cell cells[] = {{"Sealed", ctl_integer(sealed)},
                                     {"Unreadable", ctl_integer(unreadable)}};
    status = ctl_show_row(ctl, cells, 2);
    if (ctl->signal != 0)
        ctl_error(ctl, "interrupted: run it again for the rest");
    if (unreadable > 0)
        ctl_next(ctl, "put the key that sealed them into seal.key_file, or give the tokens new API "
                      "keys: `" CTL_NAME " check` names one");
    return unreadable > 0 ? EXIT_NO : status;
}
