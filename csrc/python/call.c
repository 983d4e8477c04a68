#include "python/call.h"

#include "python/convert.h"

#include "base/bf16.h"
#include "base/memory.h"
#include "ops/device.h"

#include <assert.h>
#include <string.h>

#define PER_THREAD_STREAM 2 /* cudaStreamPerThread, as CUDA's headers have it */

/* ---- operands ---- */

static mil_operand *take(mil_op_call *call, const char *name, PyObject *object, bool is_written)
{
    if (call->status != MIL_OK)
        return NULL;
    if (call->n_operands == MIL_MAX_OPERANDS) {
        call->status =
            mil_fail(MIL_ERR_INTERNAL, "%s: more than %d arrays", call->op, MIL_MAX_OPERANDS);
        return NULL;
    }
    mil_operand *operand = &call->operands[call->n_operands];
    call->status = mil_operand_take(operand, call->op, name, object);
    if (call->status != MIL_OK)
        return NULL;
    operand->is_written = is_written;
    call->n_operands++;
    return operand;
}

mil_operand *mil_op_take(mil_op_call *call, const char *name, PyObject *object)
{
    return take(call, name, object, false);
}

mil_operand *mil_op_take_optional(mil_op_call *call, const char *name, PyObject *object)
{
    return object == Py_None ? NULL : take(call, name, object, false);
}

mil_operand *mil_op_take_written(mil_op_call *call, const char *name, PyObject *object)
{
    return take(call, name, object, true);
}

mil_operand *mil_op_take_indices(mil_op_call *call, const char *name, PyObject *object)
{
    mil_operand *operand = take(call, name, object, false);
    if (operand != NULL && !operand->is_cuda && operand->dtype == MIL_DTYPE_I32)
        call->status = mil_operand_copy(operand);
    return operand;
}

void mil_op_expect(mil_op_call *call, const mil_operand *operand, mil_dtype dtype, int32_t n_dims,
                   const int32_t *shape)
{
    mil_op_expect_either(call, operand, dtype, dtype, n_dims, shape);
}

void mil_op_expect_either(mil_op_call *call, const mil_operand *operand, mil_dtype dtype,
                          mil_dtype other, int32_t n_dims, const int32_t *shape)
{
    if (call->status == MIL_OK && operand != NULL)
        call->status = mil_operand_expect(operand, call->op, dtype, other, n_dims, shape);
}

/* Where what is named exists is seen when the op runs. */
static bool names_cuda(const mil_op_call *call)
{
    bool is_cuda = false;
    int32_t ordinal;
    return call->device != NULL && mil_device_parse(&is_cuda, &ordinal, call->device) && is_cuda;
}

void mil_op_expect_product(mil_op_call *call, const mil_operand *operand, int32_t n_dims,
                           const int32_t *shape)
{
    bool is_there = (operand != NULL && operand->is_cuda) || names_cuda(call);
    mil_op_expect_either(call, operand, MIL_DTYPE_BF16, is_there ? MIL_DTYPE_BF16 : MIL_DTYPE_F32,
                         n_dims, shape);
}

void mil_op_expect_in(mil_op_call *call, const char *name, int64_t value, int64_t least,
                      int64_t most)
{
    if (call->status != MIL_OK || (value >= least && value <= most))
        return;
    if (least == most)
        call->status = mil_fail(MIL_ERR_ARGUMENT, "%s: %s is %lld, expected %lld", call->op, name,
                                (long long)value, (long long)least);
    else
        call->status = mil_fail(MIL_ERR_ARGUMENT, "%s: %s is %lld, expected %lld to %lld", call->op,
                                name, (long long)value, (long long)least, (long long)most);
}

void mil_op_expect_entry(mil_op_call *call, const char *name, int32_t index, int64_t value,
                         int64_t least, int64_t most)
{
    char entry[64];
    if (call->status != MIL_OK || (value >= least && value <= most))
        return;
    (void)snprintf(entry, sizeof entry, "%s[%d]", name, index);
    mil_op_expect_in(call, entry, value, least, most);
}

int32_t mil_op_size(const mil_operand *operand, int32_t dim)
{
    return operand != NULL && dim < operand->n_dims ? operand->shape[dim] : 0;
}

/* ---- where it runs ---- */

static mil_status check_devices(const mil_op_call *call)
{
    const mil_operand *first = &call->operands[0];
    for (int32_t i = 1; i < call->n_operands; i++) {
        const mil_operand *operand = &call->operands[i];
        if (operand->is_cuda != first->is_cuda || operand->ordinal != first->ordinal)
            return mil_fail(MIL_ERR_ARGUMENT, "%s: %s lies on %s:%d, expected %s:%d as %s",
                            call->op, operand->name, operand->is_cuda ? "cuda" : "cpu",
                            operand->ordinal, first->is_cuda ? "cuda" : "cpu", first->ordinal,
                            first->name);
    }
    return MIL_OK;
}

