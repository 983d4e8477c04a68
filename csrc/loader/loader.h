/* File -> this rank's slice -> packed slab, in one pass: peak memory is one copy plus the windows.
 *
 * A loader reads windows of a few MiB on its threads and hands each to the backend's pack while it is
 * still in cache. It knows slices, not model families. */
#pragma once

#include "loader/shard.h"
#include "loader/source.h"
#include "ops/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_loader mil_loader;

/* n_threads readers; progress may be NULL. Borrows source and backend. */
mil_status mil_loader_create(mil_loader **out, mil_source *source, const mil_backend *backend,
                             int32_t n_threads, mil_progress *progress) MIL_WARN_UNUSED;
void mil_loader_free(mil_loader *loader);

/* Set what progress counts to. */
void mil_loader_set_total(mil_loader *loader, uint64_t n_bytes);

/* Load slice of tensor name into part `part` of weight, whose data is zeroed packed_bytes. */
mil_status mil_loader_weight(mil_loader *loader, mil_weight *weight, int32_t part, const char *name,
                             const mil_slice *slice) MIL_WARN_UNUSED;
/* Elements begin .. begin + n of a vector of `length`, as float32. */
mil_status mil_loader_vector(mil_loader *loader, float *out, const char *name, int64_t length,
                             int64_t begin, int64_t n) MIL_WARN_UNUSED;

/* One rank's packed adapter: a block per layer, A and B of its modules in order, and the descriptors
 * modules[layer * MIL_N_PROJECTIONS + projection] that point into it. */
typedef struct mil_adapter {
    mil_slab slab;
    mil_lora_module *modules; /* [n_layers * MIL_N_PROJECTIONS] */
    int32_t n_layers;
    int32_t max_padded_rank;
} mil_adapter;

/* Check the whole adapter against the model's shapes, then load this rank's slices. Values that are
 * not finite as bf16 are MIL_ERR_NUMERICS naming the tensor. On failure *adapter is zeroed. */
mil_status mil_adapter_init(mil_adapter *adapter, const mil_adapter_info *info, const mil_config *config,
                            const mil_shard *shard, const mil_backend *backend) MIL_WARN_UNUSED;
void mil_adapter_deinit(mil_adapter *adapter);

#ifdef __cplusplus
}
#endif
