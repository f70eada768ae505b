/* connection.h - one FastCGI connection: its request's head, body and answer. server.c's helper, and
 * the only ones who know libfcgi. */
#ifndef EXTRACT_CONNECTION_H
#define EXTRACT_CONNECTION_H

#include <fcgiapp.h>
#include <stdbool.h>

#include "request.h"

struct connection {
    FCGX_Request fcgi;
    struct request request;
    int fd;
};

/* Once a process, before all else. Errors: ERR_INTERNAL. */
enum err_code connection_init(struct err *err) MUST_CHECK;

/* Accepts a connection from a listener that does not block. 0, or accept's errno. */
int connection_accept(struct connection *connection, int listener) MUST_CHECK;

/* Has the peer sent anything, or gone? Never blocks. */
bool connection_has_data(const struct connection *connection);

/* Reads the head and fills connection->request. False where there is none: the connection is closed. */
bool connection_read_head(struct connection *connection) MUST_CHECK;

/* Ends all reading from the peer, now and later, in whichever thread: reads find the body's end. */
void connection_stop_reading(const struct connection *connection);

/* Writes the answer, ends the request, closes, and frees what belongs to the request. */
void connection_answer(struct connection *connection, struct response *response);

/* Closes without an answer one whose head was not read. */
void connection_drop(struct connection *connection);

#endif
