/* What one rank of a runner holds: slots, LoRA table, activations, workspace and KV pages. Its
 * memory is two slabs, sized before they are taken; commands of a plan are applied here. */
#pragma once

#include "model/model.h"
#include "model/runner.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_state {
    mil_slab slab;    /* all but the pages */
    mil_slab kv_slab; /* K of every layer, then V */
    mil_context context;
    mil_activations activations;
    mil_slots slots;
    mil_lora_table lora;
    int32_t *padded_ranks; /* [max_adapter_slots] largest of what lies in that slot of lora */
    mil_sample *samples;   /* [MIL_LOGIT_BLOCK] of ranks whose samples nobody reads */
    mil_kv kv;
} mil_state;

/* Bytes of a state but for its pages; SIZE_MAX where they overflow. */
size_t mil_state_workspace_bytes(const mil_model *model, int32_t rank,
                                 const mil_plan_limits *limits);
/* KV bytes of one page, all layers. */
size_t mil_state_page_bytes(const mil_model *model, int32_t rank, int32_t page_size);

/* Of checked options. On failure mil_state_deinit gives back what was taken. */
mil_status mil_state_init(mil_state *state, const mil_model *model, int32_t rank,
                          const mil_runner_options *options) MIL_WARN_UNUSED;
void mil_state_deinit(mil_state *state);

/* Apply the batch's commands. contents [n_adapter_sets]: what its adapter sets name, NULL to clear.
 */
void mil_state_apply(mil_state *state, const mil_batch *batch, const mil_content *const *contents,
                     int32_t rank);
/* The largest padded LoRA rank that the batch's segments use; 0: none. */
int32_t mil_state_lora_rank(const mil_state *state, const mil_batch *batch);
/* Fill a page with NaN, in all layers. */
void mil_state_poison(mil_state *state, int32_t page);

#ifdef __cplusplus
}
#endif
