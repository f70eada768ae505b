/* extractctl.c - what a sysadmin or a DBA does by hand: tokens, usage, logs, checks.
 *
 * Two tables say all there is on the command line: flags (each option) and commands (words, options
 * allowed and needed, function, help); parsing, refusals and --help follow from them. What the
 * commands do is in ctl_*.c; see ctl.h.
 *
 * Exit status: 0; 1, the answer is no; 2, wrong usage or configuration; 3, the store fails. Interrupted, it
 * ends by that signal once it has said what was done. */
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "buf.h"
#include "ctl.h"
#include "log.h"
#include "text.h"

#define ALLOW(flag) (1u << (flag))
#define ALWAYS                                                                      \
    (ALLOW(FLAG_CONFIG) | ALLOW(FLAG_JSON) | ALLOW(FLAG_COLOR) | ALLOW(FLAG_HELP) | \
     ALLOW(FLAG_VERSION))
#define TEXT_COLUMNS 100 /* where a text goes to no terminal */
#define FIRST_FLAG 256   /* what getopt_long calls the first one: no character */
#define PERIOD (ALLOW(FLAG_SINCE) | ALLOW(FLAG_UNTIL) | ALLOW(FLAG_ROWS))

/* clang-format off */
static const struct {
    const char *name;
    const char *argument; /* NULL: none; with a "[": optional, after a "=" */
    const char *help;
} flags[FLAG_COUNT] = {
    [FLAG_CONFIG] =        {"config", "FILE", "configuration, instead of EXTRACT_CONFIG or " CONFIG_DEFAULT_FILE},
    [FLAG_JSON] =          {"json", NULL, "an array of objects instead of a table"},
    [FLAG_COLOR] =         {"color", "[=WHEN]", "colours: auto (default: on a terminal, unless NO_COLOR is set), always, never"},
    [FLAG_HELP] =          {"help", NULL, "this text"},
    [FLAG_VERSION] =       {"version", NULL, "print the version"},
    [FLAG_COMPANY] =       {"company", "ID", "the company"},
    [FLAG_COMPANY_NAME] =  {"company-name", "NAME", "its name, for people"},
    [FLAG_LIMIT] =         {"limit", "N", "Gemini tokens that it may use in all; none: no limit (default)"},
    [FLAG_THRESHOLD] =     {"threshold", "T", "share of the limit at which a warning is logged (default 0.8)"},
    [FLAG_PROVIDER] =      {"provider", "NAME", "default Gemini"},
    [FLAG_REASON] =        {"reason", "TEXT", "kept with the status"},
    [FLAG_BY] =            {"by", "WHAT", "sum by day (default), company, branch, user or token"},
    [FLAG_ERRORS] =        {"errors", NULL, "ERROR and CRITICAL only"},
    [FLAG_REQUEST] =       {"request", "ID", "one request only"},
    [FLAG_SINCE] =         {"since", "TIME", "not older: 2026-01-31, 2026-01-31T12:00:00Z (both UTC), 24h or 7d ago"},
    [FLAG_UNTIL] =         {"until", "TIME", "older than this"},
    [FLAG_ROWS] =          {"rows", "N", "at most N rows (default 1000)"},
    [FLAG_UNSETTLED] =     {"unsettled", NULL, "only those whose outcome is unknown"},
    [FLAG_ADMIN] =         {"admin", NULL, "an administrator's key, for no company"},
    [FLAG_LABEL] =         {"label", "TEXT", "what the key is for, for people"},
    [FLAG_AFTER_INSTALL] = {"after-install", NULL, "also: an Active token, no errors in the last hour"},
};
/* clang-format on */

struct ctl_command {
    const char *words;     /* "token add" */
    const char *arguments; /* "TOKENID STATUS"; NULL: none */
    unsigned allowed;      /* options, beside those that are always allowed */
    unsigned needed;       /* among those allowed */
    int (*run)(struct ctl *ctl);
    const char *help;
    const char *more; /* after the options; NULL: nothing */
};

