/* Products over packed weights: y = x W^T (+ bias), with LoRA and SwiGLU beside them in one region.
 *
 * x is packed by all threads; then base panels and the 16-wide A panels of all segments are one
 * list of work, taken by a counter; after a barrier, expand adds to y. Who computes a panel never
 * changes its bits: an output is one chain over all K, inside one thread, and rows of a tile do not
 * mix. Bound by bytes for few rows and by FMA for many. */
#include "cpu/linear.h"

#include <string.h>

#define PANEL MIL_CPU_PANEL
#define PANEL_PAIR_BYTES 128
/* Columns of one portion when there are many rows: its y stays in the second cache. */
#define MAX_PORTION_PANELS 16
#define NOT_TAKEN (-1)
/* With more tiles than this, the first leaves its widened weights for the others. */
#define PLAIN_TILES 2
/* Up to here all packed rows stay in the second cache, and a panel is streamed over its whole K. */
#define RESIDENT_X_BYTES ((int64_t)512 << 10)

/* x_stride is at most KC + 64 items of 4 bytes. */
static size_t packed_x_bytes(int32_t M, int32_t K)
{
    return (size_t)mil_cpu_ceil_div(K, MIL_CPU_KC) * (size_t)M * (MIL_CPU_KC + 64) * sizeof(float);
}

size_t mil_cpu_linear_workspace(int32_t M, int32_t K, int32_t n_threads)
{
    return packed_x_bytes(M, K) + (size_t)n_threads * MIL_CPU_WIDE_BYTES;
}

static int32_t take(atomic_int *counter)
{
    return atomic_fetch_add_explicit(counter, 1, memory_order_relaxed);
}

static void pack_x(mil_cpu_product *p)
{
    int32_t row;
    while ((row = take(&p->next_row)) < p->M) {
        for (int32_t b = 0; b < p->n_blocks; b++)
            p->kernels->linear->pack_x(mil_cpu_packed_row(p, b, row),
                                       p->x + row * p->ldx + b * MIL_CPU_KC,
                                       mil_cpu_smaller(MIL_CPU_KC, p->K - b * MIL_CPU_KC));
    }
}

/* ---- base ---- */

static const uint16_t *weight_block(const mil_cpu_product *p, int32_t panel, int32_t block)
{
    int64_t panel_items = (int64_t)PANEL * 2 * mil_cpu_ceil_div(p->K, 2);
    return (const uint16_t *)p->weight->data + panel * panel_items +
           (int64_t)block * MIL_CPU_KC * PANEL;
}

/* All rows of one block of one panel. The tiles together fetch `next`, the block that follows;
 * where there is one tile only, the stream itself is fetched a little ahead. */
static void panel_block(const mil_cpu_product *p, int32_t thread, int32_t panel, int32_t block,
                        const uint16_t *next)
{
    const mil_cpu_linear_kernels *kernels = p->kernels->linear;
    const uint16_t *w = weight_block(p, panel, block);
    float *wide = (float *)(p->wide + (size_t)thread * MIL_CPU_WIDE_BYTES);
    int32_t n_pairs = mil_cpu_block_pairs(p, block);
    bool is_wide = kernels->wide_rows > 0 && p->M > PLAIN_TILES * kernels->wide_rows;
    int32_t n_tiles = mil_cpu_ceil_div(p->M, is_wide ? kernels->wide_rows : kernels->max_rows);
    int32_t step = mil_cpu_ceil_div(PANEL_PAIR_BYTES, n_tiles);
    const char *fetch = n_tiles == 1 ? (const char *)w + kernels->ahead_bytes : (const char *)next;
    for (int32_t t = 0; t < n_tiles; t++) {
        int32_t row = mil_cpu_tile_begin(p->M, n_tiles, t);
        int32_t rows = mil_cpu_tile_begin(p->M, n_tiles, t + 1) - row;
        const mil_cpu_tile_fn *tiles = !is_wide ? kernels->tile32
                                       : t == 0 ? kernels->widen32
                                                : kernels->wide32;
        tiles[rows](p->y + row * p->ldy + panel * PANEL, p->ldy, mil_cpu_packed_row(p, block, row),
                    is_wide && t > 0 ? (const void *)wide : w, wide, n_pairs, block > 0, fetch,
                    step);
        fetch += (int64_t)step * n_pairs;
    }
}

/* The portion that this thread does after `portion`, taken before that one ends so that its first
 * block can be fetched; NOT_TAKEN while another thread may still wait for a first one. */
