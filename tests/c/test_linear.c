/* Products and LoRA on every instruction set of this machine, against the contract written out as
 * one scalar chain for each output: bit for bit, for every number of rows and threads. */
#include "base/bf16.h"
#include "base/hash.h"
#include "base/memory.h"
#include "base/threads.h"
#include "ops/backend.h"
#include "test.h"

#include <math.h>
#include <stdlib.h>

/* NULL and a message where the environment names no instruction set of this machine. */
static const mil_backend *cpu(void)
{
    const mil_backend *backend = NULL;
    return mil_backend_find(&backend, "cpu") == MIL_OK ? backend : NULL;
}

#define MAX_SETS 4
#define MAX_BACKENDS (2 * MAX_SETS)

/* ---- what runs here ---- */

static void choose(const char *isa)
{
    if (isa == NULL)
        unsetenv("MILPY_CPU_ISA");
    else
        setenv("MILPY_CPU_ISA", isa, 1);
}

/* One context for each instruction set and for one and two threads. */
static int32_t open_contexts(mil_context contexts[MAX_BACKENDS], size_t workspace_bytes)
{
    const char *in_use, *available;
    char names[128], *rest = names;
    int32_t n = 0;
    choose(NULL);
    CHECK(mil_cpu_isa(&in_use, &available) == MIL_OK);
    snprintf(names, sizeof names, "%s", available);
    for (char *name = strtok_r(names, " ", &rest); name; name = strtok_r(NULL, " ", &rest)) {
        choose(name);
        for (int32_t n_threads = 1; n_threads <= 2; n_threads++, n++) {
            contexts[n] = (mil_context){.backend = cpu(),
                                        .workspace = mil_alloc(workspace_bytes, 1),
                                        .workspace_bytes = workspace_bytes};
            CHECK(contexts[n].backend != NULL && contexts[n].workspace != NULL);
            CHECK(mil_pool_create(&contexts[n].pool, n_threads, NULL) == MIL_OK);
        }
    }
    choose(NULL);
    return n;
}

static void close_contexts(mil_context *contexts, int32_t n)
{
    for (int32_t i = 0; i < n; i++) {
        mil_pool_free(contexts[i].pool);
        mil_free(contexts[i].workspace);
    }
}

static void enter(mil_context *context, mil_thread_state *saved)
{
    memset(context->workspace, 0xff, context->workspace_bytes);
    CHECK(mil_pool_enter(context->pool, saved) == MIL_OK);
}

/* ---- data and the contract ---- */

/* Values over many exponents, the smallest of which underflow in a product. */
static void fill(uint16_t *to, int64_t n, uint64_t seed)
{
    for (int64_t i = 0; i < n; i++) {
        uint64_t bits = mil_mix64(seed * 1000003 + (uint64_t)i);
        int exponent = (bits & 0xff) < 4 ? -70 : (int)(bits >> 8 & 7) - 4;
        to[i] = mil_bf16_from_float(ldexpf((float)(bits >> 40) / 8388608.0f - 1.0f, exponent));
    }
}

static float chain(const uint16_t *x, const uint16_t *w, int32_t K)
{
    volatile float sum = 0.0f; /* in memory, so that each step is rounded and flushed */
    for (int32_t k = 0; k < K + K % 2; k += 2) {
        float odd = k + 1 < K ? mil_bf16_to_float(x[k + 1]) : 0.0f;
        float odd_w = k + 1 < K ? mil_bf16_to_float(w[k + 1]) : 0.0f;
        sum = fmaf(odd, odd_w, sum);
        sum = fmaf(mil_bf16_to_float(x[k]), mil_bf16_to_float(w[k]), sum);
    }
    return sum;
}

typedef struct problem {
    int32_t M, N, K;
    uint16_t *x, *w; /* [M, K], [N, K] */
    float *bias;     /* [N] or NULL */
    float *want, *got;
    mil_weight weight;
} problem;

