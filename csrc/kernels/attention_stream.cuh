/* Keys and values on their way: the portable path's endless stream of tiles, and what its blocks
 * keep in shared memory.
 *
 * A block walks attention.cuh's list there and back like a ploughing ox: block b of G takes items
 * b, 2 G - 1 - b, 2 G + b, ..., so that all get equal shares of a list sorted by work. Its items'
 * blocks of 64 keys make one stream, K then V of each, through a ring of tiles that is filled RING
 * - 1 tiles ahead, over the ends of items. Page ids come by asynchronous copies as well, RING / 2
 * blocks before the keys they are for. Keys that a tile must not see are zeros in K and V and are
 * never read. */
#pragma once

#include "kernels/attention.cuh"

#define N_AHEAD 8 /* blocks and items whose description is kept; a power of two > RING + 1 */
#define P_STRIDE (64 + 8) /* an odd number of 16-byte chunks: ldmatrix without bank conflicts */
#define S_WARPS 4         /* of a small tile: 16 keys each */

typedef struct attention_params {
    uint16_t *out;
    const uint16_t *q, *k, *v; /* k, v: of this layer */
    const int32_t *page_table;
    const mil_attention_list *list;
    const mil_attention_item *items;
    int32_t *counters;
    mil_attention_partials partials;
    int32_t n_heads, n_kv_heads, group, head_dim;
    int32_t page_shift, max_pages;
    /* Of one layer's K or V; a page of all heads is at most a few MiB. Ids past last_page are
     * clamped: nothing of theirs is used. */
    uint32_t page_mask, last_page, row_bytes, head_bytes, page_bytes;
    int32_t window;
    mil_attention_scale scale;
    mil_dtype out_dtype; /* where it is not an instance's own affair: over pages of float16 */
} attention_params;

/* A block of keys on its way. */
typedef struct kv_block {
    int32_t page[4];    /* of each 16 keys */
    int32_t key;        /* the first, a multiple of 64; -1: the stream has ended */
    int32_t first, end; /* keys outside are not read and count as zeros */
    int32_t kv_head;
} kv_block;

typedef struct queued_item {
    mil_attention_item item; /* n_rows 0: the list has ended */
    int32_t kv_head;
    int32_t key; /* where its first block begins */
    int32_t unused[2];
} queued_item;

typedef struct kv_cursor {
    int32_t key, end; /* the next block to describe; key >= end: the next item's first */
    int32_t first, kv_head;
    int32_t slot;
    int32_t n_items; /* taken so far */
    int32_t has_ended;
    int32_t unused;
} kv_cursor;

typedef struct attention_shared {
    kv_block blocks[N_AHEAD];
    queued_item items[N_AHEAD];
    kv_cursor cursor;
    int32_t is_last;
    int32_t unused[3];
} attention_shared;

/* What the warps of a small tile hand to each other. */
typedef struct attention_shares {
    float maximum[S_WARPS][MIL_ATTENTION_ROWS];
    uint16_t p[MIL_ATTENTION_ROWS * P_STRIDE];
} attention_shares;

/* One instance: shared memory is [attention_shared][shares, unless they lie in q][q][ring]. Rows of
 * the ring are padded by 16 bytes (an odd number of chunks); rows of q are not, their chunks are
 * swizzled: D 256 must fit the 99 KiB of small chips. */
