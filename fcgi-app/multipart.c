/* multipart.c - multipart/form-data, parsed in place. See multipart.h.
 *
 * The grammar (RFC 2046 section 5.1.1): [preamble CRLF] delimiter {header CRLF} CRLF data CRLF
 * delimiter … "--" [epilogue], a delimiter being "--" boundary at the beginning of a line, followed
 * by optional white space. Parameters are read as browsers write them (WHATWG: quotes as %22). */
#include "multipart.h"

#include <stdbool.h>
#include <string.h>
#include <strings.h>

#define MAX_BOUNDARY 70

/* A piece of the body that is still to be read. */
struct span {
    const char *at, *end;
};

static size_t left(const struct span *s)
{
    return (size_t)(s->end - s->at);
}

static bool is_blank(char c)
{
    return c == ' ' || c == '\t';
}

static void skip_blanks(struct span *s)
{
    while (s->at < s->end && is_blank(*s->at))
        s->at++;
}

/* A token's end: what RFC 2045 calls tspecials, blanks and controls end it. */
static bool is_token_char(char c)
{
    return (unsigned char)c > ' ' && (unsigned char)c != 0x7F &&
           strchr("()<>@,;:\\\"/[]?=", c) == NULL;
}

/* A quoted string after its opening quote. Browsers write %22 for a quote and keep backslashes as
 * they are; others escape with a backslash: only \" and \\ are taken for escapes. */
static bool read_quoted(struct span *s, char *out, size_t size)
{
    size_t n = 0;

    while (s->at < s->end && *s->at != '"') {
        char c = *s->at++;
        if (c == '\\' && s->at < s->end && (*s->at == '"' || *s->at == '\\'))
            c = *s->at++;
        else if (c == '%' && left(s) >= 2 && s->at[0] == '2' && s->at[1] == '2') {
            c = '"';
            s->at += 2;
        }
        if (n + 1 == size || ((unsigned char)c < ' ' && c != '\t'))
            return false;
        out[n++] = c;
    }
    if (s->at == s->end)
        return false;
    s->at++;
    out[n] = '\0';
    return true;
}

static bool read_token(struct span *s, char *out, size_t size)
{
    size_t n = 0;

    while (s->at < s->end && is_token_char(*s->at)) {
        if (n + 1 == size)
            return false;
        out[n++] = *s->at++;
    }
    out[n] = '\0';
    return n > 0;
}

/* Reads "; name=value" parameters until one is called wanted. *found stays false where none is. False
 * for a malformed line, and for a parameter that stands there twice. */
static bool find_parameter(struct span s, const char *wanted, char *out, size_t size, bool *found)
{
    char name[64], value[1024];

    *found = false;
    for (;;) {
        skip_blanks(&s);
        if (s.at == s.end)
            return true;
        if (*s.at != ';')
            return false;
        s.at++;
        skip_blanks(&s);
        if (s.at == s.end)
            return true; /* a ';' at the end: harmless */
        if (!read_token(&s, name, sizeof name))
            return false;
        skip_blanks(&s);
        if (s.at == s.end || *s.at != '=')
            return false;
        s.at++;
        skip_blanks(&s);
        bool quoted = s.at < s.end && *s.at == '"';
        if (quoted)
            s.at++;
        if (!(quoted ? read_quoted(&s, value, sizeof value) : read_token(&s, value, sizeof value)))
            return false;
        if (strcasecmp(name, wanted) == 0) {
            if (*found || strlen(value) >= size)
                return false;
            memcpy(out, value, strlen(value) + 1);
            *found = true;
        }
    }
}

/* RFC 2046: 1 to 70 characters, a space not last. */
static bool boundary_is_sound(const char *boundary)
{
    size_t n = strlen(boundary);

    if (n == 0 || n > MAX_BOUNDARY || boundary[n - 1] == ' ')
        return false;
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)boundary[i] < ' ' || (unsigned char)boundary[i] >= 0x7F)
            return false;
    return true;
}

static enum err_code find_boundary(const char *content_type, char *boundary, size_t size,
                                   struct err *err)
{
    static const char type[] = "multipart/form-data";
    size_t n = sizeof type - 1;
    bool found;

    if (strncasecmp(content_type, type, n) != 0 ||
        (content_type[n] != '\0' && content_type[n] != ';' && !is_blank(content_type[n])))
        return err_set(err, ERR_BAD_REQUEST, "The request must be multipart/form-data.");
    struct span s = {content_type + n, content_type + strlen(content_type)};
    if (!find_parameter(s, "boundary", boundary, size, &found) || !found ||
        !boundary_is_sound(boundary))
        return err_set(err, ERR_BAD_REQUEST,
                       "The Content-Type names no usable multipart boundary.");
    return ERR_NONE;
}

/* One line of a part's header, without its CRLF. */
static enum err_code read_header(struct span line, struct arena *arena, struct multipart_part *part,
                                 struct err *err)
{
    static const char disposition[] = "content-disposition:",
                      encoding[] = "content-transfer-encoding:";
    char type[64], name[257];
    bool found;

