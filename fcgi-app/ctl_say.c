/* ctl_say.c - what extractctl says on standard error, and what it colours. See ctl.h.
 *
 * Colours say where to look: an alarm where somebody must do something, a warning where somebody
 * should look, dim what is over. What they say stands in the words, too. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#include "clock.h"
#include "ctl.h"

/* ---- standard error ---- */

static enum paint on_stderr(const struct ctl *ctl, enum paint paint)
{
    return terminal_wants_color(ctl->color, STDERR_FILENO) ? paint : PAINT_NONE;
}

void ctl_error(const struct ctl *ctl, const char *format, ...)
{
    enum paint paint = on_stderr(ctl, PAINT_ALARM);
    va_list args;

    fprintf(stderr, "%s" CTL_NAME ":%s ", terminal_paint(paint), terminal_unpaint(paint));
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
}

void ctl_next(const struct ctl *ctl, const char *format, ...)
{
    enum paint paint = on_stderr(ctl, PAINT_WARNING);
    va_list args;

    fprintf(stderr, "%sNext:%s ", terminal_paint(paint), terminal_unpaint(paint));
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputs(".\n", stderr);
}

void ctl_note(const struct ctl *ctl, const char *format, ...)
{
    enum paint paint = on_stderr(ctl, PAINT_DIM);
    va_list args;

    fprintf(stderr, "%s(", terminal_paint(paint));
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, ")%s\n", terminal_unpaint(paint));
}

/* ---- tables ---- */

/* A word and the colour of the cell that holds it. */
struct word {
    const char *column, *word;
    enum paint paint;
};

static const struct word words[] = {
    {"Status", "Expired", PAINT_ALARM},
    {"Status", "Exceeded", PAINT_ALARM},
    {"Status", "Disabled", PAINT_ALARM},
    {"LogLevel", "CRITICAL", PAINT_ALARM},
    {"LogLevel", "ERROR", PAINT_ALARM},
    {"LogLevel", "WARNING", PAINT_WARNING},
    {"LogLevel", "DEBUG", PAINT_DIM},
    {"State", "unsettled", PAINT_WARNING},
    {"State", "revoked", PAINT_DIM},
    {"Result", "FAIL", PAINT_ALARM},
    {"TokenSource", "fallback", PAINT_WARNING},
};

/* Numbers that should be 0. */
static const struct {
    const char *column;
    enum paint paint;
} zeros[] = {
    {"UnknownCalls", PAINT_WARNING}, {"Waiting", PAINT_WARNING},  {"OldestSeconds", PAINT_WARNING},
    {"Dead", PAINT_ALARM},           {"Unreadable", PAINT_ALARM},
};

/* Of the row's cell in that column; else where it is none. */
static double number(const struct table *table, size_t row, const char *name, double otherwise)
{
    const struct store_value *cell = table_cell(table, row, name);

    if (cell != NULL && cell->type == STORE_REAL)
        return cell->real;
    return cell != NULL && cell->type == STORE_INTEGER ? (double)cell->integer : otherwise;
}

static bool is_filled(const struct table *table, size_t row, const char *name)
{
    const struct store_value *cell = table_cell(table, row, name);
    return cell != NULL && cell->type != STORE_NULL;
}

/* How much of its limit a token has used. */
static enum paint paint_used(const struct table *table, size_t row)
{
    double limit = number(table, row, "TotalTokenLimit", -1);
    double used = number(table, row, "TotalUsedTokens", 0);

    if (limit < 0)
        return PAINT_NONE;
    if (used >= limit)
        return PAINT_ALARM;
    return used >= limit * number(table, row, "Threshold", 1) ? PAINT_WARNING : PAINT_NONE;
}

/* A time until which something holds. */
static enum paint paint_until(const struct store_value *cell, enum paint while_it_holds,
                              enum paint then)
{
    int64_t until_ms;

    if (cell->type != STORE_TEXT || !clock_parse(cell->text, &until_ms))
        return PAINT_NONE;
    return until_ms > clock_wall_ms() ? while_it_holds : then;
}

enum paint ctl_paint(const struct table *table, size_t row, const char *name)
{
    const struct store_value *cell = table_cell(table, row, name);

    if (is_filled(table, row, "RevokedAt"))
        return PAINT_DIM;
    if (cell == NULL)
        return PAINT_NONE;
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
        if (cell->type == STORE_TEXT && strcmp(name, words[i].column) == 0 &&
            strcasecmp(cell->text, words[i].word) == 0)
            return words[i].paint;
    for (size_t i = 0; i < sizeof zeros / sizeof zeros[0]; i++)
        if (strcmp(name, zeros[i].column) == 0)
            return number(table, row, name, 0) > 0 ? zeros[i].paint : PAINT_NONE;
    if (strcmp(name, "IsRetryable") == 0)
        return number(table, row, name, 1) == 0 ? PAINT_WARNING : PAINT_NONE;
    if (strcmp(name, "TotalUsedTokens") == 0 || strcmp(name, "TotalRemainingTokens") == 0)
        return paint_used(table, row);
    if (strcmp(name, "CooldownUntil") == 0)
        return paint_until(cell, PAINT_WARNING, PAINT_DIM);
    if (strcmp(name, "ExpiresAt") == 0) /* the process that had it has died */
        return paint_until(cell, PAINT_NONE, PAINT_WARNING);
    return PAINT_NONE;
}

struct table_style ctl_style(const struct ctl *ctl)
{
    return (struct table_style){
        .paint = terminal_wants_color(ctl->color, STDOUT_FILENO) ? ctl_paint : NULL,
        .columns = terminal_columns(STDOUT_FILENO),
    };
}
