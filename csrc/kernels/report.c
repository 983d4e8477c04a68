/* What a GPU is and what would run there, for `milpy doctor`. Decides nothing: a queue that is
 * opened for the while did. */
#include "ops/find.h"

#include "kernels/cublas.h"
#include "kernels/device.h"

#include <stdio.h>
#include <string.h>

#define HOPPER 90

static void tell_kernels(mil_gpu_report *report, mil_cuda_path path)
{
    const char *text = "portable, as MILPY_CUDA_PATH says";
    if (path == MIL_CUDA_SM90)
        text = "Hopper's own, portable where an op has none";
    else if (report->compute_capability != HOPPER)
        text = "portable: Hopper's own want compute capability 9.0";
    (void)snprintf(report->kernels, sizeof report->kernels, "%s", text);
}

static mil_status try_queue(mil_gpu_report *report, int32_t ordinal)
{
    mil_queue *queue;
    mil_device_memory memory;
    MIL_TRY(mil_cuda_device.open(&queue, ordinal));
    mil_status status = mil_cuda_device.prepare(queue);
    if (status == MIL_OK)
        status = mil_cuda_device.memory(queue, &memory);
    if (status == MIL_OK) {
        tell_kernels(report, queue->path);
        report->cublaslt_version = mil_cublas_version(queue->cublas);
        (void)snprintf(report->cublaslt_path, sizeof report->cublaslt_path, "%s",
                       mil_cublas_path(queue->cublas));
        report->free_bytes = memory.n_free_at_open;
        report->total_bytes = memory.n_total;
    }
    mil_cuda_device.close(queue);
    return status;
}

mil_status mil_cuda_report(mil_gpu_report *report, int32_t ordinal)
{
    struct cudaDeviceProp properties;
    int driver = 0;
    memset(report, 0, sizeof *report);
    MIL_CUDA_TRY(cudaDriverGetVersion(&driver));
    mil_status status =
        mil_cuda_status(cudaGetDeviceProperties(&properties, ordinal), "reading its properties");
    if (status != MIL_OK) {
        (void)snprintf(report->problem, sizeof report->problem, "%s", mil_status_message());
        return MIL_OK;
    }
    memcpy(report->name, properties.name, sizeof report->name - 1);
    report->compute_capability = properties.major * 10 + properties.minor;
    report->driver_cuda = driver;
    report->build_cuda = CUDART_VERSION;
    report->total_bytes = properties.totalGlobalMem;
    if (try_queue(report, ordinal) != MIL_OK)
        (void)snprintf(report->problem, sizeof report->problem, "%s", mil_status_message());
    return MIL_OK;
}
