/* borrow: a queue on a caller's stream, and what its ops read beside the caller's arrays: counts
 * and index arrays that follow from shapes, the caller's own index arrays made safe, LoRA
 * descriptors, v in the plain layout, samples in arrays.
 *
 * A few hundred bytes each and bound by latency, v alone by its bytes. Arguments travel in the
 * launch, so that a captured one replays without the host. */
#include "ops/borrow.h"

#include "kernels/device.h"

#include "kernels/lora.cuh"

#define BLOCK 256

/* ---- kernels ---- */

static __device__ __forceinline__ bool is_in(int32_t x, int32_t most)
{
    return x >= 0 && x <= most;
}

static __device__ void copy_indices(const mil_borrow_indices &args, int32_t i)
{
    if (i >= args.n)
        return;
    int32_t x = args.from[i];
    args.to[i] = is_in(x, args.most) ? x : args.otherwise;
}

/* A running maximum by one block, BLOCK entries a round. */
static __device__ void copy_starts(const mil_borrow_starts &args)
{
    __shared__ int32_t warp_most[BLOCK / MIL_WARP];
    int lane = threadIdx.x % MIL_WARP, warp = threadIdx.x / MIL_WARP;
    int32_t before = 0;
    for (int32_t first = 0; first < args.n; first += BLOCK) {
        int32_t i = first + (int32_t)threadIdx.x;
        int32_t x = i > 0 && i < args.n ? args.from[i] : 0;
        x = is_in(x, args.most) ? x : 0;
        x = i == args.n - 1 ? args.most : x;
#pragma unroll
        for (int offset = 1; offset < MIL_WARP; offset *= 2)
            x = max(x, __shfl_up_sync(0xffffffffu, x, offset)); /* its own where there is none */
        __syncthreads(); /* whoever still reads the round before */
        if (lane == MIL_WARP - 1)
            warp_most[warp] = x;
        __syncthreads();
        x = max(x, before);
#pragma unroll
        for (int w = 0; w < BLOCK / MIL_WARP; w++) {
            x = w < warp ? max(x, warp_most[w]) : x;
            before = max(before, warp_most[w]);
        }
        if (i < args.n)
            args.to[i] = x;
    }
}

static __global__ void fill_kernel(const __grid_constant__ mil_borrow_fill args)
{
    int32_t i = (int32_t)(blockIdx.x * BLOCK + threadIdx.x);
    mil_wait_for_previous();
    mil_let_next_start();
    if (i == 0 && args.to != nullptr)
        *args.to = args.counts;
    if (i < MIL_BORROW_FEW && args.few_to != nullptr)
        args.few_to[i] = args.few[i];
    if (i < args.n_iota)
        args.iota[i] = i;
    if (i < args.n_ones)
        args.ones[i] = 1;
#pragma unroll
    for (int a = 0; a < MIL_BORROW_INDICES; a++)
        copy_indices(args.indices[a], i);
    if (blockIdx.x == 0)
        copy_starts(args.starts);
}

static __global__ void modules_kernel(const __grid_constant__ mil_borrow_modules args)
{
    int32_t i = (int32_t)(blockIdx.x * BLOCK + threadIdx.x);
    mil_wait_for_previous();
    mil_let_next_start();
    if (i >= args.n_slots)
        return;
    mil_lora_module module = {};
    if (i < args.n_adapters) {
        module = args.first;
        module.a = (const char *)module.a + (size_t)i * args.a_bytes;
        module.b = (const char *)module.b + (size_t)i * args.b_bytes;
        if (args.scales != nullptr)
            module.scale = args.scales[i];
    }
    args.to[(int64_t)i * MIL_N_PROJECTIONS] = module;
}

/* Splits in order, then the scale: as expand reads v. One thread for each value. */
static __global__ void gather_kernel(const __grid_constant__ mil_borrow_v args)
{
    int64_t at = (int64_t)blockIdx.x * BLOCK + threadIdx.x;
    mil_wait_for_previous();
    mil_let_next_start();
    if (at >= (int64_t)args.n_rows * args.rank)
        return;
    int32_t row = (int32_t)(at / args.rank), r = (int32_t)(at % args.rank);
    int32_t segment = mil_segment_of(args.segment_indptr, 0, args.n_segments, row);
    const mil_lora_module *module =
        &args.modules[(int64_t)args.segment_adapter[segment] * MIL_N_PROJECTIONS];
    const float *v = args.v + row * args.v_stride + r;
    int32_t n_splits = mil_lora_splits(args.in, args.padded_rank);
    float sum = 0.0f;
    for (int32_t split = 0; split < n_splits; split++)
        sum += v[split * args.padded_rank];
    args.plain[at] = module->rank > 0 ? sum * module->scale : 0.0f;
}

static __global__ void spread_kernel(const __grid_constant__ mil_borrow_v args)
{
    int64_t at = (int64_t)blockIdx.x * BLOCK + threadIdx.x;
    mil_wait_for_previous();
    mil_let_next_start();
    if (at >= (int64_t)args.n_rows * args.padded_rank)
        return;
    int64_t row = at / args.padded_rank;
    int32_t r = (int32_t)(at % args.padded_rank);
    args.v[row * args.v_stride + r] = r < args.rank ? args.plain[row * args.rank + r] : 0.0f;
}

