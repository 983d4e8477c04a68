/* Vocabulary-parallel head: a rank's block of the vocabulary for some rows, gathered from all ranks
 * and laid side by side, so that every rank holds whole rows of logits and samples the same token.
 */
#pragma once

#include "layers/embedding.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_head {
    mil_weight own;           /* where the head is not tied */
    const mil_weight *weight; /* own, or the embedding's */
    int32_t vocab_block;      /* columns that each rank sends */
    int32_t world;
} mil_head;

/* tied: the embedding that the head shares its weight with, or NULL. Both must stay where they are.
 */
void mil_head_place(mil_head *head, mil_arena *arena, const mil_backend *backend,
                    const mil_shard *shard, const mil_embedding *tied);
/* Loads nothing where the head is tied. */
mil_status mil_head_load(mil_head *head, mil_walk *walk, const char *name) MIL_WARN_UNUSED;

/* Columns of a row of logits: the vocabulary, and past it what must not be read. */
int64_t mil_head_ld(const mil_head *head);
/* Floats of scratch for n_rows; 0 for a world of one. */
size_t mil_head_scratch(const mil_head *head, int32_t n_rows);
/* logits [n_rows, mil_head_ld] = x [n_rows, H] W^T. */
mil_status mil_head_forward(const mil_head *head, const mil_step *step, float *logits,
                            const uint16_t *x, int32_t n_rows, float *scratch) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
