/* packed_bytes, pack, lora packs, linear, shrink, expand, linear_lora, gate_up_act. */
#include "shim.h"

/* A merged weight as Python holds it. */
typedef struct shim_weight {
    int32_t N, K, n_parts, part_rows[MIL_MAX_PARTS], interleave;
    void *panels;
    float *bias;
} shim_weight;

/* One adapter of one linear, packed: [n_parts] of each. */
typedef struct shim_adapter {
    int32_t rank[MIL_MAX_PARTS];
    float scale[MIL_MAX_PARTS];
    void *a[MIL_MAX_PARTS];
    void *b[MIL_MAX_PARTS];
} shim_adapter;

#define MAX_ADAPTERS 16

/* Segments over one linear; v: [n_lora_rows, n_parts * part_stride]. */
typedef struct shim_segments {
    int32_t n_tokens, n_segments, n_adapters;
    int32_t *indptr, *adapter, *rows;
    const shim_adapter *adapters;
    float *v;
    int32_t part_stride;
} shim_segments;

SHIM int64_t shim_packed_bytes(shim *s, int32_t N, int32_t K);
SHIM int64_t shim_lora_bytes(shim *s, bool is_b, int32_t rank, int32_t size);
SHIM void shim_pack(shim *s, const shim_weight *weight, int32_t part, int32_t row, int32_t n_rows,
                    const void *src, int32_t dtype, int64_t stride);
SHIM void shim_lora_pack(shim *s, bool is_b, void *packed, const uint16_t *src, int32_t rank,
                         int32_t size);
SHIM mil_status shim_linear(shim *s, float *y, const uint16_t *x, const shim_weight *weight,
                            int32_t M, int64_t ldy, int64_t ldx);
SHIM mil_status shim_linear_lora(shim *s, float *y, const uint16_t *x, const shim_weight *weight,
                                 const shim_segments *segments, bool is_fused);
SHIM mil_status shim_gate_up_act(shim *s, uint16_t *out, float *y, const uint16_t *x,
                                 const shim_weight *weight, const shim_segments *segments);

static mil_weight view_weight(const shim_weight *from)
{
    mil_weight weight = {.format = MIL_WEIGHT_BF16_PANELS,
                         .N = from->N,
                         .K = from->K,
                         .n_parts = from->n_parts,
                         .interleave = from->interleave,
                         .data = from->panels,
                         .bias = from->bias};
    for (int32_t i = 0; i < from->n_parts; i++)
        weight.part_rows[i] = from->part_rows[i];
    return weight;
}

int64_t shim_packed_bytes(shim *s, int32_t N, int32_t K)
{
    return (int64_t)s->context.backend->packed_bytes(N, K);
}

int64_t shim_lora_bytes(shim *s, bool is_b, int32_t rank, int32_t size)
{
    const mil_backend *backend = s->context.backend;
    return (int64_t)(is_b ? backend->lora_b_bytes(size, rank) : backend->lora_a_bytes(rank, size));
}

void shim_pack(shim *s, const shim_weight *from, int32_t part, int32_t row, int32_t n_rows,
               const void *src, int32_t dtype, int64_t stride)
{
    mil_weight weight = view_weight(from);
    s->context.backend->pack(&weight, part, row, n_rows, src, (mil_dtype)dtype, stride);
}

void shim_lora_pack(shim *s, bool is_b, void *packed, const uint16_t *src, int32_t rank,
                    int32_t size)
{
    if (is_b)
        s->context.backend->lora_pack_b(packed, src, rank, size, rank);
    else
        s->context.backend->lora_pack_a(packed, src, size, rank, size);
}

mil_status shim_linear(shim *s, float *y, const uint16_t *x, const shim_weight *from, int32_t M,
                       int64_t ldy, int64_t ldx)
{
    mil_weight weight = view_weight(from);
    mil_linear_args args = {y, x, &weight, MIL_DTYPE_F32, M, ldy, ldx};
    MIL_TRY(shim_enter(s));
    return shim_leave(s, s->context.backend->linear(&s->context, &args));
}

typedef struct viewed {
    mil_weight weight;
    mil_lora_module modules[MAX_ADAPTERS * MIL_N_PROJECTIONS];
    mil_lora_table table;
    mil_plan_header header;
    mil_batch batch;
    mil_linear_args linear;
    mil_lora_args lora;
} viewed;

static void view(viewed *to, float *y, const uint16_t *x, const shim_weight *weight,
                 const shim_segments *from)
{
    int32_t multiple = 16, n_parts = weight->n_parts;
    *to = (viewed){.weight = view_weight(weight)};
    for (int32_t slot = 0; slot < from->n_adapters; slot++) {
        const shim_adapter *adapter = &from->adapters[slot];
        for (int32_t part = 0; part < n_parts; part++) {
            int32_t rank = adapter->rank[part];
            to->modules[slot * MIL_N_PROJECTIONS + part] =
                (mil_lora_module){.rank = rank,
                                  .padded_rank = (rank + multiple - 1) / multiple * multiple,
                                  .in = weight->K,
                                  .out = weight->part_rows[part],
                                  .scale = adapter->scale[part],
                                  .a = adapter->a[part],
                                  .b = adapter->b[part]};
        }
    }
    to->table = (mil_lora_table){from->n_adapters, 1, to->modules};
    to->header = (mil_plan_header){.n_tokens = from->n_tokens,
                                   .n_segments = from->n_segments,
                                   .n_lora_rows = from->indptr[from->n_segments]};
    to->batch = (mil_batch){.header = &to->header,
                            .counts = &to->header,
                            .segment_indptr = from->indptr,
                            .segment_adapter = from->adapter,
                            .lora_rows = from->rows};
    to->linear =
        (mil_linear_args){y, x, &to->weight, MIL_DTYPE_F32, from->n_tokens, weight->N, weight->K};
    to->lora = (mil_lora_args){.batch = &to->batch,
                               .table = &to->table,
                               .n_parts = n_parts,
                               .projections = {0, 1, 2},
                               .v = from->v,
                               .v_stride = (int64_t)from->part_stride * n_parts,
                               .v_part_stride = from->part_stride};
}

static mil_status run_plain(mil_context *context, viewed *it)
{
    const mil_backend *backend = context->backend;
    mil_lora_shrink_args shrink = {it->lora, it->linear.x, it->linear.ldx};
    mil_lora_expand_args expand = {it->lora, it->linear.y, it->linear.ldy, &it->weight};
    MIL_TRY(backend->lora_shrink(context, &shrink));
    MIL_TRY(backend->linear(context, &it->linear));
    return backend->lora_expand(context, &expand);
}

mil_status shim_linear_lora(shim *s, float *y, const uint16_t *x, const shim_weight *weight,
                            const shim_segments *segments, bool is_fused)
{
    viewed it;
    view(&it, y, x, weight, segments);
    MIL_TRY(shim_enter(s));
    return shim_leave(s, is_fused
                             ? s->context.backend->linear_lora(&s->context, &it.linear, &it.lora)
                             : run_plain(&s->context, &it));
}

mil_status shim_gate_up_act(shim *s, uint16_t *out, float *y, const uint16_t *x,
                            const shim_weight *weight, const shim_segments *segments)
{
    viewed it;
    view(&it, y, x, weight, segments);
    mil_act_args act = {.out = out,
                        .gate_up = y,
                        .n_tokens = segments->n_tokens,
                        .ffn = weight->N / 2,
                        .interleave = weight->interleave};
    MIL_TRY(shim_enter(s));
    return shim_leave(s, s->context.backend->gate_up_act(&s->context, &it.linear, &it.lora, &act));
}
