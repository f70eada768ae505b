/* test_connection_string.c - DBConnection.txt: what is honoured, and what is refused by name. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <string.h>

#include "config.h"
#include "connection_string.h"

#define REST ";DATABASE=d;UID=u;PWD=p"
#define WHOLE "SERVER=db" REST

/* ---- servers ---- */

static void test_servers(void **state)
{
    static const struct {
        const char *text;
        const char *host;
        const char *instance;
        int port;
    } cases[] = {
        {"db", "db", "", 1433},
        {"db.example.com", "db.example.com", "", 1433},
        {"db:1444", "db", "", 1444},
        {"db,1444", "db", "", 1444},
        {"db, 1444", "db", "", 1444},
        {"tcp:db,1444", "db", "", 1444},
        {"TCP:db", "db", "", 1433},
        {"tcp:db.database.windows.net,1433", "db.database.windows.net", "", 1433},
        {"10.0.0.1:65535", "10.0.0.1", "", 65535},
        {"[::1]:1444", "::1", "", 1444},
        {"[fe80::1%eth0],1444", "fe80::1%eth0", "", 1444},
        {"[::1]", "::1", "", 1433},
        {"::1", "::1", "", 1433},
        {"fe80::1,1444", "fe80::1", "", 1444},
        {"HOST\\SQLEXPRESS", "HOST", "SQLEXPRESS", 0},
        {"tcp:HOST\\SQL_2019$A", "HOST", "SQL_2019$A", 0},
        {"HOST\\SQLEXPRESS,1444", "HOST", "", 1444}, /* the port decides, as with ODBC */
        {"HOST\\MSSQLSERVER", "HOST", "", 1433},     /* the name of the default instance */
        {".", "localhost", "", 1433},
        {"(local)", "localhost", "", 1433},
        {".\\SQLEXPRESS", "localhost", "SQLEXPRESS", 0},
    };
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct connection_server server;
        struct err err = {0};
        if (connection_server_parse(cases[i].text, &server, &err) != ERR_NONE)
            fail_msg("%s: %s", cases[i].text, err.message);
        assert_string_equal(cases[i].host, server.host);
        assert_string_equal(cases[i].instance, server.instance);
        assert_int_equal(cases[i].port, server.port);
    }
}

static void test_servers_refused(void **state)
{
    static const char *const texts[] = {
        "",           ":1433",
        "db:",        "db:0",
        "db:65536",   "db:x",
        "db:+1",      "db:1433x",
        "db,",        "db,1,2",
        "d b",        "db;x",
        "db#",        "db\nport=1",
        "np:db",      "lpc:db",
        "admin:db",   "\\\\.\\pipe\\x",
        "(localdb)x", "HOST\\a b",
        "HOST\\a#b",  "HOST\\",
        "[::1",       "[::1]x",
        "[]:1",       "HOST\\ABCDEFGHIJKLMNOPQ",
        "d\xC3\xA4",  "db/x",
        "tcp:",
    };
    char text[400];
    (void)state;

    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        struct connection_server server;
        struct err err = {0};
        if (connection_server_parse(texts[i], &server, &err) != ERR_CONFIG)
            fail_msg("'%s' was taken: %s %s %d", texts[i], server.host, server.instance,
                     server.port);
        assert_true(err.message[0] != '\0');
    }
    for (size_t len = 190; len < sizeof text; len++) {
        struct connection_server server;
        memset(text, 'a', len);
        text[len] = '\0';
        assert_int_equal(len < CONNECTION_HOST_SIZE ? ERR_NONE : ERR_CONFIG,
                         connection_server_parse(text, &server, NULL));
    }
}

/* ---- whole strings ---- */

static struct connection_string parse(const char *text)
{
    struct connection_string c;
    struct err err = {0};

    if (connection_string_parse(text, strlen(text), &c, &err) != ERR_NONE)
        fail_msg("%s: %s", text, err.message);
    return c;
}

