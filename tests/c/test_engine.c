/* The engine with a fake device behind model/runner.h: threads, ends, errors and memory. That real
 * models give the same through it is test_drivers.c's. */
#include "test.h"

#include "fake_runner.h"

#include <sys/wait.h>
#include <unistd.h>

#define STOP_TOKEN 7
#define MAX_REQUESTS 200

static const mil_engine_options SMALL = {.max_model_len = 64,
                                         .max_num_seqs = 4,
                                         .max_num_batched_tokens = 24,
                                         .kv_cache_bytes = 9 * 1000, /* 128 tokens: preempts */
                                         .poison = true};

typedef struct answer {
    uint64_t id;
    int32_t expected[64], n_expected, n_seen;
    mil_finish expected_finish, finish;
} answer;

typedef struct bench {
    mil_model model;
    mil_engine *engine;
    pthread_t thread;
    mil_status run_status;
    char run_message[256];
    answer answers[MAX_REQUESTS];
    int32_t n_answers;
    uint64_t random;
} bench;

static int32_t draw(bench *b, int32_t n)
{
    b->random = mil_mix64(b->random);
    return (int32_t)(b->random >> 33) % n;
}

/* depth: steps that the device queues, the running one included. */
static void open_deep_bench(bench *b, const mil_engine_options *options, int32_t depth)
{
    memset(b, 0, sizeof *b);
    b->model = FAKE_MODEL;
    b->model.depth = depth;
    for (int32_t i = 0; i < 4; i++)
        b->model.n_held[i] = 1;
    CHECK_INT(mil_engine_create(&b->engine, &b->model, options), MIL_OK);
}

static void open_bench(bench *b, const mil_engine_options *options)
{
    open_deep_bench(b, options, 1);
}

static void *run_engine(void *argument)
{
    bench *b = argument;
    b->run_status = mil_engine_run(b->engine);
    (void)snprintf(b->run_message, sizeof b->run_message, "%s", mil_status_message());
    return NULL;
}

static void start(bench *b)
{
    CHECK_INT(pthread_create(&b->thread, NULL, run_engine, b), 0);
}

/* Close, join, and see that nothing is left. */
static void close_bench(bench *b, mil_status run_status)
{
    mil_engine_close(b->engine);
    CHECK_INT(pthread_join(b->thread, NULL), 0);
    CHECK_INT(b->run_status, run_status);
    mil_engine_stats stats;
    mil_engine_stats_get(b->engine, &stats);
    CHECK_INT(stats.n_waiting + stats.n_running, 0);
    CHECK_INT(stats.n_free_pages, stats.n_pages);
    CHECK_INT(b->model.n_entered, 0);
    CHECK_INT(b->model.n_early, 0);
    mil_engine_free(b->engine);
    for (int32_t i = 0; i < 4; i++)
        CHECK_INT(b->model.n_held[i], 1);
}

static answer *submit(bench *b, int32_t n_prompt, int32_t max_tokens, int32_t adapter,
                      uint64_t seed)
{
    answer *a = &b->answers[b->n_answers++];
    int32_t prompt[64];
    for (int32_t i = 0; i < n_prompt; i++)
        prompt[i] = draw(b, FAKE_VOCAB);
    int32_t stop = seed % 2 == 0 ? STOP_TOKEN : -1;
    mil_request_options request = {
        .tokens = prompt,
        .n_tokens = n_prompt,
        .max_tokens = max_tokens,
        .stop_tokens = &stop,
        .n_stop_tokens = stop >= 0,
        .adapter = adapter,
        .sampling = {.top_p = 1.0f, .n_logprobs = -1, .seed = seed},
    };
    int32_t max_new = max_tokens > 0 ? max_tokens : 64 - n_prompt;
    a->n_expected = fake_answer(prompt, n_prompt, max_new, adapter, seed, stop, FAKE_VOCAB,
                                a->expected, &a->expected_finish);
    CHECK_INT(mil_engine_submit(b->engine, &request, &a->id), MIL_OK);
    CHECK(a->id > 0);
    return a;
}

