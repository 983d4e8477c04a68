/* The ops over a batch: rope, rope_and_cache, attention, lora. The batch's arrays are the caller's;
 * its counts follow from their shapes. */
#include "python/ops.h"

#include "python/call.h"

#define MAX_HEAD_DIM 256

/* ---- a batch of sequences ---- */

typedef struct batch_operands {
    mil_operand *page_table, *query_indptr, *kv_lengths, *positions;
    mil_operand *k_cache, *v_cache;
    int32_t n_tokens;
} batch_operands;

/* A batch where ops read it; the pointers of one go to the others. */
typedef struct lent_batch {
    mil_borrow_fill fill;
    mil_batch batch;
    mil_slots slots;
    mil_kv kv;
} lent_batch;

static void check_lengths(mil_op_call *call, const batch_operands *o)
{
    const int32_t *indptr = (const int32_t *)o->query_indptr->data;
    const int32_t *lengths = (const int32_t *)o->kv_lengths->data;
    int32_t S = o->kv_lengths->shape[0];
    int64_t most = (int64_t)o->page_table->shape[1] * o->k_cache->shape[2];
    mil_op_expect_in(call, "query_indptr[0]", indptr[0], 0, 0);
    for (int32_t s = 0; s < S && call->status == MIL_OK; s++) {
        mil_op_expect_in(call, "an entry of query_indptr", indptr[s + 1], indptr[s], o->n_tokens);
        mil_op_expect_in(call, "an entry of kv_lengths", lengths[s],
                         (int64_t)indptr[s + 1] - indptr[s], most);
    }
    mil_op_expect_in(call, "the last entry of query_indptr", indptr[S], o->n_tokens, o->n_tokens);
}

static void check_pages(mil_op_call *call, const batch_operands *o)
{
    const int32_t *lengths = (const int32_t *)o->kv_lengths->data;
    const int32_t *pages = (const int32_t *)o->page_table->data;
    int32_t max_pages = o->page_table->shape[1], page_size = o->k_cache->shape[2];
    for (int32_t s = 0; s < o->kv_lengths->shape[0]; s++, pages += max_pages)
        for (int32_t i = 0; (int64_t)i * page_size < lengths[s] && call->status == MIL_OK; i++)
            mil_op_expect_in(call, "a page in use", pages[i], 0, (int64_t)o->k_cache->shape[0] - 1);
}

static void take_batch(mil_op_call *call, batch_operands *o, PyObject *const objects[5],
                       bool writes_cache)
{
    mil_operand *(*take)(mil_op_call *, const char *, PyObject *) =
        writes_cache ? mil_op_take_written : mil_op_take;
    o->k_cache = take(call, "k_cache", objects[0]);
    o->v_cache = take(call, "v_cache", objects[1]);
    o->page_table = mil_op_take_indices(call, "page_table", objects[2]);
    o->query_indptr = mil_op_take_indices(call, "query_indptr", objects[3]);
    o->kv_lengths = mil_op_take_indices(call, "kv_lengths", objects[4]);
}

static void expect_batch(mil_op_call *call, const batch_operands *o)
{
    mil_op_expect(call, o->k_cache, MIL_DTYPE_BF16, MIL_SHAPE(MIL_ANY, MIL_ANY, MIL_ANY, MIL_ANY));
    int32_t n_pages = mil_op_size(o->k_cache, 0), K = mil_op_size(o->k_cache, 1);
    int32_t P = mil_op_size(o->k_cache, 2), D = mil_op_size(o->k_cache, 3);
    mil_op_expect(call, o->v_cache, MIL_DTYPE_BF16, MIL_SHAPE(n_pages, K, P, D));
    mil_op_expect_in(call, "k_cache's pages", n_pages, 1, INT32_MAX);
    mil_op_expect_in(call, "k_cache's heads", K, 1, INT32_MAX);
    mil_op_expect_in(call, "k_cache's page size", P, 16, MAX_HEAD_DIM);
    mil_op_expect_in(call, "k_cache's head size", D, 8, MAX_HEAD_DIM);
    if (call->status == MIL_OK && ((P & (P - 1)) != 0 || D % 8 != 0))
        call->status =
            mil_fail(MIL_ERR_ARGUMENT,
                     "%s: k_cache has pages of %d rows and heads of %d, expected a power "
                     "of two and a multiple of 8",
                     call->op, P, D);
    int32_t S = mil_op_size(o->kv_lengths, 0);
    mil_op_expect(call, o->kv_lengths, MIL_DTYPE_I32, MIL_SHAPE(S));
    mil_op_expect(call, o->query_indptr, MIL_DTYPE_I32, MIL_SHAPE(S < INT32_MAX ? S + 1 : S));
    mil_op_expect(call, o->page_table, MIL_DTYPE_I32, MIL_SHAPE(S, MIL_ANY));
    if (call->status != MIL_OK || o->kv_lengths->is_cuda)
        return;
    check_lengths(call, o);
    check_pages(call, o);
}