static void test_plain(void **state)
{
    struct connection_string c =
        parse("DRIVER={ODBC Driver 17 for SQL Server};SERVER=tcp:db.example.com,1444;"
              "DATABASE=Tokens;UID=app;PWD=secret;Encrypt=yes;TrustServerCertificate=no;"
              "APP=invoices;WSID=web1;Connection Timeout=30;");
    (void)state;

    assert_string_equal("db.example.com", c.server.host);
    assert_int_equal(1444, c.server.port);
    assert_string_equal("Tokens", c.database);
    assert_string_equal("app", c.user);
    assert_string_equal("secret", c.password);
    assert_string_equal("invoices", c.application);
    assert_string_equal("web1", c.workstation);
    assert_int_equal(ENCRYPT_REQUIRE, c.encrypt);
    assert_false(c.trust_certificate);
    assert_int_equal(30, c.login_timeout_s);

    c = parse(WHOLE);
    assert_int_equal(-1, c.encrypt);
    assert_false(c.trust_certificate);
    assert_int_equal(0, c.login_timeout_s);
    assert_int_equal(1433, c.server.port);
    assert_string_equal("", c.application);
}

static void test_other_names(void **state)
{
    static const char *const texts[] = {
        "Data Source=db;Initial Catalog=d;User ID=u;Password=p",
        "addr=db;database=d;user=u;pwd=p",
        "ADDRESS = db ; DATABASE = d ; UID = u ; PWD = p ;",
        "Network Address=db;Database=d;Uid=u;Pwd=p;;;",
        "\xEF\xBB\xBFserver=db;database=d;uid=u;pwd=p\r\n",
        "server=db\r\ndatabase=d\r\nuid=u\r\npwd=p\r\n",
        " ; server={db};database={d};uid={u};pwd={p} ; ",
        "server=db;database=d;uid=u;pwd=p;app=;Trusted_Connection=",
    };
    (void)state;

    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        struct connection_string c = parse(texts[i]);
        assert_string_equal("db", c.server.host);
        assert_string_equal("d", c.database);
        assert_string_equal("u", c.user);
        assert_string_equal("p", c.password);
    }
}

static void test_passwords(void **state)
{
    static const struct {
        const char *written;
        const char *password;
    } cases[] = {
        {"a=b", "a=b"},
        {"{a;b}", "a;b"},
        {"{a}}b}", "a}b"},
        {"{}}}}}", "}}"},
        {"{ a }", " a "},
        {"  a b  ", "a b"},
        {"a{b", "a{b"},
        {"a}b", "a}b"},
        {"\"a\"", "\"a\""},
        {"'a'", "'a'"},
        {"{{}", "{"},
        {"{=;={}", "=;={"},
        {"p\xC3\xA4\xC3\x9F\xF0\x9F\x98\x80", "p\xC3\xA4\xC3\x9F\xF0\x9F\x98\x80"},
        {"#a%20+\\\\", "#a%20+\\\\"},
        {"{a\nb}", "a\nb"},
    };
    char text[256];
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        snprintf(text, sizeof text, "SERVER=db;UID=u;PWD=%s;DATABASE=d", cases[i].written);
        assert_string_equal(cases[i].password, parse(text).password);
        snprintf(text, sizeof text, "SERVER=db;UID=u;DATABASE=d;PWD=%s", cases[i].written);
        assert_string_equal(cases[i].password, parse(text).password);
    }
}

static void test_encrypt(void **state)
{
    static const struct {
        const char *written;
        int encrypt;
        bool trust;
    } cases[] = {
        {"Encrypt=yes", ENCRYPT_REQUIRE, false},
        {"Encrypt=Mandatory", ENCRYPT_REQUIRE, false},
        {"Encrypt=TRUE;TrustServerCertificate=yes", ENCRYPT_REQUIRE, true},
        {"TrustServerCertificate=1;Encrypt=1", ENCRYPT_REQUIRE, true},
        {"Encrypt=no", ENCRYPT_REQUEST, true},
        {"Encrypt=Optional;TrustServerCertificate=no", ENCRYPT_REQUEST, true},
        {"encrypt={False}", ENCRYPT_REQUEST, true},
        {"Trust Server Certificate=true", -1, true},
    };
    char text[256];
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        snprintf(text, sizeof text, WHOLE ";%s", cases[i].written);
        struct connection_string c = parse(text);
        assert_int_equal(cases[i].encrypt, c.encrypt);
        assert_int_equal(cases[i].trust, c.trust_certificate);
    }
}

