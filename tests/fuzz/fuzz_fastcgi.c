/* fuzz_fastcgi.c - any bytes from the web server, through the whole of a request: head, upload, form,
 * extraction, answer. Where the first byte is 1, as in each record of FastCGI, the input is what the socket
 * gives. Else it is lines NAME=value up to an empty one, then the body, and is made a stream of records
 * here: then the request must be what was sent. Below the request stand a store that always has a token and
 * a Gemini that always answers; what Gemini was asked must have been settled. Every other request must bring
 * the one client key that there is.
 *
 * Two things that no web server sends are mended first, because libfcgi 2.4.2 itself does not stand them
 * (README.md): management records, and names or values whose lengths add up to 2^31. */
#include <fcntl.h>
#include <json.h>
#include <signal.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "auth.h"
#include "connection.h"
#include "log.h"
#include "route.h"
#include "store_driver.h"
#include "support.h"
#include "text.h"

#define UPLOAD_MAX (1024 * 1024 + 1024) /* a spool on disk at its very end */
#define SENT_MAX (128 * 1024)           /* the socket must hold it all */

/* What stands in the web server's directory, and outside it, for another user. */
#define FORM(user)                                                                \
    "--b\r\nContent-Disposition: form-data; name=file\r\n\r\n%PDF-1.4\n%%EOF\r\n" \
    "--b\r\nContent-Disposition: form-data; name=companyID\r\n\r\nNT047\r\n"      \
    "--b\r\nContent-Disposition: form-data; name=username\r\n\r\n" user "\r\n--b--\r\n"
#define USER_INSIDE "eva"
#define USER_OUTSIDE "eve"

/* ---- a store, and a Gemini ---- */

/* The only client keys, and whose they are. */
#define CLIENT_KEY "extract_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"
#define CLIENT_ID "0123456789abcdef"
#define ADMIN_KEY "extract_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh0"
#define CLIENT_COMPANY "NT047"
#define USED_KEY "click-1" /* an idempotency key that another request had */

static struct {
    int acquired, called, settled, queried;
    bool is_from_file;        /* the upload of this request */
    bool needs_key;           /* this request */
    bool brings_key;          /* CLIENT_KEY is somewhere in what was sent */
    bool brings_admin_key;    /* ADMIN_KEY */
    bool has_idempotency_key; /* the one that the store was told of */
} counts;

static void *open_driver(const struct config *config, bool migrate, struct err *err)
{
    (void)config;
    (void)migrate;
    (void)err;
    return &counts;
}

static void close_driver(void *self)
{
    (void)self;
}

static int leaders(void *self)
{
    (void)self;
    return 1;
}

static enum err_code ping(void *self, struct err *err)
{
    (void)self;
    (void)err;
    return ERR_NONE;
}

/* The rows' texts, as the contract has them. */
static void check_names(const char *company, const char *branch, const char *user)
{
    CHECK(text_fault(company, strlen(company), 1, 256) == NULL);
    CHECK(text_fault(branch, strlen(branch), 0, 256) == NULL);
    CHECK(text_fault(user, strlen(user), 1, 256) == NULL);
}

static enum err_code acquire(void *self, struct store_acquire *const *items, size_t count,
                             struct err *err)
{
    struct store_acquire *a = items[0];

    (void)self;
    (void)err;
    CHECK(count == 1 && a->estimate_tokens >= 1000);
    check_names(a->company_id, a->branch, a->requested_by);
    CHECK(!counts.is_from_file || strcmp(a->requested_by, USER_INSIDE) == 0);
    CHECK(!counts.needs_key ||
          (counts.brings_key && strcasecmp(a->company_id, CLIENT_COMPANY) == 0));
    CHECK(a->idempotency_key == NULL ||
          (strlen(a->idempotency_key) <= 128 && fuzz_is_line(a->idempotency_key)));
    counts.has_idempotency_key = a->idempotency_key != NULL;
    if (counts.has_idempotency_key && strcmp(a->idempotency_key, USED_KEY) == 0) {
        a->grant = GRANT_DUPLICATE;
        snprintf(a->first_request_id, sizeof a->first_request_id,
                 "01935a0e-0000-7000-8000-000000000001");
        return a->code = ERR_NONE;
    }
    a->grant = GRANT_TOKEN;
    a->token_id = 7;
    snprintf(a->api_key, sizeof a->api_key, "key");
    snprintf(a->company_id_stored, sizeof a->company_id_stored, "%s", a->company_id);
    counts.acquired++;
    return a->code = ERR_NONE;
}

