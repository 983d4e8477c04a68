/* Attention's Hopper path: the kernels of attention_chunk_sm90.cu and attention_decode_sm90.cu over
 * the two parts of the step's list. */
#include "ops/backend.h"

#include "kernels/attention_sm90.cuh"
#include "kernels/tensor_map.h"

static mil_attention_sm90 params_of(const mil_context *context, const mil_attention_args *args)
{
    const mil_kv *kv = args->kv;
    mil_attention_sm90 params = {};
    params.out = args->out;
    params.q = args->q;
    params.page_table = args->slots->page_table;
    params.places =
        mil_attention_place(context->step_data, context->step_bytes,
                            args->batch->header->bucket_seqs, args->n_heads, kv->n_kv_heads);
    params.partials = mil_attention_partials_in(context->workspace, context->workspace_bytes,
                                                args->n_heads, kv->head_dim);
    params.n_heads = args->n_heads;
    params.n_kv_heads = kv->n_kv_heads;
    params.group = args->n_heads / kv->n_kv_heads;
    params.head_dim = kv->head_dim;
    while (MIL_BOX_KEYS << params.page_shift < kv->page_size)
        params.page_shift++;
    params.max_pages = args->slots->max_pages;
    params.last_page = kv->n_pages - 1;
    params.window = args->window;
    params.scale = mil_attention_scale_of(args->scale, args->softcap);
    params.dtype = kv->dtype;
    params.out_dtype = args->out_dtype;
    return params;
}

extern "C" mil_status mil_cuda_attention_sm90(mil_context *context, const mil_attention_args *args)
{
    const mil_plan_header *header = args->batch->header;
    const mil_kv *kv = args->kv;
    const mil_attention_sm90 params = params_of(context, args);
    const uint64_t n_rows =
        (uint64_t)kv->n_pages * (uint64_t)kv->n_kv_heads * (uint64_t)kv->page_size;
    CUtensorMap maps[2];
    for (int i = 0; i < 2; i++)
        MIL_TRY(mil_cuda_tensor_map(&maps[i], context->queue,
                                    (i == 0 ? kv->k : kv->v) + args->layer * kv->layer_elements,
                                    kv->dtype, kv->head_dim, n_rows, MIL_BOX_KEYS));
    const int64_t n_chunk_tiles =
        (int64_t)header->bucket_tokens * params.group / MIL_ATTENTION_SM90_ROWS +
        header->bucket_chunks;
    const int64_t n_decode_tiles = mil_attention_most_items(
        header->bucket_seqs, 0, params.group, mil_attention_tiles(args->n_heads, kv->n_kv_heads),
        mil_attention_max_splits(kv->n_kv_heads));
    if (header->bucket_chunks > 0)
        MIL_TRY(mil_attention_chunks_sm90(context->queue, &params, maps,
                                          n_chunk_tiles * kv->n_kv_heads));
    return mil_attention_decode_sm90(context->queue, &params, maps,
                                     n_decode_tiles * kv->n_kv_heads);
}