bool mil_op_can_look(mil_op_call *call)
{
    if (call->status == MIL_OK)
        call->status = check_devices(call);
    return call->status == MIL_OK && !call->operands[0].is_cuda;
}

/* What an op writes is memory of its own. */
static mil_status check_overlaps(const mil_op_call *call)
{
    for (int32_t i = 0; i < call->n_operands; i++) {
        const mil_operand *a = &call->operands[i];
        for (int32_t j = 0; j < call->n_operands && a->is_written; j++) {
            const mil_operand *b = &call->operands[j];
            if (i != j && a->data < b->data + b->n_bytes && b->data < a->data + a->n_bytes)
                return mil_fail(MIL_ERR_ARGUMENT, "%s: %s overlaps %s, expected memory of its own",
                                call->op, a->name, b->name);
        }
    }
    return MIL_OK;
}

static mil_status read_device(mil_op_call *call)
{
    const mil_operand *first = &call->operands[0];
    const char *device = call->device;
    call->is_cuda = first->is_cuda;
    call->ordinal = first->ordinal;
    if (device == NULL || (strcmp(device, "cpu") == 0 && !first->is_cuda))
        return MIL_OK;
    bool is_cuda;
    int32_t ordinal;
    if (!mil_device_parse(&is_cuda, &ordinal, device) || !is_cuda)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "%s: device is \"%s\", expected \"cpu\", \"cuda\" or \"cuda:N\"%s",
                        call->op, device, first->is_cuda ? " of the arrays" : "");
    if (first->is_cuda && strchr(device, ':') != NULL && ordinal != first->ordinal)
        return mil_fail(MIL_ERR_ARGUMENT, "%s: device is \"%s\", but the arrays lie on cuda:%d",
                        call->op, device, first->ordinal);
    call->is_lent = !first->is_cuda;
    call->is_cuda = true;
    call->ordinal = first->is_cuda ? first->ordinal : ordinal;
    return MIL_OK;
}

static mil_status prepare(mil_op_call *call)
{
    MIL_TRY(check_devices(call));
    MIL_TRY(check_overlaps(call));
    MIL_TRY(read_device(call));
    /* One handle, a stream for each thread: they would share a workspace without an order. */
    if (call->is_cuda && !call->is_lent && call->stream == PER_THREAD_STREAM)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "%s: stream is %d (the per-thread default one), expected any other",
                        call->op, PER_THREAD_STREAM);
    return MIL_OK;
}

/* ---- loans ---- */

static bool is_in_place(const mil_op_call *call)
{
    return call->is_cuda && !call->is_lent;
}

static mil_op_loan *add_loan(mil_op_call *call, size_t n_bytes)
{
    if (call->status != MIL_OK)
        return NULL;
    if (call->n_loans == MIL_MAX_LOANS) {
        call->status =
            mil_fail(MIL_ERR_INTERNAL, "%s: more than %d loans", call->op, MIL_MAX_LOANS);
        return NULL;
    }
    mil_op_loan *loan = &call->loans[call->n_loans++];
    call->status = call->context->backend->device->alloc(call->context->queue, &loan->slab,
                                                         n_bytes > 0 ? n_bytes : 1, call->op);
    return call->status == MIL_OK ? loan : NULL;
}

void *mil_op_temporary(mil_op_call *call, size_t n_bytes)
{
    void *memory = NULL;
    if (call->status != MIL_OK)
        return NULL;
    if (!is_in_place(call)) {
        mil_op_loan *loan = add_loan(call, n_bytes);
        return loan != NULL ? loan->slab.data : NULL;
    }
    call->status = mil_place_scratch(call->place, &memory, n_bytes);
    return memory;
}

void *mil_op_lend(mil_op_call *call, const mil_operand *operand)
{
    if (operand == NULL || call->status != MIL_OK)
        return NULL;
    if (!call->is_lent)
        return operand->data;
    mil_op_loan *loan = add_loan(call, operand->n_bytes);
    if (loan == NULL)
        return NULL;
    loan->operand = operand;
    if (operand->n_bytes > 0)
        call->status = call->context->backend->device->copy_in(
            call->context->queue, loan->slab.data, operand->data, operand->n_bytes);
    return loan->slab.data;
}

int32_t *mil_op_lend_indices(mil_op_call *call, const mil_operand *operand,
                             mil_borrow_indices *copy, int32_t most, int32_t otherwise)
{
    int32_t *given = mil_op_lend(call, operand);
    if (given == NULL || !operand->is_cuda)
        return given;
    int32_t *to = mil_op_temporary(call, operand->n_bytes);
    if (to != NULL)
        *copy = (mil_borrow_indices){given, to, operand->shape[0], most, otherwise};
    return to;
}

