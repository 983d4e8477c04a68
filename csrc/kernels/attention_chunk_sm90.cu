/* Flash attention over paged KV for chunks of several queries, Hopper path: head sizes 64 and 128.
 *
 * The formula, shapes, dtypes and masks of attention.cu; scores, maximum, sum and O in fp32, P
 * rounded as V is for P V, its sum taken before the rounding. A tile is 128 packed rows, 64
 * of each consumer warpgroup, against blocks of 128 keys at absolute multiples of 128: a row's bits
 * depend on its length and window alone, not on how the prompt was cut.
 *
 * A persistent grid of one block an SM walks the front of attention.cuh's list as attention.cu's
 * does. Of a producer warpgroup one warp keeps two blocks of K and two of V on their way by tensor
 * maps, the others bring the next tile's q. Consumers multiply by wgmma, q k' from shared memory, P
 * V with P in registers; S of a block is computed while O still takes the block before, and named
 * barriers let one warpgroup's softmax run under another's products. FlashAttention-3: Shah et al.
 * 2024. Bound by tensor cores: 570 TFLOP/s at 8,192 tokens of D 128 on an H200, 0.70 of cuBLAS's
 * (2026-11-29, bench_ops). */
#include "ops/backend.h"

#include "kernels/attention_sm90.cuh"

#define KEYS 128 /* of a block: two boxes */
#define N_STAGES 2
#define ROWS 64 /* of a consumer warpgroup */
#define FIRST_TURN                                                                                 \
    1 /* named barriers: a consumer's turn to start products, then its own threads' */

template <int D_, int CONSUMERS_, int OWN_REGISTERS_, int PRODUCER_REGISTERS_, mil_dtype DTYPE_>
struct chunk_shape {
    static constexpr mil_dtype DTYPE = DTYPE_; /* of q, K, V and P */
    static constexpr int D = D_;
    static constexpr int CONSUMERS = CONSUMERS_; /* warpgroups */
    static constexpr int OWN_REGISTERS = OWN_REGISTERS_;
    static constexpr int PRODUCER_REGISTERS = PRODUCER_REGISTERS_;
    static constexpr int THREADS = (CONSUMERS + 1) * MIL_WARPGROUP;
    static constexpr int TILE_ROWS = CONSUMERS * ROWS;
    static constexpr int HALVES = D / 64;                       /* of 64 columns */
    static constexpr int Q_HALF = ROWS * MIL_BOX_ROW;           /* [consumer][half][row] */
    static constexpr int Q_BYTES = CONSUMERS * HALVES * Q_HALF; /* of one buffer of two */
    static constexpr int KV_HALF = KEYS * MIL_BOX_ROW;          /* [half][key] */
    static constexpr int KV_BYTES = HALVES * KV_HALF;           /* of one stage of K or V */
    static constexpr int K = 2 * Q_BYTES;
    static constexpr int V = K + N_STAGES * KV_BYTES;
    static constexpr int BARRIERS = V + N_STAGES * KV_BYTES;
    static constexpr int BYTES = BARRIERS + 12 * 8 + 1024; /* the start is aligned by hand */
};

enum { Q_FULL, Q_EMPTY, K_FULL, K_EMPTY, V_FULL, V_EMPTY };

/* Two mbarriers of each kind. */
template <class Shape>
static __device__ __forceinline__ uint32_t barrier(uint32_t memory, int kind, uint32_t stage)
{
    return memory + Shape::BARRIERS + 8 * (2 * kind + stage);
}

/* ---- the list ---- */

/* The n-th tile of this block, there and back; NULL at the list's end. Tiles stay in global memory:
 * registers are what the consumers lack. */
static __device__ __forceinline__ const mil_attention_item *find_tile(const mil_attention_sm90 &p,
                                                                      uint32_t n, int32_t *kv_head)
{
    const uint32_t place = (n & 1) != 0 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int64_t index = (int64_t)n * gridDim.x + place;
    if (index >= (int64_t)p.places.list->n_chunk_items * p.n_kv_heads)
        return NULL;
    *kv_head = (int32_t)((uint32_t)index % (uint32_t)p.n_kv_heads);
    return p.places.items + (uint32_t)index / (uint32_t)p.n_kv_heads;
}

