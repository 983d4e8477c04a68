/* Buckets of captured decode steps. */
#include "model/graphs.h"

#include "test.h"

static void check_sizes(int32_t most)
{
    mil_graphs graphs;
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

TEST(every_batch_has_the_smallest_bucket_that_holds_it)
{
    for (int32_t most = 1; most <= 700; most++)
        check_sizes(most);
    check_sizes(2048);
    check_sizes(3000);
    check_sizes(65536);
    check_sizes(1 << 20);
}

TEST(a_step_is_padded_by_little)
{
    mil_graphs graphs;
    mil_graphs_init(&graphs, 65536);
    for (int32_t n = 1; n <= 65536; n++) {
        int32_t padding = graphs.sizes[mil_graphs_find(&graphs, n)] - n;
        CHECK(padding < 8 || padding < n / (n <= 2048 ? 8 : 4));
    }
}

/* Capture takes some milliseconds a graph, three graphs a bucket. */
TEST(many_sequences_do_not_want_many_graphs)
{
    mil_graphs graphs;
    mil_graphs_init(&graphs, 256);
    CHECK_INT(graphs.n_buckets, 27);
    mil_graphs_init(&graphs, 2048);
    CHECK_INT(graphs.n_buckets, 51);
    mil_graphs_init(&graphs, 65536);
    CHECK_INT(graphs.n_buckets, 71);
}

TEST(without_buckets_there_is_no_graph)
{
    mil_graphs graphs = {0};
    CHECK_INT(mil_graphs_find(&graphs, 1), -1);
}

TEST_MAIN()
