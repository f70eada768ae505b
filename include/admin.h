/* admin.h - GET /admin/{tokens,usage,errors,retries,unsettled,outbox}: what an administrator reads.
 *
 * Whatever auth.mode says, these want an administrator's client key. They change nothing. */
#ifndef EXTRACT_ADMIN_H
#define EXTRACT_ADMIN_H

#include "app.h"
#include "request.h"

void admin_handle(struct app *app, struct request *request, struct response *response);

#endif
