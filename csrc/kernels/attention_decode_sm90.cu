/* Flash attention over paged KV for sequences of one query, Hopper path: head sizes 64 and 128.
 *
 * The formula, shapes, dtypes and masks of attention.cu; scores, maximum, sum and O in fp32, P
 * rounded as V is for P V, its sum taken before the rounding. An item is a split of a row's keys
 * for one kv head, its up to 16 query heads the rows of m16n8k16 products. Of each block of 64 keys
 * a warp has 16 for itself, with a maximum, sum and O of its own. Warps are added in their order,
 * splits in theirs: a row's bits depend on its length and window alone.
 *
 * A persistent grid, two blocks an SM, walks the end of attention.cuh's list there and back. One
 * warp of a block keeps the ring full by tensor maps, over the ends of items; at an item's end the
 * others leave their sums in shared memory and go on, and one more warp adds them up and writes.
 * Bound by bytes of KV: 0.78 of an H200's 4.55 TB/s for 64 rows of 1,024 keys, 0.23 for one of
 * 8,192 (2026-11-29, bench_ops). */
#include "ops/backend.h"

#include "kernels/attention_sm90.cuh"

#define N_WARPS 4        /* consumers, each with 16 keys of a block */
#define PRODUCER N_WARPS /* warp */
#define FINISHER (N_WARPS + 1)
#define N_THREADS ((N_WARPS + 2) * MIL_WARP)
#define PART_ROWS 4 /* of an item that are finished at once */
#define BLOCKS 2    /* of an SM */
#define N_ITEMS 2   /* on their way */

typedef struct queued_item {
    mil_attention_item item; /* n_rows 0: the list has ended */
    int32_t kv_head;
    int32_t key, end; /* its blocks; keys outside first .. end have no weight */
    int32_t first;
} queued_item;

template <int D_, mil_dtype DTYPE_>
struct decode_shape {
    static constexpr mil_dtype DTYPE = DTYPE_; /* of q, K, V and P */
    static constexpr int D = D_;
    static constexpr int HALVES = D / 64; /* boxes of a block's K or V */
    static constexpr int TILE_BYTES = HALVES * MIL_BOX_BYTES;
    static constexpr int STAGES = 384 / D; /* 96 KiB of K and V */
    static constexpr int Q_BYTES = MIL_ATTENTION_ROWS * D * 2;
    static constexpr int Q = STAGES * 2 * TILE_BYTES;
    static constexpr int O = Q + N_ITEMS * Q_BYTES;
    static constexpr int SHARES = O + N_WARPS * PART_ROWS * D * 4; /* O: [warp][row][D] fp32 */
    static constexpr int D_STEPS = D / 16;
};

