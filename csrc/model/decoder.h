/* One rank's stack of decoder layers over a batch: embedding, layers, final norm, head.
 *
 * The residual stream x is float32; what enters a product is bfloat16, rounded once by the norm or
 * the activation before it. A row-parallel result waits in y until the next norm adds it to x. */
#pragma once

#include "layers/attention.h"
#include "layers/embedding.h"
#include "layers/head.h"
#include "layers/mlp.h"
#include "layers/norm.h"
#include "model/arch.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_decoder_layer {
    mil_norm attention_norm;
    mil_attention attention;
    mil_norm mlp_norm;
    mil_mlp mlp;
} mil_decoder_layer;

typedef struct mil_decoder {
    const mil_arch *arch;
    mil_embedding embedding;
    mil_decoder_layer *layers; /* [n_layers], the owner's */
    int32_t n_layers;
    mil_norm final_norm;
    mil_head head;
} mil_decoder;

/* Needs arch, layers and n_layers set; the struct must stay where it is (a tied head points at it).
 */
void mil_decoder_place(mil_decoder *decoder, mil_arena *arena, const mil_backend *backend,
                       const mil_shard *shard, const mil_config *config);
mil_status mil_decoder_load(mil_decoder *decoder, mil_walk *walk) MIL_WARN_UNUSED;

/* What one rank writes between the token ids and the logits of a step. */
typedef struct mil_activations {
    int32_t *tokens; /* [T] */
    float *x;        /* [T, H] residual stream */
    void *y;         /* [T, H] of product_dtype: last row-parallel result, not yet added to x */
    uint16_t *h;     /* [T, H] */
    void *wide;      /* as mil_step's */
    uint16_t *narrow;
    float *lora_v; /* [T, MIL_MAX_PARTS * MIL_MAX_LORA_RANK] */
    float *logits; /* [mil_logit_block, mil_head_ld] */
    float *head_scratch;
} mil_activations;

/* Rows of logits that exist at once under these limits. */
static inline int32_t mil_logit_block(const mil_backend *backend, const mil_plan_limits *limits)
{
    int32_t block = backend->logit_block;
    return limits->max_logit_rows < block ? limits->max_logit_rows : block;
}

void mil_activations_place(mil_activations *activations, mil_arena *arena,
                           const mil_decoder *decoder, const mil_shard *shard,
                           const mil_backend *backend, const mil_plan_limits *limits);

/* tokens [T] -> x and y. */
mil_status mil_decoder_forward(const mil_decoder *decoder, const mil_step *step,
                               const mil_activations *activations) MIL_WARN_UNUSED;
/* Logits of logit rows begin .. begin + n_rows (<= mil_logit_block) of the batch, once each after a
 * forward: it adds y to those rows of x. */
mil_status mil_decoder_logits(const mil_decoder *decoder, const mil_step *step,
                              const mil_activations *activations, int32_t begin, int32_t n_rows)
    MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
