/* One tile of causal attention over paged KV: FlashAttention-2's online softmax (Dao 2023) on
 * blocks of 64 keys. For a row and a block: s_j = scale * chain over d pairs ascending, odd d
 * first, of q_d k_jd    (then softcap, mask) m' = max(m, s_j), a = e^(m - m'), p_j = bf16(e^(s_j -
 * m')), masked p_j = 0 l = l a + p_j in lane j mod 16; o_d = o_d a, then chain over key pairs
 * ascending, odd first, of p_j v_jd At a split's end l is summed by the tree. All of it is float32;
 * q, k, v, p hold bfloat16 values. l sums the rounded p, so that the weights add up to one.
 *
 * A masked key counts as p = 0 and v = 0: rows of a page that no row sees may hold NaN. Skipping a
 * key that a row does not see changes nothing but a zero's sign, which finish() sets. */
#include "cpu/cpu.h"
#include "cpu/lanes.h"

#include <math.h>

#define BLOCK MIL_CPU_KV_BLOCK
#define SPLIT MIL_CPU_KV_SPLIT

/* Rows and vectors of the register tile: 24 of 32 registers accumulate, 12 of 16, or any. */
#define TILE_ROWS 6
#ifdef MIL_ISA_AVX512
#define TILE_VECTORS 4
#else
#define TILE_VECTORS 1
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

static const uint16_t *page_row(const mil_cpu_attention_tile *tile, const uint16_t *base,
                                int32_t key)
{
    int32_t P = tile->args->kv->page_size;
    return base + tile->pages[key / P] * tile->page_stride +
           (int64_t)(key % P) * tile->args->kv->head_dim;
}

/* ---- loads ---- */

static void load_queries(const mil_cpu_attention_tile *tile)
{
    int32_t D = tile->args->kv->head_dim;
    float *to = tile->scratch.q;
    for (int32_t i = 0; i < tile->n_queries; i++) {
        /* The heads of a group lie one after another. */
        const uint16_t *from = tile->q + i * tile->ld;
        for (int32_t d = 0; d < tile->group * D; d += MIL_LANES) {
            int32_t left = tile->group * D - d;
            int width = left < MIL_LANES ? left : MIL_LANES;
            lanes_store_n(to + d, lanes_load_bf16_n(from + d, width), width);
        }
        to += tile->group * D;
    }
}

/* 16 keys, of one page since pages hold a multiple of 16 rows, into 16 columns of k[d][64]. */
static void load_16_keys(float *k, const uint16_t *rows, int32_t D)
{
    for (int32_t d = 0; d < D; d += 2 * MIL_LANES) {
        int32_t n_pairs = (D - d) / 2 < MIL_LANES ? (D - d) / 2 : MIL_LANES;
        mil_lanes m[MIL_LANES];
#pragma GCC unroll 16
        for (int32_t i = 0; i < MIL_LANES; i++)
            m[i] = lanes_load_n((const float *)(const void *)(rows + (int64_t)i * D + d), n_pairs);
        lanes_transpose(m);
        for (int32_t j = 0; j < n_pairs; j++) {
            lanes_store(k + (d + 2 * j) * BLOCK, lanes_pair_even(m[j]));
            lanes_store(k + (d + 2 * j + 1) * BLOCK, lanes_pair_odd(m[j]));
        }
    }
}

static void load_keys(const mil_cpu_attention_tile *tile, int32_t block, key_range keys)
{
    for (int32_t j = keys.begin / MIL_LANES * MIL_LANES; j < keys.end; j += MIL_LANES)
        load_16_keys(tile->scratch.k + j, page_row(tile, tile->k, block + j),
                     tile->args->kv->head_dim);
}

/* Rows that share a pair with a seen key but are not seen themselves become zeros. */
static void load_values(const mil_cpu_attention_tile *tile, int32_t block, key_range keys)
{
    int32_t D = tile->args->kv->head_dim;
    int32_t width = (D + MIL_LANES - 1) / MIL_LANES * MIL_LANES;
    for (int32_t j = keys.begin & ~1; j < keys.end + (keys.end & 1); j++) {
        float *to = tile->scratch.v + j * width;
        if (j < keys.begin || j >= keys.end) {
            memset(to, 0, (size_t)width * sizeof *to);
            continue;
        }
        const uint16_t *from = page_row(tile, tile->v, block + j);
        int32_t d = 0;
        for (; d + MIL_LANES <= D; d += MIL_LANES)
            lanes_store(to + d, lanes_load_bf16(from + d));
        if (d < D)
            lanes_store(to + d, lanes_load_bf16_n(from + d, D - d));
    }
}

/* ---- products ---- */

/* c[r][16 j ..] = chain over k pairs, odd first, of a[r][k] * b[k][16 j ..], from 0 or from c
 * itself. */
