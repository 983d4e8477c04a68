/* The CPU's table of ops, one for each instruction set, and its device calls, which are trivial:
 * host memory, a queue of one. */
#include "cpu/cpu.h"

#include "base/machine.h"

#include <string.h>

/* ---- work ---- */

void mil_cpu_run(const mil_context *context, mil_task_fn fn, void *argument)
{
    if (context->pool == NULL)
        fn(argument, 0, 1);
    else
        mil_pool_run(context->pool, fn, argument);
}

void mil_cpu_run_sized(const mil_context *context, mil_task_fn fn, void *argument,
                       int64_t n_elements)
{
    if (n_elements < 16384)
        fn(argument, 0, 1);
    else
        mil_cpu_run(context, fn, argument);
}

void mil_cpu_barrier(const mil_context *context, int32_t thread)
{
    if (context->pool != NULL)
        mil_pool_barrier(context->pool, thread);
}

int32_t mil_cpu_n_threads(const mil_context *context)
{
    return context->pool == NULL ? 1 : mil_pool_n_threads(context->pool);
}

/* ---- device ---- */

static mil_status open(struct mil_queue **out, int32_t ordinal)
{
    if (ordinal != 0)
        return mil_fail(MIL_ERR_ARGUMENT, "device is \"cpu:%d\", expected \"cpu\"", ordinal);
    *out = NULL;
    return MIL_OK;
}

static void close(struct mil_queue *queue)
{
    (void)queue;
}

static mil_status memory(struct mil_queue *queue, mil_device_memory *memory)
{
    (void)queue;
    memory->name = "cpu";
    memory->n_free = memory->n_free_at_open = mil_memory_free_bytes();
    memory->n_total = mil_memory_limit_bytes();
    return MIL_OK;
}

static mil_status alloc(struct mil_queue *queue, mil_slab *slab, size_t n_bytes, const char *what)
{
    (void)queue;
    return mil_slab_init(slab, n_bytes, what);
}

static void give_back(struct mil_queue *queue, mil_slab *slab)
{
    (void)queue;
    mil_slab_deinit(slab);
}

static mil_status copy(struct mil_queue *queue, void *to, const void *from, size_t n_bytes)
{
    (void)queue;
    memcpy(to, from, n_bytes);
    return MIL_OK;
}

static mil_status fill_16(struct mil_queue *queue, void *memory, uint16_t word, size_t n)
{
    (void)queue;
    for (size_t i = 0; i < n; i++)
        ((uint16_t *)memory)[i] = word;
    return MIL_OK;
}

static mil_status poison(struct mil_queue *queue, void *memory, size_t n_bytes, size_t n_blocks,
                         size_t stride_bytes)
{
    (void)queue;
    for (size_t i = 0; i < n_blocks; i++)
        memset((char *)memory + i * stride_bytes, 0xff, n_bytes);
    return MIL_OK;
}

static mil_status synchronize(struct mil_queue *queue)
{
    (void)queue;
    return MIL_OK;
}

/* What was queued has run: there is nothing to wait for. */
static mil_status fence(struct mil_queue *queue, int32_t index)
{
    (void)queue;
    (void)index;
    return MIL_OK;
}

static const mil_device device = {
    .name = "cpu",
    .is_host = true,
    .depth = 1,
    .open = open,
    .close = close,
    .memory = memory,
    .alloc = alloc,
    .free = give_back,
    .alloc_host = alloc,
    .free_host = give_back,
    .copy_in = copy,
    .copy_out = copy,
    .send_out = copy,
    .fill_16 = fill_16,
    .poison = poison,
    .synchronize = synchronize,
    .record = fence,
    .wait = fence,
};

/* ---- ops ---- */

/* Ops read the batch itself. */
static size_t step_bytes(const mil_maxima *maxima)
{
    (void)maxima;
    return 0;
}

#define BACKEND(isa)                                                                               \
    {                                                                                              \
        .name = "cpu",                                                                             \
        .device = &device,                                                                         \
        .default_page_size = 16,                                                                   \
        .lora_rank_multiple = 16,                                                                  \
        .gate_up_interleave = 16,                                                                  \
        .logit_block = 64,                                                                         \
        .product_dtype = MIL_DTYPE_F32,                                                            \
        .weight_format = MIL_WEIGHT_BF16_PANELS,                                                   \
        .kernels = &mil_cpu_kernels_##isa,                                                         \
        .packed_bytes = mil_cpu_packed_bytes,                                                      \
        .pack = mil_cpu_pack_##isa,                                                                \
        .lora_a_bytes = mil_cpu_lora_a_bytes,                                                      \
        .lora_b_bytes = mil_cpu_lora_b_bytes,                                                      \
        .lora_pack_a = mil_cpu_lora_pack_a_##isa,                                                  \
        .lora_pack_b = mil_cpu_lora_pack_b_##isa,                                                  \
        .workspace_bytes = mil_cpu_workspace_bytes,                                                \
        .step_bytes = step_bytes,                                                                  \
        .begin = mil_cpu_begin,                                                                    \
        .embed = mil_cpu_embed,                                                                    \
        .norm = mil_cpu_norm,                                                                      \
        .rope_write = mil_cpu_rope_write,                                                          \
        .attention = mil_cpu_attention,                                                            \
        .act = mil_cpu_act,                                                                        \
        .sample = mil_cpu_sample,                                                                  \
        .linear = mil_cpu_linear,                                                                  \
        .lora_shrink = mil_cpu_lora_shrink,                                                        \
        .lora_expand = mil_cpu_lora_expand,                                                        \
        .linear_lora = mil_cpu_linear_lora,                                                        \
        .gate_up_act = mil_cpu_gate_up_act,                                                        \
    }

static const mil_backend mil_cpu_backend[MIL_CPU_N_ISAS] = {
    [MIL_CPU_SCALAR] = BACKEND(scalar),
#ifdef __x86_64__
    [MIL_CPU_AVX2] = BACKEND(avx2),
    [MIL_CPU_AVX512] = BACKEND(avx512),
    [MIL_CPU_AVX512BF16] = BACKEND(avx512bf16),
#endif
};

mil_status mil_cpu_backend_find(const mil_backend **out)
{
    mil_cpu_isa_id isa;
    const char *available;
    MIL_TRY(mil_cpu_isa_choose(&isa, &available));
    *out = &mil_cpu_backend[isa];
    return MIL_OK;
}