static const struct ctl_command commands[] = {
    {.words = "token add",
     .allowed = ALLOW(FLAG_COMPANY) | ALLOW(FLAG_COMPANY_NAME) | ALLOW(FLAG_LIMIT) |
                ALLOW(FLAG_THRESHOLD) | ALLOW(FLAG_PROVIDER),
     .needed = ALLOW(FLAG_COMPANY),
     .run = ctl_token_add,
     .help = "add a token to a company; prints its TokenID",
     .more = "The API key is read from standard input: typed without being shown, or one line of a "
             "file:\n    " CTL_NAME " token add --company NT047 < key.txt"},
    {.words = "token list",
     .allowed = ALLOW(FLAG_COMPANY) | ALLOW(FLAG_ROWS),
     .run = ctl_token_list,
     .help = "list tokens with what they have used"},
    {.words = "token set-status",
     .arguments = "TOKENID STATUS",
     .allowed = ALLOW(FLAG_REASON),
     .run = ctl_token_set_status,
     .help = "make a token Active, Expired, Exceeded or Disabled",
     .more = "Active also ends a cooldown."},
    {.words = "token set-key",
     .arguments = "TOKENID",
     .run = ctl_token_set_key,
     .help = "replace a token's API key",
     .more = "The API key is read from standard input."},
    {.words = "token set-limit",
     .arguments = "TOKENID N|none",
     .allowed = ALLOW(FLAG_THRESHOLD),
     .run = ctl_token_set_limit,
     .help = "change how much a token may use in all",
     .more = "A token that is Exceeded and has room again becomes Active."},
    {.words = "client-key add",
     .allowed = ALLOW(FLAG_COMPANY) | ALLOW(FLAG_ADMIN) | ALLOW(FLAG_LABEL),
     .run = ctl_client_key_add,
     .help = "make a key that opens the service to a company's front end; prints it, once",
     .more = "Front ends send it as `Authorization: Bearer KEY`. Only its hash is kept."},
    {.words = "client-key list",
     .allowed = ALLOW(FLAG_COMPANY) | ALLOW(FLAG_ROWS),
     .run = ctl_client_key_list,
     .help = "list client keys, without the keys themselves"},
    {.words = "client-key revoke",
     .arguments = "ID",
     .run = ctl_client_key_revoke,
     .help = "end a client key; it is refused within 10 seconds"},
    {.words = "usage",
     .allowed = ALLOW(FLAG_COMPANY) | ALLOW(FLAG_BY) | PERIOD,
     .run = ctl_usage,
     .help = "show what was used"},
    {.words = "logs",
     .allowed = ALLOW(FLAG_ERRORS) | ALLOW(FLAG_REQUEST) | PERIOD,
     .run = ctl_logs,
     .help = "show log entries, the newest first"},
    {.words = "retries",
     .allowed = ALLOW(FLAG_COMPANY) | ALLOW(FLAG_REQUEST) | PERIOD,
     .run = ctl_retries,
     .help = "show failed attempts, the newest first"},
    {.words = "reservations",
     .allowed = ALLOW(FLAG_UNSETTLED) | ALLOW(FLAG_COMPANY) | ALLOW(FLAG_REQUEST) | PERIOD,
     .run = ctl_reservations,
     .help = "show reservations that are open or unsettled"},
    {.words = "outbox status",
     .run = ctl_outbox_status,
     .help = "show what waits in this host's outbox for the store"},
    {.words = "outbox drain",
     .run = ctl_outbox_drain,
     .help = "replay what waits, now",
     .more = "Exit status 1 when something still waits."},
    {.words = "check",
     .allowed = ALLOW(FLAG_AFTER_INSTALL),
     .run = ctl_check,
     .help = "check configuration, directories, store and Gemini",
     .more = "Changes nothing. Exit status 1 when a line says FAIL, 3 when the store does not "
             "answer."},
    {.words = "seal",
     .run = ctl_seal,
     .help = "seal the API keys of all tokens by the first key of seal.key_file",
     .more =
         "Those that are plain and those that another key of the file has sealed. Exit status 1 "
         "when some are sealed by a key that the file does not hold."},
    {.words = "migrate", .run = ctl_migrate, .help = "create or upgrade the schema"},
};

#define COMMAND_COUNT (sizeof commands / sizeof commands[0])

/* ---- what the commands use ---- */