/* Keys outside have no weight for any row of the tile. */
typedef struct key_range {
    int32_t first, end;
    int32_t begin; /* of the first block; one block at least */
} key_range;

static __device__ __forceinline__ key_range keys_of(const mil_attention_sm90 &p,
                                                    const mil_attention_item *item)
{
    key_range keys;
    keys.end = item->key_end;
    keys.first = p.window > 0 ? max(item->first_limit - p.window, 0) : 0;
    keys.begin = min(keys.first, keys.end - 1) & -KEYS;
    return keys;
}

/* ---- the producer ---- */

/* One warp: the page ids of 32 boxes at once, then K and V of each block. */
template <class Shape>
static __device__ __forceinline__ void send_keys(const mil_attention_sm90 &p,
                                                 const CUtensorMap *k_map, const CUtensorMap *v_map,
                                                 uint32_t memory)
{
    const int32_t lane = threadIdx.x % MIL_WARP;
    const mil_attention_item *item;
    int32_t kv_head;
    uint32_t block = 0;
    for (uint32_t n = 0; (item = find_tile(p, n, &kv_head)) != NULL; n++) {
        const key_range keys = keys_of(p, item);
        const int32_t first_box = keys.begin / MIL_BOX_KEYS,
                      end_box = (keys.end - 1) / MIL_BOX_KEYS + 1;
        int32_t row = 0; /* of the maps, for box known + lane */
        for (int32_t box = first_box; box < end_box; box += KEYS / MIL_BOX_KEYS, block++) {
            if ((box - first_box) % MIL_WARP == 0) {
                const int32_t own = min(box + lane, end_box - 1);
                row = mil_attention_box_row(p, item->slot, kv_head, own);
            }
            const uint32_t stage = block % N_STAGES, parity = (block / N_STAGES & 1) ^ 1;
            const int32_t n_boxes = min(end_box - box, KEYS / MIL_BOX_KEYS);
            int32_t rows[KEYS / MIL_BOX_KEYS];
#pragma unroll
            for (int i = 0; i < KEYS / MIL_BOX_KEYS; i++)
                rows[i] = __shfl_sync(0xffffffffu, row, (box - first_box + i) % MIL_WARP);
#pragma unroll
            for (int is_v = 0; is_v < 2; is_v++) {
                const uint32_t full = barrier<Shape>(memory, is_v ? V_FULL : K_FULL, stage);
                const uint32_t to = memory + (is_v ? Shape::V : Shape::K) + stage * Shape::KV_BYTES;
                if (lane == 0) { /* alone: a lane that comes late would wait for the phase after */
                    mil_barrier_wait(barrier<Shape>(memory, is_v ? V_EMPTY : K_EMPTY, stage),
                                     parity);
                    mil_barrier_expect(full, n_boxes * MIL_BOX_KEYS * Shape::D * 2);
                    for (int32_t i = 0; i < n_boxes; i++)
#pragma unroll
                        for (int half = 0; half < Shape::HALVES; half++)
                            mil_copy_box(
                                to + half * Shape::KV_HALF + i * MIL_BOX_KEYS * MIL_BOX_ROW,
                                is_v ? v_map : k_map, 64 * half, i == 0 ? rows[0] : rows[1], full);
                }
                __syncwarp();
            }
        }
    }
}

