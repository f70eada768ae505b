/* floor.c - the least that a program with libfcgi and libcurl can do with an upload: a limit to hold
 * beside what the service does.
 *
 * It reads the upload, finds the file in it, posts it as base64 in a request of the same shape to the
 * same place, and answers with what came back. No store, no accounting, no retry, no schema, no check
 * of the file, no parsing of the answer. Every thread waits in accept() itself. The upload lives in
 * malloc'd memory, or, where the web server names a file, in its mapping; base64 is made while
 * libcurl sends.
 *
 * With FLOOR_STORE it is the floor with rows: it writes what the product must, before the call and
 * after it (floor_rows.h), and nothing else changes.
 *
 *   FLOOR_URL       where to post                   FLOOR_THREADS   threads of the process
 *   FLOOR_CA_FILE   certificate of an https URL     FLOOR_STORE     a database, made by extractctl */
#include <curl/curl.h>
#include <fcgiapp.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "floor_rows.h"

static const char head[] =
    "{\"contents\":[{\"role\":\"user\",\"parts\":[{\"inlineData\":{\"mimeType\":"
    "\"application/pdf\",\"data\":\"";
static const char tail[] = "\"}},{\"text\":\"Extract the invoice.\"}]}]}";

struct body {
    const unsigned char *file;
    size_t len, at;   /* bytes of the file, and how many of them are sent */
    size_t tail_left; /* bytes of tail to come */
    int head_sent;
};

struct answer {
    char data[64 * 1024]; /* with a NUL */
    size_t len;
};

/* What all threads share. */
struct floor {
    struct curl_slist *headers;
    struct rows *rows; /* NULL: without */
};

/* What each has of its own. */
struct worker {
    const struct floor *floor;
    CURL *curl;
    struct answer answer;
    struct rows_request row;
};

/* libcurl gives room for 64 KiB and more, so that the head always fits. Groups of 3 bytes but for the end of the file. */
static size_t read_body(char *out, size_t size, size_t count, void *context)
{
    struct body *body = context;
    size_t room = size * count, done = 0;

    if (!body->head_sent) {
        memcpy(out, head, done = sizeof head - 1);
        body->head_sent = 1;
    }
    size_t n = (room - done - 1) / 4 * 3;
    if (n > body->len - body->at)
        n = body->len - body->at;
    if (n > 0)
        done += (size_t)EVP_EncodeBlock((unsigned char *)out + done, body->file + body->at, (int)n);
    body->at += n;
    if (body->at == body->len) {
        n = body->tail_left < room - done ? body->tail_left : room - done;
        memcpy(out + done, tail + sizeof tail - 1 - body->tail_left, n);
        body->tail_left -= n;
        done += n;
    }
    return done;
}

static size_t write_answer(char *data, size_t size, size_t count, void *context)
{
    struct answer *answer = context;
    size_t n = size * count;

    if (n >= sizeof answer->data - answer->len)
        return 0;
    memcpy(answer->data + answer->len, data, n);
    answer->len += n;
    answer->data[answer->len] = '\0';
    return n;
}

/* The content of the last part, which is the file: from the empty line after its headers to the closing boundary. */
static void find_file(const char *data, size_t len, const char *type, struct body *body)
{
    const char *boundary = strstr(type, "boundary=");
    size_t closing =
        boundary == NULL ? 0 : strlen(boundary + 9) + 8; /* CR LF -- boundary -- CR LF */
    const char *name = memmem(data, len < 4096 ? len : 4096, "name=\"file\"", 11);
    const char *begin =
        name == NULL ? NULL : memmem(name, len - (size_t)(name - data), "\r\n\r\n", 4);

    if (begin == NULL || (size_t)(data + len - begin) < closing + 4)
        return;
    body->file = (const unsigned char *)begin + 4;
    body->len = len - closing - (size_t)(begin + 4 - data);
}

/* A field before the file. */
static void find_field(const char *data, size_t len, const char *name, char out[ROWS_TEXT_SIZE])
{
    const char *end = data + (len < 4096 ? len : 4096);
    const char *at = memmem(data, (size_t)(end - data), name, strlen(name));
    const char *begin = at == NULL ? NULL : memmem(at, (size_t)(end - at), "\r\n\r\n", 4);
    const char *close =
        begin == NULL ? NULL : memmem(begin + 4, (size_t)(end - begin - 4), "\r\n", 2);

    out[0] = '\0';
    if (close != NULL)
        snprintf(out, ROWS_TEXT_SIZE, "%.*s", (int)(close - begin - 4), begin + 4);
}

static int post(CURL *curl, struct body *body, struct answer *answer)
{
    long status = 0;

    body->tail_left = sizeof tail - 1;
    curl_easy_setopt(curl, CURLOPT_READDATA, body);
    curl_easy_setopt(curl, CURLOPT_WRITEDATA, answer);
    curl_easy_setopt(curl, CURLOPT_POSTFIELDSIZE_LARGE,
                     (curl_off_t)(sizeof head - 1 + (body->len + 2) / 3 * 4 + sizeof tail - 1));
    return curl_easy_perform(curl) == CURLE_OK &&
           curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &status) == CURLE_OK && status == 200;
}

