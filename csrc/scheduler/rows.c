#include "scheduler/rows.h"

#include "base/memory.h"

#include <string.h>

mil_status mil_rows_init(mil_rows *rows, int32_t max_seqs, int32_t max_adapter_slots)
{
    memset(rows, 0, sizeof *rows);
    rows->max_seqs = max_seqs;
    rows->max_adapter_slots = max_adapter_slots;
    rows->seq_adapter = mil_alloc((size_t)max_seqs, sizeof *rows->seq_adapter);
    rows->adapter_rows = mil_alloc((size_t)max_adapter_slots, sizeof *rows->adapter_rows);
    if (rows->seq_adapter == NULL || rows->adapter_rows == NULL) {
        mil_rows_deinit(rows);
        return mil_fail(MIL_ERR_MEMORY, "rows: no memory for %d sequences", max_seqs);
    }
    return MIL_OK;
}

void mil_rows_deinit(mil_rows *rows)
{
    mil_free(rows->seq_adapter);
    mil_free(rows->adapter_rows);
    memset(rows, 0, sizeof *rows);
}

int32_t mil_rows_add(mil_rows *rows, mil_batch *batch, const mil_slot_set *seq,
                     const int32_t *tokens, int32_t n_past, int32_t n_tokens)
{
    mil_plan_header *header = batch->header;
    int32_t row = header->n_tokens;
    int32_t s = header->n_seqs++;
    batch->seq_slot[s] = seq->slot;
    batch->kv_lengths[s] = n_past + n_tokens;
    batch->query_indptr[s + 1] = row + n_tokens;
    header->n_tokens = row + n_tokens;
    for (int32_t i = 0; i < n_tokens; i++)
        batch->positions[row + i] = n_past + i;
    if (tokens == NULL) {
        batch->tokens[row] = 0; /* not read */
        header->n_decode++;
    } else {
        memcpy(batch->tokens + row, tokens, (size_t)n_tokens * sizeof *tokens);
    }
    rows->seq_adapter[s] = seq->adapter_slot;
    if (seq->adapter_slot != MIL_NO_ADAPTER)
        rows->adapter_rows[seq->adapter_slot] += n_tokens;
    return row;
}

void mil_rows_add_logits(mil_batch *batch, int32_t row, bool feeds)
{
    mil_plan_header *header = batch->header;
    batch->logit_rows[header->n_logit_rows] = row;
    batch->logit_slots[header->n_logit_rows] = batch->seq_slot[header->n_seqs - 1];
    batch->logit_feeds[header->n_logit_rows++] = feeds;
}

void mil_rows_finish(mil_rows *rows, mil_batch *batch)
{
    mil_plan_header *header = batch->header;
    for (int32_t a = 0; a < rows->max_adapter_slots; a++) {
        int32_t n = rows->adapter_rows[a];
        if (n == 0)
            continue;
        batch->segment_adapter[header->n_segments++] = a;
        rows->adapter_rows[a] = header->n_lora_rows; /* from here on: where its next row goes */
        header->n_lora_rows += n;
        batch->segment_indptr[header->n_segments] = header->n_lora_rows;
    }
    for (int32_t s = 0; s < header->n_seqs; s++) {
        int32_t adapter_slot = rows->seq_adapter[s];
        if (adapter_slot == MIL_NO_ADAPTER)
            continue;
        for (int32_t t = batch->query_indptr[s]; t < batch->query_indptr[s + 1]; t++)
            batch->lora_rows[rows->adapter_rows[adapter_slot]++] = t;
    }
    memset(rows->adapter_rows, 0, (size_t)rows->max_adapter_slots * sizeof *rows->adapter_rows);
}
