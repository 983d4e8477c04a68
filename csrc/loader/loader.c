#include "loader/loader.h"

#include "base/bf16.h"
#include "base/f16.h"
#include "base/threads.h"
#include "loader/progress.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

/* What a thread reads at once: it must still lie in the core's own cache when pack reads it.
 * Smaller windows are packed faster but read slower, and take as long together. */
#define WINDOW_BYTES ((size_t)1 << 20)
/* What it reads where WINDOW_BYTES is less than one panel of rows; also the longest row served. */
#define WINDOW_MAX_BYTES ((size_t)8 << 20)
/* Windows begin at multiples of this, so that no two threads write to one panel of a backend. */
#define ROW_MULTIPLE 32
#define HUGE_PAGE_BYTES ((uintptr_t)2 << 20)
#define PAGE_BYTES 4096
#define LINE_BYTES 64
/* A page more than the longest window, because place_window may move it by a line. */
#define WINDOW_STRIDE (WINDOW_MAX_BYTES + PAGE_BYTES)
#define THREAD_BYTES (WINDOW_STRIDE + WIDE_ITEMS * sizeof(float))
#define FIRST_CAPACITY 64
/* Elements of a vector that are widened at once on their way to a device. */
#define WIDE_ITEMS 16384

/* What was asked for: a part of a weight, or a vector where weight is NULL. */
typedef struct piece {
    mil_weight *weight;
    float *out; /* [slice.n_rows], where weight is NULL */
    int32_t part;
    /* Pieces from this one on whose rows alternate in the packed weight and are read in turn; 1:
     * only this one. */
    int32_t n_together;
    mil_slice slice;
    mil_source_tensor tensor;
    int64_t step; /* rows in one window */
    char *packed; /* where rows go: row i of the piece near packed + i * packed_stride */
    size_t packed_stride;
} piece;

struct mil_loader {
    const mil_source *source;
    const mil_backend *backend;
    struct mil_queue *queue;
    mil_progress *progress;
    mil_pool *pool;
    mil_slab windows; /* THREAD_BYTES for each thread: a window, then room for what is widened */
    bool is_queueing; /* calls wait for mil_loader_finish */
    piece *pieces;    /* [capacity] asked for and not loaded */
    int32_t n_pieces, capacity;
};

static mil_status create_parts(mil_loader *loader, int32_t n_threads)
{
    loader->capacity = FIRST_CAPACITY;
    MIL_TRY(mil_alloc_checked((void **)&loader->pieces, FIRST_CAPACITY, sizeof(piece), "loader"));
    MIL_TRY(loader->backend->device->alloc_host(
        loader->queue, &loader->windows, (size_t)n_threads * THREAD_BYTES, "loader: windows"));
    return mil_pool_create(&loader->pool, n_threads, NULL);
}

mil_status mil_loader_create(mil_loader **out, const mil_source *source, const mil_backend *backend,
                             struct mil_queue *queue, int32_t n_threads, mil_progress *progress)
{
    if (n_threads < 1)
        return mil_fail(MIL_ERR_ARGUMENT, "loader: n_threads is %d, expected at least 1",
                        n_threads);
    void *memory;
    MIL_TRY(mil_alloc_checked(&memory, 1, sizeof(mil_loader), "loader"));
    mil_loader *loader = memory;
    loader->source = source;
    loader->backend = backend;
    loader->queue = queue;
    loader->progress = progress;
    mil_status status = create_parts(loader, n_threads);
    if (status != MIL_OK) {
        mil_loader_free(loader);
        return status;
    }
    *out = loader;
    return MIL_OK;
}

void mil_loader_free(mil_loader *loader)
{
    if (loader == NULL)
        return;
    mil_pool_free(loader->pool);
    loader->backend->device->free_host(loader->queue, &loader->windows);
    mil_free(loader->pieces);
    mil_free(loader);
}

void mil_loader_begin(mil_loader *loader, uint64_t n_bytes)
{
    loader->is_queueing = true;
    mil_progress_set_total(loader->progress, n_bytes);
}

/* ---- one window ---- */

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Rows of row_bytes to read at once; 0: not even one fits. */
static int64_t window_rows(size_t row_bytes)
{
    int64_t n = (int64_t)(WINDOW_BYTES / row_bytes / ROW_MULTIPLE * ROW_MULTIPLE);
    return smaller(n > 0 ? n : ROW_MULTIPLE, (int64_t)(WINDOW_MAX_BYTES / row_bytes));
}

/* Fewer where a tensor is small, so that every thread gets a window of it. */
static int64_t shared_window_rows(const mil_loader *loader, size_t row_bytes, int64_t n_rows)
{
    int64_t n_threads = mil_pool_n_threads(loader->pool);
    int64_t share = (n_rows + n_threads - 1) / n_threads;
    int64_t panels = (share + ROW_MULTIPLE - 1) / ROW_MULTIPLE * ROW_MULTIPLE;
    int64_t most = window_rows(row_bytes);
    return panels > 0 ? smaller(panels, most) : most;
}

