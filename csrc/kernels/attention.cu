/* Flash attention over paged KV, portable path: prefill chunks and split decode rows in one kernel.
 *
 * out[t, n] = sum_j softmax_j(scale * q[t, n] . k[j]) v[j] over the keys that query t sees; softcap
 * and window as backend.h says. q: [T, N, D] and pages [page][kv head][row][D] of bf16, or of f16;
 * out: [T, N, D] bf16, over pages of f16 either. Scores, running maximum, sum and O are fp32; P is
 * rounded as K and V are, and the sum is the tensor cores' sum of those rounded P (a column of ones
 * beside V), so that both halves of the quotient round alike.
 *
 * A persistent grid walks attention.cuh's list by attention_stream.cuh. Tiles of more than 16 rows:
 * a warp has 16 rows and all keys. Tiles of at most 16 rows (decode rows, tails): warps share the
 * keys of a block for S and the columns of O for P V. Either way an element of S, P or O is the
 * same chain of the same operations, keys ascending: a row's bits depend on its length and on
 * whether its sequence has one query (then its keys may be split), nothing else.
 *
 * FlashAttention-2: Dao 2023. Bound by tensor cores (prefill) or by bytes of KV (decode): on an
 * H200 0.42 of cuDNN at 8,192 tokens of D 128, 0.70 of 4.55 TB/s for 64 rows of 1,024 keys
 * (2026-11-24, bench_ops). */
#include "ops/backend.h"

#include "kernels/attention_stream.cuh"

/* Two ones of the pages' dtype. */
template <class Shape>
static __device__ __forceinline__ uint32_t ones()
{
    return Shape::DTYPE == MIL_DTYPE_F16 ? 0x3c003c00u : 0x3f803f80u;
}

/* ---- q ---- */

template <class Shape>
static __device__ __forceinline__ void load_q(uint32_t (&q)[Shape::D_STEPS][4],
                                              const attention_params &p, const queued_item *queued,
                                              int32_t row)
{
    const int32_t lane = threadIdx.x % MIL_WARP, last = queued->item.n_rows - 1;
    const uint16_t *from[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
        from[i] = p.q +
                  mil_attention_row(&queued->item, queued->kv_head,
                                    min(row + lane / 4 + 8 * i, last), p.group, p.n_heads) *
                      p.head_dim +
                  2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < Shape::D_STEPS; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int32_t column = 16 * i + 8 * (j / 2);
            q[i][j] = column < p.head_dim ? *(const uint32_t *)(from[j % 2] + column) : 0;
        }
}

/* Chunk c of row r lies at chunk c ^ (r % 8). */
template <class Shape>
static __device__ __forceinline__ void share_q(char *q, const attention_params &p,
                                               const queued_item *queued, int32_t n_rows)
{
    for (int32_t i = threadIdx.x; i < n_rows * Shape::CHUNKS; i += Shape::THREADS) {
        const int32_t row = i / Shape::CHUNKS, chunk = i % Shape::CHUNKS;
        const int64_t from =
            mil_attention_row(&queued->item, queued->kv_head, min(row, queued->item.n_rows - 1),
                              p.group, p.n_heads) *
                p.head_dim +
            8 * chunk;
        uint4 bits = make_uint4(0, 0, 0, 0);
        if (8 * chunk < p.head_dim)
            bits = *(const uint4 *)(p.q + from);
        *(uint4 *)(q + (row * Shape::CHUNKS + (chunk ^ (row % 8))) * 16) = bits;
    }
}

/* ---- one block of keys ---- */

/* Where a lane points ldmatrix in 16 keys x 16 columns: of its four 8 x 8 matrices the second is
 * the right neighbour (K, whose rows are B's columns) or the one below (V). */
template <class Shape>
static __device__ __forceinline__ uint32_t k_lane()
{
    const uint32_t thread = thread_index();
    return (thread / 16 % 2 * 8 + thread % 8) * Shape::STRIDE + thread / 8 % 2 * 16;
}

