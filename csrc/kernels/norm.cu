/* norm: x += residual (where given), then out = bf16((x * r) * (weight_offset + weight)) with
 * r = 1 / sqrt(sum(x^2) / H + eps). Hugging Face's LlamaRMSNorm in float32, rounded once.
 *
 * x [T, H] fp32; residual [T, H] bf16; weight [H] fp32; out [n_rows, H] bf16. One block a row. The
 * sum of squares is a chain in each thread, then a tree: its order is a function of H alone, so a
 * row's bits do not depend on its batch; 1 / H and rsqrt.approx put r off by some 2^-22 of itself.
 * Bound by bytes: 12 H a row with a residual (x read and written, residual read, out written); x
 * stays in registers between the sum and the scaling. 0.88 of an H200's 4.55 TB/s at 8,192 rows of
 * 4,096 (2026-11-29, bench_ops).
 *
 * rows, where given, ascend, and padding repeats row 0 (see begin.cu): a row that does not ascend
 * is padding, and its x is left alone, since the row it names is another block's. A call that has
 * padding only (a block of logits past a batch's) updates row 0 again, which nothing reads. */
#include "kernels/cuda.h"

#include "kernels/common.cuh"

#define VECTOR 4 /* floats of one 16-byte access; their bf16 are 8 bytes, coalesced as well */
#define MAX_THREADS 1024
/* Vectors of one thread: rows up to NARROW floats keep 1, so that a short row still has several
 * warps to load it; longer ones 4, so that one barrier serves 4 loads. 4 * 4 * MAX_THREADS = 16384
 * is the longest row that stays in registers. */
#define NARROW 1024
#define WIDE_VECTORS 4
#define ANY_THREADS 256

/* Whether this block's row is the first of its name: that block alone writes x. */
static __device__ __forceinline__ int64_t pick_row(const int32_t *rows, bool *owns)
{
    int32_t i = (int32_t)blockIdx.x;
    *owns = rows == nullptr || i == 0 || rows[i] > rows[i - 1];
    return rows == nullptr ? i : rows[i];
}

/* The block's sum, in every thread. Warps' sums are added by the same tree in each warp. */
static __device__ __forceinline__ float block_sum(float x)
{
    __shared__ float sums[MIL_WARP];
    int warp = threadIdx.x / MIL_WARP, lane = threadIdx.x % MIL_WARP;
    x = mil_warp_sum(x);
    if (lane == 0)
        sums[warp] = x;
    __syncthreads();
    return mil_warp_sum(lane < (int)blockDim.x / MIL_WARP ? sums[lane] : 0.0f);
}

/* H % VECTOR == 0, H <= VECTOR * n_vectors * blockDim.x. */
template <int n_vectors>
static __global__ void __launch_bounds__(MAX_THREADS)
    norm_kernel(const __grid_constant__ mil_norm_args args, float inverse_hidden)
{
    const int32_t n = args.hidden / VECTOR;
    const int32_t first = (int32_t)threadIdx.x, step = (int32_t)blockDim.x;
    float4 x[n_vectors], weight[n_vectors];
#pragma unroll
    for (int i = 0; i < n_vectors; i++)
        if (first + i * step < n)
            weight[i] = __ldg((const float4 *)args.weight + first + i * step);
    mil_let_next_start();
    mil_wait_for_previous();

    bool owns;
    int64_t row = pick_row(args.rows, &owns);
    float4 *row_x = (float4 *)(args.x + row * args.hidden);
#pragma unroll
    for (int i = 0; i < n_vectors; i++)
        x[i] = first + i * step < n ? __ldcg(row_x + first + i * step) : make_float4(0, 0, 0, 0);
    if (args.residual != nullptr) {
        const uint2 *residual =
            (const uint2 *)((const uint16_t *)args.residual + row * args.hidden);
        uint2 r[n_vectors];
#pragma unroll
        for (int i = 0; i < n_vectors; i++)
            r[i] = first + i * step < n ? __ldcg(residual + first + i * step) : make_uint2(0, 0);
#pragma unroll
        for (int i = 0; i < n_vectors; i++) {
            x[i].x += mil_low(r[i].x);
            x[i].y += mil_high(r[i].x);
            x[i].z += mil_low(r[i].y);
            x[i].w += mil_high(r[i].y);
            if (owns && first + i * step < n)
                row_x[first + i * step] = x[i];
        }
    }
    if (args.out == nullptr)
        return;

    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < n_vectors; i++) {
        squares = fmaf(x[i].x, x[i].x, squares);
        squares = fmaf(x[i].y, x[i].y, squares);
        squares = fmaf(x[i].z, x[i].z, squares);
        squares = fmaf(x[i].w, x[i].w, squares);
    }
    float r = rsqrtf(block_sum(squares) * inverse_hidden + args.eps);
    uint2 *out = (uint2 *)(args.out + (int64_t)blockIdx.x * args.hidden);
    float offset = args.weight_offset;
#pragma unroll
    for (int i = 0; i < n_vectors; i++)
        if (first + i * step < n)
            out[first + i * step] = make_uint2(
                mil_pack2(x[i].x * r * (offset + weight[i].x), x[i].y * r * (offset + weight[i].y)),
                mil_pack2(x[i].z * r * (offset + weight[i].z),
                          x[i].w * r * (offset + weight[i].w)));
}

/* Any H: x is read again for the scaling, by the thread that wrote it. */
static __global__ void __launch_bounds__(ANY_THREADS)
    norm_any_kernel(const __grid_constant__ mil_norm_args args, float inverse_hidden)
{
    mil_let_next_start();
    mil_wait_for_previous();
    bool owns;
    int64_t row = pick_row(args.rows, &owns);
    float *x = args.x + row * args.hidden;
    const uint16_t *residual =
        args.residual != nullptr ? (const uint16_t *)args.residual + row * args.hidden : nullptr;
    float squares = 0.0f;
    for (int32_t d = (int32_t)threadIdx.x; d < args.hidden; d += ANY_THREADS) {
        float v = x[d];
        if (residual != nullptr) {
            v += mil_widen(residual[d]);
            if (owns)
                x[d] = v;
        }
        squares = fmaf(v, v, squares);
    }
    if (args.out == nullptr)
        return;
    float r = rsqrtf(block_sum(squares) * inverse_hidden + args.eps);
    uint16_t *out = args.out + (int64_t)blockIdx.x * args.hidden;
    for (int32_t d = (int32_t)threadIdx.x; d < args.hidden; d += ANY_THREADS)
        out[d] = mil_round(x[d] * r * (args.weight_offset + args.weight[d]));
}

extern "C" mil_status mil_cuda_norm(mil_context *context, const mil_norm_args *args)
{
    const mil_queue *queue = context->queue;
    int32_t H = args->hidden;
    if (args->n_rows == 0)
        return MIL_OK;
    if (H % VECTOR != 0 || H > VECTOR * WIDE_VECTORS * MAX_THREADS)
        return mil_launch(queue, "norm", norm_any_kernel, dim3(args->n_rows), dim3(ANY_THREADS), 0,
                          *args, 1.0f / (float)H);
    bool is_narrow = H <= NARROW;
    int32_t per_thread = VECTOR * (is_narrow ? 1 : WIDE_VECTORS);
    int32_t n_warps = (H + per_thread * MIL_WARP - 1) / (per_thread * MIL_WARP);
    return mil_launch(queue, "norm", is_narrow ? norm_kernel<1> : norm_kernel<WIDE_VECTORS>,
                      dim3(args->n_rows), dim3(n_warps * MIL_WARP), 0, *args, 1.0f / (float)H);
}
