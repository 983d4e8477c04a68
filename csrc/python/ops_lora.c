/* lora, lora_shrink, lora_expand: segments of rows, adapters of one rank stacked in one array. */
#include "python/ops.h"

#include "python/call.h"

#include "base/memory.h"

#include <math.h>

#define MAX_RANK 512

enum { LORA_SHRINK = 1, LORA_EXPAND = 2, LORA_BOTH = 3 };

/* x, a: of shrink; y, b: of expand; v: [n_rows, R], the result of one and an input of the other. */
typedef struct lora_operands {
    mil_operand *x, *a, *v, *b, *y, *indptr, *adapter, *rows, *scales;
    float scale;
    int32_t what;
    int32_t n_adapters, rank, n_rows, in, out, n_tokens;
} lora_operands;

static void check_segments(mil_op_call *call, const lora_operands *o)
{
    const int32_t *indptr = (const int32_t *)o->indptr->data;
    const int32_t *adapter = (const int32_t *)o->adapter->data;
    const int32_t *rows = (const int32_t *)o->rows->data;
    int32_t G = o->adapter->shape[0];
    mil_op_expect_entry(call, "segment_indptr", 0, indptr[0], 0, 0);
    for (int32_t g = 0; g < G && call->status == MIL_OK; g++) {
        mil_op_expect_entry(call, "segment_indptr", g + 1, indptr[g + 1], indptr[g], o->n_rows);
        mil_op_expect_entry(call, "segment_adapter", g, adapter[g], 0, (int64_t)o->n_adapters - 1);
    }
    mil_op_expect_entry(call, "segment_indptr", G, indptr[G], o->n_rows, o->n_rows);
    for (int32_t i = 0; i < o->n_rows && call->status == MIL_OK; i++)
        mil_op_expect_entry(call, "rows", i, rows[i], 0, (int64_t)o->n_tokens - 1);
}

/* Rows of y that are added to twice at once: a sum would be lost. A bit for each row of y. */
static void check_distinct(mil_op_call *call, const lora_operands *o)
{
    const int32_t *rows = (const int32_t *)o->rows->data;
    uint32_t *seen;
    if (call->status == MIL_OK)
        call->status = mil_alloc_checked((void **)&seen, (size_t)o->n_tokens / 32 + 1, sizeof *seen,
                                         "rows that were seen");
    if (call->status != MIL_OK)
        return;
    for (int32_t i = 0; i < o->n_rows && call->status == MIL_OK; i++) {
        uint32_t bit = UINT32_C(1) << rows[i] % 32;
        if (seen[rows[i] / 32] & bit)
            call->status = mil_fail(MIL_ERR_ARGUMENT,
                                    "%s: rows[%d] is %d as one before it, expected distinct rows",
                                    call->op, i, rows[i]);
        seen[rows[i] / 32] |= bit;
    }
    mil_free(seen);
}

static void check_scales(mil_op_call *call, const mil_operand *scales)
{
    for (int32_t i = 0; scales != NULL && i < scales->shape[0] && call->status == MIL_OK; i++) {
        double scale = (double)((const float *)scales->data)[i];
        if (!isfinite(scale))
            call->status = mil_fail(MIL_ERR_ARGUMENT, "%s: scale[%d] is %g, expected a finite one",
                                    call->op, i, scale);
    }
}

/* All adapters of a stacked operand as the backend wants them; *step_bytes from one to the next. */
static const void *pack_adapters(mil_op_call *call, const lora_operands *o, bool is_b,
                                 size_t *step_bytes)
{
    const mil_backend *backend = call->context->backend;
    const mil_operand *from = is_b ? o->b : o->a;
    int32_t R = o->rank, width = is_b ? o->out : o->in;
    if (from == NULL || call->status != MIL_OK)
        return NULL;
    *step_bytes = (size_t)R * (size_t)width * sizeof(uint16_t);
    if (backend->weight_format == MIL_WEIGHT_BF16_ROWS)
        return mil_op_lend(call, from);
    size_t plain_bytes = *step_bytes;
    *step_bytes = mil_round_up(
        is_b ? backend->lora_b_bytes(width, R) : backend->lora_a_bytes(R, width), MIL_ALIGN);
    char *packed = mil_op_temporary(call, *step_bytes * (size_t)o->n_adapters);
    for (int32_t i = 0; i < o->n_adapters && call->status == MIL_OK; i++) {
        char *to = packed + (size_t)i * *step_bytes;
        const uint16_t *rows = (const uint16_t *)(from->data + (size_t)i * plain_bytes);
        if (is_b)
            backend->lora_pack_b(to, rows, R, width, R);
        else
            backend->lora_pack_a(to, rows, width, R, width);
    }
    return packed;
}

typedef struct lent_lora {
    mil_borrow_fill fill;
    mil_borrow_modules modules;
    mil_borrow_v v;
    mil_batch batch;
    mil_lora_table table;
    mil_weight weight;
    mil_lora_args args;
} lent_lora;

