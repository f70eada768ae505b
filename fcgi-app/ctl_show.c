/* ctl_show.c - extractctl usage, logs, retries, reservations, outbox; and how rows are printed.
 * See ctl.h.
 *
 * Machines (--json) get every column of a view; people those of its layout. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "ctl.h"

#define ROWS 1000 /* shown unless --rows says otherwise */
#define ROWS_MAX 1000000

/* ---- printing ---- */

int ctl_show_table(const struct ctl *ctl, const struct table *table,
                   const struct table_layout *layout)
{
    const struct table_style style = ctl_style(ctl);

    if (ctl_given(ctl, FLAG_JSON) ? table_print_json(table, stdout)
                                  : table_print(table, layout, &style, stdout))
        return EXIT_OK;
    ctl_error(ctl, "the output could not be written");
    return EXIT_NO;
}

int ctl_show_row(const struct ctl *ctl, const struct ctl_cell *cells, size_t count)
{
    struct table *table = table_new();
    const char *names[8];
    struct store_value values[8];
    int status = EXIT_NO;

    for (size_t i = 0; i < count && i < 8; i++) {
        names[i] = cells[i].name;
        values[i] = cells[i].value;
    }
    if (table != NULL && table_row(table, count, names, values))
        status = ctl_show_table(ctl, table, NULL);
    else
        ctl_error(ctl, "out of memory");
    table_free(table);
    return status;
}

/* ---- the filter ---- */

static int read_time(const struct ctl *ctl, enum ctl_flag flag, const char *name, int64_t *wall_ms)
{
    const char *text = ctl->values[flag];

    if (text == NULL || clock_parse(text, wall_ms))
        return EXIT_OK;
    return ctl_usage_error(ctl, "--%s must be like " CLOCK_TIMES, name);
}

static int read_filter(const struct ctl *ctl, struct store_filter *filter)
{
    int64_t rows = ROWS;
    int status;

    *filter = (struct store_filter){
        .company_id = ctl->values[FLAG_COMPANY],
        .request_id = ctl->values[FLAG_REQUEST],
    };
    if (ctl_given(ctl, FLAG_ROWS) && !ctl_parse_integer(ctl->values[FLAG_ROWS], 1, ROWS_MAX, &rows))
        return ctl_usage_error(ctl, "--rows must be a whole number from 1 to %d", ROWS_MAX);
    filter->limit = (int)rows;
    status = read_time(ctl, FLAG_SINCE, "since", &filter->since_ms);
    return status != EXIT_OK ? status : read_time(ctl, FLAG_UNTIL, "until", &filter->until_ms);
}

/* ---- views of the store ---- */

struct reading {
    struct ctl *ctl;
    struct table *table;
};

/* A store_row. */
static bool take_row(void *context, size_t columns, const char *const *names,
                     const struct store_value *values)
{
    struct reading *reading = context;

    ctl_work_count(reading->ctl, (int64_t)table_rows(reading->table) + 1, 0);
    return table_row(reading->table, columns, names, values);
}

/* A store_row: that there is one. */
static bool see_row(void *context, size_t columns, const char *const *names,
                    const struct store_value *values)
{
    (void)columns;
    (void)names;
    (void)values;
    *(bool *)context = true;
    return false;
}

bool ctl_has_token(const struct ctl *ctl, const char *company_id)
{
    const struct store_filter filter = {.company_id = company_id, .limit = 1};
    bool found = false;

    return store_query(ctl->store, VIEW_TOKENS, &filter, see_row, &found, NULL) != ERR_NONE ||
           found;
}

/* Beside a table: that there is nothing in it, or perhaps not all. */
static void show_notes(const struct ctl *ctl, const struct table *table, int limit)
{
    const char *company = ctl->values[FLAG_COMPANY];

    if (table_rows(table) == 0 && !ctl_given(ctl, FLAG_JSON)) {
        if (company != NULL && !ctl_has_token(ctl, company))
            ctl_note(ctl, "nothing; no token is of company %s: see `" CTL_NAME " token list`",
                     company);
        else
            ctl_note(ctl, "nothing");
    }
    if (table_rows(table) >= (size_t)limit)
        ctl_note(ctl, "no more than %d rows are shown; see --rows", limit);
}

