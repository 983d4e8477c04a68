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
 * put them, they cost a quarter of the bandwidth (12.5 against 15 GB/s at 12 rows out of a
 * 480 MiB L3, Intel, 2026-11-23). */
#define PREFETCH(address) __asm__ volatile("prefetcht0 %0" : : "m"(*(address)))
#define PREFETCH_L2(address) __asm__ volatile("prefetcht1 %0" : : "m"(*(address)))
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

/* On Zen 4 the tile's own loads wait behind prefetcht0, but not behind prefetcht1: at 16 rows 0.73
 * to 0.77 of bf16 peak with the one, 0.87 to 0.91 with the other (bench_linear, 2026-11-24). A
 * stream of 1 to 4 rows is bound by bytes and best left to the processor's prefetcher: over a hot
 * loop of tiles 0.99 of read bandwidth at 4 rows, 0.88 to 0.94 with hints. LoRA's panels are short.
 */
INLINE void fetch(const char *address, int rows, int vectors)
{
    if (vectors == 1)
        PREFETCH(address);
    else if (rows > 4)
        PREFETCH_L2(address);
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
        fetch(prefetch, rows, vectors);
        UNROLL for (int m = 0; m < rows; m++)
        {
            if (m == rows / 2)
                fetch(prefetch + prefetch_step / 2, rows, vectors);
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

#define MAX_ROWS 12
/* 0.95 of the roof at 12 rows in a hot loop of tiles, where 3 KiB gives 0.82 (Zen 4). */
#define AHEAD_BYTES 6144
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

/* Within a page of where the stream is, so that the processor's own prefetcher goes along (Intel).
 */
#define AHEAD_BYTES 3072

/* Where a tile takes weights from: pairs of bf16; those, leaving their float32 values for others;
 * or what another tile left, [n_pairs][odd 32, even 32]. */
enum source { FROM_PAIRS, FROM_PAIRS_TO_WIDE, FROM_WIDE };

#if defined(MIL_ISA_AVX512)

/* Of 16 columns' pairs: the odd elements, or the even ones. */
INLINE __m512 odd_of(const char *pairs)
{
    const __m512i odd_half = _mm512_set1_epi32((int)0xffff0000u);
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_load_si512(pairs), odd_half));
}

INLINE __m512 even_of(const char *pairs)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_load_si512(pairs), 16));
}

/* Widening inside a tile takes 4 of 52 slots at 12 rows, and the rest runs worse beside it: 0.85 to
 * 0.90 of fp32 peak, against 0.98 from a widened block (Intel, 2026-11-23). */
#define HAS_WIDE 1

INLINE void tile(float *y, int64_t ldy, const X_ITEM *x, const void *panel, float *wide,
                 int32_t n_pairs, bool resume, const char *prefetch, int64_t prefetch_step,
                 int rows, int vectors, enum source source)
{
    const bool is_wide = source == FROM_WIDE;
    const char *w = panel;
    __m512 acc[MIL_CPU_MAX_TILE_ROWS][2];
    UNROLL for (int m = 0; m < rows; m++)
    {
        UNROLL for (int v = 0; v < vectors; v++) acc[m][v] =
            resume ? _mm512_loadu_ps(y + m * ldy + v * 16) : _mm512_setzero_ps();
    }
    for (int32_t i = 0; i < n_pairs; i++) {
        __m512 b[2];
        UNROLL for (int v = 0; v < vectors; v++) b[v] =
            is_wide ? _mm512_load_ps(w + v * 64) : odd_of(w + v * 64);
        UNROLL for (int v = 0; v < vectors; v++)
        {
            if (source == FROM_PAIRS_TO_WIDE)
                _mm512_store_ps(wide + v * 16, b[v]);
        }
        PREFETCH(prefetch);
        UNROLL for (int m = 0; m < rows; m++)
        {
            __m512 a = _mm512_set1_ps(x[m * X_STRIDE + 1]);
            UNROLL for (int v = 0; v < vectors; v++) acc[m][v] =
                _mm512_fmadd_ps(a, b[v], acc[m][v]);
        }
        /* Load again rather than keep: two more live vectors would spill accumulators. */
        if (!is_wide && rows >= 12)
            __asm__("" : "+r"(w));
        UNROLL for (int v = 0; v < vectors; v++) b[v] =
            is_wide ? _mm512_load_ps(w + (vectors + v) * 64) : even_of(w + v * 64);
        UNROLL for (int v = 0; v < vectors; v++)
        {
            if (source == FROM_PAIRS_TO_WIDE)
                _mm512_store_ps(wide + (vectors + v) * 16, b[v]);
        }
        PREFETCH(prefetch + prefetch_step / 2);
        UNROLL for (int m = 0; m < rows; m++)
        {
            __m512 a = _mm512_set1_ps(x[m * X_STRIDE]);
            UNROLL for (int v = 0; v < vectors; v++) acc[m][v] =
                _mm512_fmadd_ps(a, b[v], acc[m][v]);
        }
        x += 2;
        w += vectors * (is_wide ? 128 : 64);
        if (source == FROM_PAIRS_TO_WIDE)
            wide += vectors * 32;
        prefetch += prefetch_step;
    }
    UNROLL for (int m = 0; m < rows; m++)
    {
        UNROLL for (int v = 0; v < vectors; v++) _mm512_storeu_ps(y + m * ldy + v * 16, acc[m][v]);
    }
}

