/* What milpy.ops needs of a device beyond backend.h: ops on a caller's stream, over a caller's
 * arrays.
 *
 * There is no plan on the host here: counts follow from the shapes of the arrays, the arrays
 * themselves lie where ops read them. All of it is queued, so that a caller may capture it. */
#pragma once

#include "ops/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

#define MIL_BORROW_FEW 8
#define MIL_BORROW_INDICES 2

/* to[i] = from[i] where 0 <= from[i] <= most, else otherwise. */
typedef struct mil_borrow_indices {
    const int32_t *from;
    int32_t *to; /* [n] */
    int32_t n, most, otherwise;
} mil_borrow_indices;

/* Where segments start, and the last one's end: from[i], but to[0] is 0, to[n - 1] is most, and an
 * entry that is below the one before it or above most is the one before it. */
typedef struct mil_borrow_starts {
    const int32_t *from;
    int32_t *to; /* [n] */
    int32_t n, most;
} mil_borrow_starts;

/* *to = counts, few_to[i] = few[i], iota[i] = i, ones[i] = 1. NULL: not wanted. Index arrays of the
 * caller's that the host cannot see are copied, so that ops may trust them; n 0: not wanted. */
typedef struct mil_borrow_fill {
    mil_plan_header counts;
    mil_plan_header *to;
    int32_t few[MIL_BORROW_FEW];
    int32_t *few_to; /* [MIL_BORROW_FEW] */
    int32_t *iota;   /* [n_iota] */
    int32_t *ones;   /* [n_ones] */
    int32_t n_iota, n_ones;
    mil_borrow_indices indices[MIL_BORROW_INDICES];
    mil_borrow_starts starts;
} mil_borrow_fill;

/* Descriptors of adapters that lie one after another, of one linear; the n_slots - n_adapters after
 * them are absent, one at least: what an index that is no adapter's stands for. */
typedef struct mil_borrow_modules {
    mil_lora_module *to; /* [n_slots][MIL_N_PROJECTIONS], projection 0 is written */
    int32_t n_slots, n_adapters;
    mil_lora_module first;   /* adapter 0's; scale where scales is NULL */
    const float *scales;     /* [n_adapters] or NULL */
    size_t a_bytes, b_bytes; /* from one adapter to the next */
} mil_borrow_modules;

/* LoRA's v between the caller's [n_rows, rank] and what shrink leaves, expand reads. A row of an
 * absent adapter is zeros. */
typedef struct mil_borrow_v {
    float *v;
    int64_t v_stride;
    float *plain; /* [n_rows, rank] */
    int32_t n_rows, rank, padded_rank, in;
    int32_t n_segments;
    const int32_t *segment_indptr, *segment_adapter; /* where ops read them */
    const mil_lora_module *modules;
} mil_borrow_v;

/* What samples tell beside the token, in arrays. A row of the last two is the sample's top, cut to
 * n_columns or filled up with -1 and 0. */
typedef struct mil_borrow_samples {
    const mil_sample *from; /* [n] */
    float *logprobs;        /* [n] */
    int32_t *ranks;         /* [n] */
    int32_t *top_tokens;    /* [n, n_columns] */
    float *top_logprobs;    /* [n, n_columns] */
    int32_t n, n_columns;
} mil_borrow_samples;

typedef struct mil_borrow {
    /* MIL_ERR_ARGUMENT: the stream is another device's. MIL_OK for one that captures, which the
     * question would end, and where toolkit or driver is older than CUDA 12.8. NULL on the host. */
    mil_status (*check_stream)(struct mil_queue *queue, void *stream);
    /* What is queued goes to `stream` (a cudaStream_t; NULL: the legacy default stream) until
     * another is swapped in; returns the one before. The queue's own must be back before
     * anything is copied out or it is closed; alloc and copy_in use neither. From the first swap on
     * no launch of the queue overlaps the kernel before it: ops read weights early, and here a
     * caller's kernel may have written them.
     */
    void *(*swap_stream)(struct mil_queue *queue, void *stream);
    mil_status (*fill)(struct mil_queue *queue, const mil_borrow_fill *args);
    mil_status (*write_modules)(struct mil_queue *queue, const mil_borrow_modules *args);
    /* plain = what shrink left, summed and scaled. */
    mil_status (*gather_v)(struct mil_queue *queue, const mil_borrow_v *args);
    /* v = plain, for an expand whose modules have in 1 and scale 1. */
    mil_status (*spread_v)(struct mil_queue *queue, const mil_borrow_v *args);
    mil_status (*tell_samples)(struct mil_queue *queue, const mil_borrow_samples *args);
    /* What begin notes of a batch for attention, from the device's arrays. */
    mil_status (*plan_attention)(mil_context *context, const mil_begin_args *args);
} mil_borrow;

/* That of a backend; never NULL. */
const mil_borrow *mil_backend_borrow(const mil_backend *backend);

/* What it chooses among. */
extern const mil_borrow mil_host_borrow;
extern const mil_borrow mil_cuda_borrow;

#ifdef __cplusplus
}
#endif
