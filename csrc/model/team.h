/* The threads that run ranks. Rank 0 is the caller's thread; every other rank has one of its own,
 * which holds its pool and sleeps between runs. */
#pragma once

#include "base/threads.h"
#include "comm/comm.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_team mil_team;

typedef mil_status (*mil_rank_fn)(void *argument, int32_t rank);

/* pools [world], comms [world] (not read for a world of one): borrowed. Caller frees with
 * mil_team_free. */
mil_status mil_team_create(mil_team **out, int32_t world, mil_pool *const *pools,
                           mil_comm *const *comms) MIL_WARN_UNUSED;
/* In a forked child, where the threads do not exist, only memory is freed. */
void mil_team_free(mil_team *team);

/* Run fn for every rank and wait for all. A rank that fails aborts the group, so that no other
 * waits for it; the status and message are of the rank that failed first. One caller at a time,
 * which holds rank 0's pool. */
mil_status mil_team_run(mil_team *team, mil_rank_fn fn, void *argument) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
