#include "ops/plan.h"

#include "base/memory.h"

#include <string.h>

struct mil_plan {
    mil_plan_header header;
};

/* Lay the arrays out behind the header; with a plan, also point batch at them. Returns the bytes. */
static size_t lay_out(const mil_plan_limits *limits, char *plan, mil_batch *batch)
{
    size_t seqs = (size_t)limits->max_seqs;
    size_t tokens = (size_t)limits->max_tokens;
    size_t rows = (size_t)limits->max_logit_rows;
    size_t segments = (size_t)limits->max_adapter_slots;
    struct {
        void **pointer;
        size_t n_bytes;
    } const arrays[] = {
        {(void **)&batch->header, sizeof(mil_plan_header)},
        {(void **)&batch->adapter_sets, segments * sizeof(mil_adapter_set)},
        {(void **)&batch->slot_sets, seqs * sizeof(mil_slot_set)},
        {(void **)&batch->page_sets, (size_t)limits->max_page_sets * sizeof(mil_page_set)},
        {(void **)&batch->seq_slot, seqs * sizeof(int32_t)},
        {(void **)&batch->query_indptr, (seqs + 1) * sizeof(int32_t)},
        {(void **)&batch->kv_lengths, seqs * sizeof(int32_t)},
        {(void **)&batch->tokens, tokens * sizeof(int32_t)},
        {(void **)&batch->positions, tokens * sizeof(int32_t)},
        {(void **)&batch->logit_rows, rows * sizeof(int32_t)},
        {(void **)&batch->logit_slots, rows * sizeof(int32_t)},
        {(void **)&batch->logit_feeds, rows * sizeof(int32_t)},
        {(void **)&batch->segment_indptr, (segments + 1) * sizeof(int32_t)},
        {(void **)&batch->segment_adapter, segments * sizeof(int32_t)},
        {(void **)&batch->lora_rows, tokens * sizeof(int32_t)},
    };
    size_t offset = 0;
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++) {
        if (plan != NULL)
            *arrays[i].pointer = plan + offset;
        offset += mil_round_up(arrays[i].n_bytes, MIL_ALIGN);
    }
    return offset;
}

size_t mil_plan_bytes(const mil_plan_limits *limits)
{
    mil_batch unused;
    return lay_out(limits, NULL, &unused);
}

void mil_plan_view(mil_plan *plan, mil_batch *batch)
{
    (void)lay_out(&plan->header.limits, (char *)plan, batch);
}

void mil_plan_reset(mil_plan *plan, const mil_plan_limits *limits, uint64_t step)
{
    memset(&plan->header, 0, sizeof plan->header);
    plan->header.limits = *limits;
    plan->header.step = step;
    plan->header.bucket_seqs = limits->max_seqs;
    plan->header.bucket_tokens = limits->max_tokens;
    mil_batch batch;
    mil_plan_view(plan, &batch);
    batch.query_indptr[0] = 0;
    batch.segment_indptr[0] = 0;
}

/* ---- check ---- */

static mil_status in_range(const char *what, int32_t index, int32_t value, int32_t low, int32_t high)
{
    if (value < low || value >= high)
        return mil_fail(MIL_ERR_INTERNAL, "plan: %s[%d] is %d, expected %d..%d", what, index, value,
                        low, high - 1);
    return MIL_OK;
}

static mil_status check_counts(const mil_plan_header *header)
{
    const mil_plan_limits *limits = &header->limits;
    MIL_TRY(in_range("n_adapter_sets", 0, header->n_adapter_sets, 0, limits->max_adapter_slots + 1));
    MIL_TRY(in_range("n_slot_sets", 0, header->n_slot_sets, 0, limits->max_seqs + 1));
    MIL_TRY(in_range("n_page_sets", 0, header->n_page_sets, 0, limits->max_page_sets + 1));
    MIL_TRY(in_range("n_seqs", 0, header->n_seqs, 0, limits->max_seqs + 1));
    MIL_TRY(in_range("n_decode", 0, header->n_decode, 0, header->n_seqs + 1));
    MIL_TRY(in_range("n_tokens", 0, header->n_tokens, 0, limits->max_tokens + 1));
    MIL_TRY(in_range("n_logit_rows", 0, header->n_logit_rows, 0, limits->max_logit_rows + 1));
    MIL_TRY(in_range("n_segments", 0, header->n_segments, 0, limits->max_adapter_slots + 1));
    return in_range("n_lora_rows", 0, header->n_lora_rows, 0, header->n_tokens + 1);
}

