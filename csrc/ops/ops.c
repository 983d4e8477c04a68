#include "ops/ops.h"

static bool has_lora(const mil_lora_args *lora)
{
    return lora != NULL && lora->batch->header->bucket_segments > 0;
}

mil_status mil_ops_linear_lora(mil_context *context, const mil_linear_args *linear,
                               const mil_lora_args *lora)
{
    const mil_backend *backend = context->backend;
    if (backend->linear_lora != NULL)
        return backend->linear_lora(context, linear, lora);
    if (!has_lora(lora))
        return backend->linear(context, linear);
    const mil_lora_shrink_args shrink = {.lora = *lora, .x = linear->x, .ldx = linear->ldx};
    const mil_lora_expand_args expand = {
        .lora = *lora, .y = linear->y, .ldy = linear->ldy, .weight = linear->weight};
    MIL_TRY(backend->lora_shrink(context, &shrink));
    MIL_TRY(backend->linear(context, linear));
    return backend->lora_expand(context, &expand);
}

mil_status mil_ops_gate_up_act(mil_context *context, const mil_linear_args *linear,
                               const mil_lora_args *lora, const mil_act_args *act)
{
    const mil_backend *backend = context->backend;
    if (backend->gate_up_act != NULL)
        return backend->gate_up_act(context, linear, lora, act);
    MIL_TRY(mil_ops_linear_lora(context, linear, lora));
    return backend->act(context, act);
}
