/* send_out: words of device memory to pinned host memory, written in place. A copy engine's start
 * would lie between two steps, and so would an adapter that it has on its way. */
#include "kernels/device.h"

#include "kernels/common.cuh"

#define THREADS 256

static __global__ void __launch_bounds__(THREADS)
    send_kernel(uint32_t *host, const uint32_t *device, int64_t n)
{
    mil_wait_for_previous();
    mil_let_next_start();
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n)
        host[i] = __ldcg(device + i);
}

extern "C" mil_status mil_cuda_send_out(mil_queue *queue, void *host, const void *device,
                                        size_t n_bytes)
{
    size_t n = n_bytes / sizeof(uint32_t);
    if (n == 0)
        return MIL_OK;
    return mil_launch(queue, "sending results out", send_kernel,
                      dim3((unsigned)((n + THREADS - 1) / THREADS)), dim3(THREADS), 0,
                      (uint32_t *)host, (const uint32_t *)device, (int64_t)n);
}

extern "C" mil_status mil_cuda_send_load(void)
{
    cudaFuncAttributes attributes;
    return mil_cuda_status(cudaFuncGetAttributes(&attributes, send_kernel), "loading kernels");
}
