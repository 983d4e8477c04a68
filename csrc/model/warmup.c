#include "model/warmup.h"

static int32_t smaller(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

typedef struct buckets {
    int32_t n_tokens, n_logit_rows;
    bool has_chunks, has_lora;
} buckets;

static mil_batch empty_batch(mil_rank_step *all, buckets of)
{
    mil_plan_reset(all->plan, all->limits, 0);
    mil_plan_view(all->plan, &all->batch);
    mil_plan_header *header = all->batch.header;
    header->bucket_seqs = smaller(of.n_tokens, all->limits->max_seqs);
    header->bucket_tokens = of.n_tokens;
    header->bucket_chunks = of.has_chunks ? header->bucket_seqs : 0;
    header->bucket_logit_rows = of.n_logit_rows;
    header->bucket_segments = of.has_lora ? all->limits->max_adapter_slots : 0;
    header->bucket_lora_rows = of.n_tokens;
    return mil_rank_batch(all, 0);
}

/* ---- kernels ---- */

/* A step of one layer, all layers being of one shape. */
static mil_status run_rows(mil_rank_step *all, buckets of)
{
    const mil_state *state = &all->states[0];
    mil_decoder one = all->model->ranks[0].decoder;
    one.n_layers = 1;
    mil_batch batch = empty_batch(all, of);
    const mil_step step = mil_rank_operands(all, &batch, 0);
    MIL_TRY(mil_rank_begin(all, &batch, 0));
    MIL_TRY(mil_decoder_forward(&one, &step, &state->activations));
    MIL_TRY(mil_rank_choose(all, &step, 0));
    /* The plan is read by the device, and the next one is written over it. */
    return all->model->backend->device->synchronize(state->context.queue);
}

mil_status mil_warmup_kernels(mil_rank_step *all)
{
    const mil_plan_limits *limits = all->limits;
    int32_t (*rows_alike)(int32_t) = all->model->backend->rows_alike;
    for (int32_t first = 1, last; first <= limits->max_tokens; first = last + 1) {
        last = smaller(rows_alike(first), limits->max_tokens);
        buckets of = {.n_tokens = last, .has_chunks = true};
        if (first <= limits->max_logit_rows)
            of.n_logit_rows = smaller(last, limits->max_logit_rows);
        MIL_TRY(run_rows(all, of));
        of = (buckets){.n_tokens = last, .has_chunks = true, .has_lora = true};
        if (limits->max_adapter_slots > 0)
            MIL_TRY(run_rows(all, of));
    }
    return MIL_OK;
}

/* ---- graphs ---- */

static mil_status capture(const mil_rank_step *all, const mil_step *step,
                          mil_status (*part)(const mil_rank_step *, const mil_step *, int32_t),
                          struct mil_graph **out)
{
    const mil_device *device = all->model->backend->device;
    MIL_TRY(device->capture_begin(step->context->queue));
    mil_status status = part(all, step, 0);
    /* Ended whatever happened, or the queue could never run again; *out is NULL for what failed. */
    mil_status ended = device->capture_end(step->context->queue, out);
    return status != MIL_OK ? status : ended;
}

static mil_status capture_bucket(mil_rank_step *all, int32_t index, bool has_lora)
{
    mil_graphs *graphs = &all->states[0].graphs;
    int32_t size = graphs->sizes[index];
    mil_batch batch =
        empty_batch(all, (buckets){.n_tokens = size, .n_logit_rows = size, .has_lora = has_lora});
    const mil_step step = mil_rank_operands(all, &batch, 0);
    MIL_TRY(capture(all, &step, mil_rank_forward, &graphs->forward[index][has_lora]));
    return has_lora ? MIL_OK : capture(all, &step, mil_rank_choose, &graphs->choice[index]);
}

mil_status mil_warmup_graphs(mil_rank_step *all, bool has_graphs)
{
    const mil_plan_limits *limits = all->limits;
    mil_graphs *graphs = &all->states[0].graphs;
    if (all->model->backend->device->capture_begin == NULL)
        return MIL_OK;
    /* Without graphs too: a step run op by op in its bucket has the bits of the replayed one. */
    mil_graphs_init(graphs, smaller(limits->max_seqs, limits->max_tokens));
    for (int32_t i = 0; i < graphs->n_buckets && has_graphs; i++) {
        MIL_TRY(capture_bucket(all, i, false));
        if (limits->max_adapter_slots > 0)
            MIL_TRY(capture_bucket(all, i, true));
    }
    return MIL_OK;
}
