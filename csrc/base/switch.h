/* Switches of the environment: MILPY_CHECK and its like, CONTRIBUTING.md's table. */
#pragma once

#include "base/status.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What the variable says: 1 on, 0 off, unset or empty `otherwise`. Anything else is
 * MIL_ERR_ARGUMENT, since who wrote it meant something by it. *is_on is set on MIL_OK only. Any
 * thread, as long as none changes the environment. */
mil_status mil_switch_read(bool *is_on, const char *name, bool otherwise) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
