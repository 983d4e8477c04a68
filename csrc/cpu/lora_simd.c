/* LoRA's expand: y[row] += v[row] B^T, one fp32 chain over r ascending, then one add. */
#include "base/bf16.h"
#include "cpu/cpu.h"

#define GROUP 16

static void expand(float *y, int64_t ldy, const int32_t *rows, int32_t n_rows, const float *v,
                   int64_t v_stride, const uint16_t *b, int32_t n_panels, int32_t padded_rank,
                   int64_t y_step, int32_t last_width)
{
    for (int32_t j = 0; j < n_panels; j++) {
        const uint16_t *panel = b + (int64_t)j * GROUP * padded_rank;
        int32_t width = j + 1 < n_panels ? GROUP : last_width;
        for (int32_t i = 0; i < n_rows; i++) {
            for (int32_t n = 0; n < width; n++) {
                float chain = 0.0f;
                for (int32_t r = 0; r < padded_rank; r++)
                    chain = __builtin_fmaf(
                        v[i * v_stride + r],
                        mil_bf16_to_float(panel[(r / 2 * GROUP + n) * 2 + r % 2]), chain);
                y[rows[i] * ldy + j * y_step + n] += chain;
            }
        }
    }
}

const mil_cpu_lora_kernels MIL_CPU_NAME(mil_cpu_lora_kernels) = {.expand = expand};
