/* What the fuzzers share: a seeded generator, a clock, and integers that readers get wrong. A
 * fuzzer is a plain main: fuzz_x [seconds] [seed]. It aborts at the first wrong answer and prints
 * how to repeat it; the sanitizers find the rest. */
#pragma once

#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

typedef struct fuzz {
    uint64_t seed;  /* of the round now running */
    uint64_t state; /* of the generator */
    uint64_t n_rounds;
    double end;
} fuzz;

static inline double fuzz_seconds(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static inline fuzz fuzz_begin(int argc, char **argv)
{
    return (fuzz){.state = 1,
                  .seed = argc > 2 ? strtoull(argv[2], NULL, 10) - 1 : 0,
                  .end = fuzz_seconds() + (argc > 1 ? atof(argv[1]) : 10.0)};
}

/* Whether to do another round. Each has a seed of its own, so that one can be repeated alone. */
static inline bool fuzz_next(fuzz *f)
{
    if (f->n_rounds > 0 && fuzz_seconds() >= f->end)
        return false;
    f->seed++;
    f->n_rounds++;
    f->state = f->seed * 0x9e3779b97f4a7c15u;
    return true;
}

static inline uint64_t fuzz_bits(fuzz *f)
{
    f->state ^= f->state >> 12;
    f->state ^= f->state << 25;
    f->state ^= f->state >> 27;
    return f->state * 0x2545f4914f6cdd1du;
}

/* 0 .. n - 1 */
static inline int fuzz_below(fuzz *f, int n)
{
    return (int)(fuzz_bits(f) % (uint64_t)n);
}

/* A number near a power of two, of either sign, or any bits. */
static inline uint64_t fuzz_integer(fuzz *f)
{
    uint64_t near = ((uint64_t)1 << fuzz_below(f, 64)) + (uint64_t)fuzz_below(f, 5) - 2;
    switch (fuzz_below(f, 4)) {
    case 0:
        return fuzz_bits(f);
    case 1:
        return ~near + 1;
    case 2:
        return (uint64_t)fuzz_below(f, 9) - 4;
    default:
        return near;
    }
}

#define FUZZ_CHECK(f, cond)                                                                        \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            printf("%s:%d: %s is false; repeat with: 0 %" PRIu64 "\n", __FILE__, __LINE__, #cond,  \
                   (f)->seed);                                                                     \
            (void)fflush(stdout);                                                                  \
            abort();                                                                               \
        }                                                                                          \
    } while (0)
