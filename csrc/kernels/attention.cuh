/* What attention's paths share: the list of work that a step's plan makes once for all layers, the
 * rule by which a long row is split, and how its partial results become one.
 *
 * Queries of a kv head's group are packed as rows: packed row r of a sequence is query r / group,
 * head kv_head * group + r % group. An item is a tile of such rows and the keys that it may see; it
 * stands for one tile of each kv head. Rows of a sequence with one query (a decode row) are cut by
 * keys as well: the cut is a function of the row's own length, so batch mates change no bits. */
#pragma once

#include "kernels/common.cuh"

#define MIL_ATTENTION_BLOCK 64 /* keys; blocks lie at absolute multiples of it */
#define MIL_ATTENTION_ROWS 16  /* tiles of at most so many rows are worked on by a whole block */
/* Keys of the shortest split. Shorter ones serve one sequence, longer ones many: Llama-3-8B's shape
 * at 1k decodes 211 / 1504 / 7465 tokens a second at batch 1 / 8 / 64 with 256, 202 / 1516 / 7950
 * with 512, 187 / 1428 / 8200 with 1024 (H200, 2026-11-24, bench_engine). */
#define MIL_ATTENTION_MIN_SPLIT 512
#define MIL_ATTENTION_HEADER_BYTES 256
/* Where the running maximum starts: finite, so that maximum minus maximum is never NaN. */
#define MIL_ATTENTION_NO_MAXIMUM (-1e30f)

typedef struct mil_attention_item {
    int32_t token;       /* row of T of the sequence's first query */
    int32_t past;        /* keys before that query: query i sees past + i + 1 keys */
    int32_t slot;        /* its row of the page table */
    int32_t first_limit; /* keys that the tile's first query sees */
    int32_t first_row;   /* packed */
    int32_t n_rows;      /* packed, > 0 */
    int32_t key_begin, key_end;
    int32_t split, n_splits;
    int32_t partial; /* the place of split 0's partial result, if n_splits > 1 */
    int32_t counter; /* of a tile, before kv heads */
} mil_attention_item;

/* step_data from its start: header, counters (zero between kernels), items. */
typedef struct mil_attention_list {
    int32_t n_items;
    int32_t n_chunk_items; /* Hopper path: the first so many are tiles of chunks */
} mil_attention_list;

typedef struct mil_attention_places {
    mil_attention_list *list;
    mil_attention_item *items; /* [max_items]; of each kind, longest first */
    int32_t *counters;         /* [n_counters]: splits of a tile and kv head that are done */
    int32_t max_items;
    int32_t n_counters;
} mil_attention_places;

/* Partial results in the workspace, row (place + split) * N + head. */
typedef struct mil_attention_partials {
    float *o;     /* [n_places, N, D], not divided by the sum */
    float2 *sums; /* [n_places, N]: maximum (of scores in powers of two), sum */
    int32_t n_places;
} mil_attention_partials;

/* ---- sizes, on the host ---- */

/* Packed rows of a prefill tile of the portable path. 16 rows of a warp: more would spill at D 128,
 * and fewer warps would hide less. 96 rows let two blocks of six warps have 168 registers a thread.
 */
static constexpr int32_t mil_attention_tile_rows(int32_t head_dim)
{
    return head_dim <= 64 ? 128 : head_dim <= 128 ? 96 : 64;
}

/* Whether attention_sm90.cu serves this shape: a box of 64 keys lies in one page. */
static inline bool mil_attention_is_sm90(const mil_queue *queue, const mil_kv *kv)
{
    return queue->path == MIL_CUDA_SM90 && (kv->head_dim == 64 || kv->head_dim == 128) &&
           kv->page_size % MIL_ATTENTION_BLOCK == 0;
}

#define MIL_ATTENTION_SM90_ROWS 128 /* packed, of its prefill tile: 64 of each warpgroup of two */

/* So that one long row fills a GPU: some 256 splits over all kv heads, a power of two. */
static inline int32_t mil_attention_max_splits(int32_t n_kv_heads)
{
    int32_t n = 16;
    while (n < 128 && n * n_kv_heads < 256)
        n *= 2;
    return n;
}

static inline int32_t mil_attention_tiles(int32_t n_heads, int32_t n_kv_heads)
{
    const int32_t group = (n_heads + n_kv_heads - 1) / n_kv_heads;
    return (group + MIL_ATTENTION_ROWS - 1) / MIL_ATTENTION_ROWS;
}

/* Items at most: whole tiles of 64 rows or more, a last one of each sequence, splits of decode
 * rows.
 */
static inline int64_t mil_attention_most_items(int64_t n_seqs, int64_t n_tokens, int64_t group,
                                               int64_t n_tiles, int64_t n_splits)
{
    return (n_tokens * group + 63) / 64 + n_seqs * (1 + n_tiles * n_splits);
}

/* The counters of so many sequences, and items to the end of step_data. */
static inline mil_attention_places mil_attention_place(void *step_data, size_t step_bytes,
                                                       int32_t n_seqs, int32_t n_heads,
                                                       int32_t n_kv_heads)
{
    mil_attention_places places = {};
    const int32_t n_counters = n_seqs * mil_attention_tiles(n_heads, n_kv_heads) * n_kv_heads;
    const size_t begin =
        MIL_ATTENTION_HEADER_BYTES + mil_round_up((size_t)n_counters * sizeof(int32_t), 256);
    const size_t n = step_bytes > begin ? (step_bytes - begin) / sizeof(mil_attention_item) : 0;
    places.list = (mil_attention_list *)step_data;
    places.counters = (int32_t *)((char *)step_data + MIL_ATTENTION_HEADER_BYTES);
    places.items = (mil_attention_item *)((char *)step_data + begin);
    places.n_counters = n_counters;
    places.max_items = n > INT32_MAX ? INT32_MAX : (int32_t)n;
    return places;
}

