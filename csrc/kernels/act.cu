/* act: out = bf16(silu(gate) * up), silu(g) = g / (1 + e^-g).
 *
 * gate_up [T, 2 F] bf16, gate and up in groups that alternate: of `interleave` columns, or of all
 * F; out [T, F] bf16. fp32 between. e^-g by ex2.approx and the quotient by rcp.approx are off by
 * some 2^-21 of themselves, far under bf16's 2^-9. Bound by bytes: 4 F read and 2 F written a
 * token; 0.95 of an H200's 4.55 TB/s at 8,192 (2026-11-29, bench_ops). */
#include "kernels/cuda.h"

#include "kernels/common.cuh"

#define THREADS 256
#define GROUP 8   /* columns of one 16-byte vector */
#define AT_ONCE 4 /* loads of one thread in flight */

static __device__ __forceinline__ float silu(float gate)
{
    return __fdividef(gate, 1.0f + __expf(-gate));
}

static __device__ __forceinline__ uint32_t silu_mul2(uint32_t gate, uint32_t up)
{
    return mil_pack2(silu(mil_low(gate)) * mil_low(up), silu(mil_high(gate)) * mil_high(up));
}

/* interleave == GROUP: 16-byte vectors of gate (even) and up (odd) alternate over the whole array,
 * rows included. A lane loads one, so that a warp's load has no holes, and swaps half of it with
 * its neighbour: vector c leaves with outputs 4 c .. 4 c + 3. n_vectors is even. */
static __global__ void __launch_bounds__(THREADS)
    act_kernel(uint16_t *out, const uint16_t *gate_up, int64_t n_vectors)
{
    mil_let_next_start();
    mil_wait_for_previous();
    int64_t first = (int64_t)blockIdx.x * (THREADS * AT_ONCE) + threadIdx.x;
    bool is_up = threadIdx.x % 2 == 1;
    uint4 v[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
        int64_t at = first + i * THREADS;
        v[i] = at < n_vectors ? __ldcg((const uint4 *)gate_up + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
        int64_t at = first + i * THREADS;
        uint32_t low = __shfl_xor_sync(0xffffffffu, is_up ? v[i].x : v[i].z, 1);
        uint32_t high = __shfl_xor_sync(0xffffffffu, is_up ? v[i].y : v[i].w, 1);
        if (at < n_vectors)
            ((uint2 *)out)[at] = is_up
                                     ? make_uint2(silu_mul2(low, v[i].z), silu_mul2(high, v[i].w))
                                     : make_uint2(silu_mul2(v[i].x, low), silu_mul2(v[i].y, high));
    }
}

/* Any group; one thread for each output. */
static __global__ void __launch_bounds__(THREADS)
    act_any_kernel(uint16_t *out, const uint16_t *gate_up, int64_t n, int32_t ffn, int32_t group)
{
    mil_let_next_start();
    mil_wait_for_previous();
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= n)
        return;
    int64_t t = i / ffn;
    int32_t column = (int32_t)(i % ffn);
    const uint16_t *gate =
        gate_up + t * 2 * ffn + (int64_t)(column / group) * 2 * group + column % group;
    out[i] = mil_round(silu(mil_widen(gate[0])) * mil_widen(gate[group]));
}

extern "C" mil_status mil_cuda_act(mil_context *context, const mil_act_args *args)
{
    const mil_queue *queue = context->queue;
    const uint16_t *gate_up = (const uint16_t *)args->gate_up;
    int64_t n = (int64_t)args->n_tokens * args->ffn;
    if (args->kind != MIL_ACTIVATION_SILU)
        return mil_fail(MIL_ERR_UNSUPPORTED, "act: kind is %d, expected %d (silu)", (int)args->kind,
                        (int)MIL_ACTIVATION_SILU);
    if (n == 0)
        return MIL_OK;
    if (args->interleave == GROUP) {
        int64_t n_vectors = 2 * n / GROUP;
        int64_t per_block = THREADS * AT_ONCE;
        return mil_launch(queue, "act", act_kernel,
                          dim3((unsigned)((n_vectors + per_block - 1) / per_block)), dim3(THREADS),
                          0, args->out, gate_up, n_vectors);
    }
    return mil_launch(queue, "act", act_any_kernel, dim3((unsigned)((n + THREADS - 1) / THREADS)),
                      dim3(THREADS), 0, args->out, gate_up, n, args->ffn,
                      args->interleave > 0 ? args->interleave : args->ffn);
}
