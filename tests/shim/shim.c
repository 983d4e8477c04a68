#include "shim.h"

#include "base/switch.h"

#include <stdlib.h>
#include <string.h>

#define GUARD_BYTES ((size_t)65536)     /* behind workspace and step_data */
#define LOAN_GUARD_BYTES ((size_t)4096) /* behind a loan */

SHIM const char *shim_message(void);
SHIM const char *shim_isas(void);
SHIM const char *shim_cuda_paths(void);
SHIM void shim_add_library_dir(const char *dir);
SHIM void shim_free(shim *s);
SHIM mil_status shim_create(shim **out, const char *isa, int32_t n_threads,
                            const mil_maxima *maxima);
SHIM mil_status shim_need(shim *s, const mil_maxima *maxima);
SHIM void shim_set_mode(shim *s, bool is_deterministic, bool is_captured);
SHIM int32_t shim_product_dtype(const shim *s);
SHIM int32_t shim_rank_multiple(const shim *s);
SHIM int32_t shim_v_rank(const shim *s);
SHIM bool shim_is_host(const shim *s);

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

/* ---- which backend ---- */

/* A variable's value for a while; NULL: unset. Returns what it was, for the way back. */
static char *exchange_env(const char *name, const char *value)
{
    char *was = getenv(name);
    was = was == NULL ? NULL : strdup(was);
    if (value == NULL)
        unsetenv(name);
    else if (value != getenv(name))
        setenv(name, value, 1);
    return was;
}

static void restore_env(const char *name, char *was)
{
    free(exchange_env(name, was));
    free(was);
}

static bool is_cuda(const char *isa)
{
    return strncmp(isa, "cuda", 4) == 0;
}

/* isa: an instruction set, "cuda" (what MILPY_CUDA_PATH says) or "cuda-portable". */
static mil_status find(shim *s, const char *isa)
{
    mil_context *context = &s->context;
    const char *variable = is_cuda(isa) ? "MILPY_CUDA_PATH" : "MILPY_CPU_ISA";
    const char *value = strcmp(isa, "cuda") == 0 ? getenv(variable) : is_cuda(isa) ? isa + 5 : isa;
    char *was = exchange_env(variable, value);
    mil_status status = mil_backend_find(&context->backend, is_cuda(isa) ? "cuda" : "cpu");
    if (status == MIL_OK)
        status = context->backend->device->open(&context->queue, 0);
    restore_env(variable, was);
    return status;
}

/* csrc/kernels/library.c's, where CUDA is linked in. */
void mil_cuda_add_library_dir(const char *dir) __attribute__((weak));

void shim_add_library_dir(const char *dir)
{
    if (mil_cuda_add_library_dir != NULL)
        mil_cuda_add_library_dir(dir);
}

/* Paths of the GPU that is there, space-separated; "" and a message where there is none. */
const char *shim_cuda_paths(void)
{
    shim s = {0};
    if (find(&s, "cuda") != MIL_OK)
        return "";
    s.context.backend->device->close(s.context.queue);
    const char *forced = getenv("MILPY_CUDA_PATH");
    return forced != NULL && forced[0] != '\0' ? "cuda-portable" : "cuda cuda-portable";
}

/* ---- memory ---- */

static const mil_device *device_of(const shim *s)
{
    return s->context.backend->device;
}

/* Of what is taken: whole 16-bit words and a guard, or the very bytes. */
static size_t guarded(const shim *s, size_t n_bytes, size_t guard_bytes)
{
    return s->is_bare ? n_bytes : mil_round_up(n_bytes, 2) + guard_bytes;
}

static mil_status take(shim *s, mil_slab *slab, size_t n_bytes, const char *what)
{
    if (s->is_bare)
        return shim_bare_take(device_of(s)->is_host, slab, n_bytes, what);
    return device_of(s)->alloc(s->context.queue, slab, n_bytes, what);
}

static void give(shim *s, mil_slab *slab)
{
    if (s->is_bare)
        shim_bare_give(device_of(s)->is_host, slab);
    else
        device_of(s)->free(s->context.queue, slab);
}

/* ---- a context ---- */

void shim_free(shim *s)
{
    if (s == NULL)
        return;
    const mil_backend *backend = s->context.backend;
    mil_pool_free(s->context.pool);
    if (backend != NULL) {
        give(s, &s->workspace);
        give(s, &s->step_data);
        backend->device->close(s->context.queue);
    }
    free(s);
}

static mil_status size(shim *s)
{
    mil_context *context = &s->context;
    give(s, &s->workspace);
    give(s, &s->step_data);
    context->workspace_bytes = context->backend->workspace_bytes(&s->maxima);
    context->step_bytes = context->backend->step_bytes(&s->maxima);
    MIL_TRY(take(s, &s->workspace, guarded(s, context->workspace_bytes, GUARD_BYTES), "workspace"));
    MIL_TRY(take(s, &s->step_data, guarded(s, context->step_bytes, GUARD_BYTES), "step data"));
    context->workspace = s->workspace.data;
    context->step_data = s->step_data.data;
    return MIL_OK;
}

