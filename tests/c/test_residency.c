#include "test.h"

#include "base/memory.h"
#include "milpy.h"
#include "scheduler/residency.h"

TEST(one_content_is_in_one_slot_however_many_pin_it)
{
    mil_residency residency;
    CHECK_INT(mil_residency_init(&residency, 2), MIL_OK);
    bool is_new = false;
    int32_t slot = mil_residency_pin(&residency, 40, &is_new);
    CHECK(slot >= 0 && is_new);
    CHECK_INT(mil_residency_pin(&residency, 40, &is_new), slot);
    CHECK(!is_new);
    CHECK_INT(mil_residency_pin(&residency, 41, &is_new), 1 - slot);
    CHECK(is_new);
    CHECK_INT(residency.n_pins, 3);
    mil_residency_deinit(&residency);
}

TEST(a_pinned_slot_is_not_given_to_another_content)
{
    mil_residency residency;
    CHECK_INT(mil_residency_init(&residency, 1), MIL_OK);
    bool is_new;
    int32_t slot = mil_residency_pin(&residency, 40, &is_new);
    CHECK_INT(slot, 0);
    CHECK_INT(mil_residency_pin(&residency, 41, &is_new), -1);
    mil_residency_unpin(&residency, slot);
    CHECK_INT(mil_residency_pin(&residency, 41, &is_new), 0);
    CHECK(is_new);
    mil_residency_deinit(&residency);
}

/* An id may name another adapter once nobody holds it: a slot that still claimed to hold it would
 * give the new adapter's requests the old one's bytes. */
TEST(a_content_is_forgotten_with_its_last_pin)
{
    mil_residency residency;
    CHECK_INT(mil_residency_init(&residency, 2), MIL_OK);
    bool is_new;
    int32_t slot = mil_residency_pin(&residency, 40, &is_new);
    mil_residency_unpin(&residency, slot);
    CHECK_INT(residency.n_pins, 0);
    (void)mil_residency_pin(&residency, 40, &is_new);
    CHECK(is_new);
    mil_residency_deinit(&residency);
}

TEST(a_failed_allocation_holds_nothing)
{
    size_t held = mil_memory_held_bytes();
    for (uint64_t k = 1; k <= 2; k++) {
        mil_residency residency;
        mil_memory_fail_at(k);
        CHECK_INT(mil_residency_init(&residency, 4), MIL_ERR_MEMORY);
        CHECK_INT(mil_memory_held_bytes(), held);
    }
    mil_memory_fail_at(0);
}

TEST_MAIN()
