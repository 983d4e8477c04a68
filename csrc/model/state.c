#include "model/state.h"

#include <string.h>

#define NAN_BF16 0x7fc0u

/* ---- sizes ---- */

static mil_maxima maxima_of(const mil_model *model, int32_t rank, const mil_plan_limits *limits)
{
    const mil_config *config = &model->config;
    const mil_shard *shard = &model->ranks[rank].shard;
    int64_t longest = (int64_t)limits->max_pages_per_seq * MIL_MAX_PAGE_SIZE;
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
static size_t place_rank(mil_state *state, void *data, const mil_model *model, int32_t rank,
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

size_t mil_state_workspace_bytes(const mil_model *model, int32_t rank,
                                 const mil_plan_limits *limits)
{
    mil_state unused = {0};
    return place_rank(&unused, NULL, model, rank, limits);
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

mil_status mil_state_init(mil_state *state, const mil_model *model, int32_t rank,
                          const mil_runner_options *options)
{
    const mil_device *device = model->backend->device;
    const mil_plan_limits *limits = &options->limits;
    int32_t n_pages = options->n_pages;
    int32_t page_size = options->page_size;
    MIL_TRY(device->alloc(&state->slab, place_rank(state, NULL, model, rank, limits), "workspace"));
    (void)place_rank(state, state->slab.data, model, rank, limits);
    MIL_TRY(device->alloc(&state->kv_slab,
                          (size_t)n_pages * mil_state_page_bytes(model, rank, page_size),
                          "KV pages"));
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

void mil_state_deinit(mil_state *state)
{
    if (state->context.backend == NULL)
        return;
    const mil_device *device = state->context.backend->device;
    device->free(&state->kv_slab);
    device->free(&state->slab);
    memset(state, 0, sizeof *state);
}

/* ---- commands ---- */

static void apply_adapters(mil_state *state, const mil_batch *batch,
                           const mil_content *const *contents, int32_t rank)
{
    size_t n_modules = (size_t)state->lora.n_layers * MIL_N_PROJECTIONS;
    for (int32_t i = 0; i < batch->header->n_adapter_sets; i++) {
        int32_t slot = batch->adapter_sets[i].adapter_slot;
        mil_lora_module *modules = state->lora.modules + (size_t)slot * n_modules;
        const mil_content *content = contents[i];
        if (content == NULL) {
            memset(modules, 0, n_modules * sizeof *modules);
            state->padded_ranks[slot] = 0;
        } else {
            memcpy(modules, content->adapters[rank].modules, n_modules * sizeof *modules);
            state->padded_ranks[slot] = content->adapters[rank].max_padded_rank;
        }
    }
}

void mil_state_apply(mil_state *state, const mil_batch *batch, const mil_content *const *contents,
                     int32_t rank)
{
    mil_slots *slots = &state->slots;
    apply_adapters(state, batch, contents, rank);
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

int32_t mil_state_lora_rank(const mil_state *state, const mil_batch *batch)
{
    int32_t largest = 0;
    for (int32_t segment = 0; segment < batch->header->n_segments; segment++) {
        int32_t rank = state->padded_ranks[batch->segment_adapter[segment]];
        largest = rank > largest ? rank : largest;
    }
    return largest;
}

void mil_state_poison(mil_state *state, int32_t page)
{
    const mil_kv *kv = &state->kv;
    int64_t n = (int64_t)kv->n_kv_heads * kv->page_size * kv->head_dim;
    for (int32_t layer = 0; layer < state->lora.n_layers; layer++) {
        int64_t begin = layer * kv->layer_elements + page * n;
        for (int64_t i = begin; i < begin + n; i++)
            kv->k[i] = kv->v[i] = NAN_BF16;
    }
}
