/* ctl_check.c - extractctl check: would the service work here? See ctl.h.
 *
 * One line a question, each asked of the very code that the service would run; nothing is changed.
 * To add a question: a function that calls report(), and its call in ctl_check. */
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

#include "clock.h"
#include "ctl.h"
#include "fallback.h"
#include "gemini.h"
#include "invoice.h"

#define ERRORS_MAX 1000 /* counted */
#define DETAIL_AT 21    /* the column in which a line's detail begins */

struct check {
    struct ctl *ctl;
    struct table *table; /* NULL: each line is printed when it is known */
    int status;
};

/* "ok    state_dir      /var/lib/extract-fcgi is writable; next: …" */
static void print_line(const struct check *check, const char *result, const char *what,
                       const char *detail, const char *remedy)
{
    const struct table_style style = ctl_style(check->ctl);
    enum paint paint = style.paint != NULL && strcmp(result, "ok") != 0 ? PAINT_ALARM : PAINT_NONE;
    char line[1536];

    snprintf(line, sizeof line, "%s%s%s", detail, remedy != NULL ? "; next: " : "",
             remedy != NULL ? remedy : "");
    printf("%s%-4s%s  %-13s  ", terminal_paint(paint), result, terminal_unpaint(paint), what);
    terminal_write(stdout, line, PAINT_NONE, DETAIL_AT, style.columns);
    putchar('\n');
    fflush(stdout);
}

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
        const struct store_value values[] = {ctl_text(what), ctl_text(result), ctl_text(detail),
                                             remedy != NULL ? ctl_text(remedy) : ctl_null()};
        if (!table_row(check->table, 4, names, values))
            check->status = EXIT_NO;
        return;
    }
    print_line(check, result, what, detail, has_remedy ? remedy : NULL);
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
               why, ctl_user_name());
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
        report(check, what, remedy, "%s: %s for user %s", path, why, ctl_user_name());
    else
        report(check, what, NULL, "%s is writable for user %s", path, ctl_user_name());
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

/* False: there is no store to ask more. */
static bool check_store(struct check *check)
{
    struct ctl *ctl = check->ctl;
    struct err err = {0};
    char remedy[600], what[1000];
    bool answers;

    ctl->config->store.auto_create = false; /* looking changes nothing */
    ctl_work_begin(ctl, WORK_READS, "checking the store (%s)", ctl_store_place(ctl->config));
    ctl->store = store_open(ctl->config, &err);
    answers = ctl->store != NULL && store_ping(ctl->store, &err) == ERR_NONE;
    ctl_work_end(ctl);
    if (answers) {
        report(check, "store", NULL, "%s answers", ctl_store_place(ctl->config));
        report(check, "store schema", NULL, "fits this version");
        return true;
    }
    ctl_store_remedy(ctl->config, err.code, remedy, sizeof remedy);
    if (err.code == ERR_SCHEMA) {
        report(check, "store schema", remedy, "%s", err.message);
    } else {
        ctl_store_describe(ctl->config, &err, what, sizeof what);
        report(check, "store", remedy, "%s", what);
        check->status = EXIT_STORE;
    }
    return false;
}

static void check_gemini(struct check *check)
{
    struct err err = {0};
    char detail[512] = "";
    enum err_code code;

    ctl_work_begin(check->ctl, WORK_READS, "checking Gemini (%s)",
                   check->ctl->config->gemini.base_url);
    code = gemini_probe(check->ctl->config, detail, sizeof detail, &err);
    ctl_work_end(check->ctl);
    if (code == ERR_NONE)
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
    const char *status = columns >= 2 && values[0].type == STORE_TEXT ? values[0].text : "?";

    (void)names;
    if (columns < 2)
        return false;
    snprintf(counts->text + len, sizeof counts->text - len, "%s%" PRId64 " %s", len > 0 ? ", " : "",
             values[1].integer, status);
    counts->all += values[1].integer;
    if (strcasecmp(status, "Active") == 0)
        counts->active += values[1].integer;
    return true;
}

static void check_tokens(struct check *check)
{
    const struct store_filter all = {0};
    struct token_counts counts = {.text = ""};
    struct err err = {0};
    const char *remedy = NULL;

    if (store_query(check->ctl->store, VIEW_TOKENS_BY_STATUS, &all, count_tokens, &counts, &err) !=
        ERR_NONE) {
        report(check, "tokens", "see the log of the store", "%s", err.message);
        return;
    }
    if (ctl_given(check->ctl, FLAG_AFTER_INSTALL) && counts.active == 0)
        remedy = "add one: " CTL_NAME " token add --company ID";
    if (counts.all == 0)
        report(check, "tokens", remedy, "none");
    else
        report(check, "tokens", remedy, "%s", counts.text);
}

