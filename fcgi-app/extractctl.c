/* extractctl.c - what a sysadmin or a DBA does by hand: tokens, usage, logs, checks.
 *
 * Two tables say all there is on the command line: flags (each option) and commands (words, options
 * allowed and needed, function, help); parsing, refusals and --help follow from them. A command
 * prints its rows through table.h, so that --json works for each of them.
 *
 * Run by root, the program goes on as the owner of state_dir once it has read its configuration:
 * the database's files must never come to belong to another user than the service's.
 *
 * Exit status: 0; 1, the answer is no; 2, wrong usage or configuration; 3, the store fails. */
#include <errno.h>
#include <getopt.h>
#include <grp.h>
#include <inttypes.h>
#include <limits.h>
#include <pwd.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "config.h"
#include "err.h"
#include "fallback.h"
#include "gemini.h"
#include "invoice.h"
#include "log.h"
#include "store.h"
#include "table.h"
#include "text.h"

enum { EXIT_OK, EXIT_NO, EXIT_USAGE, EXIT_STORE };

#define NAME "extractctl"
#define ROWS 1000 /* shown unless --rows says otherwise */
#define MAX_ROWS 1000000
#define HOUR_MS INT64_C(3600000)

enum flag {
    FLAG_CONFIG,
    FLAG_JSON,
    FLAG_HELP,
    FLAG_VERSION,
    FLAG_COMPANY,
    FLAG_COMPANY_NAME,
    FLAG_LIMIT,
    FLAG_THRESHOLD,
    FLAG_PROVIDER,
    FLAG_REASON,
    FLAG_BY,
    FLAG_ERRORS,
    FLAG_REQUEST,
    FLAG_SINCE,
    FLAG_UNTIL,
    FLAG_ROWS,
    FLAG_UNSETTLED,
    FLAG_AFTER_INSTALL,
    FLAG_COUNT
};

#define ALLOW(flag) (1u << (flag))
#define ALWAYS (ALLOW(FLAG_CONFIG) | ALLOW(FLAG_JSON) | ALLOW(FLAG_HELP) | ALLOW(FLAG_VERSION))
#define PERIOD (ALLOW(FLAG_SINCE) | ALLOW(FLAG_UNTIL) | ALLOW(FLAG_ROWS))

/* clang-format off */
static const struct {
    const char *name;
    const char *argument; /* NULL: none */
    const char *help;
} flags[FLAG_COUNT] = {
    [FLAG_CONFIG] =        {"config", "FILE", "configuration, instead of EXTRACT_CONFIG or " CONFIG_DEFAULT_FILE},
    [FLAG_JSON] =          {"json", NULL, "an array of objects instead of a table"},
    [FLAG_HELP] =          {"help", NULL, "this text"},
    [FLAG_VERSION] =       {"version", NULL, "print the version"},
    [FLAG_COMPANY] =       {"company", "ID", "the company"},
    [FLAG_COMPANY_NAME] =  {"company-name", "NAME", "its name, for people"},
    [FLAG_LIMIT] =         {"limit", "N", "Gemini tokens that it may use in all; none: no limit (default)"},
    [FLAG_THRESHOLD] =     {"threshold", "T", "share of the limit at which a warning is logged (default 0.8)"},
    [FLAG_PROVIDER] =      {"provider", "NAME", "default Gemini"},
    [FLAG_REASON] =        {"reason", "TEXT", "kept with the status"},
    [FLAG_BY] =            {"by", "WHAT", "sum by day (default), branch, user or token"},
    [FLAG_ERRORS] =        {"errors", NULL, "ERROR and CRITICAL only"},
    [FLAG_REQUEST] =       {"request", "ID", "one request only"},
    [FLAG_SINCE] =         {"since", "TIME", "not older: 2026-01-31, 2026-01-31T12:00:00Z (both UTC), 24h or 7d ago"},
    [FLAG_UNTIL] =         {"until", "TIME", "older than this"},
    [FLAG_ROWS] =          {"rows", "N", "at most N rows (default 1000)"},
    [FLAG_UNSETTLED] =     {"unsettled", NULL, "only those whose outcome is unknown"},
    [FLAG_AFTER_INSTALL] = {"after-install", NULL, "also: an Active token, no errors in the last hour"},
};
/* clang-format on */

/* One run of the program. */
struct ctl {
    const struct command *command;
    char **arguments;
    const char
        *values[FLAG_COUNT]; /* of the options; "" for one without argument, NULL: not given */
    struct store_filter filter;
    int64_t token_limit; /* -1: none */
    double threshold;    /* 0: not given */
    struct config *config;
    struct store *store;
    char actor[300];
};

struct command {
    const char *words;     /* "token add" */
    const char *arguments; /* "TOKENID STATUS" */
    int argument_count;
    unsigned allowed;
    unsigned needed; /* among those allowed */
    int (*run)(struct ctl *ctl);
    const char *help;
    const char *more; /* after the options; or NULL */
};

static bool given(const struct ctl *ctl, enum flag flag)
{
    return ctl->values[flag] != NULL;
}

/* ---- what goes wrong ---- */

static int usage_error(const struct ctl *ctl, const char *format, ...) PRINTF_LIKE(2, 3);

static int usage_error(const struct ctl *ctl, const char *format, ...)
{
    va_list args;

    fputs(NAME ": ", stderr);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, "\nTry `" NAME "%s%s --help`.\n", ctl->command != NULL ? " " : "",
            ctl->command != NULL ? ctl->command->words : "");
    return EXIT_USAGE;
}

static int exit_status(enum err_code code)
{
    switch (code) {
    case ERR_NONE:
        return EXIT_OK;
    case ERR_NO_SUCH_ROW:
    case ERR_BAD_VALUE:
        return EXIT_NO;
    case ERR_CONFIG:
        return EXIT_USAGE;
    default:
        return EXIT_STORE;
    }
}

