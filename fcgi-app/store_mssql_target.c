/* store_mssql_target.c - where the store on SQL Server is, and as whom to log in. See store_mssql.h.
 *
 * Either the keys of [store] say so, or a DBConnection.txt, whose Encrypt and TrustServerCertificate
 * then stand in for store.encrypt. Passwords come from files only. They are read once when the store
 * is opened, so that a mistake is found then, and again for each login. */
#include "store_mssql.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <unistr.h>

#include "log.h"

#define APPLICATION "extract-fcgi"
#define FILE_SIZE 4096

static enum err_code read_file(const char *path, char out[FILE_SIZE], size_t *len, struct err *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
    ssize_t n = fd < 0 ? -1 : 1;
    enum err_code code = ERR_NONE;

    *len = 0;
    while (n > 0 && *len < FILE_SIZE) {
        n = read(fd, out + *len, FILE_SIZE - *len);
        if (n < 0 && errno == EINTR)
            n = 1;
        else if (n > 0)
            *len += (size_t)n;
    }
    if (n < 0)
        code = err_set(err, ERR_CONFIG, "cannot read %s: %s", path, strerror(errno));
    else if (*len == FILE_SIZE)
        code = err_set(err, ERR_CONFIG, "%s is too long", path);
    if (fd >= 0)
        close(fd);
    return code;
}

/* A file that holds a password and nothing else. */
static enum err_code read_password(const char *path, char password[CONNECTION_TEXT_SIZE],
                                   struct err *err)
{
    char text[FILE_SIZE];
    size_t len = 0;
    enum err_code code = read_file(path, text, &len, err);

    if (code != ERR_NONE)
        goto out;
    if (len > 0 && text[len - 1] == '\n')
        len--;
    if (len > 0 && text[len - 1] == '\r')
        len--;
    if (len == 0 || len >= CONNECTION_TEXT_SIZE || memchr(text, '\0', len) != NULL ||
        memchr(text, '\n', len) != NULL || u8_check((const uint8_t *)text, len) != NULL) {
        code = err_set(err, ERR_CONFIG,
                       "%s must hold a password: one line, at most 128 bytes of "
                       "UTF-8",
                       path);
        goto out;
    }
    memcpy(password, text, len);
    password[len] = '\0';
out:
    explicit_bzero(text, sizeof text);
    return code;
}

static enum err_code read_connection(const char *path, struct connection_string *out,
                                     struct err *err)
{
    char text[FILE_SIZE];
    size_t len = 0;
    enum err_code code = read_file(path, text, &len, err);

    if (code == ERR_NONE && connection_string_parse(text, len, out, err) != ERR_NONE)
        code = err_prefix(err, "%s", path);
    explicit_bzero(text, sizeof text);
    return code == ERR_NONE ? code : err_prefix(err, "store.connection_file");
}

enum err_code mssql_target_password(const struct mssql_target *target,
                                    char password[CONNECTION_TEXT_SIZE], struct err *err)
{
    struct connection_string connection = {.encrypt = -1};
    enum err_code code;

    if (!target->is_connection_file) {
        code = read_password(target->password_file, password, err);
        return code == ERR_NONE ? code : err_prefix(err, "%s", target->password_key);
    }
    code = read_connection(target->password_file, &connection, err);
    if (code == ERR_NONE)
        memcpy(password, connection.password, sizeof connection.password);
    explicit_bzero(&connection, sizeof connection);
    return code;
}

/* ---- the configuration ---- */

static enum err_code copy_name(char out[CONNECTION_TEXT_SIZE], const char *name, const char *key,
                               struct err *err)
{
    size_t len = strlen(name);

    if (len == 0 || len >= CONNECTION_TEXT_SIZE)
        return err_set(err, ERR_CONFIG, "%s must have 1 to 128 bytes", key);
    memcpy(out, name, len + 1);
    return ERR_NONE;
}

static enum err_code from_keys(struct mssql_target *target, const struct config *config,
                               struct err *err)
{
    if (connection_server_parse(config->store.server, &target->server, err) != ERR_NONE)
        return err_prefix(err, "store.server");
    if (copy_name(target->database, config->store.database, "store.database", err) != ERR_NONE ||
        copy_name(target->user, config->store.user, "store.user", err) != ERR_NONE)
        return err->code;
    target->password_file = strdup(config->store.password_file);
    target->encrypt = config->store.encrypt;
    target->server_key = "store.server";
    target->database_key = "store.database";
    target->login_key = "store.user and store.password_file";
    target->password_key = "store.password_file";
    target->encrypt_key = "store.encrypt";
    return ERR_NONE;
}

static enum err_code from_file(struct mssql_target *target, const struct config *config,
                               bool *trust, struct err *err)
{
    const char *path = config->store.connection_file;
    struct connection_string connection = {.encrypt = -1};
    enum err_code code = read_connection(path, &connection, err);

    if (code == ERR_NONE) {
        target->server = connection.server;
        memcpy(target->database, connection.database, sizeof target->database);
        memcpy(target->user, connection.user, sizeof target->user);
        memcpy(target->application, connection.application, sizeof target->application);
        memcpy(target->workstation, connection.workstation, sizeof target->workstation);
        target->login_timeout_s = connection.login_timeout_s;
        target->is_connection_file = true;
        target->password_file = strdup(path);
        target->encrypt = connection.encrypt >= 0 ? connection.encrypt : config->store.encrypt;
        *trust = connection.trust_certificate;
    }
    target->server_key = "SERVER in store.connection_file";
    target->database_key = "DATABASE in store.connection_file";
    target->login_key = "UID and PWD in store.connection_file";
    target->encrypt_key = "Encrypt in store.connection_file";
    explicit_bzero(&connection, sizeof connection);
    return code;
}

