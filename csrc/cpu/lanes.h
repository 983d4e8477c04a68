/* Sixteen virtual float32 lanes: one body, compiled for each instruction set, returns identical
 * bits.
 *
 * A step is a sequence of the operations below: + - x / sqrt fma, comparisons and integer shifts,
 * all correctly rounded and so the same on every machine. Reductions follow one tree (8-4-2-1),
 * tails are zeros, exp and log are the polynomials at the end. No libm, rsqrt or rcp. Flush-to-zero
 * and denormals-are-zero are expected to be set (base/threads.h). Included by *_simd.c files only.
 */
#pragma once

#include "base/f16.h"

#include <stdint.h>
#include <string.h>

#if defined(MIL_ISA_AVX512) || defined(MIL_ISA_AVX2)
#include <immintrin.h>
#endif

#define MIL_LANES 16

#define LANES_INLINE static inline __attribute__((always_inline, unused))

#if defined(MIL_ISA_AVX512)

typedef struct mil_lanes {
    __m512 v;
} mil_lanes;

LANES_INLINE mil_lanes lanes_of(__m512 v)
{
    return (mil_lanes){v};
}
LANES_INLINE mil_lanes lanes_of_bits(__m512i v)
{
    return lanes_of(_mm512_castsi512_ps(v));
}
LANES_INLINE __m512i lanes_bits(mil_lanes a)
{
    return _mm512_castps_si512(a.v);
}
LANES_INLINE __mmask16 lanes_mask(int n)
{
    return (__mmask16)((1u << n) - 1u);
}

