/* begin, embed, norm, act, rope_write, attention, sample, send_out. */
#include "shim.h"

#include <string.h>

SHIM mil_status shim_embed(shim *s, float *out, const int32_t *tokens, const void *packed,
                           int64_t packed_bytes, int32_t N, int32_t K, int32_t n_tokens,
                           int32_t vocab_begin, float scale);
SHIM mil_status shim_norm(shim *s, uint16_t *out, float *x, const void *residual,
                          const float *weight, const int32_t *rows, int32_t n_tokens,
                          int32_t n_rows, int32_t hidden, float eps, float weight_offset);
SHIM mil_status shim_act(shim *s, uint16_t *out, const void *gate_up, int32_t n_tokens, int32_t ffn,
                         int32_t interleave, int32_t kind);
SHIM mil_status shim_rope_write(shim *s, uint16_t *q, const void *qkv, const float *cos_table,
                                const float *sin_table, int32_t n_positions,
                                const shim_batch *batch, const shim_kv *kv, int32_t layer,
                                int32_t n_heads, int32_t rotary_dim, bool is_interleaved);
SHIM mil_status shim_attention(shim *s, uint16_t *out, const uint16_t *q, const shim_batch *batch,
                               const shim_kv *kv, int32_t layer, int32_t n_heads, float scale,
                               int32_t window, float softcap, int32_t repeat);
SHIM mil_status shim_attention_replays(shim *s, int32_t n, uint16_t *out, const uint16_t *q,
                                       const shim_batch *batches, const shim_kv *kv, int32_t layer,
                                       int32_t n_heads, float scale, int32_t window, float softcap);
SHIM mil_status shim_sample(shim *s, mil_sample *out, const float *logits,
                            const shim_extras *extras, const mil_sampling *sampling,
                            int32_t *last_token, int32_t n_slots, int32_t first_row, int32_t n_rows,
                            int32_t vocab, int64_t ld);
SHIM mil_status shim_send_out(shim *s, void *host, const void *sent, int64_t n_host_bytes,
                              int64_t n_bytes);

/* What begin changes beside the slots' tokens and pages, and what adapter commands name. */
typedef struct shim_state {
    int32_t *adapter_slot;           /* [n_slots] */
    mil_sampling *sampling;          /* [n_slots] */
    mil_lora_module *modules;        /* [n_adapters][n_layers][MIL_N_PROJECTIONS] */
    const mil_lora_module *contents; /* [n_contents][n_layers][MIL_N_PROJECTIONS] */
    int32_t n_adapters, n_layers, n_contents;
} shim_state;

SHIM mil_status shim_begin(shim *s, int32_t *tokens, const shim_batch *batch,
                           const shim_extras *extras, const shim_state *state);

mil_status shim_embed(shim *s, float *out, const int32_t *tokens, const void *packed,
                      int64_t packed_bytes, int32_t N, int32_t K, int32_t n_tokens,
                      int32_t vocab_begin, float scale)
{
    size_t n = (size_t)n_tokens;
    mil_weight weight = {.format = s->context.backend->weight_format,
                         .N = N,
                         .K = K,
                         .n_parts = 1,
                         .part_rows = {N},
                         .data = shim_lend(s, packed, (size_t)packed_bytes, SHIM_IN)};
    mil_embed_args args = {
        .out = shim_lend(s, out, n * (size_t)K * sizeof *out, SHIM_BACK),
        .tokens = shim_lend(s, tokens, n * sizeof *tokens, SHIM_IN),
        .weight = &weight,
        .n_tokens = n_tokens,
        .vocab_begin = vocab_begin,
        .scale = scale,
    };
    MIL_TRY(shim_enter(s));
    return shim_leave(s, s->context.backend->embed(&s->context, &args));
}

mil_status shim_norm(shim *s, uint16_t *out, float *x, const void *residual, const float *weight,
                     const int32_t *rows, int32_t n_tokens, int32_t n_rows, int32_t hidden,
                     float eps, float weight_offset)
{
    size_t T = (size_t)n_tokens, H = (size_t)hidden, n = (size_t)n_rows;
    mil_norm_args args = {
        .out = shim_lend(s, out, n * H * sizeof *out, SHIM_BACK),
        .x = shim_lend(s, x, T * H * sizeof *x, SHIM_BOTH),
        .residual = shim_lend(s, residual, T * H * shim_product_bytes(s), SHIM_IN),
        .weight = shim_lend(s, weight, H * sizeof *weight, SHIM_IN),
        .rows = shim_lend(s, rows, n * sizeof *rows, SHIM_IN),
        .n_rows = n_rows,
        .hidden = hidden,
        .eps = eps,
        .weight_offset = weight_offset,
    };
    MIL_TRY(shim_enter(s));
    return shim_leave(s, s->context.backend->norm(&s->context, &args));
}

