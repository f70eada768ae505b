/* config.c - the configuration. See config.h.
 *
 * To add a key: a member in config.h, a row in the table below, a line in extract-fcgi.conf.example.
 * Defaults, the file and the environment all go through set_key, so that a value is judged alike
 * wherever it comes from; what several values say together is judged once, by check_together.
 *
 * The file is INI as libinih reads it: `key = value` or `key: value`; a comment is a line that
 * begins with # or ;, or what follows white space and a ; in a line. There are no quotes, no
 * escapes and no continued lines, so that no value can hold a ; after white space. An empty value
 * leaves a text at its default, in the file and in the environment. */
#include "config.h"

#include <ctype.h>
#include <errno.h>
#include <ini.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "buf.h"
#include "config_value.h"

#define ENV_PREFIX "EXTRACT_"
#define LINE_BYTES 8192
#define NAME_BYTES 64 /* no key's name is longer */

struct key {
    const char *section;
    const char *name;
    size_t offset; /* in struct config */
    struct value_type type;
    const char *initial;
    const char *description;
};

static const char *const auth_words[] = {"none", "bearer", NULL};
static const char *const driver_words[] = {"sqlite", "mssql", NULL};
static const char *const encrypt_words[] = {"require", "request", "off", NULL};
static const char *const fallback_words[] = {"store_unavailable", "no_active_token", NULL};
static const char *const level_words[] = {"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", NULL};
static const char *const sink_words[] = {"store", "stderr", NULL};

/* clang-format off */
/* Does not compile where the member is not of that type. */
#define PLACE(type, member) \
    _Generic(&((struct config *)NULL)->member, type *: offsetof(struct config, member))
#define KEY(section, key, type, ...) \
    #section, #key, PLACE(type, section.key), {__VA_ARGS__}
#define INTEGER(section, key, min, max) KEY(section, key, int, VALUE_INTEGER, min, max, NULL, NULL)
#define SIZE(section, key, min, max) KEY(section, key, int64_t, VALUE_SIZE, min, max, NULL, NULL)
#define REAL(section, key, min, max) KEY(section, key, double, VALUE_REAL, min, max, NULL, NULL)
#define YES_NO(section, key) KEY(section, key, bool, VALUE_YES_NO, 0, 0, NULL, NULL)
#define WORD(section, key, words) KEY(section, key, int, VALUE_WORD, 0, 0, words, NULL)
#define TEXT(section, key, fault) KEY(section, key, char *, VALUE_TEXT, 0, 0, NULL, fault)
#define URL(section, key, fault) KEY(section, key, char *, VALUE_URL, 0, 0, NULL, fault)
#define FILE_NAME(section, key) KEY(section, key, char *, VALUE_FILE, 0, 0, NULL, NULL)
#define DURATION(section, key, min, max) /* the member's name ends in _ms */ \
    #section, #key, PLACE(int64_t, section.key##_ms), {VALUE_DURATION, min, max, NULL, NULL}

