#include "test.h"

#include "base/memory.h"
#include "scheduler/blocks.h"

TEST(every_page_but_the_first_is_dealt_out_once)
{
    mil_blocks blocks;
    CHECK_INT(mil_blocks_init(&blocks, 9), MIL_OK);
    CHECK_INT(mil_blocks_n_total(&blocks), 8);
    bool is_seen[9] = {true};
    while (blocks.n_free > 0) {
        int32_t page = mil_blocks_take(&blocks);
        CHECK(page > 0 && page < 9 && !is_seen[page]);
        is_seen[page] = true;
    }
    for (int32_t page = 0; page < 9; page++)
        CHECK(is_seen[page]);
    mil_blocks_deinit(&blocks);
}

TEST(shared_page_survives_its_first_owner)
{
    mil_blocks blocks;
    CHECK_INT(mil_blocks_init(&blocks, 3), MIL_OK);
    int32_t page = mil_blocks_take(&blocks);
    mil_blocks_share(&blocks, page);
    CHECK(!mil_blocks_give(&blocks, page));
    CHECK_INT(blocks.n_free, 1);
    CHECK(mil_blocks_take(&blocks) != page);
    CHECK(mil_blocks_give(&blocks, page));
    CHECK_INT(mil_blocks_take(&blocks), page);
    mil_blocks_deinit(&blocks);
}

TEST(a_failed_allocation_holds_nothing)
{
    size_t held = mil_memory_held_bytes();
    for (uint64_t k = 1; k <= 2; k++) {
        mil_blocks blocks;
        mil_memory_fail_at(k);
        CHECK_INT(mil_blocks_init(&blocks, 9), MIL_ERR_MEMORY);
        CHECK(blocks.free == NULL && blocks.n_holders == NULL);
        CHECK_INT(mil_memory_held_bytes(), held);
    }
    mil_memory_fail_at(0);
}

TEST_MAIN()
