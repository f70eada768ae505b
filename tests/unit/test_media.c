/* test_media.c - kinds of file by their bytes: made here, and the samples cut at every length. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(data, len) ((void)(data), (void)(len))
#define ASAN_UNPOISON_MEMORY_REGION(data, len) ((void)(data), (void)(len))
#endif

#include "buf.h"
#include "media.h"

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))
#define FILE_OF(s) (s), sizeof(s) - 1
#define UNKNOWN ((enum media_kind) - 1)

/* ---- helpers ---- */

static enum err_code check(const char *data, size_t len, enum media_kind *kind)
{
    struct err err = {0};
    enum err_code code = media_check((const unsigned char *)data, len, kind, &err);

    assert_true(code == ERR_NONE || code == ERR_INVALID_FILE || code == ERR_UNSUPPORTED_MEDIA_TYPE);
    if (code != ERR_NONE)
        assert_true(err.code == code && err.message[0] != '\0');
    return code;
}

/* Of a copy with nothing behind it, so that a sanitizer sees who reads past the end. */
static void expect(const char *what, const char *data, size_t len, enum err_code expected,
                   enum media_kind expected_kind)
{
    enum media_kind kind = UNKNOWN;
    char *copy = malloc(len > 0 ? len : 1);
    assert_non_null(copy);
    memcpy(copy, data, len);
    enum err_code code = check(copy, len, &kind);
    free(copy);

    if (code != expected || (code == ERR_NONE && kind != expected_kind))
        fail_msg("%s: %s, kind %d", what, err_info(code)->name, (int)kind);
}

/* ---- files made here ---- */

#define PDF "%PDF-1.4\n1 0 obj\n<< /Type /Page >>\nendobj\nstartxref\n9\n"
#define JUNK100                                                                                  \
    "junk junk junk junk junk junk junk junk junk junk junk junk junk junk junk junk junk junk " \
    "junk junk "
#define JUNK1000 JUNK100 JUNK100 JUNK100 JUNK100 JUNK100 JUNK100 JUNK100 JUNK100 JUNK100 JUNK100

#define PNG "\x89PNG\r\n\x1a\n"
#define IHDR "\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x8\0\0\0\0crc."
#define IDAT "\0\0\0\x5IDATabcdecrc."
#define IEND "\0\0\0\0IENDcrc."

#define SOI "\xFF\xD8"
#define APP0 "\xFF\xE0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
#define SCAN                      \
    "\xFF\xDA\0\x8\1\1\0\0\x3F\0" \
    "data\xFF\0data\xFF\xD0more\xFF\xD7last"
#define EOI "\xFF\xD9"

#define WEBP(size) "RIFF" size "WEBP"
#define VP8L "VP8L\x5\0\0\0/\0\0\0\0\0"

#define FTYP16(major) \
    "\0\0\0\x10"      \
    "ftyp" major "\0\0\0\0"
#define FTYP20(major, brand) \
    "\0\0\0\x14"             \
    "ftyp" major "\0\0\0\0" brand
#define FTYP28(major, a, b, c) \
    "\0\0\0\x1C"               \
    "ftyp" major "\0\0\0\0" a b c
#define MDAT "\0\0\0\x8mdat"

#define INVALID ERR_INVALID_FILE, UNKNOWN
#define FOREIGN ERR_UNSUPPORTED_MEDIA_TYPE, UNKNOWN

