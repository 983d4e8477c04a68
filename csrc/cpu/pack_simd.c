/* The inner part of packing: 16 rows of a weight into 16 columns of a panel, pairs of k side by
 * side; that is a transpose of dwords. F16 and F32 are rounded to bfloat16 once, nearest even, by
 * integer arithmetic, so that the caller's floating-point modes do not matter.
 *
 * Whole blocks, 16 rows of one vector each, are transposed in registers; edges take the element
 * loop, which gives the same bits. In cache a block path packs bf16 at more than 30 GB/s a core
 * with AVX-512, the element loop at 2.5 (2026-11-23, 2.6 GHz Sapphire Rapids): loading is then
 * bound by reading the file and by the kernel's clearing of fresh pages. */
#include "base/bf16.h"
#include "base/f16.h"
#include "cpu/cpu.h"

#if defined(MIL_ISA_AVX512) || defined(MIL_ISA_AVX2)
#include <immintrin.h>
#endif

#define ROWS 16 /* of a block */

static uint16_t item(const void *src, mil_dtype dtype, int64_t index)
{
    switch (dtype) {
    case MIL_DTYPE_F32:
        return mil_bf16_from_float(((const float *)src)[index]);
    case MIL_DTYPE_F16:
        return mil_bf16_from_float(mil_f16_to_float(((const uint16_t *)src)[index]));
    default:
        return ((const uint16_t *)src)[index];
    }
}

/* Elements begin .. end of n_rows rows. */
static void pack_items(uint16_t *panel, int32_t width, int32_t column, const void *src,
                       mil_dtype dtype, int64_t src_stride, int32_t n_rows, int32_t begin,
                       int32_t end)
{
    for (int32_t row = 0; row < n_rows; row++) {
        for (int32_t k = begin; k < end; k++)
            panel[((int64_t)(k / 2) * width + column + row) * 2 + k % 2] =
                item(src, dtype, row * src_stride + k);
    }
}

#if defined(MIL_ISA_AVX512)

#define BLOCK 32 /* elements of a row in one block */

/* float32 bits -> bfloat16 in the low halves; mil_bf16_from_float, 16 at once. */
static inline __m512i round_bits(__m512i bits)
{
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    __mmask16 is_nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
    __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
    return _mm512_srli_epi32(_mm512_mask_mov_epi32(up, is_nan, quiet), 16);
}

static inline __m512i narrow(__m512i low, __m512i high)
{
    __m256i low_half = _mm512_cvtepi32_epi16(round_bits(low));
    __m256i high_half = _mm512_cvtepi32_epi16(round_bits(high));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low_half), high_half, 1);
}

static inline __m512i load_pairs(const void *src, mil_dtype dtype, int64_t index)
{
    if (dtype == MIL_DTYPE_F32) {
        const float *from = (const float *)src + index;
        return narrow(_mm512_loadu_si512(from), _mm512_loadu_si512(from + 16));
    }
    __m512i halves = _mm512_loadu_si512((const uint16_t *)src + index);
    if (dtype == MIL_DTYPE_BF16)
        return halves;
    __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
    return narrow(_mm512_castps_si512(low), _mm512_castps_si512(high));
}

/* Afterwards r[4 g + c], 128-bit lane l: rows 4 g .. 4 g + 3 of column 4 l + c. */
static inline void transpose_lanes(__m512i r[ROWS])
{
    for (int g = 0; g < ROWS; g += 4) {
        __m512i a = _mm512_unpacklo_epi32(r[g], r[g + 1]);
        __m512i b = _mm512_unpackhi_epi32(r[g], r[g + 1]);
        __m512i c = _mm512_unpacklo_epi32(r[g + 2], r[g + 3]);
        __m512i d = _mm512_unpackhi_epi32(r[g + 2], r[g + 3]);
        r[g] = _mm512_unpacklo_epi64(a, c);
        r[g + 1] = _mm512_unpackhi_epi64(a, c);
        r[g + 2] = _mm512_unpacklo_epi64(b, d);
        r[g + 3] = _mm512_unpackhi_epi64(b, d);
    }
}

static inline __attribute__((always_inline)) void
pack_block(uint16_t *to, int32_t width, const void *src, mil_dtype dtype, int64_t src_stride)
{
    __m512i r[ROWS];
    for (int row = 0; row < ROWS; row++)
        r[row] = load_pairs(src, dtype, row * src_stride);
    transpose_lanes(r);
    for (int c = 0; c < 4; c++) {
        __m512i even_low = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
        __m512i odd_low = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        __m512i even_high = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        __m512i odd_high = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        uint16_t *pair = to + (int64_t)c * width * 2;
        int64_t step = (int64_t)width * 2 * 4;
        _mm512_storeu_si512(pair, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
        _mm512_storeu_si512(pair + step, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
        _mm512_storeu_si512(pair + 2 * step, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
        _mm512_storeu_si512(pair + 3 * step, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
    }
}

#elif defined(MIL_ISA_AVX2)

#define BLOCK 16

static inline __m256i round_bits(__m256i bits)
{
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
    __m256i is_nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7f800000));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    return _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, is_nan), 16);
}

