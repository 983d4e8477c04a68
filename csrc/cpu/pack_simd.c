/* The inner part of packing: 16 rows of a weight into 16 columns of a panel, pairs of k side by side;
 * that is a transpose of dwords. F16 and F32 are rounded to bfloat16 once, nearest even, by integer
 * arithmetic, so that the caller's floating-point modes do not matter. */
#include "base/bf16.h"
#include "cpu/cpu.h"

static float float_from_half(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t exponent = (half >> 10) & 0x1fu;
    uint32_t fraction = half & 0x3ffu;
    uint32_t bits;
    if (exponent == 0x1f) {
        bits = 0x7f800000u | fraction << 13;
    } else if (exponent != 0) {
        bits = (exponent + 112) << 23 | fraction << 13;
    } else if (fraction != 0) {
        uint32_t shift = (uint32_t)__builtin_clz(fraction) - 21;
        bits = (113 - shift) << 23 | ((fraction << shift) & 0x3ffu) << 13;
    } else {
        bits = 0;
    }
    bits |= sign;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint16_t item(const void *src, mil_dtype dtype, int64_t index)
{
    switch (dtype) {
    case MIL_DTYPE_F32:
        return mil_bf16_from_float(((const float *)src)[index]);
    case MIL_DTYPE_F16:
        return mil_bf16_from_float(float_from_half(((const uint16_t *)src)[index]));
    default:
        return ((const uint16_t *)src)[index];
    }
}

static void pack_rows(uint16_t *panel, int32_t width, int32_t column, const void *src,
                      mil_dtype dtype, int64_t src_stride, int32_t n_rows, int32_t n)
{
    for (int32_t row = 0; row < n_rows; row++) {
        for (int32_t k = 0; k < n; k++)
            panel[((int64_t)(k / 2) * width + column + row) * 2 + k % 2] =
                item(src, dtype, row * src_stride + k);
    }
}

const mil_cpu_pack_kernels MIL_CPU_NAME(mil_cpu_pack_kernels) = {.rows = pack_rows};
