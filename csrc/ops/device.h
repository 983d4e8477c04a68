/* What a device is called, and what every user of its memory asks before it takes some. */
#pragma once

#include "ops/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* "cpu", "cuda" (ordinal 0) or "cuda:N", N decimal without sign, space or leading zero. False for
 * any other name: what was expected is the caller's to say, who may know more of them. */
bool mil_device_parse(bool *is_cuda, int32_t *ordinal, const char *name);

/* MIL_ERR_MEMORY where n_bytes are more than the device has free, with both figures and how much is
 * missing. needs: who needs them, "adapter: needs". */
mil_status mil_device_check_room(const mil_device *device, struct mil_queue *queue,
                                 uint64_t n_bytes, const char *needs) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
