#include "loader/shard.h"
#include "test.h"

static mil_config config_of(int32_t n_heads, int32_t n_kv_heads, int32_t ffn, int32_t vocab)
{
    return (mil_config){.hidden = 96,
                        .ffn = ffn,
                        .n_layers = 2,
                        .n_heads = n_heads,
                        .n_kv_heads = n_kv_heads,
                        .head_dim = 40,
                        .vocab = vocab,
                        .max_position = 64};
}

/* Each element of the matrix lies in exactly `copies` of the ranks' slices. */
static void check_tiles(const mil_slice *slices, int32_t world, int32_t copies)
{
    for (int64_t row = 0; row < slices[0].full_rows; row++) {
        for (int64_t col = 0; col < slices[0].full_cols; col++) {
            int32_t n = 0;
            for (int32_t rank = 0; rank < world; rank++) {
                const mil_slice *s = &slices[rank];
                n += row >= s->row_begin && row < s->row_begin + s->n_rows && col >= s->col_begin &&
                     col < s->col_begin + s->n_cols;
            }
            CHECK_INT(n, copies);
        }
    }
}

static void check_layout(const mil_config *config, int32_t world, int32_t kv_copies)
{
    mil_shard shards[16];
    mil_slice slices[16];
    for (int32_t rank = 0; rank < world; rank++)
        CHECK_INT(mil_shard_init(&shards[rank], config, rank, world), MIL_OK);
    for (int p = 0; p < MIL_N_PROJECTIONS; p++) {
        for (int32_t rank = 0; rank < world; rank++)
            slices[rank] = shards[rank].projections[p];
        bool is_kv = p == MIL_PROJECTION_K || p == MIL_PROJECTION_V;
        check_tiles(slices, world, is_kv ? kv_copies : 1);
    }
    for (int32_t rank = 0; rank < world; rank++)
        slices[rank] = shards[rank].embedding;
    check_tiles(slices, world, 1);
}

TEST(one_rank_holds_everything)
{
    mil_config config = config_of(6, 2, 50, 1001);
    mil_shard shard;
    CHECK_INT(mil_shard_init(&shard, &config, 0, 1), MIL_OK);
    CHECK_INT(shard.n_heads, 6);
    CHECK_INT(shard.n_kv_heads, 2);
    CHECK_INT(shard.ffn, 50);
    CHECK_INT(shard.vocab, 1001);
    CHECK_INT(shard.vocab_block, 1001);
    CHECK_INT(shard.projections[MIL_PROJECTION_Q].full_rows, 240);
    CHECK_INT(shard.projections[MIL_PROJECTION_V].full_rows, 80);
    CHECK_INT(shard.projections[MIL_PROJECTION_O].full_cols, 240);
    CHECK_INT(shard.projections[MIL_PROJECTION_DOWN].full_cols, 50);
    check_layout(&config, 1, 1);
}

TEST(slices_of_all_ranks_tile_every_weight)
{
    mil_config config = config_of(8, 4, 128, 100);
    check_layout(&config, 2, 1);
    check_layout(&config, 4, 1);
}

TEST(kv_heads_are_replicated_where_ranks_are_a_multiple_of_them)
{
    mil_config config = config_of(8, 2, 256, 100);
    check_layout(&config, 4, 2);
    check_layout(&config, 8, 4);
    mil_shard shard;
    CHECK_INT(mil_shard_init(&shard, &config, 5, 8), MIL_OK);
    CHECK_INT(shard.n_kv_heads, 1);
    CHECK_INT(shard.kv_head_begin, 1);
}

/* As Hugging Face's repeat_kv: query head h reads KV head h / (N / K). Attention on a rank divides
 * its own heads the same way, so both must name the same KV head. */
