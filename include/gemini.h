/* gemini.h - calls to Gemini's generateContent, by libcurl.
 *
 * What is the same for all calls (prompt, schema, URL) is made once, in struct gemini. A struct
 * gemini_client belongs to one thread and keeps its connection. The request body is never built: it
 * is JSON before the file, the file in base64 made while it is sent, JSON after it. */
#ifndef EXTRACT_GEMINI_H
#define EXTRACT_GEMINI_H

#include <stddef.h>
#include <stdint.h>

#include "buf.h"
#include "config.h"
#include "err.h"
#include "retry.h"
#include "trace.h"
#include "usage.h"

#define GEMINI_ANSWER_MAX (16 * 1024 * 1024) /* bytes that are read of one, decompressed */

struct gemini;
struct gemini_client;
struct invoice_schema;

/* config and schema are borrowed until gemini_free. Errors: ERR_CONFIG (prompt or CA file). */
struct gemini *gemini_new(const struct config *config, const struct invoice_schema *schema,
                          struct err *err) MUST_CHECK;
void gemini_free(struct gemini *gemini);

/* One a thread. NULL without memory. */
struct gemini_client *gemini_client_new(struct gemini *gemini) MUST_CHECK;
void gemini_client_free(struct gemini_client *client);

/* One call. */
struct gemini_call {
    const char *api_key;
    const char *mime_type;
    const unsigned char *file; /* borrowed; read while the call runs */
    size_t file_len;
    int64_t timeout_ms;
    const struct trace *trace; /* that the call belongs to; NULL, or an empty one: none */
};

struct gemini_answer {
    struct retry_outcome
        outcome;     /* text_ok is left false: whether text fits is invoice.h's matter */
    struct buf text; /* the candidate's text parts, joined, without thoughts */
    char finish_reason[32];
    char model[128]; /* modelVersion; empty where it was not said */
    bool has_usage;
    struct usage usage;
    int64_t duration_ms;
};

void gemini_answer_init(struct gemini_answer *answer);
void gemini_answer_reset(struct gemini_answer *answer);

/* Calls generateContent and fills answer (initialised by the caller); what went wrong is in
 * answer->outcome. Never blocks longer than timeout_ms. Within a trace each call is a span of its own:
 * an attempt and its retry can be told apart. libcurl can't silently send the request a second time
 * once its last byte was handed over. */
void gemini_call(struct gemini_client *client, const struct gemini_call *call,
                 struct gemini_answer *answer);

/* Reads one HTTP answer into outcome, text, usage: the part of gemini_call that knows Google's JSON.
 * retry_after: the header's value, or NULL. */
void gemini_read_answer(struct gemini_answer *answer, int http_status, const char *retry_after,
                        const char *body, size_t len);

/* Is the server there? Any HTTP answer to a request without a key means yes; detail says which.
 * Nothing is spent. Errors: ERR_UPSTREAM_UNAVAILABLE. */
enum err_code gemini_probe(const struct config *config, char *detail, size_t detail_size,
                           struct err *err) MUST_CHECK;

#endif
