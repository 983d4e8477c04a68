/* Collectives between threads of one process, by reading each other's buffers in place.
 *
 * A collective is: publish your buffer, wait for all, do your share over everyone's buffers, wait
 * for all again (so that nobody reuses a buffer that is still read). An all-reduce gives each rank
 * one slice to sum, over ranks in ascending order, and to write to everyone: the same additions in
 * the same order whoever runs them. Message passing, and how to find other processes, are other
 * transports. */
#include "comm/comm.h"

#include "base/memory.h"
#include "base/machine.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

/* About 50 us of waiting, which covers the skew between ranks of one layer, before a rank sleeps.
 */
#define SPIN_TURNS 2000
#define LANES 16

struct local_group;

typedef struct local_comm {
    mil_comm base;
    struct local_group *group;
} local_comm;

/* What a rank shows the others during one collective. Each on a line of its own. */
typedef struct posting {
    _Alignas(64) void *data;
} posting;

typedef struct local_group {
    int32_t world;
    int32_t spin_turns;
    _Alignas(64) atomic_int_fast32_t n_arrived;
    _Alignas(64) atomic_uint_fast32_t generation;
    atomic_bool is_aborted;
    pthread_mutex_t lock; /* guards sleepers, reason and n_alive */
    pthread_cond_t wake;
    int32_t n_alive;
    char reason[256];
    posting *postings; /* [world] */
} local_group;

static local_comm *local_of(mil_comm *comm)
{
    return (local_comm *)comm;
}

