/* The stepper: one step over the sequences that the caller names, on pages that the caller owns.
 *
 * A sequence owns a slot from create to free. Everything is checked before anything is written, so
 * that a bad item costs no other one anything. Rows go into the plan as a plan wants them, decode
 * rows first, and come out in the caller's order. It never runs ahead: pages are the caller's again
 * when a step returns. */
#include "milpy.h"

#include "base/memory.h"
#include "engine/options.h"
#include "model/runner.h"
#include "scheduler/residency.h"
#include "scheduler/rows.h"

#include <assert.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#define REASON_BYTES 1024
#define MOST_SEQS 65536

struct mil_seq {
    mil_stepper *stepper;
    int32_t slot;
    int32_t content;      /* or MIL_NO_ADAPTER; held */
    int32_t adapter_slot; /* or MIL_NO_ADAPTER */
    mil_sampling sampling;
    bool is_set;        /* the device knows its slot */
    bool has_token;     /* the slot's last token is one that was sampled */
    uint64_t last_call; /* the last call of step that names it */
};

struct mil_stepper {
    mil_model *model;
    mil_runner *runner;
    mil_stepper_options options;
    int32_t vocab;
    int32_t max_position;
    pthread_mutex_t lock; /* over everything below, steps included */
    bool has_lock;
    mil_residency residency;
    bool
        *is_adapter_new; /* [max_seqs] of each adapter slot: the device does not know its content */
    mil_seq **seqs;      /* [max_seqs], by slot; NULL: free */
    int32_t *page_table; /* [max_seqs][max_pages_per_seq] as the device has it, -1: not written */
    int32_t *first_rows; /* [max_seqs], of each item, in the plan's logit rows */
    int32_t *rows_of;    /* [max_tokens], plan's logit row of the caller's row */
    mil_rows rows;
    mil_sample *samples; /* [max_tokens], in the plan's order */
    float *logit_row;    /* [V], to swap rows through */
    uint64_t n_calls;
    char reason[REASON_BYTES]; /* why it is dead; "" */
};

/* ---- create and free ---- */

static mil_status check_options(const mil_stepper_options *options)
{
    const struct {
        const char *name;
        int32_t value, most;
    } fields[] = {
        {"n_pages", options->n_pages, INT32_MAX},
        {"max_seqs", options->max_seqs, MOST_SEQS},
        {"max_tokens", options->max_tokens, 1 << 20},
        {"max_pages_per_seq", options->max_pages_per_seq, 1 << 24},
    };
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        if (fields[i].value < 1 || fields[i].value > fields[i].most)
            return mil_fail(MIL_ERR_ARGUMENT, "stepper: %s is %d, expected 1..%d", fields[i].name,
                            fields[i].value, fields[i].most);
    }
    int64_t entries = (int64_t)options->max_seqs * options->max_pages_per_seq;
    if (entries > INT32_MAX)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "stepper: max_seqs %d with max_pages_per_seq %d are %lld page entries, "
                        "expected at most %d",
                        options->max_seqs, options->max_pages_per_seq, (long long)entries,
                        INT32_MAX);
    return MIL_OK;
}

static mil_status take_memory(mil_stepper *stepper)
{
    size_t n = (size_t)stepper->options.max_seqs;
    size_t n_tokens = (size_t)stepper->options.max_tokens;
    size_t n_entries = n * (size_t)stepper->options.max_pages_per_seq;
    stepper->is_adapter_new = mil_alloc(n, sizeof *stepper->is_adapter_new);
    stepper->seqs = mil_alloc(n, sizeof *stepper->seqs);
    stepper->page_table = mil_alloc(n_entries, sizeof *stepper->page_table);
    stepper->first_rows = mil_alloc(n, sizeof *stepper->first_rows);
    stepper->rows_of = mil_alloc(n_tokens, sizeof *stepper->rows_of);
    stepper->samples = mil_alloc(n_tokens, sizeof *stepper->samples);
    stepper->logit_row = mil_alloc((size_t)stepper->vocab, sizeof *stepper->logit_row);
    if (stepper->is_adapter_new == NULL || stepper->seqs == NULL || stepper->page_table == NULL ||
        stepper->first_rows == NULL || stepper->rows_of == NULL || stepper->samples == NULL ||
        stepper->logit_row == NULL)
        return mil_fail(MIL_ERR_MEMORY, "stepper: no memory for %zu slots of %d pages", n,
                        stepper->options.max_pages_per_seq);
    MIL_TRY(mil_residency_init(&stepper->residency, stepper->options.max_seqs));
    return mil_rows_init(&stepper->rows, stepper->options.max_seqs, stepper->options.max_seqs);
}

