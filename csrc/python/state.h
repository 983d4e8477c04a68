/* The extension's state and the few helpers its types share. The only room with Python.h. */
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "milpy.h"

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL mil_numpy_api
#ifndef MIL_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include <sys/types.h>

#define MIL_N_STATUS (MIL_ERR_INTERNAL + 1)

typedef struct mil_module_state {
    PyObject *errors[MIL_N_STATUS]; /* milpy.errors classes by mil_status; [MIL_OK] is NULL */
    PyTypeObject *progress;
    PyTypeObject *model;
    PyTypeObject *engine;
    PyTypeObject *stepper;
    PyTypeObject *seq;
    struct mil_places *places; /* place.h: where milpy.ops run; NULL until one does */
} mil_module_state;

/* self is of one of our final types, so its type's module is this one. */
static inline mil_module_state *mil_state_of(PyObject *self)
{
    return PyType_GetModuleState(Py_TYPE(self));
}

extern PyType_Spec mil_progress_spec;
extern PyType_Spec mil_model_spec;
extern PyType_Spec mil_engine_spec;
extern PyType_Spec mil_stepper_spec;
extern PyType_Spec mil_seq_spec;

/* ---- objects that other types reach into ---- */

typedef struct mil_progress_object {
    PyObject_HEAD
    mil_progress *progress;
} mil_progress_object;

typedef struct mil_model_object {
    PyObject_HEAD
    mil_model *model;   /* NULL once closed */
    Py_ssize_t n_users; /* engines and steppers alive on it, changed under the GIL */
    int32_t vocab;      /* V, the width of a row of logits */
    pid_t owner;        /* the process that made it: a forked child has none of its threads */
} mil_model_object;

/* Whether the C object behind a model may be freed here. In a forked child it may not: its threads
 * are the parent's, its locks may be held by them, and the memory goes with the process. */
bool mil_model_object_is_ours(const mil_model_object *object);

/* The model of a Model object for a new engine or stepper; sets EngineError when it is closed. */
mil_model *mil_model_object_use(mil_module_state *state, mil_model_object *object);
