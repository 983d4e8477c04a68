/* One tile of causal attention over paged KV: FlashAttention-2's online softmax (Dao 2023) on
 * blocks of 64 keys. For a row and a block:
 *
 *   c_j = chain over d pairs ascending, odd d first, of q_d k_jd
 *   m' = max(m, scale * max of c_j), a = e^(m - m')
 *   p_j = round(e^(fma(c_j, scale, -m'))), masked p_j = 0
 *   l = l a + p_j in lane j mod 16
 *   o_d = o_d a, then chain over key pairs ascending, odd first, of p_j v_jd
 *
 * With a softcap c_j is cap * tanh(c_j scale / cap) and scale is 1 from there on. At a split's end
 * l is summed by the tree. All of it is float32; q, k, v, p hold bfloat16 values, or float16 ones
 * where attention_f16_simd.c compiles this file once more. p's halves round away from zero, as
 * float16 to even, and l sums the rounded p, so that the weights add up to one.
 *
 * A masked key counts as p = 0 and v = 0: rows of a page that no row sees may hold NaN. Skipping a
 * key that a row does not see changes nothing but a zero's sign, which finish() sets.
 *
 * v and o hold each 32 items of a row as 16 even and 16 odd ones: so dwords of a page's row widen
 * by a shift and a mask. Decode reads bytes: what comes next is asked for, into the second cache,
 * row by row while this is turned and used. A burst of prefetches fills the line buffers and stalls
 * instead (2026-11-23, bench_attention, one thread: 0.55 of read bandwidth, 0.34 in bursts). */
#include "cpu/cpu.h"
#include "cpu/lanes.h"

#include <math.h>

#define BLOCK MIL_CPU_KV_BLOCK
#define SPLIT MIL_CPU_KV_SPLIT

/* Rows and vectors of the register tile: 24 of 32 registers accumulate, 12 of 16, or any. */
#define TILE_ROWS 6
#ifdef MIL_ISA_AVX512
#define TILE_VECTORS 4
#define DIRECT_CHUNKS 2 /* of 32 columns */
#define DIRECT_ROWS 6
#else
#define TILE_VECTORS 1
#define DIRECT_CHUNKS 1
#define DIRECT_ROWS 2
#endif

#ifdef MIL_ATTENTION_F16
#define KERNELS mil_cpu_attention_f16_kernels
#define PAIR_EVEN lanes_pair_even_f16
#define PAIR_ODD lanes_pair_odd_f16
#define LOAD_ITEMS_N lanes_load_f16_n
#define ROUND_WEIGHTS lanes_round_f16
#else
#define KERNELS mil_cpu_attention_kernels
#define PAIR_EVEN lanes_pair_even
#define PAIR_ODD lanes_pair_odd
#define LOAD_ITEMS_N lanes_load_bf16_n
#define ROUND_WEIGHTS lanes_round_bf16_away
#endif

/* How the scratch holds a pair of items: one dword for vdpbf16ps, else two float32 for fma. */
#if defined(MIL_ISA_AVX512BF16) && !defined(MIL_ATTENTION_F16)
#define PAIR_ITEMS 1
#else
#define PAIR_ITEMS 2
#endif

typedef struct key_range {
    int32_t begin, end;
} key_range;

static int32_t clamp(int32_t value, int32_t low, int32_t high)
{
    return value < low ? low : value > high ? high : value;
}

/* Keys of the block that queries first .. last see between them, relative to the block's start. */
static key_range seen(const mil_cpu_attention_tile *tile, int32_t first, int32_t last,
                      int32_t block)
{
    int32_t window = tile->args->window;
    int32_t begin = window > 0 ? tile->n_visible + first - window : 0;
    return (key_range){clamp(begin - block, 0, BLOCK),
                       clamp(tile->n_visible + last - block, 0, BLOCK)};
}

/* Where 16 keys each lie: in one page, since pages hold a multiple of 16 rows. next: what is worked
 * on next, the following kv head or block, or this one where there is none. */
