/* One driver's state on every rank of a model, and the step over it: commands, forward, sample.
 *
 * Every rank reads the one plan, the host's in place and a device's by its first op. Every rank
 * samples the same token from the same logits, so nothing is sent back between steps; rank 0's
 * samples are the ones read. All memory is taken at create: a step allocates nothing. */
#include "model/runner.h"

#include "base/machine.h"
#include "base/switch.h"
#include "base/threads.h"
#include "model/warmup.h"
#include "ops/chaos.h"

#include <stdio.h>
#include <string.h>

/* Plans that exist: the one that is filled, and those that a device may still read. */
#define RING_DEPTH (MIL_BREAK_RING ? 1 : 3)

/* One step on its way: host memory that every rank's device reads and writes in place. */
typedef struct ring_entry {
    mil_plan *plan;
    const mil_lora_module **adapters; /* [world][max_adapter_slots] as mil_begin_args has it */
    mil_sample *samples;              /* [max_logit_rows] */
} ring_entry;

struct mil_runner {
    mil_model *model;
    mil_runner_options options;
    mil_state *states; /* [world] */
    mil_slab ring_slab;
    ring_entry ring[RING_DEPTH];
    uint64_t n_submitted;
    uint64_t n_retired;
    int32_t n_positions;    /* rows of the rope tables that are ready for this runner */
    uint64_t n_free_before; /* on the model's devices, when this runner began */
    size_t graph_bytes;     /* as mil_runner_memory has it */
    uint64_t capture_ns;    /* of all captures so far */
    bool is_warm;           /* every kernel of a step has run once */
    bool has_plan;          /* given out and not submitted */
    bool is_checked;
    bool is_entered;
    bool is_dead;
    mil_thread_state thread_state;
    mil_rank_step step; /* that is submitted */
    int32_t bucket;     /* that its launches are shaped by, -1: by what is there */
};

/* ---- sizes ---- */

/* SIZE_MAX where it does not fit in one. */
static size_t sum_of(size_t a, size_t b)
{
    size_t sum;
    return mil_add(a, b, &sum) ? sum : SIZE_MAX;
}

/* Deal out the ring, or measure it; returns its bytes. */
static size_t place_ring(ring_entry *ring, const mil_model *model, const mil_plan_limits *limits,
                         void *data)
{
    size_t n_adapters = (size_t)model->world * (size_t)limits->max_adapter_slots;
    mil_arena arena = {.data = data};
    for (int32_t i = 0; i < RING_DEPTH; i++) {
        ring_entry *entry = &ring[i];
        entry->plan = mil_arena_take(&arena, mil_plan_bytes(limits), 1);
        entry->adapters = mil_arena_take(&arena, n_adapters, sizeof *entry->adapters);
        entry->samples =
            mil_arena_take(&arena, (size_t)limits->max_logit_rows, sizeof *entry->samples);
    }
    return arena.used;
}

size_t mil_runner_workspace_bytes(const mil_model *model, const mil_plan_limits *limits,
                                  int32_t page_size)
{
    ring_entry unused[RING_DEPTH];
    bool is_host = model->backend->device->is_host;
    size_t total = is_host ? place_ring(unused, model, limits, NULL) : 0;
    for (int32_t rank = 0; rank < model->world; rank++)
        total = sum_of(total, mil_state_workspace_bytes(model, rank, limits, page_size));
    return total;
}

size_t mil_runner_page_bytes(const mil_model *model, int32_t page_size)
{
    size_t total = 0;
    for (int32_t rank = 0; rank < model->world; rank++)
        total += mil_state_page_bytes(model, rank, page_size);
    return total;
}

/* ---- create and free ---- */