static enum err_code settle(void *self, struct store_settlement *const *items, size_t count,
                            struct err *err)
{
    (void)self;
    (void)err;
    const struct store_settlement *s = items[0];
    CHECK(count == 1 && s->request_count == 1 && s->usage.total_tokens == 12);
    CHECK(s->idempotency == (counts.has_idempotency_key ? STORE_KEY_DONE : STORE_KEY_NONE));
    CHECK(counts.needs_key ? strcmp(s->client_key_id, CLIENT_ID) == 0 : s->client_key_id == NULL);
    check_names(s->company_id, s->branch, s->requested_by);
    CHECK(s->trace_id == NULL || strspn(s->trace_id, "0123456789abcdef") == 32);
    counts.settled++;
    return items[0]->code = ERR_NONE;
}

static bool is_hash_of(const char *hash, const char *key)
{
    unsigned char digest[crypto_hash_sha256_BYTES];
    char text[STORE_HASH_SIZE];

    crypto_hash_sha256(digest, (const unsigned char *)key, strlen(key));
    sodium_bin2hex(text, sizeof text, digest, sizeof digest);
    return strcmp(hash, text) == 0;
}

static enum err_code client_key_find(void *self, const char *hash, struct store_client_key *key,
                                     struct err *err)
{
    (void)self;
    CHECK(strlen(hash) == STORE_HASH_SIZE - 1);
    if (is_hash_of(hash, ADMIN_KEY))
        *key = (struct store_client_key){.id = "ad", .is_admin = true};
    else if (is_hash_of(hash, CLIENT_KEY))
        *key = (struct store_client_key){.id = CLIENT_ID, .company_id = CLIENT_COMPANY};
    else
        return err_set(err, ERR_NO_SUCH_ROW, "no such client key");
    return ERR_NONE;
}

/* Two rows, where the page has room for them. */
static enum err_code query(void *self, enum store_view view, const struct store_filter *filter,
                           store_row *row, void *context, struct err *err)
{
    static const char *const names[] = {"LogID", "Message", "Secret"};
    struct store_value values[] = {{.type = STORE_INTEGER, .integer = 9},
                                   {.type = STORE_TEXT, .text = "=1+1 \"\r\n"},
                                   {.type = STORE_TEXT, .text = CLIENT_KEY}};

    (void)self;
    (void)err;
    CHECK(counts.brings_admin_key && filter->limit > 1 && view < VIEW_OUTBOX);
    counts.queried++;
    if (row(context, 3, names, values)) {
        values[0].integer = 8;
        row(context, 3, names, values);
    }
    return ERR_NONE;
}

static const struct store_driver driver = {.name = "double",
                                           .open = open_driver,
                                           .close = close_driver,
                                           .leaders = leaders,
                                           .ping = ping,
                                           .acquire = acquire,
                                           .settle = settle,
                                           .client_key_find = client_key_find,
                                           .query = query};

/* Of /metrics, whose thread asks when it likes: a store that is away, so that no query is its. */
static enum err_code no_ping(void *self, struct err *err)
{
    (void)self;
    return err_set(err, ERR_STORE_UNAVAILABLE, "away");
}

static const struct store_driver away = {.name = "away",
                                         .open = open_driver,
                                         .close = close_driver,
                                         .leaders = leaders,
                                         .ping = no_ping};

/* In gemini_call's place (the linker's --wrap). */
void __wrap_gemini_call(struct gemini_client *client, const struct gemini_call *call,
                        struct gemini_answer *answer);

void __wrap_gemini_call(struct gemini_client *client, const struct gemini_call *call,
                        struct gemini_answer *answer)
{
    static const char body[] =
        "{\"candidates\":[{\"content\":{\"parts\":[{\"text\":\"{\\\"currency\\\":\\\"EUR\\\"}\"}]},"
        "\"finishReason\":\"STOP\"}],\"usageMetadata\":{\"totalTokenCount\":12}}";

