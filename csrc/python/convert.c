#include "python/convert.h"

#include "base/memory.h"

#include <string.h>

const char *const mil_error_names[MIL_N_STATUS] = {
    [MIL_ERR_ARGUMENT] = "RequestError",   [MIL_ERR_SHAPE] = "CheckpointError",
    [MIL_ERR_FILE] = "CheckpointError",    [MIL_ERR_MEMORY] = "OutOfMemoryError",
    [MIL_ERR_UNSUPPORTED] = "ConfigError", [MIL_ERR_NOT_FOUND] = "RequestError",
    [MIL_ERR_BUSY] = "EngineError",        [MIL_ERR_CLOSED] = "EngineError",
    [MIL_ERR_DEVICE] = "EngineError",      [MIL_ERR_NUMERICS] = "AdapterError",
    [MIL_ERR_INTERNAL] = "EngineError",
};

PyObject *mil_raise(mil_module_state *state, mil_status status)
{
    PyObject *type = status > MIL_OK && status < MIL_N_STATUS ? state->errors[status] : NULL;
    /* A message that was cut may end inside a letter. */
    const char *message = mil_status_message();
    PyObject *text = PyUnicode_DecodeUTF8(message, (Py_ssize_t)strlen(message), "replace");
    if (text != NULL)
        PyErr_SetObject(type != NULL ? type : PyExc_SystemError, text);
    Py_XDECREF(text);
    return NULL;
}

/* ---- attributes ---- */

int mil_attr_i64(PyObject *object, const char *name, int64_t *out)
{
    PyObject *value = PyObject_GetAttrString(object, name);
    if (value == NULL)
        return -1;
    long long number = PyLong_AsLongLong(value);
    Py_DECREF(value);
    if (number == -1 && PyErr_Occurred())
        return -1;
    *out = number;
    return 0;
}

int mil_attr_i32(PyObject *object, const char *name, int32_t *out)
{
    int64_t number;
    if (mil_attr_i64(object, name, &number) < 0)
        return -1;
    if (number < INT32_MIN || number > INT32_MAX) {
        PyErr_Format(PyExc_OverflowError, "%s is %lld, expected a 32-bit integer", name,
                     (long long)number);
        return -1;
    }
    *out = (int32_t)number;
    return 0;
}

int mil_attr_u64(PyObject *object, const char *name, uint64_t *out)
{
    PyObject *value = PyObject_GetAttrString(object, name);
    if (value == NULL)
        return -1;
    unsigned long long number = PyLong_AsUnsignedLongLong(value);
    Py_DECREF(value);
    if (number == (unsigned long long)-1 && PyErr_Occurred())
        return -1;
    *out = number;
    return 0;
}

int mil_attr_f64(PyObject *object, const char *name, double *out)
{
    PyObject *value = PyObject_GetAttrString(object, name);
    if (value == NULL)
        return -1;
    double number = PyFloat_AsDouble(value);
    Py_DECREF(value);
    if (number == -1.0 && PyErr_Occurred())
        return -1;
    *out = number;
    return 0;
}

int mil_attr_bool(PyObject *object, const char *name, bool *out)
{
    PyObject *value = PyObject_GetAttrString(object, name);
    if (value == NULL)
        return -1;
    int truth = PyObject_IsTrue(value);
    Py_DECREF(value);
    if (truth < 0)
        return -1;
    *out = truth;
    return 0;
}

/* The UTF-8 text of an attribute that is a str; keep holds the reference that owns it. */
static const char *attr_text(PyObject *object, const char *name, PyObject *keep)
{
    PyObject *value = PyObject_GetAttrString(object, name);
    if (value == NULL)
        return NULL;
    int kept = PyList_Append(keep, value);
    Py_DECREF(value);
    return kept < 0 ? NULL : PyUnicode_AsUTF8(value);
}

/* ---- config ---- */

