/* How far a load is, and whether it should go on: three atomics between the loading threads and
 * whoever watches (mil_progress_* in milpy.h). No callbacks. Every function takes NULL. */
#pragma once

#include "milpy.h"

#ifdef __cplusplus
extern "C" {
#endif

void mil_progress_set_total(mil_progress *progress, uint64_t n_bytes);
void mil_progress_add(mil_progress *progress, uint64_t n_bytes);
bool mil_progress_is_cancelled(const mil_progress *progress);

#ifdef __cplusplus
}
#endif