static mil_status check_options(const mil_runner_options *options)
{
    const mil_plan_limits *limits = &options->limits;
    /* A decode step of the largest bucket has as many. */
    int32_t least_rows =
        limits->max_seqs < limits->max_tokens ? limits->max_seqs : limits->max_tokens;
    const struct {
        const char *name;
        int32_t value, least, most;
    } fields[] = {
        {"max_seqs", limits->max_seqs, 1, 1 << 20},
        {"max_tokens", limits->max_tokens, 1, 1 << 20},
        {"max_logit_rows", limits->max_logit_rows, least_rows, limits->max_tokens},
        {"max_pages_per_seq", limits->max_pages_per_seq, 1, 1 << 24},
        {"max_page_sets", limits->max_page_sets, 1, INT32_MAX},
        {"max_adapter_slots", limits->max_adapter_slots, 0, 1 << 20},
        {"n_pages", options->n_pages, 1, INT32_MAX},
        {"page_size", options->page_size, 16, MIL_MAX_PAGE_SIZE},
    };
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++)
        if (fields[i].value < fields[i].least || fields[i].value > fields[i].most)
            return mil_fail(MIL_ERR_ARGUMENT, "runner: %s is %d, expected %d..%d", fields[i].name,
                            fields[i].value, fields[i].least, fields[i].most);
    if ((options->page_size & (options->page_size - 1)) != 0)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "runner: page_size is %d, expected 16, 32, 64, 128 or 256",
                        options->page_size);
    return MIL_OK;
}

/* workspace: what is still to be taken of it. */
static mil_status check_memory(const mil_runner *runner, int32_t n_pages, size_t workspace)
{
    size_t page_bytes = mil_runner_page_bytes(runner->model, runner->options.page_size);
    mil_model_memory memory;
    size_t kv;
    if (!mil_mul((size_t)n_pages, page_bytes, &kv))
        kv = SIZE_MAX;
    MIL_TRY(mil_model_memory_get(runner->model, &memory));
    size_t total = sum_of(workspace, kv);
    if (total <= memory.n_free)
        return MIL_OK;
    return mil_fail(MIL_ERR_MEMORY,
                    "engine: needs %s of KV pages and %s of workspace, %s has %s free of %s: %s "
                    "too few",
                    mil_memory_show(kv).text, mil_memory_show(workspace).text, memory.device,
                    mil_memory_show(memory.n_free).text, mil_memory_show(memory.n_total).text,
                    mil_memory_show(total - memory.n_free).text);
}

static mil_status init_runner(mil_runner *runner)
{
    mil_model *model = runner->model;
    const mil_runner_options *options = &runner->options;
    mil_model_memory memory;
    MIL_TRY(check_memory(runner, options->n_pages,
                         mil_runner_workspace_bytes(model, &options->limits, options->page_size)));
    MIL_TRY(mil_model_memory_get(model, &memory));
    runner->n_free_before = memory.n_free;
    MIL_TRY(mil_alloc_checked((void **)&runner->states, (size_t)model->world, sizeof(mil_state),
                              "runner"));
    runner->step =
        (mil_rank_step){.model = model, .states = runner->states, .limits = &options->limits};
    size_t ring_bytes = place_ring(runner->ring, model, &options->limits, NULL);
    MIL_TRY(model->backend->device->alloc_host(model->ranks[0].queue, &runner->ring_slab,
                                               ring_bytes, "plans"));
    (void)place_ring(runner->ring, model, &options->limits, runner->ring_slab.data);
    runner->n_positions = mil_state_positions(model, &options->limits, options->page_size);
    pthread_mutex_lock(&model->rope_lock);
    mil_rope_reach(&model->rope, runner->n_positions);
    pthread_mutex_unlock(&model->rope_lock);
    for (int32_t rank = 0; rank < model->world; rank++)
        MIL_TRY(mil_state_init(&runner->states[rank], model, rank, options));
    return MIL_OK;
}

void mil_runner_free(mil_runner *runner)
{
    if (runner == NULL)
        return;
    mil_model *model = runner->model;
    /* What is in flight reads what goes now; that it failed was said where it was waited for. With
     * nothing in flight the queue is left alone: another driver may be capturing on it. */
    bool is_host = model->backend->device->is_host;
    if (!is_host && (runner->is_dead || runner->n_retired != runner->n_submitted)) {
        pthread_mutex_lock(&model->step_lock);
        mil_status status = model->backend->device->synchronize(model->ranks[0].queue);
        (void)status;
        pthread_mutex_unlock(&model->step_lock);
    }
    for (int32_t rank = 0; runner->states != NULL && rank < model->world; rank++)
        mil_state_deinit(&runner->states[rank]);
    model->backend->device->free_host(model->ranks[0].queue, &runner->ring_slab);
    mil_free(runner->states);
    mil_free(runner);
}

