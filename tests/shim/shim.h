/* A backend's ops for ctypes: flat arguments, default visibility, one context behind a handle.
 *
 * Every op runs as a step would: inside mil_pool_enter, on a workspace of exactly the size asked
 * for, filled with NaN beforehand so that nothing can lean on what it held. What Python passes is
 * host memory. An op is lent each array: in place where the device reads host memory, else as a
 * copy in device memory of its own with a guard behind it, which is copied back where the op
 * writes.
 *
 * With MILPY_SHIM_BARE=1 all of that memory is bare (shim_bare.c), on the host as well: no guards,
 * no NaN, new for every op. What comes in is written, a bucket's padding of it too, since an op may
 * read that; what only comes back is not, and neither are workspace, step_data, and a plan that
 * `begin` brings. */
#pragma once

#include "base/threads.h"
#include "ops/backend.h"

#define SHIM __attribute__((visibility("default")))
#define SHIM_MAX_LOANS 1024

/* How an array is lent: its content goes in, comes back, or both. Without SHIM_IN it holds NaN, or
 * nothing where memory is bare. */
enum { SHIM_IN = 1, SHIM_BACK = 2, SHIM_BOTH = 3 };

/* n_rows dense rows of the host, row i at first_bytes + i * stride_bytes of n_bytes on the device.
 */
typedef struct shim_shape {
    size_t n_rows, row_bytes;
    size_t first_bytes, stride_bytes, n_bytes;
} shim_shape;

typedef struct shim_loan {
    void *host;
    shim_shape shape;
    mil_slab slab;
    int32_t how;
} shim_loan;

typedef struct shim {
    mil_context context;
    mil_maxima maxima;
    mil_slab workspace, step_data;
    mil_thread_state saved;
    bool is_bare;      /* MILPY_SHIM_BARE */
    bool is_captured;  /* ops go through a graph: captured, launched once */
    mil_status status; /* of what was lent since the last op */
    int32_t n_loans;
    shim_loan loans[SHIM_MAX_LOANS];
    int32_t n_pinned;
    mil_slab pinned[4];
} shim;

/* Where an op finds the array; NULL for NULL. A failure is kept until shim_enter. */
void *shim_lend(shim *s, const void *host, size_t n_bytes, int32_t how);
void *shim_lend_shaped(shim *s, const void *host, shim_shape shape, int32_t how);
/* n rows of the host and, behind them, NaN up to n_on_device rows: a bucket's padding. */
void *shim_lend_rows(shim *s, const void *host, int64_t n, int64_t n_on_device, size_t row_bytes,
                     int32_t how);
/* Device memory of n_bytes (0xff in all of them, unless bare), and host memory that the device
 * reads. */
void *shim_take(shim *s, size_t n_bytes);
void *shim_take_pinned(shim *s, size_t n_bytes);
size_t shim_product_bytes(const shim *s);

/* Poison the workspace (bare: take it anew) and enter the pool; every op stands between these two.
 * leave waits for the op, checks the guards, copies back and takes all loans back; the first
 * failure is returned. */
mil_status shim_enter(shim *s);
mil_status shim_leave(shim *s, mil_status status);

/* ---- shim_bare.c ---- */

/* Caller gives it back, through shim_bare_give. is_host: malloc's, else cudaMalloc's. */
mil_status shim_bare_take(bool is_host, mil_slab *slab, size_t n_bytes, const char *what);
void shim_bare_give(bool is_host, mil_slab *slab); /* a zeroed slab is fine */

/* ---- shim_batch.c: plans ---- */

/* A batch and its sequences' slots, as Python holds them. Buckets of 0 are the counts. */
typedef struct shim_batch {
    int32_t n_seqs, n_decode, n_tokens;
    int32_t *seq_slot, *query_indptr, *kv_lengths, *tokens, *positions;
    int32_t n_slots, max_pages;
    int32_t *last_token, *page_table;
    int32_t bucket_seqs, bucket_tokens;
} shim_batch;

/* What else a plan may hold; all of it may be 0. */
typedef struct shim_extras {
    int32_t n_logit_rows, bucket_logit_rows;
    const int32_t *logit_slots, *logit_feeds, *logit_positions;
    int32_t n_segments, n_adapters;
    const int32_t *segment_indptr, *segment_adapter, *lora_rows;
    int32_t n_slot_sets, n_page_sets, n_adapter_sets;
    const mil_slot_set *slot_sets;
    const mil_page_set *page_sets;
    const mil_adapter_set *adapter_sets;
} shim_extras;

/* KV pages as Python holds them, [n_layers, n_pages, K, P, D]. The pool may be larger: then they
 * are its last pages, and page ids count from the pool's first. */
typedef struct shim_kv {
    uint16_t *k, *v;
    int32_t n_layers, n_pages, pool_pages;
    int32_t page_size, n_kv_heads, head_dim;
    int32_t dtype, out_dtype; /* mil_dtype; out_dtype: of what attention writes */
} shim_kv;

typedef struct shim_step {
    mil_plan *plan;
    void *device_plan; /* where ops read it: plan itself on the host */
    mil_batch batch;
    mil_slots slots;
} shim_step;

/* The plan of a batch where ops read it. Slots are lent for the same call. extras may be NULL.
 * begins: the op is begin, or follows it, so that bare memory of the plan is left to that. */
void shim_lend_batch(shim *s, shim_step *to, const shim_batch *from, const shim_extras *extras,
                     bool begins);
/* Another batch in the same plan, of the same limits; begin brings it to the device. */
void shim_fill_plan(shim_step *to, const shim_batch *from, const shim_extras *extras);
mil_kv shim_lend_kv(shim *s, const shim_kv *from, int32_t how);
