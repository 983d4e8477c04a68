#include "base/memory.h"
#include "test.h"

#include <string.h>

TEST(an_allocation_is_zeroed_aligned_and_accounted)
{
    size_t before = mil_memory_held_bytes();
    unsigned char *bytes = mil_alloc(3, 33);
    CHECK(bytes != NULL);
    CHECK_INT((uintptr_t)bytes % 64, 0);
    for (int i = 0; i < 99; i++)
        CHECK_INT(bytes[i], 0);
    CHECK(mil_memory_held_bytes() >= before + 99);
    mil_free(bytes);
    CHECK_INT(mil_memory_held_bytes(), before);
}

TEST(a_product_that_overflows_is_no_memory)
{
    CHECK(mil_alloc(SIZE_MAX / 2, 3) == NULL);
    CHECK(mil_alloc(SIZE_MAX, 1) == NULL);
    mil_free(NULL);
}

TEST(nothing_asked_for_is_still_a_pointer)
{
    void *none = mil_alloc(0, 8);
    CHECK(none != NULL);
    mil_free(none);
}

TEST(the_kth_allocation_fails_once)
{
    mil_memory_fail_at(2);
    void *first = mil_alloc(1, 1);
    void *second = mil_alloc(1, 1);
    void *third = mil_alloc(1, 1);
    mil_memory_fail_at(0);
    CHECK(first != NULL);
    CHECK(second == NULL);
    CHECK(third != NULL);
    mil_free(first);
    mil_free(third);
}

TEST(a_slab_is_zeroed_and_given_back)
{
    size_t before = mil_memory_held_bytes();
    mil_slab slab;
    CHECK_INT(mil_slab_init(&slab, 5000, "test"), MIL_OK);
    CHECK(slab.n_bytes >= 5000);
    CHECK(slab.n_bytes < 64 << 10);
    CHECK_INT(((char *)slab.data)[4999], 0);
    mil_slab_deinit(&slab);
    CHECK(slab.data == NULL);
    mil_slab_deinit(&slab);
    CHECK_INT(mil_memory_held_bytes(), before);
}

TEST(a_slab_beyond_the_address_space_is_a_named_error)
{
    mil_slab slab;
    CHECK_INT(mil_slab_init(&slab, SIZE_MAX - 5, "weights"), MIL_ERR_MEMORY);
    CHECK(strstr(mil_status_message(), "weights") != NULL);
    CHECK_INT(mil_slab_init(&slab, (size_t)1 << 60, "weights"), MIL_ERR_MEMORY);
}

TEST(sizes_are_shown_with_their_unit)
{
    CHECK(strcmp(mil_memory_show(0).text, "0 bytes") == 0);
    CHECK(strcmp(mil_memory_show(1023).text, "1023 bytes") == 0);
    CHECK(strcmp(mil_memory_show(1024).text, "1.00 KiB") == 0);
    CHECK(strcmp(mil_memory_show((1 << 20) - 1).text, "1.00 MiB") == 0);
    CHECK(strcmp(mil_memory_show((uint64_t)3 << 29).text, "1.50 GiB") == 0);
    CHECK(strcmp(mil_memory_show(UINT64_MAX).text, "16.00 EiB") == 0);
}

TEST(untouched_pages_of_a_slab_are_counted)
{
    mil_slab slab;
    CHECK_INT(mil_slab_init(&slab, (size_t)100 << 20, "slab"), MIL_OK);
    CHECK_INT(mil_slab_untouched_bytes(&slab), slab.n_bytes);
    /* The last byte, and every one of the first 10 MiB; pages of either size may come. */
    memset(slab.data, 1, (size_t)10 << 20);
    ((char *)slab.data)[slab.n_bytes - 1] = 1;
    size_t untouched = mil_slab_untouched_bytes(&slab);
    CHECK(untouched <= slab.n_bytes - ((size_t)10 << 20) - 4096);
    CHECK(untouched >= slab.n_bytes - ((size_t)12 << 20));
    memset(slab.data, 1, slab.n_bytes);
    CHECK_INT(mil_slab_untouched_bytes(&slab), 0);
    mil_slab_deinit(&slab);
}

TEST(a_devices_allocator_counts_and_fails_with_the_rest)
{
    uint64_t before = mil_memory_calls();
    CHECK(!mil_memory_refuses());
    mil_memory_fail_at(2);
    void *block = mil_alloc(1, 1);
    CHECK(block != NULL);
    CHECK(mil_memory_refuses());
    CHECK(!mil_memory_refuses());
    CHECK_INT(mil_memory_calls() - before, 4);
    mil_free(block);
}

TEST_MAIN()
