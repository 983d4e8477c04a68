/* What this machine can do at best, measured in the round that a figure is judged in.
 *
 * read: bytes a second of a buffer past the cache, best of several loops (width, streams,
 * prefetch).
 *
 * bf16 peak: the better of a vdpbf16ps loop and an fp32 fma loop at the widest vectors: the fastest
 * way to multiply bf16 numbers with vector instructions here (on some Intel parts fp32 fma is twice
 * as quick as vdpbf16ps; on AMD it is the other way). AMX is not counted: milpy does not use it,
 * because its order of sums would give other bits.
 *
 * cpus [n_threads]: where the threads are pinned. */
#pragma once

#include <stddef.h>

double roof_read_gbs(const void *buffer, size_t n_bytes, int n_threads, const int *cpus);
double roof_copy_gbs(void *to, const void *from, size_t n_bytes, int n_threads, const int *cpus);
double roof_bf16_gflops(int n_threads, const int *cpus);
double roof_fp32_avx2_gflops(int n_threads, const int *cpus);
/* The clock that all figures are taken by. */
double roof_clock_s(void);
/* n_bytes of random bytes on huge pages, kept until the process ends; NULL: there is no room. */
void *roof_buffer(size_t n_bytes);
