/* test_config.c - values good and bad, precedence, places in messages, URLs that play tricks, and
 * that what config_print writes and what the example shows is read back. */
#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "config.h"
#include "log.h"

#define EXAMPLE "systemd/extract-fcgi.conf.example"

static char directory[] = "/tmp/test_config.XXXXXX";
static char path[64]; /* of the configuration that load() writes */

/* ---- helpers ---- */

static void clear_environment(void)
{
    bool found = true;

    while (found) {
        found = false;
        for (char **entry = environ; *entry != NULL && !found; entry++) {
            char name[128];
            size_t len = strcspn(*entry, "=");
            if (strncmp(*entry, "EXTRACT_", 8) != 0 || len >= sizeof name)
                continue;
            memcpy(name, *entry, len);
            name[len] = '\0';
            unsetenv(name);
            found = true;
        }
    }
}

static int set_up_all(void **state)
{
    (void)state;
    if (mkdtemp(directory) == NULL)
        return -1;
    snprintf(path, sizeof path, "%s/test.conf", directory);
    return 0;
}

static int tear_down_all(void **state)
{
    (void)state;
    unlink(path);
    return rmdir(directory);
}

static int set_up(void **state)
{
    (void)state;
    clear_environment();
    return 0;
}

static void write_file(const char *name, const char *text, size_t len)
{
    FILE *file = fopen(name, "w");
    assert_non_null(file);
    assert_int_equal(fwrite(text, 1, len, file), len);
    assert_int_equal(fclose(file), 0);
}

static struct config *load(const char *text, struct err *err)
{
    *err = (struct err){0};
    write_file(path, text, strlen(text));
    return config_load(path, err);
}

static struct config *load_good(const char *text)
{
    struct err err;
    struct config *config = load(text, &err);
    if (config == NULL)
        fail_msg("refused: %s\n%s", text, err.message);
    return config;
}

/* The text is refused; the message is expected, with the file's path put before it where it begins
 * with a colon. */
static void expect_refusal(const char *text, const char *expected)
{
    struct err err;
    char whole[600];
    struct config *config = load(text, &err);

    if (config != NULL)
        fail_msg("not refused: %s", text);
    snprintf(whole, sizeof whole, "%s%s", expected[0] == ':' ? path : "", expected);
    assert_string_equal(err.message, whole);
    assert_int_equal(err.code, ERR_CONFIG);
}

static void refuse_value(const char *section, const char *key, const char *value)
{
    struct err err;
    char text[10000];
    char place[256];
    struct config *config;

    snprintf(text, sizeof text, "[%s]\n%s = %s\n", section, key, value);
    snprintf(place, sizeof place, "%s:2: [%s] %s: ", path, section, key);
    config = load(text, &err);
    if (config != NULL)
        fail_msg("not refused: %s", text);
    if (strncmp(err.message, place, strlen(place)) != 0)
        fail_msg("no place: %s", err.message);
}

static struct config *load_value(const char *section, const char *key, const char *value)
{
    char text[10000];
    snprintf(text, sizeof text, "[%s]\n%s = %s\n", section, key, value);
    return load_good(text);
}

static char *print(const struct config *config)
{
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    assert_non_null(out);
    config_print(config, out);
    assert_int_equal(fclose(out), 0);
    return text;
}

/* Removes the lines that say where values came from. */
static void strip_sources(char *text)
{
    char *out = text;
    for (char *line = text; *line != '\0';) {
        size_t len = strcspn(line, "\n") + 1;
        if (strncmp(line, "# from ", 7) != 0) {
            memmove(out, line, len);
            out += len;
        }
        line += len;
    }
    *out = '\0';
}

/* ---- defaults and values ---- */