    (void)client;
    CHECK(call->file_len > 0 && strcmp(call->api_key, "key") == 0);
    CHECK(call->trace->state == NULL || fuzz_is_utf8(call->trace->state, strlen(call->trace->state)));
    counts.called++;
    gemini_read_answer(answer, 200, NULL, body, sizeof body - 1);
}

/* ---- the process ---- */

static char directory[] = "/tmp/fuzz_fastcgi.XXXXXX";
static char body_dir[sizeof directory + sizeof "/body"];

/* Directories before what stands in them. */
static const struct {
    const char *name, *content, *target; /* of a file; of a symbolic link; neither: a directory */
} places[] = {
    {"body", NULL, NULL},
    {"body/0000000001", FORM(USER_INSIDE), NULL},
    {"body/link", NULL, "../outside"},
    {"body/up", NULL, ".."},
    {"outside", FORM(USER_OUTSIDE), NULL},
};

#define PLACE_COUNT (sizeof places / sizeof *places)

static void in_directory(char path[64], const char *name)
{
    snprintf(path, 64, "%s/%s", directory, name);
}

static void remove_directory(void)
{
    char path[64];

    for (size_t i = PLACE_COUNT; i-- > 0;) {
        in_directory(path, places[i].name);
        remove(path);
    }
    rmdir(directory);
}

static void make_place(const char *path, const char *content, const char *target)
{
    if (content == NULL) {
        CHECK((target == NULL ? mkdir(path, 0700) : symlink(target, path)) == 0);
        return;
    }
    int fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && write(fd, content, strlen(content)) == (ssize_t)strlen(content));
    CHECK(close(fd) == 0);
}

static void make_directory(void)
{
    char path[64];

    CHECK(mkdtemp(directory) != NULL);
    atexit(remove_directory);
    for (size_t i = 0; i < PLACE_COUNT; i++) {
        in_directory(path, places[i].name);
        make_place(path, places[i].content, places[i].target);
    }
    snprintf(body_dir, sizeof body_dir, "%s/body", directory);
}

static struct config config;

static struct app *start(void)
{
    static char none[] = "", model[] = "model";
    config = (struct config){
        .server = {.threads = 1,
                   .company_share = 1,
                   .max_upload = UPLOAD_MAX,
                   .deadline_ms = 120000,
                   .state_dir = directory,
                   .runtime_dir = directory,
                   .body_file_dir = body_dir},
        .gemini = {.model = model, .schema_file = none, .timeout_ms = 55000},
        .retry = {.max_retries = 3, .max_delay_ms = 30000, .backoff_multiplier = 2},
        .store = {.query_timeout_ms = 5000},
        .seal = {.key_file = none}};
    static struct app app = {.config = &config};
    struct err err = {.message = ""};

    make_directory();
    signal(SIGPIPE, SIG_IGN);
    CHECK(connection_init(&err) == ERR_NONE);
    CHECK((app.schema = invoice_schema_load(&config, &err)) != NULL);
    CHECK((app.store = store_open_with(&driver, &config, &err)) != NULL);
    CHECK((app.share = share_new(1)) != NULL);
    CHECK((app.auth = auth_open(&config, app.store, &err)) != NULL);
    app.reader = app.store;
    struct store *nothing = store_open_with(&away, &config, &err);
    CHECK(nothing != NULL);
    app.gauges = gauges_start(nothing, nothing, GAUGES_WAIT_MS, GAUGES_SERVE_MS, &err);
    CHECK(app.gauges != NULL);
    return &app;
}

/* ---- the web server's side ---- */

enum { BEGIN_REQUEST = 1, END_REQUEST = 3, PARAMS = 4, STDIN = 5, STDOUT = 6 };

static void add_record(struct buf *out, int type, const void *content, size_t len)
{
    const unsigned char head[] = {
        1, (unsigned char)type, 0, 1, (unsigned char)(len >> 8), (unsigned char)len, 0, 0};

    buf_append(out, head, sizeof head);
    buf_append(out, content, len);
}

