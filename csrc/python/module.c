/* milpy._C: the extension's module object. Types live in a file each. */
#define MIL_IMPORTS_NUMPY
#include "python/convert.h"
#include "python/device.h"
#include "python/ops.h"
#include "python/place.h"

#include "base/memory.h"
#include "base/switch.h"
#include "ops/find.h"

static PyObject *machine_report(PyObject *module, PyObject *unused)
{
    (void)unused;
    mil_machine_report report;
    mil_status status = mil_machine_report_get(&report);
    if (status != MIL_OK)
        return mil_raise(PyModule_GetState(module), status);
    return Py_BuildValue("{s:s,s:s,s:i,s:i,s:d,s:K,s:K}", "isa", report.isa, "isa_available",
                         report.isa_available, "n_threads", report.n_threads, "n_cpus_affinity",
                         report.n_cpus_affinity, "cgroup_cpus", report.cgroup_cpus, "memory_bytes",
                         (unsigned long long)report.memory_bytes, "memory_free_bytes",
                         (unsigned long long)report.memory_free_bytes);
}

static PyObject *memory_held(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyLong_FromSize_t(mil_memory_held_bytes());
}

static PyObject *memory_calls(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyLong_FromUnsignedLongLong(mil_memory_calls());
}

static PyObject *read_switch(PyObject *module, PyObject *args)
{
    const char *name;
    int otherwise;
    bool is_on;
    if (!PyArg_ParseTuple(args, "sp:read_switch", &name, &otherwise))
        return NULL;
    mil_status status = mil_switch_read(&is_on, name, otherwise);
    return status == MIL_OK ? PyBool_FromLong(is_on) : mil_raise(PyModule_GetState(module), status);
}

#define OP(name, arguments)                                                                        \
    {"op_" #name, mil_py_op_##name, METH_VARARGS,                                                  \
     "op_" #name "(device, stream, " arguments "); see milpy.ops." #name "."}

static PyMethodDef methods[] = {
    {"machine_report", machine_report, METH_NOARGS,
     "What this machine offers: isa, isa_available, n_threads, n_cpus_affinity, cgroup_cpus,\n"
     "memory_bytes, memory_free_bytes. Raises RequestError where MILPY_CPU_ISA cannot be "
     "honoured."},
    {"memory_held", memory_held, METH_NOARGS, "Bytes that the C core now holds."},
    {"memory_calls", memory_calls, METH_NOARGS,
     "Allocations of the C core since the process began."},
    {"read_switch", read_switch, METH_VARARGS,
     "read_switch(name, otherwise): whether a variable of the environment is 1, not 0; otherwise\n"
     "where it is unset or empty. Raises RequestError for anything else."},
    {"gpu_reports", mil_py_gpu_reports, METH_NOARGS,
     "A dict for each GPU: what it is, which kernels run there with which cuBLASLt, or the "
     "problem.\n"
     "Raises EngineError where there is none, which says what is missing."},
    {"find_gpu", mil_py_find_gpu, METH_NOARGS,
     "The ordinal of the GPU that device auto is. Raises EngineError where it is the CPU: why."},
    {"add_library_dir", mil_py_add_library_dir, METH_O,
     "One more directory to find NVIDIA's libraries in, before a model is made."},
    {"dlpack_stream", mil_py_dlpack_stream, METH_VARARGS,
     "dlpack_stream(exchange_api, device_type, device_id): the stream that a producer now works\n"
     "on, as an int, by its type's __dlpack_c_exchange_api__; None where that does not tell."},
    OP(rms_norm, "out, x, weight, residual, eps"),
    OP(silu_and_mul, "out, gate_up, interleave"),
    OP(linear, "out, x, weight, bias, deterministic"),
    OP(embedding, "out, tokens, weight"),
    OP(sample, "out, logits, params, positions, logprobs, ranks, top_tokens,"
               " top_logprobs"),
    OP(rope, "out, x, positions, cos, sin, interleaved"),
    OP(rope_and_cache, "out, qkv, positions, cos, sin, k_cache, v_cache, page_table, query_indptr,"
                       " kv_lengths, interleaved"),
    OP(attention, "out, q, k_cache, v_cache, page_table, query_indptr, kv_lengths, scale, window,"
                  " softcap"),
    OP(lora, "y, x, a, v, b, segment_indptr, segment_adapter, rows, scales, scale"),
    {NULL, NULL, 0, NULL},
};

static int add_errors(mil_module_state *state)
{
    PyObject *errors = PyImport_ImportModule("milpy.errors");
    if (errors == NULL)
        return -1;
    for (int i = 0; i < MIL_N_STATUS; i++) {
        if (mil_error_names[i] == NULL)
            continue;
        state->errors[i] = PyObject_GetAttrString(errors, mil_error_names[i]);
        if (state->errors[i] == NULL) {
            Py_DECREF(errors);
            return -1;
        }
    }
    Py_DECREF(errors);
    return 0;
}

static int add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **slot)
{
    *slot = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    return *slot == NULL ? -1 : PyModule_AddType(module, *slot);
}

