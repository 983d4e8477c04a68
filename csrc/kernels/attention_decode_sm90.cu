/* Flash attention over paged KV for sequences of one query, Hopper path: head sizes 64 and 128.
 *
 * The formula, shapes, dtypes and masks of attention.cu; scores, maximum, sum and O in fp32, P
 * rounded to bf16 for P V, its sum taken before the rounding. An item is a split of a row's keys
 * for one kv head, its up to 16 query heads the rows of m16n8k16 products. Of each block of 64 keys
 * a warp has 16 for itself, with a maximum, sum and O of its own, so that warps meet once an item;
 * they are added in warp order, splits in split order: a row's bits depend on its length and window
 * alone.
 *
 * A persistent grid, two blocks an SM, walks the end of attention.cuh's list there and back. One
 * warp of a block keeps the ring full by tensor maps, over the ends of items. Bound by bytes of KV.
 */
#include "ops/backend.h"

#include "kernels/attention_sm90.cuh"

#define N_WARPS 4 /* consumers, each with 16 keys of a block */
#define N_CONSUMERS (N_WARPS * MIL_WARP)
#define N_THREADS (N_CONSUMERS + MIL_WARP)
#define BLOCKS 2   /* of an SM */
#define CONSUMED 1 /* named barrier of the consumers */
#define N_ITEMS 2  /* on their way */

typedef struct queued_item {
    mil_attention_item item; /* n_rows 0: the list has ended */
    int32_t kv_head;
    int32_t key, end; /* its blocks; keys outside first .. end have no weight */
    int32_t first;
} queued_item;

template <int D_>
struct decode_shape {
    static constexpr int D = D_;
    static constexpr int HALVES = D / 64; /* boxes of a block's K or V */
    static constexpr int TILE_BYTES = HALVES * MIL_BOX_BYTES;
    static constexpr int STAGES = 384 / D; /* 96 KiB of K and V */
    static constexpr int Q_BYTES = MIL_ATTENTION_ROWS * D * 2;
    static constexpr int Q = STAGES * 2 * TILE_BYTES;
    static constexpr int O = Q + N_ITEMS * Q_BYTES;
    static constexpr int SHARES = O + MIL_ATTENTION_ROWS * D * 4;
    static constexpr int D_STEPS = D / 16;
};

typedef struct decode_shared {
    queued_item items[N_ITEMS];
    uint64_t q_full[N_ITEMS], q_empty[N_ITEMS];
    uint64_t k_full[6], v_full[6], empty[6];
    float maxima[N_WARPS][MIL_ATTENTION_ROWS];
    float sums[N_WARPS][MIL_ATTENTION_ROWS];
    int32_t is_last;
} decode_shared;

static __device__ __forceinline__ void sync_consumers()
{
    mil_named_sync(CONSUMED, N_CONSUMERS);
}

/* ---- the producer ---- */

/* The n-th item of this block; n_rows 0 at the list's end. */
static __device__ __forceinline__ queued_item find_item(const mil_attention_sm90 &p, uint32_t n)
{
    const uint32_t place = (n & 1) != 0 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int64_t index = (int64_t)n * gridDim.x + place;
    const int32_t n_before = p.places.list->n_chunk_items;
    queued_item queued = {};
    if (index >= (int64_t)(p.places.list->n_items - n_before) * p.n_kv_heads)
        return queued;
    queued.item = p.places.items[n_before + (uint32_t)index / (uint32_t)p.n_kv_heads];
    queued.kv_head = (int32_t)((uint32_t)index % (uint32_t)p.n_kv_heads);
    queued.end = queued.item.key_end;
    queued.first = p.window > 0 ? max(queued.item.first_limit - p.window, 0) : 0;
    /* A split that lies before the window keeps one block, of no weight. */
    queued.key = max(queued.item.key_begin, queued.first & -MIL_BOX_KEYS);
    queued.key = min(queued.key, (queued.end - 1) & -MIL_BOX_KEYS);
    return queued;
}

/* Its rows are consecutive heads of one query. */
template <class Shape>
static __device__ __forceinline__ void send_query(const mil_attention_sm90 &p,
                                                  const queued_item &queued, uint32_t memory,
                                                  decode_shared *shared, uint32_t n)
{
    const uint32_t slot = n % N_ITEMS, full = mil_shared_address(&shared->q_full[slot]);
    mil_barrier_wait(mil_shared_address(&shared->q_empty[slot]), (n / N_ITEMS & 1) ^ 1);
    if (threadIdx.x % MIL_WARP != 0)
        return;
    const uint32_t n_bytes = queued.item.n_rows * Shape::D * 2;
    shared->items[slot] = queued;
    mil_barrier_expect(full, n_bytes);
    if (n_bytes > 0)
        mil_copy_bulk(memory + Shape::Q + slot * Shape::Q_BYTES,
                      p.q + mil_attention_row(&queued.item, queued.kv_head, 0, p.group, p.n_heads) *
                                Shape::D,
                      n_bytes, full);
}

