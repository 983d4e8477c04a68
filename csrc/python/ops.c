/* The ops that need no batch: rms_norm, silu_and_mul, linear, embedding, sample. */
#include "python/ops.h"

#include "python/call.h"

#define MAX_VOCAB (1 << 24) /* what a row of sample's workspace is made for */

PyObject *mil_py_dlpack_stream(PyObject *module, PyObject *args)
{
    PyObject *exchange_api;
    int device_type, device_id;
    void *stream = NULL;
    (void)module;
    if (!PyArg_ParseTuple(args, "Oii:dlpack_stream", &exchange_api, &device_type, &device_id))
        return NULL;
    int found = mil_dlpack_stream(&stream, exchange_api, device_type, device_id);
    if (found == 0)
        Py_RETURN_NONE;
    return found < 0 ? NULL : PyLong_FromVoidPtr(stream);
}

/* ---- rms_norm ---- */

typedef struct norm_operands {
    mil_operand *out, *x, *weight, *residual;
    float eps;
} norm_operands;

static void run_norm(mil_op_call *call, void *argument)
{
    const norm_operands *o = argument;
    mil_norm_args args = {
        .out = mil_op_lend(call, o->out),
        .x = mil_op_lend(call, o->x),
        .residual = mil_op_lend_product(call, o->residual),
        .weight = mil_op_lend(call, o->weight),
        .n_rows = o->x->shape[0],
        .hidden = o->x->shape[1],
        .eps = o->eps,
    };
    if (call->status == MIL_OK)
        call->status = call->context->backend->norm(call->context, &args);
}

PyObject *mil_py_op_rms_norm(PyObject *module, PyObject *args)
{
    mil_op_call call = {.op = "rms_norm", .state = PyModule_GetState(module)};
    PyObject *out, *x, *weight, *residual;
    norm_operands o;
    if (!PyArg_ParseTuple(args, "zKOOOOf:op_rms_norm", &call.device, &call.stream, &out, &x,
                          &weight, &residual, &o.eps))
        return NULL;
    o.x = residual != Py_None ? mil_op_take_written(&call, "x", x) : mil_op_take(&call, "x", x);
    o.out = mil_op_take_written(&call, "out", out);
    o.weight = mil_op_take(&call, "weight", weight);
    o.residual = mil_op_take_optional(&call, "residual", residual);
    mil_op_expect(&call, o.x, MIL_DTYPE_F32, MIL_SHAPE(MIL_ANY, MIL_ANY));
    int32_t T = mil_op_size(o.x, 0), H = mil_op_size(o.x, 1);
    mil_op_expect_in(&call, "x's row length", H, 1, INT32_MAX);
    mil_op_expect(&call, o.weight, MIL_DTYPE_F32, MIL_SHAPE(H));
    mil_op_expect_product(&call, o.residual, MIL_SHAPE(T, H));
    mil_op_expect(&call, o.out, MIL_DTYPE_BF16, MIL_SHAPE(T, H));
    return mil_op_run(&call, run_norm, &o);
}

/* ---- silu_and_mul ---- */

typedef struct act_operands {
    mil_operand *out, *gate_up;
    int32_t interleave;
} act_operands;

static void run_act(mil_op_call *call, void *argument)
{
    const act_operands *o = argument;
    mil_act_args args = {
        .out = mil_op_lend(call, o->out),
        .gate_up = mil_op_lend_product(call, o->gate_up),
        .n_tokens = o->out->shape[0],
        .ffn = o->out->shape[1],
        .interleave = o->interleave,
        .kind = MIL_ACTIVATION_SILU,
    };
    if (call->status == MIL_OK)
        call->status = call->context->backend->act(call->context, &args);
}

PyObject *mil_py_op_silu_and_mul(PyObject *module, PyObject *args)
{
    mil_op_call call = {.op = "silu_and_mul", .state = PyModule_GetState(module)};
    PyObject *out, *gate_up;
    act_operands o;
    if (!PyArg_ParseTuple(args, "zKOOi:op_silu_and_mul", &call.device, &call.stream, &out, &gate_up,
                          &o.interleave))
        return NULL;
    o.gate_up = mil_op_take(&call, "gate_up", gate_up);
    o.out = mil_op_take_written(&call, "out", out);
    mil_op_expect_product(&call, o.gate_up, MIL_SHAPE(MIL_ANY, MIL_ANY));
    int32_t T = mil_op_size(o.gate_up, 0), F = mil_op_size(o.gate_up, 1) / 2;
    if (call.status == MIL_OK && F * 2 != mil_op_size(o.gate_up, 1))
        call.status =
            mil_fail(MIL_ERR_ARGUMENT, "%s: gate_up has %d columns, expected an even number",
                     call.op, mil_op_size(o.gate_up, 1));
    mil_op_expect_in(&call, "gate_up's half", F, 1, INT32_MAX);
    mil_op_expect_in(&call, "interleave", o.interleave, 0, F);
    if (call.status == MIL_OK && o.interleave > 0 && F % o.interleave != 0)
        call.status = mil_fail(MIL_ERR_ARGUMENT, "%s: interleave is %d, expected a divisor of %d",
                               call.op, o.interleave, F);
    mil_op_expect(&call, o.out, MIL_DTYPE_BF16, MIL_SHAPE(T, F));
    return mil_op_run(&call, run_act, &o);
}

