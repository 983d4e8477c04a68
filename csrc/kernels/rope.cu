/* rope_write: split qkv into heads, rotate q and k by position, round to the pages' dtype, write q
 * in place of its token and k, v into the row of the page that the sequence's table names.
 *   a' = round(fma(a, cos, -(b sin)))    b' = round(fma(b, cos, a sin))
 * Pairs (a, b) are (d, d + rotary_dim / 2), or (2 i, 2 i + 1) where interleaved; columns from
 * rotary_dim on and v are rounded only. RoPE: Su et al. 2021, halves as Hugging Face lays them out.
 *
 * qkv [T, (N + 2 K) D] bf16; tables [max_position, rotary_dim / 2] fp32; q [T, N D] and pages
 * [page][K][P][D] both bf16 or both f16. Bound by bytes: each value read once and written once;
 * 0.83 of an H200's 4.55 TB/s at 8,192 tokens (2026-11-29, bench_ops). Rows past the batch's tokens
 * write nothing. */
#include "kernels/cuda.h"

#include "kernels/common.cuh"

#define THREADS 256 /* at most; one block a token */
#define VECTOR 8    /* items of one 16-byte access */
#define AT_ONCE 2   /* heads of one thread in flight, two vectors each */

/* ---- where a token's values come from and go ---- */

typedef struct place {
    bool is_real;  /* a token of the batch */
    bool has_page; /* false: a bad index; q alone is written */
    int64_t row;   /* of kv head 0 in kv.k and kv.v, where there is a page */
} place;

/* Chunks lie in [n_decode, n_seqs); a decode row's sequence is its own index. */
static __device__ __forceinline__ int32_t sequence_of(const mil_batch &batch, int32_t t,
                                                      int32_t n_decode, int32_t n_seqs)
{
    return t < n_decode ? t : mil_segment_of(batch.query_indptr, n_decode, n_seqs, t);
}

static __device__ __forceinline__ place find_place(const mil_rope_write_args &args,
                                                   const mil_batch &batch, const mil_slots &slots,
                                                   const mil_kv &kv, int32_t t)
{
    place to = {};
    const mil_plan_header *counts = batch.counts;
    to.is_real = t < counts->n_tokens;
    if (!to.is_real)
        return to;
    int32_t s = sequence_of(batch, t, counts->n_decode, counts->n_seqs);
    int32_t slot = batch.seq_slot[s];
    int32_t position = batch.kv_lengths[s] - batch.query_indptr[s + 1] + t;
    int32_t index = position / kv.page_size;
    if (position < 0 || index >= slots.max_pages || (uint32_t)slot >= (uint32_t)slots.n_slots)
        return to;
    int32_t page = slots.page_table[(int64_t)slot * slots.max_pages + index];
    if ((uint32_t)page >= (uint32_t)kv.n_pages)
        return to;
    to.has_page = true;
    to.row = args.layer * kv.layer_elements +
             ((int64_t)page * kv.n_kv_heads * kv.page_size + position % kv.page_size) * kv.head_dim;
    return to;
}

/* Where head `head` of q, k, v in a row goes; false: nowhere. */
static __device__ __forceinline__ bool find_head(uint16_t **out, const mil_rope_write_args &args,
                                                 const mil_kv &kv, const place &to, int32_t t,
                                                 int32_t head)
{
    int32_t N = args.n_heads, K = kv.n_kv_heads;
    bool is_v = head >= N + K;
    int64_t kv_head = head - N - (is_v ? K : 0);
    if (head < N)
        *out = args.q + ((int64_t)t * N + head) * kv.head_dim;
    else
        *out = (is_v ? kv.v : kv.k) + to.row + kv_head * kv.page_size * kv.head_dim;
    return head < N || (head < N + 2 * K && to.has_page);
}

/* ---- 16 bytes at a time ---- */

/* Two vectors of one head: at columns a and b, b < 0 where there is one only. */
typedef struct columns {
    int32_t a, b;
    bool is_turned;
} columns;

