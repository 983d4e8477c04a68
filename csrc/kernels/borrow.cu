/* borrow: a queue on a caller's stream, and what its ops read beside the caller's arrays: counts
 * and index arrays that follow from shapes, LoRA descriptors, v in the plain layout.
 *
 * A few hundred bytes each and bound by latency, v alone by its bytes. Arguments travel in the
 * launch, so that a captured one replays without the host. */
#include "ops/borrow.h"

#include "kernels/device.h"

#include "kernels/lora.cuh"

#define BLOCK 256

/* ---- kernels ---- */

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

/* The last segment that begins at or before row i: the one that holds it. */
static __device__ int32_t segment_of(const mil_borrow_v &args, int32_t i)
{
    int32_t low = 0, high = args.n_segments;
    while (low + 1 < high) {
        int32_t middle = (low + high) / 2;
        if (args.segment_indptr[middle] <= i)
            low = middle;
        else
            high = middle;
    }
    return low;
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
    int32_t slot = args.segment_adapter[segment_of(args, row)];
    const float *v = args.v + row * args.v_stride + r;
    int32_t n_splits = mil_lora_splits(args.in, args.padded_rank);
    float sum = 0.0f;
    for (int32_t split = 0; split < n_splits; split++)
        sum += v[split * args.padded_rank];
    args.plain[at] = sum * args.modules[(int64_t)slot * MIL_N_PROJECTIONS].scale;
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
    int32_t was;
    if (n <= 0)
        return MIL_OK;
    MIL_TRY(mil_cuda_enter(queue, &was));
    return mil_cuda_leave(
        queue, was, mil_launch(queue, what, kernel, dim3(blocks_of(n)), dim3(BLOCK), 0, *args));
}

static mil_status fill(struct mil_queue *queue, const mil_borrow_fill *args)
{
    int32_t n = args->n_iota > args->n_ones ? args->n_iota : args->n_ones;
    return launch(queue, "borrow: fill", fill_kernel, n > MIL_BORROW_FEW ? n : MIL_BORROW_FEW,
                  args);
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

static mil_status plan_attention(mil_context *context, const mil_begin_args *args)
{
    int32_t was;
    MIL_TRY(mil_cuda_enter(context->queue, &was));
    return mil_cuda_leave(context->queue, was, mil_cuda_attention_plan(context, args));
}

extern "C" const mil_borrow mil_cuda_borrow = {
    swap_stream, fill, write_modules, gather_v, spread_v, plan_attention,
};