/* ---- who may step ---- */

mil_status mil_runner_enter(mil_runner *runner)
{
    mil_thread_state saved;
    /* First, because in a forked child it fails where the lock might never open. */
    MIL_TRY(mil_pool_enter(runner->model->pools[0], &saved));
    pthread_mutex_lock(&runner->model->step_lock);
    runner->thread_state = saved;
    runner->is_entered = true;
    return MIL_OK;
}

void mil_runner_leave(mil_runner *runner)
{
    mil_thread_state saved = runner->thread_state;
    runner->is_entered = false;
    pthread_mutex_unlock(&runner->model->step_lock);
    mil_pool_leave(runner->model->pools[0], &saved);
}

/* ---- the step of one rank ---- */

static mil_status run_batch(const mil_runner *runner, const mil_batch *batch, int32_t rank)
{
    const mil_device *device = runner->model->backend->device;
    const mil_state *state = &runner->states[rank];
    if (runner->bucket >= 0 && runner->options.has_graphs) {
        bool has_lora = batch->header->bucket_segments > 0;
        struct mil_queue *queue = state->context.queue;
        MIL_TRY(device->graph_launch(queue, state->graphs.forward[runner->bucket][has_lora]));
        return device->graph_launch(queue, state->graphs.choice[runner->bucket]);
    }
    const mil_step step = mil_rank_operands(&runner->step, batch, rank);
    MIL_TRY(mil_rank_forward(&runner->step, &step, rank));
    return mil_rank_choose(&runner->step, &step, rank);
}

/* Every rank chooses the same tokens from the same logits; rank 0's samples are the ones read. */
static mil_status send_samples(const mil_runner *runner, const mil_state *state, int32_t index)
{
    size_t n_bytes = (size_t)runner->step.batch.header->n_logit_rows * sizeof(mil_sample);
    return n_bytes == 0 ? MIL_OK
                        : runner->model->backend->device->send_out(state->context.queue,
                                                                   runner->ring[index].samples,
                                                                   state->samples, n_bytes);
}

static mil_status step_rank(void *argument, int32_t rank)
{
    const mil_runner *runner = argument;
    const mil_state *state = &runner->states[rank];
    const mil_batch batch = mil_rank_batch(&runner->step, rank);
    int32_t index = (int32_t)(runner->n_submitted % RING_DEPTH);
    MIL_TRY(mil_rank_begin(&runner->step, &batch, rank));
    if (batch.header->n_tokens > 0)
        MIL_TRY(run_batch(runner, &batch, rank));
    if (rank != 0)
        return MIL_OK;
    MIL_TRY(send_samples(runner, state, index));
    return runner->model->backend->device->record(state->context.queue, index);
}

/* What the next step is made of. */
static void aim_at(mil_runner *runner, const ring_entry *entry)
{
    runner->step.plan = entry->plan;
    runner->step.adapters = entry->adapters;
}

/* ---- pages ---- */

/* Every kernel of a step runs once, every decode step is captured. */
static mil_status warm_up(mil_runner *runner)
{
    mil_model *model = runner->model;
    mil_status status = MIL_OK;
    aim_at(runner, &runner->ring[0]);
    if (!runner->is_warm)
        status = mil_warmup_kernels(&runner->step);
    runner->is_warm = status == MIL_OK;
    uint64_t begin = mil_clock_ns();
    if (status == MIL_OK)
        status = mil_warmup_graphs(&runner->step, runner->options.has_graphs);
    /* Graphs are on their way to the device, and what they take of it is to be measured. */
    if (status == MIL_OK)
        status = model->backend->device->synchronize(model->ranks[0].queue);
    runner->capture_ns += runner->options.has_graphs ? mil_clock_ns() - begin : 0;
    return status;
}