static const struct {
    const char *what, *data;
    size_t len;
    enum err_code code;
    enum media_kind kind;
} files[] = {
    {"empty", FILE_OF(""), INVALID},

    {"PDF", FILE_OF(PDF "%%EOF\n"), ERR_NONE, MEDIA_PDF},
    {"PDF, no line end", FILE_OF(PDF "%%EOF"), ERR_NONE, MEDIA_PDF},
    {"PDF with bytes behind", FILE_OF(PDF "%%EOF\r\n\r\n\0\0\0\0<html>"), ERR_NONE, MEDIA_PDF},
    {"PDF saved twice", FILE_OF(PDF "%%EOF\n" PDF "%%EOF\n"), ERR_NONE, MEDIA_PDF},
    {"PDF after a line", FILE_OF("HTTP/1.0 200 OK\r\n\r\n" PDF "%%EOF\n"), ERR_NONE, MEDIA_PDF},
    {"PDF after a mark of UTF-8", FILE_OF("\xEF\xBB\xBF" PDF "%%EOF\n"), ERR_NONE, MEDIA_PDF},
    {"PDF, header ends at 1024", FILE_OF(JUNK1000 "1234567890123456789" PDF "%%EOF"), ERR_NONE,
     MEDIA_PDF},
    {"PDF, header ends at 1025", FILE_OF(JUNK1000 "12345678901234567890" PDF "%%EOF"), FOREIGN},
    {"PDF, header only", FILE_OF("%PDF-1.7\n"), INVALID},
    {"PDF, header cut", FILE_OF("%PDF"), FOREIGN},
    {"PDF without end", FILE_OF(PDF), INVALID},
    {"PDF, end cut", FILE_OF(PDF "%%EO"), INVALID},
    {"PDF without header", FILE_OF("1 0 obj\nendobj\n%%EOF\n"), FOREIGN},

    {"PNG", FILE_OF(PNG IHDR IDAT IEND), ERR_NONE, MEDIA_PNG},
    {"PNG with bytes behind", FILE_OF(PNG IHDR IDAT IEND "\0\0\0"), ERR_NONE, MEDIA_PNG},
    {"PNG, signature only", FILE_OF(PNG), INVALID},
    {"PNG, signature cut", FILE_OF("\x89PNG\r\n\x1a"), FOREIGN},
    {"PNG without IHDR", FILE_OF(PNG IDAT IEND "12345678901234567890"), INVALID},
    {"PNG, IHDR of another size",
     FILE_OF(PNG "\0\0\0\x0EIHDR\0\0\0\1\0\0\0\1\x8\0\0\0\0+crc." IEND), INVALID},
    {"PNG without IEND", FILE_OF(PNG IHDR IDAT), INVALID},
    {"PNG, IEND cut", FILE_OF(PNG IHDR IDAT "\0\0\0\0IENDcrc"), INVALID},
    {"PNG, a chunk longer than the file", FILE_OF(PNG IHDR "\0\0\1\0IDATabcdecrc." IEND), INVALID},
    {"PNG, a chunk of 4 GB", FILE_OF(PNG IHDR "\xFF\xFF\xFF\xFFIDATabcdecrc." IEND), INVALID},
    {"PNG, a chunk of 4 GB less 12", FILE_OF(PNG IHDR "\xFF\xFF\xFF\xF4IDATabcdecrc." IEND),
     INVALID},
    {"PNG, IEND inside a chunk", FILE_OF(PNG IHDR "\0\0\0\x0CIDAT" IEND "crc."), INVALID},

    {"JPEG", FILE_OF(SOI APP0 SCAN EOI), ERR_NONE, MEDIA_JPEG},
    {"JPEG with bytes behind", FILE_OF(SOI APP0 SCAN EOI "\0\0\xFF"), ERR_NONE, MEDIA_JPEG},
    {"JPEG with fill bytes", FILE_OF(SOI "\xFF\xFF" APP0 SCAN "\xFF\xFF\xFF\xD9"), ERR_NONE,
     MEDIA_JPEG},
    {"JPEG of two scans", FILE_OF(SOI APP0 SCAN SCAN EOI), ERR_NONE, MEDIA_JPEG},
    {"JPEG, start only", FILE_OF("\xFF\xD8\xFF"), INVALID},
    {"JPEG, start cut", FILE_OF("\xFF\xD8"), FOREIGN},
    {"JPEG without end", FILE_OF(SOI APP0 SCAN), INVALID},
    {"JPEG, end cut", FILE_OF(SOI APP0 SCAN "\xFF"), INVALID},
    {"JPEG, only its thumbnail ends",
     FILE_OF(SOI "\xFF\xE1\0\x0E"
                 "Exif\0\0" SOI "ab" EOI SCAN),
     INVALID},
    {"JPEG, its thumbnail ends and so does it",
     FILE_OF(SOI "\xFF\xE1\0\x0E"
                 "Exif\0\0" SOI "ab" EOI SCAN EOI),
     ERR_NONE, MEDIA_JPEG},
    {"JPEG, a segment longer than the file", FILE_OF(SOI "\xFF\xE0\xFF\xFFJFIF" EOI), INVALID},
    {"JPEG, a second start is no end", FILE_OF(SOI APP0 SOI SCAN), INVALID},
    {"JPEG, a segment too short for its size", FILE_OF(SOI "\xFF\xE0\0\1JFIF" EOI), INVALID},

    {"WEBP", FILE_OF(WEBP("\x12\0\0\0") VP8L), ERR_NONE, MEDIA_WEBP},
    {"WEBP, VP8", FILE_OF(WEBP("\x0C\0\0\0") "VP8 \0\0\0\0"), ERR_NONE, MEDIA_WEBP},
    {"WEBP, VP8X", FILE_OF(WEBP("\x0C\0\0\0") "VP8X\0\0\0\0"), ERR_NONE, MEDIA_WEBP},
    {"WEBP with bytes behind", FILE_OF(WEBP("\x12\0\0\0") VP8L "\0\0\0"), ERR_NONE, MEDIA_WEBP},
    {"WEBP, header only", FILE_OF(WEBP("\x4\0\0\0")), INVALID},
    {"WEBP, cut", FILE_OF(WEBP("\x13\0\0\0") VP8L), INVALID},
    {"WEBP, a size of 4 GB", FILE_OF(WEBP("\xFF\xFF\xFF\xFF") VP8L), INVALID},
    {"WEBP, a size of 0", FILE_OF(WEBP("\0\0\0\0") VP8L), INVALID},
    {"WEBP, a size too small for an image", FILE_OF(WEBP("\x0B\0\0\0") VP8L), INVALID},
    {"WEBP without an image", FILE_OF(WEBP("\x12\0\0\0") "ALPH\x5\0\0\0/\0\0\0\0\0"), INVALID},

    {"HEIC", FILE_OF(FTYP28("heic", "mif1", "heic", "miaf") MDAT), ERR_NONE, MEDIA_HEIC},
    {"HEIC, its brand alone", FILE_OF(FTYP16("heic")), ERR_NONE, MEDIA_HEIC},
    {"HEIC, heix", FILE_OF(FTYP20("heix", "mif1") MDAT), ERR_NONE, MEDIA_HEIC},
    {"HEIC, heim", FILE_OF(FTYP20("heim", "mif1") MDAT), ERR_NONE, MEDIA_HEIC},
    {"HEIC, heis", FILE_OF(FTYP20("heis", "mif1") MDAT), ERR_NONE, MEDIA_HEIC},
    {"HEIC, hevc", FILE_OF(FTYP20("hevc", "msf1") MDAT), ERR_NONE, MEDIA_HEIC},
    {"HEIC, hevx", FILE_OF(FTYP20("hevx", "msf1") MDAT), ERR_NONE, MEDIA_HEIC},
    {"HEIC, general brand first", FILE_OF(FTYP28("mif1", "mif1", "miaf", "heic") MDAT), ERR_NONE,
     MEDIA_HEIC},
    {"HEIF, mif1", FILE_OF(FTYP20("mif1", "miaf") MDAT), ERR_NONE, MEDIA_HEIF},
    {"HEIF, msf1", FILE_OF(FTYP20("msf1", "miaf") MDAT), ERR_NONE, MEDIA_HEIF},
    {"HEIF, among the compatible", FILE_OF(FTYP20("abcd", "mif1") MDAT), ERR_NONE, MEDIA_HEIF},
    {"a minor version is no brand",
     FILE_OF("\0\0\0\x14"
             "ftypisomheicmp42" MDAT),
     FOREIGN},
    {"a brand behind the box is none", FILE_OF(FTYP20("isom", "mp42") "heicheic"), FOREIGN},
    {"AVIF", FILE_OF(FTYP28("avif", "avif", "mif1", "miaf") MDAT), FOREIGN},
    {"AVIF, general brand first", FILE_OF(FTYP28("mif1", "mif1", "avif", "miaf") MDAT), FOREIGN},
    {"AVIF, a sequence", FILE_OF(FTYP28("avis", "avif", "msf1", "miaf") MDAT), FOREIGN},
    {"MP4", FILE_OF(FTYP20("isom", "mp41") MDAT), FOREIGN},
    {"QuickTime", FILE_OF(FTYP20("qt  ", "qt  ") MDAT), FOREIGN},
    {"HEIC, cut in its ftyp",
     FILE_OF("\0\0\0\x14"
             "ftypheic\0\0\0\0mif"),
     INVALID},
    {"HEIC, cut before its brand",
     FILE_OF("\0\0\0\x14"
             "ftyp"),
     FOREIGN},
    {"HEIC, ftyp of 2 GB",
     FILE_OF("\x7F\xFF\xFF\xFC"
             "ftypheic\0\0\0\0mif1"),
     INVALID},
    {"HEIC, ftyp of 4 bytes",
     FILE_OF("\0\0\0\4"
             "ftypheic\0\0\0\0mif1"),
     INVALID},
    {"HEIC, ftyp without room for a brand",
     FILE_OF("\0\0\0\x0C"
             "ftypheic\0\0\0\0mif1"),
     INVALID},
    {"HEIC, ftyp of half a brand",
     FILE_OF("\0\0\0\x12"
             "ftypheic\0\0\0\0mif1"),
     INVALID},

    {"GIF", FILE_OF("GIF89a\1\0\1\0\0\0\0;"), FOREIGN},
    {"TIFF, II", FILE_OF("II*\0\x8\0\0\0\0\0"), FOREIGN},
    {"TIFF, MM", FILE_OF("MM\0*\0\0\0\x8\0\0"), FOREIGN},
    {"BMP", FILE_OF("BM\x3A\0\0\0\0\0\0\0\x36\0\0\0"), FOREIGN},
    {"WAVE", FILE_OF("RIFF\x24\0\0\0WAVEfmt \x10\0\0\0"), FOREIGN},
    {"RIFF, cut", FILE_OF("RIFF\x24\0\0\0WEB"), FOREIGN},
    {"ZIP, Office", FILE_OF("PK\3\4\x14\0\0\0\0\0"), FOREIGN},
    {"OLE, old Office", FILE_OF("\xD0\xCF\x11\xE0\xA1\xB1\x1A\xE1\0\0"), FOREIGN},
    {"text", FILE_OF("Invoice 1, total 10.00\n"), FOREIGN},
    {"HTML", FILE_OF("<!DOCTYPE html><html></html>"), FOREIGN},
    {"one byte", FILE_OF("%"), FOREIGN},
    {"NUL bytes", FILE_OF("\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"), FOREIGN},
};