static mil_status check_commands(const mil_batch *batch, int32_t n_pages)
{
    const mil_plan_header *header = batch->header;
    const mil_plan_limits *limits = &header->limits;
    for (int32_t i = 0; i < header->n_adapter_sets; i++)
        MIL_TRY(in_range("adapter_sets.adapter_slot", i, batch->adapter_sets[i].adapter_slot, 0,
                         limits->max_adapter_slots));
    for (int32_t i = 0; i < header->n_slot_sets; i++) {
        MIL_TRY(in_range("slot_sets.slot", i, batch->slot_sets[i].slot, 0, limits->max_seqs));
        MIL_TRY(in_range("slot_sets.adapter_slot", i, batch->slot_sets[i].adapter_slot,
                         MIL_NO_ADAPTER, limits->max_adapter_slots));
    }
    for (int32_t i = 0; i < header->n_page_sets; i++) {
        MIL_TRY(in_range("page_sets.slot", i, batch->page_sets[i].slot, 0, limits->max_seqs));
        MIL_TRY(in_range("page_sets.index", i, batch->page_sets[i].index, 0,
                         limits->max_pages_per_seq));
        MIL_TRY(in_range("page_sets.page", i, batch->page_sets[i].page, 0, n_pages));
    }
    return MIL_OK;
}

static mil_status check_sequences(const mil_batch *batch, int32_t vocab)
{
    const mil_plan_header *header = batch->header;
    if (batch->query_indptr[0] != 0 || batch->query_indptr[header->n_seqs] != header->n_tokens)
        return mil_fail(MIL_ERR_INTERNAL, "plan: query_indptr runs %d..%d, expected 0..%d",
                        batch->query_indptr[0], batch->query_indptr[header->n_seqs],
                        header->n_tokens);
    for (int32_t s = 0; s < header->n_seqs; s++) {
        int32_t length = batch->query_indptr[s + 1] - batch->query_indptr[s];
        MIL_TRY(in_range("seq_slot", s, batch->seq_slot[s], 0, header->limits.max_seqs));
        MIL_TRY(in_range("query length", s, length, s < header->n_decode ? 1 : 0,
                         s < header->n_decode ? 2 : header->n_tokens + 1));
        if (batch->kv_lengths[s] < length)
            return mil_fail(MIL_ERR_INTERNAL, "plan: kv_lengths[%d] is %d, expected >= %d", s,
                            batch->kv_lengths[s], length);
    }
    for (int32_t t = header->n_decode; t < header->n_tokens; t++)
        MIL_TRY(in_range("tokens", t, batch->tokens[t], 0, vocab));
    for (int32_t t = 0; t < header->n_tokens; t++)
        MIL_TRY(in_range("positions", t, batch->positions[t], 0, INT32_MAX));
    return MIL_OK;
}

static mil_status check_rows(const mil_batch *batch)
{
    const mil_plan_header *header = batch->header;
    for (int32_t i = 0; i < header->n_logit_rows; i++) {
        int32_t low = i > 0 ? batch->logit_rows[i - 1] + 1 : 0;
        MIL_TRY(in_range("logit_rows", i, batch->logit_rows[i], low, header->n_tokens));
        MIL_TRY(in_range("logit_slots", i, batch->logit_slots[i], 0, header->limits.max_seqs));
    }
    if (header->n_segments == 0)
        return MIL_OK;
    if (batch->segment_indptr[0] != 0 ||
        batch->segment_indptr[header->n_segments] != header->n_lora_rows)
        return mil_fail(MIL_ERR_INTERNAL, "plan: segment_indptr runs %d..%d, expected 0..%d",
                        batch->segment_indptr[0], batch->segment_indptr[header->n_segments],
                        header->n_lora_rows);
    for (int32_t g = 0; g < header->n_segments; g++) {
        MIL_TRY(in_range("segment_adapter", g, batch->segment_adapter[g], 0,
                         header->limits.max_adapter_slots));
        for (int32_t other = 0; other < g; other++)
            if (batch->segment_adapter[other] == batch->segment_adapter[g])
                return mil_fail(MIL_ERR_INTERNAL, "plan: adapter slot %d has segments %d and %d",
                                batch->segment_adapter[g], other, g);
        if (batch->segment_indptr[g + 1] < batch->segment_indptr[g])
            return mil_fail(MIL_ERR_INTERNAL, "plan: segment %d ends before it begins", g);
    }
    for (int32_t i = 0; i < header->n_lora_rows; i++)
        MIL_TRY(in_range("lora_rows", i, batch->lora_rows[i], 0, header->n_tokens));
    return MIL_OK;
}

mil_status mil_plan_check(mil_plan *plan, int32_t n_pages, int32_t vocab)
{
    mil_batch batch;
    mil_plan_view(plan, &batch);
    MIL_TRY(check_counts(batch.header));
    MIL_TRY(check_commands(&batch, n_pages));
    MIL_TRY(check_sequences(&batch, vocab));
    return check_rows(&batch);
}
