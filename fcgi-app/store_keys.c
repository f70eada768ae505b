/* store_keys.c - API keys at rest: sealed when they are stored, opened and sealed anew by an
 * administrator. Acquire opens the one that it was granted by itself (store.c). See store.h and seal.h. */
#include <stdlib.h>
#include <string.h>

#include "seal.h"
#include "store_inside.h"

static enum err_code seal_new_key(void *context, int64_t token_id, const char *api_key,
                                  char out[STORE_API_KEY_SIZE], struct err *err)
{
    return seal_seal(context, token_id, api_key, out, STORE_API_KEY_SIZE, err);
}

enum err_code store_token_add(struct store *store, const char *actor,
                              const struct store_new_token *token, int64_t *token_id,
                              struct err *err)
{
    const struct store_sealer sealer = {.seal = seal_new_key, .context = store->seal};
    struct store_new_token sealed = *token;

    if (store->seal != NULL)
        sealed.sealer = &sealer;
    return store->driver->token_add(store->self, actor, &sealed, token_id, err);
}

enum err_code store_token_set_key(struct store *store, const char *actor, int64_t token_id,
                                  const char *api_key, struct err *err)
{
    char sealed[STORE_API_KEY_SIZE];

    if (store->seal == NULL)
        return store->driver->token_set_key(store->self, actor, token_id, api_key, err);
    if (seal_seal(store->seal, token_id, api_key, sealed, sizeof sealed, err) != ERR_NONE)
        return err->code;
    return store->driver->token_set_key(store->self, actor, token_id, sealed, err);
}

/* Without what a key pasted by hand often brings, as acquire takes it. */
static void trim(char *key)
{
    size_t begin = 0, end = strlen(key);

    while (end > 0 && (unsigned char)key[end - 1] <= ' ')
        end--;
    while (begin < end && (unsigned char)key[begin] <= ' ')
        begin++;
    memmove(key, key + begin, end - begin);
    key[end - begin] = '\0';
}

/* Calls look with each token's key, until it does not return ERR_NONE. */
static enum err_code each_key(struct store *store,
                              enum err_code (*look)(struct store *store,
                                                    const struct store_token_key *key,
                                                    void *context, struct err *err),
                              void *context, struct err *err)
{
    struct store_token_key keys[16];
    size_t count = 0;
    int64_t after_id = 0, done = 0;
    enum err_code code = ERR_NONE;
    bool more = true;

    while (more) {
        code = store->driver->token_keys(store->self, after_id, keys, sizeof keys / sizeof keys[0],
                                         &count, err);
        more = code == ERR_NONE && count > 0;
        for (size_t i = 0; more && i < count; i++) {
            more = store_goes_on(store, done++);
            if (more)
                code = look(store, &keys[i], context, err);
            more = more && code == ERR_NONE;
            after_id = keys[i].token_id;
        }
        explicit_bzero(keys, sizeof keys);
    }
    return code;
}

struct resealing {
    const char *actor;
    int *sealed, *unreadable;
};

/* Seals one key anew, unless it is sealed by the key of now. */
static enum err_code reseal(struct store *store, const struct store_token_key *key, void *context,
                            struct err *err)
{
    const struct resealing *r = context;
    char plain[STORE_API_KEY_SIZE], sealed[STORE_API_KEY_SIZE];

    if (seal_is_current(store->seal, key->api_key))
        return ERR_NONE;
    if (seal_unseal(store->seal, key->token_id, key->api_key, plain, sizeof plain, err) !=
        ERR_NONE) {
        ++*r->unreadable;
        return ERR_NONE;
    }
    trim(plain);
    if (plain[0] == '\0')
        return ERR_NONE;
    enum err_code code = seal_seal(store->seal, key->token_id, plain, sealed, sizeof sealed, err);
    explicit_bzero(plain, sizeof plain);
    if (code == ERR_NONE)
        code = store->driver->token_reseal(store->self, r->actor, key, sealed, err);
    *r->sealed += code == ERR_NONE;
    return code == ERR_NO_SUCH_ROW ? ERR_NONE : code; /* changed by another meanwhile */
}

enum err_code store_seal_keys(struct store *store, const char *actor, int *sealed, int *unreadable,
                              struct err *err)
{
    struct resealing r = {.actor = actor, .sealed = sealed, .unreadable = unreadable};

    *sealed = *unreadable = 0;
    if (store->seal == NULL)
        return err_set(err, ERR_CONFIG,
                       "seal.key_file is not configured: there is no key to seal by");
    return each_key(store, reseal, &r, err);
}

struct key_check {
    store_key_row *row;
    void *context;
};

static enum err_code check_key(struct store *store, const struct store_token_key *key,
                               void *context, struct err *err)
{
    const struct key_check *check = context;
    char plain[STORE_API_KEY_SIZE];
    struct err why = {.message = ""};
    const char *fault = NULL;

    (void)err;
    if (!seal_is_sealed(key->api_key))
        fault = "";
    else if (seal_unseal(store->seal, key->token_id, key->api_key, plain, sizeof plain, &why) !=
             ERR_NONE)
        fault = why.message;
    explicit_bzero(plain, sizeof plain);
    check->row(check->context, key->token_id, fault);
    return ERR_NONE;
}

enum err_code store_check_keys(struct store *store, store_key_row *row, void *context,
                               struct err *err)
{
    struct key_check check = {.row = row, .context = context};
    return each_key(store, check_key, &check, err);
}
