/* The CUDA backend's device calls: streams, memory, copies, fences and graphs of one queue.
 *
 * Calls come from any thread. Each makes the queue's device current while it runs and may be made
 * while another thread of the process captures a graph: nothing here takes part in a capture but
 * its own, which is thread-local. Memory is plain cudaMalloc: taken once, before the first step. */
#include "kernels/device.h"

#include "base/switch.h"
#include "kernels/cublas.h"
#include "kernels/product.h"
#include "kernels/tensor_map.h"
#include "ops/chaos.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GIB ((double)(1 << 30))

struct mil_graph {
    cudaGraphExec_t exec;
};

/* ---- queues ---- */

static mil_status read_path(mil_queue *queue, int32_t capability)
{
    const char *path = getenv("MILPY_CUDA_PATH");
    bool is_forced = path != NULL && path[0] != '\0';
    bool is_pdl_on;
    if (is_forced && strcmp(path, "portable") != 0)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "MILPY_CUDA_PATH is \"%s\", expected \"portable\" or nothing", path);
    MIL_TRY(mil_switch_read(&is_pdl_on, "MILPY_CUDA_PDL", true));
    MIL_TRY(mil_switch_read(&queue->has_side, "MILPY_CUDA_SIDE", true));
    /* sm_90a code runs on 9.0 alone. */
    queue->path = capability == 90 && !is_forced ? MIL_CUDA_SM90 : MIL_CUDA_PORTABLE;
    if (queue->path == MIL_CUDA_SM90)
        MIL_TRY(mil_cuda_tensor_map_find(queue));
    /* Kernels that came from the PTX of an older architecture hold no wait for the one before. */
    int32_t arch;
    MIL_TRY(mil_cuda_kernels_arch(&arch));
    queue->has_pdl = capability >= 90 && arch >= 90 && is_pdl_on;
    return MIL_OK;
}

static mil_status read_device(mil_queue *queue)
{
    struct cudaDeviceProp properties;
    MIL_CUDA_TRY(cudaGetDeviceProperties(&properties, queue->ordinal));
    int32_t capability = properties.major * 10 + properties.minor;
    (void)snprintf(queue->label, sizeof queue->label, "cuda:%d (%s)", queue->ordinal,
                   properties.name);
    queue->n_sms = properties.multiProcessorCount;
    MIL_TRY(mil_cuda_check_capability(queue->label, properties.major, properties.minor));
    /* The context is there: what it took is not the queue's. */
    size_t n_total;
    MIL_CUDA_TRY(cudaMemGetInfo(&queue->n_free_at_open, &n_total));
    return read_path(queue, capability);
}

static mil_status make_streams(mil_queue *queue)
{
    MIL_CUDA_TRY(cudaStreamCreateWithFlags(&queue->stream, cudaStreamNonBlocking));
    MIL_CUDA_TRY(cudaStreamCreateWithFlags(&queue->side, cudaStreamNonBlocking));
    MIL_CUDA_TRY(cudaStreamCreateWithFlags(&queue->copies, cudaStreamNonBlocking));
    MIL_CUDA_TRY(cudaEventCreateWithFlags(&queue->fork, cudaEventDisableTiming));
    MIL_CUDA_TRY(cudaEventCreateWithFlags(&queue->join, cudaEventDisableTiming));
    for (int32_t i = 0; i < MIL_N_FENCES; i++)
        MIL_CUDA_TRY(cudaEventCreateWithFlags(&queue->fences[i], cudaEventDisableTiming));
    return MIL_OK;
}

static void destroy_event(cudaEvent_t event)
{
    if (event != NULL)
        (void)cudaEventDestroy(event);
}

static void destroy_stream(cudaStream_t stream)
{
    if (stream == NULL)
        return;
    (void)cudaStreamSynchronize(stream);
    (void)cudaStreamDestroy(stream);
}

static void destroy(mil_queue *queue)
{
    destroy_stream(queue->copies);
    destroy_stream(queue->side);
    destroy_stream(queue->stream);
    mil_cublas_free(queue->cublas);
    destroy_event(queue->fork);
    destroy_event(queue->join);
    for (int32_t i = 0; i < MIL_N_FENCES; i++)
        destroy_event(queue->fences[i]);
    (void)cudaGetLastError();
    mil_free(queue);
}

static mil_status fill_queue(mil_queue *queue)
{
    MIL_TRY(read_device(queue));
    MIL_TRY(make_streams(queue));
    MIL_TRY(mil_cuda_product_load());
    return mil_cuda_send_load();
}

