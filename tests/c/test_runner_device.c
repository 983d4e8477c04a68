/* A runner on a device that is not the host: what is run before the first step, what is captured,
 * and what of its memory goes where. The device is this process's memory with a meter, the ops are
 * the CPU's; that real graphs replay right is a GPU's to show. */
#include "model/model.h"
#include "model/runner.h"

#include "base/memory.h"
#include "dummy_model.h"

#define MIB ((uint64_t)1 << 20)
#define N_TOTAL (1024 * MIB)
#define GRAPH_BYTES (3 * MIB)
#define KERNEL_BYTES (5 * MIB) /* taken by the first op that runs */
#define MAX_RUNS 64

enum { MAX_SEQS = 6, MAX_TOKENS = 20, PAGE = 16, PAGES_PER_SEQ = 4 };

struct mil_graph {
    int32_t unused;
};

typedef struct run {
    int32_t n_tokens, n_logit_rows;
    bool has_lora;
} run;

/* What the device was asked for since the last test began. */
static struct {
    uint64_t n_free;
    int32_t n_graphs; /* that are there */
    int32_t n_captured;
    int32_t n_launched;
    bool is_capturing;
    bool is_loaded;
    run runs[MAX_RUNS]; /* steps that have begun */
    int32_t n_runs;
} meter;

static mil_status memory(struct mil_queue *queue, mil_device_memory *memory)
{
    (void)queue;
    *memory = (mil_device_memory){"metered", meter.n_free, N_TOTAL, N_TOTAL};
    return MIL_OK;
}

static mil_status alloc(struct mil_queue *queue, mil_slab *slab, size_t n_bytes, const char *what)
{
    (void)queue;
    MIL_TRY(mil_slab_init(slab, n_bytes, what));
    meter.n_free -= slab->n_bytes;
    return MIL_OK;
}

static void give_back(struct mil_queue *queue, mil_slab *slab)
{
    (void)queue;
    CHECK(meter.n_graphs == 0); /* they point into it */
    meter.n_free += slab->n_bytes;
    mil_slab_deinit(slab);
}

static mil_status alloc_host(struct mil_queue *queue, mil_slab *slab, size_t n_bytes,
                             const char *what)
{
    (void)queue;
    return mil_slab_init(slab, n_bytes, what);
}

static void free_host(struct mil_queue *queue, mil_slab *slab)
{
    (void)queue;
    mil_slab_deinit(slab);
}

static mil_status copy(struct mil_queue *queue, void *to, const void *from, size_t n_bytes)
{
    (void)queue;
    memcpy(to, from, n_bytes);
    return MIL_OK;
}

static void close_queue(struct mil_queue *queue)
{
    (void)queue;
}

static mil_status synchronize(struct mil_queue *queue)
{
    (void)queue;
    return MIL_OK;
}

static mil_status fence(struct mil_queue *queue, int32_t index)
{
    (void)queue;
    (void)index;
    return MIL_OK;
}

static mil_status capture_begin(struct mil_queue *queue)
{
    (void)queue;
    CHECK(!meter.is_capturing);
    meter.is_capturing = true;
    return MIL_OK;
}

static mil_status capture_end(struct mil_queue *queue, struct mil_graph **out)
{
    void *graph;
    (void)queue;
    CHECK(meter.is_capturing);
    meter.is_capturing = false;
    MIL_TRY(mil_alloc_checked(&graph, 1, sizeof(struct mil_graph), "graph"));
    *out = graph;
    meter.n_graphs++;
    meter.n_captured++;
    meter.n_free -= GRAPH_BYTES;
    return MIL_OK;
}

static mil_status graph_launch(struct mil_queue *queue, struct mil_graph *graph)
{
    (void)queue;
    CHECK(graph != NULL);
    meter.n_launched++;
    return MIL_OK;
}

static void graph_free(struct mil_queue *queue, struct mil_graph *graph)
{
    (void)queue;
    if (graph == NULL)
        return;
    meter.n_graphs--;
    meter.n_free += GRAPH_BYTES;
    mil_free(graph);
}

static const mil_device DEVICE = {
    .name = "metered",
    .depth = 1,
    .close = close_queue,
    .memory = memory,
    .alloc = alloc,
    .free = give_back,
    .alloc_host = alloc_host,
    .free_host = free_host,
    .copy_in = copy,
    .copy_out = copy,
    .send_out = copy,
    .synchronize = synchronize,
    .record = fence,
    .wait = fence,
    .capture_begin = capture_begin,
    .capture_end = capture_end,
    .graph_launch = graph_launch,
    .graph_free = graph_free,
};

/* ---- a model on it ---- */

static mil_status (*cpu_begin)(mil_context *, const mil_begin_args *);

