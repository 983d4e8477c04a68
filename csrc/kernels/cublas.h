/* cuBLASLt, found at run time: products by a fixed table of algorithms.
 *
 * An algorithm is a function of (GPU, library version, N, K, bucket of M, strides, dtype of y): the
 * library's own first choice that sums in float32, asked for once and never timed, so bits do not
 * change between starts. A number of rows that its bucket's algorithm refuses is not served, rather
 * than given an algorithm of its own: our own product (product.h) takes it. Bits do change with M:
 * product.h's do not.
 *
 * All products of a queue run on its stream, one after another (beside a product runs shrink at
 * most, and that is ours), so they share one workspace. */
#pragma once

#include "kernels/cuda.h"
#include "kernels/library.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The library's handle, a workspace, and an empty table, for products on queue, whose streams are
 * there: queue->cublas, unless it is there already. The library is libcublasLt.so.13 (where the
 * driver is for CUDA 13 or newer), else .12, found as library.h says, with MILPY_CUBLASLT to name
 * it. mil_cublas_free before the queue goes, with the queue's device current; the handle stays, for
 * the next queue of the device, since cublasLtDestroy would end captures. In a capture too. */
mil_status mil_cublas_open(mil_queue *queue) MIL_WARN_UNUSED;
void mil_cublas_free(struct mil_cublas *cublas);

/* cublasLtGetVersion: 131000 is 13.10.0. */
int64_t mil_cublas_version(const struct mil_cublas *cublas);
/* The file it was loaded from. */
const char *mil_cublas_path(const struct mil_cublas *cublas);

typedef struct mil_cublas_product {
    void *y;           /* [M, ldy] of y_dtype */
    const uint16_t *x; /* [M, ldx] bf16 */
    const uint16_t *w; /* [N, K] bf16 */
    const void *bias;  /* [N] of y_dtype, 16-byte aligned, or NULL */
    mil_dtype y_dtype; /* BF16 or F32 */
    int32_t M, N, K;
    int64_t ldy, ldx;
} mil_cublas_product;

/* The rows that an algorithm is asked for: M up to 16 rounded up to a power of two, up to 128 to a
 * multiple of 16, up to 512 of 64, up to 2,048 of 256, up to 8,192 of 1,024, above to a power of
 * two. */
int32_t mil_cublas_bucket(int32_t M);

/* y = x w^T (+ bias) through the library, on queue's stream. *is_served false, and nothing queued,
 * where it has no algorithm for these shapes and alignments, where the bucket's algorithm does not
 * take this M (the library is asked), or where K, ldx, x or w are not on 16 bytes. The first run
 * opens the library, that of a bucket looks its algorithm up and loads its kernel, in a capture
 * too. */
mil_status mil_cublas_run(mil_queue *queue, const mil_cublas_product *product, bool *is_served)
    MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