/* Where the store is, for people. */
static const char *store_place(const struct config *config)
{
    return config->store.driver == DRIVER_SQLITE ? config->store.path : config->store.server;
}

static const char *user_name(void)
{
    const struct passwd *user = getpwuid(geteuid());
    return user != NULL ? user->pw_name : "this user";
}

/* What to do about a store that fails; "" where the store's message says that itself. */
static void store_remedy(const struct config *config, enum err_code code, char *out, size_t size)
{
    if (code == ERR_SCHEMA)
        snprintf(out, size, "%s", "");
    else if (code == ERR_STORAGE_FULL)
        snprintf(out, size, "make room on the disk of %s", store_place(config));
    else if (config->store.driver == DRIVER_SQLITE)
        snprintf(out, size, "see that store.path is right and that user %s may write there",
                 user_name());
    else
        snprintf(out, size, "see that the server is up and that store.server is right");
}

/* Says what the store said, where it is and what to do next. */
static int store_error(const struct ctl *ctl, const struct err *err)
{
    int status = exit_status(err->code);
    char remedy[400];

    if (status != EXIT_STORE) {
        fprintf(stderr, NAME ": %s\n", err->message);
        return status;
    }
    fprintf(stderr, NAME ": the store (%s): %s\n", store_place(ctl->config), err->message);
    store_remedy(ctl->config, err->code, remedy, sizeof remedy);
    if (remedy[0] != '\0')
        fprintf(stderr, "Next: %s.\n", remedy);
    return status;
}

/* ---- output ---- */

static int print_table(const struct ctl *ctl, const struct table *table)
{
    if (table_print(table, given(ctl, FLAG_JSON), stdout))
        return EXIT_OK;
    fputs(NAME ": the output could not be written\n", stderr);
    return EXIT_NO;
}

/* One row that does not come from the store. */
static int print_row(const struct ctl *ctl, size_t columns, const char *const *names,
                     const struct store_value *values)
{
    struct table *table = table_new();
    int status;

    if (table == NULL || !table_row(table, columns, names, values)) {
        fputs(NAME ": out of memory\n", stderr);
        status = EXIT_NO;
    } else {
        status = print_table(ctl, table);
    }
    table_free(table);
    return status;
}

static struct store_value integer(int64_t n)
{
    return (struct store_value){.type = STORE_INTEGER, .integer = n};
}

static struct store_value string(const char *s)
{
    return (struct store_value){.type = STORE_TEXT, .text = s};
}

/* ---- values from the command line ---- */

static bool parse_integer(const char *text, int64_t min, int64_t max, int64_t *number)
{
    char *end;
    long long n;

    if (*text < '0' || *text > '9')
        return false;
    errno = 0;
    n = strtoll(text, &end, 10);
    *number = n;
    return errno == 0 && *end == '\0' && n >= min && n <= max;
}

/* "none" is -1. */
static bool parse_limit(const char *text, int64_t *limit)
{
    if (strcasecmp(text, "none") == 0) {
        *limit = -1;
        return true;
    }
    return parse_integer(text, 0, INT64_C(1000000000000000), limit);
}

/* A share: 0 < t <= 1. */
static bool parse_threshold(const char *text, double *threshold)
{
    char *end;

    if (text[strspn(text, "0123456789.")] != '\0')
        return false;
    *threshold = strtod(text, &end);
    return end != text && *end == '\0' && *threshold > 0 && *threshold <= 1;
}

/* Exactly count digits; moves *text past them. */
static bool take_digits(const char **text, int count, int *number)
{
    *number = 0;
    for (int i = 0; i < count; i++, ++*text) {
        if (**text < '0' || **text > '9')
            return false;
        *number = *number * 10 + (**text - '0');
    }
    return true;
}

static bool take_char(const char **text, char c)
{
    bool there = **text == c;
    *text += there;
    return there;
}

/* "24h": that long ago. */
static bool parse_ago(const char *text, int64_t now_ms, int64_t *wall_ms)
{
    static const struct {
        char unit;
        int64_t ms;
    } units[] = {
        {'s', 1000}, {'m', 60000}, {'h', HOUR_MS}, {'d', 24 * HOUR_MS}, {'w', 7 * 24 * HOUR_MS}};
    int64_t n = 0;
    size_t digits = strspn(text, "0123456789");

    if (digits == 0 || digits > 6 || text[digits] == '\0' || text[digits + 1] != '\0')
        return false;
    for (size_t i = 0; i < digits; i++)
        n = n * 10 + (text[i] - '0');
    for (size_t i = 0; i < sizeof units / sizeof units[0]; i++) {
        if (units[i].unit == text[digits]) {
            *wall_ms = now_ms - n * units[i].ms;
            return *wall_ms > 0;
        }
    }
    return false;
}

/* The part of ISO 8601 that people write: a date, perhaps with a time, perhaps with a zone; UTC
 * without one. */
