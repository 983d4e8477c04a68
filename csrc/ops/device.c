#include "ops/device.h"

mil_status mil_device_check_room(const mil_device *device, struct mil_queue *queue,
                                 uint64_t n_bytes, const char *needs)
{
    mil_device_memory memory;
    MIL_TRY(device->memory(queue, &memory));
    if (n_bytes <= memory.n_free)
        return MIL_OK;
    return mil_fail(MIL_ERR_MEMORY, "%s %s, %s has %s free of %s: %s too few", needs,
                    mil_memory_show(n_bytes).text, memory.name, mil_memory_show(memory.n_free).text,
                    mil_memory_show(memory.n_total).text,
                    mil_memory_show(n_bytes - memory.n_free).text);
}
