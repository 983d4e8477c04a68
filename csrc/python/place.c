#include "python/place.h"

#include "base/memory.h"

#include <unistd.h>

#define LEAST_BLOCK ((size_t)1 << 20)
#define SCRATCH_ALIGN ((size_t)256)

struct mil_places {
    pthread_mutex_t lock; /* of the list */
    mil_place *first;
    pid_t owner;
};

/* ---- one place ---- */

static void close_place(mil_place *place)
{
    const mil_device *device = place->context.backend->device;
    mil_pool_free(place->context.pool);
    for (int32_t i = 0; i < place->n_blocks; i++)
        device->free(place->context.queue, &place->blocks[i]);
    device->close(place->context.queue);
    pthread_mutex_destroy(&place->lock);
    mil_free(place);
}

static mil_status open_host(mil_place *place)
{
    mil_machine_report report;
    MIL_TRY(mil_machine_report_get(&report));
    place->n_threads = report.n_threads;
    return mil_pool_create(&place->context.pool, report.n_threads, NULL);
}

static mil_status open_cuda(mil_place *place)
{
    mil_context *context = &place->context;
    const mil_device *device = context->backend->device;
    MIL_TRY(device->open(&context->queue, place->ordinal));
    if (place->is_lent)
        return MIL_OK;
    mil_status status = place->borrow->check_stream(context->queue, place->stream);
    if (status != MIL_OK)
        device->close(context->queue);
    return status;
}

static mil_status open_place(mil_place *place)
{
    mil_context *context = &place->context;
    MIL_TRY(mil_backend_find(&context->backend, place->is_cuda ? "cuda" : "cpu"));
    place->borrow = mil_backend_borrow(context->backend);
    place->n_threads = 1;
    return place->is_cuda ? open_cuda(place) : open_host(place);
}

/* ---- all places ---- */

mil_places *mil_places_of(mil_module_state *state)
{
    /* A forked child has none of the threads, and no lock of the parent's can be trusted. */
    if (state->places != NULL && state->places->owner == getpid())
        return state->places;
    mil_places *places = mil_alloc(1, sizeof *places);
    if (places == NULL)
        return NULL;
    places->owner = getpid();
    pthread_mutex_init(&places->lock, NULL);
    state->places = places;
    return places;
}

void mil_places_free(mil_places *places)
{
    if (places == NULL || places->owner != getpid())
        return;
    while (places->first != NULL) {
        mil_place *place = places->first;
        places->first = place->next;
        close_place(place);
    }
    pthread_mutex_destroy(&places->lock);
    mil_free(places);
}

static mil_place *look(mil_places *places, const mil_place *wanted)
{
    mil_place *place = places->first;
    while (place != NULL &&
           (place->is_cuda != wanted->is_cuda || place->ordinal != wanted->ordinal ||
            place->is_lent != wanted->is_lent || place->stream != wanted->stream))
        place = place->next;
    return place;
}

static mil_status add(mil_place **out, mil_places *places, const mil_place *wanted)
{
    mil_place *place;
    MIL_TRY(mil_alloc_checked((void **)&place, 1, sizeof *place, "a place for ops"));
    *place = *wanted;
    pthread_mutex_init(&place->lock, NULL);
    mil_status status = open_place(place);
    if (status != MIL_OK) {
        mil_pool_free(place->context.pool);
        pthread_mutex_destroy(&place->lock);
        mil_free(place);
        return status;
    }
    place->next = places->first;
    places->first = place;
    *out = place;
    return MIL_OK;
}

mil_status mil_place_find(mil_place **out, mil_places *places, bool is_cuda, int32_t ordinal,
                          bool is_lent, void *stream)
{
    const mil_place wanted = {
        .is_cuda = is_cuda, .is_lent = is_lent, .ordinal = ordinal, .stream = stream};
    mil_status status = MIL_OK;
    pthread_mutex_lock(&places->lock);
    *out = look(places, &wanted);
    if (*out == NULL)
        status = add(out, places, &wanted);
    pthread_mutex_unlock(&places->lock);
    return status;
}

/* ---- one op ---- */

/* The calling thread works for the place: in its pool, or by the rules of a capture relaxed. */
static mil_status lend_thread(mil_place *place)
{
    if (place->context.pool != NULL)
        return mil_pool_enter(place->context.pool, &place->saved);
    return place->context.backend->device->relax_capture(place->context.queue,
                                                         &place->capture_mode);
}

static void give_thread_back(mil_place *place)
{
    if (place->context.pool != NULL)
        mil_pool_leave(place->context.pool, &place->saved);
    else
        place->context.backend->device->restore_capture(place->context.queue, place->capture_mode);
}

mil_status mil_place_enter(mil_place *place)
{
    pthread_mutex_lock(&place->lock);
    place->at_block = 0;
    place->at_bytes = 0;
    place->context.is_deterministic = false;
    mil_status status = lend_thread(place);
    if (status != MIL_OK) {
        pthread_mutex_unlock(&place->lock);
        return status;
    }
    if (place->is_cuda && !place->is_lent) {
        place->own_stream = place->borrow->swap_stream(place->context.queue, place->stream);
        place->is_swapped = true;
    }
    return MIL_OK;
}

void mil_place_leave(mil_place *place)
{
    if (place->is_swapped)
        (void)place->borrow->swap_stream(place->context.queue, place->own_stream);
    place->is_swapped = false;
    give_thread_back(place);
    pthread_mutex_unlock(&place->lock);
}

/* Beside the caller's stream, which may be capturing. */
static mil_status add_block(mil_place *place, size_t n_bytes)
{
    if (place->n_blocks == MIL_PLACE_BLOCKS)
        return mil_fail(MIL_ERR_MEMORY, "ops: scratch has %d blocks, expected fewer",
                        MIL_PLACE_BLOCKS);
    mil_status status = place->context.backend->device->alloc(
        place->context.queue, &place->blocks[place->n_blocks], n_bytes, "scratch of milpy.ops");
    place->n_blocks += status == MIL_OK;
    return status;
}

/* Doubling keeps the blocks few. */
static size_t next_block(const mil_place *place)
{
    size_t twice = place->n_blocks > 0 ? 2 * place->blocks[place->n_blocks - 1].n_bytes : 0;
    return twice > LEAST_BLOCK ? twice : LEAST_BLOCK;
}

mil_status mil_place_scratch(mil_place *place, void **out, size_t n_bytes)
{
    n_bytes = mil_round_up(n_bytes > 0 ? n_bytes : 1, SCRATCH_ALIGN);
    while (place->at_block < place->n_blocks &&
           place->at_bytes + n_bytes > place->blocks[place->at_block].n_bytes) {
        place->at_block++;
        place->at_bytes = 0;
    }
    if (place->at_block == place->n_blocks) {
        size_t wanted = next_block(place);
        mil_status status = add_block(place, wanted > n_bytes ? wanted : n_bytes);
        if (status == MIL_ERR_MEMORY && wanted > n_bytes)
            status = add_block(place, n_bytes);
        MIL_TRY(status);
    }
    *out = (char *)place->blocks[place->at_block].data + place->at_bytes;
    place->at_bytes += n_bytes;
    return MIL_OK;
}
