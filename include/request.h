/* request.h - a request as handlers see it, and the response that they make. server.c fills the one
 * and writes the other. */
#ifndef EXTRACT_REQUEST_H
#define EXTRACT_REQUEST_H

#include <stddef.h>
#include <stdint.h>

#include "buf.h"
#include "clock.h"
#include "err.h"
#include "trace.h"

/* Strings are never NULL but where said; what the web server did not say is empty. */
struct request {
    struct arena arena;      /* freed after the response was written */
    char id[UUID_TEXT_SIZE]; /* RequestID */
    const char *method;
    const char *path;  /* without query */
    const char *query; /* what follows the ?, as it came */
    const char *accept;
    const char *content_type;
    int64_t content_length; /* -1: not said, or not a number */
    const char *body_file;  /* REQUEST_BODY_FILE */
    const char *proxy_request_id;
    const char *peer;            /* REMOTE_ADDR */
    char *authorization;         /* wiped once it was looked at */
    const char *idempotency_key; /* NULL: the header was not sent */
    struct trace trace;          /* that it belongs to */
    int64_t accepted_ms;         /* monotonic */
    /* Reads the body's next bytes; fewer than size only where it ends. */
    size_t (*read)(void *io, void *into, size_t size);
    void *io;
};

struct response {
    int status;
    const char *content_type; /* a constant */
    int retry_after_s;        /* 0: no header */
    const char *allow;        /* a constant; NULL: no header */
    const char *authenticate; /* WWW-Authenticate: a constant; NULL: no header */
    const char *file_name;   /* a browser saves it under this name: a constant; NULL: it shows it */
    const char *next_cursor; /* X-Next-Cursor: the request's; NULL: no header */
    struct buf body;
};

#define RESPONSE_MAX (32 * 1024 * 1024)

void response_init(struct response *response);
void response_reset(struct response *response);

/* Makes the response an application/problem+json (RFC 9457) for the code, with the headers that it asks for. detail NULL: the code's own.
 * retry_after_s 0: the code's own. spent: were tokens used, or may they have been? */
void response_problem(struct response *response, const struct request *request, enum err_code code,
                      const char *detail, int retry_after_s, bool spent);

/* The trace-id of the request's trace; NULL: it belongs to none. */
const char *request_trace_id(const struct request *request);
/* Under which numbers others know the request, for log messages: "proxy_request_id=…", and, of a trace,
 * "trace_id=…". The arena's. */
const char *request_other_ids(struct request *request) __attribute__((returns_nonnull));

/* Reads what is left of the body and forgets it: a web server that still sends would take an early
 * answer for a broken connection. */
void request_drain(struct request *request);

#endif
