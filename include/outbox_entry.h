/* outbox_entry.h - the records that the outbox keeps, as JSON objects: outbox.c's helper.
 *
 * Nothing written here is a secret: no key, no invoice. What is read may come from an older version of
 * the program. */
#ifndef EXTRACT_OUTBOX_ENTRY_H
#define EXTRACT_OUTBOX_ENTRY_H

#include <json.h>
#include <stdbool.h>

#include "buf.h"
#include "log.h"
#include "store.h"

void entry_write_settlement(struct buf *out, const struct store_settlement *settlement);
void entry_write_reservation(struct buf *out, const struct store_acquire *reservation);
void entry_write_log(struct buf *out, const struct log_entry *entry);
void entry_write_attempt(struct buf *out, const struct store_retry_attempt *attempt);

/* Fills the record; its pointers are to the JSON object's texts. False: that is no such record. */
bool entry_read_settlement(struct json_object *json, struct store_settlement *settlement);
bool entry_read_reservation(struct json_object *json, struct store_acquire *reservation);
bool entry_read_log(struct json_object *json, struct log_entry *entry);
bool entry_read_attempt(struct json_object *json, struct store_retry_attempt *attempt);

#endif