/* Three warps: q of each tile, one tile ahead. Rows past the tile's are its last one again. */
template <class Shape>
static __device__ __forceinline__ void send_queries(const mil_attention_sm90 &p, uint32_t memory)
{
    constexpr int N_THREADS = MIL_WARPGROUP - MIL_WARP, CHUNKS = Shape::D / 8;
    const int32_t thread = threadIdx.x % MIL_WARPGROUP - MIL_WARP;
    const mil_attention_item *item;
    int32_t kv_head;
    for (uint32_t n = 0; (item = find_tile(p, n, &kv_head)) != NULL; n++) {
        const uint32_t stage = n % 2, to = memory + stage * Shape::Q_BYTES;
        mil_barrier_wait(barrier<Shape>(memory, Q_EMPTY, stage), (n / 2 & 1) ^ 1);
#pragma unroll 4
        for (int32_t i = thread; i < Shape::TILE_ROWS * CHUNKS; i += N_THREADS) {
            const int32_t row = i / CHUNKS, chunk = i % CHUNKS;
            const int64_t from =
                mil_attention_row(item, kv_head, min(row, item->n_rows - 1), p.group, p.n_heads) *
                    Shape::D +
                8 * chunk;
            const uint32_t tile = (row / ROWS * Shape::HALVES + chunk / 8) * Shape::Q_HALF;
            const uint32_t at = row % ROWS * MIL_BOX_ROW + ((chunk ^ row) % 8) * 16;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + tile + at),
                         "l"(p.q + from)
                         : "memory");
        }
        mil_copy_commit();
        mil_copy_wait<0>();
        mil_fence_shared();
        mil_barrier_arrive(barrier<Shape>(memory, Q_FULL, stage));
    }
}

/* ---- products ---- */

#define LIST_8(x, i) x[i], x[i + 1], x[i + 2], x[i + 3], x[i + 4], x[i + 5], x[i + 6], x[i + 7]
#define OUT_4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define OUT_16(x, i) OUT_4(x, i), OUT_4(x, i + 4), OUT_4(x, i + 8), OUT_4(x, i + 12)
#define OUT_32(x, i) OUT_16(x, i), OUT_16(x, i + 16)
#define NAMES_32                                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "   \
    "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                   \
    NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
             "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define MULTIPLY_KEYS(type)                                                                        \
    asm volatile("{\n"                                                                             \
                 ".reg .pred is_added;\n"                                                          \
                 "setp.ne.b32 is_added, %66, 0;\n"                                                 \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" NAMES_64 "}, "  \
                 "%64, %65, is_added, 1, 1, 0, 0;\n"                                               \
                 "}"                                                                               \
                 : OUT_32(s, 0), OUT_32(s, 32)                                                     \
                 : "l"(a), "l"(b), "r"(is_added))
#define MULTIPLY_VALUES_128(type)                                                                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" NAMES_64 "}, "  \
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                          \
                 : OUT_32(o, 0), OUT_32(o, 32)                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define MULTIPLY_VALUES_64(type)                                                                   \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" NAMES_32 "}, "   \
                 "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                          \
                 : OUT_32(o, 0)                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

/* s (64 x 128) = or += a b', a 64 x 16 and b 128 x 16 of DTYPE, both in shared memory. */
template <mil_dtype DTYPE>
static __device__ __forceinline__ void multiply_keys(float (&s)[64], uint64_t a, uint64_t b,
                                                     int32_t is_added)
{
    if constexpr (DTYPE == MIL_DTYPE_F16)
        MULTIPLY_KEYS("f16");
    else
        MULTIPLY_KEYS("bf16");
}

/* o (64 x 128 or 64) += a b, a 64 x 16 in registers, b 16 x 128 or 64 in shared memory. */
template <mil_dtype DTYPE>
static __device__ __forceinline__ void multiply_values(float (&o)[64], const uint32_t (&a)[4],
                                                       uint64_t b)
{
    if constexpr (DTYPE == MIL_DTYPE_F16)
        MULTIPLY_VALUES_128("f16");
    else
        MULTIPLY_VALUES_128("bf16");
}

template <mil_dtype DTYPE>
static __device__ __forceinline__ void multiply_values(float (&o)[32], const uint32_t (&a)[4],
                                                       uint64_t b)
{
    if constexpr (DTYPE == MIL_DTYPE_F16)
        MULTIPLY_VALUES_64("f16");
    else
        MULTIPLY_VALUES_64("bf16");
}

template <class Shape>
static __device__ __forceinline__ void start_scores(float (&s)[64], uint32_t q, uint32_t k)
{
    const uint64_t a = mil_wgmma_tile(q, 0), b = mil_wgmma_tile(k, 0);
#pragma unroll
    for (int d = 0; d < Shape::D / 16; d++)
        multiply_keys<Shape::DTYPE>(s, a + d / 4 * (Shape::Q_HALF >> 4) + d % 4 * 2,
                                    b + d / 4 * (Shape::KV_HALF >> 4) + d % 4 * 2, d != 0);
    mil_wgmma_commit();
}

