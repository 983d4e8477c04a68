/* What a backend's devices offer, for `milpy doctor`; where their libraries are looked for. */
#include "python/device.h"

#include "python/convert.h"

#include "ops/backend.h"
#include "ops/find.h"

/* Opens a queue, so that a missing library is found as well. */
static mil_status read_memory(const char *name, mil_device_memory *memory)
{
    const mil_backend *backend;
    struct mil_queue *queue = NULL;
    MIL_TRY(mil_backend_find(&backend, name));
    MIL_TRY(backend->device->open(&queue, 0));
    mil_status status = backend->device->memory(queue, memory);
    backend->device->close(queue);
    return status;
}

PyObject *mil_py_device_report(PyObject *module, PyObject *name)
{
    mil_device_memory memory = {0};
    mil_status status;
    const char *text = PyUnicode_AsUTF8(name);
    if (text == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = read_memory(text, &memory);
    Py_END_ALLOW_THREADS
    if (status != MIL_OK)
        return mil_raise(PyModule_GetState(module), status);
    return Py_BuildValue("{s:K,s:K}", "memory_bytes", (unsigned long long)memory.n_total,
                         "memory_free_bytes", (unsigned long long)memory.n_free);
}

static PyObject *dict_of(const mil_gpu_report *gpu)
{
    return Py_BuildValue(
        "{s:s,s:i,s:i,s:i,s:K,s:s,s:K,s:s,s:L,s:s}", "name", gpu->name, "compute_capability",
        gpu->compute_capability, "driver_cuda", gpu->driver_cuda, "build_cuda", gpu->build_cuda,
        "total_bytes", (unsigned long long)gpu->total_bytes, "problem", gpu->problem, "free_bytes",
        (unsigned long long)gpu->free_bytes, "kernels", gpu->kernels, "cublaslt_version",
        (long long)gpu->cublaslt_version, "cublaslt_path", gpu->cublaslt_path);
}

/* 0, or -1 with a Python exception. */
static int append_gpu(PyObject *module, PyObject *gpus, int32_t ordinal)
{
    mil_gpu_report report;
    mil_status status;
    Py_BEGIN_ALLOW_THREADS
    status = mil_backend_report_gpu(&report, ordinal);
    Py_END_ALLOW_THREADS
    PyObject *gpu =
        status == MIL_OK ? dict_of(&report) : mil_raise(PyModule_GetState(module), status);
    int failed = gpu == NULL ? -1 : PyList_Append(gpus, gpu);
    Py_XDECREF(gpu);
    return failed;
}

PyObject *mil_py_gpu_reports(PyObject *module, PyObject *unused)
{
    (void)unused;
    int32_t n_gpus = 0;
    mil_status status;
    Py_BEGIN_ALLOW_THREADS
    status = mil_backend_count_gpus(&n_gpus);
    Py_END_ALLOW_THREADS
    if (status != MIL_OK)
        return mil_raise(PyModule_GetState(module), status);
    PyObject *gpus = PyList_New(0);
    for (int32_t i = 0; i < n_gpus && gpus != NULL; i++)
        if (append_gpu(module, gpus, i) != 0)
            Py_CLEAR(gpus);
    return gpus;
}

PyObject *mil_py_add_library_dir(PyObject *module, PyObject *path)
{
    (void)module;
    const char *text = PyUnicode_AsUTF8(path);
    if (text == NULL)
        return NULL;
    mil_backend_add_library_dir(text);
    Py_RETURN_NONE;
}
