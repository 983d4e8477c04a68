/* Token ids of a batch: a decode row's was sampled into its slot, a chunk's came with the plan. */
#include "cpu/cpu.h"

mil_status mil_cpu_gather_tokens(mil_context *context, int32_t *tokens, const mil_batch *batch,
                                 const mil_slots *slots)
{
    (void)context;
    const mil_plan_header *header = batch->header;
    for (int32_t s = 0; s < header->n_decode; s++)
        tokens[batch->query_indptr[s]] = slots->last_token[batch->seq_slot[s]];
    int32_t first = batch->query_indptr[header->n_decode];
    for (int32_t t = first; t < header->n_tokens; t++)
        tokens[t] = batch->tokens[t];
    return MIL_OK;
}
