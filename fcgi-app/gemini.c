/* gemini.c - calls to Gemini's generateContent. See gemini.h. The only file that
 * connects by libcurl. What comes back is read in gemini_answer.c.
 *
 * Settings that are there for a reason:
 *  - the key travels in a header, never in the URL, which ends up in logs
 *  - a POST whose kept connection dies is re-sent by libcurl behind our back; the seek callback
 *    refuses to rewind once the body was read to its end, which makes that an error instead (the
 *    first copy may have been billed)
 *  - no Expect header (a round trip more), no proxy from the environment, no redirect, no .netrc
 *  - the answer has a maximum size, decompressed */
#include "gemini.h"

#include <curl/curl.h>
#include <openssl/evp.h>
#include <openssl/x509_vfy.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "clock.h"
#include "embed.h"
#include "invoice.h"
#include "metrics.h"

#define MAX_PROMPT (1024 * 1024)
#define LARGE_BODY (1024 * 1024) /* from here on libcurl gets a larger buffer */
#define BUFFER_SIZE (32L * 1024) /* a thousand threads may have one each */
#define LARGE_BUFFER_SIZE (256L * 1024)

struct gemini {
    const struct config *config;
    char *url;
    struct buf head, tail; /* the JSON before the mime type, and after the file */
    CURLSH *share;         /* names and TLS sessions, for all threads */
    pthread_mutex_t locks[CURL_LOCK_DATA_LAST];
};

struct gemini_client {
    struct gemini *gemini;
    CURL *curl;
};

/* ---- what all calls share ---- */

static void share_lock(CURL *curl, curl_lock_data data, curl_lock_access access, void *context)
{
    struct gemini *gemini = context;
    (void)curl;
    (void)access;
    pthread_mutex_lock(&gemini->locks[data]);
}

static void share_unlock(CURL *curl, curl_lock_data data, void *context)
{
    struct gemini *gemini = context;
    (void)curl;
    pthread_mutex_unlock(&gemini->locks[data]);
}

/* The prompt of the configuration or the one compiled in. */
static enum err_code read_prompt(const struct config *config, struct buf *prompt, struct err *err)
{
    if (config->gemini.prompt_file[0] == '\0') {
        buf_append_str(prompt, embed_prompt);
        return ERR_NONE;
    }
    char block[4096];
    size_t n;
    FILE *f = fopen(config->gemini.prompt_file, "re");
    if (f == NULL)
        return err_set(err, ERR_CONFIG, "gemini.prompt_file: %s cannot be read",
                       config->gemini.prompt_file);
    while ((n = fread(block, 1, sizeof block, f)) > 0)
        buf_append(prompt, block, n);
    bool broken = ferror(f) != 0;
    fclose(f);
    if (broken || !buf_ok(prompt) || prompt->len == 0)
        return err_set(err, ERR_CONFIG, "gemini.prompt_file: %s must hold 1 byte to 1 MB of text",
                       config->gemini.prompt_file);
    return ERR_NONE;
}

static enum err_code make_body(struct gemini *gemini, const struct invoice_schema *schema,
                               struct err *err)
{
    struct buf prompt;
    buf_init(&prompt, MAX_PROMPT);
    enum err_code code = read_prompt(gemini->config, &prompt, err);

    buf_append_str(&gemini->head, "{\"contents\":[{\"role\":\"user\",\"parts\":[{\"inlineData\":"
                                  "{\"mimeType\":\"");
    buf_append_str(&gemini->tail, "\"}},{\"text\":");
    buf_append_json(&gemini->tail, buf_str(&prompt), prompt.len);
    buf_append_str(&gemini->tail, "}]}],\"generationConfig\":{\"responseMimeType\":"
                                  "\"application/json\",\"responseJsonSchema\":");
    buf_append_str(&gemini->tail, invoice_schema_text(schema));
    if (gemini->config->gemini.max_output_tokens > 0)
        buf_printf(&gemini->tail, ",\"maxOutputTokens\":%lld",
                   (long long)gemini->config->gemini.max_output_tokens);
    buf_append_str(&gemini->tail, "}}");
    buf_reset(&prompt);
    if (code == ERR_NONE && (!buf_ok(&gemini->head) || !buf_ok(&gemini->tail)))
        code = err_set(err, ERR_CONFIG, "prompt and schema are too large together");
    return code;
}