static mil_status check_cancelled(const mil_loader *loader)
{
    if (mil_progress_is_cancelled(loader->progress))
        return mil_fail(MIL_ERR_CLOSED, "loader: the load was cancelled");
    return MIL_OK;
}

/* Where in a thread's window the bytes from `offset` of a file go. The kernel copies with rep
 * movsb, which takes up to four times as long where the destination lies 1 to 63 bytes behind the
 * source modulo 4096 (4.3 instead of 15.3 GB/s, Zen 4); headers end where they like. */
static char *place_window(char *window, uint64_t offset)
{
    uint64_t behind = -offset % PAGE_BYTES;
    return behind > 0 && behind < LINE_BYTES ? window + LINE_BYTES : window;
}

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

/* Rows read into `at`, to where they go. */
static mil_status deliver(const mil_loader *loader, const piece *from, char *window, char *at,
                          int64_t row, int64_t n_rows)
{
    const mil_device *device = loader->backend->device;
    const mil_slice *slice = &from->slice;
    mil_dtype dtype = from->tensor.dtype;
    if (from->weight != NULL)
        return loader->backend->pack(
            loader->queue, from->weight, from->part, (int32_t)row, (int32_t)n_rows,
            at + (size_t)slice->col_begin * mil_dtype_bytes(dtype), dtype, slice->full_cols);
    float *wide = device->is_host ? from->out + row : (float *)(window + WINDOW_STRIDE);
    widen(wide, at, dtype, (size_t)n_rows);
    return device->is_host ? MIL_OK
                           : device->copy_in(loader->queue, from->out + row, wide,
                                             (size_t)n_rows * sizeof(float));
}

/* A dummy's rows, made where they go. */
static mil_status make_rows(const mil_loader *loader, const piece *from, int64_t row,
                            int64_t n_rows)
{
    const mil_slice *slice = &from->slice;
    uint64_t first = (uint64_t)(slice->row_begin + row) * (uint64_t)slice->full_cols;
    return loader->backend->pack_dummy(loader->queue, from->weight, from->part, (int32_t)row,
                                       (int32_t)n_rows, from->tensor.stream,
                                       first + (uint64_t)slice->col_begin, slice->full_cols);
}

/* Rows row .. row + n_rows of the piece: read, then packed or widened. */
static mil_status load_rows(const mil_loader *loader, const piece *from, char *window, int64_t row,
                            int64_t n_rows)
{
    const mil_slice *slice = &from->slice;
    int64_t first = slice->row_begin + row;
    char *at = place_window(window, from->tensor.begin + (uint64_t)first * from->tensor.row_bytes);
    bool is_made = from->weight != NULL && from->tensor.index < 0 &&
                   from->tensor.dtype == MIL_DTYPE_BF16 && loader->backend->pack_dummy != NULL;
    MIL_TRY(check_cancelled(loader));
    if (is_made) {
        MIL_TRY(make_rows(loader, from, row, n_rows));
    } else {
        MIL_TRY(mil_source_read_rows(loader->source, &from->tensor, at, first, n_rows));
        MIL_TRY(deliver(loader, from, window, at, row, n_rows));
    }
    mil_progress_add(loader->progress, 2 * (uint64_t)n_rows * (uint64_t)slice->n_cols);
    return MIL_OK;
}

/* ---- the queue ---- */

/* A place in the queue, always at a row that is there or at the end. */
typedef struct place {
    int32_t piece;
    int64_t row;
} place;

typedef struct job {
    mil_loader *loader;
    pthread_mutex_t lock; /* of next, status and message */
    place next;
    mil_status status; /* of the first thread to fail, and its message */
    char message[1024];
} job;

static bool is_end(const job *work, place at)
{
    return at.piece >= work->loader->n_pieces;
}

static place skip_empty(const job *work, place at)
{
    const piece *pieces = work->loader->pieces;
    while (!is_end(work, at) && at.row >= pieces[at.piece].slice.n_rows)
        at = (place){.piece = at.piece + pieces[at.piece].n_together};
    return at;
}

static place after(const job *work, place at)
{
    at.row += work->loader->pieces[at.piece].step;
    return skip_empty(work, at);
}

static char *packed_at(const job *work, place at)
{
    const piece *first = &work->loader->pieces[at.piece];
    return first->packed + (size_t)at.row * first->packed_stride;
}

static uintptr_t huge_page(const job *work, place at)
{
    return (uintptr_t)packed_at(work, at) / HUGE_PAGE_BYTES;
}

/* Take the windows that begin in the huge page where the queue stands. The kernel clears a huge
 * page for whoever writes to it first, and once more for a thread that comes to it meanwhile; and
 * packing is twice as fast into lines that this core has just cleared. */
static bool take_windows(job *work, place *begin, place *end)
{
    pthread_mutex_lock(&work->lock);
    bool is_work = work->status == MIL_OK && !is_end(work, work->next);
    *begin = *end = work->next;
    if (is_work) {
        do
            *end = after(work, *end);
        while (!is_end(work, *end) && huge_page(work, *end) == huge_page(work, *begin));
        work->next = *end;
    }
    pthread_mutex_unlock(&work->lock);
    return is_work;
}

