/* NVIDIA's shared libraries, found at run time: in the system, the toolkit or the nvidia-* wheels.
 */
#pragma once

#include "base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One more directory to look in (a wheel's lib folder), after the system's and the toolkit's. Call
 * before a queue is opened. The text is copied, a repeated one is ignored, and what does not fit
 * (16 directories of 1,023 bytes) is left out. Any thread. */
void mil_cuda_add_library_dir(const char *dir);

/* dlopen the first of `names` (best first, NULL last) that there is: by its name alone (loaded
 * already, or where the system looks), in the toolkits $CUDA_HOME and /usr/local/cuda (the first of
 * lib64, lib and targets/x86_64-linux/lib that has it; targets/sbsa-linux/lib on Arm) and in the
 * added directories. Where the environment variable `variable` is set, only the path that it holds.
 * MIL_ERR_DEVICE names every place tried, and why files that are there did not load. */
mil_status mil_cuda_library_open(void **out, const char *variable, const char *const *names)
    MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