template <class Shape>
static __device__ __forceinline__ uint32_t v_lane()
{
    const uint32_t thread = thread_index();
    return thread % 16 * Shape::STRIDE + thread / 16 % 2 * 16;
}

/* s[2 i], s[2 i + 1] = q . keys 16 i ..; k: this lane's address in the first 16 keys. */
template <class Shape, int N_KEYS>
static __device__ __forceinline__ void find_scores(float (&s)[N_KEYS / 8][4],
                                                   const uint32_t (&q)[Shape::D_STEPS][4],
                                                   const char *shared_q, const char *k)
{
    const int32_t lane = threadIdx.x % MIL_WARP;
#pragma unroll
    for (int i = 0; i < N_KEYS / 8; i++)
        s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0.0f;
#pragma unroll
    for (int d = 0; d < Shape::D_STEPS; d++) {
        uint32_t a[4] = {q[d][0], q[d][1], q[d][2], q[d][3]};
        if (Shape::HAS_Q)
            mil_ldmatrix4(a, shared_q + (((2 * d + lane / 16) ^ (lane % 8)) * 16));
#pragma unroll
        for (int i = 0; i < N_KEYS / 16; i++) {
            uint32_t b[4];
            mil_ldmatrix4(b, k + i * 16 * Shape::STRIDE + d * 32);
            mil_mma<Shape::DTYPE>(s[2 * i], a, b[0], b[1]);
            mil_mma<Shape::DTYPE>(s[2 * i + 1], a, b[2], b[3]);
        }
    }
}

/* Keys that a row sees: end - window <= key < end. */
static __device__ __forceinline__ int32_t end_of(const attention_params &p,
                                                 const mil_attention_item *item, int32_t row)
{
    const uint32_t packed = (uint32_t)(item->first_row + min(row, item->n_rows - 1));
    return item->past + (int32_t)(packed / (uint32_t)p.group) + 1;
}

static __device__ __forceinline__ int32_t first_of(const attention_params &p, int32_t end)
{
    return p.window > 0 ? end - p.window : 0;
}

/* A warp's 16 rows. Their own ends are worked out again in the few blocks that need them. */
typedef struct row_limits {
    const mil_attention_item *item;
    int32_t least, greatest; /* of end_of; greatest is 0 where the tile has no such rows */
} row_limits;

/* Cap, mask, and the largest of each row, times factor. `key` is the first of s. */
template <int N>
static __device__ __forceinline__ void
shape_scores(float (&s)[N][4], float (&top)[2], const attention_params &p, const row_limits &limits,
             int32_t row, int32_t key)
{
    const int32_t column = key + 2 * (int32_t)(thread_index() % 4);
    if (p.scale.cap_out != 0.0f)
#pragma unroll
        for (int i = 0; i < N; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                s[i][j] = mil_attention_cap(p.scale, s[i][j]);
    if (key + 8 * N > limits.least || key < first_of(p, limits.greatest))
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int32_t own = row + (int32_t)(thread_index() % MIL_WARP) / 4 + 8 * r;
            const int32_t end = end_of(p, limits.item, own), first = first_of(p, end);
#pragma unroll
            for (int i = 0; i < N; i++)
#pragma unroll
                for (int j = 0; j < 2; j++)
                    if (column + 8 * i + j >= end || column + 8 * i + j < first)
                        s[i][2 * r + j] = -INFINITY;
        }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        top[r] = fmaxf(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
        for (int i = 1; i < N; i++)
            top[r] = fmaxf(top[r], fmaxf(s[i][2 * r], s[i][2 * r + 1]));
        top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
        top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2)) * p.scale.factor;
    }
}

template <class Shape>
static __device__ __forceinline__ uint32_t weights(float low, float high, float factor,
                                                   float maximum)
{
    return mil_pack2<Shape::DTYPE>(mil_exp2(fmaf(low, factor, -maximum)),
                                   mil_exp2(fmaf(high, factor, -maximum)));
}

