#include "engine/budget.h"

#include "base/memory.h"

#include <stdio.h>

/* What a driver deals device memory out by. */
#define DEVICE_CHUNK ((uint64_t)2 << 20)

/* a - b, or 0: numbers that were measured one after another need not fit together. */
static uint64_t beyond(uint64_t a, uint64_t b)
{
    return a > b ? a - b : 0;
}

static uint64_t smaller(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static uint64_t share_of(const mil_engine_options *options, const mil_model_memory *memory)
{
    return (uint64_t)((double)memory->n_total * options->gpu_memory_utilization);
}

uint64_t mil_budget_left(const mil_engine_options *options, const mil_model_memory *memory,
                         size_t to_take)
{
    if (!memory->is_device)
        return beyond(memory->n_free, to_take) / 2;
    uint64_t in_use = beyond(memory->n_total, memory->n_free);
    uint64_t left = beyond(beyond(share_of(options, memory), in_use), to_take);
    return left - left % DEVICE_CHUNK;
}

mil_budget_text mil_budget_explain(const mil_engine_options *options,
                                   const mil_model_memory *memory, size_t workspace_bytes)
{
    mil_budget_text out;
    if (!memory->is_device)
        (void)snprintf(out.text, sizeof out.text, "half of the %s free beside %s of workspace",
                       mil_memory_show(memory->n_free).text, mil_memory_show(workspace_bytes).text);
    else
        (void)snprintf(
            out.text, sizeof out.text,
            "gpu_memory_utilization %g of the %s of %s is %s; weights take %s, adapters %s, "
            "workspace %s, and %s of the %s are free",
            options->gpu_memory_utilization, mil_memory_show(memory->n_total).text, memory->device,
            mil_memory_show(share_of(options, memory)).text,
            mil_memory_show(memory->weight_bytes).text, mil_memory_show(memory->adapter_bytes).text,
            mil_memory_show(workspace_bytes).text, mil_memory_show(memory->n_free).text,
            mil_memory_show(memory->n_total).text);
    return out;
}

void mil_budget_report(mil_memory_report *out, const mil_model_memory *memory,
                       const mil_runner_memory *runner)
{
    *out = (mil_memory_report){
        .device = memory->device,
        .weight_bytes = memory->weight_bytes,
        .kv_bytes = runner->kv_bytes,
        .adapter_bytes = memory->adapter_bytes,
        .workspace_bytes = runner->workspace_bytes,
        /* A host's page that nothing has touched is promised to its row and free in the system. */
        .free_bytes = beyond(memory->n_free, runner->untouched_bytes),
        .total_bytes = memory->n_total,
        .pinned_bytes = runner->pinned_bytes,
    };
    uint64_t rest =
        beyond(out->total_bytes, out->weight_bytes + out->kv_bytes + out->adapter_bytes +
                                     out->workspace_bytes + out->free_bytes);
    out->graph_bytes = smaller(memory->library_bytes + runner->graph_bytes, rest);
    out->other_bytes = rest - out->graph_bytes;
}
