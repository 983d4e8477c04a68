/* out = bf16(silu(gate) * up), silu(g) = g / (1 + e^-g). A row holds gate and up in groups that
 * alternate: of `interleave` columns, or of all F. */
#include "cpu/cpu.h"
#include "cpu/lanes.h"

static void silu_mul(uint16_t *out, const float *gate_up, int32_t ffn, int32_t interleave)
{
    int32_t group = interleave > 0 ? interleave : ffn;
    for (int32_t first = 0; first < ffn; first += group) {
        const float *gate = gate_up + (int64_t)2 * first;
        const float *up = gate + group;
        for (int32_t i = 0; i < group; i += MIL_LANES) {
            int width = group - i < MIL_LANES ? group - i : MIL_LANES;
            mil_lanes g = lanes_load_n(gate + i, width);
            mil_lanes u = lanes_load_n(up + i, width);
            lanes_store_bf16_n(out + first + i, lanes_mul(lanes_silu(g), u), width);
        }
    }
}

const mil_cpu_act_kernels MIL_CPU_NAME(mil_cpu_act_kernels) = {.silu_mul = silu_mul};
