/* Execution state of a model for one driver: KV pages, slots, LoRA table and activations of every
 * rank.
 *
 * Engine and Stepper each own a runner over a shared model; a step takes the model's step lock. One
 * runner step is: apply the plan's commands, forward, sample. Up to mil_runner_depth steps may be
 * queued, the one that runs included: one where the host computes, two on a device, so that step
 * n + 1 is filled while step n runs. */
#pragma once

#include "milpy.h"
#include "ops/plan.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_runner mil_runner;

typedef struct mil_runner_options {
    mil_plan_limits limits;
    int32_t n_pages;
    int32_t page_size;
    bool is_deterministic; /* as mil_context's */
    bool has_graphs;       /* capture decode steps where the device can */
    bool poison; /* pages that mil_runner_poison_page names, freed adapters and the ring's entries
                    that are used again are NaN first */
} mil_runner_options;

/* Takes all its memory, loads on a device every kernel that a step may run, and captures the decode
 * steps where it has graphs: then it waits until no other driver of the model is in a step. */
mil_status mil_runner_create(mil_runner **out, mil_model *model, const mil_runner_options *options)
    MIL_WARN_UNUSED;
/* Not while entered. On a device, one that is dead or has steps in flight waits until no other
 * driver of the model is in a step. */
void mil_runner_free(mil_runner *runner);

/* Give the pages back and take n_pages instead; decode steps are captured again. Nothing may be in
 * flight, and what pages held is lost. An error is fatal for the runner. How to fill a device: make
 * a runner of one page, see what is left, take that. */
mil_status mil_runner_take_pages(mil_runner *runner, int32_t n_pages) MIL_WARN_UNUSED;

/* What a runner has taken, over all ranks. */
typedef struct mil_runner_memory {
    size_t kv_bytes;
    size_t
        workspace_bytes; /* activations, slots, tables, what ops scribble on; a host's plans too */
    size_t graph_bytes;  /* graphs, kernels and the driver's rounding: measured, 0 on the host */
    size_t pinned_bytes; /* plans and samples in host memory that a device reads in place */
    size_t untouched_bytes; /* of the first two on the host: promised, and nothing lies there yet */
} mil_runner_memory;

void mil_runner_memory_get(const mil_runner *runner, mil_runner_memory *memory);

/* What capturing decode steps took so far, all buckets: when it was created, and with its pages. */
uint64_t mil_runner_capture_ns(const mil_runner *runner);

/* KV bytes of one page over all ranks; workspace and activations of a runner of these limits. */
size_t mil_runner_page_bytes(const mil_model *model, int32_t page_size);
size_t mil_runner_workspace_bytes(const mil_model *model, const mil_plan_limits *limits,
                                  int32_t page_size);

/* Hold the step lock and the thread's state (mil_pool_enter) over one or many steps. */
mil_status mil_runner_enter(mil_runner *runner) MIL_WARN_UNUSED;
void mil_runner_leave(mil_runner *runner);

/* Steps that may be submitted and not waited for. */
int32_t mil_runner_depth(const mil_runner *runner);
/* The next plan to fill, reset, from the runner's ring; the same one until it is submitted. Fewer
 * than depth steps may be in flight. */
mil_plan *mil_runner_plan(mil_runner *runner);
/* Queue the plan that mil_runner_plan gave last. Needs mil_runner_enter. An error, here or from
 * mil_runner_wait, is fatal for the runner. */
mil_status mil_runner_submit(mil_runner *runner) MIL_WARN_UNUSED;
/* Wait for the oldest step in flight. *samples [n_logit_rows], in plan order, until the next
 * mil_runner_submit. */
mil_status mil_runner_wait(mil_runner *runner, const mil_sample **samples) MIL_WARN_UNUSED;
/* Submit and wait, with nothing else in flight. samples [n_logit_rows], in plan order, and logits
 * [n_logit_rows, V] may be NULL. */
mil_status mil_runner_step(mil_runner *runner, mil_sample *samples, float *logits) MIL_WARN_UNUSED;

void mil_runner_poison_page(mil_runner *runner, int32_t page);

/* ---- what drivers need of a model ---- */

const mil_config *mil_model_config(const mil_model *model);
/* Memory where the model lies and its KV pages will, over all ranks. */
typedef struct mil_model_memory {
    const char *device; /* "cpu", "cuda:0 (NVIDIA H200)": the first rank's */
    bool is_device;     /* not the host's */
    uint64_t n_free;
    uint64_t n_total;
    /* What the model has of it. */
    size_t weight_bytes;
    size_t adapter_bytes; /* contents now held */
    size_t
        library_bytes; /* handles, libraries, kernels that loading ran: measured when it opened */
} mil_model_memory;

mil_status mil_model_memory_get(const mil_model *model, mil_model_memory *memory) MIL_WARN_UNUSED;
bool mil_model_is_on_device(const mil_model *model); /* mil_model_memory's is_device */
int32_t mil_model_default_page_size(const mil_model *model);
/* A content's reference for a request: MIL_ERR_NOT_FOUND when no such content is held. */
mil_status mil_model_hold_adapter(mil_model *model, int32_t content) MIL_WARN_UNUSED;
/* mil_model_release_adapter (milpy.h) drops it. */

#ifdef __cplusplus
}
#endif
