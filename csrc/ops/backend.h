/* The contract between layers and a backend: one const table of ops, one of device calls.
 *
 * cpu/ and kernels/ implement this header and nobody includes them. Ops trust their arguments:
 * layers make those, and mil_plan_check sees a plan's indices. Plain ops each have a test. A
 * composed slot may be NULL: ops.c then composes it from plain ones with the same result.
 *
 * Buffers are 64-byte aligned and do not overlap unless said. Every op runs on the rank's queue, in
 * order, and allocates nothing. The batch's buckets (batch->header, on the host) shape a launch;
 * its counts are read where the op runs (batch->counts), so that a captured launch serves any batch
 * of its bucket: rows past the counts may hold anything and write nothing that outlives the step.
 */
#pragma once

#include "base/memory.h"
#include "ops/plan.h"
#include "ops/weight.h"

#ifdef __cplusplus
extern "C" {
#endif

struct mil_backend;
struct mil_pool;
struct mil_queue;
struct mil_graph;

/* What an op runs on: one rank's device state. Workspace is the op's to scribble on while it runs;
 * step_data is what `begin` leaves for the other ops of its step. */
typedef struct mil_context {
    const struct mil_backend *backend;
    struct mil_pool *pool;   /* CPU; else NULL */
    struct mil_queue *queue; /* a device's streams and handles; NULL on the CPU */
    void *workspace;
    size_t workspace_bytes;
    void *step_data;
    size_t step_bytes;
    bool is_deterministic; /* batch mates must not change a row's bits; the CPU's never do */
} mil_context;

/* Take a plan over, as the first op of a step: apply its commands (adapter slots, sequence slots,
 * page-table entries, in array order), gather the token ids of its batch (chunks' from the plan,
 * decode rows' from their slots, 0 in the padding of the bucket), and note in step_data what later
 * ops want to know of the batch once for all layers. Where the device does not read host memory in
 * place, this is also what copies the plan to where batch's arrays lie. */
typedef struct mil_begin_args {
    const mil_plan *plan; /* as the host filled it, in memory that the device can read */
    const mil_batch *batch;
    /* [n_adapter_sets] descriptors of one content for this rank, [L][MIL_N_PROJECTIONS], where the
     * device reads them; NULL clears the slot. The array itself is host memory like the plan. */
    const mil_lora_module *const *adapters;
    const mil_slots *slots;
    const mil_lora_table *lora;
    const mil_kv *kv;
    int32_t *tokens; /* [bucket_tokens] */
    int32_t n_heads; /* query heads of this rank */
} mil_begin_args;

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
    uint16_t *out;        /* [rows, H] bf16; NULL: only add */
    float *x;             /* [T, H], updated where residual is given */
    const void *residual; /* [T, H] of the backend's product_dtype, or NULL */
    const float *weight;  /* [H] */
    /* [n_rows] rows of x to read (out row i is x row rows[i]), ascending; NULL: all. Where a
     * bucket's padding names row 0 again, x is left alone, except in a call of padding only, which
     * updates row 0 again: nothing reads x after it. */
    const int32_t *rows;
    int32_t n_rows;
    int32_t hidden;
    float eps;
    float weight_offset; /* 0 */
} mil_norm_args;

/* y = x W^T (+ bias), accumulated in fp32. On the CPU one chain for each output: k pairs ascending,
 * in a pair the odd element first, each an fma; then the bias is added. */
typedef struct mil_linear_args {
    void *y;           /* [M, ldy] of y_dtype */
    const uint16_t *x; /* [M, ldx] bf16 */
    const mil_weight *weight;
    mil_dtype y_dtype; /* the backend's product_dtype, or F32 for logits */
    int32_t M;
    int64_t ldy; /* >= N */
    int64_t ldx; /* >= K */
} mil_linear_args;