static mil_status load_window(const job *work, char *window, place at)
{
    const piece *first = &work->loader->pieces[at.piece];
    int64_t n_rows = smaller(first->step, first->slice.n_rows - at.row);
    for (int32_t i = 0; i < first->n_together; i++)
        MIL_TRY(load_rows(work->loader, first + i, window, at.row, n_rows));
    return MIL_OK;
}

static mil_status load_taken(const job *work, char *window, place begin, place end)
{
    for (place at = begin; at.piece != end.piece || at.row != end.row; at = after(work, at))
        MIL_TRY(load_window(work, window, at));
    return MIL_OK;
}

static void set_failed(job *work, mil_status status)
{
    pthread_mutex_lock(&work->lock);
    if (work->status == MIL_OK) {
        work->status = status;
        (void)snprintf(work->message, sizeof work->message, "%s", mil_status_message());
    }
    pthread_mutex_unlock(&work->lock);
}

static void load_windows(void *argument, int32_t thread, int32_t n_threads)
{
    (void)n_threads;
    job *work = argument;
    char *window = (char *)work->loader->windows.data + (size_t)thread * THREAD_BYTES;
    place begin, end;
    while (take_windows(work, &begin, &end)) {
        mil_status status = load_taken(work, window, begin, end);
        if (status != MIL_OK)
            set_failed(work, status);
    }
}

static mil_status load_queue(mil_loader *loader)
{
    job work = {.loader = loader, .lock = PTHREAD_MUTEX_INITIALIZER};
    work.next = skip_empty(&work, work.next);
    mil_pool_run(loader->pool, load_windows, &work);
    pthread_mutex_destroy(&work.lock);
    loader->n_pieces = 0;
    return work.status == MIL_OK ? MIL_OK : mil_fail(work.status, "%s", work.message);
}

/* Room for one piece more. */
static mil_status grow(mil_loader *loader)
{
    if (loader->n_pieces < loader->capacity)
        return MIL_OK;
    size_t capacity = (size_t)loader->capacity;
    void *pieces;
    MIL_TRY(mil_alloc_checked(&pieces, 2 * capacity, sizeof(piece), "loader"));
    memcpy(pieces, loader->pieces, capacity * sizeof(piece));
    mil_free(loader->pieces);
    loader->pieces = pieces;
    loader->capacity *= 2;
    return MIL_OK;
}

/* Where the newest piece completes a weight's alternating parts: read them in turn. */
static void join_parts(mil_loader *loader)
{
    const piece *last = &loader->pieces[loader->n_pieces - 1];
    int32_t n_parts = last->weight->n_parts;
    int64_t step = last->step;
    if (n_parts > loader->n_pieces)
        return;
    piece *first = &loader->pieces[loader->n_pieces - n_parts];
    for (int32_t part = 0; part < n_parts; part++) {
        if (first[part].weight != last->weight || first[part].part != part ||
            first[part].slice.n_rows != last->slice.n_rows)
            return;
        step = smaller(step, first[part].step);
    }
    first->n_together = n_parts;
    first->step = step;
}

mil_status mil_loader_finish(mil_loader *loader)
{
    return load_queue(loader);
}

/* Queue the piece, and load it where nobody will call mil_loader_finish. */
static mil_status ask(mil_loader *loader, const piece *asked)
{
    const mil_weight *weight = asked->weight;
    MIL_TRY(check_cancelled(loader));
    MIL_TRY(grow(loader));
    loader->pieces[loader->n_pieces++] = *asked;
    if (weight != NULL && weight->interleave > 0)
        join_parts(loader);
    return loader->is_queueing ? MIL_OK : load_queue(loader);
}

/* ---- weights and vectors ---- */

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
    piece asked = {.weight = weight, .part = part, .n_together = 1, .slice = *slice};
    MIL_TRY(check_slice(weight, part, name, slice));
    MIL_TRY(
        mil_source_find(loader->source, name, slice->full_rows, slice->full_cols, &asked.tensor));
    MIL_TRY(check_row_bytes(name, asked.tensor.row_bytes));
    asked.step = shared_window_rows(loader, asked.tensor.row_bytes, slice->n_rows);
    if (slice->n_rows > 0) {
        size_t row_bytes = loader->backend->packed_bytes(weight->N, weight->K) / (size_t)weight->N;
        int32_t row = mil_weight_row(weight, part, 0);
        asked.packed = (char *)weight->data + (size_t)row * row_bytes;
        asked.packed_stride = row_bytes * (size_t)(weight->interleave > 0 ? weight->n_parts : 1);
    }
    return ask(loader, &asked);
}

mil_status mil_loader_vector(mil_loader *loader, float *out, const char *name, int64_t length,
                             int64_t begin, int64_t n)
{
    piece asked = {.out = out,
                   .n_together = 1,
                   .slice = {length, 1, begin, n, 0, 1},
                   .packed = (char *)out,
                   .packed_stride = sizeof *out};
    MIL_TRY(mil_source_find(loader->source, name, length, 1, &asked.tensor));
    asked.step = smaller(window_rows(asked.tensor.row_bytes), WIDE_ITEMS);
    return ask(loader, &asked);
}
