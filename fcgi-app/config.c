/* config.c - the configuration. See config.h.
 *
 * One row of the table below says all there is to know of a key. Defaults, the file and the
 * environment go through the same function, set_key, so that a value is judged alike wherever it
 * comes from; what several values say together is judged once, at the end.
 *
 * The file is INI as libinih reads it: `key = value` or `key: value`; a comment is a line that
 * begins with # or ;, or what follows white space and a ; in a line. There are no quotes, no
 * escapes and no continued lines, so that no value can hold a ; after white space. An empty value
 * leaves a text at its default, in the file and in the environment. */
#include "config.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <ini.h>
#include <limits.h>
#include <math.h>
#include <netinet/in.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

#include "buf.h"
#include "text.h"

#define ENV_PREFIX "EXTRACT_"
#define FILE_MAX (1 << 20) /* bytes: no configuration is longer */
#define LINE_MAX_BYTES 8192
#define VALUE_MAX 4096
#define NAME_MAX_BYTES 64 /* of a section or key in a message */
#define LETTERS "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
#define DIGITS "0123456789"

/* How a value is written. */
enum syntax {
    INTEGER,
    SIZE,     /* bytes, or with K, M, G: times 1024 */
    DURATION, /* seconds, or with ms, s, m, h; fractions too */
    REAL,
    YES_NO,
    WORD, /* one of a list; its place in the list is the value */
    TEXT,
    FILE_NAME /* text that names a file, which must be readable; its default is not looked at */
};

/* How it is kept, found from the member itself. */
enum storage { IN_INT, IN_INT64, IN_DOUBLE, IN_BOOL, IN_TEXT };

struct key {
    const char *section;
    const char *name;
    size_t offset;
    enum storage storage;
    enum syntax syntax;
    const char *initial;
    double min; /* for numbers; in bytes or milliseconds */
    double max;
    const char *const *words;               /* WORD; in the order of the enum */
    const char *(*fault)(const char *text); /* TEXT: what is wrong with it, or NULL */
    const char *description;
};

static const char *fault_of_base_url(const char *text);
static const char *fault_of_proxy(const char *text);
static const char *fault_of_model(const char *text);

static const char *const auth_words[] = {"none", "bearer", NULL};
static const char *const driver_words[] = {"sqlite", "mssql", NULL};
static const char *const encrypt_words[] = {"require", "request", "off", NULL};
static const char *const fallback_words[] = {"store_unavailable", "no_active_token", NULL};
static const char *const level_words[] = {"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", NULL};
static const char *const sink_words[] = {"store", "stderr", NULL};

#define MEMBER(member) \
    offsetof(struct config, member),                              \
        _Generic(((struct config *)NULL)->member, int: IN_INT,    \
                 int64_t: IN_INT64, double: IN_DOUBLE, bool: IN_BOOL, char *: IN_TEXT)
#define KEY(section, key) #section, #key, MEMBER(section.key)
#define KEY_MS(section, key) #section, #key, MEMBER(section.key##_ms)
#define WORDS(list) 0, 0, list, NULL
#define RANGE(min, max) min, max, NULL, NULL
#define ANY 0, 0, NULL, NULL
#define CHECKED(fault) 0, 0, NULL, fault
#define SECOND 1e3
#define MINUTE 60e3
#define HOUR 3600e3

