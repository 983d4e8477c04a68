/* A request: what was asked, how far it is, and its links in the lists it stands in.
 *
 * Tokens of a request are prompt, then generated. Three counts say how far it is, and they differ
 * because the scheduler works ahead of what it knows: n_computed (tokens whose KV is scheduled),
 * n_sampled (new tokens whose sampling is scheduled) and n_generated (new tokens known and
 * delivered). */
#pragma once

#include "milpy.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum mil_request_state {
    MIL_REQUEST_WAITING = 0, /* never started, or preempted */
    MIL_REQUEST_RUNNING,
    MIL_REQUEST_FINISHED, /* its last event is out; a step in flight may still name its slot */
} mil_request_state;

typedef struct mil_request {
    /* What was asked: fixed at creation. */
    uint64_t id;
    int32_t n_prompt;
    int32_t max_new; /* new tokens, >= 1 */
    int32_t n_stop_tokens;
    int32_t adapter; /* a content id, or MIL_NO_ADAPTER */
    mil_sampling sampling;
    const int32_t *prompt;      /* [n_prompt] */
    const int32_t *stop_tokens; /* [n_stop_tokens] */

    /* How far it is: the scheduler's. */
    mil_request_state state;
    int32_t slot; /* -1: none. A preempted or finished one keeps it until its steps have retired */
    int32_t *generated; /* [n_generated], lent by the scheduler; NULL before the first start */
    int32_t n_generated;
    int32_t n_sampled;
    int32_t n_computed;
    int32_t n_prefill; /* tokens known when it (re)started: these are computed as chunks */
    int32_t n_now;     /* tokens granted in the plan being filled */
    int32_t n_preemptions;
    struct mil_request *prev;
    struct mil_request *next;

    /* The engine's. */
    struct mil_request *index_next;
    struct mil_request *cancel_next;
    bool is_cancelled;
} mil_request;

/* Caller frees with mil_request_free. Copies prompt and stop tokens; trusts the options. max_new:
 * new tokens with the context's end already counted in. */
mil_status mil_request_create(mil_request **out, const mil_request_options *options,
                              int32_t max_new) MIL_WARN_UNUSED;
void mil_request_free(mil_request *request);

/* Whether its KV still lacks tokens that are known: it then takes chunks, else decode rows. */
bool mil_request_is_prefilling(const mil_request *request);
bool mil_request_is_stop(const mil_request *request, int32_t token);
/* Copy tokens begin .. begin + n of prompt and generated to out. */
void mil_request_copy_tokens(const mil_request *request, int32_t *out, int32_t begin, int32_t n);

/* ---- a list, linked through prev and next: a request stands in one at a time ---- */

typedef struct mil_request_list {
    mil_request *first;
    mil_request *last;
    int32_t n;
} mil_request_list;

void mil_request_list_push(mil_request_list *list, mil_request *request);
void mil_request_list_remove(mil_request_list *list, mil_request *request);

/* ---- an index by id, linked through index_next ---- */

#define MIL_REQUEST_BUCKETS 1024

typedef struct mil_request_index {
    mil_request *buckets[MIL_REQUEST_BUCKETS];
} mil_request_index;

void mil_request_index_add(mil_request_index *index, mil_request *request);
void mil_request_index_remove(mil_request_index *index, mil_request *request);
mil_request *mil_request_index_find(const mil_request_index *index, uint64_t id); /* or NULL */

#ifdef __cplusplus
}
#endif
