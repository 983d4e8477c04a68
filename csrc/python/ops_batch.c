/* The ops over a batch: rope, rope_and_cache, attention. The batch's arrays are the caller's;
 * its counts follow from their shapes. */
#include "python/ops.h"

#include "python/call.h"

#define MAX_HEAD_DIM 256

/* ---- a batch of sequences ---- */

typedef struct batch_operands {
    mil_operand *page_table, *query_indptr, *kv_lengths, *positions;
    mil_operand *k_cache, *v_cache;
    int32_t n_tokens, n_positions; /* n_positions: rows of cos and sin */
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
    mil_op_expect_entry(call, "query_indptr", 0, indptr[0], 0, 0);
    for (int32_t s = 0; s < S && call->status == MIL_OK; s++) {
        mil_op_expect_entry(call, "query_indptr", s + 1, indptr[s + 1], indptr[s], o->n_tokens);
        mil_op_expect_entry(call, "kv_lengths", s, lengths[s], (int64_t)indptr[s + 1] - indptr[s],
                            most);
    }
    mil_op_expect_entry(call, "query_indptr", S, indptr[S], o->n_tokens, o->n_tokens);
}

static void check_pages(mil_op_call *call, const batch_operands *o)
{
    const int32_t *lengths = (const int32_t *)o->kv_lengths->data;
    const int32_t *pages = (const int32_t *)o->page_table->data;
    int32_t max_pages = o->page_table->shape[1], page_size = o->k_cache->shape[2];
    for (int32_t s = 0; s < o->kv_lengths->shape[0]; s++, pages += max_pages)
        for (int32_t i = 0; (int64_t)i * page_size < lengths[s] && call->status == MIL_OK; i++)
            if (pages[i] < 0 || pages[i] >= o->k_cache->shape[0])
                call->status =
                    mil_fail(MIL_ERR_ARGUMENT, "%s: page_table[%d][%d] is %d, expected 0 to %d",
                             call->op, s, i, pages[i], o->k_cache->shape[0] - 1);
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

/* Of the pages, and so of the q beside them. */
static mil_dtype dtype_of(const batch_operands *o)
{
    const bool is_f16 = o->k_cache != NULL && o->k_cache->dtype == MIL_DTYPE_F16;
    return is_f16 ? MIL_DTYPE_F16 : MIL_DTYPE_BF16;
}

static void expect_batch(mil_op_call *call, const batch_operands *o)
{
    mil_dtype dtype = dtype_of(o);
    mil_op_expect_either(call, o->k_cache, MIL_DTYPE_BF16, MIL_DTYPE_F16,
                         MIL_SHAPE(MIL_ANY, MIL_ANY, MIL_ANY, MIL_ANY));
    int32_t n_pages = mil_op_size(o->k_cache, 0), K = mil_op_size(o->k_cache, 1);
    int32_t P = mil_op_size(o->k_cache, 2), D = mil_op_size(o->k_cache, 3);
    mil_op_expect(call, o->v_cache, dtype, MIL_SHAPE(n_pages, K, P, D));
    mil_op_expect_in(call, "k_cache's pages", n_pages, 1, INT32_MAX);
    mil_op_expect_in(call, "k_cache's heads", K, 1, INT32_MAX);
    mil_op_expect_in(call, "k_cache's page size", P, 16, MIL_MAX_PAGE_SIZE);
    mil_op_expect_in(call, "k_cache's head size", D, 8, MAX_HEAD_DIM);
    if (call->status == MIL_OK && ((P & (P - 1)) != 0 || D % 8 != 0))
        call->status =
            mil_fail(MIL_ERR_ARGUMENT,
                     "%s: k_cache has pages of %d rows and heads of %d, expected a power "
                     "of two and a multiple of 8",
                     call->op, P, D);
    int32_t S = mil_op_size(o->kv_lengths, 0);
    mil_op_expect_in(call, "the number of sequences", S, o->n_tokens > 0, INT32_MAX);
    mil_op_expect(call, o->kv_lengths, MIL_DTYPE_I32, MIL_SHAPE(S));
    mil_op_expect(call, o->query_indptr, MIL_DTYPE_I32, MIL_SHAPE(S < INT32_MAX ? S + 1 : S));
    mil_op_expect(call, o->page_table, MIL_DTYPE_I32, MIL_SHAPE(S, MIL_ANY));
    mil_op_expect_in(call, "page_table's columns", mil_op_size(o->page_table, 1), o->n_tokens > 0,
                     INT32_MAX);
    if (!mil_op_can_look(call))
        return;
    check_lengths(call, o);
    check_pages(call, o);
}

/* Keys that a row of the page table has pages for. */
static int32_t most_keys_of(const batch_operands *o)
{
    int64_t n = (int64_t)o->page_table->shape[1] * o->k_cache->shape[2];
    return n < INT32_MAX / 2 ? (int32_t)n : INT32_MAX / 2;
}

static int32_t *lend_positions(mil_op_call *call, const batch_operands *o, mil_borrow_fill *fill)
{
    return mil_op_lend_indices(call, o->positions, &fill->indices[1], o->n_positions - 1, 0);
}

static void lend_batch(mil_op_call *call, lent_batch *to, const batch_operands *o)
{
    int32_t S = o->kv_lengths->shape[0], T = o->n_tokens;
    const mil_operand *k = o->k_cache;
    int32_t most_keys = most_keys_of(o);
    mil_borrow_fill *fill = &to->fill;
    to->fill = (mil_borrow_fill){
        .counts =
            {.n_seqs = S, .n_tokens = T, .bucket_seqs = S, .bucket_tokens = T, .bucket_chunks = S},
        .to = mil_op_temporary(call, sizeof(mil_plan_header)),
        .iota = mil_op_temporary(call, (size_t)S * sizeof(int32_t)),
        .n_iota = S,
    };
    to->batch = (mil_batch){
        .header = &to->fill.counts,
        .counts = to->fill.to,
        .seq_slot = to->fill.iota,
        .query_indptr = mil_op_lend_starts(call, o->query_indptr, &fill->starts, T),
        .kv_lengths = mil_op_lend_indices(call, o->kv_lengths, &fill->indices[0], most_keys, -1),
        .positions = lend_positions(call, o, fill),
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
        .dtype = dtype_of(o),
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
        .out_dtype = dtype_of(&o->batch),
        .batch = &lent.batch,
        .slots = &lent.slots,
        .kv = &lent.kv,
        .n_heads = N,
        .scale = o->scale,
        .window = o->window,
        .softcap = o->softcap,
    };
    mil_op_size_workspace(call, (mil_maxima){.max_tokens = T,
                                             .max_seqs = S,
                                             .max_position = most_keys_of(&o->batch),
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
    mil_op_expect(&call, o.q, dtype_of(&o.batch),
                  MIL_SHAPE(MIL_ANY, MIL_ANY, mil_op_size(o.batch.k_cache, 3)));
    mil_op_expect_in(&call, "q's heads", N, 1, INT32_MAX);
    if (call.status == MIL_OK && N % K != 0)
        call.status =
            mil_fail(MIL_ERR_ARGUMENT, "%s: q has %d heads, expected a multiple of k_cache's %d",
                     call.op, N, K);
    mil_op_expect(&call, o.out, dtype_of(&o.batch),
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
        .counts =
            {.n_seqs = 1, .n_tokens = T, .bucket_seqs = 1, .bucket_tokens = T, .bucket_chunks = 1},
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
        .positions = lend_positions(call, &o->batch, &to->fill),
    };
    to->slots = (mil_slots){.n_slots = 1, .max_pages = 1, .page_table = few + 4};
    to->kv =
        (mil_kv){.n_pages = 1, .page_size = T, .head_dim = o->head_dim, .dtype = MIL_DTYPE_BF16};
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

static void expect_angles(mil_op_call *call, rope_operands *o)
{
    mil_op_expect(call, o->cos, MIL_DTYPE_F32, MIL_SHAPE(MIL_ANY, MIL_ANY));
    int32_t n = mil_op_size(o->cos, 0), half = mil_op_size(o->cos, 1);
    mil_op_expect(call, o->sin, MIL_DTYPE_F32, MIL_SHAPE(n, half));
    mil_op_expect_in(call, "cos' columns", half, 1, o->head_dim / 2);
    mil_op_expect_in(call, "cos' rows", n, mil_op_size(o->in, 0) > 0, INT32_MAX);
    o->batch.n_positions = n;
    mil_op_expect(call, o->batch.positions, MIL_DTYPE_I32, MIL_SHAPE(mil_op_size(o->in, 0)));
    if (!mil_op_can_look(call))
        return;
    const int32_t *positions = (const int32_t *)o->batch.positions->data;
    for (int32_t t = 0; t < o->in->shape[0] && call->status == MIL_OK; t++)
        mil_op_expect_entry(call, "positions", t, positions[t], 0, (int64_t)n - 1);
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
    mil_op_expect_in(&call, "x's heads", o.n_heads, 1, INT32_MAX / 2 / MAX_HEAD_DIM);
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
    mil_op_expect(&call, o.out, dtype_of(&o.batch),
                  MIL_SHAPE(o.batch.n_tokens, MIL_ANY, o.head_dim));
    mil_op_expect_in(&call, "out's heads", o.n_heads, 1, INT32_MAX / 2 / MAX_HEAD_DIM);
    mil_op_expect_in(&call, "k_cache's heads", K, 1, INT32_MAX / 8 / MAX_HEAD_DIM);
    if (call.status == MIL_OK)
        mil_op_expect_product(&call, o.in,
                              MIL_SHAPE(o.batch.n_tokens, (o.n_heads + 2 * K) * o.head_dim));
    expect_angles(&call, &o);
    return mil_op_run(&call, run_rope, &o);
}
