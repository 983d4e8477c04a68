/* One noun, one file: what a slot holds, who gets pages, who joins, how rows are written, and what
 * samples mean. */
#include "scheduler/scheduler.h"

#include "base/memory.h"
#include "ops/chaos.h"
#include "scheduler/blocks.h"
#include "scheduler/residency.h"
#include "scheduler/rows.h"

#include <assert.h>
#include <string.h>

typedef struct slot {
    mil_request *request; /* NULL: free */
    int32_t *pages;       /* [max_pages], n_pages in use */
    int32_t n_pages;
    int32_t adapter_slot; /* or MIL_NO_ADAPTER */
    uint64_t last_step;   /* the last one that names this slot: its fence */
    bool is_draining;     /* its request ended or was preempted; waits for the fence */
} slot;

typedef struct flight {
    uint64_t step;
    int32_t n_rows;
    int32_t *slots; /* [max_seqs], n_rows in use: who sampled, in plan order */
} flight;

struct mil_scheduler {
    mil_scheduler_options options;
    int32_t max_pages; /* of one sequence */
    mil_blocks blocks;
    mil_residency residency;

    mil_request_list open; /* in order of arrival; the running ones are a prefix */
    mil_request *waiting;  /* the first of open that does not run, or NULL */
    mil_request_list done; /* to be reaped */
    int32_t n_running;

    slot *slots;         /* [max_seqs] */
    int32_t *page_lists; /* [max_seqs][max_pages], what slots point into */
    int32_t *free_slots; /* [max_seqs], a stack */
    int32_t n_free_slots;

    /* Tokens of requests that have started and not ended. Those are a prefix of open, and one joins
     * it only when all of them run: max_seqs rows are enough. */
    mil_slab history;         /* [max_seqs][max_model_len] int32 */
    int32_t **free_histories; /* [max_seqs], a stack */
    int32_t n_free_histories;

    flight flights[MIL_STEPS_IN_FLIGHT]; /* oldest first */
    int32_t n_in_flight;
    uint64_t filled;  /* the last step filled */
    uint64_t retired; /* the last step retired */

    int32_t draining_pages; /* held by draining slots: free when their fences have passed */
    int32_t promised_pages; /* of those, what rows that sit this fill out wait for */
    mil_rows rows;
    int32_t *chunk; /* [max_tokens], tokens of the chunk being written */

    uint64_t n_preemptions;
    uint64_t n_prompt_tokens;
    uint64_t n_generated_tokens;
};

mil_plan_limits mil_scheduler_limits(const mil_scheduler_options *options)
{
    int32_t page = options->page_size;
    /* Page entries cannot overflow: a sequence that grows by c tokens gains at most ceil(c / P) <=
     * 1 + (c - 1) / P pages, and over S sequences of T tokens together that is at most S + T / P.
     */
    return (mil_plan_limits){
        .max_seqs = options->max_seqs,
        .max_tokens = options->max_tokens,
        .max_logit_rows = options->max_seqs,
        .max_pages_per_seq = (options->max_model_len - 1) / page + 1,
        .max_page_sets = options->max_seqs + options->max_tokens / page,
        .max_adapter_slots = options->max_seqs,
    };
}

/* ---- create and free ---- */

