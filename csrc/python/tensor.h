/* An array of Python's as an op sees it: a NumPy array, or a DLPack capsule of another library.
 *
 * DLPack's ABI is declared in tensor.c (dlpack.h 1.3 and the unversioned struct before 1.0). A
 * capsule is consumed: its tensor is given back by its own deleter when the operand is released. */
#pragma once

#include "python/state.h"

#define MIL_MAX_DIMS 4
#define MIL_DTYPE_OTHER ((mil_dtype) - 1)

typedef struct mil_operand {
    const char *name; /* as errors say it */
    char *data;
    size_t n_bytes;
    int32_t n_dims;
    int32_t shape[MIL_MAX_DIMS];
    mil_dtype dtype;     /* uint16 counts as the bits of bfloat16; MIL_DTYPE_OTHER: no op's */
    char dtype_name[32]; /* as errors say it */
    bool is_cuda;
    int32_t ordinal;
    bool is_read_only;
    bool is_written; /* by this op */
    PyObject *array; /* a NumPy array, or NULL */
    void *managed;   /* a DLPack tensor, or NULL */
    bool is_versioned;
    void *copy; /* of index arrays of the host: what is checked must not change */
} mil_operand;

/* Fill *out from a NumPy array or a capsule; needs the GIL. Refuses what no op takes: an unknown
 * device, more than MIL_MAX_DIMS dimensions, rows with gaps, addresses that are no multiple of 16.
 * An unknown dtype is for mil_operand_expect to refuse, which knows what was wanted. On failure
 * nothing is held. */
mil_status mil_operand_take(mil_operand *out, const char *op, const char *name, PyObject *object)
    MIL_WARN_UNUSED;
void mil_operand_release(mil_operand *operand);

/* The dtype must be one of these two (the same twice where one alone will do), the shape this one;
 * a size of MIL_ANY is any. What is written must be writable. */
#define MIL_ANY (-1)
mil_status mil_operand_expect(const mil_operand *operand, const char *op, mil_dtype dtype,
                              mil_dtype other, int32_t n_dims, const int32_t *shape)
    MIL_WARN_UNUSED;

/* The stream that a producer now works on, by its type's table for DLPack (the capsule
 * __dlpack_c_exchange_api__, DLPack 1.3); needs the GIL. 1; 0 where the table has no function that
 * tells it; -1 with a Python exception. */
int mil_dlpack_stream(void **out, PyObject *exchange_api, int32_t device_type, int32_t device_id);

/* Replace the data of a host operand by a copy of its own. */
mil_status mil_operand_copy(mil_operand *operand) MIL_WARN_UNUSED;
