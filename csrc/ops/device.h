/* What every user of a device's memory asks before it takes some. */
#pragma once

#include "ops/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* MIL_ERR_MEMORY where n_bytes are more than the device has free, with both figures and how much is
 * missing. needs: who needs them, "adapter: needs". */
mil_status mil_device_check_room(const mil_device *device, struct mil_queue *queue,
                                 uint64_t n_bytes, const char *needs) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
