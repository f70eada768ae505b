/* fuzz_trace.c - any bytes as traceparent and tracestate. A regular expression, written from the specification,
 * must agree on which traceparent is one; what is sent because of it is one, too, and fit for a header. */
#include <regex.h>
#include <stdlib.h>
#include <string.h>

#include "support.h"
#include "trace.h"

#define X "[0-9a-f]"
#define FIELDS "-" X "{32}-" X "{16}-" X "{2}"

/* Of version 00 no more than that; of those up to fe anything after one more dash. */
static bool is_parent(const char *s)
{
    static const char rule[] =
        "^(00" FIELDS "|(0[1-9a-f]|[1-9a-e]" X "|f[0-9a-e])" FIELDS "(-.*)?)$";
    static regex_t compiled;
    static bool ready;

    if (!ready)
        CHECK(regcomp(&compiled, rule, REG_EXTENDED | REG_NOSUB) == 0);
    ready = true;
    return regexec(&compiled, s, 0, NULL, 0) == 0 && strspn(s + 3, "0") < 32 &&
           strspn(s + 36, "0") < 16;
}

static void check_sent(const struct trace *trace)
{
    char sent[TRACE_PARENT_SIZE];
    struct trace again;

    trace_parent(trace, sent);
    CHECK(is_parent(sent) && strncmp(sent, "00", 2) == 0);
    CHECK(trace_read(&again, sent, NULL) && strcmp(again.id, trace->id) == 0);
    CHECK(again.flags == trace->flags && again.flags <= 3);
}

static void check_state(const char *state)
{
    size_t len = strlen(state);

    CHECK(len >= 1 && len <= TRACE_STATE_MAX);
    for (size_t i = 0; i < len; i++)
        CHECK(state[i] == '\t' || (state[i] >= ' ' && state[i] <= '~'));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input input = {data, size};
    char *parent = fuzz_text(&input, '\n'), *state = fuzz_rest(&input);
    struct trace trace;

    CHECK(trace_read(&trace, parent, state) == is_parent(parent));
    if (trace.id[0] != '\0') {
        CHECK(strncmp(trace.id, parent + 3, 32) == 0 && strlen(trace.id) == 32);
        CHECK(trace.state == NULL || trace.state == state);
        check_sent(&trace);
    }
    if (trace.state != NULL)
        check_state(trace.state);
    free(parent);
    free(state);
    return 0;
}