static const struct key table[] = {
    {INTEGER(server, threads, 1, 1024), "16",
     "requests that one process serves at the same time"},
    {INTEGER(server, queue, 1, 65536), "64",
     "requests that may wait for a thread in one process; one more is answered 503 at once"},
    {DURATION(server, queue_wait, 10, 10 * VALUE_MINUTE), "10s",
     "how long a request may wait for a thread before it is answered 503"},
    {REAL(server, company_share, 0.01, 1), "1.0",
     "share of a process's threads that one company may hold"},
    {SIZE(server, max_upload, 1024, 1024.0 * 1024 * 1024), "50M",
     "largest upload; nginx's client_max_body_size should say the same"},
    {DURATION(server, deadline, VALUE_SECOND, VALUE_HOUR), "120s",
     "time for one request, all waits and attempts together; nginx's timeouts must be longer"},
    {TEXT(server, state_dir, NULL), "/var/lib/extract-fcgi",
     "directory of what must survive a restart: the embedded store, the outbox"},
    {TEXT(server, runtime_dir, NULL), "/run/extract-fcgi",
     "directory of what the processes of the pool share while they run"},
    {TEXT(server, body_file_dir, NULL), "",
     "where nginx keeps uploads that it names in REQUEST_BODY_FILE; empty: such requests are refused"},

    {WORD(auth, mode, auth_words), "bearer",
     "who may post: bearer (who has a client key) or none (whoever reaches the socket)"},
    {DURATION(auth, offline_grace, 0, 720 * VALUE_HOUR), "1h",
     "how long a client key once verified is trusted while the store cannot be reached"},
    {INTEGER(auth, key_rate, 0, 1e6), "6000",
     "requests a minute of one client key, over all processes of the host; 0: no limit"},

    {TEXT(gemini, base_url, value_fault_base_url), "https://generativelanguage.googleapis.com",
     "what stands before /v1beta/models/; plain http on loopback only"},
    {TEXT(gemini, model, value_fault_model), "gemini-3.5-flash",
     "name of the model"},
    {DURATION(gemini, connect_timeout, 100, 5 * VALUE_MINUTE), "10s",
     "time to connect, TLS included"},
    {DURATION(gemini, timeout, 100, VALUE_HOUR), "55s",
     "time for one attempt"},
    {URL(gemini, proxy, value_fault_proxy), "",
     "proxy, as http://user:password@host:port; also https, socks5 and socks5h; empty: none"},
    {FILE_NAME(gemini, prompt_file), "",
     "prompt that replaces the one compiled in"},
    {FILE_NAME(gemini, schema_file), "",
     "JSON Schema of an invoice that replaces the one compiled in"},
    {FILE_NAME(gemini, ca_file), "",
     "certificates to trust instead of the system's (PEM)"},
    {INTEGER(gemini, max_output_tokens, 0, 1e7), "0",
     "most tokens of an answer, thoughts included; 0: as the model likes"},
    {INTEGER(gemini, reserve_tokens, 0, 1e9), "8000",
     "tokens reserved for a request at least, until it is known what it used"},

    {INTEGER(retry, max_retries, 0, 100), "3",
     "attempts after the first one"},
    {DURATION(retry, initial_delay, 0, VALUE_HOUR), "1.0",
     "wait before the first retry"},
    {DURATION(retry, max_delay, 0, VALUE_HOUR), "30.0",
     "longest wait before a retry; a longer one that Gemini asks for is kept"},
    {REAL(retry, backoff_multiplier, 1, 100), "2.0",
     "how much longer each wait is than the one before"},
    {YES_NO(retry, jitter), "true",
     "make each wait up to 50 % shorter or longer, so that retries do not come together"},
    {YES_NO(retry, auto_disable), "yes",
     "disable a token whose key Gemini calls bad; no: it only cools down"},

    {WORD(store, driver, driver_words), "sqlite",
     "sqlite (embedded, one host) or mssql (SQL Server)"},
    {YES_NO(store, auto_create), "yes",
     "create or upgrade the schema at start; no: extractctl migrate does"},
    {INTEGER(store, pool_size, 0, 256), "0",
     "connections of one process to the store; 0: as the driver likes"},
    {DURATION(store, query_timeout, 100, 10 * VALUE_MINUTE), "5s",
     "time for one round trip to the store"},
    {TEXT(store, path, NULL), "",
     "sqlite: the database file; empty: store.db in state_dir"},
    {TEXT(store, server, NULL), "",
     "mssql: host:port, or host\\instance"},
    {TEXT(store, database, NULL), "",
     "mssql: name of the database"},
    {TEXT(store, user, NULL), "",
     "mssql: login of the service"},
    {FILE_NAME(store, password_file), "",
     "mssql: file with that login's password"},
    {TEXT(store, admin_user, NULL), "",
     "mssql: login that extractctl uses instead"},
    {FILE_NAME(store, admin_password_file), "",
     "mssql: file with that login's password"},
    {TEXT(store, reader_user, NULL), "",
     "mssql: login that GET /admin/… reads with instead"},
    {FILE_NAME(store, reader_password_file), "",
     "mssql: file with that login's password"},
    {WORD(store, encrypt, encrypt_words), "require",
     "mssql: TLS: require, request (use it where offered) or off"},
    {FILE_NAME(store, ca_file), "system",
     "mssql: certificates to trust (PEM), or system"},
    {FILE_NAME(store, connection_file), "",
     "mssql: file with an ODBC connection string, instead of the keys above"},

    {FILE_NAME(fallback, key_file), "",
     "file with the API key that serves where no token can (appSetting.txt); empty: no fallback"},
    {WORD(fallback, when, fallback_words), "store_unavailable",
     "store_unavailable, or no_active_token: also where a known company has no Active token"},

    {WORD(log, level, level_words), "INFO",
     "entries of this level and above: DEBUG, INFO, WARNING, ERROR, CRITICAL"},
    {WORD(log, sink, sink_words), "store",
     "where entries go: store (the table ApplicationLogs) or stderr"},

    {FILE_NAME(seal, key_file), "",
     "keys that API keys in the store are sealed with, a line each, the first seals; empty: not sealed"},
};
/* clang-format on */