static problem make_problem(int32_t M, int32_t N, int32_t K, bool has_bias)
{
    problem p = {.M = M, .N = N, .K = K};
    p.x = mil_alloc((size_t)M * (size_t)K, sizeof *p.x);
    p.w = mil_alloc((size_t)N * (size_t)K, sizeof *p.w);
    p.want = mil_alloc((size_t)M * (size_t)N, sizeof *p.want);
    p.got = mil_alloc((size_t)M * (size_t)N + 1, sizeof *p.got);
    p.bias = has_bias ? mil_alloc((size_t)N, sizeof *p.bias) : NULL;
    fill(p.x, (int64_t)M * K, 1);
    fill(p.w, (int64_t)N * K, 2);
    for (int32_t n = 0; has_bias && n < N; n++)
        p.bias[n] = mil_bf16_to_float(p.w[n]) + 0.3f;
    const mil_backend *backend = cpu();
    p.weight = (mil_weight){.format = MIL_WEIGHT_BF16_PANELS,
                            .N = N,
                            .K = K,
                            .n_parts = 1,
                            .part_rows = {N},
                            .data = mil_alloc(backend->packed_bytes(N, K), 1),
                            .bias = p.bias};
    CHECK_INT(backend->pack(NULL, &p.weight, 0, 0, N, p.w, MIL_DTYPE_BF16, K), MIL_OK);
    return p;
}

static void free_problem(problem *p)
{
    mil_free(p->x);
    mil_free(p->w);
    mil_free(p->want);
    mil_free(p->got);
    mil_free(p->bias);
    mil_free(p->weight.data);
}

/* The pool of any context sets the denormal modes that the contract's chain is computed under. */
static void compute_want(problem *p, mil_context *context)
{
    mil_thread_state saved;
    enter(context, &saved);
    for (int32_t m = 0; m < p->M; m++) {
        for (int32_t n = 0; n < p->N; n++)
            p->want[m * p->N + n] =
                chain(p->x + (int64_t)m * p->K, p->w + (int64_t)n * p->K, p->K) +
                (p->bias == NULL ? 0.0f : p->bias[n]);
    }
    mil_pool_leave(context->pool, &saved);
}

static bool is_same(const float *a, const float *b, int64_t n)
{
    return memcmp(a, b, (size_t)n * sizeof *a) == 0;
}

/* ---- products ---- */

static bool product_is_right(problem *p, mil_context *context, int32_t M)
{
    int64_t n = (int64_t)M * p->N;
    mil_linear_args args = {
        .y = p->got, .x = p->x, .weight = &p->weight, .M = M, .ldy = p->N, .ldx = p->K};
    mil_thread_state saved;
    memset(p->got, 0xff, (size_t)(n + 1) * sizeof *p->got);
    uint32_t guard = 0x7fc12345u, after;
    memcpy(p->got + n, &guard, sizeof guard);
    enter(context, &saved);
    mil_status status = context->backend->linear(context, &args);
    mil_pool_leave(context->pool, &saved);
    memcpy(&after, p->got + n, sizeof after);
    return status == MIL_OK && after == guard && is_same(p->got, p->want, n);
}

static void check_products(int32_t N, int32_t K, const int32_t *rows, int32_t n_rows, bool has_bias)
{
    mil_context contexts[MAX_BACKENDS];
    int32_t largest = rows[n_rows - 1];
    int32_t n =
        open_contexts(contexts, (size_t)largest * (size_t)(K + 2048) * 8 + ((size_t)1 << 19));
    problem p = make_problem(largest, N, K, has_bias);
    compute_want(&p, &contexts[0]);
    for (int32_t c = 0; c < n; c++) {
        for (int32_t i = 0; i < n_rows; i++)
            CHECK(product_is_right(&p, &contexts[c], rows[i]));
    }
    free_problem(&p);
    close_contexts(contexts, n);
}

TEST(every_set_equals_the_chain_for_every_number_of_rows)
{
    int32_t rows[41];
    for (int32_t i = 0; i < 40; i++)
        rows[i] = i + 1;
    rows[40] = 128;
    check_products(96, 70, rows, 41, false);
}

TEST(odd_shapes_equal_the_chain)
{
    static const int32_t rows[] = {1, 2, 5, 13, 14, 17, 30};
    check_products(1, 1, rows, 7, false);
    check_products(33, 37, rows, 7, true);
    check_products(31, 513, rows, 7, false);
    check_products(70, 1030, rows, 7, true);
}

