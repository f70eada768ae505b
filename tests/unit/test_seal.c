/* test_seal.c - API keys sealed and opened; what must not open. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "seal.h"

#define ONE "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
#define TWO "//79/Pv6+fj39vX08/Lx8O/u7ezr6uno5+bl5OPi4eA="
#define API_KEY "AIzaSy-0123_abcdefghijklmnopqrstuvwxyz"

static char directory[] = "/tmp/test_seal.XXXXXX";
static char path[64];

static int set_up_all(void **state)
{
    (void)state;
    if (mkdtemp(directory) == NULL)
        return -1;
    snprintf(path, sizeof path, "%s/seal.key", directory);
    return 0;
}

static int tear_down_all(void **state)
{
    (void)state;
    unlink(path);
    return rmdir(directory);
}

static void write_file(const char *content)
{
    FILE *file = fopen(path, "w");

    assert_non_null(file);
    fputs(content, file);
    assert_int_equal(fclose(file), 0);
    assert_int_equal(chmod(path, 0600), 0);
}

static struct seal *open_with(const char *content)
{
    struct err err = {0};
    struct seal *seal;

    write_file(content);
    seal = seal_open(path, &err);
    if (seal == NULL)
        fail_msg("%s", err.message);
    return seal;
}

static void seal_for(const struct seal *seal, int64_t token_id, char out[1025])
{
    struct err err = {0};

    if (seal_seal(seal, token_id, API_KEY, out, 1025, &err) != ERR_NONE)
        fail_msg("%s", err.message);
}

static void expect_closed(const struct seal *seal, int64_t token_id, const char *stored,
                          const char *message)
{
    struct err err = {0};
    char out[1025] = "leftover";

    assert_int_equal(seal_unseal(seal, token_id, stored, out, sizeof out, &err), ERR_INTERNAL);
    assert_string_equal(out, "");
    if (strstr(err.message, message) == NULL)
        fail_msg("%s", err.message);
    assert_null(strstr(err.message, stored));
}

static void expect_opens(const struct seal *seal, int64_t token_id, const char *stored)
{
    struct err err = {0};
    char out[1025];

    if (seal_unseal(seal, token_id, stored, out, sizeof out, &err) != ERR_NONE)
        fail_msg("%s", err.message);
    assert_string_equal(out, API_KEY);
}

static void what_is_sealed_opens_again(void **state)
{
    struct seal *seal = open_with(ONE "\n");
    char a[1025], b[1025];

    (void)state;
    seal_for(seal, 7, a);
    seal_for(seal, 7, b);
    assert_true(seal_is_sealed(a));
    assert_true(seal_is_current(seal, a));
    assert_null(strstr(a, API_KEY));
    assert_string_not_equal(a, b);
    for (const char *p = a; *p != '\0'; p++)
        assert_true(*p > ' ' && *p < 0x7f);
    expect_opens(seal, 7, a);
    expect_opens(seal, 7, b);
    /* in place */
    assert_int_equal(seal_unseal(seal, 7, a, a, sizeof a, NULL), ERR_NONE);
    assert_string_equal(a, API_KEY);
    seal_close(seal);
}

static void the_longest_key_fits_its_column(void **state)
{
    struct seal *seal = open_with(ONE);
    struct err err = {0};
    char plain[SEAL_PLAIN_MAX + 2], sealed[1025], back[1025];

    (void)state;
    memset(plain, 'k', sizeof plain);
    plain[SEAL_PLAIN_MAX + 1] = '\0';
    assert_int_equal(seal_seal(seal, 1, plain, sealed, sizeof sealed, &err), ERR_BAD_VALUE);
    plain[SEAL_PLAIN_MAX] = '\0';
    assert_int_equal(seal_seal(seal, 1, plain, sealed, sizeof sealed, &err), ERR_NONE);
    assert_int_equal(seal_unseal(seal, 1, sealed, back, sizeof back, &err), ERR_NONE);
    assert_string_equal(back, plain);
    assert_int_equal(seal_unseal(seal, 1, sealed, back, SEAL_PLAIN_MAX, &err), ERR_INTERNAL);
    assert_int_equal(seal_seal(seal, 1, plain, sealed, 1000, &err), ERR_BAD_VALUE);
    seal_close(seal);
}

static void another_row_does_not_open_it(void **state)
{
    struct seal *seal = open_with(ONE);
    char sealed[1025];

    (void)state;
    seal_for(seal, 7, sealed);
    expect_closed(seal, 8, sealed, "token 8 does not open");
    seal_close(seal);
}