typedef struct block_rows {
    const uint16_t *k[BLOCK / 16], *v[BLOCK / 16];
    const uint16_t *next_k[BLOCK / 16], *next_v[BLOCK / 16];
} block_rows;

/* Offset of 16 keys' rows; -1 where the tile sees none of them, and a page may not be there. */
static int64_t offset_of(const mil_cpu_attention_tile *tile, int32_t key)
{
    int32_t P = tile->args->kv->page_size;
    int32_t begin = tile->args->window > 0 ? tile->n_visible - tile->args->window : 0;
    if (key + 16 <= begin || key >= tile->n_visible + tile->n_queries - 1)
        return -1;
    return tile->pages[key / P] * tile->page_stride + (int64_t)(key % P) * tile->args->kv->head_dim;
}

static void find_rows(const mil_cpu_attention_tile *tile, int32_t block, int32_t kv_head,
                      block_rows *rows)
{
    const mil_kv *kv = tile->args->kv;
    int64_t head = (int64_t)kv->page_size * kv->head_dim;
    for (int32_t i = 0; i < BLOCK / 16; i++) {
        int64_t offset = offset_of(tile, block + 16 * i);
        offset = offset < 0 ? 0 : offset + kv_head * head;
        int64_t next = offset + head;
        if (kv_head + 1 == tile->n_kv_heads)
            next = offset_of(tile, block + BLOCK + 16 * i);
        if (next < 0)
            next = offset;
        rows->k[i] = tile->k + offset;
        rows->v[i] = tile->v + offset;
        rows->next_k[i] = tile->k + next;
        rows->next_v[i] = tile->v + next;
    }
}

/* In place of the row of a key that is not seen though its pair's other one is. */
static const uint16_t zeros[256];

static int32_t width_of(int32_t head_dim)
{
    return (head_dim + 31) / 32 * 32;
}

/* 16 dwords of a row of K or V, or the n that it has. */
static mil_lanes load_dwords(const uint16_t *row, int32_t n)
{
    const float *dwords = (const float *)(const void *)row;
    return n >= MIL_LANES ? lanes_load(dwords) : lanes_load_n(dwords, n);
}

/* ---- loads ---- */

static void load_queries(const mil_cpu_attention_tile *tile)
{
    /* The heads of a group lie one after another. */
    int32_t n = tile->n_kv_heads * tile->group * tile->args->kv->head_dim;
    for (int32_t i = 0; i < tile->n_queries; i++) {
        float *to = tile->scratch.q + (int64_t)i * n * PAIR_ITEMS / 2;
        const uint16_t *from = tile->q + i * tile->ld;
#if PAIR_ITEMS == 1
        memcpy(to, from, (size_t)n * sizeof *from);
#else
        for (int32_t d = 0; d < n; d += MIL_LANES) {
            int width = n - d < MIL_LANES ? n - d : MIL_LANES;
            lanes_store_n(to + d, LOAD_ITEMS_N(from + d, width), width);
        }
#endif
    }
}

/* 16 keys into 16 columns of k[d][64]. */
static void load_16_keys(float *k, const uint16_t *rows, const uint16_t *next, int32_t D)
{
    for (int32_t d = 0; d < D; d += 2 * MIL_LANES) {
        int32_t n_pairs = (D - d) / 2 < MIL_LANES ? (D - d) / 2 : MIL_LANES;
        mil_lanes m[MIL_LANES];
#pragma GCC unroll 16
        for (int32_t i = 0; i < MIL_LANES; i++) {
            __builtin_prefetch(next + (int64_t)i * D + d, 0, 2);
            m[i] = lanes_load_n((const float *)(const void *)(rows + (int64_t)i * D + d), n_pairs);
        }
        lanes_transpose(m);
        float *to = k + d / 2 * PAIR_ITEMS * BLOCK;
        for (int32_t j = 0; j < n_pairs; j++, to += PAIR_ITEMS * BLOCK) {
#if PAIR_ITEMS == 1
            lanes_store(to, m[j]);
#else
            lanes_store(to, PAIR_EVEN(m[j]));
            lanes_store(to + BLOCK, PAIR_ODD(m[j]));
#endif
        }
    }
}

