/* What shrink and expand share: tiles of rows over the batch's segments, and where v's partial sums
 * lie.
 *
 * A row's v of one part is n_splits partial sums over K, [n_splits][padded_rank] fp32 within the
 * part's stretch of v: shrink leaves them, expand adds them in order. n_splits follows from (in,
 * rank) alone, so that a row's bits depend on neither its batch nor the shape of the launch. */
#pragma once

#include "kernels/common.cuh"

#define MIL_LORA_TILE_ROWS 16             /* rows of one mma */
#define MIL_LORA_SPLIT_K 1024             /* K that one block sums: 32 KB of A at rank 16 */
#define MIL_LORA_V_PART MIL_MAX_LORA_RANK /* floats of a part's stretch of v: lora_v_rank */

/* A tile: rows lora_rows[first .. first + n_rows) of one adapter. n_rows 0: there is no such tile.
 */
struct mil_lora_tile {
    int32_t adapter_slot;
    int32_t first;
    int32_t n_rows;
};

/* Segments are read a warp at a time, a lane's own one here. Those past the last are empty: `begin`
 * pads its arrays, so that no load waits for the count. */
struct mil_lora_segment {
    int32_t first, end, adapter_slot;
};

static __device__ __forceinline__ mil_lora_segment mil_lora_segment_load(const mil_batch &batch,
                                                                         int32_t begin,
                                                                         int32_t bucket_segments)
{
    int32_t segment = begin + (int32_t)(threadIdx.x % MIL_WARP);
    if (segment >= bucket_segments)
        return {0, 0, 0};
    return {batch.segment_indptr[segment], batch.segment_indptr[segment + 1],
            batch.segment_adapter[segment]};
}

/* Tiles of all segments. Every thread of the warp calls it. */
static __device__ __forceinline__ uint32_t mil_lora_tiles_count(const mil_batch &batch,
                                                                int32_t bucket_segments,
                                                                int32_t tile_rows)
{
    const int32_t n_segments = batch.counts->n_segments;
    mil_lora_segment own = mil_lora_segment_load(batch, 0, bucket_segments);
    int32_t n = mil_ceil_div(own.end - own.first, tile_rows);
#pragma unroll 1
    for (int32_t begin = MIL_WARP; begin < n_segments; begin += MIL_WARP) {
        own = mil_lora_segment_load(batch, begin, bucket_segments);
        n += mil_ceil_div(own.end - own.first, tile_rows);
    }
    return __reduce_add_sync(0xffffffffu, (uint32_t)n);
}

/* Tile `index` of all segments cut into tiles of tile_rows. Every thread of the warp calls it. */
static __device__ __forceinline__ mil_lora_tile mil_lora_tile_find(const mil_batch &batch,
                                                                   int32_t bucket_segments,
                                                                   uint32_t index,
                                                                   int32_t tile_rows)
{
    const int lane = threadIdx.x % MIL_WARP;
    const int32_t n_segments = batch.counts->n_segments;
    int32_t begin = 0;
    uint32_t before = 0; /* tiles of the segments before this round's */
    do {
        mil_lora_segment own = mil_lora_segment_load(batch, begin, bucket_segments);
        const uint32_t n_tiles = (uint32_t)mil_ceil_div(own.end - own.first, tile_rows);
        uint32_t sum = n_tiles;
#pragma unroll
        for (int offset = 1; offset < MIL_WARP; offset *= 2) {
            uint32_t other = __shfl_up_sync(0xffffffffu, sum, offset);
            sum += lane >= offset ? other : 0;
        }
        uint32_t owners = __ballot_sync(0xffffffffu, index < before + sum);
        if (owners != 0) {
            int owner = __ffs((int)owners) - 1;
            uint32_t tile = index - before - __shfl_sync(0xffffffffu, sum - n_tiles, owner);
            int32_t first = __shfl_sync(0xffffffffu, own.first, owner) + (int32_t)tile * tile_rows;
            int32_t end = __shfl_sync(0xffffffffu, own.end, owner);
            int32_t slot = __shfl_sync(0xffffffffu, own.adapter_slot, owner);
            return {slot, first, min(tile_rows, end - first)};
        }
        before += __shfl_sync(0xffffffffu, sum, MIL_WARP - 1);
        begin += MIL_WARP;
    } while (begin < n_segments);
    return {0, 0, 0};
}

/* The tokens of the two rows of a tile that a lane has in an mma, row0 + lane / 4 and 8 on; -1
 * where the tile has none. */
struct mil_lora_rows {
    int32_t tokens[2];
};

/* Call it before the module's load: neither waits for the other then. */
static __device__ __forceinline__ mil_lora_rows mil_lora_rows_load(const mil_batch &batch,
                                                                   const mil_lora_tile &tile,
                                                                   int32_t row0)
{
    mil_lora_rows rows;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int32_t row = row0 + (int32_t)(threadIdx.x % MIL_WARP) / 4 + 8 * half;
        rows.tokens[half] = row < tile.n_rows ? batch.lora_rows[tile.first + row] : -1;
    }
    return rows;
}

/* Where those rows lie in a matrix [n_tokens][stride]; NULL where there is none. */
template <typename item>
static __device__ __forceinline__ void mil_lora_rows_find(item *(&to)[2], const mil_lora_rows &rows,
                                                          item *matrix, int64_t stride,
                                                          int32_t n_tokens)
{
#pragma unroll
    for (int half = 0; half < 2; half++)
        to[half] = (uint32_t)rows.tokens[half] < (uint32_t)n_tokens
                       ? matrix + rows.tokens[half] * stride
                       : nullptr;
}

/* All of a descriptor at once: of plain loads those behind a test of `rank` would wait for it. */
static __device__ __forceinline__ mil_lora_module mil_lora_module_load(const mil_lora_module *from)
{
    constexpr int N_WORDS = sizeof(mil_lora_module) / sizeof(uint64_t);
    union {
        uint64_t words[N_WORDS];
        mil_lora_module module;
    } it;
#pragma unroll
    for (int i = 0; i < N_WORDS; i++)
        asm volatile("ld.global.u64 %0, [%1];"
                     : "=l"(it.words[i])
                     : "l"((const uint64_t *)from + i)
                     : "memory");
    return it.module;
}

/* Rows with an adapter that a launch can meet. */
static inline int32_t mil_lora_max_rows(const mil_batch *batch)
{
    return min(batch->header->bucket_lora_rows, batch->header->bucket_tokens);
}

/* Tiles that a launch can meet: every segment may leave one with a single row. Rows and segments of
 * the bucket, not slots of the table: adapters that are resident and not in the batch cost nothing.
 */
static inline uint32_t mil_lora_max_tiles(const mil_batch *batch, int32_t tile_rows)
{
    int32_t n_rows = mil_lora_max_rows(batch);
    int64_t n_segments = min(n_rows, batch->header->bucket_segments);
    return (uint32_t)((n_rows + n_segments * (tile_rows - 1)) / tile_rows);
}

static __host__ __device__ __forceinline__ int32_t mil_lora_splits(int32_t in, int32_t padded_rank)
{
    return min(mil_ceil_div(in, MIL_LORA_SPLIT_K), MIL_LORA_V_PART / padded_rank);
}
