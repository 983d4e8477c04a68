#include "engine/options.h"

#include "base/memory.h"
#include "scheduler/scheduler.h"

#define DEFAULT_SEQS 64
#define DEFAULT_BATCHED_TOKENS 512
/* A device is busy only with many rows. */
#define DEFAULT_DEVICE_SEQS 256
#define DEFAULT_DEVICE_BATCHED_TOKENS 8192
#define DEFAULT_PAGE_SIZE 16
#define MOST_SEQS 65536
#define MOST_BATCHED_TOKENS (1 << 20)
/* ---- engine ---- */

static mil_status check_knob(const char *name, int32_t value, int32_t most)
{
    if (value < 0 || value > most)
        return mil_fail(MIL_ERR_ARGUMENT, "engine: %s is %d, expected 1..%d, or 0 for the default",
                        name, value, most);
    return MIL_OK;
}

mil_status mil_options_complete(mil_engine_options *options, bool is_device)
{
    int32_t default_seqs = is_device ? DEFAULT_DEVICE_SEQS : DEFAULT_SEQS;
    int32_t default_tokens = is_device ? DEFAULT_DEVICE_BATCHED_TOKENS : DEFAULT_BATCHED_TOKENS;
    if (options->gpu_memory_utilization == 0.0)
        options->gpu_memory_utilization = MIL_GPU_MEMORY_UTILIZATION;
    if (!(options->gpu_memory_utilization > 0.0 && options->gpu_memory_utilization <= 1.0))
        return mil_fail(MIL_ERR_ARGUMENT,
                        "engine: gpu_memory_utilization is %g, expected above 0 and up to 1",
                        options->gpu_memory_utilization);
    MIL_TRY(check_knob("max_model_len", options->max_model_len, INT32_MAX - 1));
    MIL_TRY(check_knob("max_num_seqs", options->max_num_seqs, MOST_SEQS));
    MIL_TRY(
        check_knob("max_num_batched_tokens", options->max_num_batched_tokens, MOST_BATCHED_TOKENS));
    int32_t *n_seqs = &options->max_num_seqs;
    int32_t *n_tokens = &options->max_num_batched_tokens;
    /* See the scheduler's is_deterministic. The CPU's bits do not depend on how a prompt is cut. */
    int32_t spare = options->deterministic && is_device ? MIL_PROMPT_ROOM - 1 : 0;
    if (*n_tokens > 0 && *n_tokens <= spare)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "engine: max_num_batched_tokens is %d, expected at least %d under "
                        "deterministic: a piece of one token would have other bits, and a prompt "
                        "of %d cannot be cut without one",
                        *n_tokens, spare + 1, spare + 1);
    int32_t most_seqs = *n_tokens - spare;
    if (*n_seqs == 0)
        *n_seqs = *n_tokens > 0 && most_seqs < default_seqs ? most_seqs : default_seqs;
    int32_t least_tokens = *n_seqs + spare;
    if (*n_tokens == 0)
        *n_tokens = least_tokens > default_tokens ? least_tokens : default_tokens;
    if (*n_tokens < *n_seqs)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "engine: max_num_batched_tokens is %d, expected at least max_num_seqs, "
                        "which is %d: a step takes a token of each sequence that decodes",
                        *n_tokens, *n_seqs);
    if (options->page_size == 0)
        options->page_size = DEFAULT_PAGE_SIZE;
    int32_t page = options->page_size;
    if (page != 16 && page != 32 && page != 64 && page != 128 && page != 256)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "engine: page_size is %d, expected 16, 32, 64, 128 or 256", page);
    return MIL_OK;
}

static uint64_t pages_of(uint64_t n_tokens, const mil_engine_options *options)
{
    return (n_tokens - 1) / (uint64_t)options->page_size + 1;
}

/* Pages that the default takes: no more than every sequence at full length needs. */
static uint64_t default_pages(const mil_engine_options *options, const mil_kv_facts *facts,
                              int32_t longest)
{
    uint64_t needed = (uint64_t)options->max_num_seqs * pages_of((uint64_t)longest, options) + 1;
    uint64_t affordable = facts->left_bytes / facts->page_bytes;
    return affordable < needed ? affordable : needed;
}

static mil_status fail_few_pages(const mil_engine_options *options, const mil_kv_facts *facts)
{
    size_t needed = 2 * facts->page_bytes;
    if (options->kv_cache_bytes == 0)
        return mil_fail(MIL_ERR_MEMORY,
                        "engine: KV pages need at least %s, %s are left for them: %s too few (%s)",
                        mil_memory_show(needed).text, mil_memory_show(facts->left_bytes).text,
                        mil_memory_show(needed - facts->left_bytes).text, facts->left_of);
    return mil_fail(MIL_ERR_ARGUMENT,
                    "engine: kv_cache_bytes is %llu, expected at least %zu: two pages of %d "
                    "tokens, one of which is never dealt out",
                    (unsigned long long)options->kv_cache_bytes, needed, options->page_size);
}

/* held: tokens that the n pages can hold. */
static mil_status fail_long_context(const mil_engine_options *options, const mil_kv_facts *facts,
                                    uint64_t n, uint64_t held)
{
    int32_t wanted = options->max_model_len;
    uint64_t needed = (pages_of((uint64_t)wanted, options) + 1) * facts->page_bytes;
    uint64_t taken = n * facts->page_bytes;
    if (options->kv_cache_bytes == 0)
        return mil_fail(MIL_ERR_MEMORY,
                        "engine: max_model_len is %d, expected at most %llu: it needs %s of KV "
                        "pages, %s are left for them, %s too few (%s)",
                        wanted, (unsigned long long)held, mil_memory_show(needed).text,
                        mil_memory_show(facts->left_bytes).text,
                        mil_memory_show(needed - taken).text, facts->left_of);
    return mil_fail(MIL_ERR_ARGUMENT,
                    "engine: max_model_len is %d, expected at most %llu, the tokens that a KV "
                    "cache of %llu bytes holds: it needs %llu, %llu more",
                    wanted, (unsigned long long)held, (unsigned long long)taken,
                    (unsigned long long)needed, (unsigned long long)(needed - taken));
}