/* LoRA of one linear, over the batch's segments. v: [n_lora_rows, v_stride] float32, row i belongs
 * to lora_rows[i]; part p of the weight uses v[i, p * v_part_stride ...]. v_part_stride is the
 * backend's lora_v_rank, or where that is 0 at least the largest padded_rank in use; v_stride >=
 * n_parts * v_part_stride. What lies there between shrink and expand is the backend's affair: the
 * CPU's v, scaled; CUDA's partial sums over K, not scaled yet. */
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

/* v = scale * (x A^T) for each segment, in fp32: the product's sums, then one multiply by the scale
 * (which a backend may leave to expand). Depends on x alone, so it may run beside the product. */
typedef struct mil_lora_shrink_args {
    mil_lora_args lora;
    const uint16_t *x; /* [T, ldx] bf16 */
    int64_t ldx;
} mil_lora_shrink_args;

/* y[row, columns of part p] += v B^T, y of the backend's product_dtype: one fp32 sum over r (on the
 * CPU a chain from 0, r ascending, v in fp32 and B widened; on CUDA v as two bf16, to 2^-17 of
 * itself), one add to y, one rounding to its dtype. Columns of part p are the weight's packed rows
 * of that part. */
typedef struct mil_lora_expand_args {
    mil_lora_args lora;
    void *y; /* [T, ldy] */
    int64_t ldy;
    const mil_weight *weight; /* for its parts and interleave only */
} mil_lora_expand_args;

/* Split qkv, rotate q and k by position, write q in place of its token and k, v into pages, each
 * rounded to the pages' dtype once, nearest even: what float16 cannot hold becomes infinite there.
 * RoPE: Su et al. 2021, halves as Hugging Face lays them out (pairs d, d + rotary_dim / 2). */
typedef struct mil_rope_write_args {
    uint16_t *q;            /* [T, N * D] of kv->dtype */
    const void *qkv;        /* [T, (N + 2 K) * D] of product_dtype, q then k then v */
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
    uint16_t *out;       /* [T, N * D] of out_dtype */
    const uint16_t *q;   /* [T, N * D] of kv->dtype */
    mil_dtype out_dtype; /* BF16, as what enters a product; F16 only where kv->dtype is that too */
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
    uint16_t *out;       /* [T, F] bf16 */
    const void *gate_up; /* [T, 2 F] of product_dtype, in the weight's packed row order */
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
    mil_sample *out; /* [n_rows], on the device */
    float *logits;   /* [n_rows, ld]; kept. Row i is the batch's logit row first_row + i */
    const mil_batch *batch;
    mil_slots
        *slots; /* parameters of logit_slots; last_token is written where logit_feeds says so */
    int32_t first_row;
    int32_t n_rows;
    int32_t vocab; /* CUDA: at most 2^19 */
    int64_t ld;
} mil_sample_args;

/* Sizes that workspace_bytes answers for. */
typedef struct mil_maxima {
    int32_t max_tokens, max_seqs, max_logit_rows;
    int32_t max_position;
    int32_t hidden, ffn, vocab; /* of this rank */
    int32_t n_heads, n_kv_heads, head_dim;
    int32_t page_size, max_pages_per_seq;
    int32_t max_adapter_slots;
    int32_t n_threads;
} mil_maxima;

typedef struct mil_device_memory {
    const char *name;         /* of the very device, for messages; the queue's or constant */
    uint64_t n_free, n_total; /* now, whoever uses the rest */
    uint64_t n_free_at_open;  /* before the queue took anything; on the host n_free */
} mil_device_memory;

/* One device's calls. What leaves the device and fills are ordered with the ops of their queue.
 * What comes to it is done when the call returns and waits for no op: memory is zeroed, copied to
 * and poisoned beside the steps that run and the captures that are made. A message names the
 * device, what was asked for, and what there is. */
