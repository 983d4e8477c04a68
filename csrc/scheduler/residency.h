/* Which adapter content lies in which adapter slot, and how many sequences pin it there.
 *
 * One tier: contents live in host memory, a slot is a row of descriptors. A content is forgotten
 * with its last pin, because its id may then be given to another adapter; who pins holds a
 * reference on the content for at least as long. */
#pragma once

#include "base/status.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_residency {
    int32_t n_slots;
    int32_t n_pins;    /* over all slots */
    int32_t *contents; /* [n_slots]; MIL_NO_ADAPTER where nothing is pinned */
    int32_t *pins;     /* [n_slots] */
} mil_residency;

/* n_slots >= 1. On failure *residency is zeroed. */
mil_status mil_residency_init(mil_residency *residency, int32_t n_slots) MIL_WARN_UNUSED;
void mil_residency_deinit(mil_residency *residency);

/* Pin content (>= 0); returns its slot, or -1 when every slot is pinned by others. *is_new: the
 * slot held something else before, and the next plan must say what it holds now. */
int32_t mil_residency_pin(mil_residency *residency, int32_t content, bool *is_new);
void mil_residency_unpin(mil_residency *residency, int32_t slot);

#ifdef __cplusplus
}
#endif