static void test_defaults(void **state)
{
    struct config *c = load_good("");
    (void)state;

    assert_int_equal(c->server.threads, 16);
    assert_int_equal(c->server.queue, 64);
    assert_int_equal(c->server.queue_wait_ms, 10000);
    assert_true(c->server.company_share == 1.0);
    assert_int_equal(c->server.max_upload, 50 * 1024 * 1024);
    assert_int_equal(c->server.deadline_ms, 120000);
    assert_string_equal(c->server.state_dir, "/var/lib/extract-fcgi");
    assert_string_equal(c->server.runtime_dir, "/run/extract-fcgi");
    assert_string_equal(c->server.body_file_dir, "");
    assert_int_equal(c->auth.mode, AUTH_BEARER);
    assert_int_equal(c->auth.key_rate, 6000);
    assert_int_equal(c->auth.offline_grace_ms, 3600000);
    assert_string_equal(c->gemini.base_url, "https://generativelanguage.googleapis.com");
    assert_string_equal(c->gemini.model, "gemini-3.5-flash");
    assert_int_equal(c->gemini.connect_timeout_ms, 10000);
    assert_int_equal(c->gemini.timeout_ms, 55000);
    assert_string_equal(c->gemini.proxy, "");
    assert_string_equal(c->gemini.prompt_file, "");
    assert_string_equal(c->gemini.schema_file, "");
    assert_string_equal(c->gemini.ca_file, "");
    assert_int_equal(c->gemini.max_output_tokens, 0);
    assert_int_equal(c->gemini.reserve_tokens, 8000);
    assert_int_equal(c->retry.max_retries, 3);
    assert_int_equal(c->retry.initial_delay_ms, 1000);
    assert_int_equal(c->retry.max_delay_ms, 30000);
    assert_true(c->retry.backoff_multiplier == 2.0);
    assert_true(c->retry.jitter);
    assert_true(c->retry.auto_disable);
    assert_int_equal(c->store.driver, DRIVER_SQLITE);
    assert_true(c->store.auto_create);
    assert_int_equal(c->store.pool_size, 0);
    assert_int_equal(c->store.query_timeout_ms, 5000);
    assert_string_equal(c->store.path, "/var/lib/extract-fcgi/store.db");
    assert_string_equal(c->store.server, "");
    assert_string_equal(c->store.database, "");
    assert_string_equal(c->store.user, "");
    assert_string_equal(c->store.password_file, "");
    assert_string_equal(c->store.admin_user, "");
    assert_string_equal(c->store.admin_password_file, "");
    assert_int_equal(c->store.encrypt, ENCRYPT_REQUIRE);
    assert_string_equal(c->store.ca_file, "system");
    assert_string_equal(c->store.connection_file, "");
    assert_string_equal(c->fallback.key_file, "");
    assert_int_equal(c->fallback.when, FALLBACK_STORE_UNAVAILABLE);
    assert_int_equal(c->log.level, LOG_INFO);
    assert_int_equal(c->log.sink, SINK_STORE);
    assert_string_equal(c->seal.key_file, "");
    config_free(c);
    config_free(NULL);
}

static void test_durations(void **state)
{
    static const struct {
        const char *text;
        int64_t ms; /* -1: refused */
    } cases[] = {
        {"10", 10000},
        {"10s", 10000},
        {"500ms", 500},
        {"2m", 120000},
        {"1h", 3600000},
        {"1.0", 1000},
        {"0.5", 500},
        {"1.5s", 1500},
        {"0.5m", 30000},
        {"0", 0},
        {"10S", 10000},
        {"0.001", 1},
        {"1.005", 1005},
        {"720h", 2592000000},
        {"61m", -1},
        {"2h", -1},
        {"-1", -1},
        {"+1", -1},
        {"1d", -1},
        {"10 s", -1},
        {"s", -1},
        {".5", -1},
        {"1.", -1},
        {"1e3", -1},
        {"0x10", -1},
        {"inf", -1},
        {"nan", -1},
        {"1,5", -1},
        {"1.5.5", -1},
        {"10sec", -1},
        {"", -1},
        {"1s;", -1},
        {"0000000000000000000000000000000000000000000000000000001", -1},
    };
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        if (cases[i].ms < 0) {
            refuse_value("gemini", "connect_timeout", cases[i].text);
        } else {
            struct config *c = load_value("auth", "offline_grace", cases[i].text);
            assert_int_equal(c->auth.offline_grace_ms, cases[i].ms);
            config_free(c);
        }
    }
}

static void test_sizes(void **state)
{
    static const struct {
        const char *text;
        int64_t bytes; /* -1: refused */
    } cases[] = {
        {"1024", 1024},     {"512K", 524288},  {"50M", 52428800}, {"1G", 1073741824},
        {"1g", 1073741824}, {"20m", 20971520}, {"1023", -1},      {"2G", -1},
        {"1.5M", -1},       {"50MB", -1},      {"50 M", -1},      {"-50M", -1},
        {"M", -1},          {"", -1},          {"50%", -1},
    };
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        if (cases[i].bytes < 0) {
            refuse_value("server", "max_upload", cases[i].text);
        } else {
            struct config *c = load_value("server", "max_upload", cases[i].text);
            assert_int_equal(c->server.max_upload, cases[i].bytes);
            config_free(c);
        }
    }
}

static void test_whole_numbers(void **state)
{
    static const char *const bad[] = {"0",          "1025", "1.0", "1K",  "abc",  "-1",
                                      "16 threads", "0x10", "",    "1e2", "four", "4294967297"};
    struct config *c;
    (void)state;

    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        refuse_value("server", "threads", bad[i]);
    c = load_value("server", "threads", "1");
    assert_int_equal(c->server.threads, 1);
    config_free(c);
    c = load_value("server", "threads", "1024");
    assert_int_equal(c->server.threads, 1024);
    config_free(c);
    c = load_value("server", "threads", "007");
    assert_int_equal(c->server.threads, 7);
    config_free(c);
}

static void test_reals(void **state)
{
    struct config *c = load_good("[server]\ncompany_share = 0.25\n"
                                 "[retry]\nbackoff_multiplier = 1\n");
    (void)state;

    assert_true(c->server.company_share == 0.25);
    assert_true(c->retry.backoff_multiplier == 1.0);
    config_free(c);
    refuse_value("server", "company_share", "0");
    refuse_value("server", "company_share", "1.01");
    refuse_value("server", "company_share", "0,5");
    refuse_value("server", "company_share", "50%");
    refuse_value("retry", "backoff_multiplier", "0.99");
    refuse_value("retry", "backoff_multiplier", "nan");
    refuse_value("retry", "backoff_multiplier", "2s");
}