static mil_status take_memory(mil_scheduler *scheduler)
{
    size_t n = (size_t)scheduler->options.max_seqs;
    size_t max_pages = (size_t)scheduler->max_pages;
    size_t history_bytes = (size_t)scheduler->options.max_model_len * sizeof(int32_t);
    if (!mil_mul(history_bytes, n, &history_bytes))
        return mil_fail(MIL_ERR_MEMORY, "scheduler: %zu histories of %d tokens overflow", n,
                        scheduler->options.max_model_len);
    scheduler->slots = mil_alloc(n, sizeof *scheduler->slots);
    scheduler->page_lists = mil_alloc(n * max_pages, sizeof *scheduler->page_lists);
    scheduler->free_slots = mil_alloc(n, sizeof *scheduler->free_slots);
    scheduler->free_histories = mil_alloc(n, sizeof *scheduler->free_histories);
    scheduler->chunk = mil_alloc((size_t)scheduler->options.max_tokens, sizeof *scheduler->chunk);
    bool is_whole = scheduler->slots != NULL && scheduler->page_lists != NULL &&
                    scheduler->free_slots != NULL && scheduler->free_histories != NULL &&
                    scheduler->chunk != NULL;
    for (int32_t i = 0; i < MIL_STEPS_IN_FLIGHT; i++) {
        scheduler->flights[i].slots = mil_alloc(n, sizeof(int32_t));
        is_whole = is_whole && scheduler->flights[i].slots != NULL;
    }
    if (!is_whole)
        return mil_fail(MIL_ERR_MEMORY, "scheduler: no memory for %zu slots of %zu pages", n,
                        max_pages);
    MIL_TRY(mil_slab_init(&scheduler->history, history_bytes, "scheduler: histories"));
    MIL_TRY(mil_blocks_init(&scheduler->blocks, scheduler->options.n_pages));
    MIL_TRY(mil_residency_init(&scheduler->residency, scheduler->options.max_seqs));
    return mil_rows_init(&scheduler->rows, scheduler->options.max_seqs,
                         scheduler->options.max_seqs);
}

mil_status mil_scheduler_create(mil_scheduler **out, const mil_scheduler_options *options)
{
    assert(options->max_seqs >= 1 && options->max_tokens >= options->max_seqs);
    assert(options->max_model_len >= 2 && options->n_pages >= 2);
    assert(options->max_model_len <= (int64_t)(options->n_pages - 1) * options->page_size);
    assert(!options->is_deterministic || options->max_tokens >= MIL_PROMPT_ROOM);
    assert(!options->is_deterministic || options->page_size >= MIL_PROMPT_ROOM);
    void *block;
    MIL_TRY(mil_alloc_checked(&block, 1, sizeof(mil_scheduler), "scheduler"));
    mil_scheduler *scheduler = block;
    scheduler->options = *options;
    scheduler->max_pages = mil_scheduler_limits(options).max_pages_per_seq;
    mil_status status = take_memory(scheduler);
    if (status != MIL_OK) {
        mil_scheduler_free(scheduler);
        return status;
    }
    int32_t *history = scheduler->history.data;
    for (int32_t i = options->max_seqs - 1; i >= 0; i--) {
        scheduler->slots[i].pages =
            scheduler->page_lists + (size_t)i * (size_t)scheduler->max_pages;
        scheduler->free_slots[scheduler->n_free_slots++] = i;
        scheduler->free_histories[scheduler->n_free_histories++] =
            history + (size_t)i * (size_t)options->max_model_len;
    }
    *out = scheduler;
    return MIL_OK;
}

void mil_scheduler_free(mil_scheduler *scheduler)
{
    if (scheduler == NULL)
        return;
    assert(scheduler->open.n == 0 && scheduler->done.n == 0);
    mil_rows_deinit(&scheduler->rows);
    mil_residency_deinit(&scheduler->residency);
    mil_blocks_deinit(&scheduler->blocks);
    mil_slab_deinit(&scheduler->history);
    for (int32_t i = 0; i < MIL_STEPS_IN_FLIGHT; i++)
        mil_free(scheduler->flights[i].slots);
    mil_free(scheduler->chunk);
    mil_free(scheduler->free_histories);
    mil_free(scheduler->free_slots);
    mil_free(scheduler->page_lists);
    mil_free(scheduler->slots);
    mil_free(scheduler);
}

/* ---- what a slot holds, and when it lets go ---- */

static void give_pages(mil_scheduler *scheduler, slot *held)
{
    for (int32_t i = 0; i < held->n_pages; i++) {
        if (mil_blocks_give(&scheduler->blocks, held->pages[i]) &&
            scheduler->options.on_page_free != NULL)
            scheduler->options.on_page_free(scheduler->options.context, held->pages[i]);
    }
    held->n_pages = 0;
}