/* clang-format off */
static const struct key table[] = {
    {KEY(server, threads),          INTEGER,  "16",   RANGE(1, 1024),
     "requests that one process serves at the same time"},
    {KEY(server, queue),            INTEGER,  "64",   RANGE(1, 65536),
     "requests that may wait for a thread in one process; one more is answered 503 at once"},
    {KEY_MS(server, queue_wait),    DURATION, "10s",  RANGE(10, 10 * MINUTE),
     "how long a request may wait for a thread before it is answered 503"},
    {KEY(server, company_share),    REAL,     "1.0",  RANGE(0.01, 1),
     "share of a process's threads that one company may hold"},
    {KEY(server, max_upload),       SIZE,     "50M",  RANGE(1024, 1024.0 * 1024 * 1024),
     "largest upload; nginx's client_max_body_size should say the same"},
    {KEY_MS(server, deadline),      DURATION, "120s", RANGE(SECOND, HOUR),
     "time for one request, all waits and attempts together; nginx's timeouts must be longer"},
    {KEY(server, state_dir),        TEXT,     "/var/lib/extract-fcgi", ANY,
     "directory of what must survive a restart: the embedded store, the outbox"},
    {KEY(server, runtime_dir),      TEXT,     "/run/extract-fcgi", ANY,
     "directory of what the processes of the pool share while they run"},
    {KEY(server, body_file_dir),    TEXT,     "",     ANY,
     "where nginx keeps uploads that it names in REQUEST_BODY_FILE; empty: such requests are refused"},

    {KEY(auth, mode),               WORD,     "none", WORDS(auth_words),
     "who may post: none (whoever reaches the socket) or bearer (not available in this version)"},
    {KEY_MS(auth, offline_grace),   DURATION, "1h",   RANGE(0, 720 * HOUR),
     "how long a client key once verified is trusted while the store cannot be reached"},

    {KEY(gemini, base_url),         TEXT,     "https://generativelanguage.googleapis.com", CHECKED(fault_of_base_url),
     "what stands before /v1beta/models/; plain http on loopback only"},
    {KEY(gemini, model),            TEXT,     "gemini-3.5-flash", CHECKED(fault_of_model),
     "name of the model"},
    {KEY_MS(gemini, connect_timeout), DURATION, "10s", RANGE(100, 5 * MINUTE),
     "time to connect, TLS included"},
    {KEY_MS(gemini, timeout),       DURATION, "55s",  RANGE(100, HOUR),
     "time for one attempt"},
    {KEY(gemini, proxy),            TEXT,     "",     CHECKED(fault_of_proxy),
     "proxy, as http://user:password@host:port; also https, socks5 and socks5h; empty: none"},
    {KEY(gemini, prompt_file),      FILE_NAME, "",    ANY,
     "prompt that replaces the one compiled in"},
    {KEY(gemini, schema_file),      FILE_NAME, "",    ANY,
     "JSON Schema of an invoice that replaces the one compiled in"},
    {KEY(gemini, ca_file),          FILE_NAME, "",    ANY,
     "certificates to trust instead of the system's (PEM)"},
    {KEY(gemini, max_output_tokens), INTEGER, "0",    RANGE(0, 1e7),
     "most tokens of an answer, thoughts included; 0: as the model likes"},
    {KEY(gemini, reserve_tokens),   INTEGER,  "8000", RANGE(0, 1e9),
     "tokens reserved for a request at least, until it is known what it used"},

    {KEY(retry, max_retries),       INTEGER,  "3",    RANGE(0, 100),
     "attempts after the first one"},
    {KEY_MS(retry, initial_delay),  DURATION, "1.0",  RANGE(0, HOUR),
     "wait before the first retry"},
    {KEY_MS(retry, max_delay),      DURATION, "30.0", RANGE(0, HOUR),
     "longest wait before a retry; a longer one that Gemini asks for is kept"},
    {KEY(retry, backoff_multiplier), REAL,    "2.0",  RANGE(1, 100),
     "how much longer each wait is than the one before"},
    {KEY(retry, jitter),            YES_NO,   "true", ANY,
     "make each wait up to 50 % shorter or longer, so that retries do not come together"},
    {KEY(retry, auto_disable),      YES_NO,   "yes",  ANY,
     "disable a token whose key Gemini calls bad; no: it only cools down"},

    {KEY(store, driver),            WORD,     "sqlite", WORDS(driver_words),
     "sqlite (embedded, one host) or mssql (SQL Server; not available in this version)"},
    {KEY(store, auto_create),       YES_NO,   "yes",  ANY,
     "create or upgrade the schema at start; no: extractctl migrate does"},
    {KEY(store, pool_size),         INTEGER,  "0",    RANGE(0, 256),
     "connections of one process to the store; 0: as the driver likes"},
    {KEY_MS(store, query_timeout),  DURATION, "5s",   RANGE(100, 10 * MINUTE),
     "time for one round trip to the store"},
    {KEY(store, path),              TEXT,     "",     ANY,
     "sqlite: the database file; empty: store.db in state_dir"},
    {KEY(store, server),            TEXT,     "",     ANY,
     "mssql: host:port"},
    {KEY(store, database),          TEXT,     "",     ANY,
     "mssql: name of the database"},
    {KEY(store, user),              TEXT,     "",     ANY,
     "mssql: login of the service"},
    {KEY(store, password_file),     FILE_NAME, "",    ANY,
     "mssql: file with that login's password"},
    {KEY(store, admin_user),        TEXT,     "",     ANY,
     "mssql: login that extractctl uses instead"},
    {KEY(store, admin_password_file), FILE_NAME, "",  ANY,
     "mssql: file with that login's password"},
    {KEY(store, encrypt),           WORD,     "require", WORDS(encrypt_words),
     "mssql: TLS: require, request (use it where offered) or off"},
    {KEY(store, ca_file),           FILE_NAME, "system", ANY,
     "mssql: certificates to trust (PEM), or system"},
    {KEY(store, connection_file),   FILE_NAME, "",    ANY,
     "mssql: file with an ODBC connection string, instead of the keys above"},

    {KEY(fallback, key_file),       FILE_NAME, "",    ANY,
     "file with the API key that serves where no token can (appSetting.txt); empty: no fallback"},
    {KEY(fallback, when),           WORD,     "store_unavailable", WORDS(fallback_words),
     "store_unavailable, or no_active_token: also where a known company has no Active token"},

    {KEY(log, level),               WORD,     "INFO", WORDS(level_words),
     "entries of this level and above: DEBUG, INFO, WARNING, ERROR, CRITICAL"},
    {KEY(log, sink),                WORD,     "store", WORDS(sink_words),
     "where entries go: store (the table ApplicationLogs) or stderr"},

    {KEY(seal, key_file),           FILE_NAME, "",    ANY,
     "key that API keys in the store are encrypted with (not available in this version)"},
};
/* clang-format on */