static mil_status prepare_steps(mil_runner *runner)
{
    mil_model *model = runner->model;
    const mil_device *device = model->backend->device;
    struct mil_queue *queue = model->ranks[0].queue;
    int32_t mode = 0;
    if (device->is_host)
        return MIL_OK;
    /* The queue is the model's: what another driver put on it meanwhile would be captured too. */
    pthread_mutex_lock(&model->step_lock);
    mil_status status =
        device->relax_capture != NULL ? device->relax_capture(queue, &mode) : MIL_OK;
    if (status == MIL_OK) {
        status = warm_up(runner);
        if (device->restore_capture != NULL)
            device->restore_capture(queue, mode);
    }
    pthread_mutex_unlock(&model->step_lock);
    runner->is_dead = runner->is_dead || status != MIL_OK;
    return status;
}

static void add_slab(size_t *n_bytes, size_t *untouched, const mil_slab *slab, bool is_host)
{
    *n_bytes += slab->n_bytes;
    *untouched += is_host ? mil_slab_untouched_bytes(slab) : 0;
}

void mil_runner_memory_get(const mil_runner *runner, mil_runner_memory *memory)
{
    bool is_host = runner->model->backend->device->is_host;
    *memory = (mil_runner_memory){.graph_bytes = runner->graph_bytes};
    size_t *plans = is_host ? &memory->workspace_bytes : &memory->pinned_bytes;
    add_slab(plans, &memory->untouched_bytes, &runner->ring_slab, is_host);
    for (int32_t rank = 0; rank < runner->model->world; rank++) {
        const mil_state *state = &runner->states[rank];
        add_slab(&memory->workspace_bytes, &memory->untouched_bytes, &state->slab, is_host);
        add_slab(&memory->kv_bytes, &memory->untouched_bytes, &state->kv_slab, is_host);
    }
}

uint64_t mil_runner_capture_ns(const mil_runner *runner)
{
    return runner->capture_ns;
}

/* What the devices have less than before this runner, and that is not in its slabs. */
static mil_status measure_graphs(mil_runner *runner)
{
    mil_model_memory now;
    mil_runner_memory ours;
    if (runner->model->backend->device->is_host)
        return MIL_OK;
    MIL_TRY(mil_model_memory_get(runner->model, &now));
    mil_runner_memory_get(runner, &ours);
    uint64_t known = now.n_free + ours.kv_bytes + ours.workspace_bytes;
    runner->graph_bytes =
        runner->n_free_before > known ? (size_t)(runner->n_free_before - known) : 0;
    return MIL_OK;
}

mil_status mil_runner_take_pages(mil_runner *runner, int32_t n_pages)
{
    mil_model *model = runner->model;
    MIL_TRY(check_memory(runner, n_pages, 0));
    for (int32_t rank = 0; rank < model->world; rank++)
        MIL_TRY(mil_state_take_pages(&runner->states[rank], model, rank, n_pages,
                                     runner->options.page_size));
    runner->options.n_pages = n_pages;
    MIL_TRY(prepare_steps(runner));
    return measure_graphs(runner);
}

/* ---- create ---- */

mil_status mil_runner_create(mil_runner **out, mil_model *model, const mil_runner_options *options)
{
    MIL_TRY(check_options(options));
    mil_runner *runner;
    bool is_checked;
    MIL_TRY(mil_switch_read(&is_checked, "MILPY_CHECK", false));
    MIL_TRY(mil_alloc_checked((void **)&runner, 1, sizeof *runner, "runner"));
    runner->model = model;
    runner->options = *options;
    runner->is_checked = options->poison || is_checked;
    if (options->poison)
        mil_contents_poison(&model->contents);
    mil_status status = init_runner(runner);
    if (status == MIL_OK)
        status = mil_runner_take_pages(runner, options->n_pages);
    if (status != MIL_OK) {
        mil_runner_free(runner);
        return status;
    }
    *out = runner;
    return MIL_OK;
}

/* ---- the step ---- */

int32_t mil_runner_depth(const mil_runner *runner)
{
    return runner->model->backend->device->depth;
}

