/* A loaded model: one decoder for each rank, and the adapters of it. Shared by runners, whose steps
 * exclude each other by step_lock. */
#pragma once

#include "model/contents.h"
#include "model/decoder.h"
#include "model/rope.h"
#include "model/team.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One rank: its share of the weights, its threads, its place in the group. */
typedef struct mil_rank {
    mil_shard shard;
    mil_decoder decoder;
    struct mil_queue *queue; /* its device's; NULL on the CPU */
    mil_slab slab;           /* all weights, norms and biases of the decoder */
} mil_rank;

struct mil_model {
    mil_config config;
    const mil_backend *backend;
    int32_t ordinal; /* of rank 0's device */
    const char *isa;
    char no_cuda[1024]; /* as mil_model_report has it */
    int32_t world;
    int32_t n_threads; /* over all ranks */
    mil_rank *ranks;   /* [world] */
    mil_pool **pools;  /* [world] */
    mil_comm **comms;  /* [world]; entries NULL for a world of one */
    mil_team *team;
    mil_contents contents;
    size_t library_bytes; /* device memory that opening took beside the weights, measured */
    mil_rope rope;
    pthread_mutex_t rope_lock; /* guards growth of rope */
    pthread_mutex_t step_lock; /* held by the runner that steps */
};

#ifdef __cplusplus
}
#endif
