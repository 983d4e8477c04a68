/* What the drivers in C share: a backend with its threads, memory and values. They end at the first
 * failure. */
#pragma once

#include "base/bf16.h"
#include "base/hash.h"
#include "base/memory.h"
#include "base/threads.h"
#include "ops/backend.h"

#include <stdio.h>
#include <stdlib.h>

#define MAX_THREADS 256

static inline void require(bool ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "benchmark: %s: %s\n", what, mil_status_message());
        exit(1);
    }
}

static inline void *take(size_t n_bytes)
{
    mil_slab slab;
    require(mil_slab_init(&slab, n_bytes, "bench") == MIL_OK, "memory");
    return slab.data;
}

/* Values in [-scale, scale), the same on every run; filled by one thread, so that pages lie as a
 * loader's do. */
static inline void fill_bf16(uint16_t *to, size_t n, uint64_t seed, float scale)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t bits = mil_mix64(seed + i);
        to[i] = mil_bf16_from_float(((float)(bits >> 40) / 8388608.0f - 1.0f) * scale);
    }
}

/* The CPU backend with n_threads (0: all) on cpus [MAX_THREADS], and a workspace for maxima, whose
 * n_threads is set here. Returns how many threads there are. */
static inline int32_t open_context(mil_context *context, int32_t *cpus, int32_t n_threads,
                                   mil_maxima maxima)
{
    int32_t n_usable = mil_cpus_usable(cpus, MAX_THREADS);
    maxima.n_threads = n_threads > 0 && n_threads < n_usable ? n_threads : n_usable;
    require(mil_backend_find(&context->backend, "cpu") == MIL_OK, "backend");
    require(mil_pool_create(&context->pool, maxima.n_threads, cpus) == MIL_OK, "pool");
    context->workspace_bytes = context->backend->workspace_bytes(&maxima);
    context->workspace = take(context->workspace_bytes);
    return maxima.n_threads;
}
