/* model/runner.h over a fake device: linked in place of the real one, because a test of the drivers
 * must make a step fail, hold one up, or read the plan it is given. */
#pragma once

#include "fake_device.h"

#include "base/memory.h"
#include "model/runner.h"

#include <pthread.h>
#include <stdatomic.h>

struct mil_model {
    mil_config config;
    size_t page_bytes;
    atomic_int n_held[16]; /* references of contents 0..15; the rest are not there */
    atomic_int n_entered;  /* runners inside */
    atomic_int n_plans;    /* given out */
    atomic_int n_early;    /* pages that became free while a step in flight named them */
    int32_t depth;         /* of its runners' queues */
    mil_model_memory memory;
    uint64_t graph_bytes; /* of memory, that its runners' graphs take */
    uint64_t fail_at;     /* this step fails */
    uint64_t count_from;  /* allocator calls are counted from this step */
    uint64_t count_to;    /* to this one */
    uint64_t calls_before;
    uint64_t calls_between;
    void (*on_step)(void *context, mil_plan *plan); /* before the step runs; may be NULL */
    void *context;
};

#define FAKE_RING 3

struct mil_runner {
    mil_model *model;
    mil_runner_options options;
    fake_device device;
    mil_plan *plans[FAKE_RING];
    mil_sample *samples[FAKE_RING];
    uint64_t n_submitted;
    uint64_t n_retired;
};

#define FAKE_VOCAB 24

static const mil_model FAKE_MODEL = {
    .config = {.vocab = FAKE_VOCAB, .max_position = 96},
    .page_bytes = 1000,
    .depth = 1,
    .memory = {.device = "fake", .n_free = (uint64_t)1 << 33, .n_total = (uint64_t)1 << 34},
};

const mil_config *mil_model_config(const mil_model *model)
{
    return &model->config;
}

mil_status mil_model_hold_adapter(mil_model *model, int32_t content)
{
    if (content < 0 || content >= 16 || model->n_held[content] == 0)
        return mil_fail(MIL_ERR_NOT_FOUND, "adapter content %d is not held", content);
    model->n_held[content]++;
    return MIL_OK;
}

mil_status mil_model_release_adapter(mil_model *model, int32_t content)
{
    if (content < 0 || content >= 16 || model->n_held[content] == 0)
        return mil_fail(MIL_ERR_NOT_FOUND, "adapter content %d is not held", content);
    model->n_held[content]--;
    return MIL_OK;
}

size_t mil_runner_page_bytes(const mil_model *model, int32_t page_size)
{
    return model->page_bytes * (size_t)page_size / 16;
}

size_t mil_runner_workspace_bytes(const mil_model *model, const mil_plan_limits *limits,
                                  int32_t page_size)
{
    (void)model;
    (void)page_size;
    return (size_t)limits->max_tokens * 100;
}

bool mil_model_is_on_device(const mil_model *model)
{
    return model->memory.is_device;
}

static void fake_ring_free(mil_runner *runner)
{
    for (int32_t i = 0; i < FAKE_RING; i++) {
        mil_free(runner->plans[i]);
        mil_free(runner->samples[i]);
    }
    mil_free(runner);
}

void mil_runner_memory_get(const mil_runner *runner, mil_runner_memory *memory)
{
    const mil_runner_options *options = &runner->options;
    *memory = (mil_runner_memory){
        .kv_bytes =
            (size_t)options->n_pages * mil_runner_page_bytes(runner->model, options->page_size),
        .workspace_bytes =
            mil_runner_workspace_bytes(runner->model, &options->limits, options->page_size),
        .graph_bytes = runner->model->graph_bytes,
    };
}

/* A device has less while a runner is there; a host's memory is not counted. */
static void fake_take(mil_runner *runner, bool takes)
{
    mil_model_memory *memory = &runner->model->memory;
    mil_runner_memory taken;
    mil_runner_memory_get(runner, &taken);
    uint64_t n_bytes = taken.kv_bytes + taken.workspace_bytes + taken.graph_bytes;
    if (memory->is_device)
        memory->n_free = takes ? memory->n_free - n_bytes : memory->n_free + n_bytes;
}

mil_status mil_runner_create(mil_runner **out, mil_model *model, const mil_runner_options *options)
{
    void *block;
    MIL_TRY(mil_alloc_checked(&block, 1, sizeof(mil_runner), "fake runner"));
    mil_runner *runner = block;
    for (int32_t i = 0; i < FAKE_RING; i++) {
        runner->plans[i] = mil_alloc(1, mil_plan_bytes(&options->limits));
        runner->samples[i] = mil_alloc((size_t)options->limits.max_logit_rows, sizeof(mil_sample));
        if (runner->plans[i] == NULL || runner->samples[i] == NULL) {
            fake_ring_free(runner);
            return mil_fail(MIL_ERR_MEMORY, "fake runner: no memory");
        }
    }
    runner->model = model;
    runner->options = *options;
    fake_device_init(&runner->device, &options->limits, options->n_pages, options->page_size,
                     model->config.vocab);
    fake_take(runner, true);
    *out = runner;
    return MIL_OK;
}

