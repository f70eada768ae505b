/* usage.c - what calls used. See usage.h. */
#include "usage.h"

#include <json.h>
#include <string.h>

#define ABSURD INT64_C(1000000000000)

static int64_t count_member(json_object *object, const char *name)
{
    json_object *value = NULL;

    if (object == NULL || !json_object_object_get_ex(object, name, &value) ||
        !json_object_is_type(value, json_type_int))
        return 0;
    int64_t n = json_object_get_int64(value);
    return n < 0 || n > ABSURD ? 0 : n;
}

/* Sums the tokenCount of the details whose modality is one of two. *any: were there details at all? */
static int64_t sum_details(json_object *usage, const char *name, const char *modality,
                           const char *or_modality, bool *any)
{
    json_object *details = NULL;
    int64_t sum = 0;

    *any = usage != NULL && json_object_object_get_ex(usage, name, &details) &&
           json_object_is_type(details, json_type_array) && json_object_array_length(details) > 0;
    for (size_t i = 0; *any && i < json_object_array_length(details); i++) {
        json_object *detail = json_object_array_get_idx(details, i), *which = NULL;
        if (!json_object_is_type(detail, json_type_object) ||
            !json_object_object_get_ex(detail, "modality", &which) ||
            !json_object_is_type(which, json_type_string))
            continue;
        const char *is = json_object_get_string(which);
        if (strcmp(is, modality) == 0 || (or_modality != NULL && strcmp(is, or_modality) == 0))
            sum += count_member(detail, "tokenCount");
    }
    return sum;
}

void usage_parse(struct usage *usage, json_object *metadata)
{
    bool any;

    *usage = (struct usage){
        .input_tokens = count_member(metadata, "promptTokenCount"),
        .output_tokens = count_member(metadata, "candidatesTokenCount"),
        .text_prompt_tokens = sum_details(metadata, "promptTokensDetails", "TEXT", NULL, &any),
        .image_prompt_tokens =
            sum_details(metadata, "promptTokensDetails", "IMAGE", "DOCUMENT", &any),
        .thoughts_tokens = count_member(metadata, "thoughtsTokenCount"),
        .cached_tokens = count_member(metadata, "cachedContentTokenCount"),
        .total_tokens = count_member(metadata, "totalTokenCount"),
    };
    usage->text_candidates_tokens =
        sum_details(metadata, "candidatesTokensDetails", "TEXT", NULL, &any);
    if (!any)
        usage->text_candidates_tokens = usage->output_tokens;
}

void usage_add(struct usage *sum, const struct usage *more)
{
    sum->input_tokens += more->input_tokens;
    sum->output_tokens += more->output_tokens;
    sum->text_prompt_tokens += more->text_prompt_tokens;
    sum->image_prompt_tokens += more->image_prompt_tokens;
    sum->text_candidates_tokens += more->text_candidates_tokens;
    sum->thoughts_tokens += more->thoughts_tokens;
    sum->cached_tokens += more->cached_tokens;
    sum->total_tokens += more->total_tokens;
}