/* libcurl would find out with the first call, and every call would fail. */
static enum err_code check_ca_file(const char *path, struct err *err)
{
    X509_STORE *certificates = X509_STORE_new();
    bool ok = certificates != NULL && X509_STORE_load_file(certificates, path) == 1;

    X509_STORE_free(certificates);
    return ok ? ERR_NONE
              : err_set(err, ERR_CONFIG, "gemini.ca_file: %s holds no certificate (PEM)", path);
}

struct gemini *gemini_new(const struct config *config, const struct invoice_schema *schema,
                          struct err *err)
{
    struct gemini *gemini = calloc(1, sizeof *gemini);

    if (gemini == NULL || curl_global_init(CURL_GLOBAL_DEFAULT) != 0) {
        free(gemini);
        err_set(err, ERR_INTERNAL, "out of memory");
        return NULL;
    }
    gemini->config = config;
    for (int i = 0; i < CURL_LOCK_DATA_LAST; i++)
        pthread_mutex_init(&gemini->locks[i], NULL);
    buf_init(&gemini->head, 4096);
    buf_init(&gemini->tail, 2 * MAX_PROMPT + 2 * MAX_PROMPT);
    gemini->share = curl_share_init();
    if (gemini->share == NULL || asprintf(&gemini->url, "%s/v1beta/models/%s:generateContent",
                                          config->gemini.base_url, config->gemini.model) < 0) {
        gemini->url = NULL;
        err_set(err, ERR_INTERNAL, "out of memory");
        goto fail;
    }
    curl_share_setopt(gemini->share, CURLSHOPT_LOCKFUNC, share_lock);
    curl_share_setopt(gemini->share, CURLSHOPT_UNLOCKFUNC, share_unlock);
    curl_share_setopt(gemini->share, CURLSHOPT_USERDATA, gemini);
    curl_share_setopt(gemini->share, CURLSHOPT_SHARE, CURL_LOCK_DATA_DNS);
    curl_share_setopt(gemini->share, CURLSHOPT_SHARE, CURL_LOCK_DATA_SSL_SESSION);
    if ((config->gemini.ca_file[0] == '\0' ||
         check_ca_file(config->gemini.ca_file, err) == ERR_NONE) &&
        make_body(gemini, schema, err) == ERR_NONE)
        return gemini;
fail:
    gemini_free(gemini);
    return NULL;
}

void gemini_free(struct gemini *gemini)
{
    if (gemini == NULL)
        return;
    buf_reset(&gemini->head);
    buf_reset(&gemini->tail);
    free(gemini->url);
    if (gemini->share != NULL)
        curl_share_cleanup(gemini->share);
    for (int i = 0; i < CURL_LOCK_DATA_LAST; i++)
        pthread_mutex_destroy(&gemini->locks[i]);
    free(gemini);
    curl_global_cleanup();
}

/* What every request of ours to that server has in common. */
static void set_common_options(CURL *curl, const struct config *config)
{
    const char *base = config->gemini.base_url;

    curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(curl, CURLOPT_PROTOCOLS_STR,
                     strncasecmp(base, "http://", 7) == 0 ? "http" : "https");
    curl_easy_setopt(curl, CURLOPT_FOLLOWLOCATION, 0L);
    curl_easy_setopt(curl, CURLOPT_NETRC, (long)CURL_NETRC_IGNORED);
    curl_easy_setopt(curl, CURLOPT_PROXY,
                     config->gemini.proxy); /* "": none, whatever the environment */
    /* A worker has one call at a time, and nothing that HTTP/2 could share a connection with; its
     * frames and windows cost twice the processor time (tests/bench). */
    curl_easy_setopt(curl, CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_1_1);
    curl_easy_setopt(curl, CURLOPT_SSLVERSION, (long)CURL_SSLVERSION_TLSv1_2);
    if (config->gemini.ca_file[0] != '\0')
        curl_easy_setopt(curl, CURLOPT_CAINFO, config->gemini.ca_file);
    curl_easy_setopt(curl, CURLOPT_CONNECTTIMEOUT_MS, (long)config->gemini.connect_timeout_ms);
    curl_easy_setopt(curl, CURLOPT_TCP_NODELAY, 1L);
    curl_easy_setopt(curl, CURLOPT_TCP_KEEPALIVE, 1L);
    curl_easy_setopt(curl, CURLOPT_USERAGENT, "extract-fcgi/" EXTRACT_VERSION);
}

