/* Adapter contents that a model holds: packed weights of every rank, counted by reference.
 *
 * A content is an object of its own, so that the list may grow while a step reads descriptors; ids
 * rise and are never used twice. Every function may be called from any thread. */
#pragma once

#include "loader/adapter.h"

#include <pthread.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_content {
    int32_t id;
    int32_t n_refs;
    int32_t world;
    mil_adapter adapters[]; /* [world] */
} mil_content;

typedef struct mil_contents {
    pthread_mutex_t lock;
    mil_content **items; /* [n], ids ascending */
    int32_t n;
    int32_t capacity;
    int32_t next_id;
    size_t n_bytes;
    bool poisons; /* a content is NaN before its memory goes */
} mil_contents;

void mil_contents_init(mil_contents *contents);
/* From now on fill a content with NaN when its last reference is dropped. */
void mil_contents_poison(mil_contents *contents);
/* Frees what is still held. */
void mil_contents_deinit(mil_contents *contents);

/* A content with `world` empty adapters and no id. Caller frees with mil_content_free, or gives it
 * away to mil_contents_add. */
mil_status mil_content_create(mil_content **out, int32_t world) MIL_WARN_UNUSED;
void mil_content_free(mil_content *content);

/* Take a content in with one reference; on failure it stays the caller's. */
mil_status mil_contents_add(mil_contents *contents, mil_content *content, int32_t *id)
    MIL_WARN_UNUSED;
/* Both MIL_ERR_NOT_FOUND for an id that is not held. The content goes with its last reference. */
mil_status mil_contents_hold(mil_contents *contents, int32_t id) MIL_WARN_UNUSED;
mil_status mil_contents_release(mil_contents *contents, int32_t id) MIL_WARN_UNUSED;
/* Borrow a content that the caller knows to be held for as long as it looks. */
mil_status mil_contents_find(mil_contents *contents, int32_t id, const mil_content **out)
    MIL_WARN_UNUSED;
void mil_contents_count(mil_contents *contents, int32_t *n, size_t *n_bytes);

#ifdef __cplusplus
}
#endif
