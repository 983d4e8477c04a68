/* Which backends a build has, what GPUs it finds, and where backends look for what they load at run
 * time. */
#pragma once

#include "base/status.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

bool mil_backend_has_cuda(void);

/* One more directory for NVIDIA's libraries (a wheel's lib folder). Nothing in a build without
 * CUDA. Before a queue is opened; the text is copied, a repeated one ignored. Any thread. */
void mil_backend_add_library_dir(const char *dir);

/* A GPU, and whether this build runs there. */
typedef struct mil_gpu_report {
    char name[64];
    int32_t compute_capability; /* 90 is 9.0 */
    int32_t driver_cuda;        /* newest CUDA that the driver runs: 13020 is 13.2 */
    int32_t build_cuda;         /* that this was built with */
    uint64_t total_bytes;
    char problem[1024]; /* why it does not run; "" where it does, and only then there is the rest */
    uint64_t free_bytes;
    char kernels[128];        /* which ones run, and why those */
    int64_t cublaslt_version; /* 131000 is 13.10.0 */
    char cublaslt_path[1024];
} mil_gpu_report;

/* Devices that the driver shows, at least one. MIL_ERR_DEVICE says what is missing: CUDA in this
 * build, a driver, a newer one, a device. */
mil_status mil_backend_count_gpus(int32_t *n_gpus) MIL_WARN_UNUSED;
/* What device "auto" is: the first whose compute capability there are kernels for. MIL_ERR_DEVICE
 * says why there is none. */
mil_status mil_backend_find_gpu(int32_t *ordinal) MIL_WARN_UNUSED;
/* Opens a queue there, so that a missing library is found as well. */
mil_status mil_backend_report_gpu(mil_gpu_report *report, int32_t ordinal) MIL_WARN_UNUSED;

/* What it passes them to. */
void mil_cuda_add_library_dir(const char *dir);
mil_status mil_cuda_count(int32_t *n_devices) MIL_WARN_UNUSED;
mil_status mil_cuda_find_device(int32_t *ordinal) MIL_WARN_UNUSED;
mil_status mil_cuda_report(mil_gpu_report *report, int32_t ordinal) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
