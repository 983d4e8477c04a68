/* Both drivers over a real, tiny model: what the engine gives a request among others, short of
 * pages and preempted, is what the stepper gives it alone, to the last bit. */
#include "base/memory.h"
#include "dummy_model.h"

#include "base/hash.h"

#include <pthread.h>
#include <stdlib.h>

enum { N_REQUESTS = 16, N_ADAPTERS = 3, MAX_PROMPT = 60, MAX_NEW = 110 };

typedef struct request {
    int32_t prompt[MAX_PROMPT], n_prompt, max_tokens, adapter; /* index of adapters, or -1 */
    mil_sampling sampling;
    mil_sample samples[MAX_NEW], seen[MAX_NEW];
    int32_t n_seen;
    uint64_t id;
} request;

static int32_t adapters[N_ADAPTERS];
static request requests[N_REQUESTS];

static void draw_requests(void)
{
    uint64_t random = 42;
    for (int32_t i = 0; i < N_REQUESTS; i++) {
        request *r = &requests[i];
        memset(r, 0, sizeof *r);
        r->n_prompt = 1 + (int32_t)((random = mil_mix64(random)) % MAX_PROMPT);
        r->max_tokens = 20 + (int32_t)((random = mil_mix64(random)) % (MAX_NEW - 20));
        r->adapter = i % (N_ADAPTERS + 1) - 1;
        r->sampling = (mil_sampling){.temperature = i % 3 == 0 ? 0.0f : 0.9f,
                                     .top_k = i % 5 == 0 ? 40 : 0,
                                     .top_p = i % 2 == 0 ? 1.0f : 0.95f,
                                     .n_logprobs = 2,
                                     .seed = random};
        for (int32_t t = 0; t < r->n_prompt; t++)
            r->prompt[t] = (int32_t)((random = mil_mix64(random)) % 301);
    }
}

static int32_t content_of(const request *r)
{
    return r->adapter < 0 ? MIL_NO_ADAPTER : adapters[r->adapter];
}

static void open_model(mil_model **model, int32_t world)
{
    mil_config config = dummy_config();
    CHECK_INT(dummy_open(model, &config, world, world), MIL_OK);
    for (int32_t i = 0; i < N_ADAPTERS; i++)
        CHECK_INT(dummy_add_adapter(*model, &config, 4 << i, (uint64_t)i + 1, &adapters[i]),
                  MIL_OK);
}

/* The oracle: each request alone, its prompt in one piece, through the other driver. */
static void answer_alone(mil_model *model)
{
    const mil_stepper_options options = {
        .n_pages = 16, .page_size = 16, .max_seqs = 1, .max_tokens = 200, .max_pages_per_seq = 16};
    const int32_t pages[16] = {3, 0, 15, 1, 14, 2, 13, 4, 12, 5, 11, 6, 10, 7, 9, 8};
    mil_stepper *stepper;
    CHECK_INT(mil_stepper_create(&stepper, model, &options), MIL_OK);
    for (int32_t i = 0; i < N_REQUESTS; i++) {
        request *r = &requests[i];
        mil_seq *seq;
        CHECK_INT(mil_seq_create(&seq, stepper, &r->sampling, content_of(r)), MIL_OK);
        mil_step_item item = {.seq = seq,
                              .tokens = r->prompt,
                              .n_tokens = r->n_prompt,
                              .pages = pages,
                              .n_pages = 16};
        for (int32_t n = 0; n < r->max_tokens; n++) {
            CHECK_INT(mil_stepper_step(stepper, &item, 1, &r->samples[n], NULL), MIL_OK);
            item.tokens = NULL;
            item.n_past += item.n_tokens;
            item.n_tokens = 1;
        }
        mil_seq_free(seq);
    }
    mil_stepper_free(stepper);
}

static void *run_engine(void *engine)
{
    return mil_engine_run(engine) == MIL_OK ? engine : NULL;
}

static void submit_all(mil_engine *engine)
{
    for (int32_t i = 0; i < N_REQUESTS; i++) {
        request *r = &requests[i];
        const mil_request_options options = {.tokens = r->prompt,
                                             .n_tokens = r->n_prompt,
                                             .max_tokens = r->max_tokens,
                                             .adapter = content_of(r),
                                             .sampling = r->sampling};
        CHECK_INT(mil_engine_submit(engine, &options, &r->id), MIL_OK);
    }
}

static void receive_all(mil_engine *engine)
{
    for (int32_t n_ended = 0; n_ended < N_REQUESTS;) {
        mil_event events[32];
        int32_t n;
        CHECK_INT(mil_engine_poll(engine, events, 32, -1, &n), MIL_OK);
        for (int32_t i = 0; i < n; i++) {
            request *r = &requests[events[i].id - requests[0].id];
            CHECK(events[i].has_sample && r->n_seen < r->max_tokens);
            r->seen[r->n_seen++] = events[i].sample;
            n_ended += events[i].finish == MIL_FINISH_LENGTH;
        }
    }
}

