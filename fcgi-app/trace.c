/* trace.c - traceparent and tracestate. See trace.h.
 *
 *     00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01
 *     version, trace-id, parent-id (the caller's span), flags: lower-case hexadecimal, all of it
 *
 * The caller's span is not kept: whoever collects spans has it from the caller. */
#include "trace.h"

#include <stdio.h>
#include <string.h>

#include "clock.h"

#define HEX "0123456789abcdef"
#define ID_LEN (TRACE_ID_SIZE - 1)
#define SPAN_LEN 16
#define PARENT_LEN (TRACE_PARENT_SIZE - 1)
#define SAMPLED 1U
#define RANDOM 2U /* the trace-id's right half is random */

/* Where the fields begin; each but the first has a dash before it. */
enum { VERSION_AT = 0, ID_AT = 3, SPAN_AT = ID_AT + ID_LEN + 1, FLAGS_AT = SPAN_AT + SPAN_LEN + 1 };

static bool is_hex(const char *s, size_t len)
{
    return strspn(s, HEX) >= len;
}

/* An identifier is not zero. */
static bool is_id(const char *s, size_t len)
{
    return is_hex(s, len) && strspn(s, "0") < len;
}

/* Are the four fields there, and nothing behind them that their version does not allow? */
static bool is_parent(const char *s)
{
    if (strnlen(s, PARENT_LEN) < PARENT_LEN || !is_hex(s + VERSION_AT, 2) || s[ID_AT - 1] != '-' ||
        !is_id(s + ID_AT, ID_LEN) || s[SPAN_AT - 1] != '-' || !is_id(s + SPAN_AT, SPAN_LEN) ||
        s[FLAGS_AT - 1] != '-' || !is_hex(s + FLAGS_AT, 2))
        return false;
    if (strncmp(s, "ff", 2) == 0)
        return false;
    return s[PARENT_LEN] == '\0' || (s[PARENT_LEN] == '-' && strncmp(s, "00", 2) != 0);
}

static bool is_state(const char *s)
{
    size_t n = 0;

    while (n <= TRACE_STATE_MAX && (s[n] == '\t' || (s[n] >= ' ' && s[n] <= '~')))
        n++;
    return n >= 1 && n <= TRACE_STATE_MAX && s[n] == '\0';
}

static unsigned digit(char c)
{
    return (unsigned)(strchr(HEX, c) - HEX);
}

bool trace_read(struct trace *trace, const char *parent, const char *state)
{
    *trace = (struct trace){.state = NULL};
    if (parent == NULL || !is_parent(parent))
        return false;
    memcpy(trace->id, parent + ID_AT, ID_LEN);
    /* What other flags mean nobody knows: they are sent as zero. Only the first is the same in every
     * version. */
    trace->flags =
        digit(parent[FLAGS_AT + 1]) & (strncmp(parent, "00", 2) == 0 ? SAMPLED | RANDOM : SAMPLED);
    if (state != NULL && is_state(state))
        trace->state = state;
    return true;
}

void trace_parent(const struct trace *trace, char out[TRACE_PARENT_SIZE])
{
    uint64_t span;

    do
        span = clock_random();
    while (span == 0);
    snprintf(out, TRACE_PARENT_SIZE, "00-%s-%016llx-%02x", trace->id, (unsigned long long)span,
             trace->flags & 0xFFU);
}
