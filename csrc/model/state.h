/* What one rank of a runner holds on its device: slots, LoRA table, activations, workspace and KV
 * pages. Its memory is two slabs, sized before they are taken. */
#pragma once

#include "model/graphs.h"
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
    mil_sample *samples;    /* [max_logit_rows] */
    void *plan;             /* where the device does not read the host's: its copy */
    const float *cos_table; /* the model's, or a copy of what this runner reaches */
    const float *sin_table;
    mil_kv kv;
    mil_graphs graphs;
    int32_t *padded_ranks; /* [max_adapter_slots] on the host: the largest that a slot holds */
} mil_state;

/* Bytes of a state but for its pages; SIZE_MAX where they overflow. */
size_t mil_state_workspace_bytes(const mil_model *model, int32_t rank,
                                 const mil_plan_limits *limits, int32_t page_size);
/* Positions that a sequence can reach under these limits. */
int32_t mil_state_positions(const mil_model *model, const mil_plan_limits *limits,
                            int32_t page_size);
/* KV bytes of one page, all layers. */
size_t mil_state_page_bytes(const mil_model *model, int32_t rank, int32_t page_size);

/* Of checked options, without pages; the model's rope tables must reach as far as
 * mil_state_positions. On failure mil_state_deinit gives back what was taken. */
mil_status mil_state_init(mil_state *state, const mil_model *model, int32_t rank,
                          const mil_runner_options *options) MIL_WARN_UNUSED;
void mil_state_deinit(mil_state *state);
/* n_pages instead of what there was; graphs, which point into the pages, go first. */
mil_status mil_state_take_pages(mil_state *state, const mil_model *model, int32_t rank,
                                int32_t n_pages, int32_t page_size) MIL_WARN_UNUSED;

/* Note on the host what an adapter slot will hold; content NULL: nothing. */
void mil_state_note_adapter(mil_state *state, int32_t slot, const mil_content *content,
                            int32_t rank);
/* v_part_stride of the batch's LoRA (host's view of it): its largest padded rank, or the backend's
 * fixed one; 0: no row of it has an adapter. */
int32_t mil_state_lora_rank(const mil_state *state, const mil_batch *batch);
/* Fill a page with NaN, in all layers. */
mil_status mil_state_poison(mil_state *state, int32_t page) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
