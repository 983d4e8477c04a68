/* Tensor maps: what Hopper's copy engine knows of a matrix in global memory. */
#pragma once

#include "kernels/cuda.h"

#include <cuda.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The driver's encoder, found once when a queue is opened: the library itself is never linked. */
mil_status mil_cuda_tensor_map_find(mil_queue *queue) MIL_WARN_UNUSED;

/* A matrix of bf16 or f16 [rows][columns], row-major and dense, taken in boxes of box_rows x 64
 * elements that lie in shared memory with the 128-byte swizzle. columns: a multiple of 64. */
mil_status mil_cuda_tensor_map(CUtensorMap *out, const mil_queue *queue, const void *base,
                               mil_dtype dtype, int32_t columns, uint64_t rows, int32_t box_rows)
    MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
