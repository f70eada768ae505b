/* trace.h - W3C Trace Context (https://www.w3.org/TR/trace-context-2/): which trace a request belongs
 * to, where its client says so.
 *
 * The trace is taken over and passed on; none is begun here, and nothing is sent to anybody who
 * collects spans. A header that breaks the rules is as good as none: no client gets an error for it. */
#ifndef EXTRACT_TRACE_H
#define EXTRACT_TRACE_H

#include <stdbool.h>

#define TRACE_ID_SIZE 33     /* 32 hexadecimal digits and NUL */
#define TRACE_PARENT_SIZE 56 /* a traceparent of version 00 and NUL */
#define TRACE_STATE_MAX 512  /* bytes of a tracestate that is passed on */

struct trace {
    char id[TRACE_ID_SIZE]; /* trace-id; empty: the request belongs to none */
    unsigned flags;         /* those that this version knows */
    const char *state;      /* tracestate, as it came: borrowed; NULL: none */
};

/* Reads the two headers (NULL: not sent); state must live as long as *trace. Of a higher version than
 * 00 it reads what 00 has (section 4.3), of tracestate nothing: it is left out where it is empty, longer
 * than TRACE_STATE_MAX or not printable. False: the request belongs to no trace; *trace is empty. */
bool trace_read(struct trace *trace, const char *parent, const char *state);

/* A traceparent for a call of ours within the trace, which must not be empty: its trace-id and flags,
 * and a new span each time. */
void trace_parent(const struct trace *trace, char out[TRACE_PARENT_SIZE]);

#endif