mil_status mil_runner_take_pages(mil_runner *runner, int32_t n_pages)
{
    fake_device_deinit(&runner->device);
    fake_take(runner, false);
    runner->options.n_pages = n_pages;
    fake_device_init(&runner->device, &runner->options.limits, n_pages, runner->options.page_size,
                     runner->model->config.vocab);
    fake_take(runner, true);
    return MIL_OK;
}

void mil_runner_free(mil_runner *runner)
{
    if (runner == NULL)
        return;
    fake_take(runner, false);
    fake_device_deinit(&runner->device);
    fake_ring_free(runner);
}

mil_status mil_runner_enter(mil_runner *runner)
{
    runner->model->n_entered++;
    return MIL_OK;
}

void mil_runner_leave(mil_runner *runner)
{
    runner->model->n_entered--;
}

mil_plan *mil_runner_plan(mil_runner *runner)
{
    mil_plan *plan = runner->plans[runner->n_submitted % FAKE_RING];
    mil_plan_reset(plan, &runner->options.limits, runner->n_submitted + 1);
    runner->model->n_plans++;
    return plan;
}

mil_status mil_model_memory_get(const mil_model *model, mil_model_memory *memory)
{
    *memory = model->memory;
    return MIL_OK;
}

int32_t mil_model_default_page_size(const mil_model *model)
{
    (void)model;
    return 16;
}

uint64_t mil_runner_capture_ns(const mil_runner *runner)
{
    (void)runner;
    return 0;
}

int32_t mil_runner_depth(const mil_runner *runner)
{
    return runner->model->depth;
}

/* Runs at once, as a fast device might. */
static mil_status fake_run(mil_runner *runner, float *logits)
{
    mil_model *model = runner->model;
    size_t at = runner->n_submitted % FAKE_RING;
    mil_plan *plan = runner->plans[at];
    uint64_t step = ++runner->n_submitted;
    if (step == model->count_from)
        model->calls_before = mil_memory_calls();
    if (step == model->count_to)
        model->calls_between = mil_memory_calls() - model->calls_before;
    if (model->on_step != NULL)
        model->on_step(model->context, plan);
    if (step == model->fail_at) {
        runner->n_submitted--; /* nothing of it was queued */
        return mil_fail(MIL_ERR_DEVICE, "fake device: step %d caught fire", (int)step);
    }
    MIL_TRY(mil_plan_check(plan, runner->options.n_pages, model->config.vocab));
    fake_device_run(&runner->device, plan, runner->samples[at], logits);
    return MIL_OK;
}

mil_status mil_runner_submit(mil_runner *runner)
{
    return fake_run(runner, NULL);
}

mil_status mil_runner_wait(mil_runner *runner, const mil_sample **samples)
{
    *samples = runner->samples[runner->n_retired++ % FAKE_RING];
    return MIL_OK;
}

mil_status mil_runner_step(mil_runner *runner, mil_sample *samples, float *logits)
{
    mil_batch batch;
    const mil_sample *chosen;
    mil_plan_view(runner->plans[runner->n_submitted % FAKE_RING], &batch);
    MIL_TRY(fake_run(runner, logits));
    MIL_TRY(mil_runner_wait(runner, &chosen));
    if (samples != NULL)
        memcpy(samples, chosen, (size_t)batch.header->n_logit_rows * sizeof *chosen);
    return MIL_OK;
}

/* Whether a row of the step sees the page. */
static bool fake_step_names(const mil_runner *runner, uint64_t step, int32_t page)
{
    mil_batch batch;
    mil_plan_view(runner->plans[step % FAKE_RING], &batch);
    for (int32_t s = 0; s < batch.header->n_seqs; s++) {
        const int32_t *pages = runner->device.page_table +
                               batch.seq_slot[s] * runner->options.limits.max_pages_per_seq;
        for (int32_t i = 0; i * runner->options.page_size < batch.kv_lengths[s]; i++)
            if (pages[i] == page)
                return true;
    }
    return false;
}

void mil_runner_poison_page(mil_runner *runner, int32_t page)
{
    for (uint64_t step = runner->n_retired; step < runner->n_submitted; step++)
        runner->model->n_early += fake_step_names(runner, step, page);
    fake_device_poison(&runner->device, page);
}
