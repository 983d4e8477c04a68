/* y = x W^T (+ bias): which product serves it.
 *
 *   x [M, ldx] bf16, W [N][K] bf16 row-major, bias [N] fp32 or NULL, y [M, ldy] bf16 or fp32
 *
 * cuBLASLt, by its fixed table, accumulates in fp32, adds the bias in fp32 and rounds once. It
 * wants a bias of y's type, so for bf16 y the bias is rounded to bf16 first: exact for a
 * checkpoint's bf16 bias, and the plain bf16 formula for others. Our own product (product.h) serves
 * contexts that are deterministic, shapes, alignments and numbers of rows that the library does not
 * take, and keeps the bias in fp32. The library's: 0.95 to 1.15 of the speed of torch's cuBLAS on
 * Llama-3-8B's shapes (2026-11-29, bench_ops on an H200). */
#include "kernels/cublas.h"
#include "kernels/product.h"

#include "kernels/common.cuh"

#define BLOCK 256

static __global__ void round_bias_kernel(uint16_t *out, const float *bias, int32_t N)
{
    int i = blockIdx.x * BLOCK + threadIdx.x;
    mil_wait_for_previous(); /* out is workspace */
    mil_let_next_start();
    if (i < N)
        out[i] = mil_round(bias[i]);
}

static size_t rounded_bias_bytes(int32_t N)
{
    return mil_round_up((size_t)N * sizeof(uint16_t), 256);
}

/* A product needs its splits' sums or its rounded bias, never both. */
extern "C" size_t mil_cuda_linear_workspace(const mil_maxima *maxima)
{
    int32_t qkv = (maxima->n_heads + 2 * maxima->n_kv_heads) * maxima->head_dim;
    int32_t N = max(max(qkv, 2 * maxima->ffn), max(maxima->hidden, maxima->vocab));
    return max(mil_round_up(mil_cuda_product_workspace(), 256), rounded_bias_bytes(N));
}

static mil_status through_cublas(mil_context *context, const mil_linear_args *args, bool *is_served)
{
    const mil_weight *weight = args->weight;
    mil_cublas_product product = {};
    product.y = args->y;
    product.x = args->x;
    product.w = (const uint16_t *)weight->data;
    product.bias = weight->bias;
    product.y_dtype = args->y_dtype;
    product.M = args->M;
    product.N = weight->N;
    product.K = weight->K;
    product.ldy = args->ldy;
    product.ldx = args->ldx;
    *is_served = false;
    if (weight->bias != NULL && args->y_dtype == MIL_DTYPE_BF16) {
        if (context->workspace_bytes < rounded_bias_bytes(weight->N))
            return MIL_OK;
        MIL_TRY(mil_launch(context->queue, "bias of a product", round_bias_kernel,
                           dim3(mil_ceil_div(weight->N, BLOCK)), dim3(BLOCK), 0,
                           (uint16_t *)context->workspace, weight->bias, weight->N));
        product.bias = context->workspace;
    }
    return mil_cublas_run(context->queue, &product, is_served);
}

extern "C" mil_status mil_cuda_linear(mil_context *context, const mil_linear_args *args)
{
    bool is_served = false;
    if (args->M <= 0 || args->weight->N <= 0)
        return MIL_OK;
    if (!context->is_deterministic)
        MIL_TRY(through_cublas(context, args, &is_served));
    return is_served ? MIL_OK : mil_cuda_product(context, args);
}
