/* terminal.c - colours, widths and line breaks, for people at a terminal. See terminal.h.
 *
 * Colours are the first eight of every terminal (ECMA-48, "Select graphic rendition"), which follow
 * its own scheme, light or dark. */
#include "terminal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unilbrk.h>
#include <unistd.h>
#include <uniwidth.h>

#define LINE_MIN 10 /* columns: a narrower terminal breaks lines itself */

bool terminal_wants_color(enum terminal_color when, int fd)
{
    const char *no_color = getenv("NO_COLOR");
    const char *term = getenv("TERM");

    if (when != COLOR_AUTO)
        return when == COLOR_ALWAYS;
    return isatty(fd) && (no_color == NULL || *no_color == '\0') && term != NULL && *term != '\0' &&
           strcmp(term, "dumb") != 0;
}

size_t terminal_columns(int fd)
{
    struct winsize size;
    return ioctl(fd, TIOCGWINSZ, &size) == 0 ? size.ws_col : 0;
}

size_t terminal_width(const char *text)
{
    int n = u8_strwidth((const uint8_t *)text, "UTF-8");
    return n > 0 ? (size_t)n : 0;
}

const char *terminal_paint(enum paint paint)
{
    static const char *const codes[] = {
        [PAINT_NONE] = "",
        [PAINT_DIM] = "\033[2m",
        [PAINT_WARNING] = "\033[33m",
        [PAINT_ALARM] = "\033[1;31m",
    };
    return codes[paint];
}

const char *terminal_unpaint(enum paint paint)
{
    return paint == PAINT_NONE ? "" : "\033[0m";
}

static void write_line(FILE *out, const char *text, size_t len, enum paint paint)
{
    while (len > 0 && text[len - 1] == ' ')
        len--;
    fprintf(out, "%s%.*s%s", terminal_paint(paint), (int)len, text, terminal_unpaint(paint));
}

/* Where the next line begins, at most columns after begin where there is a place for it: after a space,
 * and by Unicode's rules in scripts that have none. A path or an option stays whole. */
static size_t next_line(const char *text, size_t len, const char *breaks, size_t begin,
                        size_t columns)
{
    size_t last = len;

    for (size_t i = begin + 1; i <= len; i++) {
        bool may_begin = i == len || text[i - 1] == ' ' ||
                         (breaks[i] == UC_BREAK_POSSIBLE && (unsigned char)text[i - 1] >= 0x80);
        size_t seen = i;
        if (!may_begin)
            continue;
        while (seen > begin && text[seen - 1] == ' ')
            seen--;
        int width = u8_width((const uint8_t *)text + begin, seen - begin, "UTF-8");
        if (width > (int)columns)
            return last < len ? last : i;
        last = i;
    }
    return len;
}

void terminal_write(FILE *out, const char *text, enum paint paint, size_t indent, size_t columns)
{
    size_t len = strlen(text);
    char *breaks = NULL;

    if (columns >= indent + LINE_MIN && indent + terminal_width(text) > columns)
        breaks = malloc(len);
    if (breaks == NULL) {
        fprintf(out, "%s%s%s", terminal_paint(paint), text, terminal_unpaint(paint));
        return;
    }
    u8_possible_linebreaks((const uint8_t *)text, len, "UTF-8", breaks);
    for (size_t begin = 0, next; begin < len; begin = next) {
        next = next_line(text, len, breaks, begin, columns - indent);
        if (begin > 0)
            fprintf(out, "\n%*s", (int)indent, "");
        write_line(out, text + begin, next - begin, paint);
    }
    free(breaks);
}