int ctl_show_view(struct ctl *ctl, enum store_view view, const struct table_layout *layout)
{
    struct store_filter filter;
    struct table *table = NULL;
    struct reading reading;
    struct err err = {0};
    enum err_code code;
    int status = read_filter(ctl, &filter);

    if (status == EXIT_OK)
        status = ctl_open_store(ctl);
    if (status != EXIT_OK)
        return status;
    table = table_new();
    if (table == NULL) {
        ctl_error(ctl, "out of memory");
        return EXIT_NO;
    }
    reading = (struct reading){.ctl = ctl, .table = table};
    ctl_work_begin(ctl, WORK_READS, "reading rows");
    code = store_query(ctl->store, view, &filter, take_row, &reading, &err);
    ctl_work_end(ctl);
    if (code == ERR_NONE)
        status = ctl_show_table(ctl, table, layout);
    else
        status = ctl_store_error(ctl, &err);
    if (status == EXIT_OK)
        show_notes(ctl, table, filter.limit);
    table_free(table);
    return status;
}

int ctl_usage(struct ctl *ctl)
{
#define SUMS " Requests RequestCount InputTokens OutputTokens TotalTokensUsed UnknownCalls"
    static const struct {
        const char *name;
        enum store_view view;
        struct table_layout layout;
    } by[] = {
        {"day", VIEW_USAGE_BY_DAY, {.columns = "Day" SUMS}},
        {"company", VIEW_USAGE_BY_COMPANY, {.columns = "CompanyID" SUMS}},
        {"branch", VIEW_USAGE_BY_BRANCH, {.columns = "CompanyID Branch" SUMS}},
        {"user", VIEW_USAGE_BY_USER, {.columns = "CompanyID RequestedBy" SUMS}},
        {"token", VIEW_USAGE_BY_TOKEN, {.columns = "CompanyID TokenID TokenSource" SUMS}},
    };
    const char *name = ctl_given(ctl, FLAG_BY) ? ctl->values[FLAG_BY] : "day";

    for (size_t i = 0; i < sizeof by / sizeof by[0]; i++)
        if (strcmp(name, by[i].name) == 0)
            return ctl_show_view(ctl, by[i].view, &by[i].layout);
    return ctl_usage_error(ctl, "--by must be day, company, branch, user or token");
}

int ctl_logs(struct ctl *ctl)
{
    static const struct table_layout layout = {
        .columns = "Timestamp LogLevel Logger RequestID Message",
        .below = "Exception",
    };
    return ctl_show_view(ctl, ctl_given(ctl, FLAG_ERRORS) ? VIEW_ERRORS : VIEW_LOGS, &layout);
}

int ctl_retries(struct ctl *ctl)
{
    static const struct table_layout layout = {
        .columns = "Timestamp CompanyID TokenID Attempt StatusCode IsRetryable DelayMs RequestID"
                   " ErrorMessage",
    };
    return ctl_show_view(ctl, VIEW_RETRIES, &layout);
}

int ctl_reservations(struct ctl *ctl)
{
    return ctl_show_view(ctl, ctl_given(ctl, FLAG_UNSETTLED) ? VIEW_UNSETTLED : VIEW_RESERVATIONS,
                         NULL);
}

/* ---- the outbox ---- */

/* What to do about what is dead. */
static void show_dead(const struct ctl *ctl, const struct store_outbox_status *outbox)
{
    if (outbox->dead > 0)
        ctl_next(ctl,
                 "see why the store refuses what is dead: sqlite3 %s/outbox.db 'SELECT Seq, Kind, "
                 "RequestID, LastError FROM OutboxDead'",
                 ctl->config->server.state_dir);
}

