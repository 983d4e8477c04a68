/* Where a test build makes the host and the device late, and two faults that it may hold: `make
 * chaos`, with the bodies in tests/chaos. In every other build each of these is nothing.
 *
 * When anything runs must not change a bit of what comes out. tests/model/test_cuda_order.py asks
 * for that, and asks that the two faults be seen. */
#pragma once

#include "base/status.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

struct mil_queue;

#ifdef MIL_CHAOS
/* The host sleeps for a while, or does not. */
void mil_chaos_sleep(void);
/* Whether the host is to learn late that a step has run: when all that is queued has. */
bool mil_chaos_is_late(void);
/* Queue a kernel that takes time on the queue's stream, or do not. */
mil_status mil_chaos_delay(const struct mil_queue *queue) MIL_WARN_UNUSED;
#else
static inline void mil_chaos_sleep(void)
{
}

static inline bool mil_chaos_is_late(void)
{
    return false;
}

static inline mil_status mil_chaos_delay(const struct mil_queue *queue)
{
    (void)queue;
    return MIL_OK;
}
#endif

/* One plan and one row of samples for all steps in flight. */
#ifndef MIL_BREAK_RING
#define MIL_BREAK_RING 0
#endif
/* Pages become free before the last step that names them has retired. */
#ifndef MIL_BREAK_FENCE
#define MIL_BREAK_FENCE 0
#endif

#ifdef __cplusplus
}
#endif
