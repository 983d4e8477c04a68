/* The step of one rank: the plan's commands, forward, choice. */
#pragma once

#include "model/state.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A step as all ranks see it. */
typedef struct mil_rank_step {
    const mil_model *model;
    mil_state *states; /* [world] */
    const mil_plan_limits *limits;
    mil_plan *plan;                   /* in host memory that a device reads in place */
    const mil_lora_module **adapters; /* [world][max_adapter_slots] as mil_begin_args has it */
    mil_batch batch;                  /* the plan on the host */
    float *logits;                    /* [n_logit_rows, V] on the host, NULL: not wanted */
} mil_rank_step;

/* The plan where the rank's ops read it. */
mil_batch mil_rank_batch(const mil_rank_step *all, int32_t rank);
/* What layers read of a step; borrows batch. */
mil_step mil_rank_operands(const mil_rank_step *all, const mil_batch *batch, int32_t rank);

mil_status mil_rank_begin(const mil_rank_step *all, const mil_batch *batch, int32_t rank)
    MIL_WARN_UNUSED;
mil_status mil_rank_forward(const mil_rank_step *all, const mil_step *step, int32_t rank)
    MIL_WARN_UNUSED;
/* Logits of the bucket's rows and a token for each, in the rank's samples. */
mil_status mil_rank_choose(const mil_rank_step *all, const mil_step *step, int32_t rank)
    MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