/* Thread u of the ceil(D / 16) that share a head. A region of n columns is cut in halves of
 * ceil(n / 16) vectors; the rotated columns are a region of a multiple of 16, whose halves are the
 * pairs. Interleaved pairs lie inside a vector, so all columns are one region. */
template <bool is_interleaved>
static __device__ __forceinline__ columns columns_of(int32_t u, int32_t D, int32_t rotary_dim,
                                                     bool is_v)
{
    int32_t begin = 0, end = D;
    columns at;
    at.is_turned = !is_v;
    if (!is_interleaved && !is_v) {
        int32_t n_turned = rotary_dim / (2 * VECTOR);
        at.is_turned = u < n_turned;
        begin = at.is_turned ? 0 : rotary_dim;
        end = at.is_turned ? rotary_dim : D;
        u -= at.is_turned ? 0 : n_turned;
    }
    int32_t half = (end - begin + 2 * VECTOR - 1) / (2 * VECTOR);
    at.a = begin + u * VECTOR;
    at.b = at.a + half * VECTOR < end ? at.a + half * VECTOR : -1;
    return at;
}

static __device__ __forceinline__ columns pick(bool is_rotated, columns rotated, columns plain)
{
    columns at;
    at.a = is_rotated ? rotated.a : plain.a;
    at.b = is_rotated ? rotated.b : plain.b;
    at.is_turned = is_rotated && rotated.is_turned;
    return at;
}

/* Cosines and sines of a thread's columns, the same for every head: four angles each. Of halves,
 * the eight pairs of both vectors; of interleaved pairs, the four of vector a and the four of b. */
typedef struct angles {
    float4 cos_a, cos_b, sin_a, sin_b;
} angles;

static __device__ __forceinline__ bool is_turned_pair(int32_t column, int32_t rotary_dim)
{
    return column >= 0 && column < rotary_dim;
}

/* Rows of the tables are a multiple of 4 floats, so these are aligned: rotary_dim % 16 == 0 for
 * halves, % 8 for pairs. */
template <bool is_interleaved>
static __device__ __forceinline__ angles angles_of(const mil_rope_write_args &args, columns at,
                                                   int32_t position)
{
    angles of = {};
    int64_t row = (int64_t)max(position, 0) * (args.rotary_dim / 2);
    int32_t a = is_interleaved ? at.a / 2 : at.a, b = is_interleaved ? at.b / 2 : at.a + 4;
    if (is_interleaved ? is_turned_pair(at.a, args.rotary_dim) : at.is_turned) {
        of.cos_a = __ldg((const float4 *)(args.cos_table + row + a));
        of.sin_a = __ldg((const float4 *)(args.sin_table + row + a));
    }
    if (is_interleaved ? is_turned_pair(at.b, args.rotary_dim) : at.is_turned) {
        of.cos_b = __ldg((const float4 *)(args.cos_table + row + b));
        of.sin_b = __ldg((const float4 *)(args.sin_table + row + b));
    }
    return of;
}

static __device__ __forceinline__ void turn(float &a, float &b, float cosine, float sine)
{
    float x = a, y = b;
    a = fmaf(x, cosine, -(y * sine));
    b = fmaf(y, cosine, x * sine);
}

static __device__ __forceinline__ void turn_halves(float (&a)[VECTOR], float (&b)[VECTOR],
                                                   const angles &by)
{
    turn(a[0], b[0], by.cos_a.x, by.sin_a.x);
    turn(a[1], b[1], by.cos_a.y, by.sin_a.y);
    turn(a[2], b[2], by.cos_a.z, by.sin_a.z);
    turn(a[3], b[3], by.cos_a.w, by.sin_a.w);
    turn(a[4], b[4], by.cos_b.x, by.sin_b.x);
    turn(a[5], b[5], by.cos_b.y, by.sin_b.y);
    turn(a[6], b[6], by.cos_b.z, by.sin_b.z);
    turn(a[7], b[7], by.cos_b.w, by.sin_b.w);
}

static __device__ __forceinline__ void turn_pairs(float (&x)[VECTOR], float4 cosines, float4 sines)
{
    turn(x[0], x[1], cosines.x, sines.x);
    turn(x[2], x[3], cosines.y, sines.y);
    turn(x[4], x[5], cosines.z, sines.z);
    turn(x[6], x[7], cosines.w, sines.w);
}

