/* test_find.c - find_bytes() and marks, against memmem() and a plain search. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <cmocka.h>

#include "find.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))

/* As find_bytes() is to find it, byte by byte. */
static const char *plainly(const char *data, size_t len, const char *what, size_t n)
{
    for (size_t i = 0; i + n <= len; i++)
        if (memcmp(data + i, what, n) == 0)
            return data + i;
    return NULL;
}

/* The end of a page behind which nobody may read. */
static char *page_end(void)
{
    enum { PAGE = 4096 };
    char *pages = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    assert_true(pages != MAP_FAILED);
    assert_int_equal(mprotect(pages + PAGE, PAGE, PROT_NONE), 0);
    return pages + PAGE;
}

/* At every place in data of every length, with nothing behind it. */
static void test_every_place(void **state)
{
    static const char *const whats[] = {"x", "xy", "/Type",
                                        "\r\n--a boundary of forty bytes or so -----"};
    char *const end = page_end();
    (void)state;

    for (size_t w = 0; w < COUNT(whats); w++) {
        size_t n = strlen(whats[w]);
        for (size_t len = 0; len <= 200; len++) {
            char *data = end - len;
            memset(data, '.', len);
            assert_null(find_bytes(data, len, whats[w], n));
            for (size_t at = 0; at + n <= len; at++) {
                memset(data, '.', len);
                memcpy(data + at, whats[w], n);
                assert_ptr_equal(find_bytes(data, len, whats[w], n), data + at);
                assert_null(find_bytes(data, at + n - 1, whats[w], n));
            }
        }
    }
}

/* Data of few different bytes: full of what nearly fits. */
static void test_what_nearly_fits(void **state)
{
    char data[300], what[9];
    (void)state;

    srand(1);
    for (int i = 0; i < 20000; i++) {
        size_t len = (size_t)rand() % sizeof data, n = 1 + (size_t)rand() % sizeof what;
        for (size_t k = 0; k < len; k++)
            data[k] = (char)('a' + rand() % 2);
        for (size_t k = 0; k < n; k++)
            what[k] = (char)('a' + rand() % 2);
        assert_ptr_equal(find_bytes(data, len, what, n), plainly(data, len, what, n));
    }
}

/* All that find_marks_next() finds from the beginning on. */
static size_t count_all(const struct find_marks *marks, const char *data, size_t len)
{
    const char *at = data;
    size_t count = 0;

    while ((at = find_marks_next(marks, data, len, at)) != NULL) {
        assert_ptr_equal(at, plainly(at, len - (size_t)(at - data), marks->what, marks->n));
        count++;
        at++;
    }
    return count;
}

/* However the data came in, and however little of it was looked at: the same is found. */
static void test_marks_in_pieces(void **state)
{
    enum { LEN = 2000 };
    char data[LEN];
    (void)state;

    srand(2);
    for (int i = 0; i < LEN; i++)
        data[i] = (char)('a' + rand() % 4);
    for (size_t piece = 1; piece <= LEN; piece += piece < 20 ? 1 : 97) {
        for (size_t looked = 0; looked <= LEN; looked += 500) {
            struct find_marks marks;
            find_marks_init(&marks, "abc", 3);
            for (size_t len = piece; len <= looked; len += piece)
                find_marks_look(&marks, data, len);
            size_t count = 0;
            for (const char *at = data;
                 (at = plainly(at, (size_t)(data + LEN - at), "abc", 3)) != NULL; at++)
                count++;
            assert_in_range(count, 5, FIND_MARKS);
            assert_int_equal(count_all(&marks, data, LEN), count);
        }
    }
}

/* More than there is room for is found all the same. */
static void test_more_than_marks(void **state)
{
    char data[5 * FIND_MARKS];
    struct find_marks marks;
    (void)state;

    memset(data, 'x', sizeof data);
    find_marks_init(&marks, "xx", 2);
    find_marks_look(&marks, data, sizeof data / 2);
    find_marks_look(&marks, data, sizeof data);
    assert_int_equal(marks.count, FIND_MARKS);
    assert_int_equal(count_all(&marks, data, sizeof data), sizeof data - 1);
}

/* What was marked in the whole, asked for in a part of it. */
static void test_within_less(void **state)
{
    static const char data[] = "..ab....ab..";
    struct find_marks marks;
    (void)state;

    find_marks_init(&marks, "ab", 2);
    find_marks_look(&marks, data, sizeof data - 1);
    assert_int_equal(marks.count, 2);
    assert_ptr_equal(find_marks_next(&marks, data, 12, data), data + 2);
    assert_ptr_equal(find_marks_next(&marks, data, 12, data + 3), data + 8);
    assert_ptr_equal(find_marks_next(&marks, data, 10, data + 8), data + 8);
    assert_null(find_marks_next(&marks, data, 9, data + 3));
    assert_null(find_marks_next(&marks, data, 3, data));
    assert_null(find_marks_next(&marks, data, 12, data + 9));
    assert_null(find_marks_next(&marks, data, 12, data + 12));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_place),     cmocka_unit_test(test_what_nearly_fits),
        cmocka_unit_test(test_marks_in_pieces), cmocka_unit_test(test_more_than_marks),
        cmocka_unit_test(test_within_less),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
