/* One driver's state on every rank of a model, and the step over it: commands, forward, sample.
 *
 * Ranks read the one plan in place: they are threads of this process. Every rank samples the same
 * token from the same logits, so nothing is sent back between steps; rank 0 alone writes results
 * out. All memory is taken at create: a step allocates nothing. */
#include "model/runner.h"

#include "base/machine.h"
#include "model/model.h"

#include <stdlib.h>
#include <string.h>

/* Plans in flight. One is enough where a step has ended when mil_runner_step returns. */
#define RING_DEPTH 1
#define MAX_PAGE_SIZE 256
#define NAN_BF16 0x7fc0u

typedef struct runner_rank {
    mil_slab slab;    /* workspace: all that place_rank deals out */
    mil_slab kv_slab; /* K of every layer, then V */
    mil_context context;
    mil_activations activations;
    mil_slots slots;
    mil_lora_table lora;
    int32_t *padded_ranks; /* [max_adapter_slots] largest of what lies in that slot of lora */
    mil_sample *samples;   /* [MIL_LOGIT_BLOCK] of ranks whose samples nobody reads */
    mil_kv kv;
} runner_rank;

struct mil_runner {
    mil_model *model;
    mil_runner_options options;
    runner_rank *ranks; /* [world] */
    mil_plan *plans[RING_DEPTH];
    uint64_t n_plans;             /* given out */
    const mil_content **contents; /* [max_adapter_slots] that the plan's adapter sets name */
    int32_t *sample_positions;    /* [max_logit_rows] */
    bool is_checked;
    bool is_entered;
    bool is_dead;
    mil_thread_state thread_state;
    /* The step that runs. */
    mil_batch batch;
    mil_sample *samples;
    float *logits;
};

/* ---- sizes ---- */

static mil_maxima maxima_of(const mil_model *model, int32_t rank, const mil_plan_limits *limits)
{
    const mil_config *config = &model->config;
    const mil_shard *shard = &model->ranks[rank].shard;
    int64_t longest = (int64_t)limits->max_pages_per_seq * MAX_PAGE_SIZE;
    return (mil_maxima){
        .max_tokens = limits->max_tokens,
        .max_seqs = limits->max_seqs,
        .max_logit_rows =
            limits->max_logit_rows < MIL_LOGIT_BLOCK ? limits->max_logit_rows : MIL_LOGIT_BLOCK,
        .max_position = longest < config->max_position ? (int32_t)longest : config->max_position,
        .hidden = config->hidden,
        .ffn = shard->ffn,
        .vocab = config->vocab,
        .n_heads = shard->n_heads,
        .n_kv_heads = shard->n_kv_heads,
        .head_dim = config->head_dim,
        .n_threads = mil_pool_n_threads(model->pools[rank]),
    };
}

static void place_slots(mil_slots *slots, mil_arena *arena, const mil_plan_limits *limits)
{
    size_t n_slots = (size_t)limits->max_seqs;
    slots->n_slots = limits->max_seqs;
    slots->max_pages = limits->max_pages_per_seq;
    slots->last_token = mil_arena_take(arena, n_slots, sizeof(int32_t));
    slots->adapter_slot = mil_arena_take(arena, n_slots, sizeof(int32_t));
    slots->sampling = mil_arena_take(arena, n_slots, sizeof(mil_sampling));
    slots->page_table =
        mil_arena_take(arena, n_slots * (size_t)limits->max_pages_per_seq, sizeof(int32_t));
}

/* Deal out one rank's workspace, or measure it; returns its bytes. */
static size_t place_rank(runner_rank *state, void *data, const mil_model *model, int32_t rank,
                         const mil_plan_limits *limits)
{
    mil_arena arena = {.data = data};
    const mil_maxima maxima = maxima_of(model, rank, limits);
    size_t n_adapters = (size_t)limits->max_adapter_slots;
    size_t n_modules = (size_t)model->config.n_layers * MIL_N_PROJECTIONS;
    place_slots(&state->slots, &arena, limits);
    state->lora.n_slots = limits->max_adapter_slots;
    state->lora.n_layers = model->config.n_layers;
    state->lora.modules = mil_arena_take(&arena, n_adapters * n_modules, sizeof(mil_lora_module));
    state->padded_ranks = mil_arena_take(&arena, n_adapters, sizeof(int32_t));
    state->samples = mil_arena_take(&arena, MIL_LOGIT_BLOCK, sizeof(mil_sample));
    mil_activations_place(&state->activations, &arena, &model->ranks[rank].decoder,
                          &model->ranks[rank].shard, limits);
    state->context.backend = model->backend;
    state->context.pool = model->pools[rank];
    state->context.workspace_bytes = model->backend->workspace_bytes(&maxima);
    state->context.workspace = mil_arena_take(&arena, state->context.workspace_bytes, 1);
    return arena.used;
}