template <class Shape>
static __device__ __forceinline__ void
start_values(float (&o)[Shape::D / 2], const uint32_t (&weight)[KEYS / 16][4], uint32_t v)
{
    const uint64_t b = mil_wgmma_tile(v, Shape::KV_HALF);
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++)
        multiply_values<Shape::DTYPE>(o, weight[i], b + i * (16 * MIL_BOX_ROW >> 4));
    mil_wgmma_commit();
}

/* ---- who a consumer is ---- */

/* What is derived from it is computed where it is needed and holds no register over the loop. */
static __device__ __forceinline__ int32_t thread_index()
{
    int32_t index = (int32_t)threadIdx.x;
    asm volatile("" : "+r"(index));
    return index;
}

static __device__ __forceinline__ bool is_first_lane()
{
    return thread_index() % MIL_WARP == 0;
}

static __device__ __forceinline__ int32_t consumer_index()
{
    return thread_index() / MIL_WARPGROUP - 1;
}

/* The first of a thread's two rows of the tile. */
static __device__ __forceinline__ int32_t own_row()
{
    const int32_t thread = thread_index() - MIL_WARPGROUP;
    return thread / MIL_WARP * 16 + thread % MIL_WARP / 4;
}

/* Consumers start their products one after another, round and round. */
static __device__ __forceinline__ void take_turn()
{
    mil_named_sync(FIRST_TURN + consumer_index(), 2 * MIL_WARPGROUP);
}

template <class Shape>
static __device__ __forceinline__ void give_turn()
{
    mil_named_arrive(FIRST_TURN + (consumer_index() + 1) % Shape::CONSUMERS, 2 * MIL_WARPGROUP);
}

/* ---- softmax ---- */

/* A thread's two rows, 8 apart. */
typedef struct row_state {
    float maximum[2], sum[2], shrink[2];
    int32_t end[2]; /* keys that the row sees: end - window <= key < end */
} row_state;

/* Keys that a row does not see score minus infinity. */
static __device__ __forceinline__ void mask_scores(float (&s)[64], const mil_attention_sm90 &p,
                                                   const row_state &rows, int32_t key)
{
    key += 2 * (thread_index() % 4);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int32_t end = rows.end[r] - key;
        const int32_t first = p.window > 0 ? end - p.window : -KEYS;
#pragma unroll
        for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                if (8 * i + j >= end || 8 * i + j < first)
                    s[4 * i + 2 * r + j] = -INFINITY;
    }
}

/* s becomes weights in fp32; maximum, sum and shrink follow. */
static __device__ __forceinline__ void find_weights(float (&s)[64], row_state &rows, float factor)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = s[2 * r];
#pragma unroll
        for (int i = 0; i < KEYS / 8; i++)
            top = fmaxf(top, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        const float maximum = fmaxf(rows.maximum[r], top * factor);
        rows.shrink[r] = mil_exp2(rows.maximum[r] - maximum);
        rows.maximum[r] = maximum;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float &x = s[4 * i + 2 * r + j];
                x = mil_exp2(fmaf(x, factor, -maximum));
                sum += x;
            }
        rows.sum[r] = fmaf(rows.sum[r], rows.shrink[r], sum);
    }
}

template <class Shape>
static __device__ __forceinline__ void round_weights(uint32_t (&weight)[KEYS / 16][4],
                                                     const float (&s)[64])
{
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++)
            weight[i][j] = mil_pack2<Shape::DTYPE>(s[8 * i + 2 * j], s[8 * i + 2 * j + 1]);
        mil_settle(weight[i]);
    }
}

template <int N>
static __device__ __forceinline__ void shrink(float (&o)[N], const row_state &rows)
{
#pragma unroll
    for (int i = 0; i < N; i++)
        o[i] *= rows.shrink[i / 2 % 2];
    mil_settle(o);
}

/* ---- the consumers ---- */

/* Rows of V that no row of the tile sees may hold anything, NaN too, and zero times NaN is NaN.
 * Every consumer writes the same zeros for itself. */