static void queue_close(struct mil_queue *queue)
{
    mil_cuda_call it;
    if (queue == NULL)
        return;
    const mil_queue gone = {.context = queue->context, .set_context = queue->set_context};
    bool is_entered = mil_cuda_begin_call(queue, &it) == MIL_OK;
    destroy(queue);
    if (is_entered)
        (void)mil_cuda_end_call(&gone, &it, MIL_OK);
}

static mil_status queue_open(struct mil_queue **out, int32_t ordinal)
{
    int32_t n_devices;
    mil_queue *queue;
    mil_cuda_call it;
    MIL_TRY(mil_cuda_count(&n_devices));
    if (ordinal < 0 || ordinal >= n_devices)
        return mil_fail(MIL_ERR_DEVICE, "cuda:%d: found %d device%s, expected cuda:0..%d", ordinal,
                        n_devices, n_devices == 1 ? "" : "s", n_devices - 1);
    MIL_TRY(mil_alloc_checked((void **)&queue, 1, sizeof *queue, "cuda queue"));
    queue->ordinal = ordinal;
    mil_status status = mil_cuda_find_context(queue);
    if (status != MIL_OK) {
        mil_free(queue);
        return status;
    }
    status = mil_cuda_begin_call(queue, &it);
    if (status == MIL_OK)
        status = mil_cuda_end_call(queue, &it, fill_queue(queue));
    if (status != MIL_OK) {
        queue_close(queue); /* in its own context: none is made elsewhere */
        return status;
    }
    *out = queue;
    return MIL_OK;
}

/* ---- memory ---- */

static mil_status memory(struct mil_queue *queue, mil_device_memory *memory)
{
    mil_cuda_call it;
    size_t is_free = 0, total = 0;
    MIL_TRY(mil_cuda_begin_call(queue, &it));
    mil_status status = mil_cuda_status(cudaMemGetInfo(&is_free, &total), "cudaMemGetInfo");
    memory->name = queue->label;
    memory->n_free = is_free;
    memory->n_total = total;
    memory->n_free_at_open = queue->n_free_at_open;
    return mil_cuda_end_call(queue, &it, status);
}

static mil_status no_memory(const mil_queue *queue, size_t n_bytes, const char *what)
{
    size_t is_free = 0, total = 0;
    (void)cudaGetLastError();
    (void)cudaMemGetInfo(&is_free, &total);
    return mil_fail(MIL_ERR_MEMORY, "%s: %s refused %.3f GiB, %.3f GiB of %.3f GiB are free", what,
                    queue->label, (double)n_bytes / GIB, (double)is_free / GIB,
                    (double)total / GIB);
}

static mil_status take(mil_queue *queue, mil_slab *slab, size_t n_bytes, const char *what)
{
    void *data;
    cudaError_t error =
        mil_memory_refuses() ? cudaErrorMemoryAllocation : cudaMalloc(&data, n_bytes);
    if (error == cudaErrorMemoryAllocation)
        return no_memory(queue, n_bytes, what);
    MIL_TRY(mil_cuda_status(error, what));
    error = cudaMemsetAsync(data, 0, n_bytes, queue->copies);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(queue->copies);
    if (error != cudaSuccess) {
        (void)cudaFree(data);
        return mil_cuda_status(error, what);
    }
    slab->data = data;
    slab->n_bytes = n_bytes;
    return MIL_OK;
}

static mil_status alloc(struct mil_queue *queue, mil_slab *slab, size_t n_bytes, const char *what)
{
    mil_cuda_call it;
    memset(slab, 0, sizeof *slab);
    MIL_TRY(mil_cuda_begin_call(queue, &it));
    return mil_cuda_end_call(queue, &it, take(queue, slab, n_bytes, what));
}

static void give_back(struct mil_queue *queue, mil_slab *slab)
{
    mil_cuda_call it;
    if (slab->data == NULL)
        return;
    if (mil_cuda_begin_call(queue, &it) == MIL_OK) {
        /* After a fault every call fails; the memory went with the context. */
        if (cudaFree(slab->data) != cudaSuccess)
            (void)cudaGetLastError();
        (void)mil_cuda_end_call(queue, &it, MIL_OK);
    }
    memset(slab, 0, sizeof *slab);
}