#define KEY_COUNT (sizeof table / sizeof table[0])

/* Where a value came from: "default", a variable's name or, with a line, the file's. */
struct source {
    const char *name;
    int line;
};

static const char by_default[] = "default";

/* What config_load returns is the first member of this. */
struct loaded {
    struct config config;
    struct source sources[KEY_COUNT];
    struct arena arena; /* of all texts */
};

/* ---- keys ---- */

static const struct key *find_key(const char *section, const char *name)
{
    for (size_t i = 0; i < KEY_COUNT; i++)
        if (strcmp(table[i].section, section) == 0 && strcmp(table[i].name, name) == 0)
            return &table[i];
    return NULL;
}

static const char *variable_of(struct arena *arena, const struct key *key)
{
    char *name = arena_printf(arena, ENV_PREFIX "%s_%s", key->section, key->name);

    for (char *c = name; *c != '\0'; c++)
        *c = (char)toupper((unsigned char)*c);
    return name;
}

/* Puts the key and the place of its value before the error's message. */
static enum err_code at_key(const struct loaded *loaded, const struct key *key, struct err *err)
{
    const struct source *source = &loaded->sources[key - table];

    if (source->line > 0)
        return err_prefix(err, "%s:%d: [%s] %s", source->name, source->line, key->section,
                          key->name);
    if (source->name == by_default)
        return err_prefix(err, "[%s] %s (default)", key->section, key->name);
    return err_prefix(err, "%s", source->name);
}

/* Gives the key its value from source. Errors carry their place already. */
static enum err_code set_key(struct loaded *loaded, const struct key *key, const char *text,
                             struct source source, struct err *err)
{
    void *place = (char *)&loaded->config + key->offset;

    loaded->sources[key - table] = source;
    if (*text == '\0' && value_is_text(&key->type))
        text = key->initial;
    if (value_set(&key->type, place, text, &loaded->arena, err) != ERR_NONE)
        return at_key(loaded, key, err);
    return ERR_NONE;
}

/* ---- unknown names ---- */

