/* The start of a step: the plan's commands, in order, and the token ids of its batch. A decode
 * row's was sampled into its slot, a chunk's came with the plan. The plan is read in place. */
#include "cpu/cpu.h"

#include <string.h>

static void apply_adapters(const mil_begin_args *args)
{
    const mil_batch *batch = args->batch;
    size_t n_modules = (size_t)args->lora->n_layers * MIL_N_PROJECTIONS;
    for (int32_t i = 0; i < batch->counts->n_adapter_sets; i++) {
        size_t slot = (size_t)batch->adapter_sets[i].adapter_slot;
        mil_lora_module *modules = args->lora->modules + slot * n_modules;
        if (args->adapters[i] == NULL)
            memset(modules, 0, n_modules * sizeof *modules);
        else
            memcpy(modules, args->adapters[i], n_modules * sizeof *modules);
    }
}

static void apply_slots(const mil_begin_args *args)
{
    const mil_batch *batch = args->batch;
    const mil_slots *slots = args->slots;
    for (int32_t i = 0; i < batch->counts->n_slot_sets; i++) {
        const mil_slot_set *set = &batch->slot_sets[i];
        slots->last_token[set->slot] = 0;
        slots->adapter_slot[set->slot] = set->adapter_slot;
        slots->sampling[set->slot] = set->sampling;
    }
    for (int32_t i = 0; i < batch->counts->n_page_sets; i++) {
        const mil_page_set *set = &batch->page_sets[i];
        slots->page_table[(size_t)set->slot * (size_t)slots->max_pages + (size_t)set->index] =
            set->page;
    }
}

static void gather_tokens(const mil_begin_args *args)
{
    const mil_batch *batch = args->batch;
    const mil_plan_header *counts = batch->counts;
    for (int32_t s = 0; s < counts->n_decode; s++)
        args->tokens[batch->query_indptr[s]] = args->slots->last_token[batch->seq_slot[s]];
    int32_t first = batch->query_indptr[counts->n_decode];
    for (int32_t t = first; t < counts->n_tokens; t++)
        args->tokens[t] = batch->tokens[t];
    for (int32_t t = counts->n_tokens; t < batch->header->bucket_tokens; t++)
        args->tokens[t] = 0;
}

mil_status mil_cpu_begin(mil_context *context, const mil_begin_args *args)
{
    (void)context;
    apply_adapters(args);
    apply_slots(args);
    gather_tokens(args);
    return MIL_OK;
}
