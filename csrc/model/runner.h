/* Execution state of a model for one driver: KV pages, slots, LoRA table and activations of every
 * rank.
 *
 * Engine and Stepper each own a runner over a shared model; a step takes the model's step lock. One
 * runner step is: apply the plan's commands, forward, sample. Depth of the queue on the CPU: one.
 */
#pragma once

#include "milpy.h"
#include "ops/plan.h"

#ifdef __cplusplus
extern "C" {
#endif

#define MIL_MAX_PAGE_SIZE 256

typedef struct mil_runner mil_runner;

typedef struct mil_runner_options {
    mil_plan_limits limits;
    int32_t n_pages;
    int32_t page_size;
    bool poison; /* fill pages with NaN when mil_runner_poison_page says so */
} mil_runner_options;

mil_status mil_runner_create(mil_runner **out, mil_model *model, const mil_runner_options *options)
    MIL_WARN_UNUSED;
void mil_runner_free(mil_runner *runner);

/* KV bytes of one page over all ranks; workspace and activations of a runner of these limits. */
size_t mil_runner_page_bytes(const mil_model *model, int32_t page_size);
size_t mil_runner_workspace_bytes(const mil_model *model, const mil_plan_limits *limits);

/* Hold the step lock and the thread's state (mil_pool_enter) over one or many steps. */
mil_status mil_runner_enter(mil_runner *runner) MIL_WARN_UNUSED;
void mil_runner_leave(mil_runner *runner);

/* The next plan to fill, reset, from the runner's ring. */
mil_plan *mil_runner_plan(mil_runner *runner);
/* Run the plan that mil_runner_plan gave last. samples [n_logit_rows], in plan order; logits
 * [n_logit_rows, V] or NULL. Needs mil_runner_enter. An error is fatal for the runner. */
mil_status mil_runner_step(mil_runner *runner, mil_sample *samples, float *logits) MIL_WARN_UNUSED;

void mil_runner_poison_page(mil_runner *runner, int32_t page);

/* ---- what drivers need of a model ---- */

const mil_config *mil_model_config(const mil_model *model);
/* A content's reference for a request: MIL_ERR_NOT_FOUND when no such content is held. */
mil_status mil_model_hold_adapter(mil_model *model, int32_t content) MIL_WARN_UNUSED;
/* mil_model_release_adapter (milpy.h) drops it. */

#ifdef __cplusplus
}
#endif
