/* rope_simd.c once more, rounding to float16. */
#define MIL_ROPE_F16 1
#include "cpu/rope_simd.c"
