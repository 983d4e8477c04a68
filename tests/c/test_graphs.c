/* Buckets of captured decode steps. */
#include "model/graphs.h"

#include "test.h"

TEST(every_batch_has_the_smallest_bucket_that_holds_it)
{
    mil_graphs graphs;
    for (int32_t most = 1; most <= 512; most++) {
        mil_graphs_init(&graphs, most);
        CHECK(graphs.n_buckets <= MIL_MAX_BUCKETS);
        CHECK_INT(graphs.sizes[graphs.n_buckets - 1], most);
        for (int32_t n = 1; n <= most; n++) {
            int32_t i = mil_graphs_find(&graphs, n);
            CHECK(i >= 0 && graphs.sizes[i] >= n);
            CHECK(i == 0 || graphs.sizes[i - 1] < n);
        }
        CHECK_INT(mil_graphs_find(&graphs, most + 1), -1);
    }
}

TEST(batches_beyond_the_largest_bucket_have_none)
{
    mil_graphs graphs;
    mil_graphs_init(&graphs, 4096);
    CHECK_INT(graphs.sizes[graphs.n_buckets - 1], 512);
    CHECK_INT(mil_graphs_find(&graphs, 513), -1);
}

TEST(without_buckets_there_is_no_graph)
{
    mil_graphs graphs = {0};
    CHECK_INT(mil_graphs_find(&graphs, 1), -1);
}

TEST_MAIN()
