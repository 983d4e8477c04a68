#include "ops/plan.h"

#include "base/memory.h"

#include <string.h>

struct mil_plan {
    mil_plan_header header;
};

/* Hands out pieces of a plan, each aligned; with no plan it only counts. */
typedef struct cursor {
    char *plan;
    size_t offset;
} cursor;

static void *take(cursor *at, int32_t n, size_t item_bytes)
{
    void *piece = at->plan == NULL ? NULL : at->plan + at->offset;
    at->offset += mil_round_up((size_t)n * item_bytes, MIL_ALIGN);
    return piece;
}

/* Lay the arrays out in the plan (NULL: nowhere), in mil_batch's order. Returns the bytes. */
static size_t lay_out(const mil_plan_limits *limits, char *plan, mil_batch *batch)
{
    cursor at = {plan, 0};
    batch->header = take(&at, 1, sizeof *batch->header);
    batch->counts = batch->header;
    batch->adapter_sets = take(&at, limits->max_adapter_slots, sizeof *batch->adapter_sets);
    batch->slot_sets = take(&at, limits->max_seqs, sizeof *batch->slot_sets);
    batch->page_sets = take(&at, limits->max_page_sets, sizeof *batch->page_sets);
    batch->seq_slot = take(&at, limits->max_seqs, sizeof(int32_t));
    batch->query_indptr = take(&at, limits->max_seqs + 1, sizeof(int32_t));
    batch->kv_lengths = take(&at, limits->max_seqs, sizeof(int32_t));
    batch->tokens = take(&at, limits->max_tokens, sizeof(int32_t));
    batch->positions = take(&at, limits->max_tokens, sizeof(int32_t));
    batch->logit_rows = take(&at, limits->max_logit_rows, sizeof(int32_t));
    batch->logit_slots = take(&at, limits->max_logit_rows, sizeof(int32_t));
    batch->logit_feeds = take(&at, limits->max_logit_rows, sizeof(int32_t));
    batch->logit_positions = take(&at, limits->max_logit_rows, sizeof(int32_t));
    batch->segment_indptr = take(&at, limits->max_adapter_slots + 1, sizeof(int32_t));
    batch->segment_adapter = take(&at, limits->max_adapter_slots, sizeof(int32_t));
    batch->lora_rows = take(&at, limits->max_tokens, sizeof(int32_t));
    return at.offset;
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

void mil_plan_view_at(mil_plan *plan, void *device_copy, mil_batch *batch)
{
    (void)lay_out(&plan->header.limits, device_copy, batch);
    batch->header = &plan->header;
}

void mil_plan_find_positions(mil_plan *plan)
{
    mil_batch batch;
    mil_plan_view(plan, &batch);
    int32_t s = 0;
    for (int32_t i = 0; i < batch.header->n_logit_rows; i++) {
        int32_t row = batch.logit_rows[i];
        while (batch.query_indptr[s + 1] <= row)
            s++;
        batch.logit_positions[i] = batch.kv_lengths[s] - (batch.query_indptr[s + 1] - row) + 1;
    }
}

void mil_plan_reset(mil_plan *plan, const mil_plan_limits *limits, uint64_t step)
{
    memset(&plan->header, 0, sizeof plan->header);
    plan->header.limits = *limits;
    plan->header.step = step;
    plan->header.bucket_seqs = limits->max_seqs;
    plan->header.bucket_tokens = limits->max_tokens;
    plan->header.bucket_logit_rows = limits->max_logit_rows;
    plan->header.bucket_chunks = limits->max_seqs;
    plan->header.bucket_segments = limits->max_adapter_slots;
    plan->header.bucket_lora_rows = limits->max_tokens;
    mil_batch batch;
    mil_plan_view(plan, &batch);
    batch.query_indptr[0] = 0;
    batch.segment_indptr[0] = 0;
}

/* ---- check ---- */

static mil_status in_range(const char *what, int32_t index, int32_t value, int32_t low,
                           int32_t high)
{
    if (value < low || value >= high)
        return mil_fail(MIL_ERR_INTERNAL, "plan: %s[%d] is %d, expected %d..%d", what, index, value,
                        low, high - 1);
    return MIL_OK;
}

static mil_status check_counts(const mil_plan_header *header)
{
    const mil_plan_limits *limits = &header->limits;
    MIL_TRY(
        in_range("n_adapter_sets", 0, header->n_adapter_sets, 0, limits->max_adapter_slots + 1));
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
