/* packed_bytes, pack, pack_dummy, lora packs, linear, shrink, expand, linear_lora, gate_up_act. */
#include "ops/ops.h"
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

#define MAX_ADAPTERS 128
#define LATE_BYTES ((size_t)64 << 20) /* written N_LATE times: 1 GiB in all */
#define N_LATE 16

/* Segments over one linear; v: [n_lora_rows, n_parts * part_stride]. */
typedef struct shim_segments {
    int32_t n_tokens, n_segments, n_adapters;
    int32_t *indptr, *adapter, *rows;
    const shim_adapter *adapters;
    float *v;
    int32_t part_stride;
} shim_segments;

/* What of a product and its LoRA to run. */
enum { RUN_PLAIN = 0, RUN_COMPOSED, RUN_SHRINK, RUN_EXPAND };

SHIM int64_t shim_packed_bytes(shim *s, int32_t N, int32_t K);
SHIM int64_t shim_lora_bytes(shim *s, bool is_b, int32_t rank, int32_t size);
SHIM void shim_pack(shim *s, const shim_weight *weight, int32_t part, int32_t row, int32_t n_rows,
                    const void *src, int32_t dtype, int64_t stride);
SHIM mil_status shim_pack_dummy(shim *s, const shim_weight *weight, int32_t part, int32_t row,
                                int32_t n_rows, uint64_t stream, uint64_t begin, int64_t stride);
SHIM void shim_lora_pack(shim *s, bool is_b, void *packed, const uint16_t *src, int32_t rank,
                         int32_t size);
SHIM mil_status shim_linear(shim *s, void *y, const uint16_t *x, const shim_weight *weight,
                            int32_t y_dtype, int32_t M, int32_t n_last, int64_t ldy, int64_t ldx);
SHIM mil_status shim_linear_lora(shim *s, void *y, const uint16_t *x, const shim_weight *weight,
                                 const shim_segments *segments, int32_t what);
SHIM mil_status shim_linear_lora_late(shim *s, void *y, uint16_t word, const shim_weight *weight,
                                      const shim_segments *segments);
SHIM mil_status shim_gate_up_act(shim *s, uint16_t *out, void *y, const uint16_t *x,
                                 const shim_weight *weight, const shim_segments *segments);

