/* server.h - FastCGI in and out: the acceptor, the queue, the workers. The only ones who know libfcgi.
 *
 * The processes of a pool share the listening socket on file descriptor 0. In each, the acceptor
 * waits for connections and deals requests out: extractions to a bounded queue for the workers, all
 * else to threads of their own. An acceptor without an idle worker lets the other processes go first. */
#ifndef EXTRACT_SERVER_H
#define EXTRACT_SERVER_H

#include "app.h"

/* Is fd 0 a listening socket? Errors: ERR_CONFIG, saying how the program is started. */
enum err_code server_check(struct err *err) MUST_CHECK;

/* Serves until drain_fd (an eventfd) becomes readable; then takes no new connection, finishes what
 * was accepted, and returns. Errors: ERR_INTERNAL (threads, memory). */
enum err_code server_run(struct app *app, int drain_fd, struct err *err) MUST_CHECK;

#endif