static void load_keys(const mil_cpu_attention_tile *tile, const block_rows *rows, key_range keys)
{
    for (int32_t i = keys.begin / 16; 16 * i < keys.end; i++)
        load_16_keys(tile->scratch.k + 16 * i, rows->k[i], rows->next_k[i],
                     tile->args->kv->head_dim);
}

static const uint16_t *value_row(const block_rows *rows, int32_t j, key_range keys, int32_t D)
{
    return j >= keys.begin && j < keys.end ? rows->v[j / 16] + j % 16 * D : zeros;
}

static void load_values(const mil_cpu_attention_tile *tile, const block_rows *rows, key_range keys)
{
    int32_t D = tile->args->kv->head_dim, width = width_of(D);
    for (int32_t j = keys.begin & ~1; j < keys.end; j += 2) {
        float *to = tile->scratch.v + j / 2 * PAIR_ITEMS * width;
        const uint16_t *even = value_row(rows, j, keys, D);
        const uint16_t *odd = value_row(rows, j + 1, keys, D);
        for (int32_t d = 0; d < D; d += 2 * MIL_LANES, to += 2 * MIL_LANES) {
            mil_lanes a = load_dwords(even + d, (D - d) / 2);
            mil_lanes b = load_dwords(odd + d, (D - d) / 2);
#if PAIR_ITEMS == 1
            lanes_store(to, lanes_zip_low(a, b));
            lanes_store(to + MIL_LANES, lanes_zip_high(a, b));
#else
            lanes_store(to, PAIR_EVEN(a));
            lanes_store(to + MIL_LANES, PAIR_ODD(a));
            lanes_store(to + width, PAIR_EVEN(b));
            lanes_store(to + width + MIL_LANES, PAIR_ODD(b));
#endif
        }
    }
}

/* ---- products ---- */

LANES_INLINE mil_lanes multiply_add(mil_lanes sum, mil_lanes a, mil_lanes b)
{
#if PAIR_ITEMS == 1
    return lanes_dot_pairs(sum, a, b);
#else
    return lanes_fma(a, b, sum);
#endif
}

/* c[r][16 j ..] = chain over n_pairs pairs, odd first, of a[r] times b[..][16 j ..], from 0 or from
 * c itself. */
