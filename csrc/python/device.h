/* Functions of the module about devices. */
#pragma once

#include "python/state.h"

PyObject *mil_py_gpu_reports(PyObject *module, PyObject *unused);
PyObject *mil_py_find_gpu(PyObject *module, PyObject *unused);
PyObject *mil_py_add_library_dir(PyObject *module, PyObject *path);