static bool parse_iso(const char *text, int64_t *wall_ms)
{
    struct tm tm = {0};
    struct tm check;
    int year;
    int month;
    int hours = 0;
    int minutes = 0;
    int ms = 0;
    bool west;
    time_t seconds;

    if (!take_digits(&text, 4, &year) || !take_char(&text, '-') || !take_digits(&text, 2, &month) ||
        !take_char(&text, '-') || !take_digits(&text, 2, &tm.tm_mday))
        return false;
    tm.tm_year = year - 1900;
    tm.tm_mon = month - 1;
    if (take_char(&text, 'T') || take_char(&text, ' ')) {
        if (!take_digits(&text, 2, &tm.tm_hour) || !take_char(&text, ':') ||
            !take_digits(&text, 2, &tm.tm_min))
            return false;
        if (take_char(&text, ':') && !take_digits(&text, 2, &tm.tm_sec))
            return false;
        if (take_char(&text, '.') && !take_digits(&text, 3, &ms))
            return false;
        west = *text == '-';
        if (!take_char(&text, 'Z') && (take_char(&text, '+') || take_char(&text, '-'))) {
            if (!take_digits(&text, 2, &hours) || !take_char(&text, ':') ||
                !take_digits(&text, 2, &minutes) || hours > 14 || minutes > 59)
                return false;
            if (west) {
                hours = -hours;
                minutes = -minutes;
            }
        }
    }
    check = tm;
    seconds = timegm(&check); /* makes the 31st of February a day in March: then it differs */
    if (*text != '\0' || check.tm_mday != tm.tm_mday || check.tm_mon != tm.tm_mon ||
        check.tm_hour != tm.tm_hour || check.tm_min != tm.tm_min || check.tm_sec != tm.tm_sec)
        return false;
    *wall_ms = ((int64_t)seconds - (int64_t)hours * 3600 - (int64_t)minutes * 60) * 1000 + ms;
    return *wall_ms > 0;
}

static bool parse_time(const char *text, int64_t now_ms, int64_t *wall_ms)
{
    return parse_ago(text, now_ms, wall_ms) || parse_iso(text, wall_ms);
}

/* Turns what the options say into values. Returns EXIT_OK or says what is wrong. */
static int read_values(struct ctl *ctl)
{
    static const enum flag texts[] = {FLAG_COMPANY, FLAG_COMPANY_NAME, FLAG_PROVIDER, FLAG_REASON,
                                      FLAG_REQUEST};
    int64_t now_ms = clock_wall_ms();
    int64_t rows = ROWS;

    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        const char *text = ctl->values[texts[i]];
        const char *fault = text != NULL ? text_fault(text, strlen(text), 1, 256) : NULL;
        if (fault != NULL)
            return usage_error(ctl, "--%s %s", flags[texts[i]].name, fault);
    }
    if (given(ctl, FLAG_LIMIT) && !parse_limit(ctl->values[FLAG_LIMIT], &ctl->token_limit))
        return usage_error(ctl, "--limit must be a whole number or none");
    if (given(ctl, FLAG_THRESHOLD) &&
        !parse_threshold(ctl->values[FLAG_THRESHOLD], &ctl->threshold))
        return usage_error(ctl, "--threshold must be above 0 and at most 1, like 0.8");
    if (given(ctl, FLAG_SINCE) &&
        !parse_time(ctl->values[FLAG_SINCE], now_ms, &ctl->filter.since_ms))
        return usage_error(ctl, "--since must be like 2026-01-31, 2026-01-31T12:00:00Z, 24h or 7d");
    if (given(ctl, FLAG_UNTIL) &&
        !parse_time(ctl->values[FLAG_UNTIL], now_ms, &ctl->filter.until_ms))
        return usage_error(ctl, "--until must be like 2026-01-31, 2026-01-31T12:00:00Z, 24h or 7d");
    if (given(ctl, FLAG_ROWS) && !parse_integer(ctl->values[FLAG_ROWS], 1, MAX_ROWS, &rows))
        return usage_error(ctl, "--rows must be a whole number from 1 to %d", MAX_ROWS);
    ctl->filter.limit = (int)rows;
    ctl->filter.company_id = ctl->values[FLAG_COMPANY];
    ctl->filter.request_id = ctl->values[FLAG_REQUEST];
    return EXIT_OK;
}

/* ---- the API key: from standard input only, shown to nobody ---- */

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

/* The key, trimmed. The caller wipes it. */
static bool read_key(char key[STORE_API_KEY_SIZE])
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
        fputs(NAME ": the API key must be one line of standard input, 1 to 1024 visible ASCII "
                   "characters\n",
              stderr);
    return ok;
}

/* ---- who does it ---- */

/* The login of the person, also behind sudo, and the host: for AuditLog. */
static void find_actor(char *out, size_t size)
{
    const char *name = getuid() == 0 ? getenv("SUDO_USER") : NULL;
    char login[256];
    const struct passwd *user;

    if (name == NULL && getlogin_r(login, sizeof login) == 0)
        name = login;
    if (name == NULL) {
        user = getpwuid(getuid());
        name = user != NULL ? user->pw_name : NULL;
    }
    if (name != NULL && text_fault(name, strlen(name), 1, 128) == NULL)
        snprintf(out, size, "%s@%.120s", name, log_host());
    else
        snprintf(out, size, "uid %lu@%.120s", (unsigned long)getuid(), log_host());
}

/* Root becomes the owner of state_dir. */
static bool become_owner(const struct config *config)
{
    struct stat status;
    const struct passwd *owner;

    if (geteuid() != 0 || stat(config->server.state_dir, &status) != 0 || status.st_uid == 0)
        return true;
    owner = getpwuid(status.st_uid);
    if ((owner != NULL ? initgroups(owner->pw_name, owner->pw_gid) : setgroups(0, NULL)) == 0 &&
        setgid(owner != NULL ? owner->pw_gid : status.st_gid) == 0 && setuid(status.st_uid) == 0)
        return true;
    fprintf(stderr, NAME ": cannot become the owner of %s: %s\n", config->server.state_dir,
            strerror(errno));
    return false;
}

/* ---- configuration and store: opened by the commands once their arguments are in order ---- */

