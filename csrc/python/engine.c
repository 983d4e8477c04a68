/* _C.Engine: a thread lends its stack to run(); others submit, cancel and poll. No call holds the
 * GIL while it waits, and none takes an engine lock with the GIL held for longer than the lock's
 * short sections. */
#include "python/convert.h"

#include "base/memory.h"

typedef struct engine_object {
    PyObject_HEAD
    mil_engine *engine; /* NULL once freed */
    mil_model_object *model;
    int n_inside; /* calls now inside the C engine, changed under the GIL: free() waits for none */
} engine_object;

static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"model",
                            "max_model_len",
                            "max_num_seqs",
                            "max_num_batched_tokens",
                            "page_size",
                            "kv_cache_bytes",
                            "gpu_memory_utilization",
                            "deterministic",
                            "enforce_eager",
                            "poison",
                            NULL};
    PyObject *model_object;
    mil_engine_options options = {0};
    unsigned long long kv_cache_bytes = 0;
    int poison = 0;
    int deterministic = 0;
    int enforce_eager = 0;
    mil_module_state *state = PyType_GetModuleState(type);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|$iiiiKdppp:Engine", names, state->model,
                                     &model_object, &options.max_model_len, &options.max_num_seqs,
                                     &options.max_num_batched_tokens, &options.page_size,
                                     &kv_cache_bytes, &options.gpu_memory_utilization,
                                     &deterministic, &enforce_eager, &poison))
        return NULL;
    options.kv_cache_bytes = kv_cache_bytes;
    options.deterministic = deterministic;
    options.enforce_eager = enforce_eager;
    options.poison = poison;
    engine_object *self = (engine_object *)type->tp_alloc(type, 0);
    mil_model *model = NULL;
    if (self == NULL ||
        (model = mil_model_object_use(state, (mil_model_object *)model_object)) == NULL) {
        Py_XDECREF(self);
        return NULL;
    }
    self->model = (mil_model_object *)Py_NewRef(model_object);
    mil_status status;
    Py_BEGIN_ALLOW_THREADS
    status = mil_engine_create(&self->engine, model, &options);
    Py_END_ALLOW_THREADS
    if (status != MIL_OK) {
        mil_raise(state, status);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void give_back(engine_object *self)
{
    mil_engine *engine = self->engine;
    self->engine = NULL;
    if (self->model != NULL && mil_model_object_is_ours(self->model)) {
        Py_BEGIN_ALLOW_THREADS
        mil_engine_free(engine);
        Py_END_ALLOW_THREADS
    }
    if (self->model != NULL)
        self->model->n_users--;
    Py_CLEAR(self->model);
}

static void engine_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    give_back((engine_object *)object);
    type->tp_free(object);
    Py_DECREF(type);
}

static mil_engine *enter(engine_object *self)
{
    if (self->engine == NULL) {
        PyErr_SetString(mil_state_of((PyObject *)self)->errors[MIL_ERR_CLOSED],
                        "the engine is closed");
        return NULL;
    }
    self->n_inside++;
    return self->engine;
}

static PyObject *engine_run(PyObject *object, PyObject *unused)
{
    (void)unused;
    engine_object *self = (engine_object *)object;
    mil_engine *engine = enter(self);
    if (engine == NULL)
        return NULL;
    mil_status status;
    Py_BEGIN_ALLOW_THREADS
    status = mil_engine_run(engine);
    Py_END_ALLOW_THREADS
    self->n_inside--;
    if (status != MIL_OK)
        return mil_raise(mil_state_of(object), status);
    Py_RETURN_NONE;
}