static void test_yes_no(void **state)
{
    static const char *const yes[] = {"yes", "true", "on", "1", "YES", "True"};
    static const char *const no[] = {"no", "false", "off", "0", "No", "OFF"};
    static const char *const bad[] = {"y", "2", "", "yes please", "none"};
    (void)state;

    for (size_t i = 0; i < sizeof yes / sizeof yes[0]; i++) {
        struct config *c = load_value("retry", "jitter", yes[i]);
        assert_true(c->retry.jitter);
        config_free(c);
    }
    for (size_t i = 0; i < sizeof no / sizeof no[0]; i++) {
        struct config *c = load_value("retry", "jitter", no[i]);
        assert_false(c->retry.jitter);
        config_free(c);
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        refuse_value("retry", "jitter", bad[i]);
}

static void test_words(void **state)
{
    struct config *c = load_good("[store]\nencrypt = off\n[fallback]\nwhen = no_active_token\n"
                                 "[log]\nlevel = critical\nsink = stderr\n");
    (void)state;

    assert_int_equal(c->store.encrypt, ENCRYPT_OFF);
    assert_int_equal(c->fallback.when, FALLBACK_NO_ACTIVE_TOKEN);
    assert_int_equal(c->log.level, LOG_CRITICAL);
    assert_int_equal(c->log.sink, SINK_STDERR);
    config_free(c);
    c = load_value("log", "level", "WARNING");
    assert_int_equal(c->log.level, LOG_WARNING);
    config_free(c);
    c = load_value("store", "encrypt", "request");
    assert_int_equal(c->store.encrypt, ENCRYPT_REQUEST);
    config_free(c);
    refuse_value("log", "level", "WARN");
    refuse_value("log", "level", "");
    refuse_value("store", "driver", "mysql");
}

static void test_text(void **state)
{
    char value[4100];
    struct config *c = load_value("store", "user", "J\xC3\xB6rg = x # y;z");
    (void)state;

    assert_string_equal(c->store.user, "J\xC3\xB6rg = x # y;z");
    config_free(c);
    refuse_value("store", "user", "a\x01z");
    refuse_value("store", "user", "a\tz");
    refuse_value("store", "user", "a\x7Fz");
    refuse_value("store", "user", "a\xC2\x85z");
    refuse_value("store", "user", "a\xFFz");
    refuse_value("store", "user", "a\xC3");

    memset(value, 'v', sizeof value);
    value[4096] = '\0';
    c = load_value("store", "user", value);
    assert_string_equal(c->store.user, value);
    config_free(c);
    value[4096] = 'v';
    value[4097] = '\0';
    setenv("EXTRACT_STORE_USER", value, 1);
    expect_refusal("", "EXTRACT_STORE_USER: is too long: at most 4096 bytes");
}

static void test_model(void **state)
{
    char long_name[140];
    struct config *c = load_value("gemini", "model", "Gemini_4.0-flash");
    (void)state;

    assert_string_equal(c->gemini.model, "Gemini_4.0-flash");
    config_free(c);
    refuse_value("gemini", "model", "models/gemini-3.5-flash");
    refuse_value("gemini", "model", "gemini:generateContent");
    refuse_value("gemini", "model", "gemini?key=x");
    refuse_value("gemini", "model", "gemini 3");
    refuse_value("gemini", "model", "g\xC3\xA9mini");
    memset(long_name, 'm', sizeof long_name);
    long_name[128] = '\0';
    c = load_value("gemini", "model", long_name);
    config_free(c);
    long_name[128] = 'm';
    long_name[129] = '\0';
    refuse_value("gemini", "model", long_name);
}

/* ---- the file ---- */

static void test_syntax(void **state)
{
    char text[20000];
    struct config *c = load_good("\xEF\xBB\xBF# a comment with \xFF in it\r\n; another\r\n\r\n"
                                 "[server]\r\nthreads: 2 ; inline\r\n  queue=3\r\n"
                                 "[retry]\nmax_retries = 1\n[server]\nmax_upload = 1M");
    (void)state;

    assert_int_equal(c->server.threads, 2);
    assert_int_equal(c->server.queue, 3);
    assert_int_equal(c->retry.max_retries, 1);
    assert_int_equal(c->server.max_upload, 1048576);
    config_free(c);

    /* an indented line is a line of its own, never the continuation of a value */
    expect_refusal("[store]\nuser = a\n  b\n", ":3: neither [section] nor key = value");
    expect_refusal("[server\n", ":1: neither [section] nor key = value");
    expect_refusal("[server]\n\nthreads\n", ":3: neither [section] nor key = value");
    expect_refusal("[server]\njunk\nthreads = abc\n", ":2: neither [section] nor key = value");
    expect_refusal("\nthreads = 3\n", ":2: threads: a key before the first [section]");

    /* long lines are read whole, too long ones refused, never cut */
    memset(text, '#', sizeof text);
    snprintf(text + 8000, sizeof text - 8000, "\n[server]\nthreads = 9\n");
    c = load_good(text);
    assert_int_equal(c->server.threads, 9);
    config_free(c);
    memset(text, '#', 9000);
    snprintf(text + 9000, sizeof text - 9000, "\n[server]\nthreads = 9\n");
    expect_refusal(text, ":1: the line is too long");
}

static void test_nul_byte(void **state)
{
    static const char text[] = "[server]\nthreads = 3\n\0queue = 3\n";
    struct err err = {0};
    char expected[128];
    (void)state;

    write_file(path, text, sizeof text - 1);
    assert_null(config_load(path, &err));
    snprintf(expected, sizeof expected, "%s:2: a NUL byte", path);
    assert_string_equal(err.message, expected);
}

static void test_unknown_keys(void **state)
{
    (void)state;
    expect_refusal("[retry]\n\nmax_retrys = 3\n",
                   ":3: [retry] max_retrys: unknown key (did you mean max_retries?)");
    expect_refusal("[server]\npath = /x\n",
                   ":2: [server] path: unknown key (did you mean [store] path?)");
    expect_refusal("[sever]\nthreads = 3\n",
                   ":2: [sever] threads: unknown key (did you mean [server] threads?)");
    expect_refusal("[server]\nThreads = 3\n",
                   ":2: [server] Threads: unknown key (did you mean threads?)");
    expect_refusal("[seal]\nkey_fil = /x\n",
                   ":2: [seal] key_fil: unknown key (did you mean key_file?)");
    expect_refusal("[server]\nxyzzy_plugh = 3\n", ":2: [server] xyzzy_plugh: unknown key");
    expect_refusal("[server]\na\x1B[31m = 3\n", ":2: [server] a?[31m: unknown key");
    expect_refusal(
        "[server]\n"
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa = 3\n",
        ":2: [server] "
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...: unknown key");
}

static void test_given_twice(void **state)
{
    (void)state;
    expect_refusal("[server]\nthreads = 3\nqueue = 4\nthreads = 3\n",
                   ":4: [server] threads: given twice, first in line 2");
    expect_refusal("[store]\nuser =\n[log]\n[store]\nuser =\n",
                   ":5: [store] user: given twice, first in line 2");
}

static void test_messages(void **state)
{
    (void)state;
    expect_refusal("[server]\nthreads = abc\n",
                   ":2: [server] threads: \"abc\" is not a whole number from 1 to 1024");
    expect_refusal(
        "[server]\nmax_upload = 50MB\n",
        ":2: [server] max_upload: \"50MB\" is not a size like 512K or 50M, from 1K to 1G");
    expect_refusal("[server]\ndeadline = 2h\n",
                   ":2: [server] deadline: \"2h\" is not a duration like 10s, 500ms or 2m, "
                   "from 1s to 1h");
    expect_refusal("[server]\ncompany_share = 2\n",
                   ":2: [server] company_share: \"2\" is not a number from 0.01 to 1");
    expect_refusal("[retry]\njitter = maybe\n", ":2: [retry] jitter: \"maybe\" is not yes or no");
    expect_refusal("[store]\nencrypt = yes\n",
                   ":2: [store] encrypt: \"yes\" is not one of require, request or off");
}

static void test_which_file(void **state)
{
    struct err err = {0};
    char expected[128];
    struct config *c;
    (void)state;

    /* the argument before EXTRACT_CONFIG; a file that was named must be there */
    write_file(path, "[server]\nthreads = 5\n", 21);
    setenv("EXTRACT_CONFIG", path, 1);
    c = config_load(NULL, &err);
    assert_non_null(c);
    assert_int_equal(c->server.threads, 5);
    config_free(c);
    assert_null(config_load("/nonexistent/x.conf", &err));
    assert_string_equal(err.message, "/nonexistent/x.conf: No such file or directory");
    setenv("EXTRACT_CONFIG", "/nonexistent/y.conf", 1);
    assert_null(config_load(NULL, &err));
    assert_string_equal(err.message, "/nonexistent/y.conf: No such file or directory");
    snprintf(expected, sizeof expected, "%s: Is a directory", directory);
    assert_null(config_load(directory, &err));
    assert_string_equal(err.message, expected);

    /* the default file, and only that, may be absent */
    setenv("EXTRACT_CONFIG", "", 1);
    if (access(CONFIG_DEFAULT_FILE, F_OK) != 0) {
        c = config_load(NULL, &err);
        assert_non_null(c);
        assert_int_equal(c->server.threads, 16);
        config_free(c);
    }
}

/* ---- the environment ---- */

static void test_environment(void **state)
{
    struct config *c;
    (void)state;

    setenv("EXTRACT_SERVER_THREADS", " 7 ", 1);
    setenv("EXTRACT_SERVER_QUEUE_WAIT", "250ms", 1);
    c = load_good("[server]\nthreads = 3\nqueue = 4\n");
    assert_int_equal(c->server.threads, 7);
    assert_int_equal(c->server.queue, 4);
    assert_int_equal(c->server.queue_wait_ms, 250);
    config_free(c);
}

static void test_environment_does_not_hide_the_file(void **state)
{
    (void)state;
    setenv("EXTRACT_SERVER_THREADS", "7", 1);
    expect_refusal("[server]\nthreads = abc\n",
                   ":2: [server] threads: \"abc\" is not a whole number from 1 to 1024");
}

static void test_environment_errors(void **state)
{
    static const struct {
        const char *name;
        const char *value;
        const char *message;
    } cases[] = {
        {"EXTRACT_SERVER_THREADS", "abc",
         "EXTRACT_SERVER_THREADS: \"abc\" is not a whole number from 1 to 1024"},
        {"EXTRACT_SERVER_THREADS", "",
         "EXTRACT_SERVER_THREADS: \"\" is not a whole number from 1 to 1024"},
        {"EXTRACT_RETRY_JITTER", "", "EXTRACT_RETRY_JITTER: \"\" is not yes or no"},
        {"EXTRACT_LOG_SINK", "", "EXTRACT_LOG_SINK: \"\" is not one of store or stderr"},
        {"EXTRACT_SERVER_THREAD", "3",
         "EXTRACT_SERVER_THREAD: unknown variable (did you mean EXTRACT_SERVER_THREADS?)"},
        {"EXTRACT_RETRY_MAX_RETRYS", "3",
         "EXTRACT_RETRY_MAX_RETRYS: unknown variable (did you mean EXTRACT_RETRY_MAX_RETRIES?)"},
        {"EXTRACT_XYZZY", "", "EXTRACT_XYZZY: unknown variable"},
        {"EXTRACT_", "", "EXTRACT_: unknown variable"},
        {"EXTRACT_CONFIGURATION", "", "EXTRACT_CONFIGURATION: unknown variable"},
        {"EXTRACT_STORE_USER", "a\nb", "EXTRACT_STORE_USER: must not have control characters"},
        {"EXTRACT_STORE_USER", "a\xFF", "EXTRACT_STORE_USER: must be UTF-8"},
        {"EXTRACT_STORE_USER", "a ;b",
         "EXTRACT_STORE_USER: must not have a ; at its begin or after a space: that begins a "
         "comment"},
        {"EXTRACT_STORE_USER", ";b",
         "EXTRACT_STORE_USER: must not have a ; at its begin or after a space: that begins a "
         "comment"},
        {"EXTRACT_STORE_DRIVER", "mssql",
         "[store] server (default): driver = mssql needs server, database, user and "
         "password_file, or connection_file"},
    };
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        clear_environment();
        setenv(cases[i].name, cases[i].value, 1);
        expect_refusal("", cases[i].message);
    }
}

static void test_empty_text_is_unset(void **state)
{
    struct config *c;
    (void)state;

    setenv("EXTRACT_GEMINI_MODEL", "", 1);
    setenv("EXTRACT_FALLBACK_KEY_FILE", " ", 1);
    setenv("EXTRACT_STORE_PATH", "", 1);
    c = load_good("[gemini]\nmodel = other\nbase_url =\n[fallback]\nkey_file = /nonexistent\n"
                  "[store]\npath = /x\n[server]\nstate_dir = /y\n");
    assert_string_equal(c->gemini.model, "gemini-3.5-flash");
    assert_string_equal(c->gemini.base_url, "https://generativelanguage.googleapis.com");
    assert_string_equal(c->fallback.key_file, "");
    assert_string_equal(c->store.path, "/y/store.db");
    config_free(c);
}

/* ---- what values say together ---- */

static void test_mssql(void **state)
{
#define NEEDS "driver = mssql needs server, database, user and password_file, or connection_file"
#define KEYS "[store]\ndriver = mssql\nserver = db:1433\ndatabase = d\nuser = u\n"
    struct config *c = load_good(KEYS "password_file = /etc/passwd\n");
    (void)state;

    assert_int_equal(c->store.driver, DRIVER_MSSQL);
    assert_int_equal(c->store.login, LOGIN_SERVICE);
    config_free(c);
    c = load_good("[store]\ndriver = mssql\nconnection_file = /etc/passwd\n");
    config_free(c);
    c = load_good(KEYS "password_file = /etc/passwd\nadmin_user = a\n"
                       "admin_password_file = /etc/passwd\n");
    config_free(c);
    /* the embedded store asks for none of it */
    c = load_good("[store]\nserver = db:1433\n");
    config_free(c);

    expect_refusal("[store]\ndriver = mssql\n", "[store] server (default): " NEEDS);
    expect_refusal("[store]\ndriver = mssql\nserver = db\nuser = u\n",
                   "[store] database (default): " NEEDS);
    expect_refusal("[store]\ndriver = mssql\nserver = db\ndatabase = d\nuser =\n",
                   ":5: [store] user: " NEEDS);
    expect_refusal(KEYS, "[store] password_file (default): " NEEDS);
    expect_refusal("[store]\ndriver = mssql\nconnection_file = /etc/passwd\nuser = u\n",
                   ":4: [store] user: connection_file says that already: leave one of them out");
    expect_refusal(KEYS "password_file = /etc/passwd\nadmin_user = a\n",
                   ":7: [store] admin_user: admin_user and admin_password_file belong together");
    expect_refusal(KEYS "password_file = /etc/passwd\nadmin_password_file = /etc/passwd\n",
                   ":7: [store] admin_password_file: admin_user and admin_password_file belong "
                   "together");
    expect_refusal(KEYS "password_file = /etc/passwd\nreader_user = a\n",
                   ":7: [store] reader_user: reader_user and reader_password_file belong together");
    expect_refusal(KEYS "password_file = /etc/passwd\nreader_password_file = /etc/passwd\n",
                   ":7: [store] reader_password_file: reader_user and reader_password_file belong "
                   "together");
}

static void test_delays(void **state)
{
    struct config *c = load_good("[retry]\ninitial_delay = 2\nmax_delay = 2s\n");
    (void)state;

    config_free(c);
    expect_refusal("[retry]\nmax_delay = 1500ms\ninitial_delay = 2\n",
                   ":3: [retry] initial_delay: initial_delay must not be longer than max_delay");
    expect_refusal("[retry]\nmax_delay = 500ms\n",
                   ":2: [retry] max_delay: initial_delay must not be longer than max_delay");
    setenv("EXTRACT_RETRY_INITIAL_DELAY", "40s", 1);
    expect_refusal("", "EXTRACT_RETRY_INITIAL_DELAY: initial_delay must not be longer than "
                       "max_delay");
}

static void test_files(void **state)
{
    static const struct {
        const char *section;
        const char *key;
    } keys[] = {
        {"gemini", "prompt_file"},  {"gemini", "schema_file"},        {"gemini", "ca_file"},
        {"store", "password_file"}, {"store", "admin_password_file"}, {"store", "connection_file"},
        {"store", "ca_file"},       {"fallback", "key_file"},
    };
    char text[256];
    char expected[256];
    (void)state;

    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        snprintf(text, sizeof text, "[%s]\n%s = /nonexistent/f\n", keys[i].section, keys[i].key);
        snprintf(expected, sizeof expected,
                 ":2: [%s] %s: /nonexistent/f: No such file or directory", keys[i].section,
                 keys[i].key);
        expect_refusal(text, expected);
        snprintf(text, sizeof text, "[%s]\n%s = /tmp\n", keys[i].section, keys[i].key);
        snprintf(expected, sizeof expected, ":2: [%s] %s: /tmp: not a regular file",
                 keys[i].section, keys[i].key);
        expect_refusal(text, expected);
        snprintf(text, sizeof text, "[%s]\n%s = %s\n", keys[i].section, keys[i].key, path);
        config_free(load_good(text));
    }
    config_free(load_good("[store]\nca_file = system\n"));
    setenv("EXTRACT_GEMINI_PROMPT_FILE", "/dev/null", 1);
    expect_refusal("", "EXTRACT_GEMINI_PROMPT_FILE: /dev/null: not a regular file");
}

