/* A pool of pinned worker threads for fork-join regions.
 *
 * A pool belongs to one rank. The thread that calls mil_pool_run takes part as thread 0. Workers
 * spin about 50 us for the next region, then sleep on a futex; where threads exceed the CPUs that
 * the affinity mask allows, they sleep at once. After fork a pool is dead: running it is an error.
 */
#pragma once

#include "base/machine.h"
#include "base/status.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_pool mil_pool;

/* thread: 0 .. n_threads - 1. */
typedef void (*mil_task_fn)(void *argument, int32_t thread, int32_t n_threads);

/* n_threads >= 1, the caller's included; n_threads - 1 are started. cpus [n_threads]: one for each
 * thread, cpus[0] for the thread that enters; NULL: not pinned. Caller frees with mil_pool_free. */
mil_status mil_pool_create(mil_pool **out, int32_t n_threads, const int32_t *cpus) MIL_WARN_UNUSED;
void mil_pool_free(mil_pool *pool);
int32_t mil_pool_n_threads(const mil_pool *pool);

/* Run fn on every thread and wait for all. One caller at a time; not from inside a task. */
void mil_pool_run(mil_pool *pool, mil_task_fn fn, void *argument);
/* Inside a task: wait until every thread of the pool is here. */
void mil_pool_barrier(mil_pool *pool, int32_t thread);

/* What a caller's thread must hold while it steps: flush-to-zero and denormals-are-zero (so that
 * every instruction set gives the same bits), and its place in the affinity mask. Workers always
 * hold it. */
typedef struct mil_thread_state {
    uint32_t mxcsr;
    bool was_pinned;
    uint64_t affinity[16]; /* the mask to restore, 1024 CPUs */
} mil_thread_state;

/* Returns MIL_ERR_DEVICE in a forked child ("the engine belongs to process N"). */
mil_status mil_pool_enter(mil_pool *pool, mil_thread_state *saved) MIL_WARN_UNUSED;
void mil_pool_leave(mil_pool *pool, const mil_thread_state *saved);

/* Monotonic: what waits and times are taken by. */
uint64_t mil_clock_ns(void);

#ifdef __cplusplus
}
#endif
