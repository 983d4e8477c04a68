/* PTX of the Hopper path in one-line helpers: mbarriers, bulk copies, tensor maps, warpgroup
 * products.
 *
 * For x_sm90.cu files alone (sm_90a). Names and semantics are the PTX ISA's: mbarrier,
 * cp.async.bulk, wgmma, setmaxnreg, fence.proxy. Addresses of shared memory are 32-bit, as
 * mil_shared_address gives them. */
#pragma once

#include "kernels/common.cuh"

#define MIL_WARPGROUP 128

/* ---- mbarriers ---- */

static __device__ __forceinline__ void mil_barrier_init(uint32_t barrier, uint32_t n_arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(n_arrivals)
                 : "memory");
}

/* After the inits, before other threads or the copy engine may see them. */
static __device__ __forceinline__ void mil_barrier_init_done()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

static __device__ __forceinline__ void mil_barrier_arrive(uint32_t barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* Arrive, and let the phase end only when so many bytes have been copied as well. */
static __device__ __forceinline__ void mil_barrier_expect(uint32_t barrier, uint32_t n_bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(n_bytes)
                 : "memory");
}

/* Until the phase of this parity has ended: a fresh barrier's phase is 0, that before it is 1. */
static __device__ __forceinline__ void mil_barrier_wait(uint32_t barrier, uint32_t parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

/* ---- the copy engine ---- */

static __device__ __forceinline__ void mil_prefetch_map(const void *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* The map's box whose first element is (column, row), to shared memory; its bytes count on barrier.
 */
static __device__ __forceinline__ void mil_copy_box(uint32_t shared, const void *map,
                                                    int32_t column, int32_t row, uint32_t barrier)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared),
                 "l"(map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}

/* The same, leaving other data in L2. */
static __device__ __forceinline__ void
mil_copy_box_once(uint32_t shared, const void *map, int32_t column, int32_t row, uint32_t barrier)
{
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
                 "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
                 : "memory");
}

/* n_bytes (a multiple of 16) of global memory, both ends 16-byte aligned. */
static __device__ __forceinline__ void mil_copy_bulk(uint32_t shared, const void *global,
                                                     uint32_t n_bytes, uint32_t barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(shared),
                 "l"(global), "r"(n_bytes), "r"(barrier)
                 : "memory");
}

/* This thread's loads and stores of shared memory are done before tensor cores read it or the copy
 * engine writes it. */
static __device__ __forceinline__ void mil_fence_shared()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* ---- warpgroups ---- */

template <int n>
static __device__ __forceinline__ void mil_more_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
}

template <int n>
static __device__ __forceinline__ void mil_fewer_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
}

/* Named barriers; 0 is __syncthreads()'s. */
static __device__ __forceinline__ void mil_named_sync(int32_t id, int32_t n_threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

static __device__ __forceinline__ void mil_named_arrive(int32_t id, int32_t n_threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

/* ---- wgmma ---- */

static __device__ __forceinline__ void mil_wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

/* Registers of a product are written before the fence, and not by an instruction moved behind it.
 */
template <int N>
static __device__ __forceinline__ void mil_settle(float (&x)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+f"(x[i])::"memory");
}

template <int N>
static __device__ __forceinline__ void mil_settle(uint32_t (&x)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+r"(x[i])::"memory");
}

static __device__ __forceinline__ void mil_wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int pending>
static __device__ __forceinline__ void mil_wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/* A tile in shared memory whose rows are 128 bytes, 16-byte chunk c of row r at chunk c ^ (r % 8),
 * as tensor maps with the 128-byte swizzle leave it; 1024-byte aligned. Groups of 8 rows follow
 * each other. next_bytes: from one 64 columns to the next, where the columns are not the summed
 * dimension and are more than 64. Steps along the tile are added in units of 16 bytes. */
static __device__ __forceinline__ uint64_t mil_wgmma_tile(uint32_t shared, uint32_t next_bytes)
{
    const uint64_t swizzle_128 = 1ull << 62, eight_rows = 1024 >> 4;
    return swizzle_128 | eight_rows << 32 | (uint64_t)(next_bytes >> 4) << 16 |
           (uint64_t)((shared & 0x3ffff) >> 4);
}