TEST(long_k_goes_on_across_blocks)
{
    static const int32_t rows[] = {1, 3, 16};
    check_products(64, 1537, rows, 3, false);
    check_products(32, 4096, rows, 3, false);
}

TEST(many_rows_take_one_block_of_k_over_all_panels)
{
    static const int32_t rows[] = {128};
    check_products(64, 1100, rows, 1, true);
}

TEST(a_row_does_not_depend_on_its_place_in_the_batch)
{
    mil_context contexts[MAX_BACKENDS];
    int32_t n = open_contexts(contexts, (size_t)2 << 20);
    problem p = make_problem(29, 64, 600, false);
    for (int32_t m = 1; m < 29; m++)
        memcpy(p.x + (int64_t)m * 600, p.x, 600 * sizeof *p.x);
    compute_want(&p, &contexts[0]);
    for (int32_t c = 0; c < n; c++)
        CHECK(product_is_right(&p, &contexts[c], 29));
    CHECK(is_same(p.got, p.got + 28 * 64, 64));
    free_problem(&p);
    close_contexts(contexts, n);
}

TEST(denormal_results_are_zero_on_every_set)
{
    static const float zeros[32];
    mil_context contexts[MAX_BACKENDS];
    int32_t n = open_contexts(contexts, (size_t)2 << 20);
    problem p = make_problem(1, 32, 8, false);
    for (int32_t k = 0; k < 8; k++)
        p.x[k] = mil_bf16_from_float(0x1p-66f);
    for (int32_t i = 0; i < 32 * 8; i++)
        p.w[i] = p.x[0];
    CHECK_INT(cpu()->pack(NULL, &p.weight, 0, 0, 32, p.w, MIL_DTYPE_BF16, 8), MIL_OK);
    memcpy(p.want, zeros, sizeof zeros);
    for (int32_t c = 0; c < n; c++)
        CHECK(product_is_right(&p, &contexts[c], 1));
    free_problem(&p);
    close_contexts(contexts, n);
}

TEST(too_small_a_workspace_is_named)
{
    mil_context contexts[MAX_BACKENDS];
    int32_t n = open_contexts(contexts, 64);
    problem p = make_problem(1, 32, 64, false);
    mil_linear_args args = {
        .y = p.got, .x = p.x, .weight = &p.weight, .M = 1, .ldy = 32, .ldx = 64};
    CHECK(contexts[0].backend->linear(&contexts[0], &args) == MIL_ERR_INTERNAL);
    CHECK(strstr(mil_status_message(), "workspace is 64 bytes") != NULL);
    free_problem(&p);
    close_contexts(contexts, n);
}

/* ---- packing ---- */

TEST(packing_by_row_ranges_and_parts_equals_packing_whole)
{
    const mil_backend *backend = cpu();
    const int32_t K = 75, rows = 48;
    uint16_t w[2 * 48 * 75];
    fill(w, 2 * rows * K, 3);
    size_t bytes = backend->packed_bytes(2 * rows, K);
    mil_weight weight = {.N = 2 * rows, .K = K, .n_parts = 2, .part_rows = {rows, rows}};
    for (int32_t interleave = 0; interleave <= 16; interleave += 16) {
        uint16_t *whole = mil_alloc(bytes, 1), *pieces = mil_alloc(bytes, 1);
        weight.interleave = interleave;
        weight.data = whole;
        for (int32_t part = 0; part < 2; part++)
            CHECK_INT(
                backend->pack(NULL, &weight, part, 0, rows, w + part * rows * K, MIL_DTYPE_BF16, K),
                MIL_OK);
        weight.data = pieces;
        for (int32_t row = 0; row < rows; row += 7) {
            int32_t n = row + 7 < rows ? 7 : rows - row;
            for (int32_t part = 0; part < 2; part++)
                CHECK_INT(backend->pack(NULL, &weight, part, row, n, w + (part * rows + row) * K,
                                        MIL_DTYPE_BF16, K),
                          MIL_OK);
        }
        CHECK(memcmp(whole, pieces, bytes) == 0);
        for (int32_t n = 0; n < 2 * rows; n++) {
            int32_t at = mil_weight_row(&weight, n / rows, n % rows);
            for (int32_t k = 0; k < K; k++)
                CHECK_INT(whole[((at / 32 * (K / 2 + 1) + k / 2) * 32 + at % 32) * 2 + k % 2],
                          w[n * K + k]);
        }
        mil_free(whole);
        mil_free(pieces);
    }
}

