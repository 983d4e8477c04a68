#include "base/threads.h"

#include "base/memory.h"
#include "test.h"

#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_THREADS 5
#define FLUSH_DENORMALS 0x8040u

static mil_pool *make_pool(int32_t n_threads)
{
    mil_pool *pool = NULL;
    CHECK(mil_pool_create(&pool, n_threads, NULL) == MIL_OK);
    CHECK_INT(mil_pool_n_threads(pool), n_threads);
    return pool;
}

static void count_visit(void *argument, int32_t thread, int32_t n_threads)
{
    atomic_int *visits = argument;
    atomic_fetch_add(&visits[thread], 1);
    atomic_fetch_add(&visits[MAX_THREADS], n_threads);
}

TEST(every_thread_runs_each_region_once)
{
    for (int32_t n = 1; n <= MAX_THREADS; n++) {
        mil_pool *pool = make_pool(n);
        atomic_int visits[MAX_THREADS + 1] = {0};
        for (int region = 0; region < 200; region++)
            mil_pool_run(pool, count_visit, visits);
        for (int32_t t = 0; t < MAX_THREADS; t++)
            CHECK_INT(visits[t], t < n ? 200 : 0);
        CHECK_INT(visits[MAX_THREADS], 200 * n * n);
        mil_pool_free(pool);
    }
}

TEST(workers_that_sleep_wake_for_the_next_region)
{
    mil_pool *pool = make_pool(2);
    atomic_int visits[MAX_THREADS + 1] = {0};
    for (int region = 0; region < 5; region++) {
        mil_pool_run(pool, count_visit, visits);
        usleep(2000); /* 40 times the spin, so that the futex path runs; nothing is timed */
    }
    CHECK_INT(visits[1], 5);
    mil_pool_free(pool);
}

typedef struct rounds {
    mil_pool *pool;
    int32_t written[MAX_THREADS];
    atomic_int n_wrong;
} rounds;

/* Between two barriers each thread writes its own cell, then reads all. */
static void write_then_read(void *argument, int32_t thread, int32_t n_threads)
{
    rounds *all = argument;
    for (int32_t round = 1; round <= 300; round++) {
        all->written[thread] = round;
        mil_pool_barrier(all->pool, thread);
        for (int32_t t = 0; t < n_threads; t++) {
            if (all->written[t] != round)
                atomic_fetch_add(&all->n_wrong, 1);
        }
        mil_pool_barrier(all->pool, thread);
    }
}

TEST(barrier_shows_every_thread_what_the_others_wrote)
{
    for (int32_t n = 1; n <= MAX_THREADS; n++) {
        rounds all = {.pool = make_pool(n)};
        mil_pool_run(all.pool, write_then_read, &all);
        mil_pool_run(all.pool, write_then_read, &all);
        CHECK_INT(all.n_wrong, 0);
        mil_pool_free(all.pool);
    }
}

/* A product of two numbers whose result is below the smallest normal float, counted where not 0. */
static void multiply_tiny(void *argument, int32_t thread, int32_t n_threads)
{
    (void)thread;
    (void)n_threads;
    volatile float tiny = 1e-30f;
    volatile float product = tiny * 1e-10f;
    if (product != 0.0f)
        atomic_fetch_add((atomic_int *)argument, 1);
}

TEST(denormals_are_flushed_inside_a_step_and_kept_outside)
{
    mil_pool *pool = make_pool(2);
    mil_thread_state saved;
    atomic_int n_denormals = 0;
    multiply_tiny(&n_denormals, 0, 1);
    int outside = n_denormals;
    CHECK(mil_pool_enter(pool, &saved) == MIL_OK);
    mil_pool_run(pool, multiply_tiny, &n_denormals);
    mil_pool_leave(pool, &saved);
    int inside = n_denormals - outside;
    multiply_tiny(&n_denormals, 0, 1);
    CHECK_INT(outside, 1);
#ifdef __x86_64__
    CHECK_INT(inside, 0);
#endif
    CHECK_INT(n_denormals - outside - inside, 1);
    mil_pool_free(pool);
}

