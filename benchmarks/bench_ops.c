/* Ops of the CUDA backend on Llama-3-8B's shapes, one at a time: a line asks, a line of JSON
 * answers; the figures are bench_ops.py's. The first failure ends it, with the message.
 *
 *   bench_ops [FOLDER-OF-NVIDIA-LIBRARIES ...]
 *   read                                     one pass over 2 GiB
 *   embed T | norm T | act T
 *   rope SEQS QUERY KEYS                     QUERY tokens of each sequence, KEYS of it with them
 *   attention SEQS QUERY KEYS HEAD-DIM
 *   begin SEQS QUERY KEYS                    a step's start: its plan, and attention's
 *   product N K M IS-F32 IS-DETERMINISTIC
 *   shrink ROWS ADAPTERS LINEAR              rank 16; 0 qkv, 1 o, 2 gate_up, 3 down
 *   expand ROWS ADAPTERS LINEAR
 *   joined ROWS ADAPTERS LINEAR              the product, shrink beside it, expand
 *   sample ROWS KIND N-LOGPROBS              0 greedy, 1 top-p 0.9, 2 top-k 50, 3 top-p 0.9, T 0.25
 *
 * The answer: us of one call, the median of the replays, by driver_cuda.h's method. */
#include "driver_cuda.h"
#include "read_roof.h"

#include "ops/find.h"
#include "ops/plan.h"

#include <string.h>

#define HIDDEN 4096
#define FFN 14336
#define VOCAB 128256
#define N_HEADS 32
#define N_KV_HEADS 8
#define PAGE_SIZE 64
#define MAX_TOKENS 8192
#define MAX_SEQS 128
#define MAX_KEYS 8192
#define RANK 16
#define N_ADAPTER_SLOTS 64
#define INTERLEAVE 8

/* A step's plan where ops read it, with slots and KV. */
typedef struct step {
    mil_batch host;  /* for filling it */
    mil_batch batch; /* for ops */
    mil_slots slots;
    mil_kv kv;
    mil_lora_table lora;
    int32_t *tokens;
    int32_t n_layers; /* of kv */
} step;

static const mil_plan_limits limits = {.max_seqs = MAX_SEQS,
                                       .max_tokens = MAX_TOKENS,
                                       .max_logit_rows = MAX_SEQS,
                                       .max_pages_per_seq = MAX_KEYS / PAGE_SIZE,
                                       .max_page_sets = 1,
                                       .max_adapter_slots = N_ADAPTER_SLOTS};

/* ---- a step ---- */

/* n_seqs sequences of keys tokens each, the last `query` of them in this batch. Pages lie shuffled,
 * layers of KV are in rotation. begin_step follows, after the rest of the plan is filled. */
static void make_step(machine *all, step *s, int32_t n_seqs, int32_t query, int32_t keys, int32_t D)
{
    int32_t max_pages = (keys + PAGE_SIZE - 1) / PAGE_SIZE, n_pages = max_pages * n_seqs;
    int32_t *table = malloc((size_t)n_pages * sizeof *table);
    size_t plan_bytes = mil_plan_bytes(&limits);
    require(table != NULL && n_seqs <= MAX_SEQS && n_seqs * query <= MAX_TOKENS, "sizes");
    for (int32_t i = 0; i < n_pages; i++)
        table[i] = (int32_t)((int64_t)i * 7919 % n_pages);
    require(all->device->alloc_host(all->context.queue, &all->plan, plan_bytes, "plan") == MIL_OK,
            "plan");
    mil_plan_reset(all->plan.data, &limits, 1);
    mil_plan_view(all->plan.data, &s->host);
    mil_plan_view_at(all->plan.data, take_zeroed(all, plan_bytes), &s->batch);
    mil_plan_header *header = s->host.header;
    header->n_seqs = header->bucket_seqs = n_seqs;
    header->n_decode = query == 1 ? n_seqs : 0;
    header->n_tokens = header->bucket_tokens = n_seqs * query;
    header->bucket_chunks = query == 1 ? 0 : n_seqs;
    header->bucket_logit_rows = header->bucket_segments = 0;
    for (int32_t i = 0; i < n_seqs; i++) {
        s->host.seq_slot[i] = i;
        s->host.query_indptr[i + 1] = (i + 1) * query;
        s->host.kv_lengths[i] = keys;
        for (int32_t j = 0; j < query; j++)
            s->host.positions[i * query + j] = keys - query + j;
    }
    for (int32_t i = 0; i < n_seqs * query; i++)
        s->host.tokens[i] = (int32_t)(mil_mix64((uint64_t)i) % VOCAB);
    s->slots = (mil_slots){
        .n_slots = MAX_SEQS,
        .max_pages = max_pages,
        .last_token = take_zeroed(all, MAX_SEQS * sizeof(int32_t)),
        .adapter_slot = take_zeroed(all, MAX_SEQS * sizeof(int32_t)),
        .sampling = take_zeroed(all, MAX_SEQS * sizeof(mil_sampling)),
        .page_table = take_zeroed(all, (size_t)MAX_SEQS * (size_t)max_pages * sizeof *table)};
    require(all->device->copy_in(all->context.queue, s->slots.page_table, table,
                                 (size_t)n_pages * sizeof *table) == MIL_OK,
            "page table");
    free(table);
    s->kv = (mil_kv){.k = (uint16_t *)all->pool,
                     .v = (uint16_t *)(all->pool + POOL_BYTES / 2),
                     .layer_elements = (int64_t)n_pages * N_KV_HEADS * PAGE_SIZE * D,
                     .n_pages = n_pages,
                     .page_size = PAGE_SIZE,
                     .n_kv_heads = N_KV_HEADS,
                     .head_dim = D,
                     .dtype = MIL_DTYPE_BF16};
    s->n_layers = sets_of(2 * (size_t)s->kv.layer_elements * sizeof(uint16_t));
    s->lora = (mil_lora_table){0};
    s->tokens = take_zeroed(all, MAX_TOKENS * sizeof(int32_t));
}

