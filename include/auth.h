/* auth.h - who may call: client keys (RFC 6750 bearer tokens).
 *
 * A key is "extract_" and the base64url of 256 random bits; the store holds its SHA-256 only. What the
 * store said of a key is believed for a few seconds, so that a busy client costs a look every few
 * seconds and a revoked key ends within 10 s. While the store is away, keys that it confirmed within
 * auth.offline_grace stay valid (grace.h). */
#ifndef EXTRACT_AUTH_H
#define EXTRACT_AUTH_H

#include "config.h"
#include "store.h"

#define AUTH_KEY_SIZE 52 /* a client key and NUL */

struct auth;

/* store is borrowed. Errors: ERR_CONFIG, ERR_STORAGE_FULL, ERR_INTERNAL. */
struct auth *auth_open(const struct config *config, struct store *store,
                       struct err *err) MUST_CHECK;
void auth_close(struct auth *auth);

/* Whose key does the Authorization header bring? Errors: ERR_UNAUTHENTICATED (no key, no such key,
 * a revoked one), ERR_RATE_LIMITED (*retry_after_s becomes when to come again), ERR_STORE_UNAVAILABLE
 * and what else the store may say. */
enum err_code auth_check(struct auth *auth, const char *authorization,
                         struct store_client_key *client, int *retry_after_s,
                         struct err *err) MUST_CHECK;

/* A new key with its identifier and hash: for extractctl. The caller wipes key. */
void auth_new_key(char key[AUTH_KEY_SIZE], char id[STORE_CLIENT_KEY_ID_SIZE],
                  char hash[STORE_HASH_SIZE]);

#endif