static void test_ports(void **state)
{
    (void)state;
    assert_int_equal(1444, parse("SERVER=db;PORT=1444" REST).server.port);
    assert_int_equal(1444, parse("PORT=1444;SERVER=db" REST).server.port);
    assert_int_equal(1444, parse("PORT=1444;SERVER=db\\X" REST).server.port);
    assert_string_equal("", parse("SERVER=db\\X;PORT=1444" REST).server.instance);
    assert_string_equal("X", parse("SERVER=db\\X" REST).server.instance);
}

/* What changes nothing here, because it is so already. */
static void test_harmless(void **state)
{
    static const char *const texts[] = {
        "Driver=FreeTDS",
        "Driver=SQL Server",
        "Driver={SQL Server Native Client 11.0}",
        "Driver=/usr/lib/x86_64-linux-gnu/odbc/libtdsodbc.so",
        "MARS_Connection=yes",
        "MultipleActiveResultSets=False",
        "MultiSubnetFailover=Yes",
        "TransparentNetworkIPResolution=Disabled;Pooling=true",
        "ApplicationIntent=ReadWrite",
        "Trusted_Connection=no",
        "Integrated Security=false",
        "Authentication=SqlPassword",
        "ConnectRetryCount=3;ConnectRetryInterval=10",
        "KeepAlive=30;KeepAliveInterval=1",
        "Persist Security Info=False",
        "AnsiNPW=yes;QuotedId=yes;AutoTranslate=no;Regional=no",
        "ColumnEncryption=Disabled;UseFMTONLY=no",
        "Network=dbmssocn",
        "ClientCharset=UTF-8;TDS_Version=7.4",
        "Description=production",
    };
    char text[256];
    (void)state;

    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        snprintf(text, sizeof text, WHOLE ";%s", texts[i]);
        parse(text);
    }
}

static void expect_refusal(const char *text, size_t len, const char *message)
{
    struct connection_string c;
    struct err err = {0};

    if (connection_string_parse(text, len, &c, &err) != ERR_CONFIG)
        fail_msg("%s was taken", text);
    if (strncmp(message, err.message, strlen(message)) != 0)
        fail_msg("%s: expected %s, found %s", text, message, err.message);
    if (strstr(err.message, "s3cret") != NULL)
        fail_msg("a secret is shown: %s", err.message);
}