/* One that runs until it is stopped, as good as. */
static answer *submit_long(bench *b)
{
    return submit(b, 2, 0, MIL_NO_ADAPTER, 1);
}

static void receive(bench *b, const mil_event *event)
{
    for (int32_t i = 0; i < b->n_answers; i++) {
        answer *a = &b->answers[i];
        if (a->id != event->id)
            continue;
        CHECK_INT(a->finish, MIL_FINISH_NONE);
        if (event->has_sample) {
            CHECK(a->n_seen < a->n_expected);
            CHECK_INT(event->sample.token, a->expected[a->n_seen]);
            a->n_seen++;
        }
        a->finish = event->finish;
        return;
    }
    CHECK(!"an event for an unknown id");
}

static bool are_all_finished(const bench *b)
{
    for (int32_t i = 0; i < b->n_answers; i++)
        if (b->answers[i].finish == MIL_FINISH_NONE)
            return false;
    return true;
}

static void receive_all(bench *b)
{
    mil_event events[8];
    while (!are_all_finished(b)) {
        int32_t n;
        CHECK_INT(mil_engine_poll(b->engine, events, 8, -1, &n), MIL_OK);
        CHECK(n > 0);
        for (int32_t i = 0; i < n; i++)
            receive(b, &events[i]);
    }
}

static void check_answers(const bench *b)
{
    for (int32_t i = 0; i < b->n_answers; i++) {
        CHECK_INT(b->answers[i].finish, b->answers[i].expected_finish);
        CHECK_INT(b->answers[i].n_seen, b->answers[i].n_expected);
    }
}

/* ---- answers ---- */

static void run_traffic(int32_t depth)
{
    static bench b;
    open_deep_bench(&b, &SMALL, depth);
    start(&b);
    for (int32_t i = 0; i < 120; i++) {
        int32_t n_prompt = 1 + draw(&b, 50);
        int32_t max_tokens = draw(&b, 65 - n_prompt);
        (void)submit(&b, n_prompt, max_tokens, draw(&b, 5) - 1, (uint64_t)draw(&b, 1000));
    }
    receive_all(&b);
    check_answers(&b);
    mil_engine_stats stats;
    mil_engine_stats_get(b.engine, &stats);
    CHECK(stats.n_preemptions > 0 && stats.n_steps > 0 && stats.n_generated_tokens > 500);
    CHECK(stats.fill_ns > 0 && stats.submit_ns > stats.wait_ns && stats.retire_ns > 0);
    close_bench(&b, MIL_OK);
}

TEST(each_request_gets_its_own_answer_whatever_runs_beside_it)
{
    run_traffic(1);
}

TEST(the_answers_are_the_same_where_a_step_is_queued_behind_the_running_one)
{
    run_traffic(2);
}

static void count_pieces_of_one(void *context, mil_plan *plan)
{
    int32_t *n = context;
    mil_batch batch;
    mil_plan_view(plan, &batch);
    for (int32_t s = batch.header->n_decode; s < batch.header->n_seqs; s++)
        *n += batch.query_indptr[s + 1] - batch.query_indptr[s] == 1 && batch.kv_lengths[s] > 1;
}

/* How often steps of four tokens have one of a longer prompt. */
static int32_t pieces_of_one(bool is_device, bool is_deterministic)
{
    static bench b;
    int32_t n = 0;
    mil_engine_options options = SMALL;
    options.max_num_batched_tokens = 4;
    options.deterministic = is_deterministic;
    open_bench(&b, &options);
    mil_engine_free(b.engine);
    b.model.memory.is_device = is_device;
    b.model.on_step = count_pieces_of_one;
    b.model.context = &n;
    CHECK_INT(mil_engine_create(&b.engine, &b.model, &options), MIL_OK);
    for (int32_t i = 0; i < 20; i++)
        (void)submit(&b, 1 + draw(&b, 20), 30, MIL_NO_ADAPTER, 1);
    start(&b);
    receive_all(&b);
    check_answers(&b);
    close_bench(&b, MIL_OK);
    return n;
}

TEST(deterministic_leaves_a_device_no_piece_of_one_token)
{
    CHECK_INT(pieces_of_one(true, true), 0);
    CHECK(pieces_of_one(true, false) > 20);
    CHECK(pieces_of_one(false, true) > 20); /* whose bits are the same either way */
}