/* ---- linear ---- */

typedef struct linear_operands {
    mil_operand *out, *x, *weight, *bias;
    int is_deterministic;
} linear_operands;

/* The weight as the backend wants it: in place where that is rows of bfloat16, else packed now. */
static mil_weight pack(mil_op_call *call, const mil_operand *rows)
{
    const mil_backend *backend = call->context->backend;
    mil_weight weight = {.format = backend->weight_format,
                         .N = rows->shape[0],
                         .K = rows->shape[1],
                         .n_parts = 1,
                         .part_rows = {rows->shape[0]}};
    if (backend->weight_format == MIL_WEIGHT_BF16_ROWS) {
        weight.data = mil_op_lend(call, rows);
        return weight;
    }
    weight.data = mil_op_temporary(call, backend->packed_bytes(weight.N, weight.K));
    if (call->status == MIL_OK)
        call->status = backend->pack(call->context->queue, &weight, 0, 0, weight.N, rows->data,
                                     MIL_DTYPE_BF16, weight.K);
    return weight;
}

static void run_linear(mil_op_call *call, void *argument)
{
    const linear_operands *o = argument;
    bool is_wide = o->out->dtype == MIL_DTYPE_F32;
    mil_weight weight = pack(call, o->weight);
    int32_t M = o->x->shape[0];
    weight.bias = mil_op_lend(call, o->bias);
    mil_linear_args args = {
        .y = is_wide ? mil_op_lend(call, o->out) : mil_op_lend_product(call, o->out),
        .x = mil_op_lend(call, o->x),
        .weight = &weight,
        .y_dtype = is_wide ? MIL_DTYPE_F32 : call->context->backend->product_dtype,
        .M = M,
        .ldy = weight.N,
        .ldx = weight.K,
    };
    int32_t widest = weight.N > weight.K ? weight.N : weight.K;
    mil_op_size_workspace(call, (mil_maxima){.max_tokens = M, .hidden = widest});
    call->context->is_deterministic = o->is_deterministic;
    if (call->status == MIL_OK && M > 0)
        call->status = call->context->backend->linear(call->context, &args);
}

PyObject *mil_py_op_linear(PyObject *module, PyObject *args)
{
    mil_op_call call = {.op = "linear", .state = PyModule_GetState(module)};
    PyObject *out, *x, *weight, *bias;
    linear_operands o;
    if (!PyArg_ParseTuple(args, "zKOOOOp:op_linear", &call.device, &call.stream, &out, &x, &weight,
                          &bias, &o.is_deterministic))
        return NULL;
    o.x = mil_op_take(&call, "x", x);
    o.out = mil_op_take_written(&call, "out", out);
    o.weight = mil_op_take(&call, "weight", weight);
    o.bias = mil_op_take_optional(&call, "bias", bias);
    mil_op_expect(&call, o.x, MIL_DTYPE_BF16, MIL_SHAPE(MIL_ANY, MIL_ANY));
    int32_t M = mil_op_size(o.x, 0), K = mil_op_size(o.x, 1), N = mil_op_size(o.weight, 0);
    mil_op_expect(&call, o.weight, MIL_DTYPE_BF16, MIL_SHAPE(MIL_ANY, K));
    mil_op_expect_in(&call, "weight's rows", N, 1, INT32_MAX);
    mil_op_expect_in(&call, "weight's columns", K, 1, INT32_MAX);
    mil_op_expect(&call, o.bias, MIL_DTYPE_F32, MIL_SHAPE(N));
    mil_op_expect_either(&call, o.out, MIL_DTYPE_F32, MIL_DTYPE_BF16, MIL_SHAPE(M, N));
    return mil_op_run(&call, run_linear, &o);
}

/* ---- embedding ---- */

typedef struct embed_operands {
    mil_operand *out, *tokens, *weight;
} embed_operands;

