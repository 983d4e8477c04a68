/* Counter hashes: pure integer functions of their arguments, the same on every device.
 *
 * The mixer is the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom
 * number generators", OOPSLA 2014). Used for dummy weights and for sampling; not for security. */
#pragma once

#include <stdint.h>

/* nvcc compiles these for the device as well. */
#ifdef __CUDACC__
#define MIL_HASH_INLINE static __host__ __device__ inline
#else
#define MIL_HASH_INLINE static inline
#endif

#ifdef __cplusplus
extern "C" {
#endif

MIL_HASH_INLINE uint64_t mil_mix64(uint64_t z)
{
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* One 64-bit word for element `index` of stream (seed, stream). */
MIL_HASH_INLINE uint64_t mil_counter_hash(uint64_t seed, uint64_t stream, uint64_t index)
{
    return mil_mix64(mil_mix64(mil_mix64(seed) ^ stream) ^ index);
}

#ifdef __cplusplus
}
#endif
