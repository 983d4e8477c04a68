/* Choosing a token of each row. Sums of exponentials run over fixed segments of 4,096 ids, segments
 * are added in order in float64; so the result depends on neither threads nor instruction set.
 *
 * Candidates of top-k and top-p are walked best first, ties by lowest id; without either, ids
 * ascend. The draw takes the first candidate at which the running sum of weights exceeds u times
 * their total, u = 53 bits of the hash of (seed, purpose, position). Nothing here sorts a whole
 * vocabulary unless the candidates asked for are that many: the n-th largest of the blocks' maxima
 * bounds the n-th largest logit from below, so the ids at or above it are few and hold the n best.
 */
#include "base/hash.h"
#include "cpu/cpu.h"

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#define SEGMENT 4096
#define SAMPLE_STREAM                                                                              \
    0x73616d706c65u /* the draw's purpose, apart from every other use of the seed */

/* What the passes leave of one row. */
typedef struct row_sums {
    float *block_max;   /* [ceil(V / 64)] */
    float *segment_max; /* [n_segments]; NaN where the segment holds one */
    float *raw;         /* [n_segments] sums of e^(x - max) */
    float *tempered;    /* [n_segments] sums of e^((x - max) / temperature) */
} row_sums;

/* One thread's candidates. */
typedef struct candidates {
    int32_t *ids, *other_ids;    /* [V] each */
    uint32_t *keys, *other_keys; /* [V] each */
    float *values;               /* [V] */
} candidates;

typedef struct sample_job {
    const mil_sample_args *args;
    const mil_cpu_sample_kernels *kernels;
    const mil_context *context;
    int32_t n_segments;
    float *rows;    /* row_floats each */
    int32_t *lists; /* 5 V for each thread */
    atomic_int next;
} sample_job;

typedef struct sample_row {
    const sample_job *job;
    const mil_sampling *sampling;
    const float *x; /* [V] */
    row_sums sums;
    candidates *candidates;
    float top;    /* the largest logit */
    float factor; /* 1 / temperature */
    int32_t position;
} sample_row;

static int32_t ceil_div(int32_t a, int32_t b)
{
    return (a + b - 1) / b;
}

/* ---- memory ---- */

static size_t row_floats(int32_t vocab)
{
    return mil_round_up(
        (size_t)ceil_div(vocab, MIL_CPU_SAMPLE_BLOCK) + 3 * (size_t)ceil_div(vocab, SEGMENT), 16);
}

static size_t list_items(int32_t vocab)
{
    return mil_round_up(5 * (size_t)vocab, 16);
}

size_t mil_cpu_sample_workspace(const mil_maxima *maxima)
{
    return ((size_t)maxima->max_logit_rows * row_floats(maxima->vocab) +
            (size_t)maxima->n_threads * list_items(maxima->vocab)) *
           sizeof(float);
}

static row_sums sums_of(const sample_job *job, int32_t row)
{
    row_sums sums;
    sums.block_max = job->rows + (size_t)row * row_floats(job->args->vocab);
    sums.segment_max = sums.block_max + ceil_div(job->args->vocab, MIL_CPU_SAMPLE_BLOCK);
    sums.raw = sums.segment_max + job->n_segments;
    sums.tempered = sums.raw + job->n_segments;
    return sums;
}

static candidates candidates_of(const sample_job *job, int32_t thread)
{
    size_t V = (size_t)job->args->vocab;
    int32_t *list = job->lists + (size_t)thread * list_items(job->args->vocab);
    return (candidates){
        .ids = list,
        .other_ids = list + V,
        .keys = (uint32_t *)list + 2 * V,
        .other_keys = (uint32_t *)list + 3 * V,
        .values = (float *)(void *)(list + 4 * V),
    };
}

/* Whether top-k cuts anything. */
static bool has_top_k(const sample_job *job, const mil_sampling *sampling)
{
    return sampling->top_k > 0 && sampling->top_k < job->args->vocab;
}

static const mil_sampling *sampling_of(const sample_job *job, int32_t row)
{
    const mil_sample_args *args = job->args;
    return &args->slots->sampling[args->batch->logit_slots[args->first_row + row]];
}

/* ---- passes over (row, segment), all threads ---- */