LANES_INLINE void product_tile(int n_rows, int n_vectors, bool resume, float *c, int32_t ldc,
                               const float *a, int32_t lda, const float *b, int32_t ldb, int32_t n)
{
    mil_lanes sum[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++)
            sum[r][j] = resume ? lanes_load(c + r * ldc + j * MIL_LANES) : lanes_zero();
    for (int32_t k = 0; k < n; k += 2) {
#pragma GCC unroll 2
        for (int odd = 1; odd >= 0; odd--) {
            mil_lanes row[TILE_VECTORS];
#pragma GCC unroll 4
            for (int j = 0; j < n_vectors; j++)
                row[j] = lanes_load(b + (int64_t)(k + odd) * ldb + j * MIL_LANES);
#pragma GCC unroll 8
            for (int r = 0; r < n_rows; r++) {
                mil_lanes x = lanes_set(a[(int64_t)r * lda + k + odd]);
#pragma GCC unroll 4
                for (int j = 0; j < n_vectors; j++)
                    sum[r][j] = lanes_fma(x, row[j], sum[r][j]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; j++)
            lanes_store(c + r * ldc + j * MIL_LANES, sum[r][j]);
}

#define PRODUCT_ROWS(n_vectors)                                                                    \
    switch (n_rows) {                                                                              \
    case 1:                                                                                        \
        product_tile(1, n_vectors, resume, c, ldc, a, lda, b, ldb, n);                             \
        break;                                                                                     \
    case 2:                                                                                        \
        product_tile(2, n_vectors, resume, c, ldc, a, lda, b, ldb, n);                             \
        break;                                                                                     \
    case 3:                                                                                        \
        product_tile(3, n_vectors, resume, c, ldc, a, lda, b, ldb, n);                             \
        break;                                                                                     \
    case 4:                                                                                        \
        product_tile(4, n_vectors, resume, c, ldc, a, lda, b, ldb, n);                             \
        break;                                                                                     \
    case 5:                                                                                        \
        product_tile(5, n_vectors, resume, c, ldc, a, lda, b, ldb, n);                             \
        break;                                                                                     \
    default:                                                                                       \
        product_tile(6, n_vectors, resume, c, ldc, a, lda, b, ldb, n);                             \
    }

/* One instance of the tile for each size: sizes known to the compiler keep sums in registers. */
LANES_INLINE void product_any(bool resume, int32_t n_rows, int32_t n_vectors, float *c, int32_t ldc,
                              const float *a, int32_t lda, const float *b, int32_t ldb, int32_t n)
{
    int32_t j = 0;
#if TILE_VECTORS == 4
    for (; j + 4 <= n_vectors; j += 4, c += 4 * MIL_LANES, b += 4 * MIL_LANES)
        PRODUCT_ROWS(4)
    for (; j + 2 <= n_vectors; j += 2, c += 2 * MIL_LANES, b += 2 * MIL_LANES)
        PRODUCT_ROWS(2)
#endif
    for (; j < n_vectors; j++, c += MIL_LANES, b += MIL_LANES)
        PRODUCT_ROWS(1)
}

static __attribute__((noinline)) void score_rows(int32_t n_rows, int32_t n_vectors, float *scores,
                                                 const float *q, int32_t D, const float *k)
{
    product_any(false, n_rows, n_vectors, scores, BLOCK, q, D, k, BLOCK, D);
}

static __attribute__((noinline)) void add_values(int32_t n_rows, float *o, int32_t width,
                                                 const float *p, const float *v, int32_t n)
{
    product_any(true, n_rows, width / MIL_LANES, o, width, p, BLOCK, v, width, n);
}

/* ---- softmax ---- */

static float exp_of(float x)
{
    float all[MIL_LANES];
    lanes_store(all, lanes_exp(lanes_set(x)));
    return all[0];
}

static void scale_row(float *row, float factor, int32_t n)
{
    for (int32_t d = 0; d < n; d += MIL_LANES)
        lanes_store(row + d, lanes_mul(lanes_load(row + d), lanes_set(factor)));
}

/* Scores of one row to p, in place; m, l and o follow. keys is not empty. */
static void soften_row(const mil_attention_args *args, float *scores, int32_t n_vectors,
                       key_range keys, float *m, float *l, float *o, int32_t width)
{
    mil_lanes s[BLOCK / MIL_LANES];
    mil_lanes top = lanes_set(-INFINITY);
    for (int32_t j = 0; j < n_vectors; j++) {
        s[j] = lanes_mul(lanes_load(scores + j * MIL_LANES), lanes_set(args->scale));
        if (args->softcap > 0.0f)
            s[j] = lanes_mul(lanes_set(args->softcap),
                             lanes_tanh(lanes_div(s[j], lanes_set(args->softcap))));
        s[j] = lanes_keep(s[j], clamp(keys.begin - j * MIL_LANES, 0, MIL_LANES),
                          clamp(keys.end - j * MIL_LANES, 0, MIL_LANES), lanes_set(-INFINITY));
        top = lanes_max(s[j], top);
    }
    float block_top = lanes_top(top);
    mil_lanes sum = lanes_load(l);
    if (block_top > *m) {
        float shrink = exp_of(*m - block_top);
        sum = lanes_mul(sum, lanes_set(shrink));
        scale_row(o, shrink, width);
        *m = block_top;
    }
    for (int32_t j = 0; j < n_vectors; j++) {
        mil_lanes p = lanes_round_bf16(lanes_exp(lanes_sub(s[j], lanes_set(*m))));
        sum = lanes_add(sum, p);
        lanes_store(scores + j * MIL_LANES, p);
    }
    lanes_store(l, sum);
}

/* ---- one split ---- */

/* Rows first .. first + n - 1 against the block whose keys and values are loaded. */
static void attend_rows(const mil_cpu_attention_tile *tile, const mil_cpu_attention_part *part,
                        int32_t first, int32_t n, int32_t block)
{
    const mil_cpu_attention_scratch *scratch = &tile->scratch;
    int32_t D = tile->args->kv->head_dim;
    int32_t width = (D + MIL_LANES - 1) / MIL_LANES * MIL_LANES;
    key_range keys = seen(tile, first / tile->group, (first + n - 1) / tile->group, block);
    if (keys.begin >= keys.end)
        return;
    int32_t n_vectors = (keys.end + MIL_LANES - 1) / MIL_LANES;
    score_rows(n, n_vectors, scratch->scores, scratch->q + first * D, D, scratch->k);
    for (int32_t r = 0; r < n; r++) {
        int32_t row = first + r, query = row / tile->group;
        float *scores = scratch->scores + r * BLOCK;
        key_range own = seen(tile, query, query, block);
        if (own.begin < own.end)
            soften_row(tile->args, scores, n_vectors, own, &part->m[row],
                       scratch->lanes + row * MIL_LANES, part->o + row * width, width);
        else
            memset(scores, 0, BLOCK * sizeof *scores);
    }
    int32_t even = keys.begin & ~1;
    add_values(n, part->o + first * width, width, scratch->scores + even, scratch->v + even * width,
               keys.end - even);
}

static void split(const mil_cpu_attention_tile *tile, int32_t index,
                  const mil_cpu_attention_part *part)
{
    int32_t n_rows = tile->n_queries * tile->group;
    int32_t width = (tile->args->kv->head_dim + MIL_LANES - 1) / MIL_LANES * MIL_LANES;
    for (int32_t r = 0; r < n_rows; r++)
        part->m[r] = -INFINITY;
    memset(tile->scratch.lanes, 0, (size_t)n_rows * MIL_LANES * sizeof(float));
    memset(part->o, 0, (size_t)n_rows * (size_t)width * sizeof(float));

    for (int32_t block = index * SPLIT; block < (index + 1) * SPLIT; block += BLOCK) {
        key_range keys = seen(tile, 0, tile->n_queries - 1, block);
        if (keys.begin >= keys.end)
            continue;
        load_keys(tile, block, keys);
        load_values(tile, block, keys);
        for (int32_t first = 0; first < n_rows; first += TILE_ROWS)
            attend_rows(tile, part, first, n_rows - first < TILE_ROWS ? n_rows - first : TILE_ROWS,
                        block);
    }
    for (int32_t r = 0; r < n_rows; r++)
        part->l[r] = lanes_sum(lanes_load(tile->scratch.lanes + r * MIL_LANES));
}

/* ---- after the splits ---- */

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

/* out = bf16(o * (1 / l) + 0); the zero turns -0 into +0. */
static void finish(const mil_cpu_attention_tile *tile, const mil_cpu_attention_part *total)
{
    int32_t D = tile->args->kv->head_dim;
    int32_t width = (D + MIL_LANES - 1) / MIL_LANES * MIL_LANES;
    for (int32_t r = 0; r < tile->n_queries * tile->group; r++) {
        uint16_t *out = tile->out + (r / tile->group) * tile->ld + (int64_t)(r % tile->group) * D;
        const float *o = total->o + (int64_t)r * width;
        mil_lanes factor = lanes_set(1.0f / total->l[r]);
        for (int32_t d = 0; d < D; d += MIL_LANES)
            lanes_store_bf16_n(out + d, lanes_fma(lanes_load(o + d), factor, lanes_zero()),
                               D - d < MIL_LANES ? D - d : MIL_LANES);
    }
}

const mil_cpu_attention_kernels MIL_CPU_NAME(mil_cpu_attention_kernels) = {
    .load_queries = load_queries,
    .split = split,
    .merge = merge,
    .finish = finish,
};