static void test_files(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT(files); i++)
        expect(files[i].what, files[i].data, files[i].len, files[i].code, files[i].kind);
}

static void test_far_from_the_end(void **state)
{
    struct buf b;
    (void)state;

    buf_init(&b, 1000000); /* what a mail gateway leaves behind a PDF */
    buf_append_str(&b, PDF "%%EOF\n");
    for (int i = 0; i < 60000; i++)
        buf_append_char(&b, '\0');
    expect("PDF with 60 KB behind", b.data, b.len, ERR_NONE, MEDIA_PDF);
    buf_reset(&b);
}

/* ---- the samples ---- */

static const struct {
    const char *name;
    enum media_kind kind;
    int pages;
    const char
        *good_from; /* what must be there before a part of the file may pass; "": all of it */
} samples[] = {
    {"invoice-de.pdf", MEDIA_PDF, 1, "%%EOF"},
    {"invoice-ja.pdf", MEDIA_PDF, 1, "%%EOF"},
    {"invoice-two-pages.pdf", MEDIA_PDF, 2, "%%EOF"},
    {"receipt.png", MEDIA_PNG, 1, ""},
    {"invoice.jpeg", MEDIA_JPEG, 1, ""},
    {"invoice.webp", MEDIA_WEBP, 1, ""},
    {"invoice.heic", MEDIA_HEIC, 1, "ftyp"},
};

