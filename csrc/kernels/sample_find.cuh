/* How a row's candidates are found: those that stand at a given place of the order, or where a
 * running sum of masses exceeds a target. One block, THREADS threads, serves one row.
 *
 * In a sorted list of the best few, gathered by way of the groups' maxima (the n-th largest of
 * those bounds the n-th largest logit from below); and, where the list is too short, through
 * histograms of the whole row, first linear in x, then radix on the keys, until what holds the
 * answer fits the list or is a run of equals. Counts and masses are integers: both ways answer
 * alike. */
#pragma once

#include "kernels/sample.cuh"

#define THREADS 512 /* of choose: 4 loads of 16 bytes each keep an SM's share of L2 busy */
#define N_WARPS (THREADS / MIL_WARP)
#define CHOOSE_LOADS 4
#define LIST 2048                   /* candidates that are sorted at once: 16 KiB */
#define LIST_ITEMS (LIST / THREADS) /* of one thread */
#define BINS_LOG2 10
#define BINS (1 << BINS_LOG2)
#define BINS_EACH (BINS / THREADS)
#define MAX_LISTED_K (LIST / 2) /* the n best by way of groups are some 1.4 n ids */
#define FIRST_LOOK 128          /* candidates for top-p alone: most often enough */

typedef sample_scratch<N_WARPS> scratch;

struct bins {
    uint32_t count[BINS];
    uint32_t low[BINS], high[BINS]; /* words of the mass: shared memory adds 32 bits at once */
};

/* A candidate and what stands before it. id < 0: number `tie` of the ids with this key. */
struct candidate {
    uint64_t mass; /* up to and with it */
    uint32_t key;
    int32_t id;
    int32_t tie;
    int32_t rank; /* 1: the best; 0: unknown */
};

/* A run of candidates, and what stands before it. */
struct stretch {
    uint64_t mass_before, mass;
    uint32_t count_before, count;
    int32_t bin;
};

/* The first candidate at which the running count or mass exceeds target. */
struct question {
    uint64_t target;
    bool is_count;
};

struct shared_state {
    uint64_t list[LIST]; /* key << 32 | id: ascending is best first, equals by lowest id */
    union {
        bins levels[2];      /* the whole row's; a stretch's */
        int32_t queue[LIST]; /* groups to look into, before there are bins */
    };
    scratch warps;
    uint32_t counts[2][N_WARPS];
    int32_t ties[MIL_MAX_LOGPROBS];
    int32_t n_list, n_queue;
    candidate answer;
    stretch part;
};

/* How a histogram's bins divide keys. */
struct binning {
    bool is_linear; /* in x from top down; else keys lo .. hi, 1 << shift to a bin */
    float top, scale;
    uint32_t lo, hi;
    int shift;
};

struct weighting {
    float top, factor;
};

/* ---- the list ---- */

static __device__ __forceinline__ void append(shared_state &state, uint32_t key, int32_t id)
{
    int32_t at = atomicAdd(&state.n_list, 1);
    if (at < LIST)
        state.list[at] = (uint64_t)key << 32 | (uint32_t)id;
}

/* 16 values of this thread; value i is of id pass_id(begin, i). */
static __device__ __forceinline__ void load_pass(float (&x)[4 * CHOOSE_LOADS],
                                                 const sample_row &row, int32_t begin)
{
#pragma unroll
    for (int i = 0; i < CHOOSE_LOADS; i++)
        load4(x + 4 * i, row, begin + (i * THREADS + (int)threadIdx.x) * 4);
}

static __device__ __forceinline__ int32_t pass_id(int32_t begin, int i)
{
    return begin + (i / 4 * THREADS + (int)threadIdx.x) * 4 + i % 4;
}

/* Keys lo .. hi of the whole row into the list, in any order. Returns how many there are. */
static __device__ int32_t collect(shared_state &state, const sample_row &row, uint32_t lo,
                                  uint32_t hi)
{
    __syncthreads();
    if (threadIdx.x == 0)
        state.n_list = 0;
    __syncthreads();
    for (int32_t begin = 0; begin < row.vocab; begin += 4 * CHOOSE_LOADS * THREADS) {
        float x[4 * CHOOSE_LOADS];
        load_pass(x, row, begin);
#pragma unroll
        for (int i = 0; i < 4 * CHOOSE_LOADS; i++) {
            uint32_t key = key_of(x[i]);
            if (key >= lo && key <= hi && pass_id(begin, i) < row.vocab)
                append(state, key, pass_id(begin, i));
        }
    }
    __syncthreads();
    return state.n_list;
}