static mil_status alloc_host(struct mil_queue *queue, mil_slab *slab, size_t n_bytes,
                             const char *what)
{
    mil_cuda_call it;
    void *data = NULL;
    memset(slab, 0, sizeof *slab);
    MIL_TRY(mil_cuda_begin_call(queue, &it));
    unsigned flags = cudaHostAllocPortable | cudaHostAllocMapped;
    cudaError_t error =
        mil_memory_refuses() ? cudaErrorMemoryAllocation : cudaHostAlloc(&data, n_bytes, flags);
    mil_status status = MIL_OK;
    if (error == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        status = mil_fail(MIL_ERR_MEMORY, "%s: %s: the system refused %zu pinned bytes", what,
                          queue->label, n_bytes);
    } else {
        status = mil_cuda_status(error, what);
    }
    if (status == MIL_OK) {
        memset(data, 0, n_bytes);
        *slab = (mil_slab){data, n_bytes};
    }
    return mil_cuda_end_call(queue, &it, status);
}

static void free_host(struct mil_queue *queue, mil_slab *slab)
{
    mil_cuda_call it;
    if (slab->data == NULL)
        return;
    if (mil_cuda_begin_call(queue, &it) == MIL_OK) {
        if (cudaFreeHost(slab->data) != cudaSuccess)
            (void)cudaGetLastError();
        (void)mil_cuda_end_call(queue, &it, MIL_OK);
    }
    memset(slab, 0, sizeof *slab);
}

/* ---- order ---- */

/* What the stream ran before may have failed as well: an asynchronous fault surfaces here. */
static mil_status drained(const mil_queue *queue, cudaError_t error)
{
    if (error == cudaSuccess)
        return MIL_OK;
    (void)cudaGetLastError();
    return mil_fail(MIL_ERR_DEVICE, "%s: what was queued has failed: %s (%s)", queue->label,
                    cudaGetErrorString(error), cudaGetErrorName(error));
}

static mil_status copy(mil_queue *queue, void *to, const void *from, size_t n_bytes,
                       enum cudaMemcpyKind kind, cudaStream_t stream)
{
    mil_cuda_call it;
    MIL_TRY(mil_cuda_begin_call(queue, &it));
    cudaError_t error = cudaMemcpyAsync(to, from, n_bytes, kind, stream);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(stream);
    return mil_cuda_end_call(queue, &it, drained(queue, error));
}

static mil_status copy_in(struct mil_queue *queue, void *device, const void *host, size_t n_bytes)
{
    return copy(queue, device, host, n_bytes, cudaMemcpyHostToDevice, queue->copies);
}

static mil_status copy_out(struct mil_queue *queue, void *host, const void *device, size_t n_bytes)
{
    return copy(queue, host, device, n_bytes, cudaMemcpyDeviceToHost, queue->stream);
}

static mil_status send_out(struct mil_queue *queue, void *host, const void *device, size_t n_bytes)
{
    void *was;
    MIL_TRY(mil_cuda_enter(queue, &was));
    mil_status status = mil_chaos_delay(queue);
    if (status == MIL_OK)
        status = mil_cuda_send_out(queue, host, device, n_bytes);
    return mil_cuda_leave(queue, was, status);
}

static mil_status fill_16(struct mil_queue *queue, void *device, uint16_t word, size_t n)
{
    void *was;
    MIL_TRY(mil_cuda_enter(queue, &was));
    return mil_cuda_leave(queue, was, mil_cuda_fill_16(queue, device, word, n));
}

static mil_status poison(struct mil_queue *queue, void *device, size_t n_bytes, size_t n_blocks,
                         size_t stride_bytes)
{
    mil_cuda_call it;
    cudaError_t error = cudaSuccess;
    MIL_TRY(mil_cuda_begin_call(queue, &it));
    for (size_t i = 0; i < n_blocks && error == cudaSuccess; i++)
        error = cudaMemsetAsync((char *)device + i * stride_bytes, 0xff, n_bytes, queue->copies);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(queue->copies);
    return mil_cuda_end_call(queue, &it, drained(queue, error));
}

static mil_status synchronize(struct mil_queue *queue)
{
    mil_cuda_call it;
    MIL_TRY(mil_cuda_begin_call(queue, &it));
    return mil_cuda_end_call(queue, &it, drained(queue, cudaStreamSynchronize(queue->stream)));
}

static mil_status record(struct mil_queue *queue, int32_t index)
{
    mil_cuda_call it;
    MIL_TRY(mil_cuda_begin_call(queue, &it));
    cudaError_t error = cudaEventRecord(queue->fences[index], queue->stream);
    return mil_cuda_end_call(queue, &it, mil_cuda_status(error, "recording a fence"));
}

static mil_status wait(struct mil_queue *queue, int32_t index)
{
    mil_cuda_call it;
    MIL_TRY(mil_cuda_begin_call(queue, &it));
    return mil_cuda_end_call(queue, &it,
                             drained(queue, cudaEventSynchronize(queue->fences[index])));
}

