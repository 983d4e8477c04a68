/* _C.Progress: how far a load is, read from another thread. */
#include "python/convert.h"

static PyObject *progress_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, ":Progress", names))
        return NULL;
    mil_progress_object *self = (mil_progress_object *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    mil_status status = mil_progress_create(&self->progress);
    if (status != MIL_OK) {
        mil_raise(mil_state_of((PyObject *)self), status);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void progress_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    mil_progress_free(((mil_progress_object *)object)->progress);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyObject *progress_read(PyObject *self, PyObject *unused)
{
    (void)unused;
    uint64_t done;
    uint64_t total;
    mil_progress_read(((mil_progress_object *)self)->progress, &done, &total);
    return Py_BuildValue("(KK)", (unsigned long long)done, (unsigned long long)total);
}

static PyObject *progress_cancel(PyObject *self, PyObject *unused)
{
    (void)unused;
    mil_progress_cancel(((mil_progress_object *)self)->progress);
    Py_RETURN_NONE;
}

static PyMethodDef progress_methods[] = {
    {"read", progress_read, METH_NOARGS, "(done_bytes, total_bytes)"},
    {"cancel", progress_cancel, METH_NOARGS, "Make the load that uses this fail soon."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot progress_slots[] = {
    {Py_tp_new, progress_new},
    {Py_tp_dealloc, progress_dealloc},
    {Py_tp_methods, progress_methods},
    {Py_tp_doc, "Progress(): how far a load is."},
    {0, NULL},
};

PyType_Spec mil_progress_spec = {
    .name = "milpy._C.Progress",
    .basicsize = sizeof(mil_progress_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = progress_slots,
};