int32_t *mil_op_lend_starts(mil_op_call *call, const mil_operand *operand, mil_borrow_starts *copy,
                            int32_t most)
{
    int32_t *given = mil_op_lend(call, operand);
    if (given == NULL || !operand->is_cuda)
        return given;
    int32_t *to = mil_op_temporary(call, operand->n_bytes);
    if (to != NULL)
        *copy = (mil_borrow_starts){given, to, operand->shape[0], most};
    return to;
}

static void widen(float *to, const uint16_t *from, size_t n)
{
    for (size_t i = 0; i < n; i++)
        to[i] = mil_bf16_to_float(from[i]);
}

static void narrow(uint16_t *to, const float *from, size_t n)
{
    for (size_t i = 0; i < n; i++)
        to[i] = mil_bf16_from_float(from[i]);
}

void *mil_op_lend_product(mil_op_call *call, const mil_operand *operand)
{
    if (operand == NULL || call->status != MIL_OK)
        return NULL;
    mil_dtype wanted = call->context->backend->product_dtype;
    if (operand->dtype == wanted)
        return mil_op_lend(call, operand);
    assert(!call->is_cuda); /* mil_op_expect_product */
    size_t n = operand->n_bytes / sizeof(uint16_t);
    mil_op_loan *loan = add_loan(call, n * sizeof(float));
    if (loan == NULL)
        return NULL;
    loan->operand = operand;
    loan->is_widened = true;
    widen(loan->slab.data, (const uint16_t *)operand->data, n);
    return loan->slab.data;
}

void mil_op_size_workspace(mil_op_call *call, mil_maxima maxima)
{
    mil_context *context = call->context;
    int32_t *sizes = (int32_t *)&maxima;
    maxima.n_threads = call->place->n_threads;
    for (size_t i = 0; i < sizeof maxima / sizeof *sizes; i++)
        sizes[i] = sizes[i] > 0 ? sizes[i] : 1;
    if (call->status != MIL_OK)
        return;
    context->workspace_bytes = context->backend->workspace_bytes(&maxima);
    context->step_bytes = context->backend->step_bytes(&maxima);
    call->status = mil_place_scratch(call->place, &context->workspace, context->workspace_bytes);
    if (call->status == MIL_OK)
        call->status = mil_place_scratch(call->place, &context->step_data, context->step_bytes);
}

static mil_status give_one_back(mil_op_call *call, const mil_op_loan *loan)
{
    const mil_operand *operand = loan->operand;
    if (operand == NULL || !operand->is_written || operand->n_bytes == 0)
        return MIL_OK;
    if (!loan->is_widened)
        return call->context->backend->device->copy_out(call->context->queue, operand->data,
                                                        loan->slab.data, operand->n_bytes);
    narrow((uint16_t *)operand->data, loan->slab.data, operand->n_bytes / sizeof(uint16_t));
    return MIL_OK;
}

static void give_loans_back(mil_op_call *call)
{
    const mil_device *device = call->context->backend->device;
    /* Also after a failure: what was queued may still read the loans. */
    if (call->is_lent) {
        mil_status waited = device->synchronize(call->context->queue);
        call->status = call->status == MIL_OK ? waited : call->status;
    }
    for (int32_t i = 0; i < call->n_loans; i++) {
        if (call->status == MIL_OK)
            call->status = give_one_back(call, &call->loans[i]);
        device->free(call->context->queue, &call->loans[i].slab);
    }
}

/* ---- run ---- */

static void run(mil_op_call *call, mil_op_body body, void *argument)
{
    void *stream = is_in_place(call) ? (void *)(uintptr_t)call->stream : NULL;
    call->status = mil_place_find(&call->place, call->places, call->is_cuda, call->ordinal,
                                  call->is_lent, stream);
    if (call->status == MIL_OK)
        call->status = mil_place_enter(call->place);
    if (call->status != MIL_OK)
        return;
    call->context = &call->place->context;
    body(call, argument);
    give_loans_back(call);
    mil_place_leave(call->place);
}

PyObject *mil_op_run(mil_op_call *call, mil_op_body body, void *argument)
{
    if (call->status == MIL_OK)
        call->status = prepare(call);
    if (call->status == MIL_OK && (call->places = mil_places_of(call->state)) == NULL)
        call->status = mil_fail(MIL_ERR_MEMORY, "%s: no memory", call->op);
    if (call->status == MIL_OK) {
        Py_BEGIN_ALLOW_THREADS
        run(call, body, argument);
        Py_END_ALLOW_THREADS
    }
    /* Before an exception is set: a deleter may run Python. */
    for (int32_t i = 0; i < call->n_operands; i++)
        mil_operand_release(&call->operands[i]);
    return call->status == MIL_OK ? Py_NewRef(Py_None) : mil_raise(call->state, call->status);
}