TEST(a_slow_poller_loses_nothing)
{
    static bench b;
    mil_engine_options options = SMALL;
    options.max_num_seqs = 1; /* a short queue of events */
    open_bench(&b, &options);
    for (int32_t i = 0; i < 60; i++)
        (void)submit(&b, 2, 60, MIL_NO_ADAPTER, 1);
    start(&b);
    mil_engine_stats stats;
    do
        mil_engine_stats_get(b.engine, &stats);
    while (stats.n_generated_tokens < 60 * 60);
    receive_all(&b);
    check_answers(&b);
    close_bench(&b, MIL_OK);
}

TEST(logits_that_are_not_finite_end_their_request_alone)
{
    static bench b;
    open_bench(&b, &SMALL);
    start(&b);
    int32_t n_errors = 0;
    for (int32_t i = 0; i < 40; i++)
        (void)submit(&b, 3, 40, MIL_NO_ADAPTER, i % 2 == 0 ? FAKE_NAN_SEED : 1);
    receive_all(&b);
    check_answers(&b);
    for (int32_t i = 0; i < 40; i++)
        n_errors += b.answers[i].finish == MIL_FINISH_NUMERICS;
    CHECK(n_errors > 5 && n_errors <= 20);
    close_bench(&b, MIL_OK);
}

/* ---- ends ---- */

TEST(a_cancelled_request_ends_and_the_others_go_on)
{
    static bench b;
    open_bench(&b, &SMALL);
    start(&b);
    answer *doomed = submit_long(&b);
    for (int32_t i = 0; i < 10; i++)
        (void)submit(&b, 5, 20, i % 4, 1);
    mil_engine_cancel(b.engine, doomed->id);
    mil_engine_cancel(b.engine, doomed->id);
    mil_engine_cancel(b.engine, 123456);
    receive_all(&b);
    /* It may have ended by itself before. */
    if (doomed->finish == MIL_FINISH_CANCELLED)
        doomed->n_expected = doomed->n_seen;
    doomed->expected_finish = doomed->finish;
    check_answers(&b);
    mil_engine_cancel(b.engine, doomed->id);
    close_bench(&b, MIL_OK);
}

TEST(a_request_is_cancelled_while_it_still_waits)
{
    static bench b;
    open_bench(&b, &SMALL);
    answer *a = submit_long(&b);
    mil_engine_cancel(b.engine, a->id);
    start(&b);
    receive_all(&b);
    CHECK_INT(a->finish, MIL_FINISH_CANCELLED);
    CHECK_INT(a->n_seen, 0);
    close_bench(&b, MIL_OK);
}

TEST(closing_cancels_what_is_open_and_then_all_calls_say_closed)
{
    static bench b;
    open_bench(&b, &SMALL);
    for (int32_t i = 0; i < 12; i++)
        (void)submit_long(&b);
    mil_engine_close(b.engine); /* before it runs */
    mil_engine_close(b.engine);
    start(&b);
    receive_all(&b);
    for (int32_t i = 0; i < 12; i++)
        CHECK_INT(b.answers[i].finish, MIL_FINISH_CANCELLED);
    mil_event event;
    int32_t n;
    uint64_t id;
    int32_t token = 1;
    mil_request_options request = {.tokens = &token,
                                   .n_tokens = 1,
                                   .adapter = 0,
                                   .sampling = {.top_p = 1.0f, .n_logprobs = -1}};
    CHECK_INT(mil_engine_poll(b.engine, &event, 1, -1, &n), MIL_ERR_CLOSED);
    CHECK_INT(mil_engine_submit(b.engine, &request, &id), MIL_ERR_CLOSED);
    close_bench(&b, MIL_OK);
}

