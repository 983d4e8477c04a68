/* attention_simd.c once more, over pages of float16. */
#define MIL_ATTENTION_F16 1
#include "cpu/attention_simd.c"