static void release_slot(mil_scheduler *scheduler, int32_t index)
{
    slot *held = &scheduler->slots[index];
    mil_request *request = held->request;
    give_pages(scheduler, held);
    if (held->adapter_slot != MIL_NO_ADAPTER)
        mil_residency_unpin(&scheduler->residency, held->adapter_slot);
    held->request = NULL;
    held->is_draining = false;
    scheduler->free_slots[scheduler->n_free_slots++] = index;
    request->slot = -1;
    if (request->state == MIL_REQUEST_FINISHED)
        mil_request_list_push(&scheduler->done, request);
}

/* Let go of what the slot holds, now or when the last step that names it has retired. */
static void drain_slot(mil_scheduler *scheduler, int32_t index)
{
    slot *held = &scheduler->slots[index];
    if (held->last_step <= scheduler->retired) {
        release_slot(scheduler, index);
        return;
    }
    if (MIL_BREAK_FENCE)
        give_pages(scheduler, held);
    held->is_draining = true;
    scheduler->draining_pages += held->n_pages;
}

static void release_drained(mil_scheduler *scheduler)
{
    for (int32_t i = 0; i < scheduler->options.max_seqs; i++) {
        slot *held = &scheduler->slots[i];
        if (held->is_draining && held->last_step <= scheduler->retired) {
            scheduler->draining_pages -= held->n_pages;
            release_slot(scheduler, i);
        }
    }
}

/* ---- requests come and go ---- */

void mil_scheduler_add(mil_scheduler *scheduler, mil_request *request)
{
    mil_request_list_push(&scheduler->open, request);
    if (scheduler->waiting == NULL)
        scheduler->waiting = request;
}

bool mil_scheduler_end(mil_scheduler *scheduler, mil_request *request)
{
    if (request->state == MIL_REQUEST_FINISHED)
        return false;
    bool was_running = request->state == MIL_REQUEST_RUNNING;
    if (was_running)
        scheduler->n_running--;
    if (scheduler->waiting == request)
        scheduler->waiting = request->next;
    mil_request_list_remove(&scheduler->open, request);
    request->state = MIL_REQUEST_FINISHED;
    if (request->generated != NULL)
        scheduler->free_histories[scheduler->n_free_histories++] = request->generated;
    request->generated = NULL;
    if (was_running)
        drain_slot(scheduler, request->slot);
    else if (request->slot < 0)
        mil_request_list_push(&scheduler->done, request);
    return true;
}

mil_request *mil_scheduler_first(mil_scheduler *scheduler)
{
    return scheduler->open.first;
}

mil_request *mil_scheduler_reap(mil_scheduler *scheduler)
{
    mil_request *request = scheduler->done.first;
    if (request != NULL)
        mil_request_list_remove(&scheduler->done, request);
    return request;
}

/* ---- pages: who gets them, who gives way ---- */

static int32_t pages_for(const mil_scheduler *scheduler, int32_t n_tokens)
{
    return n_tokens == 0 ? 0 : (n_tokens - 1) / scheduler->options.page_size + 1;
}

static mil_request *newest_running(const mil_scheduler *scheduler)
{
    return scheduler->waiting != NULL ? scheduler->waiting->prev : scheduler->open.last;
}

/* The newest running request waits again, first in line. Samples of it in flight will still count.
 */
static void preempt_newest(mil_scheduler *scheduler)
{
    mil_request *request = newest_running(scheduler);
    assert(request->n_now == 0);
    request->state = MIL_REQUEST_WAITING;
    request->n_preemptions++;
    scheduler->waiting = request;
    scheduler->n_running--;
    scheduler->n_preemptions++;
    drain_slot(scheduler, request->slot);
}

/* Find a free page for request, which needs one to go on. Where none is free and none is about to
 * be, newer requests give theirs. */
