/* A checkpoint of a few tensors in one temporary file, for tests of what reads them. Tensors lie at
 * odd offsets, since readers may not count on alignment. */
#pragma once

#include "milpy.h"
#include "test.h"

#include <math.h>
#include <stdlib.h>
#include <unistd.h>

#define CHECKPOINT_MAX_TENSORS 32

typedef struct checkpoint {
    char path[64];
    unsigned char *bytes;
    mil_file_info file;
    mil_tensor_info tensors[CHECKPOINT_MAX_TENSORS];
    mil_checkpoint_info info;
} checkpoint;

static inline void checkpoint_init(checkpoint *c)
{
    memset(c, 0, sizeof *c);
    strcpy(c->path, "/tmp/milpy-test-XXXXXX");
    int fd = mkstemp(c->path);
    CHECK(fd >= 0);
    close(fd);
    c->file.path = c->path;
    c->info.files = &c->file;
    c->info.n_files = 1;
    c->info.tensors = c->tensors;
}

/* Add rows x cols elements (cols 0: rank 1) and return where to fill them in. */
static inline void *checkpoint_add(checkpoint *c, const char *name, mil_dtype dtype, int64_t rows,
                                   int64_t cols)
{
    int64_t n = rows * (cols == 0 ? 1 : cols);
    size_t n_bytes = (size_t)n * mil_dtype_bytes(dtype);
    uint64_t begin = c->file.n_bytes + 13;
    CHECK(c->info.n_tensors < CHECKPOINT_MAX_TENSORS);
    c->tensors[c->info.n_tensors++] = (mil_tensor_info){.name = name,
                                                        .dtype = dtype,
                                                        .rank = cols == 0 ? 1 : 2,
                                                        .shape = {rows, cols == 0 ? 1 : cols},
                                                        .begin = begin,
                                                        .end = begin + n_bytes};
    c->file.n_bytes = begin + n_bytes;
    c->bytes = realloc(c->bytes, c->file.n_bytes);
    CHECK(c->bytes != NULL);
    memset(c->bytes + begin - 13, 0xee, 13);
    return c->bytes + begin;
}

static inline void checkpoint_write(const checkpoint *c)
{
    FILE *file = fopen(c->path, "wb");
    CHECK(file != NULL);
    size_t n = fwrite(c->bytes, 1, c->file.n_bytes, file);
    CHECK(fclose(file) == 0 && n == c->file.n_bytes);
}

static inline void checkpoint_free(checkpoint *c)
{
    (void)unlink(c->path);
    free(c->bytes);
    memset(c, 0, sizeof *c);
}

/* ---- values: a test's own arithmetic, not the core's ---- */

static inline double test_random(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (double)(*state >> 33) / (double)(1u << 30) - 1.0;
}

static inline double test_double_of(const void *at, mil_dtype dtype)
{
    uint32_t wide = 0;
    float value;
    memcpy(&wide, at, mil_dtype_bytes(dtype));
    if (dtype == MIL_DTYPE_F16) {
        int exponent = (wide >> 10) & 31;
        double fraction = (double)(wide & 1023) / 1024;
        double magnitude = exponent == 31  ? (fraction == 0 ? INFINITY : NAN)
                           : exponent == 0 ? ldexp(fraction, -14)
                                           : ldexp(1 + fraction, exponent - 15);
        return wide & 0x8000 ? -magnitude : magnitude;
    }
    if (dtype == MIL_DTYPE_BF16)
        wide <<= 16;
    memcpy(&value, &wide, sizeof value);
    return (double)value;
}

/* The bfloat16 nearest to a finite value of its normal range; ties to even by nearbyint. */
static inline uint16_t test_bf16_of(double value)
{
    int exponent;
    float rounded = 0;
    if (value != 0) {
        double fraction = frexp(value, &exponent);
        rounded = (float)ldexp(nearbyint(ldexp(fraction, 8)), exponent - 8);
    }
    uint32_t bits;
    memcpy(&bits, &rounded, sizeof bits);
    return (uint16_t)(bits >> 16);
}

/* Fill n elements with values in (-1, 1) of dtype. */
static inline void test_fill(void *at, mil_dtype dtype, int64_t n, uint64_t seed)
{
    uint64_t state = seed * 2654435761u + 1;
    for (int64_t i = 0; i < n; i++) {
        double value = test_random(&state);
        float single = (float)value;
        uint16_t half = test_bf16_of(value);
        if (dtype ==
            MIL_DTYPE_F16) /* any bits of a number below 2: sign, exponent < 16, fraction */
            half = (uint16_t)((int64_t)(value * 16384) & 0xbfff);
        const void *source = dtype == MIL_DTYPE_F32 ? (void *)&single : (void *)&half;
        memcpy((char *)at + (size_t)i * mil_dtype_bytes(dtype), source, mil_dtype_bytes(dtype));
    }
}