static inline __m256i narrow(__m256i low, __m256i high)
{
    __m256i mixed = _mm256_packus_epi32(round_bits(low), round_bits(high));
    return _mm256_permute4x64_epi64(mixed, 0xd8);
}

static inline __m256i load_256(const void *from)
{
    return _mm256_loadu_si256((const __m256i *)from);
}

static inline __m256i load_pairs(const void *src, mil_dtype dtype, int64_t index)
{
    if (dtype == MIL_DTYPE_F32) {
        const float *from = (const float *)src + index;
        return narrow(load_256(from), load_256(from + 8));
    }
    __m256i halves = load_256((const uint16_t *)src + index);
    if (dtype == MIL_DTYPE_BF16)
        return halves;
    __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
    return narrow(_mm256_castps_si256(low), _mm256_castps_si256(high));
}

/* Eight rows of eight pairs, to half a cache line for each pair. */
static inline __attribute__((always_inline)) void pack_half(uint16_t *to, int32_t width,
                                                            const void *src, mil_dtype dtype,
                                                            int64_t src_stride, int row)
{
    __m256i r[8];
    for (int i = 0; i < 8; i++)
        r[i] = load_pairs(src, dtype, (row + i) * src_stride);
    for (int g = 0; g < 8; g += 4) {
        __m256i a = _mm256_unpacklo_epi32(r[g], r[g + 1]);
        __m256i b = _mm256_unpackhi_epi32(r[g], r[g + 1]);
        __m256i c = _mm256_unpacklo_epi32(r[g + 2], r[g + 3]);
        __m256i d = _mm256_unpackhi_epi32(r[g + 2], r[g + 3]);
        r[g] = _mm256_unpacklo_epi64(a, c);
        r[g + 1] = _mm256_unpackhi_epi64(a, c);
        r[g + 2] = _mm256_unpacklo_epi64(b, d);
        r[g + 3] = _mm256_unpackhi_epi64(b, d);
    }
    for (int c = 0; c < 4; c++) {
        uint16_t *pair = to + ((int64_t)c * width + row) * 2;
        _mm256_storeu_si256((__m256i *)pair, _mm256_permute2x128_si256(r[c], r[4 + c], 0x20));
        _mm256_storeu_si256((__m256i *)(pair + (int64_t)width * 2 * 4),
                            _mm256_permute2x128_si256(r[c], r[4 + c], 0x31));
    }
}

static inline __attribute__((always_inline)) void
pack_block(uint16_t *to, int32_t width, const void *src, mil_dtype dtype, int64_t src_stride)
{
    pack_half(to, width, src, dtype, src_stride, 0);
    pack_half(to, width, src, dtype, src_stride, 8);
}

#endif

#ifdef BLOCK

static inline __attribute__((always_inline)) int32_t pack_blocks(uint16_t *to, int32_t width,
                                                                 const void *src, mil_dtype dtype,
                                                                 int64_t src_stride, int32_t n)
{
    int32_t k = 0;
    for (; k + BLOCK <= n; k += BLOCK)
        pack_block(to + (int64_t)k * width, width,
                   (const char *)src + (size_t)k * (dtype == MIL_DTYPE_F32 ? 4 : 2), dtype,
                   src_stride);
    return k;
}

/* Elements that whole blocks packed, of each of 16 rows. dtype is a constant in each body. */
static int32_t pack_whole_blocks(uint16_t *to, int32_t width, const void *src, mil_dtype dtype,
                                 int64_t src_stride, int32_t n)
{
    switch (dtype) {
    case MIL_DTYPE_F32:
        return pack_blocks(to, width, src, MIL_DTYPE_F32, src_stride, n);
    case MIL_DTYPE_F16:
        return pack_blocks(to, width, src, MIL_DTYPE_F16, src_stride, n);
    default:
        return pack_blocks(to, width, src, MIL_DTYPE_BF16, src_stride, n);
    }
}

#else

static int32_t pack_whole_blocks(uint16_t *to, int32_t width, const void *src, mil_dtype dtype,
                                 int64_t src_stride, int32_t n)
{
    (void)to, (void)width, (void)src, (void)dtype, (void)src_stride, (void)n;
    return 0;
}

#endif

static void pack_rows(uint16_t *panel, int32_t width, int32_t column, const void *src,
                      mil_dtype dtype, int64_t src_stride, int32_t n_rows, int32_t n)
{
    int32_t done = 0;
    if (n_rows == ROWS)
        done = pack_whole_blocks(panel + (int64_t)column * 2, width, src, dtype, src_stride, n);
    pack_items(panel, width, column, src, dtype, src_stride, n_rows, done, n);
}

const mil_cpu_pack_kernels MIL_CPU_NAME(mil_cpu_pack_kernels) = {.rows = pack_rows};
