/* Attention's work list. A task is a tile of queries of one sequence for one kv head; threads take
 * tasks from a counter, heavy ones first. Where there are few tasks and long KV (few sequences that
 * decode), a task's splits are taken apart and merged in order afterwards: the same sums. */
#include "cpu/cpu.h"

#include <stdatomic.h>

#define N_CLASSES 32 /* of work, by powers of two */

typedef struct attention_job {
    const mil_attention_args *args;
    const mil_cpu_attention_kernels *kernels;
    int32_t n_seqs;
    int32_t group;
    int32_t tile_queries;
    int32_t tile_kv_heads; /* of a tile of one query */
    bool is_apart;         /* splits are tasks of their own */
    int32_t *order;        /* [n_seqs], heaviest class first */
    int32_t *first_task;   /* [n_seqs + 1], by place in order */
    float *scratch;        /* one after another, one for each thread */
    float *parts;          /* is_apart: one for each task, group rows each */
    atomic_int next;
    atomic_int next_merge;
} attention_job;

typedef struct attention_task {
    int32_t sequence, tile, split;
    int32_t kv_head, n_kv_heads;
} attention_task;

static int32_t smaller(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

static int32_t ceil_div(int32_t a, int32_t b)
{
    return (a + b - 1) / b;
}

static int32_t width_of(int32_t head_dim)
{
    return ceil_div(head_dim, 32) * 32;
}

static int32_t max_rows(int32_t group)
{
    return group > MIL_CPU_ATTENTION_ROWS ? group : MIL_CPU_ATTENTION_ROWS;
}

/* ---- memory ---- */

static size_t part_floats(int32_t rows, int32_t head_dim)
{
    return mil_round_up((size_t)rows * (size_t)(width_of(head_dim) + 2), 16);
}

static size_t scratch_floats(int32_t rows, int32_t head_dim)
{
    size_t n = (size_t)rows, D = (size_t)head_dim, width = (size_t)width_of(head_dim);
    size_t block = MIL_CPU_KV_BLOCK;
    return mil_round_up(n * D + D * block + block * width + 8 * block + n * 16, 16) +
           2 * part_floats(rows, head_dim);
}

/* Below this many tasks for a thread, splits are taken apart. */
#define TASKS_PER_THREAD 2

size_t mil_cpu_attention_workspace(const mil_maxima *maxima)
{
    int32_t group = ceil_div(maxima->n_heads, maxima->n_kv_heads);
    size_t n_threads = (size_t)maxima->n_threads;
    size_t lists = mil_round_up((2 * (size_t)maxima->max_seqs + 1) * sizeof(int32_t), MIL_ALIGN);
    size_t n_splits = (size_t)ceil_div(maxima->max_position, MIL_CPU_KV_SPLIT);
    size_t floats = n_threads * scratch_floats(max_rows(group), maxima->head_dim) +
                    TASKS_PER_THREAD * n_threads * n_splits * part_floats(group, maxima->head_dim);
    return lists + floats * sizeof(float);
}

static float *deal(float **from, size_t n)
{
    float *dealt = *from;
    *from += n;
    return dealt;
}

static mil_cpu_attention_part deal_part(float **from, int32_t rows, int32_t head_dim)
{
    float *end = *from + part_floats(rows, head_dim);
    mil_cpu_attention_part part;
    part.o = deal(from, (size_t)rows * (size_t)width_of(head_dim));
    part.m = deal(from, (size_t)rows);
    part.l = deal(from, (size_t)rows);
    *from = end;
    return part;
}

typedef struct attention_room {
    mil_cpu_attention_scratch scratch;
    mil_cpu_attention_part total, part;
} attention_room;

static attention_room room_of(const attention_job *job, int32_t thread)
{
    int32_t D = job->args->kv->head_dim, rows = max_rows(job->group);
    float *from = job->scratch + (size_t)thread * scratch_floats(rows, D);
    attention_room room;
    room.total = deal_part(&from, rows, D);
    room.part = deal_part(&from, rows, D);
    room.scratch.k = deal(&from, (size_t)D * MIL_CPU_KV_BLOCK);
    room.scratch.v = deal(&from, (size_t)width_of(D) * MIL_CPU_KV_BLOCK);
    room.scratch.scores = deal(&from, (size_t)8 * MIL_CPU_KV_BLOCK);
    room.scratch.lanes = deal(&from, (size_t)rows * 16);
    room.scratch.q = deal(&from, (size_t)rows * (size_t)D);
    return room;
}

static mil_cpu_attention_part part_of(const attention_job *job, int32_t task)
{
    int32_t D = job->args->kv->head_dim;
    float *from = job->parts + (size_t)task * part_floats(job->group, D);
    return deal_part(&from, job->group, D);
}

/* ---- the list ---- */

static int32_t query_length(const mil_batch *batch, int32_t s)
{
    return batch->query_indptr[s + 1] - batch->query_indptr[s];
}

static int32_t kv_heads_of(const attention_job *job, int32_t s)
{
    return query_length(job->args->batch, s) == 1 ? job->tile_kv_heads : 1;
}

static int32_t tasks_of(const attention_job *job, int32_t s)
{
    const mil_batch *batch = job->args->batch;
    int32_t n_tiles = ceil_div(query_length(batch, s), job->tile_queries);
    int32_t n = n_tiles * (job->args->kv->n_kv_heads / kv_heads_of(job, s));
    return job->is_apart ? n * ceil_div(batch->kv_lengths[s], MIL_CPU_KV_SPLIT) : n;
}

/* Class of the work of a sequence's heaviest tile: its keys times its rows, by powers of two. */
static int32_t class_of(const attention_job *job, int32_t s)
{
    const mil_batch *batch = job->args->batch;
    int32_t rows = smaller(query_length(batch, s), job->tile_queries);
    int64_t work = (int64_t)rows * batch->kv_lengths[s] + 1;
    return smaller(63 - __builtin_clzll((unsigned long long)work), N_CLASSES - 1);
}

/* Order sequences by class, heaviest first, and number their tasks. */
static void list_tasks(attention_job *job)
{
    int32_t begin[N_CLASSES + 1] = {0};
    for (int32_t s = 0; s < job->n_seqs; s++)
        begin[N_CLASSES - class_of(job, s)]++;
    for (int32_t c = 0; c < N_CLASSES; c++)
        begin[c + 1] += begin[c];
    for (int32_t s = 0; s < job->n_seqs; s++)
        job->order[begin[N_CLASSES - 1 - class_of(job, s)]++] = s;
    job->first_task[0] = 0;
    for (int32_t i = 0; i < job->n_seqs; i++)
        job->first_task[i + 1] = job->first_task[i] + tasks_of(job, job->order[i]);
}

/* A sequence's last tile sees the most keys, so it comes first. */
static attention_task task_at(const attention_job *job, int32_t index)
{
    int32_t low = 0, high = job->n_seqs;
    while (high - low > 1) {
        int32_t middle = (low + high) / 2;
        if (job->first_task[middle] <= index)
            low = middle;
        else
            high = middle;
    }
    attention_task task = {.sequence = job->order[low]};
    const mil_batch *batch = job->args->batch;
    int32_t left = index - job->first_task[low];
    task.n_kv_heads = kv_heads_of(job, task.sequence);
    int32_t n_parts = job->args->kv->n_kv_heads / task.n_kv_heads;
    if (job->is_apart) {
        int32_t n_splits = ceil_div(batch->kv_lengths[task.sequence], MIL_CPU_KV_SPLIT);
        task.split = left % n_splits;
        left /= n_splits;
    }
    task.kv_head = left % n_parts * task.n_kv_heads;
    task.tile =
        ceil_div(query_length(batch, task.sequence), job->tile_queries) - 1 - left / n_parts;
    return task;
}

static mil_cpu_attention_tile tile_of(const attention_job *job, const attention_task *task,
                                      const mil_cpu_attention_scratch *scratch)
{
    const mil_attention_args *args = job->args;
    const mil_batch *batch = args->batch;
    const mil_kv *kv = args->kv;
    int32_t length = query_length(batch, task->sequence);
    int32_t first = task->tile * job->tile_queries;
    int64_t ld = (int64_t)args->n_heads * kv->head_dim;
    int64_t head = (int64_t)kv->page_size * kv->head_dim;
    int64_t at = (batch->query_indptr[task->sequence] + first) * ld +
                 (int64_t)task->kv_head * job->group * kv->head_dim;
    int64_t kv_at = args->layer * kv->layer_elements + task->kv_head * head;
    return (mil_cpu_attention_tile){
        .args = args,
        .scratch = *scratch,
        .q = args->q + at,
        .out = args->out + at,
        .ld = ld,
        .k = kv->k + kv_at,
        .v = kv->v + kv_at,
        .page_stride = head * kv->n_kv_heads,
        .pages = args->slots->page_table +
                 (int64_t)batch->seq_slot[task->sequence] * args->slots->max_pages,
        .n_queries = smaller(length - first, job->tile_queries),
        .n_kv_heads = task->n_kv_heads,
        .group = job->group,
        .n_visible = batch->kv_lengths[task->sequence] - length + first + 1,
    };
}

/* ---- threads ---- */

static void run_whole(const attention_job *job, const attention_task *task,
                      const attention_room *room)
{
    mil_cpu_attention_tile tile = tile_of(job, task, &room->scratch);
    const mil_attention_args *args = job->args;
    int32_t n_rows = tile.n_queries * tile.n_kv_heads * tile.group,
            width = width_of(args->kv->head_dim);
    int32_t first_key = args->window > 0 ? tile.n_visible - args->window : 0;
    int32_t first = first_key > 0 ? first_key / MIL_CPU_KV_SPLIT : 0;
    int32_t last = (tile.n_visible + tile.n_queries - 2) / MIL_CPU_KV_SPLIT;
    job->kernels->load_queries(&tile);
    job->kernels->split(&tile, first, &room->total);
    for (int32_t split = first + 1; split <= last; split++) {
        job->kernels->split(&tile, split, &room->part);
        job->kernels->merge(&room->total, &room->part, n_rows, width);
    }
    job->kernels->finish(&tile, &room->total);
}

/* A task apart has one query, so its rows are the group's. */
static void run_apart(const attention_job *job, int32_t index, const attention_room *room)
{
    attention_task task = task_at(job, index);
    mil_cpu_attention_tile tile = tile_of(job, &task, &room->scratch);
    mil_cpu_attention_part part = part_of(job, index);
    job->kernels->load_queries(&tile);
    job->kernels->split(&tile, task.split, &part);
}

/* The parts of one task follow each other; index is the first. */
static void merge_apart(const attention_job *job, int32_t index, const attention_room *room)
{
    attention_task task = task_at(job, index);
    mil_cpu_attention_tile tile = tile_of(job, &task, &room->scratch);
    mil_cpu_attention_part total = part_of(job, index);
    int32_t width = width_of(job->args->kv->head_dim);
    for (int32_t split = 1; split * MIL_CPU_KV_SPLIT < tile.n_visible; split++) {
        mil_cpu_attention_part part = part_of(job, index + split);
        job->kernels->merge(&total, &part, job->group, width);
    }
    job->kernels->finish(&tile, &total);
}

static void attention_whole(void *argument, int32_t thread, int32_t n_threads)
{
    (void)n_threads;
    attention_job *job = argument;
    attention_room room = room_of(job, thread);
    int32_t n_tasks = job->first_task[job->n_seqs], index;
    while ((index = atomic_fetch_add(&job->next, 1)) < n_tasks) {
        attention_task task = task_at(job, index);
        run_whole(job, &task, &room);
    }
}

static void attention_parts(void *argument, int32_t thread, int32_t n_threads)
{
    (void)n_threads;
    attention_job *job = argument;
    attention_room room = room_of(job, thread);
    int32_t n_tasks = job->first_task[job->n_seqs], index;
    while ((index = atomic_fetch_add(&job->next, 1)) < n_tasks)
        run_apart(job, index, &room);
}

static void attention_merge(void *argument, int32_t thread, int32_t n_threads)
{
    (void)n_threads;
    attention_job *job = argument;
    attention_room room = room_of(job, thread);
    int32_t n_tasks = job->first_task[job->n_seqs], index;
    while ((index = atomic_fetch_add(&job->next_merge, 1)) < n_tasks)
        if (task_at(job, index).split == 0)
            merge_apart(job, index, &room);
}

/* Apart only for decode rows alone: a chunk has tiles enough. */
static bool should_be_apart(const attention_job *job, int32_t n_threads)
{
    const mil_batch *batch = job->args->batch;
    if (n_threads == 1 ||
        (int64_t)job->n_seqs * job->args->kv->n_kv_heads >= TASKS_PER_THREAD * (int64_t)n_threads)
        return false;
    bool has_splits = false;
    for (int32_t s = 0; s < job->n_seqs; s++) {
        if (query_length(batch, s) != 1)
            return false;
        has_splits = has_splits || batch->kv_lengths[s] > MIL_CPU_KV_SPLIT;
    }
    return has_splits;
}

/* A page holds its kv heads one after another, so a tile of several reads longer runs. As many as
 * leave enough tasks. */
static int32_t pick_tile_kv_heads(const attention_job *job, int32_t n_threads)
{
    int32_t n_kv_heads = job->args->kv->n_kv_heads, n = n_kv_heads;
    if (job->is_apart)
        return 1;
    while (n > 1 && (n_kv_heads % n != 0 || n * job->group > max_rows(job->group) ||
                     (int64_t)job->n_seqs * n_kv_heads / n < 4 * (int64_t)n_threads))
        n--;
    return n;
}

mil_status mil_cpu_attention(mil_context *context, const mil_attention_args *args)
{
    const mil_kv *kv = args->kv;
    const mil_batch *batch = args->batch;
    const mil_cpu_kernels *kernels = mil_cpu_kernels_of(context);
    int32_t n_threads = mil_cpu_n_threads(context);
    attention_job job = {
        .args = args,
        .kernels = kv->dtype == MIL_DTYPE_F16 ? kernels->attention_f16 : kernels->attention,
        .n_seqs = batch->header->n_seqs,
        .group = args->n_heads / kv->n_kv_heads,
    };
    job.tile_queries = max_rows(job.group) / job.group;
    job.is_apart = should_be_apart(&job, n_threads);
    job.tile_kv_heads = pick_tile_kv_heads(&job, n_threads);

    size_t lists = mil_round_up((2 * (size_t)job.n_seqs + 1) * sizeof(int32_t), MIL_ALIGN);
    job.order = context->workspace;
    job.first_task = job.order + job.n_seqs;
    job.scratch = (float *)((char *)context->workspace + lists);
    job.parts = job.scratch + (size_t)n_threads * scratch_floats(max_rows(job.group), kv->head_dim);
    atomic_init(&job.next, 0);
    atomic_init(&job.next_merge, 0);
    list_tasks(&job);

    int64_t keys = 0;
    for (int32_t s = 0; s < job.n_seqs; s++)
        keys += (int64_t)query_length(batch, s) * batch->kv_lengths[s];
    int64_t work = keys * args->n_heads * kv->head_dim;
    mil_cpu_run_sized(context, job.is_apart ? attention_parts : attention_whole, &job, work / 2);
    if (job.is_apart)
        mil_cpu_run_sized(context, attention_merge, &job, work / 2);
    return MIL_OK;
}
