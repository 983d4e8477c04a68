/* One call of an op from Python: its operands, where it runs, what is lent for it.
 *
 * Operands of a call all lie on the host or all on one GPU. On a GPU they are used in place, on the
 * caller's stream, and nothing is allocated once the largest sizes were seen. Host operands are
 * used in place on the CPU, and copied to a GPU and back where the call names one. Failures are
 * kept in `status` and later steps do nothing. */
#pragma once

#include "python/place.h"
#include "python/tensor.h"

#define MIL_MAX_OPERANDS 12
#define MIL_MAX_LOANS 16

/* Memory of one call on a host, or of copies on a device. */
typedef struct mil_op_loan {
    mil_slab slab;
    const mil_operand *operand; /* copied back to it at the end where it is written; or NULL */
    bool is_widened;            /* float32 here, bfloat16 there */
} mil_op_loan;

typedef struct mil_op_call {
    const char *op;
    const char *device;        /* NULL: where the operands lie */
    unsigned long long stream; /* a cudaStream_t */
    mil_module_state *state;
    mil_status status;
    mil_operand operands[MIL_MAX_OPERANDS];
    int32_t n_operands;
    bool is_cuda, is_lent;
    int32_t ordinal;
    mil_places *places;
    mil_place *place;
    mil_context *context;
    mil_op_loan loans[MIL_MAX_LOANS];
    int32_t n_loans;
} mil_op_call;

/* ---- with the GIL ---- */

/* The operand of an object; NULL after a failure, and for the optional one that is None. */
mil_operand *mil_op_take(mil_op_call *call, const char *name, PyObject *object);
mil_operand *mil_op_take_optional(mil_op_call *call, const char *name, PyObject *object);
mil_operand *mil_op_take_written(mil_op_call *call, const char *name, PyObject *object);
/* Index arrays: int32, and on the host a copy of them. */
mil_operand *mil_op_take_indices(mil_op_call *call, const char *name, PyObject *object);
/* Dtype and shape of an operand, if there is one. */
void mil_op_expect(mil_op_call *call, const mil_operand *operand, mil_dtype dtype, int32_t n_dims,
                   const int32_t *shape);
void mil_op_expect_either(mil_op_call *call, const mil_operand *operand, mil_dtype dtype,
                          mil_dtype other, int32_t n_dims, const int32_t *shape);
/* What one product hands to the next op: bfloat16, or float32 where the op runs on the host. */
void mil_op_expect_product(mil_op_call *call, const mil_operand *operand, int32_t n_dims,
                           const int32_t *shape);
/* value must be in [least, most]; name[index], of the second. */
void mil_op_expect_in(mil_op_call *call, const char *name, int64_t value, int64_t least,
                      int64_t most);
void mil_op_expect_entry(mil_op_call *call, const char *name, int32_t index, int64_t value,
                         int64_t least, int64_t most);
int32_t mil_op_size(const mil_operand *operand, int32_t dim); /* 0 where there is none */
/* Whether what is in the arrays may be looked at: nothing has failed, and all that were taken lie
 * on the host. Arrays of several devices are a failure. */
bool mil_op_can_look(mil_op_call *call);

#define MIL_SHAPE(...)                                                                             \
    (int32_t)(sizeof((int32_t[]){__VA_ARGS__}) / sizeof(int32_t)), (int32_t[])                     \
    {                                                                                              \
        __VA_ARGS__                                                                                \
    }

/* Run body without the GIL, release everything, and return None or raise. */
typedef void (*mil_op_body)(mil_op_call *call, void *argument);
PyObject *mil_op_run(mil_op_call *call, mil_op_body body, void *argument);

/* ---- in a body, without the GIL ---- */

/* Where the op finds an operand; NULL for NULL. */
void *mil_op_lend(mil_op_call *call, const mil_operand *operand);
/* Index arrays of mil_op_take_indices. Those of a host were checked; a copy is asked of *copy for
 * those on a device: entries outside [0, most] become otherwise (mil_borrow_indices), or starts of
 * segments ascend from 0 to most (mil_borrow_starts). */
int32_t *mil_op_lend_indices(mil_op_call *call, const mil_operand *operand,
                             mil_borrow_indices *copy, int32_t most, int32_t otherwise);
int32_t *mil_op_lend_starts(mil_op_call *call, const mil_operand *operand, mil_borrow_starts *copy,
                            int32_t most);
/* As the backend's product_dtype. */
void *mil_op_lend_product(mil_op_call *call, const mil_operand *operand);
/* Memory where the op runs, for this call; zeroed on the host only. */
void *mil_op_temporary(mil_op_call *call, size_t n_bytes);
/* Workspace and step data for these sizes; zeros count as one. */
void mil_op_size_workspace(mil_op_call *call, mil_maxima maxima);
