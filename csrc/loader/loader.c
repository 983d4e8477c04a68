#include "loader/loader.h"

#include "base/bf16.h"
#include "base/f16.h"
#include "base/threads.h"
#include "loader/progress.h"

#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

/* What a thread reads at once: it must still lie in the core's own cache when pack reads it. */
#define WINDOW_BYTES ((size_t)1 << 20)
/* What it reads where WINDOW_BYTES is less than one panel of rows; also the longest row served. */
#define WINDOW_MAX_BYTES ((size_t)8 << 20)
/* Windows begin at multiples of this, so that no two threads write to one panel of a backend. */
#define ROW_MULTIPLE 32

struct mil_loader {
    const mil_source *source;
    const mil_backend *backend;
    mil_progress *progress;
    mil_pool *pool;
    mil_slab
        windows; /* WINDOW_MAX_BYTES for each thread; pages are touched only where rows are long */
};

mil_status mil_loader_create(mil_loader **out, const mil_source *source, const mil_backend *backend,
                             int32_t n_threads, mil_progress *progress)
{
    if (n_threads < 1)
        return mil_fail(MIL_ERR_ARGUMENT, "loader: n_threads is %d, expected at least 1",
                        n_threads);
    mil_status status;
    void *memory;
    MIL_TRY(mil_alloc_checked(&memory, 1, sizeof(mil_loader), "loader"));
    mil_loader *loader = memory;
    loader->source = source;
    loader->backend = backend;
    loader->progress = progress;
    MIL_TRY_GOTO(
        mil_slab_init(&loader->windows, (size_t)n_threads * WINDOW_MAX_BYTES, "loader: windows"),
        failed);
    MIL_TRY_GOTO(mil_pool_create(&loader->pool, n_threads, NULL), failed);
    *out = loader;
    return MIL_OK;

failed:
    mil_loader_free(loader);
    return status;
}

void mil_loader_free(mil_loader *loader)
{
    if (loader == NULL)
        return;
    mil_pool_free(loader->pool);
    mil_slab_deinit(&loader->windows);
    mil_free(loader);
}

void mil_loader_set_total(mil_loader *loader, uint64_t n_bytes)
{
    mil_progress_set_total(loader->progress, n_bytes);
}

/* ---- windows ---- */

/* Rows of row_bytes to read at once; 0: not even one fits. */
static int64_t window_rows(size_t row_bytes)
{
    size_t n = WINDOW_BYTES / row_bytes / ROW_MULTIPLE * ROW_MULTIPLE;
    if (n == 0)
        n = ROW_MULTIPLE;
    if (n > WINDOW_MAX_BYTES / row_bytes)
        n = WINDOW_MAX_BYTES / row_bytes;
    return (int64_t)n;
}

/* Fewer where a tensor is small, so that every thread gets a window of it. */
static int64_t shared_window_rows(const mil_loader *loader, size_t row_bytes, int64_t n_rows)
{
    int64_t n_threads = mil_pool_n_threads(loader->pool);
    int64_t share = (n_rows + n_threads - 1) / n_threads;
    int64_t panels = (share + ROW_MULTIPLE - 1) / ROW_MULTIPLE * ROW_MULTIPLE;
    int64_t most = window_rows(row_bytes);
    return panels > 0 && panels < most ? panels : most;
}

static mil_status check_cancelled(const mil_loader *loader)
{
    if (mil_progress_is_cancelled(loader->progress))
        return mil_fail(MIL_ERR_CLOSED, "loader: the load was cancelled");
    return MIL_OK;
}

/* ---- weights ---- */

typedef struct job {
    mil_loader *loader;
    mil_weight *weight;
    int32_t part;
    const mil_slice *slice;
    mil_source_tensor tensor;
    int64_t rows_per_window;
    atomic_int_fast64_t next_row; /* of the slice */
    atomic_int status;            /* the first thread to fail sets it, and then owns message */
    char message[1024];
} job;

static mil_status load_window(const job *work, char *window, int64_t row, int64_t n_rows)
{
    const mil_loader *loader = work->loader;
    const mil_slice *slice = work->slice;
    MIL_TRY(check_cancelled(loader));
    MIL_TRY(mil_source_read_rows(loader->source, &work->tensor, window, slice->row_begin + row,
                                 n_rows));
    const char *src = window + (size_t)slice->col_begin * mil_dtype_bytes(work->tensor.dtype);
    loader->backend->pack(work->weight, work->part, (int32_t)row, (int32_t)n_rows, src,
                          work->tensor.dtype, slice->full_cols);
    mil_progress_add(loader->progress, 2 * (uint64_t)n_rows * (uint64_t)slice->n_cols);
    return MIL_OK;
}

