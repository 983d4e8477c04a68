/* Tiles of a product: MR rows of x against one panel of 32 columns (a weight) or 16 (LoRA's A).
 *
 *   y[m, n] = chain over pairs i ascending: fma(x[m, 2i+1], w[n, 2i+1], .), then fma(x[m, 2i], w[n,
 * 2i], .)
 *
 * which is what vdpbf16ps computes with denormals flushed (0 of 2,000 dots differ on Zen 5, none on
 * the Intel parts tried), so every instruction set returns the same bits. Accumulators stay in
 * registers: there is one instance for each number of rows, all loops over accumulators are fully
 * unrolled, and benchmarks/bench_linear.c checks for spills by its figures. */
#include "base/bf16.h"
#include "cpu/cpu.h"

#if defined(MIL_ISA_AVX512) || defined(MIL_ISA_AVX2)
#include <immintrin.h>
#endif

/* gcc keeps an accumulator array in memory unless every loop over it is unrolled early. */
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE static inline __attribute__((always_inline))

#if defined(MIL_ISA_AVX512) || defined(MIL_ISA_AVX2)
/* Two lines for each pair, half a pair apart and pinned there: side by side, as the compiler would
 * put them, they cost a quarter of the bandwidth (12.5 against 15 GB/s at 12 rows, Intel,
 * 2026-11-23). */
#define PREFETCH(address) __asm__ volatile("prefetcht0 %0" : : "m"(*(address)))
#endif

#if defined(MIL_ISA_AVX512BF16)

/* ---- pairs of bf16, multiplied as they are ---- */

/* Rows 17 cache lines apart, so that a tile's rows spread over the sets of the first cache. */
#define X_ITEM uint16_t
#define X_STRIDE (MIL_CPU_KC + 32)

static void pack_x(void *packed, const uint16_t *x, int32_t n)
{
    uint16_t *to = packed;
    memcpy(to, x, (size_t)n * sizeof *to);
    if (n % 2 != 0)
        to[n] = 0;
}

INLINE __m512bh pair_of(const uint16_t *x)
{
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

INLINE void tile(float *y, int64_t ldy, const X_ITEM *x, const uint16_t *w, int32_t n_pairs,
                 bool resume, const char *prefetch, int64_t prefetch_step, int rows, int vectors)
{
    __m512 acc[MIL_CPU_MAX_TILE_ROWS][2];
    UNROLL for (int m = 0; m < rows; m++)
    {
        UNROLL for (int v = 0; v < vectors; v++) acc[m][v] =
            resume ? _mm512_loadu_ps(y + m * ldy + v * 16) : _mm512_setzero_ps();
    }
    for (int32_t i = 0; i < n_pairs; i++) {
        __m512bh b[2];
        UNROLL for (int v = 0; v < vectors; v++) b[v] = (__m512bh)_mm512_load_si512(w + v * 32);
        PREFETCH(prefetch);
        UNROLL for (int m = 0; m < rows; m++)
        {
            if (m == rows / 2)
                PREFETCH(prefetch + prefetch_step / 2);
            __m512bh a = pair_of(x + m * X_STRIDE);
            UNROLL for (int v = 0; v < vectors; v++) acc[m][v] =
                _mm512_dpbf16_ps(acc[m][v], a, b[v]);
        }
        x += 2;
        w += vectors * 32;
        prefetch += prefetch_step;
    }
    UNROLL for (int m = 0; m < rows; m++)
    {
        UNROLL for (int v = 0; v < vectors; v++) _mm512_storeu_ps(y + m * ldy + v * 16, acc[m][v]);
    }
}

#define MAX_ROWS 14
#define TILE32(rows) tile(y, ldy, x, panel, n_pairs, resume, prefetch, prefetch_step, rows, 2)
#define TILE16(rows) tile(y, ldy, x, panel, n_pairs, resume, prefetch, prefetch_step, rows, 1)

#else

/* ---- fp32 fma: x is widened once, weights are as they are loaded ---- */

/* Rows 33 cache lines apart, so that a tile's rows spread over the sets of the first cache. */
#define X_ITEM float
#define X_STRIDE (MIL_CPU_KC + 16)

static void pack_x(void *packed, const uint16_t *x, int32_t n)
{
    uint32_t *to = packed;
    for (int32_t k = 0; k < n; k++)
        to[k] = (uint32_t)x[k] << 16;
    if (n % 2 != 0)
        to[n] = 0;
}

#if defined(MIL_ISA_AVX512)

INLINE void tile(float *y, int64_t ldy, const X_ITEM *x, const uint16_t *w, int32_t n_pairs,
                 bool resume, const char *prefetch, int64_t prefetch_step, int rows, int vectors)
{
    const __m512i odd_half = _mm512_set1_epi32((int)0xffff0000u);
    __m512 acc[MIL_CPU_MAX_TILE_ROWS][2];
    UNROLL for (int m = 0; m < rows; m++)
    {
        UNROLL for (int v = 0; v < vectors; v++) acc[m][v] =
            resume ? _mm512_loadu_ps(y + m * ldy + v * 16) : _mm512_setzero_ps();
    }
    for (int32_t i = 0; i < n_pairs; i++) {
        __m512 b[2];
        UNROLL for (int v = 0; v < vectors; v++) b[v] =
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_load_si512(w + v * 32), odd_half));
        PREFETCH(prefetch);
        UNROLL for (int m = 0; m < rows; m++)
        {
            __m512 a = _mm512_set1_ps(x[m * X_STRIDE + 1]);
            UNROLL for (int v = 0; v < vectors; v++) acc[m][v] =
                _mm512_fmadd_ps(a, b[v], acc[m][v]);
        }
        /* Load again rather than keep: two more live vectors would spill accumulators. */
        if (rows >= 12)
            __asm__("" : "+r"(w));
        UNROLL for (int v = 0; v < vectors; v++) b[v] =
            _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_load_si512(w + v * 32), 16));
        PREFETCH(prefetch + prefetch_step / 2);
        UNROLL for (int m = 0; m < rows; m++)
        {
            __m512 a = _mm512_set1_ps(x[m * X_STRIDE]);
            UNROLL for (int v = 0; v < vectors; v++) acc[m][v] =
                _mm512_fmadd_ps(a, b[v], acc[m][v]);
        }
        x += 2;
        w += vectors * 32;
        prefetch += prefetch_step;
    }
    UNROLL for (int m = 0; m < rows; m++)
    {
        UNROLL for (int v = 0; v < vectors; v++) _mm512_storeu_ps(y + m * ldy + v * 16, acc[m][v]);
    }
}