struct gemini_client *gemini_client_new(struct gemini *gemini)
{
    struct gemini_client *client = calloc(1, sizeof *client);

    if (client == NULL)
        return NULL;
    client->gemini = gemini;
    client->curl = curl_easy_init();
    if (client->curl == NULL) {
        free(client);
        return NULL;
    }
    set_common_options(client->curl, gemini->config);
    curl_easy_setopt(client->curl, CURLOPT_SHARE, gemini->share);
    curl_easy_setopt(client->curl, CURLOPT_URL, gemini->url);
    curl_easy_setopt(client->curl, CURLOPT_POST, 1L);
    curl_easy_setopt(client->curl, CURLOPT_ACCEPT_ENCODING, "gzip");
    return client;
}

void gemini_client_free(struct gemini_client *client)
{
    if (client == NULL)
        return;
    curl_easy_cleanup(client->curl);
    free(client);
}

/* ---- the request body ---- */

/* Where in the body the next byte comes from. The body is five pieces one after the other, of which
 * one, the file, is base64 made on the fly. */
struct body {
    const struct gemini *gemini;
    const struct gemini_call *call;
    int64_t size; /* of the whole body */
    int64_t at;   /* bytes read so far */
};

static size_t base64_size(size_t len)
{
    return (len + 2) / 3 * 4;
}

static const char between[] = "\",\"data\":\"";

static int64_t body_size(const struct gemini *gemini, const struct gemini_call *call)
{
    return (int64_t)(gemini->head.len + strlen(call->mime_type) + sizeof between - 1 +
                     base64_size(call->file_len) + gemini->tail.len);
}

/* Copies from a piece that begins at *begin of the body what is wanted now; moves *begin past it. */
static size_t copy_piece(struct body *body, int64_t *begin, const char *piece, size_t len,
                         char *out, size_t room)
{
    int64_t offset = body->at - *begin;
    size_t n = 0;

    if (room > 0 && offset >= 0 && offset < (int64_t)len) {
        n = len - (size_t)offset < room ? len - (size_t)offset : room;
        memcpy(out, piece + offset, n);
        body->at += (int64_t)n;
    }
    *begin += (int64_t)len;
    return n;
}

/* The same for the file's piece. Whole groups of 3 bytes go straight to out; a group of which out
 * has only a part of the 4 characters goes through a corner of the stack. */
static size_t copy_base64(struct body *body, int64_t *begin, char *out, size_t room)
{
    const unsigned char *file = body->call->file;
    size_t len = body->call->file_len, size = base64_size(len), done = 0;

    while (body->at - *begin < (int64_t)size && done < room) {
        size_t offset = (size_t)(body->at - *begin);
        size_t source = offset / 4 * 3, skip = offset % 4;
        size_t n = (room - done - 1) / 4 * 3; /* EVP_EncodeBlock ends with a NUL */
        if (n > len - source)
            n = len - source;
        if (n > 48 * 1024)
            n = 48 * 1024;
        if (skip == 0 && n >= 3) {
            if (source + n < len)
                n -= n % 3;
            if (base64_size(n) < room - done) {
                done += (size_t)EVP_EncodeBlock((unsigned char *)out + done, file + source, (int)n);
                body->at = *begin + (int64_t)(offset + base64_size(n));
                continue;
            }
        }
        unsigned char corner[5];
        EVP_EncodeBlock(corner, file + source, len - source < 3 ? (int)(len - source) : 3);
        size_t take = 4 - skip < room - done ? 4 - skip : room - done;
        memcpy(out + done, corner + skip, take);
        done += take;
        body->at += (int64_t)take;
    }
    *begin += (int64_t)size;
    return done;
}

