/* Names are those of transformers' checkpoints: models/llama/modeling_llama.py, LlamaForCausalLM.
 */
#include "model/arch.h"

#include <stdio.h>

static const mil_arch families[] = {
    [MIL_ARCHITECTURE_LLAMA] =
        {
            .name = "LlamaForCausalLM",
            .embedding = "model.embed_tokens.weight",
            .final_norm = "model.norm.weight",
            .head = "lm_head.weight",
            .layers = "model.layers.",
            .attention_norm = "input_layernorm.weight",
            .mlp_norm = "post_attention_layernorm.weight",
            .projections =
                {
                    [MIL_PROJECTION_Q] = "self_attn.q_proj",
                    [MIL_PROJECTION_K] = "self_attn.k_proj",
                    [MIL_PROJECTION_V] = "self_attn.v_proj",
                    [MIL_PROJECTION_O] = "self_attn.o_proj",
                    [MIL_PROJECTION_GATE] = "mlp.gate_proj",
                    [MIL_PROJECTION_UP] = "mlp.up_proj",
                    [MIL_PROJECTION_DOWN] = "mlp.down_proj",
                },
            .activation = MIL_ACTIVATION_SILU,
        },
};

mil_status mil_arch_find(const mil_arch **out, mil_architecture architecture)
{
    if ((size_t)architecture >= sizeof families / sizeof families[0])
        return mil_fail(MIL_ERR_UNSUPPORTED, "config: architecture is number %d, expected %s",
                        (int)architecture, families[0].name);
    *out = &families[architecture];
    return MIL_OK;
}

void mil_arch_name(const mil_arch *arch, char name[MIL_NAME_BYTES], int32_t layer,
                   const char *suffix)
{
    (void)snprintf(name, MIL_NAME_BYTES, "%s%d.%s", arch->layers, layer, suffix);
}

void mil_arch_linear_names(const mil_arch *arch, mil_linear_names *names, int32_t layer,
                           const mil_projection *projections, int32_t n_parts)
{
    for (int32_t part = 0; part < n_parts; part++) {
        const char *projection = arch->projections[projections[part]];
        (void)snprintf(names->weight[part], MIL_NAME_BYTES, "%s%d.%s.weight", arch->layers, layer,
                       projection);
        (void)snprintf(names->bias[part], MIL_NAME_BYTES, "%s%d.%s.bias", arch->layers, layer,
                       projection);
    }
}