static void close_while_busy(int32_t depth)
{
    static bench b;
    open_deep_bench(&b, &SMALL, depth);
    for (int32_t i = 0; i < MAX_REQUESTS; i++)
        (void)submit_long(&b);
    start(&b);
    mil_event event;
    int32_t n;
    CHECK_INT(mil_engine_poll(b.engine, &event, 1, -1, &n), MIL_OK);
    receive(&b, &event);
    mil_engine_close(b.engine);
    receive_all(&b);
    CHECK_INT(b.answers[MAX_REQUESTS - 1].finish, MIL_FINISH_CANCELLED);
    close_bench(&b, MIL_OK);
}

TEST(closing_stops_a_busy_loop)
{
    close_while_busy(1);
}

/* A close once gave pages and adapters back while the device still ran the last two steps. */
TEST(closing_waits_for_the_steps_in_flight)
{
    for (int32_t i = 0; i < 20; i++)
        close_while_busy(2);
}

TEST(a_failing_device_ends_every_request_and_the_engine)
{
    static bench b;
    open_deep_bench(&b, &SMALL, 2);
    b.model.fail_at = 9;
    for (int32_t i = 0; i < 10; i++)
        (void)submit(&b, 3, 61, i % 4, 1);
    start(&b);
    receive_all(&b);
    for (int32_t i = 0; i < 10; i++)
        CHECK_INT(b.answers[i].finish, MIL_FINISH_ERROR);
    uint64_t id;
    int32_t token = 1;
    mil_request_options request = {.tokens = &token,
                                   .n_tokens = 1,
                                   .adapter = MIL_NO_ADAPTER,
                                   .sampling = {.top_p = 1.0f, .n_logprobs = -1}};
    CHECK_INT(mil_engine_submit(b.engine, &request, &id), MIL_ERR_CLOSED);
    CHECK(strstr(mil_status_message(), "dead: fake device: step 9 caught fire") != NULL);
    CHECK_INT(mil_engine_run(b.engine), MIL_ERR_CLOSED);
    close_bench(&b, MIL_ERR_DEVICE);
    CHECK(strstr(b.run_message, "step 9 caught fire") != NULL);
}

/* ---- threads ---- */

TEST(only_one_thread_runs_an_engine)
{
    static bench b;
    open_bench(&b, &SMALL);
    start(&b);
    (void)submit(&b, 2, 1, MIL_NO_ADAPTER, 1);
    receive_all(&b); /* so that the other thread is in the loop */
    CHECK_INT(mil_engine_run(b.engine), MIL_ERR_BUSY);
    close_bench(&b, MIL_OK);
}

TEST(an_idle_engine_lets_go_of_the_model)
{
    static bench b;
    open_bench(&b, &SMALL);
    start(&b);
    for (int32_t i = 0; i < 20; i++) {
        (void)submit(&b, 2, 3, MIL_NO_ADAPTER, 1);
        receive_all(&b);
    }
    while (b.model.n_entered > 0)
        sched_yield();
    close_bench(&b, MIL_OK);
}

TEST(requests_that_ended_leave_no_memory_behind)
{
    static bench b;
    open_bench(&b, &SMALL);
    start(&b);
    size_t held = mil_memory_held_bytes();
    for (int32_t i = 0; i < 1500; i++) {
        b.n_answers = 0;
        memset(b.answers, 0, sizeof b.answers[0]);
        (void)submit(&b, 2, 1, i % 4, 1);
        receive_all(&b);
    }
    mil_engine_close(b.engine);
    while (mil_engine_poll(b.engine, &(mil_event){0}, 1, -1, &(int32_t){0}) != MIL_ERR_CLOSED) {
    }
    CHECK_INT(mil_memory_held_bytes(), held);
    close_bench(&b, MIL_OK);
}

typedef struct submitter {
    bench *b;
    uint64_t ids[50];
    int32_t n_failed;
} submitter;

static void *submit_many(void *argument)
{
    submitter *s = argument;
    const int32_t prompt[3] = {1, 2, 3};
    mil_request_options request = {.tokens = prompt,
                                   .n_tokens = 3,
                                   .max_tokens = 5,
                                   .adapter = 2,
                                   .sampling = {.top_p = 1.0f, .n_logprobs = -1, .seed = 1}};
    for (int32_t i = 0; i < 50; i++) {
        s->n_failed += mil_engine_submit(s->b->engine, &request, &s->ids[i]) != MIL_OK;
        if (i % 5 == 0)
            mil_engine_cancel(s->b->engine, s->ids[i]);
    }
    return NULL;
}

