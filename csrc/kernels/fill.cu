/* fill_16: device[i] = word for n 16-bit words; any 2-byte alignment. Bound by the bytes written,
 * 16 at once between the ends. */
#include "kernels/device.h"

#include "kernels/common.cuh"

#define THREADS 256
#define WORDS 8 /* in one 16-byte store */

static __global__ void __launch_bounds__(THREADS)
    fill_kernel(uint16_t *to, uint16_t word, int64_t n, int64_t n_before)
{
    mil_wait_for_previous();
    mil_let_next_start();
    int64_t first = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    int64_t stride = (int64_t)gridDim.x * THREADS;
    int64_t n_vectors = (n - n_before) / WORDS;
    uint32_t pair = word | (uint32_t)word << 16;
    uint4 *vectors = (uint4 *)(to + n_before);
    for (int64_t i = first; i < n_vectors; i += stride)
        vectors[i] = make_uint4(pair, pair, pair, pair);
    if (first < n_before)
        to[first] = word;
    int64_t after = n_before + n_vectors * WORDS + first;
    if (after < n && first < WORDS)
        to[after] = word;
}

extern "C" mil_status mil_cuda_fill_16(mil_queue *queue, void *device, uint16_t word, size_t n)
{
    if (n == 0)
        return MIL_OK;
    size_t n_before = (16 - (uintptr_t)device % 16) % 16 / sizeof(uint16_t);
    size_t n_vectors = n / WORDS + 1;
    size_t n_blocks = (n_vectors + THREADS - 1) / THREADS;
    size_t most = (size_t)queue->n_sms * 8;
    return mil_launch(queue, "fill_16", fill_kernel, dim3(n_blocks < most ? n_blocks : most),
                      dim3(THREADS), 0, (uint16_t *)device, word, (int64_t)n,
                      (int64_t)(n_before < n ? n_before : n));
}

extern "C" mil_status mil_cuda_kernels_arch(int32_t *arch)
{
    cudaFuncAttributes attributes;
    MIL_CUDA_TRY(cudaFuncGetAttributes(&attributes, fill_kernel));
    *arch = attributes.ptxVersion;
    return MIL_OK;
}