static void lend_modules(mil_op_call *call, lent_lora *to, const lora_operands *o)
{
    const mil_backend *backend = call->context->backend;
    int32_t n_slots = o->n_adapters + 1; /* past the adapters is a slot that is none */
    size_t n_bytes = (size_t)n_slots * MIL_N_PROJECTIONS * sizeof(mil_lora_module);
    to->modules = (mil_borrow_modules){
        .to = mil_op_temporary(call, n_bytes),
        .n_slots = n_slots,
        .n_adapters = o->n_adapters,
        .first = {.rank = o->rank,
                  .padded_rank =
                      (int32_t)mil_round_up((size_t)o->rank, (size_t)backend->lora_rank_multiple),
                  .in = o->what == LORA_EXPAND ? 1 : o->in,
                  .out = o->out,
                  .scale = o->scale},
        .scales = mil_op_lend(call, o->scales),
    };
    to->modules.first.a = pack_adapters(call, o, false, &to->modules.a_bytes);
    to->modules.first.b = pack_adapters(call, o, true, &to->modules.b_bytes);
    to->table = (mil_lora_table){.n_slots = n_slots, .n_layers = 1, .modules = to->modules.to};
}

static void lend_segments(mil_op_call *call, lent_lora *to, const lora_operands *o)
{
    const mil_backend *backend = call->context->backend;
    int32_t G = o->adapter->shape[0], T = o->n_tokens, padded = to->modules.first.padded_rank;
    int32_t stride = backend->lora_v_rank > 0 ? backend->lora_v_rank : padded;
    to->fill = (mil_borrow_fill){
        .counts = {.n_tokens = T,
                   .n_segments = G,
                   .n_lora_rows = o->n_rows,
                   .bucket_tokens = T,
                   .bucket_segments = G,
                   .bucket_lora_rows = o->n_rows},
        .to = mil_op_temporary(call, sizeof(mil_plan_header)),
    };
    to->batch = (mil_batch){
        .header = &to->fill.counts,
        .counts = to->fill.to,
        .segment_indptr = mil_op_lend_starts(call, o->indptr, &to->fill.starts, o->n_rows),
        .segment_adapter = mil_op_lend_indices(call, o->adapter, &to->fill.indices[0],
                                               o->n_adapters - 1, o->n_adapters),
        .lora_rows = mil_op_lend_indices(call, o->rows, &to->fill.indices[1], T - 1, -1),
    };
    to->v = (mil_borrow_v){
        .v = mil_op_temporary(call, (size_t)o->n_rows * (size_t)stride * sizeof(float)),
        .v_stride = stride,
        .plain = mil_op_lend(call, o->v),
        .n_rows = o->n_rows,
        .rank = o->rank,
        .padded_rank = padded,
        .in = to->modules.first.in,
        .n_segments = G,
        .segment_indptr = to->batch.segment_indptr,
        .segment_adapter = to->batch.segment_adapter,
        .modules = to->modules.to,
    };
    to->weight = (mil_weight){.format = backend->weight_format,
                              .N = o->out,
                              .K = o->in,
                              .n_parts = 1,
                              .part_rows = {o->out}};
    to->args = (mil_lora_args){.batch = &to->batch,
                               .table = &to->table,
                               .n_parts = 1,
                               .v = to->v.v,
                               .v_stride = stride,
                               .v_part_stride = stride};
}

static mil_status queue_lora(mil_op_call *call, const lent_lora *lent, const lora_operands *o,
                             const uint16_t *x, void *y)
{
    const mil_backend *backend = call->context->backend;
    const mil_borrow *borrow = call->place->borrow;
    struct mil_queue *queue = call->context->queue;
    const mil_lora_shrink_args shrink = {lent->args, x, o->in};
    const mil_lora_expand_args expand = {lent->args, y, o->out, &lent->weight};
    MIL_TRY(borrow->fill(queue, &lent->fill));
    MIL_TRY(borrow->write_modules(queue, &lent->modules));
    if (o->what == LORA_EXPAND)
        MIL_TRY(borrow->spread_v(queue, &lent->v));
    if (o->what & LORA_SHRINK)
        MIL_TRY(backend->lora_shrink(call->context, &shrink));
    if (o->what == LORA_SHRINK)
        MIL_TRY(borrow->gather_v(queue, &lent->v));
    return o->what & LORA_EXPAND ? backend->lora_expand(call->context, &expand) : MIL_OK;
}

