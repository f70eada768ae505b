/* route.h - which handler answers which path: one table. */
#ifndef EXTRACT_ROUTE_H
#define EXTRACT_ROUTE_H

#include "app.h"
#include "request.h"

enum route_lane {
    ROUTE_WORKER, /* may take long: queued for a worker */
    ROUTE_READER, /* asks the store, for people: a few threads, and a short queue */
    ROUTE_AT_ONCE /* answered by a thread of its own, whatever the others do */
};

enum route_lane route_lane(const struct request *request);

/* Answers in the worker lane. */
void route_work(struct worker *worker, struct request *request, struct response *response);

/* Answers in the other lanes; unknown paths and methods too. */
void route_other(struct app *app, struct request *request, struct response *response);

#endif