static mil_begin_args begin_args(machine *all, step *s)
{
    return (mil_begin_args){.plan = all->plan.data,
                            .batch = &s->batch,
                            .slots = &s->slots,
                            .lora = &s->lora,
                            .kv = &s->kv,
                            .tokens = s->tokens,
                            .n_heads = N_HEADS};
}

static void begin_step(machine *all, step *s)
{
    mil_begin_args args = begin_args(all, s);
    require(all->context.backend->begin(&all->context, &args) == MIL_OK, "begin");
    require(all->device->synchronize(all->context.queue) == MIL_OK, "begin");
}

/* ---- rows ---- */

/* n: the numbers of the line. */
typedef timing (*row_fn)(machine *all, const int32_t *n);

#define READ_BYTES ((size_t)2 << 30)

static mil_status call_read(machine *all, void *sink, int32_t set)
{
    (void)set;
    return mil_cuda_status(bench_read(all->context.queue->stream, all->pool, READ_BYTES, sink,
                                      all->context.queue->n_sms),
                           "read");
}

static timing row_read(machine *all, const int32_t *n)
{
    (void)n;
    return measure(all, call_read, take_zeroed(all, sizeof(unsigned)), 1);
}

typedef struct embed_job {
    mil_embed_args args;
    const int32_t *tokens;
} embed_job;

static mil_status call_embed(machine *all, void *args, int32_t set)
{
    embed_job *job = args;
    job->args.tokens = job->tokens + (int64_t)set * job->args.n_tokens;
    return all->context.backend->embed(&all->context, &job->args);
}

static timing row_embed(machine *all, const int32_t *n)
{
    /* Lists of tokens in rotation, and so the rows of the weight. */
    int32_t n_sets = sets_of((size_t)n[0] * HIDDEN * sizeof(uint16_t));
    size_t n_tokens = (size_t)n[0] * (size_t)n_sets;
    int32_t *tokens = malloc(n_tokens * sizeof *tokens);
    require(tokens != NULL, "memory");
    for (size_t i = 0; i < n_tokens; i++)
        tokens[i] = (int32_t)(mil_mix64(i) % VOCAB);
    mil_weight weight = {.format = MIL_WEIGHT_BF16_ROWS,
                         .N = VOCAB,
                         .K = HIDDEN,
                         .n_parts = 1,
                         .part_rows = {VOCAB},
                         .data = all->pool};
    embed_job job = {.args = {.out = take_zeroed(all, (size_t)n[0] * HIDDEN * sizeof(float)),
                              .weight = &weight,
                              .n_tokens = n[0],
                              .scale = 1.0f},
                     .tokens = take_copy(all, tokens, n_tokens * sizeof *tokens)};
    free(tokens);
    return measure(all, call_embed, &job, n_sets);
}

static mil_status call_norm(machine *all, void *args, int32_t set)
{
    (void)set;
    return all->context.backend->norm(&all->context, args);
}