/* SIZE_MAX where it does not fit in one. */
static size_t sum_of(size_t a, size_t b)
{
    size_t sum;
    return mil_add(a, b, &sum) ? sum : SIZE_MAX;
}

size_t mil_runner_workspace_bytes(const mil_model *model, const mil_plan_limits *limits)
{
    size_t total = 0;
    for (int32_t rank = 0; rank < model->world; rank++) {
        runner_rank unused = {0};
        total = sum_of(total, place_rank(&unused, NULL, model, rank, limits));
    }
    return total;
}

/* K or V of one page in one layer. */
static size_t page_elements(const mil_model *model, int32_t rank, int32_t page_size)
{
    return (size_t)model->ranks[rank].shard.n_kv_heads * (size_t)page_size *
           (size_t)model->config.head_dim;
}

static size_t rank_page_bytes(const mil_model *model, int32_t rank, int32_t page_size)
{
    return 2 * (size_t)model->config.n_layers * page_elements(model, rank, page_size) *
           sizeof(uint16_t);
}

size_t mil_runner_page_bytes(const mil_model *model, int32_t page_size)
{
    size_t total = 0;
    for (int32_t rank = 0; rank < model->world; rank++)
        total += rank_page_bytes(model, rank, page_size);
    return total;
}

/* ---- create and free ---- */

static mil_status check_options(const mil_runner_options *options)
{
    const mil_plan_limits *limits = &options->limits;
    const struct {
        const char *name;
        int32_t value, least, most;
    } fields[] = {
        {"max_seqs", limits->max_seqs, 1, 1 << 20},
        {"max_tokens", limits->max_tokens, 1, 1 << 20},
        {"max_logit_rows", limits->max_logit_rows, 1, limits->max_tokens},
        {"max_pages_per_seq", limits->max_pages_per_seq, 1, 1 << 24},
        {"max_page_sets", limits->max_page_sets, 1, INT32_MAX},
        {"max_adapter_slots", limits->max_adapter_slots, 0, 1 << 20},
        {"n_pages", options->n_pages, 1, INT32_MAX},
        {"page_size", options->page_size, 16, MAX_PAGE_SIZE},
    };
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++)
        if (fields[i].value < fields[i].least || fields[i].value > fields[i].most)
            return mil_fail(MIL_ERR_ARGUMENT, "runner: %s is %d, expected %d..%d", fields[i].name,
                            fields[i].value, fields[i].least, fields[i].most);
    if ((options->page_size & (options->page_size - 1)) != 0)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "runner: page_size is %d, expected 16, 32, 64, 128 or 256",
                        options->page_size);
    return MIL_OK;
}

static mil_status check_memory(const mil_model *model, const mil_runner_options *options)
{
    size_t workspace = mil_runner_workspace_bytes(model, &options->limits);
    size_t kv;
    if (!mil_mul((size_t)options->n_pages, mil_runner_page_bytes(model, options->page_size), &kv))
        kv = SIZE_MAX;
    uint64_t n_free = mil_memory_free_bytes();
    if (sum_of(workspace, kv) > n_free)
        return mil_fail(
            MIL_ERR_MEMORY,
            "runner: %zu bytes of KV pages and %zu of workspace are wanted, %llu are free", kv,
            workspace, (unsigned long long)n_free);
    return MIL_OK;
}