static bool find_page(mil_scheduler *scheduler, const mil_request *request)
{
    while (scheduler->blocks.n_free == 0 &&
           scheduler->draining_pages == scheduler->promised_pages &&
           newest_running(scheduler) != request)
        preempt_newest(scheduler);
    if (scheduler->blocks.n_free > 0)
        return true;
    if (scheduler->draining_pages > scheduler->promised_pages)
        scheduler->promised_pages++;
    return false;
}

/* How many of the `left` tokens that a request has still to compute go into room for `room`. */
static int32_t piece_of(const mil_scheduler *scheduler, int32_t left, int32_t room)
{
    int32_t n = left < room ? left : room;
    if (!scheduler->options.is_deterministic || left == 1)
        return n;
    if (left - n == 1)
        n--;
    return n > 1 ? n : 0;
}

/* The least room into which any of them go. */
static int32_t least_room(const mil_scheduler *scheduler, int32_t left)
{
    if (!scheduler->options.is_deterministic || left == 1)
        return 1;
    return left == 3 ? 3 : 2;
}

/* Give request pages for a piece of the `left` tokens that it has still to compute; returns how
 * many go into those and into the budget. */
static int32_t grant(mil_scheduler *scheduler, mil_batch *batch, const mil_request *request,
                     int32_t left, int32_t budget)
{
    slot *held = &scheduler->slots[request->slot];
    int32_t size = scheduler->options.page_size;
    int32_t wanted = piece_of(scheduler, left, budget);
    if (wanted == 0)
        return 0;
    bool lacks_page = held->n_pages * size < request->n_computed + least_room(scheduler, left);
    if (lacks_page && !find_page(scheduler, request))
        return 0;
    int32_t missing = pages_for(scheduler, request->n_computed + wanted) - held->n_pages;
    for (; missing > 0 && scheduler->blocks.n_free > 0; missing--) {
        int32_t page = mil_blocks_take(&scheduler->blocks);
        batch->page_sets[batch->header->n_page_sets++] =
            (mil_page_set){.slot = request->slot, .index = held->n_pages, .page = page};
        held->pages[held->n_pages++] = page;
    }
    int32_t room = held->n_pages * size - request->n_computed;
    return piece_of(scheduler, left, wanted < room ? wanted : room);
}

/* ---- who runs ---- */

static bool is_decoding(const mil_request *request)
{
    return !mil_request_is_prefilling(request) && request->n_sampled < request->max_new;
}

/* Grant tokens to those that run, oldest first, so that the newest are still untouched when an
 * older one needs their pages. Returns the tokens left for newcomers. */
static int32_t grant_running(mil_scheduler *scheduler, mil_batch *batch)
{
    int32_t budget = scheduler->options.max_tokens;
    for (mil_request *r = scheduler->open.first; r != scheduler->waiting; r = r->next) {
        r->n_now = 0;
        budget -= is_decoding(r) ? 1 : 0;
    }
    for (mil_request *r = scheduler->open.first; r != scheduler->waiting; r = r->next) {
        if (is_decoding(r)) {
            r->n_now = grant(scheduler, batch, r, 1, 1);
        } else if (mil_request_is_prefilling(r)) {
            r->n_now = grant(scheduler, batch, r, r->n_prefill - r->n_computed, budget);
            budget -= r->n_now;
        }
    }
    return budget;
}

/* Whether one more may run: with all the others decoding, a prompt must still go on. */
static bool can_run_more(const mil_scheduler *scheduler)
{
    if (scheduler->n_free_slots == 0)
        return false;
    return !scheduler->options.is_deterministic ||
           scheduler->options.max_tokens - scheduler->n_running >= MIL_PROMPT_ROOM;
}

/* Whether the first that waits may start. It needs pages for its next chunk, or for all its tokens
 * if it was preempted (it would else be thrown out again for the very pages it lacked), and beside
 * those one page for each that runs: they then all cross their next page border before a newcomer's
 * work is undone for it. With nothing running that is no more than the pages there are. */
