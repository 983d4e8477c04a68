#include "model/team.h"

#include "base/memory.h"

#include <pthread.h>
#include <stdio.h>
#include <unistd.h>

typedef struct team_member {
    mil_team *team;
    int32_t rank;
    bool is_started;
    pthread_t thread;
    mil_pool *pool;
    mil_comm *comm;
    mil_status status;
    char message[1024];
} team_member;

struct mil_team {
    int32_t world;
    pid_t owner;
    pthread_mutex_t lock; /* guards what follows, up to members */
    pthread_cond_t work;
    pthread_cond_t done;
    uint64_t generation;
    int32_t n_busy;
    bool is_closing;
    mil_rank_fn fn;
    void *argument;
    team_member members[]; /* [world] */
};

/* A member's message lives on its own thread: copy it to where the caller can read it. */
static void keep_status(team_member *member, mil_status status)
{
    member->status = status;
    if (status == MIL_OK)
        return;
    (void)snprintf(member->message, sizeof member->message, "%s", mil_status_message());
    if (member->comm != NULL)
        member->comm->ops->abort(member->comm, member->message);
}

static void finish(mil_team *team)
{
    pthread_mutex_lock(&team->lock);
    if (--team->n_busy == 0)
        pthread_cond_signal(&team->done);
    pthread_mutex_unlock(&team->lock);
}

static void *member_main(void *argument)
{
    team_member *self = argument;
    mil_team *team = self->team;
    mil_thread_state saved;
    keep_status(self, mil_pool_enter(self->pool, &saved));
    bool has_entered = self->status == MIL_OK;
    uint64_t seen = 0;
    finish(team);
    for (;;) {
        pthread_mutex_lock(&team->lock);
        while (team->generation == seen && !team->is_closing)
            pthread_cond_wait(&team->work, &team->lock);
        seen = team->generation;
        bool is_closing = team->is_closing;
        pthread_mutex_unlock(&team->lock);
        if (is_closing)
            break;
        keep_status(self, team->fn(team->argument, self->rank));
        finish(team);
    }
    if (has_entered)
        mil_pool_leave(self->pool, &saved);
    return NULL;
}

static void wait_for_all(mil_team *team)
{
    pthread_mutex_lock(&team->lock);
    while (team->n_busy > 0)
        pthread_cond_wait(&team->done, &team->lock);
    pthread_mutex_unlock(&team->lock);
}

/* The cause, not its echoes: ranks that were woken by an abort say MIL_ERR_CLOSED. */
static mil_status first_failure(const mil_team *team)
{
    const team_member *failed = NULL;
    for (int32_t rank = 0; rank < team->world; rank++) {
        const team_member *member = &team->members[rank];
        if (member->status == MIL_OK)
            continue;
        if (failed == NULL ||
            (failed->status == MIL_ERR_CLOSED && member->status != MIL_ERR_CLOSED))
            failed = member;
    }
    if (failed == NULL)
        return MIL_OK;
    return mil_fail(failed->status, "rank %d: %s", failed->rank, failed->message);
}

static mil_status start_members(mil_team *team)
{
    for (int32_t rank = 1; rank < team->world; rank++) {
        team_member *member = &team->members[rank];
        pthread_mutex_lock(&team->lock);
        team->n_busy++;
        pthread_mutex_unlock(&team->lock);
        int error = pthread_create(&member->thread, NULL, member_main, member);
        if (error != 0) {
            finish(team);
            return mil_fail(MIL_ERR_DEVICE, "model: no thread for rank %d (error %d)", rank, error);
        }
        member->is_started = true;
    }
    wait_for_all(team);
    return first_failure(team);
}

mil_status mil_team_create(mil_team **out, int32_t world, mil_pool *const *pools,
                           mil_comm *const *comms)
{
    mil_team *team = mil_alloc(1, sizeof *team + (size_t)world * sizeof(team_member));
    if (team == NULL)
        return mil_fail(MIL_ERR_MEMORY, "model: no memory for a team of %d ranks", world);
    team->world = world;
    team->owner = getpid();
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->work, NULL);
    pthread_cond_init(&team->done, NULL);
    for (int32_t rank = 0; rank < world; rank++) {
        team_member *member = &team->members[rank];
        member->team = team;
        member->rank = rank;
        member->pool = pools[rank];
        member->comm = world > 1 ? comms[rank] : NULL;
    }
    mil_status status = start_members(team);
    if (status != MIL_OK) {
        mil_team_free(team);
        return status;
    }
    *out = team;
    return MIL_OK;
}

void mil_team_free(mil_team *team)
{
    if (team == NULL)
        return;
    if (team->owner == getpid()) {
        pthread_mutex_lock(&team->lock);
        team->is_closing = true;
        pthread_cond_broadcast(&team->work);
        pthread_mutex_unlock(&team->lock);
        for (int32_t rank = 1; rank < team->world; rank++)
            if (team->members[rank].is_started)
                pthread_join(team->members[rank].thread, NULL);
        pthread_cond_destroy(&team->done);
        pthread_cond_destroy(&team->work);
        pthread_mutex_destroy(&team->lock);
    }
    mil_free(team);
}

mil_status mil_team_run(mil_team *team, mil_rank_fn fn, void *argument)
{
    if (team->world == 1)
        return fn(argument, 0);
    pthread_mutex_lock(&team->lock);
    team->fn = fn;
    team->argument = argument;
    team->n_busy = team->world - 1;
    team->generation++;
    pthread_cond_broadcast(&team->work);
    pthread_mutex_unlock(&team->lock);
    keep_status(&team->members[0], fn(argument, 0));
    wait_for_all(team);
    return first_failure(team);
}
