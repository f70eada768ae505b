/* media.c - kinds of file by their bytes. See media.h.
 *
 * Sources: ISO 32000-1 7.5 (PDF; readers accept the header within the first 1,024 bytes, annex H),
 * PNG third edition section 5, ITU T.81 annex B (JPEG), the WebP container specification,
 * ISO/IEC 23008-12 (HEIF brands). */
#include "media.h"

#include <stdbool.h>
#include <string.h>

#define PAGES_MAX 1000 /* the most that Gemini reads */
#define PDF_HEADER_WITHIN 1024
#define PDF_END_WITHIN 65536
#define PDF_END_NEAR 1024 /* where it nearly always is */

static uint32_t big_endian(const unsigned char *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static uint32_t little_endian(const unsigned char *p)
{
    return (uint32_t)p[3] << 24 | (uint32_t)p[2] << 16 | (uint32_t)p[1] << 8 | p[0];
}

static bool starts(const unsigned char *data, size_t len, const char *with, size_t n)
{
    return len >= n && memcmp(data, with, n) == 0;
}

#define STARTS(data, len, literal) starts((data), (len), (literal), sizeof(literal) - 1)

static const char *fault_in_pdf(const unsigned char *data, size_t len)
{
    const unsigned char *end = data + len;
    size_t near = len < PDF_END_NEAR ? len : PDF_END_NEAR;
    size_t window = len < PDF_END_WITHIN ? len : PDF_END_WITHIN;

    return find_bytes(end - near, near, "%%EOF", 5) != NULL ||
                   find_bytes(end - window, window, "%%EOF", 5) != NULL
               ? NULL
               : "PDF without %%EOF";
}

/* Chunks from IHDR to IEND; their checksums are the reader's business. */
static const char *fault_in_png(const unsigned char *data, size_t len)
{
    size_t at = 8;

    if (len < at + 12 + 13 || memcmp(data + at + 4, "IHDR", 4) != 0 || big_endian(data + at) != 13)
        return "PNG without IHDR";
    while (len - at >= 12) {
        uint32_t size = big_endian(data + at);
        if (memcmp(data + at + 4, "IEND", 4) == 0)
            return NULL;
        if (size > len - at - 12)
            break;
        at += 12 + (size_t)size;
    }
    return "PNG without IEND";
}

/* Segments from SOI to EOI. Between them, as libjpeg does, stray bytes are passed over. */
static const char *fault_in_jpeg(const unsigned char *data, size_t len)
{
    size_t at = 2;

    while (at < len) {
        const unsigned char *ff = memchr(data + at, 0xFF, len - at);
        if (ff == NULL)
            break;
        at = (size_t)(ff - data) + 1;
        while (at < len && data[at] == 0xFF) /* fill bytes */
            at++;
        if (at == len)
            break;
        unsigned char marker = data[at++];
        if (marker == 0xD9)
            return NULL;
        /* stuffed zero, TEM, RSTn and SOI stand alone */
        if (marker <= 0x01 || (marker >= 0xD0 && marker <= 0xD8))
            continue;
        if (len - at < 2)
            break;
        size_t size = (size_t)data[at] << 8 | data[at + 1];
        if (size < 2 || size > len - at)
            break;
        at += size; /* after SOS the scan's data follows: passed over like stray bytes */
    }
    return "JPEG without EOI";
}

static const char *fault_in_webp(const unsigned char *data, size_t len)
{
    if (len < 20 || memcmp(data + 12, "VP8", 3) != 0)
        return "WEBP without an image";
    uint32_t size = little_endian(data + 4);
    return size >= 12 && size <= len - 8 ? NULL : "WEBP shorter than its RIFF size";
}

/* What the brands of an ISO media file say; the major brand stands first. */
enum brand { BRAND_FOREIGN, BRAND_DAMAGED, BRAND_HEIC, BRAND_HEIF };

static enum brand find_brand(const unsigned char *data, size_t len)
{
    static const char heic[][5] = {"heic", "heix", "heim", "heis", "hevc", "hevx", "hevm", "hevs"};
    static const char heif[][5] = {"mif1", "mif2", "msf1"};
    uint32_t size = big_endian(data);
    bool image = false;

    if (size < 16 || size > len || size % 4 != 0)
        return BRAND_DAMAGED;
    for (size_t at = 8; at + 4 <= size; at += 4) {
        const unsigned char *brand = data + at;
        if (at == 12) /* the minor version */
            continue;
        if (memcmp(brand, "avif", 4) == 0 || memcmp(brand, "avis", 4) == 0)
            return BRAND_FOREIGN;
        for (size_t i = 0; i < sizeof heic / sizeof *heic; i++)
            if (memcmp(brand, heic[i], 4) == 0)
                return BRAND_HEIC;
        for (size_t i = 0; i < sizeof heif / sizeof *heif; i++)
            image = image || memcmp(brand, heif[i], 4) == 0;
    }
    return image ? BRAND_HEIF : BRAND_FOREIGN;
}

/* NULL for a sound file of a kind that Gemini reads; else what is wrong. *known: is it such a kind? */
static const char *examine(const unsigned char *data, size_t len, enum media_kind *kind,
                           bool *known)
{
    *known = true;
    if (len == 0)
        return "empty file";
    if (STARTS(data, len, "\x89PNG\r\n\x1a\n")) {
        *kind = MEDIA_PNG;
        return fault_in_png(data, len);
    }
    if (STARTS(data, len, "\xFF\xD8\xFF")) {
        *kind = MEDIA_JPEG;
        return fault_in_jpeg(data, len);
    }
    if (STARTS(data, len, "RIFF") && len >= 12 && memcmp(data + 8, "WEBP", 4) == 0) {
        *kind = MEDIA_WEBP;
        return fault_in_webp(data, len);
    }
    if (len >= 12 && memcmp(data + 4, "ftyp", 4) == 0) {
        enum brand brand = find_brand(data, len);
        *kind = brand == BRAND_HEIF ? MEDIA_HEIF : MEDIA_HEIC;
        *known = brand != BRAND_FOREIGN;
        if (brand == BRAND_FOREIGN)
            return "an ISO media file that is not HEIC";
        return brand == BRAND_DAMAGED ? "HEIC with a damaged ftyp box" : NULL;
    }
    size_t window = len < PDF_HEADER_WITHIN ? len : PDF_HEADER_WITHIN;
    if (memmem(data, window, "%PDF-", 5) != NULL) {
        *kind = MEDIA_PDF;
        return fault_in_pdf(data, len);
    }
    *known = false;
    return "not a PDF, PNG, JPEG, WEBP or HEIC file";
}

enum err_code media_check(const unsigned char *data, size_t len, enum media_kind *kind,
                          struct err *err)
{
    bool known;
    const char *fault = examine(data, len, kind, &known);

    if (fault == NULL)
        return ERR_NONE;
    return err_set(err, known ? ERR_INVALID_FILE : ERR_UNSUPPORTED_MEDIA_TYPE, "%s", fault);
}

const char *media_type(enum media_kind kind)
{
    switch (kind) {
    case MEDIA_PDF:
        return "application/pdf";
    case MEDIA_PNG:
        return "image/png";
    case MEDIA_JPEG:
        return "image/jpeg";
    case MEDIA_WEBP:
        return "image/webp";
    case MEDIA_HEIC:
        return "image/heic";
    case MEDIA_HEIF:
        return "image/heif";
    }
    return "application/octet-stream";
}

/* Page objects that stand in the clear: "/Type /Page", not "/Pages". 0 where objects are packed into
 * streams, as PDF 1.5 and later may. */
static int64_t count_pages(const char *data, size_t len, const struct find_marks *marks,
                           const char *body)
{
    const char *at = data, *end = data + len;
    int64_t pages = 0;

    while (pages < PAGES_MAX &&
           (at = find_marks_next(marks, body, (size_t)(end - body), at)) != NULL) {
        at += marks->n;
        while (at < end && (*at == ' ' || *at == '\r' || *at == '\n' || *at == '\t'))
            at++;
        if (end - at > 5 && memcmp(at, "/Page", 5) == 0 && at[5] != 's')
            pages++;
    }
    return pages;
}

int64_t media_estimate_tokens(enum media_kind kind, const unsigned char *data, size_t len,
                              const struct find_marks *marks, const char *body)
{
    const int64_t prompt = 1500, page = 1600; /* 560 to 1,120 in for a page, and its lines out */
    int64_t pages = 1;

    if (kind == MEDIA_PDF) {
        pages = count_pages((const char *)data, len, marks, body);
        if (pages == 0)
            pages = 1 + (int64_t)(len / 100000);
        if (pages > PAGES_MAX)
            pages = PAGES_MAX;
    }
    return prompt + pages * page;
}
