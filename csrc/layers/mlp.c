#include "layers/mlp.h"

void mil_mlp_place(mil_mlp *mlp, mil_arena *arena, const mil_backend *backend,
                   const mil_shard *shard, const mil_mlp_options *options)
{
    /* Side by side as the backend wants them, where this rank's width allows. */
    int32_t group = backend->gate_up_interleave;
    const mil_column_options gate_up = {
        .layer = options->layer,
        .n_parts = 2,
        .projections = {MIL_PROJECTION_GATE, MIL_PROJECTION_UP},
        .interleave = group > 0 && shard->ffn % group == 0 ? group : 0,
    };
    const mil_row_options down = {.layer = options->layer, .projection = MIL_PROJECTION_DOWN};
    mlp->activation = options->activation;
    mil_column_place(&mlp->gate_up, arena, backend, shard, &gate_up);
    mil_row_place(&mlp->down, arena, backend, shard, &down);
}

mil_status mil_mlp_load(mil_mlp *mlp, mil_walk *walk, const mil_linear_names *gate_up,
                        const mil_linear_names *down)
{
    MIL_TRY(mil_column_load(&mlp->gate_up, walk, gate_up));
    return mil_row_load(&mlp->down, walk, down);
}

mil_status mil_mlp_forward(const mil_mlp *mlp, const mil_step *step, void *y, const uint16_t *x)
{
    MIL_TRY(mil_column_forward_act(&mlp->gate_up, step, step->narrow, x, mlp->activation));
    return mil_row_forward(&mlp->down, step, y, step->narrow);
}
