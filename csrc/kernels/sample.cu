/* sample: a token for each row of logits, after temperature, top-k and top-p; logprobs.
 *
 *   out [n_rows], logits [n_rows, ld] fp32 (kept), parameters slots->sampling[logit_slots[row]]
 *
 * The definition is docs/numerics.md's, with masses (sample.cuh: integers, exact sums) for weights.
 * Candidates stand in one order, best first, equals by lowest id. Top-k, top-p and the draw each
 * ask for the first candidate at which a running sum, of 1s or of masses, exceeds a target; with
 * neither filter the draw goes by ascending id. So how a question is answered cannot change its
 * answer (sample_find.cuh).
 *
 * Three kernels. maxima: of groups and segments, (row, segment) to a block. masses: sums of
 * segments, likewise, over in an instant for rows that want none. choose: a block for each row.
 *
 * Bound by reading the logits: once for greedy, twice (the second time from L2) for draws. Of an
 * H200's 4.55 TB/s, 64 rows of 128,256: greedy 0.53, top-k 0.25, a flat top-p 0.05 (2026-11-29,
 * bench_ops). */
#include "kernels/cuda.h"

#include "base/hash.h"
#include "kernels/sample_find.cuh"

#define PASS_THREADS 256
#define PASS_LOADS (SEGMENT / (4 * PASS_THREADS)) /* of 16 bytes, all in flight */
#define SAMPLE_STREAM 0x73616d706c65ull           /* the draw's purpose, cpu/sample.c's */

/* ---- passes over (row, segment) ---- */

/* Values i of a thread: ids (threadIdx + i * PASS_THREADS) * 4 and on of its segment. */
static __device__ __forceinline__ void load_segment(float (&x)[PASS_LOADS][4],
                                                    const sample_row &row, int32_t segment)
{
#pragma unroll
    for (int i = 0; i < PASS_LOADS; i++)
        load4(x[i], row, segment * SEGMENT + (i * PASS_THREADS + (int)threadIdx.x) * 4);
}

static __global__ void __launch_bounds__(PASS_THREADS) maxima_kernel(sample_job job)
{
    __shared__ float warp_top[PASS_THREADS / MIL_WARP];
    mil_let_next_start();
    mil_wait_for_previous();
    if (job.first_row + (int32_t)blockIdx.x >= job.counts->n_logit_rows)
        return;
    sample_row row = row_of(job, blockIdx.x);
    int32_t segment = blockIdx.y;
    float x[PASS_LOADS][4];
    load_segment(x, row, segment);
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < PASS_LOADS; i++) {
        float most = max_or_nan(max_or_nan(x[i][0], x[i][1]), max_or_nan(x[i][2], x[i][3]));
#pragma unroll
        for (int offset = GROUP / 8; offset > 0; offset /= 2)
            most = max_or_nan(most, __shfl_xor_sync(0xffffffffu, most, offset));
        int32_t group = (segment * SEGMENT + (i * PASS_THREADS + (int)threadIdx.x) * 4) / GROUP;
        if (threadIdx.x % (GROUP / 4) == 0 && group < row.n_groups)
            row.group_max[group] = most;
        top = max_or_nan(top, most);
    }
    top = max_or_nan(top, __shfl_xor_sync(0xffffffffu, top, MIL_WARP / 2));
    if (threadIdx.x % MIL_WARP == 0)
        warp_top[threadIdx.x / MIL_WARP] = top;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < PASS_THREADS / MIL_WARP; i++)
            top = max_or_nan(top, warp_top[i]);
        row.segment_max[segment] = top;
    }
}

static __device__ __forceinline__ void sum_segment(uint64_t *out, uint64_t *warp_sums,
                                                   const float (&x)[PASS_LOADS][4], float top,
                                                   float factor)
{
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < PASS_LOADS; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            sum += mass_of(x[i][j], top, factor);
    sum = warp_sum(sum);
    if (threadIdx.x % MIL_WARP == 0)
        warp_sums[threadIdx.x / MIL_WARP] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < PASS_THREADS / MIL_WARP; i++)
            sum += warp_sums[i];
        *out = sum;
    }
    __syncthreads();
}

