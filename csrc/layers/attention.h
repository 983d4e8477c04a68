/* Attention block: q, k, v as one column-parallel product, rotation and KV write, attention over
 * the rank's own heads, o as the row-parallel product. Numerics: transformers' LlamaAttention. */
#pragma once

#include "layers/column.h"
#include "layers/row.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_attention {
    mil_column qkv;
    mil_row o;
    int32_t layer;
    int32_t n_heads; /* of this rank */
    int32_t head_dim;
} mil_attention;

typedef struct mil_attention_options {
    int32_t layer;
    int32_t head_dim;
    bool has_bias; /* q, k, v and o */
} mil_attention_options;

void mil_attention_place(mil_attention *attention, mil_arena *arena, const mil_backend *backend,
                         const mil_shard *shard, const mil_attention_options *options);
/* qkv has three parts, o one. */
mil_status mil_attention_load(mil_attention *attention, mil_walk *walk, const mil_linear_names *qkv,
                              const mil_linear_names *o) MIL_WARN_UNUSED;
/* y [T, H] of product_dtype from x [T, H] bf16. Uses the step's wide and narrow scratch. */
mil_status mil_attention_forward(const mil_attention *attention, const mil_step *step, void *y,
                                 const uint16_t *x) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
