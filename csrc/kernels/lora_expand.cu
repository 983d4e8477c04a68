/* expand: y[row, columns of part p] += scale * v B^T for the rows of every adapter in the batch.
 *
 * v as shrink left it: partial sums over K, added here in order and scaled in fp32 (lora.cuh). B
 * [out][padded_rank] bf16 row-major; y [T, ldy] bf16, read, added to in fp32 and rounded once.
 * Tensor cores take v as two bf16, high and low, which together hold it to 2^-17 of itself, so that
 * v stays float32 in all but name. Bound by B's bytes for few rows an adapter, by y's for many:
 * 0.25 to 0.57 of an H200's 4.55 TB/s for 64 rows of 64 adapters (2026-11-29, bench_ops).
 *
 * A persistent grid shares out what the batch has, so that the cost is by the adapters in use,
 * whatever a captured graph has room for. Each warp keeps pieces of B on their way to shared memory
 * across its blocks of columns, in a ring of its own: in registers, too little would be on its way.
 * A value of y is one thread's, whatever the grid: its bits depend on v and B alone. */
#include "kernels/cuda.h"

#include "kernels/lora.cuh"

#define WARPS 8
#define THREADS (WARPS * MIL_WARP)
#define BLOCKS 2   /* of an SM */
#define COLUMNS 32 /* of a warp: four n8 tiles */
#define BLOCK_COLUMNS (WARPS * COLUMNS)
#define RANK_TILE 16
#define MAX_RANK_TILES (MIL_LORA_V_PART / RANK_TILE)
#define STAGES 4 /* pieces of B on their way, of a warp */
#define PIECE_BYTES (COLUMNS * RANK_TILE * 2)
#define AT_ONCE 7 /* splits of v on their way, of a row */

struct expand_params {
    mil_batch batch;
    const mil_lora_module *modules; /* of this layer, slot 0 */
    int64_t slot_stride;
    const float *v;
    int64_t v_stride;
    uint16_t *y;
    int64_t ldy;
    int32_t n_tokens, bucket_segments;
    int32_t n_parts;
    int32_t interleave;
    bool is_vector; /* parts are of a multiple of 8 columns, which are one 16-byte access of y */
    int32_t column_step; /* of y, from one block of columns to the next; where is_vector */
    int32_t projections[MIL_MAX_PARTS];
    int32_t part_rows[MIL_MAX_PARTS];
    int32_t first_block[MIL_MAX_PARTS + 1]; /* blocks of columns, part by part */
};

struct expand_shared {
    /* v of one tile, summed, scaled and cut in two bf16, as the mma wants it: [rank tile][lane]. */
    uint4 high[MAX_RANK_TILES][MIL_WARP];
    uint4 low[MAX_RANK_TILES][MIL_WARP];
    char b[WARPS][STAGES][PIECE_BYTES]; /* piece_place() says where */
};

/* Column of y where column c of a part lies. Not inlined: where y is no vector it stands 16 times.
 */
static __device__ __noinline__ int32_t y_column(const expand_params &p, int32_t part, int32_t c)
{
    if (p.interleave > 0)
        return c / p.interleave * p.interleave * p.n_parts + part * p.interleave + c % p.interleave;
    for (int32_t before = 0; before < part; before++)
        c += p.part_rows[before];
    return c;
}

/* ---- v ---- */

/* Of two rows, a lane's 4 of the rank from r on; zeros where there is none. Splits are added in
 * order. */
static __device__ __forceinline__ void load_v(float (&out)[2][4], const expand_params &p,
                                              const mil_lora_module &module,
                                              const mil_lora_tile &tile, int32_t part, int32_t r)
{
    const int32_t n_splits = mil_lora_splits(module.in, module.padded_rank);
    const int32_t row = (int32_t)(threadIdx.x % MIL_WARP) / 4;
    const float *v = p.v + (tile.first + row) * p.v_stride + part * MIL_LORA_V_PART + r;
#pragma unroll
    for (int i = 0; i < 8; i++)
        out[i / 4][i % 4] = 0.0f;
    for (int32_t split = 0; split < n_splits; split += AT_ONCE) {
        float4 some[AT_ONCE][2];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const bool is_there =
                    split + i < n_splits && row + 8 * half < tile.n_rows && r < module.padded_rank;
                some[i][half] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (is_there)
                    some[i][half] = __ldcg((const float4 *)(v + 8 * half * p.v_stride +
                                                            (split + i) * module.padded_rank));
            }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                out[half][0] += some[i][half].x;
                out[half][1] += some[i][half].y;
                out[half][2] += some[i][half].z;
                out[half][3] += some[i][half].w;
            }
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        out[i / 4][i % 4] *= module.scale;
}

