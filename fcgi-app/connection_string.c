/* connection_string.c - ODBC connection strings. See connection_string.h.
 *
 * The grammar is ODBC's (SQLDriverConnect): keyword=value pairs between semicolons; a value in braces
 * may hold anything, a closing brace written twice; else it ends at the semicolon, without the spaces
 * round it. Quotes mean nothing. A line end separates as a semicolon does. One table says what becomes
 * of each keyword: those of Microsoft's drivers 11 to 18, of FreeTDS's, and the names that ADO.NET has
 * for the same.
 * https://learn.microsoft.com/sql/connect/odbc/dsn-connection-string-attribute */
#include "connection_string.h"

#include <ctype.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistr.h>

#include "config.h"
#include "text.h"

#define KEYWORD_MAX 40
#define SERVER_TEXT_SIZE 300
#define REMEDY_LEAVE_OUT "leave it out"

/* ---- servers ---- */

static enum err_code bad_server(struct err *err, const char *why)
{
    return err_set(err, ERR_CONFIG, "the server %s", why);
}

static bool parse_port(const char *text, int *port)
{
    char *end = NULL;
    long number = isdigit((unsigned char)*text) ? strtol(text, &end, 10) : 0;

    *port = (int)number;
    return number >= 1 && number <= 65535 && *end == '\0';
}

/* Letters, digits and the rest of what names and addresses are made of: the host goes into a file. */
static bool is_host(const char *host)
{
    size_t len = strlen(host);

    if (len == 0 || len >= CONNECTION_HOST_SIZE)
        return false;
    for (size_t i = 0; i < len; i++)
        if (!isalnum((unsigned char)host[i]) && strchr(".-_:%", host[i]) == NULL)
            return false;
    return true;
}

static bool is_instance(const char *name, size_t size)
{
    size_t len = strlen(name);

    if (len == 0 || len >= size)
        return false;
    for (size_t i = 0; i < len; i++)
        if (!isalnum((unsigned char)name[i]) && name[i] != '_' && name[i] != '$')
            return false;
    return true;
}

/* Cuts the port off; *port stays 0 without one. A lone colon comes before a port, more are IPv6. */
static bool cut_port(char *text, int *port)
{
    char *at = strrchr(text, ',');
    char *bracket = strrchr(text, ']');

    if (at == NULL && bracket != NULL && bracket[1] == ':')
        at = bracket + 1;
    if (at == NULL && bracket == NULL && strchr(text, ':') == strrchr(text, ':'))
        at = strchr(text, ':');
    if (at == NULL)
        return true;
    *at++ = '\0';
    while (*at == ' ')
        at++;
    return parse_port(at, port);
}

enum err_code connection_server_parse(const char *text, struct connection_server *server,
                                      struct err *err)
{
    static const char *const others[] = {"np:", "lpc:", "admin:", "(localdb)", "\\\\"};
    char copy[SERVER_TEXT_SIZE];
    const char *host = copy;
    char *instance = NULL;
    size_t len = strlen(text);

    *server = (struct connection_server){.port = 0};
    if (strncasecmp(text, "tcp:", 4) == 0)
        len = strlen(text += 4);
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++)
        if (strncasecmp(text, others[i], strlen(others[i])) == 0)
            return bad_server(err, "must be reached by TCP: write HOST,PORT");
    if (len >= sizeof copy)
        return bad_server(err, "has too long a name");
    memcpy(copy, text, len + 1);
    if (!cut_port(copy, &server->port))
        return bad_server(err, "has no port from 1 to 65535 behind its name");
    instance = strchr(copy, '\\');
    if (instance != NULL)
        *instance++ = '\0';
    len = strlen(copy);
    if (*copy == '[' && copy[len - 1] == ']') {
        copy[len - 1] = '\0';
        host++;
    }
    if (strcmp(host, ".") == 0 || strcasecmp(host, "(local)") == 0)
        host = "localhost";
    if (!is_host(host))
        return bad_server(err, "must be a host's name or address, with a port: HOST,PORT");
    memcpy(server->host, host, strlen(host) + 1);
    if (instance != NULL && server->port == 0 && strcasecmp(instance, "MSSQLSERVER") != 0) {
        if (!is_instance(instance, sizeof server->instance))
            return bad_server(err, "has an instance with an odd name: write HOST,PORT");
        memcpy(server->instance, instance, strlen(instance) + 1);
    } else if (server->port == 0) {
        server->port = CONNECTION_PORT;
    }
    return ERR_NONE;
}