/* Groups whose maximum has a key <= key. */
static __device__ int32_t count_groups(shared_state &state, const sample_row &row, uint32_t key,
                                       int parity)
{
    uint32_t n = 0;
    for (int32_t i = threadIdx.x; i < row.n_groups; i += THREADS)
        n += key_of(row.group_max[i]) <= key;
    n = __reduce_add_sync(0xffffffffu, n);
    if (threadIdx.x % MIL_WARP == 0)
        state.counts[parity][threadIdx.x / MIL_WARP] = n;
    __syncthreads();
    int lane = threadIdx.x % MIL_WARP;
    return (int32_t)__reduce_add_sync(0xffffffffu, lane < N_WARPS ? state.counts[parity][lane] : 0);
}

/* A key that at least n <= n_groups groups' maxima, so at least n logits, are as good as; not many
 * more where keys differ. */
static __device__ uint32_t threshold_of(shared_state &state, const sample_row &row, int32_t n,
                                        float top)
{
    uint32_t lo = key_of(top), hi = WORST_KEY;
    int parity = 0; /* two places for counts, so that one barrier a round is enough */
    while (lo < hi) {
        uint32_t middle = lo + (hi - lo) / 2;
        int32_t count = count_groups(state, row, middle, parity);
        parity ^= 1;
        if (count < n) {
            lo = middle + 1;
            continue;
        }
        hi = middle;
        if (count <= n + n / 4 + 8)
            break;
    }
    return hi;
}

/* As collect of keys up to hi, looking only into groups that hold one. */
static __device__ int32_t collect_from_groups(shared_state &state, const sample_row &row,
                                              uint32_t hi)
{
    __syncthreads();
    if (threadIdx.x == 0)
        state.n_list = state.n_queue = 0;
    __syncthreads();
    for (int32_t i = threadIdx.x; i < row.n_groups; i += THREADS) {
        if (key_of(row.group_max[i]) > hi)
            continue;
        int32_t at = atomicAdd(&state.n_queue, 1);
        if (at < LIST)
            state.queue[at] = i;
    }
    __syncthreads();
    int32_t n_queue = state.n_queue;
    if (n_queue > LIST)
        return n_queue; /* each holds one at least */
    for (int32_t i = threadIdx.x / (GROUP / 4); i < n_queue; i += THREADS / (GROUP / 4)) {
        int32_t id = state.queue[i] * GROUP + (int)threadIdx.x % (GROUP / 4) * 4;
        float x[4];
        load4(x, row, id);
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (key_of(x[j]) <= hi && id + j < row.vocab)
                append(state, key_of(x[j]), id + j);
    }
    __syncthreads();
    return state.n_list;
}

/* Bitonic (Batcher 1968). Pairs of one warp lie in 64 neighbours while the stride is at most 32. */
static __device__ void sort_list(shared_state &state, int32_t n)
{
    int32_t size = 2;
    while (size < n)
        size *= 2;
    for (int32_t i = n + threadIdx.x; i < size; i += THREADS)
        state.list[i] = ~0ull;
    __syncthreads();
    for (int32_t run = 2; run <= size; run *= 2) {
        for (int32_t stride = run / 2; stride > 0; stride /= 2) {
            for (int32_t pair = threadIdx.x; pair < size / 2; pair += THREADS) {
                int32_t i = 2 * pair - (pair & (stride - 1));
                uint64_t a = state.list[i], b = state.list[i + stride];
                if ((a > b) == ((i & run) == 0)) {
                    state.list[i] = b;
                    state.list[i + stride] = a;
                }
            }
            int32_t next = stride > 1 ? stride / 2 : run;
            if (stride > MIL_WARP || next > MIL_WARP)
                __syncthreads();
            else
                __syncwarp();
        }
    }
    __syncthreads();
}