static __device__ __forceinline__ void split_pair(uint32_t &high, uint32_t &low, float a, float b)
{
    high = mil_pack2(a, b);
    low = mil_pack2(a - __uint_as_float(high << 16), b - __uint_as_float(high & 0xffff0000u));
}

/* All warps share the rank tiles out. */
static __device__ __forceinline__ void make_fragments(expand_shared &shared, const expand_params &p,
                                                      const mil_lora_module &module,
                                                      const mil_lora_tile &tile, int32_t part)
{
    const int lane = threadIdx.x % MIL_WARP, warp = threadIdx.x / MIL_WARP;
    for (int32_t i = warp; i * RANK_TILE < module.padded_rank; i += WARPS) {
        float v[2][4];
        uint32_t high[4], low[4];
        load_v(v, p, module, tile, part, i * RANK_TILE + 4 * (lane % 4));
#pragma unroll
        for (int half = 0; half < 2; half++) {
            split_pair(high[half], low[half], v[half][0], v[half][1]);
            split_pair(high[2 + half], low[2 + half], v[half][2], v[half][3]);
        }
        shared.high[i][lane] = make_uint4(high[0], high[1], high[2], high[3]);
        shared.low[i][lane] = make_uint4(low[0], low[1], low[2], low[3]);
    }
}

/* ---- B ---- */

/* Where 8 of the rank (`half` of 16) of a warp's column lie in a piece, in bytes: of half a warp's
 * 8-byte loads, two columns of one group of 8 and two of the next, each bank has one. */
static __device__ __forceinline__ uint32_t piece_place(uint32_t column, uint32_t half)
{
    return ((2 * column + half) ^ (column / 8 % 2 * 4)) * 16;
}

/* Pieces of B in order: 16 of the rank after 16, then the next block's columns. A lane sends 8 of
 * the rank of two columns, 16 apart. All of it is kept from piece to piece, since at rank 16 the
 * instructions for a piece are what bounds. */
struct sender {
    const uint16_t *from; /* B[c][r + 8 * half] */
    uint32_t to;          /* shared, in the ring's first piece */
    int32_t c, r, half;
    int32_t end_c; /* where c ends */
};

static __device__ __forceinline__ sender make_sender(const mil_lora_module &module,
                                                     const char *ring, int32_t c0, int32_t end_c)
{
    const int32_t column = (int32_t)(threadIdx.x % MIL_WARP) / 2;
    sender s;
    s.c = c0 + column;
    s.r = 0;
    s.half = (int32_t)threadIdx.x % 2;
    s.end_c = end_c + column;
    s.from = (const uint16_t *)module.b + (int64_t)s.c * module.padded_rank + 8 * s.half;
    s.to = mil_shared_address(ring) + piece_place(column, s.half);
    return s;
}

/* Past the end nothing, but a group of copies all the same: waits count groups. */
static __device__ __forceinline__ void send_piece(sender &s, const mil_lora_module &module,
                                                  uint32_t stage)
{
    if (s.c < s.end_c) {
        const uint32_t to = s.to + stage * PIECE_BYTES;
        const bool is_in = s.r + 8 * s.half < module.padded_rank;
        mil_copy16_at(to, s.from, is_in && s.c < module.out);
        mil_copy16_at(to + PIECE_BYTES / 2, s.from + 16 * module.padded_rank,
                      is_in && s.c + 16 < module.out);
        s.r += RANK_TILE;
        s.from += RANK_TILE;
        if (s.r >= module.padded_rank) {
            s.c += BLOCK_COLUMNS;
            s.from += BLOCK_COLUMNS * module.padded_rank - s.r;
            s.r = 0;
        }
    }
    mil_copy_commit();
}

/* Where a lane's columns of tiles 0 and 1 lie in a piece; those of tiles 2 and 3 are 128 bytes on.
 * Tile t's column n is 8 (n / 2) + 2 t + n % 2, so that lane (n = lane / 4, q = lane % 4) ends with
 * columns 8 q .. 8 q + 7 of rows n and n + 8. Its 4 of the rank are 4 q .. 4 q + 3 of v and of B
 * alike. */
struct lane_places {
    uint32_t tile[2];
};