LANES_INLINE void product_tile(int n_rows, int n_vectors, bool resume, float *c, int32_t ldc,
                               const float *a, int32_t lda, const float *b, int32_t ldb,
                               int32_t n_pairs)
{
    mil_lanes sum[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++)
            sum[r][j] = resume ? lanes_load(c + r * ldc + j * MIL_LANES) : lanes_zero();
    for (int32_t k = 0; k < n_pairs * PAIR_ITEMS; k += PAIR_ITEMS) {
#pragma GCC unroll 2
        for (int item = PAIR_ITEMS - 1; item >= 0; item--) {
            mil_lanes row[TILE_VECTORS];
#pragma GCC unroll 4
            for (int j = 0; j < n_vectors; j++)
                row[j] = lanes_load(b + (int64_t)(k + item) * ldb + j * MIL_LANES);
#pragma GCC unroll 8
            for (int r = 0; r < n_rows; r++) {
                mil_lanes x = lanes_set(a[(int64_t)r * lda + k + item]);
#pragma GCC unroll 4
                for (int j = 0; j < n_vectors; j++)
                    sum[r][j] = multiply_add(sum[r][j], x, row[j]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++)
            lanes_store(c + r * ldc + j * MIL_LANES, sum[r][j]);
}

/* One instance of a tile for each number of rows: sizes known to the compiler keep sums in
 * registers. */
#define WITH_ROWS(tile, ...)                                                                       \
    switch (n_rows) {                                                                              \
    case 1:                                                                                        \
        tile(1, __VA_ARGS__);                                                                      \
        break;                                                                                     \
    case 2:                                                                                        \
        tile(2, __VA_ARGS__);                                                                      \
        break;                                                                                     \
    case 3:                                                                                        \
        tile(3, __VA_ARGS__);                                                                      \
        break;                                                                                     \
    case 4:                                                                                        \
        tile(4, __VA_ARGS__);                                                                      \
        break;                                                                                     \
    case 5:                                                                                        \
        tile(5, __VA_ARGS__);                                                                      \
        break;                                                                                     \
    default:                                                                                       \
        tile(6, __VA_ARGS__);                                                                      \
    }

LANES_INLINE void product_any(bool resume, int32_t n_rows, int32_t n_vectors, float *c, int32_t ldc,
                              const float *a, int32_t lda, const float *b, int32_t ldb,
                              int32_t n_pairs)
{
    int32_t j = 0;
#if TILE_VECTORS == 4
    for (; j + 4 <= n_vectors; j += 4, c += 4 * MIL_LANES, b += 4 * MIL_LANES)
        WITH_ROWS(product_tile, 4, resume, c, ldc, a, lda, b, ldb, n_pairs)
    for (; j + 2 <= n_vectors; j += 2, c += 2 * MIL_LANES, b += 2 * MIL_LANES)
        WITH_ROWS(product_tile, 2, resume, c, ldc, a, lda, b, ldb, n_pairs)
#endif
    for (; j < n_vectors; j++, c += MIL_LANES, b += MIL_LANES)
        WITH_ROWS(product_tile, 1, resume, c, ldc, a, lda, b, ldb, n_pairs)
}

static __attribute__((noinline)) void score_rows(int32_t n_rows, int32_t n_vectors, float *scores,
                                                 const float *q, int32_t D, const float *k)
{
    product_any(false, n_rows, n_vectors, scores, BLOCK, q, D / 2 * PAIR_ITEMS, k, BLOCK, D / 2);
}

static __attribute__((noinline)) void add_values(int32_t n_rows, float *o, int32_t width,
                                                 const float *p, const float *v, int32_t n_pairs)
{
    product_any(true, n_rows, width / MIL_LANES, o, width, p, BLOCK, v, width, n_pairs);
}

/* add_values for rows so few that a block's values are used once, straight from the pages; D is a
 * multiple of 32. o, p: as product_tile's c and a. n_chunks of 32 columns from column d on. */
LANES_INLINE void direct_tile(int n_rows, int n_chunks, float *o, const float *p,
                              const block_rows *rows, key_range keys, int32_t D, int32_t d)
{
    mil_lanes sum[TILE_ROWS][2 * DIRECT_CHUNKS];
#pragma GCC unroll 8
    for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 2 * n_chunks; c++)
            sum[r][c] = lanes_load(o + r * D + d + c * MIL_LANES);
    for (int32_t j = keys.begin & ~1; j < keys.end; j += 2) {
        const uint16_t *row[2] = {value_row(rows, j, keys, D) + d,
                                  value_row(rows, j + 1, keys, D) + d};
        const uint16_t *next = rows->next_v[j / 16] + j % 16 * D + d;
        mil_lanes v[2][2 * DIRECT_CHUNKS];
#pragma GCC unroll 2
        for (int c = 0; c < n_chunks; c++) {
            mil_lanes a = load_dwords(row[0] + 32 * c, MIL_LANES);
            mil_lanes b = load_dwords(row[1] + 32 * c, MIL_LANES);
            __builtin_prefetch(next + 32 * c, 0, 2);
            __builtin_prefetch(next + D + 32 * c, 0, 2);
#if PAIR_ITEMS == 1
            v[0][2 * c] = lanes_zip_low(a, b);
            v[0][2 * c + 1] = lanes_zip_high(a, b);
#else
            v[0][2 * c] = PAIR_EVEN(a);
            v[0][2 * c + 1] = PAIR_ODD(a);
            v[1][2 * c] = PAIR_EVEN(b);
            v[1][2 * c + 1] = PAIR_ODD(b);
#endif
        }
#pragma GCC unroll 2
        for (int item = PAIR_ITEMS - 1; item >= 0; item--)
#pragma GCC unroll 8
            for (int r = 0; r < n_rows; r++) {
                mil_lanes x = lanes_set(p[r * BLOCK + j / 2 * PAIR_ITEMS + item]);
#pragma GCC unroll 4
                for (int c = 0; c < 2 * n_chunks; c++)
                    sum[r][c] = multiply_add(sum[r][c], x, v[item][c]);
            }
    }
#pragma GCC unroll 8
    for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 2 * n_chunks; c++)
            lanes_store(o + r * D + d + c * MIL_LANES, sum[r][c]);
}

static __attribute__((noinline)) void add_values_direct(int32_t n_rows, float *o, int32_t D,
                                                        const float *p, const block_rows *rows,
                                                        key_range keys)
{
    int32_t d = 0;
#if DIRECT_CHUNKS == 2
    for (; d + 64 <= D; d += 64)
        WITH_ROWS(direct_tile, 2, o, p, rows, keys, D, d)
#endif
    for (; d < D; d += 32)
        WITH_ROWS(direct_tile, 1, o, p, rows, keys, D, d)
}

/* ---- softmax ---- */

static mil_lanes capped(mil_lanes c, float scale, float cap)
{
    mil_lanes x = lanes_div(lanes_mul(c, lanes_set(scale)), lanes_set(cap));
    return lanes_mul(lanes_set(cap), lanes_tanh(x));
}

/* Cap and mask one row's scores in place; the largest, not scaled yet. keys is not empty. */
LANES_INLINE float finish_scores(const mil_attention_args *args, float *scores, int32_t n_vectors,
                                 key_range keys)
{
    const mil_lanes low = lanes_set(-INFINITY);
    bool is_changed = keys.begin != 0 || keys.end != n_vectors * MIL_LANES || args->softcap > 0.0f;
    mil_lanes top = low;
#pragma GCC unroll 4
    for (int32_t j = 0; j < n_vectors; j++) {
        mil_lanes c = lanes_load(scores + j * MIL_LANES);
        if (is_changed) {
            if (args->softcap > 0.0f)
                c = capped(c, args->scale, args->softcap);
            c = lanes_keep(c, clamp(keys.begin - j * MIL_LANES, 0, MIL_LANES),
                           clamp(keys.end - j * MIL_LANES, 0, MIL_LANES), low);
            lanes_store(scores + j * MIL_LANES, c);
        }
        top = lanes_max(c, top);
    }
    return lanes_top(top);
}

/* One row's scores to p, in place, and their sum to l. */
LANES_INLINE void weigh(float *scores, int32_t n_vectors, float scale, float m, float *l)
{
    mil_lanes sum = lanes_load(l);
    const mil_lanes factor = lanes_set(scale), below = lanes_set(-m);
#pragma GCC unroll 4
    for (int32_t j = 0; j < n_vectors; j++) {
        mil_lanes c = lanes_load(scores + j * MIL_LANES);
        mil_lanes p = ROUND_WEIGHTS(lanes_exp_coarse(lanes_fma(c, factor, below)));
        sum = lanes_add(sum, p);
#if PAIR_ITEMS == 1
        lanes_store_pairs(scores + j * MIL_LANES / 2, p);
#else
        lanes_store(scores + j * MIL_LANES, p);
#endif
    }
    lanes_store(l, sum);
}

static void scale_row(float *row, float factor, int32_t n)
{
    for (int32_t d = 0; d < n; d += MIL_LANES)
        lanes_store(row + d, lanes_mul(lanes_load(row + d), lanes_set(factor)));
}

/* ---- one split ---- */

/* Raise m of n <= 16 rows to the block's maxima; l and o shrink with it. */
static void raise_maxima(const mil_cpu_attention_tile *tile, const mil_cpu_attention_part *part,
                         int32_t first, int32_t n, const float *tops, float scale, int32_t width)
{
    float *m = part->m + first;
    mil_lanes old = lanes_load_n(m, n);
    mil_lanes top = lanes_mul(lanes_load_n(tops, n), lanes_set(scale));
    uint32_t raised = lanes_greater(top, old);
    if (raised == 0)
        return;
    float shrink[MIL_LANES];
    lanes_store_n(m, lanes_max(top, old), n);
    lanes_store(shrink, lanes_exp(lanes_sub(old, lanes_max(top, old))));
    for (; raised != 0; raised &= raised - 1) {
        int32_t r = __builtin_ctz(raised);
        scale_row(tile->scratch.lanes + (first + r) * MIL_LANES, shrink[r], MIL_LANES);
        scale_row(part->o + (int64_t)(first + r) * width, shrink[r], width);
    }
}

static int32_t query_of(const mil_cpu_attention_tile *tile, int32_t row)
{
    return tile->n_queries == 1 ? 0 : row / tile->group;
}

/* Whether values come straight from the pages: one group of rows uses them. */
static bool is_direct(const mil_cpu_attention_tile *tile)
{
    return tile->n_queries * tile->group <= DIRECT_ROWS && tile->args->kv->head_dim % 32 == 0;
}

/* Rows first .. first + n - 1 against the block whose keys and values are loaded. */
static void attend_rows(const mil_cpu_attention_tile *tile, const mil_cpu_attention_part *part,
                        const block_rows *rows, int32_t first, int32_t n, int32_t block)
{
    const mil_cpu_attention_scratch *scratch = &tile->scratch;
    int32_t D = tile->args->kv->head_dim, width = width_of(D);
    key_range keys = seen(tile, query_of(tile, first), query_of(tile, first + n - 1), block);
    if (keys.begin >= keys.end)
        return;
    int32_t n_vectors = (keys.end + MIL_LANES - 1) / MIL_LANES;
    score_rows(n, n_vectors, scratch->scores, scratch->q + first * (D / 2 * PAIR_ITEMS), D,
               scratch->k);

    float tops[MIL_LANES];
    bool is_blind[TILE_ROWS];
    for (int32_t r = 0; r < n; r++) {
        int32_t query = query_of(tile, first + r);
        float *scores = scratch->scores + r * BLOCK;
        key_range own = seen(tile, query, query, block);
        is_blind[r] = own.begin >= own.end;
        if (is_blind[r])
            tops[r] = -INFINITY;
        else if (n_vectors == BLOCK / MIL_LANES)
            tops[r] = finish_scores(tile->args, scores, BLOCK / MIL_LANES, own);
        else
            tops[r] = finish_scores(tile->args, scores, n_vectors, own);
    }
    float scale = tile->args->softcap > 0.0f ? 1.0f : tile->args->scale;
    raise_maxima(tile, part, first, n, tops, scale, width);
    for (int32_t r = 0; r < n; r++) {
        float *scores = scratch->scores + r * BLOCK, *l = scratch->lanes + (first + r) * MIL_LANES;
        if (is_blind[r])
            memset(scores, 0, BLOCK * sizeof *scores);
        else if (n_vectors == BLOCK / MIL_LANES)
            weigh(scores, BLOCK / MIL_LANES, scale, part->m[first + r], l);
        else
            weigh(scores, n_vectors, scale, part->m[first + r], l);
    }
    if (is_direct(tile)) {
        add_values_direct(n, part->o + (int64_t)first * D, D, scratch->scores, rows, keys);
        return;
    }
    int32_t pair = keys.begin / 2, end = (keys.end + 1) / 2;
    add_values(n, part->o + first * width, width, scratch->scores + pair * PAIR_ITEMS,
               scratch->v + pair * PAIR_ITEMS * width, end - pair);
}

/* The rows of one kv head against one block. */
static void attend_block(const mil_cpu_attention_tile *tile, const mil_cpu_attention_part *part,
                         int32_t kv_head, int32_t block, key_range keys)
{
    block_rows rows;
    find_rows(tile, block, kv_head, &rows);
    load_keys(tile, &rows, keys);
    if (!is_direct(tile))
        load_values(tile, &rows, keys);
    int32_t n_rows = tile->n_queries * tile->group, begin = kv_head * n_rows;
    for (int32_t r = 0; r < n_rows; r += TILE_ROWS)
        attend_rows(tile, part, &rows, begin + r, n_rows - r < TILE_ROWS ? n_rows - r : TILE_ROWS,
                    block);
}

static void split(const mil_cpu_attention_tile *tile, int32_t index,
                  const mil_cpu_attention_part *part)
{
    int32_t n_rows = tile->n_queries * tile->n_kv_heads * tile->group;
    int32_t width = width_of(tile->args->kv->head_dim);
    for (int32_t r = 0; r < n_rows; r++)
        part->m[r] = -INFINITY;
    memset(tile->scratch.lanes, 0, (size_t)n_rows * MIL_LANES * sizeof(float));
    memset(part->o, 0, (size_t)n_rows * (size_t)width * sizeof(float));

    for (int32_t block = index * SPLIT; block < (index + 1) * SPLIT; block += BLOCK) {
        key_range keys = seen(tile, 0, tile->n_queries - 1, block);
        if (keys.begin >= keys.end)
            continue;
        for (int32_t head = 0; head < tile->n_kv_heads; head++)
            attend_block(tile, part, head, block, keys);
    }
    for (int32_t r = 0; r < n_rows; r++)
        part->l[r] = lanes_sum(lanes_load(tile->scratch.lanes + r * MIL_LANES));
}

/* ---- after the splits ---- */

static float exp_of(float x)
{
    float all[MIL_LANES];
    lanes_store(all, lanes_exp(lanes_set(x)));
    return all[0];
}

static void merge(const mil_cpu_attention_part *total, const mil_cpu_attention_part *part,
                  int32_t n_rows, int32_t width)
{
    for (int32_t r = 0; r < n_rows; r++) {
        if (part->m[r] == -INFINITY && part->l[r] == 0.0f)
            continue;
        float m = part->m[r] > total->m[r] ? part->m[r] : total->m[r];
        float keep = exp_of(total->m[r] - m), add = exp_of(part->m[r] - m);
        float *o = total->o + (int64_t)r * width;
        const float *more = part->o + (int64_t)r * width;
        for (int32_t d = 0; d < width; d += MIL_LANES) {
            mil_lanes added = lanes_mul(lanes_load(more + d), lanes_set(add));
            lanes_store(o + d, lanes_fma(lanes_load(o + d), lanes_set(keep), added));
        }
        total->l[r] = total->l[r] * keep + part->l[r] * add;
        total->m[r] = m;
    }
}

/* Dwords of two results. */
LANES_INLINE mil_lanes join_results(const mil_attention_args *args, mil_lanes even, mil_lanes odd)
{
#ifdef MIL_ATTENTION_F16
    if (args->out_dtype == MIL_DTYPE_F16)
        return lanes_join_pairs_f16(even, odd);
#endif
    (void)args;
    return lanes_join_pairs(lanes_round_bf16(even), lanes_round_bf16(odd));
}

/* out = round(o * (1 / l) + 0); the zero turns -0 into +0. */
static void finish(const mil_cpu_attention_tile *tile, const mil_cpu_attention_part *total)
{
    int32_t D = tile->args->kv->head_dim, width = width_of(D);
    int32_t n_heads = tile->n_kv_heads * tile->group;
    for (int32_t r = 0; r < tile->n_queries * n_heads; r++) {
        uint16_t *out = tile->out + (r / n_heads) * tile->ld + (int64_t)(r % n_heads) * D;
        const float *o = total->o + (int64_t)r * width;
        mil_lanes factor = lanes_set(1.0f / total->l[r]);
        for (int32_t d = 0; d < D; d += 32) {
            mil_lanes even = lanes_fma(lanes_load(o + d), factor, lanes_zero());
            mil_lanes odd = lanes_fma(lanes_load(o + d + 16), factor, lanes_zero());
            mil_lanes both = join_results(tile->args, even, odd);
            lanes_store_n((float *)(void *)(out + d), both, D - d < 32 ? (D - d) / 2 : MIL_LANES);
        }
    }
}

const mil_cpu_attention_kernels MIL_CPU_NAME(KERNELS) = {
    .load_queries = load_queries,
    .split = split,
    .merge = merge,
    .finish = finish,
};
