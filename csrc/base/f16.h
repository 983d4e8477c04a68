/* IEEE half <-> float32: widened exactly, rounded to nearest even. */
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

/* As vcvtps2ph: from 65520 on infinite, below 2^-14 subnormal; a NaN stays a NaN (quiet) with the
 * upper bits of its payload. */
static inline uint16_t mil_f16_from_float(float value)
{
    uint32_t bits, magnitude;
    memcpy(&bits, &value, sizeof bits);
    magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u | (magnitude >> 13 & 0x03ffu);
    } else if (magnitude >= 0x477ff000u) {
        half = 0x7c00u;
    } else if (magnitude >= 0x38800000u) {
        half = (magnitude + 0x0fffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
    } else {
        /* Beside 1/2 a float32's last place is 2^-24, as a subnormal half's is. */
        memcpy(&value, &magnitude, sizeof value);
        value += 0.5f;
        memcpy(&half, &value, sizeof half);
        half -= 0x3f000000u;
    }
    return (uint16_t)(half | (bits >> 16 & 0x8000u));
}

#ifdef __cplusplus
}
#endif