/* A directory that is not there, or closed to this user, holds no empty outbox. */
static int look_for_outbox(const struct ctl *ctl)
{
    const char *directory = ctl->config->server.state_dir;
    struct err err;

    if (access(directory, R_OK | X_OK) == 0)
        return EXIT_OK;
    err_set(&err, ERR_CONFIG, "server.state_dir: %s: %s", directory, strerror(errno));
    return ctl_outbox_error(ctl, &err);
}

int ctl_outbox_status(struct ctl *ctl)
{
    struct store_outbox_status outbox;
    struct err err = {0};
    int status = ctl_open_config(ctl); /* not the store, which may be away */

    if (status == EXIT_OK)
        status = look_for_outbox(ctl);
    if (status != EXIT_OK)
        return status;
    if (store_outbox_look(ctl->config, &outbox, &err) != ERR_NONE)
        return ctl_outbox_error(ctl, &err);
    const struct ctl_cell cells[] = {
        {"Waiting", ctl_integer(outbox.waiting)},
        {"Records", ctl_integer(outbox.records)},
        {"Dead", ctl_integer(outbox.dead)},
        {"OldestSeconds", ctl_integer(outbox.oldest_ms / 1000)},
    };
    status = ctl_show_row(ctl, cells, 4);
    show_dead(ctl, &outbox);
    return status;
}

struct draining {
    struct ctl *ctl;
    int64_t total;
};

/* A store_go_on. */
static bool watch_drain(void *context, int64_t done)
{
    const struct draining *draining = context;

    ctl_work_count(draining->ctl, done, draining->total);
    return ctl_work_go_on(draining->ctl);
}

/* Why does something still wait? */
static void show_waiting(const struct ctl *ctl, int64_t replayed)
{
    if (ctl->signal != 0)
        ctl_error(ctl, "interrupted: what was replayed is in the store, the rest waits as before");
    else if (replayed == 0)
        ctl_next(ctl, "if the service runs, it is replaying them itself: look again by `" CTL_NAME
                      " outbox status`; else see `" CTL_NAME " logs --errors`");
    else
        ctl_next(ctl, "run it again: some have come, or come first, meanwhile");
}

int ctl_outbox_drain(struct ctl *ctl)
{
    struct store_outbox_status outbox;
    struct draining draining = {.ctl = ctl};
    struct err err = {0};
    int64_t replayed = 0;
    enum err_code code;
    int status = ctl_open_config(ctl);

    if (status == EXIT_OK)
        status = look_for_outbox(ctl);
    if (status == EXIT_OK)
        status = ctl_open_store(ctl);
    if (status != EXIT_OK)
        return status;
    if (store_outbox_status(ctl->store, &outbox, &err) != ERR_NONE)
        return ctl_outbox_error(ctl, &err);
    draining.total = outbox.waiting + outbox.records;
    store_watch(ctl->store, watch_drain, &draining);
    ctl_work_begin(ctl, WORK_STEPS, "replaying the outbox");
    code = store_outbox_drain(ctl->store, &replayed, &err);
    ctl_work_end(ctl);
    store_watch(ctl->store, NULL, NULL);
    if (code == ERR_NONE)
        code = store_outbox_status(ctl->store, &outbox, &err);
    if (code != ERR_NONE) {
        if (replayed > 0)
            ctl_note(ctl, "replayed before that: %lld", (long long)replayed);
        return ctl_store_error(ctl, &err);
    }
    const struct ctl_cell cells[] = {
        {"Replayed", ctl_integer(replayed)},
        {"Waiting", ctl_integer(outbox.waiting)},
        {"Records", ctl_integer(outbox.records)},
        {"Dead", ctl_integer(outbox.dead)},
    };
    status = ctl_show_row(ctl, cells, 4);
    show_dead(ctl, &outbox);
    if (outbox.waiting + outbox.records == 0)
        return status;
    show_waiting(ctl, replayed);
    return status == EXIT_OK ? EXIT_NO : status;
}