static int add_constants(PyObject *module)
{
    static const struct {
        const char *name;
        long value;
    } constants[] = {
        {"MAX_LOGPROBS", MIL_MAX_LOGPROBS},   {"MAX_STOP_TOKENS", MIL_MAX_STOP_TOKENS},
        {"FINISH_NONE", MIL_FINISH_NONE},     {"FINISH_STOP", MIL_FINISH_STOP},
        {"FINISH_LENGTH", MIL_FINISH_LENGTH}, {"FINISH_CANCELLED", MIL_FINISH_CANCELLED},
        {"FINISH_ERROR", MIL_FINISH_ERROR},   {"FINISH_NUMERICS", MIL_FINISH_NUMERICS},
    };
    for (size_t i = 0; i < sizeof constants / sizeof constants[0]; i++)
        if (PyModule_AddIntConstant(module, constants[i].name, constants[i].value) < 0)
            return -1;
    if (PyModule_AddObjectRef(module, "HAS_CUDA", mil_backend_has_cuda() ? Py_True : Py_False) < 0)
        return -1;
    PyObject *share = PyFloat_FromDouble(MIL_GPU_MEMORY_UTILIZATION);
    int failed = PyModule_AddObjectRef(module, "GPU_MEMORY_UTILIZATION", share);
    Py_XDECREF(share);
    return failed;
}

static int exec(PyObject *module)
{
    import_array1(-1);
    mil_module_state *state = PyModule_GetState(module);
    if (add_errors(state) < 0 || add_type(module, &mil_progress_spec, &state->progress) < 0 ||
        add_type(module, &mil_model_spec, &state->model) < 0 ||
        add_type(module, &mil_engine_spec, &state->engine) < 0 ||
        add_type(module, &mil_seq_spec, &state->seq) < 0 ||
        add_type(module, &mil_stepper_spec, &state->stepper) < 0)
        return -1;
    return add_constants(module);
}

static int traverse(PyObject *module, visitproc visit, void *arg)
{
    mil_module_state *state = PyModule_GetState(module);
    for (int i = 0; i < MIL_N_STATUS; i++)
        Py_VISIT(state->errors[i]);
    Py_VISIT(state->progress);
    Py_VISIT(state->model);
    Py_VISIT(state->engine);
    Py_VISIT(state->stepper);
    Py_VISIT(state->seq);
    return 0;
}

static int clear(PyObject *module)
{
    mil_module_state *state = PyModule_GetState(module);
    for (int i = 0; i < MIL_N_STATUS; i++)
        Py_CLEAR(state->errors[i]);
    Py_CLEAR(state->progress);
    Py_CLEAR(state->model);
    Py_CLEAR(state->engine);
    Py_CLEAR(state->stepper);
    Py_CLEAR(state->seq);
    return 0;
}

static void module_free(void *module)
{
    mil_module_state *state = PyModule_GetState(module);
    mil_places_free(state->places);
    state->places = NULL;
    (void)clear(module);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, exec},
#if PY_VERSION_HEX >= 0x030c0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED}, /* as NumPy */
#endif
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "milpy._C",
    .m_doc = "The C core of milpy. milpy.LLM and milpy.engine are the faces to use.",
    .m_size = sizeof(mil_module_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__C(void);

PyMODINIT_FUNC PyInit__C(void)
{
    return PyModuleDef_Init(&definition);
}
