/* Where weights come from: files that a checked header describes, or a counter hash.
 *
 * Files are opened once; every size is compared with fstat, every byte range with the file and with
 * shape x dtype, in overflow-checked arithmetic, before anything is allocated. Bytes are read by
 * pread in windows, never mapped, so that a file that shrinks is an error and not a signal. */
#pragma once

#include "base/memory.h"
#include "milpy.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_source mil_source;

mil_status mil_source_open(mil_source **out, const mil_checkpoint_info *info) MIL_WARN_UNUSED;
void mil_source_close(mil_source *source);

/* A tensor of a source: a plain value, good as long as the source is open. */
typedef struct mil_source_tensor {
    mil_dtype dtype; /* float32, bfloat16 or float16 */
    int64_t rows, cols;
    size_t row_bytes;
    uint64_t begin;  /* of its bytes in the file; dummy: 0 */
    int32_t index;   /* into the source's own table; dummy: -1 */
    bool is_ones;    /* dummy: a norm */
    uint64_t stream; /* dummy */
} mil_source_tensor;

/* MIL_ERR_FILE when name is absent, MIL_ERR_SHAPE when its shape is not [rows, cols] (rank 1: cols
 * 1) or its dtype is no float. A dummy source knows every name. */
mil_status mil_source_find(const mil_source *source, const char *name, int64_t rows, int64_t cols,
                           mil_source_tensor *out) MIL_WARN_UNUSED;
/* Rows row .. row + n_rows of tensor, as they lie in the file, in its dtype: n_rows * row_bytes at
 * out, which is aligned to 4. Thread-safe. */
mil_status mil_source_read_rows(const mil_source *source, const mil_source_tensor *tensor,
                                void *out, int64_t row, int64_t n_rows) MIL_WARN_UNUSED;

/* Dummy weights, for any device to compute. Element (row, col) of tensor `name` is
 *
 *   h     = mil_counter_hash(seed, FNV-1a 64 of name's bytes, row * cols + col)
 *   k     = 2 * (h >> 48) - 65535                 an odd integer in [-65535, 65535]
 *   value = bfloat16(k * 2^-21)                   nearest even: uniform in [-1/32, 1/32]
 *
 * whose standard deviation is 0.018, near the 0.02 that models are initialised with. Names that end
 * in "norm.weight" are 1, and names that end in ".bias" k * 2^-24, both float32. Nothing depends on
 * how the tensor is sliced. */

#ifdef __cplusplus
}
#endif
