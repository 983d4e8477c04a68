/* shrink: v[i] = x[lora_rows[i]] A^T for the rows of every adapter in the batch, as partial sums
 * over K (lora.cuh). x [T, ldx] bf16; A [padded_rank][in] bf16 row-major; fp32 sums on tensor cores
 * (m16n8k16) for every number of rows. The scale waits for expand.
 *
 * Segmented as SGMV is (Chen et al., "Punica", 2023), with K split so that one adapter's A is read
 * by many blocks. Bound by A's bytes for few rows an adapter; the cost is the sum of real ranks
 * over the adapters in use. One order of sums: each split is four quarters, each one chain of k16
 * steps; quarters are added in order, splits by expand. Whether four warps hold a quarter each (few
 * rows) or one warp runs all four (many rows) does not change a bit. For 64 rows of 64 adapters
 * 0.28 to 0.45 of an H200's 4.55 TB/s; few bytes are bound by latency, 5 us (2026-11-29,
 * bench_ops). */
#include "kernels/cuda.h"

#include "kernels/lora.cuh"

#define WARPS 4
#define THREADS (WARPS * MIL_WARP)
#define QUARTERS 4
#define BLOCK_K 32    /* K of one 16-byte load of each lane of a quad: two k16 steps */
#define RANK_TILE 16  /* two n8 tiles */
#define AT_ONCE 4     /* K blocks in flight */
#define BLOCKS 4      /* of an SM */
#define GRID 8        /* blocks of the grid for an SM; of 4 not all find room beside a product */
#define MANY_ROWS 512 /* with an adapter, from which blocks take 64 rows and all of K */

struct shrink_params {
    mil_batch batch;
    const mil_lora_module *modules; /* of this layer's first projection, slot 0 */
    int64_t slot_stride;            /* modules from one slot to the next */
    int32_t projections[MIL_MAX_PARTS];
    float *v;
    int64_t v_stride;
    const uint16_t *x;
    int64_t ldx;
    int32_t n_tokens, bucket_segments;
    int32_t n_parts, n_splits; /* most of a part's splits */
};

/* 8 elements of a row at k, zeros where they are past the end. in % 8 == 0 keeps loads aligned. Not
 * by __ldg: x is written by the kernel before, and this one may have started by then. */
static __device__ __forceinline__ uint4 load8(const uint16_t *row, int32_t k, int32_t end,
                                              bool is_aligned)
{
    uint4 v = make_uint4(0, 0, 0, 0);
    if (row == nullptr || k >= end)
        return v;
    if (is_aligned)
        return __ldcg((const uint4 *)(row + k));
    uint16_t item[8];
#pragma unroll
    for (int i = 0; i < 8; i++)
        item[i] = k + i < end ? row[k + i] : (uint16_t)0;
    v.x = item[0] | (uint32_t)item[1] << 16;
    v.y = item[2] | (uint32_t)item[3] << 16;
    v.z = item[4] | (uint32_t)item[5] << 16;
    v.w = item[6] | (uint32_t)item[7] << 16;
    return v;
}

/* d[two n8 tiles] = sum over k in [begin, end) of 16 rows of x with 16 of A. A lane's 8 elements
 * are k = 8 q .. 8 q + 7 of a block, for x and A alike: mma sums over k, so that which k it calls
 * which does not matter. */
