/* What every tensor-parallel layer shares: memory dealt out of one slab, one walk over its tensors,
 * and the view of a step that its forward gets.
 *
 * A layer lives through three calls. `place` sets its geometry for one rank and takes its memory
 * from an arena: run once without memory to measure, once with the slab. `load` names its tensors:
 * run once to check that they are there with the right shapes, once to load this rank's slices.
 * `forward` runs in a step and allocates nothing. Layers know slices and options, never model
 * families. */
#pragma once

#include "comm/comm.h"
#include "loader/loader.h"
#include "ops/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- memory ---- */

/* Deals out one slab; with data NULL it only measures. used is SIZE_MAX once a size has overflowed.
 */
typedef struct mil_arena {
    char *data;
    size_t used;
} mil_arena;

/* The next n items of item_bytes, aligned to MIL_ALIGN; NULL when measuring. */
void *mil_arena_take(mil_arena *arena, size_t n, size_t item_bytes);
/* Sets weight's format and data for its N and K, as the backend packs it. */
void mil_arena_take_weight(mil_arena *arena, const mil_backend *backend, mil_weight *weight);

/* ---- tensors ---- */

#define MIL_NAME_BYTES 96

/* Names of a linear's tensors, part by part. */
typedef struct mil_linear_names {
    char weight[MIL_MAX_PARTS][MIL_NAME_BYTES];
    char bias[MIL_MAX_PARTS][MIL_NAME_BYTES]; /* read where the layer was placed with a bias */
} mil_linear_names;

/* One walk over a rank's tensors. Without a loader it checks names and shapes, and counts. */
typedef struct mil_walk {
    const mil_shard *shard;
    const mil_source *source;
    mil_loader *loader; /* NULL: check only */
    uint64_t n_bytes;   /* what the loader will report as progress, counted by a checking walk */
} mil_walk;

mil_status mil_walk_weight(mil_walk *walk, mil_weight *weight, int32_t part, const char *name,
                           const mil_slice *slice) MIL_WARN_UNUSED;
mil_status mil_walk_vector(mil_walk *walk, float *out, const char *name, int64_t length,
                           int64_t begin, int64_t n) MIL_WARN_UNUSED;

/* ---- a step ---- */

/* One rank's view of the step it runs. Written once before the forward; layers only read it. */
typedef struct mil_step {
    mil_context *context;
    mil_comm *comm; /* NULL: a world of one */
    const mil_batch *batch;
    mil_slots *slots;
    const mil_kv *kv;
    const mil_lora_table *lora;
    float *lora_v;          /* [T, MIL_MAX_PARTS * lora_rank] */
    int32_t lora_rank;      /* v_part_stride of the batch's LoRA; 0: no LoRA in it */
    const float *cos_table; /* [positions, D / 2] */
    const float *sin_table;
    void *wide;       /* [T, max((N + 2 K) D, 2 F)] scratch of product_dtype: what a column-parallel
                         product gives */
    uint16_t *narrow; /* [2 (T N D), padded] or [T, F] scratch: what enters the row-parallel one */
} mil_step;

/* Elements of bf16 so that what follows them is aligned as backends need it. */
static inline size_t mil_aligned_halves(size_t n)
{
    return mil_round_up(n, MIL_ALIGN / sizeof(uint16_t));
}

/* Rows that ops work on: the bucket of the batch, whose padding nobody reads. */
static inline int32_t mil_step_tokens(const mil_step *step)
{
    return step->batch->header->bucket_tokens;
}

/* data[n] of float32 summed over the ranks; nothing for a world of one. (A backend with another
 * product_dtype serves a world of one only.) */
mil_status mil_step_all_reduce(const mil_step *step, void *data, int64_t n) MIL_WARN_UNUSED;

/* The LoRA operand of a linear with these parts, written to *storage; NULL when the batch has none.
 */
const mil_lora_args *mil_step_lora(const mil_step *step, mil_lora_args *storage, int32_t layer,
                                   const mil_projection *projections, int32_t n_parts);

#ifdef __cplusplus
}
#endif
