/* A tiny Llama of dummy weights, and adapters of it, for tests of what runs models. */
#pragma once

#include "milpy.h"
#include "test.h"

static inline mil_config dummy_config(void)
{
    return (mil_config){
        .architecture = MIL_ARCHITECTURE_LLAMA,
        .hidden = 128,
        .ffn = 192,
        .n_layers = 3,
        .n_heads = 4,
        .n_kv_heads = 2,
        .head_dim = 32,
        .vocab = 301,
        .max_position = 1024,
        .rms_eps = 1e-5f,
        .rope = {.kind = MIL_ROPE_DEFAULT, .theta = 10000.0},
    };
}

static inline mil_status dummy_open(mil_model **out, const mil_config *config, int32_t world,
                                    int32_t n_threads)
{
    const mil_checkpoint_info checkpoint = {.is_dummy = true, .dummy_seed = 7};
    const mil_model_options options = {
        .device = "cpu", .tensor_parallel = world, .n_threads = n_threads};
    return mil_model_open(out, config, &checkpoint, &options);
}

/* An adapter of `rank` on every projection of every layer, with a scale at which it matters. */
static inline mil_status dummy_add_adapter(mil_model *model, const mil_config *config, int32_t rank,
                                           uint64_t seed, int32_t *content)
{
    enum { MAX_MODULES = 4 * MIL_N_PROJECTIONS };
    static mil_adapter_module_info modules[MAX_MODULES];
    int32_t q = config->n_heads * config->head_dim;
    int32_t kv = config->n_kv_heads * config->head_dim;
    const int32_t in[MIL_N_PROJECTIONS] = {config->hidden, config->hidden, config->hidden, q,
                                           config->hidden, config->hidden, config->ffn};
    const int32_t out[MIL_N_PROJECTIONS] = {
        q, kv, kv, config->hidden, config->ffn, config->ffn, config->hidden};
    int32_t n = 0;
    CHECK(config->n_layers * MIL_N_PROJECTIONS <= MAX_MODULES);
    for (int32_t layer = 0; layer < config->n_layers; layer++)
        for (int32_t p = 0; p < MIL_N_PROJECTIONS; p++)
            modules[n++] = (mil_adapter_module_info){
                .layer = layer,
                .projection = (mil_projection)p,
                .rank = rank,
                .scale = 20.0f,
                .a = {.name = "a", .dtype = MIL_DTYPE_BF16, .rank = 2, .shape = {rank, in[p]}},
                .b = {.name = "b", .dtype = MIL_DTYPE_BF16, .rank = 2, .shape = {out[p], rank}},
            };
    const mil_adapter_info info = {
        .modules = modules, .n_modules = n, .is_dummy = true, .dummy_seed = seed};
    return mil_model_add_adapter(model, &info, content);
}
