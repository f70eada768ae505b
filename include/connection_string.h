/* connection_string.h - DBConnection.txt: an ODBC connection string, as existing deployments have it.
 *
 * Every keyword is either honoured or refused by name, with what to do instead. Messages hold no
 * values: a piece of a password could be among them. */
#ifndef EXTRACT_CONNECTION_STRING_H
#define EXTRACT_CONNECTION_STRING_H

#include <stdbool.h>
#include <stddef.h>

#include "err.h"

#define CONNECTION_TEXT_SIZE 129 /* db-lib takes at most 128 bytes (dbsetlname) */
#define CONNECTION_HOST_SIZE 201 /* freetds.conf has lines of 255 bytes */
#define CONNECTION_PORT 1433

/* Where a server listens. */
struct connection_server {
    char host[CONNECTION_HOST_SIZE];
    char instance[17]; /* "" where the port is known; else SQL Server Browser tells the port */
    int port;          /* 0 with an instance */
};

struct connection_string {
    struct connection_server server;
    char database[CONNECTION_TEXT_SIZE];
    char user[CONNECTION_TEXT_SIZE];
    char password[CONNECTION_TEXT_SIZE];
    char application[CONNECTION_TEXT_SIZE]; /* "": not said; so the next */
    char workstation[CONNECTION_TEXT_SIZE];
    int encrypt;            /* enum config_encrypt; -1: not said */
    bool trust_certificate; /* do not check the server's certificate */
    int login_timeout_s;    /* 0: not said */
};

/* Reads "host", "host:port", "host,port", "[IPv6]:port", each also with "tcp:" before it, and
 * "host\instance" with or without a port (which then decides). Errors: ERR_CONFIG. */
enum err_code connection_server_parse(const char *text, struct connection_server *server,
                                      struct err *err) MUST_CHECK;

/* Reads a whole connection string. Server, database, user and password must be in it. The caller
 * overwrites *out, which holds the password, after use (explicit_bzero), on an error too.
 * Errors: ERR_CONFIG. */
enum err_code connection_string_parse(const char *text, size_t len, struct connection_string *out,
                                      struct err *err) MUST_CHECK;

#endif