static bool can_start(const mil_scheduler *scheduler, const mil_request *request, int32_t budget)
{
    int32_t known = request->n_prompt + request->n_generated;
    int32_t piece = piece_of(scheduler, known, budget);
    if (piece == 0 || !can_run_more(scheduler))
        return false;
    int32_t at_once = request->n_preemptions > 0 ? known : piece;
    return pages_for(scheduler, at_once) + scheduler->n_running <= scheduler->blocks.n_free;
}

/* Put the first that waits into a slot; false when no adapter slot is free. */
static bool start(mil_scheduler *scheduler, mil_batch *batch, mil_request *request)
{
    /* One that was preempted in this fill finds no page free, and any other's steps have retired:
     * what it gave in flight is known. */
    assert(request->slot < 0);
    int32_t adapter_slot = MIL_NO_ADAPTER;
    if (request->adapter != MIL_NO_ADAPTER) {
        bool is_new;
        adapter_slot = mil_residency_pin(&scheduler->residency, request->adapter, &is_new);
        if (adapter_slot < 0)
            return false;
        if (is_new)
            batch->adapter_sets[batch->header->n_adapter_sets++] =
                (mil_adapter_set){.adapter_slot = adapter_slot, .content = request->adapter};
    }
    int32_t index = scheduler->free_slots[--scheduler->n_free_slots];
    scheduler->slots[index].request = request;
    scheduler->slots[index].adapter_slot = adapter_slot;
    batch->slot_sets[batch->header->n_slot_sets++] =
        (mil_slot_set){.slot = index, .adapter_slot = adapter_slot, .sampling = request->sampling};
    if (request->generated == NULL)
        request->generated = scheduler->free_histories[--scheduler->n_free_histories];
    request->slot = index;
    request->state = MIL_REQUEST_RUNNING;
    request->n_prefill = request->n_prompt + request->n_generated;
    request->n_sampled = request->n_generated;
    request->n_computed = 0;
    scheduler->waiting = request->next;
    scheduler->n_running++;
    return true;
}

static void grant_newcomers(mil_scheduler *scheduler, mil_batch *batch, int32_t budget)
{
    while (scheduler->waiting != NULL && can_start(scheduler, scheduler->waiting, budget)) {
        mil_request *request = scheduler->waiting;
        if (!start(scheduler, batch, request))
            return;
        request->n_now = grant(scheduler, batch, request, request->n_prefill, budget);
        budget -= request->n_now;
    }
}

/* ---- rows ---- */

static void write_row(mil_scheduler *scheduler, mil_batch *batch, mil_request *request,
                      flight *flown)
{
    slot *held = &scheduler->slots[request->slot];
    const mil_slot_set seq = {.slot = request->slot, .adapter_slot = held->adapter_slot};
    int32_t n = request->n_now;
    const int32_t *tokens = NULL;
    if (mil_request_is_prefilling(request)) {
        mil_request_copy_tokens(request, scheduler->chunk, request->n_computed, n);
        tokens = scheduler->chunk;
        scheduler->n_prompt_tokens += (uint64_t)n;
    }
    int32_t row = mil_rows_add(&scheduler->rows, batch, &seq, tokens, request->n_computed, n);
    held->last_step = batch->header->step;
    request->n_computed += n;
    request->n_now = 0;
    if (mil_request_is_prefilling(request))
        return;
    mil_rows_add_logits(batch, row + n - 1, true);
    flown->slots[flown->n_rows++] = request->slot;
    request->n_sampled++;
}

/* Decode rows first. */
static void write_rows(mil_scheduler *scheduler, mil_batch *batch, flight *flown)
{
    for (mil_request *r = scheduler->open.first; r != scheduler->waiting; r = r->next) {
        if (r->n_now > 0 && !mil_request_is_prefilling(r))
            write_row(scheduler, batch, r, flown);
    }
    for (mil_request *r = scheduler->open.first; r != scheduler->waiting; r = r->next) {
        if (r->n_now > 0)
            write_row(scheduler, batch, r, flown);
    }
    mil_rows_finish(&scheduler->rows, batch);
}