#define KEY_COUNT (sizeof table / sizeof table[0])

/* The larger unit first: numbers are written in the largest that fits. */
static const struct unit {
    enum syntax syntax;
    const char *suffix;
    double factor;
} units[] = {
    {SIZE, "G", 1024.0 * 1024 * 1024},
    {SIZE, "M", 1024.0 * 1024},
    {SIZE, "K", 1024},
    {SIZE, "", 1},
    {DURATION, "h", HOUR},
    {DURATION, "m", MINUTE},
    {DURATION, "s", SECOND},
    {DURATION, "ms", 1},
    {DURATION, "", SECOND},
    {INTEGER, "", 1},
    {REAL, "", 1},
};

#define UNIT_COUNT (sizeof units / sizeof units[0])

/* Where a value came from. */
struct source {
    enum { FROM_DEFAULT, FROM_FILE, FROM_ENVIRONMENT } kind;
    int line;
};

/* What config_load returns is the first member of this. */
struct loaded {
    struct config config;
    struct source sources[KEY_COUNT];
    char *path; /* of the file */
};

/* ---- texts for messages ---- */

struct shown {
    char text[NAME_MAX_BYTES + 4];
};

/* Foreign text made fit for a message: cut, and '?' for what no terminal should see. */
static struct shown shown(const char *s)
{
    struct shown out = {""};
    size_t len = strlen(s);
    size_t cut = len < NAME_MAX_BYTES ? len : NAME_MAX_BYTES;

    while (cut < len && cut > 0 && ((unsigned char)s[cut] & 0xC0) == 0x80)
        cut--;
    memcpy(out.text, s, cut);
    if (text_fault(s, cut, 0, NAME_MAX_BYTES) != NULL)
        for (size_t i = 0; i < cut; i++)
            if (!isprint((unsigned char)out.text[i]))
                out.text[i] = '?';
    if (cut < len)
        memcpy(out.text + cut, "...", 4);
    return out;
}

static void name_variable(const struct key *key, char out[NAME_MAX_BYTES])
{
    snprintf(out, NAME_MAX_BYTES, ENV_PREFIX "%s_%s", key->section, key->name);
    for (char *c = out; *c != '\0'; c++)
        *c = (char)toupper((unsigned char)*c);
}

/* Puts the key and the place of its value before the error's message. */
static enum err_code at_key(struct err *err, const struct loaded *loaded, const struct key *key)
{
    const struct source *source = &loaded->sources[key - table];
    char variable[NAME_MAX_BYTES];

    switch (source->kind) {
    case FROM_FILE:
        return err_prefix(err, "%s:%d: [%s] %s", loaded->path, source->line, key->section,
                          key->name);
    case FROM_ENVIRONMENT:
        name_variable(key, variable);
        return err_prefix(err, "%s", variable);
    case FROM_DEFAULT:
        break;
    }
    return err_prefix(err, "[%s] %s (default)", key->section, key->name);
}

/* A number of the key's kind, as one would write it. */
static const char *write_number(enum syntax syntax, double number, char *out, size_t size)
{
    const struct unit *unit = NULL;

    for (size_t i = 0; i < UNIT_COUNT && unit == NULL; i++)
        if (units[i].syntax == syntax && fmod(number, units[i].factor) == 0)
            unit = &units[i];
    if (unit == NULL || number == 0)
        snprintf(out, size, "%.15g", number);
    else
        snprintf(out, size, "%.15g%s", number / unit->factor, unit->suffix);
    return out;
}

/* "one of sqlite or mssql" */
static void describe_words(const char *const *words, char *out, size_t size)
{
    size_t len = (size_t)snprintf(out, size, "one of %s", words[0]);

    for (size_t i = 1; words[i] != NULL && len < size; i++)
        len += (size_t)snprintf(out + len, size - len, "%s%s", words[i + 1] == NULL ? " or " : ", ",
                                words[i]);
}

/* "a whole number from 1 to 1024": what a value of the key has to be. */
static void describe(const struct key *key, char *out, size_t size)
{
    const char *kind = "a text";
    char min[32];
    char max[32];

    switch (key->syntax) {
    case YES_NO:
        snprintf(out, size, "yes or no");
        return;
    case WORD:
        describe_words(key->words, out, size);
        return;
    case INTEGER:
        kind = "a whole number";
        break;
    case SIZE:
        kind = "a size like 512K or 50M,";
        break;
    case DURATION:
        kind = "a duration like 10s, 500ms or 2m,";
        break;
    case REAL:
        kind = "a number";
        break;
    case TEXT:
    case FILE_NAME:
        break;
    }
    snprintf(out, size, "%s from %s to %s", kind,
             write_number(key->syntax, key->min, min, sizeof min),
             write_number(key->syntax, key->max, max, sizeof max));
}

/* ---- the syntax of values ---- */

