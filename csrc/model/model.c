#include "model/model.h"

#include "base/machine.h"
#include "model/config.h"
#include "model/runner.h"
#include "ops/device.h"
#include "ops/find.h"

#include <stdio.h>
#include <string.h>

/* ---- threads ---- */

/* Threads of one rank: an equal share of all, the first ranks taking what is left over. */
static int32_t share_of(int32_t n_threads, int32_t rank, int32_t world)
{
    int32_t share = n_threads / world + (rank < n_threads % world);
    return share > 0 ? share : 1;
}

static mil_status create_pools(mil_model *model, int32_t n_threads)
{
    enum { MAX_CPUS = 1024 };
    int32_t cpus[MAX_CPUS];
    int32_t n_cpus = mil_cpus_usable(cpus, MAX_CPUS);
    int32_t wanted = n_threads > 0 ? n_threads : n_cpus;
    /* Pinned only where each thread has a CPU of its own. */
    bool is_pinned = wanted <= n_cpus && model->world <= n_cpus;
    int32_t next = 0;
    for (int32_t rank = 0; rank < model->world; rank++) {
        int32_t share = share_of(wanted, rank, model->world);
        MIL_TRY(mil_pool_create(&model->pools[rank], share, is_pinned ? cpus + next : NULL));
        next += share;
    }
    model->n_threads = next;
    return MIL_OK;
}

/* ---- weights ---- */

/* Every tensor is there and has its shape; *n_bytes is what loading will report. */
static mil_status check_tensors(mil_model *model, const mil_source *source, uint64_t *n_bytes)
{
    *n_bytes = 0;
    for (int32_t rank = 0; rank < model->world; rank++) {
        mil_walk walk = {.shard = &model->ranks[rank].shard, .source = source};
        MIL_TRY(mil_decoder_load(&model->ranks[rank].decoder, &walk));
        *n_bytes += walk.n_bytes;
    }
    return MIL_OK;
}

static size_t place_decoder(mil_model *model, int32_t rank_index, void *data)
{
    mil_rank *rank = &model->ranks[rank_index];
    mil_arena arena = {.data = data};
    mil_decoder_place(&rank->decoder, &arena, model->backend, &rank->shard, &model->config);
    return arena.used;
}

/* What is free of a device beyond its share is not for weights. */
static mil_status check_share(const mil_model *model, int32_t rank, size_t n_bytes, double share)
{
    mil_device_memory memory;
    MIL_TRY(model->backend->device->memory(model->ranks[rank].queue, &memory));
    uint64_t spare = share > 0.0 ? (uint64_t)((double)memory.n_total * (1.0 - share)) : 0;
    uint64_t left = memory.n_free > spare ? memory.n_free - spare : 0;
    if (n_bytes <= left)
        return MIL_OK;
    return mil_fail(MIL_ERR_MEMORY,
                    "model: weights need %s, gpu_memory_utilization %g of the %s of %s leaves %s "
                    "of the %s free: %s too few",
                    mil_memory_show(n_bytes).text, share, mil_memory_show(memory.n_total).text,
                    memory.name, mil_memory_show(left).text, mil_memory_show(memory.n_free).text,
                    mil_memory_show(n_bytes - left).text);
}

/* Ranks share the host's memory; a device's is its rank's alone. */
static mil_status check_room(const mil_model *model, const size_t *n_bytes, double share)
{
    const mil_device *device = model->backend->device;
    size_t total = 0;
    for (int32_t rank = 0; rank < model->world; rank++) {
        if (!device->is_host) {
            MIL_TRY(mil_device_check_room(device, model->ranks[rank].queue, n_bytes[rank],
                                          "model: weights need"));
            MIL_TRY(check_share(model, rank, n_bytes[rank], share));
        }
        if (!mil_add(total, n_bytes[rank], &total))
            total = SIZE_MAX;
    }
    return device->is_host ? mil_device_check_room(device, NULL, total, "model: weights need")
                           : MIL_OK;
}