/* The weight as Python holds it, in host memory. */
static mil_weight view_weight(const shim *s, const shim_weight *from)
{
    mil_weight weight = {.format = s->context.backend->weight_format,
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

static mil_weight lend_weight(shim *s, const shim_weight *from)
{
    mil_weight weight = view_weight(s, from);
    size_t n_bytes = s->context.backend->packed_bytes(from->N, from->K);
    weight.data = shim_lend(s, from->panels, n_bytes, SHIM_IN);
    weight.bias = shim_lend(s, from->bias, (size_t)from->N * sizeof(float), SHIM_IN);
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
    mil_weight weight = view_weight(s, from);
    (void)s->context.backend->pack(s->context.queue, &weight, part, row, n_rows,
                                   (void *)(uintptr_t)src, (mil_dtype)dtype, stride);
}

/* Rows of a GPU's weight. They are made on the calling thread's stream, not the queue's. */
mil_status shim_pack_dummy(shim *s, const shim_weight *from, int32_t part, int32_t row,
                           int32_t n_rows, uint64_t stream, uint64_t begin, int64_t stride)
{
    const mil_backend *backend = s->context.backend;
    mil_weight weight = view_weight(s, from);
    size_t n_bytes = backend->packed_bytes(from->N, from->K);
    weight.data = shim_lend(s, from->panels, n_bytes, SHIM_BOTH);
    MIL_TRY(shim_enter(s));
    mil_status status = backend->device->synchronize(s->context.queue);
    if (status == MIL_OK)
        status = backend->pack_dummy(s->context.queue, &weight, part, row, n_rows, stream, begin,
                                     stride);
    return shim_leave(s, status);
}

void shim_lora_pack(shim *s, bool is_b, void *packed, const uint16_t *src, int32_t rank,
                    int32_t size)
{
    if (is_b)
        s->context.backend->lora_pack_b(packed, src, rank, size, rank);
    else
        s->context.backend->lora_pack_a(packed, src, size, rank, size);
}

/* The host's y has the last n_last rows of M. */
mil_status shim_linear(shim *s, void *y, const uint16_t *x, const shim_weight *from,
                       int32_t y_dtype, int32_t M, int32_t n_last, int64_t ldy, int64_t ldx)
{
    mil_weight weight = lend_weight(s, from);
    size_t row_bytes = (size_t)ldy * mil_dtype_bytes((mil_dtype)y_dtype);
    shim_shape shape = {.n_rows = (size_t)n_last,
                        .row_bytes = row_bytes,
                        .first_bytes = (size_t)(M - n_last) * row_bytes,
                        .stride_bytes = row_bytes,
                        .n_bytes = (size_t)M * row_bytes};
    mil_linear_args args = {
        .y = shim_lend_shaped(s, y, shape, SHIM_BOTH),
        .x = shim_lend(s, x, (size_t)(M * ldx) * sizeof *x, SHIM_IN),
        .weight = &weight,
        .y_dtype = (mil_dtype)y_dtype,
        .M = M,
        .ldy = ldy,
        .ldx = ldx,
    };
    MIL_TRY(shim_enter(s));
    return shim_leave(s, s->context.backend->linear(&s->context, &args));
}

/* ---- LoRA ---- */

typedef struct viewed {
    mil_weight weight;
    mil_lora_module modules[MAX_ADAPTERS * MIL_N_PROJECTIONS];
    mil_lora_table table;
    shim_step step;
    mil_linear_args linear;
    mil_lora_args lora;
} viewed;

static mil_lora_module lend_module(shim *s, const shim_weight *weight, const shim_adapter *adapter,
                                   int32_t part)
{
    const mil_backend *backend = s->context.backend;
    int32_t rank = adapter->rank[part], out = weight->part_rows[part];
    size_t multiple = (size_t)backend->lora_rank_multiple;
    if (rank == 0)
        return (mil_lora_module){.in = weight->K, .out = out};
    return (mil_lora_module){
        .rank = rank,
        .padded_rank = (int32_t)mil_round_up((size_t)rank, multiple),
        .in = weight->K,
        .out = out,
        .scale = adapter->scale[part],
        .a = shim_lend(s, adapter->a[part], backend->lora_a_bytes(rank, weight->K), SHIM_IN),
        .b = shim_lend(s, adapter->b[part], backend->lora_b_bytes(out, rank), SHIM_IN),
    };
}

static void view(shim *s, viewed *to, void *y, const uint16_t *x, const shim_weight *weight,
                 const shim_segments *from)
{
    int32_t n_parts = weight->n_parts;
    size_t T = (size_t)from->n_tokens;
    *to = (viewed){.weight = lend_weight(s, weight)};
    for (int32_t slot = 0; slot < from->n_adapters; slot++)
        for (int32_t part = 0; part < n_parts; part++)
            to->modules[slot * MIL_N_PROJECTIONS + part] =
                lend_module(s, weight, &from->adapters[slot], part);
    to->table = (mil_lora_table){
        .n_slots = from->n_adapters,
        .n_layers = 1,
        .modules = shim_lend(s, to->modules, sizeof to->modules, SHIM_IN),
    };
    const shim_batch batch = {.n_tokens = from->n_tokens};
    const shim_extras extras = {
        .n_segments = from->n_segments,
        .n_adapters = from->n_adapters,
        .segment_indptr = from->indptr,
        .segment_adapter = from->adapter,
        .lora_rows = from->rows,
    };
    shim_lend_batch(s, &to->step, &batch, &extras, false);
    to->linear = (mil_linear_args){
        .y = shim_lend(s, y, T * (size_t)weight->N * shim_product_bytes(s), SHIM_BOTH),
        .x = shim_lend(s, x, T * (size_t)weight->K * sizeof *x, x != NULL ? SHIM_IN : 0),
        .weight = &to->weight,
        .y_dtype = s->context.backend->product_dtype,
        .M = from->n_tokens,
        .ldy = weight->N,
        .ldx = weight->K,
    };
    int64_t v_stride = (int64_t)from->part_stride * n_parts;
    size_t n_rows = (size_t)from->indptr[from->n_segments];
    to->lora = (mil_lora_args){
        .batch = &to->step.batch,
        .table = &to->table,
        .n_parts = n_parts,
        .projections = {0, 1, 2},
        .v = shim_lend(s, from->v, n_rows * (size_t)v_stride * sizeof(float), SHIM_BOTH),
        .v_stride = v_stride,
        .v_part_stride = from->part_stride,
    };
}

static mil_status run(mil_context *context, viewed *it, int32_t what)
{
    const mil_backend *backend = context->backend;
    mil_lora_shrink_args shrink = {it->lora, it->linear.x, it->linear.ldx};
    mil_lora_expand_args expand = {it->lora, it->linear.y, it->linear.ldy, &it->weight};
    if (what == RUN_COMPOSED)
        return mil_ops_linear_lora(context, &it->linear, &it->lora);
    if (what == RUN_PLAIN || what == RUN_SHRINK)
        MIL_TRY(backend->lora_shrink(context, &shrink));
    if (what == RUN_PLAIN)
        MIL_TRY(backend->linear(context, &it->linear));
    return what == RUN_SHRINK ? MIL_OK : backend->lora_expand(context, &expand);
}

mil_status shim_linear_lora(shim *s, void *y, const uint16_t *x, const shim_weight *weight,
                            const shim_segments *segments, int32_t what)
{
    viewed it;
    view(s, &it, y, x, weight, segments);
    MIL_TRY(shim_enter(s));
    return shim_leave(s, run(&s->context, &it, what));
}

/* What the queue runs first: far more than the host needs to queue the rest. */
static mil_status write_late(shim *s, void *scratch, const mil_linear_args *linear, uint16_t word)
{
    const mil_device *device = s->context.backend->device;
    size_t n = (size_t)linear->M * (size_t)linear->ldx;
    for (int32_t i = 0; i < N_LATE; i++)
        MIL_TRY(device->fill_16(s->context.queue, scratch, 0, LATE_BYTES / 2));
    return device->fill_16(s->context.queue, (void *)(uintptr_t)linear->x, word, n);
}

/* As layers call it, right behind what writes x: every element is `word` then, and was NaN. */
mil_status shim_linear_lora_late(shim *s, void *y, uint16_t word, const shim_weight *weight,
                                 const shim_segments *segments)
{
    viewed it;
    view(s, &it, y, NULL, weight, segments);
    void *scratch = shim_take(s, LATE_BYTES);
    MIL_TRY(shim_enter(s));
    mil_status status = write_late(s, scratch, &it.linear, word);
    if (status == MIL_OK)
        status = run(&s->context, &it, RUN_COMPOSED);
    return shim_leave(s, status);
}

mil_status shim_gate_up_act(shim *s, uint16_t *out, void *y, const uint16_t *x,
                            const shim_weight *weight, const shim_segments *segments)
{
    viewed it;
    view(s, &it, y, x, weight, segments);
    size_t n = (size_t)segments->n_tokens * (size_t)(weight->N / 2);
    mil_act_args act = {.out = shim_lend(s, out, n * sizeof *out, SHIM_BACK),
                        .gate_up = it.linear.y,
                        .n_tokens = segments->n_tokens,
                        .ffn = weight->N / 2,
                        .interleave = weight->interleave};
    MIL_TRY(shim_enter(s));
    return shim_leave(s, mil_ops_gate_up_act(&s->context, &it.linear, &it.lora, &act));
}
