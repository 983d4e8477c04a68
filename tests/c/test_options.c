#include "test.h"

#include "engine/options.h"

#include <math.h>

#define MIB ((uint64_t)1 << 20)

static bool says(const char *text)
{
    if (strstr(mil_status_message(), text) != NULL)
        return true;
    printf("message: %s\nlacks: %s\n", mil_status_message(), text);
    return false;
}

/* ---- engine ---- */

TEST(defaults_are_filled_in)
{
    mil_engine_options options = {0};
    CHECK_INT(mil_options_complete(&options, false), MIL_OK);
    CHECK_INT(options.max_num_seqs, 64);
    CHECK_INT(options.max_num_batched_tokens, 512);
    CHECK_INT(options.page_size, 16);
}

TEST(a_default_yields_to_a_knob_that_was_given)
{
    mil_engine_options many = {.max_num_seqs = 1000};
    CHECK_INT(mil_options_complete(&many, false), MIL_OK);
    CHECK_INT(many.max_num_batched_tokens, 1000);
    mil_engine_options few = {.max_num_batched_tokens = 20};
    CHECK_INT(mil_options_complete(&few, false), MIL_OK);
    CHECK_INT(few.max_num_seqs, 20);
}

TEST(a_device_takes_more_rows_by_default)
{
    mil_engine_options options = {0};
    CHECK_INT(mil_options_complete(&options, true), MIL_OK);
    CHECK_INT(options.max_num_seqs, 256);
    CHECK_INT(options.max_num_batched_tokens, 8192);
    CHECK(options.gpu_memory_utilization == 0.9);
}

TEST(deterministic_on_a_device_keeps_room_for_a_prompt_beside_its_mates)
{
    mil_engine_options many = {.max_num_seqs = 9000, .deterministic = true};
    CHECK_INT(mil_options_complete(&many, true), MIL_OK);
    CHECK_INT(many.max_num_batched_tokens, 9002);
    mil_engine_options few = {.max_num_batched_tokens = 20, .deterministic = true};
    CHECK_INT(mil_options_complete(&few, true), MIL_OK);
    CHECK_INT(few.max_num_seqs, 18);
    mil_engine_options least = {.max_num_batched_tokens = 3, .deterministic = true};
    CHECK_INT(mil_options_complete(&least, true), MIL_OK);
    CHECK_INT(least.max_num_seqs, 1);
    mil_engine_options all = {
        .max_num_seqs = 20, .max_num_batched_tokens = 20, .deterministic = true};
    CHECK_INT(mil_options_complete(&all, true), MIL_OK);
    mil_engine_options none = {
        .max_num_seqs = 1, .max_num_batched_tokens = 2, .deterministic = true};
    CHECK_INT(mil_options_complete(&none, true), MIL_ERR_ARGUMENT);
    CHECK(says("max_num_batched_tokens is 2, expected at least 3 under deterministic"));
    CHECK_INT(mil_options_complete(&none, false), MIL_OK); /* the CPU's bits know no pieces */
}

TEST(knobs_out_of_range_are_errors_that_name_both_sides)
{
    mil_engine_options clash = {.max_num_seqs = 100, .max_num_batched_tokens = 99};
    CHECK_INT(mil_options_complete(&clash, false), MIL_ERR_ARGUMENT);
    CHECK(says("max_num_batched_tokens is 99") && says("max_num_seqs, which is 100"));
    mil_engine_options page = {.page_size = 24};
    CHECK_INT(mil_options_complete(&page, false), MIL_ERR_ARGUMENT);
    CHECK(says("page_size is 24, expected 16, 32"));
    mil_engine_options negative = {.max_num_seqs = -1};
    CHECK_INT(mil_options_complete(&negative, false), MIL_ERR_ARGUMENT);
    CHECK(says("max_num_seqs is -1, expected 1..65536"));
    mil_engine_options length = {.max_model_len = -5};
    CHECK_INT(mil_options_complete(&length, false), MIL_ERR_ARGUMENT);
    CHECK(says("max_model_len is -5"));
    mil_engine_options share = {.gpu_memory_utilization = 1.5};
    CHECK_INT(mil_options_complete(&share, true), MIL_ERR_ARGUMENT);
    CHECK(says("gpu_memory_utilization is 1.5, expected above 0 and up to 1"));
}

