/* log.c - log entries: made and escaped once, then given to the sink. See log.h.
 *
 * An entry is one allocation, so that a sink can pass it between threads and free it in one go. The
 * sink is guarded by a lock that callers share: log_set_sink can promise that nobody is left inside
 * the sink before, which may then be taken apart. Where there is no memory for an entry, a line
 * without the message still says where it came from. */
#include "log.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "buf.h"
#include "clock.h"
#include "text.h"

#define MESSAGE_MAX 4000    /* bytes, escaped */
#define EXCEPTION_MAX 16000 /* bytes, escaped */
#define ESCAPED_BYTE_MAX 4  /* "\x1B" */
#define HOST_SIZE 256

static _Atomic int min_level = LOG_INFO;
static pthread_rwlock_t sink_lock = PTHREAD_RWLOCK_INITIALIZER;
static log_sink *the_sink;
static void *the_context;
static pthread_once_t host_once = PTHREAD_ONCE_INIT;
static char host[HOST_SIZE];

static void read_host(void)
{
    if (gethostname(host, sizeof host - 1) != 0 || host[0] == '\0')
        snprintf(host, sizeof host, "localhost");
}

const char *log_host(void)
{
    pthread_once(&host_once, read_host);
    return host;
}

void log_set_level(enum log_level level)
{
    atomic_store_explicit(&min_level, (int)level, memory_order_relaxed);
}

void log_set_sink(log_sink *sink, void *context)
{
    pthread_rwlock_wrlock(&sink_lock);
    the_sink = sink;
    the_context = context;
    pthread_rwlock_unlock(&sink_lock);
}

const char *log_level_name(enum log_level level)
{
    static const char *const names[] = {"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"};
    return names[level < LOG_DEBUG ? LOG_DEBUG : level > LOG_CRITICAL ? LOG_CRITICAL : level];
}

void log_to_stderr(const struct log_entry *entry)
{
    char line[MESSAGE_MAX + EXCEPTION_MAX + 1024];
    char when[CLOCK_TEXT_SIZE];
    const char *id = entry->request_id;
    const char *why = entry->exception;

    clock_format(entry->wall_ms, when);
    int n = snprintf(line, sizeof line, "%s %s %s %s:%d %s%s%s%s %s%s%s\n", when,
                     log_level_name(entry->level), entry->logger, entry->module, entry->line,
                     entry->function, id != NULL ? " [" : "", id != NULL ? id : "",
                     id != NULL ? "]" : "", entry->message, why != NULL ? ": " : "",
                     why != NULL ? why : "");
    if (n < 0)
        return;
    size_t len = (size_t)n;
    if (len >= sizeof line) {
        len = sizeof line - 1;
        line[len - 1] = '\n';
    }
    /* One write: lines of several processes must not mix. What a broken pipe does not take is lost. */
    while (write(STDERR_FILENO, line, len) < 0 && errno == EINTR)
        ;
}

/* How much of escaped text fits into max bytes without cutting a character or an escape. */
static size_t fitting(const char *s, size_t len, size_t max)
{
    size_t fits = 0;

    while (fits < len) {
        unsigned char c = (unsigned char)s[fits];
        size_t unit = 1;
        if (c == '\\')
            unit = s[fits + 1] == 'x' ? ESCAPED_BYTE_MAX : 2;
        else if (c >= 0xC0)
            unit = c >= 0xF0 ? 4 : c >= 0xE0 ? 3 : 2;
        if (unit > max - fits)
            break;
        fits += unit;
    }
    return fits;
}

/* Appends s, escaped and cut at max bytes, and its NUL. */
static void append_escaped(struct buf *b, const char *s, size_t max)
{
    struct buf escaped;

    buf_init(&escaped, ESCAPED_BYTE_MAX * (max + 1));
    text_escape(&escaped, s, strnlen(s, max + 1));
    b->failed = b->failed || !buf_ok(&escaped);
    buf_append(b, buf_str(&escaped), fitting(buf_str(&escaped), escaped.len, max));
    buf_append_char(b, '\0');
    buf_reset(&escaped);
}

