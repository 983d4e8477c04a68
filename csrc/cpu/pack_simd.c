/* The inner part of packing: 16 rows of a weight into 16 columns of a panel, pairs of k side by
 * side; that is a transpose of dwords. F16 and F32 are rounded to bfloat16 once, nearest even, by
 * integer arithmetic, so that the caller's floating-point modes do not matter. */
#include "base/bf16.h"
#include "base/f16.h"
#include "cpu/cpu.h"

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
