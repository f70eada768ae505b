/* seal.c - API keys encrypted at rest. See seal.h.
 *
 * What is sealed: nonce (24 random bytes) || ciphertext || tag (16). The nonce is long enough to be
 * drawn at random each time. The key id, the first 8 hexadecimal digits of a keyed hash, only tells
 * which of several sealing keys to take; the tag decides. */
#include "seal.h"

#include <errno.h>
#include <sodium.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define PREFIX "sealed:v1:"
#define PREFIX_LEN (sizeof PREFIX - 1)
#define ID_LEN 8
#define KEYS_MAX 8
#define LINE_SIZE 256
#define KEY_SIZE crypto_aead_xchacha20poly1305_ietf_KEYBYTES
#define NONCE_SIZE crypto_aead_xchacha20poly1305_ietf_NPUBBYTES
#define TAG_SIZE crypto_aead_xchacha20poly1305_ietf_ABYTES
#define BOX_MAX (NONCE_SIZE + SEAL_PLAIN_MAX + TAG_SIZE)
#define VARIANT sodium_base64_VARIANT_URLSAFE_NO_PADDING

struct seal {
    size_t count;
    struct {
        unsigned char key[KEY_SIZE];
        char id[ID_LEN + 1];
    } keys[KEYS_MAX];
};

/* ---- the key file ---- */

static void name_key(struct seal *seal, size_t i)
{
    static const char purpose[] = "extract-fcgi: name of a sealing key";
    unsigned char hash[crypto_generichash_BYTES];

    crypto_generichash(hash, sizeof hash, (const unsigned char *)purpose, sizeof purpose - 1,
                       seal->keys[i].key, KEY_SIZE);
    sodium_bin2hex(seal->keys[i].id, sizeof seal->keys[i].id, hash, ID_LEN / 2);
}

static enum err_code take_line(struct seal *seal, const char *path, int number, const char *line,
                               struct err *err)
{
    const size_t i = seal->count;
    size_t len = 0;

    if (i == KEYS_MAX)
        return err_set(err, ERR_CONFIG, "seal.key_file: %s holds more than %d keys", path,
                       KEYS_MAX);
    if (sodium_base642bin(seal->keys[i].key, KEY_SIZE, line, strlen(line), " \t\r\n", &len, NULL,
                          sodium_base64_VARIANT_ORIGINAL) != 0 ||
        len != KEY_SIZE)
        return err_set(err, ERR_CONFIG,
                       "seal.key_file: %s line %d is not the base64 of 32 bytes: make one with "
                       "`openssl rand -base64 32`",
                       path, number);
    name_key(seal, i);
    for (size_t j = 0; j < i; j++)
        if (sodium_memcmp(seal->keys[j].key, seal->keys[i].key, KEY_SIZE) == 0)
            return err_set(err, ERR_CONFIG, "seal.key_file: %s holds the key of line %d twice",
                           path, number);
    seal->count++;
    return ERR_NONE;
}

static enum err_code read_keys(struct seal *seal, const char *path, struct err *err)
{
    char line[LINE_SIZE];
    enum err_code code = ERR_NONE;
    struct stat st;
    FILE *f = fopen(path, "re");

    if (f == NULL || fstat(fileno(f), &st) != 0)
        code =
            err_set(err, ERR_CONFIG, "seal.key_file: %s cannot be read: %s", path, strerror(errno));
    else if ((st.st_mode & (S_IROTH | S_IWOTH)) != 0)
        code =
            err_set(err, ERR_CONFIG,
                    "seal.key_file: %s is open to every user of this machine: chmod o= it", path);
    else
        setvbuf(f, NULL, _IONBF, 0); /* no copy of the keys in a buffer that nobody wipes */
    for (int number = 1; code == ERR_NONE && fgets(line, sizeof line, f) != NULL; number++) {
        const char *text = line + strspn(line, " \t\r\n");
        if (*text != '\0' && *text != '#')
            code = take_line(seal, path, number, text, err);
    }
    if (f != NULL)
        fclose(f);
    sodium_memzero(line, sizeof line);
    if (code == ERR_NONE && seal->count == 0)
        code = err_set(err, ERR_CONFIG, "seal.key_file: %s holds no key", path);
    return code;
}

struct seal *seal_open(const char *path, struct err *err)
{
    struct seal *seal = NULL;

    if (sodium_init() < 0 || (seal = sodium_malloc(sizeof *seal)) == NULL) {
        err_set(err, ERR_INTERNAL,
                "seal.key_file: libsodium cannot be used here: no locked memory");
        return NULL;
    }
    memset(seal, 0, sizeof *seal);
    if (read_keys(seal, path, err) != ERR_NONE) {
        seal_close(seal);
        return NULL;
    }
    sodium_mprotect_readonly(seal);
    return seal;
}

void seal_close(struct seal *seal)
{
    sodium_free(seal); /* wipes */
}