/* The state of a warp's rows. */
template <class Shape>
struct row_state {
    float o[2 * Shape::D_STEPS][4];
    float sum[4]; /* [0] and [2], of the lane's two rows */
    float maximum[2];
    float shrink[2]; /* what a new maximum leaves of O and sum */
};

template <class Shape>
static __device__ __forceinline__ void raise(row_state<Shape> &state, int r, float top)
{
    const float maximum = fmaxf(state.maximum[r], top);
    state.shrink[r] = mil_exp2(state.maximum[r] - maximum);
    state.maximum[r] = maximum;
}

/* Multiplying by one changes nothing, so warps with no new maximum skip it. */
template <class Shape>
static __device__ __forceinline__ void shrink(row_state<Shape> &state)
{
    if (!__any_sync(0xffffffffu, state.shrink[0] != 1.0f || state.shrink[1] != 1.0f))
        return;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        state.sum[j] *= state.shrink[j / 2];
#pragma unroll
        for (int i = 0; i < 2 * Shape::D_STEPS; i++)
            state.o[i][j] *= state.shrink[j / 2];
    }
}

/* P of a warp's 16 rows and 64 keys, as A fragments. */
template <class Shape>
static __device__ __forceinline__ void
find_weights(row_state<Shape> &state, uint32_t (&weight)[Shape::KEY_STEPS][4],
             const uint32_t (&q)[Shape::D_STEPS][4], const attention_params &p,
             const row_limits &limits, const char *shared_q, const char *k, int32_t key)
{
    float s[MIL_ATTENTION_BLOCK / 8][4], top[2];
    find_scores<Shape, MIL_ATTENTION_BLOCK>(s, q, shared_q, k);
    shape_scores(s, top, p, limits, (int32_t)thread_index() / MIL_WARP * 16, key);
    raise(state, 0, top[0]);
    raise(state, 1, top[1]);
#pragma unroll
    for (int i = 0; i < Shape::KEY_STEPS; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float (&from)[4] = s[2 * i + j / 2];
            const int r = j % 2;
            weight[i][j] =
                weights<Shape>(from[2 * r], from[2 * r + 1], p.scale.factor, state.maximum[r]);
        }
}

/* The same P by all warps, left in shared memory: S_WARPS of them have 16 keys each. */
template <class Shape>
static __device__ __forceinline__ void
share_weights(row_state<Shape> &state, attention_shares *shares,
              const uint32_t (&q)[Shape::D_STEPS][4], const attention_params &p,
              const row_limits &limits, const char *shared_q, const char *k, int32_t key)
{
    const int32_t thread = (int32_t)thread_index();
    const int32_t lane = thread % MIL_WARP, warp = thread / MIL_WARP;
    float s[2][4] = {};
    if (warp < S_WARPS) {
        float top[2];
        find_scores<Shape, 16>(s, q, shared_q, k + warp * 16 * Shape::STRIDE);
        shape_scores(s, top, p, limits, 0, key + 16 * warp);
        if (lane % 4 == 0) {
            shares->maximum[warp][lane / 4] = top[0];
            shares->maximum[warp][lane / 4 + 8] = top[1];
        }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = shares->maximum[0][lane / 4 + 8 * r];
#pragma unroll
        for (int i = 1; i < S_WARPS; i++)
            top = fmaxf(top, shares->maximum[i][lane / 4 + 8 * r]);
        raise(state, r, top);
    }
    if (warp < S_WARPS)
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int r = 0; r < 2; r++)
                *(uint32_t *)&shares
                     ->p[(lane / 4 + 8 * r) * P_STRIDE + 16 * warp + 8 * i + 2 * (lane % 4)] =
                    weights<Shape>(s[i][2 * r], s[i][2 * r + 1], p.scale.factor, state.maximum[r]);
}