/* Steps begin outside of captures, with a copy of the plan and padding as CUDA's begin makes it. */
static mil_status begin(mil_context *context, const mil_begin_args *args)
{
    const mil_plan_header *header = args->batch->header;
    CHECK(!meter.is_capturing);
    if (meter.n_runs < MAX_RUNS)
        meter.runs[meter.n_runs++] =
            (run){header->bucket_tokens, header->bucket_logit_rows, header->bucket_segments > 0};
    if (!meter.is_loaded)
        meter.n_free -= KERNEL_BYTES;
    meter.is_loaded = true;
    memcpy((void *)(uintptr_t)args->batch->counts, args->plan, mil_plan_bytes(&header->limits));
    for (int32_t i = header->n_logit_rows; i < header->bucket_logit_rows; i++)
        args->batch->logit_rows[i] = args->batch->logit_slots[i] = args->batch->logit_feeds[i] = 0;
    return cpu_begin(context, args);
}

static int32_t rows_alike(int32_t M)
{
    return (M + 7) / 8 * 8;
}

typedef struct rig {
    mil_model *model;
    mil_backend backend;
    mil_runner_options options;
} rig;

static void rig_open(rig *r)
{
    mil_config config = dummy_config();
    memset(&meter, 0, sizeof meter);
    CHECK_INT(dummy_open(&r->model, &config, 1, 1), MIL_OK);
    r->backend = *r->model->backend;
    r->backend.device = &DEVICE;
    r->backend.rows_alike = rows_alike;
    cpu_begin = r->backend.begin;
    r->backend.begin = begin;
    r->model->backend = &r->backend;
    meter.n_free = N_TOTAL - r->model->ranks[0].slab.n_bytes;
    r->options = (mil_runner_options){
        .limits = {.max_seqs = MAX_SEQS,
                   .max_tokens = MAX_TOKENS,
                   .max_logit_rows = MAX_SEQS,
                   .max_pages_per_seq = PAGES_PER_SEQ,
                   .max_page_sets = MAX_SEQS * PAGES_PER_SEQ,
                   .max_adapter_slots = 2},
        .n_pages = 1,
        .page_size = PAGE,
        .has_graphs = true,
    };
}

static void rig_close(rig *r)
{
    mil_model_free(r->model);
    CHECK_INT(meter.n_free, N_TOTAL - (meter.is_loaded ? KERNEL_BYTES : 0)); /* kernels stay */
}

/* Sizes 1, 2, 4 and 6, each without LoRA, with it, and its choice. */
#define N_GRAPHS 12

TEST(every_size_of_step_runs_once_before_the_first_capture)
{
    const run expected[] = {{8, 6, false}, {8, 0, true},   {16, 0, false},
                            {16, 0, true}, {20, 0, false}, {20, 0, true}};
    rig r;
    mil_runner *runner;
    rig_open(&r);
    CHECK_INT(mil_runner_create(&runner, r.model, &r.options), MIL_OK);
    CHECK_INT(meter.n_runs, 6);
    for (int32_t i = 0; i < 6; i++) {
        CHECK_INT(meter.runs[i].n_tokens, expected[i].n_tokens);
        CHECK_INT(meter.runs[i].n_logit_rows, expected[i].n_logit_rows);
        CHECK_INT(meter.runs[i].has_lora, expected[i].has_lora);
    }
    CHECK_INT(meter.n_captured, N_GRAPHS);
    CHECK_INT(mil_runner_take_pages(runner, 24), MIL_OK);
    CHECK_INT(meter.n_runs, 6);
    mil_runner_free(runner);
    rig_close(&r);
}

TEST(logits_of_more_rows_than_one_size_are_run_at_each)
{
    rig r;
    mil_runner *runner;
    rig_open(&r);
    r.options.limits.max_seqs = r.options.limits.max_logit_rows = 18;
    r.options.limits.max_adapter_slots = 0;
    CHECK_INT(mil_runner_create(&runner, r.model, &r.options), MIL_OK);
    CHECK_INT(meter.n_runs, 3);
    CHECK_INT(meter.runs[0].n_logit_rows, 8);
    CHECK_INT(meter.runs[1].n_logit_rows, 16);
    CHECK_INT(meter.runs[2].n_logit_rows, 18);
    mil_runner_free(runner);
    rig_close(&r);
}

TEST(what_is_neither_pages_nor_workspace_is_measured)
{
    rig r;
    mil_runner *runner;
    mil_runner_memory taken;
    rig_open(&r);
    uint64_t before = meter.n_free;
    CHECK_INT(mil_runner_create(&runner, r.model, &r.options), MIL_OK);
    mil_runner_memory_get(runner, &taken);
    CHECK_INT(taken.graph_bytes, N_GRAPHS * GRAPH_BYTES + KERNEL_BYTES);
    CHECK_INT(before - meter.n_free, taken.graph_bytes + taken.kv_bytes + taken.workspace_bytes);
    CHECK(taken.pinned_bytes > 0);
    CHECK_INT(taken.untouched_bytes, 0);
    mil_runner_free(runner);
    rig_close(&r);
}

