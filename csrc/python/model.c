/* _C.Model: a loaded model and its adapters. Long calls run without the GIL. */
#include "python/convert.h"

#include <unistd.h>

bool mil_model_object_is_ours(const mil_model_object *object)
{
    return object->owner == getpid();
}

mil_model *mil_model_object_use(mil_module_state *state, mil_model_object *object)
{
    if (object->model == NULL) {
        PyErr_SetString(state->errors[MIL_ERR_CLOSED], "the model is closed");
        return NULL;
    }
    object->n_users++;
    return object->model;
}

static mil_status open_model(mil_model **out, const mil_config *config, const mil_borrowed *source,
                             bool is_dummy, uint64_t dummy_seed, const mil_model_options *options)
{
    mil_checkpoint_info info = {
        .files = source->files,
        .n_files = source->n_files,
        .tensors = source->tensors,
        .n_tensors = source->n_tensors,
        .is_dummy = is_dummy,
        .dummy_seed = dummy_seed,
    };
    return mil_model_open(out, config, &info, options);
}

static PyObject *model_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"config",   "checkpoint",      "max_position",
                            "device",   "tensor_parallel", "n_threads",
                            "progress", "dummy_seed",      "gpu_memory_utilization",
                            NULL};
    PyObject *config_object;
    PyObject *checkpoint;
    int max_position = 0;
    const char *device = "auto";
    int tensor_parallel = 1;
    int n_threads = 0;
    PyObject *progress = Py_None;
    unsigned long long dummy_seed = 0;
    double gpu_memory_utilization = 0.0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$isiiOKd:Model", names, &config_object,
                                     &checkpoint, &max_position, &device, &tensor_parallel,
                                     &n_threads, &progress, &dummy_seed, &gpu_memory_utilization))
        return NULL;
    mil_module_state *state = PyType_GetModuleState(type);
    if (progress != Py_None && !Py_IS_TYPE(progress, state->progress)) {
        PyErr_Format(PyExc_TypeError, "progress is a %s, expected a Progress or None",
                     Py_TYPE(progress)->tp_name);
        return NULL;
    }
    mil_config config;
    mil_borrowed source = {0};
    if (mil_read_config(config_object, max_position, &config) < 0 ||
        (checkpoint != Py_None && mil_read_checkpoint(checkpoint, &source) < 0))
        return NULL;
    mil_model_object *self = (mil_model_object *)type->tp_alloc(type, 0);
    if (self == NULL) {
        mil_borrowed_release(&source);
        return NULL;
    }
    self->owner = getpid();
    self->vocab = config.vocab;
    mil_model_options options = {
        .device = device,
        .tensor_parallel = tensor_parallel,
        .n_threads = n_threads,
        .progress = progress != Py_None ? ((mil_progress_object *)progress)->progress : NULL,
        .gpu_memory_utilization = gpu_memory_utilization,
    };
    mil_status status;
    Py_BEGIN_ALLOW_THREADS
    status =
        open_model(&self->model, &config, &source, checkpoint == Py_None, dummy_seed, &options);
    Py_END_ALLOW_THREADS
    mil_borrowed_release(&source);
    if (status != MIL_OK) {
        mil_raise(state, status);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void model_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    if (mil_model_object_is_ours((mil_model_object *)object)) {
        mil_model *model = ((mil_model_object *)object)->model;
        Py_BEGIN_ALLOW_THREADS
        mil_model_free(model);
        Py_END_ALLOW_THREADS
    }
    type->tp_free(object);
    Py_DECREF(type);
}

static mil_model *open_or_raise(PyObject *self)
{
    mil_model *model = ((mil_model_object *)self)->model;
    if (model == NULL)
        PyErr_SetString(mil_state_of(self)->errors[MIL_ERR_CLOSED], "the model is closed");
    return model;
}

