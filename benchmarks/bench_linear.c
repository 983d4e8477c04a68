/* Products, LoRA and the pool, each beside the roofs of its own round. One JSON object a line; the
 * judging is bench_cpu.py's.
 *
 *   bench_linear gemm|lora|pool N_ROUNDS N_THREADS (0: all)      (MILPY_CPU_ISA forces an
 * instruction set)
 *
 * gemm: y[M, 4096] = x W^T, K = 4096, over 1 GiB of weights in rotation, so that none is in a
 * cache. lora: the seven projections of a whole model (0.5 B and 1 B shapes), with and without
 * adapters of rank 16: one sequence, 8 sequences with 8 adapters, and 512 tokens with one. */
#include "driver.h"
#include "roofs.h"

#include <string.h>

#define GEMM_SIZE 4096
#define WEIGHT_BYTES ((size_t)1 << 30)
#define MAX_ROWS 512

typedef struct machine {
    mil_context context;
    mil_thread_state saved;
    int32_t cpus[MAX_THREADS];
    int32_t n_threads;
    uint16_t *weights; /* WEIGHT_BYTES */
    uint16_t *x;       /* [MAX_ROWS, widest input] */
    float *y;          /* [MAX_ROWS, widest output] */
} machine;

#define WIDEST 16384

static void open_machine(machine *all, int32_t n_threads)
{
    mil_maxima maxima = {.max_tokens = MAX_ROWS,
                         .max_seqs = 64,
                         .max_logit_rows = 64,
                         .max_position = 1024,
                         .hidden = 4096,
                         .ffn = 8192,
                         .vocab = 32000,
                         .n_heads = 32,
                         .n_kv_heads = 8,
                         .head_dim = 64};
    all->n_threads = open_context(&all->context, all->cpus, n_threads, maxima);
    all->x = take((size_t)MAX_ROWS * WIDEST * 2);
    fill_bf16(all->x, (size_t)MAX_ROWS * WIDEST, 1, 0.125f);
    all->y = take((size_t)MAX_ROWS * WIDEST * 4);
    memset(all->y, 0, (size_t)MAX_ROWS * WIDEST * 4);
    all->weights = take(WEIGHT_BYTES);
    fill_bf16(all->weights, (size_t)1 << 20, 2, 0.125f);
    for (size_t done = (size_t)2 << 20; done < WEIGHT_BYTES; done *= 2)
        memcpy((char *)all->weights + done, all->weights, done);
}

typedef struct roofs {
    double read, bf16, fp32_avx2;
} roofs;

/* The better of what is there and of a measurement now. */
static void measure_roofs(const machine *all, roofs *best)
{
    double read = roof_read_gbs(all->weights, WEIGHT_BYTES, all->n_threads, all->cpus);
    double bf16 = roof_bf16_gflops(all->n_threads, all->cpus);
    double fp32_avx2 = roof_fp32_avx2_gflops(all->n_threads, all->cpus);
    best->read = read > best->read ? read : best->read;
    best->bf16 = bf16 > best->bf16 ? bf16 : best->bf16;
    best->fp32_avx2 = fp32_avx2 > best->fp32_avx2 ? fp32_avx2 : best->fp32_avx2;
}

/* ---- products ---- */

static double gemm_seconds(machine *all, int32_t M, int32_t n_products, size_t *at)
{
    size_t bytes = all->context.backend->packed_bytes(GEMM_SIZE, GEMM_SIZE);
    require(mil_pool_enter(all->context.pool, &all->saved) == MIL_OK, "enter");
    double begin = roof_clock_s();
    for (int32_t i = 0; i < n_products; i++) {
        *at = (*at + bytes) % (WEIGHT_BYTES / bytes * bytes);
        mil_weight weight = {.format = MIL_WEIGHT_BF16_PANELS,
                             .N = GEMM_SIZE,
                             .K = GEMM_SIZE,
                             .n_parts = 1,
                             .part_rows = {GEMM_SIZE},
                             .data = (char *)all->weights + *at};
        mil_linear_args args = {.y = all->y,
                                .x = all->x,
                                .weight = &weight,
                                .M = M,
                                .ldy = GEMM_SIZE,
                                .ldx = GEMM_SIZE};
        require(all->context.backend->linear(&all->context, &args) == MIL_OK, "linear");
    }
    double seconds = (roof_clock_s() - begin) / n_products;
    mil_pool_leave(all->context.pool, &all->saved);
    return seconds;
}