/* o0, o1 += P V for 16 columns; v: this lane's address in the first 16 keys at those columns. */
template <class Shape>
static __device__ __forceinline__ void add_values(float (&o0)[4], float (&o1)[4],
                                                  const uint32_t (&weight)[4], const char *v, int i)
{
    uint32_t b[4];
    mil_ldmatrix4_trans(b, v + i * 16 * Shape::STRIDE);
    mil_mma<Shape::DTYPE>(o0, weight, b[0], b[1]);
    mil_mma<Shape::DTYPE>(o1, weight, b[2], b[3]);
}

template <class Shape>
static __device__ __forceinline__ void
add_weights(row_state<Shape> &state, const uint32_t (&weight)[Shape::KEY_STEPS][4], const char *v)
{
    shrink(state);
#pragma unroll
    for (int i = 0; i < Shape::KEY_STEPS; i++) {
        mil_mma<Shape::DTYPE>(state.sum, weight[i], ones<Shape>(), ones<Shape>());
#pragma unroll
        for (int d = 0; d < Shape::D_STEPS; d++)
            add_values<Shape>(state.o[2 * d], state.o[2 * d + 1], weight[i], v + 32 * d, i);
    }
}

/* Columns 16 (warp + d WARPS) on of a small tile, in o[2 d] and o[2 d + 1]. */
template <class Shape>
static __device__ __forceinline__ void
add_shared_weights(row_state<Shape> &state, const attention_shares *shares, const char *v)
{
    const int32_t thread = (int32_t)thread_index();
    const int32_t lane = thread % MIL_WARP, warp = thread / MIL_WARP;
    shrink(state);
#pragma unroll
    for (int i = 0; i < Shape::KEY_STEPS; i++) {
        uint32_t weight[4];
        mil_ldmatrix4(weight, &shares->p[lane % 16 * P_STRIDE + 16 * i + 8 * (lane / 16)]);
        mil_mma<Shape::DTYPE>(state.sum, weight, ones<Shape>(), ones<Shape>());
#pragma unroll
        for (int d = 0; d < Shape::OWN_STEPS; d++)
            if (warp + d * Shape::WARPS < Shape::D_STEPS)
                add_values<Shape>(state.o[2 * d], state.o[2 * d + 1], weight,
                                  v + 32 * (warp + d * Shape::WARPS), i);
    }
}

/* ---- results ---- */

/* 16 columns from `column` on of the lane's two rows; a neighbour's half makes each store 8 bytes.
 */
template <class Shape>
static __device__ __forceinline__ void
store_results(uint16_t *const (&to)[2], const float (&o0)[4], const float (&o1)[4],
              const float (&inverse)[2], int32_t column, int32_t head_dim, mil_dtype out_dtype)
{
    const int32_t lane = threadIdx.x % MIL_WARP;
    const bool is_odd = (lane & 1) != 0;
    column += (is_odd ? 8 : 0) + 2 * (lane & 2);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const uint32_t left = mil_attention_pack2<Shape::DTYPE>(
            o0[2 * r] * inverse[r], o0[2 * r + 1] * inverse[r], out_dtype);
        const uint32_t right = mil_attention_pack2<Shape::DTYPE>(
            o1[2 * r] * inverse[r], o1[2 * r + 1] * inverse[r], out_dtype);
        const uint32_t got = __shfl_xor_sync(0xffffffffu, is_odd ? left : right, 1);
        if (to[r] != NULL && column < head_dim)
            *(uint2 *)(to[r] + column) = is_odd ? make_uint2(got, right) : make_uint2(left, got);
    }
}

static __device__ __forceinline__ void store_partials(float *const (&to)[2], const float (&o0)[4],
                                                      const float (&o1)[4], int32_t column,
                                                      int32_t head_dim)
{
    column += 2 * (threadIdx.x % 4);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (to[r] != NULL && column < head_dim)
            *(float2 *)(to[r] + column) = make_float2(o0[2 * r], o0[2 * r + 1]);
        if (to[r] != NULL && column + 8 < head_dim)
            *(float2 *)(to[r] + column + 8) = make_float2(o1[2 * r], o1[2 * r + 1]);
    }
}

