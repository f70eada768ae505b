/* seal.h - API keys encrypted at rest.
 *
 * A sealed key is text, "sealed:v1:<key id>:<base64url>": XChaCha20-Poly1305 by libsodium, the TokenID
 * authenticated with it, so that a row's key does not open in another row. seal.key_file holds one
 * sealing key a line, the base64 of 32 random bytes (`openssl rand -base64 32`); the first seals, all
 * open: that is how a sealing key is replaced. A key that is not sealed passes as it is. */
#ifndef EXTRACT_SEAL_H
#define EXTRACT_SEAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "err.h"

#define SEAL_PLAIN_MAX 700 /* bytes of an API key that still fits into its column when sealed */

struct seal;

/* Reads the sealing keys into memory that is neither swapped nor dumped. Errors: ERR_CONFIG, naming
 * the file and line, never their content. */
struct seal *seal_open(const char *path, struct err *err) MUST_CHECK;
/* Wipes the keys. */
void seal_close(struct seal *seal);

bool seal_is_sealed(const char *stored);
/* Sealed by the key that seals now? */
bool seal_is_current(const struct seal *seal, const char *stored);

/* Seals an API key for this token into out. Errors: ERR_BAD_VALUE (longer than SEAL_PLAIN_MAX, or
 * sealed already, or out is too small). */
enum err_code seal_seal(const struct seal *seal, int64_t token_id, const char *api_key, char *out,
                        size_t size, struct err *err) MUST_CHECK;
/* The API key of this token; stored and out may be the same memory. seal NULL: no seal.key_file.
 * Errors: ERR_INTERNAL: no key that opens it, or it was changed, or it is another row's; out is then
 * empty. */
enum err_code seal_unseal(const struct seal *seal, int64_t token_id, const char *stored, char *out,
                          size_t size, struct err *err) MUST_CHECK;

#endif