static __device__ __forceinline__ void widen8(float (&out)[VECTOR], uint4 in)
{
    const uint32_t pairs[4] = {in.x, in.y, in.z, in.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[2 * i] = mil_low(pairs[i]);
        out[2 * i + 1] = mil_high(pairs[i]);
    }
}

template <mil_dtype DTYPE>
static __device__ __forceinline__ uint4 round8(const float (&in)[VECTOR])
{
    return make_uint4(mil_pack2<DTYPE>(in[0], in[1]), mil_pack2<DTYPE>(in[2], in[3]),
                      mil_pack2<DTYPE>(in[4], in[5]), mil_pack2<DTYPE>(in[6], in[7]));
}

template <bool is_interleaved, mil_dtype DTYPE>
static __device__ __forceinline__ void write_columns(uint16_t *to, columns at, const uint4 &in_a,
                                                     const uint4 &in_b, const angles &by,
                                                     int32_t rotary_dim)
{
    float a[VECTOR], b[VECTOR];
    widen8(a, in_a);
    widen8(b, in_b);
    if (!is_interleaved && at.is_turned)
        turn_halves(a, b, by);
    if (is_interleaved && at.is_turned && is_turned_pair(at.a, rotary_dim))
        turn_pairs(a, by.cos_a, by.sin_a);
    if (is_interleaved && at.is_turned && is_turned_pair(at.b, rotary_dim))
        turn_pairs(b, by.cos_b, by.sin_b);
    *(uint4 *)(to + at.a) = round8<DTYPE>(a);
    if (at.b >= 0)
        *(uint4 *)(to + at.b) = round8<DTYPE>(b);
}

/* Block (ceil(D / 16), heads at once), one token. qkv and the angles are asked for before the
 * token's place is known: the place is a chain of three loads. */
template <bool is_interleaved, mil_dtype DTYPE>
static __global__ void __launch_bounds__(THREADS)
    rope_kernel(const __grid_constant__ mil_rope_write_args args,
                const __grid_constant__ mil_batch batch, const __grid_constant__ mil_slots slots,
                const __grid_constant__ mil_kv kv)
{
    mil_let_next_start();
    mil_wait_for_previous();
    int32_t t = (int32_t)blockIdx.x, position = batch.positions[t];
    int32_t D = kv.head_dim, n_rotated = args.n_heads + kv.n_kv_heads;
    int32_t n_heads = n_rotated + kv.n_kv_heads, n_rows = (int32_t)blockDim.y;
    const uint16_t *row = (const uint16_t *)args.qkv + (int64_t)t * n_heads * D;
    columns rotated = columns_of<is_interleaved>(threadIdx.x, D, args.rotary_dim, false);
    columns plain = columns_of<is_interleaved>(threadIdx.x, D, args.rotary_dim, true);
    angles by = {};
    place to = {};
    for (int32_t first = (int32_t)threadIdx.y; first < n_heads; first += AT_ONCE * n_rows) {
        uint4 a[AT_ONCE], b[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int32_t head = min(first + i * n_rows, n_heads - 1);
            columns at = pick(head < n_rotated, rotated, plain);
            const uint16_t *from = row + (int64_t)head * D;
            a[i] = __ldcg((const uint4 *)(from + at.a));
            b[i] = __ldcg((const uint4 *)(from + max(at.b, 0)));
        }
        if (first == (int32_t)threadIdx.y) {
            by = angles_of<is_interleaved>(args, rotated, position);
            to = find_place(args, batch, slots, kv, t);
            if (!to.is_real)
                return;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int32_t head = first + i * n_rows;
            uint16_t *out;
            if (find_head(&out, args, kv, to, t, head))
                write_columns<is_interleaved, DTYPE>(out, pick(head < n_rotated, rotated, plain),
                                                     a[i], b[i], by, args.rotary_dim);
        }
    }
}

/* ---- any rotary_dim: one column at a time ---- */