static void add_length(struct buf *out, size_t len)
{
    if (len > 127) {
        buf_append_char(out, (char)(len >> 24 | 0x80));
        buf_append_char(out, (char)(len >> 16));
        buf_append_char(out, (char)(len >> 8));
    }
    buf_append_char(out, (char)len);
}

static void add_pair(struct buf *out, const char *name, const char *pair_value)
{
    add_length(out, strlen(name));
    add_length(out, strlen(pair_value));
    buf_append_str(out, name);
    buf_append_str(out, pair_value);
}

/* The name of a file in the web server's directory. */
static void add_body_file(struct buf *out, const char *name, const char *path)
{
    struct buf whole;

    buf_init(&whole, SENT_MAX);
    buf_printf(&whole, "%s%s", body_dir, path);
    add_pair(out, name, buf_str(&whole));
    buf_reset(&whole);
}

/* In records of at most size bytes, and one without any. */
static void add_stream(struct buf *out, int type, const char *data, size_t len, size_t size)
{
    for (size_t done = 0; done < len; done += size)
        add_record(out, type, data + done, len - done < size ? len - done : size);
    add_record(out, type, NULL, 0);
}

/* The first line of that name; NULL: none. */
static const char *line_value(char *const *lines, size_t count, const char *name)
{
    size_t len = strlen(name);

    for (size_t i = 0; i < count; i++)
        if (strncmp(lines[i], name, len) == 0 && lines[i][len] == '=')
            return lines[i] + len + 1;
    return NULL;
}

struct sent {
    char *lines[32];
    size_t count;
    const uint8_t *body;
    size_t body_len;
};

/* What the lines say, as a stream. */
static void make_stream(struct buf *out, struct fuzz_input *input, struct sent *sent)
{
    static const char begin[] = {0, 1, 0, 0, 0, 0, 0, 0}; /* a responder; close the connection */
    size_t record = 1 + fuzz_byte(input) * 16u;
    struct buf params;

    while (sent->count < sizeof sent->lines / sizeof *sent->lines && input->left > 0) {
        char *line = fuzz_text(input, '\n');
        if (*line == '\0') {
            free(line);
            break;
        }
        sent->lines[sent->count++] = line;
    }
    buf_init(&params, SENT_MAX);
    for (size_t i = 0; i < sent->count; i++) {
        char *equals = strchr(sent->lines[i], '=');
        if (equals == NULL)
            continue;
        *equals = '\0';
        if (strcmp(sent->lines[i], "REQUEST_BODY_FILE") == 0 && equals[1] == '@')
            add_body_file(&params, sent->lines[i], equals + 2);
        else
            add_pair(&params, sent->lines[i], equals + 1);
        *equals = '=';
    }
    sent->body = input->at;
    sent->body_len = input->left;
    add_record(out, BEGIN_REQUEST, begin, sizeof begin);
    add_stream(out, PARAMS, params.data, params.len, record);
    add_stream(out, STDIN, (const char *)sent->body, sent->body_len, record);
    buf_reset(&params);
}

static void check_sent(const struct request *request, const struct sent *sent)
{
    const char *method = line_value(sent->lines, sent->count, "REQUEST_METHOD");
    const char *type = line_value(sent->lines, sent->count, "CONTENT_TYPE");
    const char *length = line_value(sent->lines, sent->count, "CONTENT_LENGTH");
    const char *uri = line_value(sent->lines, sent->count, "DOCUMENT_URI");

    CHECK(strcmp(request->method, method == NULL ? "" : method) == 0);
    CHECK(strcmp(request->content_type, type == NULL ? "" : type) == 0);
    CHECK(length != NULL || request->content_length == -1);
    if (length != NULL && strspn(length, "0123456789") == strlen(length) && *length != '\0' &&
        strlen(length) < 18)
        CHECK(request->content_length == strtoll(length, NULL, 10));
    else
        CHECK(request->content_length == -1 || strlen(length) >= 18);
    if (uri != NULL && *uri != '\0')
        CHECK(strncmp(request->path, uri, strlen(request->path)) == 0);
}