TEST(many_threads_submit_and_cancel_at_once)
{
    static bench b;
    static submitter submitters[3];
    open_bench(&b, &SMALL);
    start(&b);
    pthread_t threads[3];
    for (int32_t i = 0; i < 3; i++) {
        submitters[i] = (submitter){.b = &b};
        CHECK_INT(pthread_create(&threads[i], NULL, submit_many, &submitters[i]), 0);
    }
    int32_t n_ended = 0;
    bool has_ended[151] = {false};
    while (n_ended < 150) {
        mil_event events[16];
        int32_t n;
        CHECK_INT(mil_engine_poll(b.engine, events, 16, -1, &n), MIL_OK);
        for (int32_t i = 0; i < n; i++) {
            CHECK(events[i].id >= 1 && events[i].id <= 150 && !has_ended[events[i].id]);
            has_ended[events[i].id] = events[i].finish != MIL_FINISH_NONE;
            n_ended += has_ended[events[i].id];
        }
    }
    for (int32_t i = 0; i < 3; i++) {
        CHECK_INT(pthread_join(threads[i], NULL), 0);
        CHECK_INT(submitters[i].n_failed, 0);
    }
    close_bench(&b, MIL_OK);
}

TEST(a_poll_with_nothing_to_say_comes_back_empty)
{
    static bench b;
    open_bench(&b, &SMALL);
    mil_event event;
    int32_t n = 5;
    CHECK_INT(mil_engine_poll(b.engine, &event, 1, 0, &n), MIL_OK);
    CHECK_INT(n, 0);
    CHECK_INT(mil_engine_poll(b.engine, &event, 1, 2, &n), MIL_OK);
    CHECK_INT(n, 0);
    CHECK_INT(mil_engine_poll(b.engine, &event, 0, 0, &n), MIL_ERR_ARGUMENT);
    start(&b);
    close_bench(&b, MIL_OK);
}

TEST(a_forked_child_is_told_whose_engine_it_is)
{
    static bench b;
    open_bench(&b, &SMALL);
    start(&b);
    (void)fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        mil_event event;
        int32_t n;
        bool is_told = mil_engine_poll(b.engine, &event, 1, -1, &n) == MIL_ERR_DEVICE &&
                       strstr(mil_status_message(), "belongs to process") != NULL;
        is_told = is_told && mil_engine_run(b.engine) == MIL_ERR_DEVICE;
        mil_engine_close(b.engine);
        mil_engine_free(b.engine);
        _exit(is_told ? 0 : 1);
    }
    int status = 0;
    CHECK_INT(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    close_bench(&b, MIL_OK);
}

/* ---- bad input and memory ---- */

TEST(a_bad_request_is_refused_and_costs_nothing)
{
    static bench b;
    open_bench(&b, &SMALL);
    int32_t prompt[70] = {0};
    mil_request_options good = {.tokens = prompt,
                                .n_tokens = 3,
                                .adapter = MIL_NO_ADAPTER,
                                .sampling = {.top_p = 1.0f, .n_logprobs = -1}};
    mil_request_options bad[5] = {good, good, good, good, good};
    bad[0].n_tokens = 0;
    bad[1].n_tokens = 64;
    bad[2].adapter = 9; /* not held */
    bad[3].sampling.top_p = 0.0f;
    bad[4].max_tokens = 62;
    size_t held = mil_memory_held_bytes();
    for (int32_t i = 0; i < 5; i++) {
        uint64_t id = 0;
        mil_status expected = i == 2 ? MIL_ERR_NOT_FOUND : MIL_ERR_ARGUMENT;
        CHECK_INT(mil_engine_submit(b.engine, &bad[i], &id), expected);
        CHECK_INT(id, 0);
    }
    CHECK_INT(mil_memory_held_bytes(), held);
    start(&b);
    (void)submit(&b, 3, 5, 1, 1);
    receive_all(&b);
    check_answers(&b);
    close_bench(&b, MIL_OK);
}