static timing row_norm(machine *all, const int32_t *n)
{
    size_t items = (size_t)n[0] * HIDDEN;
    mil_norm_args args = {.out = take_zeroed(all, items * sizeof(uint16_t)),
                          .x = take_random(all, items * sizeof(float)),
                          .residual = take_random(all, items * sizeof(uint16_t)),
                          .weight = take_random(all, HIDDEN * sizeof(float)),
                          .n_rows = n[0],
                          .hidden = HIDDEN,
                          .eps = 1e-5f};
    return measure(all, call_norm, &args, 1);
}

static mil_status call_act(machine *all, void *args, int32_t set)
{
    (void)set;
    return all->context.backend->act(&all->context, args);
}

static timing row_act(machine *all, const int32_t *n)
{
    size_t items = (size_t)n[0] * FFN;
    mil_act_args args = {.out = take_zeroed(all, items * sizeof(uint16_t)),
                         .gate_up = take_random(all, 2 * items * sizeof(uint16_t)),
                         .n_tokens = n[0],
                         .ffn = FFN,
                         .interleave = INTERLEAVE,
                         .kind = MIL_ACTIVATION_SILU};
    return measure(all, call_act, &args, 1);
}

static mil_status call_rope(machine *all, void *args, int32_t set)
{
    ((mil_rope_write_args *)args)->layer = set;
    return all->context.backend->rope_write(&all->context, args);
}

static timing row_rope(machine *all, const int32_t *n)
{
    const int32_t D = 128;
    size_t table_bytes = (size_t)MAX_KEYS * (size_t)D / 2 * sizeof(float);
    size_t q_bytes = (size_t)n[0] * (size_t)n[1] * N_HEADS * (size_t)D * sizeof(uint16_t);
    step s;
    make_step(all, &s, n[0], n[1], n[2], D);
    begin_step(all, &s);
    mil_rope_write_args args = {
        .q = take_zeroed(all, q_bytes),
        .qkv = take_random(all, q_bytes / N_HEADS * (N_HEADS + 2 * N_KV_HEADS)),
        .cos_table = take_random(all, table_bytes),
        .sin_table = take_random(all, table_bytes),
        .batch = &s.batch,
        .slots = &s.slots,
        .kv = &s.kv,
        .n_heads = N_HEADS,
        .rotary_dim = D};
    return measure(all, call_rope, &args, s.n_layers);
}

static mil_status call_attention(machine *all, void *args, int32_t set)
{
    ((mil_attention_args *)args)->layer = set;
    return all->context.backend->attention(&all->context, args);
}

static timing row_attention(machine *all, const int32_t *n)
{
    const int32_t D = n[3];
    size_t q_bytes = (size_t)n[0] * (size_t)n[1] * N_HEADS * (size_t)D * sizeof(uint16_t);
    step s;
    make_step(all, &s, n[0], n[1], n[2], D);
    begin_step(all, &s);
    mil_attention_args args = {.out = take_zeroed(all, q_bytes),
                               .q = take_random(all, q_bytes),
                               .out_dtype = MIL_DTYPE_BF16,
                               .batch = &s.batch,
                               .slots = &s.slots,
                               .kv = &s.kv,
                               .n_heads = N_HEADS,
                               .scale = D == 64 ? 0.125f : 0.08838835f};
    return measure(all, call_attention, &args, s.n_layers);
}

static mil_status call_begin(machine *all, void *args, int32_t set)
{
    (void)set;
    return all->context.backend->begin(&all->context, args);
}

static timing row_begin(machine *all, const int32_t *n)
{
    step s;
    make_step(all, &s, n[0], n[1], n[2], 128);
    mil_begin_args args = begin_args(all, &s);
    return measure(all, call_begin, &args, 1);
}

typedef struct product_job {
    mil_linear_args args;
    mil_weight weight;
    size_t n_bytes;
} product_job;

static mil_status call_product(machine *all, void *args, int32_t set)
{
    product_job *job = args;
    job->weight.data = all->pool + BEFORE_WEIGHTS + (size_t)set * job->n_bytes;
    return all->context.backend->linear(&all->context, &job->args);
}