static __device__ __forceinline__ lane_places find_places()
{
    const uint32_t n = threadIdx.x % MIL_WARP / 4, q = threadIdx.x % 4;
    lane_places places;
#pragma unroll
    for (uint32_t t = 0; t < 2; t++)
        places.tile[t] = piece_place(8 * (n / 2) + 2 * t + n % 2, q / 2) + q % 2 * 8;
    return places;
}

/* d += 16 of the rank. */
static __device__ __forceinline__ void multiply(float (&d)[4][4], uint4 high, uint4 low,
                                                const char *piece, const lane_places &places)
{
    const uint32_t high_a[4] = {high.x, high.y, high.z, high.w};
    const uint32_t low_a[4] = {low.x, low.y, low.z, low.w};
#pragma unroll
    for (int t = 0; t < 4; t++) {
        const uint2 b = *(const uint2 *)(piece + places.tile[t % 2] + t / 2 * 128);
        mil_mma(d[t], low_a, b.x, b.y);
        mil_mma(d[t], high_a, b.x, b.y);
    }
}

/* ---- y ---- */

/* The 8 columns of a lane, from c on, in two rows. */
struct y_columns {
    uint4 y[2];     /* where is_vector */
    int32_t c;      /* of the part */
    int32_t column; /* of y, where column c lies */
};

/* rows: of y, NULL where the tile has none. */
static __device__ __forceinline__ void load_y(y_columns &to, const expand_params &p, int32_t out,
                                              uint16_t *const (&rows)[2])
{
#pragma unroll
    for (int half = 0; half < 2; half++)
        if (p.is_vector && to.c < out && rows[half] != nullptr)
            to.y[half] = *(const uint4 *)(rows[half] + to.column);
}

static __device__ __forceinline__ void add_to_row(const expand_params &p, int32_t part, int32_t out,
                                                  uint16_t *row, const y_columns &at, uint4 old,
                                                  const float (&delta)[8])
{
    if (p.is_vector) {
        float y[8];
        mil_widen8(y, old);
#pragma unroll
        for (int i = 0; i < 8; i++)
            y[i] += delta[i];
        mil_store8(row + at.column, y);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (at.c + i >= out)
            return;
        uint16_t *y = row + y_column(p, part, at.c + i);
        *y = mil_round(mil_widen(*y) + delta[i]);
    }
}

static __device__ __forceinline__ void add_to_y(const expand_params &p, int32_t part, int32_t out,
                                                uint16_t *const (&rows)[2], const y_columns &at,
                                                const float (&d)[4][4])
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float delta[8];
#pragma unroll
        for (int i = 0; i < 8; i++)
            delta[i] = d[i / 2][2 * half + i % 2];
        if (at.c < out && rows[half] != nullptr)
            add_to_row(p, part, out, rows[half], at, at.y[half], delta);
    }
}

/* ---- the kernel ---- */

/* Blocks of columns `block` .. `end` of one part, for one tile. All of a block's threads. */
static __device__ __forceinline__ void expand_run(expand_shared &shared, const expand_params &p,
                                                  const mil_lora_tile &tile, int32_t part,
                                                  int32_t block, int32_t end)
{
    const int32_t lane = threadIdx.x % MIL_WARP, warp = threadIdx.x / MIL_WARP;
    const mil_lora_rows tokens = mil_lora_rows_load(p.batch, tile, 0);
    const mil_lora_module module =
        mil_lora_module_load(&p.modules[tile.adapter_slot * p.slot_stride + p.projections[part]]);
    if (module.rank == 0)
        return;
    const int32_t out = min(module.out, p.part_rows[part]);
    const int32_t end_c = min(end * BLOCK_COLUMNS, out);
    const int32_t n_rank_tiles = mil_ceil_div(module.padded_rank, RANK_TILE);
    int32_t c0 = block * BLOCK_COLUMNS + warp * COLUMNS;
    __syncthreads(); /* the fragments and pieces before these are read */
    const char *const ring = shared.b[warp][0];
    sender send = make_sender(module, ring, c0, end_c);
#pragma unroll
    for (uint32_t stage = 0; stage < STAGES - 1; stage++)
        send_piece(send, module, stage);
    uint16_t *rows[2];
    mil_lora_rows_find(rows, tokens, p.y, p.ldy, p.n_tokens);
    y_columns next;
    next.c = c0 + 8 * (lane % 4);
    next.column = y_column(p, part, next.c);
    load_y(next, p, out, rows);
    make_fragments(shared, p, module, tile, part);
    __syncthreads();
    const lane_places places = find_places();
    uint32_t stage = 0;
    for (; c0 < end_c; c0 += BLOCK_COLUMNS) {
        const y_columns now = next;
        next.c = c0 + BLOCK_COLUMNS < end_c ? now.c + BLOCK_COLUMNS : out;
        next.column += p.column_step;
        load_y(next, p, out, rows);
        float d[4][4] = {};
#pragma unroll 1
        for (int32_t i = 0; i < n_rank_tiles; i++) {
            mil_copy_wait<STAGES - 2>();
            __syncwarp(); /* the others' copies too, and they have read the piece before */
            send_piece(send, module, (stage + STAGES - 1) % STAGES);
            multiply(d, shared.high[i][lane], shared.low[i][lane], ring + stage * PIECE_BYTES,
                     places);
            stage = (stage + 1) % STAGES;
        }
        add_to_y(p, part, out, rows, now, d);
    }
}

