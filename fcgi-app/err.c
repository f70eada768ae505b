/* err.c - the table of errors: what a client is told, and whether it may try again. */
#include "err.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define FAILED "Failed to process invoice"

/* The contract's table of errors, one row a code: name, HTTP status, the status's own phrase (RFC 9457
 * section 4.2.1), detail, retryable, Retry-After in seconds. */
static const struct err_info table[ERR_CODE_COUNT] = {
    [ERR_NONE] = {"success", 200, "OK", "", false, 0},
    [ERR_TOKEN_EXPIRED] = {"token_expired", 403, "Forbidden",
                           "Your AI token has expired. Please renew your subscription.", false, 0},
    [ERR_TOKEN_UNAVAILABLE] = {"token_unavailable", 403, "Forbidden",
                               "Your AI token is no longer available or has been disabled. "
                               "Please contact support.",
                               false, 0},
    [ERR_NO_ACTIVE_TOKEN] = {"no_active_token", 403, "Forbidden",
                             "No active token found for your company. Please contact support.",
                             false, 0},
    [ERR_INVALID_FILE] = {"invalid_file", 422, "Unprocessable Content", FAILED, false, 0},
    [ERR_UNSUPPORTED_MEDIA_TYPE] = {"unsupported_media_type", 415, "Unsupported Media Type", FAILED,
                                    false, 0},
    [ERR_BAD_REQUEST] = {"bad_request", 400, "Bad Request", "The request is malformed.", false, 0},
    [ERR_FILE_TOO_LARGE] = {"file_too_large", 413, "Content Too Large", "The upload is too large.",
                            false, 0},
    [ERR_UNAUTHENTICATED] = {"unauthenticated", 401, "Unauthorized",
                             "A valid client key is required.", false, 0},
    [ERR_FORBIDDEN] = {"forbidden", 403, "Forbidden",
                       "The client key does not belong to this company.", false, 0},
    [ERR_REQUEST_IN_PROGRESS] = {"request_in_progress", 409, "Conflict",
                                 "A request with this Idempotency-Key is in progress.", true, 0},
    [ERR_ALREADY_PROCESSED] = {"already_processed", 409, "Conflict",
                               "A request with this Idempotency-Key was processed already.", false,
                               0},
    [ERR_RATE_LIMITED] = {"rate_limited", 429, "Too Many Requests",
                          "Too many requests. Please try again later.", true, 5},
    [ERR_UPSTREAM_UNAVAILABLE] = {"upstream_unavailable", 502, "Bad Gateway", FAILED, true, 30},
    [ERR_UPSTREAM_REJECTED] = {"upstream_rejected", 502, "Bad Gateway", FAILED, false, 0},
    [ERR_INVALID_ANSWER] = {"invalid_answer", 502, "Bad Gateway", FAILED, true, 0},
    [ERR_UPSTREAM_RATE_LIMITED] = {"upstream_rate_limited", 503, "Service Unavailable",
                                   "All AI tokens of your company are at their rate limit. "
                                   "Please try again later.",
                                   true, 60},
    [ERR_TOKEN_BUSY] = {"token_busy", 503, "Service Unavailable",
                        "The rest of your token's limit is held by requests in progress. "
                        "Please try again shortly.",
                        true, 10},
    [ERR_DEADLINE_EXCEEDED] = {"deadline_exceeded", 504, "Gateway Timeout",
                               "The request took longer than its deadline allows.", true, 0},
    [ERR_STORE_UNAVAILABLE] = {"store_unavailable", 503, "Service Unavailable",
                               "The token store cannot be reached. Please try again later.", true,
                               10},
    [ERR_STORAGE_FULL] = {"storage_full", 503, "Service Unavailable",
                          "Usage cannot be recorded at the moment. Please try again later.", true,
                          60},
    [ERR_OVERLOADED] = {"overloaded", 503, "Service Unavailable",
                        "The service is busy. Please try again shortly.", true, 5},
    [ERR_INTERNAL] = {"internal_error", 500, "Internal Server Error", "An internal error occurred.",
                      false, 0},
    [ERR_NOT_FOUND] = {"not_found", 404, "Not Found", "There is nothing at this path.", false, 0},
    [ERR_METHOD_NOT_ALLOWED] = {"method_not_allowed", 405, "Method Not Allowed",
                                "This path does not support the method.", false, 0},
    [ERR_CONFIG] = {"config", 500, "Internal Server Error", "The configuration is wrong.", false,
                    0},
    [ERR_NO_SUCH_ROW] = {"no_such_row", 500, "Internal Server Error", "There is no such row.",
                         false, 0},
    [ERR_BAD_VALUE] = {"bad_value", 500, "Internal Server Error", "The store refuses the value.",
                       false, 0},
    [ERR_SCHEMA] = {"schema", 503, "Service Unavailable", "The schema does not fit this program.",
                    false, 0},
};

const struct err_info *err_info(enum err_code code)
{
    if ((int)code < 0 || code >= ERR_CODE_COUNT || table[code].name == NULL)
        code = ERR_INTERNAL;
    return &table[code];
}

enum err_code err_for_client(enum err_code code)
{
    if (code == ERR_SCHEMA)
        return ERR_STORE_UNAVAILABLE;
    return code > ERR_METHOD_NOT_ALLOWED ? ERR_INTERNAL : code;
}

enum err_code err_set(struct err *err, enum err_code code, const char *format, ...)
{
    if (err != NULL) {
        va_list args;
        va_start(args, format);
        vsnprintf(err->message, sizeof err->message, format, args);
        va_end(args);
        err->code = code;
    }
    return code;
}

enum err_code err_prefix(struct err *err, const char *format, ...)
{
    char prefix[sizeof err->message];
    char whole[2 * sizeof err->message + 2];
    va_list args;

    if (err == NULL)
        return ERR_INTERNAL;
    va_start(args, format);
    vsnprintf(prefix, sizeof prefix, format, args);
    va_end(args);
    snprintf(whole, sizeof whole, "%s: %s", prefix, err->message);
    memcpy(err->message, whole, sizeof err->message - 1);
    err->message[sizeof err->message - 1] = '\0';
    return err->code;
}