/* ---- the answer ---- */

static void read_all(int fd, struct buf *out)
{
    char block[4096];
    ssize_t n;

    while ((n = read(fd, block, sizeof block)) > 0)
        buf_append(out, block, (size_t)n);
}

/* What the records hold on stdout; behind it the request must end. Other requests that were begun on the
 * connection are refused with an end of their own. */
static void read_records(const struct buf *in, struct buf *out)
{
    int request = -1;
    bool ended = false;

    for (size_t at = 0; at < in->len;) {
        const unsigned char *head = (const unsigned char *)in->data + at;
        CHECK(in->len - at >= 8 && head[0] == 1);
        size_t len = (size_t)(head[4] << 8 | head[5]);
        int id = head[2] << 8 | head[3];
        CHECK(in->len - at >= 8 + len + head[6]);
        if (request == -1 && head[1] == STDOUT)
            request = id;
        CHECK(!ended || id != request);
        if (id == request && head[1] == STDOUT)
            buf_append(out, head + 8, len);
        ended = ended || (id == request && head[1] == END_REQUEST);
        at += 8 + len + head[6];
    }
    CHECK(ended);
}

static void check_json(const char *type, const char *body, size_t len)
{
    struct json_object *answer, *id = NULL;

    if (strstr(type, "json") == NULL)
        return;
    answer = fuzz_parse_own(body, len);
    CHECK(json_object_is_type(answer, json_type_object));
    if (json_object_object_get_ex(answer, "request_id", &id))
        CHECK(json_object_get_string_len(id) == UUID_TEXT_SIZE - 1);
    json_object_put(answer);
}

static void check_answer(const struct buf *answer)
{
    static const char *const names[] = {"Status",        "Content-Type",     "Content-Length",
                                        "X-Request-ID",  "Retry-After",      "Allow",
                                        "Cache-Control", "WWW-Authenticate", "Content-Disposition",
                                        "X-Next-Cursor", NULL};
    char *head = strdup(buf_str(answer)), *end = strstr(head, "\r\n\r\n"), *type = NULL, *next;
    long length = -1;

    CHECK(end != NULL && strncmp(head, "Status: ", 8) == 0);
    const char *body = answer->data + (end - head) + 4;
    end[2] = '\0';
    for (char *line = head; (next = strstr(line, "\r\n")) != NULL; line = next + 2) {
        *next = '\0';
        size_t n = strcspn(line, ":"), k = 0;
        CHECK(line[n] == ':' && fuzz_is_line(line));
        while (names[k] != NULL && (strlen(names[k]) != n || strncmp(names[k], line, n) != 0))
            k++;
        CHECK(names[k] != NULL);
        if (k == 1)
            type = line;
        if (k == 2)
            length = strtol(line + n + 1, NULL, 10);
    }
    size_t body_len = answer->len - (size_t)(body - answer->data);
    CHECK(length >= 0 && (size_t)length == body_len && type != NULL);
    check_json(type, body, body_len);
    free(head);
}

/* ---- a request ---- */

static void serve(struct app *app, struct connection *c)
{
    struct worker worker = {.app = app};
    struct response response;

    counts.acquired = counts.called = counts.settled = counts.queried = 0;
    counts.has_idempotency_key = false;
    config.auth.mode = counts.needs_key ? AUTH_BEARER : AUTH_NONE;
    counts.is_from_file = c->request.body_file[0] != '\0';
    response_init(&response);
    if (route_lane(&c->request) == ROUTE_WORKER) {
        route_work(&worker, &c->request, &response);
        CHECK(c->request.authorization[0] == '\0'); /* wiped */
    } else {
        route_other(app, &c->request, &response);
        CHECK(counts.queried == 0 || response.status == 200);
        CHECK(counts.queried == 0 || c->request.authorization[0] == '\0');
    }
    CHECK(response.status >= 200 && response.status < 600);
    CHECK(counts.called == counts.settled && counts.called == counts.acquired);
    CHECK((response.status == 200) >= (counts.called == 1));
    connection_answer(c, &response);
}