static PyObject *model_close(PyObject *self, PyObject *unused)
{
    (void)unused;
    mil_model_object *object = (mil_model_object *)self;
    if (!mil_model_object_is_ours(object))
        Py_RETURN_NONE;
    if (object->n_users > 0) {
        PyErr_Format(mil_state_of(self)->errors[MIL_ERR_BUSY],
                     "the model is used by %zd engines or steppers, expected none",
                     object->n_users);
        return NULL;
    }
    mil_model *model = object->model;
    object->model = NULL;
    Py_BEGIN_ALLOW_THREADS
    mil_model_free(model);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *model_report(PyObject *self, PyObject *unused)
{
    (void)unused;
    mil_model *model = open_or_raise(self);
    if (model == NULL)
        return NULL;
    mil_model_report report;
    mil_model_report_get(model, &report);
    return Py_BuildValue("{s:n,s:n,s:i,s:i,s:i,s:s,s:s,s:s}", "weight_bytes",
                         (Py_ssize_t)report.weight_bytes, "adapter_bytes",
                         (Py_ssize_t)report.adapter_bytes, "n_adapters", report.n_adapters, "world",
                         report.world, "n_threads", report.n_threads, "device", report.device,
                         "isa", report.isa, "no_cuda", report.no_cuda);
}

static PyObject *model_add_adapter(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"adapter", "dummy_seed", NULL};
    PyObject *adapter;
    PyObject *seed = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O:add_adapter", names, &adapter, &seed))
        return NULL;
    uint64_t dummy_seed = seed != Py_None ? PyLong_AsUnsignedLongLong(seed) : 0;
    mil_borrowed source;
    mil_model *model = open_or_raise(self);
    if (PyErr_Occurred() || model == NULL || mil_read_adapter(adapter, &source) < 0)
        return NULL;
    mil_adapter_info info = {
        .files = source.files,
        .n_files = source.n_files,
        .modules = source.modules,
        .n_modules = source.n_modules,
        .is_dummy = seed != Py_None,
        .dummy_seed = dummy_seed,
    };
    int32_t content = -1;
    mil_status status;
    /* A user for the while, so that close() in another thread waits its turn with an error. */
    mil_model_object *object = (mil_model_object *)self;
    object->n_users++;
    Py_BEGIN_ALLOW_THREADS
    status = mil_model_add_adapter(model, &info, &content);
    Py_END_ALLOW_THREADS
    object->n_users--;
    mil_borrowed_release(&source);
    return status != MIL_OK ? mil_raise(mil_state_of(self), status) : PyLong_FromLong(content);
}

static PyObject *model_release_adapter(PyObject *self, PyObject *argument)
{
    mil_model *model = open_or_raise(self);
    int32_t content = model != NULL ? (int32_t)PyLong_AsLong(argument) : -1;
    if (PyErr_Occurred())
        return NULL;
    mil_status status = mil_model_release_adapter(model, content);
    if (status != MIL_OK)
        return mil_raise(mil_state_of(self), status);
    Py_RETURN_NONE;
}

static PyMethodDef model_methods[] = {
    {"close", model_close, METH_NOARGS, "Give all memory back; an error while engines use it."},
    {"report", model_report, METH_NOARGS,
     "weight_bytes, adapter_bytes, n_adapters, world, n_threads, device, isa, no_cuda"},
    {"add_adapter", (PyCFunction)(void (*)(void))model_add_adapter, METH_VARARGS | METH_KEYWORDS,
     "add_adapter(adapter, dummy_seed=None) -> content id, holding one reference"},
    {"release_adapter", model_release_adapter, METH_O,
     "release_adapter(content): drop the reference; freed when the last request with it ends"},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot model_slots[] = {
    {Py_tp_new, model_new},
    {Py_tp_dealloc, model_dealloc},
    {Py_tp_methods, model_methods},
    {Py_tp_doc,
     "Model(config, checkpoint, *, max_position, device='auto', tensor_parallel=1,\n"
     "n_threads=0, progress=None, dummy_seed=0, gpu_memory_utilization=0.0): checkpoint\n"
     "None means dummy weights; weights beyond the share of a GPU are refused."},
    {0, NULL},
};

PyType_Spec mil_model_spec = {
    .name = "milpy._C.Model",
    .basicsize = sizeof(mil_model_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = model_slots,
};