int ctl_usage_error(const struct ctl *ctl, const char *format, ...)
{
    va_list args;

    char text[512];

    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    ctl_error(ctl, "%s", text);
    fprintf(stderr, "Try `" CTL_NAME "%s%s --help`.\n", ctl->command != NULL ? " " : "",
            ctl->command != NULL ? ctl->command->words : "");
    return EXIT_USAGE;
}

bool ctl_parse_integer(const char *text, int64_t min, int64_t max, int64_t *number)
{
    char *end;

    if (*text < '0' || *text > '9')
        return false;
    errno = 0;
    *number = strtoll(text, &end, 10);
    return errno == 0 && *end == '\0' && *number >= min && *number <= max;
}

/* ---- help ---- */

/* "--company ID" */
static const char *spell(enum ctl_flag flag, char out[64])
{
    const char *argument = flags[flag].argument != NULL ? flags[flag].argument : "";

    snprintf(out, 64, "--%s%s%s", flags[flag].name,
             *argument != '\0' && *argument != '[' ? " " : "", argument);
    return out;
}

/* What stands to the right of a text of width columns, broken into lines for a terminal. */
static void print_right(const char *left, size_t width, const char *right)
{
    printf("  %-*s  ", (int)width, left);
    terminal_write(stdout, right, PAINT_NONE, 2 + width + 2, terminal_columns(STDOUT_FILENO));
    putchar('\n');
}

static void print_flag(enum ctl_flag flag)
{
    char left[64];

    print_right(spell(flag, left), 21, flags[flag].help);
}

/* A part of the line of usage, which goes on in the next line where the terminal ends. */
static void print_part(size_t *at, bool needed, const char *part)
{
    static const char begin[] = "usage: " CTL_NAME;
    size_t columns = terminal_columns(STDOUT_FILENO);
    char text[80];

    snprintf(text, sizeof text, "%s%s%s", needed ? "" : "[", part, needed ? "" : "]");
    if (*at == 0)
        *at = (size_t)printf("%s", begin);
    if (columns > 0 && *at + 1 + strlen(text) > columns)
        *at = (size_t)printf("\n%*s", (int)strlen(begin), "") - 1;
    *at += (size_t)printf(" %s", text);
}

/* Line by line, each broken for a terminal. */
static void print_text(const char *text)
{
    while (*text != '\0') {
        size_t len = strcspn(text, "\n");
        size_t columns = terminal_columns(STDOUT_FILENO);
        char line[400];

        snprintf(line, sizeof line, "%.*s", (int)len, text);
        terminal_write(stdout, line, PAINT_NONE, 0, columns > 0 ? columns : TEXT_COLUMNS);
        putchar('\n');
        text += len + (text[len] == '\n');
    }
}

static void print_command_help(const struct ctl_command *command)
{
    char name[64], summary[160];
    size_t at = 0;

    print_part(&at, true, command->words);
    if (command->arguments != NULL)
        print_part(&at, true, command->arguments);
    for (enum ctl_flag flag = 0; flag < FLAG_COUNT; flag++)
        if ((command->allowed & ALLOW(flag)) != 0)
            print_part(&at, (command->needed & ALLOW(flag)) != 0, spell(flag, name));
    print_part(&at, false, "--config FILE");
    print_part(&at, false, "--json");
    print_part(&at, false, "--color[=WHEN]");
    snprintf(summary, sizeof summary, "%c%s.", command->help[0] - 'a' + 'A', command->help + 1);
    printf("\n\n");
    print_text(summary);
    if (command->more != NULL)
        print_text(command->more);
    putchar('\n');
    for (enum ctl_flag flag = 0; flag < FLAG_COUNT; flag++)
        if ((command->allowed & ALLOW(flag)) != 0)
            print_flag(flag);
    print_flag(FLAG_CONFIG);
    print_flag(FLAG_JSON);
    print_flag(FLAG_COLOR);
}