mil_status shim_act(shim *s, uint16_t *out, const void *gate_up, int32_t n_tokens, int32_t ffn,
                    int32_t interleave, int32_t kind)
{
    size_t n = (size_t)n_tokens * (size_t)ffn;
    mil_act_args args = {
        .out = shim_lend(s, out, n * sizeof *out, SHIM_BACK),
        .gate_up = shim_lend(s, gate_up, 2 * n * shim_product_bytes(s), SHIM_IN),
        .n_tokens = n_tokens,
        .ffn = ffn,
        .interleave = interleave,
        .kind = (mil_activation)kind,
    };
    MIL_TRY(shim_enter(s));
    return shim_leave(s, s->context.backend->act(&s->context, &args));
}

mil_status shim_rope_write(shim *s, uint16_t *q, const void *qkv, const float *cos_table,
                           const float *sin_table, int32_t n_positions, const shim_batch *batch,
                           const shim_kv *kv, int32_t layer, int32_t n_heads, int32_t rotary_dim,
                           bool is_interleaved)
{
    shim_step step;
    shim_lend_batch(s, &step, batch, NULL, false);
    mil_kv pages = shim_lend_kv(s, kv, SHIM_BOTH);
    int32_t n = batch->n_tokens;
    int32_t bucket = step.batch.header != NULL ? step.batch.header->bucket_tokens : n;
    size_t width = (size_t)(n_heads + 2 * kv->n_kv_heads) * (size_t)kv->head_dim;
    size_t table_bytes = (size_t)n_positions * (size_t)(rotary_dim / 2) * sizeof(float);
    mil_rope_write_args args = {
        .q = shim_lend_rows(s, q, n, bucket, (size_t)n_heads * (size_t)kv->head_dim * sizeof *q,
                            SHIM_BACK),
        .qkv = shim_lend_rows(s, qkv, n, bucket, width * shim_product_bytes(s), SHIM_IN),
        .cos_table = shim_lend(s, cos_table, table_bytes, SHIM_IN),
        .sin_table = shim_lend(s, sin_table, table_bytes, SHIM_IN),
        .batch = &step.batch,
        .slots = &step.slots,
        .kv = &pages,
        .layer = layer,
        .n_heads = n_heads,
        .rotary_dim = rotary_dim,
        .is_interleaved = is_interleaved,
    };
    MIL_TRY(shim_enter(s));
    return shim_leave(s, s->context.backend->rope_write(&s->context, &args));
}

/* A step's begin, which notes the batch for attention, then attention. repeat: for benchmarks, the
 * op that often in one entry of the pool. */
mil_status shim_attention(shim *s, uint16_t *out, const uint16_t *q, const shim_batch *batch,
                          const shim_kv *kv, int32_t layer, int32_t n_heads, float scale,
                          int32_t window, float softcap, int32_t repeat)
{
    shim_step step;
    mil_lora_table none = {0};
    shim_lend_batch(s, &step, batch, NULL, true);
    mil_kv pages = shim_lend_kv(s, kv, SHIM_IN);
    int32_t n = batch->n_tokens;
    int32_t bucket = step.batch.header != NULL ? step.batch.header->bucket_tokens : n;
    size_t row_bytes = (size_t)n_heads * (size_t)kv->head_dim * sizeof *q;
    mil_attention_args args = {
        .out = shim_lend_rows(s, out, n, bucket, row_bytes, SHIM_BACK),
        .q = shim_lend_rows(s, q, n, bucket, row_bytes, SHIM_IN),
        .out_dtype = (mil_dtype)kv->out_dtype,
        .batch = &step.batch,
        .slots = &step.slots,
        .kv = &pages,
        .layer = layer,
        .n_heads = n_heads,
        .scale = scale,
        .window = window,
        .softcap = softcap,
    };
    mil_begin_args begin = {
        .plan = step.plan,
        .batch = &step.batch,
        .adapters = shim_take_pinned(s, sizeof(void *)),
        .slots = &step.slots,
        .lora = &none,
        .kv = &pages,
        .tokens = shim_take(s, (size_t)bucket * sizeof(int32_t)),
        .n_heads = n_heads,
    };
    MIL_TRY(shim_enter(s));
    mil_status status = s->context.backend->begin(&s->context, &begin);
    for (int32_t i = 0; i < repeat && status == MIL_OK; i++)
        status = s->context.backend->attention(&s->context, &args);
    return shim_leave(s, status);
}

/* What replays share: one launch over memory whose content changes. */
typedef struct replays {
    shim *s;
    shim_step step;
    mil_kv kv;
    mil_begin_args begin;
    mil_attention_args args;
    struct mil_graph *graph; /* NULL: the device has none, the op runs itself */
    size_t bucket_bytes;
} replays;