static mil_status fit(mil_engine_options *options, int32_t *n_pages, int32_t max_position,
                      uint64_t left_bytes)
{
    mil_kv_facts facts = {.max_position = max_position,
                          .page_bytes = 1000,
                          .left_bytes = left_bytes,
                          .left_of = "half of it"};
    CHECK_INT(mil_options_complete(options, false), MIL_OK);
    return mil_options_fit_kv(options, n_pages, &facts);
}

TEST(kv_takes_what_all_sequences_need_where_memory_is_plenty)
{
    mil_engine_options options = {.max_num_seqs = 4};
    int32_t n_pages;
    CHECK_INT(fit(&options, &n_pages, 100, 1024 * MIB), MIL_OK);
    CHECK_INT(n_pages, 4 * 7 + 1);
    CHECK_INT(options.max_model_len, 100);
    CHECK_INT(options.kv_cache_bytes, 29 * 1000);
}

TEST(kv_takes_what_is_left_and_cuts_the_context_to_it)
{
    mil_engine_options options = {0};
    int32_t n_pages;
    CHECK_INT(fit(&options, &n_pages, 4096, 11999), MIL_OK);
    CHECK_INT(n_pages, 11);
    CHECK_INT(options.max_model_len, 160);
}

TEST(kv_bytes_that_were_given_are_taken_as_given)
{
    mil_engine_options options = {.kv_cache_bytes = 5999};
    int32_t n_pages;
    CHECK_INT(fit(&options, &n_pages, 4096, 0), MIL_OK);
    CHECK_INT(n_pages, 5);
    CHECK_INT(options.max_model_len, 64);
}

TEST(a_kv_cache_too_small_is_an_error_with_figures)
{
    int32_t n_pages;
    mil_engine_options tiny = {.kv_cache_bytes = 1999};
    CHECK_INT(fit(&tiny, &n_pages, 4096, 0), MIL_ERR_ARGUMENT);
    CHECK(says("kv_cache_bytes is 1999, expected at least 2000"));
    mil_engine_options none = {0};
    CHECK_INT(fit(&none, &n_pages, 4096, 1500), MIL_ERR_MEMORY);
    CHECK(says("at least 1.95 KiB, 1.46 KiB are left") && says("500 bytes too few (half of it)"));
    mil_engine_options length = {.kv_cache_bytes = 5000, .max_model_len = 65};
    CHECK_INT(fit(&length, &n_pages, 4096, 0), MIL_ERR_ARGUMENT);
    CHECK(says("max_model_len is 65, expected at most 64") && says("5000 bytes holds"));
    CHECK(says("needs 6000, 1000 more"));
    mil_engine_options left = {.max_model_len = 65};
    CHECK_INT(fit(&left, &n_pages, 4096, 5500), MIL_ERR_MEMORY);
    CHECK(says("max_model_len is 65, expected at most 64: it needs 5.86 KiB of KV pages"));
    CHECK(says("5.37 KiB are left for them, 1000 bytes too few (half of it)"));
    mil_engine_options beyond = {.max_model_len = 4097};
    CHECK_INT(fit(&beyond, &n_pages, 4096, 1024 * MIB), MIL_ERR_ARGUMENT);
    CHECK(says("max_model_len is 4097, expected 2..4096"));
}

/* ---- requests ---- */

static const int32_t TOKENS[100];

static mil_request_options good(void)
{
    return (mil_request_options){.tokens = TOKENS,
                                 .n_tokens = 10,
                                 .adapter = MIL_NO_ADAPTER,
                                 .sampling = {.top_p = 1.0f, .n_logprobs = -1}};
}

static mil_status check(const mil_request_options *request, int32_t *max_new)
{
    return mil_options_check_request(request, max_new, 50, 100);
}