static mil_status take_weights(mil_model *model, const size_t *n_bytes, double share)
{
    MIL_TRY(check_room(model, n_bytes, share));
    for (int32_t rank = 0; rank < model->world; rank++) {
        mil_slab *slab = &model->ranks[rank].slab;
        MIL_TRY(model->backend->device->alloc(model->ranks[rank].queue, slab, n_bytes[rank],
                                              "weights"));
        (void)place_decoder(model, rank, slab->data);
    }
    return MIL_OK;
}

static mil_status load_weights(mil_model *model, const mil_source *source, mil_progress *progress,
                               uint64_t n_bytes)
{
    mil_loader *loader = NULL;
    /* Ranks on devices of their own need a loader each; there is one such rank so far. */
    mil_status status = mil_loader_create(&loader, source, model->backend, model->ranks[0].queue,
                                          model->n_threads, progress);
    if (status != MIL_OK)
        return status;
    mil_loader_begin(loader, n_bytes);
    for (int32_t rank = 0; rank < model->world && status == MIL_OK; rank++) {
        mil_walk walk = {.shard = &model->ranks[rank].shard, .source = source, .loader = loader};
        status = mil_decoder_load(&model->ranks[rank].decoder, &walk);
    }
    if (status == MIL_OK)
        status = mil_loader_finish(loader);
    mil_loader_free(loader);
    return status;
}

static mil_status open_weights(mil_model *model, const mil_source *source,
                               const mil_model_options *options)
{
    size_t *sizes;
    uint64_t n_bytes;
    MIL_TRY(mil_alloc_checked((void **)&sizes, (size_t)model->world, sizeof *sizes, "model"));
    for (int32_t rank = 0; rank < model->world; rank++)
        sizes[rank] = place_decoder(model, rank, NULL);
    mil_status status = check_tensors(model, source, &n_bytes);
    if (status == MIL_OK)
        status = take_weights(model, sizes, options->gpu_memory_utilization);
    mil_free(sizes);
    return status == MIL_OK ? load_weights(model, source, options->progress, n_bytes) : status;
}

/* What handles, libraries and the kernels that loading ran have taken of the devices. */
static mil_status measure_libraries(mil_model *model)
{
    const mil_device *device = model->backend->device;
    for (int32_t rank = 0; rank < model->world && !device->is_host; rank++) {
        mil_device_memory memory;
        MIL_TRY(device->memory(model->ranks[rank].queue, &memory));
        uint64_t known = memory.n_free + model->ranks[rank].slab.n_bytes;
        if (memory.n_free_at_open > known)
            model->library_bytes += (size_t)(memory.n_free_at_open - known);
    }
    return MIL_OK;
}

/* ---- open and free ---- */

/* "cpu", "cuda", "cuda:1"; NULL and "auto": the first GPU that can be used, else the CPU. */
static mil_status find_backend(mil_model *model, const char *device)
{
    bool is_cuda;
    if (device == NULL || strcmp(device, "auto") == 0) {
        if (mil_backend_find_gpu(&model->ordinal) == MIL_OK)
            return mil_backend_find(&model->backend, "cuda");
        (void)snprintf(model->no_cuda, sizeof model->no_cuda, "%s", mil_status_message());
        return mil_backend_find(&model->backend, "cpu");
    }
    if (!mil_device_parse(&is_cuda, &model->ordinal, device))
        return mil_fail(MIL_ERR_ARGUMENT,
                        "model: device is '%s', expected 'auto', 'cpu', 'cuda' or 'cuda:N'",
                        device);
    return mil_backend_find(&model->backend, is_cuda ? "cuda" : "cpu");
}

