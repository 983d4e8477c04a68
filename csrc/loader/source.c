#include "loader/source.h"

#include "base/bf16.h"
#include "base/file.h"
#include "base/hash.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_DIM ((int64_t)1 << 40)
#define MAX_NAME_BYTES ((size_t)512)

typedef struct entry {
    const char *name; /* in mil_source.text */
    mil_dtype dtype;
    int32_t rank;
    int64_t shape[2];
    int32_t file;
    uint64_t begin;
} entry;

struct mil_source {
    bool is_dummy;
    uint64_t dummy_seed;
    mil_file *files; /* [n_files] */
    int32_t n_files;
    entry *entries; /* [n_entries], ascending by name */
    int32_t n_entries;
    char *text; /* every path and name, so that the caller's may go */
};

/* ---- check what the header reader said ---- */

static void format_shape(char *out, size_t n_bytes, int32_t rank, const int64_t *shape)
{
    if (rank == 1)
        (void)snprintf(out, n_bytes, "[%" PRId64 "]", shape[0]);
    else
        (void)snprintf(out, n_bytes, "[%" PRId64 ", %" PRId64 "]", shape[0], shape[1]);
}

static bool is_dtype(mil_dtype dtype)
{
    return dtype == MIL_DTYPE_F32 || dtype == MIL_DTYPE_BF16 || dtype == MIL_DTYPE_F16 ||
           dtype == MIL_DTYPE_I32;
}

static mil_status check_shape(const mil_tensor_info *tensor, size_t *n_bytes)
{
    if (tensor->rank < 1 || tensor->rank > 2)
        return mil_fail(MIL_ERR_SHAPE, "checkpoint: tensor '%s' has rank %d, expected 1 or 2",
                        tensor->name, tensor->rank);
    int64_t rows = tensor->shape[0], cols = tensor->shape[1];
    if (rows < 1 || rows > MAX_DIM || cols < 1 || cols > MAX_DIM ||
        (tensor->rank == 1 && cols != 1))
        return mil_fail(MIL_ERR_SHAPE,
                        "checkpoint: tensor '%s' of rank %d has shape [%" PRId64 ", %" PRId64
                        "], expected 1..2^40 each (rank 1: second 1)",
                        tensor->name, tensor->rank, rows, cols);
    size_t n_elements;
    if (!mil_mul((size_t)rows, (size_t)cols, &n_elements) ||
        !mil_mul(n_elements, mil_dtype_bytes(tensor->dtype), n_bytes))
        return mil_fail(MIL_ERR_SHAPE,
                        "checkpoint: tensor '%s' has shape [%" PRId64 ", %" PRId64
                        "], whose bytes overflow 64 bits",
                        tensor->name, rows, cols);
    return MIL_OK;
}

static mil_status check_range(const mil_checkpoint_info *info, const mil_tensor_info *tensor,
                              size_t n_bytes)
{
    if (tensor->file < 0 || tensor->file >= info->n_files)
        return mil_fail(MIL_ERR_FILE, "checkpoint: tensor '%s' is in file %d, expected 0..%d",
                        tensor->name, tensor->file, info->n_files - 1);
    const mil_file_info *file = &info->files[tensor->file];
    if (tensor->begin > tensor->end || tensor->end > file->n_bytes)
        return mil_fail(MIL_ERR_FILE,
                        "%s: tensor '%s' has bytes %" PRIu64 "..%" PRIu64
                        ", expected a range within the file's %" PRIu64,
                        file->path, tensor->name, tensor->begin, tensor->end, file->n_bytes);
    if (tensor->end - tensor->begin != n_bytes) {
        char shape[64];
        format_shape(shape, sizeof shape, tensor->rank, tensor->shape);
        return mil_fail(MIL_ERR_FILE,
                        "%s: tensor '%s' has %" PRIu64 " bytes, expected %zu for %s of %s",
                        file->path, tensor->name, tensor->end - tensor->begin, n_bytes, shape,
                        mil_dtype_name(tensor->dtype));
    }
    return MIL_OK;
}

static mil_status check_tensor(const mil_checkpoint_info *info, int32_t index)
{
    const mil_tensor_info *tensor = &info->tensors[index];
    size_t length = tensor->name != NULL ? strnlen(tensor->name, MAX_NAME_BYTES + 1) : 0;
    if (length < 1 || length > MAX_NAME_BYTES)
        return mil_fail(MIL_ERR_FILE,
                        "checkpoint: tensor %d has a name of %zu bytes or more, expected 1..%zu",
                        index, length, MAX_NAME_BYTES);
    if (!is_dtype(tensor->dtype))
        return mil_fail(MIL_ERR_SHAPE,
                        "checkpoint: tensor '%s' has dtype %d, expected one of mil_dtype",
                        tensor->name, (int)tensor->dtype);
    size_t n_bytes;
    MIL_TRY(check_shape(tensor, &n_bytes));
    return check_range(info, tensor, n_bytes);
}

