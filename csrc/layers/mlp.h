/* Gated MLP: gate and up as one column-parallel product, SwiGLU, down as the row-parallel one.
 * Numerics: transformers' LlamaMLP. */
#pragma once

#include "layers/column.h"
#include "layers/row.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_mlp {
    mil_column gate_up;
    mil_row down;
    mil_activation activation;
} mil_mlp;

typedef struct mil_mlp_options {
    int32_t layer;
    mil_activation activation;
} mil_mlp_options;

void mil_mlp_place(mil_mlp *mlp, mil_arena *arena, const mil_backend *backend,
                   const mil_shard *shard, const mil_mlp_options *options);
/* gate_up has two parts, down one. */
mil_status mil_mlp_load(mil_mlp *mlp, mil_walk *walk, const mil_linear_names *gate_up,
                        const mil_linear_names *down) MIL_WARN_UNUSED;
/* y [T, H] of product_dtype from x [T, H] bf16. Uses the step's wide and narrow scratch. */
mil_status mil_mlp_forward(const mil_mlp *mlp, const mil_step *step, void *y, const uint16_t *x)
    MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