LANES_INLINE mil_lanes lanes_set(float x)
{
    return lanes_of(_mm512_set1_ps(x));
}
LANES_INLINE mil_lanes lanes_load(const float *p)
{
    return lanes_of(_mm512_loadu_ps(p));
}
LANES_INLINE mil_lanes lanes_load_n(const float *p, int n)
{
    return lanes_of(_mm512_maskz_loadu_ps(lanes_mask(n), p));
}
LANES_INLINE void lanes_store(float *p, mil_lanes a)
{
    _mm512_storeu_ps(p, a.v);
}
LANES_INLINE void lanes_store_n(float *p, mil_lanes a, int n)
{
    _mm512_mask_storeu_ps(p, lanes_mask(n), a.v);
}
LANES_INLINE mil_lanes lanes_add(mil_lanes a, mil_lanes b)
{
    return lanes_of(_mm512_add_ps(a.v, b.v));
}
LANES_INLINE mil_lanes lanes_sub(mil_lanes a, mil_lanes b)
{
    return lanes_of(_mm512_sub_ps(a.v, b.v));
}
LANES_INLINE mil_lanes lanes_mul(mil_lanes a, mil_lanes b)
{
    return lanes_of(_mm512_mul_ps(a.v, b.v));
}
LANES_INLINE mil_lanes lanes_div(mil_lanes a, mil_lanes b)
{
    return lanes_of(_mm512_div_ps(a.v, b.v));
}
LANES_INLINE mil_lanes lanes_sqrt(mil_lanes a)
{
    return lanes_of(_mm512_sqrt_ps(a.v));
}
LANES_INLINE mil_lanes lanes_fma(mil_lanes a, mil_lanes b, mil_lanes c)
{
    return lanes_of(_mm512_fmadd_ps(a.v, b.v, c.v));
}
LANES_INLINE mil_lanes lanes_max(mil_lanes a, mil_lanes b)
{
    return lanes_of(_mm512_max_ps(a.v, b.v));
}
LANES_INLINE mil_lanes lanes_min(mil_lanes a, mil_lanes b)
{
    return lanes_of(_mm512_min_ps(a.v, b.v));
}
LANES_INLINE mil_lanes lanes_keep(mil_lanes a, int begin, int end, mil_lanes other)
{
    __mmask16 mask = lanes_mask(end) & (__mmask16)~lanes_mask(begin);
    return lanes_of(_mm512_mask_blend_ps(mask, other.v, a.v));
}
LANES_INLINE uint32_t lanes_not_less(mil_lanes a, mil_lanes b)
{
    return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ);
}
LANES_INLINE uint32_t lanes_greater(mil_lanes a, mil_lanes b)
{
    return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ);
}
LANES_INLINE uint32_t lanes_equal(mil_lanes a, mil_lanes b)
{
    return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ);
}
LANES_INLINE uint32_t lanes_is_nan(mil_lanes a)
{
    return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
}
LANES_INLINE float lanes_sum(mil_lanes a)
{
    __m256 h8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 h4 = _mm_add_ps(_mm256_castps256_ps128(h8), _mm256_extractf128_ps(h8, 1));
    __m128 h2 = _mm_add_ps(h4, _mm_movehl_ps(h4, h4));
    return _mm_cvtss_f32(_mm_add_ss(h2, _mm_shuffle_ps(h2, h2, 1)));
}
LANES_INLINE float lanes_top(mil_lanes a)
{
    __m256 h8 = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 h4 = _mm_max_ps(_mm256_castps256_ps128(h8), _mm256_extractf128_ps(h8, 1));
    __m128 h2 = _mm_max_ps(h4, _mm_movehl_ps(h4, h4));
    return _mm_cvtss_f32(_mm_max_ss(h2, _mm_shuffle_ps(h2, h2, 1)));
}
LANES_INLINE mil_lanes lanes_pair_even(mil_lanes a)
{
    return lanes_of_bits(_mm512_slli_epi32(lanes_bits(a), 16));
}
LANES_INLINE mil_lanes lanes_pair_odd(mil_lanes a)
{
    return lanes_of_bits(_mm512_and_si512(lanes_bits(a), _mm512_set1_epi32((int)0xffff0000u)));
}
LANES_INLINE mil_lanes lanes_round_bf16(mil_lanes a)
{
    __m512i bits = lanes_bits(a);
    __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
    return lanes_of_bits(_mm512_and_si512(up, _mm512_set1_epi32((int)0xffff0000u)));
}
LANES_INLINE mil_lanes lanes_round_bf16_away(mil_lanes a)
{
    __m512i up = _mm512_add_epi32(lanes_bits(a), _mm512_set1_epi32(0x8000));
    return lanes_of_bits(_mm512_and_si512(up, _mm512_set1_epi32((int)0xffff0000u)));
}
LANES_INLINE mil_lanes lanes_load_bf16(const uint16_t *p)
{
    __m256i half = _mm256_loadu_si256((const __m256i *)p);
    return lanes_of_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
LANES_INLINE mil_lanes lanes_load_bf16_n(const uint16_t *p, int n)
{
    __m256i half = _mm256_maskz_loadu_epi16(lanes_mask(n), p);
    return lanes_of_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
LANES_INLINE void lanes_store_bf16_n(uint16_t *p, mil_lanes a, int n)
{
    __m512i high = _mm512_srli_epi32(lanes_bits(lanes_round_bf16(a)), 16);
    _mm256_mask_storeu_epi16(p, lanes_mask(n), _mm512_cvtepi32_epi16(high));
}
LANES_INLINE mil_lanes lanes_join_pairs(mil_lanes even, mil_lanes odd)
{
    return lanes_of_bits(_mm512_or_si512(_mm512_srli_epi32(lanes_bits(even), 16), lanes_bits(odd)));
}
LANES_INLINE mil_lanes lanes_pair_even_f16(mil_lanes a)
{
    return lanes_of(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(lanes_bits(a))));
}
LANES_INLINE mil_lanes lanes_pair_odd_f16(mil_lanes a)
{
    return lanes_of(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(lanes_bits(a), 16))));
}
LANES_INLINE __m256i lanes_narrow_f16(mil_lanes a)
{
    return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT);
}
LANES_INLINE mil_lanes lanes_round_f16(mil_lanes a)
{
    return lanes_of(_mm512_cvtph_ps(lanes_narrow_f16(a)));
}
LANES_INLINE mil_lanes lanes_load_f16_n(const uint16_t *p, int n)
{
    return lanes_of(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_mask(n), p)));
}
LANES_INLINE void lanes_store_f16_n(uint16_t *p, mil_lanes a, int n)
{
    _mm256_mask_storeu_epi16(p, lanes_mask(n), lanes_narrow_f16(a));
}
LANES_INLINE mil_lanes lanes_join_pairs_f16(mil_lanes even, mil_lanes odd)
{
    __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(lanes_narrow_f16(odd)), 16);
    return lanes_of_bits(_mm512_or_si512(_mm512_cvtepu16_epi32(lanes_narrow_f16(even)), high));
}
LANES_INLINE mil_lanes lanes_zip_low(mil_lanes a, mil_lanes b)
{
    __m512i low = _mm512_and_si512(lanes_bits(a), _mm512_set1_epi32(0xffff));
    return lanes_of_bits(_mm512_or_si512(low, _mm512_slli_epi32(lanes_bits(b), 16)));
}
LANES_INLINE mil_lanes lanes_zip_high(mil_lanes a, mil_lanes b)
{
    __m512i high = _mm512_and_si512(lanes_bits(b), _mm512_set1_epi32((int)0xffff0000u));
    return lanes_of_bits(_mm512_or_si512(_mm512_srli_epi32(lanes_bits(a), 16), high));
}
LANES_INLINE void lanes_store_pairs(float *p, mil_lanes a)
{
    __m512i high = _mm512_srli_epi32(lanes_bits(a), 16);
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtepi32_epi16(high));
}
#ifdef MIL_ISA_AVX512BF16
LANES_INLINE mil_lanes lanes_dot_pairs(mil_lanes sum, mil_lanes a, mil_lanes b)
{
    return lanes_of(_mm512_dpbf16_ps(sum.v, (__m512bh)lanes_bits(a), (__m512bh)lanes_bits(b)));
}
#endif
LANES_INLINE mil_lanes lanes_times_two_to(mil_lanes p, mil_lanes t, mil_lanes x, mil_lanes low)
{
    __mmask16 keep = _mm512_cmp_ps_mask(x.v, low.v, _CMP_NLT_UQ);
    __m512i n = _mm512_slli_epi32(lanes_bits(t), 23);
    return lanes_of_bits(_mm512_maskz_add_epi32(keep, lanes_bits(p), n));
}
LANES_INLINE mil_lanes lanes_split(mil_lanes a, mil_lanes *exponent)
{
    __m512i bits = lanes_bits(a);
    __m512i e = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3)), 23);
    *exponent = lanes_of(_mm512_cvtepi32_ps(e));
    return lanes_of_bits(_mm512_sub_epi32(bits, _mm512_slli_epi32(e, 23)));
}
LANES_INLINE void lanes_transpose(mil_lanes m[MIL_LANES])
{
    __m512 a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(m[i].v, m[i + 1].v);
        a[i + 1] = _mm512_unpackhi_ps(m[i].v, m[i + 1].v);
    }
    /* b[i + j]: column 4 q + j of rows i .. i + 3, for each 128-bit part q. */
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512 lo01 = _mm512_shuffle_f32x4(b[j], b[j + 4], 0x44);
        __m512 hi01 = _mm512_shuffle_f32x4(b[j], b[j + 4], 0xee);
        __m512 lo23 = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0x44);
        __m512 hi23 = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0xee);
        m[j].v = _mm512_shuffle_f32x4(lo01, lo23, 0x88);
        m[j + 4].v = _mm512_shuffle_f32x4(lo01, lo23, 0xdd);
        m[j + 8].v = _mm512_shuffle_f32x4(hi01, hi23, 0x88);
        m[j + 12].v = _mm512_shuffle_f32x4(hi01, hi23, 0xdd);
    }
}

