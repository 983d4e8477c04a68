/* One head's rotation, rounded once to bfloat16, or to float16 where rope_f16_simd.c compiles this
 * file once more. For the pair (a, b) and its angle:
 *   a' = round(fma(a, cos, -(b sin)))    b' = round(fma(b, cos, a sin))
 * with b sin and a sin rounded to float32 first. Pairs are (d, d + rotary_dim / 2), or (2 i, 2 i +
 * 1) where interleaved; items from rotary_dim on are rounded only. Table: Hugging Face's
 * LlamaRotaryEmbedding, made in double by the model room. */
#include "cpu/cpu.h"
#include "cpu/lanes.h"

#define MAX_HALF 128

#ifdef MIL_ROPE_F16
#define KERNELS mil_cpu_rope_f16_kernels
#define STORE_ITEMS_N lanes_store_f16_n
#else
#define KERNELS mil_cpu_rope_kernels
#define STORE_ITEMS_N lanes_store_bf16_n
#endif

static void round_row(uint16_t *out, const float *x, int32_t n)
{
    for (int32_t d = 0; d < n; d += MIL_LANES) {
        int width = n - d < MIL_LANES ? n - d : MIL_LANES;
        STORE_ITEMS_N(out + d, lanes_load_n(x + d, width), width);
    }
}

static void rotate_halves(uint16_t *out_a, uint16_t *out_b, const float *a, const float *b,
                          const float *cosines, const float *sines, int32_t n)
{
    for (int32_t d = 0; d < n; d += MIL_LANES) {
        int width = n - d < MIL_LANES ? n - d : MIL_LANES;
        mil_lanes x = lanes_load_n(a + d, width), y = lanes_load_n(b + d, width);
        mil_lanes c = lanes_load_n(cosines + d, width), s = lanes_load_n(sines + d, width);
        STORE_ITEMS_N(out_a + d, lanes_fma(x, c, lanes_negate(lanes_mul(y, s))), width);
        STORE_ITEMS_N(out_b + d, lanes_fma(y, c, lanes_mul(x, s)), width);
    }
}

static void rotate_pairs(uint16_t *out, const float *x, const float *cosines, const float *sines,
                         int32_t n)
{
    float a[MAX_HALF] = {0}, b[MAX_HALF] = {0};
    uint16_t turned_a[MAX_HALF], turned_b[MAX_HALF];
    for (int32_t i = 0; i < n; i++) {
        a[i] = x[2 * i];
        b[i] = x[2 * i + 1];
    }
    rotate_halves(turned_a, turned_b, a, b, cosines, sines, n);
    for (int32_t i = 0; i < n; i++) {
        out[2 * i] = turned_a[i];
        out[2 * i + 1] = turned_b[i];
    }
}

static void rotate(uint16_t *out, const float *x, const float *cosines, const float *sines,
                   int32_t head_dim, int32_t rotary_dim, bool is_interleaved)
{
    int32_t half = rotary_dim / 2;
    if (is_interleaved)
        rotate_pairs(out, x, cosines, sines, half);
    else
        rotate_halves(out, out + half, x, x + half, cosines, sines, half);
    round_row(out + rotary_dim, x + rotary_dim, head_dim - rotary_dim);
}

const mil_cpu_rope_kernels MIL_CPU_NAME(KERNELS) = {.rotate = rotate, .round = round_row};
