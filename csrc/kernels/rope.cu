/* rope_write: split qkv into heads, rotate q and k by position, round to bfloat16, write q in place
 * of its token and k, v into the row of the page that the sequence's table names.
 *   a' = bf16(fma(a, cos, -(b sin)))    b' = bf16(fma(b, cos, a sin))
 * Pairs (a, b) are (d, d + rotary_dim / 2), or (2 i, 2 i + 1) where interleaved; columns from
 * rotary_dim on and v are copied. RoPE: Su et al. 2021, halves as Hugging Face lays them out.
 *
 * qkv [T, (N + 2 K) D] bf16; q [T, N D] bf16; tables [max_position, rotary_dim / 2] fp32; pages
 * [page][K][P][D] bf16. Bound by bytes: each value read once and written once. Rows past the
 * batch's tokens write nothing. */
#include "kernels/cuda.h"

#include "kernels/common.cuh"

#define THREADS 256 /* at most; one block a token */
#define VECTOR 8    /* bf16 of one 16-byte access */
#define AT_ONCE 2   /* heads of one thread in flight, two vectors each */

/* ---- where a token's values come from and go ---- */

typedef struct place {
    bool is_real;    /* a token of the batch */
    int32_t angle;   /* its row of the tables */
    uint16_t *k, *v; /* its row in page and layer, of kv head 0; NULL: nowhere */
} place;

/* The last sequence that begins at or before token t: the one that holds it. Chunks lie in
 * [n_decode, n_seqs); a decode row's sequence is its own index. */