#elif defined(MIL_ISA_AVX2)

typedef struct mil_lanes {
    __m256 lo, hi;
} mil_lanes;

LANES_INLINE mil_lanes lanes_of(__m256 lo, __m256 hi)
{
    return (mil_lanes){lo, hi};
}
LANES_INLINE mil_lanes lanes_of_bits(__m256i lo, __m256i hi)
{
    return lanes_of(_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi));
}
LANES_INLINE __m256i lanes_lo(mil_lanes a)
{
    return _mm256_castps_si256(a.lo);
}
LANES_INLINE __m256i lanes_hi(mil_lanes a)
{
    return _mm256_castps_si256(a.hi);
}
/* All ones in the dwords first .. first + 7 that are below n. */
LANES_INLINE __m256i lanes_mask(int first, int n)
{
    __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n - first), index);
}

LANES_INLINE mil_lanes lanes_set(float x)
{
    return lanes_of(_mm256_set1_ps(x), _mm256_set1_ps(x));
}
LANES_INLINE mil_lanes lanes_load(const float *p)
{
    return lanes_of(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
}
LANES_INLINE mil_lanes lanes_load_n(const float *p, int n)
{
    return lanes_of(_mm256_maskload_ps(p, lanes_mask(0, n)),
                    _mm256_maskload_ps(p + 8, lanes_mask(8, n)));
}
LANES_INLINE void lanes_store(float *p, mil_lanes a)
{
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
LANES_INLINE void lanes_store_n(float *p, mil_lanes a, int n)
{
    _mm256_maskstore_ps(p, lanes_mask(0, n), a.lo);
    _mm256_maskstore_ps(p + 8, lanes_mask(8, n), a.hi);
}
LANES_INLINE mil_lanes lanes_add(mil_lanes a, mil_lanes b)
{
    return lanes_of(_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi));
}
LANES_INLINE mil_lanes lanes_sub(mil_lanes a, mil_lanes b)
{
    return lanes_of(_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi));
}
LANES_INLINE mil_lanes lanes_mul(mil_lanes a, mil_lanes b)
{
    return lanes_of(_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi));
}
LANES_INLINE mil_lanes lanes_div(mil_lanes a, mil_lanes b)
{
    return lanes_of(_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi));
}
LANES_INLINE mil_lanes lanes_sqrt(mil_lanes a)
{
    return lanes_of(_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi));
}
LANES_INLINE mil_lanes lanes_fma(mil_lanes a, mil_lanes b, mil_lanes c)
{
    return lanes_of(_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi));
}
LANES_INLINE mil_lanes lanes_max(mil_lanes a, mil_lanes b)
{
    return lanes_of(_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi));
}
LANES_INLINE mil_lanes lanes_min(mil_lanes a, mil_lanes b)
{
    return lanes_of(_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi));
}
LANES_INLINE mil_lanes lanes_keep(mil_lanes a, int begin, int end, mil_lanes other)
{
    __m256i lo = _mm256_andnot_si256(lanes_mask(0, begin), lanes_mask(0, end));
    __m256i hi = _mm256_andnot_si256(lanes_mask(8, begin), lanes_mask(8, end));
    return lanes_of(_mm256_blendv_ps(other.lo, a.lo, _mm256_castsi256_ps(lo)),
                    _mm256_blendv_ps(other.hi, a.hi, _mm256_castsi256_ps(hi)));
}
#define LANES_COMPARE(a, b, predicate)                                                             \
    ((uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((a).lo, (b).lo, predicate)) |                      \
     (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((a).hi, (b).hi, predicate)) << 8)
