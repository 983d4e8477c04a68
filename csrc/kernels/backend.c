/* The CUDA backend's table of ops, and how it wants weights and adapters laid out: row-major bf16.
 *
 * Every op is entered here, so that it runs with the queue's device current whatever the calling
 * thread had: kernels are launched on the current device. */
#include "kernels/device.h"

#include "kernels/cublas.h"
#include "ops/chaos.h"

#include <string.h>

#define RANK_MULTIPLE 8 /* one 16-byte vector of a row of B */
#define PART_BYTES 256  /* what the parts of workspace and step_data are rounded to */

/* ---- layouts ---- */

static int32_t pad_rank(int32_t rank)
{
    return (rank + RANK_MULTIPLE - 1) / RANK_MULTIPLE * RANK_MULTIPLE;
}

static size_t packed_bytes(int32_t N, int32_t K)
{
    return mil_round_up((size_t)N * (size_t)K * sizeof(uint16_t), MIL_ALIGN);
}

static size_t lora_a_bytes(int32_t rank, int32_t in)
{
    return packed_bytes(pad_rank(rank), in);
}

static size_t lora_b_bytes(int32_t out, int32_t rank)
{
    return packed_bytes(out, pad_rank(rank));
}

static void pack_rows(uint16_t *to, int64_t to_stride, const uint16_t *from, int64_t stride,
                      int32_t rows, int32_t columns)
{
    for (int32_t row = 0; row < rows; row++)
        memcpy(to + row * to_stride, from + row * stride, (size_t)columns * sizeof *to);
}

/* [padded_rank][in]: the padding's rows stay zero. */
static void lora_pack_a(void *packed, const uint16_t *a, int64_t stride, int32_t rank, int32_t in)
{
    pack_rows(packed, in, a, stride, rank, in);
}

/* [out][padded_rank]: the padding's columns stay zero. */
static void lora_pack_b(void *packed, const uint16_t *b, int64_t stride, int32_t out, int32_t rank)
{
    pack_rows(packed, pad_rank(rank), b, stride, out, rank);
}

/* ---- memory ---- */

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* Ops run one after another, so the largest need decides. */
static size_t workspace_bytes(const mil_maxima *maxima)
{
    size_t need = PART_BYTES;
    need = larger(need, mil_cuda_linear_workspace(maxima));
    need = larger(need, mil_cuda_attention_workspace(maxima));
    return larger(need, mil_cuda_sample_workspace(maxima));
}

static size_t step_bytes(const mil_maxima *maxima)
{
    return larger(PART_BYTES, mil_cuda_attention_step_bytes(maxima));
}

/* ---- ops ---- */

#define ON_DEVICE(op)                                                                              \
    static mil_status op(mil_context *context, const mil_##op##_args *args)                        \
    {                                                                                              \
        void *was;                                                                                 \
        MIL_TRY(mil_cuda_enter(context->queue, &was));                                             \
        mil_status status = mil_chaos_delay(context->queue);                                       \
        if (status == MIL_OK)                                                                      \
            status = mil_cuda_##op(context, args);                                                 \
        return mil_cuda_leave(context->queue, was, status);                                        \
    }

ON_DEVICE(begin)
ON_DEVICE(embed)
ON_DEVICE(norm)
ON_DEVICE(linear)
ON_DEVICE(lora_shrink)
ON_DEVICE(lora_expand)
ON_DEVICE(rope_write)
ON_DEVICE(attention)
ON_DEVICE(act)
ON_DEVICE(sample)

static mil_status linear_lora(mil_context *context, const mil_linear_args *linear,
                              const mil_lora_args *lora)
{
    void *was;
    MIL_TRY(mil_cuda_enter(context->queue, &was));
    mil_status status = mil_chaos_delay(context->queue);
    if (status == MIL_OK)
        status = mil_cuda_linear_lora(context, linear, lora);
    return mil_cuda_leave(context->queue, was, status);
}

static const mil_backend mil_cuda_backend = {
    .name = "cuda",
    .device = &mil_cuda_device,
    .default_page_size = 64,
    .lora_rank_multiple = RANK_MULTIPLE,
    .gate_up_interleave = 8,
    .product_dtype = MIL_DTYPE_BF16,
    .weight_format = MIL_WEIGHT_BF16_ROWS,
    .lora_v_rank = MIL_MAX_LORA_RANK, /* one for every batch: a captured launch serves any ranks */
    .logit_block = 512,
    .max_vocab = 1 << 19,
    .rows_alike = mil_cublas_bucket,
    .packed_bytes = packed_bytes,
    .pack = mil_cuda_pack,
    .pack_dummy = mil_cuda_pack_dummy,
    .lora_a_bytes = lora_a_bytes,
    .lora_b_bytes = lora_b_bytes,
    .lora_pack_a = lora_pack_a,
    .lora_pack_b = lora_pack_b,
    .workspace_bytes = workspace_bytes,
    .step_bytes = step_bytes,
    .begin = begin,
    .embed = embed,
    .norm = norm,
    .linear = linear,
    .lora_shrink = lora_shrink,
    .lora_expand = lora_expand,
    .rope_write = rope_write,
    .attention = attention,
    .act = act,
    .sample = sample,
    .linear_lora = linear_lora,
};

mil_status mil_cuda_backend_find(const mil_backend **out)
{
    int32_t n_devices;
    MIL_TRY(mil_cuda_count(&n_devices));
    *out = &mil_cuda_backend;
    return MIL_OK;
}