static timing row_product(machine *all, const int32_t *n)
{
    const int32_t N = n[0], K = n[1], M = n[2];
    mil_dtype y_dtype = n[3] ? MIL_DTYPE_F32 : MIL_DTYPE_BF16;
    product_job job = {
        .weight = {.format = MIL_WEIGHT_BF16_ROWS, .N = N, .K = K, .n_parts = 1, .part_rows = {N}},
        .n_bytes = all->context.backend->packed_bytes(N, K)};
    require((size_t)M * (size_t)K * sizeof(uint16_t) <= BEFORE_WEIGHTS, "x larger than its place");
    job.args =
        (mil_linear_args){.y = take_zeroed(all, (size_t)M * (size_t)N * mil_dtype_bytes(y_dtype)),
                          .x = (const uint16_t *)all->pool,
                          .weight = &job.weight,
                          .y_dtype = y_dtype,
                          .M = M,
                          .ldy = N,
                          .ldx = K};
    all->context.is_deterministic = n[4] != 0;
    timing got = measure(all, call_product, &job, sets_of(job.n_bytes));
    all->context.is_deterministic = false;
    return got;
}

/* ---- LoRA ---- */

typedef struct linear {
    int32_t n_parts, rows[MIL_MAX_PARTS], K, interleave;
    mil_projection first;
} linear;

static const linear linears[] = {
    {3, {4096, 1024, 1024}, HIDDEN, 0, MIL_PROJECTION_Q},
    {1, {HIDDEN}, 4096, 0, MIL_PROJECTION_O},
    {2, {FFN, FFN}, HIDDEN, INTERLEAVE, MIL_PROJECTION_GATE},
    {1, {HIDDEN}, FFN, 0, MIL_PROJECTION_DOWN},
};

typedef enum lora_op { SHRINK, EXPAND, JOINED } lora_op;

/* Adapters' modules one behind the other in the pool, slots within layers: A's where op reads A,
 * B's where it reads B, so that those bytes are in rotation from layer to layer, with beside_bytes
 * that a layer reads besides. Returns the layers; *n_bytes is what they take of the pool. */
static int32_t make_adapters(machine *all, mil_lora_table *table, const linear *l,
                             int32_t n_adapters, lora_op op, size_t beside_bytes, size_t *n_bytes)
{
    const mil_backend *backend = all->context.backend;
    size_t a_bytes = op != EXPAND ? backend->lora_a_bytes(RANK, l->K) : 0;
    size_t b_bytes[MIL_MAX_PARTS], total = 0, at = 0;
    for (int32_t p = 0; p < l->n_parts; p++) {
        b_bytes[p] = op != SHRINK ? backend->lora_b_bytes(l->rows[p], RANK) : 0;
        total += a_bytes + b_bytes[p];
    }
    int32_t n_layers = sets_of(total * (size_t)n_adapters + beside_bytes);
    size_t n_modules = (size_t)N_ADAPTER_SLOTS * (size_t)n_layers * MIL_N_PROJECTIONS;
    mil_lora_module *modules = calloc(n_modules, sizeof *modules);
    require(modules != NULL, "memory");
    *table = (mil_lora_table){N_ADAPTER_SLOTS, n_layers, modules};
    for (int32_t layer = 0; layer < n_layers; layer++) {
        for (int32_t slot = 0; slot < n_adapters; slot++) {
            for (int32_t p = 0; p < l->n_parts; p++) {
                size_t index = (size_t)(mil_lora_find(table, slot, layer, l->first) - modules);
                modules[index + (size_t)p] = (mil_lora_module){.rank = RANK,
                                                               .padded_rank = RANK,
                                                               .in = l->K,
                                                               .out = l->rows[p],
                                                               .scale = 1.0f,
                                                               .a = all->pool + at,
                                                               .b = all->pool + at + a_bytes};
                at += a_bytes + b_bytes[p];
            }
        }
    }
    require(at <= POOL_BYTES, "adapters larger than the pool");
    *n_bytes = at;
    table->modules = take_copy(all, modules, n_modules * sizeof *modules);
    free(modules);
    return n_layers;
}

static mil_status call_shrink(machine *all, void *args, int32_t set)
{
    ((mil_lora_shrink_args *)args)->lora.layer = set;
    return all->context.backend->lora_shrink(&all->context, args);
}

static mil_status call_expand(machine *all, void *args, int32_t set)
{
    ((mil_lora_expand_args *)args)->lora.layer = set;
    return all->context.backend->lora_expand(&all->context, args);
}

typedef struct joined_job {
    mil_linear_args linear;
    mil_lora_args lora;
    mil_weight weight;
    char *first; /* layer 0's weight, the others behind it */
    size_t n_bytes;
} joined_job;

static mil_status call_joined(machine *all, void *args, int32_t set)
{
    joined_job *job = args;
    job->weight.data = job->first + (size_t)set * job->n_bytes;
    job->lora.layer = set;
    return all->context.backend->linear_lora(&all->context, &job->linear, &job->lora);
}

