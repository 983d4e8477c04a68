/* Products over packed weights, with LoRA beside them: y = x W^T (+ bias) (+ scale (x A^T) B^T).
 *
 * One parallel region does a whole linear: x is packed by all threads; then base panels and the
 * 16-wide A panels of all segments are one list of work, taken by a counter; after a barrier,
 * expand adds to y. Who computes a panel never changes its bits: an output is one chain over all K,
 * inside one thread, and rows of a tile do not mix. Bound by bytes for few rows and by FMA for
 * many. */
#include "cpu/cpu.h"

#include <stdatomic.h>
#include <string.h>

#define PANEL 32
#define GROUP 16
/* Base work is dealt in this many portions a thread, so that a slow neighbour costs little. */
#define PORTIONS 8
/* Columns of one portion when there are many rows: its y stays in the second cache. */
#define MAX_PORTION_PANELS 8
#define PANEL_PAIR_BYTES 128
/* Within a page of where the stream is, so that the processor's own prefetcher goes along. */
#define STREAM_AHEAD_BYTES 2048
/* Up to here all packed rows stay in the second cache, and a panel is streamed over its whole K. */
#define RESIDENT_X_BYTES ((int64_t)256 << 10)

typedef struct product {
    const mil_context *context;
    const mil_cpu_linear_kernels *kernels;
    const mil_cpu_lora_kernels *lora_kernels;
    const mil_linear_args *base; /* NULL: LoRA only */
    const mil_lora_args *lora;   /* NULL: base only */
    bool has_shrink, has_expand;
    const uint16_t *x;
    int64_t ldx;
    int32_t M, K;
    float *y;
    int64_t ldy;
    const mil_weight *weight;
    char *packed_x; /* [n_blocks][M][x_stride] items */
    int32_t n_blocks;
    int32_t n_panels, portion_panels, n_portions;
    atomic_int next_row, next_work, next_expand;
} product;

/* ---- geometry ---- */