#define MAX_ROWS 12
#define WIDE_ROWS 12
#define TILE(rows, vectors, source)                                                                \
    tile(y, ldy, x, panel, wide, n_pairs, resume, prefetch, prefetch_step, rows, vectors, source)
#define TILE32(rows) TILE(rows, 2, FROM_PAIRS)
#define TILE16(rows) TILE(rows, 1, FROM_PAIRS)
#define WIDEN32(rows) TILE(rows, 2, FROM_PAIRS_TO_WIDE)
#define WIDE32(rows) TILE(rows, 2, FROM_WIDE)

#elif defined(MIL_ISA_AVX2)

/* Of 8 columns' pairs: the odd elements, or the even ones. */
INLINE __m256 odd_of(const char *pairs)
{
    const __m256i odd_half = _mm256_set1_epi32((int)0xffff0000u);
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_load_si256((const void *)pairs), odd_half));
}

INLINE __m256 even_of(const char *pairs)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_load_si256((const void *)pairs), 16));
}

/* A mask and the widened halves leave registers for 4 rows of 16 columns; without them it is 6. */
#define HAS_WIDE 1

/* `vectors` ymm of each pair of a panel `width` columns wide. */
INLINE void tile(float *y, int64_t ldy, const X_ITEM *x, const char *w, float *wide,
                 int32_t n_pairs, bool resume, const char *prefetch, int64_t prefetch_step,
                 int rows, int vectors, int width, enum source source)
{
    const bool is_wide = source == FROM_WIDE;
    __m256 acc[MIL_CPU_MAX_TILE_ROWS][4];
    UNROLL for (int m = 0; m < rows; m++)
    {
        UNROLL for (int v = 0; v < vectors; v++) acc[m][v] =
            resume ? _mm256_loadu_ps(y + m * ldy + v * 8) : _mm256_setzero_ps();
    }
    for (int32_t i = 0; i < n_pairs; i++) {
        __m256 b[4];
        UNROLL for (int v = 0; v < vectors; v++) b[v] =
            is_wide ? _mm256_load_ps((const float *)w + v * 8) : odd_of(w + v * 32);
        UNROLL for (int v = 0; v < vectors; v++)
        {
            if (source == FROM_PAIRS_TO_WIDE)
                _mm256_store_ps(wide + v * 8, b[v]);
        }
        PREFETCH(prefetch);
        UNROLL for (int m = 0; m < rows; m++)
        {
            __m256 a = _mm256_broadcast_ss(x + m * X_STRIDE + 1);
            UNROLL for (int v = 0; v < vectors; v++) acc[m][v] =
                _mm256_fmadd_ps(a, b[v], acc[m][v]);
        }
        UNROLL for (int v = 0; v < vectors; v++) b[v] =
            is_wide ? _mm256_load_ps((const float *)w + width + v * 8) : even_of(w + v * 32);
        UNROLL for (int v = 0; v < vectors; v++)
        {
            if (source == FROM_PAIRS_TO_WIDE)
                _mm256_store_ps(wide + width + v * 8, b[v]);
        }
        PREFETCH(prefetch + prefetch_step / 2);
        UNROLL for (int m = 0; m < rows; m++)
        {
            __m256 a = _mm256_broadcast_ss(x + m * X_STRIDE);
            UNROLL for (int v = 0; v < vectors; v++) acc[m][v] =
                _mm256_fmadd_ps(a, b[v], acc[m][v]);
        }
        x += 2;
        w += width * (is_wide ? 8 : 4);
        if (source == FROM_PAIRS_TO_WIDE)
            wide += width * 2;
        prefetch += prefetch_step;
    }
    UNROLL for (int m = 0; m < rows; m++)
    {
        UNROLL for (int v = 0; v < vectors; v++) _mm256_storeu_ps(y + m * ldy + v * 8, acc[m][v]);
    }
}