static __device__ __forceinline__ void sum_range(float (&d)[2][4], const uint16_t *const (&x)[2],
                                                 const uint16_t *const (&a)[2], int32_t begin,
                                                 int32_t end, bool is_aligned)
{
    int32_t offset = 8 * (int32_t)(threadIdx.x % 4);
    for (int32_t k = begin; k < end; k += BLOCK_K * AT_ONCE) {
        uint4 xs[AT_ONCE][2], as[AT_ONCE][2];
#pragma unroll
        for (int b = 0; b < AT_ONCE; b++) {
            int32_t at = k + b * BLOCK_K + offset;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                as[b][h] = load8(a[h], at, end, is_aligned);
                xs[b][h] = load8(x[h], at, end, is_aligned);
            }
        }
#pragma unroll
        for (int b = 0; b < AT_ONCE; b++) {
            if (k + b * BLOCK_K >= end)
                break;
            uint32_t first[4] = {xs[b][0].x, xs[b][1].x, xs[b][0].y, xs[b][1].y};
            uint32_t second[4] = {xs[b][0].z, xs[b][1].z, xs[b][0].w, xs[b][1].w};
#pragma unroll
            for (int h = 0; h < 2; h++) {
                mil_mma(d[h], first, as[b][h].x, as[b][h].y);
                mil_mma(d[h], second, as[b][h].z, as[b][h].w);
            }
        }
    }
}

/* A fragment of sums, 16 rows x 16 of the rank, to v. */
static __device__ __forceinline__ void store(const shrink_params &p, const mil_lora_tile &tile,
                                             int32_t part, int32_t split, int32_t padded_rank,
                                             int32_t rank0, int32_t row0, const float (&d)[2][4])
{
    int lane = threadIdx.x % MIL_WARP;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int32_t r = rank0 + 8 * h + 2 * (lane % 4);
        if (r >= padded_rank)
            continue;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int32_t row = row0 + lane / 4 + 8 * half;
            if (row >= tile.n_rows)
                continue;
            float *v = p.v + (tile.first + row) * p.v_stride + part * MIL_LORA_V_PART +
                       split * padded_rank + r;
            *(float2 *)v = make_float2(d[h][2 * half], d[h][2 * half + 1]);
        }
    }
}

/* One tile, part and split. All of a block's threads. */
template <bool has_many>
static __device__ __forceinline__ void shrink(const shrink_params &p, const mil_lora_tile &tile,
                                              int32_t part, int32_t split)
{
    __shared__ float quarters[has_many ? 1 : QUARTERS][2][4][MIL_WARP];
    const int32_t lane = threadIdx.x % MIL_WARP, warp = threadIdx.x / MIL_WARP;
    const int32_t row0 = has_many ? warp * MIL_LORA_TILE_ROWS : 0;
    const mil_lora_rows rows = mil_lora_rows_load(p.batch, tile, row0);
    const mil_lora_module module =
        mil_lora_module_load(&p.modules[tile.adapter_slot * p.slot_stride + p.projections[part]]);
    if (module.rank == 0)
        return;
    const int32_t in = module.in, padded_rank = module.padded_rank;
    const int32_t n_splits = mil_lora_splits(in, padded_rank);
    if (split >= n_splits)
        return;
    const int32_t unit = QUARTERS * BLOCK_K;
    const int32_t split_k = mil_ceil_div(mil_ceil_div(in, n_splits), unit) * unit;
    const int32_t quarter_k = split_k / QUARTERS;
    const bool is_aligned = in % 8 == 0 && p.ldx % 8 == 0;
    const uint16_t *x[2];
    mil_lora_rows_find(x, rows, p.x, p.ldx, p.n_tokens);
    for (int32_t rank0 = 0; rank0 < padded_rank; rank0 += RANK_TILE) {
        const uint16_t *a[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int32_t r = rank0 + 8 * h + lane / 4;
            a[h] = r < padded_rank ? (const uint16_t *)module.a + (int64_t)r * in : nullptr;
        }
        float sum[2][4] = {};
#pragma unroll 1
        for (int q = 0; q < QUARTERS; q++) {
            if (!has_many && q != warp)
                continue;
            float d[2][4] = {};
            int32_t begin = split * split_k + q * quarter_k;
            sum_range(d, x, a, begin, min(begin + quarter_k, in), is_aligned);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (has_many)
                    sum[i / 4][i % 4] += d[i / 4][i % 4];
                else
                    quarters[q][i / 4][i % 4][lane] = d[i / 4][i % 4];
            }
        }
        if (has_many) {
            store(p, tile, part, split, padded_rank, rank0, row0, sum);
            continue;
        }
        __syncthreads();
        if (warp == 0) {
#pragma unroll
            for (int q = 0; q < QUARTERS; q++)
#pragma unroll
                for (int i = 0; i < 8; i++)
                    sum[i / 4][i % 4] += quarters[q][i / 4][i % 4][lane];
            store(p, tile, part, split, padded_rank, rank0, 0, sum);
        }
        __syncthreads();
    }
}

