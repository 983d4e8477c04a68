/* What callers may ask for: defaults, ranges, and what the memory allows. Every message names what
 * was found and what was expected. Knows numbers only, so that it is tested without a model. */
#pragma once

#include "milpy.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Fill in the knobs that need no model (all but max_model_len and kv_cache_bytes), and check them.
 * A default yields to a knob that was given. */
mil_status mil_options_complete(mil_engine_options *options, bool is_device) MIL_WARN_UNUSED;

typedef struct mil_kv_facts {
    int32_t max_position;
    size_t page_bytes;   /* of one page, over all ranks */
    uint64_t left_bytes; /* what pages may take where kv_cache_bytes is not given */
    const char *left_of; /* how that came about, for messages */
} mil_kv_facts;

/* Settle max_model_len and kv_cache_bytes of completed options; *n_pages, page 0 included, holds at
 * least one context of max_model_len. */
mil_status mil_options_fit_kv(mil_engine_options *options, int32_t *n_pages,
                              const mil_kv_facts *facts) MIL_WARN_UNUSED;

/* caller: "submit", "seq": who says so in the message. */
mil_status mil_options_check_sampling(const mil_sampling *sampling, int32_t vocab,
                                      const char *caller) MIL_WARN_UNUSED;
/* Token ids in 0 .. vocab - 1; what: "token", "stop token". */
mil_status mil_options_check_tokens(const int32_t *tokens, int32_t n, int32_t vocab,
                                    const char *caller, const char *what) MIL_WARN_UNUSED;
/* A request against a model of this vocabulary and an engine of this max_model_len; *max_new is
 * then the new tokens that it may give, the context's end counted in. */
mil_status mil_options_check_request(const mil_request_options *request, int32_t *max_new,
                                     int32_t vocab, int32_t max_model_len) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
