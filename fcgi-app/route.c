/* route.c - which handler answers which path: one table. See route.h. */
#include "route.h"

#include <string.h>

#include "admin.h"
#include "extract.h"
#include "health.h"
#include "log.h"
#include "metrics.h"

/* A new endpoint is a row here and a handler. */
static const struct route {
    const char *path;
    const char *methods; /* as the Allow header lists them */
    void (*work)(struct worker *, struct request *, struct response *);
    void (*other)(struct app *, struct request *, struct response *);
    enum route_lane lane;
} routes[] = {
    {"/extract", "POST", extract_handle, NULL, ROUTE_WORKER},
    {"/healthz", "GET, HEAD", NULL, health_live, ROUTE_AT_ONCE},
    {"/readyz", "GET, HEAD", NULL, health_ready, ROUTE_AT_ONCE},
    {"/metrics", "GET, HEAD", NULL, health_metrics, ROUTE_AT_ONCE},
    {"/admin/tokens", "GET, HEAD", NULL, admin_handle, ROUTE_READER},
    {"/admin/usage", "GET, HEAD", NULL, admin_handle, ROUTE_READER},
    {"/admin/errors", "GET, HEAD", NULL, admin_handle, ROUTE_READER},
    {"/admin/retries", "GET, HEAD", NULL, admin_handle, ROUTE_READER},
    {"/admin/unsettled", "GET, HEAD", NULL, admin_handle, ROUTE_READER},
    {"/admin/outbox", "GET, HEAD", NULL, admin_handle, ROUTE_READER},
};

static const struct route *find(const char *path)
{
    for (size_t i = 0; i < sizeof routes / sizeof *routes; i++)
        if (strcmp(routes[i].path, path) == 0)
            return &routes[i];
    return NULL;
}

/* Is method one of "GET, HEAD"? */
static bool allowed(const char *methods, const char *method)
{
    size_t n = strlen(method);

    for (const char *at = methods; n > 0 && (at = strstr(at, method)) != NULL; at += n)
        if ((at == methods || at[-1] == ' ') && (at[n] == '\0' || at[n] == ','))
            return true;
    return false;
}

enum route_lane route_lane(const struct request *request)
{
    const struct route *route = find(request->path);

    return route != NULL && allowed(route->methods, request->method) ? route->lane : ROUTE_AT_ONCE;
}

void route_work(struct worker *worker, struct request *request, struct response *response)
{
    find(request->path)->work(worker, request, response);
}

void route_other(struct app *app, struct request *request, struct response *response)
{
    const struct route *route = find(request->path);
    enum err_code code = route == NULL                               ? ERR_NOT_FOUND
                         : !allowed(route->methods, request->method) ? ERR_METHOD_NOT_ALLOWED
                                                                     : ERR_NONE;

    request_drain(request);
    if (code == ERR_NONE) {
        route->other(app, request, response);
        return;
    }
    response_problem(response, request, code, NULL, 0, false);
    if (route != NULL)
        response->allow = route->methods;
    metrics_add(METRIC_REQUESTS + (int)code, 1);
}