template <class Shape>
static __device__ __forceinline__ void clear_unseen(uint32_t v, const key_range &keys, int32_t key)
{
    const int32_t thread = threadIdx.x % MIL_WARPGROUP;
    const int32_t own = key + thread; /* KEYS threads: one row each */
    static_assert(KEYS == MIL_WARPGROUP, "a row for each thread");
    if (own < keys.first || own >= keys.end)
#pragma unroll
        for (int i = 0; i < Shape::HALVES * 8; i++)
            asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(
                             v + i / 8 * Shape::KV_HALF + thread * MIL_BOX_ROW + i % 8 * 16),
                         "r"(0)
                         : "memory");
    mil_fence_shared();
    mil_named_sync(FIRST_TURN + Shape::CONSUMERS + consumer_index(), MIL_WARPGROUP);
}

/* 32 columns of a row lie with four lanes, 2 of each 8 each: after the exchange a lane has 8 of its
 * own. */
static __device__ __forceinline__ uint4 gather_columns(uint32_t x0, uint32_t x1, uint32_t x2,
                                                       uint32_t x3)
{
    const bool is_odd = (threadIdx.x & 1) != 0, is_high = (threadIdx.x & 2) != 0;
    const uint32_t a = __shfl_xor_sync(0xffffffffu, is_odd ? x0 : x1, 1);
    const uint32_t b = __shfl_xor_sync(0xffffffffu, is_odd ? x2 : x3, 1);
    /* Lane pair (0, 1) and (2, 3): [lane's own 8-column group of two][column pair of two]. */
    const uint32_t y0 = is_odd ? a : x0, y1 = is_odd ? x1 : a;
    const uint32_t z0 = is_odd ? b : x2, z1 = is_odd ? x3 : b;
    const uint32_t c = __shfl_xor_sync(0xffffffffu, is_high ? y0 : z0, 2);
    const uint32_t d = __shfl_xor_sync(0xffffffffu, is_high ? y1 : z1, 2);
    return is_high ? make_uint4(c, d, z0, z1) : make_uint4(y0, y1, c, d);
}

template <class Shape>
static __device__ __forceinline__ void store_rows(const float (&o)[Shape::D / 2], row_state &rows,
                                                  const mil_attention_sm90 &p,
                                                  const mil_attention_item *item, int32_t kv_head)
{
    const int32_t row = own_row(), lane = threadIdx.x % MIL_WARP;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float sum = rows.sum[r];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const float inverse = 1.0f / sum;
        const bool is_row = row + 8 * r < item->n_rows;
        uint16_t *to = p.out;
        if (is_row)
            to += mil_attention_row(item, kv_head, row + 8 * r, p.group, p.n_heads) * Shape::D;
#pragma unroll
        for (int i = 0; i < Shape::D / 32; i++) {
            uint32_t x[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int at = 4 * (4 * i + j) + 2 * r;
                x[j] = mil_attention_pack2<Shape::DTYPE>(o[at] * inverse, o[at + 1] * inverse,
                                                         p.out_dtype);
            }
            const uint4 bits = gather_columns(x[0], x[1], x[2], x[3]);
            if (is_row)
                *(uint4 *)(to + 32 * i + 8 * (lane % 4)) = bits;
        }
    }
}

/* One block's S, from products to weights; masked where a row of the warpgroup needs it. */
static __device__ __forceinline__ void weigh(float (&s)[64], row_state &rows,
                                             const mil_attention_sm90 &p, const key_range &keys,
                                             int32_t key, int32_t least)
{
    if (p.scale.cap_out != 0.0f)
#pragma unroll
        for (int i = 0; i < 64; i++)
            s[i] = mil_attention_cap(p.scale, s[i]);
    if (key + KEYS > least || (p.window > 0 && key < keys.end - p.window))
        mask_scores(s, p, rows, key);
    find_weights(s, rows, p.scale.factor);
}

static __device__ __forceinline__ int32_t end_of(const mil_attention_sm90 &p,
                                                 const mil_attention_item *item, int32_t row)
{
    const uint32_t packed = (uint32_t)(item->first_row + min(row, item->n_rows - 1));
    return item->past + (int32_t)(packed / (uint32_t)p.group) + 1;
}