template <int D_, int WARPS_, int BLOCKS_, int RING_, bool HAS_Q_, mil_dtype DTYPE_>
struct attention_shape {
    static constexpr mil_dtype DTYPE = DTYPE_; /* of q, K, V and P */
    static constexpr int D = D_;
    static constexpr int WARPS = WARPS_;
    static constexpr int BLOCKS = BLOCKS_; /* of an SM */
    static constexpr int RING = RING_;     /* tiles; a power of two */
    static constexpr bool HAS_Q = HAS_Q_;  /* q in shared memory: registers are full of O */
    static constexpr int THREADS = WARPS * MIL_WARP;
    static constexpr int ROWS = WARPS * 16;
    static constexpr int CHUNKS = D / 8; /* of 16 bytes, in a row */
    static constexpr int STRIDE = 2 * D + 16;
    static constexpr int TILE_BYTES = MIL_ATTENTION_BLOCK * STRIDE;
    static constexpr int SHARES = sizeof(attention_shared);
    static constexpr int Q = SHARES + (HAS_Q ? 0 : (int)sizeof(attention_shares));
    static constexpr int TILES = Q + (HAS_Q ? ROWS * D * 2 : 0);
    static constexpr int BYTES = TILES + RING * TILE_BYTES;
    static constexpr int Q_SHARES = Q + 16 * D * 2; /* behind the 16 rows of a small tile */
    static constexpr int KEY_STEPS = MIL_ATTENTION_BLOCK / 16;
    static constexpr int D_STEPS = D / 16;
    static constexpr int OWN_STEPS =
        (D_STEPS + WARPS - 1) / WARPS; /* of O's columns, small tiles */
};

static __device__ __forceinline__ void copy4(void *shared, const void *global)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(mil_shared_address(shared)),
                 "l"(global)
                 : "memory");
}

/* What is derived from it is computed where it is needed and holds no register over the loop. */
static __device__ __forceinline__ uint32_t thread_index()
{
    uint32_t index = threadIdx.x;
    asm volatile("" : "+r"(index));
    return index;
}

/* ---- the stream of key blocks ---- */

/* The next item of this block goes to the queue and the cursor to its first key block. Items whose
 * keys all lie before the window keep one block, of zeros. */
static __device__ __forceinline__ void take_item(const attention_params &p,
                                                 attention_shared *shared, kv_cursor *at)
{
    queued_item *queued = &shared->items[at->n_items % N_AHEAD];
    const int64_t turn = at->n_items++, n_blocks = gridDim.x;
    const int64_t place = (turn & 1) != 0 ? n_blocks - 1 - blockIdx.x : blockIdx.x;
    const int64_t index = turn * n_blocks + place;
    at->key = at->end = 0;
    if (index >= (int64_t)p.list->n_items * p.n_kv_heads) {
        if (threadIdx.x == 0)
            queued->item.n_rows = 0;
        at->has_ended = 1;
        return;
    }
    const mil_attention_item item = p.items[(uint32_t)index / (uint32_t)p.n_kv_heads];
    at->kv_head = (int32_t)((uint32_t)index % (uint32_t)p.n_kv_heads);
    at->slot = item.slot;
    at->end = item.key_end;
    at->first = p.window > 0 ? max(item.first_limit - p.window, 0) : 0;
    at->key = max(item.key_begin, at->first & -MIL_ATTENTION_BLOCK);
    at->key = min(at->key, (at->end - 1) & -MIL_ATTENTION_BLOCK);
    if (threadIdx.x == 0) {
        queued->item = item;
        queued->kv_head = at->kv_head;
        queued->key = at->key;
    }
}

/* Describe block `index` of the stream and fetch its page ids; by threads 0 to 3, 16 keys each. */
static __device__ __forceinline__ void look_ahead(const attention_params &p,
                                                  attention_shared *shared, uint32_t index)
{
    const int32_t i = threadIdx.x;
    kv_block *block = &shared->blocks[index % N_AHEAD];
    kv_cursor at = shared->cursor;
    __syncwarp(0xf);
    if (at.key >= at.end && !at.has_ended)
        take_item(p, shared, &at);
    const bool is_end = at.key >= at.end;
    if (!is_end) {
        const int32_t entry = min((at.key + 16 * i) >> p.page_shift, p.max_pages - 1);
        copy4(&block->page[i], p.page_table + (int64_t)at.slot * p.max_pages + entry);
    }
    if (i == 0) {
        *(int4 *)&block->key =
            make_int4(is_end ? -1 : at.key, at.first, max(at.first, at.end), at.kv_head);
        at.key += is_end ? 0 : MIL_ATTENTION_BLOCK;
        shared->cursor = at;
    }
    __syncwarp(0xf);
}

