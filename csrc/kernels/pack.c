/* Weights into device memory: row-major bf16, copied from the loader's pinned windows.
 *
 * Loader threads call these side by side: each copies on its own stream, so that one thread's copy
 * runs while another reads its file. F32 and F16 are narrowed in the window itself. */
#include "kernels/device.h"

#include "base/bf16.h"
#include "base/f16.h"

#include <string.h>

/* Rows of K elements, stride apart, to rows of bf16 that touch, in place: row i never ends behind
 * where row i + 1 begins. */
static void narrow(void *rows, mil_dtype dtype, int64_t stride, int32_t n_rows, int32_t K)
{
    uint16_t *out = rows;
    for (int64_t row = 0; row < n_rows; row++) {
        for (int64_t k = 0; k < K; k++, out++) {
            const char *at =
                (const char *)rows + (row * stride + k) * (int64_t)mil_dtype_bytes(dtype);
            float wide;
            uint16_t half;
            if (dtype == MIL_DTYPE_F32) {
                memcpy(&wide, at, sizeof wide);
            } else {
                memcpy(&half, at, sizeof half);
                wide = dtype == MIL_DTYPE_F16 ? mil_f16_to_float(half) : mil_bf16_to_float(half);
            }
            *out = mil_bf16_from_float(wide);
        }
    }
}

/* Rows that touch, to rows or groups of rows that alternate with other parts'. */
static mil_status send(const mil_weight *weight, int32_t part, int32_t row, int32_t n_rows,
                       const uint16_t *rows)
{
    size_t row_bytes = (size_t)weight->K * sizeof(uint16_t);
    int32_t group = weight->interleave;
    while (n_rows > 0) {
        int32_t whole = group > 0 && row % group == 0 ? n_rows / group : 0;
        int32_t head = group > 0 ? group - row % group : n_rows; /* rows to the end of the group */
        int32_t n = whole > 0 ? whole * group : head < n_rows ? head : n_rows;
        size_t height = whole > 0 ? (size_t)whole : 1;
        size_t width = (size_t)n / height * row_bytes;
        size_t pitch = width * (size_t)(whole > 0 ? weight->n_parts : 1);
        char *to = (char *)weight->data + (size_t)mil_weight_row(weight, part, row) * row_bytes;
        MIL_CUDA_TRY(cudaMemcpy2DAsync(to, pitch, rows, width, width, height,
                                       cudaMemcpyHostToDevice, cudaStreamPerThread));
        rows += (size_t)n * (size_t)weight->K;
        row += n;
        n_rows -= n;
    }
    return mil_cuda_status(cudaStreamSynchronize(cudaStreamPerThread), "pack");
}

mil_status mil_cuda_pack(struct mil_queue *queue, mil_weight *weight, int32_t part, int32_t row,
                         int32_t n_rows, void *src, mil_dtype dtype, int64_t src_stride)
{
    mil_cuda_call it;
    if (dtype != MIL_DTYPE_BF16 || src_stride != weight->K)
        narrow(src, dtype, src_stride, n_rows, weight->K);
    MIL_TRY(mil_cuda_begin_call(queue, &it));
    return mil_cuda_end_call(queue, &it, send(weight, part, row, n_rows, src));
}
