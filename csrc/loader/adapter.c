#include "loader/adapter.h"

#include "base/bf16.h"
#include "base/f16.h"
#include "loader/source.h"
#include "ops/device.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

/* What is read at once; a longer row is read whole. */
#define WINDOW_BYTES ((size_t)1 << 20)

/* What a load needs besides the adapter itself; all of it is gone when mil_adapter_init returns. */
typedef struct reader {
    const mil_adapter_info *info;
    const mil_shard *shard;
    const mil_backend *backend;
    mil_source *source;
    mil_slab staging; /* of a device that does not read the host's memory: the slab's bytes here */
    size_t window_bytes;
    char *window;     /* whole rows as the file has them */
    uint16_t *matrix; /* this rank's slice of one A or B, row-major bf16 */
} reader;

static mil_lora_module *module_of(const mil_adapter *adapter, const mil_adapter_module_info *info)
{
    size_t layer = (size_t)info->layer;
    return &adapter->modules[layer * MIL_N_PROJECTIONS + (size_t)info->projection];
}

/* ---- check ---- */

static mil_status check_module(const mil_adapter *adapter, const mil_adapter_module_info *info)
{
    const char *name = info->a.name != NULL ? info->a.name : "dummy";
    if ((int)info->projection < 0 || info->projection >= MIL_N_PROJECTIONS)
        return mil_fail(MIL_ERR_ARGUMENT, "adapter: '%s' is of projection %d, expected 0..%d", name,
                        (int)info->projection, MIL_N_PROJECTIONS - 1);
    if (info->layer < 0 || info->layer >= adapter->n_layers)
        return mil_fail(MIL_ERR_ARGUMENT, "adapter: '%s' is of layer %d, expected 0..%d", name,
                        info->layer, adapter->n_layers - 1);
    const char *projection = mil_projection_name(info->projection);
    if (info->rank < 1 || info->rank > MIL_MAX_LORA_RANK)
        return mil_fail(MIL_ERR_ARGUMENT, "adapter: layer %d %s has rank %d, expected 1..%d",
                        info->layer, projection, info->rank, MIL_MAX_LORA_RANK);
    if (!isfinite(info->scale))
        return mil_fail(MIL_ERR_ARGUMENT,
                        "adapter: layer %d %s has scale %g, expected a finite one", info->layer,
                        projection, (double)info->scale);
    if (module_of(adapter, info)->rank != 0)
        return mil_fail(MIL_ERR_ARGUMENT, "adapter: layer %d %s is there twice, expected once",
                        info->layer, projection);
    return MIL_OK;
}

/* Check every module's numbers and note them in the descriptors. */
static mil_status note_modules(mil_adapter *adapter, const reader *from)
{
    if (from->info->n_modules < 1)
        return mil_fail(MIL_ERR_ARGUMENT, "adapter: found %d modules, expected at least 1",
                        from->info->n_modules);
    for (int32_t i = 0; i < from->info->n_modules; i++) {
        const mil_adapter_module_info *info = &from->info->modules[i];
        MIL_TRY(check_module(adapter, info));
        const mil_slice *slice = &from->shard->projections[info->projection];
        size_t multiple = (size_t)from->backend->lora_rank_multiple;
        int32_t padded_rank = (int32_t)mil_round_up((size_t)info->rank, multiple);
        *module_of(adapter, info) = (mil_lora_module){.rank = info->rank,
                                                      .padded_rank = padded_rank,
                                                      .in = (int32_t)slice->n_cols,
                                                      .out = (int32_t)slice->n_rows,
                                                      .scale = info->scale};
        if (padded_rank > adapter->max_padded_rank)
            adapter->max_padded_rank = padded_rank;
    }
    return MIL_OK;
}

