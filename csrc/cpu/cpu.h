/* Inside the CPU room: the kernels of one instruction set, and how an op finds and runs them.
 *
 * A file x.c reads like the formula and splits the work over threads. Where speed needs it,
 * x_simd.c stands beside it: one body that the Makefile compiles once per instruction set, ending
 * in one `const mil_cpu_x_kernels MIL_CPU_NAME(mil_cpu_x_kernels)`. isa.c gathers those into a
 * mil_cpu_kernels for each set; backend.c makes a mil_backend of each. All sets give the same bits.
 *
 * To add a kernel file: its struct here, one MIL_CPU_DECLARE line, one member of mil_cpu_kernels,
 * one line of KERNELS in isa.c. To add an op: its prototype under "ops", one line of BACKEND in
 * backend.c. */
#pragma once

#include "base/threads.h"
#include "ops/backend.h"

/* ---- names per instruction set ---- */

#define MIL_CPU_JOIN_(stem, isa) stem##_##isa
#define MIL_CPU_JOIN(stem, isa) MIL_CPU_JOIN_(stem, isa)
/* In x_simd.c: the stem with this compilation's instruction set, mil_cpu_x_kernels_avx2. */
#define MIL_CPU_NAME(stem) MIL_CPU_JOIN(stem, MIL_ISA_NAME)

#ifdef __x86_64__
#define MIL_CPU_DECLARE(type, stem)                                                                \
    extern const type stem##_scalar;                                                               \
    extern const type stem##_avx2;                                                                 \
    extern const type stem##_avx512;                                                               \
    extern const type stem##_avx512bf16
#else
#define MIL_CPU_DECLARE(type, stem) extern const type stem##_scalar
#endif

typedef enum mil_cpu_isa_id {
    MIL_CPU_SCALAR = 0,
    MIL_CPU_AVX2,
    MIL_CPU_AVX512,
    MIL_CPU_AVX512BF16,
    MIL_CPU_N_ISAS,
} mil_cpu_isa_id;

/* The set that this machine and MILPY_CPU_ISA choose; *available as mil_cpu_isa. Nothing is timed.
 */
mil_status mil_cpu_isa_choose(mil_cpu_isa_id *chosen, const char **available) MIL_WARN_UNUSED;

/* ---- products ---- */

/* K is worked through in blocks, so that a block of one panel (64 KiB) and of all rows stay in the
 * second cache. A chain goes on across blocks through y. */
#define MIL_CPU_KC 1024
#define MIL_CPU_MAX_TILE_ROWS 12
#define MIL_CPU_WIDE_BYTES ((size_t)MIL_CPU_KC * 32 * sizeof(float)) /* a widened block */

/* One tile: y[m, 0 .. width) = chain over n_pairs pairs, starting from 0 or (resume) from y itself.
 * x: rows of one block as pack_x lays them out. panel: [n_pairs][width][2] bf16; for wide32, what
 * widen32 left in wide. prefetch: memory that will be wanted soon, prefetch_step bytes (0 .. 128)
 * of it for each pair; any address will do. */
typedef void (*mil_cpu_tile_fn)(float *y, int64_t ldy, const void *x, const void *panel,
                                float *wide, int32_t n_pairs, bool resume, const void *prefetch,
                                int64_t prefetch_step);

typedef struct mil_cpu_linear_kernels {
    int32_t max_rows;     /* of a tile: even, <= MIL_CPU_MAX_TILE_ROWS */
    int32_t x_item_bytes; /* 4: x is widened to float32; 2: pairs stay bf16 */
    int32_t x_stride;     /* items from a packed row to the next, > MIL_CPU_KC */
    int32_t ahead_bytes;  /* how far before its use a stream that only one tile reads is fetched */
    /* n <= MIL_CPU_KC items of one row; an odd n is followed by a zero. */
    void (*pack_x)(void *packed, const uint16_t *x, int32_t n);
    mil_cpu_tile_fn tile32[MIL_CPU_MAX_TILE_ROWS + 1]; /* [rows]; [0] is NULL */
    mil_cpu_tile_fn tile16[MIL_CPU_MAX_TILE_ROWS + 1];
    /* For many tiles over one block: the first leaves the weights' float32 values for the others,
     * [n_pairs][odd 32, even 32]. wide_rows 0: pairs are multiplied as they are. */
    int32_t wide_rows;
    mil_cpu_tile_fn widen32[MIL_CPU_MAX_TILE_ROWS + 1];
    mil_cpu_tile_fn wide32[MIL_CPU_MAX_TILE_ROWS + 1];
} mil_cpu_linear_kernels;
MIL_CPU_DECLARE(mil_cpu_linear_kernels, mil_cpu_linear_kernels);

