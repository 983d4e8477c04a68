/* The engine: requests in, steps in a loop on a lent thread, batches of events out.
 *
 * One lock guards what threads share: the inbox, the index of open requests, cancels, events. It is
 * never held over a step. The scheduler and the runner belong to the thread in mil_engine_run; when
 * no thread is there, to whoever holds the lock. The lock comes before the model's locks. */
#include "milpy.h"

#include "base/machine.h"
#include "base/memory.h"
#include "base/threads.h"
#include "engine/budget.h"
#include "engine/events.h"
#include "engine/options.h"
#include "model/runner.h"
#include "scheduler/scheduler.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define FIRST_EVENTS 1024
#define REASON_BYTES 1024

/* As mil_engine_stats has them. */
typedef struct loop_times {
    uint64_t fill_ns, submit_ns, wait_ns, retire_ns;
} loop_times;

struct mil_engine {
    mil_model *model;
    mil_engine_options options; /* completed */
    int32_t vocab;
    pid_t process; /* that made it: a forked child has none of its threads */

    /* The loop's. */
    mil_runner *runner;
    mil_scheduler *scheduler;
    mil_event *step_events; /* [max_num_seqs] */
    uint64_t last_step;     /* submitted */
    int32_t n_in_flight;    /* submitted and not retired */
    bool can_submit;        /* there is work, and room for what it may say */
    size_t workspace_bytes;
    bool is_on_device; /* whose memory is not the host's */
    bool is_entered;   /* holds the model's step lock */
    loop_times spent;

    pthread_mutex_t lock;
    pthread_cond_t work;  /* for the loop: there is something to do */
    pthread_cond_t ready; /* for pollers: there are events, or there will be none */
    bool has_sync;        /* the three above exist */

    /* Under the lock. */
    mil_request_list inbox;
    mil_request_index index; /* every request that is not freed yet */
    mil_request *cancels;    /* linked through cancel_next */
    int32_t n_open;          /* requests whose last event is not queued yet */
    mil_events events;       /* has room for n_open beside what is queued: last events never fail */
    uint64_t last_id;
    uint64_t n_steps;
    mil_scheduler_counts counts; /* as of the last step */
    loop_times times;            /* likewise */
    bool is_running;
    bool is_closing;
    bool has_ended;            /* closed or dead, with every last event queued */
    char reason[REASON_BYTES]; /* why it is dead; "" */
};

/* ---- create and free ---- */

static void poison_page(void *context, int32_t page)
{
    mil_engine *engine = context;
    mil_runner_poison_page(engine->runner, page);
}

static mil_scheduler_options scheduler_options(mil_engine *engine, int32_t n_pages)
{
    return (mil_scheduler_options){
        .max_seqs = engine->options.max_num_seqs,
        .max_tokens = engine->options.max_num_batched_tokens,
        .max_model_len = engine->options.max_model_len,
        .page_size = engine->options.page_size,
        .n_pages = n_pages,
        .is_deterministic = engine->options.deterministic && engine->is_on_device,
        .on_page_free = engine->options.poison ? poison_page : NULL,
        .context = engine,
    };
}

/* Settle max_model_len and the pages by what is free now; to_take: what else is still to be taken.
 */
static mil_status fit_pages(mil_engine *engine, int32_t *n_pages, int32_t max_position,
                            size_t to_take)
{
    mil_engine_options *options = &engine->options;
    mil_model_memory memory;
    MIL_TRY(mil_model_memory_get(engine->model, &memory));
    mil_budget_text text = mil_budget_explain(options, &memory, engine->workspace_bytes);
    mil_kv_facts facts = {
        .max_position = max_position,
        .page_bytes = mil_runner_page_bytes(engine->model, options->page_size),
        .left_bytes = mil_budget_left(options, &memory, to_take),
        .left_of = text.text,
    };
    return mil_options_fit_kv(options, n_pages, &facts);
}

static mil_plan_limits limits_of(mil_engine *engine)
{
    mil_scheduler_options options = scheduler_options(engine, 0);
    return mil_scheduler_limits(&options);
}