typedef struct mil_device {
    const char *name; /* "cpu", "cuda" */
    /* Device memory is host memory, and a step has ended when its last op returns. */
    bool is_host;
    int32_t depth; /* steps that may be queued at once, the running one included */

    /* A queue on device `ordinal`: streams, handles, events. NULL out and MIL_OK on the CPU. */
    mil_status (*open)(struct mil_queue **out, int32_t ordinal);
    /* Find now what an op finds at its first use: a model's missing library is told before its
     * weights are read. NULL: there is nothing. */
    mil_status (*prepare)(struct mil_queue *queue);
    void (*close)(struct mil_queue *queue);
    mil_status (*memory)(struct mil_queue *queue, mil_device_memory *memory);

    /* Zeroed device memory. */
    mil_status (*alloc)(struct mil_queue *queue, mil_slab *slab, size_t n_bytes, const char *what);
    void (*free)(struct mil_queue *queue, mil_slab *slab);
    /* Zeroed host memory that the device reads and writes in place. */
    mil_status (*alloc_host)(struct mil_queue *queue, mil_slab *slab, size_t n_bytes,
                             const char *what);
    void (*free_host)(struct mil_queue *queue, mil_slab *slab);

    /* Both return when the copy is done. No op that was queued before copy_in may use its target.
     */
    mil_status (*copy_in)(struct mil_queue *queue, void *device, const void *host, size_t n_bytes);
    mil_status (*copy_out)(struct mil_queue *queue, void *host, const void *device, size_t n_bytes);
    /* Returns at once; host is alloc_host's and stays valid. Whole 4-byte words. */
    mil_status (*send_out)(struct mil_queue *queue, void *host, const void *device, size_t n_bytes);
    /* n 16-bit words of device memory. */
    mil_status (*fill_16)(struct mil_queue *queue, void *device, uint16_t word, size_t n);
    /* Every byte of n_blocks blocks of n_bytes, stride_bytes apart, is 0xff: a NaN of any float.
     * Done when it returns, and ahead of what is queued, so that a step in flight that still reads
     * there shows it. */
    mil_status (*poison)(struct mil_queue *queue, void *device, size_t n_bytes, size_t n_blocks,
                         size_t stride_bytes);
    mil_status (*synchronize)(struct mil_queue *queue);

    /* Fence `index` (0 .. MIL_N_FENCES - 1) of the queue: record it after what was queued so far,
     * wait on the host until that has run. An asynchronous fault of the device surfaces here. */
    mil_status (*record)(struct mil_queue *queue, int32_t index);
    mil_status (*wait)(struct mil_queue *queue, int32_t index);

    /* From here on this thread may do what a capture forbids, be it its own or another thread's:
     * the first launch of a kernel loads it. *mode: to be given back. NULL where there are no
     * graphs. */
    mil_status (*relax_capture)(struct mil_queue *queue, int32_t *mode);
    void (*restore_capture)(struct mil_queue *queue, int32_t mode);
    /* Between begin and end, ops are noted and not run. NULL where there are no graphs. */
    mil_status (*capture_begin)(struct mil_queue *queue);
    mil_status (*capture_end)(struct mil_queue *queue, struct mil_graph **out);
    mil_status (*graph_launch)(struct mil_queue *queue, struct mil_graph *graph);
    void (*graph_free)(struct mil_queue *queue, struct mil_graph *graph);
} mil_device;

#define MIL_N_FENCES 4

