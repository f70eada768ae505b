/* auth.c - who may call. See auth.h.
 *
 * What the store said is kept in a table of a fixed size: sets of a few entries, the oldest of a set
 * makes room. An entry is found by the key's hash, never by the key. Past SOFT_MS one caller asks the
 * store again, while the others believe the entry until HARD_MS: a busy key whose entry ends does not
 * send them all. */
#include "auth.h"

#include <pthread.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "clock.h"
#include "grace.h"
#include "rate.h"

#define SCHEME "Bearer"
#define PREFIX "extract_"
#define PREFIX_LEN (sizeof PREFIX - 1)
#define SECRET_SIZE 32 /* bytes */
#define VARIANT sodium_base64_VARIANT_URLSAFE_NO_PADDING
#define ID_SIZE 8 /* random bytes in an identifier */

#define SOFT_MS 4000
#define HARD_MS 8000
#define UNKNOWN_MS 2000 /* for a key that the store does not know */
#define REMEMBER_EVERY_MS 60000

#define SETS 256
#define WAYS 4

struct entry {
    unsigned char hash[crypto_hash_sha256_BYTES];
    struct store_client_key client; /* id empty: the store does not know the key */
    int64_t asked_ms;               /* monotonic; when the store was asked last; 0: no entry */
    int64_t confirmed_ms;           /* monotonic; when it last said yes */
    int64_t remembered_ms;          /* monotonic; when grace heard of it; 0: never */
    bool asking;                    /* somebody asks the store at this moment */
};

struct auth {
    struct store *store;
    struct grace *grace;
    struct rate *rate;
    int64_t grace_ms;
    pthread_mutex_t lock;
    struct entry entries[SETS][WAYS];
};

struct auth *auth_open(const struct config *config, struct store *store, struct err *err)
{
    struct auth *auth = calloc(1, sizeof *auth);

    if (auth == NULL || sodium_init() < 0) {
        err_set(err, ERR_INTERNAL, "no memory for client keys");
        free(auth);
        return NULL;
    }
    auth->store = store;
    auth->grace_ms = config->auth.offline_grace_ms;
    pthread_mutex_init(&auth->lock, NULL);
    if ((auth->grace = grace_open(config->server.state_dir, auth->grace_ms, err)) == NULL ||
        (auth->rate = rate_open(config->server.runtime_dir, config->auth.key_rate, err)) == NULL) {
        auth_close(auth);
        return NULL;
    }
    return auth;
}

void auth_close(struct auth *auth)
{
    if (auth == NULL)
        return;
    rate_close(auth->rate);
    grace_close(auth->grace);
    pthread_mutex_destroy(&auth->lock);
    free(auth);
}

/* ---- keys ---- */

static void hash_key(const char *key, unsigned char hash[crypto_hash_sha256_BYTES])
{
    crypto_hash_sha256(hash, (const unsigned char *)key, strlen(key));
}

/* Has it the form of a key? Else nobody needs to ask the store. */
static bool has_form(const char *key)
{
    unsigned char secret[SECRET_SIZE];
    size_t len = 0;
    bool ok = strlen(key) == AUTH_KEY_SIZE - 1 && strncmp(key, PREFIX, PREFIX_LEN) == 0 &&
              sodium_base642bin(secret, sizeof secret, key + PREFIX_LEN, strlen(key + PREFIX_LEN),
                                NULL, &len, NULL, VARIANT) == 0 &&
              len == SECRET_SIZE;

    sodium_memzero(secret, sizeof secret);
    return ok;
}

void auth_new_key(char key[AUTH_KEY_SIZE], char id[STORE_CLIENT_KEY_ID_SIZE],
                  char hash[STORE_HASH_SIZE])
{
    unsigned char secret[SECRET_SIZE], name[ID_SIZE], digest[crypto_hash_sha256_BYTES];

    randombytes_buf(secret, sizeof secret);
    randombytes_buf(name, sizeof name);
    memcpy(key, PREFIX, PREFIX_LEN);
    sodium_bin2base64(key + PREFIX_LEN, AUTH_KEY_SIZE - PREFIX_LEN, secret, sizeof secret, VARIANT);
    sodium_bin2hex(id, STORE_CLIENT_KEY_ID_SIZE, name, sizeof name);
    hash_key(key, digest);
    sodium_bin2hex(hash, STORE_HASH_SIZE, digest, sizeof digest);
    sodium_memzero(secret, sizeof secret);
}

/* The key in an Authorization header (RFC 6750 section 2.1); NULL: there is none. */
static const char *find_key(const char *authorization)
{
    const size_t n = sizeof SCHEME - 1;

    if (strncasecmp(authorization, SCHEME, n) != 0 || authorization[n] != ' ')
        return NULL;
    return authorization + n + strspn(authorization + n, " ");
}

/* ---- entries: under the lock ---- */

static struct entry *set_of(struct auth *auth, const unsigned char *hash)
{
    return auth->entries[hash[0] % SETS];
}

static struct entry *find_entry(struct auth *auth, const unsigned char *hash)
{
    struct entry *set = set_of(auth, hash);

    for (size_t i = 0; i < WAYS; i++)
        if (set[i].asked_ms != 0 && sodium_memcmp(set[i].hash, hash, sizeof set[i].hash) == 0)
            return &set[i];
    return NULL;
}

