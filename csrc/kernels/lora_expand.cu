/* expand: y[row, columns of part p] += scale * v B^T for the rows of every adapter in the batch.
 *
 * v as shrink left it: partial sums over K, added here in order and scaled in fp32 (lora.cuh). B
 * [out][padded_rank] bf16 row-major; y [T, ldy] bf16, read, added to in fp32 and rounded once.
 * Tensor cores take v as two bf16, high and low, which together hold it to 2^-17 of itself, so that
 * v stays float32 in all but name. Bound by B's bytes for few rows an adapter, by y's for many.
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
#define STAGES 4  /* pieces of B on their way, of a warp */
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
    int32_t projections[MIL_MAX_PARTS];
    int32_t part_rows[MIL_MAX_PARTS];
    int32_t first_block[MIL_MAX_PARTS + 1]; /* blocks of columns, part by part */
};

struct expand_shared {
    /* v of one tile, summed, scaled and cut in two bf16, as the mma wants it: [rank tile][lane]. */
    uint4 high[MAX_RANK_TILES][MIL_WARP];
    uint4 low[MAX_RANK_TILES][MIL_WARP];
    uint4 b[WARPS][STAGES][COLUMNS * RANK_TILE / 8]; /* piece_place() says where */
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

/* Where 8 of the rank (`half` of 16) of a warp's column lie in a piece: 8-byte loads of a quarter
 * of a warp, two columns of one group of 8 and two of the next, meet each bank once. */
static __device__ __forceinline__ int32_t piece_place(int32_t column, int32_t half)
{
    return (2 * column + half) ^ (column / 8 % 2 * 4);
}

/* A piece, 16 of the rank of a warp's 32 columns, and the one to be sent next: piece after piece of
 * the rank, then the next block's columns. */
struct piece {
    int32_t c0, i; /* i * RANK_TILE of the rank */
};

static __device__ __forceinline__ void move_on(piece &at, const mil_lora_module &module)
{
    if (++at.i * RANK_TILE < module.padded_rank)
        return;
    at.i = 0;
    at.c0 += BLOCK_COLUMNS;
}

/* Nothing from `end_c` on, but a group of copies all the same: waits count groups. */
static __device__ __forceinline__ void send_piece(uint4 *to, const mil_lora_module &module,
                                                  piece &at, int32_t end_c)
{
    if (at.c0 < end_c) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int32_t index = (int32_t)(threadIdx.x % MIL_WARP) + j * MIL_WARP;
            const int32_t column = index / 2, half = index % 2;
            const int32_t c = at.c0 + column, r = at.i * RANK_TILE + 8 * half;
            const bool is_there = c < module.out && r < module.padded_rank;
            const uint16_t *b = (const uint16_t *)module.b;
            mil_copy16(to + piece_place(column, half),
                       is_there ? b + (int64_t)c * module.padded_rank + r : b, is_there);
        }
        move_on(at, module);
    }
    mil_copy_commit();
}

/* d += 16 of the rank: lane (n = lane / 4, q = lane % 4) ends with columns 8 q .. 8 q + 7 of rows n
 * and n + 8, because tile t's column n is 8 (n / 2) + 2 t + n % 2. A lane's 4 of the rank are 4 q
 * .. 4 q + 3 of v and of B alike. */
