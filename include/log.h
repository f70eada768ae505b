/* log.h - log entries, from anywhere in the program.
 *
 * log_write makes an entry and gives it to the sink: the recorder once it runs (record.h, which
 * writes to ApplicationLogs in the background), standard error before, after and instead. Messages
 * are escaped here, once. No entry ever holds an API key, invoice content or a file's name. */
#ifndef EXTRACT_LOG_H
#define EXTRACT_LOG_H

#include <stdint.h>

#include "err.h"

enum log_level { LOG_DEBUG, LOG_INFO, LOG_WARNING, LOG_ERROR, LOG_CRITICAL };

/* One row of ApplicationLogs. One allocation: the strings lie behind the struct. */
struct log_entry {
    int64_t wall_ms;
    enum log_level level;
    const char *logger;    /* module: "gemini" */
    const char *message;   /* escaped, one line */
    const char *exception; /* the whole cause chain, escaped; NULL without one */
    const char *module;    /* file: "gemini.c" */
    const char *function;
    int line;
    const char *request_id; /* NULL outside a request */
    const char *trace_id;   /* in the entry that ends a request: of its trace; NULL: none */
};

/* Takes the entry over: it frees it with free() when done. Called from any thread; must not log. */
typedef void log_sink(struct log_entry *take_entry, void *context);

/* Before any thread is started. */
void log_set_level(enum log_level level);
/* sink NULL: standard error. Once it returns, nobody is inside the sink before any more. */
void log_set_sink(log_sink *sink, void *context);

const char *log_level_name(enum log_level level) __attribute__((returns_nonnull));

/* One line on standard error, in one write. */
void log_to_stderr(const struct log_entry *entry);

/* exception, request_id and trace_id may be NULL. The message is cut at 4,000 bytes, the exception at
 * 16,000. */
void log_write(enum log_level level, const char *file, int line, const char *function,
               const char *request_id, const char *trace_id, const char *exception,
               const char *format, ...) PRINTF_LIKE(8, 9);

/* The entry that log_write would give to the sink, whatever the level: for sinks that have something
 * to say themselves. The caller's, to free(). NULL without memory. */
struct log_entry *log_entry_new(enum log_level level, const char *file, int line,
                                const char *function, const char *request_id, const char *exception,
                                const char *format, ...) PRINTF_LIKE(7, 8);

#define LOG_TRACED(level, request_id, trace_id, exception, ...)                             \
    log_write((level), __FILE__, __LINE__, __func__, (request_id), (trace_id), (exception), \
              __VA_ARGS__)
#define LOG_AT(level, request_id, exception, ...) \
    LOG_TRACED((level), (request_id), NULL, (exception), __VA_ARGS__)
#define log_debug(request_id, ...) LOG_AT(LOG_DEBUG, request_id, NULL, __VA_ARGS__)
#define log_info(request_id, ...) LOG_AT(LOG_INFO, request_id, NULL, __VA_ARGS__)
#define log_warning(request_id, exception, ...) \
    LOG_AT(LOG_WARNING, request_id, exception, __VA_ARGS__)
#define log_error(request_id, exception, ...) LOG_AT(LOG_ERROR, request_id, exception, __VA_ARGS__)
#define log_critical(request_id, exception, ...) \
    LOG_AT(LOG_CRITICAL, request_id, exception, __VA_ARGS__)

/* This host's name, read once at start. Borrowed. */
const char *log_host(void) __attribute__((returns_nonnull));

#endif