static int open_config(struct ctl *ctl)
{
    struct err err = {0};

    ctl->config = config_load(ctl->values[FLAG_CONFIG], &err);
    if (ctl->config == NULL) {
        fprintf(stderr, NAME ": %s\n", err.message);
        return EXIT_USAGE;
    }
    find_actor(ctl->actor, sizeof ctl->actor);
    return become_owner(ctl->config) ? EXIT_OK : EXIT_STORE;
}

static int open_store(struct ctl *ctl)
{
    struct err err = {0};
    int status = open_config(ctl);

    if (status != EXIT_OK)
        return status;
    ctl->store = store_open(ctl->config, &err);
    return ctl->store != NULL ? EXIT_OK : store_error(ctl, &err);
}

/* Prints a view, as the options have filtered it. */
static int print_view(struct ctl *ctl, enum store_view view)
{
    struct table *table;
    struct err err = {0};
    int status = open_store(ctl);

    if (status != EXIT_OK)
        return status;
    table = table_new();
    if (table == NULL) {
        fputs(NAME ": out of memory\n", stderr);
        return EXIT_NO;
    }
    if (store_query(ctl->store, view, &ctl->filter, table_row, table, &err) != ERR_NONE) {
        status = store_error(ctl, &err);
        goto out;
    }
    status = print_table(ctl, table);
    if (status == EXIT_OK && table_rows(table) == 0 && !given(ctl, FLAG_JSON))
        fputs("(nothing)\n", stderr);
    if (table_rows(table) >= (size_t)ctl->filter.limit)
        fprintf(stderr, "(no more than %d rows are shown; see --rows)\n", ctl->filter.limit);
out:
    table_free(table);
    return status;
}

/* ---- tokens ---- */

static bool token_id(const struct ctl *ctl, int64_t *id)
{
    if (parse_integer(ctl->arguments[0], 1, INT64_MAX, id))
        return true;
    usage_error(ctl, "TOKENID must be a whole number, as `token list` shows it");
    return false;
}

static int run_token_add(struct ctl *ctl)
{
    char key[STORE_API_KEY_SIZE];
    struct store_new_token token = {
        .company_id = ctl->values[FLAG_COMPANY],
        .company_name = ctl->values[FLAG_COMPANY_NAME],
        .provider = ctl->values[FLAG_PROVIDER],
        .api_key = key,
        .limit = ctl->token_limit,
        .threshold = ctl->threshold,
    };
    struct err err = {0};
    int64_t id = 0;
    enum err_code code;
    int status = open_store(ctl);

    if (status != EXIT_OK)
        return status;
    if (!read_key(key))
        return EXIT_USAGE;
    code = store_token_add(ctl->store, ctl->actor, &token, &id, &err);
    explicit_bzero(key, sizeof key);
    if (code != ERR_NONE)
        return store_error(ctl, &err);
    if (given(ctl, FLAG_JSON))
        return print_row(ctl, 1, (const char *const[]){"TokenID"},
                         (const struct store_value[]){integer(id)});
    return printf("%" PRId64 "\n", id) > 0 && fflush(stdout) == 0 ? EXIT_OK : EXIT_NO;
}

static int run_token_list(struct ctl *ctl)
{
    return print_view(ctl, VIEW_TOKENS);
}

static int run_token_set_status(struct ctl *ctl)
{
    static const char *const statuses[] = {"Active", "Expired", "Exceeded", "Disabled"};
    const char *status = NULL;
    struct err err = {0};
    int64_t id;
    int opened;

    if (!token_id(ctl, &id))
        return EXIT_USAGE;
    for (size_t i = 0; i < sizeof statuses / sizeof statuses[0]; i++)
        if (strcasecmp(ctl->arguments[1], statuses[i]) == 0)
            status = statuses[i];
    if (status == NULL)
        return usage_error(ctl, "STATUS must be Active, Expired, Exceeded or Disabled");
    opened = open_store(ctl);
    if (opened != EXIT_OK)
        return opened;
    if (store_token_set_status(ctl->store, ctl->actor, id, status, ctl->values[FLAG_REASON],
                               &err) != ERR_NONE)
        return store_error(ctl, &err);
    return print_row(ctl, 2, (const char *const[]){"TokenID", "Status"},
                     (const struct store_value[]){integer(id), string(status)});
}

static int run_token_set_key(struct ctl *ctl)
{
    char key[STORE_API_KEY_SIZE];
    struct err err = {0};
    int64_t id;
    enum err_code code;
    int status;

    if (!token_id(ctl, &id))
        return EXIT_USAGE;
    status = open_store(ctl);
    if (status != EXIT_OK)
        return status;
    if (!read_key(key))
        return EXIT_USAGE;
    code = store_token_set_key(ctl->store, ctl->actor, id, key, &err);
    explicit_bzero(key, sizeof key);
    if (code != ERR_NONE)
        return store_error(ctl, &err);
    return print_row(ctl, 2, (const char *const[]){"TokenID", "ApiKey"},
                     (const struct store_value[]){integer(id), string("replaced")});
}

static int run_token_set_limit(struct ctl *ctl)
{
    struct err err = {0};
    int64_t id;
    int64_t limit;
    int status;

    if (!token_id(ctl, &id))
        return EXIT_USAGE;
    if (!parse_limit(ctl->arguments[1], &limit))
        return usage_error(ctl, "the limit must be a whole number or none");
    status = open_store(ctl);
    if (status != EXIT_OK)
        return status;
    if (store_token_set_limit(ctl->store, ctl->actor, id, limit, ctl->threshold, &err) != ERR_NONE)
        return store_error(ctl, &err);
    return print_row(ctl, 2, (const char *const[]){"TokenID", "TotalTokenLimit"},
                     (const struct store_value[]){integer(id), limit < 0 ? (struct store_value){0}
                                                                         : integer(limit)});
}

