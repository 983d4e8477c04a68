/* begin: a step's plan from pinned host memory to where its batch lies, its commands applied, its
 * token ids gathered, and harmless values in the padding of its buckets.
 *
 * Two kernels, launched outside graphs with this step's pointers and counts. The first reads the
 * host's plan in place (before it waits for the kernel before it: bytes that no kernel writes) and
 * writes the batch's arrays, padding included; it points adapter slots at their descriptors, and
 * claims the slots and page-table entries that commands name. The second lets the claim's winner
 * write, and gathers tokens.
 *
 * Array order without an order among threads: an entry that several commands name is claimed by
 * atomicMin with a number that falls with the command's index, so the last one holds it whichever
 * thread came first. Integers only, nothing is summed. No driver of ours writes an entry twice in a
 * plan (scheduler.c grants a request once, stepper.c refuses a sequence named twice); this keeps a
 * plan's meaning from resting on that.
 *
 * Bound by latency: a few KB over PCIe for a decode step, some 100 KB for 8192 tokens. */
#include "kernels/cuda.h"

#include "kernels/common.cuh"

#define TILE 192 /* 16-byte words of one block: a whole number of slot_sets and of page_sets */
#define WORD 4   /* int32 of one 16-byte word */
#define TILE_VALUES (TILE * WORD)
#define THREADS 256 /* of the second kernel; its work is a few loads each */

#define SLOT_SET_VALUES 8
#define PAGE_SET_VALUES 3

static_assert(sizeof(mil_slot_set) == SLOT_SET_VALUES * sizeof(int32_t), "as it is cut here");
static_assert(sizeof(mil_page_set) == PAGE_SET_VALUES * sizeof(int32_t), "as it is cut here");
static_assert(TILE_VALUES % SLOT_SET_VALUES == 0 && TILE_VALUES % PAGE_SET_VALUES == 0,
              "no command lies across two blocks");
static_assert(sizeof(mil_lora_module) % sizeof(uint64_t) == 0, "copied by 8 bytes");
static_assert(sizeof(mil_plan_header) % sizeof(int32_t) == 0, "copied as int32");

/* Arrays of a plan, each 64-byte aligned and as long as a multiple of that. */
enum {
    PIECE_HEADER = 0,
    PIECE_ADAPTER_SETS,
    PIECE_SLOT_SETS,
    PIECE_PAGE_SETS,
    PIECE_SEQ_SLOT,
    PIECE_QUERY_INDPTR,
    PIECE_KV_LENGTHS,
    PIECE_TOKENS,
    PIECE_POSITIONS,
    PIECE_LOGIT_ROWS,
    PIECE_LOGIT_SLOTS,
    PIECE_LOGIT_FEEDS,
    PIECE_LOGIT_POSITIONS,
    PIECE_SEGMENT_INDPTR,
    PIECE_SEGMENT_ADAPTER,
    PIECE_LORA_ROWS,
    N_PIECES
};

/* to[i] = i < n_values ? from[i] : fill, for i < n_total */
typedef struct piece {
    const int32_t *from; /* host */
    int32_t *to;         /* device */
    int32_t n_values;
    int32_t n_total;
    int32_t fill;
    int32_t first_tile; /* the block that copies its first TILE_VALUES */
} piece;

typedef struct begin_job {
    piece pieces[N_PIECES];
    int32_t n_tiles;
    int32_t n_adapter_sets, n_slot_sets, n_page_sets;
    int32_t n_decode, n_tokens, bucket_tokens;
    const mil_adapter_set *adapter_sets;    /* [n_adapter_sets], host */
    const mil_lora_module *const *adapters; /* [n_adapter_sets], host */
    mil_lora_module *modules;               /* [n_adapter_slots][n_modules] */
    int32_t n_adapter_slots, n_modules;
    mil_slots slots;
    int32_t *tokens; /* [bucket_tokens] */
} begin_job;

/* ---- device ---- */