static mil_status settle_options(mil_engine *engine, int32_t *n_pages)
{
    mil_engine_options *options = &engine->options;
    int32_t max_position = mil_model_config(engine->model)->max_position;
    if (options->page_size == 0)
        options->page_size = mil_model_default_page_size(engine->model);
    MIL_TRY(mil_options_complete(options, engine->is_on_device));
    /* Workspace for the longest context that could come out, so that fitting cannot make it grow.
     */
    int32_t wanted = options->max_model_len;
    options->max_model_len = wanted > 0 ? wanted : max_position;
    mil_plan_limits limits = limits_of(engine);
    options->max_model_len = wanted;
    engine->workspace_bytes =
        mil_runner_workspace_bytes(engine->model, &limits, options->page_size);
    MIL_TRY(fit_pages(engine, n_pages, max_position, engine->workspace_bytes));
    limits = limits_of(engine);
    engine->workspace_bytes =
        mil_runner_workspace_bytes(engine->model, &limits, options->page_size);
    return MIL_OK;
}

static mil_status create_runner(mil_engine *engine, int32_t n_pages)
{
    const mil_runner_options options = {
        .limits = limits_of(engine),
        .n_pages = n_pages,
        .page_size = engine->options.page_size,
        .is_deterministic = engine->options.deterministic,
        .has_graphs = !engine->options.enforce_eager,
        .poison = engine->options.poison,
    };
    return mil_runner_create(&engine->runner, engine->model, &options);
}

/* A runner of one page shows what workspace, kernels and graphs take of the device: pages get the
 * rest. */
static mil_status create_measured(mil_engine *engine, int32_t *n_pages, int32_t wanted)
{
    int32_t longest = engine->options.max_model_len;
    MIL_TRY(create_runner(engine, 1));
    engine->options.max_model_len = wanted;
    engine->options.kv_cache_bytes = 0;
    MIL_TRY(fit_pages(engine, n_pages, longest, 0));
    return mil_runner_take_pages(engine->runner, *n_pages);
}

static mil_status create_sync(mil_engine *engine)
{
    pthread_condattr_t attributes;
    if (pthread_condattr_init(&attributes) != 0)
        return mil_fail(MIL_ERR_DEVICE, "engine: the system gave no condition attributes");
    int failed = pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    bool has_lock = failed == 0 && (failed = pthread_mutex_init(&engine->lock, NULL)) == 0;
    bool has_work = has_lock && (failed = pthread_cond_init(&engine->work, &attributes)) == 0;
    bool has_ready = has_work && (failed = pthread_cond_init(&engine->ready, &attributes)) == 0;
    pthread_condattr_destroy(&attributes);
    engine->has_sync = has_ready;
    if (has_ready)
        return MIL_OK;
    if (has_work)
        pthread_cond_destroy(&engine->work);
    if (has_lock)
        pthread_mutex_destroy(&engine->lock);
    return mil_fail(MIL_ERR_DEVICE, "engine: the system gave no lock: %s", strerror(failed));
}

static mil_status init_engine(mil_engine *engine)
{
    int32_t n_pages;
    int32_t wanted = engine->options.max_model_len;
    bool is_measured = engine->is_on_device && engine->options.kv_cache_bytes == 0;
    MIL_TRY(settle_options(engine, &n_pages));
    MIL_TRY(create_sync(engine));
    size_t n_seqs = (size_t)engine->options.max_num_seqs;
    MIL_TRY(mil_alloc_checked((void **)&engine->step_events, n_seqs, sizeof *engine->step_events,
                              "engine: events"));
    MIL_TRY(mil_events_init(&engine->events, FIRST_EVENTS + 8 * n_seqs));
    MIL_TRY(is_measured ? create_measured(engine, &n_pages, wanted)
                        : create_runner(engine, n_pages));
    mil_scheduler_options options = scheduler_options(engine, n_pages);
    MIL_TRY(mil_scheduler_create(&engine->scheduler, &options));
    mil_scheduler_counts_get(engine->scheduler, &engine->counts);
    return MIL_OK;
}