static char *load(const char *name, size_t *len)
{
    char path[128];
    snprintf(path, sizeof path, "tests/samples/%s", name);
    FILE *file = fopen(path, "r");
    if (file == NULL)
        fail_msg("%s cannot be read; the tests run in the top folder", path);
    assert_int_equal(fseek(file, 0, SEEK_END), 0);
    *len = (size_t)ftell(file);
    rewind(file);
    char *data = malloc(*len);
    assert_non_null(data);
    assert_int_equal(fread(data, 1, *len, file), *len);
    assert_int_equal(fclose(file), 0);
    return data;
}

/* In a body that is the file alone. */
static int64_t estimate_kind(enum media_kind kind, const char *data, size_t len)
{
    struct find_marks marks;

    find_marks_init(&marks, MEDIA_PAGE_MARK, strlen(MEDIA_PAGE_MARK));
    find_marks_look(&marks, data, len);
    return media_estimate_tokens(kind, (const unsigned char *)data, len, &marks, data);
}

static void test_samples(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT(samples); i++) {
        size_t len;
        char *data = load(samples[i].name, &len);
        char *more = calloc(1, len + 700);
        expect(samples[i].name, data, len, ERR_NONE, samples[i].kind);
        assert_non_null(more);
        memcpy(more, data, len);
        expect(samples[i].name, more, len + 700, ERR_NONE, samples[i].kind);
        int64_t tokens = estimate_kind(samples[i].kind, data, len);
        assert_in_range(tokens, 1120 * samples[i].pages + 1000, 3000 * samples[i].pages + 1000);
        free(more);
        free(data);
    }
}

