#include "scheduler/residency.h"

#include "base/memory.h"
#include "milpy.h"

#include <assert.h>
#include <string.h>

mil_status mil_residency_init(mil_residency *residency, int32_t n_slots)
{
    assert(n_slots >= 1);
    memset(residency, 0, sizeof *residency);
    residency->n_slots = n_slots;
    residency->contents = mil_alloc((size_t)n_slots, sizeof *residency->contents);
    residency->pins = mil_alloc((size_t)n_slots, sizeof *residency->pins);
    if (residency->contents == NULL || residency->pins == NULL) {
        mil_residency_deinit(residency);
        return mil_fail(MIL_ERR_MEMORY, "residency: no memory for %d adapter slots", n_slots);
    }
    for (int32_t i = 0; i < n_slots; i++)
        residency->contents[i] = MIL_NO_ADAPTER;
    return MIL_OK;
}

void mil_residency_deinit(mil_residency *residency)
{
    mil_free(residency->contents);
    mil_free(residency->pins);
    memset(residency, 0, sizeof *residency);
}

int32_t mil_residency_pin(mil_residency *residency, int32_t content, bool *is_new)
{
    assert(content >= 0);
    int32_t slot = -1;
    for (int32_t i = 0; i < residency->n_slots; i++) {
        if (residency->contents[i] == content) {
            slot = i;
            break;
        }
        if (slot < 0 && residency->pins[i] == 0)
            slot = i;
    }
    if (slot < 0)
        return -1;
    *is_new = residency->pins[slot] == 0;
    residency->contents[slot] = content;
    residency->pins[slot]++;
    residency->n_pins++;
    return slot;
}

void mil_residency_unpin(mil_residency *residency, int32_t slot)
{
    assert(slot >= 0 && slot < residency->n_slots && residency->pins[slot] > 0);
    residency->n_pins--;
    if (--residency->pins[slot] == 0)
        residency->contents[slot] = MIL_NO_ADAPTER;
}