static void lend_batch(mil_op_call *call, lent_batch *to, const batch_operands *o)
{
    int32_t S = o->kv_lengths->shape[0];
    const mil_operand *k = o->k_cache;
    to->fill = (mil_borrow_fill){
        .counts = {.n_seqs = S,
                   .n_tokens = o->n_tokens,
                   .bucket_seqs = S,
                   .bucket_tokens = o->n_tokens},
        .to = mil_op_temporary(call, sizeof(mil_plan_header)),
        .iota = mil_op_temporary(call, (size_t)S * sizeof(int32_t)),
        .n_iota = S,
    };
    to->batch = (mil_batch){
        .header = &to->fill.counts,
        .counts = to->fill.to,
        .seq_slot = to->fill.iota,
        .query_indptr = mil_op_lend(call, o->query_indptr),
        .kv_lengths = mil_op_lend(call, o->kv_lengths),
        .positions = mil_op_lend(call, o->positions),
    };
    to->slots = (mil_slots){
        .n_slots = S,
        .max_pages = o->page_table->shape[1],
        .page_table = mil_op_lend(call, o->page_table),
    };
    to->kv = (mil_kv){
        .k = mil_op_lend(call, o->k_cache),
        .v = mil_op_lend(call, o->v_cache),
        .layer_elements = (int64_t)(k->n_bytes / sizeof(uint16_t)),
        .n_pages = k->shape[0],
        .n_kv_heads = k->shape[1],
        .page_size = k->shape[2],
        .head_dim = k->shape[3],
    };
    if (call->status == MIL_OK)
        call->status = call->place->borrow->fill(call->context->queue, &to->fill);
}

/* ---- attention ---- */

typedef struct attention_operands {
    mil_operand *out, *q;
    batch_operands batch;
    float scale, softcap;
    int32_t window;
} attention_operands;

static void run_attention(mil_op_call *call, void *argument)
{
    const attention_operands *o = argument;
    const mil_backend *backend = call->context->backend;
    int32_t T = o->q->shape[0], N = o->q->shape[1], S = o->batch.kv_lengths->shape[0];
    if (T == 0)
        return;
    lent_batch lent;
    lend_batch(call, &lent, &o->batch);
    mil_attention_args args = {
        .out = mil_op_lend(call, o->out),
        .q = mil_op_lend(call, o->q),
        .batch = &lent.batch,
        .slots = &lent.slots,
        .kv = &lent.kv,
        .n_heads = N,
        .scale = o->scale,
        .window = o->window,
        .softcap = o->softcap,
    };
    int64_t most = (int64_t)lent.slots.max_pages * lent.kv.page_size;
    mil_op_size_workspace(
        call, (mil_maxima){.max_tokens = T,
                           .max_seqs = S,
                           .max_position = most < INT32_MAX / 2 ? (int32_t)most : INT32_MAX / 2,
                           .n_heads = N,
                           .n_kv_heads = lent.kv.n_kv_heads,
                           .head_dim = lent.kv.head_dim,
                           .page_size = lent.kv.page_size,
                           .max_pages_per_seq = lent.slots.max_pages});
    const mil_begin_args begin = {
        .batch = &lent.batch, .slots = &lent.slots, .kv = &lent.kv, .n_heads = N};
    if (call->status == MIL_OK)
        call->status = call->place->borrow->plan_attention(call->context, &begin);
    if (call->status == MIL_OK)
        call->status = backend->attention(call->context, &args);
}

PyObject *mil_py_op_attention(PyObject *module, PyObject *args)
{
    mil_op_call call = {.op = "attention", .state = PyModule_GetState(module)};
    PyObject *out, *q, *batch[5];
    attention_operands o = {0};
    if (!PyArg_ParseTuple(args, "zKOOOOOOOfif:op_attention", &call.device, &call.stream, &out, &q,
                          &batch[0], &batch[1], &batch[2], &batch[3], &batch[4], &o.scale,
                          &o.window, &o.softcap))
        return NULL;
    o.q = mil_op_take(&call, "q", q);
    o.out = mil_op_take_written(&call, "out", out);
    take_batch(&call, &o.batch, batch, false);
    o.batch.n_tokens = mil_op_size(o.q, 0);
    expect_batch(&call, &o.batch);
    int32_t N = mil_op_size(o.q, 1), K = mil_op_size(o.batch.k_cache, 1);
    mil_op_expect(&call, o.q, MIL_DTYPE_BF16,
                  MIL_SHAPE(MIL_ANY, MIL_ANY, mil_op_size(o.batch.k_cache, 3)));
    mil_op_expect_in(&call, "q's heads", N, 1, INT32_MAX);
    if (call.status == MIL_OK && N % K != 0)
        call.status =
            mil_fail(MIL_ERR_ARGUMENT, "%s: q has %d heads, expected a multiple of k_cache's %d",
                     call.op, N, K);
    mil_op_expect(&call, o.out, MIL_DTYPE_BF16,
                  MIL_SHAPE(o.batch.n_tokens, N, mil_op_size(o.q, 2)));
    mil_op_expect_in(&call, "window", o.window, 0, INT32_MAX);
    return mil_op_run(&call, run_attention, &o);
}