/* ---- LoRA ---- */

#define LORA_T 23
#define LORA_K 530
#define LORA_SLOTS 4
#define LORA_PARTS 3

typedef struct lora_problem {
    int32_t part_rows[LORA_PARTS];
    int32_t n_parts, interleave, N;
    problem base;
    uint16_t *a[LORA_SLOTS][LORA_PARTS], *b[LORA_SLOTS][LORA_PARTS];
    mil_lora_module modules[LORA_SLOTS * MIL_N_PROJECTIONS];
    mil_lora_table table;
    mil_plan_header header;
    mil_batch batch;
    float *v, *want;
    mil_lora_args args;
} lora_problem;

/* Of each slot and part; 0: the adapter does not touch it. */
static const int32_t ranks[LORA_SLOTS][LORA_PARTS] = {
    {4, 16, 0}, {24, 3, 16}, {0, 0, 0}, {1, 40, 8}};
/* Segments of slots 3, 0, 1 and 2: a lone row, scattered rows, a chunk with a gap, one more. Rows
 * 1, 4 and 22 are base rows. */
static const int32_t segment_indptr[] = {0, 1, 5, 19, 20};
static const int32_t segment_slots[] = {3, 0, 1, 2};
static const int32_t lora_rows[] = {2,  0,  3,  5,  21, 6,  7,  8,  9,  10,
                                    11, 12, 13, 14, 15, 17, 18, 19, 20, 16};

static void make_module(lora_problem *p, int32_t slot, int32_t part)
{
    const mil_backend *backend = cpu();
    int32_t rank = ranks[slot][part], padded = (rank + 15) / 16 * 16, out = p->part_rows[part];
    uint64_t seed = 10 + (uint64_t)(slot * 16 + part);
    if (rank == 0)
        return;
    uint16_t *a = mil_alloc((size_t)rank * LORA_K, 2), *b = mil_alloc((size_t)(out * rank), 2);
    void *packed_a = mil_alloc(backend->lora_a_bytes(rank, LORA_K), 1);
    void *packed_b = mil_alloc(backend->lora_b_bytes(out, rank), 1);
    fill(a, (int64_t)rank * LORA_K, seed);
    fill(b, (int64_t)out * rank, seed + 1000);
    backend->lora_pack_a(packed_a, a, LORA_K, rank, LORA_K);
    backend->lora_pack_b(packed_b, b, rank, out, rank);
    p->a[slot][part] = a;
    p->b[slot][part] = b;
    p->modules[slot * MIL_N_PROJECTIONS + part] =
        (mil_lora_module){rank, padded, LORA_K, out, 0.7f + (float)slot, packed_a, packed_b};
}

static void make_lora(lora_problem *p, int32_t n_parts, const int32_t *part_rows,
                      int32_t interleave)
{
    memset(p, 0, sizeof *p);
    p->n_parts = n_parts;
    p->interleave = interleave;
    for (int32_t i = 0; i < n_parts; i++) {
        p->part_rows[i] = part_rows[i];
        p->N += part_rows[i];
    }
    p->base = make_problem(LORA_T, p->N, LORA_K, true);
    p->base.weight.n_parts = n_parts;
    p->base.weight.interleave = interleave;
    memcpy(p->base.weight.part_rows, p->part_rows, sizeof p->part_rows);
    for (int32_t slot = 0; slot < LORA_SLOTS; slot++) {
        for (int32_t part = 0; part < n_parts; part++)
            make_module(p, slot, part);
    }
    p->table = (mil_lora_table){LORA_SLOTS, 1, p->modules};
    p->header = (mil_plan_header){.n_tokens = LORA_T, .n_segments = 4, .n_lora_rows = 20};
    p->batch = (mil_batch){.header = &p->header,
                           .segment_indptr = (int32_t *)segment_indptr,
                           .segment_adapter = (int32_t *)segment_slots,
                           .lora_rows = (int32_t *)lora_rows};
    p->v = mil_alloc((size_t)20 * 3 * 48, sizeof *p->v);
    p->want = mil_alloc((size_t)LORA_T * (size_t)p->N, sizeof *p->want);
    p->args = (mil_lora_args){.batch = &p->batch,
                              .table = &p->table,
                              .n_parts = n_parts,
                              .projections = {0, 1, 2},
                              .v = p->v,
                              .v_stride = 3 * 48,
                              .v_part_stride = 48};
}

