/* What a runner on a device does before its first step: it runs every kernel once, and captures the
 * decode steps. Both by plans with nothing in them: they change nothing that outlives a step. */
#pragma once

#include "model/rank.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Run every kernel that a step may need, over all->plan, and wait. A driver loads a kernel into
 * device memory when it is first used, and that shall be before memory is measured, in no capture
 * and in no step. */
mil_status mil_warmup_kernels(mil_rank_step *all) MIL_WARN_UNUSED;

/* Settle the buckets of the decode steps, and capture them all if has_graphs. */
mil_status mil_warmup_graphs(mil_rank_step *all, bool has_graphs) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
