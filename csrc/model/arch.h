/* The table of model families: the only place that knows them. A family is names of tensors and a
 * choice among the options that layers have. */
#pragma once

#include "layers/layer.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Names within a layer follow its prefix, "<layers><number>."; a linear's tensors add ".weight" and
 * ".bias". */
typedef struct mil_arch {
    const char *name; /* as config.json's "architectures" has it */
    const char *embedding;
    const char *final_norm;
    const char *head; /* not read where the head is tied */
    const char *layers;
    const char *attention_norm;
    const char *mlp_norm;
    const char *projections[MIL_N_PROJECTIONS];
    mil_activation activation;
} mil_arch;

/* MIL_ERR_UNSUPPORTED for a family that this build does not know. */
mil_status mil_arch_find(const mil_arch **out, mil_architecture architecture) MIL_WARN_UNUSED;

/* Name of tensor `suffix` of a layer. */
void mil_arch_name(const mil_arch *arch, char name[MIL_NAME_BYTES], int32_t layer,
                   const char *suffix);
/* Names of a linear's parts. */
void mil_arch_linear_names(const mil_arch *arch, mil_linear_names *names, int32_t layer,
                           const mil_projection *projections, int32_t n_parts);

#ifdef __cplusplus
}
#endif