static void bench_gemm(machine *all, int32_t n_rounds)
{
    static const int32_t rows[] = {1, 4, 16, 128};
    size_t at = 0;
    for (int32_t round = 0; round < n_rounds; round++) {
        for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
            int32_t M = rows[i];
            int32_t n_products = M <= 16 ? 16 : M <= 128 ? 4 : 1;
            roofs best = {0};
            measure_roofs(all, &best);
            double seconds = gemm_seconds(all, M, n_products, &at);
            measure_roofs(all, &best);
            printf("{\"bench\": \"gemm\", \"M\": %d, \"gflops\": %.3f, \"read_gbs\": %.3f, "
                   "\"bf16_gflops\": %.2f, \"fp32_avx2_gflops\": %.2f}\n",
                   M, 2.0 * M * GEMM_SIZE * GEMM_SIZE / 1e9 / seconds, best.read, best.bf16,
                   best.fp32_avx2);
            fflush(stdout);
        }
    }
}

/* ---- LoRA over a model's projections ---- */

typedef struct shape {
    const char *name;
    int32_t hidden, q, kv, ffn, n_layers;
} shape;

/* The two shapes of the end-to-end bars. */
static const shape shapes[] = {
    {"0.5B", 1024, 1024, 512, 4096, 24},
    {"1B", 2048, 2048, 512, 8192, 16},
};

typedef struct linear_of_layer {
    int32_t n_parts, rows[MIL_MAX_PARTS], K;
    mil_projection first;
    int32_t interleave;
} linear_of_layer;

#define N_LINEARS 4
#define RANK 16
#define MAX_ADAPTERS 8

static void layer_linears(const shape *s, linear_of_layer *out)
{
    out[0] = (linear_of_layer){3, {s->q, s->kv, s->kv}, s->hidden, MIL_PROJECTION_Q, 0};
    out[1] = (linear_of_layer){1, {s->hidden}, s->q, MIL_PROJECTION_O, 0};
    out[2] = (linear_of_layer){2, {s->ffn, s->ffn}, s->hidden, MIL_PROJECTION_GATE, 16};
    out[3] = (linear_of_layer){1, {s->hidden}, s->ffn, MIL_PROJECTION_DOWN, 0};
}

/* A descriptor table over one block of memory for each adapter and layer, as the loader lays them.
 */
static mil_lora_table make_adapters(const mil_backend *backend, const shape *s)
{
    linear_of_layer linears[N_LINEARS];
    layer_linears(s, linears);
    mil_lora_table table = {.n_slots = MAX_ADAPTERS, .n_layers = s->n_layers};
    size_t n = (size_t)MAX_ADAPTERS * (size_t)s->n_layers * MIL_N_PROJECTIONS;
    table.modules = take(n * sizeof *table.modules);
    for (int32_t slot = 0; slot < MAX_ADAPTERS; slot++) {
        size_t each = (size_t)16 << 20;
        char *memory = take(each * 16);
        fill_bf16((uint16_t *)memory, (size_t)1 << 20, (uint64_t)slot + 3, 0.125f);
        for (size_t done = (size_t)2 << 20; done < each * 16; done *= 2)
            memcpy(memory + done, memory, done);
        for (int32_t layer = 0; layer < s->n_layers; layer++) {
            for (int32_t l = 0; l < N_LINEARS; l++) {
                for (int32_t p = 0; p < linears[l].n_parts; p++) {
                    size_t index =
                        ((size_t)slot * (size_t)s->n_layers + (size_t)layer) * MIL_N_PROJECTIONS +
                        (size_t)linears[l].first + (size_t)p;
                    mil_lora_module *module = &table.modules[index];
                    *module = (mil_lora_module){.rank = RANK,
                                                .padded_rank = RANK,
                                                .in = linears[l].K,
                                                .out = linears[l].rows[p],
                                                .scale = 2.0f};
                    module->a = memory;
                    memory += mil_round_up(backend->lora_a_bytes(RANK, module->in), 64);
                    module->b = memory;
                    memory += mil_round_up(backend->lora_b_bytes(module->out, RANK), 64);
                }
            }
        }
    }
    return table;
}

typedef struct lora_case {
    const char *name;
    int32_t rows, n_segments;
} lora_case;

/* One pass over all linears of the model; lora NULL: without. */
static void run_model(machine *all, const shape *s, int32_t rows, const mil_lora_args *lora)
{
    linear_of_layer linears[N_LINEARS];
    layer_linears(s, linears);
    const mil_backend *backend = all->context.backend;
    char *at = (char *)all->weights;
    for (int32_t layer = 0; layer < s->n_layers; layer++) {
        for (int32_t l = 0; l < N_LINEARS; l++) {
            const linear_of_layer *each = &linears[l];
            mil_weight weight = {.format = MIL_WEIGHT_BF16_PANELS,
                                 .K = each->K,
                                 .n_parts = each->n_parts,
                                 .interleave = each->interleave,
                                 .data = at};
            mil_lora_args with = {0};
            for (int32_t p = 0; p < each->n_parts; p++) {
                weight.N += each->rows[p];
                weight.part_rows[p] = each->rows[p];
            }
            size_t bytes = backend->packed_bytes(weight.N, weight.K);
            at += bytes;
            if (at > (char *)all->weights + WEIGHT_BYTES) {
                at = (char *)all->weights + bytes;
                weight.data = all->weights;
            }
            mil_linear_args args = {.y = all->y,
                                    .x = all->x,
                                    .weight = &weight,
                                    .M = rows,
                                    .ldy = weight.N,
                                    .ldx = weight.K};
            if (lora != NULL) {
                with = *lora;
                with.layer = layer;
                with.n_parts = each->n_parts;
                for (int32_t p = 0; p < each->n_parts; p++)
                    with.projections[p] = (mil_projection)((int32_t)each->first + p);
            }
            require(backend->linear_lora(&all->context, &args, lora == NULL ? NULL : &with) ==
                        MIL_OK,
                    "linear_lora");
        }
    }
}