/* ---- URLs ---- */

static void test_base_url(void **state)
{
    static const char *const good[] = {
        "https://generativelanguage.googleapis.com",
        "https://gateway.example:8443/gemini/v2",
        "https://10.0.0.1",
        "https://[2001:db8::1]:443",
        "http://127.0.0.1",
        "http://127.0.0.1:19090",
        "http://127.255.1.2:1/a-b_c.d~e",
        "http://localhost:8080",
        "http://LocalHost",
        "http://[::1]",
        "http://[0:0:0:0:0:0:0:1]:65535",
    };
    static const char *const bad[] = {
        /* plain http elsewhere than loopback */
        "http://generativelanguage.googleapis.com",
        "http://10.0.0.1",
        "http://126.0.0.1",
        "http://128.0.0.1",
        "http://0.0.0.0",
        "http://[::]",
        "http://[::2]",
        "http://[::ffff:127.0.0.1]",
        /* what looks like loopback to one reader and not to another */
        "http://127.0.0.1@evil.example",
        "http://127.0.0.1:80@evil.example/",
        "http://localhost@evil.example",
        "http://evil.example@127.0.0.1",
        "http://localhost.evil.example",
        "http://127.0.0.1.evil.example",
        "http://localhost.",
        "http://127.1",
        "http://127.0.0.1.",
        "http://127.0.0.01",
        "http://0x7f000001",
        "http://2130706433",
        "http://0177.0.0.1",
        "http://127.0.0.1\\@evil.example",
        "http://127.0.0.1\\.evil.example",
        "http://evil.example\\@127.0.0.1",
        "http://evil.example#@127.0.0.1",
        "http://evil.example?@127.0.0.1",
        "http://127.0.0.1#.evil.example",
        "http://127.0.0.1?.evil.example",
        "http://127.0.0.1%2eevil.example",
        "http://127.0.0.1%00.evil.example",
        "http://[::1]evil.example",
        "http://[::1].evil.example",
        "http://[::1%25lo]",
        "http://::1",
        "http://[::1",
        "http://[::1]180",
        "http://[127.0.0.1]",
        "http://\xE2\x93\x9Bocalhost",
        "http://127.0.0.1 .evil.example",
        /* not plain */
        "https://user@host.example",
        "https://user:password@host.example",
        "https://host.example/?key=1",
        "https://host.example?key=1",
        "https://host.example/#x",
        "https://host.example/a b",
        "https://host.example/%2e%2e",
        "https://host%2eexample",
        "https://host\\example",
        "https://ho st.example",
        "https://host.example:0",
        "https://host.example:65536",
        "https://host.example:",
        "https://host.example:80:80",
        "https://host.example:+80",
        "https://host.example:000080",
        "https://",
        "https:///x",
        "https://:443",
        "https:/host.example",
        "//host.example",
        "host.example",
        "ftp://127.0.0.1",
        "file:///etc/passwd",
        "gopher://127.0.0.1",
        "https-and-so-on://host.example",
    };
    (void)state;

    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        struct config *c = load_value("gemini", "base_url", good[i]);
        assert_string_equal(c->gemini.base_url, good[i]);
        config_free(c);
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        refuse_value("gemini", "base_url", bad[i]);
}

