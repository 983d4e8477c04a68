/* Collectives of one tensor-parallel group: sums in rank order, so that results do not depend on
 * who arrives first. comm/local.c joins ranks that are threads of this process; NCCL and processes
 * are other transports of the same table. */
#pragma once

#include "base/status.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct mil_comm;

typedef struct mil_comm_ops {
    /* data[n] of every rank becomes the sum over ranks 0, 1, ... in that order. */
    mil_status (*all_reduce)(struct mil_comm *, float *data, int64_t n);
    /* out [world][n_bytes] gathers in [n_bytes] of each rank. in may not lie in out. */
    mil_status (*all_gather)(struct mil_comm *, const void *in, void *out, size_t n_bytes);
    mil_status (*broadcast)(struct mil_comm *, void *data, size_t n_bytes, int32_t root);
    mil_status (*barrier)(struct mil_comm *);
    /* Wake every rank out of any collective, which then returns MIL_ERR_CLOSED, for good. */
    void (*abort)(struct mil_comm *, const char *reason);
    void (*free)(struct mil_comm *);
} mil_comm_ops;

typedef struct mil_comm {
    const mil_comm_ops *ops;
    int32_t rank;
    int32_t world;
} mil_comm;

/* comms[world]: one for each of `world` threads of this process. Ranks read each other's buffers in
 * place, so no message is copied twice. Caller frees each with ops->free, after all ranks are idle.
 * On failure every entry is NULL. */
mil_status mil_comm_local_create(mil_comm **comms, int32_t world) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