static float factor_of(const mil_sampling *sampling)
{
    /* Finite, so that the best logit's 0 stays 0 whatever the temperature. */
    float factor = 1.0f / sampling->temperature;
    return factor < FLT_MAX ? factor : FLT_MAX;
}

static float top_of(const row_sums *sums, int32_t n_segments)
{
    float top = sums->segment_max[0];
    for (int32_t i = 1; i < n_segments; i++)
        if (!(sums->segment_max[i] <= top))
            top = isnan(top) ? top : sums->segment_max[i];
    return top;
}

static void pass_maxima(const sample_job *job, int32_t row, int32_t segment)
{
    const mil_sample_args *args = job->args;
    int32_t begin = segment * SEGMENT;
    int32_t n = args->vocab - begin < SEGMENT ? args->vocab - begin : SEGMENT;
    row_sums sums = sums_of(job, row);
    sums.segment_max[segment] = job->kernels->maxima(sums.block_max + begin / MIL_CPU_SAMPLE_BLOCK,
                                                     args->logits + row * args->ld + begin, n);
}

static void pass_sums(const sample_job *job, int32_t row, int32_t segment)
{
    const mil_sample_args *args = job->args;
    const mil_sampling *sampling = sampling_of(job, row);
    int32_t begin = segment * SEGMENT;
    int32_t n = args->vocab - begin < SEGMENT ? args->vocab - begin : SEGMENT;
    const float *x = args->logits + row * args->ld + begin;
    row_sums sums = sums_of(job, row);
    float top = top_of(&sums, job->n_segments);
    if (sampling->n_logprobs >= 0)
        sums.raw[segment] = job->kernels->sum_weights(x, n, top, 1.0f);
    /* Top-k sums its own candidates. */
    if (sampling->temperature > 0.0f && !has_top_k(job, sampling))
        sums.tempered[segment] = job->kernels->sum_weights(x, n, top, factor_of(sampling));
}

static double total_of(const float *segments, int32_t n)
{
    double total = 0.0;
    for (int32_t i = 0; i < n; i++)
        total += segments[i];
    return total;
}

/* ---- the best n ---- */

/* Ascends as x descends; +0 and -0 (and what counts as zero) are equal. */
static uint32_t key_of(float x)
{
    float value = x + 0.0f;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bits & 0x80000000u) != 0 ? bits : ~(bits | 0x80000000u);
}

/* Sort n (key, id) by key, stable: a radix sort of bytes, least first. The result is in keys, ids.
 */
static void sort_candidates(candidates *list, int32_t n)
{
    for (int shift = 0; shift < 32; shift += 8) {
        int32_t begin[257] = {0};
        for (int32_t i = 0; i < n; i++)
            begin[((list->keys[i] >> shift) & 0xffu) + 1]++;
        for (int32_t digit = 0; digit < 256; digit++)
            begin[digit + 1] += begin[digit];
        for (int32_t i = 0; i < n; i++) {
            int32_t at = begin[(list->keys[i] >> shift) & 0xffu]++;
            list->other_keys[at] = list->keys[i];
            list->other_ids[at] = list->ids[i];
        }
        uint32_t *keys = list->keys;
        int32_t *ids = list->ids;
        list->keys = list->other_keys;
        list->ids = list->other_ids;
        list->other_keys = keys;
        list->other_ids = ids;
    }
}

/* A lower bound of the n-th largest logit: that of the blocks' maxima. */
static float threshold_of(const sample_row *row, int32_t n)
{
    candidates *list = row->candidates;
    int32_t n_blocks = ceil_div(row->job->args->vocab, MIL_CPU_SAMPLE_BLOCK);
    if (n > n_blocks)
        return -INFINITY;
    for (int32_t i = 0; i < n_blocks; i++) {
        list->ids[i] = i;
        list->keys[i] = key_of(row->sums.block_max[i]);
    }
    sort_candidates(list, n_blocks);
    return row->sums.block_max[list->ids[n - 1]];
}

/* Ids of logits >= threshold, best first, ties by lowest id, to candidates.ids; their logits to
 * values. Returns how many. */
