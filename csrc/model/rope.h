/* Tables of cosines and sines for rotary embedding, made once and shared by every rank and runner.
 *
 * Formulas and roundings are those of transformers (modeling_rope_utils.py: _compute_default_rope_
 * parameters, _compute_linear_scaling_rope_parameters, _compute_llama3_parameters; and
 * LlamaRotaryEmbedding.forward): inverse frequencies and angles are rounded to float32 there and
 * here; everything in between, cosine and sine included, is computed in double. */
#pragma once

#include "base/memory.h"
#include "milpy.h"

#ifdef __cplusplus
extern "C" {
#endif

#define MIL_MAX_ROTARY_PAIRS 128

typedef struct mil_rope {
    mil_slab slab; /* room for max_position rows; the system gives only the rows that are written */
    float *cos_table; /* [n_ready, n_pairs] */
    float *sin_table;
    float frequencies[MIL_MAX_ROTARY_PAIRS];
    int32_t n_pairs; /* D / 2 */
    int32_t n_ready;
    int32_t max_position;
} mil_rope;

/* Of a checked config. No row is ready yet. */
mil_status mil_rope_init(mil_rope *rope, const mil_config *config) MIL_WARN_UNUSED;
void mil_rope_deinit(mil_rope *rope);
/* Make rows 0 .. min(n_positions, max_position) - 1 ready. Rows that were are not written again, so
 * a step may read them meanwhile; callers of this exclude each other. */
void mil_rope_reach(mil_rope *rope, int32_t n_positions);

#ifdef __cplusplus
}
#endif
