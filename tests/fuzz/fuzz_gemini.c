/* fuzz_gemini.c - any bytes as Gemini's answer. The first two are the HTTP status and whether a line
 * follows that is the Retry-After header. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistr.h>

#include "gemini.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(bool fine)
{
    if (!fine)
        abort();
}

static bool is_utf8(const char *s)
{
    return u8_check((const uint8_t *)s, strlen(s)) == NULL;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const int statuses[] = {200, 400, 401, 402, 403, 404, 408, 413, 429, 500, 502, 503, 504};
    struct gemini_answer answer;
    char *retry_after = NULL;

    if (size < 2)
        return 0;
    int status = statuses[data[0] % (sizeof statuses / sizeof *statuses)];
    bool with_header = data[1] % 2 == 1;
    data += 2;
    size -= 2;
    const uint8_t *line = with_header && size > 0 ? memchr(data, '\n', size) : NULL;
    if (line != NULL) {
        retry_after = strndup((const char *)data, (size_t)(line - data));
        size -= (size_t)(line + 1 - data);
        data = line + 1;
    }
    gemini_answer_init(&answer);
    gemini_read_answer(&answer, status, retry_after, (const char *)data, size);
    struct retry_outcome *o = &answer.outcome;
    check(o->complete && o->http_status == status);
    check(o->retry_after_ms >= -1 && o->retry_after_ms <= RETRY_MAX_HINT_MS);
    check(status == 200 || (!o->understood && !o->blocked));
    check(!(o->blocked && !o->understood));
    check(is_utf8(o->message) && is_utf8(o->status) && is_utf8(o->reason) &&
          is_utf8(answer.model) && is_utf8(answer.finish_reason)); /* they go to rows and logs */
    check(answer.usage.total_tokens >= 0 && answer.usage.text_prompt_tokens >= 0 &&
          answer.usage.image_prompt_tokens >= 0 && answer.usage.text_candidates_tokens >= 0);
    check(retry_classify(o) < RETRY_CLASS_COUNT);
    gemini_answer_reset(&answer);
    free(retry_after);
    return 0;
}
