/* fallback.h - the key that serves where the store has none: appSetting.txt. */
#ifndef EXTRACT_FALLBACK_H
#define EXTRACT_FALLBACK_H

#include "err.h"

/* Reads the key: a bare key, or a line `name = value` or `name: value` whose name holds API_KEY
 * (quotes and a comma around the value are taken off, as in JSON). *key is the caller's to free.
 * Errors: ERR_CONFIG, naming the file, never its content. */
enum err_code fallback_load(const char *path, char **key, struct err *err) MUST_CHECK;

#endif