#define MIL_CPU_EXPAND_ROWS 8

typedef struct mil_cpu_lora_kernels {
    /* y[rows[i], 0 .. width) += chain over r ascending of v[i, r] * b, for n_rows <=
     * MIL_CPU_EXPAND_ROWS rows and n_panels panels of B ([padded_rank/2][16][2] bf16 each, one
     * after another). Panel j adds to columns j * y_step ...; the last one is last_width wide. */
    void (*expand)(float *y, int64_t ldy, const int32_t *rows, int32_t n_rows, const float *v,
                   int64_t v_stride, const uint16_t *b, int32_t n_panels, int32_t padded_rank,
                   int64_t y_step, int32_t last_width);
} mil_cpu_lora_kernels;
MIL_CPU_DECLARE(mil_cpu_lora_kernels, mil_cpu_lora_kernels);

typedef struct mil_cpu_pack_kernels {
    /* n_rows <= 16 rows of n items (src_stride apart) into one panel of `width` columns from column
     * `column` of it on; pair i at panel + i * width * 2. An odd n leaves the pair's second item.
     */
    void (*rows)(uint16_t *panel, int32_t width, int32_t column, const void *src, mil_dtype dtype,
                 int64_t src_stride, int32_t n_rows, int32_t n);
} mil_cpu_pack_kernels;
MIL_CPU_DECLARE(mil_cpu_pack_kernels, mil_cpu_pack_kernels);

/* ---- the other ops ---- */

typedef struct mil_cpu_norm_kernels {
    void (*add)(float *x, const float *residual, int32_t n);
    void (*norm)(uint16_t *out, const float *x, const float *weight, int32_t n, float eps,
                 float offset);
} mil_cpu_norm_kernels;
MIL_CPU_DECLARE(mil_cpu_norm_kernels, mil_cpu_norm_kernels);

typedef struct mil_cpu_rope_kernels {
    /* One head. cosines, sines: [rotary_dim / 2] of its position. */
    void (*rotate)(uint16_t *out, const float *x, const float *cosines, const float *sines,
                   int32_t head_dim, int32_t rotary_dim, bool is_interleaved);
    void (*round)(uint16_t *out, const float *x, int32_t n);
} mil_cpu_rope_kernels;
MIL_CPU_DECLARE(mil_cpu_rope_kernels, mil_cpu_rope_kernels); /* to bfloat16 */
MIL_CPU_DECLARE(mil_cpu_rope_kernels, mil_cpu_rope_f16_kernels);

typedef struct mil_cpu_act_kernels {
    /* One row. gate_up: [2 F], groups of `interleave` columns alternating; 0: gate then up. */
    void (*silu_mul)(uint16_t *out, const float *gate_up, int32_t ffn, int32_t interleave);
} mil_cpu_act_kernels;
MIL_CPU_DECLARE(mil_cpu_act_kernels, mil_cpu_act_kernels);

/* Lengths, in keys, that attention's results depend on: softmax goes block by block, a long KV is
 * cut into splits that are merged in order. Both lie at absolute multiples. */
#define MIL_CPU_KV_BLOCK 64
#define MIL_CPU_KV_SPLIT 1024
/* Rows (queries x heads of a group) of one tile at most, but for a larger group: enough that
 * turning a block of keys costs little beside using it. */
#define MIL_CPU_ATTENTION_ROWS 126

