/* Between linear.c and lora.c: one linear as one parallel region, with or without LoRA. */
#pragma once

#include "cpu/cpu.h"

#include <stdatomic.h>

#define MIL_CPU_PANEL 32 /* columns of a weight's panel */
#define MIL_CPU_GROUP 16 /* columns of a LoRA panel */
/* Work is dealt in this many portions a thread, so that a slow neighbour costs little. */
#define MIL_CPU_PORTIONS 8

typedef struct mil_cpu_product {
    const mil_context *context;
    const mil_cpu_kernels *kernels;
    const uint16_t *x; /* [M, ldx] bf16 */
    int64_t ldx;
    int32_t M, K;
    float *y; /* [M, ldy] */
    int64_t ldy;
    const mil_weight *weight;  /* of the base, or of expand for its parts; NULL for shrink alone */
    const mil_lora_args *lora; /* NULL: base only */
    const mil_act_args *act;   /* gate_up_act's epilogue, or NULL */
    bool has_base, has_shrink, has_expand;
    char *packed_x; /* [n_blocks][M][x_stride] items */
    char *wide;     /* [n_threads][MIL_CPU_WIDE_BYTES] */
    int32_t n_blocks;
    int32_t n_panels, portion_panels, n_portions;
    atomic_int next_row, next_work, next_expand;
} mil_cpu_product;

/* Run the region: pack x, base panels and A panels as one list, a barrier, expand. */
mil_status mil_cpu_product_run(mil_context *context, mil_cpu_product *product);

/* Where a thread is in the list of A panels of all segments and parts, each over one piece of the
 * segment's rows after another; it only moves on. */
typedef struct mil_cpu_shrink_cursor {
    int32_t segment, part;
    int32_t first; /* index in the list of this module's first piece */
} mil_cpu_shrink_cursor;

/* Compute piece `index` of the list into v; false when the list is shorter. */
bool mil_cpu_shrink_panel(const mil_cpu_product *product, mil_cpu_shrink_cursor *at, int32_t index);
/* Add one of n_portions to y, for all segments: of every part's columns where act follows (it takes
 * the same columns) or rows are few, else of rows. */
void mil_cpu_expand_portion(const mil_cpu_product *product, int32_t portion, int32_t n_portions);

/* ---- geometry ---- */

static inline int32_t mil_cpu_smaller(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

static inline int32_t mil_cpu_ceil_div(int32_t n, int32_t by)
{
    return n / by + (n % by != 0);
}

/* First row of a tile. Heights are alike (16 rows are 8 + 8, not 12 + 4) and even but for the last,
 * since odd ones run worse. */
static inline int32_t mil_cpu_tile_begin(int32_t rows, int32_t n_tiles, int32_t tile)
{
    int64_t row_pairs = mil_cpu_ceil_div(rows, 2);
    return mil_cpu_smaller(rows, (int32_t)(row_pairs * tile / n_tiles) * 2);
}

static inline int32_t mil_cpu_block_pairs(const mil_cpu_product *p, int32_t block)
{
    return mil_cpu_ceil_div(mil_cpu_smaller(MIL_CPU_KC, p->K - block * MIL_CPU_KC), 2);
}

static inline char *mil_cpu_packed_row(const mil_cpu_product *p, int32_t block, int32_t row)
{
    const mil_cpu_linear_kernels *kernels = p->kernels->linear;
    int64_t row_bytes = (int64_t)kernels->x_stride * kernels->x_item_bytes;
    return p->packed_x + ((int64_t)block * p->M + row) * row_bytes;
}
