/* Where weights come from: files that a checked header describes, or a counter hash.
 *
 * Files are opened once; every size is compared with fstat, every byte range with the file and with
 * shape x dtype, in overflow-checked arithmetic, before anything is allocated. Bytes are read by pread
 * in windows, never mapped, so that a file that shrinks is an error and not a signal. */
#pragma once

#include "base/memory.h"
#include "milpy.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_source mil_source;

mil_status mil_source_open(mil_source **out, const mil_checkpoint_info *info) MIL_WARN_UNUSED;
void mil_source_close(mil_source *source);

/* MIL_ERR_FILE when name is absent, MIL_ERR_SHAPE when its shape is not [rows, cols] (rank 1: cols 1).
 * A dummy source knows every name and gives MIL_DTYPE_BF16 (norms and biases MIL_DTYPE_F32). */
mil_status mil_source_find(mil_source *source, const char *name, int64_t rows, int64_t cols,
                           int32_t *tensor, mil_dtype *dtype) MIL_WARN_UNUSED;
/* n_rows whole rows of the tensor, as they lie in the file, in its dtype. Thread-safe. For a dummy
 * tensor: name's stream of mil_counter_hash, element (row, col) drawn at row * cols + col. */
mil_status mil_source_read_rows(mil_source *source, int32_t tensor, int64_t row, int64_t n_rows,
                                void *out) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
