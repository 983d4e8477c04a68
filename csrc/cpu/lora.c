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
/* Rows of one piece of shrink's work: a panel over a long chunk alone would keep one thread while
 * the others wait. Whole tiles of every instruction set. */
#define SHRINK_ROWS 48

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

/* One A panel over rows [begin, end) of lora_rows, in runs of neighbours: decode rows come one by
 * one, a chunk is a single run. */
static void shrink_chunk(const mil_cpu_product *p, const mil_lora_module *module, int32_t part,
                         int32_t panel, int32_t begin, int32_t end)
{
    const mil_lora_args *lora = p->lora;
    const int32_t *rows = lora->batch->lora_rows;
    const uint16_t *a =
        (const uint16_t *)module->a + (int64_t)panel * GROUP * 2 * mil_cpu_ceil_div(p->K, 2);
    for (int32_t i = begin; i < end;) {
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
    const int32_t *indptr = p->lora->batch->segment_indptr;
    while (at->segment < p->lora->batch->header->n_segments) {
        const mil_lora_module *module = module_of(p->lora, at->segment, at->part);
        int32_t begin = indptr[at->segment], end = indptr[at->segment + 1];
        int32_t n_panels = module->rank > 0 ? module->padded_rank / GROUP : 0;
        int32_t n_chunks = mil_cpu_ceil_div(end - begin, SHRINK_ROWS);
        int32_t item = index - at->first;
        if (item < n_panels * n_chunks) {
            begin += item % n_chunks * SHRINK_ROWS;
            shrink_chunk(p, module, at->part, item / n_chunks, begin,
                         mil_cpu_smaller(begin + SHRINK_ROWS, end));
            return true;
        }
        at->first += n_panels * n_chunks;
        if (++at->part == p->lora->n_parts) {
            at->part = 0;
            at->segment++;
        }
    }
    return false;
}

/* ---- expand ---- */

/* Which panels of a part, and which of lora_rows, one piece of expand's work has. */
typedef struct share {
    int32_t index, n_shares;
} share;

static int32_t share_begin(share mine, int32_t n)
{
    return (int32_t)((int64_t)n * mine.index / mine.n_shares);
}

static int32_t share_end(share mine, int32_t n)
{
    return (int32_t)((int64_t)n * (mine.index + 1) / mine.n_shares);
}

/* A share of a part's B panels, for n_rows <= MIL_CPU_EXPAND_ROWS of lora_rows from `row` on. */
static void expand_part(const mil_cpu_product *p, const mil_lora_module *module, int32_t part,
                        share columns, int32_t row, int32_t n_rows)
{
    const mil_lora_args *lora = p->lora;
    int32_t n_panels = mil_cpu_ceil_div(p->weight->part_rows[part], GROUP);
    int32_t begin = share_begin(columns, n_panels), end = share_end(columns, n_panels);
    if (module->rank == 0 || begin == end)
        return;
    /* A panel's columns must lie side by side in y: interleave is what this backend asked for. */
    assert(p->weight->interleave == 0 || p->weight->interleave == GROUP);
    int32_t column = mil_weight_row(p->weight, part, begin * GROUP);
    int32_t step = p->weight->interleave > 0 ? GROUP * p->weight->n_parts : GROUP;
    int32_t last_width = mil_cpu_smaller(GROUP, module->out - (end - 1) * GROUP);
    const uint16_t *b = (const uint16_t *)module->b + (int64_t)begin * GROUP * module->padded_rank;
    const float *v = lora->v + row * lora->v_stride + part * lora->v_part_stride;
    p->kernels->lora->expand(p->y + column, p->ldy, lora->batch->lora_rows + row, n_rows, v,
                             lora->v_stride, b, end - begin, module->padded_rank, step, last_width);
}

/* Parts of a few rows one after another, since those of gate and up share lines of y. */
static void expand_share(const mil_cpu_product *p, share columns, share rows)
{
    const mil_lora_args *lora = p->lora;
    int32_t n_blocks = mil_cpu_ceil_div(lora->batch->header->n_lora_rows, MIL_CPU_EXPAND_ROWS);
    int32_t first = share_begin(rows, n_blocks) * MIL_CPU_EXPAND_ROWS;
    int32_t last = share_end(rows, n_blocks) * MIL_CPU_EXPAND_ROWS;
    for (int32_t segment = 0; segment < lora->batch->header->n_segments; segment++) {
        int32_t i = lora->batch->segment_indptr[segment];
        int32_t end = mil_cpu_smaller(last, lora->batch->segment_indptr[segment + 1]);
        for (i = i < first ? first : i; i < end; i += MIL_CPU_EXPAND_ROWS) {
            for (int32_t part = 0; part < lora->n_parts; part++)
                expand_part(p, module_of(lora, segment, part), part, columns, i,
                            mil_cpu_smaller(MIL_CPU_EXPAND_ROWS, end - i));
        }
    }
}

void mil_cpu_expand_portion(const mil_cpu_product *p, int32_t portion, int32_t n_portions)
{
    const share all = {0, 1}, mine = {portion, n_portions};
    int32_t n_rows = p->lora->batch->header->n_lora_rows;
    /* Whole rows stream best, where there are enough for all threads; but an activation that
     * follows takes this portion's columns. */
    if (p->act == NULL && n_rows >= n_portions / 2 * MIL_CPU_EXPAND_ROWS)
        expand_share(p, all, mine);
    else
        expand_share(p, mine, all);
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
