#include "layers/layer.h"

void *mil_arena_take(mil_arena *arena, size_t n, size_t item_bytes)
{
    size_t n_bytes;
    size_t begin;
    size_t end;
    if (!mil_add(arena->used, MIL_ALIGN - 1, &begin) || !mil_mul(n, item_bytes, &n_bytes) ||
        !mil_add(begin / MIL_ALIGN * MIL_ALIGN, n_bytes, &end)) {
        arena->used = SIZE_MAX;
        return NULL;
    }
    arena->used = end;
    return arena->data != NULL ? arena->data + begin / MIL_ALIGN * MIL_ALIGN : NULL;
}

void mil_arena_take_weight(mil_arena *arena, const mil_backend *backend, mil_weight *weight)
{
    weight->format = backend->weight_format;
    weight->data = mil_arena_take(arena, backend->packed_bytes(weight->N, weight->K), 1);
}

/* The loader counts two bytes for each element, whatever the file holds. */
#define PROGRESS_BYTES 2

mil_status mil_walk_weight(mil_walk *walk, mil_weight *weight, int32_t part, const char *name,
                           const mil_slice *slice)
{
    if (walk->loader != NULL)
        return mil_loader_weight(walk->loader, weight, part, name, slice);
    mil_source_tensor tensor;
    MIL_TRY(mil_source_find(walk->source, name, slice->full_rows, slice->full_cols, &tensor));
    walk->n_bytes += (uint64_t)slice->n_rows * (uint64_t)slice->n_cols * PROGRESS_BYTES;
    return MIL_OK;
}

mil_status mil_walk_vector(mil_walk *walk, float *out, const char *name, int64_t length,
                           int64_t begin, int64_t n)
{
    if (walk->loader != NULL)
        return mil_loader_vector(walk->loader, out, name, length, begin, n);
    mil_source_tensor tensor;
    MIL_TRY(mil_source_find(walk->source, name, length, 1, &tensor));
    walk->n_bytes += (uint64_t)n * PROGRESS_BYTES;
    return MIL_OK;
}

mil_status mil_step_all_reduce(const mil_step *step, void *data, int64_t n)
{
    return step->comm != NULL ? step->comm->ops->all_reduce(step->comm, data, n) : MIL_OK;
}

const mil_lora_args *mil_step_lora(const mil_step *step, mil_lora_args *storage, int32_t layer,
                                   const mil_projection *projections, int32_t n_parts)
{
    if (step->lora_rank == 0)
        return NULL;
    *storage = (mil_lora_args){
        .batch = step->batch,
        .table = step->lora,
        .layer = layer,
        .n_parts = n_parts,
        .v = step->lora_v,
        .v_stride = (int64_t)n_parts * step->lora_rank,
        .v_part_stride = step->lora_rank,
    };
    for (int32_t part = 0; part < n_parts; part++)
        storage->projections[part] = projections[part];
    return storage;
}
