#include "shim.h"

#include <stdlib.h>
#include <string.h>

#define GUARD_BYTES ((size_t)65536)

SHIM const char *shim_message(void);
SHIM const char *shim_isas(void);
SHIM void shim_free(shim *s);
SHIM mil_status shim_create(shim **out, const char *isa, int32_t n_threads,
                            const mil_maxima *maxima);

const char *shim_message(void)
{
    return mil_status_message();
}

/* All that this machine has, space-separated. */
const char *shim_isas(void)
{
    const char *in_use = "", *available = "";
    return mil_cpu_isa(&in_use, &available) == MIL_OK ? available : "";
}

static const mil_backend *find(const char *isa)
{
    char *was = getenv("MILPY_CPU_ISA");
    was = was == NULL ? NULL : strdup(was);
    setenv("MILPY_CPU_ISA", isa, 1);
    const mil_backend *backend = mil_backend_find("cpu");
    if (was == NULL)
        unsetenv("MILPY_CPU_ISA");
    else
        setenv("MILPY_CPU_ISA", was, 1);
    free(was);
    return backend;
}

void shim_free(shim *s)
{
    if (s == NULL)
        return;
    mil_pool_free(s->context.pool);
    mil_slab_deinit(&s->workspace);
    free(s);
}

mil_status shim_create(shim **out, const char *isa, int32_t n_threads, const mil_maxima *maxima)
{
    mil_status status = MIL_ERR_ARGUMENT;
    mil_maxima sized = *maxima;
    sized.n_threads = n_threads;
    shim *s = calloc(1, sizeof *s);
    if (s == NULL)
        return mil_fail(MIL_ERR_MEMORY, "shim: no memory");
    s->context.backend = find(isa);
    if (s->context.backend == NULL)
        goto failed;
    MIL_TRY_GOTO(mil_pool_create(&s->context.pool, n_threads, NULL), failed);
    s->context.workspace_bytes = s->context.backend->workspace_bytes(&sized);
    MIL_TRY_GOTO(
        mil_slab_init(&s->workspace, s->context.workspace_bytes + GUARD_BYTES, "workspace"),
        failed);
    s->context.workspace = s->workspace.data;
    *out = s;
    return MIL_OK;
failed:
    shim_free(s);
    return status;
}

mil_status shim_enter(shim *s)
{
    memset(s->context.workspace, 0xff, s->context.workspace_bytes + GUARD_BYTES);
    return mil_pool_enter(s->context.pool, &s->saved);
}

mil_status shim_leave(shim *s, mil_status status)
{
    mil_pool_leave(s->context.pool, &s->saved);
    const unsigned char *guard = (const unsigned char *)s->context.workspace;
    guard += s->context.workspace_bytes;
    for (size_t i = 0; i < GUARD_BYTES; i++)
        if (guard[i] != 0xff)
            return mil_fail(MIL_ERR_INTERNAL, "shim: an op wrote past its workspace of %zu bytes",
                            s->context.workspace_bytes);
    return status;
}