/* ---- rope ---- */

typedef struct rope_operands {
    mil_operand *out, *in, *cos, *sin;
    batch_operands batch; /* without pages: positions alone */
    int32_t n_heads, head_dim;
    int is_interleaved;
} rope_operands;

/* One sequence that has no kv heads, in one page as long as itself: k and v are nothing. */
static void lend_no_pages(mil_op_call *call, lent_batch *to, const rope_operands *o)
{
    int32_t T = o->in->shape[0];
    to->fill = (mil_borrow_fill){
        .counts = {.n_seqs = 1, .n_tokens = T, .bucket_seqs = 1, .bucket_tokens = T},
        .to = mil_op_temporary(call, sizeof(mil_plan_header)),
        .few = {0, T, T, 0, 0}, /* query_indptr, kv_lengths, seq_slot, page_table */
        .few_to = mil_op_temporary(call, MIL_BORROW_FEW * sizeof(int32_t)),
    };
    int32_t *few = to->fill.few_to;
    if (call->status != MIL_OK)
        return;
    to->batch = (mil_batch){
        .header = &to->fill.counts,
        .counts = to->fill.to,
        .query_indptr = few,
        .kv_lengths = few + 2,
        .seq_slot = few + 3,
        .positions = mil_op_lend(call, o->batch.positions),
    };
    to->slots = (mil_slots){.n_slots = 1, .max_pages = 1, .page_table = few + 4};
    to->kv = (mil_kv){.n_pages = 1, .page_size = T, .head_dim = o->head_dim};
    if (call->status == MIL_OK)
        call->status = call->place->borrow->fill(call->context->queue, &to->fill);
}

static void run_rope(mil_op_call *call, void *argument)
{
    const rope_operands *o = argument;
    if (o->in->shape[0] == 0)
        return;
    lent_batch lent;
    if (o->batch.k_cache != NULL)
        lend_batch(call, &lent, &o->batch);
    else
        lend_no_pages(call, &lent, o);
    mil_rope_write_args args = {
        .q = mil_op_lend(call, o->out),
        .qkv = mil_op_lend_product(call, o->in),
        .cos_table = mil_op_lend(call, o->cos),
        .sin_table = mil_op_lend(call, o->sin),
        .batch = &lent.batch,
        .slots = &lent.slots,
        .kv = &lent.kv,
        .n_heads = o->n_heads,
        .rotary_dim = 2 * o->cos->shape[1],
        .is_interleaved = o->is_interleaved,
    };
    if (call->status == MIL_OK)
        call->status = call->context->backend->rope_write(call->context, &args);
}

static void expect_angles(mil_op_call *call, const rope_operands *o)
{
    mil_op_expect(call, o->cos, MIL_DTYPE_F32, MIL_SHAPE(MIL_ANY, MIL_ANY));
    int32_t n = mil_op_size(o->cos, 0), half = mil_op_size(o->cos, 1);
    mil_op_expect(call, o->sin, MIL_DTYPE_F32, MIL_SHAPE(n, half));
    mil_op_expect_in(call, "cos' columns", half, 1, o->head_dim / 2);
    mil_op_expect(call, o->batch.positions, MIL_DTYPE_I32, MIL_SHAPE(mil_op_size(o->in, 0)));
    if (call->status != MIL_OK || o->batch.positions->is_cuda)
        return;
    const int32_t *positions = (const int32_t *)o->batch.positions->data;
    for (int32_t t = 0; t < o->in->shape[0] && call->status == MIL_OK; t++)
        mil_op_expect_in(call, "an entry of positions", positions[t], 0, (int64_t)n - 1);
}