static mil_status init_stepper(mil_stepper *stepper)
{
    const mil_stepper_options *options = &stepper->options;
    MIL_TRY(check_options(options));
    if (pthread_mutex_init(&stepper->lock, NULL) != 0)
        return mil_fail(MIL_ERR_DEVICE, "stepper: the system gave no lock");
    stepper->has_lock = true;
    MIL_TRY(take_memory(stepper));
    mil_runner_options runner_options = {
        .limits =
            {
                .max_seqs = options->max_seqs,
                .max_tokens = options->max_tokens,
                .max_logit_rows = options->max_tokens,
                .max_pages_per_seq = options->max_pages_per_seq,
                /* A caller may change every entry of every list between two steps. */
                .max_page_sets = options->max_seqs * options->max_pages_per_seq,
                .max_adapter_slots = options->max_seqs,
            },
        .n_pages = options->n_pages,
        .page_size = options->page_size,
    };
    return mil_runner_create(&stepper->runner, stepper->model, &runner_options);
}

mil_status mil_stepper_create(mil_stepper **out, mil_model *model,
                              const mil_stepper_options *options)
{
    void *block;
    MIL_TRY(mil_alloc_checked(&block, 1, sizeof(mil_stepper), "stepper"));
    mil_stepper *stepper = block;
    stepper->model = model;
    stepper->options = *options;
    stepper->vocab = mil_model_config(model)->vocab;
    stepper->max_position = mil_model_config(model)->max_position;
    mil_status status = init_stepper(stepper);
    if (status != MIL_OK) {
        mil_stepper_free(stepper);
        return status;
    }
    *out = stepper;
    return MIL_OK;
}

void mil_stepper_free(mil_stepper *stepper)
{
    if (stepper == NULL)
        return;
    for (int32_t i = 0; stepper->seqs != NULL && i < stepper->options.max_seqs; i++)
        mil_seq_free(stepper->seqs[i]);
    mil_runner_free(stepper->runner);
    mil_rows_deinit(&stepper->rows);
    mil_residency_deinit(&stepper->residency);
    mil_free(stepper->logit_row);
    mil_free(stepper->samples);
    mil_free(stepper->rows_of);
    mil_free(stepper->first_rows);
    mil_free(stepper->page_table);
    mil_free(stepper->seqs);
    mil_free(stepper->is_adapter_new);
    if (stepper->has_lock)
        pthread_mutex_destroy(&stepper->lock);
    mil_free(stepper);
}

/* ---- sequences ---- */

static int32_t *page_list(const mil_stepper *stepper, int32_t slot)
{
    return stepper->page_table + (size_t)slot * (size_t)stepper->options.max_pages_per_seq;
}

/* Give seq a slot of its own and its adapter one to share. */
static mil_status seat(mil_stepper *stepper, mil_seq *seq)
{
    int32_t slot = 0;
    while (slot < stepper->options.max_seqs && stepper->seqs[slot] != NULL)
        slot++;
    if (slot == stepper->options.max_seqs)
        return mil_fail(MIL_ERR_BUSY, "seq: all %d slots are taken, expected a free one", slot);
    if (seq->content != MIL_NO_ADAPTER) {
        bool is_new;
        seq->adapter_slot = mil_residency_pin(&stepper->residency, seq->content, &is_new);
        assert(seq->adapter_slot >= 0); /* as many as sequence slots */
        if (is_new)
            stepper->is_adapter_new[seq->adapter_slot] = true;
    }
    seq->slot = slot;
    stepper->seqs[slot] = seq;
    int32_t *pages = page_list(stepper, slot);
    for (int32_t i = 0; i < stepper->options.max_pages_per_seq; i++)
        pages[i] = -1;
    return MIL_OK;
}