/* What stands in an entry between the two kernels: below any page, token or MIL_TOKEN_NUMERICS. */
static __device__ __forceinline__ int32_t claim_of(int32_t command)
{
    return -2 - command;
}

static __device__ __forceinline__ bool is_claim(int32_t value)
{
    return value < -1;
}

static __device__ __forceinline__ bool is_in(int32_t value, int32_t n)
{
    return (uint32_t)value < (uint32_t)n;
}

/* Whoever reads an entry clamps it to the pages there are; here it must only not pass for a claim.
 */
static __device__ __forceinline__ bool is_page_set(const begin_job &job, int32_t slot,
                                                   int32_t index, int32_t page)
{
    return is_in(slot, job.slots.n_slots) && is_in(index, job.slots.max_pages) && page >= 0;
}

static __device__ __forceinline__ int32_t *page_entry(const begin_job &job, int32_t slot,
                                                      int32_t index)
{
    return job.slots.page_table + (int64_t)slot * job.slots.max_pages + index;
}

/* The commands of one tile, which starts with command `first`. */
static __device__ void claim_slots(const begin_job &job, const int32_t *tile, int32_t first)
{
    int32_t i = threadIdx.x;
    if (i >= TILE_VALUES / SLOT_SET_VALUES || first + i >= job.n_slot_sets)
        return;
    int32_t slot = tile[i * SLOT_SET_VALUES];
    if (is_in(slot, job.slots.n_slots))
        atomicMin(&job.slots.last_token[slot], claim_of(first + i));
}

static __device__ void claim_pages(const begin_job &job, const int32_t *tile, int32_t first)
{
    for (int32_t i = threadIdx.x; i < TILE_VALUES / PAGE_SET_VALUES; i += TILE) {
        const int32_t *set = tile + i * PAGE_SET_VALUES;
        if (first + i < job.n_page_sets && is_page_set(job, set[0], set[1], set[2]))
            atomicMin(page_entry(job, set[0], set[1]), claim_of(first + i));
    }
}

static __device__ void copy_tile(const begin_job &job, int32_t block)
{
    __shared__ uint4 tile[TILE];
    int32_t p = 0;
    while (p + 1 < N_PIECES && block >= job.pieces[p + 1].first_tile)
        p++;
    const piece at = job.pieces[p];
    int32_t tile_index = block - at.first_tile;
    int32_t word = tile_index * TILE + (int32_t)threadIdx.x;
    int32_t value = word * WORD;

    uint4 v = make_uint4(0, 0, 0, 0);
    if (value < at.n_values)
        v = __ldcv((const uint4 *)at.from + word);
    uint32_t fill = (uint32_t)at.fill;
    v.x = value < at.n_values ? v.x : fill;
    v.y = value + 1 < at.n_values ? v.y : fill;
    v.z = value + 2 < at.n_values ? v.z : fill;
    v.w = value + 3 < at.n_values ? v.w : fill;

    mil_wait_for_previous();
    if (value < at.n_total)
        ((uint4 *)at.to)[word] = v;
    if (p != PIECE_SLOT_SETS && p != PIECE_PAGE_SETS)
        return;
    tile[threadIdx.x] = v;
    __syncthreads();
    if (p == PIECE_SLOT_SETS)
        claim_slots(job, (const int32_t *)tile, tile_index * (TILE_VALUES / SLOT_SET_VALUES));
    else
        claim_pages(job, (const int32_t *)tile, tile_index * (TILE_VALUES / PAGE_SET_VALUES));
}

