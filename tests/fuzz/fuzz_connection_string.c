/* fuzz_connection_string.c - any bytes as DBConnection.txt. What is accepted must fit where it goes
 * (db-lib, freetds.conf), and be the same when it is written plainly and read again; no message may hold
 * what is not a keyword. The first byte chooses: the input as it is; a password in the middle of it; a
 * server alone; a password's file. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "config.h"
#include "store_mssql.h"
#include "support.h"

#define SECRET "hunter2-Zq7!"

static void check_server(const struct connection_server *server)
{
    struct connection_server again;
    char text[CONNECTION_HOST_SIZE + 40];
    struct err err;

    CHECK(server->host[0] != '\0' && strlen(server->host) < sizeof server->host);
    CHECK(server->host[strcspn(server->host, " \t\r\n;#\"'\\,[]=/")] == '\0'); /* freetds.conf */
    CHECK(strlen(server->instance) < sizeof server->instance);
    CHECK((server->instance[0] != '\0') == (server->port == 0));
    CHECK(server->port >= 0 && server->port <= 65535);
    if (server->port != 0)
        snprintf(text, sizeof text, "tcp:[%s],%d", server->host, server->port);
    else
        snprintf(text, sizeof text, "[%s]\\%s", server->host, server->instance);
    CHECK(connection_server_parse(text, &again, &err) == ERR_NONE);
    CHECK(strcmp(again.host, server->host) == 0 && again.port == server->port &&
          strcmp(again.instance, server->instance) == 0);
}

static void write_value(struct buf *out, const char *keyword, const char *value)
{
    if (*value == '\0')
        return;
    buf_printf(out, "%s={", keyword);
    for (; *value != '\0'; value++) {
        if (*value == '}')
            buf_append_char(out, '}');
        buf_append_char(out, *value);
    }
    buf_append_str(out, "};");
}

static void check_written(const struct connection_string *c)
{
    static const char *const encrypts[] = {"mandatory", "optional"}; /* enum config_encrypt */
    struct connection_string again;
    struct buf out;
    struct err err;

    buf_init(&out, 8192);
    buf_printf(&out, "SERVER=[%s]%s%s", c->server.host, c->server.port == 0 ? "\\" : "",
               c->server.instance);
    if (c->server.port != 0)
        buf_printf(&out, ";PORT=%d", c->server.port);
    buf_append_char(&out, ';');
    write_value(&out, "DATABASE", c->database);
    write_value(&out, "UID", c->user);
    write_value(&out, "PWD", c->password);
    write_value(&out, "APP", c->application);
    write_value(&out, "WSID", c->workstation);
    if (c->encrypt >= 0)
        buf_printf(&out, "Encrypt=%s;", encrypts[c->encrypt]);
    buf_printf(&out, "TrustServerCertificate=%s;", c->trust_certificate ? "yes" : "no");
    buf_printf(&out, "Timeout=%d\n", c->login_timeout_s);
    CHECK(buf_ok(&out));
    CHECK(connection_string_parse(out.data, out.len, &again, &err) == ERR_NONE);
    CHECK(strcmp(again.server.host, c->server.host) == 0 && again.server.port == c->server.port &&
          strcmp(again.server.instance, c->server.instance) == 0);
    CHECK(strcmp(again.database, c->database) == 0 && strcmp(again.user, c->user) == 0);
    CHECK(strcmp(again.password, c->password) == 0);
    CHECK(strcmp(again.application, c->application) == 0 &&
          strcmp(again.workstation, c->workstation) == 0);
    CHECK(again.encrypt == c->encrypt && again.trust_certificate == c->trust_certificate &&
          again.login_timeout_s == c->login_timeout_s);
    buf_reset(&out);
}

/* Does it stand where a keyword does: with = behind it? */
static bool is_in_keyword(const char *text, size_t len)
{
    const char *found = text, *end = text + len;

    while ((found = memmem(found, (size_t)(end - found), SECRET, sizeof SECRET - 1)) != NULL) {
        found += sizeof SECRET - 1;
        const char *next = found;
        while (next < end && strchr(";\r\n=", *next) == NULL)
            next++;
        if (next < end && *next == '=')
            return true;
    }
    return false;
}

static void check_string(const char *text, size_t len)
{
    struct connection_string c;
    struct err err = {.message = ""};

    if (connection_string_parse(text, len, &c, &err) != ERR_NONE) {
        CHECK(fuzz_is_line(err.message) && err.message[0] != '\0');
        CHECK(strstr(err.message, SECRET) == NULL || is_in_keyword(text, len));
        return;
    }
    CHECK(c.database[0] != '\0' && c.user[0] != '\0' && c.password[0] != '\0');
    CHECK(c.encrypt == -1 || c.encrypt == ENCRYPT_REQUIRE || c.encrypt == ENCRYPT_REQUEST);
    CHECK(c.login_timeout_s >= 0 && c.login_timeout_s <= 9999);
    check_server(&c.server);
    check_written(&c);
}

/* Where the store would log in, with the input as one of the two files. */
static void check_target(const char *text, size_t len, bool is_connection)
{
    static char none[] = "", system_ca[] = "system", server[] = "db.example:1433", name[] = "sa";
    char path[64], password[CONNECTION_TEXT_SIZE] = "";
    struct mssql_target target;
    struct err err = {.message = ""};

    snprintf(path, sizeof path, "%s", fuzz_file(0, text, len));
    struct config config = {.store = {.server = server,
                                      .database = name,
                                      .user = name,
                                      .password_file = path,
                                      .connection_file = is_connection ? path : none,
                                      .admin_user = none,
                                      .reader_user = none,
                                      .ca_file = system_ca,
                                      .query_timeout_ms = 5000}};
    if (mssql_target_init(&target, &config, &err) == ERR_NONE) {
        CHECK(mssql_target_password(&target, password, &err) == ERR_NONE);
        CHECK(password[0] != '\0' && fuzz_is_utf8(password, strlen(password)));
        CHECK(is_connection || strlen(password) <= len);
        CHECK(target.place[0] != '\0' && target.login_timeout_s > 0);
    } else {
        CHECK(fuzz_is_line(err.message) && err.message[0] != '\0');
    }
    mssql_target_reset(&target);
}

/* SECRET as a password, somewhere in the input. */
static void check_secret(const char *text, size_t len, size_t place)
{
    struct buf with;

    place = len == 0 ? 0 : place % (len + 1);
    buf_init(&with, len + 64);
    buf_append(&with, text, place);
    buf_append_str(&with, "PWD=" SECRET);
    buf_append(&with, text + place, len - place);
    check_string(with.data, with.len);
    buf_reset(&with);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input input = {data, size};
    struct connection_server server;
    struct err err = {.message = ""};
    uint8_t mode = fuzz_byte(&input);
    size_t len = input.left;
    char *text = fuzz_rest(&input);

    fuzz_check_log();
    switch (mode % 4) {
    case 0:
        check_string(text, len);
        check_target(text, len, true);
        break;
    case 1:
        check_secret(text, len, mode / 4);
        break;
    case 2:
        if (connection_server_parse(text, &server, &err) == ERR_NONE)
            check_server(&server);
        else
            CHECK(err.code == ERR_CONFIG && fuzz_is_line(err.message));
        break;
    default:
        check_target(text, len, false);
        break;
    }
    free(text);
    return 0;
}
