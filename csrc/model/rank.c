#include "model/rank.h"

mil_batch mil_rank_batch(const mil_rank_step *all, int32_t rank)
{
    mil_batch batch = all->batch;
    if (!all->model->backend->device->is_host)
        mil_plan_view_at(all->plan, all->states[rank].plan, &batch);
    return batch;
}

/* Logits and choice of one block of rows. */
static mil_status sample_block(const mil_rank_step *all, const mil_step *step, int32_t rank,
                               int32_t begin, int32_t n_rows)
{
    const mil_decoder *decoder = &all->model->ranks[rank].decoder;
    const mil_device *device = all->model->backend->device;
    const mil_state *state = &all->states[rank];
    size_t vocab = (size_t)all->model->config.vocab;
    MIL_TRY(mil_decoder_logits(decoder, step, &state->activations, begin, n_rows));
    const mil_sample_args args = {
        .out = state->samples + begin,
        .logits = state->activations.logits,
        .batch = step->batch,
        .slots = step->slots,
        .first_row = begin,
        .n_rows = n_rows,
        .vocab = all->model->config.vocab,
        .ld = mil_head_ld(&decoder->head),
    };
    MIL_TRY(all->model->backend->sample(step->context, &args));
    for (int32_t row = 0; rank == 0 && all->logits != NULL && row < n_rows; row++)
        MIL_TRY(device->copy_out(step->context->queue, all->logits + (size_t)(begin + row) * vocab,
                                 args.logits + row * args.ld, vocab * sizeof(float)));
    return MIL_OK;
}

mil_status mil_rank_forward(const mil_rank_step *all, const mil_step *step, int32_t rank)
{
    return mil_decoder_forward(&all->model->ranks[rank].decoder, step,
                               &all->states[rank].activations);
}

mil_status mil_rank_choose(const mil_rank_step *all, const mil_step *step, int32_t rank)
{
    int32_t n_rows = step->batch->header->bucket_logit_rows;
    int32_t block = mil_logit_block(all->model->backend, all->limits);
    for (int32_t begin = 0; begin < n_rows; begin += block) {
        int32_t n = n_rows - begin < block ? n_rows - begin : block;
        MIL_TRY(sample_block(all, step, rank, begin, n));
    }
    return MIL_OK;
}

mil_status mil_rank_begin(const mil_rank_step *all, const mil_batch *batch, int32_t rank)
{
    mil_state *state = &all->states[rank];
    const mil_begin_args args = {
        .plan = all->plan,
        .batch = batch,
        .adapters = all->adapters + (size_t)rank * (size_t)all->limits->max_adapter_slots,
        .slots = &state->slots,
        .lora = &state->lora,
        .kv = &state->kv,
        .tokens = state->activations.tokens,
        .n_heads = all->model->ranks[rank].shard.n_heads,
    };
    return all->model->backend->begin(&state->context, &args);
}

mil_step mil_rank_operands(const mil_rank_step *all, const mil_batch *batch, int32_t rank)
{
    mil_state *state = &all->states[rank];
    return (mil_step){
        .context = &state->context,
        .comm = all->model->comms[rank],
        .batch = batch,
        .slots = &state->slots,
        .kv = &state->kv,
        .lora = &state->lora,
        .lora_v = state->activations.lora_v,
        .lora_rank = mil_state_lora_rank(state, &all->batch),
        .cos_table = state->cos_table,
        .sin_table = state->sin_table,
        .wide = state->activations.wide,
        .narrow = state->activations.narrow,
    };
}