static int read_rope(PyObject *config, mil_rope_config *out)
{
    PyObject *rope = PyObject_GetAttrString(config, "rope");
    PyObject *keep = PyList_New(0);
    int result = -1;
    if (rope == NULL || keep == NULL)
        goto done;
    const char *kind = attr_text(rope, "type", keep);
    if (kind == NULL)
        goto done;
    if (strcmp(kind, "linear") == 0)
        out->kind = MIL_ROPE_LINEAR;
    else if (strcmp(kind, "llama3") == 0)
        out->kind = MIL_ROPE_LLAMA3;
    else
        out->kind = MIL_ROPE_DEFAULT;
    result = mil_attr_f64(rope, "theta", &out->theta);
    if (result == 0 && out->kind != MIL_ROPE_DEFAULT)
        result = mil_attr_f64(rope, "factor", &out->factor);
    if (result == 0 && out->kind == MIL_ROPE_LLAMA3) {
        result = -(mil_attr_f64(rope, "low_freq_factor", &out->low_freq_factor) < 0 ||
                   mil_attr_f64(rope, "high_freq_factor", &out->high_freq_factor) < 0 ||
                   mil_attr_i64(rope, "original_max_position_embeddings",
                                &out->original_max_position) < 0);
    }
done:
    Py_XDECREF(keep);
    Py_XDECREF(rope);
    return result;
}

int mil_read_config(PyObject *config, int32_t max_position, mil_config *out)
{
    memset(out, 0, sizeof *out);
    out->architecture = MIL_ARCHITECTURE_LLAMA;
    out->max_position = max_position;
    double eps;
    if (mil_attr_i32(config, "hidden_size", &out->hidden) < 0 ||
        mil_attr_i32(config, "intermediate_size", &out->ffn) < 0 ||
        mil_attr_i32(config, "num_hidden_layers", &out->n_layers) < 0 ||
        mil_attr_i32(config, "num_attention_heads", &out->n_heads) < 0 ||
        mil_attr_i32(config, "num_key_value_heads", &out->n_kv_heads) < 0 ||
        mil_attr_i32(config, "head_dim", &out->head_dim) < 0 ||
        mil_attr_i32(config, "vocab_size", &out->vocab) < 0 ||
        mil_attr_f64(config, "rms_norm_eps", &eps) < 0 ||
        mil_attr_bool(config, "tie_word_embeddings", &out->tie_embeddings) < 0 ||
        mil_attr_bool(config, "attention_bias", &out->attention_bias) < 0)
        return -1;
    out->rms_eps = (float)eps;
    return read_rope(config, &out->rope);
}

/* ---- files and tensors ---- */

static int read_dtype(const char *text, mil_dtype *out)
{
    static const struct {
        const char *name;
        mil_dtype dtype;
    } known[] = {{"F32", MIL_DTYPE_F32}, {"BF16", MIL_DTYPE_BF16}, {"F16", MIL_DTYPE_F16}};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        if (strcmp(text, known[i].name) == 0) {
            *out = known[i].dtype;
            return 0;
        }
    }
    PyErr_Format(PyExc_ValueError, "dtype is %s, expected F32, BF16 or F16", text);
    return -1;
}

static int read_tensor(PyObject *tensor, PyObject *keep, mil_tensor_info *out)
{
    const char *name = attr_text(tensor, "name", keep);
    const char *dtype = name != NULL ? attr_text(tensor, "dtype", keep) : NULL;
    if (dtype == NULL || read_dtype(dtype, &out->dtype) < 0 ||
        mil_attr_i32(tensor, "file_index", &out->file) < 0 ||
        mil_attr_u64(tensor, "begin", &out->begin) < 0 ||
        mil_attr_u64(tensor, "end", &out->end) < 0)
        return -1;
    out->name = name;
    PyObject *shape = PyObject_GetAttrString(tensor, "shape");
    if (shape == NULL)
        return -1;
    Py_ssize_t rank = PySequence_Size(shape);
    if (rank < 1 || rank > 2) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "%s has %zd dimensions, expected 1 or 2", name, rank);
        Py_DECREF(shape);
        return -1;
    }
    out->rank = (int32_t)rank;
    out->shape[1] = 1;
    for (Py_ssize_t i = 0; i < rank; i++) {
        PyObject *size = PySequence_GetItem(shape, i);
        out->shape[i] = size != NULL ? PyLong_AsLongLong(size) : -1;
        Py_XDECREF(size);
    }
    Py_DECREF(shape);
    return PyErr_Occurred() ? -1 : 0;
}

