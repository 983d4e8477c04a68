#include "loader/shard.h"

#include <string.h>

#define VOCAB_BLOCK_MULTIPLE 32
#define FFN_MULTIPLE 16

static mil_status check_positive(const char *name, int32_t value)
{
    if (value < 1)
        return mil_fail(MIL_ERR_ARGUMENT, "shard: %s is %d, expected at least 1", name, value);
    return MIL_OK;
}

static mil_status check_config(const mil_config *config)
{
    MIL_TRY(check_positive("hidden", config->hidden));
    MIL_TRY(check_positive("ffn", config->ffn));
    MIL_TRY(check_positive("n_layers", config->n_layers));
    MIL_TRY(check_positive("n_heads", config->n_heads));
    MIL_TRY(check_positive("n_kv_heads", config->n_kv_heads));
    MIL_TRY(check_positive("head_dim", config->head_dim));
    MIL_TRY(check_positive("vocab", config->vocab));
    if ((int64_t)config->n_heads * config->head_dim > INT32_MAX)
        return mil_fail(MIL_ERR_ARGUMENT, "shard: n_heads %d x head_dim %d is more than %d rows",
                        config->n_heads, config->head_dim, INT32_MAX);
    if (config->n_heads % config->n_kv_heads != 0)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "shard: n_heads is %d, expected a multiple of n_kv_heads %d",
                        config->n_heads, config->n_kv_heads);
    return MIL_OK;
}

static mil_status check_division(const mil_config *config, int32_t world)
{
    if (config->n_heads % world != 0)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "shard: n_heads is %d, expected a multiple of the world size %d",
                        config->n_heads, world);
    if (config->n_kv_heads % world != 0 && world % config->n_kv_heads != 0)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "shard: n_kv_heads is %d, expected a multiple or a divisor of the world "
                        "size %d",
                        config->n_kv_heads, world);
    if (world > 1 && config->ffn % ((int64_t)world * FFN_MULTIPLE) != 0)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "shard: ffn is %d, expected a multiple of %d x the world size %d",
                        config->ffn, FFN_MULTIPLE, world);
    return MIL_OK;
}

static mil_slice rows_of(int64_t full_rows, int64_t full_cols, int64_t begin, int64_t n)
{
    return (mil_slice){.full_rows = full_rows,
                       .full_cols = full_cols,
                       .row_begin = begin,
                       .n_rows = n,
                       .n_cols = full_cols};
}

static mil_slice cols_of(int64_t full_rows, int64_t full_cols, int64_t begin, int64_t n)
{
    return (mil_slice){.full_rows = full_rows,
                       .full_cols = full_cols,
                       .n_rows = full_rows,
                       .col_begin = begin,
                       .n_cols = n};
}

static void slice_heads(mil_shard *shard, const mil_config *config)
{
    int32_t rank = shard->rank, world = shard->world, n_kv_heads = config->n_kv_heads;
    shard->n_heads = config->n_heads / world;
    shard->head_begin = rank * shard->n_heads;
    if (n_kv_heads % world == 0) {
        shard->n_kv_heads = n_kv_heads / world;
        shard->kv_head_begin = rank * shard->n_kv_heads;
    } else {
        shard->n_kv_heads = 1;
        shard->kv_head_begin = rank / (world / n_kv_heads);
    }

    int64_t dim = config->head_dim, hidden = config->hidden;
    int64_t q_rows = config->n_heads * dim, kv_rows = n_kv_heads * dim;
    int64_t q_begin = shard->head_begin * dim, kv_begin = shard->kv_head_begin * dim;
    mil_slice *slices = shard->projections;
    slices[MIL_PROJECTION_Q] = rows_of(q_rows, hidden, q_begin, shard->n_heads * dim);
    slices[MIL_PROJECTION_K] = rows_of(kv_rows, hidden, kv_begin, shard->n_kv_heads * dim);
    slices[MIL_PROJECTION_V] = slices[MIL_PROJECTION_K];
    slices[MIL_PROJECTION_O] = cols_of(hidden, q_rows, q_begin, shard->n_heads * dim);
}

static void slice_ffn(mil_shard *shard, const mil_config *config)
{
    shard->ffn = config->ffn / shard->world;
    int64_t begin = (int64_t)shard->rank * shard->ffn;
    mil_slice *slices = shard->projections;
    slices[MIL_PROJECTION_GATE] = rows_of(config->ffn, config->hidden, begin, shard->ffn);
    slices[MIL_PROJECTION_UP] = slices[MIL_PROJECTION_GATE];
    slices[MIL_PROJECTION_DOWN] = cols_of(config->hidden, config->ffn, begin, shard->ffn);
}

static void slice_vocab(mil_shard *shard, const mil_config *config)
{
    int64_t vocab = config->vocab, block = vocab;
    if (shard->world > 1) {
        block = (vocab + shard->world - 1) / shard->world;
        block = (block + VOCAB_BLOCK_MULTIPLE - 1) / VOCAB_BLOCK_MULTIPLE * VOCAB_BLOCK_MULTIPLE;
    }
    int64_t begin = block * shard->rank < vocab ? block * shard->rank : vocab;
    int64_t n = vocab - begin < block ? vocab - begin : block;
    shard->vocab_block = (int32_t)block;
    shard->vocab_begin = (int32_t)begin;
    shard->vocab = (int32_t)n;
    shard->embedding = rows_of(vocab, config->hidden, begin, n);
}

mil_status mil_shard_init(mil_shard *shard, const mil_config *config, int32_t rank, int32_t world)
{
    memset(shard, 0, sizeof *shard);
    if (world < 1 || rank < 0 || rank >= world)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "shard: rank is %d of world size %d, expected 0 <= rank < world", rank,
                        world);
    MIL_TRY(check_config(config));
    MIL_TRY(check_division(config, world));
    shard->rank = rank;
    shard->world = world;
    slice_heads(shard, config);
    slice_ffn(shard, config);
    slice_vocab(shard, config);
    return MIL_OK;
}