static mil_status open_source(reader *from)
{
    const mil_adapter_info *info = from->info;
    size_t n_modules = (size_t)info->n_modules;
    void *memory;
    MIL_TRY(mil_alloc_checked(&memory, 2 * n_modules, sizeof(mil_tensor_info), "adapter: tensors"));
    mil_tensor_info *tensors = memory;
    for (size_t i = 0; i < n_modules; i++) {
        tensors[2 * i] = info->modules[i].a;
        tensors[2 * i + 1] = info->modules[i].b;
    }
    mil_checkpoint_info files = {.files = info->files,
                                 .n_files = info->n_files,
                                 .tensors = tensors,
                                 .n_tensors = 2 * info->n_modules,
                                 .is_dummy = info->is_dummy,
                                 .dummy_seed = info->dummy_seed};
    mil_status status = mil_source_open(&from->source, &files);
    mil_free(tensors);
    return status;
}

typedef struct pair {
    mil_source_tensor a, b;
} pair;

/* The module's A and B, whose shapes must be the base weight's and the rank. */
static mil_status find_pair(const reader *from, const mil_adapter_module_info *info, pair *out)
{
    const mil_slice *slice = &from->shard->projections[info->projection];
    const char *a_name = info->a.name, *b_name = info->b.name;
    char a_dummy[64], b_dummy[64];
    if (from->info->is_dummy) {
        const char *projection = mil_projection_name(info->projection);
        (void)snprintf(a_dummy, sizeof a_dummy, "layers.%d.%s.lora_A", info->layer, projection);
        (void)snprintf(b_dummy, sizeof b_dummy, "layers.%d.%s.lora_B", info->layer, projection);
        a_name = a_dummy;
        b_name = b_dummy;
    }
    MIL_TRY(mil_source_find(from->source, a_name, info->rank, slice->full_cols, &out->a));
    return mil_source_find(from->source, b_name, slice->full_rows, info->rank, &out->b);
}

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* Check every shape, then take windows for the longest row and the largest slice. */
static mil_status check_shapes(reader *from, const mil_adapter *adapter)
{
    size_t n_matrix = 0;
    from->window_bytes = WINDOW_BYTES;
    for (int32_t i = 0; i < from->info->n_modules; i++) {
        const mil_adapter_module_info *info = &from->info->modules[i];
        const mil_lora_module *module = module_of(adapter, info);
        pair found;
        MIL_TRY(find_pair(from, info, &found));
        from->window_bytes = larger(from->window_bytes, found.a.row_bytes);
        from->window_bytes = larger(from->window_bytes, found.b.row_bytes);
        n_matrix = larger(n_matrix, (size_t)module->rank * (size_t)module->in);
        n_matrix = larger(n_matrix, (size_t)module->out * (size_t)module->rank);
    }
    void *memory;
    MIL_TRY(mil_alloc_checked(&memory, from->window_bytes, 1, "adapter: window"));
    from->window = memory;
    MIL_TRY(mil_alloc_checked(&memory, n_matrix, sizeof(uint16_t), "adapter: matrix"));
    from->matrix = memory;
    return MIL_OK;
}

/* ---- memory ---- */

/* Bytes of one module's A and B, each aligned; false on overflow. */
static bool module_bytes(const mil_backend *backend, const mil_lora_module *module, size_t *a_bytes,
                         size_t *total)
{
    size_t a = backend->lora_a_bytes(module->rank, module->in);
    size_t b = backend->lora_b_bytes(module->out, module->rank);
    if (!mil_add(a, MIL_ALIGN - 1, &a) || !mil_add(b, MIL_ALIGN - 1, &b))
        return false;
    *a_bytes = a / MIL_ALIGN * MIL_ALIGN;
    return mil_add(*a_bytes, b / MIL_ALIGN * MIL_ALIGN, total);
}

