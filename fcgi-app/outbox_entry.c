/* outbox_entry.c - what the outbox keeps, as JSON. See outbox_entry.h.
 *
 * A table for each kind of record says which members are kept, under which names. A name is for ever:
 * entries of an older version must still be read. */
#include "outbox_entry.h"

#include <limits.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

enum field_type {
    FIELD_TEXT,
    FIELD_INT,
    FIELD_INT64,
    FIELD_NEW_INT, /* one that entries of older versions lack: 0 */
    FIELD_CHARS,   /* text within the record */
    FIELD_BOOL
};

struct field {
    const char *name;
    enum field_type type;
    size_t offset;
    size_t size; /* FIELD_CHARS: with NUL */
};

_Static_assert(sizeof(enum log_level) == sizeof(int) && sizeof(enum store_fault) == sizeof(int) &&
                   sizeof(enum store_idempotency) == sizeof(int),
               "an enum is read and written as an int");

#define COUNT(array) (sizeof(array) / sizeof(array)[0])
#define FIELD(record, name, type, member)              \
    {                                                  \
        name, type, offsetof(struct record, member), 0 \
    }
#define SETTLEMENT(name, type, member) FIELD(store_settlement, name, type, member)
#define RESERVATION(name, type, member) FIELD(store_acquire, name, type, member)
#define LOG(name, type, member) FIELD(log_entry, name, type, member)
#define ATTEMPT(name, type, member) FIELD(store_retry_attempt, name, type, member)
#define ATTEMPT_TEXT(name, member)                                       \
    {                                                                    \
        name, FIELD_CHARS, offsetof(struct store_retry_attempt, member), \
            sizeof(((struct store_retry_attempt *)0)->member)            \
    }

static const struct field settlement_fields[] = {
    SETTLEMENT("request_id", FIELD_TEXT, request_id),
    SETTLEMENT("token_id", FIELD_INT64, token_id),
    SETTLEMENT("company_id", FIELD_TEXT, company_id),
    SETTLEMENT("branch", FIELD_TEXT, branch),
    SETTLEMENT("requested_by", FIELD_TEXT, requested_by),
    SETTLEMENT("client_key_id", FIELD_TEXT, client_key_id),
    SETTLEMENT("token_source", FIELD_TEXT, token_source),
    SETTLEMENT("model", FIELD_TEXT, model),
    SETTLEMENT("input_tokens", FIELD_INT64, usage.input_tokens),
    SETTLEMENT("output_tokens", FIELD_INT64, usage.output_tokens),
    SETTLEMENT("text_prompt_tokens", FIELD_INT64, usage.text_prompt_tokens),
    SETTLEMENT("image_prompt_tokens", FIELD_INT64, usage.image_prompt_tokens),
    SETTLEMENT("text_candidates_tokens", FIELD_INT64, usage.text_candidates_tokens),
    SETTLEMENT("thoughts_tokens", FIELD_INT64, usage.thoughts_tokens),
    SETTLEMENT("cached_tokens", FIELD_INT64, usage.cached_tokens),
    SETTLEMENT("total_tokens", FIELD_INT64, usage.total_tokens),
    SETTLEMENT("request_count", FIELD_INT, request_count),
    SETTLEMENT("unknown_calls", FIELD_INT, unknown_calls),
    SETTLEMENT("duration_ms", FIELD_INT64, duration_ms),
    SETTLEMENT("logged_ms", FIELD_INT64, logged_ms),
    SETTLEMENT("fault", FIELD_INT, fault.fault),
    SETTLEMENT("fault_cooldown_ms", FIELD_INT64, fault.cooldown_ms),
    SETTLEMENT("fault_reason", FIELD_TEXT, fault.reason),
    SETTLEMENT("idempotency", FIELD_NEW_INT, idempotency),
    SETTLEMENT("release_sequence", FIELD_NEW_INT, release_sequence),
    SETTLEMENT("trace_id", FIELD_TEXT, trace_id),
};

static const struct field reservation_fields[] = {
    RESERVATION("request_id", FIELD_TEXT, request_id),
    RESERVATION("sequence", FIELD_INT, sequence),
    RESERVATION("company_id", FIELD_TEXT, company_id),
    RESERVATION("branch", FIELD_TEXT, branch),
    RESERVATION("requested_by", FIELD_TEXT, requested_by),
    RESERVATION("estimate_tokens", FIELD_INT64, estimate_tokens),
    RESERVATION("expires_ms", FIELD_INT64, expires_ms),
    RESERVATION("idempotency_key", FIELD_TEXT, idempotency_key),
};

static const struct field log_fields[] = {
    LOG("wall_ms", FIELD_INT64, wall_ms),      LOG("level", FIELD_INT, level),
    LOG("logger", FIELD_TEXT, logger),         LOG("message", FIELD_TEXT, message),
    LOG("exception", FIELD_TEXT, exception),   LOG("module", FIELD_TEXT, module),
    LOG("function", FIELD_TEXT, function),     LOG("line", FIELD_INT, line),
    LOG("request_id", FIELD_TEXT, request_id), LOG("trace_id", FIELD_TEXT, trace_id)};

