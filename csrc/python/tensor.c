#include "python/tensor.h"

#include "base/memory.h"

#include <stdio.h>
#include <string.h>

#define ALIGNMENT 16 /* kernels read and write 16 bytes at once */

/* ---- DLPack's ABI ---- */

enum { DL_CPU = 1, DL_CUDA = 2, DL_CUDA_HOST = 3, DL_CUDA_MANAGED = 13 };
enum { DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_BFLOAT = 4, DL_BOOL = 6 };

#define DL_MAJOR 1
#define DL_READ_ONLY ((uint64_t)1)

typedef struct dl_tensor {
    void *data;
    int32_t device_type, device_id;
    int32_t n_dims;
    uint8_t dtype_code, dtype_bits;
    uint16_t dtype_lanes;
    int64_t *shape;
    int64_t *strides; /* in elements; NULL: compact */
    uint64_t byte_offset;
} dl_tensor;

typedef struct dl_managed {
    dl_tensor tensor;
    void *context;
    void (*deleter)(struct dl_managed *self); /* may be NULL */
} dl_managed;

typedef struct dl_versioned {
    uint32_t major, minor;
    void *context;
    void (*deleter)(struct dl_versioned *self); /* may be NULL */
    uint64_t flags;
    dl_tensor tensor;
} dl_versioned;

/* What a producer's type offers to C code. Of another major version only the first two lines are
 * as here; a minor one adds meanings, and moves nothing. */
typedef struct dl_exchange {
    uint32_t major, minor;
    const struct dl_exchange *older; /* of an earlier major version, or NULL */
    void (*conversions[4])(void);    /* not used here; the last may be NULL */
    /* 0, or -1 with a Python exception. Not NULL, says DLPack; NULL is taken to tell nothing. */
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void **out);
} dl_exchange;

/* ---- text ---- */

#define TEXT 96

/* "bfloat16 [3, ?]" */
static void describe(char text[TEXT], const char *dtype, int32_t n_dims, const int32_t *shape)
{
    int at = snprintf(text, TEXT, "%s [", dtype);
    for (int32_t i = 0; i < n_dims && at < TEXT; i++) {
        const char *comma = i == 0 ? "" : ", ";
        if (shape[i] == MIL_ANY)
            at += snprintf(text + at, (size_t)(TEXT - at), "%s?", comma);
        else
            at += snprintf(text + at, (size_t)(TEXT - at), "%s%d", comma, shape[i]);
    }
    if (at < TEXT)
        snprintf(text + at, (size_t)(TEXT - at), "]");
}

/* name: of a dtype that no op takes, else NULL. */
static void set_dtype(mil_operand *out, mil_dtype dtype, const char *name)
{
    out->dtype = dtype;
    (void)snprintf(out->dtype_name, sizeof out->dtype_name, "%s",
                   name != NULL ? name : mil_dtype_name(dtype));
}

/* ---- what the array itself must be ---- */

typedef struct layout {
    int32_t n_dims;
    const int64_t *shape;
    const int64_t *strides; /* in units of stride_bytes; NULL: compact */
    int64_t stride_bytes;
    int64_t item_bytes;
} layout;

static mil_status check_layout(mil_operand *out, const char *op, const layout *is)
{
    int64_t n_bytes = is->item_bytes;
    bool is_compact = true;
    if (is->n_dims < 1 || is->n_dims > MIL_MAX_DIMS)
        return mil_fail(MIL_ERR_ARGUMENT, "%s: %s has %d dimensions, expected 1 to %d", op,
                        out->name, is->n_dims, MIL_MAX_DIMS);
    out->n_dims = is->n_dims;
    for (int32_t i = is->n_dims - 1; i >= 0; i--) {
        if (is->shape[i] < 0 || is->shape[i] > INT32_MAX)
            return mil_fail(MIL_ERR_ARGUMENT,
                            "%s: %s has size %lld in dimension %d, expected at "
                            "most %d",
                            op, out->name, (long long)is->shape[i], i, INT32_MAX);
        out->shape[i] = (int32_t)is->shape[i];
        if (is->strides != NULL && is->shape[i] != 1)
            is_compact = is_compact && is->strides[i] * is->stride_bytes == n_bytes;
        if (__builtin_mul_overflow(n_bytes, is->shape[i], &n_bytes))
            return mil_fail(MIL_ERR_ARGUMENT, "%s: %s has more bytes than 64 bits count", op,
                            out->name);
    }
    out->n_bytes = (size_t)n_bytes;
    if (n_bytes > 0 && !is_compact)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "%s: %s is not contiguous, expected rows that touch (C order)", op,
                        out->name);
    if (n_bytes > 0 && (uintptr_t)out->data % ALIGNMENT != 0)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "%s: %s begins %d bytes past a multiple of %d, expected 0", op, out->name,
                        (int)((uintptr_t)out->data % ALIGNMENT), ALIGNMENT);
    return MIL_OK;
}

/* ---- NumPy ---- */