template <class Shape>
static __device__ __forceinline__ void produce(const mil_attention_sm90 &p,
                                               const CUtensorMap *k_map, const CUtensorMap *v_map,
                                               uint32_t memory, decode_shared *shared)
{
    const int32_t lane = threadIdx.x % MIL_WARP;
    uint32_t block = 0;
    for (uint32_t n = 0;; n++) {
        const queued_item queued = find_item(p, n);
        send_query<Shape>(p, queued, memory, shared, n);
        if (queued.item.n_rows == 0)
            return;
        const int32_t first_box = queued.key / MIL_BOX_KEYS;
        const int32_t end_box = (queued.end - 1) / MIL_BOX_KEYS + 1;
        int32_t rows = 0; /* of 32 boxes, one a lane */
        for (int32_t box = first_box; box < end_box; box++, block++) {
            const int32_t known = (box - first_box) % MIL_WARP;
            if (known == 0)
                rows = mil_attention_box_row(p, queued.item.slot, queued.kv_head,
                                             min(box + lane, end_box - 1));
            const int32_t row = __shfl_sync(0xffffffffu, rows, known);
            const uint32_t stage = block % Shape::STAGES;
            mil_barrier_wait(mil_shared_address(&shared->empty[stage]),
                             (block / Shape::STAGES & 1) ^ 1);
            if (lane == 0)
#pragma unroll
                for (int is_v = 0; is_v < 2; is_v++) {
                    const uint32_t full =
                        mil_shared_address(is_v ? &shared->v_full[stage] : &shared->k_full[stage]);
                    mil_barrier_expect(full, Shape::TILE_BYTES);
#pragma unroll
                    for (int half = 0; half < Shape::HALVES; half++)
                        mil_copy_box(memory + (2 * stage + is_v) * Shape::TILE_BYTES +
                                         half * MIL_BOX_BYTES,
                                     is_v ? v_map : k_map, 64 * half, row, full);
                }
            __syncwarp();
        }
    }
}

/* ---- a block of keys, by one warp ---- */

template <class Shape>
struct row_state {
    float o[2 * Shape::D_STEPS][4];
    float maximum[2], sum[2]; /* of the lane's two rows; sum: of its own keys */
};

/* The 16-byte chunk of a row of a tile, as the tensor map's swizzle placed it. */
static __device__ __forceinline__ uint32_t chunk_at(uint32_t tile, uint32_t row, uint32_t chunk)
{
    return tile + chunk / 8 * MIL_BOX_BYTES + row * MIL_BOX_ROW + ((chunk ^ row) % 8) * 16;
}

