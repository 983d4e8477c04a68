#include "layers/column.h"

void mil_column_place(mil_column *column, mil_arena *arena, const mil_backend *backend,
                      const mil_shard *shard, const mil_column_options *options)
{
    *column = (mil_column){
        .layer = options->layer, .n_parts = options->n_parts, .has_bias = options->has_bias};
    mil_weight *weight = &column->weight;
    weight->n_parts = options->n_parts;
    weight->interleave = options->interleave;
    for (int32_t part = 0; part < options->n_parts; part++) {
        const mil_slice *slice = &shard->projections[options->projections[part]];
        column->projections[part] = options->projections[part];
        weight->part_rows[part] = (int32_t)slice->n_rows;
        weight->N += (int32_t)slice->n_rows;
        weight->K = (int32_t)slice->n_cols;
    }
    mil_arena_take_weight(arena, backend, weight);
    if (options->has_bias)
        weight->bias = mil_arena_take(arena, (size_t)weight->N, sizeof(float));
}

mil_status mil_column_load(mil_column *column, mil_walk *walk, const mil_linear_names *names)
{
    mil_weight *weight = &column->weight;
    for (int32_t part = 0; part < column->n_parts; part++) {
        const mil_slice *slice = &walk->shard->projections[column->projections[part]];
        MIL_TRY(mil_walk_weight(walk, weight, part, names->weight[part], slice));
        if (!column->has_bias)
            continue;
        float *bias = weight->bias != NULL ? weight->bias + mil_weight_row(weight, part, 0) : NULL;
        MIL_TRY(mil_walk_vector(walk, bias, names->bias[part], slice->full_rows, slice->row_begin,
                                slice->n_rows));
    }
    return MIL_OK;
}

static mil_linear_args linear_args(const mil_column *column, const mil_step *step, void *y,
                                   const uint16_t *x)
{
    return (mil_linear_args){
        .y = y,
        .x = x,
        .weight = &column->weight,
        .y_dtype = step->context->backend->product_dtype,
        .M = mil_step_tokens(step),
        .ldy = column->weight.N,
        .ldx = column->weight.K,
    };
}

mil_status mil_column_forward(const mil_column *column, const mil_step *step, void *y,
                              const uint16_t *x)
{
    mil_lora_args lora;
    const mil_linear_args linear = linear_args(column, step, y, x);
    return mil_ops_linear_lora(
        step->context, &linear,
        mil_step_lora(step, &lora, column->layer, column->projections, column->n_parts));
}

mil_status mil_column_forward_act(const mil_column *column, const mil_step *step, uint16_t *out,
                                  const uint16_t *x, mil_activation kind)
{
    mil_lora_args lora;
    const mil_linear_args linear = linear_args(column, step, step->wide, x);
    const mil_act_args act = {
        .out = out,
        .gate_up = step->wide,
        .n_tokens = linear.M,
        .ffn = column->weight.part_rows[0],
        .interleave = column->weight.interleave,
        .kind = kind,
    };
    return mil_ops_gate_up_act(
        step->context, &linear,
        mil_step_lora(step, &lora, column->layer, column->projections, column->n_parts), &act);
}
