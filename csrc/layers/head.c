#include "layers/head.h"

#include <string.h>

void mil_head_place(mil_head *head, mil_arena *arena, const mil_backend *backend,
                    const mil_shard *shard, const mil_embedding *tied)
{
    *head = (mil_head){.vocab_block = shard->vocab_block, .world = shard->world};
    if (tied != NULL) {
        head->weight = &tied->weight;
        return;
    }
    mil_embedding rows;
    mil_embedding_place(&rows, arena, backend, shard);
    head->own = rows.weight;
    head->weight = &head->own;
}

mil_status mil_head_load(mil_head *head, mil_walk *walk, const char *name)
{
    if (head->weight != &head->own || (head->own.N == 0 && walk->loader != NULL))
        return MIL_OK;
    return mil_walk_weight(walk, &head->own, 0, name, &walk->shard->embedding);
}

int64_t mil_head_ld(const mil_head *head)
{
    return (int64_t)head->vocab_block * head->world;
}

size_t mil_head_scratch(const mil_head *head, int32_t n_rows)
{
    size_t block = (size_t)n_rows * (size_t)head->vocab_block;
    return head->world > 1 ? block * (1 + (size_t)head->world) : 0;
}

/* [world][n_rows][block] -> [n_rows][world * block] */
static void lay_side_by_side(const mil_head *head, float *logits, const float *gathered,
                             int32_t n_rows)
{
    size_t block = (size_t)head->vocab_block;
    for (int32_t rank = 0; rank < head->world; rank++)
        for (int32_t row = 0; row < n_rows; row++)
            memcpy(logits + row * mil_head_ld(head) + (size_t)rank * block,
                   gathered + ((size_t)rank * (size_t)n_rows + (size_t)row) * block,
                   block * sizeof(float));
}

/* The columns between a rank's share and its block. No row of logits is read past the vocabulary;
 * minus infinity keeps that from mattering. */
static void pad_block(const mil_head *head, float *logits, int32_t n_rows)
{
    const uint32_t minus_infinity = 0xff800000u;
    for (int32_t row = 0; row < n_rows; row++)
        for (int32_t column = head->weight->N; column < head->vocab_block; column++)
            memcpy(logits + (int64_t)row * head->vocab_block + column, &minus_infinity,
                   sizeof minus_infinity);
}

mil_status mil_head_forward(const mil_head *head, const mil_step *step, float *logits,
                            const uint16_t *x, int32_t n_rows, float *scratch)
{
    float *block = head->world > 1 ? scratch : logits;
    size_t n_block = (size_t)n_rows * (size_t)head->vocab_block;
    const mil_linear_args linear = {
        .y = block,
        .x = x,
        .weight = head->weight,
        .y_dtype = MIL_DTYPE_F32,
        .M = n_rows,
        .ldy = head->vocab_block,
        .ldx = head->weight->K,
    };
    if (head->weight->N > 0)
        MIL_TRY(step->context->backend->linear(step->context, &linear));
    if (head->world == 1)
        return MIL_OK;
    pad_block(head, block, n_rows);
    float *gathered = scratch + n_block;
    MIL_TRY(step->comm->ops->all_gather(step->comm, block, gathered, n_block * sizeof(float)));
    lay_side_by_side(head, logits, gathered, n_rows);
    return MIL_OK;
}
