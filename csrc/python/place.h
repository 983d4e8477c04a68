/* Where milpy.ops run: a backend with its queue, workspace and lock, one for each (device, stream).
 *
 * Made when first used and kept. Memory that a place took is never given back before the module
 * goes: a graph that its caller captured may hold it. Graphs captured on one stream share it, so
 * they must not run at the same time. */
#pragma once

#include "python/state.h"

#include "base/threads.h"
#include "ops/borrow.h"

#include <pthread.h>

#define MIL_PLACE_BLOCKS 40

typedef struct mil_place {
    struct mil_place *next;
    bool is_cuda, is_lent; /* is_lent: on the queue's own stream, for arrays of the host */
    int32_t ordinal;
    void *stream, *own_stream;
    const mil_borrow *borrow;
    mil_context context;
    int32_t n_threads;
    pthread_mutex_t lock;
    mil_thread_state saved;
    bool is_swapped;
    int32_t capture_mode;              /* the calling thread's own, while an op runs */
    mil_slab blocks[MIL_PLACE_BLOCKS]; /* of scratch, dealt out anew for each op */
    int32_t n_blocks, at_block;
    size_t at_bytes;
} mil_place;

/* All places of a process, in the module's state. */
typedef struct mil_places mil_places;

/* The places of this process: a forked child starts with none. NULL: no memory. Needs the GIL. */
mil_places *mil_places_of(mil_module_state *state);
void mil_places_free(mil_places *places);

/* The place of (device, stream); made if need be. Any thread, without the GIL. */
mil_status mil_place_find(mil_place **out, mil_places *places, bool is_cuda, int32_t ordinal,
                          bool is_lent, void *stream) MIL_WARN_UNUSED;

/* Lock the place and make its queue the stream's; deal scratch from the start. */
mil_status mil_place_enter(mil_place *place) MIL_WARN_UNUSED;
void mil_place_leave(mil_place *place);

/* n_bytes on the device until the place is left, 256-aligned, not zeroed. Allocates only where no
 * op before took as much. */
mil_status mil_place_scratch(mil_place *place, void **out, size_t n_bytes) MIL_WARN_UNUSED;