static __device__ __forceinline__ int32_t sequence_of(const mil_batch &batch, int32_t t,
                                                      int32_t n_decode, int32_t n_seqs)
{
    if (t < n_decode)
        return t;
    int32_t low = n_decode, high = n_seqs;
    while (low + 1 < high) {
        int32_t middle = (low + high) / 2;
        if (batch.query_indptr[middle] <= t)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static __device__ __forceinline__ place find_place(const mil_rope_write_args &args,
                                                   const mil_batch &batch, const mil_slots &slots,
                                                   const mil_kv &kv, int32_t t)
{
    place to = {};
    const mil_plan_header *counts = batch.counts;
    int32_t angle = batch.positions[t];
    to.is_real = t < counts->n_tokens;
    if (!to.is_real)
        return to;
    to.angle = max(angle, 0);
    int32_t s = sequence_of(batch, t, counts->n_decode, counts->n_seqs);
    int32_t slot = batch.seq_slot[s];
    int32_t position = batch.kv_lengths[s] - batch.query_indptr[s + 1] + t;
    int32_t index = position / kv.page_size;
    if (position < 0 || index >= slots.max_pages || (uint32_t)slot >= (uint32_t)slots.n_slots)
        return to;
    int32_t page = slots.page_table[(int64_t)slot * slots.max_pages + index];
    if ((uint32_t)page >= (uint32_t)kv.n_pages)
        return to;
    int64_t row =
        args.layer * kv.layer_elements +
        ((int64_t)page * kv.n_kv_heads * kv.page_size + position % kv.page_size) * kv.head_dim;
    to.k = kv.k + row;
    to.v = kv.v + row;
    return to;
}

/* Where head `head` of q, k, v in a row goes; NULL: nowhere. */
static __device__ __forceinline__ uint16_t *
head_of(const mil_rope_write_args &args, const mil_kv &kv, const place &to, int32_t t, int32_t head)
{
    int32_t N = args.n_heads, K = kv.n_kv_heads;
    if (head < N)
        return args.q + ((int64_t)t * N + head) * kv.head_dim;
    bool is_v = head >= N + K;
    uint16_t *base = is_v ? to.v : to.k;
    int64_t kv_head = head - N - (is_v ? K : 0);
    return base == nullptr ? nullptr : base + kv_head * kv.page_size * kv.head_dim;
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

/* a and b [VECTOR] by the angles of columns d .. of the tables' row. */
static __device__ __forceinline__ void turn_halves(float (&a)[VECTOR], float (&b)[VECTOR],
                                                   const float *cosines, const float *sines)
{
#pragma unroll
    for (int i = 0; i < VECTOR; i += 4) {
        float4 c4 = __ldg((const float4 *)(cosines + i)), s4 = __ldg((const float4 *)(sines + i));
        const float c[4] = {c4.x, c4.y, c4.z, c4.w}, s[4] = {s4.x, s4.y, s4.z, s4.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float x = a[i + j], y = b[i + j];
            a[i + j] = fmaf(x, c[j], -(y * s[j]));
            b[i + j] = fmaf(y, c[j], x * s[j]);
        }
    }
}

static __device__ __forceinline__ void turn_pairs(float (&x)[VECTOR], const float *cosines,
                                                  const float *sines)
{
    float4 c4 = __ldg((const float4 *)cosines), s4 = __ldg((const float4 *)sines);
    const float c[4] = {c4.x, c4.y, c4.z, c4.w}, s[4] = {s4.x, s4.y, s4.z, s4.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float even = x[2 * i], odd = x[2 * i + 1];
        x[2 * i] = fmaf(even, c[i], -(odd * s[i]));
        x[2 * i + 1] = fmaf(odd, c[i], even * s[i]);
    }
}

/* Rows of the tables are a multiple of 4 floats, so their vectors are aligned: rotary_dim % 16 == 0
 * for halves, % 8 for pairs. */
template <bool is_interleaved>
static __device__ __forceinline__ void write_columns(uint16_t *to, columns at, const uint4 &in_a,
                                                     const uint4 &in_b, const float *cosines,
                                                     const float *sines, int32_t rotary_dim)
{
    float a[VECTOR], b[VECTOR];
    mil_load8(a, &in_a);
    mil_load8(b, &in_b);
    if (!is_interleaved && at.is_turned)
        turn_halves(a, b, cosines + at.a, sines + at.a);
    if (is_interleaved && at.is_turned && at.a < rotary_dim)
        turn_pairs(a, cosines + at.a / 2, sines + at.a / 2);
    if (is_interleaved && at.is_turned && at.b >= 0 && at.b < rotary_dim)
        turn_pairs(b, cosines + at.b / 2, sines + at.b / 2);
    mil_store8(to + at.a, a);
    if (at.b >= 0)
        mil_store8(to + at.b, b);
}

/* Block (ceil(D / 16), heads at once), one token. qkv is asked for before the token's place is
 * known: the place is a chain of three loads. */
template <bool is_interleaved>
static __global__ void __launch_bounds__(THREADS)
    rope_kernel(const __grid_constant__ mil_rope_write_args args,
                const __grid_constant__ mil_batch batch, const __grid_constant__ mil_slots slots,
                const __grid_constant__ mil_kv kv)
{
    mil_let_next_start();
    mil_wait_for_previous();
    int32_t t = (int32_t)blockIdx.x;
    int32_t D = kv.head_dim, n_rotated = args.n_heads + kv.n_kv_heads;
    int32_t n_heads = n_rotated + kv.n_kv_heads, n_rows = (int32_t)blockDim.y;
    const uint16_t *row = (const uint16_t *)args.qkv + (int64_t)t * n_heads * D;
    const columns turned = columns_of<is_interleaved>(threadIdx.x, D, args.rotary_dim, false);
    const columns plain = columns_of<is_interleaved>(threadIdx.x, D, args.rotary_dim, true);
    place to = {};
    for (int32_t first = (int32_t)threadIdx.y; first < n_heads; first += AT_ONCE * n_rows) {
        uint4 a[AT_ONCE], b[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int32_t head = min(first + i * n_rows, n_heads - 1);
            const columns at = pick(head < n_rotated, turned, plain);
            const uint16_t *from = row + (int64_t)head * D;
            a[i] = __ldcg((const uint4 *)(from + at.a));
            b[i] = __ldcg((const uint4 *)(from + max(at.b, 0)));
        }
        if (first == (int32_t)threadIdx.y)
            to = find_place(args, batch, slots, kv, t);
        if (!to.is_real)
            return;
        const float *cosines = args.cos_table + (int64_t)to.angle * (args.rotary_dim / 2);
        const float *sines = args.sin_table + (int64_t)to.angle * (args.rotary_dim / 2);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int32_t head = first + i * n_rows;
            uint16_t *out = head < n_heads ? head_of(args, kv, to, t, head) : nullptr;
            if (out != nullptr)
                write_columns<is_interleaved>(out, pick(head < n_rotated, turned, plain), a[i],
                                              b[i], cosines, sines, args.rotary_dim);
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
    const float *cosines = args.cos_table + (int64_t)to.angle * (args.rotary_dim / 2);
    const float *sines = args.sin_table + (int64_t)to.angle * (args.rotary_dim / 2);
    for (int32_t i = (int32_t)threadIdx.x; i < n_heads * D; i += (int32_t)blockDim.x) {
        int32_t head = i / D, d = i % D;
        uint16_t *out = head_of(args, kv, to, t, head);
        int32_t rotary_dim = head < n_rotated ? args.rotary_dim : 0;
        if (out != nullptr)
            out[d] = mil_round(turned_column(row + (int64_t)head * D, d, cosines, sines, rotary_dim,
                                             args.is_interleaved));
    }
}

/* ---- launch ---- */

/* Vectors neither split a half nor a pair, and every vector is aligned. */
static bool is_vector_shape(int32_t D, int32_t rotary_dim, bool is_interleaved)
{
    return D % VECTOR == 0 && rotary_dim % (is_interleaved ? VECTOR : 2 * VECTOR) == 0;
}

extern "C" mil_status mil_cuda_rope_write(mil_context *context, const mil_rope_write_args *args)
{
    const mil_queue *queue = context->queue;
    const mil_kv *kv = args->kv;
    int32_t n_tokens = args->batch->header->bucket_tokens;
    int32_t n_heads = args->n_heads + 2 * kv->n_kv_heads;
    if (n_tokens == 0)
        return MIL_OK;
    if (!is_vector_shape(kv->head_dim, args->rotary_dim, args->is_interleaved))
        return mil_launch(queue, "rope_write", rope_any_kernel, dim3(n_tokens), dim3(THREADS), 0,
                          *args, *args->batch, *args->slots, *kv);
    int32_t per_head = (kv->head_dim + 2 * VECTOR - 1) / (2 * VECTOR);
    int32_t wanted = (n_heads + AT_ONCE - 1) / AT_ONCE;
    int32_t most = THREADS / per_head;
    return mil_launch(queue, "rope_write",
                      args->is_interleaved ? rope_kernel<true> : rope_kernel<false>, dim3(n_tokens),
                      dim3(per_head, wanted < most ? wanted : most), 0, *args, *args->batch,
                      *args->slots, *kv);
}