static void test_base_url_slashes(void **state)
{
    struct config *c = load_value("gemini", "base_url", "http://localhost:1/");
    (void)state;

    assert_string_equal(c->gemini.base_url, "http://localhost:1");
    config_free(c);
    c = load_value("gemini", "base_url", "https://host.example/a///");
    assert_string_equal(c->gemini.base_url, "https://host.example/a");
    config_free(c);
}

static void test_proxy(void **state)
{
    static const struct {
        const char *value;
        const char *printed;
    } good[] = {
        {"http://proxy.example:3128", "proxy = http://proxy.example:3128\n"},
        {"http://user:s3cret@proxy.example:3128/", "proxy = http://user:***@proxy.example:3128/\n"},
        {"socks5h://u:s3%40cret@[::1]:1080", "proxy = socks5h://u:***@[::1]:1080\n"},
        {"https://u:a:s3cret@proxy.example", "proxy = https://u:***@proxy.example\n"},
        {"http://user@proxy.example", "proxy = http://user@proxy.example\n"},
    };
    static const char *const bad[] = {
        "proxy.example:3128",          "ftp://s3cret@p.example",     "http://u:s3cret@",
        "http://u:s3cret@p.example/x", "http://u:s3 cret@p.example", "http://u:s3cret@@p.example",
    };
    (void)state;

    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        struct config *c = load_value("gemini", "proxy", good[i].value);
        char *text = print(c);
        assert_string_equal(c->gemini.proxy, good[i].value);
        assert_non_null(strstr(text, good[i].printed));
        assert_null(strstr(text, "s3"));
        free(text);
        config_free(c);
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct err err;
        char text[100];
        refuse_value("gemini", "proxy", bad[i]);
        snprintf(text, sizeof text, "[gemini]\nproxy = %s\n", bad[i]);
        assert_null(load(text, &err));
        assert_null(strstr(err.message, "s3"));
    }
}

