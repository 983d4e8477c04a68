#include "layers/embedding.h"

void mil_embedding_place(mil_embedding *embedding, mil_arena *arena, const mil_backend *backend,
                         const mil_shard *shard)
{
    *embedding = (mil_embedding){.vocab_begin = shard->vocab_begin};
    mil_weight *weight = &embedding->weight;
    weight->n_parts = 1;
    weight->N = weight->part_rows[0] = shard->vocab;
    weight->K = (int32_t)shard->embedding.full_cols;
    mil_arena_take_weight(arena, backend, weight);
}

mil_status mil_embedding_load(mil_embedding *embedding, mil_walk *walk, const char *name)
{
    /* A rank beyond the vocabulary's end has nothing to load, but its check costs nothing. */
    if (embedding->weight.N == 0 && walk->loader != NULL)
        return MIL_OK;
    return mil_walk_weight(walk, &embedding->weight, 0, name, &walk->shard->embedding);
}

mil_status mil_embedding_forward(const mil_embedding *embedding, const mil_step *step, float *x,
                                 const int32_t *tokens)
{
    const mil_embed_args args = {
        .out = x,
        .tokens = tokens,
        .weight = &embedding->weight,
        .n_tokens = mil_step_tokens(step),
        .vocab_begin = embedding->vocab_begin,
        .scale = 1.0f,
    };
    MIL_TRY(step->context->backend->embed(step->context, &args));
    return mil_step_all_reduce(step, x, (int64_t)args.n_tokens * embedding->weight.K);
}
