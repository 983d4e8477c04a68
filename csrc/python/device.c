/* What a backend's devices offer, for `milpy doctor`; where their libraries are looked for. */
#include "python/device.h"

#include "python/convert.h"

#include "ops/find.h"

#include <string.h>

/* Cut text may end inside a letter. */
static PyObject *decode(const char *text)
{
    return PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace");
}

static PyObject *dict_of(const mil_gpu_report *gpu)
{
    return Py_BuildValue("{s:s,s:i,s:i,s:i,s:K,s:N,s:K,s:s,s:L,s:N}", "name", gpu->name,
                         "compute_capability", gpu->compute_capability, "driver_cuda",
                         gpu->driver_cuda, "build_cuda", gpu->build_cuda, "total_bytes",
                         (unsigned long long)gpu->total_bytes, "problem", decode(gpu->problem),
                         "free_bytes", (unsigned long long)gpu->free_bytes, "kernels", gpu->kernels,
                         "cublaslt_version", (long long)gpu->cublaslt_version, "cublaslt_path",
                         decode(gpu->cublaslt_path));
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

PyObject *mil_py_find_gpu(PyObject *module, PyObject *unused)
{
    (void)unused;
    int32_t ordinal;
    mil_status status;
    Py_BEGIN_ALLOW_THREADS
    status = mil_backend_find_gpu(&ordinal);
    Py_END_ALLOW_THREADS
    return status == MIL_OK ? PyLong_FromLong(ordinal)
                            : mil_raise(PyModule_GetState(module), status);
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
