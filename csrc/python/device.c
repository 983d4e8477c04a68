/* What a backend's first device offers, for `milpy doctor`; where its libraries are looked for. */
#include "python/device.h"

#include "python/convert.h"

#include "ops/backend.h"
#include "ops/find.h"

/* Opens a queue, so that a missing library is found as well. */
static mil_status read_memory(const char *name, uint64_t *n_free, uint64_t *n_total)
{
    const mil_backend *backend;
    struct mil_queue *queue = NULL;
    MIL_TRY(mil_backend_find(&backend, name));
    MIL_TRY(backend->device->open(&queue, 0));
    mil_status status = backend->device->free_bytes(queue, n_free, n_total);
    backend->device->close(queue);
    return status;
}

PyObject *mil_py_device_report(PyObject *module, PyObject *name)
{
    uint64_t n_free = 0, n_total = 0;
    mil_status status;
    const char *text = PyUnicode_AsUTF8(name);
    if (text == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = read_memory(text, &n_free, &n_total);
    Py_END_ALLOW_THREADS
    if (status != MIL_OK)
        return mil_raise(PyModule_GetState(module), status);
    return Py_BuildValue("{s:K,s:K}", "memory_bytes", (unsigned long long)n_total,
                         "memory_free_bytes", (unsigned long long)n_free);
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
