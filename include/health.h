/* health.h - GET /healthz, /readyz and /metrics. */
#ifndef EXTRACT_HEALTH_H
#define EXTRACT_HEALTH_H

#include "app.h"
#include "request.h"

/* The process answers. */
void health_live(struct app *app, struct request *request, struct response *response);
/* The store is reachable, or the fallback can serve; else 503. */
void health_ready(struct app *app, struct request *request, struct response *response);
void health_metrics(struct app *app, struct request *request, struct response *response);

#endif