/* ---- queries ---- */

static int run_usage(struct ctl *ctl)
{
    static const struct {
        const char *name;
        enum store_view view;
    } by[] = {{"day", VIEW_USAGE_BY_DAY},
              {"branch", VIEW_USAGE_BY_BRANCH},
              {"user", VIEW_USAGE_BY_USER},
              {"token", VIEW_USAGE_BY_TOKEN}};
    const char *name = given(ctl, FLAG_BY) ? ctl->values[FLAG_BY] : "day";

    for (size_t i = 0; i < sizeof by / sizeof by[0]; i++)
        if (strcmp(name, by[i].name) == 0)
            return print_view(ctl, by[i].view);
    return usage_error(ctl, "--by must be day, branch, user or token");
}

static int run_logs(struct ctl *ctl)
{
    return print_view(ctl, given(ctl, FLAG_ERRORS) ? VIEW_ERRORS : VIEW_LOGS);
}

static int run_retries(struct ctl *ctl)
{
    return print_view(ctl, VIEW_RETRIES);
}

static int run_reservations(struct ctl *ctl)
{
    return print_view(ctl, given(ctl, FLAG_UNSETTLED) ? VIEW_UNSETTLED : VIEW_RESERVATIONS);
}

/* ---- the outbox ---- */

static int run_outbox_status(struct ctl *ctl)
{
    static const char *const names[] = {"Waiting", "Dead", "OldestSeconds"};
    struct store_outbox_status outbox;
    struct err err = {0};
    int status = open_store(ctl);

    if (status != EXIT_OK)
        return status;
    if (store_outbox_status(ctl->store, &outbox, &err) != ERR_NONE)
        return store_error(ctl, &err);
    return print_row(ctl, 3, names,
                     (const struct store_value[]){integer(outbox.waiting), integer(outbox.dead),
                                                  integer(outbox.oldest_ms / 1000)});
}

static int run_outbox_drain(struct ctl *ctl)
{
    static const char *const names[] = {"Replayed", "Waiting", "Dead"};
    struct store_outbox_status outbox;
    struct err err = {0};
    int64_t replayed = 0;
    int status = open_store(ctl);

    if (status != EXIT_OK)
        return status;
    if (store_outbox_drain(ctl->store, &replayed, &err) != ERR_NONE ||
        store_outbox_status(ctl->store, &outbox, &err) != ERR_NONE)
        return store_error(ctl, &err);
    status = print_row(ctl, 3, names,
                       (const struct store_value[]){integer(replayed), integer(outbox.waiting),
                                                    integer(outbox.dead)});
    return status == EXIT_OK && outbox.waiting > 0 ? EXIT_NO : status;
}

/* ---- migrate ---- */

static int run_migrate(struct ctl *ctl)
{
    struct err err = {0};
    int version = 0;
    int status = open_config(ctl);

    if (status != EXIT_OK)
        return status;
    if (store_migrate(ctl->config, &version, &err) != ERR_NONE)
        return store_error(ctl, &err);
    return print_row(ctl, 1, (const char *const[]){"SchemaVersion"},
                     (const struct store_value[]){integer(version)});
}

/* ---- check ---- */

struct check {
    const struct ctl *ctl;
    struct table *table; /* NULL: each line is printed when it is known */
    int status;
};

/* One line. remedy: what to do next, "" where the detail says it; NULL: it is in order. */
static void report(struct check *check, const char *what, const char *remedy, const char *format,
                   ...) PRINTF_LIKE(4, 5);

static void report(struct check *check, const char *what, const char *remedy, const char *format,
                   ...)
{
    static const char *const names[] = {"Check", "Result", "Detail", "Next"};
    const char *result = remedy == NULL ? "ok" : "FAIL";
    bool has_remedy = remedy != NULL && *remedy != '\0';
    char detail[1024];
    va_list args;

    va_start(args, format);
    vsnprintf(detail, sizeof detail, format, args);
    va_end(args);
    if (remedy != NULL && check->status == EXIT_OK)
        check->status = EXIT_NO;
    if (check->table != NULL) {
        const struct store_value values[] = {string(what), string(result), string(detail),
                                             remedy != NULL ? string(remedy)
                                                            : (struct store_value){0}};
        if (!table_row(check->table, 4, names, values))
            check->status = EXIT_NO;
        return;
    }
    printf("%-4s  %-13s  %s%s%s\n", result, what, detail, has_remedy ? "; next: " : "",
           has_remedy ? remedy : "");
    fflush(stdout);
}

/* Which file the configuration came from; NULL: none was there. */
static const char *config_path(const struct ctl *ctl)
{
    const char *path = ctl->values[FLAG_CONFIG];

    if (path == NULL)
        path = getenv("EXTRACT_CONFIG");
    if (path == NULL || *path == '\0')
        path = access(CONFIG_DEFAULT_FILE, F_OK) == 0 ? CONFIG_DEFAULT_FILE : NULL;
    return path;
}

/* May the service's user do this with path? NULL, or why not. */
static const char *denied(const char *path, int mode)
{
    return access(path, mode) == 0 ? NULL : strerror(errno);
}

static void check_config(struct check *check)
{
    const char *path = config_path(check->ctl);
    const char *why = path != NULL ? denied(path, R_OK) : NULL;

    if (path == NULL)
        report(check, "configuration", NULL, "defaults and environment; no " CONFIG_DEFAULT_FILE);
    else if (why != NULL)
        report(check, "configuration", "let the service's user read it", "%s: %s for user %s", path,
               why, user_name());
    else
        report(check, "configuration", NULL, "%s", path);
}

