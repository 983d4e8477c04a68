/* Attention's list of work, made on the device once a step for all layers.
 *
 * Reads counts, query_indptr, kv_lengths and seq_slot of the batch; writes attention.cuh's list to
 * step_data: for each sequence either tiles of packed rows (several queries) or, for one query,
 * tiles times splits of its keys. A split has MIL_ATTENTION_MIN_SPLIT keys, doubled until the row
 * has no more than mil_attention_max_splits of them: a function of the row's length alone. Items
 * are sorted by their number of key blocks, longest first (to a quarter of an octave; the order
 * inside a class is left to integer atomics and reaches no result). One block; bound by latency,
 * some 10 us. */
#include "ops/backend.h"

#include "kernels/attention.cuh"

#define THREADS 1024  /* a group of sequences: one for each thread, then items of all, flat */
#define N_CLASSES 128 /* of length; chunks' own, if they are apart, come before all others */

typedef struct plan_params {
    const mil_plan_header *counts;
    const int32_t *query_indptr;
    const int32_t *kv_lengths;
    const int32_t *seq_slot;
    mil_attention_places places;
    int32_t bucket_seqs, bucket_tokens;
    int32_t group;
    int32_t n_tiles; /* of MIL_ATTENTION_ROWS that hold a group */
    int32_t tile_rows;
    int32_t max_splits;
    int32_t max_keys; /* that a page table can hold */
    int32_t n_slots;
    bool are_chunks_apart; /* the Hopper path's kernel takes them from the list's front */
} plan_params;

typedef struct plan_sequence {
    int32_t token, query_length, kv_length, slot;
    int32_t n_splits, partial, counter;
} plan_sequence;

typedef struct plan_shared {
    plan_sequence sequences[THREADS];
    int32_t warp_sums[THREADS / MIL_WARP]; /* read as whole vectors: nothing else in those */
    int32_t classes[2 * N_CLASSES];        /* items in it, then where its next one goes */
    int32_t first_item[THREADS + 1];       /* of each sequence of the group */
} plan_shared;

static __device__ __forceinline__ int32_t clamp(int32_t x, int32_t low, int32_t high)
{
    return min(max(x, low), high);
}

static __device__ int32_t split_keys(int32_t kv_length, int32_t max_splits)
{
    int32_t keys = MIL_ATTENTION_MIN_SPLIT;
    while ((int64_t)keys * max_splits < kv_length)
        keys *= 2;
    return keys;
}

/* Sum over the threads before this one; *total over all. The block's threads all come here. */
static __device__ int32_t sum_before(int32_t x, int32_t *total, int32_t *warp_sums)
{
    const int32_t lane = threadIdx.x % MIL_WARP, warp = threadIdx.x / MIL_WARP;
    int32_t sum = x;
    for (int offset = 1; offset < MIL_WARP; offset *= 2) {
        const int32_t below = __shfl_up_sync(0xffffffffu, sum, offset);
        sum += lane >= offset ? below : 0;
    }
    __syncthreads();
    if (lane == MIL_WARP - 1)
        warp_sums[warp] = sum;
    __syncthreads();
    int32_t before = 0, all = 0;
    for (int i = 0; i < THREADS / MIL_WARP; i++) {
        before += i < warp ? warp_sums[i] : 0;
        all += warp_sums[i];
    }
    *total = all;
    return before + sum - x;
}

static __device__ plan_sequence sequence_of(const plan_params &p, int32_t s, int32_t n_seqs)
{
    plan_sequence sequence = {};
    if (s >= n_seqs)
        return sequence;
    sequence.token = clamp(p.query_indptr[s], 0, p.bucket_tokens);
    sequence.query_length =
        clamp(p.query_indptr[s + 1], sequence.token, p.bucket_tokens) - sequence.token;
    sequence.kv_length = max(min(p.kv_lengths[s], p.max_keys), sequence.query_length);
    sequence.slot = clamp(p.seq_slot[s], 0, p.n_slots - 1);
    sequence.counter = s * p.n_tiles;
    sequence.n_splits = 1;
    if (sequence.query_length == 1) {
        const int32_t keys = split_keys(sequence.kv_length, p.max_splits);
        sequence.n_splits = (sequence.kv_length + keys - 1) / keys;
    }
    return sequence;
}

static __device__ int32_t n_items_of(const plan_params &p, const plan_sequence &sequence)
{
    if (sequence.query_length == 1)
        return p.n_tiles * sequence.n_splits;
    return (int32_t)(((int64_t)sequence.query_length * p.group + p.tile_rows - 1) / p.tile_rows);
}