static int32_t take_ahead(mil_cpu_product *p, int32_t portion)
{
    bool are_enough = portion + mil_cpu_n_threads(p->context) < p->n_portions;
    return are_enough ? take(&p->next_work) : NOT_TAKEN;
}

/* Block i of panels [first, end) in the order that keeps what is used again close: one panel over
 * its whole K while all of x stays in the second cache, else one block of K over all panels. */
static void locate(const mil_cpu_product *p, int32_t first, int32_t end, int32_t i, int32_t *panel,
                   int32_t *block)
{
    const mil_cpu_linear_kernels *kernels = p->kernels->linear;
    bool is_resident = p->M <= kernels->max_rows ||
                       (int64_t)p->M * p->K * kernels->x_item_bytes <= RESIDENT_X_BYTES;
    *panel = first + (is_resident ? i / p->n_blocks : i % (end - first));
    *block = is_resident ? i % p->n_blocks : i / (end - first);
}

/* Panels [first, end) of a portion; returns take_ahead's answer. */
static int32_t whole_panels(mil_cpu_product *p, int32_t thread, int32_t portion, int32_t first,
                            int32_t end)
{
    int32_t n = (end - first) * p->n_blocks;
    int32_t taken = NOT_TAKEN;
    for (int32_t i = 0; i < n; i++) {
        int32_t panel, block, next_panel, next_block;
        locate(p, first, end, i, &panel, &block);
        locate(p, first, end, i + 1 < n ? i + 1 : i, &next_panel, &next_block);
        if (i + 1 == n)
            taken = take_ahead(p, portion);
        if (taken != NOT_TAKEN && taken < p->n_portions) {
            next_panel = taken * p->portion_panels;
            next_block = 0;
        }
        panel_block(p, thread, panel, block, weight_block(p, next_panel, next_block));
    }
    return taken;
}

/* The last panel when N is no multiple of 32: y has no room for its padding. */
static void narrow_panel(const mil_cpu_product *p, int32_t panel)
{
    const mil_cpu_linear_kernels *kernels = p->kernels->linear;
    size_t width = (size_t)(p->weight->N - panel * PANEL);
    int32_t n_tiles = mil_cpu_ceil_div(p->M, kernels->max_rows);
    float tile[MIL_CPU_MAX_TILE_ROWS * PANEL];
    for (int32_t t = 0; t < n_tiles; t++) {
        int32_t row = mil_cpu_tile_begin(p->M, n_tiles, t);
        int32_t rows = mil_cpu_tile_begin(p->M, n_tiles, t + 1) - row;
        for (int32_t b = 0; b < p->n_blocks; b++)
            kernels->tile32[rows](tile, PANEL, mil_cpu_packed_row(p, b, row),
                                  weight_block(p, panel, b), NULL, mil_cpu_block_pairs(p, b), b > 0,
                                  p->packed_x, 0);
        for (int32_t i = 0; i < rows; i++)
            memcpy(p->y + (row + i) * p->ldy + panel * PANEL, tile + i * PANEL,
                   width * sizeof(float));
    }
}

static void add_bias(const mil_cpu_product *p, int32_t begin, int32_t end)
{
    const float *bias = p->weight->bias;
    for (int32_t m = 0; m < p->M; m++) {
        for (int32_t n = begin; n < end; n++)
            p->y[m * p->ldy + n] += bias[n];
    }
}

/* SwiGLU over columns [begin, end) of y, multiples of 32, while they are in cache. */
static void activate(const mil_cpu_product *p, int32_t begin, int32_t end)
{
    const mil_act_args *act = p->act;
    for (int32_t m = 0; m < p->M; m++)
        p->kernels->act->silu_mul(act->out + (int64_t)m * act->ffn + begin / 2,
                                  p->y + m * p->ldy + begin, (end - begin) / 2, act->interleave);
}

/* Returns the index of the work to do next, or NOT_TAKEN. */
static int32_t base_portion(mil_cpu_product *p, int32_t thread, int32_t portion)
{
    int32_t first = portion * p->portion_panels;
    int32_t end = mil_cpu_smaller(first + p->portion_panels, p->n_panels);
    int32_t whole_end = mil_cpu_smaller(end, p->weight->N / PANEL);
    int32_t taken = whole_panels(p, thread, portion, first, whole_end);
    if (whole_end < end)
        narrow_panel(p, whole_end);
    if (p->weight->bias != NULL)
        add_bias(p, first * PANEL, mil_cpu_smaller(end * PANEL, p->weight->N));
    if (p->act != NULL && !p->has_expand)
        activate(p, first * PANEL, end * PANEL);
    return taken;
}