static void destroy(mil_engine *engine)
{
    mil_runner_free(engine->runner);
    mil_scheduler_free(engine->scheduler);
    mil_events_deinit(&engine->events);
    mil_free(engine->step_events);
    if (engine->has_sync) {
        pthread_cond_destroy(&engine->ready);
        pthread_cond_destroy(&engine->work);
        pthread_mutex_destroy(&engine->lock);
    }
    mil_free(engine);
}

mil_status mil_engine_create(mil_engine **out, mil_model *model, const mil_engine_options *options)
{
    void *block;
    MIL_TRY(mil_alloc_checked(&block, 1, sizeof(mil_engine), "engine"));
    mil_engine *engine = block;
    engine->model = model;
    engine->options = *options;
    engine->vocab = mil_model_config(model)->vocab;
    engine->process = getpid();
    engine->is_on_device = mil_model_is_on_device(model);
    mil_status status = init_engine(engine);
    if (status != MIL_OK) {
        destroy(engine);
        return status;
    }
    *out = engine;
    return MIL_OK;
}

void mil_engine_free(mil_engine *engine)
{
    /* In a forked child its lock may be held for ever by a thread that is not there. */
    if (engine == NULL || engine->process != getpid())
        return;
    mil_engine_close(engine);
    assert(!engine->is_running);
    destroy(engine);
}

static mil_status check_process(const mil_engine *engine, const char *caller)
{
    if (engine->process != getpid())
        return mil_fail(MIL_ERR_DEVICE, "%s: the engine belongs to process %d, this is %d", caller,
                        (int)engine->process, (int)getpid());
    return MIL_OK;
}

/* ---- under the lock: what begins and ends ---- */

static mil_status fail_closed(const mil_engine *engine, const char *caller)
{
    if (engine->reason[0] != '\0')
        return mil_fail(MIL_ERR_CLOSED, "%s: the engine is dead: %s", caller, engine->reason);
    return mil_fail(MIL_ERR_CLOSED, "%s: the engine is closed", caller);
}

static void discard(mil_engine *engine, mil_request *request)
{
    if (request->adapter != MIL_NO_ADAPTER) {
        /* The request held it, so that it is there: only a bug of ours can fail this. */
        mil_status status = mil_model_release_adapter(engine->model, request->adapter);
        assert(status == MIL_OK);
        (void)status;
    }
    mil_request_free(request);
}

/* Free what has ended and is named by no step any more. */
static void reap(mil_engine *engine)
{
    mil_request *request;
    while ((request = mil_scheduler_reap(engine->scheduler)) != NULL) {
        mil_request_index_remove(&engine->index, request);
        discard(engine, request);
    }
}

/* End a request with an event of its own, unless it has ended by itself. */
static void end_request(mil_engine *engine, mil_request *request, mil_finish finish)
{
    if (!mil_scheduler_end(engine->scheduler, request))
        return;
    mil_event event = {.id = request->id, .finish = finish};
    mil_events_push(&engine->events, &event);
    engine->n_open--;
}

/* Hand the scheduler what other threads asked for since the last step. */
static void take_requests(mil_engine *engine)
{
    mil_request *request;
    while ((request = engine->inbox.first) != NULL) {
        mil_request_list_remove(&engine->inbox, request);
        mil_scheduler_add(engine->scheduler, request);
    }
    bool has_ended = engine->cancels != NULL;
    while ((request = engine->cancels) != NULL) {
        engine->cancels = request->cancel_next;
        end_request(engine, request, MIL_FINISH_CANCELLED);
    }
    reap(engine);
    mil_scheduler_counts_get(engine->scheduler, &engine->counts);
    if (has_ended)
        pthread_cond_broadcast(&engine->ready);
}

/* Nothing runs any more and nothing will: tell every open request. */
static void end_all(mil_engine *engine, mil_finish finish)
{
    take_requests(engine);
    mil_scheduler_abandon(engine->scheduler);
    engine->n_in_flight = 0;
    mil_request *request;
    while ((request = mil_scheduler_first(engine->scheduler)) != NULL)
        end_request(engine, request, finish);
    reap(engine);
    mil_scheduler_counts_get(engine->scheduler, &engine->counts);
    engine->has_ended = true;
    pthread_cond_broadcast(&engine->ready);
}

