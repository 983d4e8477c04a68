#include "loader/progress.h"

#include "base/memory.h"

#include <stdatomic.h>

struct mil_progress {
    atomic_uint_fast64_t done_bytes;
    atomic_uint_fast64_t total_bytes;
    atomic_bool is_cancelled;
};

mil_status mil_progress_create(mil_progress **out)
{
    void *progress;
    MIL_TRY(mil_alloc_checked(&progress, 1, sizeof(mil_progress), "progress"));
    *out = progress;
    return MIL_OK;
}

void mil_progress_free(mil_progress *progress)
{
    mil_free(progress);
}

void mil_progress_read(const mil_progress *progress, uint64_t *done_bytes, uint64_t *total_bytes)
{
    *done_bytes = atomic_load_explicit(&progress->done_bytes, memory_order_relaxed);
    *total_bytes = atomic_load_explicit(&progress->total_bytes, memory_order_relaxed);
}

void mil_progress_cancel(mil_progress *progress)
{
    atomic_store_explicit(&progress->is_cancelled, true, memory_order_relaxed);
}

void mil_progress_set_total(mil_progress *progress, uint64_t n_bytes)
{
    if (progress != NULL)
        atomic_store_explicit(&progress->total_bytes, n_bytes, memory_order_relaxed);
}

void mil_progress_add(mil_progress *progress, uint64_t n_bytes)
{
    if (progress != NULL)
        atomic_fetch_add_explicit(&progress->done_bytes, n_bytes, memory_order_relaxed);
}

bool mil_progress_is_cancelled(const mil_progress *progress)
{
    return progress != NULL && atomic_load_explicit(&progress->is_cancelled, memory_order_relaxed);
}