/* Row i has adapter i % n_adapters, as rows of a batch come. */
static void fill_segments(const mil_batch *host, int32_t n_rows, int32_t n_adapters)
{
    int32_t at = 0;
    for (int32_t g = 0; g < n_adapters; g++) {
        host->segment_adapter[g] = g;
        host->segment_indptr[g] = at;
        for (int32_t row = g; row < n_rows; row += n_adapters)
            host->lora_rows[at++] = row;
    }
    host->segment_indptr[n_adapters] = at;
    host->header->n_lora_rows = at;
    host->header->n_segments = host->header->bucket_segments = n_adapters;
}

static timing row_lora(machine *all, const int32_t *n, lora_op op)
{
    const int32_t n_rows = n[0], n_adapters = n[1];
    require(n[2] >= 0 && n[2] < 4 && n_adapters <= N_ADAPTER_SLOTS, "sizes");
    const linear *l = &linears[n[2]];
    const int32_t v_rank = all->context.backend->lora_v_rank;
    step s;
    make_step(all, &s, n_rows, 1, 1, 128);
    fill_segments(&s.host, n_rows, n_adapters);
    mil_weight weight = {.format = MIL_WEIGHT_BF16_ROWS,
                         .K = l->K,
                         .n_parts = l->n_parts,
                         .interleave = l->interleave};
    for (int32_t p = 0; p < l->n_parts; p++) {
        weight.part_rows[p] = l->rows[p];
        weight.N += l->rows[p];
    }
    size_t adapter_bytes, weight_bytes = all->context.backend->packed_bytes(weight.N, weight.K);
    int32_t n_layers = make_adapters(all, &s.lora, l, n_adapters, op,
                                     op == JOINED ? weight_bytes : 0, &adapter_bytes);
    begin_step(all, &s);
    mil_lora_args lora = {.batch = &s.batch,
                          .table = &s.lora,
                          .n_parts = l->n_parts,
                          .v_stride = (int64_t)l->n_parts * v_rank,
                          .v_part_stride = v_rank};
    for (int32_t p = 0; p < l->n_parts; p++)
        lora.projections[p] = (mil_projection)((int32_t)l->first + p);
    lora.v = take_random(all, (size_t)n_rows * (size_t)lora.v_stride * sizeof(float));
    const uint16_t *x = (const uint16_t *)(all->pool + POOL_BYTES / 2);
    if (op == SHRINK) {
        mil_lora_shrink_args args = {.lora = lora, .x = x, .ldx = l->K};
        return measure(all, call_shrink, &args, n_layers);
    }
    void *y = take_random(all, (size_t)n_rows * (size_t)weight.N * sizeof(uint16_t));
    if (op == EXPAND) {
        mil_lora_expand_args args = {.lora = lora, .y = y, .ldy = weight.N, .weight = &weight};
        return measure(all, call_expand, &args, n_layers);
    }
    require(adapter_bytes + (size_t)n_layers * weight_bytes <= POOL_BYTES, "sets beyond the pool");
    joined_job job = {.lora = lora,
                      .weight = weight,
                      .first = all->pool + adapter_bytes,
                      .n_bytes = weight_bytes};
    job.linear = (mil_linear_args){.y = y,
                                   .x = x,
                                   .weight = &job.weight,
                                   .y_dtype = MIL_DTYPE_BF16,
                                   .M = n_rows,
                                   .ldy = weight.N,
                                   .ldx = l->K};
    return measure(all, call_joined, &job, n_layers);
}

static timing row_shrink(machine *all, const int32_t *n)
{
    return row_lora(all, n, SHRINK);
}

static timing row_expand(machine *all, const int32_t *n)
{
    return row_lora(all, n, EXPAND);
}

static timing row_joined(machine *all, const int32_t *n)
{
    return row_lora(all, n, JOINED);
}

/* ---- sample ---- */

/* About normal, deviation 4: the best 0.9 of the probability are some thousands of ids, at
 * temperature 0.25 some twenty, as they are where a model is sure. */