static void run_lora(mil_op_call *call, void *argument)
{
    const lora_operands *o = argument;
    int32_t multiple = call->context->backend->weight_format == MIL_WEIGHT_BF16_ROWS
                           ? call->context->backend->lora_rank_multiple
                           : 1;
    if (o->rank % multiple != 0) {
        call->status = mil_fail(MIL_ERR_ARGUMENT, "%s: the rank is %d, expected a multiple of %d",
                                call->op, o->rank, multiple);
        return;
    }
    if (o->n_rows == 0 || o->adapter->shape[0] == 0)
        return;
    lent_lora lent;
    lend_modules(call, &lent, o);
    lend_segments(call, &lent, o);
    const uint16_t *x = mil_op_lend(call, o->x);
    void *y = mil_op_lend_product(call, o->y);
    int32_t widest = o->in > o->out ? o->in : o->out;
    mil_op_size_workspace(call, (mil_maxima){.max_tokens = o->n_tokens, .hidden = widest});
    if (call->status == MIL_OK)
        call->status = queue_lora(call, &lent, o, x, y);
}

static void expect_lora(mil_op_call *call, lora_operands *o)
{
    const mil_operand *adapters = o->a != NULL ? o->a : o->b;
    o->n_adapters = mil_op_size(adapters, 0);
    o->rank = o->a != NULL ? mil_op_size(o->a, 1) : mil_op_size(o->b, 2);
    o->in = o->x != NULL ? mil_op_size(o->x, 1) : 1;
    o->out = o->y != NULL ? mil_op_size(o->y, 1) : 1;
    o->n_tokens = mil_op_size(o->x != NULL ? o->x : o->y, 0);
    o->n_rows = mil_op_size(o->rows, 0);
    mil_op_expect(call, o->x, MIL_DTYPE_BF16, MIL_SHAPE(MIL_ANY, MIL_ANY));
    mil_op_expect_product(call, o->y, MIL_SHAPE(o->n_tokens, MIL_ANY));
    mil_op_expect_in(call, "the row length", o->in < o->out ? o->in : o->out, 1, INT32_MAX);
    mil_op_expect(call, o->a, MIL_DTYPE_BF16, MIL_SHAPE(MIL_ANY, MIL_ANY, o->in));
    mil_op_expect(call, o->b, MIL_DTYPE_BF16, MIL_SHAPE(o->n_adapters, o->out, o->rank));
    mil_op_expect_in(call, "the number of adapters", o->n_adapters, 1, INT32_MAX / 16);
    mil_op_expect_in(call, "the rank", o->rank, 1, MAX_RANK);
    int32_t G = mil_op_size(o->adapter, 0);
    mil_op_expect_in(call, "the number of segments", G, 0, INT32_MAX / 16);
    mil_op_expect(call, o->adapter, MIL_DTYPE_I32, MIL_SHAPE(MIL_ANY));
    mil_op_expect(call, o->indptr, MIL_DTYPE_I32, MIL_SHAPE(G + 1));
    mil_op_expect(call, o->rows, MIL_DTYPE_I32, MIL_SHAPE(MIL_ANY));
    mil_op_expect_in(call, "the number of rows", o->n_rows, 0, o->n_tokens);
    mil_op_expect(call, o->v, MIL_DTYPE_F32, MIL_SHAPE(o->n_rows, o->rank));
    mil_op_expect(call, o->scales, MIL_DTYPE_F32, MIL_SHAPE(o->n_adapters));
    if (mil_op_can_look(call)) {
        check_segments(call, o);
        if (o->what & LORA_EXPAND)
            check_distinct(call, o);
        check_scales(call, o->scales);
    }
}

PyObject *mil_py_op_lora(PyObject *module, PyObject *args)
{
    mil_op_call call = {.state = PyModule_GetState(module)};
    PyObject *x, *a, *v, *b, *y, *indptr, *adapter, *rows, *scales;
    lora_operands o = {0};
    if (!PyArg_ParseTuple(args, "zKOOOOOOOOOf:op_lora", &call.device, &call.stream, &y, &x, &a, &v,
                          &b, &indptr, &adapter, &rows, &scales, &o.scale))
        return NULL;
    o.what = (x != Py_None ? LORA_SHRINK : 0) | (y != Py_None ? LORA_EXPAND : 0);
    call.op = o.what == LORA_SHRINK   ? "lora_shrink"
              : o.what == LORA_EXPAND ? "lora_expand"
                                      : "lora";
    if (o.what == 0)
        call.status = mil_fail(MIL_ERR_ARGUMENT, "lora: found neither x nor y, expected one");
    if (o.what & LORA_SHRINK) {
        o.x = mil_op_take(&call, "x", x);
        o.a = mil_op_take(&call, "a", a);
    }
    if (o.what & LORA_EXPAND) {
        o.y = mil_op_take_written(&call, "y", y);
        o.b = mil_op_take(&call, "b", b);
    }
    if (o.what != LORA_BOTH)
        o.v = o.what == LORA_SHRINK ? mil_op_take_written(&call, "out", v)
                                    : mil_op_take(&call, "v", v);
    o.indptr = mil_op_take_indices(&call, "segment_indptr", indptr);
    o.adapter = mil_op_take_indices(&call, "segment_adapter", adapter);
    o.rows = mil_op_take_indices(&call, "rows", rows);
    o.scales = mil_op_take_optional(&call, "scale", scales);
    expect_lora(&call, &o);
    return mil_op_run(&call, run_lora, &o);
}