/* ---- values; each returns NULL, or what is wrong and what to do instead ---- */

static int parse_word(const char *value, const char *const *words, int none)
{
    for (int i = 0; words[i] != NULL; i++)
        if (strcasecmp(value, words[i]) == 0)
            return i;
    return none;
}

/* 1 yes, 0 no, -1 neither */
static int parse_yes_no(const char *value)
{
    static const char *const words[] = {"no", "yes", "false", "true", "0", "1", "off", "on", NULL};
    int word = parse_word(value, words, -1);

    return word < 0 ? -1 : word % 2;
}

static const char not_yes_no[] = "must be yes or no";

static const char *take_driver(struct connection_string *c, const char *value)
{
    (void)c;
    if (strcasestr(value, "SQL Server") != NULL || strcasestr(value, "SQL Native Client") != NULL ||
        strcasestr(value, "tds") != NULL)
        return NULL;
    return "must be a driver for SQL Server: the store is SQL Server, or store.driver = sqlite";
}

static const char *take_server(struct connection_string *c, const char *value)
{
    int port = c->server.port; /* of PORT, where that came first */
    struct err err = {.message = ""};

    if (connection_server_parse(value, &c->server, &err) != ERR_NONE)
        return strstr(value, "\\") != NULL || strstr(value, ",") != NULL
                   ? "must be HOST,PORT or HOST\\INSTANCE, with plain names and reached by TCP"
                   : "must be a host's name or address, reached by TCP: HOST,PORT";
    if (port != 0) {
        c->server.port = port;
        c->server.instance[0] = '\0';
    }
    return NULL;
}

static const char *take_port(struct connection_string *c, const char *value)
{
    c->server.instance[0] = '\0';
    return parse_port(value, &c->server.port) ? NULL : "must be 1 to 65535";
}

static const char *take_encrypt(struct connection_string *c, const char *value)
{
    static const char *const words[] = {"optional", "mandatory", NULL};

    if (strcasecmp(value, "strict") == 0)
        return "strict is not available here: write Encrypt=yes; with TrustServerCertificate=no "
               "the "
               "certificate is checked all the same";
    switch (parse_word(value, words, parse_yes_no(value))) {
    case 0: /* as with ODBC: the login is encrypted all the same, by whatever certificate */
        c->encrypt = ENCRYPT_REQUEST;
        return NULL;
    case 1:
        c->encrypt = ENCRYPT_REQUIRE;
        return NULL;
    default:
        return not_yes_no;
    }
}

static const char *take_trust(struct connection_string *c, const char *value)
{
    int yes = parse_yes_no(value);

    c->trust_certificate = yes == 1;
    return yes < 0 ? not_yes_no : NULL;
}

static const char *take_trusted_connection(struct connection_string *c, const char *value)
{
    (void)c;
    if (parse_yes_no(value) == 0)
        return NULL;
    return "Windows logins are not available here: leave it out, and write UID and PWD of a SQL "
           "Server login";
}

static const char *take_authentication(struct connection_string *c, const char *value)
{
    (void)c;
    if (strcasecmp(value, "SqlPassword") == 0)
        return NULL;
    return "only SqlPassword is available here: leave it out, and write UID and PWD of a SQL "
           "Server "
           "login";
}

static const char *take_timeout(struct connection_string *c, const char *value)
{
    size_t digits = strspn(value, "0123456789");

    if (digits == 0 || digits > 4 || value[digits] != '\0')
        return "must be 0 to 9999 seconds";
    c->login_timeout_s = (int)strtol(value, NULL, 10);
    return NULL;
}

static const char *take_intent(struct connection_string *c, const char *value)
{
    (void)c;
    return strcasecmp(value, "ReadWrite") == 0 ? NULL
                                               : "must be ReadWrite: this program writes, too";
}

static const char *take_either(struct connection_string *c, const char *value)
{
    (void)c;
    return parse_yes_no(value) < 0 ? not_yes_no : NULL;
}