typedef struct decode_shared {
    queued_item items[N_ITEMS];
    uint64_t q_full[N_ITEMS], k_full[6], v_full[6]; /* the producer's first lane arrives */
    uint64_t empty[6];                              /* a lane of each consumer */
    /* Every lane arrives, for what it wrote or read itself: few a row, and the order needs no
     * __syncwarp, which racecheck does not follow to an arrival. */
    uint64_t q_empty[N_ITEMS], o_full, o_empty;
    float2 sums[N_WARPS][PART_ROWS]; /* maximum and sum, with O */
} decode_shared;

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
            if (lane == 0) { /* alone: a lane that comes late would wait for the phase after */
                mil_barrier_wait(mil_shared_address(&shared->empty[stage]),
                                 (block / Shape::STAGES & 1) ^ 1);
#pragma unroll
                for (int is_v = 0; is_v < 2; is_v++) {
                    const uint32_t full =
                        mil_shared_address(is_v ? &shared->v_full[stage] : &shared->k_full[stage]);
                    mil_barrier_expect(full, Shape::TILE_BYTES);
#pragma unroll
                    for (int half = 0; half < Shape::HALVES; half++)
                        mil_copy_box_once(memory + (2 * stage + is_v) * Shape::TILE_BYTES +
                                              half * MIL_BOX_BYTES,
                                          is_v ? v_map : k_map, 64 * half, row, full);
                }
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
        mil_mma<Shape::DTYPE>(d % 2 != 0 ? other[0] : s[0], q[d], b[0], b[1]);
        mil_mma<Shape::DTYPE>(d % 2 != 0 ? other[1] : s[1], q[d], b[2], b[3]);
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
        weight[i] = mil_pack2<Shape::DTYPE>(s[i / 2][2 * (i % 2)], s[i / 2][2 * (i % 2) + 1]);
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
        mil_mma<Shape::DTYPE>(state.o[2 * d], weight, b[0] & keys[0], b[1] & keys[1]);
        mil_mma<Shape::DTYPE>(state.o[2 * d + 1], weight, b[2] & keys[0], b[3] & keys[1]);
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

/* Where column `column` (even) of a warp's row lies: rows of a part in different banks. */
static __device__ __forceinline__ int32_t place_of(int32_t row, int32_t column)
{
    return column ^ (row % PART_ROWS * 8);
}

/* A warp hands its rows over, PART_ROWS at a time. n: parts handed over so far. */
template <class Shape>
static __device__ __forceinline__ void hand_over(row_state<Shape> &state, decode_shared *shared,
                                                 float *sums, int32_t n_rows, uint32_t *n)
{
    const int32_t lane = threadIdx.x % MIL_WARP, warp = threadIdx.x / MIL_WARP;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        state.sum[r] += __shfl_xor_sync(0xffffffffu, state.sum[r], 1);
        state.sum[r] += __shfl_xor_sync(0xffffffffu, state.sum[r], 2);
    }
    for (int32_t first = 0; first < n_rows; first += PART_ROWS, ++*n) {
        mil_barrier_wait(mil_shared_address(&shared->o_empty), (*n & 1) ^ 1);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int32_t row = lane / 4 + 8 * r;
            if (row < first || row >= first + PART_ROWS)
                continue;
            float *to = sums + (warp * PART_ROWS + row % PART_ROWS) * Shape::D;
            if (lane % 4 == 0)
                shared->sums[warp][row % PART_ROWS] = make_float2(state.maximum[r], state.sum[r]);
#pragma unroll
            for (int i = 0; i < 2 * Shape::D_STEPS; i++)
                *(float2 *)(to + place_of(row, 8 * i + 2 * (lane % 4))) =
                    make_float2(state.o[i][2 * r], state.o[i][2 * r + 1]);
        }
        mil_barrier_arrive(mil_shared_address(&shared->o_full));
    }
}

/* Four columns of a row, over the warps in order; *total: its maximum and sum. */
template <class Shape>
static __device__ __forceinline__ float4 join_warps(const decode_shared *shared, const float *sums,
                                                    int32_t row, int32_t column, float2 *total)
{
    float2 part[N_WARPS];
    float maximum = MIL_ATTENTION_NO_MAXIMUM, sum = 0.0f;
    float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < N_WARPS; i++) {
        part[i] = shared->sums[i][row];
        maximum = fmaxf(maximum, part[i].x);
    }
#pragma unroll
    for (int i = 0; i < N_WARPS; i++) {
        const float weight = mil_exp2(part[i].x - maximum);
        const float4 v =
            *(const float4 *)(sums + (i * PART_ROWS + row) * Shape::D + place_of(row, column));
        sum = fmaf(weight, part[i].y, sum);
        o.x = fmaf(weight, v.x, o.x);
        o.y = fmaf(weight, v.y, o.y);
        o.z = fmaf(weight, v.z, o.z);
        o.w = fmaf(weight, v.w, o.w);
    }
    *total = make_float2(maximum, sum);
    return o;
}

template <class Shape>
static __device__ __forceinline__ void store_4(uint16_t *to, float4 o, float sum,
                                               mil_dtype out_dtype)
{
    const float inverse = 1.0f / sum;
    *(uint2 *)to =
        make_uint2(mil_attention_pack2<Shape::DTYPE>(o.x * inverse, o.y * inverse, out_dtype),
                   mil_attention_pack2<Shape::DTYPE>(o.z * inverse, o.w * inverse, out_dtype));
}

