/* What this process may use of the machine: processors and memory, as the affinity mask and the
 * control groups (version 1 or 2) leave them. Read anew on each call. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* CPUs that a model should use, best first: one per physical core of the affinity mask, cut by the
 * cgroup quota (rounded up), written to cpus[max]. Returns how many (>= 1). */
int32_t mil_cpus_usable(int32_t *cpus, int32_t max);
/* CPUs in the affinity mask. */
int32_t mil_cpus_allowed(void);
/* CPU quota of the cgroup (v1 or v2); 0: none. */
double mil_cgroup_cpus(void);
/* Bytes this process may use in all: physical memory cut by the cgroup limits (v1 or v2). */
uint64_t mil_memory_limit_bytes(void);
/* Of those, bytes now free (MemAvailable, and the cgroup's limit less its usage; page cache counts
 * as free). */
uint64_t mil_memory_free_bytes(void);

#ifdef __cplusplus
}
#endif
