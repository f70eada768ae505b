/* fuzz_seal.c - any text as an API key of the store, and any bytes as the file of sealing keys. The first
 * byte chooses: the text is opened; it is sealed and opened again, and nothing that differs from it may
 * open; it is the file. No message may hold the text. The sealed texts among the seeds are another
 * token's: one of TOKEN_ID's does open, by the change of a byte that chooses. */
#include <stdlib.h>
#include <string.h>

#include "seal.h"
#include "store.h"
#include "support.h"

/* 32 bytes counted up, and down; as a file has them. */
static const char keys[] = "# the second one only opens\n"
                           "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n"
                           "//79/Pv6+fj39vX08/Lx8O/u7ezr6uno5+bl5OPi4eA=\n";

#define TOKEN_ID 42
#define QUOTE_MIN 8 /* bytes of a text that could not be in a message by chance */

static bool quotes(const char *message, const char *text)
{
    return strlen(text) >= QUOTE_MIN && strstr(message, text) != NULL;
}

/* What is in the store, as it is. */
static void check_stored(const struct seal *seal, const char *stored)
{
    char out[STORE_API_KEY_SIZE] = "left over";
    struct err err = {.message = ""};

    if (seal_unseal(seal, TOKEN_ID, stored, out, sizeof out, &err) == ERR_NONE) {
        CHECK(!seal_is_sealed(stored) && strcmp(out, stored) == 0); /* nobody forges one */
        return;
    }
    CHECK(err.code == ERR_INTERNAL && out[0] == (seal_is_sealed(stored) ? '\0' : 'l'));
    CHECK(fuzz_is_line(err.message) && !quotes(err.message, stored));
}

/* Another character at the place. */
static void change(char *sealed, size_t place)
{
    char *c = sealed + place % strlen(sealed);
    *c = *c == 'A' ? 'B' : 'A';
}

static void check_round(const struct seal *seal, const char *api_key, size_t place)
{
    char sealed[STORE_API_KEY_SIZE], out[STORE_API_KEY_SIZE];
    struct err err = {.message = ""};

    if (seal_seal(seal, TOKEN_ID, api_key, sealed, sizeof sealed, &err) != ERR_NONE) {
        CHECK(strlen(api_key) > SEAL_PLAIN_MAX || seal_is_sealed(api_key));
        CHECK(fuzz_is_line(err.message) && !quotes(err.message, api_key));
        return;
    }
    CHECK(seal_is_sealed(sealed) && seal_is_current(seal, sealed) && fuzz_is_line(sealed));
    CHECK(!quotes(strrchr(sealed, ':'), api_key));
    CHECK(seal_unseal(seal, TOKEN_ID, sealed, out, sizeof out, &err) == ERR_NONE);
    CHECK(strcmp(out, api_key) == 0);
    CHECK(seal_unseal(seal, TOKEN_ID + 1, sealed, out, sizeof out, &err) == ERR_INTERNAL);
    CHECK(out[0] == '\0');
    change(sealed, place);
    if (seal_unseal(seal, TOKEN_ID, sealed, out, sizeof out, &err) == ERR_NONE)
        CHECK(!seal_is_sealed(sealed) && strcmp(out, sealed) == 0);
}

static void check_file(const char *data, size_t size)
{
    struct err err = {.message = ""};
    struct seal *seal = seal_open(fuzz_file(0, data, size), &err);

    if (seal != NULL)
        check_round(seal, "AIzaSy-0123", 20);
    else
        CHECK(err.code == ERR_CONFIG && fuzz_is_line(err.message) && strlen(err.message) < 200);
    seal_close(seal);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct seal *seal;
    struct fuzz_input input = {data, size};
    struct err err = {.message = ""};

    if (seal == NULL)
        CHECK((seal = seal_open(fuzz_file(1, keys, sizeof keys - 1), &err)) != NULL);
    uint8_t mode = fuzz_byte(&input);
    size = input.left;
    char *text = fuzz_rest(&input);
    switch (mode % 3) {
    case 0:
        check_stored(seal, text);
        check_stored(NULL, text);
        break;
    case 1:
        check_round(seal, text, mode);
        break;
    default:
        check_file(text, size);
        break;
    }
    free(text);
    return 0;
}