static void load_windows(void *argument, int32_t thread, int32_t n_threads)
{
    (void)n_threads;
    job *work = argument;
    char *window = (char *)work->loader->windows.data + (size_t)thread * WINDOW_MAX_BYTES;
    int64_t total = work->slice->n_rows, step = work->rows_per_window;
    for (;;) {
        int64_t row = atomic_fetch_add_explicit(&work->next_row, step, memory_order_relaxed);
        if (row >= total || atomic_load_explicit(&work->status, memory_order_relaxed) != MIL_OK)
            return;
        mil_status status = load_window(work, window, row, total - row < step ? total - row : step);
        int none = MIL_OK;
        if (status != MIL_OK && atomic_compare_exchange_strong(&work->status, &none, (int)status))
            (void)snprintf(work->message, sizeof work->message, "%s", mil_status_message());
    }
}

static mil_status check_slice(const mil_weight *weight, int32_t part, const char *name,
                              const mil_slice *slice)
{
    bool is_inside = slice->row_begin >= 0 && slice->n_rows >= 0 && slice->col_begin >= 0 &&
                     slice->n_cols >= 0 && slice->n_rows <= slice->full_rows - slice->row_begin &&
                     slice->n_cols <= slice->full_cols - slice->col_begin;
    if (!is_inside || part < 0 || part >= weight->n_parts ||
        slice->n_rows != weight->part_rows[part] || slice->n_cols != weight->K)
        return mil_fail(MIL_ERR_INTERNAL,
                        "loader: the slice [%" PRId64 " + %" PRId64 ", %" PRId64 " + %" PRId64
                        "] of '%s' is not part %d of its weight",
                        slice->row_begin, slice->n_rows, slice->col_begin, slice->n_cols, name,
                        part);
    return MIL_OK;
}

static mil_status check_row_bytes(const char *name, size_t row_bytes)
{
    if (row_bytes > WINDOW_MAX_BYTES)
        return mil_fail(MIL_ERR_UNSUPPORTED,
                        "loader: a row of '%s' has %zu bytes, expected at most %zu", name,
                        row_bytes, WINDOW_MAX_BYTES);
    return MIL_OK;
}

mil_status mil_loader_weight(mil_loader *loader, mil_weight *weight, int32_t part, const char *name,
                             const mil_slice *slice)
{
    MIL_TRY(check_slice(weight, part, name, slice));
    job work = {.loader = loader, .weight = weight, .part = part, .slice = slice};
    MIL_TRY(
        mil_source_find(loader->source, name, slice->full_rows, slice->full_cols, &work.tensor));
    MIL_TRY(check_row_bytes(name, work.tensor.row_bytes));
    work.rows_per_window = shared_window_rows(loader, work.tensor.row_bytes, slice->n_rows);
    if (slice->n_rows > work.rows_per_window)
        mil_pool_run(loader->pool, load_windows, &work);
    else
        load_windows(&work, 0, 1);
    mil_status status = (mil_status)atomic_load(&work.status);
    return status == MIL_OK ? MIL_OK : mil_fail(status, "%s", work.message);
}

/* ---- vectors ---- */

static void widen(float *out, const void *in, mil_dtype dtype, size_t n)
{
    if (dtype == MIL_DTYPE_F32) {
        memcpy(out, in, n * sizeof *out);
        return;
    }
    const uint16_t *halves = in;
    for (size_t i = 0; i < n; i++)
        out[i] =
            dtype == MIL_DTYPE_BF16 ? mil_bf16_to_float(halves[i]) : mil_f16_to_float(halves[i]);
}

mil_status mil_loader_vector(mil_loader *loader, float *out, const char *name, int64_t length,
                             int64_t begin, int64_t n)
{
    mil_source_tensor tensor;
    MIL_TRY(mil_source_find(loader->source, name, length, 1, &tensor));
    int64_t step = window_rows(tensor.row_bytes);
    for (int64_t done = 0; done < n; done += step) {
        int64_t count = n - done < step ? n - done : step;
        MIL_TRY(check_cancelled(loader));
        MIL_TRY(mil_source_read_rows(loader->source, &tensor, loader->windows.data, begin + done,
                                     count));
        widen(out + done, loader->windows.data, tensor.dtype, (size_t)count);
        mil_progress_add(loader->progress, 2 * (uint64_t)count);
    }
    return MIL_OK;
}