static __device__ mil_attention_item item_of(const plan_params &p, const plan_sequence &sequence,
                                             int32_t i)
{
    mil_attention_item item;
    const bool is_decode = sequence.query_length == 1;
    const int32_t tile = is_decode ? i / sequence.n_splits : i;
    const int32_t tile_rows = is_decode ? MIL_ATTENTION_ROWS : p.tile_rows;
    item.token = sequence.token;
    item.past = sequence.kv_length - sequence.query_length;
    item.slot = sequence.slot;
    item.first_row = tile * tile_rows;
    item.n_rows = min(tile_rows, sequence.query_length * p.group - item.first_row);
    item.first_limit = item.past + item.first_row / p.group + 1;
    item.split = is_decode ? i - tile * sequence.n_splits : 0;
    item.n_splits = sequence.n_splits;
    item.partial = sequence.partial;
    item.counter = sequence.counter + (is_decode ? tile : 0);
    item.key_begin = 0;
    item.key_end = item.past + (item.first_row + item.n_rows - 1) / p.group + 1;
    if (sequence.n_splits > 1) {
        const int32_t keys = split_keys(sequence.kv_length, p.max_splits);
        item.key_begin = item.split * keys;
        item.key_end = min(item.key_end, item.key_begin + keys);
    }
    return item;
}

static __device__ bool is_apart(const plan_params &p, const plan_sequence &sequence)
{
    return p.are_chunks_apart && sequence.query_length > 1;
}

/* The greater, the earlier in the list. */
static __device__ int32_t class_of(const mil_attention_item &item, bool is_apart)
{
    const uint32_t keys = (uint32_t)max(item.key_end - item.key_begin, 1);
    const uint32_t n = (keys + MIL_ATTENTION_BLOCK - 1) / MIL_ATTENTION_BLOCK;
    const int32_t log2 = 31 - __clz((int)n);
    return (is_apart ? N_CLASSES : 0) + 4 * log2 +
           (int32_t)((log2 >= 2 ? n >> (log2 - 2) : n << (2 - log2)) & 3);
}

/* Fill the shared arrays for sequences first .. first + THREADS; returns their items. */
static __device__ int32_t load_group(const plan_params &p, plan_shared &shared, int32_t first,
                                     int32_t n_seqs, int32_t *n_partials)
{
    const int32_t t = threadIdx.x;
    plan_sequence sequence = sequence_of(p, first + t, n_seqs);
    int32_t total;
    const int32_t wanted = sequence.n_splits > 1 ? sequence.n_splits : 0;
    sequence.partial = *n_partials + sum_before(wanted, &total, shared.warp_sums);
    *n_partials += total;
    const int32_t before = sum_before(n_items_of(p, sequence), &total, shared.warp_sums);
    shared.sequences[t] = sequence;
    shared.first_item[t] = before;
    if (t == THREADS - 1)
        shared.first_item[THREADS] = total;
    __syncthreads();
    return total;
}

static __device__ mil_attention_item find_item(const plan_params &p, const plan_shared &shared,
                                               int32_t i, int32_t *item_class)
{
    int32_t low = 0, high = THREADS; /* first_item[low] <= i < first_item[high] */
    while (high - low > 1) {
        const int32_t middle = (low + high) / 2;
        if (shared.first_item[middle] <= i)
            low = middle;
        else
            high = middle;
    }
    const plan_sequence &sequence = shared.sequences[low];
    const mil_attention_item item = item_of(p, sequence, i - shared.first_item[low]);
    *item_class = class_of(item, is_apart(p, sequence));
    return item;
}

static __global__ void __launch_bounds__(THREADS) plan_kernel(const __grid_constant__ plan_params p)
{
    __shared__ __align__(16) plan_shared shared;
    const int32_t t = threadIdx.x;
    mil_wait_for_previous();
    mil_let_next_start();
    const int32_t n_seqs = clamp(p.counts->n_seqs, 0, p.bucket_seqs);
    for (int32_t i = t; i < p.places.n_counters; i += THREADS)
        p.places.counters[i] = 0;
    if (t < 2 * N_CLASSES)
        shared.classes[t] = 0;
    __syncthreads();

    int32_t n_items = 0, n_partials = 0;
    for (int32_t first = 0; first < n_seqs; first += THREADS) {
        const int32_t n = load_group(p, shared, first, n_seqs, &n_partials);
        for (int32_t i = t; i < n; i += THREADS) {
            int32_t item_class;
            (void)find_item(p, shared, i, &item_class);
            atomicAdd(&shared.classes[item_class], 1);
        }
        n_items += n;
        __syncthreads();
    }

    int32_t longer = 0;
    for (int32_t c = t + 1; c < 2 * N_CLASSES; c++)
        longer += shared.classes[c];
    __syncthreads();
    if (t < 2 * N_CLASSES)
        shared.classes[t] = longer;
    if (t == N_CLASSES - 1)
        p.places.list->n_chunk_items = min(longer, p.places.max_items);
    __syncthreads();

    n_partials = 0;
    for (int32_t first = 0; first < n_seqs; first += THREADS) {
        const int32_t n = load_group(p, shared, first, n_seqs, &n_partials);
        for (int32_t i = t; i < n; i += THREADS) {
            int32_t item_class;
            const mil_attention_item item = find_item(p, shared, i, &item_class);
            const int32_t at = atomicAdd(&shared.classes[item_class], 1);
            if (at < p.places.max_items)
                p.places.items[at] = item;
        }
        __syncthreads();
    }
    if (t == 0)
        p.places.list->n_items = min(n_items, p.places.max_items);
}