static mil_status replay_one(replays *r, uint16_t *out, const uint16_t *q, const shim_batch *batch)
{
    mil_context *context = &r->s->context;
    const mil_device *device = context->backend->device;
    size_t table_bytes = (size_t)batch->n_slots * (size_t)batch->max_pages * sizeof(int32_t);
    shim_fill_plan(&r->step, batch, NULL);
    MIL_TRY(
        device->copy_in(context->queue, r->step.slots.page_table, batch->page_table, table_bytes));
    MIL_TRY(device->copy_in(context->queue, (void *)(uintptr_t)r->args.q, q, r->bucket_bytes));
    MIL_TRY(device->fill_16(context->queue, r->args.out, 0xffff, r->bucket_bytes / 2));
    MIL_TRY(context->backend->begin(context, &r->begin));
    if (device->capture_begin != NULL && r->graph == NULL) {
        MIL_TRY(device->capture_begin(context->queue));
        mil_status status = context->backend->attention(context, &r->args);
        mil_status ended = device->capture_end(context->queue, &r->graph);
        MIL_TRY(status);
        MIL_TRY(ended);
    }
    MIL_TRY(r->graph != NULL ? device->graph_launch(context->queue, r->graph)
                             : context->backend->attention(context, &r->args));
    MIL_TRY(device->synchronize(context->queue));
    return device->copy_out(context->queue, out, r->args.out, r->bucket_bytes);
}

/* Attention captured once, with the first batch, and launched over each of n batches of the same
 * buckets, slots and pages. q, out: [n][bucket_tokens][N * D]. The page tables are read from each
 * batch. A page table that lies in the first batch's memory is overwritten. */
mil_status shim_attention_replays(shim *s, int32_t n, uint16_t *out, const uint16_t *q,
                                  const shim_batch *batches, const shim_kv *kv, int32_t layer,
                                  int32_t n_heads, float scale, int32_t window, float softcap)
{
    replays r = {.s = s};
    mil_lora_table none = {0};
    shim_lend_batch(s, &r.step, &batches[0], NULL, true);
    r.kv = shim_lend_kv(s, kv, SHIM_IN);
    size_t bucket = (size_t)batches[0].bucket_tokens;
    r.bucket_bytes = bucket * (size_t)n_heads * (size_t)kv->head_dim * sizeof *q;
    r.args = (mil_attention_args){
        .out = shim_take(s, r.bucket_bytes),
        .q = shim_take(s, r.bucket_bytes),
        .out_dtype = (mil_dtype)kv->out_dtype,
        .batch = &r.step.batch,
        .slots = &r.step.slots,
        .kv = &r.kv,
        .layer = layer,
        .n_heads = n_heads,
        .scale = scale,
        .window = window,
        .softcap = softcap,
    };
    r.begin = (mil_begin_args){
        .plan = r.step.plan,
        .batch = &r.step.batch,
        .adapters = shim_take_pinned(s, sizeof(void *)),
        .slots = &r.step.slots,
        .lora = &none,
        .kv = &r.kv,
        .tokens = shim_take(s, bucket * sizeof(int32_t)),
        .n_heads = n_heads,
    };
    mil_status status = MIL_OK;
    bool was_captured = s->is_captured;
    s->is_captured = false;
    MIL_TRY(shim_enter(s));
    for (int32_t i = 0; i < n && status == MIL_OK; i++)
        status = replay_one(&r, out + (size_t)i * (r.bucket_bytes / sizeof *out),
                            q + (size_t)i * (r.bucket_bytes / sizeof *q), &batches[i]);
    if (r.graph != NULL)
        s->context.backend->device->graph_free(s->context.queue, r.graph);
    status = shim_leave(s, status);
    s->is_captured = was_captured;
    return status;
}

/* adapters[i]: where the descriptors of command i's content lie, NULL to clear. */
static void point_at_contents(shim *s, const mil_lora_module **adapters, const shim_extras *extras,
                              const shim_state *state)
{
    size_t n = (size_t)state->n_layers * MIL_N_PROJECTIONS;
    const mil_lora_module *contents =
        shim_lend(s, state->contents, (size_t)state->n_contents * n * sizeof *contents, SHIM_IN);
    for (int32_t i = 0; i < extras->n_adapter_sets && s->status == MIL_OK; i++) {
        int32_t content = extras->adapter_sets[i].content;
        adapters[i] = content < 0 ? NULL : contents + (size_t)content * n;
    }
}

