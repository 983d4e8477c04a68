/* What a backend's first device offers, for `milpy doctor`; where its libraries are looked for. */
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

PyObject *mil_py_add_library_dir(PyObject *module, PyObject *path)
{
    (void)module;
    const char *text = PyUnicode_AsUTF8(path);
    if (text == NULL)
        return NULL;
    mil_backend_add_library_dir(text);
    Py_RETURN_NONE;
}