static int read_file(PyObject *path, PyObject *size, PyObject *keep, mil_file_info *out)
{
    PyObject *encoded = NULL;
    if (!PyUnicode_FSConverter(path, &encoded))
        return -1;
    int kept = PyList_Append(keep, encoded);
    Py_DECREF(encoded);
    if (kept < 0)
        return -1;
    out->path = PyBytes_AS_STRING(encoded);
    out->n_bytes = PyLong_AsUnsignedLongLong(size);
    return PyErr_Occurred() ? -1 : 0;
}

static int read_files(PyObject *owner, mil_borrowed *out)
{
    PyObject *files = PyObject_GetAttrString(owner, "files");
    PyObject *sizes = files != NULL ? PyObject_GetAttrString(owner, "file_sizes") : NULL;
    PyObject *paths = sizes != NULL ? PySequence_Fast(files, "files must be a sequence") : NULL;
    PyObject *counts =
        paths != NULL ? PySequence_Fast(sizes, "file_sizes must be a sequence") : NULL;
    int result = -1;
    if (counts == NULL)
        goto done;
    Py_ssize_t n = PySequence_Fast_GET_SIZE(paths);
    if (n != PySequence_Fast_GET_SIZE(counts)) {
        PyErr_Format(PyExc_ValueError, "%zd files with %zd sizes", n,
                     PySequence_Fast_GET_SIZE(counts));
        goto done;
    }
    out->files = mil_alloc((size_t)n, sizeof *out->files);
    if (out->files == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    out->n_files = (int32_t)n;
    for (Py_ssize_t i = 0; i < n; i++)
        if (read_file(PySequence_Fast_GET_ITEM(paths, i), PySequence_Fast_GET_ITEM(counts, i),
                      out->keep, &out->files[i]) < 0)
            goto done;
    result = 0;
done:
    Py_XDECREF(counts);
    Py_XDECREF(paths);
    Py_XDECREF(sizes);
    Py_XDECREF(files);
    return result;
}

int mil_read_checkpoint(PyObject *checkpoint, mil_borrowed *out)
{
    memset(out, 0, sizeof *out);
    out->keep = PyList_New(0);
    PyObject *tensors = NULL;
    PyObject *values = NULL;
    if (out->keep == NULL || read_files(checkpoint, out) < 0)
        goto fail;
    tensors = PyObject_GetAttrString(checkpoint, "tensors");
    values = tensors != NULL ? PyMapping_Values(tensors) : NULL;
    if (values == NULL || PyList_Append(out->keep, values) < 0)
        goto fail;
    Py_ssize_t n = PyList_GET_SIZE(values);
    out->tensors = mil_alloc((size_t)n, sizeof *out->tensors);
    if (out->tensors == NULL) {
        PyErr_NoMemory();
        goto fail;
    }
    out->n_tensors = (int32_t)n;
    for (Py_ssize_t i = 0; i < n; i++)
        if (read_tensor(PyList_GET_ITEM(values, i), out->keep, &out->tensors[i]) < 0)
            goto fail;
    Py_DECREF(values);
    Py_DECREF(tensors);
    return 0;
fail:
    Py_XDECREF(values);
    Py_XDECREF(tensors);
    mil_borrowed_release(out);
    return -1;
}

static int read_projection(const char *name, mil_projection *out)
{
    for (int32_t p = 0; p < MIL_N_PROJECTIONS; p++) {
        if (strcmp(name, mil_projection_name((mil_projection)p)) == 0) {
            *out = (mil_projection)p;
            return 0;
        }
    }
    PyErr_Format(PyExc_ValueError, "projection is %s, expected one of Llama's seven", name);
    return -1;
}

static int read_module(PyObject *module, PyObject *keep, mil_adapter_module_info *out)
{
    const char *projection = attr_text(module, "projection", keep);
    double scale;
    if (projection == NULL || read_projection(projection, &out->projection) < 0 ||
        mil_attr_i32(module, "layer", &out->layer) < 0 ||
        mil_attr_i32(module, "rank", &out->rank) < 0 || mil_attr_f64(module, "scale", &scale) < 0)
        return -1;
    out->scale = (float)scale;
    PyObject *a = PyObject_GetAttrString(module, "a");
    PyObject *b = a != NULL ? PyObject_GetAttrString(module, "b") : NULL;
    int result =
        b != NULL && read_tensor(a, keep, &out->a) == 0 && read_tensor(b, keep, &out->b) == 0 ? 0
                                                                                              : -1;
    Py_XDECREF(b);
    Py_XDECREF(a);
    return result;
}

int mil_read_adapter(PyObject *adapter, mil_borrowed *out)
{
    memset(out, 0, sizeof *out);
    out->keep = PyList_New(0);
    PyObject *modules = NULL;
    if (out->keep == NULL || read_files(adapter, out) < 0)
        goto fail;
    PyObject *attribute = PyObject_GetAttrString(adapter, "modules");
    modules = attribute != NULL ? PySequence_Fast(attribute, "modules must be a sequence") : NULL;
    Py_XDECREF(attribute);
    if (modules == NULL)
        goto fail;
    Py_ssize_t n = PySequence_Fast_GET_SIZE(modules);
    out->modules = mil_alloc((size_t)n, sizeof *out->modules);
    if (out->modules == NULL) {
        PyErr_NoMemory();
        goto fail;
    }
    out->n_modules = (int32_t)n;
    for (Py_ssize_t i = 0; i < n; i++)
        if (read_module(PySequence_Fast_GET_ITEM(modules, i), out->keep, &out->modules[i]) < 0)
            goto fail;
    Py_DECREF(modules);
    return 0;
fail:
    Py_XDECREF(modules);
    mil_borrowed_release(out);
    return -1;
}

void mil_borrowed_release(mil_borrowed *borrowed)
{
    mil_free(borrowed->files);
    mil_free(borrowed->tensors);
    mil_free(borrowed->modules);
    Py_CLEAR(borrowed->keep);
    memset(borrowed, 0, sizeof *borrowed);
}

/* ---- arrays and samples ---- */

PyArrayObject *mil_int32_array(PyObject *object, const char *what)
{
    PyObject *array =
        PyArray_FROM_OTF(object, NPY_INT32, NPY_ARRAY_IN_ARRAY | NPY_ARRAY_ENSURECOPY);
    if (array == NULL)
        return NULL;
    if (PyArray_NDIM((PyArrayObject *)array) != 1 ||
        PyArray_DIM((PyArrayObject *)array, 0) > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "%s has %d dimensions, expected 1", what,
                     PyArray_NDIM((PyArrayObject *)array));
        Py_DECREF(array);
        return NULL;
    }
    return (PyArrayObject *)array;
}

PyObject *mil_sample_tuple(const mil_sample *sample)
{
    PyObject *top = PyList_New(sample->n_top);
    if (top == NULL)
        return NULL;
    for (int32_t i = 0; i < sample->n_top; i++) {
        PyObject *pair = Py_BuildValue("(if)", sample->top[i].token, sample->top[i].logprob);
        if (pair == NULL) {
            Py_DECREF(top);
            return NULL;
        }
        PyList_SET_ITEM(top, i, pair);
    }
    return Py_BuildValue("(ifiN)", sample->token, sample->logprob, sample->rank, top);
}