static int32_t find_from(const sample_row *row, float threshold)
{
    candidates *list = row->candidates;
    int32_t n = row->job->kernels->collect(list->ids, row->x, row->job->args->vocab,
                                           row->sums.block_max, threshold);
    for (int32_t i = 0; i < n; i++)
        list->keys[i] = key_of(row->x[list->ids[i]]);
    sort_candidates(list, n);
    for (int32_t i = 0; i < n; i++)
        list->values[i] = row->x[list->ids[i]];
    return n;
}

/* ---- the choice ---- */

static int32_t choose_greedy(const sample_row *row)
{
    int32_t block = 0;
    while (row->sums.block_max[block] != row->top)
        block++;
    int32_t id = block * MIL_CPU_SAMPLE_BLOCK;
    while (row->x[id] != row->top)
        id++;
    return id;
}

/* In [0, 1). */
static double uniform_of(const sample_row *row)
{
    uint64_t word = mil_counter_hash(row->sampling->seed, SAMPLE_STREAM, (uint64_t)row->position);
    return (double)(word >> 11) * 0x1p-53;
}

/* First i at which base + weights[0 .. i] exceeds target, else the last that has weight. */
static int32_t walk(const float *weights, int32_t n, double base, double target)
{
    int32_t last = 0;
    for (int32_t i = 0; i < n; i++) {
        base += weights[i];
        if (weights[i] > 0.0f)
            last = i;
        if (base > target)
            return i;
    }
    return last;
}

static int32_t draw_from_all(const sample_row *row)
{
    const sample_job *job = row->job;
    double target = uniform_of(row) * total_of(row->sums.tempered, job->n_segments);
    int32_t segment = 0;
    double base = 0.0, sum = 0.0;
    for (int32_t i = 0; i < job->n_segments; i++) {
        if (row->sums.tempered[i] > 0.0f) {
            segment = i;
            base = sum;
        }
        sum += row->sums.tempered[i];
        if (sum > target)
            break;
    }
    int32_t begin = segment * SEGMENT;
    int32_t n = job->args->vocab - begin < SEGMENT ? job->args->vocab - begin : SEGMENT;
    job->kernels->weights(row->candidates->values, row->x + begin, n, row->top, row->factor);
    return begin + walk(row->candidates->values, n, base, target);
}

/* The candidates that top-p keeps of the best n, whose weights are given; 0: more than n are
 * needed. */
static int32_t nucleus(const float *weights, int32_t n, double wanted, double *kept)
{
    *kept = 0.0;
    for (int32_t i = 0; i < n; i++) {
        *kept += weights[i];
        if (*kept >= wanted)
            return i + 1;
    }
    return 0;
}

/* A logit so low that the weights at or above it sum to about `wanted`, from a histogram: eight
 * bins for each factor e. Only how many candidates are looked at depends on it, never which are
 * kept. */
static float threshold_of_mass(const sample_row *row, double wanted)
{
    enum { N_BINS = 512 };
    double mass[N_BINS] = {0};
    const sample_job *job = row->job;
    int32_t V = job->args->vocab;
    float *weights = row->candidates->values;
    job->kernels->weights(weights, row->x, V, row->top, row->factor);
    for (int32_t i = 0; i < V; i++) {
        float below = (row->top - row->x[i]) * row->factor * 8.0f;
        mass[below < N_BINS - 1 ? (int32_t)below : N_BINS - 1] += weights[i];
    }
    double sum = 0.0;
    for (int32_t bin = 0; bin < N_BINS - 1; bin++) {
        sum += mass[bin];
        if (sum >= wanted * 1.001)
            return row->top - (float)(bin + 1) / (8.0f * row->factor);
    }
    return -INFINITY;
}

/* Top-p alone looks at few candidates first, then at as many as the histogram says, then at all. */
static int32_t draw_from_best(const sample_row *row)
{
    const sample_job *job = row->job;
    float *weights = row->candidates->values;
    bool has_k = has_top_k(job, row->sampling);
    int32_t limit = has_k ? row->sampling->top_k : job->args->vocab;
    double top_p = row->sampling->top_p, kept;
    float threshold = threshold_of(row, has_k || limit < 64 ? limit : 64);
    for (int attempt = 0;; attempt++) {
        int32_t n = find_from(row, threshold);
        n = n < limit ? n : limit;
        job->kernels->weights(weights, weights, n, row->top, row->factor);
        double total = has_k ? total_of(weights, n) : total_of(row->sums.tempered, job->n_segments);
        int32_t n_kept = nucleus(weights, n, top_p * total, &kept);
        if (n_kept == 0 && n == limit)
            n_kept = n;
        if (n_kept > 0)
            return row->candidates->ids[walk(weights, n_kept, 0.0, uniform_of(row) * kept)];
        threshold = attempt == 0 ? threshold_of_mass(row, top_p * total) : -INFINITY;
    }
}

