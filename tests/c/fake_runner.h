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
    uint64_t fail_at;      /* this step fails */
    uint64_t count_from;   /* allocator calls are counted from this step */
    uint64_t count_to;     /* to this one */
    uint64_t calls_before;
    uint64_t calls_between;
    void (*on_step)(void *context, mil_plan *plan); /* before the step runs; may be NULL */
    void *context;
};

struct mil_runner {
    mil_model *model;
    mil_runner_options options;
    fake_device device;
    mil_plan *plan;
    uint64_t step;
};

#define FAKE_VOCAB 24

static const mil_model FAKE_MODEL = {.config = {.vocab = FAKE_VOCAB, .max_position = 96},
                                     .page_bytes = 1000};

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

size_t mil_runner_workspace_bytes(const mil_model *model, const mil_plan_limits *limits)
{
    (void)model;
    return (size_t)limits->max_tokens * 100;
}

mil_status mil_runner_create(mil_runner **out, mil_model *model, const mil_runner_options *options)
{
    void *block;
    void *plan;
    MIL_TRY(mil_alloc_checked(&plan, 1, mil_plan_bytes(&options->limits), "fake plan"));
    mil_status status = mil_alloc_checked(&block, 1, sizeof(mil_runner), "fake runner");
    if (status != MIL_OK) {
        mil_free(plan);
        return status;
    }
    mil_runner *runner = block;
    runner->model = model;
    runner->options = *options;
    runner->plan = plan;
    fake_device_init(&runner->device, &options->limits, options->n_pages, options->page_size,
                     model->config.vocab);
    *out = runner;
    return MIL_OK;
}

void mil_runner_free(mil_runner *runner)
{
    if (runner == NULL)
        return;
    fake_device_deinit(&runner->device);
    mil_free(runner->plan);
    mil_free(runner);
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
    mil_plan_reset(runner->plan, &runner->options.limits, ++runner->step);
    runner->model->n_plans++;
    return runner->plan;
}

mil_status mil_runner_step(mil_runner *runner, mil_sample *samples, float *logits)
{
    mil_model *model = runner->model;
    if (runner->step == model->count_from)
        model->calls_before = mil_memory_calls();
    if (runner->step == model->count_to)
        model->calls_between = mil_memory_calls() - model->calls_before;
    if (model->on_step != NULL)
        model->on_step(model->context, runner->plan);
    if (runner->step == model->fail_at)
        return mil_fail(MIL_ERR_DEVICE, "fake device: step %d caught fire", (int)runner->step);
    MIL_TRY(mil_plan_check(runner->plan, runner->options.n_pages, model->config.vocab));
    fake_device_run(&runner->device, runner->plan, samples, logits);
    return MIL_OK;
}

void mil_runner_poison_page(mil_runner *runner, int32_t page)
{
    fake_device_poison(&runner->device, page);
}