TEST(local_query_heads_find_their_kv_head_on_their_own_rank)
{
    static const int32_t cases[][3] = {{8, 8, 4},  {8, 4, 2},  {8, 2, 8},  {12, 3, 3},
                                       {12, 2, 4}, {16, 4, 8}, {16, 1, 16}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        mil_config config = config_of(cases[c][0], cases[c][1], 768, 100);
        int32_t world = cases[c][2];
        for (int32_t rank = 0; rank < world; rank++) {
            mil_shard shard;
            CHECK_INT(mil_shard_init(&shard, &config, rank, world), MIL_OK);
            for (int32_t i = 0; i < shard.n_heads; i++) {
                int32_t global = (shard.head_begin + i) / (config.n_heads / config.n_kv_heads);
                int32_t local = i / (shard.n_heads / shard.n_kv_heads);
                CHECK_INT(shard.kv_head_begin + local, global);
            }
        }
    }
}

TEST(row_parallel_columns_are_the_rows_of_their_partner)
{
    mil_config config = config_of(8, 2, 128, 100);
    for (int32_t rank = 0; rank < 4; rank++) {
        mil_shard shard;
        CHECK_INT(mil_shard_init(&shard, &config, rank, 4), MIL_OK);
        const mil_slice *s = shard.projections;
        CHECK_INT(s[MIL_PROJECTION_O].col_begin, s[MIL_PROJECTION_Q].row_begin);
        CHECK_INT(s[MIL_PROJECTION_O].n_cols, s[MIL_PROJECTION_Q].n_rows);
        CHECK_INT(s[MIL_PROJECTION_DOWN].col_begin, s[MIL_PROJECTION_UP].row_begin);
        CHECK_INT(s[MIL_PROJECTION_DOWN].n_cols, s[MIL_PROJECTION_UP].n_rows);
    }
}

TEST(vocabulary_blocks_are_whole_panels_and_may_be_empty)
{
    mil_config config = config_of(8, 8, 128, 70);
    static const int32_t expected[4] = {32, 32, 6, 0};
    for (int32_t rank = 0; rank < 4; rank++) {
        mil_shard shard;
        CHECK_INT(mil_shard_init(&shard, &config, rank, 4), MIL_OK);
        CHECK_INT(shard.vocab_block, 32);
        CHECK_INT(shard.vocab, expected[rank]);
        CHECK_INT(shard.vocab_begin, rank < 3 ? 32 * rank : 70);
    }
}

static void check_refused(const mil_config *config, int32_t rank, int32_t world, const char *a,
                          const char *b)
{
    mil_shard shard;
    CHECK_INT(mil_shard_init(&shard, config, rank, world), MIL_ERR_ARGUMENT);
    CHECK(strstr(mil_status_message(), a) != NULL);
    CHECK(strstr(mil_status_message(), b) != NULL);
}

TEST(sizes_that_do_not_divide_are_refused_with_both_numbers)
{
    mil_config config = config_of(10, 5, 128, 100);
    check_refused(&config, 0, 4, "n_heads is 10", "world size 4");
    config = config_of(12, 4, 256, 100);
    check_refused(&config, 0, 6, "n_kv_heads is 4", "world size 6");
    config = config_of(8, 8, 120, 100);
    check_refused(&config, 0, 2, "ffn is 120", "16 x the world size 2");
    config = config_of(8, 3, 128, 100);
    check_refused(&config, 0, 1, "n_heads is 8", "n_kv_heads 3");
    config = config_of(8, 8, 128, 100);
    check_refused(&config, 2, 2, "rank is 2", "world size 2");
    check_refused(&config, 0, 0, "rank is 0", "world size 0");
}

TEST(sizes_below_one_or_beyond_32_bits_are_refused)
{
    mil_config config = config_of(8, 8, 128, 100);
    config.hidden = 0;
    check_refused(&config, 0, 1, "hidden is 0", "at least 1");
    config = config_of(8, -1, 128, 100);
    check_refused(&config, 0, 1, "n_kv_heads is -1", "at least 1");
    config = config_of(1 << 30, 1, 128, 100);
    check_refused(&config, 0, 1, "n_heads 1073741824", "head_dim 40");
}

TEST_MAIN()