static __device__ __forceinline__ float turned_column(const uint16_t *from, int32_t d,
                                                      const float *cosines, const float *sines,
                                                      int32_t rotary_dim, bool is_interleaved)
{
    float x = mil_widen(from[d]);
    if (d >= rotary_dim)
        return x;
    int32_t half = rotary_dim / 2;
    bool is_first = is_interleaved ? d % 2 == 0 : d < half;
    int32_t apart = is_interleaved ? 1 : half;
    int32_t angle = is_interleaved ? d / 2 : d % half;
    float other = mil_widen(from[is_first ? d + apart : d - apart]);
    float product = other * sines[angle];
    return fmaf(x, cosines[angle], is_first ? -product : product);
}

template <mil_dtype DTYPE>
static __global__ void __launch_bounds__(THREADS)
    rope_any_kernel(const __grid_constant__ mil_rope_write_args args,
                    const __grid_constant__ mil_batch batch,
                    const __grid_constant__ mil_slots slots, const __grid_constant__ mil_kv kv)
{
    mil_let_next_start();
    mil_wait_for_previous();
    int32_t t = (int32_t)blockIdx.x;
    int32_t D = kv.head_dim, n_rotated = args.n_heads + kv.n_kv_heads;
    int32_t n_heads = n_rotated + kv.n_kv_heads;
    const uint16_t *row = (const uint16_t *)args.qkv + (int64_t)t * n_heads * D;
    place to = find_place(args, batch, slots, kv, t);
    if (!to.is_real)
        return;
    int64_t angle = (int64_t)max(batch.positions[t], 0) * (args.rotary_dim / 2);
    const float *cosines = args.cos_table + angle, *sines = args.sin_table + angle;
    for (int32_t i = (int32_t)threadIdx.x; i < n_heads * D; i += (int32_t)blockDim.x) {
        int32_t head = i / D, d = i % D;
        uint16_t *out;
        int32_t rotary_dim = head < n_rotated ? args.rotary_dim : 0;
        if (find_head(&out, args, kv, to, t, head))
            out[d] = mil_round<DTYPE>(turned_column(row + (int64_t)head * D, d, cosines, sines,
                                                    rotary_dim, args.is_interleaved));
    }
}

/* ---- launch ---- */

/* Vectors neither split a half nor a pair, and every vector is aligned. */
static bool is_vector_shape(int32_t D, int32_t rotary_dim, bool is_interleaved)
{
    return D % VECTOR == 0 && rotary_dim % (is_interleaved ? VECTOR : 2 * VECTOR) == 0;
}

template <mil_dtype DTYPE>
static mil_status launch(mil_context *context, const mil_rope_write_args *args)
{
    const mil_queue *queue = context->queue;
    const mil_kv *kv = args->kv;
    int32_t n_tokens = args->batch->header->bucket_tokens;
    int32_t n_heads = args->n_heads + 2 * kv->n_kv_heads;
    if (n_tokens == 0)
        return MIL_OK;
    if (!is_vector_shape(kv->head_dim, args->rotary_dim, args->is_interleaved))
        return mil_launch(queue, "rope_write", rope_any_kernel<DTYPE>, dim3(n_tokens),
                          dim3(THREADS), 0, *args, *args->batch, *args->slots, *kv);
    int32_t per_head = (kv->head_dim + 2 * VECTOR - 1) / (2 * VECTOR);
    int32_t wanted = (n_heads + AT_ONCE - 1) / AT_ONCE;
    int32_t most = THREADS / per_head;
    return mil_launch(queue, "rope_write",
                      args->is_interleaved ? rope_kernel<true, DTYPE> : rope_kernel<false, DTYPE>,
                      dim3(n_tokens), dim3(per_head, wanted < most ? wanted : most), 0, *args,
                      *args->batch, *args->slots, *kv);
}

extern "C" mil_status mil_cuda_rope_write(mil_context *context, const mil_rope_write_args *args)
{
    return args->kv->dtype == MIL_DTYPE_F16 ? launch<MIL_DTYPE_F16>(context, args)
                                            : launch<MIL_DTYPE_BF16>(context, args);
}
