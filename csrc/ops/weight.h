/* A weight as a backend packed it: opaque to layers, which only know its parts.
 *
 * Merged weights (q, k, v; gate, up) are one mil_weight whose parts keep their own rows. With
 * interleave g > 0 the parts' rows alternate in groups of g: row r of part p lies at packed row
 * (r / g) * g * n_parts + p * g + r % g, so that one panel holds both halves of a gate/up pair. */
#pragma once

#include "ops/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

#define MIL_MAX_PARTS 3

typedef enum mil_weight_format {
    MIL_WEIGHT_NONE = 0,
    MIL_WEIGHT_BF16_PANELS, /* CPU: [N/32][K/2][32][2] bf16, N padded to 32 and K to 2 with zeros */
    MIL_WEIGHT_BF16_ROWS,   /* [N][K] bf16, row-major */
} mil_weight_format;

typedef struct mil_weight {
    mil_weight_format format;
    int32_t N; /* rows of this rank, all parts */
    int32_t K; /* columns of this rank */
    int32_t n_parts;
    int32_t part_rows[MIL_MAX_PARTS];
    int32_t interleave;  /* 0: parts one after another; else all parts have equal rows, multiples of
                            it */
    void *data;          /* packed_bytes of the backend; owned by the rank's weight slab */
    const float *scales; /* later formats; NULL */
    const void *zeros;   /* later formats; NULL */
    int32_t group;       /* later formats; 0 */
    float *bias;         /* [N] in packed row order, or NULL */
} mil_weight;

/* Packed row of row r of part p. */
static inline int32_t mil_weight_row(const mil_weight *weight, int32_t part, int32_t row)
{
    if (weight->interleave > 0) {
        int32_t group = weight->interleave;
        return row / group * group * weight->n_parts + part * group + row % group;
    }
    for (int32_t p = 0; p < part; p++)
        row += weight->part_rows[p];
    return row;
}

#ifdef __cplusplus
}
#endif