/* An item is a block of columns of one tile; items go column by column, then tile by tile. A block
 * takes an equal share of those that the batch has, one after another: neighbours share a tile, and
 * tiles that a graph's bucket has room for and the batch lacks cost nothing. */
static __global__ void __launch_bounds__(THREADS, BLOCKS)
    expand_kernel(const __grid_constant__ expand_params p)
{
    extern __shared__ __align__(16) unsigned char memory[];
    expand_shared &shared = *(expand_shared *)memory;
    mil_let_next_start();
    mil_wait_for_previous();
    const uint32_t n_blocks = (uint32_t)p.first_block[p.n_parts];
    const uint32_t n_items =
        n_blocks * mil_lora_tiles_count(p.batch, p.bucket_segments, MIL_LORA_TILE_ROWS);
    /* Equal shares but for the last: of Llama's shapes they divide a tile's blocks, so that few
     * blocks have two tiles. Shares that differ by one at most took a fifth longer there. */
    const uint32_t share = (n_items + gridDim.x - 1) / gridDim.x;
    uint32_t item = blockIdx.x * share;
    const uint32_t end = min(item + share, n_items);
    while (item < end) {
        const uint32_t index = item / n_blocks;
        const int32_t block = (int32_t)(item % n_blocks);
        int32_t part = 0;
        while (block >= p.first_block[part + 1])
            part++;
        const int32_t run = (int32_t)min(end - item, (uint32_t)(p.first_block[part + 1] - block));
        const mil_lora_tile tile =
            mil_lora_tile_find(p.batch, p.bucket_segments, index, MIL_LORA_TILE_ROWS);
        const int32_t first = block - p.first_block[part];
        expand_run(shared, p, tile, part, first, first + run);
        item += (uint32_t)run;
    }
}

static bool is_vector(const mil_lora_expand_args *args)
{
    const mil_weight *weight = args->weight;
    bool is_even = args->ldy % 8 == 0 && weight->interleave % 8 == 0 &&
                   (weight->interleave == 0 || BLOCK_COLUMNS % weight->interleave == 0);
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
    p.bucket_segments = lora->batch->header->bucket_segments;
    p.n_parts = lora->n_parts;
    p.interleave = args->weight->interleave;
    p.is_vector = is_vector(args);
    p.column_step = BLOCK_COLUMNS * (p.interleave > 0 ? p.n_parts : 1);
    for (int32_t part = 0; part < lora->n_parts; part++) {
        p.projections[part] = lora->projections[part];
        p.part_rows[part] = args->weight->part_rows[part];
        p.first_block[part + 1] =
            p.first_block[part] + mil_ceil_div(p.part_rows[part], BLOCK_COLUMNS);
    }
    const int64_t n_items =
        (int64_t)p.first_block[lora->n_parts] * mil_lora_max_tiles(lora->batch, MIL_LORA_TILE_ROWS);
    if (n_items > INT32_MAX)
        return mil_fail(MIL_ERR_UNSUPPORTED,
                        "lora_expand: %d rows by %d columns take %lld items, expected <= %d",
                        n_rows, args->weight->N, (long long)n_items, INT32_MAX);
    const int64_t most = (int64_t)context->queue->n_sms * BLOCKS;
    MIL_CUDA_TRY(cudaFuncSetAttribute(expand_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      (int)sizeof(expand_shared)));
    return mil_launch(context->queue, "lora_expand", expand_kernel,
                      dim3((uint32_t)(n_items < most ? n_items : most)), dim3(THREADS),
                      sizeof(expand_shared), p);
}