/* digits[.digits] and a unit. Not strtod alone: it reads "inf", "0x10" and, in some locales, "1,5" */
static bool parse_number(const char *text, enum syntax syntax, double *number)
{
    size_t whole = strspn(text, DIGITS);
    size_t fraction = text[whole] == '.' ? strspn(text + whole + 1, DIGITS) : 0;
    size_t len = whole + (fraction > 0 ? fraction + 1 : 0);
    char digits[20] = "";

    if (whole == 0 || len >= sizeof digits)
        return false;
    memcpy(digits, text, len);
    for (size_t i = 0; i < UNIT_COUNT; i++) {
        if (units[i].syntax == syntax && strcasecmp(text + len, units[i].suffix) == 0) {
            *number = strtod(digits, NULL) * units[i].factor;
            return true;
        }
    }
    return false;
}

static bool parse_yes_no(const char *text, double *number)
{
    static const char *const words[] = {"no", "yes", "false", "true", "off", "on", "0", "1"};

    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
        if (strcasecmp(text, words[i]) == 0) {
            *number = (double)(i % 2);
            return true;
        }
    }
    return false;
}

static bool parse_word(const char *text, const char *const *words, double *number)
{
    for (size_t i = 0; words[i] != NULL; i++) {
        if (strcasecmp(text, words[i]) == 0) {
            *number = (double)i;
            return true;
        }
    }
    return false;
}

/* Reads a value that is not text. Sizes come in bytes, durations in milliseconds, words as their
 * place in the list; all whole but REAL. */
static bool parse_value(const struct key *key, const char *text, double *number)
{
    bool ok = false;

    switch (key->syntax) {
    case INTEGER:
    case SIZE:
        ok = strchr(text, '.') == NULL && parse_number(text, key->syntax, number);
        break;
    case DURATION:
        ok = parse_number(text, DURATION, number);
        *number = round(*number);
        break;
    case REAL:
        ok = parse_number(text, REAL, number);
        break;
    case YES_NO:
        return parse_yes_no(text, number);
    case WORD:
        return parse_word(text, key->words, number);
    case TEXT:
    case FILE_NAME:
        break;
    }
    return ok && *number >= key->min && *number <= key->max;
}

/* ---- URLs, by hand: what is not plainly understood is refused, so that nobody (curl, a proxy)
 * can understand it otherwise than the check for loopback did ---- */

struct url {
    char scheme[8];
    char host[256]; /* an IPv6 address without its brackets */
    bool bracketed;
    bool has_user;
    const char *path; /* "" or from its slash */
};

static bool all_of(const char *s, size_t len, const char *allowed)
{
    for (size_t i = 0; i < len; i++)
        if (s[i] == '\0' || strchr(allowed, s[i]) == NULL)
            return false;
    return true;
}

/* host, host:port, [address] or [address]:port, and nothing else. */
static bool split_host(const char *s, size_t len, struct url *url)
{
    const char *end;
    const char *host = s;
    size_t host_len;
    struct in6_addr address;

    url->bracketed = len > 0 && s[0] == '[';
    if (url->bracketed) {
        host = s + 1;
        end = memchr(s, ']', len);
    } else {
        end = memchr(s, ':', len);
        if (end == NULL)
            end = s + len;
    }
    if (end == NULL || end == host || (size_t)(end - host) >= sizeof url->host)
        return false;
    host_len = (size_t)(end - host);
    memcpy(url->host, host, host_len);
    url->host[host_len] = '\0';
    if (url->bracketed ? inet_pton(AF_INET6, url->host, &address) != 1
                       : !all_of(host, host_len, LETTERS DIGITS "-._"))
        return false;
    end += url->bracketed;
    if (end == s + len)
        return true;
    len = (size_t)(s + len - end) - 1;
    return *end == ':' && len >= 1 && len <= 5 && all_of(end + 1, len, DIGITS) &&
           strtol(end + 1, NULL, 10) >= 1 && strtol(end + 1, NULL, 10) <= 65535;
}

static bool split_url(const char *text, struct url *url)
{
    const char *colon = strstr(text, "://");
    const char *authority;
    const char *at;
    size_t len;

    *url = (struct url){.path = ""};
    if (colon == NULL || (size_t)(colon - text) >= sizeof url->scheme)
        return false;
    memcpy(url->scheme, text, (size_t)(colon - text));
    authority = colon + 3;
    len = strcspn(authority, "/");
    url->path = authority + len;
    at = memchr(authority, '@', len);
    if (at != NULL) {
        size_t user_len = (size_t)(at - authority);
        if (!all_of(authority, user_len, LETTERS DIGITS "-._~!$&'()*+,;=:%"))
            return false;
        url->has_user = true;
        len -= user_len + 1;
        authority = at + 1;
    }
    return split_host(authority, len, url);
}

static bool is_loopback(const struct url *url)
{
    struct in_addr four;
    struct in6_addr six;

    if (url->bracketed)
        return inet_pton(AF_INET6, url->host, &six) == 1 && IN6_IS_ADDR_LOOPBACK(&six);
    if (inet_pton(AF_INET, url->host, &four) == 1)
        return ntohl(four.s_addr) >> 24 == 127;
    return strcasecmp(url->host, "localhost") == 0;
}

