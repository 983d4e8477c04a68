/* Which part of each weight a rank of a tensor-parallel group holds: pure geometry.
 *
 * Column-parallel (q, k, v, gate, up): rows split. Row-parallel (o, down): columns split. Embedding
 * and head: vocabulary split in equal blocks, the last ones shorter or empty. KV heads divide by
 * ranks, or ranks by KV heads (each head then lies on world / K ranks). Row-parallel layers follow
 * their column-parallel partner, so o's columns are the rank's query heads. A rank's query heads
 * are the ones that its KV heads serve: head h reads KV head h / (N / K), as Llama's repeat_kv has
 * it. */
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
    int32_t n_heads;            /* of this rank */
    int32_t n_kv_heads;         /* of this rank */
    int32_t head_begin;         /* first query head */
    int32_t kv_head_begin;      /* first kv head */
    int32_t ffn;                /* of this rank */
    int32_t vocab_begin, vocab; /* of this rank; vocab may be 0 */
    /* Every rank's share before the end is cut off: V for one rank, else ceil(V / world) rounded up
     * to 32, so that no rank but the last has a panel that is partly padding. */
    int32_t vocab_block;
    mil_slice projections[MIL_N_PROJECTIONS];
    mil_slice embedding; /* and the head */
} mil_shard;

/* MIL_ERR_ARGUMENT, naming both numbers, where a size does not divide: N by world, K by world or
 * world by K, N by K, and F by world into multiples of 16 (the groups in which gate and up
 * alternate; one rank takes any F, since its layer may leave them apart). */
mil_status mil_shard_init(mil_shard *shard, const mil_config *config, int32_t rank, int32_t world)
    MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
