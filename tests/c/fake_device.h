/* A device that runs plans by the letter of ops/plan.h, with a hash where a model would be.
 *
 * A KV row holds a hash of (token, position, adapter content); a sampled token is a hash of all
 * rows that its query sees, read through the page table. A page that is reused too early, a wrong
 * position, a lost page entry or a foreign adapter therefore changes tokens. fake_answer computes
 * the same from a request alone, without pages, slots or batches. */
#pragma once

#include "base/hash.h"
#include "ops/plan.h"

#include <stdlib.h>

#define FAKE_POISON UINT64_C(0xdeadbeefdeadbeef)
#define FAKE_NAN_SEED 3 /* requests with this seed (mod 16) meet logits that are not finite */

typedef struct fake_device {
    mil_plan_limits limits;
    int32_t n_pages, page_size, vocab;
    int32_t *last_token, *slot_adapter, *contents, *page_table;
    mil_sampling *sampling;
    uint64_t *kv; /* [n_pages][page_size] */
    int32_t *row_content;
} fake_device;

static inline void fake_device_init(fake_device *device, const mil_plan_limits *limits,
                                    int32_t n_pages, int32_t page_size, int32_t vocab)
{
    size_t n = (size_t)limits->max_seqs;
    *device = (fake_device){
        .limits = *limits, .n_pages = n_pages, .page_size = page_size, .vocab = vocab};
    device->last_token = calloc(n, sizeof(int32_t));
    device->slot_adapter = calloc(n, sizeof(int32_t));
    device->contents = calloc((size_t)limits->max_adapter_slots, sizeof(int32_t));
    device->page_table = calloc(n * (size_t)limits->max_pages_per_seq, sizeof(int32_t));
    device->sampling = calloc(n, sizeof(mil_sampling));
    device->kv = calloc((size_t)n_pages * (size_t)page_size, sizeof(uint64_t));
    device->row_content = calloc((size_t)limits->max_tokens, sizeof(int32_t));
}

static inline void fake_device_deinit(fake_device *device)
{
    free(device->last_token);
    free(device->slot_adapter);
    free(device->contents);
    free(device->page_table);
    free(device->sampling);
    free(device->kv);
    free(device->row_content);
}

static inline void fake_device_poison(fake_device *device, int32_t page)
{
    for (int32_t i = 0; i < device->page_size; i++)
        device->kv[page * device->page_size + i] = FAKE_POISON;
}

static inline uint64_t fake_kv_row(int32_t token, int32_t position, int32_t content)
{
    return mil_counter_hash((uint64_t)token, (uint64_t)position, (uint64_t)(int64_t)content);
}

static inline int32_t fake_choose(uint64_t state, uint64_t seed, int32_t vocab)
{
    uint64_t draw = mil_mix64(state ^ seed);
    if (seed % 16 == FAKE_NAN_SEED && draw % 31 == 0)
        return -1;
    return (int32_t)(draw % (uint64_t)vocab);
}

static inline uint64_t *fake_kv_at(const fake_device *device, int32_t slot, int32_t position)
{
    const int32_t *pages = device->page_table + slot * device->limits.max_pages_per_seq;
    int32_t page = pages[position / device->page_size];
    return &device->kv[page * device->page_size + position % device->page_size];
}

static inline void fake_apply_commands(fake_device *device, const mil_batch *batch)
{
    for (int32_t i = 0; i < batch->header->n_adapter_sets; i++)
        device->contents[batch->adapter_sets[i].adapter_slot] = batch->adapter_sets[i].content;
    for (int32_t i = 0; i < batch->header->n_slot_sets; i++) {
        device->slot_adapter[batch->slot_sets[i].slot] = batch->slot_sets[i].adapter_slot;
        device->sampling[batch->slot_sets[i].slot] = batch->slot_sets[i].sampling;
    }
    for (int32_t i = 0; i < batch->header->n_page_sets; i++) {
        const mil_page_set *set = &batch->page_sets[i];
        device->page_table[set->slot * device->limits.max_pages_per_seq + set->index] = set->page;
    }
}

/* samples [n_logit_rows]; logits [n_logit_rows, vocab] or NULL: the chosen token's is its row + 1.
 */
static inline void fake_device_run(fake_device *device, mil_plan *plan, mil_sample *samples,
                                   float *logits)
{
    mil_batch batch;
    mil_plan_view(plan, &batch);
    const mil_plan_header *header = batch.header;
    fake_apply_commands(device, &batch);
    for (int32_t t = 0; t < header->n_tokens; t++)
        device->row_content[t] = MIL_NO_ADAPTER;
    for (int32_t g = 0; g < header->n_segments; g++)
        for (int32_t i = batch.segment_indptr[g]; i < batch.segment_indptr[g + 1]; i++)
            device->row_content[batch.lora_rows[i]] = device->contents[batch.segment_adapter[g]];
    for (int32_t s = 0; s < header->n_seqs; s++) {
        int32_t slot = batch.seq_slot[s];
        int32_t first = batch.kv_lengths[s] - (batch.query_indptr[s + 1] - batch.query_indptr[s]);
        for (int32_t t = batch.query_indptr[s]; t < batch.query_indptr[s + 1]; t++) {
            int32_t token = s < header->n_decode ? device->last_token[slot] : batch.tokens[t];
            int32_t position = first + t - batch.query_indptr[s];
            *fake_kv_at(device, slot, position) =
                fake_kv_row(token, batch.positions[t], device->row_content[t]);
        }
    }
    for (int32_t i = 0; i < header->n_logit_rows; i++) {
        int32_t slot = batch.logit_slots[i];
        uint64_t state = 0;
        for (int32_t p = 0; p <= batch.positions[batch.logit_rows[i]]; p++)
            state = mil_mix64(state ^ *fake_kv_at(device, slot, p));
        int32_t token = fake_choose(state, device->sampling[slot].seed, device->vocab);
        memset(&samples[i], 0, sizeof samples[i]);
        samples[i].token = token;
        if (batch.logit_feeds[i])
            device->last_token[slot] = token;
        for (int32_t v = 0; logits != NULL && v < device->vocab; v++)
            logits[i * device->vocab + v] = v == token ? (float)(i + 1) : 0.0f;
    }
}

/* What a request gives when it runs alone: tokens to answer [max_new], how many, and how it ends.
 */
static inline int32_t fake_answer(const int32_t *prompt, int32_t n_prompt, int32_t max_new,
                                  int32_t content, uint64_t seed, int32_t stop, int32_t vocab,
                                  int32_t *answer, mil_finish *finish)
{
    uint64_t state = 0;
    for (int32_t p = 0; p < n_prompt; p++)
        state = mil_mix64(state ^ fake_kv_row(prompt[p], p, content));
    for (int32_t n = 0;; n++) {
        int32_t token = fake_choose(state, seed, vocab);
        *finish = token < 0          ? MIL_FINISH_NUMERICS
                  : token == stop    ? MIL_FINISH_STOP
                  : n + 1 == max_new ? MIL_FINISH_LENGTH
                                     : MIL_FINISH_NONE;
        if (token < 0)
            return n;
        answer[n] = token;
        if (*finish != MIL_FINISH_NONE)
            return n + 1;
        state = mil_mix64(state ^ fake_kv_row(token, n_prompt + n, content));
    }
}
