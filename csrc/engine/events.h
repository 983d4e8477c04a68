/* A queue of events between the loop and whoever polls. Room is made ahead, where failing is still
 * allowed: a push never allocates. Not locked: the engine's lock guards it. */
#pragma once

#include "milpy.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_events {
    mil_event *ring; /* [capacity], n in use from first on, wrapping round */
    size_t capacity;
    size_t first;
    size_t n;
} mil_events;

/* Room for n_events at first (>= 1). On failure *events is zeroed. */
mil_status mil_events_init(mil_events *events, size_t n_events) MIL_WARN_UNUSED;
void mil_events_deinit(mil_events *events);

/* Make room for n_more beyond what is queued, by doubling. On failure nothing changes. */
mil_status mil_events_reserve(mil_events *events, size_t n_more) MIL_WARN_UNUSED;
/* Needs room. */
void mil_events_push(mil_events *events, const mil_event *event);
/* Move up to max events, oldest first, to out; returns how many. */
int32_t mil_events_take(mil_events *events, mil_event *out, int32_t max);

#ifdef __cplusplus
}
#endif
