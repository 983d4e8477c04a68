/* Vocabulary-parallel embedding: a rank looks up the tokens of its block of rows, gives zeros for
 * the rest, and an all-reduce joins them. Rows are gathered from the packed weight, which a tied
 * head shares. */
#pragma once

#include "layers/layer.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_embedding {
    mil_weight weight; /* rows vocab_begin .. of the vocabulary; N may be 0 */
    int32_t vocab_begin;
} mil_embedding;

void mil_embedding_place(mil_embedding *embedding, mil_arena *arena, const mil_backend *backend,
                         const mil_shard *shard);
mil_status mil_embedding_load(mil_embedding *embedding, mil_walk *walk, const char *name)
    MIL_WARN_UNUSED;
/* x [T, H] float32 of tokens [T]. */
mil_status mil_embedding_forward(const mil_embedding *embedding, const mil_step *step, float *x,
                                 const int32_t *tokens) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