/* ---- printing ---- */

static void test_print_names_sources(void **state)
{
    char expected[256];
    char *text;
    struct config *c;
    (void)state;

    setenv("EXTRACT_SERVER_QUEUE", "5", 1);
    c = load_good("[server]\n\nthreads = 3\n");
    text = print(c);
    snprintf(expected, sizeof expected, "# from %s:3\nthreads = 3\n", path);
    assert_non_null(strstr(text, expected));
    assert_non_null(strstr(text, "# from EXTRACT_SERVER_QUEUE\nqueue = 5\n"));
    assert_non_null(strstr(text, "# from default\nqueue_wait = 10s\n"));
    assert_non_null(strstr(text, "# from default\npath = /var/lib/extract-fcgi/store.db\n"));
    free(text);
    config_free(c);
}

/* Two configurations say the same. */
static void assert_same(const struct config *a, const struct config *b)
{
    static const size_t texts[] = {
        offsetof(struct config, server.state_dir),
        offsetof(struct config, server.runtime_dir),
        offsetof(struct config, server.body_file_dir),
        offsetof(struct config, gemini.base_url),
        offsetof(struct config, gemini.model),
        offsetof(struct config, gemini.proxy),
        offsetof(struct config, gemini.prompt_file),
        offsetof(struct config, gemini.schema_file),
        offsetof(struct config, gemini.ca_file),
        offsetof(struct config, store.path),
        offsetof(struct config, store.server),
        offsetof(struct config, store.database),
        offsetof(struct config, store.user),
        offsetof(struct config, store.password_file),
        offsetof(struct config, store.admin_user),
        offsetof(struct config, store.admin_password_file),
        offsetof(struct config, store.reader_user),
        offsetof(struct config, store.reader_password_file),
        offsetof(struct config, store.ca_file),
        offsetof(struct config, store.connection_file),
        offsetof(struct config, fallback.key_file),
        offsetof(struct config, seal.key_file),
    };
    unsigned char a_rest[sizeof *a];
    unsigned char b_rest[sizeof *b];

    memcpy(a_rest, a, sizeof a_rest);
    memcpy(b_rest, b, sizeof b_rest);
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        char *a_text;
        char *b_text;
        memcpy(&a_text, a_rest + texts[i], sizeof a_text);
        memcpy(&b_text, b_rest + texts[i], sizeof b_text);
        assert_string_equal(a_text, b_text);
        memset(a_rest + texts[i], 0, sizeof a_text);
        memset(b_rest + texts[i], 0, sizeof b_text);
    }
    assert_memory_equal(a_rest, b_rest, sizeof a_rest);
}