static const char *take_yes(struct connection_string *c, const char *value)
{
    (void)c;
    return parse_yes_no(value) == 1 ? NULL : "only yes is available here: " REMEDY_LEAVE_OUT;
}

static const char *take_no(struct connection_string *c, const char *value)
{
    (void)c;
    if (parse_yes_no(value) == 0 || strcasecmp(value, "Disabled") == 0)
        return NULL;
    return "is not available here: " REMEDY_LEAVE_OUT;
}

static const char *take_network(struct connection_string *c, const char *value)
{
    (void)c;
    return strcasecmp(value, "dbmssocn") == 0 ? NULL : "must be TCP (dbmssocn): " REMEDY_LEAVE_OUT;
}

static const char *take_charset(struct connection_string *c, const char *value)
{
    (void)c;
    return strcasecmp(value, "UTF-8") == 0
               ? NULL
               : "is UTF-8 always, and loses nothing: " REMEDY_LEAVE_OUT;
}

static const char *take_tds_version(struct connection_string *c, const char *value)
{
    (void)c;
    return strcasecmp(value, "7.4") == 0 || strcasecmp(value, "auto") == 0
               ? NULL
               : "is 7.4 always, which SQL Server 2012 and later speak: " REMEDY_LEAVE_OUT;
}

static const char *take_anything(struct connection_string *c, const char *value)
{
    (void)c;
    (void)value;
    return NULL;
}

/* ---- keywords ---- */

struct keyword {
    const char *names; /* separated by |, the first one for messages; compared without case */
    size_t offset;     /* of a text in struct connection_string, where neither of the next is set */
    const char *(*take)(struct connection_string *c, const char *value);
    const char *refusal; /* why it cannot be honoured, and what to do */
};

#define TEXT(member) offsetof(struct connection_string, member), NULL, NULL
#define TAKE(function) 0, function, NULL
#define REFUSE(why) 0, NULL, why

/* clang-format off */
static const struct keyword keywords[] = {
    {"SERVER|Address|Addr|Network Address|Data Source", TAKE(take_server)},
    {"DATABASE|Initial Catalog", TEXT(database)},
    {"UID|User ID|User", TEXT(user)},
    {"PWD|Password", TEXT(password)},
    {"DRIVER", TAKE(take_driver)},
    {"PORT", TAKE(take_port)},
    {"Encrypt", TAKE(take_encrypt)},
    {"TrustServerCertificate|Trust Server Certificate", TAKE(take_trust)},
    {"Trusted_Connection|Integrated Security", TAKE(take_trusted_connection)},
    {"Authentication", TAKE(take_authentication)},
    {"APP|Application Name", TEXT(application)},
    {"WSID|Workstation ID", TEXT(workstation)},
    {"Connection Timeout|Connect Timeout|ConnectTimeout|LoginTimeout|Timeout", TAKE(take_timeout)},
    {"ApplicationIntent|Application Intent", TAKE(take_intent)},
    /* both are so already: all addresses of a name are tried at the same time */
    {"MultiSubnetFailover|Multi Subnet Failover", TAKE(take_either)},
    {"TransparentNetworkIPResolution|Transparent Network IP Resolution", TAKE(take_anything)},
    /* no connection here ever carries two at a time */
    {"MARS_Connection|MultipleActiveResultSets|Multiple Active Result Sets", TAKE(take_either)},
    {"AnsiNPW", TAKE(take_yes)},
    {"QuotedID", TAKE(take_yes)},
    {"AutoTranslate", TAKE(take_either)},
    {"Regional", TAKE(take_either)},
    {"Persist Security Info|PersistSecurityInfo", TAKE(take_either)},
    {"ColumnEncryption|Column Encryption Setting", TAKE(take_no)},
    {"UseFMTONLY", TAKE(take_no)},
    {"Network|Net|Network Library", TAKE(take_network)},
    {"ClientCharset", TAKE(take_charset)},
    {"TDS_Version", TAKE(take_tds_version)},
    /* what they ask for happens here without being asked: connections are watched and made anew */
    {"ConnectRetryCount|Connect Retry Count", TAKE(take_anything)},
    {"ConnectRetryInterval|Connect Retry Interval", TAKE(take_anything)},
    {"KeepAlive", TAKE(take_anything)},
    {"KeepAliveInterval", TAKE(take_anything)},
    {"Description", TAKE(take_anything)},
    {"Pooling", TAKE(take_either)},

    {"Max Pool Size|Min Pool Size", REFUSE("leave it out, and set store.pool_size")},
    {"QueryTimeout|Command Timeout", REFUSE("leave it out, and set store.query_timeout")},
    {"Language|Current Language", REFUSE("makes no difference here: " REMEDY_LEAVE_OUT)},
    {"Packet Size|PacketSize", REFUSE("makes no difference here: " REMEDY_LEAVE_OUT)},
    {"Failover_Partner|Failover Partner|FailoverPartnerSPN",
     REFUSE("database mirroring is not available here: name the listener of an availability group "
            "as SERVER")},
    {"HostNameInCertificate|HostnameInCertificate|Host Name In Certificate",
     REFUSE("the certificate is checked for the name in SERVER: write there the name that is in the "
            "certificate")},
    {"ServerCertificate|Server Certificate",
     REFUSE("leave it out, and name the file as store.ca_file, in PEM form")},
    {"ServerSPN|Server SPN", REFUSE("is for Windows logins: " REMEDY_LEAVE_OUT)},
    {"AttachDBFileName|Initial File Name",
     REFUSE("attach the database in SQL Server, and write its name as DATABASE")},
    {"DSN", REFUSE("data sources of ODBC are not read: write SERVER and DATABASE")},
    {"FILEDSN|SAVEFILE", REFUSE("data sources of ODBC are not read: write SERVER and DATABASE")},
    {"Provider", REFUSE("is OLE DB's: leave it out, this is an ODBC connection string")},
    {"Trace|QueryLog_On|QueryLogFile|QueryLogTime|StatsLog_On|StatsLogFile",
     REFUSE("leave it out: the server's own tools trace calls")},
    {"KeystoreAuthentication|KeystorePrincipalId|KeystoreSecret|ClientCertificate|ClientKey",
     REFUSE("is not available here: " REMEDY_LEAVE_OUT)},
};
/* clang-format on */