static __global__ void __launch_bounds__(PASS_THREADS) masses_kernel(sample_job job)
{
    __shared__ uint64_t warp_sums[PASS_THREADS / MIL_WARP];
    mil_let_next_start();
    mil_wait_for_previous();
    int32_t at = job.first_row + (int32_t)blockIdx.x;
    if (at >= job.counts->n_logit_rows)
        return;
    mil_sampling sampling = job.sampling[slot_of(job, at)];
    /* Top-k sums its own candidates. */
    bool wants_tempered = sampling.temperature > 0.0f && !cuts_by_k(sampling, job.vocab);
    bool wants_raw = sampling.n_logprobs >= 0;
    if (!wants_tempered && !wants_raw)
        return;
    sample_row row = row_of(job, blockIdx.x);
    float x[PASS_LOADS][4];
    load_segment(x, row, blockIdx.y);
    float top = top_of(row);
    if (!isfinite(top))
        return;
    if (wants_raw)
        sum_segment(&row.raw[blockIdx.y], warp_sums, x, top, 1.0f);
    if (wants_tempered)
        sum_segment(&row.tempered[blockIdx.y], warp_sums, x, top, factor_of(sampling));
}

/* ---- the choice ---- */

static __device__ candidate greedy(shared_state &state, const sample_row &row, float top)
{
    int32_t group = row.n_groups;
    for (int32_t i = threadIdx.x; i < row.n_groups; i += THREADS)
        if (row.group_max[i] == top)
            group = min(group, i);
    group = block_min(state.warps, group);
    int32_t id = group * GROUP + (int)threadIdx.x;
    bool is_best = threadIdx.x < GROUP && id < row.vocab && clean(row.x[id]) == top;
    id = block_min(state.warps, is_best ? id : row.vocab);
    return {0, key_of(top), id < row.vocab ? id : -1, 0, 1};
}

/* The sum of n <= THREADS masses. */
static __device__ uint64_t total_of(shared_state &state, const uint64_t *masses, int32_t n)
{
    uint64_t total;
    (void)block_scan(state.warps, (int32_t)threadIdx.x < n ? masses[threadIdx.x] : 0, &total);
    return total;
}

/* The upper 53 bits of the draw's hash. */
static __device__ __forceinline__ uint64_t uniform_bits(uint64_t seed, int32_t position)
{
    return mil_counter_hash(seed, SAMPLE_STREAM, (uint64_t)position) >> 11;
}

/* floor(bits / 2^53 * total), which a running sum of integers exceeds exactly when it exceeds
 * u total. */
static __device__ __forceinline__ uint64_t share_of(uint64_t bits, uint64_t total)
{
    return __umul64hi(bits, total) << 11 | bits * total >> 53;
}

/* Ids ascend. */
static __device__ candidate draw_from_all(shared_state &state, const sample_row &row, weighting by,
                                          uint64_t bits)
{
    enum { EACH = SEGMENT / THREADS };
    uint64_t own = (int32_t)threadIdx.x < row.n_segments ? row.tempered[threadIdx.x] : 0, total;
    uint64_t before = block_scan(state.warps, own, &total);
    uint64_t target = share_of(bits, total);
    if (threadIdx.x == 0) {
        state.answer = {0, 0, -1, -1, 0};
        state.part = {0, 0, 0, 0, 0};
    }
    __syncthreads();
    if (before <= target && target < before + own)
        state.part = {before, own, 0, 0, (int32_t)threadIdx.x};
    __syncthreads();
    target -= state.part.mass_before;
    int32_t id = state.part.bin * SEGMENT + (int)threadIdx.x * EACH;
    float x[EACH];
    uint64_t mass[EACH], sum = 0;
#pragma unroll
    for (int i = 0; i < EACH; i += 4)
        load4(x + i, row, id + i);
#pragma unroll
    for (int i = 0; i < EACH; i++)
        sum += mass[i] = mass_of(x[i], by.top, by.factor);
    sum = block_scan(state.warps, sum, &total);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        if (sum <= target && target < sum + mass[i])
            state.answer = {0, key_of(x[i]), id + i, 0, 0};
        sum += mass[i];
    }
    __syncthreads();
    return state.answer;
}

/* 1 + how many stand before id in the order of candidates. */
static __device__ int32_t rank_of(shared_state &state, const sample_row &row, uint32_t key,
                                  int32_t id)
{
    uint64_t count = 0, total;
    for (int32_t begin = 0; begin < row.vocab; begin += 4 * CHOOSE_LOADS * THREADS) {
        float x[4 * CHOOSE_LOADS];
        load_pass(x, row, begin);
#pragma unroll
        for (int i = 0; i < 4 * CHOOSE_LOADS; i++) {
            int32_t other = pass_id(begin, i);
            count +=
                other < row.vocab && (key_of(x[i]) < key || (key_of(x[i]) == key && other < id));
        }
    }
    (void)block_scan(state.warps, count, &total);
    return 1 + (int32_t)total;
}