static void free_lora(lora_problem *p)
{
    for (int32_t slot = 0; slot < LORA_SLOTS; slot++) {
        for (int32_t part = 0; part < p->n_parts; part++) {
            mil_free(p->a[slot][part]);
            mil_free(p->b[slot][part]);
            mil_free((void *)p->modules[slot * MIL_N_PROJECTIONS + part].a);
            mil_free((void *)p->modules[slot * MIL_N_PROJECTIONS + part].b);
        }
    }
    mil_free(p->v);
    mil_free(p->want);
    free_problem(&p->base);
}

/* want[row] += expand(shrink(x[row])) for one row of one segment, as backend.h writes it. */
static void add_row(lora_problem *p, int32_t slot, int32_t part, int32_t row)
{
    const mil_lora_module *module = &p->modules[slot * MIL_N_PROJECTIONS + part];
    float v[64] = {0};
    for (int32_t r = 0; r < module->rank; r++)
        v[r] = module->scale * chain(p->base.x + (int64_t)row * LORA_K,
                                     p->a[slot][part] + (int64_t)r * LORA_K, LORA_K);
    for (int32_t n = 0; n < p->part_rows[part]; n++) {
        volatile float d = 0.0f;
        for (int32_t r = 0; r < module->rank; r++)
            d = fmaf(v[r], mil_bf16_to_float(p->b[slot][part][n * module->rank + r]), d);
        p->want[row * p->N + mil_weight_row(&p->base.weight, part, n)] += d;
    }
}

static void compute_lora_want(lora_problem *p, mil_context *context)
{
    mil_thread_state saved;
    compute_want(&p->base, context);
    memcpy(p->want, p->base.want, (size_t)(LORA_T * p->N) * sizeof *p->want);
    enter(context, &saved);
    for (int32_t g = 0; g < 4; g++) {
        for (int32_t i = segment_indptr[g]; i < segment_indptr[g + 1]; i++) {
            for (int32_t part = 0; part < p->n_parts; part++)
                add_row(p, segment_slots[g], part, lora_rows[i]);
        }
    }
    mil_pool_leave(context->pool, &saved);
}

static mil_linear_args lora_linear(lora_problem *p)
{
    memset(p->v, 0xff, 20 * 3 * 48 * sizeof *p->v);
    memset(p->base.got, 0xff, (size_t)(LORA_T * p->N) * sizeof(float));
    return (mil_linear_args){.y = p->base.got,
                             .x = p->base.x,
                             .weight = &p->base.weight,
                             .M = LORA_T,
                             .ldy = p->N,
                             .ldx = LORA_K};
}

static bool fused_is_right(lora_problem *p, mil_context *context)
{
    mil_linear_args linear = lora_linear(p);
    mil_thread_state saved;
    enter(context, &saved);
    mil_status status = context->backend->linear_lora(context, &linear, &p->args);
    mil_pool_leave(context->pool, &saved);
    return status == MIL_OK && is_same(p->base.got, p->want, LORA_T * p->N);
}

static bool plain_is_right(lora_problem *p, mil_context *context)
{
    const mil_backend *backend = context->backend;
    mil_linear_args linear = lora_linear(p);
    mil_lora_shrink_args shrink = {.lora = p->args, .x = linear.x, .ldx = linear.ldx};
    mil_lora_expand_args expand = {
        .lora = p->args, .y = linear.y, .ldy = linear.ldy, .weight = linear.weight};
    mil_thread_state saved;
    enter(context, &saved);
    bool ok = backend->lora_shrink(context, &shrink) == MIL_OK &&
              backend->linear(context, &linear) == MIL_OK &&
              backend->lora_expand(context, &expand) == MIL_OK;
    mil_pool_leave(context->pool, &saved);
    return ok && is_same(p->base.got, p->want, LORA_T * p->N);
}