static void check_directory(struct check *check, const char *what, const char *path)
{
    static const char remedy[] = "make it a directory that the service's user may write to";
    const char *why = denied(path, R_OK | W_OK | X_OK);
    struct stat status;

    if (stat(path, &status) != 0)
        report(check, what, remedy, "%s: %s", path, strerror(errno));
    else if (!S_ISDIR(status.st_mode))
        report(check, what, remedy, "%s: not a directory", path);
    else if (why != NULL)
        report(check, what, remedy, "%s: %s for user %s", path, why, user_name());
    else
        report(check, what, NULL, "%s is writable for user %s", path, user_name());
}

/* Prompt and schema as the service would load them. */
static void check_texts(struct check *check)
{
    const struct config *config = check->ctl->config;
    struct err err = {0};
    struct invoice_schema *schema = invoice_schema_load(config, &err);
    struct gemini *gemini = NULL;
    const char *name = config->gemini.schema_file;

    if (schema == NULL) {
        report(check, "schema file", "correct gemini.schema_file", "%s", err.message);
        return;
    }
    report(check, "schema file", NULL, "%s", *name != '\0' ? name : "as compiled in");
    gemini = gemini_new(config, schema, &err);
    name = config->gemini.prompt_file;
    if (gemini == NULL)
        report(check, "prompt file", "correct gemini.prompt_file or gemini.ca_file", "%s",
               err.message);
    else
        report(check, "prompt file", NULL, "%s", *name != '\0' ? name : "as compiled in");
    gemini_free(gemini);
    invoice_schema_free(schema);
}

static void check_fallback(struct check *check)
{
    const char *path = check->ctl->config->fallback.key_file;
    struct err err = {0};
    char *key = NULL;

    if (*path == '\0') {
        report(check, "fallback key", NULL, "none: while the store is away, requests get a 503");
        return;
    }
    if (fallback_load(path, &key, &err) != ERR_NONE) {
        report(check, "fallback key", "correct fallback.key_file", "%s", err.message);
        return;
    }
    explicit_bzero(key, strlen(key));
    free(key);
    report(check, "fallback key", NULL, "%s", path);
}

/* Opens the store without changing it. NULL: it is reported why that failed. */
static struct store *check_store(struct check *check, struct config *unchanged)
{
    struct err err = {0};
    struct store *store;
    char remedy[400];

    *unchanged = *check->ctl->config;
    unchanged->store.auto_create = false;
    store = store_open(unchanged, &err);
    if (store != NULL && store_ping(store, &err) != ERR_NONE) {
        store_close(store);
        store = NULL;
    }
    if (store != NULL) {
        report(check, "store", NULL, "%s answers", store_place(unchanged));
        report(check, "store schema", NULL, "fits this version");
        return store;
    }
    store_remedy(unchanged, err.code, remedy, sizeof remedy);
    if (err.code == ERR_SCHEMA) {
        report(check, "store schema", remedy, "%s", err.message);
    } else {
        report(check, "store", remedy, "%s: %s", store_place(unchanged), err.message);
        check->status = EXIT_STORE;
    }
    return NULL;
}

static void check_gemini(struct check *check)
{
    struct err err = {0};
    char detail[512] = "";

    if (gemini_probe(check->ctl->config, detail, sizeof detail, &err) == ERR_NONE)
        report(check, "Gemini", NULL, "%s", detail);
    else
        report(check, "Gemini",
               "see gemini.base_url, gemini.proxy, gemini.ca_file and the firewall", "%s",
               err.message);
}

struct token_counts {
    char text[256]; /* "2 Active, 1 Disabled" */
    int64_t active;
    int64_t all;
};

/* A store_row: Status and how many. */
static bool count_tokens(void *context, size_t columns, const char *const *names,
                         const struct store_value *values)
{
    struct token_counts *counts = context;
    size_t len = strlen(counts->text);
    const char *status = columns == 2 && values[0].type == STORE_TEXT ? values[0].text : "?";

    (void)names;
    if (columns != 2)
        return false;
    snprintf(counts->text + len, sizeof counts->text - len, "%s%" PRId64 " %s", len > 0 ? ", " : "",
             values[1].integer, status);
    counts->all += values[1].integer;
    if (strcasecmp(status, "Active") == 0)
        counts->active += values[1].integer;
    return true;
}

static void check_tokens(struct check *check, struct store *store)
{
    const struct store_filter all = {0};
    struct token_counts counts = {.text = ""};
    struct err err = {0};
    const char *remedy = NULL;

    if (store_query(store, VIEW_TOKENS_BY_STATUS, &all, count_tokens, &counts, &err) != ERR_NONE) {
        report(check, "tokens", "see the log of the store", "%s", err.message);
        return;
    }
    if (given(check->ctl, FLAG_AFTER_INSTALL) && counts.active == 0)
        remedy = "add one: " NAME " token add --company ID";
    if (counts.all == 0)
        report(check, "tokens", remedy, "none");
    else
        report(check, "tokens", remedy, "%s; %" PRId64 " API key%s stored in clear", counts.text,
               counts.all, counts.all == 1 ? " is" : "s are");
}

/* A store_row: counts. */
static bool count_row(void *context, size_t columns, const char *const *names,
                      const struct store_value *values)
{
    (void)columns;
    (void)names;
    (void)values;
    ++*(int *)context;
    return true;
}

static void check_errors(struct check *check, struct store *store)
{
    const struct store_filter hour = {.since_ms = clock_wall_ms() - HOUR_MS, .limit = ROWS};
    struct err err = {0};
    int count = 0;

    if (store_query(store, VIEW_ERRORS, &hour, count_row, &count, &err) != ERR_NONE)
        report(check, "errors", "see the log of the store", "%s", err.message);
    else if (count > 0)
        report(check, "errors", "read them: " NAME " logs --errors --since 1h",
               "%d%s in the last hour", count, count == ROWS ? " or more" : "");
    else
        report(check, "errors", NULL, "none in the last hour");
}

