/* request.c - responses, and what all handlers do with requests. See request.h. */
#include "request.h"

#include <string.h>

void response_init(struct response *response)
{
    *response = (struct response){.status = 200, .content_type = "application/json"};
    buf_init(&response->body, RESPONSE_MAX);
}

void response_reset(struct response *response)
{
    buf_reset(&response->body);
}

void response_problem(struct response *response, const struct request *request, enum err_code code,
                      const char *detail, int retry_after_s, bool spent)
{
    const struct err_info *info = err_info(code);
    struct buf *b = &response->body;

    if (detail == NULL)
        detail = info->detail;
    response->status = info->status;
    response->content_type = "application/problem+json";
    response->authenticate = code == ERR_UNAUTHENTICATED ? "Bearer realm=\"extract-fcgi\"" : NULL;
    response->file_name = response->next_cursor = NULL;
    response->retry_after_s = retry_after_s > 0 ? retry_after_s : info->retry_after_s;
    buf_clear(b);
    buf_printf(b, "{\"type\": \"about:blank\", \"title\": \"%s\", \"status\": %d, \"detail\": ",
               info->title, info->status);
    buf_append_json(b, detail, strlen(detail));
    buf_printf(b, ", \"code\": \"%s\", \"request_id\": \"%s\", \"retryable\": %s, \"spent\": %s}",
               info->name, request->id, info->retryable ? "true" : "false",
               spent ? "true" : "false");
}

const char *request_trace_id(const struct request *request)
{
    return request->trace.id[0] == '\0' ? NULL : request->trace.id;
}

const char *request_other_ids(struct request *request)
{
    const char *trace_id = request_trace_id(request);

    return trace_id == NULL
               ? arena_printf(&request->arena, "proxy_request_id=%s", request->proxy_request_id)
               : arena_printf(&request->arena, "proxy_request_id=%s trace_id=%s",
                              request->proxy_request_id, trace_id);
}

void request_drain(struct request *request)
{
    char scratch[16384];

    while (request->read(request->io, scratch, sizeof scratch) == sizeof scratch)
        ;
}
