/* embed, norm, act, rope_write, attention, gather_tokens, sample. */
#include "shim.h"

/* A batch and its sequences' slots, as Python holds them. */
typedef struct shim_batch {
    int32_t n_seqs, n_decode, n_tokens;
    int32_t *seq_slot, *query_indptr, *kv_lengths, *tokens, *positions;
    int32_t n_slots, max_pages;
    int32_t *last_token, *page_table;
} shim_batch;

SHIM mil_status shim_embed(shim *s, float *out, const int32_t *tokens, void *panels, int32_t N,
                           int32_t K, int32_t n_tokens, int32_t vocab_begin, float scale);
SHIM mil_status shim_norm(shim *s, uint16_t *out, float *x, const float *residual,
                          const float *weight, const int32_t *rows, int32_t n_rows, int32_t hidden,
                          float eps, float weight_offset);
SHIM mil_status shim_act(shim *s, uint16_t *out, const float *gate_up, int32_t n_tokens,
                         int32_t ffn, int32_t interleave, int32_t kind);
SHIM mil_status shim_rope_write(shim *s, uint16_t *q, const float *qkv, const float *cos_table,
                                const float *sin_table, const shim_batch *batch, const mil_kv *kv,
                                int32_t layer, int32_t n_heads, int32_t rotary_dim,
                                bool is_interleaved);
SHIM mil_status shim_attention(shim *s, uint16_t *out, const uint16_t *q, const shim_batch *batch,
                               const mil_kv *kv, int32_t layer, int32_t n_heads, float scale,
                               int32_t window, float softcap, int32_t repeat);
SHIM mil_status shim_gather_tokens(shim *s, int32_t *tokens, const shim_batch *batch);
SHIM mil_status shim_sample(shim *s, mil_sample *out, float *logits, const int32_t *slots_of,
                            const int32_t *positions, const int32_t *feeds, mil_sampling *sampling,
                            int32_t *last_token, int32_t n_slots, int32_t n_rows, int32_t vocab,
                            int64_t ld);

typedef struct viewed {
    mil_plan_header header;
    mil_batch batch;
    mil_slots slots;
} viewed;

static void view(viewed *to, const shim_batch *from)
{
    *to = (viewed){
        .header = {.n_seqs = from->n_seqs,
                   .n_decode = from->n_decode,
                   .n_tokens = from->n_tokens,
                   .bucket_seqs = from->n_seqs,
                   .bucket_tokens = from->n_tokens},
        .batch = {.header = &to->header,
                  .counts = &to->header,
                  .seq_slot = from->seq_slot,
                  .query_indptr = from->query_indptr,
                  .kv_lengths = from->kv_lengths,
                  .tokens = from->tokens,
                  .positions = from->positions},
        .slots = {.n_slots = from->n_slots,
                  .max_pages = from->max_pages,
                  .last_token = from->last_token,
                  .page_table = from->page_table},
    };
}

mil_status shim_embed(shim *s, float *out, const int32_t *tokens, void *panels, int32_t N,
                      int32_t K, int32_t n_tokens, int32_t vocab_begin, float scale)
{
    mil_weight weight = {.format = MIL_WEIGHT_BF16_PANELS,
                         .N = N,
                         .K = K,
                         .n_parts = 1,
                         .part_rows = {N},
                         .data = panels};
    mil_embed_args args = {out, tokens, &weight, n_tokens, vocab_begin, scale};
    MIL_TRY(shim_enter(s));
    return shim_leave(s, s->context.backend->embed(&s->context, &args));
}

mil_status shim_norm(shim *s, uint16_t *out, float *x, const float *residual, const float *weight,
                     const int32_t *rows, int32_t n_rows, int32_t hidden, float eps,
                     float weight_offset)
{
    mil_norm_args args = {out, x, residual, weight, rows, n_rows, hidden, eps, weight_offset};
    MIL_TRY(shim_enter(s));
    return shim_leave(s, s->context.backend->norm(&s->context, &args));
}

mil_status shim_act(shim *s, uint16_t *out, const float *gate_up, int32_t n_tokens, int32_t ffn,
                    int32_t interleave, int32_t kind)
{
    mil_act_args args = {out, gate_up, n_tokens, ffn, interleave, (mil_activation)kind};
    MIL_TRY(shim_enter(s));
    return shim_leave(s, s->context.backend->act(&s->context, &args));
}

mil_status shim_rope_write(shim *s, uint16_t *q, const float *qkv, const float *cos_table,
                           const float *sin_table, const shim_batch *batch, const mil_kv *kv,
                           int32_t layer, int32_t n_heads, int32_t rotary_dim, bool is_interleaved)
{
    viewed v;
    view(&v, batch);
    mil_rope_write_args args = {q,  qkv,   cos_table, sin_table,  &v.batch,      &v.slots,
                                kv, layer, n_heads,   rotary_dim, is_interleaved};
    MIL_TRY(shim_enter(s));
    return shim_leave(s, s->context.backend->rope_write(&s->context, &args));
}

/* repeat: for benchmarks, the op that often in one entry of the pool. */
mil_status shim_attention(shim *s, uint16_t *out, const uint16_t *q, const shim_batch *batch,
                          const mil_kv *kv, int32_t layer, int32_t n_heads, float scale,
                          int32_t window, float softcap, int32_t repeat)
{
    viewed v;
    view(&v, batch);
    mil_attention_args args = {out,   q,       &v.batch, &v.slots, kv,
                               layer, n_heads, scale,    window,   softcap};
    mil_status status = MIL_OK;
    MIL_TRY(shim_enter(s));
    for (int32_t i = 0; i < repeat && status == MIL_OK; i++)
        status = s->context.backend->attention(&s->context, &args);
    return shim_leave(s, status);
}

mil_status shim_gather_tokens(shim *s, int32_t *tokens, const shim_batch *batch)
{
    viewed v;
    view(&v, batch);
    MIL_TRY(shim_enter(s));
    mil_begin_args args = {
        .batch = &v.batch, .slots = &v.slots, .lora = &(mil_lora_table){0}, .tokens = tokens};
    return shim_leave(s, s->context.backend->begin(&s->context, &args));
}

mil_status shim_sample(shim *s, mil_sample *out, float *logits, const int32_t *slots_of,
                       const int32_t *positions, const int32_t *feeds, mil_sampling *sampling,
                       int32_t *last_token, int32_t n_slots, int32_t n_rows, int32_t vocab,
                       int64_t ld)
{
    mil_slots slots = {.n_slots = n_slots, .last_token = last_token, .sampling = sampling};
    mil_plan_header header = {.n_logit_rows = n_rows, .bucket_logit_rows = n_rows};
    mil_batch batch = {.header = &header,
                       .counts = &header,
                       .logit_slots = (int32_t *)(uintptr_t)slots_of,
                       .logit_positions = (int32_t *)(uintptr_t)positions,
                       .logit_feeds = (int32_t *)(uintptr_t)feeds};
    mil_sample_args args = {out, logits, &batch, &slots, 0, n_rows, vocab, ld};
    MIL_TRY(shim_enter(s));
    return shim_leave(s, s->context.backend->sample(&s->context, &args));
}
