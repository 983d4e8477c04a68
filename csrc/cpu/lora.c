/* LoRA's two halves, over the segments of a batch: shrink v = scale * (x A^T) is a product over
 * panels 16 wide, expand adds v B^T to y. Both cost by real ranks and rows: base rows are in no
 * segment.
 *
 * An output is one chain inside one thread, so that who computes it, and who else is in the batch,
 * does not show in its bits. */
#include "cpu/linear.h"

#include <assert.h>

#define GROUP MIL_CPU_GROUP
#define SHRINK_AHEAD_BYTES 1024

static const mil_lora_module *module_of(const mil_lora_args *lora, int32_t segment, int32_t part)
{
    return mil_lora_find(lora->table, lora->batch->segment_adapter[segment], lora->layer,
                         lora->projections[part]);
}

/* ---- shrink ---- */

/* One A panel over rows that follow one another in x. v: of the first row and the panel's columns.
 */
static void shrink_rows(const mil_cpu_product *p, const mil_lora_module *module,
                        const uint16_t *panel, float *v, int32_t first_row, int32_t n_rows)
{
    const mil_cpu_linear_kernels *kernels = p->kernels->linear;
    int64_t v_stride = p->lora->v_stride;
    int32_t n_tiles = mil_cpu_ceil_div(n_rows, kernels->max_rows);
    for (int32_t t = 0; t < n_tiles; t++) {
        int32_t row = mil_cpu_tile_begin(n_rows, n_tiles, t);
        int32_t rows = mil_cpu_tile_begin(n_rows, n_tiles, t + 1) - row;
        float *to = v + row * v_stride;
        for (int32_t b = 0; b < p->n_blocks; b++) {
            const uint16_t *block = panel + (int64_t)b * MIL_CPU_KC * GROUP;
            kernels->tile16[rows](to, v_stride, mil_cpu_packed_row(p, b, first_row + row), block,
                                  NULL, mil_cpu_block_pairs(p, b), b > 0,
                                  (const char *)block + SHRINK_AHEAD_BYTES, GROUP * 4);
        }
        for (int32_t i = 0; i < rows; i++) {
            for (int32_t r = 0; r < GROUP; r++)
                to[i * v_stride + r] *= module->scale;
        }
    }
}

/* One A panel over all rows of a segment, in runs of neighbours: decode rows come one by one, a
 * chunk is a single run. */
static void shrink_segment(const mil_cpu_product *p, int32_t segment, int32_t part, int32_t panel)
{
    const mil_lora_args *lora = p->lora;
    const mil_lora_module *module = module_of(lora, segment, part);
    const int32_t *rows = lora->batch->lora_rows;
    const uint16_t *a =
        (const uint16_t *)module->a + (int64_t)panel * GROUP * 2 * mil_cpu_ceil_div(p->K, 2);
    int32_t end = lora->batch->segment_indptr[segment + 1];
    for (int32_t i = lora->batch->segment_indptr[segment]; i < end;) {
        int32_t n = 1;
        while (i + n < end && rows[i + n] == rows[i] + n)
            n++;
        float *v = lora->v + i * lora->v_stride + part * lora->v_part_stride + panel * GROUP;
        shrink_rows(p, module, a, v, rows[i], n);
        i += n;
    }
}

bool mil_cpu_shrink_panel(const mil_cpu_product *p, mil_cpu_shrink_cursor *at, int32_t index)
{
    while (at->segment < p->lora->batch->header->n_segments) {
        const mil_lora_module *module = module_of(p->lora, at->segment, at->part);
        int32_t n_panels = module->rank > 0 ? module->padded_rank / GROUP : 0;
        if (index < at->first + n_panels) {
            shrink_segment(p, at->segment, at->part, index - at->first);
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

/* ---- expand ---- */

/* B panels [begin, end) of a part, for all rows of a segment. */
static void expand_part(const mil_cpu_product *p, int32_t segment, int32_t part, int32_t begin,
                        int32_t end)
{
    const mil_lora_args *lora = p->lora;
    const mil_lora_module *module = module_of(lora, segment, part);
    if (module->rank == 0 || begin == end)
        return;
    /* A panel's columns must lie side by side in y: interleave is what this backend asked for. */
    assert(p->weight->interleave == 0 || p->weight->interleave == GROUP);
    int32_t column = mil_weight_row(p->weight, part, begin * GROUP);
    int32_t step = p->weight->interleave > 0 ? GROUP * p->weight->n_parts : GROUP;
    int32_t last_width = mil_cpu_smaller(GROUP, module->out - (end - 1) * GROUP);
    const uint16_t *b = (const uint16_t *)module->b + (int64_t)begin * GROUP * module->padded_rank;
    int32_t last = lora->batch->segment_indptr[segment + 1];
    for (int32_t i = lora->batch->segment_indptr[segment]; i < last; i += MIL_CPU_EXPAND_ROWS) {
        const float *v = lora->v + i * lora->v_stride + part * lora->v_part_stride;
        p->kernels->lora->expand(p->y + column, p->ldy, lora->batch->lora_rows + i,
                                 mil_cpu_smaller(MIL_CPU_EXPAND_ROWS, last - i), v, lora->v_stride,
                                 b, end - begin, module->padded_rank, step, last_width);
    }
}

void mil_cpu_expand_portion(const mil_cpu_product *p, int32_t portion, int32_t n_portions)
{
    for (int32_t segment = 0; segment < p->lora->batch->header->n_segments; segment++) {
        for (int32_t part = 0; part < p->lora->n_parts; part++) {
            int64_t n_panels = mil_cpu_ceil_div(p->weight->part_rows[part], GROUP);
            expand_part(p, segment, part, (int32_t)(n_panels * portion / n_portions),
                        (int32_t)(n_panels * (portion + 1) / n_portions));
        }
    }
}

/* ---- the plain ops ---- */

/* Columns of x, which all modules of one linear share; 0 when no segment touches it. */
static int32_t shrink_columns(const mil_lora_args *lora)
{
    for (int32_t segment = 0; segment < lora->batch->header->n_segments; segment++) {
        for (int32_t part = 0; part < lora->n_parts; part++) {
            if (module_of(lora, segment, part)->rank > 0)
                return module_of(lora, segment, part)->in;
        }
    }
    return 0;
}

mil_status mil_cpu_lora_shrink(mil_context *context, const mil_lora_shrink_args *args)
{
    mil_cpu_product product = {
        .lora = &args->lora,
        .has_shrink = true,
        .x = args->x,
        .ldx = args->ldx,
        .M = args->lora.batch->header->n_tokens,
        .K = shrink_columns(&args->lora),
    };
    return product.K == 0 ? MIL_OK : mil_cpu_product_run(context, &product);
}

mil_status mil_cpu_lora_expand(mil_context *context, const mil_lora_expand_args *args)
{
    mil_cpu_product product = {
        .lora = &args->lora,
        .has_expand = true,
        .y = args->y,
        .ldy = args->ldy,
        .weight = args->weight,
    };
    return args->lora.batch->header->n_segments == 0 ? MIL_OK
                                                     : mil_cpu_product_run(context, &product);
}