static void run_embed(mil_op_call *call, void *argument)
{
    const embed_operands *o = argument;
    mil_weight weight = pack(call, o->weight);
    mil_embed_args args = {
        .out = mil_op_lend(call, o->out),
        .tokens = mil_op_lend(call, o->tokens),
        .weight = &weight,
        .n_tokens = o->tokens->shape[0],
        .scale = 1.0f,
    };
    if (call->status == MIL_OK)
        call->status = call->context->backend->embed(call->context, &args);
}

PyObject *mil_py_op_embedding(PyObject *module, PyObject *args)
{
    mil_op_call call = {.op = "embedding", .state = PyModule_GetState(module)};
    PyObject *out, *tokens, *weight;
    embed_operands o;
    if (!PyArg_ParseTuple(args, "zKOOO:op_embedding", &call.device, &call.stream, &out, &tokens,
                          &weight))
        return NULL;
    o.tokens = mil_op_take_indices(&call, "tokens", tokens);
    o.out = mil_op_take_written(&call, "out", out);
    o.weight = mil_op_take(&call, "weight", weight);
    mil_op_expect(&call, o.tokens, MIL_DTYPE_I32, MIL_SHAPE(MIL_ANY));
    mil_op_expect(&call, o.weight, MIL_DTYPE_BF16, MIL_SHAPE(MIL_ANY, MIL_ANY));
    mil_op_expect_in(&call, "weight's rows", mil_op_size(o.weight, 0), 1, INT32_MAX);
    mil_op_expect_in(&call, "weight's columns", mil_op_size(o.weight, 1), 1, INT32_MAX);
    mil_op_expect(&call, o.out, MIL_DTYPE_F32,
                  MIL_SHAPE(mil_op_size(o.tokens, 0), mil_op_size(o.weight, 1)));
    return mil_op_run(&call, run_embed, &o);
}

/* ---- sample ---- */

#define SAMPLING_WORDS ((int32_t)(sizeof(mil_sampling) / sizeof(int32_t)))

typedef struct sample_operands {
    mil_operand *out, *logits, *params, *positions;
    mil_operand *logprobs, *ranks, *top_tokens, *top_logprobs; /* NULL: the token alone */
} sample_operands;

static mil_status check_choice(const mil_op_call *call, int32_t row, const mil_sampling *it)
{
    if (!(it->temperature >= 0.0f && it->temperature <= 1e30f))
        return mil_fail(MIL_ERR_ARGUMENT,
                        "%s: row %d of params has temperature %g, expected 0 to 1e30", call->op,
                        row, (double)it->temperature);
    if (it->top_k < 0)
        return mil_fail(MIL_ERR_ARGUMENT, "%s: row %d of params has top_k %d, expected 0 or more",
                        call->op, row, it->top_k);
    if (!(it->top_p > 0.0f && it->top_p <= 1.0f))
        return mil_fail(MIL_ERR_ARGUMENT,
                        "%s: row %d of params has top_p %g, expected above 0, up to 1", call->op,
                        row, (double)it->top_p);
    return MIL_OK;
}

static void check_params(mil_op_call *call, const mil_operand *params)
{
    const mil_sampling *sampling = (const mil_sampling *)params->data;
    for (int32_t i = 0; i < params->shape[0] && call->status == MIL_OK; i++)
        if (sampling[i].n_logprobs < -1 || sampling[i].n_logprobs > MIL_MAX_LOGPROBS)
            call->status = mil_fail(MIL_ERR_ARGUMENT,
                                    "%s: row %d of params has n_logprobs %d, expected -1 to %d",
                                    call->op, i, sampling[i].n_logprobs, MIL_MAX_LOGPROBS);
    for (int32_t i = 0; i < params->shape[0] && call->status == MIL_OK; i++)
        call->status = check_choice(call, i, &sampling[i]);
}

/* What the samples tell beside the token. */
static void tell(mil_op_call *call, const sample_operands *o, const mil_borrow_samples *samples)
{
    if (o->logprobs != NULL && call->status == MIL_OK)
        call->status = call->place->borrow->tell_samples(call->context->queue, samples);
}

