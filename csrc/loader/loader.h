/* File -> this rank's slice -> packed slab, in one pass: peak memory is one copy plus the windows.
 *
 * A loader reads windows of a MiB on its threads and hands each to the backend's pack while it
 * is still in cache. A device's windows are pinned, one for each thread: while one thread's rows
 * are on their way, others read and convert. It knows slices, not model families. */
#pragma once

#include "loader/adapter.h"
#include "loader/shard.h"
#include "loader/source.h"
#include "ops/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_loader mil_loader;

/* queue: of the device that weights are for. n_threads readers (the caller is one), progress may be
 * NULL. Borrows all. One call at a time. */
mil_status mil_loader_create(mil_loader **out, const mil_source *source, const mil_backend *backend,
                             struct mil_queue *queue, int32_t n_threads, mil_progress *progress)
    MIL_WARN_UNUSED;
void mil_loader_free(mil_loader *loader);

/* From here on calls only queue what they ask for, and mil_loader_finish loads all of it on all
 * threads: no thread idles where a tensor ends. n_bytes: what will be asked for, as progress counts
 * it, 2 for each element of a slice whatever the file holds, so that a total follows from shapes
 * alone. Without this each call loads what it asks for. */
void mil_loader_begin(mil_loader *loader, uint64_t n_bytes);
/* Load what is queued; the first failure among it. */
mil_status mil_loader_finish(mil_loader *loader) MIL_WARN_UNUSED;

/* Load slice of tensor name into part `part` of weight, whose data is zeroed packed_bytes and stays
 * until the load. The slice's rows and columns are the part's. Alternating parts are best asked for
 * one after another: they are then packed while their lines are in cache. MIL_ERR_CLOSED once
 * progress is cancelled. */
mil_status mil_loader_weight(mil_loader *loader, mil_weight *weight, int32_t part, const char *name,
                             const mil_slice *slice) MIL_WARN_UNUSED;
/* Elements begin .. begin + n of a vector of `length`, as float32, to out in the device's memory,
 * which stays likewise. */
mil_status mil_loader_vector(mil_loader *loader, float *out, const char *name, int64_t length,
                             int64_t begin, int64_t n) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
