/* What the kernels of attention's Hopper path share: their parameters, and reading keys by boxes.
 */
#pragma once

#include "kernels/attention.cuh"
#include "kernels/hopper.cuh"

#include <cuda.h>

#define MIL_BOX_KEYS MIL_ATTENTION_BLOCK /* of a tensor map's box: they lie in one page */
#define MIL_BOX_ROW 128                  /* bytes: 64 bf16 or f16, swizzled */
#define MIL_BOX_BYTES (MIL_BOX_KEYS * MIL_BOX_ROW)

typedef struct mil_attention_sm90 {
    uint16_t *out;
    const uint16_t *q;
    const int32_t *page_table;
    mil_attention_places places;
    mil_attention_partials partials;
    int32_t n_heads, n_kv_heads, group, head_dim;
    int32_t page_shift; /* boxes of a page, as a power of two */
    int32_t max_pages, last_page;
    int32_t window;
    mil_attention_scale scale;
    mil_dtype dtype, out_dtype; /* of q, K, V; of out: over pages of float16 either */
} mil_attention_sm90;

/* The first row of the maps' box `box` of a sequence, for one kv head. A page id out of range is
 * that of a page that nothing is used of. */
static __device__ __forceinline__ int32_t mil_attention_box_row(const mil_attention_sm90 &p,
                                                                int32_t slot, int32_t kv_head,
                                                                int32_t box)
{
    const int32_t entry = min(box >> p.page_shift, p.max_pages - 1);
    const int32_t page = p.page_table[(int64_t)slot * p.max_pages + entry];
    const int32_t in_page = box & ((1 << p.page_shift) - 1);
    return (((min(max(page, 0), p.last_page) * p.n_kv_heads + kv_head) << p.page_shift) + in_page) *
           MIL_BOX_KEYS;
}

/* Both queue one kernel over their part of the step's list. */
mil_status mil_attention_chunks_sm90(const mil_queue *queue, const mil_attention_sm90 *params,
                                     const CUtensorMap (&maps)[2], int64_t n_tiles);
mil_status mil_attention_decode_sm90(const mil_queue *queue, const mil_attention_sm90 *params,
                                     const CUtensorMap (&maps)[2], int64_t n_tiles);
