/* terminal.h - what people see: colours where they want them, the width of a terminal and of texts. */
#ifndef EXTRACT_TERMINAL_H
#define EXTRACT_TERMINAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

/* Few, each with a meaning. */
enum paint {
    PAINT_NONE,
    PAINT_DIM,     /* matters less */
    PAINT_WARNING, /* somebody should look at it */
    PAINT_ALARM    /* somebody must */
};

enum terminal_color { COLOR_AUTO, COLOR_ALWAYS, COLOR_NEVER };

/* Is what goes to the descriptor to be coloured? COLOR_AUTO: where it is a terminal that can (TERM is
 * set and not dumb), and NO_COLOR is unset or empty (https://no-color.org). */
bool terminal_wants_color(enum terminal_color when, int fd);

/* Columns of the terminal; 0: it is none, or does not say. */
size_t terminal_columns(int fd);

/* Columns that a text in UTF-8 takes: East Asian characters two, combining ones none. */
size_t terminal_width(const char *text);

/* What begins and ends a colour; "" for PAINT_NONE. */
const char *terminal_paint(enum paint paint) __attribute__((returns_nonnull));
const char *terminal_unpaint(enum paint paint) __attribute__((returns_nonnull));

/* Writes a text that begins in the column indent (from 0), in lines no longer than columns (0: any)
 * where its words allow it, each further one indented as far; no end of line after the last. */
void terminal_write(FILE *out, const char *text, enum paint paint, size_t indent, size_t columns);

#endif