static mil_status init_rank(mil_runner *runner, int32_t rank)
{
    const mil_model *model = runner->model;
    const mil_device *device = model->backend->device;
    const mil_plan_limits *limits = &runner->options.limits;
    int32_t n_pages = runner->options.n_pages;
    int32_t page_size = runner->options.page_size;
    runner_rank *state = &runner->ranks[rank];
    MIL_TRY(device->alloc(&state->slab, place_rank(state, NULL, model, rank, limits), "workspace"));
    (void)place_rank(state, state->slab.data, model, rank, limits);
    MIL_TRY(device->alloc(&state->kv_slab,
                          (size_t)n_pages * rank_page_bytes(model, rank, page_size), "KV pages"));
    int64_t layer_elements = (int64_t)n_pages * (int64_t)page_elements(model, rank, page_size);
    state->kv = (mil_kv){
        .k = state->kv_slab.data,
        .v = (uint16_t *)state->kv_slab.data + layer_elements * model->config.n_layers,
        .layer_elements = layer_elements,
        .n_pages = n_pages,
        .page_size = page_size,
        .n_kv_heads = model->ranks[rank].shard.n_kv_heads,
        .head_dim = model->config.head_dim,
    };
    return MIL_OK;
}

static mil_status init_runner(mil_runner *runner)
{
    const mil_plan_limits *limits = &runner->options.limits;
    mil_model *model = runner->model;
    MIL_TRY(mil_alloc_checked((void **)&runner->ranks, (size_t)model->world, sizeof(runner_rank),
                              "runner"));
    for (int32_t i = 0; i < RING_DEPTH; i++)
        MIL_TRY(mil_alloc_checked((void **)&runner->plans[i], mil_plan_bytes(limits), 1, "plan"));
    MIL_TRY(mil_alloc_checked((void **)&runner->contents, (size_t)limits->max_adapter_slots,
                              sizeof(mil_content *), "runner"));
    MIL_TRY(mil_alloc_checked((void **)&runner->sample_positions, (size_t)limits->max_logit_rows,
                              sizeof(int32_t), "runner"));
    for (int32_t rank = 0; rank < model->world; rank++)
        MIL_TRY(init_rank(runner, rank));
    int64_t longest = (int64_t)limits->max_pages_per_seq * runner->options.page_size;
    pthread_mutex_lock(&model->rope_lock);
    mil_rope_reach(&model->rope, longest < INT32_MAX ? (int32_t)longest : INT32_MAX);
    pthread_mutex_unlock(&model->rope_lock);
    return MIL_OK;
}

mil_status mil_runner_create(mil_runner **out, mil_model *model, const mil_runner_options *options)
{
    MIL_TRY(check_options(options));
    MIL_TRY(check_memory(model, options));
    mil_runner *runner;
    MIL_TRY(mil_alloc_checked((void **)&runner, 1, sizeof *runner, "runner"));
    runner->model = model;
    runner->options = *options;
    const char *check = getenv("MILPY_CHECK");
    runner->is_checked = options->poison || (check != NULL && strcmp(check, "1") == 0);
    mil_status status = init_runner(runner);
    if (status != MIL_OK) {
        mil_runner_free(runner);
        return status;
    }
    *out = runner;
    return MIL_OK;
}

void mil_runner_free(mil_runner *runner)
{
    if (runner == NULL)
        return;
    const mil_device *device = runner->model->backend->device;
    for (int32_t rank = 0; runner->ranks != NULL && rank < runner->model->world; rank++) {
        device->free(&runner->ranks[rank].kv_slab);
        device->free(&runner->ranks[rank].slab);
    }
    mil_free(runner->sample_positions);
    mil_free(runner->contents);
    for (int32_t i = 0; i < RING_DEPTH; i++)
        mil_free(runner->plans[i]);
    mil_free(runner->ranks);
    mil_free(runner);
}

/* ---- who may step ---- */

mil_status mil_runner_enter(mil_runner *runner)
{
    mil_thread_state saved;
    /* First, because in a forked child it fails where the lock might never open. */
    MIL_TRY(mil_pool_enter(runner->model->pools[0], &saved));
    pthread_mutex_lock(&runner->model->step_lock);
    runner->thread_state = saved;
    runner->is_entered = true;
    return MIL_OK;
}

void mil_runner_leave(mil_runner *runner)
{
    mil_thread_state saved = runner->thread_state;
    runner->is_entered = false;
    pthread_mutex_unlock(&runner->model->step_lock);
    mil_pool_leave(runner->model->pools[0], &saved);
}

/* ---- the step of one rank ---- */