PyObject *mil_py_op_rope(PyObject *module, PyObject *args)
{
    mil_op_call call = {.op = "rope", .state = PyModule_GetState(module)};
    PyObject *out, *x, *positions, *cos, *sin;
    rope_operands o = {0};
    if (!PyArg_ParseTuple(args, "zKOOOOOp:op_rope", &call.device, &call.stream, &out, &x,
                          &positions, &cos, &sin, &o.is_interleaved))
        return NULL;
    o.in = mil_op_take(&call, "x", x);
    o.out = mil_op_take_written(&call, "out", out);
    o.batch.positions = mil_op_take_indices(&call, "positions", positions);
    o.cos = mil_op_take(&call, "cos", cos);
    o.sin = mil_op_take(&call, "sin", sin);
    o.n_heads = mil_op_size(o.in, 1);
    o.head_dim = mil_op_size(o.in, 2);
    mil_op_expect_product(&call, o.in, MIL_SHAPE(MIL_ANY, MIL_ANY, MIL_ANY));
    mil_op_expect_in(&call, "x's heads", o.n_heads, 1, INT32_MAX);
    mil_op_expect_in(&call, "x's head size", o.head_dim, 2, MAX_HEAD_DIM);
    mil_op_expect(&call, o.out, MIL_DTYPE_BF16,
                  MIL_SHAPE(mil_op_size(o.in, 0), o.n_heads, o.head_dim));
    expect_angles(&call, &o);
    return mil_op_run(&call, run_rope, &o);
}

PyObject *mil_py_op_rope_and_cache(PyObject *module, PyObject *args)
{
    mil_op_call call = {.op = "rope_and_cache", .state = PyModule_GetState(module)};
    PyObject *out, *qkv, *positions, *cos, *sin, *batch[5];
    rope_operands o = {0};
    if (!PyArg_ParseTuple(args, "zKOOOOOOOOOOp:op_rope_and_cache", &call.device, &call.stream, &out,
                          &qkv, &positions, &cos, &sin, &batch[0], &batch[1], &batch[2], &batch[3],
                          &batch[4], &o.is_interleaved))
        return NULL;
    o.in = mil_op_take(&call, "qkv", qkv);
    o.out = mil_op_take_written(&call, "out", out);
    o.batch.positions = mil_op_take_indices(&call, "positions", positions);
    o.cos = mil_op_take(&call, "cos", cos);
    o.sin = mil_op_take(&call, "sin", sin);
    take_batch(&call, &o.batch, batch, true);
    o.batch.n_tokens = mil_op_size(o.in, 0);
    expect_batch(&call, &o.batch);
    int32_t K = mil_op_size(o.batch.k_cache, 1);
    o.head_dim = mil_op_size(o.batch.k_cache, 3);
    o.n_heads = mil_op_size(o.out, 1);
    mil_op_expect(&call, o.out, MIL_DTYPE_BF16, MIL_SHAPE(o.batch.n_tokens, MIL_ANY, o.head_dim));
    mil_op_expect_in(&call, "out's heads", o.n_heads, 1, INT32_MAX / 2 / MAX_HEAD_DIM);
    mil_op_expect_in(&call, "k_cache's heads", K, 1, INT32_MAX / 8 / MAX_HEAD_DIM);
    if (call.status == MIL_OK)
        mil_op_expect_product(&call, o.in,
                              MIL_SHAPE(o.batch.n_tokens, (o.n_heads + 2 * K) * o.head_dim));
    expect_angles(&call, &o);
    return mil_op_run(&call, run_rope, &o);
}

/* ---- lora ---- */

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
    mil_op_expect_in(call, "segment_indptr[0]", indptr[0], 0, 0);
    for (int32_t g = 0; g < G && call->status == MIL_OK; g++) {
        mil_op_expect_in(call, "an entry of segment_indptr", indptr[g + 1], indptr[g], o->n_rows);
        mil_op_expect_in(call, "an entry of segment_adapter", adapter[g], 0,
                         (int64_t)o->n_adapters - 1);
    }
    mil_op_expect_in(call, "the last entry of segment_indptr", indptr[G], o->n_rows, o->n_rows);
    for (int32_t i = 0; i < o->n_rows && call->status == MIL_OK; i++)
        mil_op_expect_in(call, "an entry of rows", rows[i], 0, (int64_t)o->n_tokens - 1);
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
    int32_t G = o->adapter->shape[0];
    /* A launch has room for one tile part full of each slot: segments may be more than adapters. */
    int32_t n_slots = G > o->n_adapters ? G : o->n_adapters;
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
                   .bucket_segments = G},
        .to = mil_op_temporary(call, sizeof(mil_plan_header)),
    };
    to->batch = (mil_batch){
        .header = &to->fill.counts,
        .counts = to->fill.to,
        .segment_indptr = mil_op_lend(call, o->indptr),
        .segment_adapter = mil_op_lend(call, o->adapter),
        .lora_rows = mil_op_lend(call, o->rows),
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
    if (call->status == MIL_OK && !o->rows->is_cuda)
        check_segments(call, o);
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
