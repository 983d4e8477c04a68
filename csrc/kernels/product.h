/* Our own product, y = x W^T (+ bias): any shape, and a row's bits depend on nothing but the row
 * and the weight. linear.cu chooses between it and cuBLASLt. */
#pragma once

#include "kernels/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Splits of K that are summed apart and then in order: a function of the weight's shape alone, so
 * that neither batch mates nor the device change a row's bits. */
int32_t mil_cuda_product_splits(int32_t N, int32_t K);

/* Workspace with which few rows are quick, whatever N and K; with less they are slower and have the
 * same bits. */
size_t mil_cuda_product_workspace(void);

/* Load its kernels on the device that is current: a step whose rows cuBLASLt refuses may be the
 * first to need one, and steps load nothing. */
mil_status mil_cuda_product_load(void) MIL_WARN_UNUSED;

/* Weights in MIL_WEIGHT_BF16_ROWS. Quick where K and ldx are multiples of 8 and x lies on 16 bytes;
 * right and slow elsewhere. */
mil_status mil_cuda_product(mil_context *, const mil_linear_args *) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