static float *make_logits(machine *all, size_t n)
{
    float *logits = malloc(n * sizeof *logits);
    require(logits != NULL, "memory");
    for (size_t i = 0; i < n; i++) {
        uint64_t bits = mil_mix64(i);
        uint64_t sum =
            (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
        logits[i] = ((float)sum / 65536.0f - 2.0f) * 6.9282f;
    }
    float *to = take_copy(all, logits, n * sizeof *logits);
    free(logits);
    return to;
}

static mil_status call_sample(machine *all, void *args, int32_t set)
{
    (void)set;
    return all->context.backend->sample(&all->context, args);
}

static timing row_sample(machine *all, const int32_t *n)
{
    static const mil_sampling kinds[] = {
        {.temperature = 0.0f, .top_p = 1.0f},
        {.temperature = 1.0f, .top_p = 0.9f},
        {.temperature = 1.0f, .top_p = 1.0f, .top_k = 50},
        {.temperature = 0.25f, .top_p = 0.9f},
    };
    const int32_t n_rows = n[0];
    require(n[1] >= 0 && n[1] < (int32_t)(sizeof kinds / sizeof *kinds), "a kind of sampling");
    mil_sampling sampling[MAX_SEQS];
    step s;
    make_step(all, &s, n_rows, 1, 1, 128);
    for (int32_t i = 0; i < n_rows; i++) {
        s.host.logit_rows[i] = s.host.logit_slots[i] = i;
        s.host.logit_feeds[i] = s.host.logit_positions[i] = 1;
        sampling[i] = kinds[n[1]];
        sampling[i].n_logprobs = n[2];
        sampling[i].seed = (uint64_t)i;
    }
    s.host.header->n_logit_rows = s.host.header->bucket_logit_rows = n_rows;
    require(all->device->copy_in(all->context.queue, s.slots.sampling, sampling,
                                 (size_t)n_rows * sizeof *sampling) == MIL_OK,
            "copy");
    begin_step(all, &s);
    mil_sample_args args = {.out = take_zeroed(all, (size_t)n_rows * sizeof(mil_sample)),
                            .logits = make_logits(all, (size_t)n_rows * VOCAB),
                            .batch = &s.batch,
                            .slots = &s.slots,
                            .n_rows = n_rows,
                            .vocab = VOCAB,
                            .ld = VOCAB};
    return measure(all, call_sample, &args, 1);
}

/* ---- lines ---- */

static const struct {
    const char *name;
    row_fn run;
    int32_t n_numbers;
} rows[] = {
    {"read", row_read, 0},       {"embed", row_embed, 1},   {"norm", row_norm, 1},
    {"act", row_act, 1},         {"rope", row_rope, 3},     {"attention", row_attention, 4},
    {"product", row_product, 5}, {"shrink", row_shrink, 3}, {"expand", row_expand, 3},
    {"joined", row_joined, 3},   {"begin", row_begin, 3},   {"sample", row_sample, 3},
};

static void answer(machine *all, const char *line)
{
    char name[16] = "";
    int32_t n[5] = {0};
    int n_read = sscanf(line, "%15s %d %d %d %d %d", name, &n[0], &n[1], &n[2], &n[3], &n[4]);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        if (strcmp(rows[i].name, name) != 0 || n_read != rows[i].n_numbers + 1)
            continue;
        timing got = rows[i].run(all, n);
        give_all(all);
        printf(
            "{\"us\": %.4f, \"low_us\": %.4f, \"high_us\": %.4f, \"calls\": %d, \"rounds\": %d}\n",
            got.us, got.low_us, got.high_us, got.n_calls, got.n_rounds);
        fflush(stdout);
        return;
    }
    fprintf(stderr, "benchmark: found \"%s\", expected a line as bench_ops.c lists them\n", line);
    exit(2);
}

int main(int argc, char **argv)
{
    static machine all;
    char line[128];
    const mil_maxima maxima = {.max_tokens = MAX_TOKENS,
                               .max_seqs = MAX_SEQS,
                               .max_logit_rows = MAX_SEQS,
                               .max_position = MAX_KEYS,
                               .hidden = HIDDEN,
                               .ffn = FFN,
                               .vocab = VOCAB,
                               .n_heads = N_HEADS,
                               .n_kv_heads = N_KV_HEADS,
                               .head_dim = 128,
                               .page_size = PAGE_SIZE,
                               .max_pages_per_seq = MAX_KEYS / PAGE_SIZE,
                               .max_adapter_slots = N_ADAPTER_SLOTS,
                               .n_threads = 1};
    for (int i = 1; i < argc; i++)
        mil_backend_add_library_dir(argv[i]);
    open_machine(&all, &maxima);
    printf("{\"device\": \"%s\", \"sms\": %d}\n", all.context.queue->label,
           all.context.queue->n_sms);
    fflush(stdout);
    while (fgets(line, sizeof line, stdin) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        answer(&all, line);
    }
    return 0;
}