mil_status shim_create(shim **out, const char *isa, int32_t n_threads, const mil_maxima *maxima)
{
    mil_status status = MIL_ERR_MEMORY;
    shim *s = calloc(1, sizeof *s);
    if (s == NULL)
        return mil_fail(MIL_ERR_MEMORY, "shim: no memory");
    s->maxima = *maxima;
    s->maxima.n_threads = n_threads;
    MIL_TRY_GOTO(mil_switch_read(&s->is_bare, "MILPY_SHIM_BARE", false), failed);
    MIL_TRY_GOTO(find(s, isa), failed);
    if (s->context.backend->device->is_host)
        MIL_TRY_GOTO(mil_pool_create(&s->context.pool, n_threads, NULL), failed);
    MIL_TRY_GOTO(size(s), failed);
    *out = s;
    return MIL_OK;
failed:
    shim_free(s);
    return status;
}

/* Make room for these sizes as well, where the backend is not the host's: tests of the CPU say all
 * sizes themselves. */
mil_status shim_need(shim *s, const mil_maxima *maxima)
{
    const int32_t *wanted = (const int32_t *)maxima;
    int32_t *has = (int32_t *)&s->maxima;
    bool is_larger = false;
    if (s->context.backend->device->is_host)
        return MIL_OK;
    for (size_t i = 0; i < sizeof *maxima / sizeof *has; i++) {
        is_larger |= wanted[i] > has[i];
        has[i] = wanted[i] > has[i] ? wanted[i] : has[i];
    }
    return is_larger ? size(s) : MIL_OK;
}

void shim_set_mode(shim *s, bool is_deterministic, bool is_captured)
{
    s->context.is_deterministic = is_deterministic;
    s->is_captured = is_captured;
}

int32_t shim_product_dtype(const shim *s)
{
    return (int32_t)s->context.backend->product_dtype;
}

int32_t shim_rank_multiple(const shim *s)
{
    return s->context.backend->lora_rank_multiple;
}

int32_t shim_v_rank(const shim *s)
{
    return s->context.backend->lora_v_rank;
}

bool shim_is_host(const shim *s)
{
    return s->context.backend->device->is_host;
}

size_t shim_product_bytes(const shim *s)
{
    return mil_dtype_bytes(s->context.backend->product_dtype);
}

/* ---- loans ---- */

/* One row of the host at `first` of the device; a row alone when they lie close. */
static mil_status copy_rows(shim *s, const shim_loan *loan, bool is_in)
{
    const shim_shape *shape = &loan->shape;
    bool is_dense = shape->stride_bytes == shape->row_bytes;
    size_t n = is_dense ? 1 : shape->n_rows;
    size_t n_bytes = is_dense ? shape->n_rows * shape->row_bytes : shape->row_bytes;
    for (size_t i = 0; i < n && n_bytes > 0; i++) {
        char *host = (char *)loan->host + i * shape->row_bytes;
        char *device = (char *)loan->slab.data + shape->first_bytes + i * shape->stride_bytes;
        MIL_TRY(is_in ? device_of(s)->copy_in(s->context.queue, device, host, n_bytes)
                      : device_of(s)->copy_out(s->context.queue, host, device, n_bytes));
    }
    return MIL_OK;
}

static mil_status start_loan(shim *s, shim_loan *loan)
{
    const mil_device *device = device_of(s);
    const shim_shape *shape = &loan->shape;
    size_t n_bytes = guarded(s, shape->n_bytes, LOAN_GUARD_BYTES);
    bool is_padded = shape->n_bytes > shape->n_rows * shape->row_bytes;
    MIL_TRY(take(s, &loan->slab, n_bytes, "a test's array"));
    /* Padding of what comes in is never bare: an op may read it. */
    if (!s->is_bare || (is_padded && loan->how & SHIM_IN))
        MIL_TRY(device->fill_16(s->context.queue, loan->slab.data, 0xffff, n_bytes / 2));
    MIL_TRY(device->synchronize(s->context.queue)); /* copies wait for no op */
    return loan->how & SHIM_IN ? copy_rows(s, loan, true) : MIL_OK;
}

void *shim_lend_shaped(shim *s, const void *host, shim_shape shape, int32_t how)
{
    bool is_same = shape.first_bytes == 0 && shape.n_bytes == shape.n_rows * shape.row_bytes;
    if (s->status != MIL_OK)
        return NULL;
    if (host == NULL && how != 0)
        return NULL;
    if (device_of(s)->is_host && !s->is_bare && is_same && host != NULL)
        return (void *)(uintptr_t)host;
    if (s->n_loans == SHIM_MAX_LOANS) {
        s->status = mil_fail(MIL_ERR_INTERNAL, "shim: more than %d arrays", SHIM_MAX_LOANS);
        return NULL;
    }
    shim_loan *loan = &s->loans[s->n_loans++];
    *loan = (shim_loan){.host = (void *)(uintptr_t)host, .shape = shape, .how = how};
    s->status = start_loan(s, loan);
    return loan->slab.data;
}