#define KEYWORD_COUNT (sizeof keywords / sizeof keywords[0])
enum { KEYWORD_SERVER, KEYWORD_DATABASE, KEYWORD_USER, KEYWORD_PASSWORD, KEYWORD_NEEDED };

static bool has_name(const struct keyword *keyword, const char *name, size_t len)
{
    for (const char *at = keyword->names;; at++) {
        size_t end = strcspn(at, "|");
        if (end == len && strncasecmp(at, name, len) == 0)
            return true;
        at += end;
        if (*at == '\0')
            return false;
    }
}

static const struct keyword *find_keyword(const char *name, size_t len)
{
    for (size_t i = 0; i < KEYWORD_COUNT; i++)
        if (has_name(&keywords[i], name, len))
            return &keywords[i];
    return NULL;
}

static enum err_code fault(struct err *err, const struct keyword *keyword, const char *why)
{
    return err_set(err, ERR_CONFIG, "%.*s: %s", (int)strcspn(keyword->names, "|"), keyword->names,
                   why);
}

/* ---- the string ---- */

struct scanner {
    const char *at, *end;
    const struct keyword *last; /* the keyword before */
    bool seen[KEYWORD_COUNT];
};

static bool is_separator(char c)
{
    return c == ';' || c == '\n' || c == '\r';
}

static void skip_spaces(struct scanner *s)
{
    while (s->at < s->end && (*s->at == ' ' || *s->at == '\t'))
        s->at++;
}

/* The name before '='. A name that is not known is not shown after a password, whose end it may be. */
static enum err_code scan_keyword(struct scanner *s, const struct keyword **keyword,
                                  struct err *err)
{
    const char *begin = s->at;
    size_t len;
    bool after_password = s->last == &keywords[KEYWORD_PASSWORD];