template <class Shape>
static __device__ __forceinline__ void
find_scores(float (&s)[2][4], const uint32_t (&q)[Shape::D_STEPS][4], uint32_t k)
{
    const uint32_t lane = threadIdx.x % MIL_WARP;
    const uint32_t row = threadIdx.x / MIL_WARP * 16 + lane / 16 * 8 + lane % 8;
    float other[2][4] = {}; /* of every second step: a shorter chain */
#pragma unroll
    for (int i = 0; i < 8; i++)
        s[i / 4][i % 4] = 0.0f;
#pragma unroll
    for (int d = 0; d < Shape::D_STEPS; d++) {
        uint32_t b[4];
        mil_ldmatrix4_at(b, chunk_at(k, row, 2 * d + lane / 8 % 2));
        mil_mma(d % 2 != 0 ? other[0] : s[0], q[d], b[0], b[1]);
        mil_mma(d % 2 != 0 ? other[1] : s[1], q[d], b[2], b[3]);
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        s[i / 4][i % 4] += other[i / 4][i % 4];
}

/* Whether the lane's keys key + 8 i + j count. */
static __device__ __forceinline__ bool is_seen(const queued_item *queued, int32_t key)
{
    return key >= queued->first && key < queued->end;
}

/* s becomes the weights as an A fragment; O and sum shrink where the maximum grows. */
template <class Shape>
static __device__ __forceinline__ void find_weights(uint32_t (&weight)[4], float (&s)[2][4],
                                                    row_state<Shape> &state, float factor)
{
    float shrink[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = fmaxf(fmaxf(s[0][2 * r], s[0][2 * r + 1]), fmaxf(s[1][2 * r], s[1][2 * r + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        const float maximum = fmaxf(state.maximum[r], top * factor);
        shrink[r] = mil_exp2(state.maximum[r] - maximum);
        state.maximum[r] = maximum;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float &x = s[i / 2][2 * r + i % 2];
            x = mil_exp2(fmaf(x, factor, -maximum));
        }
        const float sum = (s[0][2 * r] + s[0][2 * r + 1]) + (s[1][2 * r] + s[1][2 * r + 1]);
        state.sum[r] = fmaf(state.sum[r], shrink[r], sum);
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        weight[i] = mil_pack2(s[i / 2][2 * (i % 2)], s[i / 2][2 * (i % 2) + 1]);
    /* Multiplying by one changes nothing. */
    if (!__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f))
        return;
#pragma unroll
    for (int i = 0; i < 2 * Shape::D_STEPS; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            state.o[i][j] *= shrink[j / 2];
}

/* keys: all bits of the lane's values that count, in pairs of keys and of keys 8 on. Others may be
 * anything, NaN too, and zero times NaN is NaN. */
template <class Shape>
static __device__ __forceinline__ void add_values(row_state<Shape> &state,
                                                  const uint32_t (&weight)[4],
                                                  const uint32_t (&keys)[2], uint32_t v)
{
    const uint32_t lane = threadIdx.x % MIL_WARP;
    const uint32_t row = threadIdx.x / MIL_WARP * 16 + lane % 16;
#pragma unroll
    for (int d = 0; d < Shape::D_STEPS; d++) {
        uint32_t b[4];
        mil_ldmatrix4_trans_at(b, chunk_at(v, row, 2 * d + lane / 16));
        mil_mma(state.o[2 * d], weight, b[0] & keys[0], b[1] & keys[1]);
        mil_mma(state.o[2 * d + 1], weight, b[2] & keys[0], b[3] & keys[1]);
    }
}

/* The warp's 16 keys of a block that begins at `key`. */
template <class Shape>
static __device__ __forceinline__ void
add_block(row_state<Shape> &state, const uint32_t (&q)[Shape::D_STEPS][4],
          const mil_attention_sm90 &p, const queued_item *queued, int32_t key, uint32_t k,
          uint32_t v, uint32_t v_full, uint32_t parity)
{
    float s[2][4];
    uint32_t weight[4], keys[2] = {0xffffffffu, 0xffffffffu};
    find_scores<Shape>(s, q, k);
    if (p.scale.cap_out != 0.0f)
#pragma unroll
        for (int i = 0; i < 8; i++)
            s[i / 4][i % 4] = mil_attention_cap(p.scale, s[i / 4][i % 4]);
    if (key < queued->first || key + MIL_BOX_KEYS > queued->end) {
        const int32_t own = key + threadIdx.x / MIL_WARP * 16 + 2 * (threadIdx.x % 4);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const bool is_low = is_seen(queued, own + 8 * i);
            const bool is_high = is_seen(queued, own + 8 * i + 1);
            keys[i] = (is_low ? 0xffffu : 0) | (is_high ? 0xffff0000u : 0);
            s[i][0] = is_low ? s[i][0] : -INFINITY;
            s[i][1] = is_high ? s[i][1] : -INFINITY;
            s[i][2] = is_low ? s[i][2] : -INFINITY;
            s[i][3] = is_high ? s[i][3] : -INFINITY;
        }
    }
    find_weights(weight, s, state, p.scale.factor);
    mil_barrier_wait(v_full, parity);
    add_values(state, weight, keys, v);
}

/* ---- the end of an item ---- */

static __device__ __forceinline__ float maximum_of(const decode_shared *shared, int32_t row)
{
    float maximum = shared->maxima[0][row];
#pragma unroll
    for (int i = 1; i < N_WARPS; i++)
        maximum = fmaxf(maximum, shared->maxima[i][row]);
    return maximum;
}

static __device__ __forceinline__ float sum_of(const decode_shared *shared, int32_t row)
{
    float sum = shared->sums[0][row];
#pragma unroll
    for (int i = 1; i < N_WARPS; i++)
        sum += shared->sums[i][row];
    return sum;
}

/* The warps' maxima and sums become one, O their sum in shared memory. */
template <class Shape>
static __device__ __forceinline__ void join_warps(row_state<Shape> &state, decode_shared *shared,
                                                  float *sum, int32_t n_rows)
{
    const int32_t lane = threadIdx.x % MIL_WARP, warp = threadIdx.x / MIL_WARP;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        state.sum[r] += __shfl_xor_sync(0xffffffffu, state.sum[r], 1);
        state.sum[r] += __shfl_xor_sync(0xffffffffu, state.sum[r], 2);
        if (lane % 4 == 0)
            shared->maxima[warp][lane / 4 + 8 * r] = state.maximum[r];
    }
    sync_consumers();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float maximum = maximum_of(shared, lane / 4 + 8 * r);
        const float shrink = mil_exp2(state.maximum[r] - maximum);
        state.maximum[r] = maximum;
        if (lane % 4 == 0)
            shared->sums[warp][lane / 4 + 8 * r] = state.sum[r] * shrink;
#pragma unroll
        for (int i = 0; i < 2 * Shape::D_STEPS; i++) {
            state.o[i][2 * r] *= shrink;
            state.o[i][2 * r + 1] *= shrink;
        }
    }
    for (int32_t turn = 0; turn < N_WARPS; turn++) {
        if (turn == warp)
#pragma unroll
            for (int r = 0; r < 2; r++)
                if (lane / 4 + 8 * r < n_rows)
#pragma unroll
                    for (int i = 0; i < 2 * Shape::D_STEPS; i++) {
                        float2 *at = (float2 *)(sum + (lane / 4 + 8 * r) * Shape::D + 8 * i +
                                                2 * (lane % 4));
                        const float2 before = turn == 0 ? make_float2(0.0f, 0.0f) : *at;
                        *at = make_float2(before.x + state.o[i][2 * r],
                                          before.y + state.o[i][2 * r + 1]);
                    }
        sync_consumers();
    }
}

/* True in the block whose split of a row came last, for all its consumers. */
static __device__ __forceinline__ bool is_last_split(int32_t *counter, int32_t n_splits,
                                                     int32_t *is_last)
{
    __threadfence();
    sync_consumers();
    if (threadIdx.x == 0)
        *is_last = mil_attention_count(counter, n_splits);
    sync_consumers();
    if (*is_last == 0)
        return false;
    __threadfence();
    return true;
}

/* Rows of a whole item as bf16, of a split in fp32 to its place; by the block of the last split
 * their sum. */
template <class Shape>
static __device__ __forceinline__ void store_rows(const mil_attention_sm90 &p,
                                                  decode_shared *shared, const queued_item *queued,
                                                  const float *sum)
{
    constexpr int COLUMNS = Shape::D / 4;
    const mil_attention_item *item = &queued->item;
    const int64_t first_row = mil_attention_row(item, queued->kv_head, 0, p.group, p.n_heads);
    const int64_t first_partial =
        (int64_t)item->partial * p.n_heads + queued->kv_head * p.group + item->first_row;
    const int64_t own_partial = first_partial + (int64_t)item->split * p.n_heads;
    for (int32_t i = threadIdx.x; i < item->n_rows * COLUMNS; i += N_CONSUMERS) {
        const int32_t row = i / COLUMNS;
        const float4 o = *(const float4 *)(sum + 4 * i);
        if (item->n_splits > 1) {
            *(float4 *)(p.partials.o + own_partial * Shape::D + 4 * i) = o;
            continue;
        }
        const float inverse = 1.0f / sum_of(shared, row);
        *(uint2 *)(p.out + first_row * Shape::D + 4 * i) = make_uint2(
            mil_pack2(o.x * inverse, o.y * inverse), mil_pack2(o.z * inverse, o.w * inverse));
    }
    if (item->n_splits == 1)
        return;
    const int32_t thread = threadIdx.x, warp = threadIdx.x / MIL_WARP;
    if (thread < item->n_rows)
        p.partials.sums[own_partial + thread] =
            make_float2(maximum_of(shared, thread), sum_of(shared, thread));
    int32_t *counter = &p.places.counters[(int64_t)item->counter * p.n_kv_heads + queued->kv_head];
    if (!is_last_split(counter, item->n_splits, &shared->is_last))
        return;
    for (int32_t row = warp; row < item->n_rows; row += N_WARPS)
        mil_attention_merge(p.out + (first_row + row) * Shape::D, p.partials, first_partial + row,
                            p.n_heads, item->n_splits, Shape::D);
}

/* ---- the consumers ---- */

template <class Shape>
static __device__ __forceinline__ void consume(const mil_attention_sm90 &p, char *bytes,
                                               decode_shared *shared)
{
    const uint32_t memory = mil_shared_address(bytes), lane = threadIdx.x % MIL_WARP;
    uint32_t block = 0;
    for (uint32_t n = 0;; n++) {
        const uint32_t slot = n % N_ITEMS;
        const queued_item *queued = &shared->items[slot];
        mil_barrier_wait(mil_shared_address(&shared->q_full[slot]), n / N_ITEMS & 1);
        if (queued->item.n_rows == 0)
            return;
        uint32_t q[Shape::D_STEPS][4];
#pragma unroll
        for (int d = 0; d < Shape::D_STEPS; d++)
            mil_ldmatrix4_at(q[d], memory + Shape::Q + slot * Shape::Q_BYTES +
                                       lane % 16 * Shape::D * 2 + (2 * d + lane / 16) * 16);
        row_state<Shape> state = {};
        state.maximum[0] = state.maximum[1] = MIL_ATTENTION_NO_MAXIMUM;
        for (int32_t key = queued->key; key < queued->end; key += MIL_BOX_KEYS, block++) {
            const uint32_t stage = block % Shape::STAGES, parity = block / Shape::STAGES & 1;
            const uint32_t k = memory + 2 * stage * Shape::TILE_BYTES;
            mil_barrier_wait(mil_shared_address(&shared->k_full[stage]), parity);
            add_block(state, q, p, queued, key, k, k + Shape::TILE_BYTES,
                      mil_shared_address(&shared->v_full[stage]), parity);
            __syncwarp();
            if (lane == 0)
                mil_barrier_arrive(mil_shared_address(&shared->empty[stage]));
        }
        float *sum = (float *)(bytes + Shape::O);
        join_warps(state, shared, sum, queued->item.n_rows);
        store_rows<Shape>(p, shared, queued, sum);
        __syncwarp();
        if (lane == 0)
            mil_barrier_arrive(mil_shared_address(&shared->q_empty[slot]));
    }
}

/* ---- the kernel ---- */

template <class Shape>
static __global__ void __launch_bounds__(N_THREADS, BLOCKS)
    decode_kernel(const __grid_constant__ CUtensorMap k_map,
                  const __grid_constant__ CUtensorMap v_map,
                  const __grid_constant__ mil_attention_sm90 p)
{
    extern __shared__ __align__(1024) char memory[];
    decode_shared *shared = (decode_shared *)(memory + Shape::SHARES);
    /* Rows past an item's are multiplied too: finite, they raise no maximum. */
    for (int32_t i = threadIdx.x; i < N_ITEMS * Shape::Q_BYTES / 16; i += N_THREADS)
        *(uint4 *)(memory + Shape::Q + 16 * i) = make_uint4(0, 0, 0, 0);
    mil_fence_shared();
    if (threadIdx.x == 0) {
        mil_prefetch_map(&k_map);
        mil_prefetch_map(&v_map);
        for (int i = 0; i < N_ITEMS; i++) {
            mil_barrier_init(mil_shared_address(&shared->q_full[i]), 1);
            mil_barrier_init(mil_shared_address(&shared->q_empty[i]), N_WARPS);
        }
        for (int i = 0; i < Shape::STAGES; i++) {
            mil_barrier_init(mil_shared_address(&shared->k_full[i]), 1);
            mil_barrier_init(mil_shared_address(&shared->v_full[i]), 1);
            mil_barrier_init(mil_shared_address(&shared->empty[i]), N_WARPS);
        }
        mil_barrier_init_done();
    }
    __syncthreads();
    mil_wait_for_previous();
    mil_let_next_start();
    if (threadIdx.x >= N_CONSUMERS)
        produce<Shape>(p, &k_map, &v_map, mil_shared_address(memory), shared);
    else
        consume<Shape>(p, memory, shared);
}

template <class Shape>
static mil_status launch(const mil_queue *queue, const mil_attention_sm90 &params,
                         const CUtensorMap (&maps)[2], int64_t n_tiles)
{
    constexpr int BYTES = Shape::SHARES + (int)sizeof(decode_shared);
    static_assert(Shape::STAGES <= 6 && Shape::SHARES % 16 == 0, "shared");
    static_assert(BLOCKS * (BYTES + 1024) <= 228 * 1024, "shared memory of an SM");
    const int64_t most = (int64_t)queue->n_sms * BLOCKS;
    MIL_CUDA_TRY(cudaFuncSetAttribute(decode_kernel<Shape>,
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES));
    return mil_launch(queue, "attention of decode rows", decode_kernel<Shape>,
                      dim3((unsigned)(n_tiles < most ? n_tiles : most)), dim3(N_THREADS), BYTES,
                      maps[0], maps[1], params);
}

mil_status mil_attention_decode_sm90(const mil_queue *queue, const mil_attention_sm90 *params,
                                     const CUtensorMap (&maps)[2], int64_t n_tiles)
{
    return params->head_dim == 64 ? launch<decode_shape<64>>(queue, *params, maps, n_tiles)
                                  : launch<decode_shape<128>>(queue, *params, maps, n_tiles);
}