/* One thread for each column of a row, one at least: the first writes what a row has one of. */
static __global__ void samples_kernel(const __grid_constant__ mil_borrow_samples args)
{
    int64_t at = (int64_t)blockIdx.x * BLOCK + threadIdx.x;
    mil_wait_for_previous();
    mil_let_next_start();
    int32_t n_threads = max(args.n_columns, 1);
    int64_t row = at / n_threads;
    int32_t column = (int32_t)(at % n_threads);
    if (row >= args.n)
        return;
    const mil_sample *sample = &args.from[row];
    if (column == 0) {
        args.logprobs[row] = sample->logprob;
        args.ranks[row] = sample->rank;
    }
    if (column >= args.n_columns)
        return;
    bool is_there = column < sample->n_top;
    args.top_tokens[at] = is_there ? sample->top[column].token : -1;
    args.top_logprobs[at] = is_there ? sample->top[column].logprob : 0.0f;
}

/* ---- the caller's stream ---- */

#if CUDART_VERSION >= 12080
static mil_status check_ordinal(const struct mil_queue *queue, cudaStream_t stream)
{
    int ordinal = queue->ordinal;
    cudaStreamCaptureStatus captures;
    MIL_CUDA_TRY(cudaStreamIsCapturing(stream, &captures));
    if (captures != cudaStreamCaptureStatusNone)
        return MIL_OK;
    const cudaError_t error = cudaStreamGetDevice(stream, &ordinal);
    if (error == cudaErrorCallRequiresNewerDriver) {
        (void)cudaGetLastError();
        return MIL_OK;
    }
    MIL_TRY(mil_cuda_status(error, "asking a stream for its device"));
    if (ordinal != queue->ordinal)
        return mil_fail(MIL_ERR_ARGUMENT, "stream %p is of cuda:%d, expected one of cuda:%d",
                        (void *)stream, ordinal, queue->ordinal);
    return MIL_OK;
}
#else
static mil_status check_ordinal(const struct mil_queue *, cudaStream_t)
{
    return MIL_OK;
}
#endif

static mil_status check_stream(struct mil_queue *queue, void *stream)
{
    mil_cuda_call it;
    if (stream == nullptr || stream == cudaStreamLegacy)
        return MIL_OK;
    MIL_TRY(mil_cuda_begin_call(queue, &it));
    return mil_cuda_end_call(queue, &it, check_ordinal(queue, (cudaStream_t)stream));
}

/* ---- launch ---- */

static void *swap_stream(struct mil_queue *queue, void *stream)
{
    void *was = queue->stream;
    queue->stream = (cudaStream_t)stream;
    queue->has_pdl = false;
    return was;
}

static unsigned blocks_of(int64_t n)
{
    return (unsigned)((n + BLOCK - 1) / BLOCK);
}

template <typename Args>
static mil_status launch(struct mil_queue *queue, const char *what, void (*kernel)(Args), int64_t n,
                         const Args *args)
{
    void *was;
    if (n <= 0)
        return MIL_OK;
    MIL_TRY(mil_cuda_enter(queue, &was));
    return mil_cuda_leave(
        queue, was, mil_launch(queue, what, kernel, dim3(blocks_of(n)), dim3(BLOCK), 0, *args));
}

static mil_status fill(struct mil_queue *queue, const mil_borrow_fill *args)
{
    int32_t n = max(MIL_BORROW_FEW, max(args->n_iota, args->n_ones));
    for (int32_t a = 0; a < MIL_BORROW_INDICES; a++)
        n = max(n, args->indices[a].n);
    return launch(queue, "borrow: fill", fill_kernel, n, args);
}

static mil_status write_modules(struct mil_queue *queue, const mil_borrow_modules *args)
{
    return launch(queue, "borrow: modules", modules_kernel, args->n_slots, args);
}

static mil_status gather_v(struct mil_queue *queue, const mil_borrow_v *args)
{
    return launch(queue, "borrow: gather v", gather_kernel, (int64_t)args->n_rows * args->rank,
                  args);
}

static mil_status spread_v(struct mil_queue *queue, const mil_borrow_v *args)
{
    return launch(queue, "borrow: spread v", spread_kernel,
                  (int64_t)args->n_rows * args->padded_rank, args);
}

static mil_status tell_samples(struct mil_queue *queue, const mil_borrow_samples *args)
{
    return launch(queue, "borrow: samples", samples_kernel,
                  (int64_t)args->n * max(args->n_columns, 1), args);
}

static mil_status plan_attention(mil_context *context, const mil_begin_args *args)
{
    void *was;
    MIL_TRY(mil_cuda_enter(context->queue, &was));
    return mil_cuda_leave(context->queue, was, mil_cuda_attention_plan(context, args));
}

extern "C" const mil_borrow mil_cuda_borrow = {
    check_stream, swap_stream, fill,         write_modules,
    gather_v,     spread_v,    tell_samples, plan_attention,
};