static int32_t choose(const sample_row *row)
{
    const mil_sampling *sampling = row->sampling;
    if (!(sampling->temperature > 0.0f))
        return choose_greedy(row);
    if (has_top_k(row->job, sampling) || sampling->top_p < 1.0f)
        return draw_from_best(row);
    return draw_from_all(row);
}

/* log softmax: (x - max) - log(sum of e^(x - max)). */
static void report_logprobs(const sample_row *row, mil_sample *out)
{
    const sample_job *job = row->job;
    float log_sum = job->kernels->log((float)total_of(row->sums.raw, job->n_segments));
    out->logprob = (row->x[out->token] - row->top) - log_sum;
    out->rank = 1 + job->kernels->count_before(row->x, job->args->vocab, out->token);
    int32_t n = row->sampling->n_logprobs;
    n = n < MIL_MAX_LOGPROBS ? n : MIL_MAX_LOGPROBS;
    out->n_top = n < job->args->vocab ? n : job->args->vocab;
    if (out->n_top == 0)
        return;
    (void)find_from(row, threshold_of(row, out->n_top));
    for (int32_t i = 0; i < out->n_top; i++) {
        out->top[i].token = row->candidates->ids[i];
        out->top[i].logprob = (row->candidates->values[i] - row->top) - log_sum;
    }
}

static void sample_one(const sample_job *job, int32_t index, candidates *list)
{
    const mil_sample_args *args = job->args;
    sample_row row = {
        .job = job,
        .sampling = sampling_of(job, index),
        .x = args->logits + index * args->ld,
        .sums = sums_of(job, index),
        .candidates = list,
        .position = args->batch->logit_positions[args->first_row + index],
    };
    row.top = top_of(&row.sums, job->n_segments);
    row.factor = factor_of(row.sampling);
    mil_sample *out = &args->out[index];
    *out = (mil_sample){.token = MIL_TOKEN_NUMERICS};
    if (!isfinite(row.top))
        return;
    out->token = choose(&row);
    if (row.sampling->n_logprobs >= 0)
        report_logprobs(&row, out);
    if (args->batch->logit_feeds[args->first_row + index])
        args->slots->last_token[args->batch->logit_slots[args->first_row + index]] = out->token;
}

/* ---- threads ---- */

static void sample_share(void *argument, int32_t thread, int32_t n_threads)
{
    sample_job *job = argument;
    int32_t n = job->n_segments;
    int64_t begin, end;
    mil_cpu_share((int64_t)job->args->n_rows * n, thread, n_threads, &begin, &end);
    for (int64_t i = begin; i < end; i++)
        pass_maxima(job, (int32_t)(i / n), (int32_t)(i % n));
    if (n_threads > 1)
        mil_cpu_barrier(job->context, thread);
    for (int64_t i = begin; i < end; i++)
        pass_sums(job, (int32_t)(i / n), (int32_t)(i % n));
    if (n_threads > 1)
        mil_cpu_barrier(job->context, thread);
    candidates list = candidates_of(job, thread);
    int32_t row;
    while ((row = atomic_fetch_add(&job->next, 1)) < job->args->n_rows)
        sample_one(job, row, &list);
}

mil_status mil_cpu_sample(mil_context *context, const mil_sample_args *args)
{
    sample_job job = {
        .args = args,
        .kernels = mil_cpu_kernels_of(context)->sample,
        .context = context,
        .n_segments = ceil_div(args->vocab, SEGMENT),
        .rows = context->workspace,
    };
    job.lists = (int32_t *)(job.rows + (size_t)args->n_rows * row_floats(args->vocab));
    atomic_init(&job.next, 0);
    mil_cpu_run_sized(context, sample_share, &job, (int64_t)args->n_rows * args->vocab);
    return MIL_OK;
}