static void numpy_dtype(mil_operand *out, PyArrayObject *array)
{
    int type = PyArray_TYPE(array);
    const char *name = PyArray_DESCR(array)->typeobj->tp_name; /* "numpy.int64" */
    const char *dot = strrchr(name, '.');
    if (type == NPY_FLOAT32)
        set_dtype(out, MIL_DTYPE_F32, NULL);
    else if (type == NPY_INT32)
        set_dtype(out, MIL_DTYPE_I32, NULL);
    else if (type == NPY_UINT16 ||
             (PyArray_ITEMSIZE(array) == 2 && strstr(name, "bfloat16") != NULL))
        set_dtype(out, MIL_DTYPE_BF16, NULL);
    else if (type == NPY_FLOAT16)
        set_dtype(out, MIL_DTYPE_F16, NULL);
    else
        set_dtype(out, MIL_DTYPE_OTHER, dot != NULL ? dot + 1 : name);
}

static mil_status take_numpy(mil_operand *out, const char *op, PyArrayObject *array)
{
    if (!PyArray_ISNOTSWAPPED(array))
        return mil_fail(MIL_ERR_ARGUMENT, "%s: %s is byte-swapped, expected native order", op,
                        out->name);
    numpy_dtype(out, array);
    int64_t shape[NPY_MAXDIMS], strides[NPY_MAXDIMS];
    layout is = {PyArray_NDIM(array), shape, strides, 1, PyArray_ITEMSIZE(array)};
    for (int32_t i = 0; i < is.n_dims; i++) {
        shape[i] = PyArray_DIM(array, i);
        strides[i] = PyArray_STRIDE(array, i);
    }
    out->data = PyArray_DATA(array);
    out->is_read_only = !PyArray_ISWRITEABLE(array);
    MIL_TRY(check_layout(out, op, &is));
    out->array = Py_NewRef((PyObject *)array);
    return MIL_OK;
}

/* ---- capsules ---- */

static void other_dlpack_dtype(mil_operand *out, const dl_tensor *tensor)
{
    static const char *const kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex"};
    char name[sizeof out->dtype_name];
    int code = tensor->dtype_code, bits = tensor->dtype_bits, lanes = tensor->dtype_lanes;
    if (code == DL_BOOL && lanes == 1)
        (void)snprintf(name, sizeof name, "bool");
    else if (code < (int)(sizeof kinds / sizeof kinds[0]) && lanes == 1)
        (void)snprintf(name, sizeof name, "%s%d", kinds[code], bits);
    else
        (void)snprintf(name, sizeof name, "DLPack's %d:%d:%d", code, bits, lanes);
    set_dtype(out, MIL_DTYPE_OTHER, name);
}

static void dlpack_dtype(mil_operand *out, const dl_tensor *tensor)
{
    int code = tensor->dtype_code, bits = tensor->dtype_lanes == 1 ? tensor->dtype_bits : 0;
    if (code == DL_FLOAT && bits == 32)
        set_dtype(out, MIL_DTYPE_F32, NULL);
    else if (code == DL_FLOAT && bits == 16)
        set_dtype(out, MIL_DTYPE_F16, NULL);
    else if ((code == DL_BFLOAT || code == DL_UINT) && bits == 16)
        set_dtype(out, MIL_DTYPE_BF16, NULL);
    else if (code == DL_INT && bits == 32)
        set_dtype(out, MIL_DTYPE_I32, NULL);
    else
        other_dlpack_dtype(out, tensor);
}

static mil_status read_dlpack(mil_operand *out, const char *op, const dl_tensor *tensor)
{
    int32_t device = tensor->device_type;
    if (device != DL_CPU && device != DL_CUDA_HOST && device != DL_CUDA &&
        device != DL_CUDA_MANAGED)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "%s: %s lies on DLPack device type %d, expected 1 (CPU) or 2 (CUDA)", op,
                        out->name, device);
    out->is_cuda = device == DL_CUDA || device == DL_CUDA_MANAGED;
    out->ordinal = out->is_cuda ? tensor->device_id : 0;
    out->data = (char *)tensor->data + tensor->byte_offset;
    dlpack_dtype(out, tensor);
    int64_t item_bytes = ((int64_t)tensor->dtype_bits * tensor->dtype_lanes + 7) / 8;
    const layout is = {tensor->n_dims, tensor->shape, tensor->strides, item_bytes, item_bytes};
    return check_layout(out, op, &is);
}

