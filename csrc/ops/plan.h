/* What one step does: a contiguous buffer without pointers, and the view of it that ops read.
 *
 * The scheduler (or the stepper) fills a plan; every rank gets the same bytes, by one copy; a
 * backend reads it in place. Arrays lie at offsets fixed by the limits, so that a plan of given
 * limits always has the same shape: what shapes a launch (bucket sizes) is apart from the counts
 * read on the device.
 *
 * Commands come first and are applied, in array order, before the batch is read: adapter slots,
 * then sequence slots, then page-table entries. A page, slot or adapter named by a plan may be
 * reused only after the last step that names it has retired.
 *
 * Batch order: decode rows (query length 1, token taken from the slot) first, then chunks, whose
 * token ids are in the plan. Query i of sequence s sees keys < kv_lengths[s] - query_length + i
 * + 1. A padding sequence has query length 0 and kv length 0 and writes nothing. */
#pragma once

#include "ops/lora.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Sizes that a plan, and everything sized after it, is made for. */
typedef struct mil_plan_limits {
    int32_t max_seqs;       /* S: sequences of one step; also sequence slots */
    int32_t max_tokens;     /* T */
    int32_t max_logit_rows; /* <= max_tokens */
    int32_t max_pages_per_seq;
    int32_t max_page_sets;     /* page-table entries that one plan can write */
    int32_t max_adapter_slots; /* also the most LoRA segments */
} mil_plan_limits;

typedef struct mil_slot_set { /* a sequence begins in this slot */
    int32_t slot;
    int32_t adapter_slot; /* or MIL_NO_ADAPTER */
    mil_sampling sampling;
} mil_slot_set;

typedef struct mil_page_set { /* page_table[slot][index] = page */
    int32_t slot;
    int32_t index;
    int32_t page;
} mil_page_set;

typedef struct mil_adapter_set { /* lora_table[adapter_slot] = descriptors of content */
    int32_t adapter_slot;
    int32_t content; /* a content id, or MIL_NO_ADAPTER to clear */
} mil_adapter_set;

typedef struct mil_plan_header {
    uint64_t step; /* 1, 2, ... */
    mil_plan_limits limits;
    /* Counts, read where the work is done. */
    int32_t n_adapter_sets, n_slot_sets, n_page_sets;
    int32_t n_seqs;   /* S, decode rows first */
    int32_t n_decode; /* of them, decode rows */
    int32_t n_tokens; /* T = query_indptr[S] */
    int32_t n_logit_rows;
    int32_t n_segments;  /* G */
    int32_t n_lora_rows; /* segment_indptr[G] */
    /* Buckets, which shape launches: >= the counts. */
    int32_t bucket_seqs, bucket_tokens, bucket_logit_rows;
    int32_t bucket_chunks;    /* sequences of several tokens; 0: nothing is launched for them */
    int32_t bucket_segments;  /* 0: the step launches no LoRA op */
    int32_t bucket_lora_rows; /* rows with an adapter; shapes LoRA's launches */
} mil_plan_header;

/* The header, then the arrays of mil_batch in their order, each aligned to 64 bytes. */
typedef struct mil_plan mil_plan;

/* A view of a plan. Writers fill through it on the host, where every pointer lies inside the plan;
 * ops read through it where they run. */
typedef struct mil_batch {
    mil_plan_header *header;       /* on the host: buckets, and counts for host code */
    const mil_plan_header *counts; /* the same, where ops run */
    mil_adapter_set *adapter_sets; /* [max_adapter_slots] */
    mil_slot_set *slot_sets;       /* [max_seqs] */
    mil_page_set *page_sets;       /* [max_page_sets] */
    int32_t *seq_slot;             /* [S] */
    int32_t *query_indptr;         /* [S + 1], first 0 */
    int32_t *kv_lengths;           /* [S], this step's tokens included */
    int32_t *tokens;               /* [T]; entries of decode rows are not read */
    int32_t *positions;            /* [T], for RoPE only */
    int32_t *logit_rows;           /* [n_logit_rows], ascending rows of T whose logits are wanted */
    int32_t *logit_slots;          /* [n_logit_rows], the slot that samples there */
    int32_t *logit_feeds; /* [n_logit_rows], 1: the sampled token becomes the slot's last token */
    int32_t
        *logit_positions;     /* [n_logit_rows], index in its sequence of the token to choose: the
                                 draw's counter. positions[] would not do: they are what RoPE sees */
    int32_t *segment_indptr;  /* [G + 1], into lora_rows */
    int32_t *segment_adapter; /* [G], adapter slots, each once */
    int32_t *lora_rows;       /* [n_lora_rows], rows of T; base rows are in no segment */
} mil_batch;

size_t mil_plan_bytes(const mil_plan_limits *limits);
/* Zero the counts, set limits, step and buckets (to the limits). plan: mil_plan_bytes, 64-aligned.
 */
void mil_plan_reset(mil_plan *plan, const mil_plan_limits *limits, uint64_t step);
void mil_plan_view(mil_plan *plan, mil_batch *batch);
/* As mil_plan_view, with the arrays and counts in a copy of the plan on the device. */
void mil_plan_view_at(mil_plan *plan, void *device_copy, mil_batch *batch);
/* Write logit_positions from the rest of the batch. */
void mil_plan_find_positions(mil_plan *plan);
/* Every index of the plan against the limits and n_pages; MIL_ERR_INTERNAL names the first bad one.
 * Run on every plan under MILPY_CHECK=1 and in test builds. */
mil_status mil_plan_check(mil_plan *plan, int32_t n_pages, int32_t vocab) MIL_WARN_UNUSED;

/* Per-slot state, on the device, of one rank. */
typedef struct mil_slots {
    int32_t n_slots;
    int32_t max_pages;
    int32_t *last_token;    /* [n_slots] */
    int32_t *adapter_slot;  /* [n_slots] */
    mil_sampling *sampling; /* [n_slots] */
    int32_t *page_table;    /* [n_slots][max_pages] */
} mil_slots;

#define MIL_MAX_PAGE_SIZE 256 /* rows; a power of two from 16 on */

/* KV pages of one rank: layer l's K at k + l * layer_elements, page p of it at p * K * P * D there,
 * laid out [page][kv_head][row][head_dim]; V likewise. */
typedef struct mil_kv {
    uint16_t *k;
    uint16_t *v;
    int64_t layer_elements; /* n_pages * K * P * D */
    int32_t n_pages;
    int32_t page_size;  /* P */
    int32_t n_kv_heads; /* K of this rank */
    int32_t head_dim;
    mil_dtype dtype; /* of K and V, and of the q beside them: BF16 or F16 */
} mil_kv;

#ifdef __cplusplus
}
#endif