static PyObject *engine_submit(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"tokens", "max_tokens", "stop_tokens", "adapter", "temperature",
                            "top_k",  "top_p",      "n_logprobs",  "seed",    NULL};
    engine_object *self = (engine_object *)object;
    PyObject *tokens_object;
    PyObject *stop_object = NULL;
    mil_request_options request = {
        .adapter = MIL_NO_ADAPTER,
        .sampling = {.temperature = 1.0f, .top_p = 1.0f, .n_logprobs = -1},
    };
    unsigned long long seed = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$iOififiK:submit", names, &tokens_object,
                                     &request.max_tokens, &stop_object, &request.adapter,
                                     &request.sampling.temperature, &request.sampling.top_k,
                                     &request.sampling.top_p, &request.sampling.n_logprobs, &seed))
        return NULL;
    request.sampling.seed = seed;
    PyArrayObject *tokens = mil_int32_array(tokens_object, "tokens");
    PyArrayObject *stops = NULL;
    PyObject *result = NULL;
    if (tokens == NULL ||
        (stop_object != NULL && (stops = mil_int32_array(stop_object, "stop_tokens")) == NULL))
        goto done;
    request.tokens = PyArray_DATA(tokens);
    request.n_tokens = (int32_t)PyArray_DIM(tokens, 0);
    if (stops != NULL) {
        request.stop_tokens = PyArray_DATA(stops);
        request.n_stop_tokens = (int32_t)PyArray_DIM(stops, 0);
    }
    mil_engine *engine = enter(self);
    if (engine == NULL)
        goto done;
    uint64_t id = 0;
    mil_status status;
    Py_BEGIN_ALLOW_THREADS
    status = mil_engine_submit(engine, &request, &id);
    Py_END_ALLOW_THREADS
    self->n_inside--;
    result = status != MIL_OK ? mil_raise(mil_state_of(object), status)
                              : PyLong_FromUnsignedLongLong(id);
done:
    Py_XDECREF(stops);
    Py_XDECREF(tokens);
    return result;
}

static PyObject *engine_cancel(PyObject *object, PyObject *argument)
{
    engine_object *self = (engine_object *)object;
    unsigned long long id = PyLong_AsUnsignedLongLong(argument);
    mil_engine *engine = PyErr_Occurred() ? NULL : enter(self);
    if (engine == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    mil_engine_cancel(engine, id);
    Py_END_ALLOW_THREADS
    self->n_inside--;
    Py_RETURN_NONE;
}

static PyObject *event_list(const mil_event *events, int32_t n)
{
    PyObject *list = PyList_New(n);
    for (int32_t i = 0; list != NULL && i < n; i++) {
        PyObject *sample =
            events[i].has_sample ? mil_sample_tuple(&events[i].sample) : Py_NewRef(Py_None);
        PyObject *event = sample == NULL ? NULL
                                         : Py_BuildValue("(KiN)", (unsigned long long)events[i].id,
                                                         (int)events[i].finish, sample);
        if (event == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, event);
    }
    return list;
}

static PyObject *engine_poll(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"timeout_ms", "max_events", NULL};
    engine_object *self = (engine_object *)object;
    int timeout_ms = -1;
    int max = 256;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|ii:poll", names, &timeout_ms, &max))
        return NULL;
    if (max < 1 || max > 65536)
        return PyErr_Format(PyExc_ValueError, "max_events is %d, expected 1..65536", max);
    mil_event *events = mil_alloc((size_t)max, sizeof *events);
    if (events == NULL)
        return PyErr_NoMemory();
    mil_engine *engine = enter(self);
    PyObject *result = NULL;
    if (engine != NULL) {
        int32_t n = 0;
        mil_status status;
        Py_BEGIN_ALLOW_THREADS
        status = mil_engine_poll(engine, events, max, timeout_ms, &n);
        Py_END_ALLOW_THREADS
        self->n_inside--;
        result = status != MIL_OK ? mil_raise(mil_state_of(object), status) : event_list(events, n);
    }
    mil_free(events);
    return result;
}

static PyObject *engine_stop(PyObject *object, PyObject *unused)
{
    (void)unused;
    engine_object *self = (engine_object *)object;
    if (self->engine != NULL)
        mil_engine_close(self->engine);
    Py_RETURN_NONE;
}

static PyObject *engine_free(PyObject *object, PyObject *unused)
{
    (void)unused;
    engine_object *self = (engine_object *)object;
    if (self->n_inside > 0) {
        PyErr_Format(mil_state_of(object)->errors[MIL_ERR_BUSY],
                     "the engine has %d calls inside, expected none", self->n_inside);
        return NULL;
    }
    give_back(self);
    Py_RETURN_NONE;
}