typedef struct mil_backend {
    const char *name; /* "cpu", "cuda" */
    const mil_device *device;
    int32_t default_page_size;
    int32_t lora_rank_multiple; /* 16 on the CPU, 8 on CUDA */
    int32_t gate_up_interleave; /* how this backend wants gate and up merged: 16 on the CPU, 8 on
                                   CUDA */
    mil_dtype product_dtype;    /* of what a product hands to the next op: F32 on the CPU, BF16 on
                                   CUDA */
    mil_weight_format weight_format;
    int32_t lora_v_rank; /* v_part_stride of every step; 0: the largest rank in its batch */
    int32_t logit_block; /* rows of logits that exist at once */
    int32_t max_vocab;   /* largest vocabulary that sample takes; 0: any */
    /* Rows up to which a step of M rows runs the same kernels: each such size is run once before
     * the first step, which may load nothing. NULL on the host, which loads none. */
    int32_t (*rows_alike)(int32_t M);
    const void *kernels; /* the backend's own: what its ops run on (CPU: one instruction set) */

    /* ---- weights ---- */
    size_t (*packed_bytes)(int32_t N, int32_t K);
    /* Pack n_rows whole rows (all K of this rank) of one part, from row `row` of it on, and be done
     * when it returns. src row i at src + i * src_stride elements of dtype; F16 and F32 are rounded
     * to bf16. src is staging of the device's alloc_host, which a device may overwrite. Thread-safe
     * for disjoint rows of one weight, whichever panel they fall in. Padding rows and columns are
     * zero because slabs come zeroed. */
    mil_status (*pack)(struct mil_queue *queue, mil_weight *weight, int32_t part, int32_t row,
                       int32_t n_rows, void *src, mil_dtype dtype, int64_t src_stride);
    /* Rows of a dummy tensor straight into the weight: element (i, k) of the part is that of index
     * begin + i * stride + k of `stream` (loader/source.h). NULL: they are made on the host. */
    mil_status (*pack_dummy)(struct mil_queue *queue, mil_weight *weight, int32_t part, int32_t row,
                             int32_t n_rows, uint64_t stream, uint64_t begin, int64_t stride);
    size_t (*lora_a_bytes)(int32_t rank, int32_t in);
    size_t (*lora_b_bytes)(int32_t out, int32_t rank);
    /* a: [rank, in], b: [out, rank], bf16, row-major; destinations zeroed. */
    void (*lora_pack_a)(void *packed, const uint16_t *a, int64_t stride, int32_t rank, int32_t in);
    void (*lora_pack_b)(void *packed, const uint16_t *b, int64_t stride, int32_t out, int32_t rank);

    /* ---- step ---- */
    size_t (*workspace_bytes)(const mil_maxima *maxima);
    size_t (*step_bytes)(const mil_maxima *maxima); /* of step_data */
    mil_status (*begin)(mil_context *, const mil_begin_args *);
    mil_status (*embed)(mil_context *, const mil_embed_args *);
    mil_status (*norm)(mil_context *, const mil_norm_args *);
    mil_status (*linear)(mil_context *, const mil_linear_args *);
    mil_status (*lora_shrink)(mil_context *, const mil_lora_shrink_args *);
    mil_status (*lora_expand)(mil_context *, const mil_lora_expand_args *);
    mil_status (*rope_write)(mil_context *, const mil_rope_write_args *);
    mil_status (*attention)(mil_context *, const mil_attention_args *);
    mil_status (*act)(mil_context *, const mil_act_args *);
    mil_status (*sample)(mil_context *, const mil_sample_args *);

    /* ---- composed; may be NULL. lora: NULL or of bucket_segments 0 is none ---- */
    mil_status (*linear_lora)(mil_context *, const mil_linear_args *, const mil_lora_args *lora);
    mil_status (*gate_up_act)(mil_context *, const mil_linear_args *, const mil_lora_args *lora,
                              const mil_act_args *);
} mil_backend;

/* The table for "cpu" or "cuda". MIL_ERR_ARGUMENT for another name; MIL_ERR_DEVICE with the reason
 * where this build or this machine cannot serve it. */
mil_status mil_backend_find(const mil_backend **out, const char *device) MIL_WARN_UNUSED;

/* What mil_backend_find chooses among. */
mil_status mil_cpu_backend_find(const mil_backend **out) MIL_WARN_UNUSED;
mil_status mil_cuda_backend_find(const mil_backend **out) MIL_WARN_UNUSED;

/* Instruction sets: the one in use, and all that run here, best first, space-separated.
 * MIL_ERR_ARGUMENT when MILPY_CPU_ISA names one that is unknown or that this machine lacks. */
mil_status mil_cpu_isa(const char **in_use, const char **available) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
