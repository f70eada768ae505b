/* store_driver.h - what a driver of the store gives to store.c and the files beside it; nobody else includes this.
 *
 * A driver knows nothing of batching or waiting: it gets whole arrays, one transaction each, and
 * sets every item's code. It checks each item's data first (ERR_BAD_VALUE) so that one bad item
 * cannot fail its neighbours. When it returns an error, nothing of the batch has happened, or, for
 * ERR_STORE_UNAVAILABLE, what happened is unknown (and repeating it is safe). */
#ifndef EXTRACT_STORE_DRIVER_H
#define EXTRACT_STORE_DRIVER_H

#include "store.h"

/* A token's API key as the table holds it. */
struct store_token_key {
    int64_t token_id;
    char api_key[STORE_API_KEY_SIZE];
};

struct store_driver {
    const char *name;
    /* migrate: create or upgrade the schema even where auto_create says no. */
    void *(*open)(const struct config *config, bool migrate, struct err *err);
    void (*close)(void *self);
    int (*leaders)(void *self); /* how many batches it can carry at the same time */
    int64_t gather_ms;          /* how long a batch waits for more where many come; see batch.h */
    int (*schema_version)(void *self);
    enum err_code (*ping)(void *self, struct err *err);
    enum err_code (*acquire)(void *self, struct store_acquire *const *items, size_t count,
                             struct err *err);
    enum err_code (*settle)(void *self, struct store_settlement *const *items, size_t count,
                            struct err *err);
    enum err_code (*record)(void *self, struct log_entry *const *entries, size_t entry_count,
                            const struct store_retry_attempt *const *attempts, size_t attempt_count,
                            bool again, struct err *err);
    enum err_code (*expire_reservations)(void *self, int *expired, struct err *err);
    enum err_code (*token_add)(void *self, const char *actor, const struct store_new_token *token,
                               int64_t *token_id, struct err *err);
    /* The keys of up to max tokens after that one, in TokenID order, as they are, whatever their
     * status; those that are longer than any key are left out. */
    enum err_code (*token_keys)(void *self, int64_t after_id, struct store_token_key *keys,
                                size_t max, size_t *count, struct err *err);
    enum err_code (*token_set_status)(void *self, const char *actor, int64_t token_id,
                                      const char *status, const char *reason, struct err *err);
    enum err_code (*token_set_key)(void *self, const char *actor, int64_t token_id,
                                   const char *api_key, struct err *err);
    /* Changes it from what token_keys said of it; ERR_NO_SUCH_ROW: it is another by now. */
    enum err_code (*token_reseal)(void *self, const char *actor, const struct store_token_key *key,
                                  const char *sealed, struct err *err);
    enum err_code (*token_set_limit)(void *self, const char *actor, int64_t token_id, int64_t limit,
                                     double threshold, struct err *err);
    enum err_code (*client_key_find)(void *self, const char *hash, struct store_client_key *key,
                                     struct err *err);
    enum err_code (*client_key_add)(void *self, const char *actor,
                                    const struct store_new_client_key *key, struct err *err);
    enum err_code (*client_key_revoke)(void *self, const char *actor, const char *id,
                                       struct err *err);
    enum err_code (*query)(void *self, enum store_view view, const struct store_filter *filter,
                           store_row *row, void *context, struct err *err);
};

extern const struct store_driver store_sqlite;
extern const struct store_driver store_mssql;

#endif