/* log softmax of what the list holds, entries i .. of out. */
static __device__ void report_list(mil_sample *out, const shared_state &state, int32_t n, float top,
                                   float log_sum)
{
    int32_t i = threadIdx.x;
    if (i >= n)
        return;
    float x = value_of((uint32_t)(state.list[i] >> 32));
    out->top[i] = {(int32_t)(uint32_t)state.list[i], (x - top) - log_sum};
}

/* The n best where the list could not hold them: those better than the n-th, then its equals. */
static __device__ void report_best(mil_sample *out, shared_state &state, const sample_row &row,
                                   uint32_t key, int32_t n, float top, float log_sum)
{
    int32_t n_better = min(collect(state, row, 0, key - 1), n);
    sort_list(state, n_better);
    report_list(out, state, n_better, top, log_sum);
    find_ties(state, row, key, 0, n - n_better);
    int32_t i = threadIdx.x;
    if (i < n - n_better)
        out->top[n_better + i] = {state.ties[i], (value_of(key) - top) - log_sum};
}

/* The best n, and somewhat more, sorted into the list; 0 where they do not fit. */
static __device__ int32_t list_best(shared_state &state, const sample_row &row, int32_t n,
                                    float top)
{
    int32_t n_list;
    if (row.vocab <= LIST)
        n_list = collect(state, row, 0, WORST_KEY);
    else
        n_list =
            collect_from_groups(state, row, threshold_of(state, row, min(n, row.n_groups), top));
    if (n_list > LIST)
        return 0;
    sort_list(state, n_list);
    return n_list;
}

enum stage { STAGE_BEST, STAGE_TOP_K, STAGE_TOP_P, STAGE_DRAW };

/* The token, and the n_top best to out->top. */
static __device__ candidate choose(mil_sample *out, shared_state &state, const sample_row &row,
                                   const mil_sampling &sampling, int32_t position, float top,
                                   int32_t n_top, float log_sum)
{
    bool is_greedy = !(sampling.temperature > 0.0f);
    bool has_k = !is_greedy && cuts_by_k(sampling, row.vocab);
    bool has_p = !is_greedy && sampling.top_p < 1.0f;
    bool is_filtered = has_k || has_p;
    weighting by = {top, is_greedy ? 1.0f : factor_of(sampling)};
    uint64_t bits = uniform_bits(sampling.seed, position);

    int32_t n_look = n_top;
    if (is_filtered && row.vocab <= LIST)
        n_look = row.vocab;
    else if (has_k && sampling.top_k <= MAX_LISTED_K)
        n_look = max(n_top, sampling.top_k);
    else if (has_p && !has_k)
        n_look = max(n_top, FIRST_LOOK);
    int32_t n_list = n_look > 0 ? list_best(state, row, n_look, top) : 0;
    if (n_list > 0)
        report_list(out, state, n_top, top, log_sum);

    uint64_t total = 0; /* of what is left */
    binning division = {false, 0.0f, 0.0f, 0, 0, 0};
    candidate found = {0, 0, -1, -1, 0};
    int last = is_filtered ? STAGE_DRAW : STAGE_BEST;
    for (int stage = STAGE_BEST; stage <= last; stage++) {
        question ask;
        if (stage == STAGE_BEST) {
            if (n_top == 0 || n_list > 0)
                continue;
            ask = {(uint64_t)n_top - 1, true};
        } else if (stage == STAGE_TOP_K) {
            if (!has_k)
                continue;
            ask = {(uint64_t)sampling.top_k - 1, true};
        } else if (stage == STAGE_TOP_P) {
            if (!has_p)
                continue;
            if (!has_k)
                total = total_of(state, row.tempered, row.n_segments);
            uint64_t wanted = __double2ull_ru((double)sampling.top_p * (double)total);
            ask = {min(max(wanted, (uint64_t)1), total) - 1, false};
        } else {
            ask = {share_of(bits, total), false};
        }
        found = find(state, row, &n_list, &division, by, ask);
        total = found.mass;
        if (stage == STAGE_BEST)
            report_best(out, state, row, found.key, n_top, top, log_sum);
    }
    if (is_filtered) {
        if (found.id < 0 && found.tie >= 0) {
            find_ties(state, row, found.key, found.tie, 1);
            found.id = state.ties[0];
        }
        return found;
    }
    return is_greedy ? greedy(state, row, top) : draw_from_all(state, row, by, bits);
}

