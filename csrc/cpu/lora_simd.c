/* LoRA's expand: y[row] += v[row] B^T for a few rows, one fp32 chain over r ascending, then one
 * add.
 *
 * Unlike a product, a pair (r, r + 1) goes even element first: v is float32, so there is no
 * vdpbf16ps to agree with. Chains stay in registers, one instance for each number of rows; bound by
 * B's bytes for one row and by y's for many. */
#include "cpu/cpu.h"
#include "cpu/lanes.h"

/* gcc keeps an accumulator array in memory unless every loop over it is unrolled early. */
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* One panel of B for `rows` rows. */
LANES_INLINE void expand_panel(float *y, int64_t ldy, const int32_t *row_of, const float *v,
                               int64_t v_stride, const uint16_t *b, int32_t padded_rank,
                               int32_t width, int rows)
{
    mil_lanes chain[MIL_CPU_EXPAND_ROWS];
    UNROLL for (int i = 0; i < rows; i++) chain[i] = lanes_zero();
    for (int32_t r = 0; r < padded_rank; r += 2) {
        float pairs[MIL_LANES];
        memcpy(pairs, b + r * MIL_LANES, sizeof pairs);
        mil_lanes both = lanes_load(pairs);
        mil_lanes even = lanes_pair_even(both);
        mil_lanes odd = lanes_pair_odd(both);
        UNROLL for (int i = 0; i < rows; i++) chain[i] =
            lanes_fma(lanes_set(v[i * v_stride + r]), even, chain[i]);
        UNROLL for (int i = 0; i < rows; i++) chain[i] =
            lanes_fma(lanes_set(v[i * v_stride + r + 1]), odd, chain[i]);
    }
    if (width == MIL_LANES) {
        UNROLL for (int i = 0; i < rows; i++)
        {
            float *to = y + row_of[i] * ldy;
            lanes_store(to, lanes_add(lanes_load(to), chain[i]));
        }
    } else {
        UNROLL for (int i = 0; i < rows; i++)
        {
            float *to = y + row_of[i] * ldy;
            lanes_store_n(to, lanes_add(lanes_load_n(to, width), chain[i]), width);
        }
    }
}

LANES_INLINE void expand_rows(float *y, int64_t ldy, const int32_t *row_of, const float *v,
                              int64_t v_stride, const uint16_t *b, int32_t n_panels,
                              int32_t padded_rank, int64_t y_step, int32_t last_width, int rows)
{
    for (int32_t j = 0; j < n_panels; j++)
        expand_panel(y + j * y_step, ldy, row_of, v, v_stride,
                     b + (int64_t)j * MIL_LANES * padded_rank, padded_rank,
                     j + 1 < n_panels ? MIL_LANES : last_width, rows);
}

static void expand(float *y, int64_t ldy, const int32_t *rows, int32_t n_rows, const float *v,
                   int64_t v_stride, const uint16_t *b, int32_t n_panels, int32_t padded_rank,
                   int64_t y_step, int32_t last_width)
{
#define ROWS(n)                                                                                    \
    case n:                                                                                        \
        expand_rows(y, ldy, rows, v, v_stride, b, n_panels, padded_rank, y_step, last_width, n);   \
        break
    switch (n_rows) {
        ROWS(1);
        ROWS(2);
        ROWS(3);
        ROWS(4);
        ROWS(5);
        ROWS(6);
        ROWS(7);
        ROWS(8);
    }
#undef ROWS
}

const mil_cpu_lora_kernels MIL_CPU_NAME(mil_cpu_lora_kernels) = {.expand = expand};
