/* Device code that kernels share: launches, 16-byte vectors of bfloat16, reductions, and the PTX of
 * the portable path (sm_80 on) in one-line helpers. */
#pragma once

#include "kernels/cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#define MIL_WARP 32

/* a / b rounded up, a >= 0, b > 0. */
static __host__ __device__ __forceinline__ int32_t mil_ceil_div(int32_t a, int32_t b)
{
    return (a + b - 1) / b;
}

/* ---- launches ---- */

/* One kernel on the queue's stream. With programmatic dependent launch its first instructions may
 * run while the kernel before it drains: a kernel calls mil_wait_for_previous() before it reads or
 * writes anything that another kernel writes or reads. */
template <typename... Params, typename... Args>
static inline mil_status mil_launch(const mil_queue *queue, const char *what,
                                    void (*kernel)(Params...), dim3 grid, dim3 block,
                                    size_t shared_bytes, Args... args)
{
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = queue->stream;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = queue->has_pdl ? 1 : 0;
    return mil_cuda_status(cudaLaunchKernelEx(&config, kernel, Params(args)...), what);
}

/* Until every kernel before this one has ended and its writes are seen. */
static __device__ __forceinline__ void mil_wait_for_previous()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* The next kernel may start its prologue; says nothing about memory. */
static __device__ __forceinline__ void mil_let_next_start()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* ---- segments ---- */

/* Of low .. high - 1 the last segment that starts at or before `at`: the one that holds it, where
 * starts ascend. In range whatever they hold. */
static __device__ __forceinline__ int32_t mil_segment_of(const int32_t *starts, int32_t low,
                                                         int32_t high, int32_t at)
{
    while (low + 1 < high) {
        int32_t middle = low + (high - low) / 2;
        if (starts[middle] <= at)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* ---- bfloat16, and float16 where a template says MIL_DTYPE_F16 ---- */

static __device__ __forceinline__ float mil_widen(uint16_t bits)
{
    return __uint_as_float((uint32_t)bits << 16);
}

template <mil_dtype DTYPE = MIL_DTYPE_BF16>
static __device__ __forceinline__ uint16_t mil_round(float x)
{
    if constexpr (DTYPE == MIL_DTYPE_F16)
        return __half_as_ushort(__float2half_rn(x));
    else
        return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

/* The two bfloat16 of one register, widened. */
static __device__ __forceinline__ float mil_low(uint32_t pair)
{
    return __uint_as_float(pair << 16);
}

static __device__ __forceinline__ float mil_high(uint32_t pair)
{
    return __uint_as_float(pair & 0xffff0000u);
}

/* Two float32 rounded into one register, low half first. */
template <mil_dtype DTYPE = MIL_DTYPE_BF16>
static __device__ __forceinline__ uint32_t mil_pack2(float low, float high)
{
    if constexpr (DTYPE == MIL_DTYPE_F16) {
        __half2 v = __floats2half2_rn(low, high);
        return *(uint32_t *)&v;
    } else {
        __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
        return *(uint32_t *)&v;
    }
}

static __device__ __forceinline__ void mil_widen8(float (&out)[8], uint4 v)
{
    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[2 * i] = mil_low(pairs[i]);
        out[2 * i + 1] = mil_high(pairs[i]);
    }
}

/* Eight values, one 16-byte access. */
static __device__ __forceinline__ void mil_load8(float (&out)[8], const void *from)
{
    mil_widen8(out, *(const uint4 *)from);
}

static __device__ __forceinline__ void mil_store8(void *to, const float (&in)[8])
{
    *(uint4 *)to = make_uint4(mil_pack2(in[0], in[1]), mil_pack2(in[2], in[3]),
                              mil_pack2(in[4], in[5]), mil_pack2(in[6], in[7]));
}

/* ---- reductions in a fixed order ---- */

static __device__ __forceinline__ float mil_warp_sum(float x)
{
#pragma unroll
    for (int offset = MIL_WARP / 2; offset > 0; offset /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

static __device__ __forceinline__ float mil_warp_max(float x)
{
#pragma unroll
    for (int offset = MIL_WARP / 2; offset > 0; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

/* ---- shared memory and tensor cores (PTX ISA: mma, ldmatrix, cp.async) ---- */

static __device__ __forceinline__ uint32_t mil_shared_address(const void *shared)
{
    return (uint32_t)__cvta_generic_to_shared(shared);
}

/* 16 bytes from global to shared; zeros where !is_inside. shared: as mil_shared_address gives it.
 */
static __device__ __forceinline__ void mil_copy16_at(uint32_t shared, const void *global,
                                                     bool is_inside)
{
    int n = is_inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(n)
                 : "memory");
}

static __device__ __forceinline__ void mil_copy16(void *shared, const void *global, bool is_inside)
{
    mil_copy16_at(mil_shared_address(shared), global, is_inside);
}

static __device__ __forceinline__ void mil_copy_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int pending>
static __device__ __forceinline__ void mil_copy_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

/* shared: an address as mil_shared_address gives it. */
static __device__ __forceinline__ void mil_ldmatrix4_at(uint32_t (&out)[4], uint32_t shared)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared)
                 : "memory");
}

static __device__ __forceinline__ void mil_ldmatrix4_trans_at(uint32_t (&out)[4], uint32_t shared)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared)
                 : "memory");
}

static __device__ __forceinline__ void mil_ldmatrix4(uint32_t (&out)[4], const void *shared)
{
    mil_ldmatrix4_at(out, mil_shared_address(shared));
}

static __device__ __forceinline__ void mil_ldmatrix4_trans(uint32_t (&out)[4], const void *shared)
{
    mil_ldmatrix4_trans_at(out, mil_shared_address(shared));
}

/* d += a b: a 16 x 16 row-major, b 16 x 8 column-major, both of DTYPE, d 16 x 8 fp32. */
template <mil_dtype DTYPE = MIL_DTYPE_BF16>
static __device__ __forceinline__ void mil_mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1)
{
    if constexpr (DTYPE == MIL_DTYPE_F16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
                     "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                     "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