static size_t read_body(char *out, size_t size, size_t count, void *context)
{
    struct body *body = context;
    const struct gemini *gemini = body->gemini;
    const char *mime_type = body->call->mime_type;
    size_t room = size * count, done = 0;
    int64_t begin = 0;

    done += copy_piece(body, &begin, gemini->head.data, gemini->head.len, out, room);
    done += copy_piece(body, &begin, mime_type, strlen(mime_type), out + done, room - done);
    done += copy_piece(body, &begin, between, sizeof between - 1, out + done, room - done);
    done += copy_base64(body, &begin, out + done, room - done);
    done += copy_piece(body, &begin, gemini->tail.data, gemini->tail.len, out + done, room - done);
    return done;
}

/* libcurl wants to send again. Only what never left us whole may be sent a second time. */
static int seek_body(void *context, curl_off_t offset, int origin)
{
    struct body *body = context;

    if (body->at == body->size || origin != SEEK_SET || offset != 0)
        return CURL_SEEKFUNC_FAIL;
    body->at = 0;
    return CURL_SEEKFUNC_OK;
}

static size_t write_answer(char *data, size_t size, size_t count, void *context)
{
    struct buf *answer = context;

    buf_append(answer, data, size * count);
    return buf_ok(answer) ? size * count : 0;
}

/* ---- the call ---- */

static void set_header(struct curl_slist **headers, const char *line, bool *ok)
{
    struct curl_slist *more = curl_slist_append(*headers, line);

    if (more == NULL)
        *ok = false;
    else
        *headers = more;
}

/* What a proxy on the way needs to put its spans into the client's trace; nothing where there is none. */
static void set_trace(struct curl_slist **headers, const struct trace *trace, bool *ok)
{
    char line[sizeof "tracestate: " + TRACE_STATE_MAX];
    char parent[TRACE_PARENT_SIZE];

    if (trace == NULL || trace->id[0] == '\0')
        return;
    trace_parent(trace, parent);
    snprintf(line, sizeof line, "traceparent: %s", parent);
    set_header(headers, line, ok);
    if (trace->state == NULL)
        return;
    snprintf(line, sizeof line, "tracestate: %s", trace->state);
    set_header(headers, line, ok);
}

/* Google quotes keys in its messages ("Consumer 'api_key:…' has been suspended"), and those go to
 * StatusReason, RetryAttempts and the log. */
static void hide_key(struct buf *answer, const char *key)
{
    size_t n = strlen(key);
    char *at = answer->data;

    while (n >= 8 && at != NULL &&
           (at = memmem(at, answer->len - (size_t)(at - answer->data), key, n)) != NULL)
        memset(at, '*', n);
}

void gemini_call(struct gemini_client *client, const struct gemini_call *call,
                 struct gemini_answer *answer)
{
    CURL *curl = client->curl;
    struct retry_outcome *o = &answer->outcome;
    struct body body = {client->gemini, call, body_size(client->gemini, call), 0};
    struct curl_slist *headers = NULL;
    struct buf received;
    char key_header[1100], why[CURL_ERROR_SIZE] = "";
    int64_t begun = clock_monotonic_ms();
    bool ok = strpbrk(call->api_key, "\r\n") == NULL; /* a header is one line */