/* Keys that a row of the page table can hold. Sizes follow from it, and not from the positions that
 * a model allows, so that the plan can hold them against it. */
static int32_t table_keys(int32_t max_pages, int32_t page_size)
{
    const int64_t n = (int64_t)max_pages * page_size;
    return n > INT32_MAX / 2 ? INT32_MAX / 2 : (int32_t)n;
}

/* Splits of a row of so many keys, at most. */
static int64_t most_splits(int32_t n_keys, int32_t max_splits)
{
    const int64_t n = ((int64_t)n_keys + MIL_ATTENTION_MIN_SPLIT - 1) / MIL_ATTENTION_MIN_SPLIT;
    return n < max_splits ? n : max_splits;
}

/* For any number of kv heads up to that of maxima: sizes grow with each of them. */
extern "C" size_t mil_cuda_attention_step_bytes(const mil_maxima *maxima)
{
    const size_t n_seqs = (size_t)maxima->max_seqs, n_heads = (size_t)maxima->n_heads;
    const int32_t n_keys = table_keys(maxima->max_pages_per_seq, maxima->page_size);
    const int64_t n_items = mil_attention_most_items(
        maxima->max_seqs, maxima->max_tokens, maxima->n_heads,
        mil_attention_tiles(maxima->n_heads, 1), most_splits(n_keys, mil_attention_max_splits(1)));
    /* Tiles of a group times kv heads: never more than heads. */
    return mil_round_up(MIL_ATTENTION_HEADER_BYTES + 256 + n_seqs * n_heads * sizeof(int32_t) +
                            (size_t)n_items * sizeof(mil_attention_item),
                        256);
}

extern "C" size_t mil_cuda_attention_workspace(const mil_maxima *maxima)
{
    const int32_t n_keys = table_keys(maxima->max_pages_per_seq, maxima->page_size);
    const int64_t n_splits = most_splits(n_keys, mil_attention_max_splits(maxima->n_kv_heads));
    if (n_splits <= 1)
        return 256;
    return mil_round_up((size_t)(maxima->max_seqs * n_splits) *
                                mil_attention_partial_bytes(maxima->n_heads, maxima->head_dim) +
                            256,
                        256);
}

/* Room for the longest rows that the bucket allows: a row that found none could not be cut as its
 * length asks, and its bits would depend on its batch mates. */
static mil_status check_room(const mil_context *context, const mil_begin_args *args,
                             const plan_params &p)
{
    const int32_t head_dim = args->kv->head_dim;
    const int64_t n_splits = most_splits(p.max_keys, p.max_splits);
    const int64_t n_items =
        mil_attention_most_items(p.bucket_seqs, p.bucket_tokens, p.group, p.n_tiles, n_splits);
    const int64_t n_places = n_splits > 1 ? p.bucket_seqs * n_splits : 0;
    const int64_t n_found = mil_attention_partials_in(context->workspace, context->workspace_bytes,
                                                      args->n_heads, head_dim)
                                .n_places;
    if (p.places.max_items < n_items)
        return mil_fail(MIL_ERR_INTERNAL,
                        "attention: found room for %d items of work in %zu bytes of step data, "
                        "expected %lld",
                        p.places.max_items, context->step_bytes, (long long)n_items);
    if (n_found < n_places)
        return mil_fail(MIL_ERR_INTERNAL,
                        "attention: found room for %lld partial results in %zu bytes of workspace, "
                        "expected %lld",
                        (long long)n_found, context->workspace_bytes, (long long)n_places);
    return MIL_OK;
}

extern "C" mil_status mil_cuda_attention_plan(mil_context *context, const mil_begin_args *args)
{
    const mil_plan_header *header = args->batch->header;
    const mil_kv *kv = args->kv;
    plan_params p = {};
    p.counts = args->batch->counts;
    p.query_indptr = args->batch->query_indptr;
    p.kv_lengths = args->batch->kv_lengths;
    p.seq_slot = args->batch->seq_slot;
    p.places = mil_attention_place(context->step_data, context->step_bytes, header->bucket_seqs,
                                   args->n_heads, kv->n_kv_heads);
    p.bucket_seqs = header->bucket_seqs;
    p.bucket_tokens = header->bucket_tokens;
    p.group = args->n_heads / kv->n_kv_heads;
    p.n_tiles = mil_attention_tiles(args->n_heads, kv->n_kv_heads);
    p.are_chunks_apart = mil_attention_is_sm90(context->queue, kv);
    p.tile_rows =
        p.are_chunks_apart ? MIL_ATTENTION_SM90_ROWS : mil_attention_tile_rows(kv->head_dim);
    p.max_splits = mil_attention_max_splits(kv->n_kv_heads);
    p.max_keys = table_keys(args->slots->max_pages, kv->page_size);
    p.n_slots = args->slots->n_slots;
    MIL_TRY(check_room(context, args, p));
    return mil_launch(context->queue, "attention plan", plan_kernel, dim3(1), dim3(THREADS), 0, p);
}
