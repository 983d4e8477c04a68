/* embed: out[t] = scale * weight[tokens[t] - vocab_begin], or zeros where that row is not here.
 *
 * out [T, H] fp32; tokens [T] int32; weight [N][H] bf16, row-major. One multiply in fp32, no
 * rounding but its own. Bound by bytes: 2 H read and 4 H written for each token; 0.84 of an
 * H200's 4.55 TB/s at 8,192 (2026-11-29, bench_ops). */
#include "kernels/cuda.h"

#include "kernels/common.cuh"

#define THREADS 256
#define VECTOR 4  /* bf16 of one 8-byte load: their floats are one 16-byte store, both coalesced */
#define AT_ONCE 4 /* loads of one thread in flight: a row of 4096 is one round of a block */

/* The token's row of the weight, or NULL. In 64 bits: a token may be any int32. */
static __device__ __forceinline__ const uint16_t *row_of(const uint16_t *weight, int32_t token,
                                                         int32_t vocab_begin, int32_t N, int32_t H)
{
    int64_t row = (int64_t)token - vocab_begin;
    return row >= 0 && row < N ? weight + row * H : nullptr;
}

/* H % VECTOR == 0; one block for each token. */
static __global__ void __launch_bounds__(THREADS)
    embed_kernel(float *out, const int32_t *tokens, const uint16_t *weight, int32_t N, int32_t H,
                 int32_t vocab_begin, float scale)
{
    mil_let_next_start();
    mil_wait_for_previous();
    const uint16_t *row = row_of(weight, tokens[blockIdx.x], vocab_begin, N, H);
    float4 *to = (float4 *)(out + (int64_t)blockIdx.x * H);
    int32_t n = H / VECTOR;
    int32_t step = (int32_t)blockDim.x;
    for (int32_t first = (int32_t)threadIdx.x; first < n; first += AT_ONCE * step) {
        uint2 v[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int32_t at = first + i * step;
            v[i] = at < n && row != nullptr ? __ldg((const uint2 *)row + at) : make_uint2(0, 0);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int32_t at = first + i * step;
            if (at < n)
                to[at] = make_float4(mil_low(v[i].x) * scale, mil_high(v[i].x) * scale,
                                     mil_low(v[i].y) * scale, mil_high(v[i].y) * scale);
        }
    }
}

/* Any H. */
static __global__ void __launch_bounds__(THREADS)
    embed_any_kernel(float *out, const int32_t *tokens, const uint16_t *weight, int32_t N,
                     int32_t H, int32_t vocab_begin, float scale)
{
    mil_let_next_start();
    mil_wait_for_previous();
    const uint16_t *row = row_of(weight, tokens[blockIdx.x], vocab_begin, N, H);
    float *to = out + (int64_t)blockIdx.x * H;
    for (int32_t d = (int32_t)threadIdx.x; d < H; d += (int32_t)blockDim.x)
        to[d] = row != nullptr ? mil_widen(row[d]) * scale : 0.0f;
}

extern "C" mil_status mil_cuda_embed(mil_context *context, const mil_embed_args *args)
{
    const mil_weight *weight = args->weight;
    if (args->n_tokens == 0)
        return MIL_OK;
    bool is_vector = weight->K % VECTOR == 0;
    return mil_launch(context->queue, "embed", is_vector ? embed_kernel : embed_any_kernel,
                      dim3(args->n_tokens), dim3(THREADS), 0, args->out, args->tokens,
                      (const uint16_t *)weight->data, weight->N, weight->K, args->vocab_begin,
                      args->scale);
}