/* A tile of more than 16 rows: this warp's 16. */
template <class Shape>
static __device__ __forceinline__ void finish_rows(const row_state<Shape> &state,
                                                   const attention_params &p,
                                                   const queued_item *queued, int32_t row)
{
    const int32_t lane = threadIdx.x % MIL_WARP;
    const float inverse[2] = {1.0f / state.sum[0], 1.0f / state.sum[2]};
    uint16_t *to[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int32_t own = row + lane / 4 + 8 * r;
        to[r] = own >= queued->item.n_rows
                    ? NULL
                    : p.out + mil_attention_row(&queued->item, queued->kv_head, own, p.group,
                                                p.n_heads) *
                                  p.head_dim;
    }
#pragma unroll
    for (int i = 0; i < Shape::D_STEPS; i++)
        store_results<Shape>(to, state.o[2 * i], state.o[2 * i + 1], inverse, 16 * i, p.head_dim,
                             p.out_dtype);
}

/* A tile of at most 16 rows: this warp's columns; and if it is one of several splits, the sum of
 * all splits by the block that ends last. */
template <class Shape>
static __device__ __forceinline__ void
finish_columns(const row_state<Shape> &state, const attention_params &p, attention_shared *shared,
               const queued_item *queued)
{
    const int32_t lane = threadIdx.x % MIL_WARP, warp = threadIdx.x / MIL_WARP;
    const mil_attention_item *item = &queued->item;
    const float inverse[2] = {1.0f / state.sum[0], 1.0f / state.sum[2]};
    const bool is_part = item->n_splits > 1;
    const int64_t first_partial = (int64_t)item->partial * p.n_heads + queued->kv_head * p.group +
                                  item->first_row; /* of row 0 of the tile: these have one query */
    uint16_t *to[2];
    float *part[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int32_t own = lane / 4 + 8 * r;
        const bool is_row = own < item->n_rows;
        const int64_t at = first_partial + (int64_t)item->split * p.n_heads + own;
        to[r] = NULL;
        part[r] = NULL;
        if (is_row && is_part)
            part[r] = p.partials.o + at * p.head_dim;
        if (is_row && !is_part)
            to[r] = p.out +
                    mil_attention_row(item, queued->kv_head, own, p.group, p.n_heads) * p.head_dim;
        if (is_row && is_part && warp == 0 && lane % 4 == 0)
            p.partials.sums[at] = make_float2(state.maximum[r], state.sum[2 * r]);
    }
#pragma unroll
    for (int i = 0; i < Shape::OWN_STEPS; i++) {
        const int32_t column = 16 * (warp + i * Shape::WARPS);
        if (is_part)
            store_partials(part, state.o[2 * i], state.o[2 * i + 1], column, p.head_dim);
        else
            store_results<Shape>(to, state.o[2 * i], state.o[2 * i + 1], inverse, column,
                                 p.head_dim, p.out_dtype);
    }
    if (!is_part ||
        !mil_attention_is_last(&p.counters[(int64_t)item->counter * p.n_kv_heads + queued->kv_head],
                               item->n_splits, &shared->is_last))
        return;
    for (int32_t row = warp; row < item->n_rows; row += Shape::WARPS)
        mil_attention_merge<Shape::DTYPE>(
            p.out + mil_attention_row(item, queued->kv_head, row, p.group, p.n_heads) * p.head_dim,
            p.partials, first_partial + row, p.n_heads, item->n_splits, p.head_dim, p.out_dtype);
}

/* ---- the kernel ---- */