#define MAX_ROWS 13
#define TILE32(rows) tile(y, ldy, x, panel, n_pairs, resume, prefetch, prefetch_step, rows, 2)
#define TILE16(rows) tile(y, ldy, x, panel, n_pairs, resume, prefetch, prefetch_step, rows, 1)

#elif defined(MIL_ISA_AVX2)

/* `vectors` ymm of a panel whose pairs lie `step` items apart. */
INLINE void tile(float *y, int64_t ldy, const X_ITEM *x, const uint16_t *w, int32_t n_pairs,
                 bool resume, const char *prefetch, int64_t prefetch_step, int rows, int vectors,
                 int step)
{
    const __m256i odd_half = _mm256_set1_epi32((int)0xffff0000u);
    __m256 acc[MIL_CPU_MAX_TILE_ROWS][4];
    UNROLL for (int m = 0; m < rows; m++)
    {
        UNROLL for (int v = 0; v < vectors; v++) acc[m][v] =
            resume ? _mm256_loadu_ps(y + m * ldy + v * 8) : _mm256_setzero_ps();
    }
    for (int32_t i = 0; i < n_pairs; i++) {
        __m256 b[4];
        UNROLL for (int v = 0; v < vectors; v++) b[v] = _mm256_castsi256_ps(
            _mm256_and_si256(_mm256_load_si256((const __m256i *)(w + v * 16)), odd_half));
        PREFETCH(prefetch);
        UNROLL for (int m = 0; m < rows; m++)
        {
            __m256 a = _mm256_broadcast_ss(x + m * X_STRIDE + 1);
            UNROLL for (int v = 0; v < vectors; v++) acc[m][v] =
                _mm256_fmadd_ps(a, b[v], acc[m][v]);
        }
        UNROLL for (int v = 0; v < vectors; v++) b[v] = _mm256_castsi256_ps(
            _mm256_slli_epi32(_mm256_load_si256((const __m256i *)(w + v * 16)), 16));
        PREFETCH(prefetch + prefetch_step / 2);
        UNROLL for (int m = 0; m < rows; m++)
        {
            __m256 a = _mm256_broadcast_ss(x + m * X_STRIDE);
            UNROLL for (int v = 0; v < vectors; v++) acc[m][v] =
                _mm256_fmadd_ps(a, b[v], acc[m][v]);
        }
        x += 2;
        w += step;
        prefetch += prefetch_step;
    }
    UNROLL for (int m = 0; m < rows; m++)
    {
        UNROLL for (int v = 0; v < vectors; v++) _mm256_storeu_ps(y + m * ldy + v * 8, acc[m][v]);
    }
}

