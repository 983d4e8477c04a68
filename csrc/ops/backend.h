/* The contract between layers and a backend: one const table of ops, one of device calls.
 *
 * cpu/ and kernels/ implement this header and nobody includes them. Ops trust their arguments:
 * layers make those, and mil_plan_check sees a plan's indices. Plain ops each have a test. A
 * composed slot may be NULL: ops.c then composes it from plain ones with the same result.
 *
 * Buffers are 64-byte aligned and do not overlap unless said. Every op runs on the rank's stream,
 * in order, reads counts from the batch, and allocates nothing. */
#pragma once

#include "base/memory.h"
#include "ops/plan.h"
#include "ops/weight.h"

#ifdef __cplusplus
extern "C" {
#endif

struct mil_backend;
struct mil_pool;

/* What an op runs on: one rank's device state. Workspace is the op's to scribble on while it runs.
 */
typedef struct mil_context {
    const struct mil_backend *backend;
    struct mil_pool *pool; /* CPU */
    void *stream;          /* CUDA; NULL */
    void *workspace;
    size_t workspace_bytes;
} mil_context;

/* out[t] = scale * weight[token] as float32; zeros where the token is outside this rank's rows. */
typedef struct mil_embed_args {
    float *out;               /* [T, H] */
    const int32_t *tokens;    /* [T] */
    const mil_weight *weight; /* rows vocab_begin .. vocab_begin + N of the vocabulary */
    int32_t n_tokens;
    int32_t vocab_begin;
    float scale; /* 1 */
} mil_embed_args;

/* x += residual (where given), then out = x / sqrt(mean(x^2) + eps) * (weight_offset + weight),
 * rounded to bfloat16 once. RMSNorm: Zhang and Sennrich 2019. */
typedef struct mil_norm_args {
    uint16_t *out;         /* [rows, H] bf16; NULL: only add */
    float *x;              /* [T, H], updated where residual is given */
    const float *residual; /* [T, H] or NULL */
    const float *weight;   /* [H] */
    const int32_t *rows;   /* [n_rows] rows of x to read (out row i is x row rows[i]); NULL: all */
    int32_t n_rows;
    int32_t hidden;
    float eps;
    float weight_offset; /* 0 */
} mil_norm_args;

/* y = x W^T (+ bias). One fp32 chain for each output: k pairs ascending, in a pair the odd element
 * first, each an fma; then the bias is added. */
typedef struct mil_linear_args {
    float *y;          /* [M, ldy] */
    const uint16_t *x; /* [M, ldx] bf16 */
    const mil_weight *weight;
    int32_t M;
    int64_t ldy; /* >= N */
    int64_t ldx; /* >= K */
} mil_linear_args;

/* LoRA of one linear, over the batch's segments. v: [n_lora_rows, v_stride] float32, row i belongs
 * to lora_rows[i]; part p of the weight uses v[i, p * v_part_stride ...]. v_part_stride >= the
 * largest padded_rank in use, v_stride >= n_parts * v_part_stride. */
typedef struct mil_lora_args {
    const mil_batch *batch;
    const mil_lora_table *table;
    int32_t layer;
    int32_t n_parts;
    mil_projection projections[MIL_MAX_PARTS];
    float *v;
    int64_t v_stride;
    int64_t v_part_stride;
} mil_lora_args;

/* v = scale * (x A^T) for each segment: the product's chain, then one multiply by the scale in
 * fp32. */
typedef struct mil_lora_shrink_args {
    mil_lora_args lora;
    const uint16_t *x; /* [T, ldx] bf16 */
    int64_t ldx;
} mil_lora_shrink_args;

/* y[row, columns of part p] += v B^T: one fp32 chain from 0 over r ascending (v stays fp32, B is
 * widened), then one add to y. Columns of part p are the weight's packed rows of that part. */
typedef struct mil_lora_expand_args {
    mil_lora_args lora;
    float *y; /* [T, ldy] */
    int64_t ldy;
    const mil_weight *weight; /* for its parts and interleave only */
} mil_lora_expand_args;

/* Split qkv, rotate q and k by position, write q as bfloat16 and k, v into pages.
 * RoPE: Su et al. 2021, halves as Hugging Face lays them out (pairs d, d + rotary_dim / 2). */
typedef struct mil_rope_write_args {
    uint16_t *q;            /* [T, N * D] bf16 */
    const float *qkv;       /* [T, (N + 2 K) * D], q then k then v */
    const float *cos_table; /* [max_position, rotary_dim / 2] */
    const float *sin_table;
    const mil_batch *batch;
    const mil_slots *slots;
    const mil_kv *kv;
    int32_t layer;
    int32_t n_heads;
    int32_t rotary_dim;  /* D */
    bool is_interleaved; /* false: halves; true: pairs (2 i, 2 i + 1) */
} mil_rope_write_args;

/* Causal attention over paged KV, Flash-style online softmax (Dao 2023), GQA. KV blocks lie at
 * absolute multiples of 64 keys whatever the page size or chunk. */
typedef struct mil_attention_args {
    uint16_t *out;     /* [T, N * D] bf16 */
    const uint16_t *q; /* [T, N * D] bf16 */
    const mil_batch *batch;
    const mil_slots *slots;
    const mil_kv *kv;
    int32_t layer;
    int32_t n_heads;
    float scale;
    int32_t window; /* 0: none; else a query sees the last `window` keys */
    float softcap;  /* 0: none */
} mil_attention_args;

typedef enum mil_activation { MIL_ACTIVATION_SILU = 0 } mil_activation;

/* out = act(gate) * up, rounded to bfloat16 once. SwiGLU: Shazeer 2020. */
typedef struct mil_act_args {
    uint16_t *out;        /* [T, F] bf16 */
    const float *gate_up; /* [T, 2 F], in the weight's packed row order */
    int32_t n_tokens;
    int32_t ffn;        /* F of this rank */
    int32_t interleave; /* as the weight's */
    mil_activation kind;
} mil_act_args;

/* The token of a row whose logits hold a NaN or no finite maximum: the request ends with an error.
 */
#define MIL_TOKEN_NUMERICS (-1)

/* Choose a token for each row. Greedy and ties: the lowest id. Temperature, then top-k, then top-p
 * (the smallest set of best tokens whose probability reaches top_p, at least one), then one draw.
 */
typedef struct mil_sample_args {
    mil_sample *out;          /* [n_rows] */
    float *logits;            /* [n_rows, ld]; kept */
    const int32_t *slots_of;  /* [n_rows] slots, for the parameters */
    const int32_t *positions; /* [n_rows] position of the token being chosen: the draw's counter */
    const int32_t *feeds;     /* [n_rows] as mil_batch.logit_feeds */
    mil_slots *slots;         /* last_token is written where feeds */
    int32_t n_rows;
    int32_t vocab;
    int64_t ld;
} mil_sample_args;

/* Sizes that workspace_bytes answers for. */
typedef struct mil_maxima {
    int32_t max_tokens, max_seqs, max_logit_rows;
    int32_t max_position;
    int32_t hidden, ffn, vocab; /* of this rank */
    int32_t n_heads, n_kv_heads, head_dim;
    int32_t n_threads;
} mil_maxima;

typedef struct mil_device {
    const char *name; /* "cpu" */
    mil_status (*alloc)(mil_slab *slab, size_t n_bytes, const char *what);
    void (*free)(mil_slab *slab);
    mil_status (*copy_in)(mil_context *context, void *device, const void *host, size_t n_bytes);
    mil_status (*copy_out)(mil_context *context, void *host, const void *device, size_t n_bytes);
    mil_status (*synchronize)(mil_context *context);
    /* Events, streams and graphs come with the CUDA backend; NULL on the CPU, whose queue is one.
     */
} mil_device;

typedef struct mil_backend {
    const char *name; /* "cpu" */
    const mil_device *device;
    int32_t default_page_size;
    int32_t lora_rank_multiple; /* 16 on the CPU */
    int32_t gate_up_interleave; /* how this backend wants gate and up merged: 16 on the CPU */
    const void *kernels; /* the backend's own: what its ops run on (CPU: one instruction set) */

    /* ---- weights ---- */
    size_t (*packed_bytes)(int32_t N, int32_t K);
    /* Pack n_rows whole rows (all K of this rank) of one part, from row `row` of it on. src row i
     * at src + i * src_stride elements of dtype; F16 and F32 are rounded to bf16. Thread-safe for
     * disjoint rows of one weight that fall in different groups of 32 packed rows or not. Padding
     * rows and columns are zero because slabs come zeroed. */
    void (*pack)(mil_weight *weight, int32_t part, int32_t row, int32_t n_rows, const void *src,
                 mil_dtype dtype, int64_t src_stride);
    size_t (*lora_a_bytes)(int32_t rank, int32_t in);
    size_t (*lora_b_bytes)(int32_t out, int32_t rank);
    /* a: [rank, in], b: [out, rank], bf16, row-major; destinations zeroed. */
    void (*lora_pack_a)(void *packed, const uint16_t *a, int64_t stride, int32_t rank, int32_t in);
    void (*lora_pack_b)(void *packed, const uint16_t *b, int64_t stride, int32_t out, int32_t rank);

    /* ---- step ---- */
    size_t (*workspace_bytes)(const mil_maxima *maxima);
    /* Token ids of the batch: chunks' from the plan, decode rows' from their slots. tokens: [T]. */
    mil_status (*gather_tokens)(mil_context *, int32_t *tokens, const mil_batch *,
                                const mil_slots *);
    mil_status (*embed)(mil_context *, const mil_embed_args *);
    mil_status (*norm)(mil_context *, const mil_norm_args *);
    mil_status (*linear)(mil_context *, const mil_linear_args *);
    mil_status (*lora_shrink)(mil_context *, const mil_lora_shrink_args *);
    mil_status (*lora_expand)(mil_context *, const mil_lora_expand_args *);
    mil_status (*rope_write)(mil_context *, const mil_rope_write_args *);
    mil_status (*attention)(mil_context *, const mil_attention_args *);
    mil_status (*act)(mil_context *, const mil_act_args *);
    mil_status (*sample)(mil_context *, const mil_sample_args *);

    /* ---- composed; may be NULL. lora may be NULL or have n_segments 0 ---- */
    mil_status (*linear_lora)(mil_context *, const mil_linear_args *, const mil_lora_args *lora);
    mil_status (*gate_up_act)(mil_context *, const mil_linear_args *, const mil_lora_args *lora,
                              const mil_act_args *);
} mil_backend;

/* The table for "cpu" (later "cuda"), NULL for an unknown name. Chooses the instruction set once.
 */
const mil_backend *mil_backend_find(const char *device);

/* Instruction sets: the one in use, and all that run here, best first, space-separated.
 * MIL_ERR_ARGUMENT when MILPY_CPU_ISA names one that is unknown or that this machine lacks. */
mil_status mil_cpu_isa(const char **in_use, const char **available) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
