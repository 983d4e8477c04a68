#include "ops/device.h"

#include <string.h>

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

bool mil_device_parse(bool *is_cuda, int32_t *ordinal, const char *name)
{
    int64_t number = 0;
    const char *at = name + 5;
    *ordinal = 0;
    *is_cuda = strncmp(name, "cuda", 4) == 0;
    if (!*is_cuda)
        return strcmp(name, "cpu") == 0;
    if (name[4] == '\0')
        return true;
    if (name[4] != ':' || !is_digit(*at) || (*at == '0' && at[1] != '\0'))
        return false;
    for (; is_digit(*at) && number <= INT32_MAX; at++)
        number = 10 * number + (*at - '0');
    if (*at != '\0' || number > INT32_MAX)
        return false;
    *ordinal = (int32_t)number;
    return true;
}

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