TEST(a_hundred_steps_allocate_nothing)
{
    static bench b;
    mil_engine_options options = SMALL;
    options.max_model_len = 96;
    options.kv_cache_bytes = 30 * 1000;
    options.poison = false;
    open_bench(&b, &options);
    b.model.config.max_position = 200;
    mil_engine_free(b.engine);
    options.max_model_len = 150;
    options.kv_cache_bytes = 50 * 1000;
    CHECK_INT(mil_engine_create(&b.engine, &b.model, &options), MIL_OK);
    b.model.count_from = 10;
    b.model.count_to = 110;
    b.model.calls_between = 99;
    const int32_t prompt[2] = {1, 2};
    mil_request_options request = {.tokens = prompt,
                                   .n_tokens = 2,
                                   .adapter = 1,
                                   .sampling = {.top_p = 1.0f, .n_logprobs = -1, .seed = 1}};
    uint64_t id;
    for (int32_t i = 0; i < 4; i++)
        CHECK_INT(mil_engine_submit(b.engine, &request, &id), MIL_OK);
    start(&b);
    for (int32_t n_ended = 0; n_ended < 4;) {
        mil_event events[16];
        int32_t n;
        CHECK_INT(mil_engine_poll(b.engine, events, 16, -1, &n), MIL_OK);
        for (int32_t i = 0; i < n; i++)
            n_ended += events[i].finish != MIL_FINISH_NONE;
    }
    CHECK_INT(b.model.calls_between, 0);
    close_bench(&b, MIL_OK);
}

/* ---- a device's memory ---- */

#define MIB ((uint64_t)1 << 20)

/* 1 GiB, 124 MiB of it in use, pages of 1 MiB. */
static mil_model device_model(void)
{
    mil_model model = FAKE_MODEL;
    model.page_bytes = 1 * MIB;
    model.graph_bytes = 50 * MIB;
    model.memory = (mil_model_memory){.device = "fake",
                                      .is_device = true,
                                      .n_free = 900 * MIB,
                                      .n_total = 1024 * MIB,
                                      .weight_bytes = 100 * MIB,
                                      .adapter_bytes = 3 * MIB,
                                      .library_bytes = 7 * MIB};
    return model;
}

static uint64_t sum_of_rows(const mil_memory_report *report)
{
    return report->weight_bytes + report->kv_bytes + report->adapter_bytes +
           report->workspace_bytes + report->graph_bytes + report->other_bytes + report->free_bytes;
}

TEST(on_a_device_pages_take_what_all_else_leaves_of_the_share)
{
    static mil_model model;
    model = device_model();
    const mil_engine_options options = {
        .gpu_memory_utilization = 0.5, .page_size = 16, .max_num_seqs = 200};
    mil_engine *engine;
    mil_memory_report report;
    CHECK_INT(mil_engine_create(&engine, &model, &options), MIL_OK);
    uint64_t in_use = model.memory.n_total - model.memory.n_free;
    /* One page less for the one that was there while it was measured, and 2 MiB for rounding. */
    CHECK(in_use <= 512 * MIB && in_use > 508 * MIB);
    CHECK_INT(mil_engine_memory_get(engine, &report), MIL_OK);
    CHECK_INT(sum_of_rows(&report), report.total_bytes);
    CHECK_INT(report.total_bytes, 1024 * MIB);
    CHECK_INT(report.free_bytes, model.memory.n_free);
    CHECK_INT(report.weight_bytes, 100 * MIB);
    CHECK_INT(report.adapter_bytes, 3 * MIB);
    CHECK_INT(report.graph_bytes, 57 * MIB);
    CHECK_INT(report.other_bytes, 14 * MIB);
    CHECK_INT(report.kv_bytes, in_use - 174 * MIB - report.workspace_bytes);
    mil_engine_free(engine);
    CHECK_INT(model.memory.n_free, 900 * MIB);
}

TEST(kv_bytes_that_were_given_overrule_the_share)
{
    static mil_model model;
    model = device_model();
    const mil_engine_options options = {
        .gpu_memory_utilization = 0.1, .page_size = 16, .kv_cache_bytes = 700 * MIB};
    mil_engine *engine;
    mil_memory_report report;
    CHECK_INT(mil_engine_create(&engine, &model, &options), MIL_OK);
    CHECK_INT(mil_engine_memory_get(engine, &report), MIL_OK);
    CHECK_INT(report.kv_bytes, 700 * MIB);
    mil_engine_free(engine);
}

