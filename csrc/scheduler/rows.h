/* How sequences become rows of a plan, the same for both drivers: arrays of the batch in step with
 * each other, and LoRA rows grouped by adapter slot whatever their order in the batch. */
#pragma once

#include "ops/plan.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_rows {
    int32_t max_seqs;
    int32_t max_adapter_slots;
    int32_t *seq_adapter;  /* [max_seqs], adapter slot of each sequence of the batch */
    int32_t *adapter_rows; /* [max_adapter_slots], rows of each in the batch */
} mil_rows;

/* On failure *rows is zeroed. */
mil_status mil_rows_init(mil_rows *rows, int32_t max_seqs, int32_t max_adapter_slots)
    MIL_WARN_UNUSED;
void mil_rows_deinit(mil_rows *rows);

/* Append a sequence: n_tokens rows after n_past tokens whose KV is there. tokens NULL: a decode
 * row, whose one token is in the slot; all of those come before the first chunk. Returns its first
 * row. */
int32_t mil_rows_add(mil_rows *rows, mil_batch *batch, const mil_slot_set *seq,
                     const int32_t *tokens, int32_t n_past, int32_t n_tokens);
/* Want the logits of a row of the sequence added last. feeds: the token sampled there is its next.
 */
void mil_rows_add_logits(mil_batch *batch, int32_t row, bool feeds);
/* Write the segments, once all sequences of the batch are in; ready for the next batch then. */
void mil_rows_finish(mil_rows *rows, mil_batch *batch);

#ifdef __cplusplus
}
#endif