TEST(taking_pages_again_captures_again_and_adds_pages_alone)
{
    rig r;
    mil_runner *runner;
    mil_runner_memory one, many;
    rig_open(&r);
    CHECK_INT(mil_runner_create(&runner, r.model, &r.options), MIL_OK);
    uint64_t n_free = meter.n_free;
    mil_runner_memory_get(runner, &one);
    uint64_t capture_ns = mil_runner_capture_ns(runner);
    CHECK_INT(mil_runner_take_pages(runner, 5000), MIL_OK);
    CHECK(capture_ns > 0 && mil_runner_capture_ns(runner) > capture_ns);
    mil_runner_memory_get(runner, &many);
    CHECK_INT(meter.n_captured, 2 * N_GRAPHS);
    CHECK_INT(meter.n_graphs, N_GRAPHS);
    CHECK_INT(many.graph_bytes, one.graph_bytes);
    CHECK_INT(many.workspace_bytes, one.workspace_bytes);
    CHECK(many.kv_bytes >= 5000 * mil_runner_page_bytes(r.model, PAGE));
    CHECK_INT(n_free - meter.n_free, many.kv_bytes - one.kv_bytes);
    /* More than there are: said before anything is given back. */
    CHECK_INT(mil_runner_take_pages(runner, 1 << 20), MIL_ERR_MEMORY);
    CHECK(strstr(mil_status_message(), "metered has ") != NULL);
    mil_runner_free(runner);
    rig_close(&r);
}

TEST(without_graphs_kernels_are_loaded_all_the_same)
{
    rig r;
    mil_runner *runner;
    mil_runner_memory taken;
    rig_open(&r);
    r.options.has_graphs = false;
    CHECK_INT(mil_runner_create(&runner, r.model, &r.options), MIL_OK);
    mil_runner_memory_get(runner, &taken);
    CHECK_INT(meter.n_runs, 6);
    CHECK_INT(meter.n_captured, 0);
    CHECK_INT(mil_runner_capture_ns(runner), 0);
    CHECK_INT(taken.graph_bytes, KERNEL_BYTES);
    mil_runner_free(runner);
    rig_close(&r);
}

/* A step of new sequences of n_tokens each, with a row of logits for each. */
static run step(mil_runner *runner, int32_t n_seqs, int32_t n_tokens)
{
    mil_batch b;
    mil_plan_view(mil_runner_plan(runner), &b);
    for (int32_t s = 0; s < n_seqs; s++) {
        b.slot_sets[b.header->n_slot_sets++] =
            (mil_slot_set){s, MIL_NO_ADAPTER, {.top_p = 1.0f, .n_logprobs = -1}};
        b.page_sets[b.header->n_page_sets++] = (mil_page_set){s, 0, s};
        for (int32_t i = 0; i < n_tokens; i++) {
            b.tokens[b.header->n_tokens] = i;
            b.positions[b.header->n_tokens++] = i;
        }
        b.logit_rows[s] = b.header->n_tokens - 1;
        b.logit_slots[s] = b.seq_slot[s] = s;
        b.logit_feeds[s] = 1;
        b.kv_lengths[s] = n_tokens;
        b.query_indptr[s + 1] = b.header->n_tokens;
    }
    b.header->n_seqs = b.header->n_logit_rows = n_seqs;
    meter.n_runs = meter.n_launched = 0;
    CHECK_INT(mil_runner_enter(runner), MIL_OK);
    CHECK_INT(mil_runner_step(runner, NULL, NULL), MIL_OK);
    mil_runner_leave(runner);
    CHECK_INT(meter.n_runs, 1);
    return meter.runs[0];
}

static void check_buckets(bool has_graphs)
{
    rig r;
    mil_runner *runner;
    rig_open(&r);
    r.options.n_pages = MAX_SEQS;
    r.options.has_graphs = has_graphs;
    CHECK_INT(mil_runner_create(&runner, r.model, &r.options), MIL_OK);
    run single = step(runner, 3, 1);
    CHECK_INT(single.n_tokens, 4);
    CHECK_INT(single.n_logit_rows, 4);
    CHECK_INT(meter.n_launched, has_graphs ? 2 : 0);
    run chunks = step(runner, 3, 5);
    CHECK_INT(chunks.n_tokens, 15);
    CHECK_INT(chunks.n_logit_rows, 3);
    CHECK_INT(meter.n_launched, 0);
    mil_runner_free(runner);
    rig_close(&r);
}

TEST(a_step_has_the_shape_of_its_bucket_with_graphs_and_without)
{
    check_buckets(true);
    check_buckets(false);
}

TEST(an_allocation_that_fails_gives_all_back)
{
    rig r;
    rig_open(&r);
    meter.is_loaded = true;
    uint64_t n_free = meter.n_free -= KERNEL_BYTES;
    size_t held = mil_memory_held_bytes();
    mil_status status = MIL_ERR_MEMORY;
    for (uint64_t k = 1; status != MIL_OK; k++) {
        mil_runner *runner = NULL;
        mil_memory_fail_at(k);
        status = mil_runner_create(&runner, r.model, &r.options);
        if (status == MIL_OK)
            mil_runner_free(runner);
        mil_memory_fail_at(0);
        CHECK(status == MIL_OK || status == MIL_ERR_MEMORY);
        CHECK_INT(meter.n_graphs, 0);
        CHECK_INT(meter.n_free, n_free);
        CHECK_INT(mil_memory_held_bytes(), held);
        meter.n_runs = 0;
    }
    CHECK(meter.n_captured > N_GRAPHS);
    rig_close(&r);
}

TEST_MAIN()
