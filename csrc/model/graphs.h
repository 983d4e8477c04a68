/* Decode steps that were captured once and are replayed for any batch of their bucket.
 *
 * A bucket is a number of sequences, each with one token and one row of logits. Forward and choice
 * are two graphs, so that what a choice must wait for can come between them; forward comes in two
 * families, without LoRA and with it. Steps with chunks run op by op. */
#pragma once

#include "ops/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

#define MIL_MAX_BUCKETS 88 /* room for 2^20 sequences; 65,536 have 71 */

typedef struct mil_graphs {
    int32_t n_buckets;
    int32_t sizes[MIL_MAX_BUCKETS];                /* ascending */
    struct mil_graph *forward[MIL_MAX_BUCKETS][2]; /* [1]: with LoRA */
    struct mil_graph *choice[MIL_MAX_BUCKETS];
} mil_graphs;

/* Sizes 1, 2, 4, 8, then multiples of 8 to 128, of 16 to 256 and so on to 128 up to 2,048, of 512
 * to 4,096, of 1,024 to 8,192 and so on, below max_seqs (1 .. 2^20), and that number itself. No
 * graph is there yet. */
void mil_graphs_init(mil_graphs *graphs, int32_t max_seqs);
void mil_graphs_deinit(mil_graphs *graphs, const mil_device *device, struct mil_queue *queue);
/* Index of the smallest bucket that holds n sequences, -1: none. */
int32_t mil_graphs_find(const mil_graphs *graphs, int32_t n);

#ifdef __cplusplus
}
#endif