static void apply_adapters(mil_runner *runner, runner_rank *state, int32_t rank)
{
    const mil_batch *batch = &runner->batch;
    size_t n_modules = (size_t)state->lora.n_layers * MIL_N_PROJECTIONS;
    for (int32_t i = 0; i < batch->header->n_adapter_sets; i++) {
        int32_t slot = batch->adapter_sets[i].adapter_slot;
        mil_lora_module *modules = state->lora.modules + (size_t)slot * n_modules;
        const mil_content *content = runner->contents[i];
        if (content == NULL) {
            memset(modules, 0, n_modules * sizeof *modules);
            state->padded_ranks[slot] = 0;
        } else {
            memcpy(modules, content->adapters[rank].modules, n_modules * sizeof *modules);
            state->padded_ranks[slot] = content->adapters[rank].max_padded_rank;
        }
    }
}

static void apply_commands(mil_runner *runner, runner_rank *state, int32_t rank)
{
    const mil_batch *batch = &runner->batch;
    mil_slots *slots = &state->slots;
    apply_adapters(runner, state, rank);
    for (int32_t i = 0; i < batch->header->n_slot_sets; i++) {
        const mil_slot_set *set = &batch->slot_sets[i];
        slots->last_token[set->slot] = 0;
        slots->adapter_slot[set->slot] = set->adapter_slot;
        slots->sampling[set->slot] = set->sampling;
    }
    for (int32_t i = 0; i < batch->header->n_page_sets; i++) {
        const mil_page_set *set = &batch->page_sets[i];
        slots->page_table[(size_t)set->slot * (size_t)slots->max_pages + (size_t)set->index] =
            set->page;
    }
}

static int32_t lora_rank_of(const mil_batch *batch, const int32_t *padded_ranks)
{
    int32_t largest = 0;
    for (int32_t segment = 0; segment < batch->header->n_segments; segment++) {
        int32_t rank = padded_ranks[batch->segment_adapter[segment]];
        largest = rank > largest ? rank : largest;
    }
    return largest;
}

/* Logits and choice of one block of rows. */
static mil_status sample_block(mil_runner *runner, mil_step *step, int32_t rank, int32_t begin,
                               int32_t n_rows)
{
    const mil_decoder *decoder = &runner->model->ranks[rank].decoder;
    runner_rank *state = &runner->ranks[rank];
    size_t vocab = (size_t)runner->model->config.vocab;
    MIL_TRY(mil_decoder_logits(decoder, step, &state->activations, begin, n_rows));
    const mil_sample_args args = {
        .out = rank == 0 && runner->samples != NULL ? runner->samples + begin : state->samples,
        .logits = state->activations.logits,
        .slots_of = runner->batch.logit_slots + begin,
        .positions = runner->sample_positions + begin,
        .feeds = runner->batch.logit_feeds + begin,
        .slots = step->slots,
        .n_rows = n_rows,
        .vocab = runner->model->config.vocab,
        .ld = mil_head_ld(&decoder->head),
    };
    MIL_TRY(runner->model->backend->sample(step->context, &args));
    for (int32_t row = 0; rank == 0 && runner->logits != NULL && row < n_rows; row++)
        memcpy(runner->logits + (size_t)(begin + row) * vocab, args.logits + row * args.ld,
               vocab * sizeof(float));
    return MIL_OK;
}

static mil_status step_rank(void *argument, int32_t rank)
{
    mil_runner *runner = argument;
    mil_model *model = runner->model;
    runner_rank *state = &runner->ranks[rank];
    const mil_batch *batch = &runner->batch;
    apply_commands(runner, state, rank);
    if (batch->header->n_tokens == 0)
        return MIL_OK;
    mil_step step = {
        .context = &state->context,
        .comm = model->comms[rank],
        .batch = batch,
        .slots = &state->slots,
        .kv = &state->kv,
        .lora = &state->lora,
        .lora_v = state->activations.lora_v,
        .lora_rank = lora_rank_of(batch, state->padded_ranks),
        .cos_table = model->rope.cos_table,
        .sin_table = model->rope.sin_table,
        .wide = state->activations.wide,
        .narrow = state->activations.narrow,
    };
    MIL_TRY(model->backend->gather_tokens(&state->context, state->activations.tokens, batch,
                                          &state->slots));
    MIL_TRY(mil_decoder_forward(&model->ranks[rank].decoder, &step, &state->activations));
    int32_t n_rows = batch->header->n_logit_rows;
    for (int32_t begin = 0; begin < n_rows; begin += MIL_LOGIT_BLOCK) {
        int32_t n = n_rows - begin < MIL_LOGIT_BLOCK ? n_rows - begin : MIL_LOGIT_BLOCK;
        MIL_TRY(sample_block(runner, &step, rank, begin, n));
    }
    return MIL_OK;
}