static __device__ __forceinline__ void multiply(float (&d)[4][4], const expand_shared &shared,
                                                const uint4 *piece, int32_t i)
{
    const int32_t lane = threadIdx.x % MIL_WARP, n = lane / 4, q = lane % 4;
    const uint4 high = shared.high[i][lane], low = shared.low[i][lane];
    const uint32_t high_a[4] = {high.x, high.y, high.z, high.w};
    const uint32_t low_a[4] = {low.x, low.y, low.z, low.w};
#pragma unroll
    for (int t = 0; t < 4; t++) {
        const int32_t column = 8 * (n / 2) + 2 * t + n % 2;
        const uint2 b = ((const uint2 *)(piece + piece_place(column, q / 2)))[q % 2];
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
static __device__ __forceinline__ void load_y(y_columns &to, const expand_params &p, int32_t part,
                                              int32_t out, uint16_t *const (&rows)[2], int32_t c0)
{
    to.c = c0 + 8 * (int32_t)(threadIdx.x % 4);
    to.column = y_column(p, part, to.c);
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

/* Rows n and n + 8 of the tile, a lane's own: where they lie in y. */
static __device__ __forceinline__ void find_rows(uint16_t *(&rows)[2], const expand_params &p,
                                                 const mil_lora_tile &tile)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int32_t row = (int32_t)(threadIdx.x % MIL_WARP) / 4 + 8 * half;
        int32_t t = row < tile.n_rows ? p.batch.lora_rows[tile.first + row] : -1;
        rows[half] = (uint32_t)t < (uint32_t)p.n_tokens ? p.y + (int64_t)t * p.ldy : nullptr;
    }
}

/* Blocks of columns `block` .. `end` of one part, for one tile. All of a block's threads. */
static __device__ __forceinline__ void expand_run(expand_shared &shared, const expand_params &p,
                                                  const mil_lora_tile &tile, int32_t part,
                                                  int32_t block, int32_t end)
{
    const int32_t warp = threadIdx.x / MIL_WARP;
    uint16_t *rows[2];
    find_rows(rows, p, tile); /* before the module is looked at: the loads do not wait for it */
    const mil_lora_module module =
        p.modules[tile.adapter_slot * p.slot_stride + p.projections[part]];
    if (module.rank == 0)
        return;
    const int32_t out = min(module.out, p.part_rows[part]);
    const int32_t end_c = min(end * BLOCK_COLUMNS, out);
    int32_t c0 = block * BLOCK_COLUMNS + warp * COLUMNS;
    __syncthreads(); /* the fragments and pieces before these are read */
    uint4(*const pieces)[COLUMNS * RANK_TILE / 8] = shared.b[warp];
    piece to_send = {c0, 0};
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++)
        send_piece(pieces[stage], module, to_send, end_c);
    y_columns next;
    load_y(next, p, part, out, rows, c0);
    make_fragments(shared, p, module, tile, part);
    __syncthreads();
    int32_t stage = 0;
    for (; c0 < end_c; c0 += BLOCK_COLUMNS) {
        const y_columns now = next;
        load_y(next, p, part, out, rows, c0 + BLOCK_COLUMNS < end_c ? c0 + BLOCK_COLUMNS : out);
        float d[4][4] = {};
        for (int32_t i = 0; i * RANK_TILE < module.padded_rank; i++) {
            mil_copy_wait<STAGES - 2>();
            __syncwarp(); /* the others' copies too, and they have read the piece before */
            send_piece(pieces[stage == 0 ? STAGES - 1 : stage - 1], module, to_send, end_c);
            multiply(d, shared, pieces[stage], i);
            stage = stage + 1 == STAGES ? 0 : stage + 1;
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
    const uint32_t share = (n_items + gridDim.x - 1) / gridDim.x;
    const uint32_t end = min((blockIdx.x + 1) * share, n_items);
    for (uint32_t item = blockIdx.x * share; item < end;) {
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
    p.bucket_segments = lora->batch->header->bucket_segments;
    p.n_parts = lora->n_parts;
    p.interleave = args->weight->interleave;
    p.is_vector = is_vector(args);
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
                        "lora_expand: %d rows by %d columns, more than one launch", n_rows,
                        args->weight->N);
    const int64_t most = (int64_t)context->queue->n_sms * BLOCKS;
    MIL_CUDA_TRY(cudaFuncSetAttribute(expand_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      (int)sizeof(expand_shared)));
    return mil_launch(context->queue, "lora_expand", expand_kernel,
                      dim3((uint32_t)(n_items < most ? n_items : most)), dim3(THREADS),
                      sizeof(expand_shared), p);
}
