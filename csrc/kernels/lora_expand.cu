/* expand: y[row, columns of part p] += scale * v B^T for the rows of every adapter in the batch.
 *
 * v as shrink left it: partial sums over K, added here in order and scaled in fp32 (lora.cuh). B
 * [out][padded_rank] bf16 row-major; y [T, ldy] bf16, read, added to in fp32 and rounded once.
 * Tensor cores take v as two bf16, high and low, which together hold it to 2^-17 of itself, so that
 * v stays float32 in all but name. Bound by B's bytes for few rows an adapter, by y's for many. */
#include "kernels/cuda.h"

#include "kernels/lora.cuh"

#define WARPS 4
#define THREADS (WARPS * MIL_WARP)
#define RANK_TILE 16
#define COLUMNS 32 /* of one step of a warp: four n8 tiles */
#define STEPS 2    /* of a warp */
#define BLOCK_COLUMNS (WARPS * STEPS * COLUMNS)
#define MAX_RANK_TILES (MIL_LORA_V_PART / RANK_TILE)

struct expand_params {
    mil_batch batch;
    const mil_lora_module *modules; /* of this layer, slot 0 */
    int64_t slot_stride;
    const float *v;
    int64_t v_stride;
    uint16_t *y;
    int64_t ldy;
    int32_t n_tokens;
    int32_t n_parts;
    int32_t interleave;
    bool is_vector; /* 8 columns of a part from a multiple of 8 on are one 16-byte access of y */
    int32_t projections[MIL_MAX_PARTS];
    int32_t part_rows[MIL_MAX_PARTS];
    int32_t first_block[MIL_MAX_PARTS + 1]; /* blocks of columns, part by part */
};

/* v of one tile, summed, scaled and cut in two bf16, as the mma wants it: [rank tile][lane]. */
struct fragments {
    uint4 high[MAX_RANK_TILES][MIL_WARP];
    uint4 low[MAX_RANK_TILES][MIL_WARP];
};

/* Column of y where column c of a part lies. */
static __device__ __forceinline__ int32_t y_column(const expand_params &p, int32_t part, int32_t c)
{
    if (p.interleave > 0)
        return c / p.interleave * p.interleave * p.n_parts + part * p.interleave + c % p.interleave;
    for (int32_t before = 0; before < part; before++)
        c += p.part_rows[before];
    return c;
}

/* A lane's 4 of the rank in a tile are r = 4 q .. 4 q + 3 of v and of B alike. */
static __device__ __forceinline__ void load_v(float (&out)[4], const expand_params &p,
                                              const mil_lora_module &module, int32_t row,
                                              int32_t part, int32_t r)
{
    int32_t n_splits = mil_lora_splits(module.in, module.padded_rank);
    const float *v = p.v + row * p.v_stride + part * MIL_LORA_V_PART + r;
#pragma unroll
    for (int i = 0; i < 4; i++)
        out[i] = 0.0f;
    for (int32_t split = 0; split < n_splits; split++) {
        float4 one = __ldcg((const float4 *)(v + split * module.padded_rank));
        out[0] += one.x;
        out[1] += one.y;
        out[2] += one.z;
        out[3] += one.w;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        out[i] *= module.scale;
}

static __device__ __forceinline__ void split_pair(uint32_t &high, uint32_t &low, float a, float b)
{
    high = mil_pack2(a, b);
    low = mil_pack2(a - __uint_as_float(high << 16), b - __uint_as_float(high & 0xffff0000u));
}

/* All warps share the rank tiles out. */
static __device__ __forceinline__ void make_fragments(fragments &f, const expand_params &p,
                                                      const mil_lora_module &module,
                                                      const mil_lora_tile &tile, int32_t part)
{
    int lane = threadIdx.x % MIL_WARP, warp = threadIdx.x / MIL_WARP;
    for (int32_t i = warp; i * RANK_TILE < module.padded_rank; i += WARPS) {
        int32_t r = i * RANK_TILE + 4 * (lane % 4);
        uint32_t high[4], low[4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int32_t row = lane / 4 + 8 * half;
            float v[4] = {};
            if (row < tile.n_rows && r < module.padded_rank)
                load_v(v, p, module, tile.first + row, part, r);
            split_pair(high[half], low[half], v[0], v[1]);
            split_pair(high[2 + half], low[2 + half], v[2], v[3]);
        }
        f.high[i][lane] = make_uint4(high[0], high[1], high[2], high[3]);
        f.low[i][lane] = make_uint4(low[0], low[1], low[2], low[3]);
    }
}

/* 32 columns from c0 on: lane (n = lane / 4, q = lane % 4) ends with columns 8 q .. 8 q + 7 of rows
 * n and n + 8, because tile t's column n is 8 (n / 2) + 2 t + n % 2. */
static __device__ __forceinline__ void multiply(float (&d)[4][4], const fragments &f,
                                                const mil_lora_module &module, int32_t c0)
{
    int lane = threadIdx.x % MIL_WARP;
    int n = lane / 4, q = lane % 4;
    int32_t padded_rank = module.padded_rank;
    for (int32_t i = 0; i * RANK_TILE < padded_rank; i++) {
        int32_t r = i * RANK_TILE + 4 * q;
        uint2 b[4];
#pragma unroll
        for (int t = 0; t < 4; t++) {
            int32_t c = c0 + 8 * (n / 2) + 2 * t + n % 2;
            const uint16_t *row = (const uint16_t *)module.b + (int64_t)c * padded_rank + r;
            b[t] = c < module.out && r < padded_rank ? __ldg((const uint2 *)row) : make_uint2(0, 0);
        }
        uint4 high = f.high[i][lane], low = f.low[i][lane];
        uint32_t high_a[4] = {high.x, high.y, high.z, high.w};
        uint32_t low_a[4] = {low.x, low.y, low.z, low.w};
#pragma unroll
        for (int t = 0; t < 4; t++) {
            mil_mma(d[t], low_a, b[t].x, b[t].y);
            mil_mma(d[t], high_a, b[t].x, b[t].y);
        }
    }
}

static __device__ __forceinline__ void add_to_y(const expand_params &p, int32_t part, int32_t out,
                                                int32_t t, int32_t c, const float (&delta)[8])
{
    uint16_t *row = p.y + (int64_t)t * p.ldy;
    if (p.is_vector && c + 8 <= out) {
        uint16_t *at = row + y_column(p, part, c);
        float y[8];
        mil_load8(y, at);
#pragma unroll
        for (int i = 0; i < 8; i++)
            y[i] += delta[i];
        mil_store8(at, y);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (c + i >= out)
            return;
        uint16_t *at = row + y_column(p, part, c + i);
        *at = mil_round(mil_widen(*at) + delta[i]);
    }
}

/* Grid, flat because tiles alone may pass what y and z take: blocks of columns over all parts, then
 * tiles, so that tiles that are not there come last. */
static __global__ void __launch_bounds__(THREADS) expand_kernel(expand_params p)
{
    extern __shared__ __align__(16) unsigned char shared[];
    fragments &f = *(fragments *)shared;
    int lane = threadIdx.x % MIL_WARP, warp = threadIdx.x / MIL_WARP;
    uint32_t n_blocks = (uint32_t)p.first_block[p.n_parts];
    int32_t block = (int32_t)(blockIdx.x % n_blocks), part = 0;
    mil_let_next_start();
    mil_wait_for_previous();
    mil_lora_tile tile =
        mil_lora_tile_find(p.batch, (int32_t)(blockIdx.x / n_blocks), MIL_LORA_TILE_ROWS);
    if (tile.n_rows == 0)
        return;
    while (part + 1 < p.n_parts && block >= p.first_block[part + 1])
        part++;
    const mil_lora_module module =
        p.modules[tile.adapter_slot * p.slot_stride + p.projections[part]];
    if (module.rank == 0)
        return;
    make_fragments(f, p, module, tile, part);
    __syncthreads();
    int32_t out = min(module.out, p.part_rows[part]);
    int32_t c0 = (block - p.first_block[part]) * BLOCK_COLUMNS + warp * STEPS * COLUMNS;
#pragma unroll
    for (int step = 0; step < STEPS; step++, c0 += COLUMNS) {
        if (c0 >= out)
            return;
        float d[4][4] = {};
        multiply(d, f, module, c0);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int32_t row = lane / 4 + 8 * half;
            int32_t t = row < tile.n_rows ? p.batch.lora_rows[tile.first + row] : -1;
            if ((uint32_t)t >= (uint32_t)p.n_tokens)
                continue; /* there is no such row */
            float delta[8];
#pragma unroll
            for (int i = 0; i < 8; i++)
                delta[i] = d[i / 2][2 * half + i % 2];
            add_to_y(p, part, out, t, c0 + 8 * (lane % 4), delta);
        }
    }
}

