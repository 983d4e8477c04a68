/* LoRA's expand: y[row] += v[row] B^T for a few rows, one fp32 chain over r ascending, then one
 * add.
 *
 * Unlike a product, a pair (r, r + 1) goes even element first: v is float32, so there is no
 * vdpbf16ps to agree with. Chains stay in registers, one instance for each number of rows; bound by
 * B's bytes for one row and by fma for many, as long as y's are fetched ahead. */
#include "cpu/cpu.h"
#include "cpu/lanes.h"

/* gcc keeps an accumulator array in memory unless every loop over it is unrolled early. */
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
/* Panels that share the broadcasts of v. AVX2 spills some chains, and is no
 * quicker with fewer rows or panels. */
#define PANELS 2
/* Panels from what is added to now to what is fetched: y streams through once. */
#define AHEAD 4

/* `panels` neighbouring panels of B for `rows` rows, whose y is at to[i] + at; the last panel is
 * `width` wide. */
LANES_INLINE void expand_panels(float *const *to, int64_t at, const float *v, int64_t v_stride,
                                const uint16_t *b, int32_t padded_rank, int64_t y_step,
                                int32_t width, int rows, int panels)
{
    mil_lanes chain[MIL_CPU_EXPAND_ROWS][PANELS];
    UNROLL for (int i = 0; i < rows; i++)
    {
        UNROLL for (int p = 0; p < panels; p++)
        {
            chain[i][p] = lanes_zero();
            __builtin_prefetch(to[i] + at + (AHEAD + p) * y_step, 1);
        }
    }
    for (int32_t r = 0; r < padded_rank; r += 2) {
        mil_lanes even[PANELS], odd[PANELS];
        UNROLL for (int p = 0; p < panels; p++)
        {
            float pairs[MIL_LANES];
            memcpy(pairs, b + (r + p * padded_rank) * MIL_LANES, sizeof pairs);
            mil_lanes both = lanes_load(pairs);
            even[p] = lanes_pair_even(both);
            odd[p] = lanes_pair_odd(both);
        }
        UNROLL for (int i = 0; i < rows; i++)
        {
            mil_lanes value = lanes_set(v[i * v_stride + r]);
            UNROLL for (int p = 0; p < panels; p++) chain[i][p] =
                lanes_fma(value, even[p], chain[i][p]);
        }
        UNROLL for (int i = 0; i < rows; i++)
        {
            mil_lanes value = lanes_set(v[i * v_stride + r + 1]);
            UNROLL for (int p = 0; p < panels; p++) chain[i][p] =
                lanes_fma(value, odd[p], chain[i][p]);
        }
    }
    /* Rows often lie a multiple of 4 KiB apart: a load behind such a row's store would wait. */
    UNROLL for (int i = 0; i < rows; i++)
    {
        UNROLL for (int p = 0; p < panels; p++)
        {
            const float *y = to[i] + at + p * y_step;
            mil_lanes old = width == MIL_LANES ? lanes_load(y) : lanes_load_n(y, width);
            chain[i][p] = lanes_add(old, chain[i][p]);
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
    {
        UNROLL for (int p = 0; p < panels; p++)
        {
            float *y = to[i] + at + p * y_step;
            if (width == MIL_LANES)
                lanes_store(y, chain[i][p]);
            else
                lanes_store_n(y, chain[i][p], width);
        }
    }
}

LANES_INLINE void expand_rows(float *y, int64_t ldy, const int32_t *row_of, const float *v,
                              int64_t v_stride, const uint16_t *b, int32_t n_panels,
                              int32_t padded_rank, int64_t y_step, int32_t last_width, int rows)
{
    float *to[MIL_CPU_EXPAND_ROWS];
    for (int i = 0; i < rows; i++)
        to[i] = y + row_of[i] * ldy;
    int32_t n_whole = last_width == MIL_LANES ? n_panels : n_panels - 1;
    int32_t j = 0;
    for (; j + PANELS <= n_whole; j += PANELS)
        expand_panels(to, j * y_step, v, v_stride, b + (int64_t)j * MIL_LANES * padded_rank,
                      padded_rank, y_step, MIL_LANES, rows, PANELS);
    for (; j < n_panels; j++)
        expand_panels(to, j * y_step, v, v_stride, b + (int64_t)j * MIL_LANES * padded_rank,
                      padded_rank, y_step, j < n_whole ? MIL_LANES : last_width, rows, 1);
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