/* The list's n sorted items follow what `before` counts. False: the answer comes after them. */
static __device__ __forceinline__ bool find_in_list(candidate *out, shared_state &state, int32_t n,
                                                    const stretch &before, weighting by,
                                                    question ask)
{
    uint64_t mass[LIST_ITEMS], own = 0, total;
    int32_t first = threadIdx.x * LIST_ITEMS;
#pragma unroll
    for (int i = 0; i < LIST_ITEMS; i++) {
        mass[i] = first + i < n ? mass_of(value_of((uint32_t)(state.list[first + i] >> 32)), by.top,
                                          by.factor)
                                : 0;
        own += mass[i];
    }
    uint64_t sum = before.mass_before + block_scan(state.warps, own, &total);
    uint64_t count = before.count_before + (uint64_t)first;
    uint64_t end = ask.is_count ? before.count_before + (uint64_t)n : before.mass_before + total;
    if (ask.target >= end)
        return false;
#pragma unroll
    for (int i = 0; i < LIST_ITEMS; i++) {
        uint64_t reached = ask.is_count ? count : sum;
        uint64_t step = ask.is_count ? first + i < n : mass[i];
        sum += mass[i];
        count++;
        if (reached <= ask.target && ask.target < reached + step) {
            uint64_t item = state.list[first + i];
            state.answer = {sum, (uint32_t)(item >> 32), (int32_t)(uint32_t)item, 0,
                            (int32_t)count};
        }
    }
    __syncthreads();
    *out = state.answer;
    return true;
}

/* ---- histograms ---- */

static __device__ __forceinline__ int32_t linear_bin(const binning &division, float x)
{
    float below = __fmul_rn(__fsub_rn(division.top, x), division.scale);
    return (int32_t)fminf(below, (float)(BINS - 1));
}

/* -1: outside. */
static __device__ __forceinline__ int32_t bin_of(const binning &division, float x)
{
    if (division.is_linear)
        return linear_bin(division, x);
    uint32_t key = key_of(x);
    return key >= division.lo && key <= division.hi
               ? (int32_t)((key - division.lo) >> division.shift)
               : -1;
}

static __device__ __forceinline__ void add_to_bin(bins &to, int32_t bin, uint64_t mass)
{
    atomicAdd(&to.count[bin], 1u);
    uint32_t low = (uint32_t)mass, high = (uint32_t)(mass >> 32);
    if (low != 0) {
        uint32_t was = atomicAdd(&to.low[bin], low);
        high += was + low < was;
    }
    if (high != 0)
        atomicAdd(&to.high[bin], high);
}

static __device__ void fill_bins(bins &to, const sample_row &row, const binning &division,
                                 weighting by)
{
    __syncthreads();
    for (int32_t i = threadIdx.x; i < BINS; i += THREADS)
        to.count[i] = to.low[i] = to.high[i] = 0;
    __syncthreads();
    for (int32_t begin = 0; begin < row.vocab; begin += 4 * CHOOSE_LOADS * THREADS) {
        float x[4 * CHOOSE_LOADS];
        load_pass(x, row, begin);
#pragma unroll
        for (int i = 0; i < 4 * CHOOSE_LOADS; i++) {
            int32_t bin = bin_of(division, x[i]);
            if (bin >= 0 && pass_id(begin, i) < row.vocab)
                add_to_bin(to, bin, mass_of(x[i], by.top, by.factor));
        }
    }
    __syncthreads();
}

/* The bin that holds the answer; before.mass_before and count_before stand before bin 0. */
static __device__ __forceinline__ stretch find_bin(shared_state &state, const bins &from,
                                                   const stretch &before, question ask)
{
    int32_t first = threadIdx.x * BINS_EACH;
    uint64_t count = 0, mass = 0, total;
#pragma unroll
    for (int i = 0; i < BINS_EACH; i++) {
        count += from.count[first + i];
        mass += (uint64_t)from.high[first + i] << 32 | from.low[first + i];
    }
    count = before.count_before + block_scan(state.warps, count, &total);
    if (threadIdx.x == 0)
        state.part.bin = -1;
    mass = before.mass_before + block_scan(state.warps, mass, &total);
#pragma unroll
    for (int i = 0; i < BINS_EACH; i++) {
        uint32_t n = from.count[first + i];
        uint64_t own = (uint64_t)from.high[first + i] << 32 | from.low[first + i];
        uint64_t reached = ask.is_count ? count : mass;
        if (reached <= ask.target && ask.target < reached + (ask.is_count ? n : own))
            state.part = {mass, own, (uint32_t)count, n, first + i};
        count += n;
        mass += own;
    }
    __syncthreads();
    return state.part;
}

/* The first key whose value falls in bin `bin` or a later one. */
static __device__ uint32_t first_key_of(const binning &division, int32_t bin)
{
    uint32_t lo = key_of(division.top), hi = WORST_KEY;
    while (lo < hi) {
        uint32_t middle = lo + (hi - lo) / 2;
        if (linear_bin(division, value_of(middle)) >= bin)
            hi = middle;
        else
            lo = middle + 1;
    }
    return lo;
}

