/* What layers call where a backend's slot may be NULL: the composed ops.
 *
 * Each runs the backend's own slot if there is one, else the plain ops that give the same result.
 * The residual add of a row-parallel product has no entry here: it is the residual operand of the
 * norm that reads the sum. */
#pragma once

#include "ops/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y = x W^T (+ bias), then y += the LoRA of each row that has one. lora may be NULL; lora->n_parts
 * must be the weight's. */
mil_status mil_ops_linear_lora(mil_context *context, const mil_linear_args *linear,
                               const mil_lora_args *lora) MIL_WARN_UNUSED;

/* out = act(gate) * up of linear's product with its LoRA. linear->y, [M, 2 F] with ldy = 2 F, is
 * scratch: its content afterwards is not defined. act->gate_up must be linear->y. */
mil_status mil_ops_gate_up_act(mil_context *context, const mil_linear_args *linear,
                               const mil_lora_args *lora, const mil_act_args *act) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