static const struct field attempt_fields[] = {
    ATTEMPT("token_id", FIELD_INT64, token_id),
    ATTEMPT("wall_ms", FIELD_INT64, wall_ms),
    ATTEMPT("attempt", FIELD_INT, attempt),
    ATTEMPT("is_retryable", FIELD_BOOL, is_retryable),
    ATTEMPT("status_code", FIELD_INT, status_code),
    ATTEMPT("delay_ms", FIELD_INT64, delay_ms),
    ATTEMPT_TEXT("request_id", request_id),
    ATTEMPT_TEXT("company_id", company_id),
    ATTEMPT_TEXT("error_message", error_message),
};

/* memcpy: what lies at an offset is read by its type, not by a cast of the record's. */
static void write_field(struct buf *out, const struct field *field, const void *record)
{
    const char *at = (const char *)record + field->offset;
    const char *text;
    int64_t number;
    int small;
    bool yes;

    switch (field->type) {
    case FIELD_CHARS:
        buf_append_json(out, at, strlen(at));
        break;
    case FIELD_BOOL:
        memcpy(&yes, at, sizeof yes);
        buf_append_str(out, yes ? "1" : "0");
        break;
    case FIELD_TEXT:
        memcpy(&text, at, sizeof text);
        buf_append_json(out, text, text == NULL ? 0 : strlen(text));
        break;
    case FIELD_INT:
    case FIELD_NEW_INT:
        memcpy(&small, at, sizeof small);
        buf_printf(out, "%d", small);
        break;
    case FIELD_INT64:
        memcpy(&number, at, sizeof number);
        buf_printf(out, "%lld", (long long)number);
        break;
    }
}

static void write_record(struct buf *out, const struct field *fields, size_t count,
                         const void *record)
{
    for (size_t i = 0; i < count; i++) {
        buf_printf(out, "%s\"%s\": ", i == 0 ? "{" : ", ", fields[i].name);
        write_field(out, &fields[i], record);
    }
    buf_append_char(out, '}');
}

#define WRITE(out, fields, record) write_record((out), (fields), COUNT(fields), (record))
#define READ(json, fields, record) read_record((json), (fields), COUNT(fields), (record))

void entry_write_settlement(struct buf *out, const struct store_settlement *settlement)
{
    WRITE(out, settlement_fields, settlement);
}

void entry_write_reservation(struct buf *out, const struct store_acquire *reservation)
{
    WRITE(out, reservation_fields, reservation);
}

void entry_write_log(struct buf *out, const struct log_entry *entry)
{
    WRITE(out, log_fields, entry);
}

void entry_write_attempt(struct buf *out, const struct store_retry_attempt *attempt)
{
    WRITE(out, attempt_fields, attempt);
}

/* Pointers to text are to the JSON object's. False: the value has another type than the field. */
static bool read_text(struct json_object *value, const struct field *field, char *at)
{
    const char *text = json_object_get_string(value);

    if (!json_object_is_type(value, json_type_string) ||
        strlen(text) != (size_t)json_object_get_string_len(value)) /* no \u0000 */
        return false;
    if (field->type == FIELD_TEXT)
        memcpy(at, &text, sizeof text);
    else
        snprintf(at, field->size, "%s", text);
    return true;
}

static bool read_number(struct json_object *value, const struct field *field, char *at)
{
    int64_t number = json_object_get_int64(value);
    int small = (int)number;
    bool yes = number != 0;

    if (!json_object_is_type(value, json_type_int))
        return false;
    if (field->type == FIELD_INT64) {
        memcpy(at, &number, sizeof number);
        return true;
    }
    if (field->type == FIELD_BOOL)
        memcpy(at, &yes, sizeof yes);
    else
        memcpy(at, &small, sizeof small);
    return number >= INT_MIN && number <= INT_MAX;
}

static bool read_field(struct json_object *json, const struct field *field, void *record)
{
    char *at = (char *)record + field->offset;
    struct json_object *value = NULL;

    if (!json_object_object_get_ex(json, field->name, &value) || value == NULL)
        return field->type == FIELD_TEXT || field->type == FIELD_NEW_INT; /* as it is: zeroed */
    return field->type == FIELD_TEXT || field->type == FIELD_CHARS ? read_text(value, field, at)
                                                                   : read_number(value, field, at);
}

static bool read_record(struct json_object *json, const struct field *fields, size_t count,
                        void *record)
{
    bool ok = json_object_is_type(json, json_type_object);

    for (size_t i = 0; ok && i < count; i++)
        ok = read_field(json, &fields[i], record);
    return ok;
}

bool entry_read_settlement(struct json_object *json, struct store_settlement *settlement)
{
    *settlement = (struct store_settlement){.request_id = NULL};
    return READ(json, settlement_fields, settlement) && settlement->request_id != NULL &&
           (unsigned)settlement->fault.fault <= STORE_FAULT_EXCEED &&
           (unsigned)settlement->idempotency <= STORE_KEY_DONE;
}

bool entry_read_reservation(struct json_object *json, struct store_acquire *reservation)
{
    *reservation = (struct store_acquire){.request_id = NULL};
    return READ(json, reservation_fields, reservation) && reservation->request_id != NULL;
}

bool entry_read_log(struct json_object *json, struct log_entry *entry)
{
    *entry = (struct log_entry){.message = NULL};
    return READ(json, log_fields, entry) && entry->message != NULL && entry->logger != NULL &&
           entry->module != NULL && entry->function != NULL && entry->level >= LOG_DEBUG &&
           entry->level <= LOG_CRITICAL;
}

bool entry_read_attempt(struct json_object *json, struct store_retry_attempt *attempt)
{
    *attempt = (struct store_retry_attempt){.token_id = 0};
    return READ(json, attempt_fields, attempt);
}