/* An item is a tile, a part and a split; tiles are next to each other. Blocks share out what the
 * batch has: tiles that a graph's bucket has room for and the batch lacks cost nothing. has_many:
 * 64 rows a block, 16 a warp; else 16, and the warps share K. */
template <bool has_many>
static __global__ void __launch_bounds__(THREADS, BLOCKS)
    shrink_kernel(const __grid_constant__ shrink_params p)
{
    constexpr int32_t TILE_ROWS = has_many ? WARPS * MIL_LORA_TILE_ROWS : MIL_LORA_TILE_ROWS;
    mil_let_next_start();
    mil_wait_for_previous();
    const uint32_t n_tiles = mil_lora_tiles_count(p.batch, p.bucket_segments, TILE_ROWS);
    const uint32_t n_items = n_tiles * (uint32_t)(p.n_parts * p.n_splits);
    for (uint32_t item = blockIdx.x; item < n_items; item += gridDim.x) {
        const mil_lora_tile tile =
            mil_lora_tile_find(p.batch, p.bucket_segments, item % n_tiles, TILE_ROWS);
        const int32_t rest = (int32_t)(item / n_tiles);
        shrink<has_many>(p, tile, rest % p.n_parts, rest / p.n_parts);
    }
}

extern "C" mil_status mil_cuda_lora_shrink(mil_context *context, const mil_lora_shrink_args *args)
{
    const mil_lora_args *lora = &args->lora;
    int32_t n_rows = mil_lora_max_rows(lora->batch);
    if (n_rows == 0 || lora->batch->header->bucket_segments == 0)
        return MIL_OK;
    if (lora->v_part_stride != MIL_LORA_V_PART)
        return mil_fail(MIL_ERR_INTERNAL, "lora_shrink: v_part_stride is %lld, expected %d",
                        (long long)lora->v_part_stride, MIL_LORA_V_PART);
    shrink_params p = {};
    p.batch = *lora->batch;
    p.modules = lora->table->modules + (int64_t)lora->layer * MIL_N_PROJECTIONS;
    p.slot_stride = (int64_t)lora->table->n_layers * MIL_N_PROJECTIONS;
    for (int32_t part = 0; part < lora->n_parts; part++)
        p.projections[part] = lora->projections[part];
    p.v = lora->v;
    p.v_stride = lora->v_stride;
    p.x = args->x;
    p.ldx = args->ldx;
    p.n_tokens = lora->batch->header->bucket_tokens;
    p.bucket_segments = lora->batch->header->bucket_segments;
    p.n_parts = lora->n_parts;
    p.n_splits = mil_lora_splits((int32_t)args->ldx, 1); /* a row of x is as long as any A's */
    const bool has_many = n_rows >= MANY_ROWS;
    const int32_t tile_rows = has_many ? WARPS * MIL_LORA_TILE_ROWS : MIL_LORA_TILE_ROWS;
    const int64_t n_items =
        (int64_t)mil_lora_max_tiles(lora->batch, tile_rows) * p.n_parts * p.n_splits;
    const int64_t most = (int64_t)context->queue->n_sms * GRID;
    if (n_items > INT32_MAX)
        return mil_fail(MIL_ERR_UNSUPPORTED,
                        "lora_shrink: %d rows of %d take %lld items, expected <= %d", n_rows,
                        (int32_t)args->ldx, (long long)n_items, INT32_MAX);
    return mil_launch(context->queue, "lora_shrink",
                      has_many ? shrink_kernel<true> : shrink_kernel<false>,
                      dim3((uint32_t)(n_items < most ? n_items : most)), dim3(THREADS), 0, p);
}
