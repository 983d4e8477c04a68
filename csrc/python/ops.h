/* Functions of the module that run one op each, for milpy/ops.py: arrays or capsules in, None out.
 * The first two arguments are a device ("cuda:1"; None: where the arrays lie) and a stream. */
#pragma once

#include "python/state.h"

/* dlpack_stream(exchange_api, device_type, device_id) -> handle, or None */
PyObject *mil_py_dlpack_stream(PyObject *module, PyObject *args);

PyObject *mil_py_op_rms_norm(PyObject *module, PyObject *args);
PyObject *mil_py_op_silu_and_mul(PyObject *module, PyObject *args);
PyObject *mil_py_op_linear(PyObject *module, PyObject *args);
PyObject *mil_py_op_embedding(PyObject *module, PyObject *args);
PyObject *mil_py_op_sample(PyObject *module, PyObject *args);
PyObject *mil_py_op_rope(PyObject *module, PyObject *args);
PyObject *mil_py_op_rope_and_cache(PyObject *module, PyObject *args);
PyObject *mil_py_op_attention(PyObject *module, PyObject *args);
PyObject *mil_py_op_lora(PyObject *module, PyObject *args);
