/* The CPU's table of ops, one for each instruction set, and its device calls, which are trivial:
 * host memory, a queue of one. */
#include "cpu/cpu.h"

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

static mil_status copy(mil_context *context, void *to, const void *from, size_t n_bytes)
{
    (void)context;
    memcpy(to, from, n_bytes);
    return MIL_OK;
}

static mil_status synchronize(mil_context *context)
{
    (void)context;
    return MIL_OK;
}

static const mil_device device = {
    .name = "cpu",
    .alloc = mil_slab_init,
    .free = mil_slab_deinit,
    .copy_in = copy,
    .copy_out = copy,
    .synchronize = synchronize,
};

/* ---- ops ---- */

#define BACKEND(isa)                                                                               \
    {                                                                                              \
        .name = "cpu",                                                                             \
        .device = &device,                                                                         \
        .default_page_size = 16,                                                                   \
        .lora_rank_multiple = 16,                                                                  \
        .gate_up_interleave = 16,                                                                  \
        .kernels = &mil_cpu_kernels_##isa,                                                         \
        .packed_bytes = mil_cpu_packed_bytes,                                                      \
        .pack = mil_cpu_pack_##isa,                                                                \
        .lora_a_bytes = mil_cpu_lora_a_bytes,                                                      \
        .lora_b_bytes = mil_cpu_lora_b_bytes,                                                      \
        .lora_pack_a = mil_cpu_lora_pack_a_##isa,                                                  \
        .lora_pack_b = mil_cpu_lora_pack_b_##isa,                                                  \
        .workspace_bytes = mil_cpu_workspace_bytes,                                                \
        .gather_tokens = mil_cpu_gather_tokens,                                                    \
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

const mil_backend *mil_backend_find(const char *name)
{
    mil_cpu_isa_id isa;
    const char *available;
    if (strcmp(name, "cpu") != 0) {
        (void)mil_fail(MIL_ERR_ARGUMENT, "device is \"%s\", expected \"cpu\"", name);
        return NULL;
    }
    if (mil_cpu_isa_choose(&isa, &available) != MIL_OK)
        return NULL;
    return &mil_cpu_backend[isa];
}