static void poison_entry(const mil_runner *runner, const ring_entry *entry)
{
    const mil_plan_limits *limits = &runner->options.limits;
    size_t n_adapters = (size_t)runner->model->world * (size_t)limits->max_adapter_slots;
    memset(entry->plan, 0xff, mil_plan_bytes(limits));
    memset(entry->adapters, 0xff, n_adapters * sizeof *entry->adapters);
    memset(entry->samples, 0xff, (size_t)limits->max_logit_rows * sizeof *entry->samples);
}

mil_plan *mil_runner_plan(mil_runner *runner)
{
    const ring_entry *entry = &runner->ring[runner->n_submitted % RING_DEPTH];
    if (runner->options.poison)
        poison_entry(runner, entry);
    mil_plan_reset(entry->plan, &runner->options.limits, runner->n_submitted + 1);
    runner->has_plan = true;
    return entry->plan;
}

/* What the plan's own check cannot know: how far the pages of a slot and the rope tables reach. */
static mil_status check_lengths(const mil_runner *runner)
{
    const mil_batch *batch = &runner->step.batch;
    const mil_runner_options *options = &runner->options;
    int64_t longest = (int64_t)options->limits.max_pages_per_seq * options->page_size;
    for (int32_t s = 0; s < batch->header->n_seqs; s++)
        if (batch->kv_lengths[s] > longest)
            return mil_fail(MIL_ERR_INTERNAL, "plan: kv_lengths[%d] is %d, expected <= %lld", s,
                            batch->kv_lengths[s], (long long)longest);
    for (int32_t t = 0; t < batch->header->n_tokens; t++)
        if (batch->positions[t] >= runner->n_positions)
            return mil_fail(MIL_ERR_INTERNAL, "plan: positions[%d] is %d, expected < %d", t,
                            batch->positions[t], runner->n_positions);
    return MIL_OK;
}

/* What shapes the launches holds what is there. */
static mil_status check_buckets(const mil_plan_header *header)
{
    if (header->bucket_seqs >= header->n_seqs && header->bucket_tokens >= header->n_tokens &&
        header->bucket_logit_rows >= header->n_logit_rows &&
        header->bucket_segments >= header->n_segments &&
        header->bucket_lora_rows >= header->n_lora_rows)
        return MIL_OK;
    return mil_fail(MIL_ERR_INTERNAL, "plan: step %llu has buckets below its counts",
                    (unsigned long long)header->step);
}

/* Where the adapter sets' descriptors lie, for every rank. */
static mil_status find_contents(mil_runner *runner)
{
    const mil_batch *batch = &runner->step.batch;
    size_t max_slots = (size_t)runner->options.limits.max_adapter_slots;
    for (int32_t i = 0; i < batch->header->n_adapter_sets; i++) {
        const mil_adapter_set *set = &batch->adapter_sets[i];
        const mil_content *content = NULL;
        if (set->content != MIL_NO_ADAPTER)
            MIL_TRY(mil_contents_find(&runner->model->contents, set->content, &content));
        for (int32_t rank = 0; rank < runner->model->world; rank++) {
            runner->step.adapters[(size_t)rank * max_slots + (size_t)i] =
                content != NULL ? content->adapters[rank].device_modules : NULL;
            mil_state_note_adapter(&runner->states[rank], set->adapter_slot, content, rank);
        }
    }
    return MIL_OK;
}

/* A pure decode step takes the bucket that holds it; others are shaped by what is there. */
static void choose_buckets(mil_runner *runner)
{
    mil_plan_header *header = runner->step.batch.header;
    const mil_graphs *graphs = &runner->states[0].graphs;
    bool is_decode = header->n_seqs > 0 && header->n_tokens == header->n_seqs &&
                     header->n_logit_rows <= header->n_seqs && runner->step.logits == NULL;
    runner->bucket = is_decode ? mil_graphs_find(graphs, header->n_seqs) : -1;
    bool has_bucket = runner->bucket >= 0;
    int32_t size = has_bucket ? graphs->sizes[runner->bucket] : 0;
    header->bucket_seqs = has_bucket ? size : header->n_seqs;
    header->bucket_tokens = has_bucket ? size : header->n_tokens;
    header->bucket_logit_rows = has_bucket ? size : header->n_logit_rows;
    header->bucket_chunks = has_bucket ? 0 : header->n_seqs - header->n_decode;
    header->bucket_segments = has_bucket && header->n_segments > 0
                                  ? runner->options.limits.max_adapter_slots
                                  : header->n_segments;
    header->bucket_lora_rows = has_bucket ? size : header->n_lora_rows;
}

