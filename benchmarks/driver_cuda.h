/* What a driver of the CUDA backend's ops shares: a queue with workspace, memory of random values,
 * and the time of one call. They end at the first failure.
 *
 * Calls are captured in a graph, whose replays are timed by CUDA events. What an op reads of
 * weights, adapters and KV is in rotation over ROTATED bytes or more; activations lie where they
 * lie in a step, so small ones are in L2. */
#pragma once

#include "driver.h"

#include "kernels/cuda.h"

#define POOL_BYTES ((size_t)3 << 30)            /* of random values, which everything is cut from */
#define BEFORE_WEIGHTS ((size_t)1 << 29)        /* of it, for inputs */
#define ROTATED ((size_t)256 << 20)             /* four times an H200's L2 */
#define BLOCK_VALUES (((size_t)8 << 20) + 9896) /* the pool's period: no multiple of any row */
#define MAX_SETS 2048
#define MAX_CALLS 4096
#define GRAPH_US 1500.0 /* of one replay: beside it the gap between graphs is nothing */
#define WARM_US 25000.0 /* before the clock counts, for the card's clocks */
#define TIMED_US 50000.0
#define MIN_ROUNDS 7
#define MAX_ROUNDS 60
#define MAX_SLABS 32

typedef struct machine {
    mil_context context;
    const mil_device *device;
    char *pool;
    mil_slab slabs[MAX_SLABS]; /* of the row at hand */
    mil_slab plan;
    int32_t n_slabs;
} machine;

static inline void check(cudaError_t error, const char *what)
{
    require(mil_cuda_status(error, what) == MIL_OK, what);
}

static inline int32_t at_most(int64_t value, int64_t most)
{
    return (int32_t)(value < most ? value : most);
}

/* Sets of n_bytes that are in rotation. */
static inline int32_t sets_of(size_t n_bytes)
{
    return at_most((int64_t)((ROTATED + n_bytes - 1) / n_bytes), MAX_SETS);
}

/* ---- memory ---- */

static inline void *take_zeroed(machine *all, size_t n_bytes)
{
    require(all->n_slabs < MAX_SLABS, "too many arrays");
    mil_slab *slab = &all->slabs[all->n_slabs];
    require(all->device->alloc(all->context.queue, slab, n_bytes, "bench") == MIL_OK, "memory");
    all->n_slabs++;
    return slab->data;
}

/* Values in [-1, 1), read as bfloat16 or as float32: a float's upper half is one of the former. */
static inline void *take_random(machine *all, size_t n_bytes)
{
    void *to = take_zeroed(all, n_bytes);
    require(n_bytes <= POOL_BYTES, "an array larger than the pool");
    check(cudaMemcpyAsync(to, all->pool, n_bytes, cudaMemcpyDeviceToDevice,
                          all->context.queue->stream),
          "filling");
    return to;
}

static inline void *take_copy(machine *all, const void *from, size_t n_bytes)
{
    void *to = take_zeroed(all, n_bytes);
    require(all->device->copy_in(all->context.queue, to, from, n_bytes) == MIL_OK, "copy");
    return to;
}

static inline void give_all(machine *all)
{
    require(all->device->synchronize(all->context.queue) == MIL_OK, "synchronize");
    while (all->n_slabs > 0)
        all->device->free(all->context.queue, &all->slabs[--all->n_slabs]);
    all->device->free_host(all->context.queue, &all->plan);
}

static inline void fill_pool(machine *all)
{
    uint16_t *block = malloc(BLOCK_VALUES * sizeof *block);
    require(block != NULL, "memory");
    fill_bf16(block, BLOCK_VALUES, 1, 1.0f);
    size_t done = BLOCK_VALUES * sizeof *block;
    require(all->device->copy_in(all->context.queue, all->pool, block, done) == MIL_OK, "copy");
    free(block);
    while (done < POOL_BYTES) {
        size_t n = done < POOL_BYTES - done ? done : POOL_BYTES - done;
        check(cudaMemcpyAsync(all->pool + done, all->pool, n, cudaMemcpyDeviceToDevice,
                              all->context.queue->stream),
              "filling");
        done += n;
    }
    require(all->device->synchronize(all->context.queue) == MIL_OK, "filling");
}