template <class Shape>
static __device__ __forceinline__ void consume(const mil_attention_sm90 &p, uint32_t memory)
{
    const mil_attention_item *item;
    int32_t kv_head;
    uint32_t block = 0;
    if (consumer_index() == Shape::CONSUMERS - 1)
        give_turn<Shape>();
    for (uint32_t n = 0; (item = find_tile(p, n, &kv_head)) != NULL; n++) {
        const key_range keys = keys_of(p, item);
        const int32_t least = end_of(p, item, consumer_index() * ROWS);
        const uint32_t q =
            memory + n % 2 * Shape::Q_BYTES + consumer_index() * Shape::HALVES * Shape::Q_HALF;
        row_state rows = {};
        rows.maximum[0] = rows.maximum[1] = MIL_ATTENTION_NO_MAXIMUM;
        rows.end[0] = end_of(p, item, own_row());
        rows.end[1] = end_of(p, item, own_row() + 8);
        float s[64], o[Shape::D / 2];
        uint32_t weight[KEYS / 16][4];
#pragma unroll
        for (int i = 0; i < Shape::D / 2; i++)
            o[i] = 0.0f;
        mil_settle(o);

        mil_barrier_wait(barrier<Shape>(memory, Q_FULL, n % 2), n / 2 & 1);
        int32_t key = keys.begin;
        uint32_t stage = block % N_STAGES, parity = block / N_STAGES & 1;
        mil_barrier_wait(barrier<Shape>(memory, K_FULL, stage), parity);
        mil_wgmma_fence();
        start_scores<Shape>(s, q, memory + Shape::K + stage * Shape::KV_BYTES);
        mil_wgmma_wait<0>();
        if (is_first_lane())
            mil_barrier_arrive(barrier<Shape>(memory, K_EMPTY, stage));
        weigh(s, rows, p, keys, key, least);
        round_weights<Shape>(weight, s);

        /* S of this block beside P V of the one before. */
        for (key += KEYS; key < keys.end; key += KEYS) {
            const uint32_t last_stage = stage, last_parity = parity;
            const uint32_t v = memory + Shape::V + last_stage * Shape::KV_BYTES;
            block++;
            stage = block % N_STAGES, parity = block / N_STAGES & 1;
            if (key - KEYS < keys.first) {
                mil_barrier_wait(barrier<Shape>(memory, V_FULL, last_stage), last_parity);
                clear_unseen<Shape>(v, keys, key - KEYS);
            }
            mil_barrier_wait(barrier<Shape>(memory, K_FULL, stage), parity);
            take_turn();
            mil_wgmma_fence();
            start_scores<Shape>(s, q, memory + Shape::K + stage * Shape::KV_BYTES);
            mil_barrier_wait(barrier<Shape>(memory, V_FULL, last_stage), last_parity);
            mil_wgmma_fence();
            start_values<Shape>(o, weight, v);
            give_turn<Shape>();
            mil_wgmma_wait<1>();
            if (is_first_lane())
                mil_barrier_arrive(barrier<Shape>(memory, K_EMPTY, stage));
            weigh(s, rows, p, keys, key, least);
            mil_wgmma_wait<0>();
            if (is_first_lane())
                mil_barrier_arrive(barrier<Shape>(memory, V_EMPTY, last_stage));
            shrink(o, rows);
            round_weights<Shape>(weight, s);
        }
        if (is_first_lane())
            mil_barrier_arrive(barrier<Shape>(memory, Q_EMPTY, n % 2));

        const uint32_t v = memory + Shape::V + stage * Shape::KV_BYTES;
        mil_barrier_wait(barrier<Shape>(memory, V_FULL, stage), parity);
        if (key > keys.end || key - KEYS < keys.first)
            clear_unseen<Shape>(v, keys, key - KEYS);
        mil_wgmma_fence();
        start_values<Shape>(o, weight, v);
        mil_wgmma_wait<0>();
        if (is_first_lane())
            mil_barrier_arrive(barrier<Shape>(memory, V_EMPTY, stage));
        block++;
        store_rows<Shape>(o, rows, p, item, kv_head);
    }
}