    buf_init(&received, GEMINI_ANSWER_MAX);
    snprintf(key_header, sizeof key_header, "x-goog-api-key: %s", call->api_key);
    set_header(&headers, key_header, &ok);
    set_header(&headers, "Content-Type: application/json", &ok);
    set_header(&headers, "Expect:", &ok);
    set_trace(&headers, call->trace, &ok);
    curl_easy_setopt(curl, CURLOPT_HTTPHEADER, headers);
    curl_easy_setopt(curl, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)body.size);
    curl_easy_setopt(curl, CURLOPT_UPLOAD_BUFFERSIZE,
                     body.size < LARGE_BODY ? BUFFER_SIZE : LARGE_BUFFER_SIZE);
    curl_easy_setopt(curl, CURLOPT_READFUNCTION, read_body);
    curl_easy_setopt(curl, CURLOPT_READDATA, &body);
    curl_easy_setopt(curl, CURLOPT_SEEKFUNCTION, seek_body);
    curl_easy_setopt(curl, CURLOPT_SEEKDATA, &body);
    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, write_answer);
    curl_easy_setopt(curl, CURLOPT_WRITEDATA, &received);
    curl_easy_setopt(curl, CURLOPT_ERRORBUFFER, why);
    curl_easy_setopt(curl, CURLOPT_TIMEOUT_MS, (long)(call->timeout_ms > 0 ? call->timeout_ms : 1));

    CURLcode result = ok ? curl_easy_perform(curl) : CURLE_BAD_FUNCTION_ARGUMENT;
    if (result == CURLE_OK) {
        long status = 0;
        struct curl_header *retry_after = NULL;
        curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &status);
        hide_key(&received, call->api_key);
        curl_easy_header(curl, "Retry-After", 0, CURLH_HEADER, -1, &retry_after);
        gemini_read_answer(answer, (int)status, retry_after == NULL ? NULL : retry_after->value,
                           buf_str(&received), received.len);
    } else {
        snprintf(o->message, sizeof o->message, "%s",
                 why[0] != '\0' ? why : curl_easy_strerror(result));
    }
    o->sent_whole = body.at == body.size;
    answer->duration_ms = clock_monotonic_ms() - begun;
    metrics_observe(METRIC_GEMINI_DURATION, answer->duration_ms * 1000);

    curl_easy_setopt(curl, CURLOPT_HTTPHEADER, NULL);
    curl_easy_setopt(curl, CURLOPT_ERRORBUFFER, NULL);
    for (struct curl_slist *h = headers; h != NULL; h = h->next)
        explicit_bzero(h->data, strlen(h->data));
    curl_slist_free_all(headers);
    explicit_bzero(key_header, sizeof key_header);
    buf_reset(&received);
}

static size_t discard(char *data, size_t size, size_t count, void *context)
{
    (void)data;
    (void)context;
    return size * count;
}

enum err_code gemini_probe(const struct config *config, char *detail, size_t detail_size,
                           struct err *err)
{
    char url[2048], why[CURL_ERROR_SIZE] = "";
    enum err_code code = ERR_NONE;
    long status = 0;
    CURL *curl;

    if (curl_global_init(CURL_GLOBAL_DEFAULT) != 0 || (curl = curl_easy_init()) == NULL)
        return err_set(err, ERR_INTERNAL, "out of memory");
    snprintf(url, sizeof url, "%s/v1beta/models/%s", config->gemini.base_url, config->gemini.model);
    set_common_options(curl, config);
    curl_easy_setopt(curl, CURLOPT_URL, url);
    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, discard);
    curl_easy_setopt(curl, CURLOPT_ERRORBUFFER, why);
    curl_easy_setopt(curl, CURLOPT_TIMEOUT_MS, 2 * (long)config->gemini.connect_timeout_ms);
    CURLcode result = curl_easy_perform(curl);
    if (result == CURLE_OK) {
        curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &status);
        snprintf(detail, detail_size, "%s answers (HTTP %ld without a key)",
                 config->gemini.base_url, status);
    } else {
        code = err_set(err, ERR_UPSTREAM_UNAVAILABLE, "%s: %s", config->gemini.base_url,
                       why[0] != '\0' ? why : curl_easy_strerror(result));
    }
    curl_easy_cleanup(curl);
    curl_global_cleanup();
    return code;
}