/* Bins so wide that weights that count, and where the row is flat its logits, spread over all of
 * them. Only time depends on it. */
static __device__ binning divide_row(shared_state &state, const sample_row &row, weighting by)
{
    uint32_t last = 0; /* the worst finite of the groups' maxima */
    for (int32_t i = threadIdx.x; i < row.n_groups; i += THREADS) {
        uint32_t key = key_of(row.group_max[i]);
        last = key < WORST_KEY ? max(last, key) : last;
    }
    /* As the least of complements, in int32's order. */
    last = (uint32_t)~block_min(state.warps, ~(int32_t)(last ^ 0x80000000u)) ^ 0x80000000u;
    float spread = by.top - value_of(last);
    float range = fminf(4.0f * spread, 32.0f / by.factor);
    return {true, by.top, fminf(BINS / range, FLT_MAX), 0, 0, 0};
}

/* ---- answers ---- */

/* The ask.target-th of count candidates with one key. */
static __device__ candidate answer_among_ties(const stretch &part, uint32_t key, question ask)
{
    uint64_t mass = part.mass / max(part.count, 1u);
    uint64_t tie = ask.is_count ? ask.target - part.count_before
                                : (ask.target - part.mass_before) / max(mass, (uint64_t)1);
    return {part.mass_before + (tie + 1) * mass, key, -1, (int32_t)tie,
            (int32_t)(part.count_before + tie + 1)};
}

/* From the list where it holds *n_list items and the answer; else from the row, and the list is
 * spent. */
static __device__ candidate find(shared_state &state, const sample_row &row, int32_t *n_list,
                                 binning *division, weighting by, question ask)
{
    const stretch none = {0, 0, 0, 0, 0};
    candidate found = {0, 0, -1, -1, 0};
    if (*n_list > 0 && find_in_list(&found, state, *n_list, none, by, ask))
        return found;
    *n_list = 0;
    if (!division->is_linear) { /* not made yet */
        *division = divide_row(state, row, by);
        fill_bins(state.levels[0], row, *division, by);
    }
    stretch part = find_bin(state, state.levels[0], none, ask);
    if (part.bin < 0)
        return found;
    uint32_t lo = first_key_of(*division, part.bin);
    uint32_t hi = part.bin + 1 < BINS ? first_key_of(*division, part.bin + 1) - 1 : WORST_KEY;
    while (part.count > LIST && lo < hi) {
        int width = 32 - __clz(hi - lo);
        int shift = max(width - BINS_LOG2, 0);
        binning narrower = {false, 0.0f, 0.0f, lo, hi, shift};
        fill_bins(state.levels[1], row, narrower, by);
        part = find_bin(state, state.levels[1], part, ask);
        if (part.bin < 0)
            return found;
        lo += (uint32_t)part.bin << shift;
        hi = min(hi, lo + ((1u << shift) - 1));
    }
    if (part.count > LIST)
        return answer_among_ties(part, lo, ask);
    int32_t n = min(collect(state, row, lo, hi), LIST);
    sort_list(state, n);
    (void)find_in_list(&found, state, n, part, by, ask);
    return found;
}

/* Ids first .. first + n - 1 among those with this key, ascending, to state.ties. n <= 20. */
static __device__ void find_ties(shared_state &state, const sample_row &row, uint32_t key,
                                 uint32_t first, uint32_t n)
{
    uint64_t seen = 0;
    for (int32_t begin = 0; begin < row.vocab && seen < first + n;
         begin += 4 * CHOOSE_LOADS * THREADS) {
        int32_t id = begin + (int)threadIdx.x * 4 * CHOOSE_LOADS;
        float x[4 * CHOOSE_LOADS];
        uint64_t count = 0, total;
#pragma unroll
        for (int i = 0; i < CHOOSE_LOADS; i++)
            load4(x + 4 * i, row, id + 4 * i);
#pragma unroll
        for (int i = 0; i < 4 * CHOOSE_LOADS; i++)
            count += key_of(x[i]) == key && id + i < row.vocab;
        uint64_t at = seen + block_scan(state.warps, count, &total);
        seen += total;
#pragma unroll
        for (int i = 0; i < 4 * CHOOSE_LOADS; i++) {
            if (key_of(x[i]) != key || id + i >= row.vocab)
                continue;
            if (at >= first && at < (uint64_t)first + n)
                state.ties[at - first] = id + i;
            at++;
        }
    }
    __syncthreads();
}