static const char *fault_of_base_url(const char *text)
{
    struct url url;

    if (!split_url(text, &url))
        return "must be https://host, with an optional port and path";
    if (url.has_user)
        return "must have no user or password";
    if (!all_of(url.path, strlen(url.path), LETTERS DIGITS "-._~/"))
        return "must have a plain path: letters, digits and -._~/, no query and no fragment";
    if (strcmp(url.scheme, "https") == 0)
        return NULL;
    if (strcmp(url.scheme, "http") != 0)
        return "must begin with https:// (or http:// on loopback)";
    return is_loopback(&url) ? NULL
                             : "must be https:// unless the host is 127.0.0.1, ::1 or localhost";
}

static const char *fault_of_proxy(const char *text)
{
    static const char *const schemes[] = {"http", "https", "socks5", "socks5h"};
    struct url url;

    if (!split_url(text, &url) || (url.path[0] != '\0' && strcmp(url.path, "/") != 0))
        return "must be a URL like http://proxy.example:3128";
    for (size_t i = 0; i < sizeof schemes / sizeof schemes[0]; i++)
        if (strcmp(url.scheme, schemes[i]) == 0)
            return NULL;
    return "must begin with http://, https://, socks5:// or socks5h://";
}

static const char *fault_of_model(const char *text)
{
    size_t len = strlen(text);

    return len <= 128 && all_of(text, len, LETTERS DIGITS "-._")
               ? NULL
               : "must be a model's name: 1 to 128 of A-Z a-z 0-9 . _ -";
}

/* ---- setting a key ---- */

static void *member(struct loaded *loaded, const struct key *key)
{
    return (char *)&loaded->config + key->offset;
}

static const void *member_const(const struct config *config, const struct key *key)
{
    return (const char *)config + key->offset;
}

static enum err_code set_text(struct loaded *loaded, const struct key *key, const char *text,
                              struct err *err)
{
    char **place = member(loaded, key);
    const char *fault = NULL;
    char *copy;

    if (*text == '\0')
        text = key->initial;
    else if (key->fault != NULL)
        fault = key->fault(text);
    if (fault != NULL)
        return err_set(err, ERR_CONFIG, "%s", fault);
    copy = strdup(text);
    if (copy == NULL)
        return err_set(err, ERR_CONFIG, "out of memory");
    free(*place);
    *place = copy;
    return ERR_NONE;
}

static enum err_code set_number(struct loaded *loaded, const struct key *key, const char *text,
                                struct err *err)
{
    void *place = member(loaded, key);
    double number = 0;
    char wanted[128];

    if (!parse_value(key, text, &number)) {
        describe(key, wanted, sizeof wanted);
        return err_set(err, ERR_CONFIG, "\"%s\" is not %s", shown(text).text, wanted);
    }
    switch (key->storage) {
    case IN_INT:
        *(int *)place = (int)number;
        break;
    case IN_INT64:
        *(int64_t *)place = (int64_t)number;
        break;
    case IN_DOUBLE:
        *(double *)place = number;
        break;
    case IN_BOOL:
        *(bool *)place = number != 0;
        break;
    case IN_TEXT:
        break;
    }
    return ERR_NONE;
}

/* What no value of any kind may be. */
static const char *fault_of_any(const char *text)
{
    size_t len = strlen(text);
    const char *fault = NULL;

    if (len > VALUE_MAX)
        return "is too long: at most 4096 bytes";
    fault = text_fault(text, len, 0, VALUE_MAX);
    if (fault != NULL)
        return fault;
    for (size_t i = 0; i < len; i++)
        if (text[i] == ';' && (i == 0 || isspace((unsigned char)text[i - 1])))
            return "must not have a ; at its begin or after a space: that begins a comment";
    return NULL;
}

/* Gives the key its value from source. Errors carry their place already. */
static enum err_code set_key(struct loaded *loaded, const struct key *key, const char *text,
                             struct source source, struct err *err)
{
    const char *fault = fault_of_any(text);
    enum err_code code;

    loaded->sources[key - table] = source;
    if (fault != NULL)
        code = err_set(err, ERR_CONFIG, "%s", fault);
    else if (key->storage == IN_TEXT)
        code = set_text(loaded, key, text, err);
    else
        code = set_number(loaded, key, text, err);
    return code == ERR_NONE ? ERR_NONE : at_key(err, loaded, key);
}

/* ---- unknown names ---- */

static const struct key *find_key(const char *section, const char *name)
{
    for (size_t i = 0; i < KEY_COUNT; i++)
        if (strcmp(table[i].section, section) == 0 && strcmp(table[i].name, name) == 0)
            return &table[i];
    return NULL;
}

static const struct key *find_variable(const char *name)
{
    char variable[NAME_MAX_BYTES];

    for (size_t i = 0; i < KEY_COUNT; i++) {
        name_variable(&table[i], variable);
        if (strcmp(variable, name) == 0)
            return &table[i];
    }
    return NULL;
}