/* Rows first .. of an item: rounded where it is whole, in fp32 to the split's place where not. */
template <class Shape>
static __device__ __forceinline__ void
store_part(const mil_attention_sm90 &p, const decode_shared *shared, const float *sums,
           const mil_attention_item *item, int64_t out_row, int64_t partial_row, int32_t first)
{
    constexpr int COLUMNS = Shape::D / 4;
    const int32_t n_rows = min(item->n_rows - first, PART_ROWS);
    for (int32_t i = threadIdx.x % MIL_WARP; i < n_rows * COLUMNS; i += MIL_WARP) {
        const int32_t row = i / COLUMNS, column = 4 * (i % COLUMNS);
        float2 total;
        const float4 o = join_warps<Shape>(shared, sums, row, column, &total);
        if (item->n_splits == 1) {
            store_4<Shape>(p.out + (out_row + first + row) * Shape::D + column, o, total.y,
                           p.out_dtype);
            continue;
        }
        const int64_t at = partial_row + first + row;
        *(float4 *)(p.partials.o + at * Shape::D + column) = o;
        if (column == 0)
            p.partials.sums[at] = total;
    }
}

/* The splits of PART_ROWS rows become one, in their order, whoever came last. */
template <class Shape>
static __device__ __forceinline__ void merge_part(const mil_attention_sm90 &p,
                                                  const mil_attention_item *item, int64_t out_row,
                                                  int64_t partial_row, int32_t first)
{
    constexpr int COLUMNS = Shape::D / 4, TURNS = PART_ROWS * COLUMNS / MIL_WARP;
    const int32_t lane = threadIdx.x % MIL_WARP;
    float maximum[TURNS], sum[TURNS] = {};
    float4 o[TURNS] = {};
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        maximum[i] = MIL_ATTENTION_NO_MAXIMUM;
        const int64_t at =
            partial_row + min(first + (i * MIL_WARP + lane) / COLUMNS, item->n_rows - 1);
#pragma unroll 4
        for (int32_t s = 0; s < item->n_splits; s++)
            maximum[i] = fmaxf(maximum[i], __ldcg(&p.partials.sums[at + (int64_t)s * p.n_heads]).x);
    }
#pragma unroll 2
    for (int32_t s = 0; s < item->n_splits; s++)
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            const int32_t row = min(first + (i * MIL_WARP + lane) / COLUMNS, item->n_rows - 1);
            const int64_t at = partial_row + row + (int64_t)s * p.n_heads;
            const float2 part = __ldcg(&p.partials.sums[at]);
            const float4 v = __ldcg((const float4 *)(p.partials.o + at * Shape::D) +
                                    (i * MIL_WARP + lane) % COLUMNS);
            const float weight = mil_exp2(part.x - maximum[i]);
            sum[i] = fmaf(weight, part.y, sum[i]);
            o[i].x = fmaf(weight, v.x, o[i].x);
            o[i].y = fmaf(weight, v.y, o[i].y);
            o[i].z = fmaf(weight, v.z, o[i].z);
            o[i].w = fmaf(weight, v.w, o[i].w);
        }
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        const int32_t row = first + (i * MIL_WARP + lane) / COLUMNS;
        if (row < item->n_rows)
            store_4<Shape>(p.out + (out_row + row) * Shape::D +
                               4 * ((i * MIL_WARP + lane) % COLUMNS),
                           o[i], sum[i], p.out_dtype);
    }
}

/* True for the whole warp where its split of the item's rows came last. */
static __device__ __forceinline__ bool is_last_split(const mil_attention_sm90 &p,
                                                     const queued_item *queued)
{
    const mil_attention_item *item = &queued->item;
    int32_t is_last = 0;
    __threadfence();
    __syncwarp();
    if (threadIdx.x % MIL_WARP == 0)
        is_last = mil_attention_count(
            &p.places.counters[(int64_t)item->counter * p.n_kv_heads + queued->kv_head],
            item->n_splits);
    is_last = __shfl_sync(0xffffffffu, is_last, 0);
    __syncwarp(); /* the shuffle orders no memory: the others read behind the first lane's count */
    __threadfence();
    return is_last != 0;
}

