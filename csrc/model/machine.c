#include "base/machine.h"
#include "milpy.h"
#include "ops/backend.h"

#include <string.h>

mil_status mil_machine_report_get(mil_machine_report *report)
{
    enum { MAX_CPUS = 1024 };
    int32_t cpus[MAX_CPUS];
    memset(report, 0, sizeof *report);
    MIL_TRY(mil_cpu_isa(&report->isa, &report->isa_available));
    report->n_threads = mil_cpus_usable(cpus, MAX_CPUS);
    report->n_cpus_affinity = mil_cpus_allowed();
    report->cgroup_cpus = mil_cgroup_cpus();
    report->memory_bytes = mil_memory_limit_bytes();
    report->memory_free_bytes = mil_memory_free_bytes();
    return MIL_OK;
}
