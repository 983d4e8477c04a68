/* _C.Stepper and _C.Seq: a caller that owns pages and order. One step at a time. */
#include "python/convert.h"

#include "base/memory.h"

#include <string.h>

typedef struct stepper_object {
    PyObject_HEAD
    mil_stepper *stepper; /* NULL once freed */
    mil_model_object *model;
    bool is_stepping;
} stepper_object;

typedef struct seq_object {
    PyObject_HEAD
    mil_seq *seq;
    stepper_object *stepper;
} seq_object;

static PyObject *stepper_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"model",      "n_pages",           "page_size", "max_seqs",
                            "max_tokens", "max_pages_per_seq", NULL};
    PyObject *model_object;
    mil_stepper_options options = {0};
    mil_module_state *state = PyType_GetModuleState(type);
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "O!|$iiiii:Stepper", names, state->model, &model_object, &options.n_pages,
            &options.page_size, &options.max_seqs, &options.max_tokens, &options.max_pages_per_seq))
        return NULL;
    stepper_object *self = (stepper_object *)type->tp_alloc(type, 0);
    mil_model *model = NULL;
    if (self == NULL ||
        (model = mil_model_object_use(state, (mil_model_object *)model_object)) == NULL) {
        Py_XDECREF(self);
        return NULL;
    }
    self->model = (mil_model_object *)Py_NewRef(model_object);
    mil_status status = mil_stepper_create(&self->stepper, model, &options);
    if (status != MIL_OK) {
        mil_raise(state, status);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void stepper_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    stepper_object *self = (stepper_object *)object;
    if (self->model != NULL && mil_model_object_is_ours(self->model)) {
        /* May wait for another driver's steps. */
        Py_BEGIN_ALLOW_THREADS
        mil_stepper_free(self->stepper);
        Py_END_ALLOW_THREADS
    }
    if (self->model != NULL)
        self->model->n_users--;
    Py_CLEAR(self->model);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyObject *create_seq(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"adapter", "temperature", "top_k", "top_p", "n_logprobs", "seed", NULL};
    stepper_object *self = (stepper_object *)object;
    int32_t adapter = MIL_NO_ADAPTER;
    mil_sampling sampling = {.top_p = 1.0f, .n_logprobs = -1};
    unsigned long long seed = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$ififiK:create_seq", names, &adapter,
                                     &sampling.temperature, &sampling.top_k, &sampling.top_p,
                                     &sampling.n_logprobs, &seed))
        return NULL;
    sampling.seed = seed;
    mil_module_state *state = mil_state_of(object);
    seq_object *seq = (seq_object *)state->seq->tp_alloc(state->seq, 0);
    if (seq == NULL)
        return NULL;
    seq->stepper = (stepper_object *)Py_NewRef(object);
    mil_status status = mil_seq_create(&seq->seq, self->stepper, &sampling, adapter);
    if (status != MIL_OK) {
        mil_raise(state, status);
        Py_DECREF(seq);
        return NULL;
    }
    return (PyObject *)seq;
}

static void seq_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    stepper_object *stepper = ((seq_object *)object)->stepper;
    if (stepper != NULL && mil_model_object_is_ours(stepper->model))
        mil_seq_free(((seq_object *)object)->seq);
    Py_CLEAR(((seq_object *)object)->stepper);
    type->tp_free(object);
    Py_DECREF(type);
}

/* ---- step ---- */

/* item: (seq, tokens | None, n_past, pages[, all_logits]); arrays that it makes go to keep. */
static int read_item(stepper_object *self, PyObject *object, PyObject *keep, mil_step_item *item)
{
    PyObject *seq;
    PyObject *tokens;
    PyObject *pages;
    int all_logits = 0;
    if (!PyTuple_Check(object)) {
        PyErr_Format(PyExc_TypeError, "a step item is a %s, expected a tuple",
                     Py_TYPE(object)->tp_name);
        return -1;
    }
    if (!PyArg_ParseTuple(object, "O!OiO|p", mil_state_of((PyObject *)self)->seq, &seq, &tokens,
                          &item->n_past, &pages, &all_logits))
        return -1;
    if (((seq_object *)seq)->stepper != self) {
        PyErr_SetString(PyExc_ValueError, "a sequence belongs to another stepper");
        return -1;
    }
    item->seq = ((seq_object *)seq)->seq;
    item->all_logits = all_logits;
    item->tokens = NULL;
    item->n_tokens = 1;
    if (tokens != Py_None) {
        PyArrayObject *array = mil_int32_array(tokens, "tokens");
        if (array == NULL)
            return -1;
        item->tokens = PyArray_DATA(array);
        item->n_tokens = (int32_t)PyArray_DIM(array, 0);
        int kept = PyList_Append(keep, (PyObject *)array);
        Py_DECREF(array);
        if (kept < 0)
            return -1;
    }
    PyArrayObject *array = mil_int32_array(pages, "pages");
    if (array == NULL)
        return -1;
    item->pages = PyArray_DATA(array);
    item->n_pages = (int32_t)PyArray_DIM(array, 0);
    int kept = PyList_Append(keep, (PyObject *)array);
    Py_DECREF(array);
    return kept;
}