static void discard(mil_seq *seq)
{
    if (seq->content != MIL_NO_ADAPTER) {
        /* The sequence held it, so that it is there: only a bug of ours can fail this. */
        mil_status status = mil_model_release_adapter(seq->stepper->model, seq->content);
        assert(status == MIL_OK);
        (void)status;
    }
    mil_free(seq);
}

mil_status mil_seq_create(mil_seq **out, mil_stepper *stepper, const mil_sampling *sampling,
                          int32_t adapter)
{
    MIL_TRY(mil_options_check_sampling(sampling, stepper->vocab, "seq"));
    if (adapter < MIL_NO_ADAPTER)
        return mil_fail(MIL_ERR_ARGUMENT, "seq: adapter is %d, expected a content id or %d",
                        adapter, MIL_NO_ADAPTER);
    void *block;
    MIL_TRY(mil_alloc_checked(&block, 1, sizeof(mil_seq), "seq"));
    mil_seq *seq = block;
    seq->stepper = stepper;
    seq->content = adapter;
    seq->adapter_slot = MIL_NO_ADAPTER;
    seq->sampling = *sampling;
    mil_status status =
        adapter == MIL_NO_ADAPTER ? MIL_OK : mil_model_hold_adapter(stepper->model, adapter);
    if (status != MIL_OK) {
        mil_free(seq);
        return status;
    }
    pthread_mutex_lock(&stepper->lock);
    status = seat(stepper, seq);
    pthread_mutex_unlock(&stepper->lock);
    if (status == MIL_OK) {
        *out = seq;
        return MIL_OK;
    }
    discard(seq);
    return status;
}

void mil_seq_free(mil_seq *seq)
{
    if (seq == NULL)
        return;
    mil_stepper *stepper = seq->stepper;
    pthread_mutex_lock(&stepper->lock);
    stepper->seqs[seq->slot] = NULL;
    if (seq->adapter_slot != MIL_NO_ADAPTER)
        mil_residency_unpin(&stepper->residency, seq->adapter_slot);
    pthread_mutex_unlock(&stepper->lock);
    discard(seq);
}

/* ---- what a step is checked for ---- */

static bool is_decode(const mil_step_item *item)
{
    return item->tokens == NULL;
}

static mil_status check_tokens(const mil_stepper *stepper, const mil_step_item *item, int32_t index)
{
    if (item->n_tokens < 1)
        return mil_fail(MIL_ERR_ARGUMENT, "step: item %d has %d tokens, expected at least 1", index,
                        item->n_tokens);
    if (is_decode(item) && item->n_tokens != 1)
        return mil_fail(
            MIL_ERR_ARGUMENT,
            "step: item %d asks for %d tokens without giving them, expected 1, the token "
            "sampled last",
            index, item->n_tokens);
    if (is_decode(item) && !item->seq->has_token)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "step: item %d gives no token, expected one: none was sampled for it yet",
                        index);
    if (is_decode(item))
        return MIL_OK;
    char caller[32];
    (void)snprintf(caller, sizeof caller, "step: item %d", index);
    return mil_options_check_tokens(item->tokens, item->n_tokens, stepper->vocab, caller, "token");
}

static mil_status check_pages(const mil_stepper *stepper, const mil_step_item *item, int32_t index)
{
    const mil_stepper_options *options = &stepper->options;
    int64_t length = (int64_t)item->n_past + item->n_tokens;
    if (item->n_past < 0 || length > stepper->max_position)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "step: item %d has %d past tokens and %d new ones, expected 0..%d together",
                        index, item->n_past, item->n_tokens, stepper->max_position);
    if (item->pages == NULL || item->n_pages > options->max_pages_per_seq ||
        (int64_t)item->n_pages * options->page_size < length)
        return mil_fail(
            MIL_ERR_ARGUMENT,
            "step: item %d lists %d pages, expected %lld..%d of %d tokens for %lld tokens", index,
            item->pages == NULL ? 0 : item->n_pages,
            (long long)((length - 1) / options->page_size + 1), options->max_pages_per_seq,
            options->page_size, (long long)length);
    for (int32_t i = 0; i < item->n_pages; i++) {
        if (item->pages[i] < 0 || item->pages[i] >= options->n_pages)
            return mil_fail(MIL_ERR_ARGUMENT, "step: item %d, page %d is %d, expected 0..%d", index,
                            i, item->pages[i], options->n_pages - 1);
    }
    return MIL_OK;
}