static void test_refused(void **state)
{
    static const struct {
        const char *text;
        const char *message;
    } cases[] = {
        {"", "SERVER is missing"},
        {"DATABASE=d;UID=u;PWD=p", "SERVER is missing"},
        {"SERVER=db;UID=u;PWD=p", "DATABASE is missing"},
        {"SERVER=db;DATABASE=d;PWD=p", "UID is missing"},
        {"SERVER=db;DATABASE=d;UID=u", "PWD is missing"},
        {"SERVER=db;DATABASE=d;UID=u;PWD={}", "PWD is missing"},
        {WHOLE ";server=x", "SERVER: is given twice"},
        {WHOLE ";Data Source=x", "SERVER: is given twice"},
        {WHOLE ";Colour=red", "what follows PWD is no keyword: a password that holds ;"},
        {"SERVER=db;DATABASE=d;UID=u;PWD=s3cret;s3cret2=x", "what follows PWD is no keyword"},
        {"SERVER=db;DATABASE=d;UID=u;PWD=a;s3cret", "what follows PWD is no keyword"},
        {"Colour=red;" WHOLE, "Colour: is no keyword that is known here"},
        {"SERVER;" WHOLE, "SERVER: there is no = after it"},
        {"=x;" WHOLE, "not a list of KEYWORD=value; pairs"},
        {"a\x01=x;" WHOLE, "not a list of KEYWORD=value; pairs"},
        {"s3cret", "not a list of KEYWORD=value; pairs"}, /* a password's file by mistake */
        {"SERVER=db;UID=s3cret;s3cret2\nPWD=p", "not a list of KEYWORD=value; pairs"},
        {"SERVER=db;DATABASE=d;UID=u;PWD={s3cret", "PWD: its { has no }"},
        {"SERVER=db;DATABASE=d;UID=u;PWD={s3cret}}", "PWD: its { has no }"},
        {"SERVER=db;DATABASE=d;UID=u;PWD={s3}cret", "PWD: there must be a ; after its }"},
        {"SERVER=np:db" REST, "SERVER: must be a host's name or address"},
        {"SERVER=db,x" REST, "SERVER: must be HOST,PORT or HOST\\INSTANCE"},
        {WHOLE ";PORT=0", "PORT: must be 1 to 65535"},
        {WHOLE ";DRIVER={PostgreSQL Unicode}", "DRIVER: must be a driver for SQL Server"},
        {WHOLE ";Encrypt=strict", "Encrypt: strict is not available here: write Encrypt=yes"},
        {WHOLE ";Encrypt=perhaps", "Encrypt: must be yes or no"},
        {WHOLE ";TrustServerCertificate=2", "TrustServerCertificate: must be yes or no"},
        {WHOLE ";Trusted_Connection=yes", "Trusted_Connection: Windows logins are not available"},
        {WHOLE ";Integrated Security=SSPI", "Trusted_Connection: Windows logins are not available"},
        {WHOLE ";Authentication=ActiveDirectoryMsi", "Authentication: only SqlPassword"},
        {WHOLE ";ApplicationIntent=ReadOnly", "ApplicationIntent: must be ReadWrite"},
        {WHOLE ";Connection Timeout=-1", "Connection Timeout: must be 0 to 9999 seconds"},
        {WHOLE ";ColumnEncryption=Enabled", "ColumnEncryption: is not available here"},
        {WHOLE ";QuotedId=no", "QuotedID: only yes is available here"},
        {WHOLE ";Network=dbnmpntw", "Network: must be TCP"},
        {WHOLE ";ClientCharset=ISO-8859-1", "ClientCharset: is UTF-8 always"},
        {WHOLE ";TDS_Version=7.0", "TDS_Version: is 7.4 always"},
        {WHOLE ";Max Pool Size=100", "Max Pool Size: leave it out, and set store.pool_size"},
        {WHOLE ";Command Timeout=30", "QueryTimeout: leave it out, and set store.query_timeout"},
        {WHOLE ";Language=German", "Language: makes no difference here"},
        {WHOLE ";Failover_Partner=db2", "Failover_Partner: database mirroring is not available"},
        {WHOLE ";HostNameInCertificate=x", "HostNameInCertificate: the certificate is checked for"},
        {WHOLE ";ServerCertificate=/x", "ServerCertificate: leave it out, and name the file as"},
        {WHOLE ";AttachDBFileName=x", "AttachDBFileName: attach the database"},
        {"DSN=x;UID=u;PWD=p", "DSN: data sources of ODBC are not read"},
        {"Provider=MSOLEDBSQL;" WHOLE, "Provider: is OLE DB's"},
    };
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        expect_refusal(cases[i].text, strlen(cases[i].text), cases[i].message);
    expect_refusal("SERVER=db\0x" REST, 12, "must be text in UTF-8");
    expect_refusal("S\0E\0", 4, "must be text in UTF-8"); /* UTF-16 */
    expect_refusal("SERVER=\xFF" REST, strlen("SERVER=\xFF" REST), "must be text in UTF-8");
}

static void test_lengths(void **state)
{
    char value[400];
    char text[600];
    (void)state;

    memset(value, 'a', sizeof value);
    for (size_t len = 120; len < sizeof value; len++) {
        struct connection_string c;
        int n = snprintf(text, sizeof text, "SERVER=db;UID=u;DATABASE=d;PWD=%.*s", (int)len, value);
        assert_int_equal(len < CONNECTION_TEXT_SIZE ? ERR_NONE : ERR_CONFIG,
                         connection_string_parse(text, (size_t)n, &c, NULL));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_servers),   cmocka_unit_test(test_servers_refused),
        cmocka_unit_test(test_plain),     cmocka_unit_test(test_other_names),
        cmocka_unit_test(test_passwords), cmocka_unit_test(test_encrypt),
        cmocka_unit_test(test_ports),     cmocka_unit_test(test_harmless),
        cmocka_unit_test(test_refused),   cmocka_unit_test(test_lengths),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
