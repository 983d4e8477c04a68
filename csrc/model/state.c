#include "model/state.h"

#include <string.h>

/* ---- sizes ---- */

int32_t mil_state_positions(const mil_model *model, const mil_plan_limits *limits,
                            int32_t page_size)
{
    int64_t longest = (int64_t)limits->max_pages_per_seq * page_size;
    return longest < model->config.max_position ? (int32_t)longest : model->config.max_position;
}

static mil_maxima maxima_of(const mil_model *model, int32_t rank, const mil_plan_limits *limits,
                            int32_t page_size)
{
    const mil_config *config = &model->config;
    const mil_shard *shard = &model->ranks[rank].shard;
    return (mil_maxima){
        .max_tokens = limits->max_tokens,
        .max_seqs = limits->max_seqs,
        .max_logit_rows = mil_logit_block(model->backend, limits),
        .max_position = mil_state_positions(model, limits, page_size),
        .hidden = config->hidden,
        .ffn = shard->ffn,
        .vocab = config->vocab,
        .n_heads = shard->n_heads,
        .n_kv_heads = shard->n_kv_heads,
        .head_dim = config->head_dim,
        .page_size = page_size,
        .max_pages_per_seq = limits->max_pages_per_seq,
        .max_adapter_slots = limits->max_adapter_slots,
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

/* What a device has a copy of and the host's own ops read in place. */
static void place_copies(mil_state *state, mil_arena *arena, const mil_model *model,
                         const mil_plan_limits *limits, int32_t page_size)
{
    size_t n = (size_t)mil_state_positions(model, limits, page_size) * (size_t)model->rope.n_pairs;
    if (model->backend->device->is_host) {
        state->cos_table = model->rope.cos_table;
        state->sin_table = model->rope.sin_table;
        return;
    }
    state->plan = mil_arena_take(arena, mil_plan_bytes(limits), 1);
    state->cos_table = mil_arena_take(arena, n, sizeof(float));
    state->sin_table = mil_arena_take(arena, n, sizeof(float));
}

/* Deal out one rank's workspace, or measure it; returns its bytes. */
static size_t place_rank(mil_state *state, void *data, const mil_model *model, int32_t rank,
                         const mil_plan_limits *limits, int32_t page_size)
{
    mil_arena arena = {.data = data};
    const mil_backend *backend = model->backend;
    const mil_maxima maxima = maxima_of(model, rank, limits, page_size);
    mil_context *context = &state->context;
    size_t n_adapters = (size_t)limits->max_adapter_slots;
    size_t n_modules = (size_t)model->config.n_layers * MIL_N_PROJECTIONS;
    place_slots(&state->slots, &arena, limits);
    state->lora.n_slots = limits->max_adapter_slots;
    state->lora.n_layers = model->config.n_layers;
    state->lora.modules = mil_arena_take(&arena, n_adapters * n_modules, sizeof(mil_lora_module));
    state->samples = mil_arena_take(&arena, (size_t)limits->max_logit_rows, sizeof(mil_sample));
    place_copies(state, &arena, model, limits, page_size);
    mil_activations_place(&state->activations, &arena, &model->ranks[rank].decoder,
                          &model->ranks[rank].shard, backend, limits);
    context->backend = backend;
    context->pool = model->pools[rank];
    context->queue = model->ranks[rank].queue;
    context->step_bytes = backend->step_bytes(&maxima);
    context->step_data = mil_arena_take(&arena, context->step_bytes, 1);
    context->workspace_bytes = backend->workspace_bytes(&maxima);
    context->workspace = mil_arena_take(&arena, context->workspace_bytes, 1);
    return arena.used;
}

size_t mil_state_workspace_bytes(const mil_model *model, int32_t rank,
                                 const mil_plan_limits *limits, int32_t page_size)
{
    mil_state unused = {0};
    return place_rank(&unused, NULL, model, rank, limits, page_size);
}

/* K or V of one page in one layer. */
static size_t page_elements(const mil_model *model, int32_t rank, int32_t page_size)
{
    return (size_t)model->ranks[rank].shard.n_kv_heads * (size_t)page_size *
           (size_t)model->config.head_dim;
}

size_t mil_state_page_bytes(const mil_model *model, int32_t rank, int32_t page_size)
{
    return 2 * (size_t)model->config.n_layers * page_elements(model, rank, page_size) *
           sizeof(uint16_t);
}

/* ---- memory ---- */

static void view_pages(mil_state *state, const mil_model *model, int32_t rank, int32_t n_pages,
                       int32_t page_size)
{
    int64_t layer_elements = (int64_t)n_pages * (int64_t)page_elements(model, rank, page_size);
    state->kv = (mil_kv){
        .k = state->kv_slab.data,
        .v = (uint16_t *)state->kv_slab.data + layer_elements * model->config.n_layers,
        .layer_elements = layer_elements,
        .n_pages = n_pages,
        .page_size = page_size,
        .n_kv_heads = model->ranks[rank].shard.n_kv_heads,
        .head_dim = model->config.head_dim,
        .dtype = MIL_DTYPE_BF16,
    };
}

static mil_status copy_tables(mil_state *state, const mil_model *model, size_t n_positions)
{
    const mil_device *device = model->backend->device;
    size_t n_bytes = n_positions * (size_t)model->rope.n_pairs * sizeof(float);
    if (device->is_host)
        return MIL_OK;
    MIL_TRY(device->copy_in(state->context.queue, (void *)(uintptr_t)state->cos_table,
                            model->rope.cos_table, n_bytes));
    return device->copy_in(state->context.queue, (void *)(uintptr_t)state->sin_table,
                           model->rope.sin_table, n_bytes);
}

mil_status mil_state_init(mil_state *state, const mil_model *model, int32_t rank,
                          const mil_runner_options *options)
{
    const mil_device *device = model->backend->device;
    const mil_plan_limits *limits = &options->limits;
    struct mil_queue *queue = model->ranks[rank].queue;
    int32_t page_size = options->page_size;
    size_t n_bytes = place_rank(state, NULL, model, rank, limits, page_size);
    MIL_TRY(device->alloc(queue, &state->slab, n_bytes, "workspace"));
    (void)place_rank(state, state->slab.data, model, rank, limits, page_size);
    state->context.is_deterministic = options->is_deterministic;
    MIL_TRY(mil_alloc_checked((void **)&state->padded_ranks, (size_t)limits->max_adapter_slots,
                              sizeof(int32_t), "runner"));
    return copy_tables(state, model, (size_t)mil_state_positions(model, limits, page_size));
}

static void give_pages(mil_state *state)
{
    const mil_device *device = state->context.backend->device;
    mil_graphs_deinit(&state->graphs, device, state->context.queue);
    device->free(state->context.queue, &state->kv_slab);
}

mil_status mil_state_take_pages(mil_state *state, const mil_model *model, int32_t rank,
                                int32_t n_pages, int32_t page_size)
{
    size_t n_bytes = (size_t)n_pages * mil_state_page_bytes(model, rank, page_size);
    give_pages(state);
    MIL_TRY(
        model->backend->device->alloc(state->context.queue, &state->kv_slab, n_bytes, "KV pages"));
    view_pages(state, model, rank, n_pages, page_size);
    return MIL_OK;
}

void mil_state_deinit(mil_state *state)
{
    if (state->context.backend == NULL)
        return;
    give_pages(state);
    state->context.backend->device->free(state->context.queue, &state->slab);
    mil_free(state->padded_ranks);
    memset(state, 0, sizeof *state);
}

/* ---- a step ---- */

void mil_state_note_adapter(mil_state *state, int32_t slot, const mil_content *content,
                            int32_t rank)
{
    state->padded_ranks[slot] = content != NULL ? content->adapters[rank].max_padded_rank : 0;
}

int32_t mil_state_lora_rank(const mil_state *state, const mil_batch *batch)
{
    int32_t fixed = state->context.backend->lora_v_rank;
    int32_t largest = 0;
    if (fixed > 0)
        return batch->header->bucket_segments > 0 ? fixed : 0;
    for (int32_t segment = 0; segment < batch->header->n_segments; segment++) {
        int32_t rank = state->padded_ranks[batch->segment_adapter[segment]];
        largest = rank > largest ? rank : largest;
    }
    return largest;
}

mil_status mil_state_poison(mil_state *state, int32_t page)
{
    const mil_kv *kv = &state->kv;
    int64_t n = (int64_t)kv->n_kv_heads * kv->page_size * kv->head_dim;
    /* V of all layers follows K of all. */
    return state->context.backend->device->poison(
        state->context.queue, kv->k + page * n, (size_t)n * sizeof *kv->k,
        2 * (size_t)state->lora.n_layers, (size_t)kv->layer_elements * sizeof *kv->k);
}