/* The commands that begin with words; all of them for "". */
static void print_help(const char *words)
{
    size_t len = strlen(words);

    puts("usage: " CTL_NAME " COMMAND [OPTIONS]\n");
    for (size_t i = 0; i < COMMAND_COUNT; i++) {
        char left[64];
        snprintf(left, sizeof left, "%s%s%s", commands[i].words,
                 commands[i].arguments != NULL ? " " : "",
                 commands[i].arguments != NULL ? commands[i].arguments : "");
        if (strncmp(commands[i].words, words, len) == 0)
            print_right(left, 31, commands[i].help);
    }
    putchar('\n');
    print_flag(FLAG_CONFIG);
    print_flag(FLAG_JSON);
    print_flag(FLAG_COLOR);
    print_flag(FLAG_HELP);
    print_flag(FLAG_VERSION);
    putchar('\n');
    print_text("`" CTL_NAME
               " COMMAND --help` says more. Exit status: 0; 1 the answer is no; 2 wrong "
               "usage or configuration; 3 the store fails.");
}

/* ---- the command line ---- */

/* Those of a text like "token add"; NULL: 0. */
static int count_words(const char *text)
{
    int count = text != NULL;

    for (; text != NULL && (text = strchr(text, ' ')) != NULL; text++)
        count++;
    return count;
}