template <class Shape>
static __device__ __forceinline__ void finish(const mil_attention_sm90 &p, decode_shared *shared,
                                              const float *sums)
{
    uint32_t n_parts = 0;
    for (uint32_t n = 0;; n++) {
        const uint32_t slot = n % N_ITEMS;
        const queued_item *queued = &shared->items[slot];
        const mil_attention_item *item = &queued->item;
        mil_barrier_wait(mil_shared_address(&shared->q_full[slot]), n / N_ITEMS & 1);
        const int32_t n_rows = item->n_rows;
        if (n_rows == 0)
            return;
        const int64_t out_row = mil_attention_row(item, queued->kv_head, 0, p.group, p.n_heads);
        const int64_t first_partial =
            (int64_t)item->partial * p.n_heads + queued->kv_head * p.group + item->first_row;
        const int64_t own_partial = first_partial + (int64_t)item->split * p.n_heads;
        for (int32_t first = 0; first < n_rows; first += PART_ROWS, n_parts++) {
            mil_barrier_wait(mil_shared_address(&shared->o_full), n_parts & 1);
            store_part<Shape>(p, shared, sums, item, out_row, own_partial, first);
            mil_barrier_arrive(mil_shared_address(&shared->o_empty));
        }
        if (item->n_splits > 1 && is_last_split(p, queued))
            for (int32_t first = 0; first < n_rows; first += PART_ROWS)
                merge_part<Shape>(p, item, out_row, first_partial, first);
        mil_barrier_arrive(mil_shared_address(&shared->q_empty[slot]));
    }
}

/* ---- the consumers ---- */

template <class Shape>
static __device__ __forceinline__ void consume(const mil_attention_sm90 &p, char *bytes,
                                               decode_shared *shared)
{
    const uint32_t memory = mil_shared_address(bytes), lane = threadIdx.x % MIL_WARP;
    uint32_t block = 0, n_parts = 0;
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
            /* ldmatrix that is on its way is no obstacle to the arrival: without the fence the next
             * tile overwrites V that is still being read. */
            mil_fence_shared();
            __syncwarp();
            if (lane == 0)
                mil_barrier_arrive(mil_shared_address(&shared->empty[stage]));
        }
        hand_over(state, shared, (float *)(bytes + Shape::O), queued->item.n_rows, &n_parts);
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
            mil_barrier_init(mil_shared_address(&shared->q_empty[i]), (N_WARPS + 1) * MIL_WARP);
        }
        for (int i = 0; i < Shape::STAGES; i++) {
            mil_barrier_init(mil_shared_address(&shared->k_full[i]), 1);
            mil_barrier_init(mil_shared_address(&shared->v_full[i]), 1);
            mil_barrier_init(mil_shared_address(&shared->empty[i]), N_WARPS);
        }
        mil_barrier_init(mil_shared_address(&shared->o_full), N_WARPS * MIL_WARP);
        mil_barrier_init(mil_shared_address(&shared->o_empty), MIL_WARP);
        mil_barrier_init_done();
    }
    __syncthreads();
    mil_wait_for_previous();
    mil_let_next_start();
    const uint32_t warp = threadIdx.x / MIL_WARP;
    if (warp == PRODUCER)
        produce<Shape>(p, &k_map, &v_map, mil_shared_address(memory), shared);
    else if (warp == FINISHER)
        finish<Shape>(p, shared, (const float *)(memory + Shape::O));
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

template <mil_dtype DTYPE>
static mil_status launch_any(const mil_queue *queue, const mil_attention_sm90 &params,
                             const CUtensorMap (&maps)[2], int64_t n_tiles)
{
    return params.head_dim == 64 ? launch<decode_shape<64, DTYPE>>(queue, params, maps, n_tiles)
                                 : launch<decode_shape<128, DTYPE>>(queue, params, maps, n_tiles);
}

mil_status mil_attention_decode_sm90(const mil_queue *queue, const mil_attention_sm90 *params,
                                     const CUtensorMap (&maps)[2], int64_t n_tiles)
{
    return params->dtype == MIL_DTYPE_F16
               ? launch_any<MIL_DTYPE_F16>(queue, *params, maps, n_tiles)
               : launch_any<MIL_DTYPE_BF16>(queue, *params, maps, n_tiles);
}
