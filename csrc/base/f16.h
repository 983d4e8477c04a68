/* IEEE half -> float32, exactly. */
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

static inline float mil_f16_to_float(uint16_t bits)
{
    uint32_t magnitude = bits & 0x7fffu;
    /* Subnormals are multiples of 2^-24: an exact product, and a normal float32. */
    float value = (float)magnitude * 0x1p-24f;
    uint32_t wide;
    memcpy(&wide, &value, sizeof wide);
    if (magnitude >= 0x0400u)
        wide = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
    wide |= (uint32_t)(bits & 0x8000u) << 16;
    memcpy(&value, &wide, sizeof value);
    return value;
}

#ifdef __cplusplus
}
#endif