/* The command whose words the arguments begin with; *words: how many those are. */
static const struct ctl_command *find_command(int count, char **arguments, int *words)
{
    char two[64] = "";

    if (count >= 2)
        snprintf(two, sizeof two, "%s %s", arguments[0], arguments[1]);
    for (size_t i = 0; i < COMMAND_COUNT; i++) {
        *words = count_words(commands[i].words);
        if (count >= *words && strcmp(commands[i].words, *words == 2 ? two : arguments[0]) == 0)
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

/* What getopt_long, told to be silent, has found wrong in the argument before optind. */
static int refuse_option(const struct ctl *ctl, int problem, char **argv)
{
    const char *given = argv[optind - 1];
    int len = (int)strcspn(given, "=");
    int candidates = 0;
    int flag = optopt - FIRST_FLAG;

    if (problem == ':' && flag >= 0 && flag < FLAG_COUNT)
        return ctl_usage_error(ctl, "--%s needs its %s", flags[flag].name, flags[flag].argument);
    if (flag >= 0 && flag < FLAG_COUNT)
        return ctl_usage_error(ctl, "--%s takes no value", flags[flag].name);
    for (int i = 0; i < FLAG_COUNT && len > 2; i++)
        candidates += strncmp(flags[i].name, given + 2, (size_t)len - 2) == 0;
    return ctl_usage_error(
        ctl, candidates > 1 ? "%.*s: more than one option begins so" : "there is no option %.*s",
        len, given);
}

static int read_color(struct ctl *ctl)
{
    static const char *const names[] = {
        [COLOR_AUTO] = "auto", [COLOR_ALWAYS] = "always", [COLOR_NEVER] = "never"};
    const char *when = ctl->values[FLAG_COLOR];

    if (when == NULL)
        return EXIT_OK;
    if (*when == '\0')
        when = "always"; /* --color alone, as ls and git have it */
    for (enum terminal_color color = COLOR_AUTO; color <= COLOR_NEVER; color++)
        if (strcmp(when, names[color]) == 0) {
            ctl->color = color;
            return EXIT_OK;
        }
    return ctl_usage_error(ctl, "--color must be auto, always or never");
}

/* Collects options into ctl; leaves optind at the first argument that is none. */
static int read_options(struct ctl *ctl, int argc, char **argv)
{
    struct option options[FLAG_COUNT + 1] = {0};
    int found;

    for (int i = 0; i < FLAG_COUNT; i++)
        options[i] = (struct option){
            .name = flags[i].name,
            .has_arg = flags[i].argument == NULL   ? no_argument
                       : *flags[i].argument == '[' ? optional_argument
                                                   : required_argument,
            .val = FIRST_FLAG + i,
        };
    opterr = 0;
    while ((found = getopt_long(argc, argv, ":", options, NULL)) != -1) {
        int flag = found - FIRST_FLAG;
        if (flag < 0)
            return refuse_option(ctl, found, argv);
        if (ctl->values[flag] != NULL && flag != FLAG_COLOR) /* an alias may hold that one */
            return ctl_usage_error(ctl, "--%s is given twice", flags[flag].name);
        ctl->values[flag] = optarg != NULL ? optarg : "";
    }
    return read_color(ctl);
}

/* Do options and arguments fit the command? */
static int check_usage(const struct ctl *ctl, int argument_count)
{
    const struct ctl_command *command = ctl->command;
    const char *fault = NULL;

    for (enum ctl_flag flag = 0; flag < FLAG_COUNT; flag++) {
        if (ctl_given(ctl, flag) && ((command->allowed | ALWAYS) & ALLOW(flag)) == 0)
            return ctl_usage_error(ctl, "`%s` has no option --%s", command->words,
                                   flags[flag].name);
        if (!ctl_given(ctl, flag) && (command->needed & ALLOW(flag)) != 0)
            return ctl_usage_error(ctl, "`%s` needs --%s %s", command->words, flags[flag].name,
                                   flags[flag].argument);
        if (ctl_given(ctl, flag) && flags[flag].argument != NULL && flag != FLAG_CONFIG &&
            flag != FLAG_COLOR)
            fault = text_fault(ctl->values[flag], strlen(ctl->values[flag]), 1, 256);
        if (fault != NULL)
            return ctl_usage_error(ctl, "--%s %s", flags[flag].name, fault);
    }
    if (argument_count != count_words(command->arguments))
        return ctl_usage_error(ctl, "`%s` takes %s", command->words,
                               command->arguments != NULL ? command->arguments : "no arguments");
    return EXIT_OK;
}

/* The second words of a group: "add, list". */
static const char *second_words(const char *group, char out[128])
{
    size_t group_len = strlen(group), len = 0;

    out[0] = '\0';
    for (size_t i = 0; i < COMMAND_COUNT && len < 128; i++)
        if (strncmp(commands[i].words, group, group_len) == 0 &&
            commands[i].words[group_len] == ' ')
            len += (size_t)snprintf(out + len, 128 - len, "%s%s", len > 0 ? ", " : "",
                                    commands[i].words + group_len + 1);
    return out;
}

/* --help, and the refusal of what is no command. */
static int run_without_command(const struct ctl *ctl, int count, char **arguments)
{
    char words[128];

    if (ctl_given(ctl, FLAG_HELP) && (count == 0 || (count == 1 && is_group(arguments[0])))) {
        print_help(count == 0 ? "" : arguments[0]);
        return EXIT_OK;
    }
    if (count == 0)
        return ctl_usage_error(ctl, "a command is missing");
    if (count == 1 && is_group(arguments[0]))
        return ctl_usage_error(ctl, "`%s` needs a second word: %s", arguments[0],
                               second_words(arguments[0], words));
    if (is_group(arguments[0]))
        return ctl_usage_error(ctl, "there is no command `%s %s`; there are: %s", arguments[0],
                               arguments[1], second_words(arguments[0], words));
    return ctl_usage_error(ctl, "there is no command `%s`", arguments[0]);
}

int main(int argc, char **argv)
{
    struct ctl ctl = {0};
    int words = 0;
    int status;

    log_set_level(LOG_WARNING);
    unsetenv("SSLKEYLOGFILE"); /* TLS secrets go nowhere */
    status = read_options(&ctl, argc, argv);
    if (status != EXIT_OK)
        return status;
    if (ctl_given(&ctl, FLAG_VERSION)) {
        puts(CTL_NAME " " EXTRACT_VERSION);
        return EXIT_OK;
    }
    ctl.command = find_command(argc - optind, argv + optind, &words);
    if (ctl.command == NULL)
        return run_without_command(&ctl, argc - optind, argv + optind);
    if (ctl_given(&ctl, FLAG_HELP)) {
        print_command_help(ctl.command);
        return EXIT_OK;
    }
    ctl.arguments = argv + optind + words;
    status = check_usage(&ctl, argc - optind - words);
    if (status == EXIT_OK)
        status = ctl.command->run(&ctl);
    store_close(ctl.store);
    config_free(ctl.config);
    if (ctl.signal != 0) { /* so that a shell's loop ends, too */
        signal(ctl.signal, SIG_DFL);
        raise(ctl.signal);
    }
    return status;
}
