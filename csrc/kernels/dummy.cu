/* Dummy weights, made where they lie: element i of a tensor's stream is a function of (stream, i)
 * alone, the same here as on the host (loader/source.h), bit for bit. Bound by the bytes written.
 */
#include "kernels/device.h"

#include "base/hash.h"
#include "kernels/common.cuh"

#define THREADS 256
#define GRID 2112 /* blocks; each walks over rows */

struct dummy_params {
    uint16_t *data;
    uint64_t stream, begin;
    int64_t stride;
    int32_t K, n_rows;
    int32_t row, part, n_parts, interleave; /* where row 0 lies, as mil_weight_row says */
    int64_t part_begin; /* packed row of the part's first one, not interleaved */
};

static __global__ void __launch_bounds__(THREADS) dummy_kernel(dummy_params p)
{
    for (int32_t i = (int32_t)blockIdx.x; i < p.n_rows; i += (int32_t)gridDim.x) {
        int32_t row = p.row + i, g = p.interleave;
        int64_t packed =
            g > 0 ? (int64_t)(row / g) * g * p.n_parts + p.part * g + row % g : p.part_begin + row;
        uint64_t index = p.begin + (uint64_t)(i * p.stride);
        for (int32_t k = (int32_t)threadIdx.x; k < p.K; k += THREADS) {
            int32_t integer =
                2 * (int32_t)(mil_mix64(p.stream ^ (index + (uint64_t)k)) >> 48) - 65535;
            p.data[packed * p.K + k] = mil_round((float)integer * 0x1p-21f);
        }
    }
}

/* On the calling thread's own stream, as mil_cuda_pack. */
static mil_status launch(const dummy_params *p)
{
    uint32_t n_blocks = p->n_rows < GRID ? (uint32_t)p->n_rows : GRID;
    dummy_kernel<<<n_blocks, THREADS, 0, cudaStreamPerThread>>>(*p);
    MIL_CUDA_TRY(cudaGetLastError());
    return mil_cuda_status(cudaStreamSynchronize(cudaStreamPerThread), "dummy weights");
}

extern "C" mil_status mil_cuda_pack_dummy(struct mil_queue *queue, mil_weight *weight, int32_t part,
                                          int32_t row, int32_t n_rows, uint64_t stream,
                                          uint64_t begin, int64_t stride)
{
    mil_cuda_call it;
    dummy_params p = {};
    if (n_rows == 0)
        return MIL_OK;
    p.data = (uint16_t *)weight->data;
    p.stream = stream;
    p.begin = begin;
    p.stride = stride;
    p.K = weight->K;
    p.n_rows = n_rows;
    p.row = row;
    p.part = part;
    p.n_parts = weight->n_parts;
    p.interleave = weight->interleave;
    p.part_begin = weight->interleave > 0 ? 0 : mil_weight_row(weight, part, 0);
    MIL_TRY(mil_cuda_begin_call(queue, &it));
    return mil_cuda_end_call(queue, &it, launch(&p));
}