/* ---- other threads ---- */

/* Room for all that the steps in flight may say, and for the last event of every open request and
 * n_more. */
static mil_status reserve_events(mil_engine *engine, int32_t n_more)
{
    size_t steps = (size_t)mil_runner_depth(engine->runner);
    size_t last = (size_t)engine->n_open + (size_t)n_more;
    return mil_events_reserve(&engine->events, steps * (size_t)engine->options.max_num_seqs + last);
}

static mil_status enqueue(mil_engine *engine, mil_request *request, uint64_t *id)
{
    if (engine->is_closing || engine->has_ended)
        return fail_closed(engine, "submit");
    MIL_TRY(reserve_events(engine, 1));
    request->id = ++engine->last_id;
    *id = request->id;
    engine->n_open++;
    mil_request_index_add(&engine->index, request);
    mil_request_list_push(&engine->inbox, request);
    pthread_cond_signal(&engine->work);
    return MIL_OK;
}

mil_status mil_engine_submit(mil_engine *engine, const mil_request_options *options, uint64_t *id)
{
    MIL_TRY(check_process(engine, "submit"));
    int32_t max_new;
    MIL_TRY(
        mil_options_check_request(options, &max_new, engine->vocab, engine->options.max_model_len));
    mil_request *request;
    MIL_TRY(mil_request_create(&request, options, max_new));
    mil_status status = options->adapter == MIL_NO_ADAPTER
                            ? MIL_OK
                            : mil_model_hold_adapter(engine->model, options->adapter);
    if (status != MIL_OK) {
        mil_request_free(request);
        return status;
    }
    pthread_mutex_lock(&engine->lock);
    status = enqueue(engine, request, id);
    pthread_mutex_unlock(&engine->lock);
    if (status != MIL_OK)
        discard(engine, request);
    return status;
}

void mil_engine_cancel(mil_engine *engine, uint64_t id)
{
    if (engine->process != getpid())
        return;
    pthread_mutex_lock(&engine->lock);
    mil_request *request = mil_request_index_find(&engine->index, id);
    if (request != NULL && !request->is_cancelled) {
        request->is_cancelled = true;
        request->cancel_next = engine->cancels;
        engine->cancels = request;
        pthread_cond_signal(&engine->work);
    }
    pthread_mutex_unlock(&engine->lock);
}

void mil_engine_close(mil_engine *engine)
{
    if (engine->process != getpid())
        return;
    pthread_mutex_lock(&engine->lock);
    engine->is_closing = true;
    if (!engine->is_running && !engine->has_ended)
        end_all(engine, MIL_FINISH_CANCELLED);
    pthread_cond_broadcast(&engine->work);
    pthread_mutex_unlock(&engine->lock);
}

static struct timespec deadline_in(int32_t timeout_ms)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    at.tv_sec += timeout_ms / 1000;
    at.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    if (at.tv_nsec >= 1000000000) {
        at.tv_sec++;
        at.tv_nsec -= 1000000000;
    }
    return at;
}

static void wait_for_events(mil_engine *engine, int32_t timeout_ms)
{
    struct timespec deadline = deadline_in(timeout_ms > 0 ? timeout_ms : 0);
    int timed_out = timeout_ms == 0;
    while (engine->events.n == 0 && !engine->has_ended && !timed_out) {
        if (timeout_ms < 0)
            pthread_cond_wait(&engine->ready, &engine->lock);
        else
            timed_out =
                pthread_cond_timedwait(&engine->ready, &engine->lock, &deadline) == ETIMEDOUT;
    }
}

mil_status mil_engine_poll(mil_engine *engine, mil_event *events, int32_t max, int32_t timeout_ms,
                           int32_t *n)
{
    *n = 0;
    MIL_TRY(check_process(engine, "poll"));
    if (max < 1)
        return mil_fail(MIL_ERR_ARGUMENT, "poll: max is %d, expected at least 1", max);
    pthread_mutex_lock(&engine->lock);
    wait_for_events(engine, timeout_ms);
    *n = mil_events_take(&engine->events, events, max);
    mil_status status = MIL_OK;
    if (*n == 0 && engine->has_ended)
        status = fail_closed(engine, "poll");
    /* The loop may wait for room. */
    pthread_cond_signal(&engine->work);
    pthread_mutex_unlock(&engine->lock);
    return status;
}

