/* RMSNorm, and the residual add before it. Its weight is whole on every rank. Numerics:
 * transformers' LlamaRMSNorm in float32, rounded to bfloat16 once. */
#pragma once

#include "layers/layer.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_norm {
    float *weight; /* [H] */
    int32_t hidden;
    float eps;
} mil_norm;

void mil_norm_place(mil_norm *norm, mil_arena *arena, int32_t hidden, float eps);
mil_status mil_norm_load(mil_norm *norm, mil_walk *walk, const char *name) MIL_WARN_UNUSED;
/* x += residual (may be NULL), out = norm(x) as bf16, over rows [n_rows] of x (NULL: the first
 * n_rows). */
mil_status mil_norm_forward(const mil_norm *norm, const mil_step *step, uint16_t *out, float *x,
                            const void *residual, const int32_t *rows, int32_t n_rows)
    MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
