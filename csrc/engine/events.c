#include "engine/events.h"

#include "base/memory.h"

#include <assert.h>
#include <string.h>

mil_status mil_events_init(mil_events *events, size_t n_events)
{
    memset(events, 0, sizeof *events);
    void *ring;
    MIL_TRY(mil_alloc_checked(&ring, n_events, sizeof *events->ring, "events"));
    events->ring = ring;
    events->capacity = n_events;
    return MIL_OK;
}

void mil_events_deinit(mil_events *events)
{
    mil_free(events->ring);
    memset(events, 0, sizeof *events);
}

mil_status mil_events_reserve(mil_events *events, size_t n_more)
{
    size_t capacity = events->capacity;
    while (capacity - events->n < n_more) {
        if (!mil_mul(capacity, 2, &capacity))
            return mil_fail(MIL_ERR_MEMORY, "events: %zu more than an address space holds", n_more);
    }
    if (capacity == events->capacity)
        return MIL_OK;
    mil_events larger;
    MIL_TRY(mil_events_init(&larger, capacity));
    while (events->n > 0)
        larger.n += (size_t)mil_events_take(events, larger.ring + larger.n, INT32_MAX);
    mil_events_deinit(events);
    *events = larger;
    return MIL_OK;
}

void mil_events_push(mil_events *events, const mil_event *event)
{
    assert(events->n < events->capacity);
    size_t at = events->first + events->n;
    events->ring[at < events->capacity ? at : at - events->capacity] = *event;
    events->n++;
}

int32_t mil_events_take(mil_events *events, mil_event *out, int32_t max)
{
    int32_t n = 0;
    for (; n < max && events->n > 0; n++) {
        out[n] = events->ring[events->first];
        events->first = events->first + 1 < events->capacity ? events->first + 1 : 0;
        events->n--;
    }
    return n;
}