LANES_INLINE uint32_t lanes_not_less(mil_lanes a, mil_lanes b)
{
    return LANES_COMPARE(a, b, _CMP_GE_OQ);
}
LANES_INLINE uint32_t lanes_greater(mil_lanes a, mil_lanes b)
{
    return LANES_COMPARE(a, b, _CMP_GT_OQ);
}
LANES_INLINE uint32_t lanes_equal(mil_lanes a, mil_lanes b)
{
    return LANES_COMPARE(a, b, _CMP_EQ_OQ);
}
LANES_INLINE uint32_t lanes_is_nan(mil_lanes a)
{
    return LANES_COMPARE(a, a, _CMP_UNORD_Q);
}
LANES_INLINE float lanes_sum(mil_lanes a)
{
    __m256 h8 = _mm256_add_ps(a.lo, a.hi);
    __m128 h4 = _mm_add_ps(_mm256_castps256_ps128(h8), _mm256_extractf128_ps(h8, 1));
    __m128 h2 = _mm_add_ps(h4, _mm_movehl_ps(h4, h4));
    return _mm_cvtss_f32(_mm_add_ss(h2, _mm_shuffle_ps(h2, h2, 1)));
}
LANES_INLINE float lanes_top(mil_lanes a)
{
    __m256 h8 = _mm256_max_ps(a.lo, a.hi);
    __m128 h4 = _mm_max_ps(_mm256_castps256_ps128(h8), _mm256_extractf128_ps(h8, 1));
    __m128 h2 = _mm_max_ps(h4, _mm_movehl_ps(h4, h4));
    return _mm_cvtss_f32(_mm_max_ss(h2, _mm_shuffle_ps(h2, h2, 1)));
}
LANES_INLINE mil_lanes lanes_pair_even(mil_lanes a)
{
    return lanes_of_bits(_mm256_slli_epi32(lanes_lo(a), 16), _mm256_slli_epi32(lanes_hi(a), 16));
}
LANES_INLINE mil_lanes lanes_pair_odd(mil_lanes a)
{
    __m256i mask = _mm256_set1_epi32((int)0xffff0000u);
    return lanes_of_bits(_mm256_and_si256(lanes_lo(a), mask), _mm256_and_si256(lanes_hi(a), mask));
}
LANES_INLINE __m256i lanes_round_bf16_half(__m256 a)
{
    __m256i bits = _mm256_castps_si256(a);
    __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    up = _mm256_blendv_epi8(up, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
    return _mm256_and_si256(up, _mm256_set1_epi32((int)0xffff0000u));
}
LANES_INLINE mil_lanes lanes_round_bf16(mil_lanes a)
{
    return lanes_of_bits(lanes_round_bf16_half(a.lo), lanes_round_bf16_half(a.hi));
}
LANES_INLINE mil_lanes lanes_join_pairs(mil_lanes even, mil_lanes odd)
{
    return lanes_of_bits(_mm256_or_si256(_mm256_srli_epi32(lanes_lo(even), 16), lanes_lo(odd)),
                         _mm256_or_si256(_mm256_srli_epi32(lanes_hi(even), 16), lanes_hi(odd)));
}
LANES_INLINE mil_lanes lanes_round_bf16_away(mil_lanes a)
{
    __m256i half = _mm256_set1_epi32(0x8000), mask = _mm256_set1_epi32((int)0xffff0000u);
    return lanes_of_bits(_mm256_and_si256(_mm256_add_epi32(lanes_lo(a), half), mask),
                         _mm256_and_si256(_mm256_add_epi32(lanes_hi(a), half), mask));
}
LANES_INLINE mil_lanes lanes_load_bf16(const uint16_t *p)
{
    __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8)));
    return lanes_of_bits(_mm256_slli_epi32(lo, 16), _mm256_slli_epi32(hi, 16));
}
LANES_INLINE mil_lanes lanes_load_bf16_n(const uint16_t *p, int n)
{
    if (n == MIL_LANES)
        return lanes_load_bf16(p);
    uint16_t whole[MIL_LANES] = {0};
    memcpy(whole, p, (size_t)n * sizeof *p);
    return lanes_load_bf16(whole);
}
LANES_INLINE void lanes_store_bf16_n(uint16_t *p, mil_lanes a, int n)
{
    mil_lanes rounded = lanes_round_bf16(a);
    __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(lanes_lo(rounded), 16),
                                         _mm256_srli_epi32(lanes_hi(rounded), 16));
    packed = _mm256_permute4x64_epi64(packed, 0xd8);
    if (n == MIL_LANES) {
        _mm256_storeu_si256((__m256i *)p, packed);
        return;
    }
    uint16_t whole[MIL_LANES];
    _mm256_storeu_si256((__m256i *)whole, packed);
    memcpy(p, whole, (size_t)n * sizeof *p);
}
/* 16 dwords below 2^16 as words. */
LANES_INLINE __m256i lanes_words(__m256i lo, __m256i hi)
{
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8);
}
LANES_INLINE mil_lanes lanes_widen_f16(__m256i words)
{
    return lanes_of(_mm256_cvtph_ps(_mm256_castsi256_si128(words)),
                    _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1)));
}
LANES_INLINE __m256i lanes_narrow_f16(mil_lanes a)
{
    return _mm256_set_m128i(_mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
}
LANES_INLINE mil_lanes lanes_pair_even_f16(mil_lanes a)
{
    __m256i mask = _mm256_set1_epi32(0xffff);
    return lanes_widen_f16(
        lanes_words(_mm256_and_si256(lanes_lo(a), mask), _mm256_and_si256(lanes_hi(a), mask)));
}
LANES_INLINE mil_lanes lanes_pair_odd_f16(mil_lanes a)
{
    return lanes_widen_f16(
        lanes_words(_mm256_srli_epi32(lanes_lo(a), 16), _mm256_srli_epi32(lanes_hi(a), 16)));
}
LANES_INLINE mil_lanes lanes_round_f16(mil_lanes a)
{
    return lanes_widen_f16(lanes_narrow_f16(a));
}
LANES_INLINE mil_lanes lanes_load_f16_n(const uint16_t *p, int n)
{
    uint16_t whole[MIL_LANES] = {0};
    memcpy(whole, p, (size_t)n * sizeof *p);
    return lanes_widen_f16(_mm256_loadu_si256((const __m256i *)whole));
}
LANES_INLINE void lanes_store_f16_n(uint16_t *p, mil_lanes a, int n)
{
    uint16_t whole[MIL_LANES];
    _mm256_storeu_si256((__m256i *)whole, lanes_narrow_f16(a));
    memcpy(p, whole, (size_t)n * sizeof *p);
}
LANES_INLINE mil_lanes lanes_join_pairs_f16(mil_lanes even, mil_lanes odd)
{
    __m256i a = lanes_narrow_f16(even), b = lanes_narrow_f16(odd);
    __m256i a_lo = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(a));
    __m256i a_hi = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1));
    __m256i b_lo = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(b));
    __m256i b_hi = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(b, 1));
    return lanes_of_bits(_mm256_or_si256(a_lo, _mm256_slli_epi32(b_lo, 16)),
                         _mm256_or_si256(a_hi, _mm256_slli_epi32(b_hi, 16)));
}
LANES_INLINE __m256 lanes_times_two_to_half(__m256 p, __m256 t, __m256 x, __m256 low)
{
    __m256i n = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
    __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(p), n);
    return _mm256_and_ps(_mm256_castsi256_ps(scaled), _mm256_cmp_ps(x, low, _CMP_NLT_UQ));
}
LANES_INLINE mil_lanes lanes_times_two_to(mil_lanes p, mil_lanes t, mil_lanes x, mil_lanes low)
{
    return lanes_of(lanes_times_two_to_half(p.lo, t.lo, x.lo, low.lo),
                    lanes_times_two_to_half(p.hi, t.hi, x.hi, low.hi));
}
LANES_INLINE mil_lanes lanes_split(mil_lanes a, mil_lanes *exponent)
{
    __m256i root_half = _mm256_set1_epi32(0x3f3504f3);
    __m256i lo = _mm256_srai_epi32(_mm256_sub_epi32(lanes_lo(a), root_half), 23);
    __m256i hi = _mm256_srai_epi32(_mm256_sub_epi32(lanes_hi(a), root_half), 23);
    *exponent = lanes_of(_mm256_cvtepi32_ps(lo), _mm256_cvtepi32_ps(hi));
    return lanes_of_bits(_mm256_sub_epi32(lanes_lo(a), _mm256_slli_epi32(lo, 23)),
                         _mm256_sub_epi32(lanes_hi(a), _mm256_slli_epi32(hi, 23)));
}
LANES_INLINE void lanes_transpose_8x8(__m256 to[8], const __m256 m[8])
{
    __m256 a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(m[i], m[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(m[i], m[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        to[j] = _mm256_permute2f128_ps(b[j], b[j + 4], 0x20);
        to[j + 4] = _mm256_permute2f128_ps(b[j], b[j + 4], 0x31);
    }
}
LANES_INLINE void lanes_transpose(mil_lanes m[MIL_LANES])
{
    __m256 part[4][8];
    __m256 turned[4][8];
    for (int i = 0; i < 8; i++) {
        part[0][i] = m[i].lo;
        part[1][i] = m[i].hi;
        part[2][i] = m[i + 8].lo;
        part[3][i] = m[i + 8].hi;
    }
    for (int i = 0; i < 4; i++)
        lanes_transpose_8x8(turned[i], part[i]);
    for (int i = 0; i < 8; i++) {
        m[i] = lanes_of(turned[0][i], turned[2][i]);
        m[i + 8] = lanes_of(turned[1][i], turned[3][i]);
    }
}

#else /* any machine */

typedef struct mil_lanes {
    float v[MIL_LANES];
} mil_lanes;

#define LANES_EACH for (int i = 0; i < MIL_LANES; i++)

LANES_INLINE uint32_t lane_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
LANES_INLINE float lane_of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

LANES_INLINE mil_lanes lanes_set(float x)
{
    mil_lanes r;
    LANES_EACH r.v[i] = x;
    return r;
}
LANES_INLINE mil_lanes lanes_load(const float *p)
{
    mil_lanes r;
    memcpy(r.v, p, sizeof r.v);
    return r;
}
LANES_INLINE mil_lanes lanes_load_n(const float *p, int n)
{
    mil_lanes r = {{0}};
    memcpy(r.v, p, (size_t)n * sizeof *p);
    return r;
}
LANES_INLINE void lanes_store(float *p, mil_lanes a)
{
    memcpy(p, a.v, sizeof a.v);
}
LANES_INLINE void lanes_store_n(float *p, mil_lanes a, int n)
{
    memcpy(p, a.v, (size_t)n * sizeof *p);
}
LANES_INLINE mil_lanes lanes_add(mil_lanes a, mil_lanes b)
{
    LANES_EACH a.v[i] += b.v[i];
    return a;
}
LANES_INLINE mil_lanes lanes_sub(mil_lanes a, mil_lanes b)
{
    LANES_EACH a.v[i] -= b.v[i];
    return a;
}
LANES_INLINE mil_lanes lanes_mul(mil_lanes a, mil_lanes b)
{
    LANES_EACH a.v[i] *= b.v[i];
    return a;
}
LANES_INLINE mil_lanes lanes_div(mil_lanes a, mil_lanes b)
{
    LANES_EACH a.v[i] /= b.v[i];
    return a;
}
LANES_INLINE mil_lanes lanes_sqrt(mil_lanes a)
{
    LANES_EACH a.v[i] = __builtin_sqrtf(a.v[i]);
    return a;
}
LANES_INLINE mil_lanes lanes_fma(mil_lanes a, mil_lanes b, mil_lanes c)
{
    LANES_EACH c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
    return c;
}
LANES_INLINE mil_lanes lanes_max(mil_lanes a, mil_lanes b)
{
    LANES_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
}
LANES_INLINE mil_lanes lanes_min(mil_lanes a, mil_lanes b)
{
    LANES_EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return a;
}
LANES_INLINE mil_lanes lanes_keep(mil_lanes a, int begin, int end, mil_lanes other)
{
    LANES_EACH a.v[i] = i >= begin && i < end ? a.v[i] : other.v[i];
    return a;
}
LANES_INLINE uint32_t lanes_not_less(mil_lanes a, mil_lanes b)
{
    uint32_t mask = 0;
    LANES_EACH mask |= (uint32_t)(a.v[i] >= b.v[i]) << i;
    return mask;
}
LANES_INLINE uint32_t lanes_greater(mil_lanes a, mil_lanes b)
{
    uint32_t mask = 0;
    LANES_EACH mask |= (uint32_t)(a.v[i] > b.v[i]) << i;
    return mask;
}
LANES_INLINE uint32_t lanes_equal(mil_lanes a, mil_lanes b)
{
    uint32_t mask = 0;
    LANES_EACH mask |= (uint32_t)(a.v[i] == b.v[i]) << i;
    return mask;
}
LANES_INLINE uint32_t lanes_is_nan(mil_lanes a)
{
    uint32_t mask = 0;
    LANES_EACH mask |= (uint32_t)(a.v[i] != a.v[i]) << i;
    return mask;
}
LANES_INLINE float lanes_sum(mil_lanes a)
{
    for (int n = MIL_LANES / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++)
            a.v[i] += a.v[i + n];
    return a.v[0];
}
LANES_INLINE float lanes_top(mil_lanes a)
{
    for (int n = MIL_LANES / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++)
            a.v[i] = a.v[i] > a.v[i + n] ? a.v[i] : a.v[i + n];
    return a.v[0];
}
LANES_INLINE mil_lanes lanes_pair_even(mil_lanes a)
{
    LANES_EACH a.v[i] = lane_of_bits(lane_bits(a.v[i]) << 16);
    return a;
}
LANES_INLINE mil_lanes lanes_pair_odd(mil_lanes a)
{
    LANES_EACH a.v[i] = lane_of_bits(lane_bits(a.v[i]) & 0xffff0000u);
    return a;
}
LANES_INLINE mil_lanes lanes_round_bf16(mil_lanes a)
{
    LANES_EACH
    {
        uint32_t bits = lane_bits(a.v[i]);
        uint32_t up = bits + 0x7fffu + ((bits >> 16) & 1u);
        uint32_t quiet = bits | 0x400000u;
        a.v[i] = lane_of_bits((a.v[i] == a.v[i] ? up : quiet) & 0xffff0000u);
    }
    return a;
}
LANES_INLINE mil_lanes lanes_join_pairs(mil_lanes even, mil_lanes odd)
{
    LANES_EACH even.v[i] = lane_of_bits((lane_bits(even.v[i]) >> 16) | lane_bits(odd.v[i]));
    return even;
}
LANES_INLINE mil_lanes lanes_round_bf16_away(mil_lanes a)
{
    LANES_EACH a.v[i] = lane_of_bits((lane_bits(a.v[i]) + 0x8000u) & 0xffff0000u);
    return a;
}
LANES_INLINE mil_lanes lanes_load_bf16_n(const uint16_t *p, int n)
{
    mil_lanes r = {{0}};
    for (int i = 0; i < n; i++)
        r.v[i] = lane_of_bits((uint32_t)p[i] << 16);
    return r;
}
LANES_INLINE mil_lanes lanes_load_bf16(const uint16_t *p)
{
    return lanes_load_bf16_n(p, MIL_LANES);
}
LANES_INLINE void lanes_store_bf16_n(uint16_t *p, mil_lanes a, int n)
{
    a = lanes_round_bf16(a);
    for (int i = 0; i < n; i++)
        p[i] = (uint16_t)(lane_bits(a.v[i]) >> 16);
}
LANES_INLINE mil_lanes lanes_pair_even_f16(mil_lanes a)
{
    LANES_EACH a.v[i] = mil_f16_to_float((uint16_t)lane_bits(a.v[i]));
    return a;
}
LANES_INLINE mil_lanes lanes_pair_odd_f16(mil_lanes a)
{
    LANES_EACH a.v[i] = mil_f16_to_float((uint16_t)(lane_bits(a.v[i]) >> 16));
    return a;
}
LANES_INLINE mil_lanes lanes_round_f16(mil_lanes a)
{
    LANES_EACH a.v[i] = mil_f16_to_float(mil_f16_from_float(a.v[i]));
    return a;
}
LANES_INLINE mil_lanes lanes_load_f16_n(const uint16_t *p, int n)
{
    mil_lanes r = {{0}};
    for (int i = 0; i < n; i++)
        r.v[i] = mil_f16_to_float(p[i]);
    return r;
}
LANES_INLINE void lanes_store_f16_n(uint16_t *p, mil_lanes a, int n)
{
    for (int i = 0; i < n; i++)
        p[i] = mil_f16_from_float(a.v[i]);
}
LANES_INLINE mil_lanes lanes_join_pairs_f16(mil_lanes even, mil_lanes odd)
{
    LANES_EACH
    {
        uint32_t high = (uint32_t)mil_f16_from_float(odd.v[i]) << 16;
        even.v[i] = lane_of_bits(mil_f16_from_float(even.v[i]) | high);
    }
    return even;
}
LANES_INLINE mil_lanes lanes_times_two_to(mil_lanes p, mil_lanes t, mil_lanes x, mil_lanes low)
{
    LANES_EACH
    {
        uint32_t scaled = lane_bits(p.v[i]) + (lane_bits(t.v[i]) << 23);
        p.v[i] = lane_of_bits(x.v[i] < low.v[i] ? 0 : scaled);
    }
    return p;
}
LANES_INLINE mil_lanes lanes_split(mil_lanes a, mil_lanes *exponent)
{
    LANES_EACH
    {
        uint32_t bits = lane_bits(a.v[i]);
        int32_t e = (int32_t)(bits - 0x3f3504f3u) >> 23;
        exponent->v[i] = (float)e;
        a.v[i] = lane_of_bits(bits - ((uint32_t)e << 23));
    }
    return a;
}
LANES_INLINE void lanes_transpose(mil_lanes m[MIL_LANES])
{
    for (int row = 0; row < MIL_LANES; row++) {
        for (int column = 0; column < row; column++) {
            uint32_t bits = lane_bits(m[row].v[column]);
            m[row].v[column] = m[column].v[row];
            m[column].v[row] = lane_of_bits(bits);
        }
    }
}

#endif

/* What the three sections above provide, beside the arithmetic that its names say:
 *
 *   lanes_load_n, _store_n       the first n lanes; others read as zero, are not written
 *   lanes_max, lanes_min         a > b ? a : b, a < b ? a : b; so b where either is a NaN
 *   lanes_keep(a, i, j, other)   lanes i .. j - 1 of a, the rest of other; 0 <= i, j <= 16
 *   lanes_not_less and so on     one bit for each lane
 *   lanes_sum, lanes_top         tree 8-4-2-1: lane i with i + 8, then i + 4, i + 2, i + 1
 *   lanes_pair_even, _odd        of dwords of two bfloat16 (even one low): that one, widened
 *   lanes_round_bf16             nearest even, still float32; a NaN stays a quiet NaN
 *   lanes_round_bf16_away        nearest, halves away from zero: two operations, not seven
 *   lanes_join_pairs(even, odd)  dwords of two bfloat16, of lanes with such values
 *   lanes_pair_even_f16, _odd_f16   as lanes_pair_even, of dwords of two float16
 *   lanes_round_f16              nearest even, still float32; subnormals of float16 are kept
 *   lanes_join_pairs_f16         dwords of two float16, of any lanes: rounds them
 *   lanes_load_f16_n, _store_f16_n   n of float16, widened; rounded to it
 *   lanes_zip_low, _high(a, b)   AVX-512: dwords (a, b) of the low, or high, halves of a's and b's
 *   lanes_store_pairs            AVX-512: upper halves of lanes, two to a dword, to p[0 .. 8)
 *   lanes_dot_pairs(sum, a, b)   AVX-512-BF16: fma of dwords' odd items, then of the even
 *   lanes_times_two_to(p, t, x, low)   x < low ? +0 : p 2^n, with t = n + 1.5 x 2^23
 *   lanes_transpose(m)           lane j of m[i] and lane i of m[j] change places, as bits
 *   lanes_split(a, &e)           a = m x 2^e, sqrt(1/2) <= m < sqrt(2), for normal a > 0 */

LANES_INLINE mil_lanes lanes_zero(void)
{
    return lanes_set(0.0f);
}
LANES_INLINE void lanes_store_bf16(uint16_t *p, mil_lanes a)
{
    lanes_store_bf16_n(p, a, MIL_LANES);
}
LANES_INLINE mil_lanes lanes_negate(mil_lanes a)
{
    return lanes_sub(lanes_zero(), a);
}

/* e^x. Exactly 1 at 0, exactly +0 below -87 (and at -inf), e^88 above 88; a NaN stays one where its
 * low 16 bits are zero, as those of arithmetic and of bfloat16 are. Relative error at most 1e-7.
 * Cody and Waite's reduction by ln 2 in two parts, then a minimax polynomial of degree 6 on
 * +-ln(2)/2 (fitted for this file; 2e-9 before rounding). */
LANES_INLINE mil_lanes lanes_exp(mil_lanes x)
{
    const mil_lanes low = lanes_set(-87.0f);
    const mil_lanes magic = lanes_set(12582912.0f);
    /* The bound comes first in max and min, so that a NaN of x goes through. */
    mil_lanes c = lanes_min(lanes_set(88.0f), lanes_max(low, x));
    mil_lanes t = lanes_fma(c, lanes_set(0x1.715476p+0f), magic);
    mil_lanes n = lanes_sub(t, magic);
    mil_lanes r = lanes_fma(n, lanes_set(-0x1.62e43p-1f), c);
    r = lanes_fma(n, lanes_set(0x1.05c61p-29f), r);
    mil_lanes p = lanes_set(0x1.6ae0dep-10f);
    p = lanes_fma(p, r, lanes_set(0x1.126e4cp-7f));
    p = lanes_fma(p, r, lanes_set(0x1.555840p-5f));
    p = lanes_fma(p, r, lanes_set(0x1.55540cp-3f));
    p = lanes_fma(p, r, lanes_set(0x1.fffffcp-2f));
    p = lanes_fma(p, r, lanes_set(1.0f));
    p = lanes_fma(p, r, lanes_set(1.0f));
    return lanes_times_two_to(p, t, x, low);
}

/* As lanes_exp for x <= 0, with a polynomial of degree 4: relative error at most 4e-6. For results
 * that are rounded to bfloat16, where it counts for nothing. */
LANES_INLINE mil_lanes lanes_exp_coarse(mil_lanes x)
{
    const mil_lanes low = lanes_set(-87.0f);
    const mil_lanes magic = lanes_set(12582912.0f);
    mil_lanes c = lanes_max(low, x);
    mil_lanes t = lanes_fma(c, lanes_set(0x1.715476p+0f), magic);
    mil_lanes r = lanes_fma(lanes_sub(t, magic), lanes_set(-0x1.62e43p-1f), c);
    mil_lanes p = lanes_set(0x1.541162p-5f);
    p = lanes_fma(p, r, lanes_set(0x1.57d4ecp-3f));
    p = lanes_fma(p, r, lanes_set(0x1.000408p-1f));
    p = lanes_fma(p, r, lanes_set(0x1.fffb92p-1f));
    p = lanes_fma(p, r, lanes_set(1.0f));
    return lanes_times_two_to(p, t, x, low);
}

/* Natural logarithm of normal x > 0; relative error at most 2e-7 (absolute near 1). With
 * s = (m - 1) / (m + 1): log m = 2 s + s z P(z), z = s^2, P of degree 3 (fitted for this file). */
LANES_INLINE mil_lanes lanes_log(mil_lanes x)
{
    mil_lanes e;
    mil_lanes m = lanes_split(x, &e);
    mil_lanes one = lanes_set(1.0f);
    mil_lanes s = lanes_div(lanes_sub(m, one), lanes_add(m, one));
    mil_lanes z = lanes_mul(s, s);
    mil_lanes p = lanes_set(0x1.e38be2p-3f);
    p = lanes_fma(p, z, lanes_set(0x1.24351ap-2f));
    p = lanes_fma(p, z, lanes_set(0x1.999a88p-2f));
    p = lanes_fma(p, z, lanes_set(0x1.555554p-1f));
    p = lanes_fma(lanes_mul(s, z), p, lanes_mul(e, lanes_set(-0x1.05c61p-29f)));
    p = lanes_add(lanes_add(s, s), p);
    return lanes_fma(e, lanes_set(0x1.62e43p-1f), p);
}

/* x / (1 + e^-x). */
LANES_INLINE mil_lanes lanes_silu(mil_lanes x)
{
    return lanes_div(x, lanes_add(lanes_set(1.0f), lanes_exp(lanes_negate(x))));
}

/* tanh(x) = (e^2x - 1) / (e^2x + 1), |x| cut at 40, where it is 1; absolute error at most 2e-7. */
LANES_INLINE mil_lanes lanes_tanh(mil_lanes x)
{
    mil_lanes one = lanes_set(1.0f);
    mil_lanes c = lanes_min(lanes_set(40.0f), lanes_max(lanes_set(-40.0f), x));
    mil_lanes e = lanes_exp(lanes_add(c, c));
    return lanes_div(lanes_sub(e, one), lanes_add(e, one));
}