/* One thread's scratch for attention. width: head_dim rounded up to 32. */
typedef struct mil_cpu_attention_scratch {
    float *q;      /* [rows][head_dim] */
    float *k;      /* [head_dim][64]: a block, transposed */
    float *v;      /* [64][width]: a block */
    float *scores; /* [8][64] */
    float *lanes;  /* [rows][16]: a split's sums, before the tree */
} mil_cpu_attention_scratch;

/* Softmax's state after some keys: running maximum, sum of weights, weighted sum of values. */
typedef struct mil_cpu_attention_part {
    float *m; /* [rows] */
    float *l; /* [rows] */
    float *o; /* [rows][width] */
} mil_cpu_attention_part;

/* Consecutive queries of one sequence for the query heads of one kv head, or one query for those of
 * several kv heads. Rows go by query, then head. Query i sees keys [max(0, n_visible + i - window),
 * n_visible + i). */
typedef struct mil_cpu_attention_tile {
    const mil_attention_args *args;
    mil_cpu_attention_scratch scratch;
    const uint16_t *q; /* of the first query and head; a query is ld further */
    uint16_t *out;     /* likewise */
    int64_t ld;
    const uint16_t *k; /* of the layer and kv head; a page is page_stride further */
    const uint16_t *v;
    int64_t page_stride;
    const int32_t *pages;          /* of the sequence */
    int32_t n_queries, n_kv_heads; /* one of them is 1 */
    int32_t group;                 /* query heads of a kv head */
    int32_t n_visible;             /* keys that the first query sees, were there no window */
} mil_cpu_attention_tile;

typedef struct mil_cpu_attention_kernels {
    void (*load_queries)(const mil_cpu_attention_tile *tile);
    /* The state after the split's keys alone; m is -inf in rows that see none of them. */
    void (*split)(const mil_cpu_attention_tile *tile, int32_t split,
                  const mil_cpu_attention_part *part);
    /* total = total merged with part, whose keys come after it. */
    void (*merge)(const mil_cpu_attention_part *total, const mil_cpu_attention_part *part,
                  int32_t n_rows, int32_t width);
    void (*finish)(const mil_cpu_attention_tile *tile, const mil_cpu_attention_part *total);
} mil_cpu_attention_kernels;
MIL_CPU_DECLARE(mil_cpu_attention_kernels, mil_cpu_attention_kernels); /* of bfloat16 pages */
MIL_CPU_DECLARE(mil_cpu_attention_kernels, mil_cpu_attention_f16_kernels);

#define MIL_CPU_SAMPLE_BLOCK 64 /* logits of one maximum */

typedef struct mil_cpu_sample_kernels {
    /* Largest of each block of n logits, and of all; that is a NaN where the logits hold one. */
    float (*maxima)(float *block_max, const float *x, int32_t n);
    /* Sum, and each, of e^((x - top) * factor). out may be x. */
    float (*sum_weights)(const float *x, int32_t n, float top, float factor);
    void (*weights)(float *out, const float *x, int32_t n, float top, float factor);
    /* Ids of logits >= threshold, ascending; returns how many. */
    int32_t (*collect)(int32_t *ids, const float *x, int32_t n, const float *block_max,
                       float threshold);
    /* Logits that rank before x[id]: larger, or equal with a lower id. */
    int32_t (*count_before)(const float *x, int32_t n, int32_t id);
    float (*log)(float x);
} mil_cpu_sample_kernels;
MIL_CPU_DECLARE(mil_cpu_sample_kernels, mil_cpu_sample_kernels);

/* ---- one instruction set ---- */

typedef struct mil_cpu_kernels {
    const char *name; /* "avx2" */
    const mil_cpu_linear_kernels *linear;
    const mil_cpu_lora_kernels *lora;
    const mil_cpu_pack_kernels *pack;
    const mil_cpu_norm_kernels *norm;
    const mil_cpu_rope_kernels *rope, *rope_f16;
    const mil_cpu_act_kernels *act;
    const mil_cpu_attention_kernels *attention, *attention_f16;
    const mil_cpu_sample_kernels *sample;
} mil_cpu_kernels;
MIL_CPU_DECLARE(mil_cpu_kernels, mil_cpu_kernels);