void mil_engine_stats_get(mil_engine *engine, mil_engine_stats *stats)
{
    memset(stats, 0, sizeof *stats);
    if (engine->process != getpid())
        return;
    pthread_mutex_lock(&engine->lock);
    const mil_scheduler_counts *counts = &engine->counts;
    *stats = (mil_engine_stats){
        .n_waiting = counts->n_waiting + engine->inbox.n,
        .n_running = counts->n_running,
        .n_pages = counts->n_pages,
        .n_free_pages = counts->n_free_pages,
        .page_size = engine->options.page_size,
        .max_model_len = engine->options.max_model_len,
        .max_num_seqs = engine->options.max_num_seqs,
        .max_num_batched_tokens = engine->options.max_num_batched_tokens,
        .n_steps = engine->n_steps,
        .n_preemptions = counts->n_preemptions,
        .n_prompt_tokens = counts->n_prompt_tokens,
        .n_generated_tokens = counts->n_generated_tokens,
        .fill_ns = engine->times.fill_ns,
        .submit_ns = engine->times.submit_ns,
        .wait_ns = engine->times.wait_ns,
        .retire_ns = engine->times.retire_ns,
        .capture_ns = mil_runner_capture_ns(engine->runner),
        .kv_bytes = (size_t)engine->options.kv_cache_bytes,
        .workspace_bytes = engine->workspace_bytes,
    };
    pthread_mutex_unlock(&engine->lock);
}

mil_status mil_engine_memory_get(mil_engine *engine, mil_memory_report *report)
{
    mil_model_memory memory;
    mil_runner_memory runner;
    MIL_TRY(check_process(engine, "memory"));
    MIL_TRY(mil_model_memory_get(engine->model, &memory));
    mil_runner_memory_get(engine->runner, &runner);
    mil_budget_report(report, &memory, &runner);
    return MIL_OK;
}

/* ---- the loop ---- */

static void leave(mil_engine *engine)
{
    if (engine->is_entered)
        mil_runner_leave(engine->runner);
    engine->is_entered = false;
}

static mil_status enter(mil_engine *engine)
{
    if (!engine->is_entered)
        MIL_TRY(mil_runner_enter(engine->runner));
    engine->is_entered = true;
    return MIL_OK;
}

/* Whether a step can run now: something is open, and there is room for what it may say. When memory
 * for that is short, the loop waits for whoever polls. */
static bool can_step(mil_engine *engine)
{
    return mil_scheduler_first(engine->scheduler) != NULL && reserve_events(engine, 0) == MIL_OK;
}

/* Sleep until there is work; false when the engine closes. A sleeper does not hold the model. */
static bool wait_for_work(mil_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    take_requests(engine);
    while (!engine->is_closing && !(engine->can_submit = can_step(engine)) &&
           engine->n_in_flight == 0) {
        if (engine->is_entered) {
            pthread_mutex_unlock(&engine->lock);
            leave(engine);
            pthread_mutex_lock(&engine->lock);
        } else {
            pthread_cond_wait(&engine->work, &engine->lock);
        }
        take_requests(engine);
    }
    bool is_closing = engine->is_closing;
    pthread_mutex_unlock(&engine->lock);
    return !is_closing;
}

static void publish(mil_engine *engine, int32_t n_events)
{
    pthread_mutex_lock(&engine->lock);
    for (int32_t i = 0; i < n_events; i++) {
        mil_events_push(&engine->events, &engine->step_events[i]);
        engine->n_open -= engine->step_events[i].finish != MIL_FINISH_NONE;
    }
    engine->n_steps++;
    engine->times = engine->spent;
    mil_scheduler_counts_get(engine->scheduler, &engine->counts);
    if (n_events > 0)
        pthread_cond_broadcast(&engine->ready);
    pthread_mutex_unlock(&engine->lock);
}