static void append_text(struct buf *b, const char *s)
{
    buf_append(b, s, strlen(s) + 1);
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash == NULL ? path : slash + 1;
}

/* The string at *at, which moves behind it. */
static const char *next_string(const char **at)
{
    const char *s = *at;
    *at += strlen(s) + 1;
    return s;
}

PRINTF_LIKE(8, 0)
static struct log_entry *make_entry(enum log_level level, const char *file, int line,
                                    const char *function, const char *request_id,
                                    const char *trace_id, const char *exception, const char *format,
                                    va_list args)
{
    char message[MESSAGE_MAX + 2]; /* one byte more than fits: a character cut here is cut again */
    const char *module = base_name(file);
    struct log_entry *entry = NULL;
    struct buf text;

    buf_init(&text, MESSAGE_MAX + EXCEPTION_MAX + 4096);
    if (vsnprintf(message, sizeof message, format, args) < 0)
        snprintf(message, sizeof message, "(a message that cannot be formatted)");
    buf_append(&text, module, strcspn(module, "."));
    buf_append_char(&text, '\0');
    append_text(&text, module);
    append_text(&text, function);
    append_escaped(&text, message, MESSAGE_MAX);
    if (request_id != NULL)
        append_text(&text, request_id);
    if (trace_id != NULL)
        append_text(&text, trace_id);
    if (exception != NULL)
        append_escaped(&text, exception, EXCEPTION_MAX);
    if (!buf_ok(&text))
        goto out;

    entry = malloc(sizeof *entry + text.len);
    if (entry == NULL)
        goto out;
    memcpy(entry + 1, text.data, text.len);
    const char *at = (const char *)(entry + 1);
    *entry = (struct log_entry){.wall_ms = clock_wall_ms(), .level = level, .line = line};
    entry->logger = next_string(&at);
    entry->module = next_string(&at);
    entry->function = next_string(&at);
    entry->message = next_string(&at);
    if (request_id != NULL)
        entry->request_id = next_string(&at);
    if (trace_id != NULL)
        entry->trace_id = next_string(&at);
    if (exception != NULL)
        entry->exception = next_string(&at);
out:
    buf_reset(&text);
    return entry;
}

struct log_entry *log_entry_new(enum log_level level, const char *file, int line,
                                const char *function, const char *request_id, const char *exception,
                                const char *format, ...)
{
    va_list args;

    va_start(args, format);
    struct log_entry *entry =
        make_entry(level, file, line, function, request_id, NULL, exception, format, args);
    va_end(args);
    return entry;
}

/* What is left to say where an entry finds no memory. */
static void say_without_memory(enum log_level level, const char *file, int line,
                               const char *function, const char *request_id)
{
    struct log_entry entry = {.wall_ms = clock_wall_ms(),
                              .level = level,
                              .logger = "log",
                              .message = "(no memory for this entry's message)",
                              .module = base_name(file),
                              .function = function,
                              .line = line,
                              .request_id = request_id};
    log_to_stderr(&entry);
}

void log_write(enum log_level level, const char *file, int line, const char *function,
               const char *request_id, const char *trace_id, const char *exception,
               const char *format, ...)
{
    va_list args;

    if ((int)level < atomic_load_explicit(&min_level, memory_order_relaxed))
        return;
    va_start(args, format);
    struct log_entry *entry =
        make_entry(level, file, line, function, request_id, trace_id, exception, format, args);
    va_end(args);
    if (entry == NULL) {
        say_without_memory(level, file, line, function, request_id);
        return;
    }
    pthread_rwlock_rdlock(&sink_lock);
    if (the_sink != NULL) {
        the_sink(entry, the_context);
        entry = NULL;
    } else {
        log_to_stderr(entry);
    }
    pthread_rwlock_unlock(&sink_lock);
    free(entry);
}
