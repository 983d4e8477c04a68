#include "model/decoder.h"

void mil_decoder_place(mil_decoder *decoder, mil_arena *arena, const mil_backend *backend,
                       const mil_shard *shard, const mil_config *config)
{
    mil_embedding_place(&decoder->embedding, arena, backend, shard);
    for (int32_t l = 0; l < decoder->n_layers; l++) {
        mil_decoder_layer *layer = &decoder->layers[l];
        const mil_attention_options attention = {
            .layer = l, .head_dim = config->head_dim, .has_bias = config->attention_bias};
        const mil_mlp_options mlp = {.layer = l, .activation = decoder->arch->activation};
        mil_norm_place(&layer->attention_norm, arena, config->hidden, config->rms_eps);
        mil_attention_place(&layer->attention, arena, backend, shard, &attention);
        mil_norm_place(&layer->mlp_norm, arena, config->hidden, config->rms_eps);
        mil_mlp_place(&layer->mlp, arena, backend, shard, &mlp);
    }
    mil_norm_place(&decoder->final_norm, arena, config->hidden, config->rms_eps);
    mil_head_place(&decoder->head, arena, backend, shard,
                   config->tie_embeddings ? &decoder->embedding : NULL);
}

static mil_status load_layer(mil_decoder_layer *layer, mil_walk *walk, const mil_arch *arch,
                             int32_t l)
{
    static const mil_projection qkv[] = {MIL_PROJECTION_Q, MIL_PROJECTION_K, MIL_PROJECTION_V};
    static const mil_projection gate_up[] = {MIL_PROJECTION_GATE, MIL_PROJECTION_UP};
    static const mil_projection o = MIL_PROJECTION_O;
    static const mil_projection down = MIL_PROJECTION_DOWN;
    char name[MIL_NAME_BYTES];
    mil_linear_names column;
    mil_linear_names row;
    mil_arch_name(arch, name, l, arch->attention_norm);
    MIL_TRY(mil_norm_load(&layer->attention_norm, walk, name));
    mil_arch_linear_names(arch, &column, l, qkv, 3);
    mil_arch_linear_names(arch, &row, l, &o, 1);
    MIL_TRY(mil_attention_load(&layer->attention, walk, &column, &row));
    mil_arch_name(arch, name, l, arch->mlp_norm);
    MIL_TRY(mil_norm_load(&layer->mlp_norm, walk, name));
    mil_arch_linear_names(arch, &column, l, gate_up, 2);
    mil_arch_linear_names(arch, &row, l, &down, 1);
    return mil_mlp_load(&layer->mlp, walk, &column, &row);
}

mil_status mil_decoder_load(mil_decoder *decoder, mil_walk *walk)
{
    MIL_TRY(mil_embedding_load(&decoder->embedding, walk, decoder->arch->embedding));
    for (int32_t l = 0; l < decoder->n_layers; l++)
        MIL_TRY(load_layer(&decoder->layers[l], walk, decoder->arch, l));
    MIL_TRY(mil_norm_load(&decoder->final_norm, walk, decoder->arch->final_norm));
    return mil_head_load(&decoder->head, walk, decoder->arch->head);
}

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

void mil_activations_place(mil_activations *activations, mil_arena *arena,
                           const mil_decoder *decoder, const mil_shard *shard,
                           const mil_backend *backend, const mil_plan_limits *limits)
{
    size_t product_bytes = mil_dtype_bytes(backend->product_dtype);
    size_t n_tokens = (size_t)limits->max_tokens;
    size_t hidden = (size_t)decoder->embedding.weight.K;
    size_t ffn = (size_t)shard->ffn;
    size_t query = (size_t)shard->projections[MIL_PROJECTION_Q].n_rows;
    size_t kv = (size_t)shard->projections[MIL_PROJECTION_K].n_rows;
    int32_t n_rows = mil_logit_block(backend, limits);
    activations->tokens = mil_arena_take(arena, n_tokens, sizeof(int32_t));
    activations->x = mil_arena_take(arena, n_tokens * hidden, sizeof(float));
    activations->y = mil_arena_take(arena, n_tokens * hidden, product_bytes);
    activations->h = mil_arena_take(arena, n_tokens * hidden, sizeof(uint16_t));
    activations->wide =
        mil_arena_take(arena, n_tokens * larger(query + 2 * kv, 2 * ffn), product_bytes);
    activations->narrow = mil_arena_take(
        arena, larger(2 * mil_aligned_halves(n_tokens * query), n_tokens * ffn), sizeof(uint16_t));
    /* For the largest rank there can be, so that no adapter makes a step allocate; the system gives
     * only what is touched. */
    activations->lora_v =
        mil_arena_take(arena, n_tokens * MIL_MAX_PARTS * MIL_MAX_LORA_RANK, sizeof(float));
    activations->logits =
        mil_arena_take(arena, (size_t)n_rows * (size_t)mil_head_ld(&decoder->head), sizeof(float));
    activations->head_scratch =
        mil_arena_take(arena, mil_head_scratch(&decoder->head, n_rows), sizeof(float));
}

mil_status mil_decoder_forward(const mil_decoder *decoder, const mil_step *step,
                               const mil_activations *activations)
{
    int32_t n_tokens = mil_step_tokens(step);
    float *x = activations->x;
    void *y = activations->y;
    uint16_t *h = activations->h;
    MIL_TRY(mil_embedding_forward(&decoder->embedding, step, x, activations->tokens));
    for (int32_t l = 0; l < decoder->n_layers; l++) {
        const mil_decoder_layer *layer = &decoder->layers[l];
        const void *residual = l > 0 ? y : NULL;
        MIL_TRY(mil_norm_forward(&layer->attention_norm, step, h, x, residual, NULL, n_tokens));
        MIL_TRY(mil_attention_forward(&layer->attention, step, y, h));
        MIL_TRY(mil_norm_forward(&layer->mlp_norm, step, h, x, y, NULL, n_tokens));
        MIL_TRY(mil_mlp_forward(&layer->mlp, step, y, h));
    }
    return MIL_OK;
}

mil_status mil_decoder_logits(const mil_decoder *decoder, const mil_step *step,
                              const mil_activations *activations, int32_t begin, int32_t n_rows)
{
    MIL_TRY(mil_norm_forward(&decoder->final_norm, step, activations->h, activations->x,
                             activations->y, step->batch->logit_rows + begin, n_rows));
    return mil_head_forward(&decoder->head, step, activations->logits, activations->h, n_rows,
                            activations->head_scratch);
}
