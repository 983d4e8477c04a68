/* One driver's state on every rank of a model, and the step over it: commands, forward, sample.
 *
 * Ranks read the one plan in place: they are threads of this process. Every rank samples the same
 * token from the same logits, so nothing is sent back between steps; rank 0 alone writes results
 * out. All memory is taken at create: a step allocates nothing. */
#include "model/runner.h"

#include "base/machine.h"
#include "model/state.h"

#include <stdlib.h>
#include <string.h>

/* Plans in flight. One is enough where a step has ended when mil_runner_step returns. */
#define RING_DEPTH 1

struct mil_runner {
    mil_model *model;
    mil_runner_options options;
    mil_state *states; /* [world] */
    mil_plan *plans[RING_DEPTH];
    uint64_t n_plans;             /* given out */
    const mil_content **contents; /* [max_adapter_slots] that the plan's adapter sets name */
    int32_t *sample_positions;    /* [max_logit_rows] */
    int32_t n_positions;          /* rows of the rope tables that are ready for this runner */
    bool is_checked;
    bool is_entered;
    bool is_dead;
    mil_thread_state thread_state;
    /* The step that runs. */
    mil_batch batch;
    mil_sample *samples;
    float *logits;
};

/* ---- sizes ---- */

/* SIZE_MAX where it does not fit in one. */
static size_t sum_of(size_t a, size_t b)
{
    size_t sum;
    return mil_add(a, b, &sum) ? sum : SIZE_MAX;
}