static bool is_vector(const mil_lora_expand_args *args)
{
    const mil_weight *weight = args->weight;
    bool is_even = args->ldy % 8 == 0 && weight->interleave % 8 == 0;
    for (int32_t part = 0; part < weight->n_parts; part++)
        is_even = is_even && weight->part_rows[part] % 8 == 0;
    return is_even;
}

extern "C" mil_status mil_cuda_lora_expand(mil_context *context, const mil_lora_expand_args *args)
{
    const mil_lora_args *lora = &args->lora;
    int32_t n_rows = mil_lora_max_rows(lora->batch);
    if (n_rows == 0 || lora->batch->header->bucket_segments == 0)
        return MIL_OK;
    if (lora->v_part_stride != MIL_LORA_V_PART)
        return mil_fail(MIL_ERR_INTERNAL, "lora_expand: v_part_stride is %lld, expected %d",
                        (long long)lora->v_part_stride, MIL_LORA_V_PART);
    expand_params p = {};
    p.batch = *lora->batch;
    p.modules = lora->table->modules + (int64_t)lora->layer * MIL_N_PROJECTIONS;
    p.slot_stride = (int64_t)lora->table->n_layers * MIL_N_PROJECTIONS;
    p.v = lora->v;
    p.v_stride = lora->v_stride;
    p.y = (uint16_t *)args->y;
    p.ldy = args->ldy;
    p.n_tokens = lora->batch->header->bucket_tokens;
    p.n_parts = lora->n_parts;
    p.interleave = args->weight->interleave;
    p.is_vector = is_vector(args);
    for (int32_t part = 0; part < lora->n_parts; part++) {
        p.projections[part] = lora->projections[part];
        p.part_rows[part] = args->weight->part_rows[part];
        p.first_block[part + 1] =
            p.first_block[part] + mil_ceil_div(p.part_rows[part], BLOCK_COLUMNS);
    }
    uint32_t n_tiles = mil_lora_max_tiles(lora->batch, MIL_LORA_TILE_ROWS);
    int64_t n_blocks = (int64_t)p.first_block[lora->n_parts] * n_tiles;
    if (n_blocks > INT32_MAX)
        return mil_fail(MIL_ERR_UNSUPPORTED,
                        "lora_expand: %d rows by %d columns, more than one launch", n_rows,
                        args->weight->N);
    return mil_launch(context->queue, "lora_expand", expand_kernel, dim3((uint32_t)n_blocks),
                      dim3(THREADS), sizeof(fragments), p);
}