template <class Shape>
static __global__ void __launch_bounds__(Shape::THREADS, Shape::BLOCKS)
    attention_kernel(const __grid_constant__ attention_params p)
{
    extern __shared__ __align__(128) char memory[];
    attention_shared *shared = (attention_shared *)memory;
    attention_shares *shares =
        (attention_shares *)(memory + (Shape::HAS_Q ? Shape::Q_SHARES : Shape::SHARES));
    const int32_t warp = threadIdx.x / MIL_WARP;
    mil_wait_for_previous();
    mil_let_next_start();
    start_stream<Shape>(p, memory);

    uint32_t index = 0; /* of a block of keys in the stream */
    for (uint32_t n = 0;; n++) {
        const queued_item *queued = &shared->items[n % N_AHEAD];
        const int32_t n_rows = queued->item.n_rows;
        if (n_rows == 0)
            break;
        const bool is_small = n_rows <= MIL_ATTENTION_ROWS;
        const int32_t row = is_small ? 0 : 16 * warp;
        const row_limits limits = {&queued->item, end_of(p, &queued->item, row),
                                   row < n_rows ? end_of(p, &queued->item, row + 15) : 0};
        uint32_t q[Shape::D_STEPS][4];
        const char *shared_q =
            memory + Shape::Q + (row + threadIdx.x % 16) * Shape::D * 2; /* this lane's row */
        if (Shape::HAS_Q) {
            __syncthreads(); /* the item before may still be read */
            share_q<Shape>(memory + Shape::Q, p, queued, is_small ? 16 : Shape::ROWS);
        } else {
            load_q<Shape>(q, p, queued, row);
        }
        row_state<Shape> state = {};
        state.maximum[0] = state.maximum[1] = MIL_ATTENTION_NO_MAXIMUM;
        for (int32_t key = queued->key; key < queued->item.key_end; key += MIL_ATTENTION_BLOCK) {
            uint32_t weight[Shape::KEY_STEPS][4];
            const char *k = next_tile<Shape, false>(p, memory, index) + k_lane<Shape>();
            const bool has_work =
                is_small ||
                (key < limits.greatest && key + MIL_ATTENTION_BLOCK > first_of(p, limits.least));
            if (is_small)
                share_weights(state, shares, q, p, limits, shared_q, k, key);
            else if (has_work)
                find_weights(state, weight, q, p, limits, shared_q, k, key);
            const char *v = next_tile<Shape, true>(p, memory, index) + v_lane<Shape>();
            index++;
            if (is_small)
                add_shared_weights(state, shares, v);
            else if (has_work)
                add_weights(state, weight, v);
        }
        if (is_small)
            finish_columns(state, p, shared, queued);
        else if (limits.greatest > 0)
            finish_rows(state, p, queued, row);
    }
}

template <class Shape>
static mil_status launch(mil_context *context, const attention_params &params, int64_t n_blocks)
{
    static_assert(Shape::RING + 2 <= N_AHEAD && (Shape::RING & (Shape::RING - 1)) == 0, "ring");
    static_assert(sizeof(attention_shared) % 16 == 0 && sizeof(attention_shares) % 16 == 0,
                  "align");
    static_assert(!Shape::HAS_Q || Shape::Q_SHARES + sizeof(attention_shares) <= Shape::TILES, "q");
    static_assert(Shape::BYTES <= 99 * 1024, "the smallest chip's shared memory");
    static_assert(Shape::ROWS == mil_attention_tile_rows(Shape::D), "the plan's rows of a tile");
    const mil_queue *queue = context->queue;
    const int64_t most = (int64_t)queue->n_sms * Shape::BLOCKS;
    MIL_CUDA_TRY(cudaFuncSetAttribute(attention_kernel<Shape>,
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::BYTES));
    return mil_launch(queue, "attention", attention_kernel<Shape>,
                      dim3((unsigned)(n_blocks < most ? n_blocks : most)), dim3(Shape::THREADS),
                      Shape::BYTES, params);
}