/* ---- the region ---- */

static void base_and_shrink(mil_cpu_product *p, int32_t thread)
{
    mil_cpu_shrink_cursor at = {0, 0, p->n_portions};
    int32_t index = take(&p->next_work);
    for (;;) {
        int32_t taken = NOT_TAKEN;
        if (index < p->n_portions)
            taken = base_portion(p, thread, index);
        else if (!p->has_shrink || !mil_cpu_shrink_panel(p, &at, index))
            return;
        index = taken == NOT_TAKEN ? take(&p->next_work) : taken;
    }
}

static void expand_and_activate(mil_cpu_product *p, int32_t n_threads)
{
    int32_t n_portions = n_threads * MIL_CPU_PORTIONS;
    int32_t i;
    while ((i = take(&p->next_expand)) < n_portions) {
        mil_cpu_expand_portion(p, i, n_portions);
        if (p->act != NULL)
            activate(p, (int32_t)((int64_t)p->n_panels * i / n_portions) * PANEL,
                     (int32_t)((int64_t)p->n_panels * (i + 1) / n_portions) * PANEL);
    }
}

static void product_task(void *argument, int32_t thread, int32_t n_threads)
{
    mil_cpu_product *p = argument;
    if (p->has_base || p->has_shrink) {
        pack_x(p);
        mil_cpu_barrier(p->context, thread);
        base_and_shrink(p, thread);
    }
    if (p->has_expand) {
        mil_cpu_barrier(p->context, thread);
        expand_and_activate(p, n_threads);
    }
}

mil_status mil_cpu_product_run(mil_context *context, mil_cpu_product *p)
{
    p->context = context;
    p->kernels = mil_cpu_kernels_of(context);
    p->packed_x = context->workspace;
    p->wide = p->packed_x + packed_x_bytes(p->M, p->K);
    p->n_blocks = mil_cpu_ceil_div(p->K, MIL_CPU_KC);
    size_t needed = mil_cpu_linear_workspace(p->M, p->K, mil_cpu_n_threads(context));
    if (context->workspace_bytes < needed)
        return mil_fail(MIL_ERR_INTERNAL, "linear: workspace is %zu bytes, expected %zu",
                        context->workspace_bytes, needed);
    if (p->has_base) {
        p->n_panels = mil_cpu_ceil_div(p->weight->N, PANEL);
        p->portion_panels =
            mil_cpu_ceil_div(p->n_panels, MIL_CPU_PORTIONS * mil_cpu_n_threads(context));
        if (p->portion_panels > MAX_PORTION_PANELS && p->M > p->kernels->linear->max_rows)
            p->portion_panels = MAX_PORTION_PANELS;
        p->n_portions = mil_cpu_ceil_div(p->n_panels, p->portion_panels);
    }
    mil_cpu_run(context, product_task, p);
    return MIL_OK;
}

/* ---- slots ---- */

static mil_status run_linear(mil_context *context, const mil_linear_args *args,
                             const mil_lora_args *lora, const mil_act_args *act)
{
    bool has_lora = lora != NULL && lora->batch->header->n_segments > 0;
    mil_cpu_product product = {
        .x = args->x,
        .ldx = args->ldx,
        .M = args->M,
        .K = args->weight->K,
        .y = args->y,
        .ldy = args->ldy,
        .weight = args->weight,
        .lora = lora,
        .act = act,
        .has_base = true,
        .has_shrink = has_lora,
        .has_expand = has_lora,
    };
    return args->M == 0 ? MIL_OK : mil_cpu_product_run(context, &product);
}

mil_status mil_cpu_linear(mil_context *context, const mil_linear_args *args)
{
    return run_linear(context, args, NULL, NULL);
}

mil_status mil_cpu_linear_lora(mil_context *context, const mil_linear_args *args,
                               const mil_lora_args *lora)
{
    return run_linear(context, args, lora, NULL);
}

/* Fused where gate and up alternate within a panel, as this backend asks for. */
mil_status mil_cpu_gate_up_act(mil_context *context, const mil_linear_args *args,
                               const mil_lora_args *lora, const mil_act_args *act)
{
    if (act->kind == MIL_ACTIVATION_SILU && act->interleave == MIL_CPU_GROUP &&
        args->weight->interleave == MIL_CPU_GROUP)
        return run_linear(context, args, lora, act);
    MIL_TRY(run_linear(context, args, lora, NULL));
    return mil_cpu_act(context, act);
}
