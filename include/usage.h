/* usage.h - what calls used, as Gemini's usageMetadata reports it. */
#ifndef EXTRACT_USAGE_H
#define EXTRACT_USAGE_H

#include <stdbool.h>
#include <stdint.h>

struct json_object;

struct usage {
    int64_t input_tokens;        /* promptTokenCount */
    int64_t output_tokens;       /* candidatesTokenCount */
    int64_t text_prompt_tokens;  /* promptTokensDetails, modality TEXT */
    int64_t image_prompt_tokens; /* promptTokensDetails, modalities IMAGE and DOCUMENT */
    int64_t
        text_candidates_tokens; /* candidatesTokensDetails TEXT; without details, output_tokens */
    int64_t thoughts_tokens;    /* thoughtsTokenCount; already inside total */
    int64_t cached_tokens;      /* cachedContentTokenCount; already inside input */
    int64_t total_tokens;       /* totalTokenCount */
};

/* Reads usageMetadata; absent, negative or absurd (over 10^12) fields count 0. */
void usage_parse(struct usage *usage, struct json_object *usage_metadata);
void usage_add(struct usage *sum, const struct usage *more);

#endif
