#include "ops/borrow.h"

#include <string.h>

/* A host has no streams: an op has run when it returns. */
static void *swap_stream(struct mil_queue *queue, void *stream)
{
    (void)queue;
    (void)stream;
    return NULL;
}

/* Index arrays were checked: the host sees its own. */
static mil_status fill(struct mil_queue *queue, const mil_borrow_fill *args)
{
    (void)queue;
    if (args->to != NULL)
        *args->to = args->counts;
    if (args->few_to != NULL)
        memcpy(args->few_to, args->few, sizeof args->few);
    for (int32_t i = 0; i < args->n_iota; i++)
        args->iota[i] = i;
    for (int32_t i = 0; i < args->n_ones; i++)
        args->ones[i] = 1;
    return MIL_OK;
}

static mil_status write_modules(struct mil_queue *queue, const mil_borrow_modules *args)
{
    (void)queue;
    memset(args->to, 0, (size_t)args->n_slots * MIL_N_PROJECTIONS * sizeof *args->to);
    for (int32_t i = 0; i < args->n_adapters; i++) {
        mil_lora_module *to = &args->to[i * MIL_N_PROJECTIONS];
        *to = args->first;
        to->a =
            args->first.a == NULL ? NULL : (const char *)args->first.a + (size_t)i * args->a_bytes;
        to->b =
            args->first.b == NULL ? NULL : (const char *)args->first.b + (size_t)i * args->b_bytes;
        if (args->scales != NULL)
            to->scale = args->scales[i];
    }
    return MIL_OK;
}

/* The host's v is whole and scaled. */
static mil_status gather_v(struct mil_queue *queue, const mil_borrow_v *args)
{
    (void)queue;
    for (int64_t i = 0; i < args->n_rows; i++)
        memcpy(args->plain + i * args->rank, args->v + i * args->v_stride,
               (size_t)args->rank * sizeof(float));
    return MIL_OK;
}

static mil_status spread_v(struct mil_queue *queue, const mil_borrow_v *args)
{
    (void)queue;
    for (int64_t i = 0; i < args->n_rows; i++)
        for (int32_t r = 0; r < args->padded_rank; r++)
            args->v[i * args->v_stride + r] =
                r < args->rank ? args->plain[i * args->rank + r] : 0.0f;
    return MIL_OK;
}

static mil_status tell_samples(struct mil_queue *queue, const mil_borrow_samples *args)
{
    (void)queue;
    for (int64_t i = 0; i < args->n; i++) {
        const mil_sample *sample = &args->from[i];
        args->logprobs[i] = sample->logprob;
        args->ranks[i] = sample->rank;
        for (int32_t b = 0; b < args->n_columns; b++) {
            bool is_there = b < sample->n_top;
            args->top_tokens[i * args->n_columns + b] = is_there ? sample->top[b].token : -1;
            args->top_logprobs[i * args->n_columns + b] = is_there ? sample->top[b].logprob : 0.0f;
        }
    }
    return MIL_OK;
}

/* Attention reads the batch itself. */
static mil_status plan_attention(mil_context *context, const mil_begin_args *args)
{
    (void)context;
    (void)args;
    return MIL_OK;
}

const mil_borrow mil_host_borrow = {
    .swap_stream = swap_stream,
    .fill = fill,
    .write_modules = write_modules,
    .gather_v = gather_v,
    .spread_v = spread_v,
    .tell_samples = tell_samples,
    .plan_attention = plan_attention,
};