static void exchange(struct app *app, const char *data, size_t len, const struct sent *sent)
{
    struct connection c = {.fd = -1};
    struct buf received, answer;
    int pair[2];

    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    CHECK(len == 0 || send(pair[0], data, len, MSG_DONTWAIT) == (ssize_t)len);
    shutdown(pair[0], SHUT_WR);
    c.fd = pair[1];
    if (connection_read_head(&c)) {
        if (sent != NULL)
            check_sent(&c.request, sent);
        serve(app, &c); /* closes */
        buf_init(&received, 1 << 20);
        buf_init(&answer, 1 << 20);
        read_all(pair[0], &received);
        read_records(&received, &answer);
        check_answer(&answer);
        CHECK(memmem(answer.data, answer.len, CLIENT_KEY, strlen(CLIENT_KEY)) == NULL);
        CHECK(memmem(answer.data, answer.len, ADMIN_KEY, strlen(ADMIN_KEY)) == NULL);
        buf_reset(&answer);
        buf_reset(&received);
    } else {
        CHECK(sent == NULL);
    }
    close(pair[0]);
}

/* ---- what libfcgi does not stand ---- */

/* The bytes of all parameters' records, one after the other. */
struct params {
    unsigned char *at[SENT_MAX];
    size_t count;
};

/* Makes lengths of 2^24 and more smaller: the first of their four bytes is left with its mark. */
static size_t mend_length(const struct params *p, size_t i, size_t *length)
{
    *length = i < p->count ? *p->at[i] : 0;
    if (*length < 0x80)
        return i + 1;
    *p->at[i] = 0x80;
    *length = 0;
    for (size_t k = 1; k < 4 && i + k < p->count; k++)
        *length = *length << 8 | *p->at[i + k];
    return i + 4;
}

/* In place. No record is a management record (request 0), and all parameters are delivered: those of one
 * request, without a record of another one before them that is empty, behind which libfcgi skips, and
 * without padding where it forgets to skip it. */
static void mend(unsigned char *data, size_t size)
{
    static struct params params;

    params.count = 0;
    for (size_t at = 0; size - at >= 8;) {
        unsigned char *head = data + at;
        size_t len = (size_t)(head[4] << 8 | head[5]);
        if (head[1] == PARAMS || len == 0 || (head[2] == 0 && head[3] == 0)) {
            head[2] = 0;
            head[3] = 1;
        }
        if (head[1] == BEGIN_REQUEST || len == 0)
            head[6] = 0;
        at += 8;
        if (len > size - at)
            len = size - at;
        for (size_t i = 0; head[1] == PARAMS && i < len; i++)
            params.at[params.count++] = data + at + i;
        at += len;
        at += head[6] < size - at ? head[6] : size - at;
    }
    for (size_t i = 0, name, text; i < params.count;) {
        i = mend_length(&params, i, &name);
        i = mend_length(&params, i, &text);
        i += name + text;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct app *app;
    struct fuzz_input input = {data, size};
    struct sent sent = {.count = 0};
    struct buf stream;

    if (app == NULL)
        app = start();
    fuzz_check_log();
    if (size > SENT_MAX / 4)
        return 0;
    buf_init(&stream, 4 * SENT_MAX);
    if (size == 0 || data[0] == 1) {
        buf_append(&stream, data, size);
        mend((unsigned char *)stream.data, size);
        counts.needs_key = size % 2 == 1;
        counts.brings_key = counts.brings_admin_key = true; /* perhaps: records can cut them */
        exchange(app, stream.data, size, NULL);
        buf_reset(&stream);
        return 0;
    }
    counts.needs_key = data[0] % 2 == 1;
    counts.brings_key = memmem(data, size, CLIENT_KEY, strlen(CLIENT_KEY)) != NULL;
    counts.brings_admin_key = memmem(data, size, ADMIN_KEY, strlen(ADMIN_KEY)) != NULL;
    make_stream(&stream, &input, &sent);
    CHECK(buf_ok(&stream));
    if (stream.len <= SENT_MAX)
        exchange(app, stream.data, stream.len, &sent);
    buf_reset(&stream);
    for (size_t i = 0; i < sent.count; i++)
        free(sent.lines[i]);
    return 0;
}