TEST(an_engine_that_does_not_fit_says_by_how_much_and_holds_nothing)
{
    static mil_model model;
    model = device_model();
    mil_engine_options options = {.gpu_memory_utilization = 0.1, .page_size = 16};
    size_t held = mil_memory_held_bytes();
    mil_engine *engine;
    CHECK_INT(mil_engine_create(&engine, &model, &options), MIL_ERR_MEMORY);
    CHECK(strstr(mil_status_message(), "at least 2.00 MiB, 0 bytes are left") != NULL);
    CHECK(strstr(mil_status_message(),
                 "2.00 MiB too few (gpu_memory_utilization 0.1 of the 1.00 "
                 "GiB of fake is 102.40 MiB; weights take 100.00 MiB") != NULL);
    /* What only the measuring shows. */
    options.gpu_memory_utilization = 0.16;
    CHECK_INT(mil_engine_create(&engine, &model, &options), MIL_ERR_MEMORY);
    options.gpu_memory_utilization = 0.1785;
    options.max_model_len = 96;
    CHECK_INT(mil_engine_create(&engine, &model, &options), MIL_ERR_MEMORY);
    CHECK(strstr(mil_status_message(), "max_model_len is 96, expected at most 80: it needs 7.00 "
                                       "MiB of KV pages, 6.00 MiB are left") != NULL);
    CHECK_INT(model.memory.n_free, 900 * MIB);
    CHECK_INT(mil_memory_held_bytes(), held);
}

TEST(a_failed_allocation_at_create_is_an_error_and_holds_nothing)
{
    static mil_model model;
    model = FAKE_MODEL;
    size_t held = mil_memory_held_bytes();
    mil_status status = MIL_ERR_MEMORY;
    uint64_t k = 1;
    for (; status != MIL_OK; k++) {
        mil_engine *engine = NULL;
        mil_memory_fail_at(k);
        status = mil_engine_create(&engine, &model, &SMALL);
        mil_memory_fail_at(0);
        CHECK(status == MIL_OK || status == MIL_ERR_MEMORY);
        mil_engine_free(engine);
        CHECK_INT(mil_memory_held_bytes(), held);
    }
    CHECK(k > 15);
}

TEST(a_failed_allocation_at_submit_costs_that_request_only)
{
    static bench b;
    open_bench(&b, &SMALL);
    size_t held = mil_memory_held_bytes();
    const int32_t prompt[2] = {1, 2};
    mil_request_options request = {.tokens = prompt,
                                   .n_tokens = 2,
                                   .adapter = 3,
                                   .sampling = {.top_p = 1.0f, .n_logprobs = -1, .seed = 1}};
    uint64_t id;
    mil_memory_fail_at(1);
    CHECK_INT(mil_engine_submit(b.engine, &request, &id), MIL_ERR_MEMORY);
    mil_memory_fail_at(0);
    CHECK_INT(mil_memory_held_bytes(), held);
    CHECK_INT(b.model.n_held[3], 1);
    start(&b);
    (void)submit(&b, 2, 9, 3, 1);
    receive_all(&b);
    check_answers(&b);
    close_bench(&b, MIL_OK);
}

TEST(with_no_memory_for_events_the_loop_waits_for_a_poll)
{
    static bench b;
    mil_engine_options options = SMALL;
    options.max_num_seqs = 1; /* a short queue of events */
    open_bench(&b, &options);
    for (int32_t i = 0; i < 40; i++)
        (void)submit(&b, 2, 60, MIL_NO_ADAPTER, 1);
    uint64_t before = mil_memory_calls();
    mil_memory_fail_at(1);
    start(&b);
    while (mil_memory_calls() == before)
        sched_yield();
    mil_memory_fail_at(0);
    receive_all(&b);
    check_answers(&b);
    close_bench(&b, MIL_OK);
}

TEST_MAIN()
