/* PEFT adapter -> one rank's packed LoRA: checked whole before memory is taken, one slab, one block
 * for each layer. A is cut by columns and B by rows exactly as the base weight they belong to. */
#pragma once

#include "loader/shard.h"
#include "ops/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One rank's packed adapter: a block per layer, A and B of its modules in order, and the
 * descriptors modules[layer * MIL_N_PROJECTIONS + projection] that point into it. */
typedef struct mil_adapter {
    const mil_device *device; /* whose memory slab is */
    struct mil_queue *queue;
    mil_slab slab;
    mil_lora_module *modules;              /* [n_layers * MIL_N_PROJECTIONS], on the host */
    const mil_lora_module *device_modules; /* the same where ops read it; in slab if not there */
    int32_t n_layers;
    int32_t max_padded_rank;
} mil_adapter;

/* Check the whole adapter against its files and the model's shapes, then take memory, then load
 * this rank's slices. Values that are not finite as bf16 are MIL_ERR_NUMERICS naming the tensor. On
 * failure *adapter is zeroed. A dummy adapter's elements are those of source.h's formula for the
 * names "layers.<layer>.<projection>.lora_A" and "...lora_B". */
mil_status mil_adapter_init(mil_adapter *adapter, const mil_adapter_info *info,
                            const mil_config *config, const mil_shard *shard,
                            const mil_backend *backend, struct mil_queue *queue) MIL_WARN_UNUSED;
void mil_adapter_deinit(mil_adapter *adapter);

#ifdef __cplusplus
}
#endif