/* Runs without a configuration that could be loaded, too: that is its first line. */
static int run_check(struct ctl *ctl)
{
    struct check check = {.ctl = ctl, .status = EXIT_OK};
    struct err err = {0};
    struct config unchanged;
    struct store *store;

    if (given(ctl, FLAG_JSON) && (check.table = table_new()) == NULL)
        return EXIT_NO;
    ctl->config = config_load(ctl->values[FLAG_CONFIG], &err);
    if (ctl->config == NULL) {
        report(&check, "configuration", "correct it", "%s", err.message);
        goto out;
    }
    if (!become_owner(ctl->config)) {
        check.status = EXIT_NO;
        goto out;
    }
    check_config(&check);
    check_directory(&check, "state_dir", ctl->config->server.state_dir);
    check_directory(&check, "runtime_dir", ctl->config->server.runtime_dir);
    check_texts(&check);
    check_fallback(&check);
    store = check_store(&check, &unchanged);
    if (store != NULL) {
        check_tokens(&check, store);
        if (given(ctl, FLAG_AFTER_INSTALL))
            check_errors(&check, store);
        store_close(store);
    }
    check_gemini(&check);
out:
    if ((check.table != NULL ? print_table(ctl, check.table) != EXIT_OK : ferror(stdout)) &&
        check.status == EXIT_OK)
        check.status = EXIT_NO;
    table_free(check.table);
    return check.status;
}

/* ---- the command line ---- */

/* clang-format off */
static const struct command commands[] = {
    {"token add", NULL, 0,
     ALLOW(FLAG_COMPANY) | ALLOW(FLAG_COMPANY_NAME) | ALLOW(FLAG_LIMIT) | ALLOW(FLAG_THRESHOLD) |
         ALLOW(FLAG_PROVIDER),
     ALLOW(FLAG_COMPANY), run_token_add, "add a token to a company; prints its TokenID",
     "The API key is read from standard input: typed without being shown, or one line of a file:\n"
     "    " NAME " token add --company NT047 < key.txt"},
    {"token list", NULL, 0, ALLOW(FLAG_COMPANY) | ALLOW(FLAG_ROWS), 0, run_token_list,
     "list tokens with what they have used", NULL},
    {"token set-status", "TOKENID STATUS", 2, ALLOW(FLAG_REASON), 0, run_token_set_status,
     "make a token Active, Expired, Exceeded or Disabled",
     "Active also ends a cooldown."},
    {"token set-key", "TOKENID", 1, 0, 0, run_token_set_key, "replace a token's API key",
     "The API key is read from standard input."},
    {"token set-limit", "TOKENID N|none", 2, ALLOW(FLAG_THRESHOLD), 0, run_token_set_limit,
     "change how much a token may use in all",
     "A token that is Exceeded and has room again becomes Active."},
    {"usage", NULL, 0, ALLOW(FLAG_COMPANY) | ALLOW(FLAG_BY) | PERIOD, 0, run_usage,
     "show what was used", NULL},
    {"logs", NULL, 0, ALLOW(FLAG_ERRORS) | ALLOW(FLAG_REQUEST) | PERIOD, 0, run_logs,
     "show log entries, the newest first", NULL},
    {"retries", NULL, 0, ALLOW(FLAG_COMPANY) | ALLOW(FLAG_REQUEST) | PERIOD, 0, run_retries,
     "show failed attempts, the newest first", NULL},
    {"reservations", NULL, 0,
     ALLOW(FLAG_UNSETTLED) | ALLOW(FLAG_COMPANY) | ALLOW(FLAG_REQUEST) | PERIOD, 0,
     run_reservations, "show reservations that are open or unsettled", NULL},
    {"outbox status", NULL, 0, 0, 0, run_outbox_status,
     "show what waits in this host's outbox for the store", NULL},
    {"outbox drain", NULL, 0, 0, 0, run_outbox_drain,
     "replay what waits, now", "Exit status 1 when something still waits."},
    {"check", NULL, 0, ALLOW(FLAG_AFTER_INSTALL), 0, run_check,
     "check configuration, directories, store and Gemini",
     "Changes nothing. Exit status 1 when a line says FAIL, 3 when the store does not answer."},
    {"migrate", NULL, 0, 0, 0, run_migrate, "create or upgrade the schema", NULL},
};
/* clang-format on */

#define COMMAND_COUNT (sizeof commands / sizeof commands[0])

static void print_flag(enum flag flag)
{
    char left[64];

    snprintf(left, sizeof left, "--%s%s%s", flags[flag].name,
             flags[flag].argument != NULL ? " " : "",
             flags[flag].argument != NULL ? flags[flag].argument : "");
    printf("  %-21s  %s\n", left, flags[flag].help);
}

static void print_command_help(const struct command *command)
{
    printf("usage: " NAME " %s", command->words);
    if (command->arguments != NULL)
        printf(" %s", command->arguments);
    for (enum flag flag = 0; flag < FLAG_COUNT; flag++) {
        bool needed = (command->needed & ALLOW(flag)) != 0;
        if ((command->allowed & ALLOW(flag)) != 0)
            printf(" %s--%s%s%s%s", needed ? "" : "[", flags[flag].name,
                   flags[flag].argument != NULL ? " " : "",
                   flags[flag].argument != NULL ? flags[flag].argument : "", needed ? "" : "]");
    }
    printf(" [--config FILE] [--json]\n\n%c%s.\n", command->help[0] - 'a' + 'A', command->help + 1);
    if (command->more != NULL)
        printf("%s\n", command->more);
    putchar('\n');
    for (enum flag flag = 0; flag < FLAG_COUNT; flag++)
        if ((command->allowed & ALLOW(flag)) != 0)
            print_flag(flag);
    print_flag(FLAG_CONFIG);
    print_flag(FLAG_JSON);
}

