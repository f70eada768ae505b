/* store_check.h - what every driver of the store does before and after a transaction: refuse what may
 * not come in, so that one bad item cannot fail its neighbours, and set the outcomes of a batch.
 * For drivers only (store_sqlite*.c, store_mssql*.c). */
#ifndef EXTRACT_STORE_CHECK_H
#define EXTRACT_STORE_CHECK_H

#include <stdbool.h>
#include <stddef.h>

#include "store_driver.h"

#define STORE_REASON_MAX 800    /* bytes of what Gemini said that are kept with a token */
#define STORE_ROWS_DEFAULT 1000 /* struct store_filter, limit */

/* Has s (NULL: 0 bytes) at least min and at most max bytes? */
bool store_text_fits(const char *s, size_t min, size_t max);
/* How many of its bytes (NULL: none) fit into max, without cutting a character in two? */
size_t store_text_cut(const char *s, size_t max);

/* ---- batches ---- */

/* Clears each item's outcome, and refuses (ERR_BAD_VALUE) those whose data cannot be meant. How many
 * may go on. */
size_t store_admit_acquires(struct store_acquire *const *items, size_t count) MUST_CHECK;
size_t store_admit_settlements(struct store_settlement *const *items, size_t count) MUST_CHECK;
/* Nothing is granted; code and err stay. */
void store_clear_acquire(struct store_acquire *a);
void store_clear_settlement(struct store_settlement *s);
/* The batch has failed: so have its items, but for those that were refused, whatever became of it. */
void store_fail_acquires(struct store_acquire *const *items, size_t count, const struct err *err);
void store_fail_settlements(struct store_settlement *const *items, size_t count,
                            const struct err *err);

/* ---- administration and queries; errors: ERR_BAD_VALUE ---- */

enum err_code store_check_new_token(const char *actor, const struct store_new_token *token,
                                    struct err *err) MUST_CHECK;
/* *status becomes the status as it is written. */
enum err_code store_check_status(const char *actor, const char **status, const char *reason,
                                 struct err *err) MUST_CHECK;
enum err_code store_check_key(const char *actor, const char *key, struct err *err) MUST_CHECK;
enum err_code store_check_limit(const char *actor, int64_t limit, double threshold,
                                struct err *err) MUST_CHECK;
enum err_code store_check_new_client_key(const char *actor, const struct store_new_client_key *key,
                                         struct err *err) MUST_CHECK;
enum err_code store_check_client_key_id(const char *actor, const char *id,
                                        struct err *err) MUST_CHECK;
/* Is there such a view, and can it be filtered so? */
enum err_code store_check_filter(enum store_view view, const struct store_filter *filter,
                                 struct err *err) MUST_CHECK;

#endif