static mil_status check_info(const mil_checkpoint_info *info)
{
    if (info->n_files < 0 || info->n_tensors < 0)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "checkpoint: found %d files and %d tensors, expected none or more",
                        info->n_files, info->n_tensors);
    for (int32_t i = 0; i < info->n_files; i++)
        if (info->files[i].path == NULL)
            return mil_fail(MIL_ERR_ARGUMENT, "checkpoint: file %d has no path, expected one", i);
    for (int32_t i = 0; i < info->n_tensors; i++)
        MIL_TRY(check_tensor(info, i));
    return MIL_OK;
}

/* ---- open ---- */

static mil_status copy_text(mil_source *source, const mil_checkpoint_info *info)
{
    /* Sums of lengths of strings that are all in memory at once: they cannot overflow. */
    size_t n_bytes = 0;
    for (int32_t i = 0; i < info->n_files; i++)
        n_bytes += strlen(info->files[i].path) + 1;
    for (int32_t i = 0; i < info->n_tensors; i++)
        n_bytes += strlen(info->tensors[i].name) + 1;
    void *text;
    MIL_TRY(mil_alloc_checked(&text, n_bytes, 1, "checkpoint: names"));
    source->text = text;
    return MIL_OK;
}

/* Append to the text and return where. */
static const char *keep(char **end, const char *string)
{
    size_t n_bytes = strlen(string) + 1;
    char *kept = memcpy(*end, string, n_bytes);
    *end += n_bytes;
    return kept;
}

static mil_status open_files(mil_source *source, const mil_checkpoint_info *info, char **end)
{
    void *files;
    MIL_TRY(
        mil_alloc_checked(&files, (size_t)info->n_files, sizeof(mil_file), "checkpoint: files"));
    source->files = files;
    source->n_files = info->n_files;
    for (int32_t i = 0; i < info->n_files; i++)
        MIL_TRY(mil_file_open(&source->files[i], keep(end, info->files[i].path),
                              info->files[i].n_bytes));
    return MIL_OK;
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(((const entry *)a)->name, ((const entry *)b)->name);
}

static mil_status index_tensors(mil_source *source, const mil_checkpoint_info *info, char **end)
{
    void *entries;
    MIL_TRY(
        mil_alloc_checked(&entries, (size_t)info->n_tensors, sizeof(entry), "checkpoint: tensors"));
    source->entries = entries;
    source->n_entries = info->n_tensors;
    for (int32_t i = 0; i < info->n_tensors; i++) {
        const mil_tensor_info *tensor = &info->tensors[i];
        source->entries[i] = (entry){.name = keep(end, tensor->name),
                                     .dtype = tensor->dtype,
                                     .rank = tensor->rank,
                                     .shape = {tensor->shape[0], tensor->shape[1]},
                                     .file = tensor->file,
                                     .begin = tensor->begin};
    }
    qsort(source->entries, (size_t)source->n_entries, sizeof(entry), compare_names);
    for (int32_t i = 1; i < source->n_entries; i++)
        if (strcmp(source->entries[i - 1].name, source->entries[i].name) == 0)
            return mil_fail(MIL_ERR_FILE, "checkpoint: tensor '%s' is there twice, expected once",
                            source->entries[i].name);
    return MIL_OK;
}

static mil_status open_checkpoint(mil_source *source, const mil_checkpoint_info *info)
{
    MIL_TRY(check_info(info));
    MIL_TRY(copy_text(source, info));
    char *end = source->text;
    MIL_TRY(open_files(source, info, &end));
    return index_tensors(source, info, &end);
}

mil_status mil_source_open(mil_source **out, const mil_checkpoint_info *info)
{
    void *memory;
    MIL_TRY(mil_alloc_checked(&memory, 1, sizeof(mil_source), "checkpoint"));
    mil_source *source = memory;
    source->is_dummy = info->is_dummy;
    source->dummy_seed = info->dummy_seed;
    mil_status status = info->is_dummy ? MIL_OK : open_checkpoint(source, info);
    if (status != MIL_OK) {
        mil_source_close(source);
        return status;
    }
    *out = source;
    return MIL_OK;
}

void mil_source_close(mil_source *source)
{
    if (source == NULL)
        return;
    for (int32_t i = 0; i < source->n_files; i++)
        mil_file_close(&source->files[i]);
    mil_free(source->files);
    mil_free(source->entries);
    mil_free(source->text);
    mil_free(source);
}

/* ---- dummy weights ---- */

static bool ends_with(const char *name, const char *end)
{
    size_t n = strlen(name), n_end = strlen(end);
    return n >= n_end && memcmp(name + n - n_end, end, n_end) == 0;
}

static bool is_dummy_norm(const char *name)
{
    return ends_with(name, "norm.weight");
}

static uint64_t fnv1a(const char *name)
{
    uint64_t hash = 0xcbf29ce484222325u;
    for (; *name != '\0'; name++)
        hash = (hash ^ (uint8_t)*name) * 0x100000001b3u;
    return hash;
}

