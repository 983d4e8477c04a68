/* Weights into panels: [N/32][K/2][32][2] bf16, so that for each pair of k one panel's columns lie
 * side by side and a panel is one sequential stream. LoRA's A and B likewise, in panels 16 wide.
 *
 * Rows are packed in runs that stay inside one group of 16 columns; a run writes only its own rows'
 * elements, so rows of one panel may be packed by several threads at once. */
#include "cpu/cpu.h"

#define PANEL 32
#define GROUP 16 /* columns of a LoRA panel, and of the run that one call of a kernel packs */

static int64_t panels(int64_t n, int64_t width)
{
    return (n + width - 1) / width;
}

size_t mil_cpu_packed_bytes(int32_t N, int32_t K)
{
    return (size_t)(panels(N, PANEL) * PANEL * panels(K, 2) * 2) * sizeof(uint16_t);
}

size_t mil_cpu_lora_a_bytes(int32_t rank, int32_t in)
{
    return (size_t)(panels(rank, GROUP) * GROUP * panels(in, 2) * 2) * sizeof(uint16_t);
}

size_t mil_cpu_lora_b_bytes(int32_t out, int32_t rank)
{
    return mil_cpu_lora_a_bytes(out, (int32_t)panels(rank, GROUP) * GROUP);
}

/* Rows from `row` of a matrix into `width`-wide panels of K columns, where packed row of row i is
 * column0 + i: n_rows of them, inside one group. */
static void pack_run(const mil_cpu_pack_kernels *kernels, uint16_t *packed, int32_t width,
                     int32_t packed_row, const void *src, mil_dtype dtype, int64_t src_stride,
                     int32_t n_rows, int32_t K)
{
    uint16_t *panel = packed + packed_row / width * (int64_t)width * panels(K, 2) * 2;
    kernels->rows(panel, width, packed_row % width, src, dtype, src_stride, n_rows, K);
}

static int32_t smaller(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

static void pack_weight(const mil_cpu_pack_kernels *kernels, mil_weight *weight, int32_t part,
                        int32_t row, int32_t n_rows, const void *src, mil_dtype dtype,
                        int64_t src_stride)
{
    const char *from = src;
    while (n_rows > 0) {
        int32_t packed_row = mil_weight_row(weight, part, row);
        int32_t run = smaller(n_rows, GROUP - packed_row % GROUP);
        if (weight->interleave > 0)
            run = smaller(run, weight->interleave - row % weight->interleave);
        pack_run(kernels, weight->data, PANEL, packed_row, from, dtype, src_stride, run, weight->K);
        from += (size_t)run * (size_t)src_stride * mil_dtype_bytes(dtype);
        row += run;
        n_rows -= run;
    }
}

/* rows x columns of bf16 into panels 16 wide over the rows. */
static void pack_lora(const mil_cpu_pack_kernels *kernels, void *packed, const uint16_t *src,
                      int64_t stride, int32_t rows, int32_t columns, int32_t padded_columns)
{
    uint16_t *to = packed;
    for (int32_t row = 0; row < rows; row += GROUP) {
        kernels->rows(to + (int64_t)row * padded_columns, GROUP, 0, src + row * stride,
                      MIL_DTYPE_BF16, stride, smaller(GROUP, rows - row), columns);
    }
}

#define SLOTS(isa)                                                                                 \
    mil_status mil_cpu_pack_##isa(struct mil_queue *queue, mil_weight *weight, int32_t part,       \
                                  int32_t row, int32_t n_rows, void *src, mil_dtype dtype,         \
                                  int64_t src_stride)                                              \
    {                                                                                              \
        (void)queue;                                                                               \
        pack_weight(&mil_cpu_pack_kernels_##isa, weight, part, row, n_rows, src, dtype,            \
                    src_stride);                                                                   \
        return MIL_OK;                                                                             \
    }                                                                                              \
    void mil_cpu_lora_pack_a_##isa(void *packed, const uint16_t *a, int64_t stride, int32_t rank,  \
                                   int32_t in)                                                     \
    {                                                                                              \
        pack_lora(&mil_cpu_pack_kernels_##isa, packed, a, stride, rank, in, in + in % 2);          \
    }                                                                                              \
    void mil_cpu_lora_pack_b_##isa(void *packed, const uint16_t *b, int64_t stride, int32_t out,   \
                                   int32_t rank)                                                   \
    {                                                                                              \
        pack_lora(&mil_cpu_pack_kernels_##isa, packed, b, stride, out, rank,                       \
                  (int32_t)panels(rank, GROUP) * GROUP);                                           \
    }

SLOTS(scalar)
#ifdef __x86_64__
SLOTS(avx2)
SLOTS(avx512)
SLOTS(avx512bf16)
#endif