template <class Shape>
static __device__ __forceinline__ char *tile_of(char *memory, uint32_t tile)
{
    return memory + Shape::TILES + tile % Shape::RING * Shape::TILE_BYTES;
}

/* K or V of block `index` of the stream, tile 2 index (+ 1 if V) of the ring. */
template <class Shape, bool IS_V>
static __device__ __forceinline__ void fetch(const attention_params &p, char *memory,
                                             uint32_t index)
{
    attention_shared *shared = (attention_shared *)memory;
    constexpr int ROWS_AT_ONCE = Shape::THREADS / Shape::CHUNKS;
    constexpr int PASSES = (MIL_ATTENTION_BLOCK + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    const uint32_t thread = thread_index();
    const uint32_t first_row = thread / Shape::CHUNKS, chunk = thread % Shape::CHUNKS;
    const kv_block *block = &shared->blocks[index % N_AHEAD];
    const int4 at = *(const int4 *)&block->key;
    if (at.x >= 0 && first_row < ROWS_AT_ONCE) {
        const char *from = (const char *)(IS_V ? p.v : p.k);
        char *to =
            tile_of<Shape>(memory, 2 * index + IS_V) + first_row * Shape::STRIDE + 16 * chunk;
        /* No keys where head_dim has no such chunk. */
        const uint32_t n_keys = 8 * chunk < (uint32_t)p.head_dim ? (uint32_t)(at.z - at.y) : 0;
        const uint32_t head_bytes = (uint32_t)at.w * p.head_bytes + 16 * chunk;
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            const uint32_t row = first_row + i * ROWS_AT_ONCE, key = (uint32_t)at.x + row;
            if ((i + 1) * ROWS_AT_ONCE > MIL_ATTENTION_BLOCK && row >= MIL_ATTENTION_BLOCK)
                break;
            const uint32_t page = min((uint32_t)block->page[row / 16], p.last_page);
            const uint32_t in_page = head_bytes + (key & p.page_mask) * p.row_bytes;
            mil_copy16(to + i * ROWS_AT_ONCE * Shape::STRIDE,
                       from + ((uint64_t)page * p.page_bytes + in_page),
                       key - (uint32_t)at.y < n_keys);
        }
    }
    if (IS_V && threadIdx.x < 4)
        look_ahead(p, shared, index + Shape::RING / 2);
    mil_copy_commit();
}

template <class Shape>
static __device__ __forceinline__ void start_stream(const attention_params &p, char *memory)
{
    attention_shared *shared = (attention_shared *)memory;
    if (threadIdx.x < 4) {
        if (threadIdx.x == 0)
            shared->cursor = kv_cursor{};
        __syncwarp(0xf);
        for (uint32_t i = 0; i < Shape::RING / 2; i++)
            look_ahead(p, shared, i);
    }
    mil_copy_commit();
    mil_copy_wait<0>();
    __syncthreads();
    for (uint32_t i = 0; i < Shape::RING / 2; i++) {
        fetch<Shape, false>(p, memory, i);
        if (i + 1 < Shape::RING / 2)
            fetch<Shape, true>(p, memory, i);
    }
}

/* Wait for K or V of block `index`. The tile before it has been read by all: another one, RING
 * tiles later in the stream, comes in its place. */
template <class Shape, bool IS_V>
static __device__ __forceinline__ const char *next_tile(const attention_params &p, char *memory,
                                                        uint32_t index)
{
    mil_copy_wait<Shape::RING - 2>();
    __syncthreads();
    fetch<Shape, !IS_V>(p, memory, index + Shape::RING / 2 - (IS_V ? 0 : 1));
    return tile_of<Shape>(memory, 2 * index + IS_V);
}