/* The CUDA backend on device 0 with room for maxima, and the pool. */
static inline void open_machine(machine *all, const mil_maxima *maxima)
{
    mil_context *context = &all->context;
    mil_slab slab;
    require(mil_backend_find(&context->backend, "cuda") == MIL_OK, "backend");
    all->device = context->backend->device;
    require(all->device->open(&context->queue, 0) == MIL_OK, "queue");
    context->workspace_bytes = context->backend->workspace_bytes(maxima);
    context->step_bytes = context->backend->step_bytes(maxima);
    require(all->device->alloc(context->queue, &slab, context->workspace_bytes, "workspace") ==
                MIL_OK,
            "workspace");
    context->workspace = slab.data;
    require(all->device->alloc(context->queue, &slab, context->step_bytes, "step data") == MIL_OK,
            "step data");
    context->step_data = slab.data;
    require(all->device->alloc(context->queue, &slab, POOL_BYTES, "pool") == MIL_OK, "pool");
    all->pool = slab.data;
    fill_pool(all);
}

/* ---- time ---- */

/* Queue one call; set: which of the sets in rotation it reads. */
typedef mil_status (*call_fn)(machine *all, void *args, int32_t set);

typedef struct timing {
    double us, low_us, high_us; /* of one call: the median replay, the best, the worst */
    int32_t n_calls, n_rounds;
} timing;

static inline void run_calls(machine *all, call_fn call, void *args, int32_t n_sets,
                             int32_t n_calls)
{
    for (int32_t i = 0; i < n_calls; i++)
        require(call(all, args, i % n_sets) == MIL_OK, "op");
}

static inline double elapsed_us(cudaEvent_t begin, cudaEvent_t end)
{
    float ms;
    check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    return (double)ms * 1e3;
}

/* Outside a graph, after calls that load kernels and choose algorithms. */
static inline double estimate_us(machine *all, call_fn call, void *args, int32_t n_sets,
                                 const cudaEvent_t *events)
{
    cudaStream_t stream = all->context.queue->stream;
    int32_t n_calls = at_most(n_sets, 16);
    run_calls(all, call, args, n_sets, 2);
    check(cudaEventRecord(events[0], stream), "cudaEventRecord");
    run_calls(all, call, args, n_sets, n_calls);
    check(cudaEventRecord(events[1], stream), "cudaEventRecord");
    require(all->device->synchronize(all->context.queue) == MIL_OK, "op");
    double us = elapsed_us(events[0], events[1]) / n_calls;
    return us < 0.5 ? 0.5 : us;
}

static inline int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static inline int32_t rounds_of(double total_us, double us, int32_t least)
{
    int32_t n = at_most((int64_t)(total_us / us), MAX_ROUNDS);
    return n < least ? least : n;
}

static inline timing replay(machine *all, struct mil_graph *graph, int32_t n_calls, int32_t n_warm,
                            int32_t n_rounds, const cudaEvent_t *events)
{
    mil_queue *queue = all->context.queue;
    double us[MAX_ROUNDS];
    for (int32_t i = 0; i < n_warm; i++)
        require(all->device->graph_launch(queue, graph) == MIL_OK, "replay");
    for (int32_t i = 0; i <= n_rounds; i++) {
        check(cudaEventRecord(events[i], queue->stream), "cudaEventRecord");
        if (i < n_rounds)
            require(all->device->graph_launch(queue, graph) == MIL_OK, "replay");
    }
    require(all->device->synchronize(queue) == MIL_OK, "replay");
    for (int32_t i = 0; i < n_rounds; i++)
        us[i] = elapsed_us(events[i], events[i + 1]) / n_calls;
    qsort(us, (size_t)n_rounds, sizeof *us, compare);
    return (timing){us[n_rounds / 2], us[0], us[n_rounds - 1], n_calls, n_rounds};
}

static inline timing measure(machine *all, call_fn call, void *args, int32_t n_sets)
{
    mil_queue *queue = all->context.queue;
    cudaEvent_t events[MAX_ROUNDS + 1];
    struct mil_graph *graph = NULL;
    for (int32_t i = 0; i <= MAX_ROUNDS; i++)
        check(cudaEventCreate(&events[i]), "cudaEventCreate");
    double us = estimate_us(all, call, args, n_sets, events);
    int32_t n_turns = at_most((int64_t)(GRAPH_US / (us * n_sets)), MAX_CALLS / n_sets);
    int32_t n_calls = n_sets * (n_turns < 1 ? 1 : n_turns);
    require(all->device->capture_begin(queue) == MIL_OK, "capture");
    run_calls(all, call, args, n_sets, n_calls);
    require(all->device->capture_end(queue, &graph) == MIL_OK, "capture");
    timing got = replay(all, graph, n_calls, rounds_of(WARM_US, us * n_calls, 2),
                        rounds_of(TIMED_US, us * n_calls, MIN_ROUNDS), events);
    all->device->graph_free(queue, graph);
    for (int32_t i = 0; i <= MAX_ROUNDS; i++)
        check(cudaEventDestroy(events[i]), "cudaEventDestroy");
    return got;
}
