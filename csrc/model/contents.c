#include "model/contents.h"

#include <string.h>

void mil_contents_init(mil_contents *contents)
{
    memset(contents, 0, sizeof *contents);
    pthread_mutex_init(&contents->lock, NULL);
}

void mil_contents_poison(mil_contents *contents)
{
    pthread_mutex_lock(&contents->lock);
    contents->poisons = true;
    pthread_mutex_unlock(&contents->lock);
}

void mil_contents_deinit(mil_contents *contents)
{
    for (int32_t i = 0; i < contents->n; i++)
        mil_content_free(contents->items[i]);
    mil_free(contents->items);
    pthread_mutex_destroy(&contents->lock);
    memset(contents, 0, sizeof *contents);
}

mil_status mil_content_create(mil_content **out, int32_t world)
{
    mil_content *content = mil_alloc(1, sizeof *content + (size_t)world * sizeof(mil_adapter));
    if (content == NULL)
        return mil_fail(MIL_ERR_MEMORY, "adapter: no memory for its descriptors on %d ranks",
                        world);
    content->world = world;
    *out = content;
    return MIL_OK;
}

void mil_content_free(mil_content *content)
{
    if (content == NULL)
        return;
    for (int32_t rank = 0; rank < content->world; rank++)
        mil_adapter_deinit(&content->adapters[rank]);
    mil_free(content);
}

static size_t bytes_of(const mil_content *content)
{
    size_t n_bytes = 0;
    for (int32_t rank = 0; rank < content->world; rank++)
        n_bytes += content->adapters[rank].slab.n_bytes;
    return n_bytes;
}

/* Needs the lock. */
static mil_status make_room(mil_contents *contents)
{
    if (contents->n < contents->capacity)
        return MIL_OK;
    int32_t capacity = contents->capacity > 0 ? 2 * contents->capacity : 16;
    mil_content **items = mil_alloc((size_t)capacity, sizeof(mil_content *));
    if (items == NULL)
        return mil_fail(MIL_ERR_MEMORY, "adapter: no memory for a list of %d", capacity);
    if (contents->n > 0)
        memcpy(items, contents->items, (size_t)contents->n * sizeof(mil_content *));
    mil_free(contents->items);
    contents->items = items;
    contents->capacity = capacity;
    return MIL_OK;
}

mil_status mil_contents_add(mil_contents *contents, mil_content *content, int32_t *id)
{
    pthread_mutex_lock(&contents->lock);
    mil_status status = make_room(contents);
    if (status == MIL_OK && contents->next_id == INT32_MAX)
        status = mil_fail(MIL_ERR_MEMORY, "adapter: all %d ids have been given out", INT32_MAX);
    if (status == MIL_OK) {
        content->id = contents->next_id++;
        content->n_refs = 1;
        contents->items[contents->n++] = content;
        contents->n_bytes += bytes_of(content);
        *id = content->id;
    }
    pthread_mutex_unlock(&contents->lock);
    return status;
}

/* Where id is, or -1. Needs the lock. */
static int32_t index_of(const mil_contents *contents, int32_t id)
{
    int32_t low = 0;
    int32_t high = contents->n;
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if (contents->items[middle]->id < id)
            low = middle + 1;
        else
            high = middle;
    }
    return low < contents->n && contents->items[low]->id == id ? low : -1;
}

static mil_status not_found(int32_t id)
{
    return mil_fail(MIL_ERR_NOT_FOUND, "adapter: found content id %d, expected one that is held",
                    id);
}

mil_status mil_contents_hold(mil_contents *contents, int32_t id)
{
    pthread_mutex_lock(&contents->lock);
    int32_t index = index_of(contents, id);
    if (index >= 0)
        contents->items[index]->n_refs++;
    pthread_mutex_unlock(&contents->lock);
    return index >= 0 ? MIL_OK : not_found(id);
}

/* A device that fails here fails its steps too: they say so. */
static void poison(const mil_content *content)
{
    for (int32_t rank = 0; rank < content->world; rank++) {
        const mil_adapter *adapter = &content->adapters[rank];
        mil_status status = adapter->device->poison(adapter->queue, adapter->slab.data,
                                                    adapter->slab.n_bytes, 1, 0);
        (void)status;
    }
}

mil_status mil_contents_release(mil_contents *contents, int32_t id)
{
    mil_content *dropped = NULL;
    bool poisons = false;
    pthread_mutex_lock(&contents->lock);
    int32_t index = index_of(contents, id);
    if (index >= 0 && --contents->items[index]->n_refs == 0) {
        dropped = contents->items[index];
        contents->n--;
        memmove(contents->items + index, contents->items + index + 1,
                (size_t)(contents->n - index) * sizeof(mil_content *));
        contents->n_bytes -= bytes_of(dropped);
        poisons = contents->poisons;
    }
    pthread_mutex_unlock(&contents->lock);
    if (poisons)
        poison(dropped);
    /* Outside the lock, because giving a slab back to the system takes a while. */
    mil_content_free(dropped);
    return index >= 0 ? MIL_OK : not_found(id);
}

mil_status mil_contents_find(mil_contents *contents, int32_t id, const mil_content **out)
{
    pthread_mutex_lock(&contents->lock);
    int32_t index = index_of(contents, id);
    if (index >= 0)
        *out = contents->items[index];
    pthread_mutex_unlock(&contents->lock);
    return index >= 0 ? MIL_OK : not_found(id);
}

void mil_contents_count(mil_contents *contents, int32_t *n, size_t *n_bytes)
{
    pthread_mutex_lock(&contents->lock);
    *n = contents->n;
    *n_bytes = contents->n_bytes;
    pthread_mutex_unlock(&contents->lock);
}