bool mil_scheduler_fill(mil_scheduler *scheduler, mil_plan *plan)
{
    assert(scheduler->n_in_flight < MIL_STEPS_IN_FLIGHT);
    mil_batch batch;
    mil_plan_view(plan, &batch);
    assert(batch.header->step > scheduler->filled);
    scheduler->promised_pages = 0;
    int32_t budget = grant_running(scheduler, &batch);
    grant_newcomers(scheduler, &batch, budget);
    flight *flown = &scheduler->flights[scheduler->n_in_flight];
    flown->step = batch.header->step;
    flown->n_rows = 0;
    write_rows(scheduler, &batch, flown);
    if (batch.header->n_seqs == 0)
        return false;
    scheduler->filled = flown->step;
    scheduler->n_in_flight++;
    return true;
}

/* ---- what came out ---- */

/* Deliver one sample; false when it overshot the end of its request. */
static bool deliver(mil_scheduler *scheduler, mil_request *request, const mil_sample *sample,
                    mil_event *event)
{
    if (request->state == MIL_REQUEST_FINISHED)
        return false;
    memset(event, 0, sizeof *event);
    event->id = request->id;
    if (sample->token < 0) {
        event->finish = MIL_FINISH_NUMERICS;
        (void)mil_scheduler_end(scheduler, request);
        return true;
    }
    event->has_sample = true;
    event->sample = *sample;
    request->generated[request->n_generated++] = sample->token;
    scheduler->n_generated_tokens++;
    if (mil_request_is_stop(request, sample->token))
        event->finish = MIL_FINISH_STOP;
    else if (request->n_generated == request->max_new)
        event->finish = MIL_FINISH_LENGTH;
    if (event->finish != MIL_FINISH_NONE)
        (void)mil_scheduler_end(scheduler, request);
    return true;
}

int32_t mil_scheduler_retire(mil_scheduler *scheduler, uint64_t step, const mil_sample *samples,
                             mil_event *events)
{
    assert(scheduler->n_in_flight > 0 && scheduler->flights[0].step == step);
    flight flown = scheduler->flights[0];
    scheduler->n_in_flight--;
    for (int32_t i = 0; i < scheduler->n_in_flight; i++)
        scheduler->flights[i] = scheduler->flights[i + 1];
    scheduler->flights[scheduler->n_in_flight] = flown;
    int32_t n_events = 0;
    /* The fence moves after the samples are read: a slot in flown still has its request. */
    for (int32_t i = 0; i < flown.n_rows; i++) {
        mil_request *request = scheduler->slots[flown.slots[i]].request;
        if (deliver(scheduler, request, &samples[i], &events[n_events]))
            n_events++;
    }
    scheduler->retired = step;
    release_drained(scheduler);
    return n_events;
}

void mil_scheduler_abandon(mil_scheduler *scheduler)
{
    scheduler->n_in_flight = 0;
    scheduler->retired = scheduler->filled;
    release_drained(scheduler);
}

void mil_scheduler_counts_get(const mil_scheduler *scheduler, mil_scheduler_counts *counts)
{
    *counts = (mil_scheduler_counts){
        .n_waiting = scheduler->open.n - scheduler->n_running,
        .n_running = scheduler->n_running,
        .n_in_flight = scheduler->n_in_flight,
        .n_pages = mil_blocks_n_total(&scheduler->blocks),
        .n_free_pages = scheduler->blocks.n_free,
        .n_pins = scheduler->residency.n_pins,
        .n_preemptions = scheduler->n_preemptions,
        .n_prompt_tokens = scheduler->n_prompt_tokens,
        .n_generated_tokens = scheduler->n_generated_tokens,
    };
}
