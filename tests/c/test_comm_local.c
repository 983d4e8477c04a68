/* comm/local with ranks as threads: order of sums, every collective, and abort. */
#include "comm/comm.h"

#include "base/memory.h"
#include "test.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

#define MAX_WORLD 4
#define N 1003

typedef struct rank_job {
    pthread_t thread;
    mil_comm *comm;
    mil_status (*body)(struct rank_job *);
    mil_status status;
    char message[256];
    float data[N];
    int32_t gathered[MAX_WORLD][3];
} rank_job;

static void *rank_main(void *argument)
{
    rank_job *job = argument;
    job->status = job->body(job);
    if (job->status != MIL_OK)
        snprintf(job->message, sizeof job->message, "%s", mil_status_message());
    return NULL;
}

/* Run body on `world` ranks; the jobs come back finished. Caller frees. */
static rank_job *run_ranks(int32_t world, mil_status (*body)(rank_job *))
{
    mil_comm *comms[MAX_WORLD];
    rank_job *jobs = calloc((size_t)world, sizeof *jobs);
    CHECK(jobs != NULL);
    CHECK_INT(mil_comm_local_create(comms, world), MIL_OK);
    for (int32_t rank = 0; rank < world; rank++) {
        jobs[rank].comm = comms[rank];
        jobs[rank].body = body;
        CHECK(pthread_create(&jobs[rank].thread, NULL, rank_main, &jobs[rank]) == 0);
    }
    for (int32_t rank = 0; rank < world; rank++)
        pthread_join(jobs[rank].thread, NULL);
    for (int32_t rank = 0; rank < world; rank++)
        comms[rank]->ops->free(comms[rank]);
    return jobs;
}

/* Values whose fp32 sum depends on the order of addition. */
static float value_of(int32_t rank, int32_t i)
{
    static const float scales[MAX_WORLD] = {1e8f, 3.14159f, -1e8f, 0.001f};
    return scales[rank] * (1.0f + (float)(i % 17) * 0.01f);
}

static mil_status reduce_often(rank_job *job)
{
    for (int32_t round = 0; round < 50; round++) {
        for (int32_t i = 0; i < N; i++)
            job->data[i] = value_of(job->comm->rank, i);
        MIL_TRY(job->comm->ops->all_reduce(job->comm, job->data, N));
    }
    return MIL_OK;
}

static void check_sums(int32_t world)
{
    rank_job *jobs = run_ranks(world, reduce_often);
    for (int32_t rank = 0; rank < world; rank++) {
        CHECK_INT(jobs[rank].status, MIL_OK);
        for (int32_t i = 0; i < N; i++) {
            float expected = value_of(0, i);
            for (int32_t other = 1; other < world; other++)
                expected += value_of(other, i);
            CHECK(memcmp(&jobs[rank].data[i], &expected, sizeof expected) == 0);
        }
    }
    free(jobs);
}

TEST(all_reduce_adds_in_rank_order_on_every_rank)
{
    check_sums(1);
    check_sums(2);
    check_sums(3);
    check_sums(4);
}

static mil_status gather_and_broadcast(rank_job *job)
{
    mil_comm *comm = job->comm;
    for (int32_t round = 0; round < 50; round++) {
        int32_t mine[3] = {comm->rank, 10 * comm->rank, round};
        MIL_TRY(comm->ops->all_gather(comm, mine, job->gathered, sizeof mine));
        float sent = comm->rank == 1 ? (float)round : -1.0f;
        MIL_TRY(comm->ops->broadcast(comm, &sent, sizeof sent, 1));
        job->data[0] = sent;
        MIL_TRY(comm->ops->barrier(comm));
    }
    return MIL_OK;
}

TEST(all_gather_lays_ranks_in_order_and_broadcast_reaches_all)
{
    for (int32_t world = 2; world <= MAX_WORLD; world += 2) {
        rank_job *jobs = run_ranks(world, gather_and_broadcast);
        for (int32_t rank = 0; rank < world; rank++) {
            CHECK_INT(jobs[rank].status, MIL_OK);
            CHECK(jobs[rank].data[0] == 49.0f);
            for (int32_t other = 0; other < world; other++) {
                CHECK_INT(jobs[rank].gathered[other][0], other);
                CHECK_INT(jobs[rank].gathered[other][1], 10 * other);
                CHECK_INT(jobs[rank].gathered[other][2], 49);
            }
        }
        free(jobs);
    }
}

static mil_status last_rank_aborts(rank_job *job)
{
    mil_comm *comm = job->comm;
    if (comm->rank == comm->world - 1) {
        comm->ops->abort(comm, "rank was told to stop");
        comm->ops->abort(comm, "a second reason");
        return MIL_OK;
    }
    mil_status first = comm->ops->all_reduce(comm, job->data, N);
    mil_status again = comm->ops->barrier(comm);
    return first == again ? again : MIL_ERR_INTERNAL;
}

TEST(abort_wakes_every_rank_for_good_and_keeps_the_first_reason)
{
    for (int32_t world = 2; world <= MAX_WORLD; world += 2) {
        rank_job *jobs = run_ranks(world, last_rank_aborts);
        for (int32_t rank = 0; rank < world - 1; rank++) {
            CHECK_INT(jobs[rank].status, MIL_ERR_CLOSED);
            CHECK(strstr(jobs[rank].message, "rank was told to stop") != NULL);
        }
        free(jobs);
    }
}

TEST(a_group_that_cannot_be_made_holds_nothing)
{
    mil_comm *comms[MAX_WORLD];
    size_t held = mil_memory_held_bytes();
    CHECK_INT(mil_comm_local_create(comms, 0), MIL_ERR_ARGUMENT);
    for (uint64_t k = 1; k <= 2 + MAX_WORLD; k++) {
        mil_memory_fail_at(k);
        CHECK_INT(mil_comm_local_create(comms, MAX_WORLD), MIL_ERR_MEMORY);
        CHECK(mil_memory_held_bytes() == held);
    }
    mil_memory_fail_at(0);
}

TEST_MAIN()