/* The login of those who are not the service itself, where there is one. */
static enum err_code use_login(struct mssql_target *target, const struct config *config,
                               struct err *err)
{
    const struct {
        const char *user, *password_file, *user_key, *password_key, *both;
    } logins[] =
        {
            [LOGIN_SERVICE] = {.user = ""},
            [LOGIN_ADMIN] = {config->store.admin_user, config->store.admin_password_file,
                             "store.admin_user", "store.admin_password_file",
                             "store.admin_user and store.admin_password_file"},
            [LOGIN_READER] = {config->store.reader_user, config->store.reader_password_file,
                              "store.reader_user", "store.reader_password_file",
                              "store.reader_user and store.reader_password_file"},
        },
      *login = &logins[config->store.login];

    if (login->user[0] == '\0')
        return ERR_NONE;
    free(target->password_file);
    target->password_file = strdup(login->password_file);
    target->is_connection_file = false;
    target->login_key = login->both;
    target->password_key = login->password_key;
    return copy_name(target->user, login->user, login->user_key, err);
}

/* Which certificates are trusted. `request` looks at the server's only where a file is named: whoever
 * could present another could as well say that there is no TLS. */
static const char *choose_ca(const struct mssql_target *target, const struct config *config,
                             bool trust)
{
    bool is_named = strcmp(config->store.ca_file, "system") != 0;

    if (trust || target->encrypt == ENCRYPT_OFF ||
        (target->encrypt == ENCRYPT_REQUEST && !is_named))
        return "";
    return config->store.ca_file;
}

/* Variables that FreeTDS reads, and prefers to what it is told. */
static enum err_code check_environment(struct err *err)
{
    static const char *const overriding[] = {"TDSHOST", "TDSPORT", "TDSVER"};
    static const char *const dumping[] = {"TDSDUMP", "TDSDUMPCONFIG"};

    for (size_t i = 0; i < sizeof overriding / sizeof overriding[0]; i++)
        if (getenv(overriding[i]) != NULL)
            return err_set(err, ERR_CONFIG,
                           "the environment variable %s would override the configuration: unset it",
                           overriding[i]);
    for (size_t i = 0; i < sizeof dumping / sizeof dumping[0]; i++)
        if (getenv(dumping[i]) != NULL)
            return err_set(err, ERR_CONFIG,
                           "the environment variable %s would write API keys into a file: unset it",
                           dumping[i]);
    return ERR_NONE;
}

static void complete(struct mssql_target *target, const struct config *config)
{
    int call_s = (int)((config->store.query_timeout_ms + 999) / 1000);

    target->timeout_ms = config->store.query_timeout_ms;
    if (target->login_timeout_s == 0)
        target->login_timeout_s = call_s;
    if (target->application[0] == '\0')
        memcpy(target->application, APPLICATION, sizeof APPLICATION);
    if (target->workstation[0] == '\0')
        snprintf(target->workstation, sizeof target->workstation, "%.100s", log_host());
    if (target->server.instance[0] != '\0')
        snprintf(target->place, sizeof target->place, "%s\\%s", target->server.host,
                 target->server.instance);
    else
        snprintf(target->place, sizeof target->place, "%s:%d", target->server.host,
                 target->server.port);
}

enum err_code mssql_target_init(struct mssql_target *target, const struct config *config,
                                struct err *err)
{
    char password[CONNECTION_TEXT_SIZE] = "";
    bool trust = false;
    enum err_code code = check_environment(err);

    *target = (struct mssql_target){.encrypt = ENCRYPT_REQUIRE};
    if (code == ERR_NONE)
        code = config->store.connection_file[0] != '\0' ? from_file(target, config, &trust, err)
                                                        : from_keys(target, config, err);
    if (code == ERR_NONE)
        code = use_login(target, config, err);
    if (code != ERR_NONE)
        return code;
    target->ca_file = strdup(choose_ca(target, config, trust));
    if (target->ca_file == NULL || target->password_file == NULL)
        return err_set(err, ERR_INTERNAL, "no memory");
    complete(target, config);
    if (target->encrypt == ENCRYPT_REQUIRE && target->ca_file[0] == '\0' &&
        config->store.login == LOGIN_SERVICE)
        log_warning(NULL, NULL,
                    "the certificate of SQL Server (%s) is not checked: "
                    "TrustServerCertificate=yes",
                    target->place);
    code = mssql_target_password(target, password, err);
    explicit_bzero(password, sizeof password);
    return code;
}

void mssql_target_reset(struct mssql_target *target)
{
    free(target->password_file);
    free(target->ca_file);
    target->password_file = NULL;
    target->ca_file = NULL;
}
