/* ctl_show.c - extractctl usage, logs, retries, reservations, outbox; and how rows are printed.
 * See ctl.h.
 *
 * Machines (--json) get every column of a view; people those of its layout. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "ctl.h"

#define ROWS 1000 /* shown unless --rows says otherwise */
#define ROWS_MAX 1000000

/* ---- printing ---- */

int ctl_show_table(const struct ctl *ctl, const struct table *table,
                   const struct table_layout *layout)
{
    if (ctl_given(ctl, FLAG_JSON) ? table_print_json(table, stdout)
                                  : table_print(table, layout, stdout))
        return EXIT_OK;
    fputs(CTL_NAME ": the output could not be written\n", stderr);
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
        fputs(CTL_NAME ": out of memory\n", stderr);
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

int ctl_show_view(struct ctl *ctl, enum store_view view, const struct table_layout *layout)
{
    struct store_filter filter;
    struct table *table = NULL;
    struct err err = {0};
    int status = read_filter(ctl, &filter);

    if (status == EXIT_OK)
        status = ctl_open_store(ctl);
    if (status != EXIT_OK)
        return status;
    table = table_new();
    if (table == NULL) {
        fputs(CTL_NAME ": out of memory\n", stderr);
        return EXIT_NO;
    }
    if (store_query(ctl->store, view, &filter, table_row, table, &err) != ERR_NONE) {
        status = ctl_store_error(ctl, &err);
        goto out;
    }
    status = ctl_show_table(ctl, table, layout);
    if (status == EXIT_OK && table_rows(table) == 0 && !ctl_given(ctl, FLAG_JSON))
        fputs("(nothing)\n", stderr);
    if (table_rows(table) >= (size_t)filter.limit)
        fprintf(stderr, "(no more than %d rows are shown; see --rows)\n", filter.limit);
out:
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

int ctl_outbox_status(struct ctl *ctl)
{
    struct store_outbox_status outbox;
    struct err err = {0};
    int status = ctl_open_config(ctl); /* not the store, which may be away */

    if (status != EXIT_OK)
        return status;
    if (store_outbox_look(ctl->config, &outbox, &err) != ERR_NONE) {
        fprintf(stderr, CTL_NAME ": %s\n", err.message);
        return EXIT_STORE;
    }
    const struct ctl_cell cells[] = {
        {"Waiting", ctl_integer(outbox.waiting)},
        {"Records", ctl_integer(outbox.records)},
        {"Dead", ctl_integer(outbox.dead)},
        {"OldestSeconds", ctl_integer(outbox.oldest_ms / 1000)},
    };
    return ctl_show_row(ctl, cells, 4);
}

int ctl_outbox_drain(struct ctl *ctl)
{
    struct store_outbox_status outbox;
    struct err err = {0};
    int64_t replayed = 0;
    int status = ctl_open_store(ctl);

    if (status != EXIT_OK)
        return status;
    if (store_outbox_drain(ctl->store, &replayed, &err) != ERR_NONE ||
        store_outbox_status(ctl->store, &outbox, &err) != ERR_NONE)
        return ctl_store_error(ctl, &err);
    const struct ctl_cell cells[] = {
        {"Replayed", ctl_integer(replayed)},
        {"Waiting", ctl_integer(outbox.waiting)},
        {"Records", ctl_integer(outbox.records)},
        {"Dead", ctl_integer(outbox.dead)},
    };
    status = ctl_show_row(ctl, cells, 4);
    return status == EXIT_OK && outbox.waiting + outbox.records > 0 ? EXIT_NO : status;
}