void *shim_lend(shim *s, const void *host, size_t n_bytes, int32_t how)
{
    shim_shape shape = {
        .n_rows = 1, .row_bytes = n_bytes, .stride_bytes = n_bytes, .n_bytes = n_bytes};
    return shim_lend_shaped(s, host, shape, how);
}

void *shim_lend_rows(shim *s, const void *host, int64_t n, int64_t n_on_device, size_t row_bytes,
                     int32_t how)
{
    shim_shape shape = {.n_rows = (size_t)n,
                        .row_bytes = row_bytes,
                        .stride_bytes = row_bytes,
                        .n_bytes = (size_t)n_on_device * row_bytes};
    return shim_lend_shaped(s, host, shape, how);
}

void *shim_take(shim *s, size_t n_bytes)
{
    return shim_lend(s, NULL, n_bytes, 0);
}

void *shim_take_pinned(shim *s, size_t n_bytes)
{
    if (s->status != MIL_OK)
        return NULL;
    mil_slab *slab = &s->pinned[s->n_pinned++];
    s->status = device_of(s)->is_host /* where all memory is of one kind */
                    ? take(s, slab, n_bytes, "a test's plan")
                    : device_of(s)->alloc_host(s->context.queue, slab, n_bytes, "a test's plan");
    return slab->data;
}

static mil_status check_guard(shim *s, const void *end, size_t n_bytes, const char *what,
                              int32_t index)
{
    unsigned char guard[GUARD_BYTES];
    MIL_TRY(device_of(s)->copy_out(s->context.queue, guard, end, n_bytes));
    for (size_t i = 0; i < n_bytes; i++)
        if (guard[i] != 0xff)
            return mil_fail(MIL_ERR_INTERNAL, "shim: an op wrote past its %s %d, %zu bytes on",
                            what, index, i);
    return MIL_OK;
}

/* Guards and results; the copies back only when the op ran. */
static mil_status end_loans(shim *s)
{
    const mil_context *context = &s->context;
    for (int32_t i = 0; i < s->n_loans; i++) {
        const shim_loan *loan = &s->loans[i];
        const char *end = (char *)loan->slab.data + mil_round_up(loan->shape.n_bytes, 2);
        if (!s->is_bare)
            MIL_TRY(check_guard(s, end, LOAN_GUARD_BYTES, "array", i));
        if (loan->how & SHIM_BACK)
            MIL_TRY(copy_rows(s, loan, false));
    }
    if (s->is_bare)
        return MIL_OK;
    MIL_TRY(check_guard(s, (char *)context->workspace + context->workspace_bytes, GUARD_BYTES,
                        "workspace", 0));
    return check_guard(s, (char *)context->step_data + context->step_bytes, GUARD_BYTES,
                       "step data", 0);
}

static void take_back(shim *s)
{
    for (int32_t i = 0; i < s->n_loans; i++)
        give(s, &s->loans[i].slab);
    for (int32_t i = 0; i < s->n_pinned; i++)
        if (device_of(s)->is_host)
            give(s, &s->pinned[i]);
        else
            device_of(s)->free_host(s->context.queue, &s->pinned[i]);
    s->n_loans = s->n_pinned = 0;
    s->status = MIL_OK;
}

/* ---- around an op ---- */

static mil_status poison(shim *s)
{
    const mil_context *context = &s->context;
    size_t n = (context->workspace_bytes + GUARD_BYTES) / 2;
    MIL_TRY(device_of(s)->fill_16(context->queue, context->workspace, 0xffff, n));
    n = (context->step_bytes + GUARD_BYTES) / 2;
    return device_of(s)->fill_16(context->queue, context->step_data, 0xffff, n);
}

mil_status shim_enter(shim *s)
{
    mil_status status = s->status;
    if (status == MIL_OK)
        status = s->is_bare ? size(s) : poison(s);
    if (status == MIL_OK && s->context.pool != NULL)
        status = mil_pool_enter(s->context.pool, &s->saved);
    if (status == MIL_OK && s->is_captured)
        status = device_of(s)->capture_begin(s->context.queue);
    if (status != MIL_OK)
        take_back(s);
    return status;
}

static mil_status replay(shim *s, mil_status status)
{
    struct mil_graph *graph = NULL;
    mil_status ended = device_of(s)->capture_end(s->context.queue, &graph);
    if (status == MIL_OK)
        status = ended;
    if (status == MIL_OK)
        status = device_of(s)->graph_launch(s->context.queue, graph);
    mil_status waited = device_of(s)->synchronize(s->context.queue);
    device_of(s)->graph_free(s->context.queue, graph);
    return status != MIL_OK ? status : waited;
}

mil_status shim_leave(shim *s, mil_status status)
{
    if (s->is_captured)
        status = replay(s, status);
    else if (status == MIL_OK)
        status = device_of(s)->synchronize(s->context.queue);
    if (s->context.pool != NULL)
        mil_pool_leave(s->context.pool, &s->saved);
    if (status == MIL_OK)
        status = end_loans(s);
    take_back(s);
    return status;
}
