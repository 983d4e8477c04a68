/* The driver: what its errors say, which devices it has, and being on the right one.
 *
 * Makes no context but the primary one that find asks for, and keeps none of its own. */
#include "kernels/device.h"

#include <cuda.h>
#include <stdio.h>
#include <string.h>

#define OLDEST_CAPABILITY 80 /* bf16 tensor cores, cp.async */

/* ---- errors ---- */

static cudaError_t find_entry(void **out, const char *name)
{
    enum cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    *out = NULL;
    /* As CUDA 12.0 had it, where the youngest of those we ask for was new. */
#if CUDART_VERSION >= 12050
    cudaError_t error =
        cudaGetDriverEntryPointByVersion(name, out, 12000, cudaEnableDefault, &found);
#else
    cudaError_t error = cudaGetDriverEntryPoint(name, out, cudaEnableDefault, &found);
#endif
    if (found != cudaDriverEntryPointSuccess)
        *out = NULL;
    return error;
}

/* Asking cudart how much is free would make a context where none is current. */
static bool has_context(void)
{
    void *get;
    CUcontext now = NULL;
    if (find_entry(&get, "cuCtxGetCurrent") != cudaSuccess)
        (void)cudaGetLastError();
    return get != NULL && ((__typeof__(&cuCtxGetCurrent))get)(&now) == CUDA_SUCCESS && now != NULL;
}

/* A driver's own needs, streams and kernels and graphs, have no size that could be told. */
static mil_status out_of_memory(const char *what)
{
    size_t is_free, total;
    const char *name = cudaGetErrorName(cudaErrorMemoryAllocation);
    if (!has_context())
        return mil_fail(MIL_ERR_MEMORY,
                        "cuda: %s: out of memory (%s), where a context takes some 0.5 GiB of a "
                        "GPU",
                        what, name);
    if (cudaMemGetInfo(&is_free, &total) != cudaSuccess) {
        (void)cudaGetLastError();
        return mil_fail(MIL_ERR_MEMORY, "cuda: %s: out of memory (%s)", what, name);
    }
    return mil_fail(MIL_ERR_MEMORY, "cuda: %s: out of memory (%s), %s of %s are free", what, name,
                    mil_memory_show(is_free).text, mil_memory_show(total).text);
}

/* A GPU for which there is PTX alone needs a driver of this toolkit's very version. */
static mil_status old_compiler(const char *what)
{
    int has = 0;
    (void)cudaDriverGetVersion(&has);
    return mil_fail(MIL_ERR_DEVICE,
                    "cuda: %s: the NVIDIA driver is for CUDA %d.%d, expected CUDA %d.%d or newer, "
                    "since it must compile the kernels for this GPU from PTX",
                    what, has / 1000, has % 1000 / 10, CUDART_VERSION / 1000,
                    CUDART_VERSION % 1000 / 10);
}

mil_status mil_cuda_status(cudaError_t error, const char *what)
{
    if (error == cudaSuccess)
        return MIL_OK;
    (void)cudaGetLastError();
    if (error == cudaErrorMemoryAllocation)
        return out_of_memory(what);
    if (error == cudaErrorUnsupportedPtxVersion)
        return old_compiler(what);
    return mil_fail(MIL_ERR_DEVICE, "cuda: %s: %s (%s)", what, cudaGetErrorString(error),
                    cudaGetErrorName(error));
}

static mil_status count_failed(cudaError_t error)
{
    int has = 0;
    int needs = CUDART_VERSION / 1000;
    (void)cudaGetLastError();
    if (error == cudaErrorNoDevice)
        return mil_fail(MIL_ERR_DEVICE, "cuda: the driver shows no device, expected one or more");
    if (cudaDriverGetVersion(&has) != cudaSuccess || has == 0)
        return mil_fail(MIL_ERR_DEVICE,
                        "cuda: found no NVIDIA driver (libcuda.so.1), expected one for CUDA %d.0 "
                        "or newer",
                        needs);
    if (error == cudaErrorInsufficientDriver)
        return mil_fail(MIL_ERR_DEVICE,
                        "cuda: the NVIDIA driver is for CUDA %d.%d, expected CUDA %d.0 or newer",
                        has / 1000, has % 1000 / 10, needs);
    return mil_cuda_status(error, "counting devices");
}

mil_status mil_cuda_count(int32_t *n_devices)
{
    int n = 0;
    cudaError_t error = cudaGetDeviceCount(&n);
    if (error == cudaSuccess && n == 0)
        error = cudaErrorNoDevice;
    if (error != cudaSuccess)
        return count_failed(error);
    *n_devices = n;
    return MIL_OK;
}