/* Fill and submit one more step; *is_full: none can run before another one retires. */
static mil_status submit_step(mil_engine *engine, bool *is_full)
{
    mil_plan *plan = mil_runner_plan(engine->runner);
    mil_batch batch;
    uint64_t begin = mil_clock_ns();
    *is_full = !mil_scheduler_fill(engine->scheduler, plan);
    uint64_t filled = mil_clock_ns();
    engine->spent.fill_ns += filled - begin;
    if (*is_full)
        return MIL_OK;
    mil_plan_view(plan, &batch);
    engine->last_step = batch.header->step;
    MIL_TRY(mil_runner_submit(engine->runner));
    engine->spent.submit_ns += mil_clock_ns() - filled;
    engine->n_in_flight++;
    return MIL_OK;
}

static mil_status retire_step(mil_engine *engine)
{
    const mil_sample *samples;
    uint64_t oldest = engine->last_step - (uint64_t)engine->n_in_flight + 1;
    uint64_t begin = mil_clock_ns();
    MIL_TRY(mil_runner_wait(engine->runner, &samples));
    uint64_t waited = mil_clock_ns();
    engine->spent.wait_ns += waited - begin;
    engine->n_in_flight--;
    publish(engine, mil_scheduler_retire(engine->scheduler, oldest, samples, engine->step_events));
    engine->spent.retire_ns += mil_clock_ns() - waited;
    return MIL_OK;
}

/* Queue one step more where the device takes it, and retire one where it does not. */
static mil_status run_step(mil_engine *engine)
{
    MIL_TRY(enter(engine));
    bool is_full = !engine->can_submit || engine->n_in_flight == mil_runner_depth(engine->runner);
    if (!is_full)
        MIL_TRY(submit_step(engine, &is_full));
    if (engine->n_in_flight == 0)
        return mil_fail(MIL_ERR_INTERNAL, "engine: nothing runs, though requests are open");
    if (is_full || engine->n_in_flight == mil_runner_depth(engine->runner))
        return retire_step(engine);
    return MIL_OK;
}

/* Take the loop for this thread; *has_begun is false when there is nothing to loop for. */
static mil_status begin(mil_engine *engine, bool *has_begun)
{
    mil_status status = MIL_OK;
    *has_begun = false;
    pthread_mutex_lock(&engine->lock);
    if (engine->is_running)
        status =
            mil_fail(MIL_ERR_BUSY, "run: another thread runs the engine, expected one at a time");
    else if (engine->reason[0] != '\0')
        status = fail_closed(engine, "run");
    else
        engine->is_running = *has_begun = !engine->is_closing;
    pthread_mutex_unlock(&engine->lock);
    return status;
}

/* Wait for the steps in flight, whatever becomes of them: what they name is given back next. */
static mil_status drain(mil_engine *engine)
{
    mil_status first = MIL_OK;
    for (; engine->n_in_flight > 0; engine->n_in_flight--) {
        const mil_sample *unread;
        mil_status status = mil_runner_wait(engine->runner, &unread);
        first = first == MIL_OK ? status : first;
    }
    return first;
}

mil_status mil_engine_run(mil_engine *engine)
{
    MIL_TRY(check_process(engine, "run"));
    bool has_begun;
    char reason[REASON_BYTES] = "";
    mil_status status = begin(engine, &has_begun);
    if (!has_begun)
        return status;
    while (status == MIL_OK && wait_for_work(engine))
        status = run_step(engine);
    if (status == MIL_OK)
        status = drain(engine);
    if (status != MIL_OK) {
        (void)snprintf(reason, sizeof reason, "%s", mil_status_message());
        mil_status unsaid = drain(engine); /* the first failure is the one to tell */
        (void)unsaid;
    }
    leave(engine);
    pthread_mutex_lock(&engine->lock);
    memcpy(engine->reason, reason, sizeof reason);
    end_all(engine, status == MIL_OK ? MIL_FINISH_CANCELLED : MIL_FINISH_ERROR);
    engine->is_running = false;
    pthread_mutex_unlock(&engine->lock);
    return status == MIL_OK ? MIL_OK : mil_fail(status, "%s", reason);
}