static inline void pause_briefly(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static mil_status closed(local_group *group)
{
    char reason[sizeof group->reason];
    pthread_mutex_lock(&group->lock);
    memcpy(reason, group->reason, sizeof reason);
    pthread_mutex_unlock(&group->lock);
    return mil_fail(MIL_ERR_CLOSED, "comm: aborted: %s", reason);
}

/* A barrier: the last to arrive opens the next generation. */
static mil_status meet(local_group *group)
{
    uint_fast32_t generation = atomic_load_explicit(&group->generation, memory_order_acquire);
    if (atomic_load_explicit(&group->is_aborted, memory_order_acquire))
        return closed(group);
    if (atomic_fetch_add_explicit(&group->n_arrived, 1, memory_order_acq_rel) + 1 == group->world) {
        atomic_store_explicit(&group->n_arrived, 0, memory_order_relaxed);
        pthread_mutex_lock(&group->lock);
        atomic_store_explicit(&group->generation, generation + 1, memory_order_release);
        pthread_cond_broadcast(&group->wake);
        pthread_mutex_unlock(&group->lock);
        return MIL_OK;
    }
    for (int32_t turn = 0; turn < group->spin_turns; turn++) {
        if (atomic_load_explicit(&group->generation, memory_order_acquire) != generation)
            return MIL_OK;
        pause_briefly();
    }
    pthread_mutex_lock(&group->lock);
    while (atomic_load_explicit(&group->generation, memory_order_acquire) == generation &&
           !atomic_load_explicit(&group->is_aborted, memory_order_acquire))
        pthread_cond_wait(&group->wake, &group->lock);
    bool has_met = atomic_load_explicit(&group->generation, memory_order_acquire) != generation;
    pthread_mutex_unlock(&group->lock);
    return has_met ? MIL_OK : closed(group);
}

static mil_status post(local_comm *comm, void *data)
{
    comm->group->postings[comm->base.rank].data = data;
    return meet(comm->group);
}

/* Sum one group of lanes over ranks, in rank order, and give it to all. */
static void reduce_lanes(const posting *postings, int32_t world, int64_t at, int64_t n)
{
    float sum[LANES];
    memcpy(sum, (const float *)postings[0].data + at, (size_t)n * sizeof(float));
    for (int32_t rank = 1; rank < world; rank++) {
        const float *other = (const float *)postings[rank].data + at;
        if (n == LANES)
            for (int32_t lane = 0; lane < LANES; lane++)
                sum[lane] += other[lane];
        else
            for (int64_t lane = 0; lane < n; lane++)
                sum[lane] += other[lane];
    }
    for (int32_t rank = 0; rank < world; rank++)
        memcpy((float *)postings[rank].data + at, sum, (size_t)n * sizeof(float));
}

static mil_status local_all_reduce(mil_comm *base, float *data, int64_t n)
{
    local_comm *comm = local_of(base);
    MIL_TRY(post(comm, data));
    int64_t n_groups = (n + LANES - 1) / LANES;
    int64_t begin = n_groups * base->rank / base->world * LANES;
    int64_t end = n_groups * (base->rank + 1) / base->world * LANES;
    for (int64_t at = begin; at < end; at += LANES)
        reduce_lanes(comm->group->postings, base->world, at, n - at < LANES ? n - at : LANES);
    return meet(comm->group);
}

static mil_status local_all_gather(mil_comm *base, const void *in, void *out, size_t n_bytes)
{
    local_comm *comm = local_of(base);
    MIL_TRY(post(comm, (void *)(uintptr_t)in));
    for (int32_t rank = 0; rank < base->world; rank++)
        memcpy((char *)out + (size_t)rank * n_bytes, comm->group->postings[rank].data, n_bytes);
    return meet(comm->group);
}

static mil_status local_broadcast(mil_comm *base, void *data, size_t n_bytes, int32_t root)
{
    local_comm *comm = local_of(base);
    MIL_TRY(post(comm, data));
    if (base->rank != root)
        memcpy(data, comm->group->postings[root].data, n_bytes);
    return meet(comm->group);
}

static mil_status local_barrier(mil_comm *base)
{
    return meet(local_of(base)->group);
}

static void local_abort(mil_comm *base, const char *reason)
{
    local_group *group = local_of(base)->group;
    pthread_mutex_lock(&group->lock);
    if (!atomic_load_explicit(&group->is_aborted, memory_order_relaxed)) {
        size_t length = strnlen(reason, sizeof group->reason - 1);
        memcpy(group->reason, reason, length);
        group->reason[length] = '\0';
        /* After the reason: who sees the flag reads the reason. */
        atomic_store_explicit(&group->is_aborted, true, memory_order_release);
    }
    pthread_cond_broadcast(&group->wake);
    pthread_mutex_unlock(&group->lock);
}

static void group_free(local_group *group)
{
    if (group == NULL)
        return;
    pthread_cond_destroy(&group->wake);
    pthread_mutex_destroy(&group->lock);
    mil_free(group->postings);
    mil_free(group);
}

static void local_free(mil_comm *base)
{
    if (base == NULL)
        return;
    local_group *group = local_of(base)->group;
    pthread_mutex_lock(&group->lock);
    bool is_last = --group->n_alive == 0;
    pthread_mutex_unlock(&group->lock);
    mil_free(base);
    if (is_last)
        group_free(group);
}

static const mil_comm_ops local_ops = {
    .all_reduce = local_all_reduce,
    .all_gather = local_all_gather,
    .broadcast = local_broadcast,
    .barrier = local_barrier,
    .abort = local_abort,
    .free = local_free,
};

static mil_status group_create(local_group **out, int32_t world)
{
    local_group *group = mil_alloc(1, sizeof *group);
    posting *postings = mil_alloc((size_t)world, sizeof *postings);
    if (group == NULL || postings == NULL) {
        mil_free(group);
        mil_free(postings);
        return mil_fail(MIL_ERR_MEMORY, "comm: no memory for a group of %d ranks", world);
    }
    group->world = world;
    group->postings = postings;
    /* Where ranks share CPUs, who spins keeps the one it waits for from running. */
    group->spin_turns = world <= mil_cpus_allowed() ? SPIN_TURNS : 0;
    pthread_mutex_init(&group->lock, NULL);
    pthread_cond_init(&group->wake, NULL);
    *out = group;
    return MIL_OK;
}

mil_status mil_comm_local_create(mil_comm **comms, int32_t world)
{
    if (world < 1)
        return mil_fail(MIL_ERR_ARGUMENT, "comm: world is %d, expected >= 1", world);
    local_group *group = NULL;
    MIL_TRY(group_create(&group, world));
    for (int32_t rank = 0; rank < world; rank++) {
        local_comm *comm = mil_alloc(1, sizeof *comm);
        if (comm == NULL) {
            for (int32_t made = 0; made < rank; made++) {
                mil_free(comms[made]);
                comms[made] = NULL;
            }
            group_free(group);
            return mil_fail(MIL_ERR_MEMORY, "comm: no memory for rank %d of %d", rank, world);
        }
        comm->base = (mil_comm){.ops = &local_ops, .rank = rank, .world = world};
        comm->group = group;
        comms[rank] = &comm->base;
    }
    group->n_alive = world;
    return MIL_OK;
}