mil_status mil_cuda_check_capability(const char *label, int32_t major, int32_t minor)
{
    return 10 * major + minor >= OLDEST_CAPABILITY
               ? MIL_OK
               : mil_fail(MIL_ERR_DEVICE,
                          "%s: compute capability is %d.%d, expected %d.%d or newer", label, major,
                          minor, OLDEST_CAPABILITY / 10, OLDEST_CAPABILITY % 10);
}

/* Makes no context. */
static mil_status check_device(int32_t ordinal)
{
    int major, minor;
    char label[24];
    MIL_CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal));
    MIL_CUDA_TRY(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal));
    (void)snprintf(label, sizeof label, "cuda:%d", ordinal);
    return mil_cuda_check_capability(label, major, minor);
}

/* Why there is none: each one's reason. */
mil_status mil_cuda_find_device(int32_t *ordinal)
{
    int32_t n_devices;
    char reasons[900] = "";
    *ordinal = 0;
    MIL_TRY(mil_cuda_count(&n_devices));
    for (int32_t i = 0; i < n_devices; i++) {
        if (check_device(i) == MIL_OK) {
            *ordinal = i;
            return MIL_OK;
        }
        size_t used = strlen(reasons);
        (void)snprintf(reasons + used, sizeof reasons - used, "%s%s", used > 0 ? "; " : "",
                       mil_status_message());
    }
    return mil_fail(MIL_ERR_DEVICE, "%s", reasons);
}

/* ---- on the right device ---- */

mil_status mil_cuda_driver_find(void **out, const char *name)
{
    MIL_CUDA_TRY(find_entry(out, name));
    return *out != NULL
               ? MIL_OK
               : mil_fail(MIL_ERR_DEVICE,
                          "cuda: the driver has no %s, expected that of CUDA 12.0 or newer", name);
}

/* The driver numbers its errors as cudart does. */
static mil_status driver_status(CUresult result, const char *what)
{
    return mil_cuda_status((cudaError_t)result, what);
}

/* The primary context, which is cudart's and torch's too. It stays for the process: what cudart
 * keeps of our kernels is bound to it. */
mil_status mil_cuda_find_context(mil_queue *queue)
{
    void *retain;
    CUcontext context;
    char what[48];
    MIL_TRY(mil_cuda_driver_find(&queue->get_context, "cuCtxGetCurrent"));
    MIL_TRY(mil_cuda_driver_find(&queue->set_context, "cuCtxSetCurrent"));
    MIL_TRY(mil_cuda_driver_find(&retain, "cuDevicePrimaryCtxRetain"));
    (void)snprintf(what, sizeof what, "making a context on cuda:%d", queue->ordinal);
    /* A device's handle is its ordinal. */
    MIL_TRY(driver_status(
        ((__typeof__(&cuDevicePrimaryCtxRetain))retain)(&context, (CUdevice)queue->ordinal), what));
    queue->context = context;
    return MIL_OK;
}

static mil_status set_context(const mil_queue *queue, void *context)
{
    const __typeof__(&cuCtxSetCurrent) set = (__typeof__(&cuCtxSetCurrent))queue->set_context;
    return driver_status(set((CUcontext)context), "cuCtxSetCurrent");
}

mil_status mil_cuda_enter(const mil_queue *queue, void **was)
{
    CUcontext now;
    const __typeof__(&cuCtxGetCurrent) get = (__typeof__(&cuCtxGetCurrent))queue->get_context;
    MIL_TRY(driver_status(get(&now), "cuCtxGetCurrent"));
    *was = now;
    return now == queue->context ? MIL_OK : set_context(queue, queue->context);
}

mil_status mil_cuda_leave(const mil_queue *queue, void *was, mil_status status)
{
    if (was == queue->context)
        return status;
    /* The first failure is the one to tell. */
    if (status == MIL_OK)
        return set_context(queue, was);
    char first[1024];
    (void)snprintf(first, sizeof first, "%s", mil_status_message());
    if (set_context(queue, was) != MIL_OK)
        return mil_fail(status, "%s", first);
    return status;
}

mil_status mil_cuda_begin_call(const mil_queue *queue, mil_cuda_call *it)
{
    MIL_TRY(mil_cuda_enter(queue, &it->was));
    it->mode = cudaStreamCaptureModeRelaxed;
    (void)cudaThreadExchangeStreamCaptureMode(&it->mode);
    return MIL_OK;
}

mil_status mil_cuda_end_call(const mil_queue *queue, mil_cuda_call *it, mil_status status)
{
    (void)cudaThreadExchangeStreamCaptureMode(&it->mode);
    return mil_cuda_leave(queue, it->was, status);
}