/* Levenshtein's distance; names too long for a typo are far from everything. */
static size_t distance(const char *a, const char *b)
{
    size_t a_len = strlen(a);
    size_t b_len = strlen(b);
    size_t row[NAME_MAX_BYTES + 1];

    if (a_len > NAME_MAX_BYTES || b_len > NAME_MAX_BYTES)
        return NAME_MAX_BYTES;
    for (size_t j = 0; j <= b_len; j++)
        row[j] = j;
    for (size_t i = 1; i <= a_len; i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= b_len; j++) {
            size_t best = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            if (row[j] + 1 < best)
                best = row[j] + 1;
            if (row[j - 1] + 1 < best)
                best = row[j - 1] + 1;
            row[j] = best;
        }
    }
    return row[b_len];
}

/* The key that was probably meant: nearly the same name, in the same section rather than in
 * another. NULL: none. */
static const struct key *guess_key(const char *section, const char *name)
{
    const struct key *guess = NULL;
    size_t best = 2 * (strlen(name) / 3 + 1);

    for (size_t i = 0; i < KEY_COUNT; i++) {
        size_t score = 2 * distance(table[i].name, name) + (strcmp(table[i].section, section) != 0);
        if (score < best) {
            best = score;
            guess = &table[i];
        }
    }
    return guess;
}

static enum err_code unknown_key(const char *section, const char *name, struct err *err)
{
    const struct key *guess = guess_key(section, name);

    if (guess == NULL)
        return err_set(err, ERR_CONFIG, "[%s] %s: unknown key", shown(section).text,
                       shown(name).text);
    if (strcmp(guess->section, section) == 0)
        return err_set(err, ERR_CONFIG, "[%s] %s: unknown key (did you mean %s?)", section,
                       shown(name).text, guess->name);
    return err_set(err, ERR_CONFIG, "[%s] %s: unknown key (did you mean [%s] %s?)",
                   shown(section).text, shown(name).text, guess->section, guess->name);
}

static enum err_code unknown_variable(const char *name, struct err *err)
{
    const struct key *guess = NULL;
    size_t best = strlen(name) / 4;
    char variable[NAME_MAX_BYTES];

    for (size_t i = 0; i < KEY_COUNT; i++) {
        size_t d;
        name_variable(&table[i], variable);
        d = distance(variable, name);
        if (d < best) {
            best = d;
            guess = &table[i];
        }
    }
    if (guess == NULL)
        return err_set(err, ERR_CONFIG, "%s: unknown variable", shown(name).text);
    name_variable(guess, variable);
    return err_set(err, ERR_CONFIG, "%s: unknown variable (did you mean %s?)", shown(name).text,
                   variable);
}

/* ---- the file ---- */

struct reader {
    struct loaded *loaded;
    const char *at; /* what is not read yet; ends with NUL */
    int line;       /* the line read last */
    struct err *err;
    enum err_code code;
};

/* libinih's reader: one line at a time, counted. NULL: the end, or a line that is too long. */
static char *read_line(char *out, int size, void *stream)
{
    struct reader *reader = stream;
    size_t len = strcspn(reader->at, "\n");

    if (reader->code != ERR_NONE || *reader->at == '\0')
        return NULL;
    reader->line++;
    len += reader->at[len] == '\n';
    if (len >= (size_t)size) {
        reader->code = err_set(reader->err, ERR_CONFIG, "%s:%d: the line is too long",
                               reader->loaded->path, reader->line);
        return NULL;
    }
    memcpy(out, reader->at, len);
    out[len] = '\0';
    reader->at += len;
    return out;
}

/* libinih's handler: 0 stops. */
static int take_pair(void *user, const char *section, const char *name, const char *value)
{
    struct reader *reader = user;
    struct loaded *loaded = reader->loaded;
    const struct key *key = find_key(section, name);
    const struct source source = {FROM_FILE, reader->line};
    struct err *err = reader->err;

    if (key == NULL) {
        reader->code =
            *section == '\0'
                ? err_set(err, ERR_CONFIG, "%s: a key before the first [section]", shown(name).text)
                : unknown_key(section, name, err);
        reader->code = err_prefix(err, "%s:%d", loaded->path, reader->line);
    } else if (loaded->sources[key - table].kind == FROM_FILE) {
        reader->code =
            err_set(err, ERR_CONFIG, "%s:%d: [%s] %s: given twice, first in line %d", loaded->path,
                    reader->line, section, name, loaded->sources[key - table].line);
    } else {
        reader->code = set_key(loaded, key, value, source, err);
    }
    return reader->code == ERR_NONE;
}

static enum err_code parse_text(struct loaded *loaded, const struct buf *text, struct err *err)
{
    struct reader reader = {.loaded = loaded, .at = buf_str(text), .err = err};
    int bad_line;

    /* Variables of the library, not options of its build, in Debian's. */
    ini_use_stack = false;
    ini_initial_alloc = LINE_MAX_BYTES;
    ini_max_line = LINE_MAX_BYTES;
    ini_allow_multiline = false;
    ini_stop_on_first_error = true;
    bad_line = ini_parse_stream(read_line, &reader, take_pair, &reader);
    if (reader.code != ERR_NONE)
        return reader.code;
    if (bad_line > 0)
        return err_set(err, ERR_CONFIG, "%s:%d: neither [section] nor key = value", loaded->path,
                       bad_line);
    if (bad_line < 0)
        return err_set(err, ERR_CONFIG, "%s: out of memory", loaded->path);
    if (reader.at != buf_str(text) + text->len)
        return err_set(err, ERR_CONFIG, "%s:%d: a NUL byte", loaded->path, reader.line);
    return ERR_NONE;
}