struct key_faults {
    struct ctl *ctl;
    int plain, sealed, unreadable;
    char tokens[200]; /* the plain ones: "3, 7, …" */
    char first[sizeof((struct err *)0)->message];
};

/* A store_key_row. */
static void count_key(void *context, int64_t token_id, const char *fault)
{
    struct key_faults *faults = context;
    size_t len = strlen(faults->tokens);

    ctl_work_count(faults->ctl, faults->plain + faults->sealed + faults->unreadable + 1, 0);
    if (fault == NULL) {
        faults->sealed++;
    } else if (*fault != '\0') {
        if (faults->unreadable++ == 0)
            snprintf(faults->first, sizeof faults->first, "%s", fault);
    } else {
        faults->plain++;
        if (len + 32 < sizeof faults->tokens)
            snprintf(faults->tokens + len, sizeof faults->tokens - len, "%s%" PRId64,
                     len > 0 ? ", " : "", token_id);
        else if (len + 8 < sizeof faults->tokens && faults->tokens[len - 1] != '.')
            snprintf(faults->tokens + len, sizeof faults->tokens - len, ", ...");
    }
}

static void check_keys(struct check *check)
{
    struct key_faults faults = {.ctl = check->ctl};
    struct err err = {0};
    enum err_code code;
    bool can_seal = check->ctl->config->seal.key_file[0] != '\0';

    ctl_work_begin(check->ctl, WORK_READS, "checking API keys");
    code = store_check_keys(check->ctl->store, count_key, &faults, &err);
    ctl_work_end(check->ctl);
    if (code != ERR_NONE)
        report(check, "API keys", "see the log of the store", "%s", err.message);
    else if (faults.unreadable > 0)
        report(check, "API keys",
               "put the key that sealed them into seal.key_file, or give the "
               "tokens new API keys: " CTL_NAME " token set-key",
               "%d cannot be used: %s", faults.unreadable, faults.first);
    else if (faults.plain > 0)
        report(check, "API keys", can_seal ? "seal them: " CTL_NAME " seal" : NULL,
               "%d sealed, %d in clear: token %s", faults.sealed, faults.plain, faults.tokens);
    else
        report(check, "API keys", NULL, "%d sealed, none in clear", faults.sealed);
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

static void check_errors(struct check *check)
{
    const struct store_filter hour = {.since_ms = clock_wall_ms() - CTL_HOUR_MS,
                                      .limit = ERRORS_MAX};
    struct err err = {0};
    int count = 0;

    if (store_query(check->ctl->store, VIEW_ERRORS, &hour, count_row, &count, &err) != ERR_NONE)
        report(check, "errors", "see the log of the store", "%s", err.message);
    else if (count > 0)
        report(check, "errors", "read them: " CTL_NAME " logs --errors --since 1h",
               "%d%s in the last hour", count, count == ERRORS_MAX ? " or more" : "");
    else
        report(check, "errors", NULL, "none in the last hour");
}

/* Runs without a configuration that could be loaded, too: that is its first line. */
int ctl_check(struct ctl *ctl)
{
    struct check check = {.ctl = ctl, .status = EXIT_OK};
    struct err err = {0};

    if (ctl_given(ctl, FLAG_JSON) && (check.table = table_new()) == NULL)
        return EXIT_NO;
    ctl->config = config_load(ctl->values[FLAG_CONFIG], &err);
    if (ctl->config == NULL) {
        report(&check, "configuration", "correct it", "%s", err.message);
    } else if (!ctl_become_owner(ctl)) {
        check.status = EXIT_NO;
    } else {
        check_config(&check);
        check_directory(&check, "state_dir", ctl->config->server.state_dir);
        check_directory(&check, "runtime_dir", ctl->config->server.runtime_dir);
        check_texts(&check);
        check_fallback(&check);
        if (check_store(&check)) {
            check_tokens(&check);
            check_keys(&check);
            if (ctl_given(ctl, FLAG_AFTER_INSTALL))
                check_errors(&check);
        }
        check_gemini(&check);
    }
    if ((check.table != NULL ? ctl_show_table(ctl, check.table, NULL) != EXIT_OK
                             : ferror(stdout)) &&
        check.status == EXIT_OK)
        check.status = EXIT_NO;
    table_free(check.table);
    return check.status;
}