/* Sixteen registers hold 5 rows of 16 columns (a sixth spills under gcc 12, and is slower): a panel
 * of 32 is two halves, the second from cache. */
INLINE void tile32(float *y, int64_t ldy, const X_ITEM *x, const uint16_t *w, int32_t n_pairs,
                   bool resume, const char *prefetch, int64_t prefetch_step, int rows)
{
    if (rows <= 2) {
        tile(y, ldy, x, w, n_pairs, resume, prefetch, prefetch_step, rows, 4, 64);
        return;
    }
    tile(y, ldy, x, w, n_pairs, resume, prefetch, prefetch_step, rows, 2, 64);
    tile(y + 16, ldy, x, w + 32, n_pairs, resume, prefetch, prefetch_step, rows, 2, 64);
}

#define MAX_ROWS 5
#define TILE32(rows) tile32(y, ldy, x, panel, n_pairs, resume, prefetch, prefetch_step, rows)
#define TILE16(rows) tile(y, ldy, x, panel, n_pairs, resume, prefetch, prefetch_step, rows, 2, 32)

#else

/* The formula, as it is written above. */
static void tile(float *y, int64_t ldy, const X_ITEM *x, const uint16_t *w, int32_t n_pairs,
                 bool resume, int rows, int width)
{
    for (int m = 0; m < rows; m++) {
        for (int n = 0; n < width; n++) {
            float chain = resume ? y[m * ldy + n] : 0.0f;
            for (int32_t i = 0; i < n_pairs; i++) {
                const uint16_t *pair = w + ((int64_t)i * width + n) * 2;
                const float *a = x + m * X_STRIDE + 2 * i;
                chain = __builtin_fmaf(a[1], mil_bf16_to_float(pair[1]), chain);
                chain = __builtin_fmaf(a[0], mil_bf16_to_float(pair[0]), chain);
            }
            y[m * ldy + n] = chain;
        }
    }
}

#define MAX_ROWS 4
#define TILE32(rows)                                                                               \
    ((void)prefetch, (void)prefetch_step, tile(y, ldy, x, panel, n_pairs, resume, rows, 32))
#define TILE16(rows)                                                                               \
    ((void)prefetch, (void)prefetch_step, tile(y, ldy, x, panel, n_pairs, resume, rows, 16))

#endif
#endif

/* ---- one instance for each number of rows ---- */

#define TILES(rows)                                                                                \
    static void tile_##rows##x32(float *y, int64_t ldy, const void *x, const uint16_t *panel,      \
                                 int32_t n_pairs, bool resume, const void *prefetch,               \
                                 int64_t prefetch_step)                                            \
    {                                                                                              \
        TILE32(rows);                                                                              \
    }                                                                                              \
    static void tile_##rows##x16(float *y, int64_t ldy, const void *x, const uint16_t *panel,      \
                                 int32_t n_pairs, bool resume, const void *prefetch,               \
                                 int64_t prefetch_step)                                            \
    {                                                                                              \
        TILE16(rows);                                                                              \
    }
TILES(1)
TILES(2)
TILES(3)
TILES(4)
#if MAX_ROWS >= 5
TILES(5)
#endif
#if MAX_ROWS >= 13
TILES(6)
TILES(7)
TILES(8)
TILES(9)
TILES(10)
TILES(11)
TILES(12)
TILES(13)
#endif
#if MAX_ROWS >= 14
TILES(14)
#endif

#define FOUR(width) NULL, tile_1x##width, tile_2x##width, tile_3x##width, tile_4x##width
#define FIVE(width) FOUR(width), tile_5x##width
#define THIRTEEN(width)                                                                            \
    FIVE(width), tile_6x##width, tile_7x##width, tile_8x##width, tile_9x##width, tile_10x##width,  \
        tile_11x##width, tile_12x##width, tile_13x##width

const mil_cpu_linear_kernels MIL_CPU_NAME(mil_cpu_linear_kernels) = {
    .max_rows = MAX_ROWS,
    .x_item_bytes = sizeof(X_ITEM),
    .x_stride = X_STRIDE,
    .pack_x = pack_x,
#if MAX_ROWS == 14
    .tile32 = {THIRTEEN(32), tile_14x32},
    .tile16 = {THIRTEEN(16), tile_14x16},
#elif MAX_ROWS == 13
    .tile32 = {THIRTEEN(32)},
    .tile16 = {THIRTEEN(16)},
#elif MAX_ROWS == 5
    .tile32 = {FIVE(32)},
    .tile16 = {FIVE(16)},
#else
    .tile32 = {FOUR(32)},
    .tile16 = {FOUR(16)},
#endif
};
