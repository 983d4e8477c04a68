/* Row-parallel linear, LoRA included: each rank holds some columns of W, and the ranks' partial
 * results are summed by one all-reduce in fp32.
 *
 * LoRA follows: A split with W, B whole, so that its partial sum joins the same all-reduce. A bias
 * is rank 0's alone, so that it is added once. */
#pragma once

#include "layers/layer.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_row {
    mil_weight weight;
    int32_t layer;
    mil_projection projection;
    bool has_bias; /* of this rank */
} mil_row;

typedef struct mil_row_options {
    int32_t layer;
    mil_projection projection;
    bool has_bias;
} mil_row_options;

void mil_row_place(mil_row *row, mil_arena *arena, const mil_backend *backend,
                   const mil_shard *shard, const mil_row_options *options);
/* Reads part 0 of names. */
mil_status mil_row_load(mil_row *row, mil_walk *walk, const mil_linear_names *names)
    MIL_WARN_UNUSED;
/* y [T, H] = x [T, K] W^T + bias + LoRA, whole on every rank. */
mil_status mil_row_forward(const mil_row *row, const mil_step *step, void *y, const uint16_t *x)
    MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