/* ---- the step ---- */

mil_plan *mil_runner_plan(mil_runner *runner)
{
    mil_plan *plan = runner->plans[runner->n_plans % RING_DEPTH];
    mil_plan_reset(plan, &runner->options.limits, ++runner->n_plans);
    return plan;
}

/* What the plan's own check cannot know: how far the pages of a slot and the rope tables reach. */
static mil_status check_lengths(const mil_runner *runner)
{
    const mil_batch *batch = &runner->batch;
    const mil_runner_options *options = &runner->options;
    int64_t longest = (int64_t)options->limits.max_pages_per_seq * options->page_size;
    int32_t n_ready = runner->model->rope.n_ready;
    for (int32_t s = 0; s < batch->header->n_seqs; s++)
        if (batch->kv_lengths[s] > longest)
            return mil_fail(MIL_ERR_INTERNAL, "plan: kv_lengths[%d] is %d, expected <= %lld", s,
                            batch->kv_lengths[s], (long long)longest);
    for (int32_t t = 0; t < batch->header->n_tokens; t++)
        if (batch->positions[t] >= n_ready)
            return mil_fail(MIL_ERR_INTERNAL, "plan: positions[%d] is %d, expected < %d", t,
                            batch->positions[t], n_ready);
    return MIL_OK;
}

static mil_status find_contents(mil_runner *runner)
{
    const mil_batch *batch = &runner->batch;
    for (int32_t i = 0; i < batch->header->n_adapter_sets; i++) {
        int32_t id = batch->adapter_sets[i].content;
        runner->contents[i] = NULL;
        if (id != MIL_NO_ADAPTER)
            MIL_TRY(mil_contents_find(&runner->model->contents, id, &runner->contents[i]));
    }
    return MIL_OK;
}

/* A row's draw is counted by the index in its sequence of the token that it chooses. positions[]
 * would not do: they are what RoPE sees. */
static void find_sample_positions(mil_runner *runner)
{
    const mil_batch *batch = &runner->batch;
    int32_t s = 0;
    for (int32_t i = 0; i < batch->header->n_logit_rows; i++) {
        int32_t row = batch->logit_rows[i];
        while (batch->query_indptr[s + 1] <= row)
            s++;
        runner->sample_positions[i] = batch->kv_lengths[s] - (batch->query_indptr[s + 1] - row) + 1;
    }
}

static mil_status run_step(mil_runner *runner, mil_plan *plan)
{
    mil_plan_view(plan, &runner->batch);
    if (runner->is_checked) {
        MIL_TRY(mil_plan_check(plan, runner->options.n_pages, runner->model->config.vocab));
        MIL_TRY(check_lengths(runner));
    }
    MIL_TRY(find_contents(runner));
    find_sample_positions(runner);
    return mil_team_run(runner->model->team, step_rank, runner);
}

mil_status mil_runner_step(mil_runner *runner, mil_sample *samples, float *logits)
{
    if (runner->is_dead)
        return mil_fail(MIL_ERR_CLOSED, "runner: an earlier step failed");
    if (!runner->is_entered || runner->n_plans == 0)
        return mil_fail(MIL_ERR_INTERNAL, "runner: found a step without %s",
                        runner->is_entered ? "a plan" : "mil_runner_enter");
    runner->samples = samples;
    runner->logits = logits;
    mil_status status = run_step(runner, runner->plans[(runner->n_plans - 1) % RING_DEPTH]);
    runner->is_dead = status != MIL_OK;
    return status;
}

/* ---- poison ---- */

void mil_runner_poison_page(mil_runner *runner, int32_t page)
{
    if (!runner->options.poison)
        return;
    for (int32_t rank = 0; rank < runner->model->world; rank++) {
        const mil_kv *kv = &runner->ranks[rank].kv;
        size_t n = page_elements(runner->model, rank, kv->page_size);
        for (int32_t layer = 0; layer < runner->model->config.n_layers; layer++) {
            size_t begin = (size_t)layer * (size_t)kv->layer_elements + (size_t)page * n;
            for (size_t i = begin; i < begin + n; i++)
                kv->k[i] = kv->v[i] = NAN_BF16;
        }
    }
}
