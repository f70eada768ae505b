/* route.h - which handler answers which path: one table. */
#ifndef EXTRACT_ROUTE_H
#define EXTRACT_ROUTE_H

#include "app.h"
#include "request.h"

enum route_lane {
    ROUTE_WORKER, /* may take long: queued for a worker */
    ROUTE_AT_ONCE /* answered by a thread of its own, whatever the workers do */
};

enum route_lane route_lane(const struct request *request);

/* Answers in the worker lane. */
void route_work(struct worker *worker, struct request *request, struct response *response);

/* Answers in the other lane; unknown paths and methods too. */
void route_at_once(struct app *app, struct request *request, struct response *response);

#endif