/* Adapter set i, unless a later one names its slot. */
static __device__ void set_adapter(const begin_job &job, int32_t i)
{
    int32_t slot = __ldcv(&job.adapter_sets[i].adapter_slot);
    const uint64_t *from = (const uint64_t *)__ldcv((const unsigned long long *)&job.adapters[i]);
    bool is_stale = !is_in(slot, job.n_adapter_slots);
    for (int32_t j = i + 1 + threadIdx.x; j < job.n_adapter_sets; j += TILE)
        is_stale |= __ldcv(&job.adapter_sets[j].adapter_slot) == slot;

    mil_wait_for_previous();
    if (__syncthreads_or(is_stale))
        return;
    uint64_t *to = (uint64_t *)(job.modules + (int64_t)slot * job.n_modules);
    int32_t n_words = job.n_modules * (int32_t)(sizeof(mil_lora_module) / sizeof(uint64_t));
    for (int32_t w = threadIdx.x; w < n_words; w += TILE)
        to[w] = from != nullptr ? from[w] : 0;
}

static __global__ void __launch_bounds__(TILE) copy_kernel(const __grid_constant__ begin_job job)
{
    mil_let_next_start();
    int32_t block = (int32_t)blockIdx.x;
    if (block < job.n_tiles)
        copy_tile(job, block);
    else
        set_adapter(job, block - job.n_tiles);
}

static __device__ void set_slot(const begin_job &job, int32_t i)
{
    const mil_slot_set *set = (const mil_slot_set *)job.pieces[PIECE_SLOT_SETS].to + i;
    int32_t slot = set->slot;
    if (!is_in(slot, job.slots.n_slots) || job.slots.last_token[slot] != claim_of(i))
        return;
    job.slots.adapter_slot[slot] = set->adapter_slot;
    job.slots.sampling[slot] = set->sampling;
    job.slots.last_token[slot] = 0;
}

static __device__ void set_page(const begin_job &job, int32_t i)
{
    const mil_page_set *set = (const mil_page_set *)job.pieces[PIECE_PAGE_SETS].to + i;
    int32_t slot = set->slot, index = set->index, page = set->page;
    if (!is_page_set(job, slot, index, page))
        return;
    int32_t *entry = page_entry(job, slot, index);
    if (*entry == claim_of(i))
        *entry = page;
}

/* Decode rows come first, one token each: row t is sequence t's. A slot that begins here counts as
 * set whether its claim still stands or not: both read as token 0. */
static __device__ int32_t token_of(const begin_job &job, int32_t t)
{
    if (t >= job.n_tokens)
        return 0;
    if (t >= job.n_decode)
        return job.pieces[PIECE_TOKENS].to[t];
    int32_t slot = job.pieces[PIECE_SEQ_SLOT].to[t];
    if (!is_in(slot, job.slots.n_slots))
        return 0;
    int32_t token = *(volatile int32_t *)&job.slots.last_token[slot];
    return is_claim(token) ? 0 : token;
}

static __global__ void __launch_bounds__(THREADS)
    apply_kernel(const __grid_constant__ begin_job job)
{
    mil_let_next_start();
    mil_wait_for_previous();
    int32_t i = (int32_t)(blockIdx.x * THREADS + threadIdx.x);
    if (i < job.n_slot_sets)
        set_slot(job, i);
    if (i < job.n_page_sets)
        set_page(job, i);
    if (i < job.bucket_tokens)
        job.tokens[i] = token_of(job, i);
}

/* ---- launch ---- */

static void put(begin_job *job, int32_t at, const void *from, const void *to, int32_t n_values,
                int32_t n_total, int32_t fill)
{
    n_total = n_total > n_values ? n_total : n_values;
    job->pieces[at] =
        piece{(const int32_t *)from, (int32_t *)to, n_values, n_total, fill, job->n_tiles};
    job->n_tiles += (n_total + TILE_VALUES - 1) / TILE_VALUES;
}