/* ---- the kernel ---- */

template <class Shape>
static __device__ __forceinline__ void init_barriers(uint32_t memory)
{
    const uint32_t n_warps = Shape::CONSUMERS * MIL_WARPGROUP / MIL_WARP;
    for (uint32_t stage = 0; stage < 2; stage++) {
        mil_barrier_init(barrier<Shape>(memory, Q_FULL, stage), MIL_WARPGROUP - MIL_WARP);
        mil_barrier_init(barrier<Shape>(memory, K_FULL, stage), 1);
        mil_barrier_init(barrier<Shape>(memory, V_FULL, stage), 1);
        mil_barrier_init(barrier<Shape>(memory, Q_EMPTY, stage), n_warps);
        mil_barrier_init(barrier<Shape>(memory, K_EMPTY, stage), n_warps);
        mil_barrier_init(barrier<Shape>(memory, V_EMPTY, stage), n_warps);
    }
    mil_barrier_init_done();
}

template <class Shape>
static __global__ void __launch_bounds__(Shape::THREADS, 1)
    chunk_kernel(const __grid_constant__ CUtensorMap k_map,
                 const __grid_constant__ CUtensorMap v_map,
                 const __grid_constant__ mil_attention_sm90 p)
{
    extern __shared__ char memory_bytes[];
    const uint32_t memory = (mil_shared_address(memory_bytes) + 1023) & ~1023u;
    static_assert(Shape::TILE_ROWS == MIL_ATTENTION_SM90_ROWS, "the plan's tiles");
    static_assert(Shape::BYTES <= 227 * 1024, "shared memory of a block");
    static_assert(Shape::TILE_ROWS * Shape::D / 8 % 4 == 0 && N_STAGES == 2, "shape");
    if (threadIdx.x == 0) {
        mil_prefetch_map(&k_map);
        mil_prefetch_map(&v_map);
        init_barriers<Shape>(memory);
    }
    __syncthreads();
    mil_wait_for_previous();
    mil_let_next_start();
    if (threadIdx.x < MIL_WARPGROUP) {
        mil_fewer_registers<Shape::PRODUCER_REGISTERS>();
        if (threadIdx.x < MIL_WARP)
            send_keys<Shape>(p, &k_map, &v_map, memory);
        else
            send_queries<Shape>(p, memory);
    } else {
        mil_more_registers<Shape::OWN_REGISTERS>();
        consume<Shape>(p, memory);
    }
}

template <class Shape>
static mil_status launch(const mil_queue *queue, const mil_attention_sm90 &params,
                         const CUtensorMap (&maps)[2], int64_t n_tiles)
{
    MIL_CUDA_TRY(cudaFuncSetAttribute(chunk_kernel<Shape>,
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::BYTES));
    return mil_launch(queue, "attention of chunks", chunk_kernel<Shape>,
                      dim3((unsigned)(n_tiles < queue->n_sms ? n_tiles : queue->n_sms)),
                      dim3(Shape::THREADS), Shape::BYTES, maps[0], maps[1], params);
}

/* Registers: 64 Ki of an SM, dealt out in 8s. */
template <mil_dtype DTYPE>
static mil_status launch_any(const mil_queue *queue, const mil_attention_sm90 &params,
                             const CUtensorMap (&maps)[2], int64_t n_tiles)
{
    return params.head_dim == 64
               ? launch<chunk_shape<64, 2, 232, 40, DTYPE>>(queue, params, maps, n_tiles)
               : launch<chunk_shape<128, 2, 232, 40, DTYPE>>(queue, params, maps, n_tiles);
}

mil_status mil_attention_chunks_sm90(const mil_queue *queue, const mil_attention_sm90 *params,
                                     const CUtensorMap (&maps)[2], int64_t n_tiles)
{
    return params->dtype == MIL_DTYPE_F16
               ? launch_any<MIL_DTYPE_F16>(queue, *params, maps, n_tiles)
               : launch_any<MIL_DTYPE_BF16>(queue, *params, maps, n_tiles);
}
