/* Tiles of a product: MR rows of x against one panel of 32 (a weight) or 16 (LoRA's A) columns. */
#include "base/bf16.h"
#include "cpu/cpu.h"

#define X_STRIDE (MIL_CPU_KC + 16)

static void pack_x(void *packed, const uint16_t *x, int32_t n)
{
    float *to = packed;
    for (int32_t k = 0; k < n; k++)
        to[k] = mil_bf16_to_float(x[k]);
    if (n % 2 != 0)
        to[n] = 0.0f;
}

static void tile(float *y, int64_t ldy, const float *x, const uint16_t *panel, int32_t n_pairs,
                 bool resume, int32_t rows, int32_t width)
{
    for (int32_t m = 0; m < rows; m++) {
        for (int32_t n = 0; n < width; n++) {
            float chain = resume ? y[m * ldy + n] : 0.0f;
            for (int32_t i = 0; i < n_pairs; i++) {
                const uint16_t *pair = panel + ((int64_t)i * width + n) * 2;
                const float *xs = x + m * X_STRIDE + 2 * i;
                chain = __builtin_fmaf(xs[1], mil_bf16_to_float(pair[1]), chain);
                chain = __builtin_fmaf(xs[0], mil_bf16_to_float(pair[0]), chain);
            }
            y[m * ldy + n] = chain;
        }
    }
}

#define TILE(rows, width)                                                                          \
    static void tile_##rows##x##width(float *y, int64_t ldy, const void *x, const uint16_t *panel, \
                                      int32_t n_pairs, bool resume, const void *prefetch)          \
    {                                                                                              \
        (void)prefetch;                                                                            \
        tile(y, ldy, x, panel, n_pairs, resume, rows, width);                                      \
    }
TILE(1, 32)
TILE(2, 32)
TILE(3, 32)
TILE(4, 32)
TILE(1, 16)
TILE(2, 16)
TILE(3, 16)
TILE(4, 16)

const mil_cpu_linear_kernels MIL_CPU_NAME(mil_cpu_linear_kernels) = {
    .max_rows = 4,
    .x_item_bytes = 4,
    .x_stride = X_STRIDE,
    .pack_x = pack_x,
    .tile32 = {NULL, tile_1x32, tile_2x32, tile_3x32, tile_4x32},
    .tile16 = {NULL, tile_1x16, tile_2x16, tile_3x16, tile_4x16},
};