mil_status mil_options_fit_kv(mil_engine_options *options, int32_t *n_pages,
                              const mil_kv_facts *facts)
{
    int32_t wanted = options->max_model_len;
    if (wanted > facts->max_position || wanted == 1)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "engine: max_model_len is %d, expected 2..%d, the model's", wanted,
                        facts->max_position);
    int32_t longest = wanted > 0 ? wanted : facts->max_position;
    uint64_t n = options->kv_cache_bytes == 0 ? default_pages(options, facts, longest)
                                              : options->kv_cache_bytes / facts->page_bytes;
    if (n > INT32_MAX)
        n = INT32_MAX;
    if (n < 2)
        return fail_few_pages(options, facts);
    uint64_t held = (n - 1) * (uint64_t)options->page_size;
    if (wanted > 0 && (uint64_t)wanted > held)
        return fail_long_context(options, facts, n, held);
    options->max_model_len = (uint64_t)longest > held ? (int32_t)held : longest;
    options->kv_cache_bytes = n * facts->page_bytes;
    *n_pages = (int32_t)n;
    return MIL_OK;
}

/* ---- requests ---- */

mil_status mil_options_check_sampling(const mil_sampling *sampling, int32_t vocab,
                                      const char *caller)
{
    /* Written so that a NaN fails. */
    if (!(sampling->temperature >= 0.0f && sampling->temperature <= 100.0f))
        return mil_fail(MIL_ERR_ARGUMENT, "%s: temperature is %g, expected 0..100, 0 for greedy",
                        caller, (double)sampling->temperature);
    if (!(sampling->top_p > 0.0f && sampling->top_p <= 1.0f))
        return mil_fail(MIL_ERR_ARGUMENT, "%s: top_p is %g, expected above 0 and up to 1", caller,
                        (double)sampling->top_p);
    if (sampling->top_k < 0 || sampling->top_k > vocab)
        return mil_fail(MIL_ERR_ARGUMENT, "%s: top_k is %d, expected 0..%d, the vocabulary", caller,
                        sampling->top_k, vocab);
    if (sampling->n_logprobs < -1 || sampling->n_logprobs > MIL_MAX_LOGPROBS)
        return mil_fail(MIL_ERR_ARGUMENT, "%s: n_logprobs is %d, expected -1..%d", caller,
                        sampling->n_logprobs, MIL_MAX_LOGPROBS);
    return MIL_OK;
}

mil_status mil_options_check_tokens(const int32_t *tokens, int32_t n, int32_t vocab,
                                    const char *caller, const char *what)
{
    for (int32_t i = 0; i < n; i++) {
        if (tokens[i] < 0 || tokens[i] >= vocab)
            return mil_fail(MIL_ERR_ARGUMENT, "%s: %s %d is %d, expected 0..%d", caller, what, i,
                            tokens[i], vocab - 1);
    }
    return MIL_OK;
}

mil_status mil_options_check_request(const mil_request_options *request, int32_t *max_new,
                                     int32_t vocab, int32_t max_model_len)
{
    if (request->n_tokens < 1 || request->tokens == NULL)
        return mil_fail(MIL_ERR_ARGUMENT, "submit: the prompt has %d tokens, expected at least 1",
                        request->tokens == NULL ? 0 : request->n_tokens);
    if (request->n_tokens >= max_model_len)
        return mil_fail(
            MIL_ERR_ARGUMENT,
            "submit: the prompt has %d tokens, expected at most %d: the context holds %d, "
            "the answer's included",
            request->n_tokens, max_model_len - 1, max_model_len);
    if (request->max_tokens < 0)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "submit: max_tokens is %d, expected at least 1, or 0 for no limit",
                        request->max_tokens);
    int32_t room = max_model_len - request->n_tokens;
    if (request->max_tokens > room)
        return mil_fail(
            MIL_ERR_ARGUMENT,
            "submit: max_tokens is %d, expected at most %d: the context holds %d tokens "
            "and the prompt has %d",
            request->max_tokens, room, max_model_len, request->n_tokens);
    bool has_stops = request->n_stop_tokens == 0 || request->stop_tokens != NULL;
    if (!has_stops || request->n_stop_tokens < 0 || request->n_stop_tokens > MIL_MAX_STOP_TOKENS)
        return mil_fail(MIL_ERR_ARGUMENT, "submit: %d stop tokens%s, expected 0..%d",
                        request->n_stop_tokens, has_stops ? "" : " at NULL", MIL_MAX_STOP_TOKENS);
    if (request->adapter < MIL_NO_ADAPTER)
        return mil_fail(MIL_ERR_ARGUMENT, "submit: adapter is %d, expected a content id or %d",
                        request->adapter, MIL_NO_ADAPTER);
    MIL_TRY(mil_options_check_tokens(request->tokens, request->n_tokens, vocab, "submit", "token"));
    MIL_TRY(mil_options_check_tokens(request->stop_tokens, request->n_stop_tokens, vocab, "submit",
                                     "stop token"));
    MIL_TRY(mil_options_check_sampling(&request->sampling, vocab, "submit"));
    *max_new = request->max_tokens > 0 ? request->max_tokens : room;
    return MIL_OK;
}
