/* connection.c - one FastCGI connection. See connection.h. The only file that calls libfcgi.
 *
 * libfcgi would accept by itself, but then wait without end for a head that does not come, and nobody
 * else would be accepted meanwhile. So a connection is accepted here and given to libfcgi as one that
 * it has kept; and it is never kept in earnest, whatever the web server asks for: an idle kept
 * connection would hold its thread. How long a peer may take is the caller's to decide
 * (connection_stop_reading). */
#include "connection.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "clock.h"
#include "log.h"

#define SEND_PATIENCE_S 60 /* of a peer that does not read its answer */
#define READ_AT_ONCE (1 << 30)

enum err_code connection_init(struct err *err)
{
    return FCGX_Init() == 0 ? ERR_NONE
                            : err_set(err, ERR_INTERNAL, "libfcgi cannot be initialised");
}

int connection_accept(struct connection *c, int listener)
{
    const struct timeval patience = {.tv_sec = SEND_PATIENCE_S}, endless = {0};

    c->fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (c->fd < 0)
        return errno;
    setsockopt(c->fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    setsockopt(c->fd, SOL_SOCKET, SO_RCVTIMEO, &endless, sizeof endless); /* not the listener's */
    return 0;
}

bool connection_has_data(const struct connection *c)
{
    char byte;
    return recv(c->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) >= 0;
}

void connection_stop_reading(const struct connection *c)
{
    shutdown(c->fd, SHUT_RD);
}

/* ---- a request's head and body ---- */

static const char *parameter(const struct connection *c, const char *name)
{
    const char *value = FCGX_GetParam(name, c->fcgi.envp);
    return value == NULL ? "" : value;
}

/* The same of a value that is to be wiped: libfcgi's own copy, the only one. */
static char *secret(const struct connection *c, const char *name)
{
    static char none[] = "";
    char *value = FCGX_GetParam(name, c->fcgi.envp);
    return value == NULL ? none : value;
}

/* NULL: it is not there, or more than once. (libfcgi gives the first of several.) */
static const char *only_parameter(const struct connection *c, const char *name)
{
    const size_t len = strlen(name);
    const char *value = NULL;

    for (char **at = c->fcgi.envp; at != NULL && *at != NULL; at++) {
        if (strncmp(*at, name, len) != 0 || (*at)[len] != '=')
            continue;
        if (value != NULL)
            return NULL;
        value = *at + len + 1;
    }
    return value;
}

static size_t read_stdin(void *io, void *into, size_t size)
{
    FCGX_Request *fcgi = io;
    char *at = into;
    size_t done = 0;

    while (done < size) {
        size_t want = size - done < READ_AT_ONCE ? size - done : READ_AT_ONCE;
        int n = FCGX_GetStr(at + done, (int)want, fcgi->in);
        if (n <= 0)
            break;
        done += (size_t)n;
    }
    return done;
}

/* A whole number that is not negative; -1 for anything else. */
static int64_t parse_length(const char *s)
{
    int64_t n = 0;

    if (*s == '\0')
        return -1;
    for (; *s != '\0'; s++) {
        if (*s < '0' || *s > '9' || n > INT64_MAX / 10 - 10)
            return -1;
        n = n * 10 + (*s - '0');
    }
    return n;
}

/* The path without query, from whichever of the usual parameters the web server sends. */
static const char *find_path(struct connection *c)
{
    const char *path = parameter(c, "DOCUMENT_URI");

    if (*path == '\0')
        path = parameter(c, "REQUEST_URI");
    if (*path == '\0')
        path = parameter(c, "SCRIPT_NAME");
    return arena_strndup(&c->request.arena, path, strcspn(path, "?"));
}

bool connection_read_head(struct connection *c)
{
    struct request *request = &c->request;

    FCGX_InitRequest(&c->fcgi, -1, FCGI_FAIL_ACCEPT_ON_INTR);
    c->fcgi.ipcFd = c->fd;
    c->fcgi.keepConnection = 1;
    if (FCGX_Accept_r(&c->fcgi) < 0) /* it has closed fd, and could not accept another */
        return false;
    if (FCGX_GetError(c->fcgi.in) != 0) { /* it takes a head that broke off for a whole one */
        FCGX_Free(&c->fcgi, 0);
        close(c->fd);
        return false;
    }
    c->fcgi.keepConnection = 0;
    arena_init(&request->arena);
    uuid_v7(request->id);
    request->accepted_ms = clock_monotonic_ms();
    request->method = parameter(c, "REQUEST_METHOD");
    request->path = find_path(c);
    request->query = parameter(c, "QUERY_STRING");
    request->accept = parameter(c, "HTTP_ACCEPT");
    request->content_type = parameter(c, "CONTENT_TYPE");
    request->content_length = parse_length(parameter(c, "CONTENT_LENGTH"));
    request->body_file = parameter(c, "REQUEST_BODY_FILE");
    request->proxy_request_id = parameter(c, "PROXY_REQUEST_ID");
    request->peer = parameter(c, "REMOTE_ADDR");
    request->authorization = secret(c, "HTTP_AUTHORIZATION");
    request->idempotency_key = FCGX_GetParam("HTTP_IDEMPOTENCY_KEY", c->fcgi.envp);
    trace_read(&request->trace, only_parameter(c, "HTTP_TRACEPARENT"),
               only_parameter(c, "HTTP_TRACESTATE"));
    request->read = read_stdin;
    request->io = &c->fcgi;
    return true;
}

/* ---- its answer ---- */

static void write_response(struct connection *c, struct response *response)
{
    FCGX_Stream *out = c->fcgi.out;

    if (!buf_ok(&response->body)) { /* no memory, or no end */
        log_error(c->request.id, NULL, "the answer could not be made");
        response_problem(response, &c->request, ERR_INTERNAL, NULL, 0, true);
    }
    size_t len = buf_ok(&response->body) ? response->body.len : 0;
    FCGX_FPrintF(out,
                 "Status: %d\r\nContent-Type: %s\r\nContent-Length: %ld\r\nX-Request-ID: %s\r\n",
                 response->status, response->content_type, (long)len, c->request.id);
    if (response->retry_after_s > 0)
        FCGX_FPrintF(out, "Retry-After: %d\r\n", response->retry_after_s);
    if (response->allow != NULL)
        FCGX_FPrintF(out, "Allow: %s\r\n", response->allow);
    if (response->authenticate != NULL)
        FCGX_FPrintF(out, "WWW-Authenticate: %s\r\n", response->authenticate);
    if (response->file_name != NULL)
        FCGX_FPrintF(out, "Content-Disposition: attachment; filename=\"%s\"\r\n",
                     response->file_name);
    if (response->next_cursor != NULL)
        FCGX_FPrintF(out, "X-Next-Cursor: %s\r\n", response->next_cursor);
    FCGX_PutS("Cache-Control: no-store\r\n\r\n", out);
    FCGX_PutStr(buf_str(&response->body), (int)len, out);
}

void connection_answer(struct connection *c, struct response *response)
{
    write_response(c, response);
    response_reset(response);
    FCGX_Finish_r(&c->fcgi);
    arena_reset(&c->request.arena);
}

void connection_drop(struct connection *c)
{
    close(c->fd);
}