static mil_status check_items(mil_stepper *stepper, const mil_step_item *items, int32_t n_items)
{
    const mil_stepper_options *options = &stepper->options;
    if (n_items < 0 || n_items > options->max_seqs)
        return mil_fail(MIL_ERR_ARGUMENT, "step: %d items, expected 0..%d", n_items,
                        options->max_seqs);
    int64_t n_tokens = 0;
    stepper->n_calls++;
    for (int32_t i = 0; i < n_items; i++) {
        mil_seq *seq = items[i].seq;
        if (seq == NULL || seq->stepper != stepper)
            return mil_fail(MIL_ERR_ARGUMENT, "step: item %d has %s, expected one of this stepper",
                            i, seq == NULL ? "no sequence" : "a sequence of another stepper");
        if (seq->last_call == stepper->n_calls)
            return mil_fail(MIL_ERR_ARGUMENT,
                            "step: item %d names its sequence again, expected once", i);
        seq->last_call = stepper->n_calls;
        MIL_TRY(check_tokens(stepper, &items[i], i));
        MIL_TRY(check_pages(stepper, &items[i], i));
        n_tokens += items[i].n_tokens;
    }
    if (n_tokens > options->max_tokens)
        return mil_fail(MIL_ERR_ARGUMENT, "step: %lld tokens, expected at most %d",
                        (long long)n_tokens, options->max_tokens);
    return MIL_OK;
}

/* ---- the plan ---- */

static void write_adapters(mil_stepper *stepper, mil_batch *batch)
{
    for (int32_t a = 0; a < stepper->options.max_seqs; a++) {
        if (!stepper->is_adapter_new[a])
            continue;
        stepper->is_adapter_new[a] = false;
        /* Its last sequence may have gone since. */
        if (stepper->residency.pins[a] > 0)
            batch->adapter_sets[batch->header->n_adapter_sets++] =
                (mil_adapter_set){.adapter_slot = a, .content = stepper->residency.contents[a]};
    }
}

/* Page entries that the step needs and the device has otherwise. */
static void write_pages(mil_stepper *stepper, mil_batch *batch, const mil_step_item *item)
{
    int32_t *known = page_list(stepper, item->seq->slot);
    int32_t needed = (item->n_past + item->n_tokens - 1) / stepper->options.page_size + 1;
    for (int32_t i = 0; i < needed; i++) {
        if (known[i] == item->pages[i])
            continue;
        known[i] = item->pages[i];
        batch->page_sets[batch->header->n_page_sets++] =
            (mil_page_set){.slot = item->seq->slot, .index = i, .page = known[i]};
    }
}

static void write_item(mil_stepper *stepper, mil_batch *batch, const mil_step_item *item)
{
    mil_seq *seq = item->seq;
    const mil_slot_set set = {
        .slot = seq->slot, .adapter_slot = seq->adapter_slot, .sampling = seq->sampling};
    if (!seq->is_set)
        batch->slot_sets[batch->header->n_slot_sets++] = set;
    seq->is_set = true;
    write_pages(stepper, batch, item);
    int32_t n = item->n_tokens;
    int32_t row = mil_rows_add(&stepper->rows, batch, &set, item->tokens, item->n_past, n);
    for (int32_t i = item->all_logits ? 0 : n - 1; i < n; i++)
        mil_rows_add_logits(batch, row + i, i == n - 1);
}