/* The slab; on a device of its own with the descriptors at its end, and a copy here to fill. */
static mil_status take_slab(mil_adapter *adapter, reader *from, size_t n_bytes, size_t table_bytes)
{
    const mil_device *device = adapter->device;
    size_t total = n_bytes;
    if (!device->is_host && !mil_add(n_bytes, table_bytes, &total))
        return mil_fail(MIL_ERR_MEMORY, "adapter: its bytes overflow 64 bits");
    MIL_TRY(mil_device_check_room(device, adapter->queue, total, "adapter: needs"));
    MIL_TRY(device->alloc(adapter->queue, &adapter->slab, total, "adapter"));
    adapter->device_modules = adapter->modules;
    if (device->is_host)
        return MIL_OK;
    adapter->device_modules = (const mil_lora_module *)((const char *)adapter->slab.data + n_bytes);
    return device->alloc_host(adapter->queue, &from->staging, total, "adapter: staging");
}

/* Where the host writes what will lie at `packed`. */
static void *to_fill(const mil_adapter *adapter, const reader *from, const void *packed)
{
    if (adapter->device->is_host)
        return (void *)(uintptr_t)packed;
    return (char *)from->staging.data + ((const char *)packed - (const char *)adapter->slab.data);
}

static mil_status send_staging(const mil_adapter *adapter, const reader *from)
{
    if (adapter->device->is_host)
        return MIL_OK;
    memcpy(to_fill(adapter, from, adapter->device_modules), adapter->modules,
           (size_t)adapter->n_layers * MIL_N_PROJECTIONS * sizeof *adapter->modules);
    return adapter->device->copy_in(adapter->queue, adapter->slab.data, from->staging.data,
                                    adapter->slab.n_bytes);
}

/* One slab, modules in the order of the descriptors, so that each layer is one block. */
static mil_status place_modules(mil_adapter *adapter, reader *from)
{
    const mil_backend *backend = from->backend;
    size_t n_modules = (size_t)adapter->n_layers * MIL_N_PROJECTIONS, total = 0, a_bytes, n_bytes;
    for (size_t i = 0; i < n_modules; i++) {
        if (adapter->modules[i].rank == 0)
            continue;
        if (!module_bytes(backend, &adapter->modules[i], &a_bytes, &n_bytes) ||
            !mil_add(total, n_bytes, &total))
            return mil_fail(MIL_ERR_MEMORY, "adapter: its bytes overflow 64 bits");
    }
    MIL_TRY(take_slab(adapter, from, total, n_modules * sizeof *adapter->modules));
    char *next = adapter->slab.data;
    for (size_t i = 0; i < n_modules; i++) {
        mil_lora_module *module = &adapter->modules[i];
        if (module->rank == 0 || !module_bytes(backend, module, &a_bytes, &n_bytes))
            continue;
        module->a = next;
        module->b = next + a_bytes;
        next += n_bytes;
    }
    return MIL_OK;
}

/* ---- read ---- */

static bool is_finite_bf16(uint16_t bits)
{
    return (bits & 0x7f80u) != 0x7f80u;
}

/* n elements as bf16; false where one is not finite. */
static bool narrow(uint16_t *out, const char *in, mil_dtype dtype, size_t n)
{
    bool is_finite = true;
    for (size_t i = 0; i < n; i++) {
        if (dtype == MIL_DTYPE_F32) {
            float value;
            memcpy(&value, in + i * sizeof value, sizeof value);
            out[i] = mil_bf16_from_float(value);
        } else {
            memcpy(&out[i], in + i * sizeof out[i], sizeof out[i]);
            if (dtype == MIL_DTYPE_F16)
                out[i] = mil_bf16_from_float(mil_f16_to_float(out[i]));
        }
        is_finite &= is_finite_bf16(out[i]);
    }
    return is_finite;
}

static mil_status fail_not_finite(const uint16_t *row_bits, const char *name, int64_t row,
                                  const mil_slice *slice)
{
    int64_t col = 0;
    while (is_finite_bf16(row_bits[col]))
        col++;
    return mil_fail(MIL_ERR_NUMERICS,
                    "adapter: tensor '%s' is %g as bfloat16 at [%" PRId64 ", %" PRId64
                    "], expected a finite value",
                    name, (double)mil_bf16_to_float(row_bits[col]), row, slice->col_begin + col);
}

