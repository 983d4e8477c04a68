/* What the host's files share: the driver and its devices (driver.c), the device's calls
 * (device.c), and what single kernels serve them. */
#pragma once

#include "kernels/cuda.h"
#include "ops/find.h"

#ifdef __cplusplus
extern "C" {
#endif

extern const mil_device mil_cuda_device;

/* A function of the driver's, which is never linked. */
mil_status mil_cuda_driver_find(void **out, const char *name) MIL_WARN_UNUSED;

/* label: the device, for the message. */
mil_status mil_cuda_check_capability(const char *label, int32_t major, int32_t minor)
    MIL_WARN_UNUSED;
/* queue's context, from its ordinal, and how to make it current. */
mil_status mil_cuda_find_context(mil_queue *queue) MIL_WARN_UNUSED;

/* A thread's current device is its own affair: queue's is made current, and what was is put back.
 * By contexts, since cudaSetDevice would make one on a device that the thread has never used. */
mil_status mil_cuda_enter(const mil_queue *queue, void **was) MIL_WARN_UNUSED;
/* Put `was` back; returns status. */
mil_status mil_cuda_leave(const mil_queue *queue, void *was, mil_status status) MIL_WARN_UNUSED;

/* A call that is no op: on the right device, and what a capture forbids to other threads is allowed
 * while it runs. */
typedef struct mil_cuda_call {
    void *was;
    enum cudaStreamCaptureMode mode;
} mil_cuda_call;

mil_status mil_cuda_begin_call(const mil_queue *queue, mil_cuda_call *it) MIL_WARN_UNUSED;
/* Returns status. */
mil_status mil_cuda_end_call(const mil_queue *queue, mil_cuda_call *it, mil_status status);

/* mil_backend's pack and pack_dummy. */
mil_status mil_cuda_pack(struct mil_queue *queue, mil_weight *weight, int32_t part, int32_t row,
                         int32_t n_rows, void *src, mil_dtype dtype, int64_t src_stride);
mil_status mil_cuda_pack_dummy(struct mil_queue *queue, mil_weight *weight, int32_t part,
                               int32_t row, int32_t n_rows, uint64_t stream, uint64_t begin,
                               int64_t stride);

/* n_bytes of device memory to pinned host memory, both 4-byte aligned, on the queue's stream. */
mil_status mil_cuda_send_out(mil_queue *queue, void *host, const void *device, size_t n_bytes);
/* Its kernel is loaded now: no step's warm-up runs it. */
mil_status mil_cuda_send_load(void);
/* n 16-bit words of device memory, 2-byte aligned, on the queue's stream. */
mil_status mil_cuda_fill_16(mil_queue *queue, void *device, uint16_t word, size_t n);
/* The architecture that the kernels now loaded were written for, as PTX counts: 80, 90. */
mil_status mil_cuda_kernels_arch(int32_t *arch) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