static inline const mil_cpu_kernels *mil_cpu_kernels_of(const mil_context *context)
{
    return (const mil_cpu_kernels *)context->backend->kernels;
}

/* ---- work ---- */

/* Run fn on every thread of the context's pool; on the caller alone where there is none. */
void mil_cpu_run(const mil_context *context, mil_task_fn fn, void *argument);
/* As mil_cpu_run, but on the caller alone (n_threads 1) where n_elements, of work of about a
 * nanosecond for four, are not worth waking a thread. */
void mil_cpu_run_sized(const mil_context *context, mil_task_fn fn, void *argument,
                       int64_t n_elements);
/* Inside such a task: wait for every thread. */
void mil_cpu_barrier(const mil_context *context, int32_t thread);
int32_t mil_cpu_n_threads(const mil_context *context);

/* This thread's share [*begin, *end) of n items, contiguous and even. */
static inline void mil_cpu_share(int64_t n, int32_t thread, int32_t n_threads, int64_t *begin,
                                 int64_t *end)
{
    *begin = n * thread / n_threads;
    *end = n * (thread + 1) / n_threads;
}

/* ---- ops ---- */

/* Packing slots get no context, so each instruction set has its own: mil_cpu_pack_avx2 and so on.
 */
#define MIL_CPU_DECLARE_PACK(isa)                                                                  \
    mil_status mil_cpu_pack_##isa(struct mil_queue *queue, mil_weight *weight, int32_t part,       \
                                  int32_t row, int32_t n_rows, void *src, mil_dtype dtype,         \
                                  int64_t src_stride);                                             \
    void mil_cpu_lora_pack_a_##isa(void *packed, const uint16_t *a, int64_t stride, int32_t rank,  \
                                   int32_t in);                                                    \
    void mil_cpu_lora_pack_b_##isa(void *packed, const uint16_t *b, int64_t stride, int32_t out,   \
                                   int32_t rank)
MIL_CPU_DECLARE_PACK(scalar);
#ifdef __x86_64__
MIL_CPU_DECLARE_PACK(avx2);
MIL_CPU_DECLARE_PACK(avx512);
MIL_CPU_DECLARE_PACK(avx512bf16);
#endif
size_t mil_cpu_packed_bytes(int32_t N, int32_t K);
size_t mil_cpu_lora_a_bytes(int32_t rank, int32_t in);
size_t mil_cpu_lora_b_bytes(int32_t out, int32_t rank);

/* What a product needs of the workspace, for M rows of K items. */
size_t mil_cpu_linear_workspace(int32_t M, int32_t K, int32_t n_threads);

/* What attention and sampling need of it. */
size_t mil_cpu_attention_workspace(const mil_maxima *maxima);
size_t mil_cpu_sample_workspace(const mil_maxima *maxima);
/* The largest need of any op: they run one after another. */
size_t mil_cpu_workspace_bytes(const mil_maxima *maxima);

mil_status mil_cpu_begin(mil_context *context, const mil_begin_args *args);
mil_status mil_cpu_embed(mil_context *context, const mil_embed_args *args);
mil_status mil_cpu_norm(mil_context *context, const mil_norm_args *args);
mil_status mil_cpu_rope_write(mil_context *context, const mil_rope_write_args *args);
mil_status mil_cpu_attention(mil_context *context, const mil_attention_args *args);
mil_status mil_cpu_act(mil_context *context, const mil_act_args *args);
mil_status mil_cpu_sample(mil_context *context, const mil_sample_args *args);
mil_status mil_cpu_linear(mil_context *context, const mil_linear_args *args);
mil_status mil_cpu_lora_shrink(mil_context *context, const mil_lora_shrink_args *args);
mil_status mil_cpu_lora_expand(mil_context *context, const mil_lora_expand_args *args);
mil_status mil_cpu_linear_lora(mil_context *context, const mil_linear_args *args,
                               const mil_lora_args *lora);
mil_status mil_cpu_gate_up_act(mil_context *context, const mil_linear_args *args,
                               const mil_lora_args *lora, const mil_act_args *act);
