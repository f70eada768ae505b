/* err.h - what can go wrong, and what a client is told about it.
 *
 * Every fallible function returns an enum err_code or fills a caller's struct err. The code alone
 * decides the HTTP status, the title, whether a retry makes sense and the default Retry-After: one
 * table in err.c, which is the contract's table of errors. */
#ifndef EXTRACT_ERR_H
#define EXTRACT_ERR_H

#include <stdbool.h>
#include <stddef.h>

#define MUST_CHECK __attribute__((warn_unused_result))
#define PRINTF_LIKE(text, first) __attribute__((format(printf, text, first)))

enum err_code {
    ERR_NONE = 0,
    /* what a client may be told */
    ERR_TOKEN_EXPIRED,
    ERR_TOKEN_UNAVAILABLE,
    ERR_NO_ACTIVE_TOKEN,
    ERR_INVALID_FILE,
    ERR_UNSUPPORTED_MEDIA_TYPE,
    ERR_BAD_REQUEST,
    ERR_FILE_TOO_LARGE,
    ERR_UNAUTHENTICATED,
    ERR_FORBIDDEN,
    ERR_REQUEST_IN_PROGRESS,
    ERR_ALREADY_PROCESSED,
    ERR_RATE_LIMITED,
    ERR_UPSTREAM_UNAVAILABLE,
    ERR_UPSTREAM_REJECTED,
    ERR_INVALID_ANSWER,
    ERR_UPSTREAM_RATE_LIMITED,
    ERR_TOKEN_BUSY,
    ERR_DEADLINE_EXCEEDED,
    ERR_STORE_UNAVAILABLE,
    ERR_STORAGE_FULL,
    ERR_OVERLOADED,
    ERR_INTERNAL,
    ERR_NOT_FOUND,
    ERR_METHOD_NOT_ALLOWED,
    /* what only an administrator meets (exit codes and messages, never HTTP) */
    ERR_CONFIG,      /* the configuration is wrong: message says where */
    ERR_NO_SUCH_ROW, /* the row named does not exist */
    ERR_BAD_VALUE,   /* the store refuses the data itself: trying again cannot help */
    ERR_SCHEMA,      /* schema missing, older or newer than this program understands */
    ERR_CODE_COUNT
};

struct err {
    enum err_code code;
    char message[512]; /* for people; one line, never a secret, a path's content or SQL data */
};

/* What follows from a code. */
struct err_info {
    const char *name;   /* "token_expired" */
    int status;         /* HTTP status */
    const char *title;  /* problem+json title */
    const char *detail; /* problem+json detail unless the error brings its own message */
    bool retryable;     /* may the same request succeed later, as it is? */
    int retry_after_s;  /* default Retry-After in seconds; 0: none */
};

/* The row of the table for code; ERR_INTERNAL's for a code without one. */
const struct err_info *err_info(enum err_code code) __attribute__((returns_nonnull));

/* What a client is told of a code that only an administrator meets; any other code as it is. */
enum err_code err_for_client(enum err_code code);

/* Sets code and message (printf-like, cut to fit) and returns code. err may be NULL. */
enum err_code err_set(struct err *err, enum err_code code, const char *format, ...)
    PRINTF_LIKE(3, 4);

/* Puts "format: " before the message that is there: a cause chain, outermost first. Returns its code,
 * which it keeps; err may be NULL (ERR_INTERNAL). */
enum err_code err_prefix(struct err *err, const char *format, ...) PRINTF_LIKE(2, 3);

#endif