static void run_sample(mil_op_call *call, void *argument)
{
    const sample_operands *o = argument;
    const mil_backend *backend = call->context->backend;
    int32_t n = o->logits->shape[0], V = o->logits->shape[1];
    if (backend->max_vocab > 0)
        mil_op_expect_in(call, "logits' columns", V, 1, backend->max_vocab);
    mil_borrow_fill fill = {
        .counts = {.n_logit_rows = n, .bucket_logit_rows = n},
        .to = mil_op_temporary(call, sizeof(mil_plan_header)),
        .iota = mil_op_temporary(call, (size_t)n * sizeof(int32_t)),
        .ones = mil_op_temporary(call, (size_t)n * sizeof(int32_t)),
        .n_iota = n,
        .n_ones = n,
    };
    const mil_batch batch = {
        .header = &fill.counts,
        .counts = fill.to,
        .logit_slots = fill.iota,
        .logit_feeds = fill.ones,
        .logit_positions = mil_op_lend(call, o->positions),
    };
    mil_slots slots = {
        .n_slots = n,
        .last_token = mil_op_lend(call, o->out),
        .sampling = mil_op_lend(call, o->params),
    };
    mil_sample_args args = {
        .out = mil_op_temporary(call, (size_t)n * sizeof(mil_sample)),
        .logits = mil_op_lend(call, o->logits),
        .batch = &batch,
        .slots = &slots,
        .n_rows = n,
        .vocab = V,
        .ld = V,
    };
    const mil_borrow_samples samples = {
        .from = args.out,
        .logprobs = mil_op_lend(call, o->logprobs),
        .ranks = mil_op_lend(call, o->ranks),
        .top_tokens = mil_op_lend(call, o->top_tokens),
        .top_logprobs = mil_op_lend(call, o->top_logprobs),
        .n = n,
        .n_columns = mil_op_size(o->top_tokens, 1),
    };
    mil_op_size_workspace(call, (mil_maxima){.max_logit_rows = n, .vocab = V});
    if (call->status != MIL_OK || n == 0)
        return;
    call->status = call->place->borrow->fill(call->context->queue, &fill);
    /* A row without a token feeds nothing: MIL_TOKEN_NUMERICS stays. */
    if (call->status == MIL_OK)
        call->status =
            backend->device->fill_16(call->context->queue, slots.last_token, 0xffff, 2 * (size_t)n);
    if (call->status == MIL_OK)
        call->status = backend->sample(call->context, &args);
    tell(call, o, &samples);
}

static void take_logprobs(mil_op_call *call, sample_operands *o, PyObject *const objects[4],
                          int32_t n)
{
    o->logprobs = mil_op_take_written(call, "logprobs", objects[0]);
    o->ranks = mil_op_take_written(call, "ranks", objects[1]);
    o->top_tokens = mil_op_take_written(call, "top_tokens", objects[2]);
    o->top_logprobs = mil_op_take_written(call, "top_logprobs", objects[3]);
    mil_op_expect(call, o->logprobs, MIL_DTYPE_F32, MIL_SHAPE(n));
    mil_op_expect(call, o->ranks, MIL_DTYPE_I32, MIL_SHAPE(n));
    mil_op_expect(call, o->top_tokens, MIL_DTYPE_I32, MIL_SHAPE(n, MIL_ANY));
    int32_t n_columns = mil_op_size(o->top_tokens, 1);
    mil_op_expect_in(call, "top_tokens' columns", n_columns, 0, MIL_MAX_LOGPROBS);
    mil_op_expect(call, o->top_logprobs, MIL_DTYPE_F32, MIL_SHAPE(n, n_columns));
}

PyObject *mil_py_op_sample(PyObject *module, PyObject *args)
{
    mil_op_call call = {.state = PyModule_GetState(module)};
    PyObject *out, *logits, *params, *positions, *more[4];
    sample_operands o = {0};
    if (!PyArg_ParseTuple(args, "zKOOOOOOOO:op_sample", &call.device, &call.stream, &out, &logits,
                          &params, &positions, &more[0], &more[1], &more[2], &more[3]))
        return NULL;
    bool has_logprobs = more[0] != Py_None;
    call.op = has_logprobs ? "sample_logprobs" : "sample";
    o.logits = mil_op_take(&call, "logits", logits);
    o.out = mil_op_take_written(&call, "out", out);
    o.params = mil_op_take_indices(&call, "params", params);
    o.positions = mil_op_take_indices(&call, "positions", positions);
    mil_op_expect(&call, o.logits, MIL_DTYPE_F32, MIL_SHAPE(MIL_ANY, MIL_ANY));
    int32_t n = mil_op_size(o.logits, 0);
    mil_op_expect_in(&call, "logits' columns", mil_op_size(o.logits, 1), 1, MAX_VOCAB);
    mil_op_expect(&call, o.params, MIL_DTYPE_I32, MIL_SHAPE(n, SAMPLING_WORDS));
    mil_op_expect(&call, o.positions, MIL_DTYPE_I32, MIL_SHAPE(n));
    mil_op_expect(&call, o.out, MIL_DTYPE_I32, MIL_SHAPE(n));
    if (has_logprobs)
        take_logprobs(&call, &o, more, n);
    if (mil_op_can_look(&call))
        check_params(&call, o.params);
    return mil_op_run(&call, run_sample, &o);
}
