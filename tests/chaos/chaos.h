/* What the bodies of ops/chaos.h share. MILPY_CHAOS lists what happens, by the names of the kinds;
 * MILPY_CHAOS_SEED says when and for how long. Each thread draws its own numbers in its own order,
 * so that a loop that makes the same calls meets the same chaos. How often each kind happened is
 * said on stderr when the process ends; some happen unasked, and are only counted (launches.c). */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum mil_chaos_kind {
    MIL_CHAOS_DELAYS = 0, /* kernels that take time, before ops of a GPU */
    MIL_CHAOS_SLEEPS,     /* of the host, around a submit and after a wait */
    MIL_CHAOS_LATE,       /* the host hears of a step's end when all that is queued has run */
    MIL_CHAOS_DEVICE,     /* the CPU's ops run late, as a device's do (late_cpu.c) */
    MIL_CHAOS_PDL,        /* counted: launches that may start before the one before has ended */
    MIL_CHAOS_SIDE,       /* counted: LoRA's shrinks on the second stream */
    MIL_CHAOS_SPLITS,     /* counted: launches that add up a product's splits */
    MIL_CHAOS_BIAS,       /* counted: launches that round a bias into the workspace */
    MIL_CHAOS_N_KINDS,
} mil_chaos_kind;

bool mil_chaos_is_on(mil_chaos_kind kind);
/* The calling thread's next number below n. */
uint64_t mil_chaos_draw(uint64_t n);
void mil_chaos_count(mil_chaos_kind kind);

#ifdef __cplusplus
}
#endif