static PyObject *engine_stats(PyObject *object, PyObject *unused)
{
    (void)unused;
    engine_object *self = (engine_object *)object;
    mil_engine *engine = enter(self);
    if (engine == NULL)
        return NULL;
    mil_engine_stats stats;
    Py_BEGIN_ALLOW_THREADS
    mil_engine_stats_get(engine, &stats);
    Py_END_ALLOW_THREADS
    self->n_inside--;
    return Py_BuildValue(
        "{s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:n,s:n}",
        "n_waiting", stats.n_waiting, "n_running", stats.n_running, "n_pages", stats.n_pages,
        "n_free_pages", stats.n_free_pages, "page_size", stats.page_size, "max_model_len",
        stats.max_model_len, "max_num_seqs", stats.max_num_seqs, "max_num_batched_tokens",
        stats.max_num_batched_tokens, "n_steps", (unsigned long long)stats.n_steps, "n_preemptions",
        (unsigned long long)stats.n_preemptions, "n_prompt_tokens",
        (unsigned long long)stats.n_prompt_tokens, "n_generated_tokens",
        (unsigned long long)stats.n_generated_tokens, "fill_ns", (unsigned long long)stats.fill_ns,
        "submit_ns", (unsigned long long)stats.submit_ns, "wait_ns",
        (unsigned long long)stats.wait_ns, "retire_ns", (unsigned long long)stats.retire_ns,
        "capture_ns", (unsigned long long)stats.capture_ns, "kv_bytes", (Py_ssize_t)stats.kv_bytes,
        "workspace_bytes", (Py_ssize_t)stats.workspace_bytes);
}

static PyObject *engine_memory(PyObject *object, PyObject *unused)
{
    (void)unused;
    engine_object *self = (engine_object *)object;
    mil_engine *engine = enter(self);
    if (engine == NULL)
        return NULL;
    mil_memory_report report;
    mil_status status;
    Py_BEGIN_ALLOW_THREADS
    status = mil_engine_memory_get(engine, &report);
    Py_END_ALLOW_THREADS
    self->n_inside--;
    if (status != MIL_OK)
        return mil_raise(mil_state_of(object), status);
    return Py_BuildValue(
        "{s:s,s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:K}", "device", report.device, "weight_bytes",
        (unsigned long long)report.weight_bytes, "kv_bytes", (unsigned long long)report.kv_bytes,
        "adapter_bytes", (unsigned long long)report.adapter_bytes, "workspace_bytes",
        (unsigned long long)report.workspace_bytes, "graph_bytes",
        (unsigned long long)report.graph_bytes, "other_bytes",
        (unsigned long long)report.other_bytes, "free_bytes", (unsigned long long)report.free_bytes,
        "total_bytes", (unsigned long long)report.total_bytes, "pinned_bytes",
        (unsigned long long)report.pinned_bytes);
}

static PyMethodDef engine_methods[] = {
    {"run", engine_run, METH_NOARGS, "Run steps until stop(); the calling thread is lent for it."},
    {"submit", (PyCFunction)(void (*)(void))engine_submit, METH_VARARGS | METH_KEYWORDS,
     "submit(tokens, *, max_tokens=0, stop_tokens=(), adapter=-1, temperature=1.0, top_k=0,\n"
     "top_p=1.0, n_logprobs=-1, seed=0) -> request id"},
    {"cancel", engine_cancel, METH_O, "cancel(id)"},
    {"poll", (PyCFunction)(void (*)(void))engine_poll, METH_VARARGS | METH_KEYWORDS,
     "poll(timeout_ms=-1, max_events=256) -> [(id, finish, (token, logprob, rank, top) | None)]"},
    {"stop", engine_stop, METH_NOARGS, "Make run() return after the step in flight."},
    {"free", engine_free, METH_NOARGS, "Give all memory back; run() must have returned."},
    {"stats", engine_stats, METH_NOARGS, "The counters of mil_engine_stats as a dict."},
    {"memory", engine_memory, METH_NOARGS, "The rows of mil_memory_report as a dict."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot engine_slots[] = {
    {Py_tp_new, engine_new},
    {Py_tp_dealloc, engine_dealloc},
    {Py_tp_methods, engine_methods},
    {Py_tp_doc, "Engine(model, *, max_model_len=0, max_num_seqs=0, max_num_batched_tokens=0,\n"
                "page_size=0, kv_cache_bytes=0, gpu_memory_utilization=0.0,\n"
                "deterministic=False, enforce_eager=False, poison=False)"},
    {0, NULL},
};

PyType_Spec mil_engine_spec = {
    .name = "milpy._C.Engine",
    .basicsize = sizeof(engine_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = engine_slots,
};