static mil_status open_queues(mil_model *model)
{
    if (!model->backend->device->is_host && model->world > 1)
        return mil_fail(MIL_ERR_UNSUPPORTED,
                        "model: tensor_parallel is %d on device '%s', this build serves 1 there",
                        model->world, model->backend->device->name);
    int32_t max_vocab = model->backend->max_vocab;
    if (max_vocab > 0 && model->config.vocab > max_vocab)
        return mil_fail(MIL_ERR_UNSUPPORTED,
                        "model: vocab_size is %d, expected at most %d on device '%s'",
                        model->config.vocab, max_vocab, model->backend->device->name);
    const mil_device *device = model->backend->device;
    for (int32_t rank = 0; rank < model->world; rank++) {
        MIL_TRY(device->open(&model->ranks[rank].queue, model->ordinal));
        if (device->prepare != NULL)
            MIL_TRY(device->prepare(model->ranks[rank].queue));
    }
    return MIL_OK;
}

static mil_status init_ranks(mil_model *model)
{
    const mil_arch *arch;
    size_t world = (size_t)model->world;
    MIL_TRY(mil_arch_find(&arch, model->config.architecture));
    MIL_TRY(mil_alloc_checked((void **)&model->ranks, world, sizeof(mil_rank), "model"));
    MIL_TRY(mil_alloc_checked((void **)&model->pools, world, sizeof(mil_pool *), "model"));
    MIL_TRY(mil_alloc_checked((void **)&model->comms, world, sizeof(mil_comm *), "model"));
    for (int32_t r = 0; r < model->world; r++) {
        mil_rank *rank = &model->ranks[r];
        MIL_TRY(mil_shard_init(&rank->shard, &model->config, r, model->world));
        rank->decoder.arch = arch;
        rank->decoder.n_layers = model->config.n_layers;
        MIL_TRY(mil_alloc_checked((void **)&rank->decoder.layers, (size_t)model->config.n_layers,
                                  sizeof(mil_decoder_layer), "model"));
    }
    return MIL_OK;
}

static mil_status open_parts(mil_model *model, const mil_source *source,
                             const mil_model_options *options)
{
    MIL_TRY(init_ranks(model));
    MIL_TRY(open_queues(model));
    MIL_TRY(create_pools(model, options->n_threads));
    if (model->world > 1)
        MIL_TRY(mil_comm_local_create(model->comms, model->world));
    MIL_TRY(mil_team_create(&model->team, model->world, model->pools, model->comms));
    MIL_TRY(mil_rope_init(&model->rope, &model->config));
    MIL_TRY(open_weights(model, source, options));
    return measure_libraries(model);
}

mil_status mil_model_open(mil_model **out, const mil_config *config,
                          const mil_checkpoint_info *checkpoint, const mil_model_options *options)
{
    const char *isa;
    const char *available;
    if (options->tensor_parallel < 1 || options->tensor_parallel > 1024)
        return mil_fail(MIL_ERR_ARGUMENT, "model: tensor_parallel is %d, expected 1..1024",
                        options->tensor_parallel);
    if (options->n_threads < 0 || options->n_threads > 1024)
        return mil_fail(MIL_ERR_ARGUMENT, "model: n_threads is %d, expected 0..1024",
                        options->n_threads);
    MIL_TRY(mil_config_check(config));
    MIL_TRY(mil_cpu_isa(&isa, &available));
    mil_source *source;
    MIL_TRY(mil_source_open(&source, checkpoint));
    mil_model *model = mil_alloc(1, sizeof *model);
    if (model == NULL) {
        mil_source_close(source);
        return mil_fail(MIL_ERR_MEMORY, "model: no memory");
    }
    model->config = *config;
    model->isa = isa;
    model->world = options->tensor_parallel;
    mil_contents_init(&model->contents);
    pthread_mutex_init(&model->rope_lock, NULL);
    pthread_mutex_init(&model->step_lock, NULL);
    mil_status status = find_backend(model, options->device);
    if (status == MIL_OK)
        status = open_parts(model, source, options);
    mil_source_close(source);
    if (status != MIL_OK) {
        mil_model_free(model);
        return status;
    }
    *out = model;
    return MIL_OK;
}