static void test_print_is_read_back(void **state)
{
    static const char *const texts[] = {
        "",
        "[server]\nthreads = 3\nqueue = 65536\nqueue_wait = 1.5s\ncompany_share = 0.333333333\n"
        "max_upload = 1025\ndeadline = 59m\nstate_dir = /a b/c;d\nruntime_dir = relative/#x\n"
        "body_file_dir = \xC3\xA4\n",
        "[server]\nqueue_wait = 10ms\nmax_upload = 2047K\ndeadline = 1h\n"
        "[auth]\noffline_grace = 0\n[gemini]\nbase_url = http://[::1]:1/x/\nmodel = m\n"
        "timeout = 0.1\nproxy = http://user@h:1\nmax_output_tokens = 10000000\nreserve_tokens = "
        "0\n",
        "[retry]\nmax_retries = 0\ninitial_delay = 0.001\nmax_delay = 1h\n"
        "backoff_multiplier = 1.0000001\njitter = off\nauto_disable = 0\n"
        "[store]\nauto_create = false\npool_size = 3\nquery_timeout = 61s\npath = x.db\nserver = "
        "s:1\n"
        "database = d = e\nuser = u\nadmin_user = a\nreader_user = r\nencrypt = REQUEST\n"
        "[fallback]\nwhen = no_active_token\n[log]\nlevel = debug\nsink = stderr\n",
    };
    (void)state;

    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        struct config *first = load_good(texts[i]);
        char *text = print(first);
        struct config *second = load_good(text);

        assert_same(first, second);
        free(text);
        config_free(first);
        config_free(second);
    }
}

