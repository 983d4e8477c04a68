/* Where backends look for what they load at run time. */
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

/* One more directory for NVIDIA's libraries (a wheel's lib folder). Nothing in a build without
 * CUDA. Before a queue is opened; the text is copied, a repeated one ignored. Any thread. */
void mil_backend_add_library_dir(const char *dir);

/* What it passes the directory to. */
void mil_cuda_add_library_dir(const char *dir);

#ifdef __cplusplus
}
#endif
