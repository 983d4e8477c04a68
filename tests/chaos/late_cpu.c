/* The CPU as a device that runs late: ops, copies out and fences are noted, and run when the host
 * waits, or some of them before, as the seed says. So the order between a host that works ahead and
 * a device can be wrong, and be seen to be, where there is no GPU.
 *
 * It stands in for the CPU's backend at link time (--wrap). Steps come from one thread, and what
 * other threads do here (memory, adapters) touches nothing that is noted. Poison and free do not
 * wait, as on no device they may be trusted to. */
#include "chaos.h"

#include "ops/backend.h"

#include <assert.h>
#include <string.h>

#define MOST_NOTES 4096 /* of the steps in flight */

typedef struct note {
    mil_status (*run)(struct note *note);
    mil_context *context;
    /* The caller's go with its step; arrays stay where they are. */
    mil_batch batch;
    mil_plan_header header;
    union {
        mil_begin_args begin;
        mil_embed_args embed;
        mil_norm_args norm;
        mil_linear_args linear;
        mil_rope_write_args rope_write;
        mil_attention_args attention;
        mil_act_args act;
        mil_sample_args sample;
    } args;
    mil_lora_args lora;
    mil_act_args act; /* behind a product */
    bool has_lora;
    void *to;
    const void *from;
    size_t n_bytes;
    int32_t fence; /* -1: none */
} note;

struct mil_queue {
    int64_t n_run, n_added;
    note notes[MOST_NOTES]; /* a ring */
};

static const mil_backend *real; /* the CPU's: one per process, as its instruction set is */

/* ---- notes ---- */

static note *note_at(struct mil_queue *queue, int64_t index)
{
    return &queue->notes[index % MOST_NOTES];
}

static mil_status run_notes(struct mil_queue *queue, int64_t end)
{
    while (queue->n_run < end) {
        note *next = note_at(queue, queue->n_run++);
        MIL_TRY(next->run(next));
    }
    return MIL_OK;
}

static note *add(struct mil_queue *queue, mil_status (*run)(note *))
{
    assert(queue->n_added - queue->n_run < MOST_NOTES);
    note *last = note_at(queue, queue->n_added++);
    memset(last, 0, sizeof *last);
    last->run = run;
    last->fence = -1;
    mil_chaos_count(MIL_CHAOS_DEVICE);
    return last;
}

static const mil_batch *keep(note *kept, const mil_batch *batch)
{
    kept->batch = *batch;
    kept->header = *batch->header;
    kept->batch.header = &kept->header;
    kept->batch.counts = &kept->header;
    return &kept->batch;
}

/* ---- ops ---- */

/* The plan's bytes are read now and not when they were filled. */
static mil_status run_begin(note *now)
{
    memcpy(now->to, now->args.begin.plan, mil_plan_bytes(&now->header.limits));
    return real->begin(now->context, &now->args.begin);
}

static mil_status begin(mil_context *context, const mil_begin_args *args)
{
    note *later = add(context->queue, run_begin);
    later->context = context;
    later->args.begin = *args;
    later->args.begin.batch = keep(later, args->batch);
    later->to = (void *)(uintptr_t)args->batch->counts; /* where the copy begins */
    return MIL_OK;
}