    while (s->at < s->end && *s->at != '=' && !is_separator(*s->at))
        s->at++;
    len = (size_t)(s->at - begin);
    while (len > 0 && isspace((unsigned char)begin[len - 1]))
        len--;
    *keyword = find_keyword(begin, len);
    if (*keyword != NULL && s->at < s->end && *s->at == '=') {
        s->at++;
        return ERR_NONE;
    }
    if (after_password)
        return err_set(err, ERR_CONFIG,
                       "what follows PWD is no keyword: a password that holds ; must stand in "
                       "braces, PWD={...}, and a } in it be written twice");
    if (*keyword != NULL)
        return fault(err, *keyword, "there is no = after it");
    if (s->at == s->end || *s->at != '=' || text_fault(begin, len, 1, KEYWORD_MAX) != NULL)
        return err_set(err, ERR_CONFIG, "not a list of KEYWORD=value; pairs");
    return err_set(err, ERR_CONFIG, "%.*s: is no keyword that is known here: leave it out",
                   (int)len, begin);
}

/* Into out, which holds CONNECTION_HOST_SIZE bytes or more. */
static const char *scan_value(struct scanner *s, char *out, size_t size)
{
    size_t len = 0;
    bool braced;

    skip_spaces(s);
    braced = s->at < s->end && *s->at == '{';
    s->at += braced;
    for (;; s->at++) {
        if (s->at == s->end && braced)
            return "its { has no }";
        if (s->at == s->end || (!braced && is_separator(*s->at)))
            break;
        if (braced && *s->at == '}') {
            s->at++;
            if (s->at == s->end || *s->at != '}')
                break;
        }
        if (len + 1 >= size)
            return "is too long";
        out[len++] = *s->at;
    }
    while (!braced && len > 0 && isspace((unsigned char)out[len - 1]))
        len--;
    out[len] = '\0';
    skip_spaces(s);
    return s->at < s->end && !is_separator(*s->at) ? "there must be a ; after its }" : NULL;
}

static const char *take_text(char *place, const char *value)
{
    size_t len = strlen(value);

    if (len >= CONNECTION_TEXT_SIZE)
        return "is too long: at most 128 bytes";
    memcpy(place, value, len + 1);
    return NULL;
}

static enum err_code scan_pair(struct scanner *s, struct connection_string *out, struct err *err)
{
    char value[SERVER_TEXT_SIZE];
    const struct keyword *keyword = NULL;
    const char *why = NULL;
    enum err_code code = scan_keyword(s, &keyword, err);

    if (code != ERR_NONE)
        return code;
    if (s->seen[keyword - keywords])
        return fault(err, keyword, "is given twice, perhaps by another name for the same");
    s->seen[keyword - keywords] = true;
    s->last = keyword;
    if (keyword->refusal != NULL)
        return fault(err, keyword, keyword->refusal);
    why = scan_value(s, value, sizeof value);
    if (why == NULL && value[0] != '\0') /* an empty value is none */
        why = keyword->take != NULL ? keyword->take(out, value)
                                    : take_text((char *)out + keyword->offset, value);
    explicit_bzero(value, sizeof value);
    return why == NULL ? ERR_NONE : fault(err, keyword, why);
}

static const char *missing(const struct connection_string *c)
{
    return c->server.host[0] == '\0' ? "SERVER is missing"
           : c->database[0] == '\0'  ? "DATABASE is missing: the login's default is not used"
           : c->user[0] == '\0'      ? "UID is missing: a SQL Server login is needed"
           : c->password[0] == '\0'  ? "PWD is missing"
                                     : NULL;
}

enum err_code connection_string_parse(const char *text, size_t len, struct connection_string *out,
                                      struct err *err)
{
    static const char mark[] = "\xEF\xBB\xBF"; /* what Windows editors put first */
    struct scanner s = {.at = text, .end = text + len};
    const char *why = NULL;

    *out = (struct connection_string){.encrypt = -1};
    if (memchr(text, '\0', len) != NULL || u8_check((const uint8_t *)text, len) != NULL)
        return err_set(err, ERR_CONFIG, "must be text in UTF-8");
    if (len >= 3 && memcmp(text, mark, 3) == 0)
        s.at += 3;
    for (;;) {
        while (s.at < s.end && (isspace((unsigned char)*s.at) || *s.at == ';'))
            s.at++;
        if (s.at == s.end)
            break;
        if (scan_pair(&s, out, err) != ERR_NONE)
            return ERR_CONFIG;
    }
    if (out->encrypt == ENCRYPT_REQUEST)
        out->trust_certificate = true;
    why = missing(out);
    return why == NULL ? ERR_NONE : err_set(err, ERR_CONFIG, "%s", why);
}