/* With rows between a reservation and its settlement, and by the key of the company's token. */
static int call(struct worker *w, const FCGX_Request *request, const char *data, size_t len,
                struct body *body)
{
    char header[sizeof w->row.api_key + 32];
    struct curl_slist key = {.data = header, .next = w->floor->headers};

    if (w->floor->rows == NULL)
        return post(w->curl, body, &w->answer);
    find_field(data, len, "name=\"companyID\"", w->row.company);
    find_field(data, len, "name=\"username\"", w->row.user);
    find_field(data, len, "name=\"branch\"", w->row.branch);
    w->row.bytes = body->len;
    w->row.proxy_id = FCGX_GetParam("PROXY_REQUEST_ID", request->envp);
    if (!rows_reserve(w->floor->rows, &w->row))
        return 0;
    snprintf(header, sizeof header, "x-goog-api-key: %s", w->row.api_key);
    curl_easy_setopt(w->curl, CURLOPT_HTTPHEADER, &key);
    if (!post(w->curl, body, &w->answer))
        return 0; /* its reservation stays open */
    rows_settle(w->floor->rows, &w->row, w->answer.data);
    return 1;
}

static void serve(FCGX_Request *request, struct worker *w)
{
    const char *length = FCGX_GetParam("CONTENT_LENGTH", request->envp);
    const char *type = FCGX_GetParam("CONTENT_TYPE", request->envp);
    const char *path = FCGX_GetParam("REQUEST_BODY_FILE", request->envp);
    size_t len = length == NULL ? 0 : strtoul(length, NULL, 10);
    char *data = NULL;
    struct body body = {0};

    w->answer.len = 0;
    w->answer.data[0] = '\0';
    if (len > 0 && path != NULL) {
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        data = fd < 0 ? MAP_FAILED : mmap(NULL, len, PROT_READ, MAP_PRIVATE, fd, 0);
        if (fd >= 0)
            close(fd);
        if (data == MAP_FAILED)
            data = NULL;
    } else if (len > 0 && len <= INT32_MAX && (data = malloc(len)) != NULL) {
        len = (size_t)FCGX_GetStr(data, (int)len, request->in);
    }
    if (data != NULL && type != NULL)
        find_file(data, len, type, &body);
    if (len == 0) /* /healthz */
        FCGX_PutS("Status: 200 OK\r\nContent-Type: text/plain\r\n\r\nfloor\n", request->out);
    else if (body.file != NULL && call(w, request, data, len, &body)) {
        FCGX_PutS("Status: 200 OK\r\nContent-Type: application/json\r\n\r\n", request->out);
        FCGX_PutStr(w->answer.data, (int)w->answer.len, request->out);
    } else {
        FCGX_PutS("Status: 502 Bad Gateway\r\n\r\n", request->out);
    }
    FCGX_Finish_r(request);
    if (path != NULL && data != NULL)
        munmap(data, len);
    else
        free(data);
}

static CURL *new_client(struct curl_slist *headers)
{
    CURL *curl = curl_easy_init();

    if (curl == NULL)
        exit(1);
    curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(curl, CURLOPT_URL, getenv("FLOOR_URL"));
    curl_easy_setopt(curl, CURLOPT_HTTPHEADER, headers);
    curl_easy_setopt(curl, CURLOPT_POST, 1L);
    curl_easy_setopt(curl, CURLOPT_UPLOAD_BUFFERSIZE, 128L * 1024);
    curl_easy_setopt(curl, CURLOPT_READFUNCTION, read_body);
    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, write_answer);
    /* Measured: over TLS with HTTP/2 the same 200 KB cost four times the processor time. */
    curl_easy_setopt(curl, CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_1_1);
    if (getenv("FLOOR_CA_FILE") != NULL)
        curl_easy_setopt(curl, CURLOPT_CAINFO, getenv("FLOOR_CA_FILE"));
    return curl;
}

static void *work(void *context)
{
    struct worker *w = malloc(sizeof *w); /* not cleared: most of it stays untouched */
    FCGX_Request request;

    if (w == NULL || FCGX_InitRequest(&request, 0, 0) != 0)
        exit(1);
    w->floor = context;
    w->curl = new_client(w->floor->headers);
    rows_init(&w->row);
    while (FCGX_Accept_r(&request) == 0)
        serve(&request, w);
    return NULL;
}

int main(void)
{
    struct floor floor = {0};
    const char *threads = getenv("FLOOR_THREADS");
    const char *store = getenv("FLOOR_STORE");
    pthread_t thread;

    if (getenv("FLOOR_URL") == NULL || threads == NULL || FCGX_Init() != 0 ||
        curl_global_init(CURL_GLOBAL_DEFAULT) != 0)
        return 1;
    signal(SIGTERM, SIG_DFL); /* libfcgi has a handler, and then goes on waiting */
    floor.headers = curl_slist_append(NULL, "Content-Type: application/json");
    floor.headers = curl_slist_append(floor.headers, "Expect:");
    if (store == NULL)
        floor.headers = curl_slist_append(floor.headers, "x-goog-api-key: floor");
    else
        floor.rows = rows_open(store);
    for (int i = atoi(threads); i > 1; i--)
        if (pthread_create(&thread, NULL, work, &floor) != 0)
            return 1;
    work(&floor);
    return 1;
}