static void check_same_samples(const mil_sample *found, const mil_sample *expected)
{
    CHECK_INT(found->token, expected->token);
    CHECK_INT(found->rank, expected->rank);
    CHECK_INT(found->n_top, expected->n_top);
    CHECK(memcmp(&found->logprob, &expected->logprob, sizeof found->logprob) == 0);
    CHECK(memcmp(found->top, expected->top, (size_t)found->n_top * sizeof *found->top) == 0);
}

static void check_engine(mil_model *model, const mil_engine_options *options)
{
    mil_engine *engine;
    pthread_t thread;
    CHECK_INT(mil_engine_create(&engine, model, options), MIL_OK);
    for (int32_t i = 0; i < N_REQUESTS; i++)
        requests[i].n_seen = 0;
    submit_all(engine);
    CHECK_INT(pthread_create(&thread, NULL, run_engine, engine), 0);
    receive_all(engine);
    for (int32_t i = 0; i < N_REQUESTS; i++) {
        CHECK_INT(requests[i].n_seen, requests[i].max_tokens);
        for (int32_t n = 0; n < requests[i].max_tokens; n++)
            check_same_samples(&requests[i].seen[n], &requests[i].samples[n]);
    }
    void *result;
    mil_engine_close(engine);
    CHECK_INT(pthread_join(thread, &result), 0);
    CHECK(result != NULL);
    mil_engine_stats stats;
    mil_engine_stats_get(engine, &stats);
    CHECK_INT(stats.n_free_pages, stats.n_pages);
    if (options->kv_cache_bytes > 0)
        CHECK(stats.n_preemptions > 0);
    mil_engine_free(engine);
}

static void check_world(int32_t world)
{
    size_t held = mil_memory_held_bytes();
    mil_model *model;
    open_model(&model, world);
    draw_requests();
    answer_alone(model);
    mil_model_report report;
    mil_model_report_get(model, &report);
    const size_t page_bytes =
        3 * 2 * 2 * 16 * 32 * 2; /* layers, K and V, kv heads, rows, D, bf16 */
    const mil_engine_options tight = {.max_model_len = 192,
                                      .max_num_seqs = 8,
                                      .max_num_batched_tokens = 24,
                                      .kv_cache_bytes = 17 * page_bytes,
                                      .poison = true};
    const mil_engine_options roomy = {.max_num_seqs = 32, .page_size = 64, .poison = true};
    check_engine(model, &tight);
    if (world == 1)
        check_engine(model, &roomy);
    for (int32_t i = 0; i < N_ADAPTERS; i++)
        CHECK_INT(mil_model_release_adapter(model, adapters[i]), MIL_OK);
    mil_model_report_get(model, &report);
    CHECK_INT(report.n_adapters, 0);
    mil_model_free(model);
    CHECK_INT(mil_memory_held_bytes(), held);
}

TEST(the_engine_gives_each_request_what_the_stepper_gives_it_alone)
{
    check_world(1);
}

TEST(the_engine_gives_the_same_as_the_stepper_over_two_ranks)
{
    check_world(2);
}

TEST(an_adapter_outlives_its_release_while_a_request_uses_it)
{
    mil_model *model;
    open_model(&model, 1);
    draw_requests();
    answer_alone(model);
    mil_engine *engine;
    const mil_engine_options options = {.max_num_seqs = 4};
    CHECK_INT(mil_engine_create(&engine, model, &options), MIL_OK);
    submit_all(engine);
    for (int32_t i = 0; i < N_ADAPTERS; i++)
        CHECK_INT(mil_model_release_adapter(model, adapters[i]), MIL_OK);
    pthread_t thread;
    CHECK_INT(pthread_create(&thread, NULL, run_engine, engine), 0);
    receive_all(engine);
    for (int32_t i = 0; i < N_REQUESTS; i++)
        check_same_samples(&requests[i].seen[0], &requests[i].samples[0]);
    mil_engine_close(engine);
    CHECK_INT(pthread_join(thread, NULL), 0);
    mil_model_report report;
    mil_model_report_get(model, &report);
    CHECK_INT(report.n_adapters, 0);
    CHECK_INT(report.adapter_bytes, 0);
    mil_engine_free(engine);
    mil_model_free(model);
}

TEST(a_failed_allocation_costs_nothing_but_the_call)
{
    mil_model *model;
    open_model(&model, 1);
    const mil_engine_options options = {.max_num_seqs = 2, .kv_cache_bytes = 1 << 20};
    size_t held = mil_memory_held_bytes();
    mil_status status = MIL_ERR_MEMORY;
    for (uint64_t k = 1; status != MIL_OK; k++) {
        mil_engine *engine = NULL;
        mil_memory_fail_at(k);
        status = mil_engine_create(&engine, model, &options);
        mil_memory_fail_at(0);
        CHECK(status == MIL_OK || status == MIL_ERR_MEMORY);
        mil_engine_free(engine);
        CHECK_INT(mil_memory_held_bytes(), held);
    }
    mil_model_free(model);
}

TEST_MAIN()
