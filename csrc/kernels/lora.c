/* A product with LoRA beside it: shrink needs x alone, so it runs on the queue's second stream
 * while the product runs on the first, and expand waits for both. Without a second stream shrink
 * goes first: the same kernels, the same bits. */
#include "kernels/cuda.h"

#include "ops/chaos.h"

/* The same place, its ops on the second stream. Programmatic launches order within one stream only.
 */
static mil_queue beside(const mil_queue *queue)
{
    mil_queue side = *queue;
    side.stream = queue->side;
    side.has_pdl = false;
    return side;
}

static mil_status shrink_beside(const mil_context *context, const mil_lora_shrink_args *args)
{
    mil_queue side = beside(context->queue);
    mil_context there = *context;
    there.queue = &side;
    MIL_CUDA_TRY(cudaStreamWaitEvent(side.stream, side.fork, 0));
    MIL_TRY(mil_chaos_delay(&side));
    MIL_TRY(mil_cuda_lora_shrink(&there, args));
    MIL_CUDA_TRY(cudaEventRecord(side.join, side.stream));
    return MIL_OK;
}

/* The product first: its blocks fill an SM's registers, and find no room beside shrink's. */
static mil_status product_and_shrink(mil_context *context, const mil_linear_args *linear,
                                     const mil_lora_shrink_args *shrink)
{
    const mil_queue *queue = context->queue;
    MIL_CUDA_TRY(cudaEventRecord(queue->fork, queue->stream));
    MIL_TRY(mil_chaos_delay(queue));
    MIL_TRY(mil_cuda_linear(context, linear));
    MIL_TRY(shrink_beside(context, shrink));
    MIL_CUDA_TRY(cudaStreamWaitEvent(queue->stream, queue->join, 0));
    return MIL_OK;
}

mil_status mil_cuda_linear_lora(mil_context *context, const mil_linear_args *linear,
                                const mil_lora_args *lora)
{
    if (lora == NULL || lora->batch->header->bucket_segments == 0)
        return mil_cuda_linear(context, linear);
    const mil_lora_shrink_args shrink = {.lora = *lora, .x = linear->x, .ldx = linear->ldx};
    const mil_lora_expand_args expand = {
        .lora = *lora, .y = linear->y, .ldy = linear->ldy, .weight = linear->weight};
    if (context->queue->has_side) {
        MIL_TRY(product_and_shrink(context, linear, &shrink));
    } else {
        MIL_TRY(mil_cuda_lora_shrink(context, &shrink));
        MIL_TRY(mil_cuda_linear(context, linear));
    }
    return mil_cuda_lora_expand(context, &expand);
}