/* Instances: head size, warps (16 rows each), blocks of an SM, tiles in the ring. */
template <mil_dtype DTYPE>
static mil_status launch_any(mil_context *context, const attention_params &params, int64_t n_blocks)
{
    if (params.head_dim <= 64) /* 128 rows: 128 registers suffice */
        return launch<attention_shape<64, 8, 2, 4, false, DTYPE>>(context, params, n_blocks);
    if (params.head_dim <= 80) /* 96 rows: 168 registers */
        return launch<attention_shape<80, 6, 2, 4, false, DTYPE>>(context, params, n_blocks);
    if (params.head_dim <= 96)
        return launch<attention_shape<96, 6, 2, 4, false, DTYPE>>(context, params, n_blocks);
    if (params.head_dim <= 128)
        return launch<attention_shape<128, 6, 2, 4, false, DTYPE>>(context, params, n_blocks);
    /* 64 rows: O alone is 128 registers */
    return launch<attention_shape<256, 4, 2, 2, true, DTYPE>>(context, params, n_blocks);
}

extern "C" mil_status mil_cuda_attention(mil_context *context, const mil_attention_args *args)
{
    const mil_plan_header *header = args->batch->header;
    const mil_kv *kv = args->kv;
    if (kv->head_dim % 8 != 0 || kv->head_dim > 256 || args->n_heads % kv->n_kv_heads != 0)
        return mil_fail(
            MIL_ERR_UNSUPPORTED,
            "attention: head_dim %d with %d heads over %d kv heads, expected a multiple "
            "of 8 up to 256 and whole groups",
            kv->head_dim, args->n_heads, kv->n_kv_heads);
    if (kv->page_size < 16 || (kv->page_size & (kv->page_size - 1)) != 0)
        return mil_fail(MIL_ERR_UNSUPPORTED,
                        "attention: page size %d, expected a power of two from 16 on",
                        kv->page_size);
    if (mil_attention_is_sm90(context->queue, kv))
        return mil_cuda_attention_sm90(context, args);
    const mil_attention_places places =
        mil_attention_place(context->step_data, context->step_bytes, header->bucket_seqs,
                            args->n_heads, kv->n_kv_heads);
    attention_params params = {};
    params.out = args->out;
    params.q = args->q;
    params.k = kv->k + args->layer * kv->layer_elements;
    params.v = kv->v + args->layer * kv->layer_elements;
    params.page_table = args->slots->page_table;
    params.list = places.list;
    params.items = places.items;
    params.counters = places.counters;
    params.partials = mil_attention_partials_in(context->workspace, context->workspace_bytes,
                                                args->n_heads, kv->head_dim);
    params.n_heads = args->n_heads;
    params.n_kv_heads = kv->n_kv_heads;
    params.group = args->n_heads / kv->n_kv_heads;
    params.head_dim = kv->head_dim;
    while (1 << params.page_shift < kv->page_size)
        params.page_shift++;
    params.page_mask = (uint32_t)kv->page_size - 1;
    params.last_page = (uint32_t)kv->n_pages - 1;
    params.row_bytes = 2 * (uint32_t)kv->head_dim;
    params.head_bytes = params.row_bytes * (uint32_t)kv->page_size;
    params.page_bytes = params.head_bytes * (uint32_t)kv->n_kv_heads;
    params.max_pages = args->slots->max_pages;
    params.window = args->window;
    params.scale = mil_attention_scale_of(args->scale, args->softcap);
    params.out_dtype = args->out_dtype;
    const int64_t n_items =
        mil_attention_most_items(header->bucket_seqs, header->bucket_tokens, params.group,
                                 mil_attention_tiles(args->n_heads, kv->n_kv_heads),
                                 mil_attention_max_splits(kv->n_kv_heads));
    const int64_t n_blocks = n_items * kv->n_kv_heads;
    return kv->dtype == MIL_DTYPE_F16 ? launch_any<MIL_DTYPE_F16>(context, params, n_blocks)
                                      : launch_any<MIL_DTYPE_BF16>(context, params, n_blocks);
}