TEST(max_tokens_is_what_was_asked_or_what_the_context_leaves)
{
    mil_request_options request = good();
    int32_t max_new;
    CHECK_INT(check(&request, &max_new), MIL_OK);
    CHECK_INT(max_new, 90);
    request.max_tokens = 90;
    CHECK_INT(check(&request, &max_new), MIL_OK);
    CHECK_INT(max_new, 90);
    request.max_tokens = 91;
    CHECK_INT(check(&request, &max_new), MIL_ERR_ARGUMENT);
    CHECK(says("max_tokens is 91, expected at most 90"));
    request.max_tokens = -1;
    CHECK_INT(check(&request, &max_new), MIL_ERR_ARGUMENT);
}

TEST(a_bad_prompt_is_an_error_that_names_it)
{
    mil_request_options request = good();
    int32_t max_new;
    int32_t tokens[2] = {3, 50};
    request.n_tokens = 0;
    CHECK_INT(check(&request, &max_new), MIL_ERR_ARGUMENT);
    CHECK(says("0 tokens, expected at least 1"));
    request.n_tokens = 100;
    CHECK_INT(check(&request, &max_new), MIL_ERR_ARGUMENT);
    CHECK(says("100 tokens, expected at most 99"));
    request.tokens = tokens;
    request.n_tokens = 2;
    CHECK_INT(check(&request, &max_new), MIL_ERR_ARGUMENT);
    CHECK(says("token 1 is 50, expected 0..49"));
    tokens[1] = -1;
    CHECK_INT(check(&request, &max_new), MIL_ERR_ARGUMENT);
    CHECK(says("token 1 is -1"));
}

TEST(bad_stop_tokens_are_errors)
{
    mil_request_options request = good();
    int32_t max_new;
    int32_t stops[MIL_MAX_STOP_TOKENS + 1] = {0};
    request.stop_tokens = stops;
    request.n_stop_tokens = MIL_MAX_STOP_TOKENS;
    CHECK_INT(check(&request, &max_new), MIL_OK);
    request.n_stop_tokens = MIL_MAX_STOP_TOKENS + 1;
    CHECK_INT(check(&request, &max_new), MIL_ERR_ARGUMENT);
    CHECK(says("257 stop tokens, expected 0..256"));
    request.n_stop_tokens = 3;
    stops[2] = 50;
    CHECK_INT(check(&request, &max_new), MIL_ERR_ARGUMENT);
    CHECK(says("stop token 2 is 50"));
    request.stop_tokens = NULL;
    CHECK_INT(check(&request, &max_new), MIL_ERR_ARGUMENT);
}

TEST(sampling_out_of_range_or_not_a_number_is_an_error)
{
    const struct {
        mil_sampling sampling;
        const char *text;
    } bad[] = {
        {{.temperature = -0.1f, .top_p = 1, .n_logprobs = -1}, "temperature is -0.1"},
        {{.temperature = 101, .top_p = 1, .n_logprobs = -1}, "temperature is 101"},
        {{.temperature = NAN, .top_p = 1, .n_logprobs = -1}, "temperature is"},
        {{.temperature = INFINITY, .top_p = 1, .n_logprobs = -1}, "temperature is inf"},
        {{.top_p = 0, .n_logprobs = -1}, "top_p is 0, expected above 0"},
        {{.top_p = 1.1f, .n_logprobs = -1}, "top_p is 1.1"},
        {{.top_p = NAN, .n_logprobs = -1}, "top_p is"},
        {{.top_p = 1, .top_k = -1, .n_logprobs = -1}, "top_k is -1, expected 0..50"},
        {{.top_p = 1, .top_k = 51, .n_logprobs = -1}, "top_k is 51"},
        {{.top_p = 1, .n_logprobs = -2}, "n_logprobs is -2, expected -1..20"},
        {{.top_p = 1, .n_logprobs = 21}, "n_logprobs is 21"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        CHECK_INT(mil_options_check_sampling(&bad[i].sampling, 50, "seq"), MIL_ERR_ARGUMENT);
        CHECK(says("seq: ") && says(bad[i].text));
    }
    mil_sampling most = {.temperature = 100, .top_k = 50, .top_p = 0.001f, .n_logprobs = 20};
    CHECK_INT(mil_options_check_sampling(&most, 50, "seq"), MIL_OK);
}

TEST_MAIN()