/* Levenshtein's distance. b has at most NAME_BYTES. */
static size_t distance(const char *a, const char *b)
{
    size_t b_len = strlen(b);
    size_t row[NAME_BYTES + 1];

    for (size_t j = 0; j <= b_len; j++)
        row[j] = j;
    for (; *a != '\0'; a++) {
        size_t diagonal = row[0]++;
        for (size_t j = 1; j <= b_len; j++) {
            size_t best = diagonal + (*a != b[j - 1]);
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

    for (size_t i = 0; i < KEY_COUNT && strlen(name) <= NAME_BYTES; i++) {
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

    if (*section == '\0')
        err_set(err, ERR_CONFIG, "a key before the first [section]");
    else if (guess == NULL)
        err_set(err, ERR_CONFIG, "unknown key");
    else if (strcmp(guess->section, section) == 0)
        err_set(err, ERR_CONFIG, "unknown key (did you mean %s?)", guess->name);
    else
        err_set(err, ERR_CONFIG, "unknown key (did you mean [%s] %s?)", guess->section,
                guess->name);
    if (*section == '\0')
        return err_prefix(err, "%s", value_show(name).text);
    return err_prefix(err, "[%s] %s", value_show(section).text, value_show(name).text);
}

/* ---- the file ---- */

struct reader {
    struct loaded *loaded;
    const char *path;
    FILE *file;
    int line; /* the one read last */
    int last; /* the character read last, or EOF */
    struct err *err;
    enum err_code code;
};

/* libinih's reader: one line at a time, counted. NULL: the end, a NUL byte or a line too long. */
static char *read_line(char *out, int size, void *stream)
{
    struct reader *reader = stream;
    int len = 0;

    while (reader->last != '\0') {
        reader->last = getc(reader->file);
        if (reader->last == EOF || reader->last == '\0')
            break;
        if (len + 1 == size) {
            reader->code = err_set(reader->err, ERR_CONFIG, "%s:%d: the line is too long",
                                   reader->path, reader->line + 1);
            return NULL;
        }
        out[len++] = (char)reader->last;
        if (reader->last == '\n')
            break;
    }
    out[len] = '\0';
    reader->line += len > 0;
    return len > 0 ? out : NULL;
}

/* libinih's handler: 0 stops. */
static int take_pair(void *user, const char *section, const char *name, const char *value)
{
    struct reader *reader = user;
    const struct key *key = find_key(section, name);
    const struct source source = {reader->path, reader->line};
    int before = key != NULL ? reader->loaded->sources[key - table].line : 0;

    if (key == NULL) {
        unknown_key(section, name, reader->err);
        reader->code = err_prefix(reader->err, "%s:%d", reader->path, reader->line);
    } else if (before > 0) {
        reader->code =
            err_set(reader->err, ERR_CONFIG, "%s:%d: [%s] %s: given twice, first in line %d",
                    reader->path, reader->line, section, name, before);
    } else {
        reader->code = set_key(reader->loaded, key, value, source, reader->err);
    }
    return reader->code == ERR_NONE;
}

static enum err_code load_file(struct loaded *loaded, const char *path, bool may_be_absent,
                               struct err *err)
{
    struct reader reader = {.loaded = loaded, .err = err, .last = '\n'};
    enum err_code code;
    int bad_line;

    reader.path = arena_strdup(&loaded->arena, path); /* outlives the caller's, in sources */
    reader.file = fopen(path, "re");
    if (reader.file == NULL) {
        if (errno == ENOENT && may_be_absent)
            return ERR_NONE;
        return err_set(err, ERR_CONFIG, "%s: %s", path, strerror(errno));
    }
    /* Variables of the library, not options of its build, in Debian's. */
    ini_use_stack = false;
    ini_initial_alloc = LINE_BYTES;
    ini_max_line = LINE_BYTES;
    ini_allow_multiline = false;
    ini_stop_on_first_error = true;
    bad_line = ini_parse_stream(read_line, &reader, take_pair, &reader);
    code = reader.code;
    if (code == ERR_NONE && ferror(reader.file))
        code = err_set(err, ERR_CONFIG, "%s: %s", path, strerror(errno));
    if (code == ERR_NONE && bad_line > 0)
        code = err_set(err, ERR_CONFIG, "%s:%d: neither [section] nor key = value", path, bad_line);
    if (code == ERR_NONE && bad_line < 0)
        code = err_set(err, ERR_CONFIG, "%s: out of memory", path);
    if (code == ERR_NONE && reader.last == '\0')
        code = err_set(err, ERR_CONFIG, "%s:%d: a NUL byte", path, reader.line);
    fclose(reader.file);
    return code;
}

/* ---- the environment ---- */

static enum err_code take_variable(struct loaded *loaded, const char *name, const char *value,
                                   struct err *err)
{
    struct arena *arena = &loaded->arena;
    const struct source source = {name, 0};
    const struct key *key;
    char *section = arena_strdup(arena, name + strlen(ENV_PREFIX)); /* "server" */
    char *rest = section + strcspn(section, "_");                   /* "threads" */
    size_t len;

    for (char *c = section; *c != '\0'; c++)
        *c = (char)tolower((unsigned char)*c);
    if (*rest != '\0')
        *rest++ = '\0';
    key = find_key(section, rest);
    if (key == NULL || strcmp(variable_of(arena, key), name) != 0) {
        key = guess_key(section, rest);
        if (key == NULL)
            err_set(err, ERR_CONFIG, "unknown variable");
        else
            err_set(err, ERR_CONFIG, "unknown variable (did you mean %s?)",
                    variable_of(arena, key));
        return err_prefix(err, "%s", value_show(name).text);
    }
    /* without the white space round it, as the file's values are */
    while (isspace((unsigned char)*value))
        value++;
    len = strlen(value);
    while (len > 0 && isspace((unsigned char)value[len - 1]))
        len--;
    return set_key(loaded, key, arena_strndup(arena, value, len), source, err);
}

static enum err_code load_environment(struct loaded *loaded, struct err *err)
{
    enum err_code code = ERR_NONE;

    for (char **entry = environ; *entry != NULL && code == ERR_NONE; entry++) {
        size_t len = strcspn(*entry, "=");
        const char *name;

        if (strncmp(*entry, ENV_PREFIX, strlen(ENV_PREFIX)) != 0 || (*entry)[len] != '=')
            continue;
        name = arena_strndup(&loaded->arena, *entry, len);
        if (strcmp(name, "EXTRACT_CONFIG") != 0)
            code = take_variable(loaded, name, *entry + len + 1, err);
    }
    return code;
}

/* ---- all values together ---- */

/* What follows from values that are set. */
static void resolve(struct loaded *loaded)
{
    struct config *config = &loaded->config;
    size_t len = strlen(config->gemini.base_url);

    while (len > 0 && config->gemini.base_url[len - 1] == '/')
        config->gemini.base_url[--len] = '\0';
    if (config->store.path[0] == '\0')
        config->store.path = arena_printf(&loaded->arena, "%s/store.db", config->server.state_dir);
}

/* The key of [store] that SQL Server cannot be reached without, or that says a second time what a
 * connection file says; NULL: there is none. */
static const char *misfit_of_mssql(const struct config *config)
{
    const struct {
        const char *name;
        const char *value;
    } keys[] = {
        {"server", config->store.server},
        {"database", config->store.database},
        {"user", config->store.user},
        {"password_file", config->store.password_file},
    };
    bool is_wanted = config->store.connection_file[0] == '\0';

    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++)
        if ((keys[i].value[0] != '\0') != is_wanted)
            return keys[i].name;
    return NULL;
}

static enum err_code check_together(const struct loaded *loaded, struct err *err)
{
    const struct config *config = &loaded->config;
    bool mssql = config->store.driver == DRIVER_MSSQL;
    const char *misfit = mssql ? misfit_of_mssql(config) : NULL;
    bool has_admin = config->store.admin_user[0] != '\0';
    bool has_reader = config->store.reader_user[0] != '\0';
    const struct key *delay = find_key("retry", "initial_delay");
    bool delay_is_set = loaded->sources[delay - table].name != by_default;
    const struct {
        bool wrong;
        const char *section;
        const char *name; /* of two keys that do not fit together, one that somebody set */
        const char *why;
    } rules[] = {
        {misfit != NULL, "store", misfit,
         config->store.connection_file[0] == '\0'
             ? "driver = mssql needs server, database, user and password_file, or connection_file"
             : "connection_file says that already: leave one of them out"},
        {mssql && has_admin != (config->store.admin_password_file[0] != '\0'), "store",
         has_admin ? "admin_user" : "admin_password_file",
         "admin_user and admin_password_file belong together"},
        {mssql && has_reader != (config->store.reader_password_file[0] != '\0'), "store",
         has_reader ? "reader_user" : "reader_password_file",
         "reader_user and reader_password_file belong together"},
        {config->retry.initial_delay_ms > config->retry.max_delay_ms, "retry",
         delay_is_set ? "initial_delay" : "max_delay",
         "initial_delay must not be longer than max_delay"},
    };

    for (size_t i = 0; i < sizeof rules / sizeof rules[0]; i++) {
        if (rules[i].wrong) {
            err_set(err, ERR_CONFIG, "%s", rules[i].why);
            return at_key(loaded, find_key(rules[i].section, rules[i].name), err);
        }
    }
    return ERR_NONE;
}

/* Each file that is named must be there; a default ("", "system") names none. */
static enum err_code check_files(const struct loaded *loaded, struct err *err)
{
    for (const struct key *key = table; key < table + KEY_COUNT; key++) {
        const char *path;
        const char *fault;

        if (key->type.kind != VALUE_FILE)
            continue;
        memcpy(&path, (const char *)&loaded->config + key->offset, sizeof path);
        fault = strcmp(path, key->initial) != 0 ? value_fault_file(path) : NULL;
        if (fault != NULL) {
            err_set(err, ERR_CONFIG, "%s: %s", path, fault);
            return at_key(loaded, key, err);
        }
    }
    return ERR_NONE;
}

/* ---- the interface ---- */

static enum err_code load(struct loaded *loaded, const char *path, struct err *err)
{
    const struct source source = {by_default, 0};
    bool named = true;
    enum err_code code = ERR_NONE;

    if (path == NULL)
        path = getenv("EXTRACT_CONFIG");
    if (path == NULL || *path == '\0') {
        path = CONFIG_DEFAULT_FILE;
        named = false;
    }
    for (size_t i = 0; i < KEY_COUNT && code == ERR_NONE; i++)
        code = set_key(loaded, &table[i], table[i].initial, source, err);
    if (code == ERR_NONE)
        code = load_file(loaded, path, !named, err);
    if (code == ERR_NONE)
        code = load_environment(loaded, err);
    if (code != ERR_NONE)
        return code;
    resolve(loaded);
    code = check_together(loaded, err);
    return code == ERR_NONE ? check_files(loaded, err) : code;
}

struct config *config_load(const char *path, struct err *err)
{
    struct loaded *loaded = calloc(1, sizeof *loaded);

    if (loaded == NULL) {
        err_set(err, ERR_CONFIG, "out of memory");
        return NULL;
    }
    arena_init(&loaded->arena);
    if (load(loaded, path, err) != ERR_NONE) {
        config_free(&loaded->config);
        return NULL;
    }
    return &loaded->config;
}

void config_free(struct config *config)
{
    struct loaded *loaded = (struct loaded *)config;

    if (loaded != NULL)
        arena_reset(&loaded->arena);
    free(loaded);
}

void config_print(const struct config *config, FILE *out)
{
    const struct loaded *loaded = (const struct loaded *)config;
    const char *section = "";

    for (size_t i = 0; i < KEY_COUNT; i++) {
        const struct key *key = &table[i];
        const struct source *source = &loaded->sources[i];
        char text[VALUE_RANGE_SIZE];
        const char *range = value_range(&key->type, text);

        if (strcmp(key->section, section) != 0)
            fprintf(out, "%s[%s]\n", i == 0 ? "" : "\n", key->section);
        section = key->section;
        fprintf(out, *range == '\0' ? "# %s%s\n" : "# %s; %s\n", key->description, range);
        fprintf(out, "# from %s", source->name);
        if (source->line > 0)
            fprintf(out, ":%d", source->line);
        fprintf(out, "\n%s = ", key->name);
        value_print(&key->type, (const char *)config + key->offset, out);
        fputc('\n', out);
    }
}
