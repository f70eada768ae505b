/* health.c - GET /healthz, /readyz and /metrics. See health.h. */
#include "health.h"

#include "metrics.h"

void health_live(struct app *app, struct request *request, struct response *response)
{
    (void)app;
    (void)request;
    buf_append_str(&response->body, "{\"status\": \"ok\"}");
}

void health_ready(struct app *app, struct request *request, struct response *response)
{
    struct store_outbox_status outbox = {0};
    struct err err = {0}, ignored = {0};
    bool store = store_ping(app->store, &err) == ERR_NONE;
    bool outbox_ok = store_outbox_status(app->store, &outbox, &ignored) == ERR_NONE;
    bool fallback = app->fallback_key != NULL && outbox_ok; /* whatever fallback.when adds */

    if (!store && !fallback) {
        response_problem(response, request, ERR_STORE_UNAVAILABLE, NULL, 0, false);
        return;
    }
    buf_printf(
        &response->body,
        "{\"status\": \"ok\", \"store\": \"%s\", \"fallback\": %s, \"outbox\": {\"usable\": %s, "
        "\"waiting\": %lld, \"records\": %lld, \"dead\": %lld, \"oldest_seconds\": %lld}}",
        store ? "reachable" : "unreachable", fallback ? "true" : "false",
        outbox_ok ? "true" : "false", (long long)outbox.waiting, (long long)outbox.records,
        (long long)outbox.dead, (long long)outbox.oldest_ms / 1000);
}

static void write_outbox(struct buf *out, const struct store_outbox_status *outbox)
{
    metrics_write_head(out, "extract_outbox_entries", "gauge",
                       "What this host's outbox holds: settlements and reservations that wait for "
                       "the store, log entries and retry attempts that do, and what the store "
                       "refused for good.");
    metrics_write_sample(out, "extract_outbox_entries", "state", "waiting", outbox->waiting);
    metrics_write_sample(out, "extract_outbox_entries", "state", "records", outbox->records);
    metrics_write_sample(out, "extract_outbox_entries", "state", "dead", outbox->dead);
    metrics_write_head(out, "extract_outbox_oldest_seconds", "gauge",
                       "How long the oldest has waited.");
    buf_printf(out, "extract_outbox_oldest_seconds %lld\n", (long long)outbox->oldest_ms / 1000);
}

void health_metrics(struct app *app, struct request *request, struct response *response)
{
    struct store_outbox_status outbox;
    struct err err = {0};

    response->content_type = "text/plain; version=0.0.4; charset=utf-8";
    metrics_write(&response->body);
    if (store_outbox_status(app->store, &outbox, &err) == ERR_NONE)
        write_outbox(&response->body, &outbox);
    gauges_write(app->gauges, &response->body);
    if (!buf_ok(&response->body))
        response_problem(response, request, ERR_INTERNAL, NULL, 0, false);
}
