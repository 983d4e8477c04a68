#include "ops/plan.h"

#include "base/memory.h"
#include "test.h"

#include <string.h>

static const mil_plan_limits limits = {
    .max_seqs = 4,
    .max_tokens = 16,
    .max_logit_rows = 16,
    .max_pages_per_seq = 8,
    .max_page_sets = 12,
    .max_adapter_slots = 3,
};

/* A plan of one decode row and one chunk of three, the chunk under adapter slot 2. */
static mil_plan *sample_plan(mil_batch *batch)
{
    mil_plan *plan = mil_alloc(1, mil_plan_bytes(&limits));
    mil_plan_reset(plan, &limits, 7);
    mil_plan_view(plan, batch);
    batch->header->n_seqs = 2;
    batch->header->n_decode = 1;
    batch->header->n_tokens = 4;
    batch->header->n_logit_rows = 2;
    batch->header->n_segments = 1;
    batch->header->n_lora_rows = 3;
    memcpy(batch->seq_slot, (int32_t[]){3, 0}, 8);
    memcpy(batch->query_indptr, (int32_t[]){0, 1, 4}, 12);
    memcpy(batch->kv_lengths, (int32_t[]){9, 3}, 8);
    memcpy(batch->tokens, (int32_t[]){-5, 1, 2, 3}, 16);
    memcpy(batch->positions, (int32_t[]){8, 0, 1, 2}, 16);
    memcpy(batch->logit_rows, (int32_t[]){0, 3}, 8);
    memcpy(batch->logit_slots, (int32_t[]){3, 0}, 8);
    memcpy(batch->segment_indptr, (int32_t[]){0, 3}, 8);
    memcpy(batch->segment_adapter, (int32_t[]){2}, 4);
    memcpy(batch->lora_rows, (int32_t[]){1, 2, 3}, 12);
    return plan;
}

TEST(a_reset_plan_is_empty_and_valid)
{
    mil_plan *plan = mil_alloc(1, mil_plan_bytes(&limits));
    mil_plan_reset(plan, &limits, 1);
    CHECK_INT(mil_plan_check(plan, 10, 100), MIL_OK);
    mil_free(plan);
}

TEST(arrays_lie_inside_the_plan_aligned_and_apart)
{
    mil_batch batch;
    mil_plan *plan = sample_plan(&batch);
    char *end = (char *)plan + mil_plan_bytes(&limits);
    CHECK_INT((uintptr_t)batch.tokens % 64, 0);
    CHECK((char *)(batch.tokens + limits.max_tokens) <= (char *)batch.positions);
    CHECK((char *)(batch.lora_rows + limits.max_tokens) <= end);
    mil_free(plan);
}

TEST(a_moved_plan_reads_the_same)
{
    mil_batch batch;
    mil_batch copied;
    mil_plan *plan = sample_plan(&batch);
    mil_plan *copy = mil_alloc(1, mil_plan_bytes(&limits));
    memcpy(copy, plan, mil_plan_bytes(&limits));
    mil_free(plan);
    mil_plan_view(copy, &copied);
    CHECK_INT(copied.header->step, 7);
    CHECK_INT(copied.lora_rows[2], 3);
    CHECK_INT(mil_plan_check(copy, 10, 100), MIL_OK);
    mil_free(copy);
}

/* Each bad value is refused by name; the token of a decode row alone is not read. */
TEST(every_bad_index_is_named)
{
    mil_batch batch;
    mil_plan *plan = sample_plan(&batch);
    CHECK_INT(mil_plan_check(plan, 10, 100), MIL_OK);
    struct {
        int32_t *field;
        int32_t bad;
        const char *name;
    } const cases[] = {
        {&batch.header->n_tokens, 17, "n_tokens"},
        {&batch.header->n_seqs, 5, "n_seqs"},
        {&batch.header->n_decode, 3, "n_decode"},
        {&batch.header->n_segments, 4, "n_segments"},
        {&batch.seq_slot[1], 4, "seq_slot[1]"},
        {&batch.seq_slot[0], -1, "seq_slot[0]"},
        {&batch.query_indptr[1], 2, "query length[0]"},
        {&batch.query_indptr[2], 5, "query_indptr"},
        {&batch.kv_lengths[1], 2, "kv_lengths[1]"},
        {&batch.tokens[2], 100, "tokens[2]"},
        {&batch.positions[3], -1, "positions[3]"},
        {&batch.logit_rows[1], 0, "logit_rows[1]"},
        {&batch.logit_slots[0], 9, "logit_slots[0]"},
        {&batch.segment_adapter[0], 3, "segment_adapter[0]"},
        {&batch.segment_indptr[1], 2, "segment_indptr"},
        {&batch.lora_rows[0], 4, "lora_rows[0]"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        int32_t good = *cases[i].field;
        *cases[i].field = cases[i].bad;
        CHECK_INT(mil_plan_check(plan, 10, 100), MIL_ERR_INTERNAL);
        CHECK(strstr(mil_status_message(), cases[i].name) != NULL);
        *cases[i].field = good;
    }
    mil_free(plan);
}

TEST(commands_are_checked_against_pages_and_slots)
{
    mil_batch batch;
    mil_plan *plan = sample_plan(&batch);
    batch.header->n_page_sets = 1;
    batch.page_sets[0] = (mil_page_set){.slot = 0, .index = 7, .page = 10};
    CHECK_INT(mil_plan_check(plan, 10, 100), MIL_ERR_INTERNAL);
    CHECK_INT(mil_plan_check(plan, 11, 100), MIL_OK);
    batch.header->n_slot_sets = 1;
    batch.slot_sets[0] = (mil_slot_set){.slot = 4};
    CHECK_INT(mil_plan_check(plan, 11, 100), MIL_ERR_INTERNAL);
    mil_free(plan);
}

TEST(one_adapter_slot_has_one_segment)
{
    mil_batch batch;
    mil_plan *plan = sample_plan(&batch);
    batch.header->n_segments = 2;
    memcpy(batch.segment_indptr, (int32_t[]){0, 1, 3}, 12);
    memcpy(batch.segment_adapter, (int32_t[]){2, 2}, 8);
    CHECK_INT(mil_plan_check(plan, 10, 100), MIL_ERR_INTERNAL);
    batch.segment_adapter[1] = 1;
    CHECK_INT(mil_plan_check(plan, 10, 100), MIL_OK);
    mil_free(plan);
}

TEST_MAIN()