static mil_status submit(mil_runner *runner)
{
    aim_at(runner, &runner->ring[runner->n_submitted % RING_DEPTH]);
    mil_plan *plan = runner->step.plan;
    mil_plan_view(plan, &runner->step.batch);
    if (runner->is_checked) {
        MIL_TRY(mil_plan_check(plan, runner->options.n_pages, runner->model->config.vocab));
        MIL_TRY(check_lengths(runner));
    }
    MIL_TRY(find_contents(runner));
    mil_plan_find_positions(plan);
    choose_buckets(runner);
    if (runner->is_checked)
        MIL_TRY(check_buckets(runner->step.batch.header));
    MIL_TRY(mil_team_run(runner->model->team, step_rank, runner));
    runner->n_submitted++;
    return MIL_OK;
}

static mil_status check_can_step(const mil_runner *runner)
{
    if (runner->is_dead)
        return mil_fail(MIL_ERR_CLOSED, "runner: an earlier step failed");
    if (!runner->is_entered || !runner->has_plan)
        return mil_fail(MIL_ERR_INTERNAL, "runner: found a step without %s",
                        runner->is_entered ? "a plan" : "mil_runner_enter");
    return MIL_OK;
}

static mil_status submit_with(mil_runner *runner, float *logits)
{
    MIL_TRY(check_can_step(runner));
    runner->has_plan = false;
    runner->step.logits = logits;
    mil_chaos_sleep();
    mil_status status = submit(runner);
    mil_chaos_sleep();
    runner->is_dead = status != MIL_OK;
    return status;
}

mil_status mil_runner_submit(mil_runner *runner)
{
    return submit_with(runner, NULL);
}

/* A device's fault shows only here, where its step is waited for. */
static mil_status name_step(uint64_t step, mil_status status)
{
    char what[1024];
    if (status == MIL_OK)
        return MIL_OK;
    (void)snprintf(what, sizeof what, "%s", mil_status_message());
    return mil_fail(status, "step %llu: %s", (unsigned long long)step, what);
}

mil_status mil_runner_wait(mil_runner *runner, const mil_sample **samples)
{
    if (runner->n_retired == runner->n_submitted)
        return mil_fail(MIL_ERR_INTERNAL, "runner: found a wait with no step in flight");
    int32_t index = (int32_t)(runner->n_retired++ % RING_DEPTH);
    const mil_device *device = runner->model->backend->device;
    struct mil_queue *queue = runner->model->ranks[0].queue;
    mil_status status = mil_chaos_is_late() ? device->synchronize(queue) : MIL_OK;
    if (status == MIL_OK)
        status = device->wait(queue, index);
    mil_chaos_sleep();
    runner->is_dead = runner->is_dead || status != MIL_OK;
    *samples = runner->ring[index].samples;
    return name_step(runner->n_retired, status);
}

mil_status mil_runner_step(mil_runner *runner, mil_sample *samples, float *logits)
{
    const mil_sample *chosen;
    MIL_TRY(submit_with(runner, logits));
    MIL_TRY(mil_runner_wait(runner, &chosen));
    if (samples != NULL)
        memcpy(samples, chosen,
               (size_t)runner->step.batch.header->n_logit_rows * sizeof(mil_sample));
    return MIL_OK;
}

/* ---- poison ---- */

void mil_runner_poison_page(mil_runner *runner, int32_t page)
{
    if (!runner->options.poison)
        return;
    for (int32_t rank = 0; rank < runner->model->world; rank++)
        if (mil_state_poison(&runner->states[rank], page) != MIL_OK)
            runner->is_dead = true;
}
