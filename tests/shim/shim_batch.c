/* Plans of tests: the batch, its slots and KV pages, lent to one op. */
#include "shim.h"

#include <string.h>

static int32_t larger(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

static mil_plan_limits limits_of(const shim_batch *from, const shim_extras *extras)
{
    int32_t n_seqs = larger(from->n_seqs, larger(from->bucket_seqs, from->n_slots));
    return (mil_plan_limits){
        .max_seqs = larger(1, larger(n_seqs, extras->n_slot_sets)),
        .max_tokens = larger(1, larger(from->n_tokens, from->bucket_tokens)),
        .max_logit_rows = larger(1, larger(extras->n_logit_rows, extras->bucket_logit_rows)),
        .max_pages_per_seq = larger(1, from->max_pages),
        .max_page_sets = larger(1, extras->n_page_sets),
        .max_adapter_slots = larger(
            1, larger(larger(extras->n_segments, extras->n_adapters), extras->n_adapter_sets)),
    };
}

/* Padding may become anything when a captured op runs again, so then all may be chunks. */
static int32_t n_chunks(const shim_batch *from)
{
    int32_t n = 0;
    if (from->query_indptr == NULL || from->bucket_seqs > 0)
        return larger(from->n_seqs, from->bucket_seqs);
    for (int32_t s = 0; s < from->n_seqs; s++)
        n += from->query_indptr[s + 1] - from->query_indptr[s] > 1;
    return n;
}

static void fill_header(mil_plan_header *header, const shim_batch *from, const shim_extras *extras)
{
    header->n_seqs = from->n_seqs;
    header->n_decode = from->n_decode;
    header->n_tokens = from->n_tokens;
    header->n_logit_rows = extras->n_logit_rows;
    header->n_segments = extras->n_segments;
    header->n_lora_rows = extras->n_segments > 0 ? extras->segment_indptr[extras->n_segments] : 0;
    header->n_slot_sets = extras->n_slot_sets;
    header->n_page_sets = extras->n_page_sets;
    header->n_adapter_sets = extras->n_adapter_sets;
    header->bucket_segments = extras->n_segments;
    header->bucket_lora_rows = header->n_lora_rows;
    header->bucket_seqs = larger(from->n_seqs, from->bucket_seqs);
    header->bucket_chunks = n_chunks(from);
    header->bucket_tokens = larger(from->n_tokens, from->bucket_tokens);
    header->bucket_logit_rows = larger(extras->n_logit_rows, extras->bucket_logit_rows);
}

static void put(void *to, const void *from, int32_t n, size_t item_bytes)
{
    if (from != NULL && n > 0)
        memcpy(to, from, (size_t)n * item_bytes);
}

static void put_ints(int32_t *to, const int32_t *from, int32_t n)
{
    put(to, from, n, sizeof *to);
}

static void fill_arrays(const mil_batch *to, const shim_batch *from, const shim_extras *extras)
{
    put_ints(to->seq_slot, from->seq_slot, from->n_seqs);
    if (from->query_indptr != NULL)
        put_ints(to->query_indptr, from->query_indptr, from->n_seqs + 1);
    put_ints(to->kv_lengths, from->kv_lengths, from->n_seqs);
    put_ints(to->tokens, from->tokens, from->n_tokens);
    put_ints(to->positions, from->positions, from->n_tokens);
    put_ints(to->logit_rows, extras->logit_slots, extras->n_logit_rows);
    put_ints(to->logit_slots, extras->logit_slots, extras->n_logit_rows);
    put_ints(to->logit_feeds, extras->logit_feeds, extras->n_logit_rows);
    put_ints(to->logit_positions, extras->logit_positions, extras->n_logit_rows);
    put_ints(to->segment_indptr, extras->segment_indptr, extras->n_segments + 1);
    put_ints(to->segment_adapter, extras->segment_adapter, extras->n_segments);
    put_ints(to->lora_rows, extras->lora_rows, to->header->n_lora_rows);
    put(to->slot_sets, extras->slot_sets, extras->n_slot_sets, sizeof *to->slot_sets);
    put(to->page_sets, extras->page_sets, extras->n_page_sets, sizeof *to->page_sets);
    put(to->adapter_sets, extras->adapter_sets, extras->n_adapter_sets, sizeof *to->adapter_sets);
}

void shim_fill_plan(shim_step *to, const shim_batch *from, const shim_extras *extras)
{
    static const shim_extras none;
    extras = extras != NULL ? extras : &none;
    mil_plan_limits limits = limits_of(from, extras);
    /* What lies past the counts is what an older plan left. */
    memset(to->plan, 0xff, mil_plan_bytes(&limits));
    mil_plan_reset(to->plan, &limits, 1);
    mil_plan_view(to->plan, &to->batch);
    fill_header(to->batch.header, from, extras);
    fill_arrays(&to->batch, from, extras);
    mil_plan_view_at(to->plan, to->device_plan, &to->batch);
}

void shim_lend_batch(shim *s, shim_step *to, const shim_batch *from, const shim_extras *extras,
                     bool begins)
{
    static const shim_extras none;
    extras = extras != NULL ? extras : &none;
    const mil_device *device = s->context.backend->device;
    mil_plan_limits limits = limits_of(from, extras);
    size_t n_bytes = mil_plan_bytes(&limits);
    memset(to, 0, sizeof *to);
    to->plan = shim_take_pinned(s, n_bytes);
    to->device_plan = device->is_host ? to->plan : shim_take(s, n_bytes);
    if (s->status != MIL_OK)
        return;
    shim_fill_plan(to, from, extras);
    if (!device->is_host && !(begins && s->is_bare))
        s->status = device->copy_in(s->context.queue, to->device_plan, to->plan, n_bytes);
    size_t n_slots = (size_t)from->n_slots;
    to->slots = (mil_slots){
        .n_slots = from->n_slots,
        .max_pages = from->max_pages,
        .last_token = shim_lend(s, from->last_token, n_slots * sizeof(int32_t), SHIM_BOTH),
        .page_table = shim_lend(s, from->page_table,
                                n_slots * (size_t)from->max_pages * sizeof(int32_t), SHIM_BOTH),
    };
}

mil_kv shim_lend_kv(shim *s, const shim_kv *from, int32_t how)
{
    int64_t pool = larger(from->n_pages, from->pool_pages);
    int64_t page = (int64_t)from->n_kv_heads * from->page_size * from->head_dim;
    shim_shape shape = {
        .n_rows = (size_t)from->n_layers,
        .row_bytes = (size_t)(from->n_pages * page) * sizeof(uint16_t),
        .first_bytes = (size_t)((pool - from->n_pages) * page) * sizeof(uint16_t),
        .stride_bytes = (size_t)(pool * page) * sizeof(uint16_t),
        .n_bytes = (size_t)(from->n_layers * pool * page) * sizeof(uint16_t),
    };
    return (mil_kv){
        .k = shim_lend_shaped(s, from->k, shape, how),
        .v = shim_lend_shaped(s, from->v, shape, how),
        .layer_elements = pool * page,
        .n_pages = (int32_t)pool,
        .page_size = from->page_size,
        .n_kv_heads = from->n_kv_heads,
        .head_dim = from->head_dim,
        .dtype = (mil_dtype)from->dtype,
    };
}