/* The key's entry, made in the place of the set's oldest where there is none. */
static struct entry *need_entry(struct auth *auth, const unsigned char *hash)
{
    struct entry *set = set_of(auth, hash), *entry = find_entry(auth, hash);

    if (entry != NULL)
        return entry;
    entry = &set[0];
    for (size_t i = 1; i < WAYS; i++)
        if (set[i].asked_ms < entry->asked_ms)
            entry = &set[i];
    *entry = (struct entry){.asked_ms = 0};
    memcpy(entry->hash, hash, sizeof entry->hash);
    return entry;
}

enum belief { BELIEVE_YES, BELIEVE_NO, ASK };

/* Can the entry be believed without asking? Whoever must ask is the one who asks. */
static enum belief believe(struct auth *auth, const unsigned char *hash,
                           struct store_client_key *client)
{
    struct entry *entry = find_entry(auth, hash);
    int64_t now = clock_monotonic_ms();

    if (entry == NULL)
        return ASK;
    int64_t age = now - entry->asked_ms;
    if (entry->client.id[0] == '\0')
        return age < UNKNOWN_MS ? BELIEVE_NO : ASK;
    if (age >= (entry->asking ? HARD_MS : SOFT_MS)) {
        entry->asking = true;
        return ASK;
    }
    *client = entry->client;
    return BELIEVE_YES;
}

/* ---- asking ---- */

/* The store knows the key; true where grace should hear of it. */
static bool confirm(struct auth *auth, const unsigned char *hash,
                    const struct store_client_key *client)
{
    int64_t now = clock_monotonic_ms();
    struct entry *entry = need_entry(auth, hash);
    bool remember = entry->remembered_ms == 0 || now - entry->remembered_ms >= REMEMBER_EVERY_MS;

    entry->client = *client;
    entry->asked_ms = entry->confirmed_ms = now;
    entry->asking = false;
    if (remember)
        entry->remembered_ms = now;
    return remember;
}

static void deny(struct auth *auth, const unsigned char *hash)
{
    struct entry *entry = need_entry(auth, hash);

    *entry = (struct entry){.asked_ms = clock_monotonic_ms()};
    memcpy(entry->hash, hash, sizeof entry->hash);
}

/* The store did not answer: does what it said last still hold? The next look waits as if it had. */
static bool hold_on(struct auth *auth, const unsigned char *hash, struct store_client_key *client)
{
    struct entry *entry = find_entry(auth, hash);
    int64_t now = clock_monotonic_ms();

    if (entry == NULL || entry->client.id[0] == '\0')
        return false;
    entry->asking = false;
    if (now - entry->confirmed_ms > auth->grace_ms)
        return false;
    entry->asked_ms = now;
    *client = entry->client;
    return true;
}

static enum err_code unknown_key(struct err *err)
{
    return err_set(err, ERR_UNAUTHENTICATED, "the client key is unknown or was revoked");
}

static enum err_code ask(struct auth *auth, const unsigned char *hash,
                         struct store_client_key *client, struct err *err)
{
    char text[STORE_HASH_SIZE];
    bool held, remember = false;

    sodium_bin2hex(text, sizeof text, hash, crypto_hash_sha256_BYTES);
    enum err_code code = store_client_key_find(auth->store, text, client, err);
    pthread_mutex_lock(&auth->lock);
    if (code == ERR_NONE)
        remember = confirm(auth, hash, client);
    else if (code == ERR_NO_SUCH_ROW)
        deny(auth, hash);
    held = code != ERR_NONE && code != ERR_NO_SUCH_ROW && hold_on(auth, hash, client);
    pthread_mutex_unlock(&auth->lock);
    if (remember)
        grace_remember(auth->grace, text, client);
    if (code == ERR_NO_SUCH_ROW) {
        grace_forget(auth->grace, text);
        return unknown_key(err);
    }
    if (code == ERR_NONE || held || grace_find(auth->grace, text, client))
        return ERR_NONE;
    return code;
}

enum err_code auth_check(struct auth *auth, const char *authorization,
                         struct store_client_key *client, int *retry_after_s, struct err *err)
{
    unsigned char hash[crypto_hash_sha256_BYTES];
    const char *key = find_key(authorization);
    enum err_code code = ERR_NONE;

    if (authorization[0] == '\0')
        return err_set(err, ERR_UNAUTHENTICATED, "the request brings no client key");
    if (key == NULL || !has_form(key))
        return err_set(err, ERR_UNAUTHENTICATED, "what the request brings is no client key");
    hash_key(key, hash);
    pthread_mutex_lock(&auth->lock);
    enum belief belief = believe(auth, hash, client);
    pthread_mutex_unlock(&auth->lock);
    if (belief == BELIEVE_NO)
        code = unknown_key(err);
    else if (belief == ASK)
        code = ask(auth, hash, client, err);
    if (code != ERR_NONE)
        return code;
    int64_t wait_ms = rate_take(auth->rate, client->id, clock_monotonic_ms());
    if (wait_ms == 0)
        return ERR_NONE;
    *retry_after_s = (int)((wait_ms + 999) / 1000);
    return err_set(err, ERR_RATE_LIMITED, "client key %s makes more than auth.key_rate requests",
                   client->id);
}