    if (left(&line) >= sizeof encoding - 1 &&
        strncasecmp(line.at, encoding, sizeof encoding - 1) == 0) {
        line.at += sizeof encoding - 1;
        skip_blanks(&line);
        if (!read_token(&line, type, sizeof type) ||
            (strcasecmp(type, "binary") != 0 && strcasecmp(type, "8bit") != 0 &&
             strcasecmp(type, "7bit") != 0))
            return err_set(err, ERR_BAD_REQUEST,
                           "A part has a Content-Transfer-Encoding; send it as it is.");
        return ERR_NONE;
    }
    if (left(&line) < sizeof disposition - 1 ||
        strncasecmp(line.at, disposition, sizeof disposition - 1) != 0)
        return ERR_NONE;
    line.at += sizeof disposition - 1;
    skip_blanks(&line);
    if (part->name != NULL || !read_token(&line, type, sizeof type) ||
        strcasecmp(type, "form-data") != 0 ||
        !find_parameter(line, "name", name, sizeof name, &found) || !found)
        return err_set(err, ERR_BAD_REQUEST,
                       "A part of the form has no usable Content-Disposition with a name.");
    part->name = arena_strdup(arena, name);
    return ERR_NONE;
}

/* A part's header lines, up to and with the empty one. */
static enum err_code read_headers(struct span *s, struct arena *arena, struct multipart_part *part,
                                  struct err *err)
{
    const char *limit = left(s) > MULTIPART_MAX_HEADER ? s->at + MULTIPART_MAX_HEADER : s->end;

    for (;;) {
        const char *crlf = memmem(s->at, (size_t)(limit - s->at), "\r\n", 2);
        if (crlf == NULL)
            return err_set(err, ERR_BAD_REQUEST, "A part's header is too long or not complete.");
        struct span line = {s->at, crlf};
        s->at = crlf + 2;
        if (line.at == line.end)
            break;
        enum err_code code = read_header(line, arena, part, err);
        if (code != ERR_NONE)
            return code;
    }
    if (part->name == NULL)
        return err_set(err, ERR_BAD_REQUEST, "A part of the form has no name.");
    return ERR_NONE;
}

/* After a delimiter's boundary: "--" closes the form; else optional blanks and CRLF. */
static enum err_code end_delimiter(struct span *s, bool *closed, struct err *err)
{
    *closed = left(s) >= 2 && s->at[0] == '-' && s->at[1] == '-';
    if (*closed)
        return ERR_NONE;
    skip_blanks(s);
    if (left(s) < 2 || s->at[0] != '\r' || s->at[1] != '\n')
        return err_set(err, ERR_BAD_REQUEST, "The form is malformed at a boundary, or ends there.");
    s->at += 2;
    return ERR_NONE;
}

enum err_code multipart_delimiter(const char *content_type, struct find_marks *delimiter,
                                  struct err *err)
{
    char text[4 + MAX_BOUNDARY + 2] = "\r\n--";
    enum err_code code = find_boundary(content_type, text + 4, sizeof text - 4, err);

    if (code == ERR_NONE)
        find_marks_init(delimiter, text, strlen(text));
    return code;
}

enum err_code multipart_parse(struct arena *arena, const struct find_marks *delimiter,
                              const char *body, size_t len, struct multipart_part *parts,
                              size_t *count, struct err *err)
{
    struct span s = {body, body + len};
    size_t n = delimiter->n;
    enum err_code code;
    bool closed;

    *count = 0;
    /* The first delimiter may stand at the very beginning, without a CRLF before it. */
    if (left(&s) >= n - 2 && memcmp(s.at, delimiter->what + 2, n - 2) == 0) {
        s.at += n - 2;
    } else {
        const char *first = find_marks_next(delimiter, body, len, s.at);
        if (first == NULL)
            return err_set(err, ERR_BAD_REQUEST, "The body does not begin with its boundary.");
        s.at = first + n;
    }
    while ((code = end_delimiter(&s, &closed, err)) == ERR_NONE && !closed) {
        if (*count == MULTIPART_MAX_PARTS)
            return err_set(err, ERR_BAD_REQUEST, "The form has more than %d parts.",
                           MULTIPART_MAX_PARTS);
        struct multipart_part *part = &parts[*count];
        *part = (struct multipart_part){0};
        if ((code = read_headers(&s, arena, part, err)) != ERR_NONE)
            return code;
        /* An empty part's CRLF may be the one that ended its header. */
        const char *end = find_marks_next(delimiter, body, len, s.at - 2);
        if (end == NULL)
            return err_set(
                err, ERR_BAD_REQUEST,
                "The form ends before its closing boundary: the upload is not complete.");
        part->data = s.at;
        part->len = end < s.at ? 0 : (size_t)(end - s.at);
        s.at = end + n;
        ++*count;
    }
    return code;
}