static int32_t smaller(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

static int32_t ceil_div(int32_t n, int32_t by)
{
    return n / by + (n % by != 0);
}

size_t mil_cpu_linear_workspace(int32_t M, int32_t K)
{
    /* x_stride is at most KC + 64 items of 4 bytes. */
    return (size_t)ceil_div(K, MIL_CPU_KC) * (size_t)M * (MIL_CPU_KC + 64) * sizeof(float);
}

static int32_t block_items(const product *p, int32_t block)
{
    return smaller(MIL_CPU_KC, p->K - block * MIL_CPU_KC);
}

static char *packed_row(const product *p, int32_t block, int32_t row)
{
    int64_t row_bytes = (int64_t)p->kernels->x_stride * p->kernels->x_item_bytes;
    return p->packed_x + ((int64_t)block * p->M + row) * row_bytes;
}

/* Tiles of equal height: 16 rows are 8 + 8, not 13 + 3. */
static int32_t tile_begin(int32_t rows, int32_t n_tiles, int32_t tile)
{
    return (int32_t)((int64_t)rows * tile / n_tiles);
}

/* ---- base ---- */

static void pack_x(product *p)
{
    int32_t row;
    while ((row = atomic_fetch_add_explicit(&p->next_row, 1, memory_order_relaxed)) < p->M) {
        for (int32_t b = 0; b < p->n_blocks; b++)
            p->kernels->pack_x(packed_row(p, b, row), p->x + row * p->ldx + b * MIL_CPU_KC,
                               block_items(p, b));
    }
}

static const uint16_t *weight_block(const product *p, int32_t panel, int32_t block)
{
    int64_t panel_items = (int64_t)PANEL * 2 * ceil_div(p->K, 2);
    return (const uint16_t *)p->weight->data + panel * panel_items +
           (int64_t)block * MIL_CPU_KC * PANEL;
}

/* All rows of one block of one panel. The tiles together fetch `next`, the block that follows; where
 * there is one tile only, the stream itself is fetched a little ahead. */
static void panel_block(const product *p, int32_t panel, int32_t block, const uint16_t *next)
{
    const uint16_t *w = weight_block(p, panel, block);
    int32_t n_pairs = ceil_div(block_items(p, block), 2);
    int32_t n_tiles = ceil_div(p->M, p->kernels->max_rows);
    int32_t step = ceil_div(PANEL_PAIR_BYTES, n_tiles);
    for (int32_t t = 0; t < n_tiles; t++) {
        int32_t row = tile_begin(p->M, n_tiles, t);
        int32_t rows = tile_begin(p->M, n_tiles, t + 1) - row;
        const char *fetch = n_tiles == 1 ? (const char *)w + STREAM_AHEAD_BYTES
                                         : (const char *)next + (int64_t)t * step * n_pairs;
        p->kernels->tile32[rows](p->y + row * p->ldy + panel * PANEL, p->ldy,
                                 packed_row(p, block, row), w, n_pairs, block > 0, fetch, step);
    }
}

/* Panels [first, end) in the order that keeps what is used again close: one panel over its whole K
 * while all of x stays in the second cache, else one block of K over all panels. */
static void panels_of_portion(const product *p, int32_t first, int32_t end)
{
    bool is_resident = p->M <= p->kernels->max_rows ||
                       (int64_t)p->M * p->K * p->kernels->x_item_bytes <= RESIDENT_X_BYTES;
    int32_t n = (end - first) * p->n_blocks;
    for (int32_t i = 0; i < n; i++) {
        int32_t after = i + 1 < n ? i + 1 : i;
        if (is_resident)
            panel_block(p, first + i / p->n_blocks, i % p->n_blocks,
                        weight_block(p, first + after / p->n_blocks, after % p->n_blocks));
        else
            panel_block(p, first + i % (end - first), i / (end - first),
                        weight_block(p, first + after % (end - first), after / (end - first)));
    }
}

/* The last panel when N is no multiple of 32: y has no room for its padding. */
static void narrow_panel(const product *p, int32_t panel)
{
    int32_t width = p->weight->N - panel * PANEL;
    int32_t n_tiles = ceil_div(p->M, p->kernels->max_rows);
    float tile[MIL_CPU_MAX_TILE_ROWS * PANEL];
    for (int32_t t = 0; t < n_tiles; t++) {
        int32_t row = tile_begin(p->M, n_tiles, t);
        int32_t rows = tile_begin(p->M, n_tiles, t + 1) - row;
        for (int32_t b = 0; b < p->n_blocks; b++)
            p->kernels->tile32[rows](tile, PANEL, packed_row(p, b, row),
                                     weight_block(p, panel, b), ceil_div(block_items(p, b), 2),
                                     b > 0, p->packed_x, 0);
        for (int32_t i = 0; i < rows; i++)
            memcpy(p->y + (row + i) * p->ldy + panel * PANEL, tile + i * PANEL,
                   (size_t)width * sizeof(float));
    }
}

static void add_bias(const product *p, int32_t begin, int32_t end)
{
    const float *bias = p->weight->bias;
    for (int32_t m = 0; m < p->M; m++) {
        for (int32_t n = begin; n < end; n++)
            p->y[m * p->ldy + n] += bias[n];
    }
}

static void base_portion(const product *p, int32_t portion)
{
    int32_t first = portion * p->portion_panels;
    int32_t end = smaller(first + p->portion_panels, p->n_panels);
    int32_t whole_end = smaller(end, p->weight->N / PANEL);
    panels_of_portion(p, first, whole_end);
    if (whole_end < end)
        narrow_panel(p, whole_end);
    if (p->weight->bias != NULL)
        add_bias(p, first * PANEL, smaller(end * PANEL, p->weight->N));
}

/* ---- LoRA ---- */

static const mil_lora_module *module_of(const product *p, int32_t segment, int32_t part)
{
    const mil_lora_args *lora = p->lora;
    return mil_lora_find(lora->table, lora->batch->segment_adapter[segment], lora->layer,
                         lora->projections[part]);
}

/* v = scale * chain, for a run of rows that follow one another in x: i in [begin, end) of
 * lora_rows. */
static void shrink_run(const product *p, const mil_lora_module *module, const uint16_t *panel,
                       float *v, int32_t first_row, int32_t rows)
{
    int64_t v_stride = p->lora->v_stride;
    int32_t n_tiles = ceil_div(rows, p->kernels->max_rows);
    for (int32_t t = 0; t < n_tiles; t++) {
        int32_t row = tile_begin(rows, n_tiles, t);
        int32_t height = tile_begin(rows, n_tiles, t + 1) - row;
        float *to = v + row * v_stride;
        for (int32_t b = 0; b < p->n_blocks; b++)
            p->kernels->tile16[height](to, v_stride, packed_row(p, b, first_row + row),
                                       panel + (int64_t)b * MIL_CPU_KC * GROUP,
                                       ceil_div(block_items(p, b), 2), b > 0, p->packed_x, 0);
        for (int32_t i = 0; i < height; i++) {
            for (int32_t r = 0; r < GROUP; r++)
                to[i * v_stride + r] *= module->scale;
        }
    }
}

/* One A panel (16 of an adapter's ranks) over all rows of a segment. */
static void shrink_panel(const product *p, int32_t segment, int32_t part, int32_t panel)
{
    const mil_lora_module *module = module_of(p, segment, part);
    const mil_batch *batch = p->lora->batch;
    const int32_t *rows = batch->lora_rows;
    const uint16_t *a =
        (const uint16_t *)module->a + (int64_t)panel * GROUP * 2 * ceil_div(p->K, 2);
    int32_t end = batch->segment_indptr[segment + 1];
    for (int32_t i = batch->segment_indptr[segment]; i < end;) {
        int32_t run = 1;
        while (i + run < end && rows[i + run] == rows[i] + run)
            run++;
        float *v =
            p->lora->v + i * p->lora->v_stride + part * p->lora->v_part_stride + panel * GROUP;
        shrink_run(p, module, a, v, rows[i], run);
        i += run;
    }
}

/* Where a thread is in the list of all A panels; it only moves on. */
typedef struct cursor {
    int32_t segment, part;
    int32_t first; /* index in the list of this module's first panel */
} cursor;

/* Compute A panel `index` of the list; false when the list is shorter. */
static bool shrink_index(const product *p, cursor *at, int32_t index)
{
    int32_t n_segments = p->lora->batch->header->n_segments;
    while (at->segment < n_segments) {
        int32_t n_panels = module_of(p, at->segment, at->part)->rank > 0
                               ? module_of(p, at->segment, at->part)->padded_rank / GROUP
                               : 0;
        if (index < at->first + n_panels) {
            shrink_panel(p, at->segment, at->part, index - at->first);
            return true;
        }
        at->first += n_panels;
        if (++at->part == p->lora->n_parts) {
            at->part = 0;
            at->segment++;
        }
    }
    return false;
}

/* Panels [begin, end) of a part's B, for all rows of a segment. */
static void expand_part(const product *p, int32_t segment, int32_t part, int32_t begin, int32_t end)
{
    const mil_lora_module *module = module_of(p, segment, part);
    if (module->rank == 0 || begin == end)
        return;
    const mil_batch *batch = p->lora->batch;
    int32_t column = mil_weight_row(p->weight, part, begin * GROUP);
    int32_t step = p->weight->interleave > 0 ? GROUP * p->weight->n_parts : GROUP;
    int32_t last_width = smaller(GROUP, module->out - (end - 1) * GROUP);
    const uint16_t *b = (const uint16_t *)module->b + (int64_t)begin * GROUP * module->padded_rank;
    int32_t last = batch->segment_indptr[segment + 1];
    for (int32_t i = batch->segment_indptr[segment]; i < last; i += MIL_CPU_EXPAND_ROWS) {
        const float *v = p->lora->v + i * p->lora->v_stride + part * p->lora->v_part_stride;
        p->lora_kernels->expand(p->y + column, p->ldy, batch->lora_rows + i,
                                smaller(MIL_CPU_EXPAND_ROWS, last - i), v, p->lora->v_stride, b,
                                end - begin, module->padded_rank, step, last_width);
    }
}

static void expand_portion(const product *p, int32_t portion, int32_t n_portions)
{
    for (int32_t segment = 0; segment < p->lora->batch->header->n_segments; segment++) {
        for (int32_t part = 0; part < p->lora->n_parts; part++) {
            int64_t n_panels = ceil_div(p->weight->part_rows[part], GROUP);
            expand_part(p, segment, part, (int32_t)(n_panels * portion / n_portions),
                        (int32_t)(n_panels * (portion + 1) / n_portions));
        }
    }
}

/* ---- the region ---- */

static int32_t take(atomic_int *counter)
{
    return atomic_fetch_add_explicit(counter, 1, memory_order_relaxed);
}

static void product_task(void *argument, int32_t thread, int32_t n_threads)
{
    product *p = argument;
    if (p->base != NULL || p->has_shrink) {
        pack_x(p);
        mil_cpu_barrier(p->context, thread);
        cursor at = {0, 0, p->n_portions};
        for (;;) {
            int32_t index = take(&p->next_work);
            if (index < p->n_portions)
                base_portion(p, index);
            else if (!p->has_shrink || !shrink_index(p, &at, index))
                break;
        }
    }
    if (!p->has_expand)
        return;
    if (p->has_shrink)
        mil_cpu_barrier(p->context, thread);
    int32_t n_portions = n_threads * PORTIONS;
    int32_t portion;
    while ((portion = take(&p->next_expand)) < n_portions)
        expand_portion(p, portion, n_portions);
}

static mil_status run(mil_context *context, product *p)
{
    const mil_cpu_kernels *kernels = mil_cpu_kernels_of(context);
    p->context = context;
    p->kernels = kernels->linear;
    p->lora_kernels = kernels->lora;
    p->packed_x = context->workspace;
    p->n_blocks = ceil_div(p->K, MIL_CPU_KC);
    size_t needed = mil_cpu_linear_workspace(p->M, p->K);
    if ((p->base != NULL || p->has_shrink) && context->workspace_bytes < needed)
        return mil_fail(MIL_ERR_INTERNAL, "linear: workspace is %zu bytes, expected %zu",
                        context->workspace_bytes, needed);
    if (p->base != NULL) {
        p->n_panels = ceil_div(p->weight->N, PANEL);
        p->portion_panels = ceil_div(p->n_panels, PORTIONS * mil_cpu_n_threads(context));
        if (p->portion_panels > MAX_PORTION_PANELS && p->M > p->kernels->max_rows)
            p->portion_panels = MAX_PORTION_PANELS;
        p->n_portions = ceil_div(p->n_panels, p->portion_panels);
    }
    mil_cpu_run(context, product_task, p);
    return MIL_OK;
}

static bool has_segments(const mil_lora_args *lora)
{
    return lora != NULL && lora->batch->header->n_segments > 0;
}

mil_status mil_cpu_linear_lora(mil_context *context, const mil_linear_args *args,
                               const mil_lora_args *lora)
{
    bool with_lora = has_segments(lora);
    product p = {
        .base = args,
        .lora = with_lora ? lora : NULL,
        .has_shrink = with_lora,
        .has_expand = with_lora,
        .x = args->x,
        .ldx = args->ldx,
        .M = args->M,
        .K = args->weight->K,
        .y = args->y,
        .ldy = args->ldy,
        .weight = args->weight,
    };
    return args->M == 0 ? MIL_OK : run(context, &p);
}

mil_status mil_cpu_linear(mil_context *context, const mil_linear_args *args)
{
    return mil_cpu_linear_lora(context, args, NULL);
}

/* ---- LoRA alone ---- */

/* Columns of x, which every module of one linear shares; 0 when no segment touches it. */
static int32_t shrink_columns(const mil_lora_args *lora)
{
    for (int32_t g = 0; g < lora->batch->header->n_segments; g++) {
        for (int32_t part = 0; part < lora->n_parts; part++) {
            const mil_lora_module *module = mil_lora_find(
                lora->table, lora->batch->segment_adapter[g], lora->layer, lora->projections[part]);
            if (module->rank > 0)
                return module->in;
        }
    }
    return 0;
}

mil_status mil_cpu_lora_shrink(mil_context *context, const mil_lora_shrink_args *args)
{
    product p = {
        .lora = &args->lora,
        .has_shrink = true,
        .x = args->x,
        .ldx = args->ldx,
        .M = args->lora.batch->header->n_tokens,
        .K = shrink_columns(&args->lora),
    };
    return p.K == 0 || p.M == 0 ? MIL_OK : run(context, &p);
}

mil_status mil_cpu_lora_expand(mil_context *context, const mil_lora_expand_args *args)
{
    product p = {
        .lora = &args->lora,
        .has_expand = true,
        .y = args->y,
        .ldy = args->ldy,
        .weight = args->weight,
    };
    return has_segments(&args->lora) ? run(context, &p) : MIL_OK;
}
