/* A kernel that does nothing for a while. Of an odd number of ticks it lets the next one start at
 * once: what that does before it waits, it does while kernels far before it still run. Of an even
 * number it does not: the next one does all of its work late. */
#include "chaos.h"
#include "ops/chaos.h"

#include "kernels/common.cuh"

static __global__ void delay_kernel(uint64_t n_ticks)
{
    if (n_ticks % 2 == 1)
        mil_let_next_start();
    mil_wait_for_previous();
    long long begin = clock64();
    while ((uint64_t)(clock64() - begin) < n_ticks)
        continue;
}

/* Half are none and most others about as long as an op, so that ops that should wait for each other
 * get the chance not to; one in 16 is as long as the host needs to fill the next step. */
static uint64_t draw_ticks()
{
    uint64_t size = mil_chaos_draw(16);
    if (size > 7)
        return 0;
    return size == 0 ? 200000 + mil_chaos_draw(600000) : 1000 + mil_chaos_draw(30000);
}

extern "C" mil_status mil_chaos_delay(const mil_queue *queue)
{
    uint64_t n_ticks = mil_chaos_is_on(MIL_CHAOS_DELAYS) ? draw_ticks() : 0;
    if (n_ticks == 0)
        return MIL_OK;
    mil_chaos_count(MIL_CHAOS_DELAYS);
    return mil_launch(queue, "delay", delay_kernel, dim3(1), dim3(1), 0, n_ticks);
}