/* Cut anywhere, a sample is refused or, where the check is cheap by intent, passes; nothing is read
 * that is not there. */
static void test_every_prefix(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT(samples); i++) {
        size_t len, good_from, passed = 0;
        char *data = load(samples[i].name, &len);
        good_from = len;
        if (samples[i].good_from[0] != '\0') {
            const char *mark =
                memmem(data, len, samples[i].good_from, strlen(samples[i].good_from));
            assert_non_null(mark);
            good_from = (size_t)(mark - data) + strlen(samples[i].good_from);
        }
        for (size_t n = len + 1; n-- > 0;) {
            enum media_kind kind = UNKNOWN;
            ASAN_POISON_MEMORY_REGION(data + n, n == len ? 0 : 1);
            enum err_code code = check(data, n, &kind);
            if (code == ERR_NONE && (n < good_from || kind != samples[i].kind))
                fail_msg("%s passes with %zu of %zu bytes", samples[i].name, n, len);
            passed += code == ERR_NONE;
        }
        assert_true(passed > 0);
        ASAN_UNPOISON_MEMORY_REGION(data, len);
        free(data);
    }
}

/* ---- what follows from a kind ---- */

static void test_types(void **state)
{
    static const char *const types[] = {
        [MEDIA_PDF] = "application/pdf", [MEDIA_PNG] = "image/png",   [MEDIA_JPEG] = "image/jpeg",
        [MEDIA_WEBP] = "image/webp",     [MEDIA_HEIC] = "image/heic", [MEDIA_HEIF] = "image/heif",
    };
    (void)state;

    for (int kind = MEDIA_PDF; kind <= MEDIA_HEIF; kind++)
        assert_string_equal(media_type((enum media_kind)kind), types[kind]);
}

static int64_t estimate(const char *text, size_t len)
{
    char *copy = malloc(len);
    assert_non_null(copy);
    memcpy(copy, text, len);
    int64_t tokens = estimate_kind(MEDIA_PDF, copy, len);
    free(copy);
    return tokens;
}

static void test_estimates(void **state)
{
    static char large[1000000];
    const int64_t one = estimate(FILE_OF("/Type /Page ")), page = one - 1500;
    struct buf b;
    (void)state;

    assert_true(page >= 1120); /* what Gemini counts for a page at its finest */
    assert_int_equal(estimate(FILE_OF("/Type/Page>>")), one);
    assert_int_equal(estimate(FILE_OF("/Type\r\n\t /Page\n/Type /Pages /Type /Page/Type/Catalog")),
                     one + page);
    assert_int_equal(estimate(FILE_OF("/Type /Pages")), one); /* none in the clear: by its size */
    assert_int_equal(estimate(FILE_OF("/Type")), one);
    assert_int_equal(estimate(FILE_OF("/Type /Page")), one);
    assert_int_equal(estimate(FILE_OF("/Type   ")), one);
    assert_true(estimate(large, sizeof large) >= one + 9 * page);
    assert_int_equal(estimate_kind(MEDIA_JPEG, large, sizeof large), one);
    /* What stands before the file, or behind it, is not its own. */
    static const char form[] = "/Type/Page /Type/Page.%PDF-/Type/Page /Type/Page /Type/Page.";
    struct find_marks marks;
    find_marks_init(&marks, MEDIA_PAGE_MARK, strlen(MEDIA_PAGE_MARK));
    find_marks_look(&marks, form, sizeof form);
    assert_int_equal(
        media_estimate_tokens(MEDIA_PDF, (const unsigned char *)form + 22, 27, &marks, form),
        one + page);
    buf_init(&b, sizeof large);
    for (int i = 0; i < 1001; i++)
        buf_append_str(&b, "/Type/Page ");
    assert_int_equal(estimate(b.data, b.len), 1500 + 1000 * page); /* Gemini reads no more */
    buf_reset(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_files),   cmocka_unit_test(test_far_from_the_end),
        cmocka_unit_test(test_samples), cmocka_unit_test(test_every_prefix),
        cmocka_unit_test(test_types),   cmocka_unit_test(test_estimates),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