/* Read a slice of tensor into from->matrix. */
static mil_status read_slice(const reader *from, const mil_source_tensor *tensor, const char *name,
                             const mil_slice *slice)
{
    int64_t step = (int64_t)(from->window_bytes / tensor->row_bytes);
    size_t skip = (size_t)slice->col_begin * mil_dtype_bytes(tensor->dtype);
    size_t n_cols = (size_t)slice->n_cols;
    for (int64_t done = 0; done < slice->n_rows; done += step) {
        int64_t n = slice->n_rows - done < step ? slice->n_rows - done : step;
        MIL_TRY(
            mil_source_read_rows(from->source, tensor, from->window, slice->row_begin + done, n));
        for (int64_t i = 0; i < n; i++) {
            uint16_t *out = from->matrix + (size_t)(done + i) * n_cols;
            const char *in = from->window + (size_t)i * tensor->row_bytes + skip;
            if (!narrow(out, in, tensor->dtype, n_cols))
                return fail_not_finite(out, name, slice->row_begin + done + i, slice);
        }
    }
    return MIL_OK;
}

static mil_status load_module(const reader *from, const mil_adapter *adapter,
                              const mil_adapter_module_info *info)
{
    const mil_slice *slice = &from->shard->projections[info->projection];
    const mil_lora_module *module = module_of(adapter, info);
    pair found;
    MIL_TRY(find_pair(from, info, &found));

    mil_slice a = {.n_rows = info->rank, .col_begin = slice->col_begin, .n_cols = slice->n_cols};
    MIL_TRY(read_slice(from, &found.a, info->a.name, &a));
    from->backend->lora_pack_a(to_fill(adapter, from, module->a), from->matrix, module->in,
                               module->rank, module->in);

    mil_slice b = {.row_begin = slice->row_begin, .n_rows = slice->n_rows, .n_cols = info->rank};
    MIL_TRY(read_slice(from, &found.b, info->b.name, &b));
    from->backend->lora_pack_b(to_fill(adapter, from, module->b), from->matrix, module->rank,
                               module->out, module->rank);
    return MIL_OK;
}

static mil_status load(mil_adapter *adapter, reader *from)
{
    size_t n_layers = (size_t)adapter->n_layers;
    void *memory;
    MIL_TRY(mil_alloc_checked(&memory, n_layers, MIL_N_PROJECTIONS * sizeof(mil_lora_module),
                              "adapter: descriptors"));
    adapter->modules = memory;
    MIL_TRY(note_modules(adapter, from));
    MIL_TRY(open_source(from));
    MIL_TRY(check_shapes(from, adapter));
    MIL_TRY(place_modules(adapter, from));
    for (int32_t i = 0; i < from->info->n_modules; i++)
        MIL_TRY(load_module(from, adapter, &from->info->modules[i]));
    return send_staging(adapter, from);
}

mil_status mil_adapter_init(mil_adapter *adapter, const mil_adapter_info *info,
                            const mil_config *config, const mil_shard *shard,
                            const mil_backend *backend, struct mil_queue *queue)
{
    *adapter =
        (mil_adapter){.device = backend->device, .queue = queue, .n_layers = config->n_layers};
    reader from = {.info = info, .shard = shard, .backend = backend};
    mil_status status = load(adapter, &from);
    backend->device->free_host(queue, &from.staging);
    mil_free(from.window);
    mil_free(from.matrix);
    mil_source_close(from.source);
    if (status != MIL_OK)
        mil_adapter_deinit(adapter);
    return status;
}

void mil_adapter_deinit(mil_adapter *adapter)
{
    if (adapter->device != NULL)
        adapter->device->free(adapter->queue, &adapter->slab);
    mil_free(adapter->modules);
    memset(adapter, 0, sizeof *adapter);
}