/* ---- graphs ---- */

/* The queue's device is current: the call must not wake another one. */
static mil_status exchange(const mil_queue *queue, enum cudaStreamCaptureMode *mode)
{
    void *was;
    MIL_TRY(mil_cuda_enter(queue, &was));
    return mil_cuda_leave(
        queue, was,
        mil_cuda_status(cudaThreadExchangeStreamCaptureMode(mode), "relaxing captures"));
}

static mil_status relax_capture(struct mil_queue *queue, int32_t *mode)
{
    enum cudaStreamCaptureMode relaxed = cudaStreamCaptureModeRelaxed;
    MIL_TRY(exchange(queue, &relaxed));
    *mode = (int32_t)relaxed;
    return MIL_OK;
}

static void restore_capture(struct mil_queue *queue, int32_t mode)
{
    enum cudaStreamCaptureMode own = (enum cudaStreamCaptureMode)mode;
    (void)exchange(queue, &own);
}

static mil_status capture_begin(struct mil_queue *queue)
{
    mil_cuda_call it;
    MIL_TRY(mil_cuda_begin_call(queue, &it));
    cudaError_t error = cudaStreamBeginCapture(queue->stream, cudaStreamCaptureModeThreadLocal);
    return mil_cuda_end_call(queue, &it, mil_cuda_status(error, "beginning a capture"));
}

/* Uploaded now, so that its first launch costs no more than the next. */
static mil_status instantiate(mil_queue *queue, struct mil_graph *graph, cudaGraph_t captured)
{
    MIL_CUDA_TRY(cudaGraphInstantiate(&graph->exec, captured, 0));
    MIL_CUDA_TRY(cudaGraphUpload(graph->exec, queue->stream));
    return MIL_OK;
}

static void free_graph(struct mil_graph *graph)
{
    if (graph->exec != NULL && cudaGraphExecDestroy(graph->exec) != cudaSuccess)
        (void)cudaGetLastError();
    mil_free(graph);
}

static mil_status end_capture(mil_queue *queue, struct mil_graph **out)
{
    cudaGraph_t captured = NULL;
    struct mil_graph *graph = NULL;
    mil_status status =
        mil_cuda_status(cudaStreamEndCapture(queue->stream, &captured), "ending a capture");
    if (status == MIL_OK)
        status = mil_alloc_checked((void **)&graph, 1, sizeof *graph, "cuda graph");
    if (status == MIL_OK)
        status = instantiate(queue, graph, captured);
    if (captured != NULL)
        (void)cudaGraphDestroy(captured);
    if (status == MIL_OK)
        *out = graph;
    else if (graph != NULL)
        free_graph(graph);
    return status;
}

static mil_status capture_end(struct mil_queue *queue, struct mil_graph **out)
{
    mil_cuda_call it;
    MIL_TRY(mil_cuda_begin_call(queue, &it));
    return mil_cuda_end_call(queue, &it, end_capture(queue, out));
}

static mil_status graph_launch(struct mil_queue *queue, struct mil_graph *graph)
{
    void *was;
    MIL_TRY(mil_cuda_enter(queue, &was));
    mil_status status = mil_chaos_delay(queue);
    if (status == MIL_OK)
        status = mil_cuda_status(cudaGraphLaunch(graph->exec, queue->stream), "launching a graph");
    return mil_cuda_leave(queue, was, status);
}

static void graph_free(struct mil_queue *queue, struct mil_graph *graph)
{
    mil_cuda_call it;
    if (graph == NULL)
        return;
    bool is_entered = mil_cuda_begin_call(queue, &it) == MIL_OK;
    free_graph(graph);
    if (is_entered)
        (void)mil_cuda_end_call(queue, &it, MIL_OK);
}

const mil_device mil_cuda_device = {
    .name = "cuda",
    .is_host = false,
    .depth = 2,
    .open = queue_open,
    .prepare = mil_cublas_open,
    .close = queue_close,
    .memory = memory,
    .alloc = alloc,
    .free = give_back,
    .alloc_host = alloc_host,
    .free_host = free_host,
    .copy_in = copy_in,
    .copy_out = copy_out,
    .send_out = send_out,
    .fill_16 = fill_16,
    .poison = poison,
    .synchronize = synchronize,
    .record = record,
    .wait = wait,
    .relax_capture = relax_capture,
    .restore_capture = restore_capture,
    .capture_begin = capture_begin,
    .capture_end = capture_end,
    .graph_launch = graph_launch,
    .graph_free = graph_free,
};