static double model_seconds(machine *all, const shape *s, const lora_case *which,
                            const mil_lora_args *lora)
{
    require(mil_pool_enter(all->context.pool, &all->saved) == MIL_OK, "enter");
    int32_t n_passes = which->rows > 8 ? 1 : 3;
    double begin = roof_clock_s();
    for (int32_t i = 0; i < n_passes; i++)
        run_model(all, s, which->rows, lora);
    double seconds = (roof_clock_s() - begin) / n_passes;
    mil_pool_leave(all->context.pool, &all->saved);
    return seconds;
}

static void bench_lora(machine *all, int32_t n_rounds)
{
    static const lora_case cases[] = {
        {"decode 1", 1, 1}, {"decode 8, 8 adapters", 8, 8}, {"prefill 512", 512, 1}};
    mil_plan_header header = {0};
    int32_t indptr[MAX_ADAPTERS + 1], adapters[MAX_ADAPTERS], rows[MAX_ROWS];
    for (int32_t i = 0; i < MAX_ADAPTERS; i++)
        adapters[i] = i;
    for (int32_t i = 0; i < MAX_ROWS; i++)
        rows[i] = i;
    mil_batch batch = {.header = &header,
                       .segment_indptr = indptr,
                       .segment_adapter = adapters,
                       .lora_rows = rows};
    mil_lora_args lora = {.batch = &batch,
                          .v = take((size_t)MAX_ROWS * 64 * sizeof(float)),
                          .v_stride = 64,
                          .v_part_stride = RANK};
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        mil_lora_table table = make_adapters(all->context.backend, &shapes[s]);
        lora.table = &table;
        for (int32_t round = 0; round < n_rounds; round++) {
            for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
                header.n_tokens = header.n_lora_rows = cases[c].rows;
                header.n_segments = cases[c].n_segments;
                for (int32_t g = 0; g <= cases[c].n_segments; g++)
                    indptr[g] = cases[c].rows * g / cases[c].n_segments;
                double without = model_seconds(all, &shapes[s], &cases[c], NULL);
                double with = model_seconds(all, &shapes[s], &cases[c], &lora);
                without = 0.5 * (without + model_seconds(all, &shapes[s], &cases[c], NULL));
                printf("{\"bench\": \"lora\", \"shape\": \"%s\", \"case\": \"%s\", "
                       "\"without_ms\": %.4f, \"with_ms\": %.4f}\n",
                       shapes[s].name, cases[c].name, without * 1e3, with * 1e3);
                fflush(stdout);
            }
        }
    }
}

/* ---- the pool ---- */

static void nothing(void *argument, int32_t thread, int32_t n_threads)
{
    (void)argument;
    (void)thread;
    (void)n_threads;
}

static void bench_pool(machine *all, int32_t n_rounds)
{
    require(mil_pool_enter(all->context.pool, &all->saved) == MIL_OK, "enter");
    for (int32_t i = 0; i < 100; i++)
        mil_pool_run(all->context.pool, nothing, NULL);
    for (int32_t round = 0; round < n_rounds * 100; round++) {
        double begin = roof_clock_s();
        mil_pool_run(all->context.pool, nothing, NULL);
        printf("{\"bench\": \"pool\", \"fork_join_us\": %.3f}\n", (roof_clock_s() - begin) * 1e6);
    }
    mil_pool_leave(all->context.pool, &all->saved);
}

int main(int argc, char **argv)
{
    if (argc != 4) {
        fprintf(stderr, "usage: bench_linear gemm|lora|pool N_ROUNDS N_THREADS\n");
        return 2;
    }
    static machine all;
    int32_t n_rounds = atoi(argv[2]);
    open_machine(&all, atoi(argv[3]));
    if (strcmp(argv[1], "gemm") == 0)
        bench_gemm(&all, n_rounds);
    else if (strcmp(argv[1], "lora") == 0)
        bench_lora(&all, n_rounds);
    else
        bench_pool(&all, n_rounds);
    return 0;
}
