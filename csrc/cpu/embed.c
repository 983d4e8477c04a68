/* Embedding: rows gathered from the weight's packed panels, so that a tied head and the embedding
 * are one copy. A row is K / 2 pairs that lie 128 bytes apart. */
#include "base/bf16.h"
#include "cpu/cpu.h"

#define PANEL_ROWS 32

static void embed_row(float *out, const mil_weight *weight, int32_t row, float scale)
{
    int32_t n_pairs = (weight->K + 1) / 2;
    const uint16_t *pair =
        (const uint16_t *)weight->data +
        ((int64_t)(row / PANEL_ROWS) * n_pairs * PANEL_ROWS + row % PANEL_ROWS) * 2;
    int32_t k = 0;
    for (; k + 1 < weight->K; k += 2, pair += PANEL_ROWS * 2) {
        out[k] = mil_bf16_to_float(pair[0]) * scale;
        out[k + 1] = mil_bf16_to_float(pair[1]) * scale;
    }
    if (k < weight->K)
        out[k] = mil_bf16_to_float(pair[0]) * scale;
}

static void embed_share(void *argument, int32_t thread, int32_t n_threads)
{
    const mil_embed_args *args = argument;
    const mil_weight *weight = args->weight;
    int64_t begin, end;
    mil_cpu_share(args->n_tokens, thread, n_threads, &begin, &end);
    for (int64_t t = begin; t < end; t++) {
        float *out = args->out + t * weight->K;
        /* In 64 bits: a token from outside may be any int32. */
        int64_t row = (int64_t)args->tokens[t] - args->vocab_begin;
        if (row >= 0 && row < weight->N)
            embed_row(out, weight, (int32_t)row, args->scale);
        else
            memset(out, 0, (size_t)weight->K * sizeof *out);
    }
}

mil_status mil_cpu_embed(mil_context *context, const mil_embed_args *args)
{
    mil_cpu_run_sized(context, embed_share, (void *)args,
                      (int64_t)args->n_tokens * args->weight->K);
    return MIL_OK;
}
