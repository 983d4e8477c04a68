/* The read roof of a GPU, one pass over a buffer at a time. */
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Queue one read of n_bytes at data on stream. sink: 4 bytes on the device. */
cudaError_t bench_read(cudaStream_t stream, const void *data, size_t n_bytes, unsigned *sink,
                       int n_sms);

#ifdef __cplusplus
}
#endif