/* The commands that begin with words; all of them for "". */
static void print_help(const char *words)
{
    size_t len = strlen(words);

    puts("usage: " NAME " COMMAND [OPTIONS]\n");
    for (size_t i = 0; i < COMMAND_COUNT; i++) {
        char left[64];
        snprintf(left, sizeof left, "%s%s%s", commands[i].words,
                 commands[i].arguments != NULL ? " " : "",
                 commands[i].arguments != NULL ? commands[i].arguments : "");
        if (strncmp(commands[i].words, words, len) == 0)
            printf("  %-31s  %s\n", left, commands[i].help);
    }
    putchar('\n');
    print_flag(FLAG_CONFIG);
    print_flag(FLAG_JSON);
    print_flag(FLAG_HELP);
    print_flag(FLAG_VERSION);
    puts("\n`" NAME
         " COMMAND --help` says more. Exit status: 0; 1 the answer is no; 2 wrong usage or\n"
         "configuration; 3 the store fails.");
}

/* The command whose words the arguments begin with; *words: how many those are. */
static const struct command *find_command(int count, char **arguments, int *words)
{
    for (size_t i = 0; i < COMMAND_COUNT; i++) {
        const char *space = strchr(commands[i].words, ' ');
        size_t first =
            space != NULL ? (size_t)(space - commands[i].words) : strlen(commands[i].words);

        *words = space != NULL ? 2 : 1;
        if (count >= *words && strlen(arguments[0]) == first &&
            strncmp(arguments[0], commands[i].words, first) == 0 &&
            (space == NULL || strcmp(arguments[1], space + 1) == 0))
            return &commands[i];
    }
    return NULL;
}

/* Is the word the first one of a command of two? */
static bool is_group(const char *word)
{
    size_t len = strlen(word);

    for (size_t i = 0; i < COMMAND_COUNT; i++)
        if (strncmp(commands[i].words, word, len) == 0 && commands[i].words[len] == ' ')
            return true;
    return false;
}

/* Collects options into ctl; leaves optind at the first argument that is none. */
static int read_options(struct ctl *ctl, int argc, char **argv)
{
    struct option options[FLAG_COUNT + 1] = {0};
    int flag;

    for (int i = 0; i < FLAG_COUNT; i++)
        options[i] = (struct option){
            .name = flags[i].name,
            .has_arg = flags[i].argument != NULL ? required_argument : no_argument,
            .val = i,
        };
    while ((flag = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (flag == '?') { /* getopt_long has said why */
            fputs("Try `" NAME " --help`.\n", stderr);
            return EXIT_USAGE;
        }
        if (ctl->values[flag] != NULL)
            return usage_error(ctl, "--%s is given twice", flags[flag].name);
        ctl->values[flag] = optarg != NULL ? optarg : "";
    }
    return EXIT_OK;
}

/* Do options and arguments fit the command? */
static int check_usage(const struct ctl *ctl, int argument_count)
{
    const struct command *command = ctl->command;

    for (enum flag flag = 0; flag < FLAG_COUNT; flag++) {
        if (given(ctl, flag) && ((command->allowed | ALWAYS) & ALLOW(flag)) == 0)
            return usage_error(ctl, "`%s` has no option --%s", command->words, flags[flag].name);
        if (!given(ctl, flag) && (command->needed & ALLOW(flag)) != 0)
            return usage_error(ctl, "`%s` needs --%s %s", command->words, flags[flag].name,
                               flags[flag].argument);
    }
    if (argument_count != command->argument_count)
        return usage_error(ctl, "`%s` takes %s", command->words,
                           command->arguments != NULL ? command->arguments : "no arguments");
    return EXIT_OK;
}

/* --version, --help, and the refusal of what is no command. */
static int run_without_command(const struct ctl *ctl, int count, char **arguments)
{
    if (given(ctl, FLAG_HELP) && (count == 0 || (count == 1 && is_group(arguments[0])))) {
        print_help(count == 0 ? "" : arguments[0]);
        return EXIT_OK;
    }
    if (count == 0)
        return usage_error(ctl, "a command is missing");
    if (count == 1 && is_group(arguments[0]))
        return usage_error(ctl, "`%s` needs a second word", arguments[0]);
    return usage_error(ctl, "there is no command `%s%s%s`", arguments[0],
                       is_group(arguments[0]) ? " " : "",
                       is_group(arguments[0]) ? arguments[1] : "");
}

int main(int argc, char **argv)
{
    struct ctl ctl = {.token_limit = -1};
    int words = 0;
    int status;

    log_set_level(LOG_WARNING);
    status = read_options(&ctl, argc, argv);
    if (status != EXIT_OK)
        return status;
    if (given(&ctl, FLAG_VERSION)) {
        puts(NAME " " EXTRACT_VERSION);
        return EXIT_OK;
    }
    ctl.command = find_command(argc - optind, argv + optind, &words);
    if (ctl.command == NULL)
        return run_without_command(&ctl, argc - optind, argv + optind);
    if (given(&ctl, FLAG_HELP)) {
        print_command_help(ctl.command);
        return EXIT_OK;
    }
    ctl.arguments = argv + optind + words;
    status = check_usage(&ctl, argc - optind - words);
    if (status == EXIT_OK)
        status = read_values(&ctl);
    if (status == EXIT_OK)
        status = ctl.command->run(&ctl);
    store_close(ctl.store);
    config_free(ctl.config);
    return status;
}
