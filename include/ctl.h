/* ctl.h - extractctl's inside.
 *
 *   extractctl.c   the command line: options, commands, --help
 *   ctl_token.c    token add, list, set-status, set-key, set-limit; seal
 *   ctl_client.c   client-key add, list, revoke
 *   ctl_show.c     usage, logs, retries, reservations, outbox; how rows are printed
 *   ctl_check.c    check
 *   ctl_store.c    migrate; configuration and store as all commands open them, and their failures
 *   ctl_say.c      what is said on standard error; which cells of a table are coloured
 *   ctl_work.c     what may take long: the line that says so, and interruption
 *
 * To add a command: a row in extractctl.c's table, its function here and in a file above. */
#ifndef EXTRACT_CTL_H
#define EXTRACT_CTL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "config.h"
#include "err.h"
#include "store.h"
#include "table.h"
#include "terminal.h"

#define CTL_NAME "extractctl"
#define CTL_HOUR_MS INT64_C(3600000)

/* Exit statuses. */
enum { EXIT_OK, EXIT_NO, EXIT_USAGE, EXIT_STORE };

/* Options; extractctl.c says what each one is called. */
enum ctl_flag {
    FLAG_CONFIG,
    FLAG_JSON,
    FLAG_COLOR,
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
    FLAG_ADMIN,
    FLAG_LABEL,
    FLAG_COUNT
};

/* One run of the program. main releases configuration and store. */
struct ctl {
    const struct ctl_command *command;
    enum terminal_color color;
    char **arguments;               /* as many as the command takes */
    const char *values[FLAG_COUNT]; /* NULL: not given; "" for an option without argument */
    struct config *config;
    struct store *store;
    char actor[300];       /* who changes something, for AuditLog; set with the configuration */
    struct ctl_work *work; /* NULL: nothing that takes long is under way */
    int signal;            /* that has interrupted it, and ends it once all is said; 0: none */
};

/* The commands. Each returns an exit status, and opens what it needs once its arguments are in
 * order. */
int ctl_token_add(struct ctl *ctl);
int ctl_token_list(struct ctl *ctl);
int ctl_token_set_status(struct ctl *ctl);
int ctl_token_set_key(struct ctl *ctl);
int ctl_token_set_limit(struct ctl *ctl);
int ctl_seal(struct ctl *ctl);
int ctl_client_key_add(struct ctl *ctl);
int ctl_client_key_list(struct ctl *ctl);
int ctl_client_key_revoke(struct ctl *ctl);
int ctl_usage(struct ctl *ctl);
int ctl_logs(struct ctl *ctl);
int ctl_retries(struct ctl *ctl);
int ctl_reservations(struct ctl *ctl);
int ctl_outbox_status(struct ctl *ctl);
int ctl_outbox_drain(struct ctl *ctl);
int ctl_check(struct ctl *ctl);
int ctl_migrate(struct ctl *ctl);

/* ---- extractctl.c ---- */

static inline bool ctl_given(const struct ctl *ctl, enum ctl_flag flag)
{
    return ctl->values[flag] != NULL;
}

/* Says what is wrong on the command line; EXIT_USAGE. */
int ctl_usage_error(const struct ctl *ctl, const char *format, ...) PRINTF_LIKE(2, 3);

/* A whole number in digits, from min to max. */
bool ctl_parse_integer(const char *text, int64_t min, int64_t max, int64_t *number) MUST_CHECK;

/* ---- ctl_store.c ---- */

/* Sets ctl->config or ctl->store too; EXIT_OK, or says why not. Root becomes the owner of
 * state_dir on the way. */
int ctl_open_config(struct ctl *ctl) MUST_CHECK;
int ctl_open_store(struct ctl *ctl) MUST_CHECK;
/* False, and said why: root could not. */
bool ctl_become_owner(const struct ctl *ctl) MUST_CHECK;

/* Says what the store said, where it is and what to do next; the exit status. */
int ctl_store_error(const struct ctl *ctl, const struct err *err);
/* The same of the outbox, a file of this host; EXIT_STORE. */
int ctl_outbox_error(const struct ctl *ctl, const struct err *err);
/* What failed, with the place of the store where the message does not name it. */
void ctl_store_describe(const struct config *config, const struct err *err, char *out, size_t size);
/* Where the store is, and what to do when it fails ("": its message says so), for people. */
const char *ctl_store_place(const struct config *config) __attribute__((returns_nonnull));
void ctl_store_remedy(const struct config *config, enum err_code code, char *out, size_t size);

/* Who runs this, by the rights that count here. */
const char *ctl_user_name(void) __attribute__((returns_nonnull));

/* ---- ctl_say.c ---- */

/* A line on standard error: "extractctl: …"; "Next: …."; "(…)". */
void ctl_error(const struct ctl *ctl, const char *format, ...) PRINTF_LIKE(2, 3);
void ctl_next(const struct ctl *ctl, const char *format, ...) PRINTF_LIKE(2, 3);
void ctl_note(const struct ctl *ctl, const char *format, ...) PRINTF_LIKE(2, 3);

/* How tables look on standard output. */
struct table_style ctl_style(const struct ctl *ctl);
/* By the name of a column, whatever the table. */
enum paint ctl_paint(const struct table *table, size_t row, const char *name);

/* ---- ctl_work.c ---- */

/* What SIGINT, SIGTERM and SIGHUP do meanwhile. */
enum ctl_work_kind {
    WORK_READS,   /* end the program */
    WORK_CHANGES, /* the same, saying that a change is made as a whole or not at all */
    WORK_SETUP,   /* the same, saying that it may be run again */
    WORK_STEPS    /* make ctl_work_go_on say no; the second one ends the program */
};

/* From here to ctl_work_end, once it has taken half a second, a line on standard error says what is
 * being done, where that is a terminal. The text, without a line end, completes "while …". */
void ctl_work_begin(struct ctl *ctl, enum ctl_work_kind kind, const char *format, ...)
    PRINTF_LIKE(3, 4);
/* How far it is; total 0: nobody knows. */
void ctl_work_count(struct ctl *ctl, int64_t done, int64_t total);
bool ctl_work_go_on(const struct ctl *ctl);
/* Takes the line away. Sets ctl->signal where a signal asked WORK_STEPS to end, or came too late to end
 * the work, whatever its kind. */
void ctl_work_end(struct ctl *ctl);

/* ---- ctl_show.c ---- */

/* Prints a view of the store, filtered as the options say; layout: what people see of it, all
 * columns for NULL. */
int ctl_show_view(struct ctl *ctl, enum store_view view, const struct table_layout *layout);
int ctl_show_table(const struct ctl *ctl, const struct table *table,
                   const struct table_layout *layout);

/* Is a token of that company? Also true where the store does not say. */
bool ctl_has_token(const struct ctl *ctl, const char *company_id);

/* Prints one row that does not come from the store. */
struct ctl_cell {
    const char *name;
    struct store_value value;
};
int ctl_show_row(const struct ctl *ctl, const struct ctl_cell *cells, size_t count);

static inline struct store_value ctl_null(void)
{
    return (struct store_value){.type = STORE_NULL};
}

static inline struct store_value ctl_integer(int64_t n)
{
    return (struct store_value){.type = STORE_INTEGER, .integer = n};
}

static inline struct store_value ctl_text(const char *s)
{
    return (struct store_value){.type = STORE_TEXT, .text = s};
}

#endif
