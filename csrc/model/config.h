/* What a mil_config must hold whatever the family, before anything is sized from it. */
#pragma once

#include "milpy.h"

#ifdef __cplusplus
extern "C" {
#endif

/* MIL_ERR_ARGUMENT (or _UNSUPPORTED, for a known quantity that no kernel serves) naming the field,
 * its value and what is served. */
mil_status mil_config_check(const mil_config *config) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