void mil_model_free(mil_model *model)
{
    if (model == NULL)
        return;
    mil_team_free(model->team);
    mil_contents_deinit(&model->contents);
    for (int32_t rank = 0; rank < model->world; rank++) {
        if (model->comms != NULL && model->comms[rank] != NULL)
            model->comms[rank]->ops->free(model->comms[rank]);
        if (model->pools != NULL)
            mil_pool_free(model->pools[rank]);
        if (model->ranks != NULL) {
            mil_free(model->ranks[rank].decoder.layers);
            model->backend->device->free(model->ranks[rank].queue, &model->ranks[rank].slab);
            model->backend->device->close(model->ranks[rank].queue);
        }
    }
    mil_rope_deinit(&model->rope);
    pthread_mutex_destroy(&model->step_lock);
    pthread_mutex_destroy(&model->rope_lock);
    mil_free(model->comms);
    mil_free(model->pools);
    mil_free(model->ranks);
    mil_free(model);
}

void mil_model_report_get(const mil_model *model, mil_model_report *report)
{
    *report = (mil_model_report){
        .world = model->world,
        .n_threads = model->n_threads,
        .device = model->backend->device->name,
        .isa = model->isa,
        .no_cuda = model->no_cuda,
    };
    for (int32_t rank = 0; rank < model->world; rank++)
        report->weight_bytes += model->ranks[rank].slab.n_bytes;
    /* The lock is the one thing that reading a count writes. */
    mil_contents_count((mil_contents *)(uintptr_t)&model->contents, &report->n_adapters,
                       &report->adapter_bytes);
}

const mil_config *mil_model_config(const mil_model *model)
{
    return &model->config;
}

mil_status mil_model_memory_get(const mil_model *model, mil_model_memory *memory)
{
    const mil_device *device = model->backend->device;
    int32_t n_memories = device->is_host ? 1 : model->world;
    mil_model_report report;
    mil_model_report_get(model, &report);
    *memory = (mil_model_memory){
        .is_device = !device->is_host,
        .weight_bytes = report.weight_bytes,
        .adapter_bytes = report.adapter_bytes,
        .library_bytes = model->library_bytes,
    };
    for (int32_t rank = 0; rank < n_memories; rank++) {
        mil_device_memory one;
        MIL_TRY(device->memory(model->ranks[rank].queue, &one));
        memory->device = rank == 0 ? one.name : memory->device;
        memory->n_free += one.n_free;
        memory->n_total += one.n_total;
    }
    return MIL_OK;
}

bool mil_model_is_on_device(const mil_model *model)
{
    return !model->backend->device->is_host;
}

int32_t mil_model_default_page_size(const mil_model *model)
{
    return model->backend->default_page_size;
}

/* ---- adapters ---- */

mil_status mil_model_add_adapter(mil_model *model, const mil_adapter_info *info, int32_t *content)
{
    mil_content *loaded = NULL;
    mil_status status;
    MIL_TRY(mil_content_create(&loaded, model->world));
    for (int32_t rank = 0; rank < model->world; rank++)
        MIL_TRY_GOTO(mil_adapter_init(&loaded->adapters[rank], info, &model->config,
                                      &model->ranks[rank].shard, model->backend,
                                      model->ranks[rank].queue),
                     failed);
    MIL_TRY_GOTO(mil_contents_add(&model->contents, loaded, content), failed);
    return MIL_OK;
failed:
    mil_content_free(loaded);
    return status;
}

mil_status mil_model_hold_adapter(mil_model *model, int32_t content)
{
    return mil_contents_hold(&model->contents, content);
}

mil_status mil_model_release_adapter(mil_model *model, int32_t content)
{
    return mil_contents_release(&model->contents, content);
}