TEST(enter_pins_the_caller_and_leave_restores_its_mask)
{
    int32_t cpus[2];
    int32_t n = mil_cpus_usable(cpus, 2);
    cpu_set_t before, during, after;
    CHECK(sched_getaffinity(0, sizeof before, &before) == 0);
    mil_pool *pool = NULL;
    mil_thread_state saved;
    CHECK(mil_pool_create(&pool, n, cpus) == MIL_OK);
    CHECK(mil_pool_enter(pool, &saved) == MIL_OK);
    CHECK(sched_getaffinity(0, sizeof during, &during) == 0);
    mil_pool_leave(pool, &saved);
    CHECK(sched_getaffinity(0, sizeof after, &after) == 0);
    CHECK_INT(CPU_COUNT(&during), 1);
    CHECK(CPU_ISSET((size_t)cpus[0], &during));
    CHECK(CPU_EQUAL(&before, &after));
    mil_pool_free(pool);
}

/* The child's exit code: 0 when the pool refused and named this process. */
static int use_in_child(mil_pool *pool)
{
    mil_thread_state saved;
    if (mil_pool_enter(pool, &saved) != MIL_ERR_DEVICE)
        return 1;
    char owner[32];
    snprintf(owner, sizeof owner, "process %d", (int)getppid());
    if (strstr(mil_status_message(), owner) == NULL)
        return 2;
    mil_pool_free(pool); /* must not wait for threads that the child does not have */
    return 0;
}

TEST(forked_child_is_refused_and_may_free)
{
    mil_pool *pool = make_pool(2);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0)
        _exit(use_in_child(pool));
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status));
    CHECK_INT(WEXITSTATUS(status), 0);
    mil_pool_free(pool);
}

TEST(no_threads_is_an_error)
{
    mil_pool *pool = NULL;
    CHECK(mil_pool_create(&pool, 0, NULL) == MIL_ERR_ARGUMENT);
    CHECK(pool == NULL);
}

TEST(failed_allocations_leave_nothing)
{
    size_t held = mil_memory_held_bytes();
    for (uint64_t k = 1; k <= 2; k++) {
        mil_pool *pool = NULL;
        mil_memory_fail_at(k);
        mil_status status = mil_pool_create(&pool, 2, NULL);
        mil_memory_fail_at(0);
        CHECK(status == MIL_ERR_MEMORY);
        CHECK(pool == NULL);
        CHECK(mil_memory_held_bytes() == held);
    }
}

TEST(usable_cpus_are_distinct_and_allowed)
{
    int32_t cpus[64];
    int32_t n = mil_cpus_usable(cpus, 64);
    cpu_set_t allowed;
    CHECK(sched_getaffinity(0, sizeof allowed, &allowed) == 0);
    CHECK(n >= 1);
    CHECK(n <= mil_cpus_allowed());
    for (int32_t i = 0; i < n; i++) {
        CHECK(CPU_ISSET((size_t)cpus[i], &allowed));
        for (int32_t j = 0; j < i; j++)
            CHECK(cpus[i] != cpus[j]);
    }
}

TEST(usable_cpus_follow_the_affinity_mask)
{
    cpu_set_t before, one;
    CHECK(sched_getaffinity(0, sizeof before, &before) == 0);
    int32_t last = 0;
    for (int32_t cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET((size_t)cpu, &before))
            last = cpu;
    }
    CPU_ZERO(&one);
    CPU_SET((size_t)last, &one);
    CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
    int32_t cpus[4];
    int32_t n = mil_cpus_usable(cpus, 4);
    int32_t allowed = mil_cpus_allowed();
    CHECK(sched_setaffinity(0, sizeof before, &before) == 0);
    CHECK_INT(n, 1);
    CHECK_INT(cpus[0], last);
    CHECK_INT(allowed, 1);
}

TEST(free_memory_is_below_the_limit)
{
    uint64_t limit = mil_memory_limit_bytes();
    CHECK(limit >= (uint64_t)64 << 20);
    CHECK(mil_memory_free_bytes() > 0);
    CHECK(mil_memory_free_bytes() <= limit);
    CHECK(mil_cgroup_cpus() >= 0);
}

TEST_MAIN()
