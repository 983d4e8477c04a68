/* Python values to C structs and back: one place, one table of errors. RAISES: every function here
 * that returns -1 or NULL has set a Python exception. */
#pragma once

#include "python/state.h"

/* The milpy.errors class of each status, in mil_status order from MIL_ERR_ARGUMENT on. */
extern const char *const mil_error_names[MIL_N_STATUS];

/* Raise the exception of status with this thread's message. Always returns NULL. */
PyObject *mil_raise(mil_module_state *state, mil_status status);

int mil_attr_i32(PyObject *object, const char *name, int32_t *out);
int mil_attr_i64(PyObject *object, const char *name, int64_t *out);
int mil_attr_u64(PyObject *object, const char *name, uint64_t *out);
int mil_attr_f64(PyObject *object, const char *name, double *out);
int mil_attr_bool(PyObject *object, const char *name, bool *out);

/* A milpy.config.ModelConfig. */
int mil_read_config(PyObject *config, int32_t max_position, mil_config *out);

/* C arrays built from a Checkpoint or an Adapter, and the Python objects whose text they point to.
 */
typedef struct mil_borrowed {
    PyObject *keep; /* a list */
    mil_file_info *files;
    int32_t n_files;
    mil_tensor_info *tensors;
    int32_t n_tensors;
    mil_adapter_module_info *modules;
    int32_t n_modules;
} mil_borrowed;

/* A milpy.checkpoint.Checkpoint. On failure *out is released. */
int mil_read_checkpoint(PyObject *checkpoint, mil_borrowed *out);
/* A milpy.adapters.Adapter. */
int mil_read_adapter(PyObject *adapter, mil_borrowed *out);
void mil_borrowed_release(mil_borrowed *borrowed);

/* A one-dimensional int32 array (new reference) from a sequence or array of ints; values that do
 * not fit are an error, never wrapped. Always a copy: what is checked without the GIL must not be
 * the caller's to change. */
PyArrayObject *mil_int32_array(PyObject *object, const char *what);

/* (token, logprob, rank, [(token, logprob), ...]) */
PyObject *mil_sample_tuple(const mil_sample *sample);
