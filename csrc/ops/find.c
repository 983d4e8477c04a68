/* The one place that knows which backends a build has. */
#include "ops/find.h"

#include "ops/borrow.h"

#include <string.h>

#ifndef MIL_WITH_CUDA
static mil_status no_cuda(void)
{
    return mil_fail(
        MIL_ERR_DEVICE,
        "this build has no CUDA, expected one by `make MILPY_CUDA=1`, which says what of "
        "nvcc, g++ and CUDA's headers it does not find");
}
#endif

mil_status mil_backend_find(const mil_backend **out, const char *device)
{
    if (strcmp(device, "cpu") == 0)
        return mil_cpu_backend_find(out);
    if (strcmp(device, "cuda") != 0)
        return mil_fail(MIL_ERR_ARGUMENT, "device is \"%s\", expected \"cpu\" or \"cuda\"", device);
#ifdef MIL_WITH_CUDA
    return mil_cuda_backend_find(out);
#else
    return no_cuda();
#endif
}

bool mil_backend_has_cuda(void)
{
#ifdef MIL_WITH_CUDA
    return true;
#else
    return false;
#endif
}

mil_status mil_backend_count_gpus(int32_t *n_gpus)
{
#ifdef MIL_WITH_CUDA
    return mil_cuda_count(n_gpus);
#else
    *n_gpus = 0;
    return no_cuda();
#endif
}

mil_status mil_backend_find_gpu(int32_t *ordinal)
{
#ifdef MIL_WITH_CUDA
    return mil_cuda_find_device(ordinal);
#else
    *ordinal = 0;
    return no_cuda();
#endif
}

mil_status mil_backend_report_gpu(mil_gpu_report *report, int32_t ordinal)
{
#ifdef MIL_WITH_CUDA
    return mil_cuda_report(report, ordinal);
#else
    (void)ordinal;
    memset(report, 0, sizeof *report);
    return no_cuda();
#endif
}

void mil_backend_add_library_dir(const char *dir)
{
#ifdef MIL_WITH_CUDA
    mil_cuda_add_library_dir(dir);
#else
    (void)dir;
#endif
}

const mil_borrow *mil_backend_borrow(const mil_backend *backend)
{
#ifdef MIL_WITH_CUDA
    if (!backend->device->is_host)
        return &mil_cuda_borrow;
#endif
    (void)backend;
    return &mil_host_borrow;
}