static inline size_t mil_attention_partial_bytes(int32_t n_heads, int32_t head_dim)
{
    return (size_t)n_heads * (size_t)(head_dim + 2) * sizeof(float);
}

/* As many places as the workspace has room for: the plan refuses one with too few for its bucket.
 */
static inline mil_attention_partials mil_attention_partials_in(void *workspace, size_t n_bytes,
                                                               int32_t n_heads, int32_t head_dim)
{
    mil_attention_partials partials = {};
    const size_t room = n_bytes < 256 ? 0 : n_bytes - 256;
    const size_t n = room / mil_attention_partial_bytes(n_heads, head_dim);
    partials.n_places = n > INT32_MAX ? INT32_MAX : (int32_t)n;
    partials.sums = (float2 *)workspace;
    partials.o = (float *)((char *)workspace +
                           mil_round_up((size_t)partials.n_places * (size_t)n_heads * 8, 256));
    return partials;
}

/* Then p = exp2(factor * score - maximum). With softcap, a score is cap_out * tanh of it, the tanh
 * wants exp2 of cap_in * score, and factor is 1. */
typedef struct mil_attention_scale {
    float cap_in, cap_out, factor;
} mil_attention_scale;

static inline mil_attention_scale mil_attention_scale_of(float scale, float softcap)
{
    const float log2e = 1.44269504f;
    mil_attention_scale of = {0.0f, 0.0f, scale * log2e};
    if (softcap > 0.0f) {
        of.cap_in = 2.0f * log2e * scale / softcap;
        of.cap_out = softcap * log2e;
        of.factor = 1.0f;
    }
    return of;
}

/* The Hopper path, where mil_attention_is_sm90 says so. */
extern "C" mil_status mil_cuda_attention_sm90(mil_context *, const mil_attention_args *);

/* ---- on the device ---- */

static __device__ __forceinline__ float mil_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* cap * tanh(x / cap) in powers of two: 1 - 2 / (e^2y + 1). */
static __device__ __forceinline__ float mil_attention_cap(const mil_attention_scale &scale, float x)
{
    return scale.cap_out * (1.0f - __fdividef(2.0f, mil_exp2(scale.cap_in * x) + 1.0f));
}

/* Packed row r of a tile as (row of T, head). */
static __device__ __forceinline__ int64_t mil_attention_row(const mil_attention_item *item,
                                                            int32_t kv_head, int32_t row,
                                                            int32_t group, int32_t n_heads)
{
    const uint32_t packed = (uint32_t)(item->first_row + row);
    const uint32_t query = packed / (uint32_t)group;
    const uint32_t head = (uint32_t)(kv_head * group) + packed - query * (uint32_t)group;
    return (int64_t)(item->token + (int32_t)query) * n_heads + head;
}

/* One split more is done: whether it was the last one. */
static __device__ __forceinline__ int32_t mil_attention_count(int32_t *counter, int32_t n_splits)
{
    const bool is_last = atomicAdd(counter, 1) == n_splits - 1;
    if (is_last)
        *counter = 0; /* the next layer's */
    return is_last;
}

/* Called by the whole block after it wrote its partial result: true in the block that came last. */
static __device__ __forceinline__ bool mil_attention_is_last(int32_t *counter, int32_t n_splits,
                                                             int32_t *is_last)
{
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
        *is_last = mil_attention_count(counter, n_splits);
    __syncthreads();
    if (!*is_last)
        return false;
    __threadfence();
    return true;
}

/* Two results in one register: bfloat16, over pages of float16 what out_dtype says. */
template <mil_dtype DTYPE>
static __device__ __forceinline__ uint32_t mil_attention_pack2(float low, float high,
                                                               mil_dtype out_dtype)
{
    if (DTYPE == MIL_DTYPE_F16 && out_dtype == MIL_DTYPE_F16)
        return mil_pack2<MIL_DTYPE_F16>(low, high);
    return mil_pack2(low, high);
}

/* One row, by one warp: splits in ascending order, whoever computes it. out: [head_dim]. */
template <mil_dtype DTYPE>
static __device__ __forceinline__ void
mil_attention_merge(uint16_t *out, const mil_attention_partials &partials, int64_t row,
                    int32_t stride, int32_t n_splits, int32_t head_dim, mil_dtype out_dtype)
{
    const int32_t lane = threadIdx.x % MIL_WARP;
    float maximum = MIL_ATTENTION_NO_MAXIMUM;
    for (int32_t s = lane; s < n_splits; s += MIL_WARP)
        maximum = fmaxf(maximum, __ldcg(&partials.sums[row + (int64_t)s * stride]).x);
    maximum = mil_warp_max(maximum);
    for (int32_t column = 4 * lane; column < head_dim; column += 4 * MIL_WARP) {
        float sum = 0.0f;
        float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (int32_t s = 0; s < n_splits; s++) {
            const int64_t at = row + (int64_t)s * stride;
            const float2 part = __ldcg(&partials.sums[at]);
            const float4 v = __ldcg((const float4 *)(partials.o + at * head_dim + column));
            const float weight = mil_exp2(part.x - maximum);
            sum = fmaf(weight, part.y, sum);
            o.x = fmaf(weight, v.x, o.x);
            o.y = fmaf(weight, v.y, o.y);
            o.z = fmaf(weight, v.z, o.z);
            o.w = fmaf(weight, v.w, o.w);
        }
        const float inverse = 1.0f / sum;
        *(uint2 *)(out + column) =
            make_uint2(mil_attention_pack2<DTYPE>(o.x * inverse, o.y * inverse, out_dtype),
                       mil_attention_pack2<DTYPE>(o.z * inverse, o.w * inverse, out_dtype));
    }
}