/* A panel of 32 is two halves where there are many rows, the second from cache. */
INLINE void halves(float *y, int64_t ldy, const X_ITEM *x, const char *w, float *wide,
                   int32_t n_pairs, bool resume, const char *prefetch, int64_t prefetch_step,
                   int rows, enum source source)
{
    if (rows <= 2) {
        tile(y, ldy, x, w, wide, n_pairs, resume, prefetch, prefetch_step, rows, 4, 32, source);
        return;
    }
    tile(y, ldy, x, w, wide, n_pairs, resume, prefetch, prefetch_step, rows, 2, 32, source);
    tile(y + 16, ldy, x, w + 64, wide + 16, n_pairs, resume, prefetch, prefetch_step, rows, 2, 32,
         source);
}

#define MAX_ROWS 4
#define WIDE_ROWS 6
#define HALVES(rows, source)                                                                       \
    halves(y, ldy, x, panel, wide, n_pairs, resume, prefetch, prefetch_step, rows, source)
#define TILE32(rows) HALVES(rows, FROM_PAIRS)
#define TILE16(rows)                                                                               \
    tile(y, ldy, x, panel, wide, n_pairs, resume, prefetch, prefetch_step, rows, 2, 16, FROM_PAIRS)
#define WIDEN32(rows) HALVES(rows, FROM_PAIRS_TO_WIDE)
#define WIDE32(rows) HALVES(rows, FROM_WIDE)

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

#define INSTANCE(kind, rows, CALL)                                                                 \
    static void kind##_##rows(float *y, int64_t ldy, const void *x, const void *panel,             \
                              float *wide, int32_t n_pairs, bool resume, const void *prefetch,     \
                              int64_t prefetch_step)                                               \
    {                                                                                              \
        (void)wide;                                                                                \
        CALL(rows);                                                                                \
    }
#define FOUR(kind, CALL)                                                                           \
    INSTANCE(kind, 1, CALL)                                                                        \
    INSTANCE(kind, 2, CALL)                                                                        \
    INSTANCE(kind, 3, CALL)                                                                        \
    INSTANCE(kind, 4, CALL)
#define SIX(kind, CALL)                                                                            \
    FOUR(kind, CALL)                                                                               \
    INSTANCE(kind, 5, CALL)                                                                        \
    INSTANCE(kind, 6, CALL)
#define TWELVE(kind, CALL)                                                                         \
    SIX(kind, CALL)                                                                                \
    INSTANCE(kind, 7, CALL)                                                                        \
    INSTANCE(kind, 8, CALL)                                                                        \
    INSTANCE(kind, 9, CALL)                                                                        \
    INSTANCE(kind, 10, CALL)                                                                       \
    INSTANCE(kind, 11, CALL)                                                                       \
    INSTANCE(kind, 12, CALL)
#define FOUR_OF(kind) NULL, kind##_1, kind##_2, kind##_3, kind##_4
#define SIX_OF(kind) FOUR_OF(kind), kind##_5, kind##_6
#define TWELVE_OF(kind) SIX_OF(kind), kind##_7, kind##_8, kind##_9, kind##_10, kind##_11, kind##_12

#if MAX_ROWS == 12
TWELVE(tile32, TILE32)
TWELVE(tile16, TILE16)
#define TILES_OF(kind) TWELVE_OF(kind)
#else
FOUR(tile32, TILE32)
FOUR(tile16, TILE16)
#define TILES_OF(kind) FOUR_OF(kind)
#endif

#if defined(HAS_WIDE) && WIDE_ROWS == 12
TWELVE(widen32, WIDEN32)
TWELVE(wide32, WIDE32)
#define WIDE_OF(kind) TWELVE_OF(kind)
#elif defined(HAS_WIDE)
SIX(widen32, WIDEN32)
SIX(wide32, WIDE32)
#define WIDE_OF(kind) SIX_OF(kind)
#endif

const mil_cpu_linear_kernels MIL_CPU_NAME(mil_cpu_linear_kernels) = {
    .max_rows = MAX_ROWS,
    .x_item_bytes = sizeof(X_ITEM),
    .x_stride = X_STRIDE,
    .ahead_bytes = AHEAD_BYTES,
    .pack_x = pack_x,
    .tile32 = {TILES_OF(tile32)},
    .tile16 = {TILES_OF(tile16)},
#ifdef HAS_WIDE
    .wide_rows = WIDE_ROWS,
    .widen32 = {WIDE_OF(widen32)},
    .wide32 = {WIDE_OF(wide32)},
#endif
};
