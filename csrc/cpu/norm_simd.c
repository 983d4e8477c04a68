/* out = bf16((x * r) * (offset + w)), r = 1 / sqrt(sum(x^2) / H + eps): Hugging Face's LlamaRMSNorm
 * in float32, rounded once. The sum of squares is one fma chain for each lane, then the tree. */
#include "cpu/cpu.h"
#include "cpu/lanes.h"

static void add(float *x, const float *residual, int32_t n)
{
    for (int32_t d = 0; d < n; d += MIL_LANES) {
        int width = n - d < MIL_LANES ? n - d : MIL_LANES;
        mil_lanes sum = lanes_add(lanes_load_n(x + d, width), lanes_load_n(residual + d, width));
        lanes_store_n(x + d, sum, width);
    }
}

static void norm(uint16_t *out, const float *x, const float *weight, int32_t n, float eps,
                 float offset)
{
    mil_lanes squares = lanes_zero();
    for (int32_t d = 0; d < n; d += MIL_LANES) {
        mil_lanes v = lanes_load_n(x + d, n - d < MIL_LANES ? n - d : MIL_LANES);
        squares = lanes_fma(v, v, squares);
    }
    float mean = lanes_sum(squares) / (float)n;
    mil_lanes r = lanes_set(1.0f / __builtin_sqrtf(mean + eps));
    for (int32_t d = 0; d < n; d += MIL_LANES) {
        int width = n - d < MIL_LANES ? n - d : MIL_LANES;
        mil_lanes w = lanes_add(lanes_set(offset), lanes_load_n(weight + d, width));
        mil_lanes v = lanes_mul(lanes_load_n(x + d, width), r);
        lanes_store_bf16_n(out + d, lanes_mul(v, w), width);
    }
}

const mil_cpu_norm_kernels MIL_CPU_NAME(mil_cpu_norm_kernels) = {.add = add, .norm = norm};
