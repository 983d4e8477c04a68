#include "layers/norm.h"

void mil_norm_place(mil_norm *norm, mil_arena *arena, int32_t hidden, float eps)
{
    *norm = (mil_norm){.hidden = hidden, .eps = eps};
    norm->weight = mil_arena_take(arena, (size_t)hidden, sizeof(float));
}

mil_status mil_norm_load(mil_norm *norm, mil_walk *walk, const char *name)
{
    return mil_walk_vector(walk, norm->weight, name, norm->hidden, 0, norm->hidden);
}

mil_status mil_norm_forward(const mil_norm *norm, const mil_step *step, uint16_t *out, float *x,
                            const void *residual, const int32_t *rows, int32_t n_rows)
{
    const mil_norm_args args = {
        .out = out,
        .x = x,
        .residual = residual,
        .weight = norm->weight,
        .rows = rows,
        .n_rows = n_rows,
        .hidden = norm->hidden,
        .eps = norm->eps,
    };
    return step->context->backend->norm(step->context, &args);
}