static PyObject *sample_list(const mil_sample *samples, int64_t n)
{
    PyObject *list = PyList_New(n);
    for (int64_t i = 0; list != NULL && i < n; i++) {
        PyObject *sample = mil_sample_tuple(&samples[i]);
        if (sample == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, sample);
    }
    return list;
}

static PyObject *stepper_step(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"items", "logits", NULL};
    stepper_object *self = (stepper_object *)object;
    PyObject *sequence;
    int wants_logits = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|p:step", names, &sequence, &wants_logits))
        return NULL;
    if (self->is_stepping) {
        PyErr_SetString(mil_state_of(object)->errors[MIL_ERR_BUSY], "a step is under way");
        return NULL;
    }
    /* A tuple of its own: a list could change while the step runs, and let go of a sequence. */
    PyObject *tuple = PySequence_Tuple(sequence);
    PyObject *keep = tuple != NULL ? PyList_New(0) : NULL;
    if (keep == NULL) {
        Py_XDECREF(tuple);
        return NULL;
    }
    int32_t n_items = (int32_t)PyTuple_GET_SIZE(tuple);
    mil_step_item *items = mil_alloc((size_t)n_items, sizeof *items);
    mil_sample *samples = NULL;
    PyObject *logits = NULL;
    PyObject *result = NULL;
    if (items == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    int64_t n_rows = 0;
    for (int32_t i = 0; i < n_items; i++) {
        if (read_item(self, PyTuple_GET_ITEM(tuple, i), keep, &items[i]) < 0)
            goto done;
        n_rows += items[i].all_logits ? items[i].n_tokens : 1;
    }
    samples = mil_alloc((size_t)n_rows, sizeof *samples);
    npy_intp shape[2] = {n_rows, self->model->vocab};
    logits = wants_logits ? PyArray_SimpleNew(2, shape, NPY_FLOAT32) : Py_NewRef(Py_None);
    if (samples == NULL || logits == NULL) {
        if (!PyErr_Occurred())
            PyErr_NoMemory();
        goto done;
    }
    float *logit_data = wants_logits ? PyArray_DATA((PyArrayObject *)logits) : NULL;
    mil_status status;
    self->is_stepping = true;
    Py_BEGIN_ALLOW_THREADS
    status = mil_stepper_step(self->stepper, items, n_items, samples, logit_data);
    Py_END_ALLOW_THREADS
    self->is_stepping = false;
    if (status != MIL_OK) {
        mil_raise(mil_state_of(object), status);
        goto done;
    }
    PyObject *list = sample_list(samples, n_rows);
    if (list != NULL)
        result = Py_BuildValue("(NO)", list, logits);
done:
    Py_XDECREF(logits);
    mil_free(samples);
    mil_free(items);
    Py_DECREF(keep);
    Py_DECREF(tuple);
    return result;
}

static PyMethodDef stepper_methods[] = {
    {"create_seq", (PyCFunction)(void (*)(void))create_seq, METH_VARARGS | METH_KEYWORDS,
     "create_seq(*, adapter=-1, temperature=0.0, top_k=0, top_p=1.0, n_logprobs=-1, seed=0) -> "
     "Seq"},
    {"step", (PyCFunction)(void (*)(void))stepper_step, METH_VARARGS | METH_KEYWORDS,
     "step([(seq, tokens | None, n_past, pages[, all_logits])], logits=False)\n"
     "-> ([(token, logprob, rank, top)], float32 [rows, vocab] | None), in the items' order"},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot stepper_slots[] = {
    {Py_tp_new, stepper_new},
    {Py_tp_dealloc, stepper_dealloc},
    {Py_tp_methods, stepper_methods},
    {Py_tp_doc, "Stepper(model, *, n_pages, page_size, max_seqs, max_tokens, max_pages_per_seq): "
                "the caller owns pages 0 .. n_pages - 1 and the order."},
    {0, NULL},
};

PyType_Spec mil_stepper_spec = {
    .name = "milpy._C.Stepper",
    .basicsize = sizeof(stepper_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = stepper_slots,
};

static PyType_Slot seq_slots[] = {
    {Py_tp_dealloc, seq_dealloc},
    {Py_tp_doc, "A sequence of a Stepper; made by Stepper.create_seq."},
    {0, NULL},
};

PyType_Spec mil_seq_spec = {
    .name = "milpy._C.Seq",
    .basicsize = sizeof(seq_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = seq_slots,
};