static __global__ void __launch_bounds__(THREADS, 1) choose_kernel(sample_job job)
{
    __shared__ shared_state state;
    mil_let_next_start();
    mil_wait_for_previous();
    int32_t at = job.first_row + (int32_t)blockIdx.x;
    if (at >= job.counts->n_logit_rows)
        return;
    int32_t slot = slot_of(job, at);
    mil_sampling sampling = job.sampling[slot];
    sample_row row = row_of(job, blockIdx.x);
    mil_sample *out = &job.out[blockIdx.x];
    float top = top_of(row), log_sum = 0.0f;
    bool is_sound = isfinite(top);
    bool wants_logprobs = is_sound && sampling.n_logprobs >= 0;
    int32_t n_top = 0;
    candidate found = {0, 0, MIL_TOKEN_NUMERICS, -1, 0};
    if (wants_logprobs) {
        n_top = min(min(sampling.n_logprobs, MIL_MAX_LOGPROBS), row.vocab);
        uint64_t total = total_of(state, row.raw, row.n_segments);
        log_sum = logf((float)total * (1.0f / (1ull << MASS_BITS)));
    }
    if (is_sound)
        found = choose(out, state, row, sampling, job.logit_positions[at], top, n_top, log_sum);
    if (wants_logprobs && found.rank == 0 && found.id >= 0)
        found.rank = rank_of(state, row, found.key, found.id);
    if ((int32_t)threadIdx.x >= n_top && threadIdx.x < MIL_MAX_LOGPROBS)
        out->top[threadIdx.x] = {0, 0.0f};
    if (threadIdx.x != 0)
        return;
    out->token = found.id;
    out->n_top = n_top;
    out->logprob = wants_logprobs ? (value_of(found.key) - top) - log_sum : 0.0f;
    out->rank = wants_logprobs ? found.rank : 0;
    if (found.id >= 0 && job.logit_feeds[at])
        job.last_token[slot] = found.id;
}

/* ---- launch ---- */

extern "C" size_t mil_cuda_sample_workspace(const mil_maxima *maxima)
{
    int64_t n_bytes =
        maxima->max_logit_rows *
        sample_row_bytes(mil_ceil_div(maxima->vocab, SEGMENT), mil_ceil_div(maxima->vocab, GROUP));
    return mil_round_up((size_t)n_bytes, 256);
}

extern "C" mil_status mil_cuda_sample(mil_context *context, const mil_sample_args *args)
{
    if (args->vocab > MAX_VOCAB)
        return mil_fail(MIL_ERR_UNSUPPORTED,
                        "sample: the vocabulary has %d ids, expected at most %d", args->vocab,
                        MAX_VOCAB);
    if (args->n_rows == 0)
        return MIL_OK;
    const mil_batch *batch = args->batch;
    sample_job job;
    job.out = args->out;
    job.logits = args->logits;
    job.ld = args->ld;
    job.counts = batch->counts;
    job.logit_slots = batch->logit_slots;
    job.logit_feeds = batch->logit_feeds;
    job.logit_positions = batch->logit_positions;
    job.sampling = args->slots->sampling;
    job.last_token = args->slots->last_token;
    job.workspace = (char *)context->workspace;
    job.n_slots = args->slots->n_slots;
    job.first_row = args->first_row;
    job.vocab = args->vocab;
    job.n_segments = mil_ceil_div(args->vocab, SEGMENT);
    job.n_groups = mil_ceil_div(args->vocab, GROUP);
    job.row_bytes = sample_row_bytes(job.n_segments, job.n_groups);
    dim3 passes(args->n_rows, job.n_segments);
    MIL_TRY(mil_launch(context->queue, "sample: maxima", maxima_kernel, passes, dim3(PASS_THREADS),
                       0, job));
    MIL_TRY(mil_launch(context->queue, "sample: masses", masses_kernel, passes, dim3(PASS_THREADS),
                       0, job));
    return mil_launch(context->queue, "sample: choose", choose_kernel, dim3(args->n_rows),
                      dim3(THREADS), 0, job);
}
