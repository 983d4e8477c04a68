/* Attention beside the roofs of its own round: prefill by the flops of the keys that are seen,
 * decode by the bytes of KV. One JSON object a line.
 *
 *   bench_attention N_ROUNDS N_THREADS [PART]     only shapes whose name holds PART
 *                                                 (MILPY_CPU_ISA forces an instruction set)
 *
 * Layers' KV is in rotation over 1 GiB, as a model's layers are, so that none is in a cache. */
#include "driver.h"
#include "roofs.h"

#include <string.h>

#define MAX_SEQS 64
#define KV_BYTES ((size_t)1 << 30)
#define PAGE_SIZE 16

typedef struct shape {
    const char *name;
    int32_t n_heads, n_kv_heads, head_dim;
    int32_t n_seqs, query_length, kv_length;
} shape;

static const shape shapes[] = {
    {"0.5B prefill 512", 16, 8, 64, 1, 512, 512},
    {"1B prefill 512", 32, 8, 64, 1, 512, 512},
    {"8B prefill 512", 32, 8, 128, 1, 512, 512},
    {"0.5B prefill 512 after 3584", 16, 8, 64, 1, 512, 4096},
    {"0.5B decode 1 x 192", 16, 8, 64, 1, 1, 192},
    {"0.5B decode 8 x 192", 16, 8, 64, 8, 1, 192},
    {"0.5B decode 32 x 192", 16, 8, 64, 32, 1, 192},
    {"0.5B decode 1 x 4096", 16, 8, 64, 1, 1, 4096},
    {"8B decode 8 x 2048", 32, 8, 128, 8, 1, 2048},
};

typedef struct machine {
    mil_context context;
    int32_t cpus[MAX_THREADS];
    int32_t n_threads;
    uint16_t *pages;
    const void *roof;
    size_t roof_bytes;
} machine;

static void open_machine(machine *all, int32_t n_threads)
{
    mil_maxima maxima = {.max_tokens = 512,
                         .max_seqs = MAX_SEQS,
                         .max_logit_rows = 1,
                         .max_position = 4096,
                         .hidden = 4096,
                         .ffn = 4096,
                         .vocab = 1,
                         .n_heads = 32,
                         .n_kv_heads = 8,
                         .head_dim = 128};
    all->n_threads = open_context(&all->context, all->cpus, n_threads, maxima);
    all->pages = take(KV_BYTES);
    fill_bf16(all->pages, KV_BYTES / sizeof *all->pages, 0, 1.0f);
    all->roof_bytes = (size_t)1 << 30;
    all->roof = roof_buffer(all->roof_bytes);
    require(all->roof != NULL, "memory for the roof");
}

static double seconds_of(machine *all, const shape *s)
{
    static int32_t seq_slot[MAX_SEQS], indptr[MAX_SEQS + 1], lengths[MAX_SEQS];
    int32_t max_pages = (s->kv_length + PAGE_SIZE - 1) / PAGE_SIZE;
    int32_t n_pages = max_pages * s->n_seqs;
    int32_t *table = take(sizeof *table * (size_t)n_pages);
    size_t q_items =
        (size_t)s->n_seqs * (size_t)s->query_length * (size_t)s->n_heads * (size_t)s->head_dim;
    uint16_t *q = take(q_items * sizeof *q), *out = take(q_items * sizeof *out);
    fill_bf16(q, q_items, 0, 1.0f);
    for (int32_t i = 0; i < n_pages; i++) /* shuffled, as pages are after some requests */
        table[i] = (int32_t)((int64_t)i * 7919 % n_pages);
    for (int32_t i = 0; i < s->n_seqs; i++) {
        seq_slot[i] = i;
        indptr[i + 1] = (i + 1) * s->query_length;
        lengths[i] = s->kv_length;
    }
    mil_plan_header header = {.n_seqs = s->n_seqs, .n_tokens = s->n_seqs * s->query_length};
    mil_batch batch = {
        .header = &header, .seq_slot = seq_slot, .query_indptr = indptr, .kv_lengths = lengths};
    mil_slots slots = {.n_slots = s->n_seqs, .max_pages = max_pages, .page_table = table};
    int64_t layer = (int64_t)n_pages * s->n_kv_heads * PAGE_SIZE * s->head_dim;
    int32_t n_layers = (int32_t)((int64_t)(KV_BYTES / sizeof *all->pages) / 2 / layer);
    mil_kv kv = {.k = all->pages,
                 .v = all->pages + n_layers * layer,
                 .layer_elements = layer,
                 .n_pages = n_pages,
                 .page_size = PAGE_SIZE,
                 .n_kv_heads = s->n_kv_heads,
                 .head_dim = s->head_dim,
                 .dtype = MIL_DTYPE_BF16};
    mil_attention_args args = {.out = out,
                               .q = q,
                               .out_dtype = MIL_DTYPE_BF16,
                               .batch = &batch,
                               .slots = &slots,
                               .kv = &kv,
                               .n_heads = s->n_heads,
                               .scale = 0.125f};
    mil_thread_state saved;
    require(mil_pool_enter(all->context.pool, &saved) == MIL_OK, "enter");
    int32_t n_calls = 0;
    double begin = roof_clock_s(), end;
    do {
        args.layer = n_calls % n_layers;
        require(all->context.backend->attention(&all->context, &args) == MIL_OK, "attention");
        n_calls++;
        end = roof_clock_s();
    } while (end - begin < 0.2);
    mil_pool_leave(all->context.pool, &saved);
    return (end - begin) / n_calls;
}

static double larger(double a, double b)
{
    return a > b ? a : b;
}

/* Roofs just before and just after, the better kept. */
static void measure(machine *all, const shape *s, int round)
{
    double peak = roof_bf16_gflops(all->n_threads, all->cpus);
    double read = roof_read_gbs(all->roof, all->roof_bytes, all->n_threads, all->cpus);
    double seconds = seconds_of(all, s);
    peak = larger(peak, roof_bf16_gflops(all->n_threads, all->cpus));
    read = larger(read, roof_read_gbs(all->roof, all->roof_bytes, all->n_threads, all->cpus));
    double seen = 0;
    for (int32_t i = 0; i < s->query_length; i++)
        seen += s->kv_length - s->query_length + i + 1;
    double gflop = 4e-9 * seen * s->n_seqs * s->n_heads * s->head_dim;
    double gbytes = 4e-9 * s->n_seqs * (double)s->kv_length * s->n_kv_heads * s->head_dim;
    printf("{\"shape\": \"%s\", \"round\": %d, \"threads\": %d, \"us\": %.1f, \"gflops\": %.1f, "
           "\"of_peak\": %.3f, \"gbs\": %.1f, \"of_read\": %.3f}\n",
           s->name, round, all->n_threads, seconds * 1e6, gflop / seconds, gflop / seconds / peak,
           gbytes / seconds, gbytes / seconds / read);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    static machine all;
    int n_rounds = argc > 1 ? atoi(argv[1]) : 3;
    open_machine(&all, argc > 2 ? atoi(argv[2]) : 0);
    for (int round = 0; round < n_rounds; round++)
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
            if (argc < 4 || strstr(shapes[i].name, argv[3]) != NULL)
                measure(&all, &shapes[i], round);
    return 0;
}
