/* A device's memory as numbers: what KV pages may take of it, and what all of it went to. Knows no
 * model, so that it is tested without one. */
#pragma once

#include "model/runner.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes that KV pages may take by default, of memory as it is now; to_take: what else is still to
 * be taken. On the host half of what that leaves, because the page cache, Python and a second
 * engine want some too. On a device what it leaves of gpu_memory_utilization, rounded down so that
 * the driver can round up. */
uint64_t mil_budget_left(const mil_engine_options *options, const mil_model_memory *memory,
                         size_t to_take);

typedef struct mil_budget_text {
    char text[384];
} mil_budget_text;

/* Where the number of mil_budget_left comes from, for messages; workspace_bytes: taken or not. */
mil_budget_text mil_budget_explain(const mil_engine_options *options,
                                   const mil_model_memory *memory, size_t workspace_bytes);

/* All of the memory, whose rows sum up to total_bytes. */
void mil_budget_report(mil_memory_report *out, const mil_model_memory *memory,
                       const mil_runner_memory *runner);

#ifdef __cplusplus
}
#endif
