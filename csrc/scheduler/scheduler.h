/* Who runs this step, and with how many tokens: fills plans, is told samples, says what to deliver.
 *
 * First come, first served, with continuous batching (Yu et al., "Orca", OSDI 2022) and chunked
 * prefill (Agrawal et al., "Sarathi-Serve", OSDI 2024). Open requests stand in order of arrival and
 * those that run are a prefix of that order: one joins at its end, and where pages run out the
 * newest leaves at its end, to be recomputed later from its prompt and the tokens it already gave.
 *
 * It works from what is scheduled, not from what is known: a decode row's token is in its slot on
 * the device, so that step n + 1 can be filled before step n retires. One fence serves pages, slots
 * and adapter slots alike: every one of them is named by a plan through a sequence slot, and a slot
 * lets go of all it holds when the last step that names it has retired.
 *
 * Knows no model and no device. One thread at a time. No function but create and free allocates. */
#pragma once

#include "ops/plan.h"
#include "scheduler/request.h"

#ifdef __cplusplus
extern "C" {
#endif

#define MIL_STEPS_IN_FLIGHT 2 /* filled and not retired, at most */
#define MIL_PROMPT_ROOM 3     /* tokens; see is_deterministic */

typedef struct mil_scheduler_options {
    int32_t max_seqs;
    int32_t max_tokens; /* of one step, >= max_seqs: every decode row fits */
    int32_t
        max_model_len; /* <= (n_pages - 1) * page_size: a request alone always runs to its end */
    int32_t page_size;
    int32_t n_pages; /* page 0 included, which is never dealt out */
    /* What mates and pages leave never cuts a piece of one token off a longer prompt: attention may
     * compute a lone query in another order than the rows of a chunk. Three tokens are then not cut
     * at all. So that no prompt waits for that many while its mates decode, at most max_tokens - 2
     * requests run at once: the oldest of those that prefill has MIL_PROMPT_ROOM in every step.
     * Needs max_tokens and page_size of at least that. */
    bool is_deterministic;
    /* Called when a page becomes free, which no step in flight names any more; may be NULL. */
    void (*on_page_free)(void *context, int32_t page);
    void *context;
} mil_scheduler_options;

/* The limits of the plans that a scheduler of these options fills. */
mil_plan_limits mil_scheduler_limits(const mil_scheduler_options *options);

typedef struct mil_scheduler mil_scheduler;

mil_status mil_scheduler_create(mil_scheduler **out, const mil_scheduler_options *options)
    MIL_WARN_UNUSED;
/* Needs every request to have been reaped. */
void mil_scheduler_free(mil_scheduler *scheduler);

/* Queue a request, last in order. It is the scheduler's until mil_scheduler_reap gives it back.
 * Trusts that n_prompt + max_new <= max_model_len. */
void mil_scheduler_add(mil_scheduler *scheduler, mil_request *request);
/* End a request now: nothing more is delivered for it. False when it has ended already. */
bool mil_scheduler_end(mil_scheduler *scheduler, mil_request *request);
/* The oldest open request, or NULL. */
mil_request *mil_scheduler_first(mil_scheduler *scheduler);
/* A request that has ended and that no step in flight names, or NULL. Caller frees. */
mil_request *mil_scheduler_reap(mil_scheduler *scheduler);

/* Fill a freshly reset plan, whose header's step is above that of the last one. False when nothing
 * can run before another step retires (with none in flight: when nothing is open); the plan is then
 * as it was. Needs fewer than MIL_STEPS_IN_FLIGHT steps in flight. */
bool mil_scheduler_fill(mil_scheduler *scheduler, mil_plan *plan);
/* The oldest step in flight has run. samples [n_logit_rows], in plan order; a sample whose token is
 * -1 had logits that are not finite. Writes what to deliver to events [max_seqs] and returns how
 * many. */
int32_t mil_scheduler_retire(mil_scheduler *scheduler, uint64_t step, const mil_sample *samples,
                             mil_event *events);
/* No step in flight will ever retire: the device failed. */
void mil_scheduler_abandon(mil_scheduler *scheduler);

typedef struct mil_scheduler_counts {
    int32_t n_waiting;
    int32_t n_running;
    int32_t n_in_flight; /* steps */
    int32_t n_pages;     /* that can be dealt out */
    int32_t n_free_pages;
    int32_t n_pins; /* of adapter slots */
    uint64_t n_preemptions;
    uint64_t n_prompt_tokens;    /* scheduled as chunks, recomputed ones included */
    uint64_t n_generated_tokens; /* delivered */
} mil_scheduler_counts;

void mil_scheduler_counts_get(const mil_scheduler *scheduler, mil_scheduler_counts *counts);

#ifdef __cplusplus
}
#endif
