/* fuzz_gemini.c - any bytes as Gemini's answer. The first byte chooses the HTTP status, the second says
 * whether a line follows that is the Retry-After header. What the answer becomes must be fit for rows and
 * logs, its numbers must be fit for sums, and the policy must know what to do. */
#include <stdlib.h>
#include <string.h>

#include "gemini.h"
#include "invoice.h"
#include "log.h"
#include "support.h"

#define ABSURD INT64_C(1000000000000) /* usage.h */

static void check_usage(const struct usage *u, size_t size)
{
    const int64_t counts[] = {u->input_tokens, u->output_tokens, u->thoughts_tokens,
                              u->cached_tokens, u->total_tokens};
    const int64_t sums[] = {u->text_prompt_tokens, u->image_prompt_tokens,
                            u->text_candidates_tokens};

    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        CHECK(counts[i] >= 0 && counts[i] <= ABSURD);
    for (size_t i = 0; i < sizeof sums / sizeof *sums; i++)
        CHECK(sums[i] >= 0 && sums[i] / ABSURD <= (int64_t)size);
}

static void check_outcome(const struct retry_outcome *o, int status)
{
    const struct retry_policy policy = {
        .max_retries = 3, .initial_delay_ms = 1000, .max_delay_ms = 30000, .backoff_multiplier = 2};

    CHECK(o->complete && o->http_status == status);
    CHECK(o->retry_after_ms >= -1 && o->retry_after_ms <= RETRY_MAX_HINT_MS);
    CHECK(status == 200 || (!o->understood && !o->blocked));
    CHECK(status != 200 || !o->google_error);
    CHECK(o->understood || !o->blocked);
    CHECK(fuzz_is_utf8(o->message, strlen(o->message)) && o->message[0] != '\0');
    CHECK(fuzz_is_utf8(o->status, strlen(o->status)) && fuzz_is_utf8(o->reason, strlen(o->reason)));

    enum retry_class class = retry_classify(o);
    const struct retry_rule *rule = retry_rule(class);
    CHECK(class < RETRY_CLASS_COUNT);
    CHECK((class == RETRY_SUCCESS) == (rule->action == RETRY_DONE));
    /* only Google itself can take a token away; 402 alone says that it is used up */
    CHECK(rule->effect != RETRY_TOKEN_DISABLED || o->google_error);
    CHECK((rule->effect == RETRY_TOKEN_EXCEEDED) == (status == 402));
    int64_t backoff = retry_backoff_ms(&policy, 2, 1);
    int64_t cooldown = retry_cooldown_ms(o, rule, backoff, 1800000000000);
    CHECK(cooldown >= 0 && cooldown <= RETRY_MAX_HINT_MS + RETRY_MAX_HINT_MS / 10);
    CHECK(retry_hint_wait_ms(cooldown, UINT64_MAX) >= cooldown);
    free(log_entry_new(LOG_WARNING, __FILE__, __LINE__, __func__, NULL, o->message, "%s",
                       o->reason));
    log_warning(NULL, o->message, "%s", o->status);
}

/* The text of a good answer goes on to the invoice. */
static void read_text(const struct gemini_answer *answer)
{
    static struct invoice_schema *schema;
    static char none[] = "";
    const struct config config = {.gemini = {.schema_file = none}};
    struct invoice invoice;

    if (schema == NULL)
        CHECK((schema = invoice_schema_load(&config, NULL)) != NULL);
    if (invoice_parse(&invoice, schema, buf_str(&answer->text), answer->text.len))
        invoice_reset(&invoice);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const int statuses[] = {200, 400, 401, 402, 403, 404, 408, 413, 429, 500, 502, 503, 504};
    struct fuzz_input input = {data, size};
    struct gemini_answer answer;

    fuzz_check_log();
    int status = statuses[fuzz_byte(&input) % (sizeof statuses / sizeof *statuses)];
    char *retry_after = fuzz_byte(&input) % 2 == 1 ? fuzz_text(&input, '\n') : NULL;
    size = input.left;
    char *body = fuzz_rest(&input);
    gemini_answer_init(&answer);
    gemini_read_answer(&answer, status, retry_after, body, size);
    check_outcome(&answer.outcome, status);
    check_usage(&answer.usage, size);
    CHECK(answer.has_usage || answer.usage.total_tokens == 0);
    CHECK(fuzz_is_utf8(answer.model, strlen(answer.model)) &&
          fuzz_is_utf8(answer.finish_reason, strlen(answer.finish_reason)));
    CHECK(buf_ok(&answer.text) && answer.text.len <= size);
    if (answer.outcome.understood && !answer.outcome.blocked)
        read_text(&answer);
    gemini_answer_reset(&answer);
    free(body);
    free(retry_after);
    return 0;
}
