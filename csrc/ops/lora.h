/* Adapter descriptors: where the packed A and B of each (adapter slot, layer, projection) lie.
 *
 * A row of a batch has at most one adapter. Ranks are exact, padded to the backend's panel only,
 * never to a global maximum; rank 0 means that the adapter does not touch the module. */
#pragma once

#include "ops/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

#define MIL_MAX_LORA_RANK 512 /* milpy/adapter_config.py's MAX_RANK */

typedef struct mil_lora_module {
    int32_t rank;        /* R <= MIL_MAX_LORA_RANK; 0: absent */
    int32_t padded_rank; /* R rounded up to the backend's lora_rank_multiple */
    int32_t in;          /* columns of A of this rank (row-parallel: its slice) */
    int32_t out;         /* rows of B of this rank (column-parallel: its slice) */
    float scale;         /* multiplies v in fp32 */
    const void *a; /* packed by backend->lora_pack_a; CPU: [padded_rank/16][in/2][16][2] bf16 */
    const void
        *b; /* packed by backend->lora_pack_b; CPU: [ceil(out/16)][padded_rank/2][16][2] bf16 */
} mil_lora_module;

/* One rank's table. modules[(slot * n_layers + layer) * MIL_N_PROJECTIONS + projection]. */
typedef struct mil_lora_table {
    int32_t n_slots;
    int32_t n_layers;
    mil_lora_module *modules;
} mil_lora_table;

static inline const mil_lora_module *mil_lora_find(const mil_lora_table *table, int32_t slot,
                                                   int32_t layer, mil_projection projection)
{
    size_t index = ((size_t)slot * (size_t)table->n_layers + (size_t)layer) * MIL_N_PROJECTIONS;
    return &table->modules[index + (size_t)projection];
}

#ifdef __cplusplus
}
#endif