/* ---- the example ---- */

static char *read_example(void)
{
    char *text = calloc(1, 100000);
    FILE *file = fopen(EXAMPLE, "r");

    assert_non_null(text);
    if (file == NULL)
        fail_msg("run from the top of the source tree: no " EXAMPLE);
    assert_in_range(fread(text, 1, 99999, file), 1, 99998);
    fclose(file);
    return text;
}

/* As it stands it changes nothing. */
static void test_example_as_it_stands(void **state)
{
    char *text = read_example();
    struct config *example = load_good(text);
    char *printed = print(example);
    struct config *defaults = load_good("");
    char *expected = print(defaults);
    (void)state;

    assert_string_equal(printed, expected);
    free(text);
    free(printed);
    free(expected);
    config_free(example);
    config_free(defaults);
}

/* With each "#key = value" in force it still says what the defaults say, and names every key. */
static void test_example_names_every_key(void **state)
{
    char *text = read_example();
    struct config *defaults = load_good("");
    struct config *example;
    char *expected = print(defaults);
    char *printed;
    (void)state;

    for (char *hash = strchr(text, '#'); hash != NULL; hash = strchr(hash + 1, '#'))
        if ((hash == text || hash[-1] == '\n') && hash[1] >= 'a' && hash[1] <= 'z')
            *hash = ' ';
    example = load_good(text);
    printed = print(example);
    assert_null(strstr(printed, "# from default"));
    strip_sources(printed);
    strip_sources(expected);
    assert_string_equal(printed, expected);
    free(text);
    free(printed);
    free(expected);
    config_free(example);
    config_free(defaults);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_defaults, set_up),
        cmocka_unit_test_setup(test_durations, set_up),
        cmocka_unit_test_setup(test_sizes, set_up),
        cmocka_unit_test_setup(test_whole_numbers, set_up),
        cmocka_unit_test_setup(test_reals, set_up),
        cmocka_unit_test_setup(test_yes_no, set_up),
        cmocka_unit_test_setup(test_words, set_up),
        cmocka_unit_test_setup(test_text, set_up),
        cmocka_unit_test_setup(test_model, set_up),
        cmocka_unit_test_setup(test_syntax, set_up),
        cmocka_unit_test_setup(test_nul_byte, set_up),
        cmocka_unit_test_setup(test_unknown_keys, set_up),
        cmocka_unit_test_setup(test_given_twice, set_up),
        cmocka_unit_test_setup(test_messages, set_up),
        cmocka_unit_test_setup(test_which_file, set_up),
        cmocka_unit_test_setup(test_environment, set_up),
        cmocka_unit_test_setup(test_environment_does_not_hide_the_file, set_up),
        cmocka_unit_test_setup(test_environment_errors, set_up),
        cmocka_unit_test_setup(test_empty_text_is_unset, set_up),
        cmocka_unit_test_setup(test_mssql, set_up),
        cmocka_unit_test_setup(test_delays, set_up),
        cmocka_unit_test_setup(test_files, set_up),
        cmocka_unit_test_setup(test_base_url, set_up),
        cmocka_unit_test_setup(test_base_url_slashes, set_up),
        cmocka_unit_test_setup(test_proxy, set_up),
        cmocka_unit_test_setup(test_print_names_sources, set_up),
        cmocka_unit_test_setup(test_print_is_read_back, set_up),
        cmocka_unit_test_setup(test_example_as_it_stands, set_up),
        cmocka_unit_test_setup(test_example_names_every_key, set_up),
    };
    return cmocka_run_group_tests(tests, set_up_all, tear_down_all);
}