static mil_status take_capsule(mil_operand *out, const char *op, PyObject *capsule)
{
    out->is_versioned = PyCapsule_IsValid(capsule, "dltensor_versioned");
    const char *name = out->is_versioned ? "dltensor_versioned" : "dltensor";
    out->managed = PyCapsule_GetPointer(capsule, name);
    if (out->managed == NULL ||
        PyCapsule_SetName(capsule,
                          out->is_versioned ? "used_dltensor_versioned" : "used_dltensor") != 0) {
        PyErr_Clear();
        out->managed = NULL;
        return mil_fail(MIL_ERR_ARGUMENT, "%s: %s is a used DLPack capsule, expected a fresh one",
                        op, out->name);
    }
    if (!out->is_versioned)
        return read_dlpack(out, op, &((dl_managed *)out->managed)->tensor);
    const dl_versioned *versioned = out->managed;
    if (versioned->major != DL_MAJOR)
        return mil_fail(MIL_ERR_ARGUMENT, "%s: %s is of DLPack %u.%u, expected %d.x", op, out->name,
                        versioned->major, versioned->minor, DL_MAJOR);
    out->is_read_only = (versioned->flags & DL_READ_ONLY) != 0;
    return read_dlpack(out, op, &versioned->tensor);
}

mil_status mil_operand_take(mil_operand *out, const char *op, const char *name, PyObject *object)
{
    mil_status status;
    memset(out, 0, sizeof *out);
    out->name = name;
    if (PyArray_Check(object))
        status = take_numpy(out, op, (PyArrayObject *)object);
    else if (PyCapsule_CheckExact(object))
        status = take_capsule(out, op, object);
    else
        status = mil_fail(MIL_ERR_ARGUMENT, "%s: %s is a %s, expected a NumPy or a DLPack array",
                          op, name, Py_TYPE(object)->tp_name);
    if (status != MIL_OK)
        mil_operand_release(out);
    return status;
}

void mil_operand_release(mil_operand *operand)
{
    if (operand->managed != NULL && operand->is_versioned) {
        dl_versioned *versioned = operand->managed;
        if (versioned->deleter != NULL)
            versioned->deleter(versioned);
    } else if (operand->managed != NULL) {
        dl_managed *managed = operand->managed;
        if (managed->deleter != NULL)
            managed->deleter(managed);
    }
    Py_CLEAR(operand->array);
    mil_free(operand->copy);
    operand->managed = operand->copy = NULL;
}

int mil_dlpack_stream(void **out, PyObject *exchange_api, int32_t device_type, int32_t device_id)
{
    const dl_exchange *api = PyCapsule_GetPointer(exchange_api, "dlpack_exchange_api");
    if (api == NULL)
        return -1;
    uint32_t newest = api->major;
    while (api != NULL && api->major != DL_MAJOR)
        api = api->older;
    if (api == NULL) {
        PyErr_Format(PyExc_BufferError, "the producer's exchange API is of DLPack %u, expected %d",
                     newest, DL_MAJOR);
        return -1;
    }
    if (api->current_work_stream == NULL)
        return 0;
    if (api->current_work_stream(device_type, device_id, out) == 0)
        return 1;
    if (!PyErr_Occurred())
        PyErr_Format(PyExc_BufferError,
                     "the producer's exchange API tells no current stream of device %d:%d, nor why",
                     device_type, device_id);
    return -1;
}

/* ---- what an op wants of it ---- */

static mil_status unexpected(const mil_operand *operand, const char *op, mil_dtype dtype,
                             mil_dtype other, int32_t n_dims, const int32_t *shape)
{
    char found[TEXT], expected[TEXT], dtypes[32];
    bool is_dtype = operand->dtype == dtype || operand->dtype == other;
    bool takes_bits = dtype == MIL_DTYPE_BF16 || other == MIL_DTYPE_BF16;
    (void)snprintf(dtypes, sizeof dtypes, "%s%s%s", mil_dtype_name(dtype),
                   other != dtype ? " or " : "", other != dtype ? mil_dtype_name(other) : "");
    describe(found, operand->dtype_name, operand->n_dims, operand->shape);
    describe(expected, dtypes, n_dims, shape);
    return mil_fail(
        MIL_ERR_ARGUMENT, "%s: %s is %s, expected %s%s", op, operand->name, found, expected,
        !is_dtype && takes_bits && operand->array != NULL ? " (bfloat16 as its bits in uint16)"
                                                          : "");
}

mil_status mil_operand_expect(const mil_operand *operand, const char *op, mil_dtype dtype,
                              mil_dtype other, int32_t n_dims, const int32_t *shape)
{
    bool is_expected =
        (operand->dtype == dtype || operand->dtype == other) && operand->n_dims == n_dims;
    for (int32_t i = 0; is_expected && i < n_dims; i++)
        is_expected = shape[i] == MIL_ANY || shape[i] == operand->shape[i];
    if (!is_expected)
        return unexpected(operand, op, dtype, other, n_dims, shape);
    if (operand->is_written && operand->is_read_only)
        return mil_fail(MIL_ERR_ARGUMENT, "%s: %s is read-only, expected a writable array", op,
                        operand->name);
    return MIL_OK;
}

mil_status mil_operand_copy(mil_operand *operand)
{
    MIL_TRY(mil_alloc_checked(&operand->copy, operand->n_bytes + 1, 1, operand->name));
    if (operand->n_bytes > 0)
        memcpy(operand->copy, operand->data, operand->n_bytes);
    operand->data = operand->copy;
    return MIL_OK;
}