/* gate_up_act's out equals act over linear_lora's y. */
static bool gate_up_is_right(lora_problem *p, mil_context *context, const mil_lora_args *lora,
                             const float *y)
{
    mil_linear_args linear = lora_linear(p);
    int32_t F = p->N / 2;
    uint16_t want[LORA_T * 64], got[LORA_T * 64];
    mil_act_args act = {
        .out = want, .gate_up = y, .n_tokens = LORA_T, .ffn = F, .interleave = p->interleave};
    mil_thread_state saved;
    enter(context, &saved);
    bool ok = context->backend->act(context, &act) == MIL_OK;
    act.out = got;
    act.gate_up = linear.y;
    ok = ok && context->backend->gate_up_act(context, &linear, lora, &act) == MIL_OK;
    mil_pool_leave(context->pool, &saved);
    return ok && memcmp(want, got, (size_t)(LORA_T * F) * sizeof *got) == 0;
}

static void check_lora(int32_t n_parts, const int32_t *part_rows, int32_t interleave)
{
    mil_context contexts[MAX_BACKENDS];
    lora_problem p;
    int32_t n = open_contexts(contexts, (size_t)2 << 20);
    make_lora(&p, n_parts, part_rows, interleave);
    compute_lora_want(&p, &contexts[0]);
    for (int32_t c = 0; c < n; c++) {
        CHECK(fused_is_right(&p, &contexts[c]));
        CHECK(plain_is_right(&p, &contexts[c]));
        if (n_parts == 2) {
            CHECK(gate_up_is_right(&p, &contexts[c], &p.args, p.want));
            CHECK(gate_up_is_right(&p, &contexts[c], NULL, p.base.want));
        }
    }
    free_lora(&p);
    close_contexts(contexts, n);
}

TEST(lora_of_mixed_ranks_equals_the_chains_fused_and_plain)
{
    static const int32_t rows[] = {40, 24, 8};
    check_lora(3, rows, 0);
}

TEST(lora_of_interleaved_parts_equals_the_chains_and_feeds_the_activation)
{
    static const int32_t rows[] = {64, 64};
    check_lora(2, rows, 16);
}

TEST(lora_of_parts_one_after_another_feeds_the_activation)
{
    static const int32_t rows[] = {24, 24};
    check_lora(2, rows, 0);
}

TEST(no_segments_is_the_base_product)
{
    static const int32_t rows[] = {40, 24, 8};
    mil_context contexts[MAX_BACKENDS];
    lora_problem p;
    int32_t n = open_contexts(contexts, (size_t)2 << 20);
    make_lora(&p, 3, rows, 0);
    compute_want(&p.base, &contexts[0]);
    memcpy(p.want, p.base.want, (size_t)(LORA_T * p.N) * sizeof *p.want);
    p.header.n_segments = p.header.n_lora_rows = 0;
    for (int32_t c = 0; c < n; c++)
        CHECK(fused_is_right(&p, &contexts[c]) && plain_is_right(&p, &contexts[c]));
    free_lora(&p);
    close_contexts(contexts, n);
}

/* ---- the choice of a set ---- */

TEST(unknown_instruction_set_is_refused_with_those_that_run)
{
    const char *in_use, *available;
    choose("sse9");
    mil_status status = mil_cpu_isa(&in_use, &available);
    const mil_backend *backend = cpu();
    choose(NULL);
    CHECK(status == MIL_ERR_ARGUMENT);
    CHECK(backend == NULL);
    CHECK(strstr(mil_status_message(), "sse9") != NULL);
    CHECK(strstr(mil_status_message(), "scalar") != NULL);
    CHECK(mil_backend_find(&backend, "tpu") == MIL_ERR_ARGUMENT);
}

TEST_MAIN()