size_t mil_runner_workspace_bytes(const mil_model *model, const mil_plan_limits *limits)
{
    size_t total = 0;
    for (int32_t rank = 0; rank < model->world; rank++)
        total = sum_of(total, mil_state_workspace_bytes(model, rank, limits));
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
    const struct {
        const char *name;
        int32_t value, least, most;
    } fields[] = {
        {"max_seqs", limits->max_seqs, 1, 1 << 20},
        {"max_tokens", limits->max_tokens, 1, 1 << 20},
        {"max_logit_rows", limits->max_logit_rows, 1, limits->max_tokens},
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

static mil_status check_memory(const mil_model *model, const mil_runner_options *options)
{
    size_t workspace = mil_runner_workspace_bytes(model, &options->limits);
    size_t kv;
    if (!mil_mul((size_t)options->n_pages, mil_runner_page_bytes(model, options->page_size), &kv))
        kv = SIZE_MAX;
    uint64_t n_free = mil_memory_free_bytes();
    if (sum_of(workspace, kv) > n_free)
        return mil_fail(
            MIL_ERR_MEMORY,
            "runner: %zu bytes of KV pages and %zu of workspace are wanted, %llu are free", kv,
            workspace, (unsigned long long)n_free);
    return MIL_OK;
}

static mil_status init_runner(mil_runner *runner)
{
    const mil_plan_limits *limits = &runner->options.limits;
    mil_model *model = runner->model;
    MIL_TRY(mil_alloc_checked((void **)&runner->states, (size_t)model->world, sizeof(mil_state),
                              "runner"));
    for (int32_t i = 0; i < RING_DEPTH; i++)
        MIL_TRY(mil_alloc_checked((void **)&runner->plans[i], mil_plan_bytes(limits), 1, "plan"));
    MIL_TRY(mil_alloc_checked((void **)&runner->contents, (size_t)limits->max_adapter_slots,
                              sizeof(mil_content *), "runner"));
    MIL_TRY(mil_alloc_checked((void **)&runner->sample_positions, (size_t)limits->max_logit_rows,
                              sizeof(int32_t), "runner"));
    for (int32_t rank = 0; rank < model->world; rank++)
        MIL_TRY(mil_state_init(&runner->states[rank], model, rank, &runner->options));
    int64_t longest = (int64_t)limits->max_pages_per_seq * runner->options.page_size;
    runner->n_positions =
        longest < model->config.max_position ? (int32_t)longest : model->config.max_position;
    pthread_mutex_lock(&model->rope_lock);
    mil_rope_reach(&model->rope, runner->n_positions);
    pthread_mutex_unlock(&model->rope_lock);
    return MIL_OK;
}

mil_status mil_runner_create(mil_runner **out, mil_model *model, const mil_runner_options *options)
{
    MIL_TRY(check_options(options));
    MIL_TRY(check_memory(model, options));
    mil_runner *runner;
    MIL_TRY(mil_alloc_checked((void **)&runner, 1, sizeof *runner, "runner"));
    runner->model = model;
    runner->options = *options;
    const char *check = getenv("MILPY_CHECK");
    runner->is_checked = options->poison || (check != NULL && strcmp(check, "1") == 0);
    mil_status status = init_runner(runner);
    if (status != MIL_OK) {
        mil_runner_free(runner);
        return status;
    }
    *out = runner;
    return MIL_OK;
}

void mil_runner_free(mil_runner *runner)
{
    if (runner == NULL)
        return;
    for (int32_t rank = 0; runner->states != NULL && rank < runner->model->world; rank++)
        mil_state_deinit(&runner->states[rank]);
    mil_free(runner->sample_positions);
    mil_free(runner->contents);
    for (int32_t i = 0; i < RING_DEPTH; i++)
        mil_free(runner->plans[i]);
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

/* Logits and choice of one block of rows. */
static mil_status sample_block(mil_runner *runner, mil_step *step, int32_t rank, int32_t begin,
                               int32_t n_rows)
{
    const mil_decoder *decoder = &runner->model->ranks[rank].decoder;
    mil_state *state = &runner->states[rank];
    size_t vocab = (size_t)runner->model->config.vocab;
    MIL_TRY(mil_decoder_logits(decoder, step, &state->activations, begin, n_rows));
    const mil_sample_args args = {
        .out = rank == 0 && runner->samples != NULL ? runner->samples + begin : state->samples,
        .logits = state->activations.logits,
        .slots_of = runner->batch.logit_slots + begin,
        .positions = runner->sample_positions + begin,
        .feeds = runner->batch.logit_feeds + begin,
        .slots = step->slots,
        .n_rows = n_rows,
        .vocab = runner->model->config.vocab,
        .ld = mil_head_ld(&decoder->head),
    };
    MIL_TRY(runner->model->backend->sample(step->context, &args));
    for (int32_t row = 0; rank == 0 && runner->logits != NULL && row < n_rows; row++)
        memcpy(runner->logits + (size_t)(begin + row) * vocab, args.logits + row * args.ld,
               vocab * sizeof(float));
    return MIL_OK;
}

static mil_status step_rank(void *argument, int32_t rank)
{
    mil_runner *runner = argument;
    mil_model *model = runner->model;
    mil_state *state = &runner->states[rank];
    const mil_batch *batch = &runner->batch;
    mil_state_apply(state, batch, runner->contents, rank);
    if (batch->header->n_tokens == 0)
        return MIL_OK;
    mil_step step = {
        .context = &state->context,
        .comm = model->comms[rank],
        .batch = batch,
        .slots = &state->slots,
        .kv = &state->kv,
        .lora = &state->lora,
        .lora_v = state->activations.lora_v,
        .lora_rank = mil_state_lora_rank(state, batch),
        .cos_table = model->rope.cos_table,
        .sin_table = model->rope.sin_table,
        .wide = state->activations.wide,
        .narrow = state->activations.narrow,
    };
    MIL_TRY(model->backend->gather_tokens(&state->context, state->activations.tokens, batch,
                                          &state->slots));
    MIL_TRY(mil_decoder_forward(&model->ranks[rank].decoder, &step, &state->activations));
    int32_t n_rows = batch->header->n_logit_rows;
    for (int32_t begin = 0; begin < n_rows; begin += MIL_LOGIT_BLOCK) {
        int32_t n = n_rows - begin < MIL_LOGIT_BLOCK ? n_rows - begin : MIL_LOGIT_BLOCK;
        MIL_TRY(sample_block(runner, &step, rank, begin, n));
    }
    return MIL_OK;
}

/* ---- the step ---- */

mil_plan *mil_runner_plan(mil_runner *runner)
{
    mil_plan *plan = runner->plans[runner->n_plans % RING_DEPTH];
    mil_plan_reset(plan, &runner->options.limits, ++runner->n_plans);
    return plan;
}

/* What the plan's own check cannot know: how far the pages of a slot and the rope tables reach. */
static mil_status check_lengths(const mil_runner *runner)
{
    const mil_batch *batch = &runner->batch;
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

static mil_status find_contents(mil_runner *runner)
{
    const mil_batch *batch = &runner->batch;
    for (int32_t i = 0; i < batch->header->n_adapter_sets; i++) {
        int32_t id = batch->adapter_sets[i].content;
        runner->contents[i] = NULL;
        if (id != MIL_NO_ADAPTER)
            MIL_TRY(mil_contents_find(&runner->model->contents, id, &runner->contents[i]));
    }
    return MIL_OK;
}

/* A row's draw is counted by the index in its sequence of the token that it chooses. positions[]
 * would not do: they are what RoPE sees. */
static void find_sample_positions(mil_runner *runner)
{
    const mil_batch *batch = &runner->batch;
    int32_t s = 0;
    for (int32_t i = 0; i < batch->header->n_logit_rows; i++) {
        int32_t row = batch->logit_rows[i];
        while (batch->query_indptr[s + 1] <= row)
            s++;
        runner->sample_positions[i] = batch->kv_lengths[s] - (batch->query_indptr[s + 1] - row) + 1;
    }
}

static mil_status run_step(mil_runner *runner, mil_plan *plan)
{
    mil_plan_view(plan, &runner->batch);
    if (runner->is_checked) {
        MIL_TRY(mil_plan_check(plan, runner->options.n_pages, runner->model->config.vocab));
        MIL_TRY(check_lengths(runner));
    }
    MIL_TRY(find_contents(runner));
    find_sample_positions(runner);
    return mil_team_run(runner->model->team, step_rank, runner);
}

mil_status mil_runner_step(mil_runner *runner, mil_sample *samples, float *logits)
{
    if (runner->is_dead)
        return mil_fail(MIL_ERR_CLOSED, "runner: an earlier step failed");
    if (!runner->is_entered || runner->n_plans == 0)
        return mil_fail(MIL_ERR_INTERNAL, "runner: found a step without %s",
                        runner->is_entered ? "a plan" : "mil_runner_enter");
    runner->samples = samples;
    runner->logits = logits;
    mil_status status = run_step(runner, runner->plans[(runner->n_plans - 1) % RING_DEPTH]);
    runner->is_dead = status != MIL_OK;
    return status;
}

/* ---- poison ---- */

void mil_runner_poison_page(mil_runner *runner, int32_t page)
{
    if (!runner->options.poison)
        return;
    for (int32_t rank = 0; rank < runner->model->world; rank++)
        mil_state_poison(&runner->states[rank], page);
}