/* ---- sealing ---- */

bool seal_is_sealed(const char *stored)
{
    return strncmp(stored, "sealed:", sizeof "sealed:" - 1) == 0;
}

/* The index of the key that this was sealed with; -1: none of ours. */
static int find_key(const struct seal *seal, const char *stored)
{
    if (strncmp(stored, PREFIX, PREFIX_LEN) != 0)
        return -1;
    const char *id = stored + PREFIX_LEN;
    for (size_t i = 0; i < seal->count; i++)
        if (strncmp(id, seal->keys[i].id, ID_LEN) == 0 && id[ID_LEN] == ':')
            return (int)i;
    return -1;
}

bool seal_is_current(const struct seal *seal, const char *stored)
{
    return find_key(seal, stored) == 0;
}

/* What is authenticated with the key: whose it is. */
static size_t owner(char out[64], int64_t token_id)
{
    return (size_t)snprintf(out, 64, "extract-fcgi TokenID %lld", (long long)token_id);
}

enum err_code seal_seal(const struct seal *seal, int64_t token_id, const char *api_key, char *out,
                        size_t size, struct err *err)
{
    unsigned char box[BOX_MAX];
    unsigned long long len = 0;
    char name[64];
    const size_t plain = strlen(api_key), name_len = owner(name, token_id);

    if (seal_is_sealed(api_key))
        return err_set(err, ERR_BAD_VALUE, "the API key is sealed already");
    if (plain > SEAL_PLAIN_MAX)
        return err_set(err, ERR_BAD_VALUE,
                       "the API key is longer than %d bytes: no room to seal it", SEAL_PLAIN_MAX);
    const size_t need =
        PREFIX_LEN + ID_LEN + 1 + sodium_base64_encoded_len(NONCE_SIZE + plain + TAG_SIZE, VARIANT);
    if (size < need)
        return err_set(err, ERR_BAD_VALUE, "no room for the sealed API key");
    randombytes_buf(box, NONCE_SIZE);
    crypto_aead_xchacha20poly1305_ietf_encrypt(
        box + NONCE_SIZE, &len, (const unsigned char *)api_key, plain, (const unsigned char *)name,
        name_len, NULL, box, seal->keys[0].key);
    int head = snprintf(out, size, PREFIX "%s:", seal->keys[0].id);
    sodium_bin2base64(out + head, size - (size_t)head, box, NONCE_SIZE + (size_t)len, VARIANT);
    return ERR_NONE;
}

/* Opens the box of this text into plain. -1: it does not open. */
static int open_box(const unsigned char *key, int64_t token_id, const char *text,
                    unsigned char plain[SEAL_PLAIN_MAX], size_t *plain_len)
{
    unsigned char box[BOX_MAX];
    size_t len = 0;
    unsigned long long opened = 0;
    char name[64];
    const size_t name_len = owner(name, token_id);

    if (sodium_base642bin(box, sizeof box, text, strlen(text), NULL, &len, NULL, VARIANT) != 0 ||
        len < NONCE_SIZE + TAG_SIZE ||
        crypto_aead_xchacha20poly1305_ietf_decrypt(plain, &opened, NULL, box + NONCE_SIZE,
                                                   len - NONCE_SIZE, (const unsigned char *)name,
                                                   name_len, box, key) != 0)
        return -1;
    *plain_len = (size_t)opened;
    return 0;
}

enum err_code seal_unseal(const struct seal *seal, int64_t token_id, const char *stored, char *out,
                          size_t size, struct err *err)
{
    unsigned char plain[SEAL_PLAIN_MAX];
    size_t len = strlen(stored);
    enum err_code code = ERR_NONE;
    int i;

    if (!seal_is_sealed(stored)) {
        if (len >= size)
            return err_set(err, ERR_INTERNAL, "the API key of token %lld is too long",
                           (long long)token_id);
        memmove(out, stored, len + 1);
        return ERR_NONE;
    }
    if (seal == NULL)
        code = err_set(err, ERR_INTERNAL,
                       "the API key of token %lld is sealed, and no seal.key_file is configured",
                       (long long)token_id);
    else if ((i = find_key(seal, stored)) < 0)
        code =
            err_set(err, ERR_INTERNAL,
                    "the API key of token %lld is sealed by a key that seal.key_file does not hold",
                    (long long)token_id);
    else if (open_box(seal->keys[i].key, token_id, stored + PREFIX_LEN + ID_LEN + 1, plain, &len) !=
                 0 ||
             len >= size)
        code = err_set(err, ERR_INTERNAL,
                       "the sealed API key of token %lld does not open: it was changed, or it is "
                       "another token's",
                       (long long)token_id);
    if (code == ERR_NONE)
        memcpy(out, plain, len);
    out[code == ERR_NONE ? len : 0] = '\0';
    sodium_memzero(plain, sizeof plain);
    return code;
}
