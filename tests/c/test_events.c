#include "test.h"

#include "base/memory.h"
#include "engine/events.h"

static void push(mil_events *events, uint64_t id)
{
    mil_event event = {.id = id};
    mil_events_push(events, &event);
}

TEST(events_come_out_in_order_across_growth_and_wrapping)
{
    mil_events events;
    mil_event out[3];
    uint64_t pushed = 0, taken = 0;
    CHECK_INT(mil_events_init(&events, 1), MIL_OK);
    for (int32_t round = 0; round < 50; round++) {
        CHECK_INT(mil_events_reserve(&events, 4), MIL_OK);
        for (int32_t i = 0; i < 4; i++)
            push(&events, ++pushed);
        int32_t n = mil_events_take(&events, out, 3);
        CHECK_INT(n, 3);
        for (int32_t i = 0; i < n; i++)
            CHECK_INT(out[i].id, ++taken);
    }
    while (mil_events_take(&events, out, 1) == 1)
        CHECK_INT(out[0].id, ++taken);
    CHECK_INT(taken, pushed);
    mil_events_deinit(&events);
}

TEST(room_that_was_made_is_not_made_again)
{
    mil_events events;
    CHECK_INT(mil_events_init(&events, 8), MIL_OK);
    uint64_t before = mil_memory_calls();
    mil_event out[8];
    for (int32_t round = 0; round < 20; round++) {
        CHECK_INT(mil_events_reserve(&events, 8), MIL_OK);
        for (int32_t i = 0; i < 5; i++)
            push(&events, 1);
        CHECK_INT(mil_events_take(&events, out, 8), 5);
    }
    CHECK_INT(mil_memory_calls(), before);
    mil_events_deinit(&events);
}

TEST(failing_to_grow_keeps_what_is_queued)
{
    mil_events events;
    CHECK_INT(mil_events_init(&events, 1), MIL_OK);
    push(&events, 7);
    mil_memory_fail_at(1);
    CHECK_INT(mil_events_reserve(&events, 1), MIL_ERR_MEMORY);
    mil_memory_fail_at(0);
    mil_event out;
    CHECK_INT(mil_events_take(&events, &out, 1), 1);
    CHECK_INT(out.id, 7);
    mil_events_deinit(&events);
}

TEST_MAIN()