mil_status shim_begin(shim *s, int32_t *tokens, const shim_batch *batch, const shim_extras *extras,
                      const shim_state *state)
{
    shim_step step;
    shim_lend_batch(s, &step, batch, extras, true);
    size_t n_slots = (size_t)batch->n_slots;
    size_t n_modules = (size_t)state->n_adapters * (size_t)state->n_layers * MIL_N_PROJECTIONS;
    step.slots.adapter_slot =
        shim_lend(s, state->adapter_slot, n_slots * sizeof(int32_t), SHIM_BOTH);
    step.slots.sampling = shim_lend(s, state->sampling, n_slots * sizeof(mil_sampling), SHIM_BOTH);
    mil_lora_table lora = {
        .n_slots = state->n_adapters,
        .n_layers = state->n_layers,
        .modules = shim_lend(s, state->modules, n_modules * sizeof(mil_lora_module), SHIM_BOTH),
    };
    const mil_lora_module **adapters =
        shim_take_pinned(s, (size_t)(extras->n_adapter_sets + 1) * sizeof *adapters);
    point_at_contents(s, adapters, extras, state);
    int32_t bucket = step.batch.header != NULL ? step.batch.header->bucket_tokens : 1;
    mil_kv kv = {.n_pages = 1,
                 .page_size = 64,
                 .n_kv_heads = s->maxima.n_kv_heads,
                 .head_dim = s->maxima.head_dim,
                 .dtype = MIL_DTYPE_BF16};
    mil_begin_args args = {
        .plan = step.plan,
        .batch = &step.batch,
        .adapters = adapters,
        .slots = &step.slots,
        .lora = &lora,
        .kv = &kv,
        .tokens = shim_lend(s, tokens, (size_t)bucket * sizeof *tokens, SHIM_BACK),
        .n_heads = s->maxima.n_heads,
    };
    /* begin itself must bring the plan to where the batch is read. */
    if (s->status == MIL_OK && !s->context.backend->device->is_host && !s->is_bare)
        s->status = s->context.backend->device->fill_16(
            s->context.queue, (void *)(uintptr_t)step.batch.counts, 0xffff,
            mil_plan_bytes(&step.batch.header->limits) / 2);
    MIL_TRY(shim_enter(s));
    return shim_leave(s, s->context.backend->begin(&s->context, &args));
}

mil_status shim_sample(shim *s, mil_sample *out, const float *logits, const shim_extras *extras,
                       const mil_sampling *sampling, int32_t *last_token, int32_t n_slots,
                       int32_t first_row, int32_t n_rows, int32_t vocab, int64_t ld)
{
    shim_step step;
    const shim_batch batch = {.n_slots = n_slots, .last_token = last_token};
    shim_lend_batch(s, &step, &batch, extras, false);
    step.slots.sampling = shim_lend(s, sampling, (size_t)n_slots * sizeof *sampling, SHIM_IN);
    int32_t n = extras->n_logit_rows - first_row; /* rows of the host */
    n = n < n_rows ? n : n_rows;
    shim_shape shape = {
        .n_rows = (size_t)n,
        .row_bytes = (size_t)vocab * sizeof *logits,
        .stride_bytes = (size_t)ld * sizeof *logits,
        .n_bytes = (size_t)n_rows * (size_t)ld * sizeof *logits,
    };
    mil_sample_args args = {
        .out = shim_lend_rows(s, out, n, n_rows, sizeof *out, SHIM_BACK),
        .logits = shim_lend_shaped(s, logits, shape, SHIM_IN),
        .batch = &step.batch,
        .slots = &step.slots,
        .first_row = first_row,
        .n_rows = n_rows,
        .vocab = vocab,
        .ld = ld,
    };
    MIL_TRY(shim_enter(s));
    return shim_leave(s, s->context.backend->sample(&s->context, &args));
}

/* The device's copy of `sent`, n_bytes, goes to memory like runner.c's ring, which holds
 * n_host_bytes of `host` before and is what `host` holds after. */
mil_status shim_send_out(shim *s, void *host, const void *sent, int64_t n_host_bytes,
                         int64_t n_bytes)
{
    const mil_device *device = s->context.backend->device;
    mil_slab pinned;
    mil_status status = MIL_OK;
    MIL_TRY(device->alloc_host(s->context.queue, &pinned, (size_t)n_host_bytes, "a test's ring"));
    memcpy(pinned.data, host, (size_t)n_host_bytes);
    const void *there = shim_lend(s, sent, (size_t)n_bytes, SHIM_IN);
    MIL_TRY_GOTO(shim_enter(s), done);
    status = device->send_out(s->context.queue, pinned.data, there, (size_t)n_bytes);
    status = shim_leave(s, status);
    memcpy(host, pinned.data, (size_t)n_host_bytes);
done:
    device->free_host(s->context.queue, &pinned);
    return status;
}