static enum err_code load_file(struct loaded *loaded, bool may_be_absent, struct err *err)
{
    struct buf text;
    char block[4096];
    size_t n;
    enum err_code code = ERR_NONE;
    FILE *file = fopen(loaded->path, "re");

    buf_init(&text, FILE_MAX);
    if (file == NULL) {
        if (errno != ENOENT || !may_be_absent)
            code = err_set(err, ERR_CONFIG, "%s: %s", loaded->path, strerror(errno));
        goto out;
    }
    while ((n = fread(block, 1, sizeof block, file)) > 0)
        buf_append(&text, block, n);
    if (ferror(file)) {
        code = err_set(err, ERR_CONFIG, "%s: %s", loaded->path, strerror(errno));
        goto out;
    }
    if (!buf_ok(&text)) {
        code = err_set(err, ERR_CONFIG, "%s: too large for a configuration", loaded->path);
        goto out;
    }
    code = parse_text(loaded, &text, err);
out:
    if (file != NULL)
        fclose(file);
    buf_reset(&text);
    return code;
}

/* ---- the environment ---- */

/* The value without the white space round it, as the file's values are. */
static enum err_code set_trimmed(struct loaded *loaded, const struct key *key, const char *value,
                                 struct err *err)
{
    const struct source source = {FROM_ENVIRONMENT, 0};
    size_t len;
    char *copy;
    enum err_code code;

    while (isspace((unsigned char)*value))
        value++;
    len = strlen(value);
    while (len > 0 && isspace((unsigned char)value[len - 1]))
        len--;
    copy = strndup(value, len);
    if (copy == NULL)
        return err_set(err, ERR_CONFIG, "out of memory");
    code = set_key(loaded, key, copy, source, err);
    free(copy);
    return code;
}

static enum err_code load_environment(struct loaded *loaded, struct err *err)
{
    for (char **entry = environ; *entry != NULL; entry++) {
        const char *equals = strchr(*entry, '=');
        const struct key *key;
        char name[2 * NAME_MAX_BYTES];
        size_t len;
        enum err_code code;

        if (strncmp(*entry, ENV_PREFIX, strlen(ENV_PREFIX)) != 0 || equals == NULL)
            continue;
        len = (size_t)(equals - *entry);
        if (len >= sizeof name)
            len = sizeof name - 1;
        memcpy(name, *entry, len);
        name[len] = '\0';
        if (strcmp(name, "EXTRACT_CONFIG") == 0)
            continue;
        key = find_variable(name);
        code =
            key == NULL ? unknown_variable(name, err) : set_trimmed(loaded, key, equals + 1, err);
        if (code != ERR_NONE)
            return code;
    }
    return ERR_NONE;
}

/* ---- what values say together ---- */

/* Of two keys that do not fit together, the one that somebody set. */
static const struct key *culprit(const struct loaded *loaded, const struct key *a,
                                 const struct key *b)
{
    return loaded->sources[a - table].kind == FROM_DEFAULT ? b : a;
}

static enum err_code refuse(const struct loaded *loaded, const struct key *key, struct err *err,
                            const char *why)
{
    err_set(err, ERR_CONFIG, "%s", why);
    return at_key(err, loaded, key);
}

static enum err_code check_available(const struct loaded *loaded, struct err *err)
{
    const struct config *config = &loaded->config;

    if (config->auth.mode == AUTH_BEARER)
        return refuse(loaded, find_key("auth", "mode"), err,
                      "bearer is not available in this version");
    if (config->store.driver == DRIVER_MSSQL)
        return refuse(loaded, find_key("store", "driver"), err,
                      "mssql is not available in this version");
    if (config->seal.key_file[0] != '\0')
        return refuse(loaded, find_key("seal", "key_file"), err,
                      "sealing is not available in this version");
    return ERR_NONE;
}

static enum err_code check_file(const struct loaded *loaded, const struct key *key, struct err *err)
{
    const char *path;
    struct stat status;
    const char *why = NULL;
    int fd;

    if (key->syntax != FILE_NAME)
        return ERR_NONE;
    path = *(char *const *)member_const(&loaded->config, key);
    if (strcmp(path, key->initial) == 0)
        return ERR_NONE;
    fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &status) != 0)
        why = strerror(errno);
    else if (!S_ISREG(status.st_mode))
        why = "not a regular file";
    if (fd >= 0)
        close(fd);
    if (why == NULL)
        return ERR_NONE;
    err_set(err, ERR_CONFIG, "%s: %s", path, why);
    return at_key(err, loaded, key);
}

static enum err_code check_together(const struct loaded *loaded, struct err *err)
{
    const struct config *config = &loaded->config;
    enum err_code code = check_available(loaded, err);

