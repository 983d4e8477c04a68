/* The backend's ops for ctypes: flat arguments, default visibility, one context behind a handle.
 * Every op runs as a step would: inside mil_pool_enter, on a workspace of exactly the size asked
 * for, filled with NaN beforehand so that nothing can lean on what it held. */
#pragma once

#include "base/threads.h"
#include "ops/backend.h"

#define SHIM __attribute__((visibility("default")))

typedef struct shim {
    mil_context context;
    mil_slab workspace;
    mil_thread_state saved;
} shim;

/* Poison the workspace and enter the pool; every call of an op stands between these two. */
mil_status shim_enter(shim *s);
mil_status shim_leave(shim *s, mil_status status);