/* mil_counter_hash with the part that all elements of a tensor share taken out of the loop. */
static int32_t dummy_integer(uint64_t stream, uint64_t index)
{
    return 2 * (int32_t)(mil_mix64(stream ^ index) >> 48) - 65535;
}

static void fill_bf16(uint16_t *out, uint64_t stream, uint64_t begin, size_t n)
{
    for (size_t i = 0; i < n; i++)
        out[i] = mil_bf16_from_float((float)dummy_integer(stream, begin + i) * 0x1p-21f);
}

static void fill_biases(float *out, uint64_t stream, uint64_t begin, size_t n)
{
    for (size_t i = 0; i < n; i++)
        out[i] = (float)dummy_integer(stream, begin + i) * 0x1p-24f;
}

static void fill_ones(float *out, size_t n)
{
    for (size_t i = 0; i < n; i++)
        out[i] = 1.0f;
}

static void fill_dummy(const mil_source_tensor *tensor, void *out, int64_t row, int64_t n_rows)
{
    uint64_t begin = (uint64_t)row * (uint64_t)tensor->cols;
    size_t n = (size_t)n_rows * (size_t)tensor->cols;
    if (tensor->dtype == MIL_DTYPE_BF16)
        fill_bf16(out, tensor->stream, begin, n);
    else if (tensor->is_ones)
        fill_ones(out, n);
    else
        fill_biases(out, tensor->stream, begin, n);
}

static mil_status find_dummy(const mil_source *source, const char *name, int64_t rows, int64_t cols,
                             mil_source_tensor *out)
{
    bool is_ones = is_dummy_norm(name);
    mil_tensor_info tensor = {.name = name,
                              .dtype = is_ones || ends_with(name, ".bias") ? MIL_DTYPE_F32
                                                                           : MIL_DTYPE_BF16,
                              .rank = 2,
                              .shape = {rows, cols}};
    size_t n_bytes;
    MIL_TRY(check_shape(&tensor, &n_bytes));
    *out = (mil_source_tensor){.dtype = tensor.dtype,
                               .rows = rows,
                               .cols = cols,
                               .row_bytes = (size_t)cols * mil_dtype_bytes(tensor.dtype),
                               .index = -1,
                               .is_ones = is_ones,
                               .stream = mil_mix64(mil_mix64(source->dummy_seed) ^ fnv1a(name))};
    return MIL_OK;
}

/* ---- find and read ---- */

mil_status mil_source_find(const mil_source *source, const char *name, int64_t rows, int64_t cols,
                           mil_source_tensor *out)
{
    if (source->is_dummy)
        return find_dummy(source, name, rows, cols, out);
    entry key = {.name = name};
    const entry *found =
        bsearch(&key, source->entries, (size_t)source->n_entries, sizeof(entry), compare_names);
    char expected[64];
    format_shape(expected, sizeof expected, cols == 1 ? 1 : 2, (int64_t[]){rows, cols});
    if (found == NULL)
        return mil_fail(MIL_ERR_FILE,
                        "checkpoint: found no tensor '%s' among %d, expected one of shape %s", name,
                        source->n_entries, expected);
    const char *path = source->files[found->file].path;
    if (found->shape[0] != rows || found->shape[1] != cols) {
        char shape[64];
        format_shape(shape, sizeof shape, found->rank, found->shape);
        return mil_fail(MIL_ERR_SHAPE, "%s: tensor '%s' has shape %s, expected %s", path, name,
                        shape, expected);
    }
    if (found->dtype == MIL_DTYPE_I32)
        return mil_fail(MIL_ERR_SHAPE,
                        "%s: tensor '%s' has dtype %s, expected float32, bfloat16 or float16", path,
                        name, mil_dtype_name(found->dtype));
    *out = (mil_source_tensor){.dtype = found->dtype,
                               .rows = rows,
                               .cols = cols,
                               .row_bytes = (size_t)cols * mil_dtype_bytes(found->dtype),
                               .begin = found->begin,
                               .index = (int32_t)(found - source->entries)};
    return MIL_OK;
}

mil_status mil_source_read_rows(const mil_source *source, const mil_source_tensor *tensor,
                                void *out, int64_t row, int64_t n_rows)
{
    if (row < 0 || n_rows < 0 || row > tensor->rows || n_rows > tensor->rows - row)
        return mil_fail(MIL_ERR_INTERNAL,
                        "checkpoint: rows %" PRId64 " + %" PRId64
                        " are asked of a tensor of %" PRId64,
                        row, n_rows, tensor->rows);
    if (source->is_dummy) {
        fill_dummy(tensor, out, row, n_rows);
        return MIL_OK;
    }
    const entry *found = &source->entries[tensor->index];
    return mil_file_read(&source->files[found->file], out,
                         found->begin + (uint64_t)row * tensor->row_bytes,
                         (size_t)n_rows * tensor->row_bytes);
}