#define LATER(op, keep_batch)                                                                      \
    static mil_status run_##op(note *now)                                                          \
    {                                                                                              \
        return real->op(now->context, &now->args.op);                                              \
    }                                                                                              \
    static mil_status op(mil_context *context, const mil_##op##_args *args)                        \
    {                                                                                              \
        note *later = add(context->queue, run_##op);                                               \
        later->context = context;                                                                  \
        later->args.op = *args;                                                                    \
        keep_batch;                                                                                \
        return MIL_OK;                                                                             \
    }

#define KEEP(op) later->args.op.batch = keep(later, args->batch)

LATER(embed, (void)0)
LATER(norm, (void)0)
LATER(linear, (void)0)
LATER(act, (void)0)
LATER(rope_write, KEEP(rope_write))
LATER(attention, KEEP(attention))
LATER(sample, KEEP(sample))

static mil_status run_linear_lora(note *now)
{
    return real->linear_lora(now->context, &now->args.linear, now->has_lora ? &now->lora : NULL);
}

static mil_status run_gate_up_act(note *now)
{
    return real->gate_up_act(now->context, &now->args.linear, now->has_lora ? &now->lora : NULL,
                             &now->act);
}

static note *add_product(mil_context *context, const mil_linear_args *linear,
                         const mil_lora_args *lora, mil_status (*run)(note *))
{
    note *later = add(context->queue, run);
    later->context = context;
    later->args.linear = *linear;
    later->has_lora = lora != NULL;
    if (lora == NULL)
        return later;
    later->lora = *lora;
    later->lora.batch = keep(later, lora->batch);
    return later;
}

static mil_status linear_lora(mil_context *context, const mil_linear_args *linear,
                              const mil_lora_args *lora)
{
    (void)add_product(context, linear, lora, run_linear_lora);
    return MIL_OK;
}

static mil_status gate_up_act(mil_context *context, const mil_linear_args *linear,
                              const mil_lora_args *lora, const mil_act_args *act)
{
    add_product(context, linear, lora, run_gate_up_act)->act = *act;
    return MIL_OK;
}

/* ---- device ---- */

static mil_status open(struct mil_queue **out, int32_t ordinal)
{
    (void)ordinal;
    return mil_alloc_checked((void **)out, 1, sizeof **out, "late cpu");
}

static void close(struct mil_queue *queue)
{
    mil_free(queue);
}

static mil_status run_copy(note *now)
{
    memcpy(now->to, now->from, now->n_bytes);
    return MIL_OK;
}

static mil_status send_out(struct mil_queue *queue, void *host, const void *device, size_t n_bytes)
{
    note *later = add(queue, run_copy);
    later->to = host;
    later->from = device;
    later->n_bytes = n_bytes;
    return MIL_OK;
}

static mil_status synchronize(struct mil_queue *queue)
{
    return run_notes(queue, queue->n_added);
}

static mil_status copy_out(struct mil_queue *queue, void *host, const void *device, size_t n_bytes)
{
    MIL_TRY(synchronize(queue));
    memcpy(host, device, n_bytes);
    return MIL_OK;
}

static mil_status run_nothing(note *now)
{
    (void)now;
    return MIL_OK;
}

/* The step is queued: some of what waits has run by now. */
static mil_status record(struct mil_queue *queue, int32_t index)
{
    add(queue, run_nothing)->fence = index;
    uint64_t n_waiting = (uint64_t)(queue->n_added - queue->n_run);
    return run_notes(queue, queue->n_run + (int64_t)mil_chaos_draw(n_waiting));
}

/* To the last fence of that index, as an event that was recorded again is waited for. */
static mil_status wait(struct mil_queue *queue, int32_t index)
{
    int64_t end = queue->n_added;
    while (end > queue->n_run && note_at(queue, end - 1)->fence != index)
        end--;
    return run_notes(queue, end);
}

static int32_t rows_alike(int32_t M)
{
    (void)M;
    return INT32_MAX;
}

static mil_device late_device;
static mil_backend late_backend;

/* The first find comes before any thread of an engine. */
static void make_late(void)
{
    late_device = *real->device;
    late_device.is_host = false;
    late_device.depth = 2;
    late_device.open = open;
    late_device.close = close;
    late_device.send_out = send_out;
    late_device.copy_out = copy_out;
    late_device.synchronize = synchronize;
    late_device.record = record;
    late_device.wait = wait;
    late_backend = *real;
    late_backend.device = &late_device;
    late_backend.rows_alike = rows_alike;
    late_backend.begin = begin;
    late_backend.embed = embed;
    late_backend.norm = norm;
    late_backend.linear = linear;
    late_backend.rope_write = rope_write;
    late_backend.attention = attention;
    late_backend.act = act;
    late_backend.sample = sample;
    late_backend.linear_lora = linear_lora;
    late_backend.gate_up_act = gate_up_act;
}

mil_status __real_mil_backend_find(const mil_backend **out, const char *device) MIL_WARN_UNUSED;
mil_status __wrap_mil_backend_find(const mil_backend **out, const char *device) MIL_WARN_UNUSED;

mil_status __wrap_mil_backend_find(const mil_backend **out, const char *device)
{
    MIL_TRY(__real_mil_backend_find(out, device));
    if (!(*out)->device->is_host || !mil_chaos_is_on(MIL_CHAOS_DEVICE))
        return MIL_OK;
    real = *out;
    make_late();
    *out = &late_backend;
    return MIL_OK;
}
