/* Column-parallel linear, LoRA included: each rank holds some rows of W and gives those columns of
 * y.
 *
 * Several projections of one input are one weight ("merged"): q, k, v; gate, up. LoRA follows: A
 * whole on every rank, B split with W, so no collective is needed. */
#pragma once

#include "layers/layer.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_column {
    mil_weight weight;
    int32_t layer;
    int32_t n_parts;
    mil_projection projections[MIL_MAX_PARTS];
    bool has_bias;
} mil_column;

typedef struct mil_column_options {
    int32_t layer;
    int32_t n_parts;
    mil_projection projections[MIL_MAX_PARTS];
    int32_t interleave; /* of the packed rows, see weight.h; 0 where there is a bias */
    bool has_bias;
} mil_column_options;

void mil_column_place(mil_column *column, mil_arena *arena, const mil_backend *backend,
                      const mil_shard *shard, const mil_column_options *options);
mil_status mil_column_load(mil_column *column, mil_walk *walk, const mil_linear_names *names)
    MIL_WARN_UNUSED;
/* y [T, N] = x [T, K] W^T + bias + LoRA. */
mil_status mil_column_forward(const mil_column *column, const mil_step *step, void *y,
                              const uint16_t *x) MIL_WARN_UNUSED;
/* out [T, N / 2] = act(gate) * up, for a column of those two parts. */
mil_status mil_column_forward_act(const mil_column *column, const mil_step *step, uint16_t *out,
                                  const uint16_t *x, mil_activation kind) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
