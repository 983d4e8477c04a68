/* Which part of each weight a rank of a tensor-parallel group holds: pure geometry.
 *
 * Column-parallel (q, k, v, gate, up): rows split. Row-parallel (o, down): columns split. Embedding
 * and head: vocabulary split in equal blocks of ceil(V / world), the last ones shorter or empty. KV
 * heads divide by ranks, or ranks by KV heads (each head then lies on world / K ranks). Row-parallel
 * layers follow their column-parallel partner, so o's columns are the rank's query heads. */
#pragma once

#include "milpy.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_slice { /* a block of a [full_rows, full_cols] matrix */
    int64_t full_rows, full_cols;
    int64_t row_begin, n_rows;
    int64_t col_begin, n_cols;
} mil_slice;

/* Everything that one rank's share of a model is made of. */
typedef struct mil_shard {
    int32_t rank, world;
    int32_t n_heads;       /* of this rank */
    int32_t n_kv_heads;    /* of this rank */
    int32_t head_begin;    /* first query head */
    int32_t kv_head_begin; /* first kv head */
    int32_t ffn;           /* of this rank */
    int32_t vocab_begin, vocab; /* of this rank; vocab may be 0 */
    int32_t vocab_block;   /* ceil(V / world): every rank's share before the end is cut off */
    mil_slice projections[MIL_N_PROJECTIONS];
    mil_slice embedding; /* and the head */
} mil_shard;

/* MIL_ERR_ARGUMENT, naming both numbers, where a size does not divide. */
mil_status mil_shard_init(mil_shard *shard, const mil_config *config, int32_t rank, int32_t world)
    MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
