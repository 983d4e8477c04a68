#include "layers/row.h"

void mil_row_place(mil_row *row, mil_arena *arena, const mil_backend *backend,
                   const mil_shard *shard, const mil_row_options *options)
{
    const mil_slice *slice = &shard->projections[options->projection];
    *row = (mil_row){
        .layer = options->layer,
        .projection = options->projection,
        .has_bias = options->has_bias && shard->rank == 0,
    };
    mil_weight *weight = &row->weight;
    weight->n_parts = 1;
    weight->N = weight->part_rows[0] = (int32_t)slice->n_rows;
    weight->K = (int32_t)slice->n_cols;
    mil_arena_take_weight(arena, backend, weight);
    if (row->has_bias)
        weight->bias = mil_arena_take(arena, (size_t)weight->N, sizeof(float));
}

mil_status mil_row_load(mil_row *row, mil_walk *walk, const mil_linear_names *names)
{
    const mil_slice *slice = &walk->shard->projections[row->projection];
    MIL_TRY(mil_walk_weight(walk, &row->weight, 0, names->weight[0], slice));
    if (!row->has_bias)
        return MIL_OK;
    return mil_walk_vector(walk, row->weight.bias, names->bias[0], slice->full_rows, 0,
                           slice->full_rows);
}

mil_status mil_row_forward(const mil_row *row, const mil_step *step, void *y, const uint16_t *x)
{
    mil_lora_args lora;
    const mil_linear_args linear = {
        .y = y,
        .x = x,
        .weight = &row->weight,
        .y_dtype = step->context->backend->product_dtype,
        .M = mil_step_tokens(step),
        .ldy = row->weight.N,
        .ldx = row->weight.K,
    };
    MIL_TRY(mil_ops_linear_lora(step->context, &linear,
                                mil_step_lora(step, &lora, row->layer, &row->projection, 1)));
    return mil_step_all_reduce(step, y, (int64_t)linear.M * linear.ldy);
}