    if (code == ERR_NONE && config->retry.initial_delay_ms > config->retry.max_delay_ms)
        code = refuse(
            loaded,
            culprit(loaded, find_key("retry", "initial_delay"), find_key("retry", "max_delay")),
            err, "initial_delay must not be longer than max_delay");
    for (size_t i = 0; i < KEY_COUNT && code == ERR_NONE; i++)
        code = check_file(loaded, &table[i], err);
    return code;
}

/* What follows from values that are set. */
static enum err_code resolve(struct loaded *loaded, struct err *err)
{
    struct config *config = &loaded->config;
    size_t len = strlen(config->gemini.base_url);

    while (len > 0 && config->gemini.base_url[len - 1] == '/')
        config->gemini.base_url[--len] = '\0';
    if (config->store.path[0] == '\0') {
        char *path = NULL;
        if (asprintf(&path, "%s/store.db", config->server.state_dir) < 0)
            return err_set(err, ERR_CONFIG, "out of memory");
        free(config->store.path);
        config->store.path = path;
    }
    return ERR_NONE;
}

/* ---- the interface ---- */

static enum err_code load(struct loaded *loaded, const char *path, struct err *err)
{
    const struct source source = {FROM_DEFAULT, 0};
    bool may_be_absent = false;
    enum err_code code = ERR_NONE;

    if (path == NULL)
        path = getenv("EXTRACT_CONFIG");
    if (path == NULL || *path == '\0') {
        path = CONFIG_DEFAULT_FILE;
        may_be_absent = true;
    }
    loaded->path = strdup(path);
    if (loaded->path == NULL)
        return err_set(err, ERR_CONFIG, "out of memory");
    for (size_t i = 0; i < KEY_COUNT && code == ERR_NONE; i++)
        code = set_key(loaded, &table[i], table[i].initial, source, err);
    if (code == ERR_NONE)
        code = load_file(loaded, may_be_absent, err);
    if (code == ERR_NONE)
        code = load_environment(loaded, err);
    if (code == ERR_NONE)
        code = resolve(loaded, err);
    if (code == ERR_NONE)
        code = check_together(loaded, err);
    return code;
}

struct config *config_load(const char *path, struct err *err)
{
    struct loaded *loaded = calloc(1, sizeof *loaded);

    if (loaded == NULL) {
        err_set(err, ERR_CONFIG, "out of memory");
        return NULL;
    }
    if (load(loaded, path, err) != ERR_NONE) {
        config_free(&loaded->config);
        return NULL;
    }
    return &loaded->config;
}

void config_free(struct config *config)
{
    struct loaded *loaded = (struct loaded *)config;

    if (loaded == NULL)
        return;
    for (size_t i = 0; i < KEY_COUNT; i++)
        if (table[i].storage == IN_TEXT)
            free(*(char **)member(loaded, &table[i]));
    free(loaded->path);
    free(loaded);
}

/* The proxy with *** for its password. */
static void print_proxy(const char *proxy, FILE *out)
{
    const char *at = strchr(proxy, '@');
    const char *user = strstr(proxy, "://");
    const char *colon = at != NULL && user != NULL ? strchr(user + 3, ':') : NULL;

    if (colon == NULL || colon > at)
        fputs(proxy, out);
    else
        fprintf(out, "%.*s:***%s", (int)(colon - proxy), proxy, at);
}

static void print_value(const struct config *config, const struct key *key, FILE *out)
{
    const void *place = member_const(config, key);
    char number[32];

    switch (key->storage) {
    case IN_INT:
        if (key->syntax == WORD)
            fputs(key->words[*(const int *)place], out);
        else
            fprintf(out, "%d", *(const int *)place);
        break;
    case IN_INT64:
        fputs(write_number(key->syntax, (double)*(const int64_t *)place, number, sizeof number),
              out);
        break;
    case IN_DOUBLE:
        fputs(write_number(key->syntax, *(const double *)place, number, sizeof number), out);
        break;
    case IN_BOOL:
        fputs(*(const bool *)place ? "yes" : "no", out);
        break;
    case IN_TEXT:
        if (place == &config->gemini.proxy)
            print_proxy(config->gemini.proxy, out);
        else
            fputs(*(char *const *)place, out);
        break;
    }
}

void config_print(const struct config *config, FILE *out)
{
    const struct loaded *loaded = (const struct loaded *)config;
    const char *section = "";
    char variable[NAME_MAX_BYTES];

    for (size_t i = 0; i < KEY_COUNT; i++) {
        const struct key *key = &table[i];
        if (strcmp(key->section, section) != 0)
            fprintf(out, "%s[%s]\n", i == 0 ? "" : "\n", key->section);
        section = key->section;
        fprintf(out, "# %s\n", key->description);
        switch (loaded->sources[i].kind) {
        case FROM_DEFAULT:
            fputs("# from default\n", out);
            break;
        case FROM_FILE:
            fprintf(out, "# from %s:%d\n", loaded->path, loaded->sources[i].line);
            break;
        case FROM_ENVIRONMENT:
            name_variable(key, variable);
            fprintf(out, "# from %s\n", variable);
            break;
        }
        fprintf(out, "%s = ", key->name);
        print_value(config, key, out);
        fputc('\n', out);
    }
}
