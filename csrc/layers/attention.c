#include "layers/attention.h"

#include <math.h>

void mil_attention_place(mil_attention *attention, mil_arena *arena, const mil_backend *backend,
                         const mil_shard *shard, const mil_attention_options *options)
{
    const mil_column_options qkv = {
        .layer = options->layer,
        .n_parts = 3,
        .projections = {MIL_PROJECTION_Q, MIL_PROJECTION_K, MIL_PROJECTION_V},
        .has_bias = options->has_bias,
    };
    const mil_row_options o = {
        .layer = options->layer, .projection = MIL_PROJECTION_O, .has_bias = options->has_bias};
    attention->layer = options->layer;
    attention->n_heads = shard->n_heads;
    attention->head_dim = options->head_dim;
    mil_column_place(&attention->qkv, arena, backend, shard, &qkv);
    mil_row_place(&attention->o, arena, backend, shard, &o);
}

mil_status mil_attention_load(mil_attention *attention, mil_walk *walk, const mil_linear_names *qkv,
                              const mil_linear_names *o)
{
    MIL_TRY(mil_column_load(&attention->qkv, walk, qkv));
    return mil_row_load(&attention->o, walk, o);
}

mil_status mil_attention_forward(const mil_attention *attention, const mil_step *step, void *y,
                                 const uint16_t *x)
{
    const mil_backend *backend = step->context->backend;
    uint16_t *q = step->narrow;
    size_t width = (size_t)attention->n_heads * (size_t)attention->head_dim;
    uint16_t *out = q + mil_aligned_halves((size_t)mil_step_tokens(step) * width);
    MIL_TRY(mil_column_forward(&attention->qkv, step, step->wide, x));
    const mil_rope_write_args rope = {
        .q = q,
        .qkv = step->wide,
        .cos_table = step->cos_table,
        .sin_table = step->sin_table,
        .batch = step->batch,
        .slots = step->slots,
        .kv = step->kv,
        .layer = attention->layer,
        .n_heads = attention->n_heads,
        .rotary_dim = attention->head_dim,
    };
    MIL_TRY(backend->rope_write(step->context, &rope));
    const mil_attention_args args = {
        .out = out,
        .q = q,
        .out_dtype = MIL_DTYPE_BF16,
        .batch = step->batch,
        .slots = step->slots,
        .kv = step->kv,
        .layer = attention->layer,
        .n_heads = attention->n_heads,
        .scale = (float)(1.0 / sqrt((double)attention->head_dim)),
    };
    MIL_TRY(backend->attention(step->context, &args));
    return mil_row_forward(&attention->o, step, y, out);
}
