#include "chaos.h"

#include "base/hash.h"
#include "ops/chaos.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MOST_SLEEP_NS 1000000

static const char *const names[MIL_CHAOS_N_KINDS] = {"delays", "sleeps", "late",   "device",
                                                     "pdl",    "side",   "splits", "bias"};
static atomic_int n_happened[MIL_CHAOS_N_KINDS];

bool mil_chaos_is_on(mil_chaos_kind kind)
{
    const char *list = getenv("MILPY_CHAOS");
    return list != NULL && strstr(list, names[kind]) != NULL;
}

uint64_t mil_chaos_draw(uint64_t n)
{
    static _Thread_local uint64_t n_drawn;
    const char *seed = getenv("MILPY_CHAOS_SEED");
    uint64_t from = seed != NULL ? strtoull(seed, NULL, 10) : 0;
    return mil_counter_hash(from, 0, n_drawn++) % n;
}

void mil_chaos_count(mil_chaos_kind kind)
{
    n_happened[kind]++;
}

void mil_chaos_sleep(void)
{
    if (!mil_chaos_is_on(MIL_CHAOS_SLEEPS) || mil_chaos_draw(4) > 0)
        return;
    const struct timespec pause = {.tv_nsec = (long)mil_chaos_draw(MOST_SLEEP_NS)};
    mil_chaos_count(MIL_CHAOS_SLEEPS);
    (void)nanosleep(&pause, NULL);
}

bool mil_chaos_is_late(void)
{
    if (!mil_chaos_is_on(MIL_CHAOS_LATE) || mil_chaos_draw(2) > 0)
        return false;
    mil_chaos_count(MIL_CHAOS_LATE);
    return true;
}

__attribute__((destructor)) static void say_what_happened(void)
{
    (void)fprintf(stderr, "chaos:");
    for (int kind = 0; kind < MIL_CHAOS_N_KINDS; kind++)
        (void)fprintf(stderr, " %s=%d", names[kind], n_happened[kind]);
    (void)fprintf(stderr, "\n");
}
