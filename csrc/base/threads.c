#include "base/threads.h"

#include "base/memory.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* ---- gates: a number that only moves on, and threads that wait until it does ---- */

/* Longer than the gaps between the ops of a step, shorter than anyone would notice as load. */
#define SPIN_NS 50000
#define PAUSES_PER_LOOK 32

typedef struct gate {
    _Alignas(64) atomic_uint value; /* also the futex */
    atomic_uint n_sleeping;
} gate;

uint64_t mil_clock_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void relax(void)
{
#ifdef __x86_64__
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static unsigned gate_read(gate *g)
{
    return atomic_load_explicit(&g->value, memory_order_acquire);
}

/* Sequentially consistent on both sides: either the opener sees the sleeper, or the sleeper's futex
 * call sees the new value. */
static void gate_open(gate *g)
{
    atomic_fetch_add_explicit(&g->value, 1, memory_order_seq_cst);
    if (atomic_load_explicit(&g->n_sleeping, memory_order_seq_cst) > 0)
        syscall(SYS_futex, &g->value, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static void gate_sleep(gate *g, unsigned seen)
{
    atomic_fetch_add_explicit(&g->n_sleeping, 1, memory_order_seq_cst);
    while (atomic_load_explicit(&g->value, memory_order_seq_cst) == seen)
        syscall(SYS_futex, &g->value, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub_explicit(&g->n_sleeping, 1, memory_order_relaxed);
}

/* Until the gate's value is no longer `seen`. */
static void gate_wait(gate *g, unsigned seen, bool may_spin)
{
    if (may_spin) {
        uint64_t end = mil_clock_ns() + SPIN_NS;
        do {
            for (int i = 0; i < PAUSES_PER_LOOK; i++) {
                if (gate_read(g) != seen)
                    return;
                relax();
            }
        } while (mil_clock_ns() < end);
    }
    gate_sleep(g, seen);
}

/* ---- the pool ---- */

typedef struct worker {
    mil_pool *pool;
    int32_t thread;
    pthread_t handle;
} worker;

struct mil_pool {
    gate start; /* a region begins, or the pool ends */
    gate done;  /* every worker has left the region */
    gate meet;  /* every thread is at the barrier */
    _Alignas(64) atomic_int n_working;
    _Alignas(64) atomic_int n_arrived;
    _Alignas(64) mil_task_fn fn;
    void *argument;
    bool is_ending;
    bool may_spin;
    bool is_pinned;
    int32_t n_threads;
    int32_t caller_cpu;
    pid_t process;
    int32_t n_started; /* workers that exist */
    worker *workers;   /* [n_threads - 1] */
};

#define FLUSH_DENORMALS 0x8040u /* MXCSR: flush-to-zero and denormals-are-zero */

static uint32_t read_mxcsr(void)
{
#ifdef __x86_64__
    return __builtin_ia32_stmxcsr();
#else
    return 0;
#endif
}

static void write_mxcsr(uint32_t value)
{
#ifdef __x86_64__
    __builtin_ia32_ldmxcsr(value);
#else
    (void)value;
#endif
}

static void *work(void *argument)
{
    worker *me = argument;
    mil_pool *pool = me->pool;
    write_mxcsr(read_mxcsr() | FLUSH_DENORMALS);
    for (unsigned seen = 0;; seen++) {
        gate_wait(&pool->start, seen, pool->may_spin);
        if (pool->is_ending)
            return NULL;
        pool->fn(pool->argument, me->thread, pool->n_threads);
        if (atomic_fetch_sub_explicit(&pool->n_working, 1, memory_order_acq_rel) == 1)
            gate_open(&pool->done);
    }
}

static void pin(pthread_attr_t *attributes, int32_t cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((size_t)cpu, &set);
    (void)pthread_attr_setaffinity_np(attributes, sizeof set, &set);
}

/* Workers take no signals: Python's handlers belong to its own threads. */
static int start_worker(worker *me, const int32_t *cpus)
{
    pthread_attr_t attributes;
    int error = pthread_attr_init(&attributes);
    if (error != 0)
        return error;
    if (cpus != NULL)
        pin(&attributes, cpus[me->thread]);
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&me->handle, &attributes, work, me);
    if (error == EINVAL && cpus != NULL) /* the CPU has left the mask since it was chosen */
        error = pthread_create(&me->handle, NULL, work, me);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return error;
}

mil_status mil_pool_create(mil_pool **out, int32_t n_threads, const int32_t *cpus)
{
    if (n_threads < 1)
        return mil_fail(MIL_ERR_ARGUMENT, "pool: %d threads, expected 1 or more", n_threads);
    void *memory;
    MIL_TRY(mil_alloc_checked(&memory, 1, sizeof(mil_pool), "pool"));
    mil_pool *pool = memory;
    pool->n_threads = n_threads;
    pool->process = getpid();
    pool->is_pinned = cpus != NULL;
    pool->caller_cpu = cpus != NULL ? cpus[0] : 0;
    pool->may_spin = n_threads <= mil_cpus_allowed();
    pool->workers = mil_alloc((size_t)n_threads - 1, sizeof *pool->workers);
    if (pool->workers == NULL) {
        mil_pool_free(pool);
        return mil_fail(MIL_ERR_MEMORY, "pool: no memory for %d threads", n_threads);
    }
    for (int32_t i = 0; i < n_threads - 1; i++) {
        worker *me = &pool->workers[i];
        me->pool = pool;
        me->thread = i + 1;
        int error = start_worker(me, cpus);
        if (error != 0) {
            mil_pool_free(pool);
            return mil_fail(MIL_ERR_DEVICE, "pool: thread %d of %d did not start: error %d", i + 1,
                            n_threads, error);
        }
        pool->n_started++;
    }
    *out = pool;
    return MIL_OK;
}

void mil_pool_free(mil_pool *pool)
{
    if (pool == NULL)
        return;
    /* A forked child has the memory but not the threads. */
    if (pool->process == getpid()) {
        pool->is_ending = true;
        gate_open(&pool->start);
        for (int32_t i = 0; i < pool->n_started; i++)
            pthread_join(pool->workers[i].handle, NULL);
    }
    mil_free(pool->workers);
    mil_free(pool);
}

int32_t mil_pool_n_threads(const mil_pool *pool)
{
    return pool->n_threads;
}

void mil_pool_run(mil_pool *pool, mil_task_fn fn, void *argument)
{
    if (pool->n_threads == 1) {
        fn(argument, 0, 1);
        return;
    }
    unsigned seen = gate_read(&pool->done);
    pool->fn = fn;
    pool->argument = argument;
    atomic_store_explicit(&pool->n_working, pool->n_threads - 1, memory_order_relaxed);
    gate_open(&pool->start);
    fn(argument, 0, pool->n_threads);
    gate_wait(&pool->done, seen, pool->may_spin);
}

/* The last to arrive opens the gate for the others; the gate's number is the sense that reverses.
 */
void mil_pool_barrier(mil_pool *pool, int32_t thread)
{
    (void)thread;
    if (pool->n_threads == 1)
        return;
    unsigned seen = gate_read(&pool->meet);
    if (atomic_fetch_add_explicit(&pool->n_arrived, 1, memory_order_acq_rel) + 1 <
        pool->n_threads) {
        gate_wait(&pool->meet, seen, pool->may_spin);
        return;
    }
    atomic_store_explicit(&pool->n_arrived, 0, memory_order_relaxed);
    gate_open(&pool->meet);
}

mil_status mil_pool_enter(mil_pool *pool, mil_thread_state *saved)
{
    memset(saved, 0, sizeof *saved);
    if (pool->process != getpid())
        return mil_fail(MIL_ERR_DEVICE,
                        "pool: used in process %d, but the engine belongs to process %d",
                        (int)getpid(), (int)pool->process);
    saved->mxcsr = read_mxcsr();
    write_mxcsr(saved->mxcsr | FLUSH_DENORMALS);
    /* Pinning is for speed alone: where it fails the step runs all the same. */
    if (pool->is_pinned &&
        sched_getaffinity(0, sizeof saved->affinity, (cpu_set_t *)saved->affinity) == 0) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET((size_t)pool->caller_cpu, &set);
        saved->was_pinned = sched_setaffinity(0, sizeof set, &set) == 0;
    }
    return MIL_OK;
}

void mil_pool_leave(mil_pool *pool, const mil_thread_state *saved)
{
    (void)pool;
    write_mxcsr(saved->mxcsr);
    if (saved->was_pinned)
        (void)sched_setaffinity(0, sizeof saved->affinity, (const cpu_set_t *)saved->affinity);
}