/* Where each used array lies and goes. Called in the order of the pieces: first_tile ascends. */
static void put_pieces(begin_job *job, const mil_batch *from, const mil_batch *to)
{
    const mil_plan_header *n = from->header;
    int32_t rows = n->bucket_logit_rows;
    /* As many as are read at once (lora.cuh), not the bucket: that is every slot there is. */
    int32_t segments =
        min(mil_ceil_div(max(n->n_segments, 1), MIL_WARP) * MIL_WARP, n->bucket_segments);
    put(job, PIECE_HEADER, n, to->counts, sizeof *n / sizeof(int32_t), 0, 0);
    put(job, PIECE_ADAPTER_SETS, from->adapter_sets, to->adapter_sets, 2 * n->n_adapter_sets, 0, 0);
    put(job, PIECE_SLOT_SETS, from->slot_sets, to->slot_sets, SLOT_SET_VALUES * n->n_slot_sets, 0,
        0);
    put(job, PIECE_PAGE_SETS, from->page_sets, to->page_sets, PAGE_SET_VALUES * n->n_page_sets, 0,
        0);
    put(job, PIECE_SEQ_SLOT, from->seq_slot, to->seq_slot, n->n_seqs, n->bucket_seqs, 0);
    put(job, PIECE_QUERY_INDPTR, from->query_indptr, to->query_indptr, n->n_seqs + 1,
        n->bucket_seqs + 1, n->n_tokens);
    put(job, PIECE_KV_LENGTHS, from->kv_lengths, to->kv_lengths, n->n_seqs, n->bucket_seqs, 0);
    put(job, PIECE_TOKENS, from->tokens, to->tokens, n->n_tokens, n->bucket_tokens, 0);
    put(job, PIECE_POSITIONS, from->positions, to->positions, n->n_tokens, n->bucket_tokens, 0);
    put(job, PIECE_LOGIT_ROWS, from->logit_rows, to->logit_rows, n->n_logit_rows, rows, 0);
    put(job, PIECE_LOGIT_SLOTS, from->logit_slots, to->logit_slots, n->n_logit_rows, rows, 0);
    put(job, PIECE_LOGIT_FEEDS, from->logit_feeds, to->logit_feeds, n->n_logit_rows, rows, 0);
    put(job, PIECE_LOGIT_POSITIONS, from->logit_positions, to->logit_positions, n->n_logit_rows,
        rows, 0);
    put(job, PIECE_SEGMENT_INDPTR, from->segment_indptr, to->segment_indptr, n->n_segments + 1,
        segments + 1, n->n_lora_rows);
    put(job, PIECE_SEGMENT_ADAPTER, from->segment_adapter, to->segment_adapter, n->n_segments,
        segments, 0);
    put(job, PIECE_LORA_ROWS, from->lora_rows, to->lora_rows, n->n_lora_rows, 0, 0);
}

static begin_job job_of(const mil_begin_args *args)
{
    mil_batch from;
    mil_plan_view((mil_plan *)args->plan, &from);
    const mil_plan_header *n = from.header;
    begin_job job = {};
    put_pieces(&job, &from, args->batch);
    job.n_adapter_sets = n->n_adapter_sets;
    job.n_slot_sets = n->n_slot_sets;
    job.n_page_sets = n->n_page_sets;
    job.n_decode = n->n_decode;
    job.n_tokens = n->n_tokens;
    job.bucket_tokens = n->bucket_tokens;
    job.adapter_sets = from.adapter_sets;
    job.adapters = args->adapters;
    job.modules = args->lora->modules;
    job.n_adapter_slots = args->lora->n_slots;
    job.n_modules = args->lora->n_layers * MIL_N_PROJECTIONS;
    job.slots = *args->slots;
    job.tokens = args->tokens;
    return job;
}

extern "C" mil_status mil_cuda_begin(mil_context *context, const mil_begin_args *args)
{
    const begin_job job = job_of(args);
    MIL_TRY(mil_launch(context->queue, "begin: copy", copy_kernel,
                       dim3(job.n_tiles + job.n_adapter_sets), dim3(TILE), 0, job));
    int32_t n = max(max(job.n_slot_sets, job.n_page_sets), max(job.bucket_tokens, 1));
    MIL_TRY(mil_launch(context->queue, "begin: apply", apply_kernel, dim3((n - 1) / THREADS + 1),
                       dim3(THREADS), 0, job));
    return mil_cuda_attention_plan(context, args);
}