static void write_items(mil_stepper *stepper, mil_batch *batch, const mil_step_item *items,
                        int32_t n_items)
{
    write_adapters(stepper, batch);
    for (int32_t pass = 0; pass < 2; pass++) {
        for (int32_t i = 0; i < n_items; i++) {
            if (is_decode(&items[i]) != (pass == 0))
                continue;
            stepper->first_rows[i] = batch->header->n_logit_rows;
            write_item(stepper, batch, &items[i]);
        }
    }
    mil_rows_finish(&stepper->rows, batch);
    int32_t n_rows = 0;
    for (int32_t i = 0; i < n_items; i++) {
        int32_t n = items[i].all_logits ? items[i].n_tokens : 1;
        for (int32_t row = 0; row < n; row++)
            stepper->rows_of[n_rows++] = stepper->first_rows[i] + row;
    }
}

/* ---- results ---- */

static void take_samples(mil_stepper *stepper, const mil_step_item *items, int32_t n_items,
                         mil_sample *samples)
{
    int32_t n_rows = 0;
    for (int32_t i = 0; i < n_items; i++) {
        int32_t n = items[i].all_logits ? items[i].n_tokens : 1;
        for (int32_t row = 0; samples != NULL && row < n; row++)
            samples[n_rows + row] = stepper->samples[stepper->rows_of[n_rows + row]];
        n_rows += n;
        items[i].seq->has_token = stepper->samples[stepper->rows_of[n_rows - 1]].token >= 0;
    }
}

/* Bring rows of the plan's order into the caller's, in place: follow each cycle once. Uses up
 * rows_of. */
static void order_logits(mil_stepper *stepper, float *logits, int32_t n_rows)
{
    size_t width = (size_t)stepper->vocab;
    size_t n_bytes = width * sizeof *logits;
    for (int32_t start = 0; start < n_rows; start++) {
        int32_t from = stepper->rows_of[start];
        if (from == start)
            continue;
        memcpy(stepper->logit_row, logits + (size_t)start * width, n_bytes);
        int32_t at = start;
        while (from != start) {
            memcpy(logits + (size_t)at * width, logits + (size_t)from * width, n_bytes);
            stepper->rows_of[at] = at;
            at = from;
            from = stepper->rows_of[at];
        }
        memcpy(logits + (size_t)at * width, stepper->logit_row, n_bytes);
        stepper->rows_of[at] = at;
    }
}

/* ---- the step ---- */

static mil_status run_plan(mil_stepper *stepper, const mil_step_item *items, int32_t n_items,
                           float *logits, int32_t *n_rows)
{
    mil_batch batch;
    mil_plan_view(mil_runner_plan(stepper->runner), &batch);
    write_items(stepper, &batch, items, n_items);
    *n_rows = batch.header->n_logit_rows;
    return mil_runner_step(stepper->runner, stepper->samples, logits);
}

static mil_status step_locked(mil_stepper *stepper, const mil_step_item *items, int32_t n_items,
                              mil_sample *samples, float *logits)
{
    if (stepper->reason[0] != '\0')
        return mil_fail(MIL_ERR_CLOSED, "step: the stepper is dead: %s", stepper->reason);
    MIL_TRY(check_items(stepper, items, n_items));
    if (n_items == 0)
        return MIL_OK;
    MIL_TRY(mil_runner_enter(stepper->runner));
    int32_t n_rows;
    mil_status status = run_plan(stepper, items, n_items, logits, &n_rows);
    mil_runner_leave(stepper->runner);
    if (status != MIL_OK) {
        (void)snprintf(stepper->reason, sizeof stepper->reason, "%s", mil_status_message());
        return status;
    }
    take_samples(stepper, items, n_items, samples);
    if (logits != NULL)
        order_logits(stepper, logits, n_rows);
    return MIL_OK;
}

mil_status mil_stepper_step(mil_stepper *stepper, const mil_step_item *items, int32_t n_items,
                            mil_sample *samples, float *logits)
{
    pthread_mutex_lock(&stepper->lock);
    mil_status status = step_locked(stepper, items, n_items, samples, logits);
    pthread_mutex_unlock(&stepper->lock);
    return status;
}