static void a_changed_one_does_not_open(void **state)
{
    struct seal *seal = open_with(ONE);
    char sealed[1025];

    (void)state;
    seal_for(seal, 7, sealed);
    const size_t len = strlen(sealed);
    for (size_t i = sizeof "sealed:v1:01234567:" - 1; i + 1 < len; i++) {
        const char c = sealed[i];
        sealed[i] = c == 'A' ? 'B' : 'A';
        expect_closed(seal, 7, sealed, "does not open");
        sealed[i] = c;
    }
    sealed[len - 4] = '\0';
    expect_closed(seal, 7, sealed, "does not open");
    sealed[sizeof "sealed:v1:01234567:" - 1] = '\0';
    expect_closed(seal, 7, sealed, "does not open");
    expect_closed(seal, 7, "sealed:v2:01234567:AAAA", "does not hold");
    expect_closed(seal, 7, "sealed:", "does not hold");
    seal_close(seal);
}

static void keys_are_replaced_one_beside_the_other(void **state)
{
    struct seal *seal = open_with(ONE);
    char sealed[1025], again[1025];

    (void)state;
    seal_for(seal, 7, sealed);
    seal_close(seal);

    seal = open_with("# since 2026\n" TWO "\n\n  # before\n" ONE "\r\n");
    expect_opens(seal, 7, sealed);
    assert_false(seal_is_current(seal, sealed));
    seal_for(seal, 7, again);
    assert_true(seal_is_current(seal, again));
    seal_close(seal);

    seal = open_with(TWO);
    expect_closed(seal, 7, sealed, "seal.key_file does not hold");
    expect_opens(seal, 7, again);
    seal_close(seal);
    expect_closed(NULL, 7, again, "no seal.key_file");
}

static void plain_keys_pass(void **state)
{
    struct err err = {0};
    char sealed[1025];
    struct seal *seal = open_with(ONE);

    (void)state;
    expect_opens(NULL, 7, API_KEY);
    expect_opens(seal, 7, API_KEY);
    assert_false(seal_is_sealed(API_KEY));
    assert_false(seal_is_current(seal, API_KEY));
    seal_for(seal, 7, sealed);
    assert_int_equal(seal_seal(seal, 7, sealed, sealed, sizeof sealed, &err), ERR_BAD_VALUE);
    seal_close(seal);
}

static void expect_refused(const char *content, mode_t mode, const char *message)
{
    struct err err = {0};

    write_file(content);
    assert_int_equal(chmod(path, mode), 0);
    assert_null(seal_open(path, &err));
    assert_int_equal(err.code, ERR_CONFIG);
    assert_non_null(strstr(err.message, path));
    if (strstr(err.message, message) == NULL)
        fail_msg("%s", err.message);
    assert_null(strstr(err.message, "AAECAwQF"));
}

static void faulty_files_are_refused(void **state)
{
    struct err err = {0};

    (void)state;
    expect_refused("", 0600, "holds no key");
    expect_refused("# nothing\n", 0600, "holds no key");
    expect_refused("\nAAECAwQFBgcICQ==\n", 0600, "line 2 is not the base64 of 32 bytes");
    expect_refused(ONE "AAAA\n", 0600, "line 1 is not the base64 of 32 bytes");
    expect_refused("AAECAwQF!gcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", 0600, "line 1 is not");
    expect_refused(ONE "\n" ONE "\n", 0600, "holds the key of line 2 twice");
    expect_refused(ONE "\n", 0604, "open to every user");
    unlink(path);
    assert_null(seal_open(path, &err));
    assert_non_null(strstr(err.message, "cannot be read"));
    seal_close(NULL);
}

static void there_is_room_for_eight(void **state)
{
    char content[9 * 64] = "";
    struct seal *seal;

    (void)state;
    for (int i = 0; i < 8; i++)
        snprintf(content + strlen(content), sizeof content - strlen(content),
                 "%cAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n", 'A' + i);
    seal = open_with(content);
    seal_close(seal);
    snprintf(content + strlen(content), sizeof content - strlen(content), TWO "\n");
    expect_refused(content, 0600, "more than 8 keys");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_sealed_opens_again),
        cmocka_unit_test(the_longest_key_fits_its_column),
        cmocka_unit_test(another_row_does_not_open_it),
        cmocka_unit_test(a_changed_one_does_not_open),
        cmocka_unit_test(keys_are_replaced_one_beside_the_other),
        cmocka_unit_test(plain_keys_pass),
        cmocka_unit_test(faulty_files_are_refused),
        cmocka_unit_test(there_is_room_for_eight),
    };
    return cmocka_run_group_tests(tests, set_up_all, tear_down_all);
}
