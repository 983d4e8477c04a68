/* Split qkv into heads, rotate q and k by position, round, and write K and V where the sequence's
 * page table says. Tokens are shared out; the rotation is rope_simd.c's. */
#include "cpu/cpu.h"

typedef struct rope_job {
    const mil_rope_write_args *args;
    const mil_cpu_rope_kernels *kernels;
} rope_job;

/* Token t, query i of sequence s. */
static void write_token(const rope_job *job, int32_t t, int32_t s, int32_t i)
{
    const mil_rope_write_args *args = job->args;
    const mil_batch *batch = args->batch;
    const mil_kv *kv = args->kv;
    int32_t D = kv->head_dim, P = kv->page_size, K = kv->n_kv_heads, N = args->n_heads;
    int64_t angle = (int64_t)batch->positions[t] * (args->rotary_dim / 2);
    const float *cosines = args->cos_table + angle, *sines = args->sin_table + angle;
    const float *q = (const float *)args->qkv + (int64_t)t * (N + 2 * K) * D;
    const float *k = q + (int64_t)N * D;
    const float *v = k + (int64_t)K * D;

    for (int32_t head = 0; head < N; head++)
        job->kernels->rotate(args->q + ((int64_t)t * N + head) * D, q + (int64_t)head * D, cosines,
                             sines, D, args->rotary_dim, args->is_interleaved);

    int32_t query_length = batch->query_indptr[s + 1] - batch->query_indptr[s];
    int32_t position = batch->kv_lengths[s] - query_length + i;
    const int32_t *pages =
        args->slots->page_table + (int64_t)batch->seq_slot[s] * args->slots->max_pages;
    int64_t row = args->layer * kv->layer_elements +
                  ((int64_t)pages[position / P] * K * P + position % P) * D;
    for (int32_t head = 0; head < K; head++, row += (int64_t)P * D) {
        job->kernels->rotate(kv->k + row, k + (int64_t)head * D, cosines, sines, D,
                             args->rotary_dim, args->is_interleaved);
        job->kernels->round(kv->v + row, v + (int64_t)head * D, D);
    }
}

static void rope_share(void *argument, int32_t thread, int32_t n_threads)
{
    const rope_job *job = argument;
    const mil_batch *batch = job->args->batch;
    int64_t begin, end;
    mil_cpu_share(batch->header->n_tokens, thread, n_threads, &begin, &end);
    int32_t s = 0;
    for (int32_t t = (int32_t)begin; t < (int32_t)end; t++) {
        while (batch->query_indptr[s + 1] <= t)
            s++;
        write_token(job, t, s, t - batch->query_indptr[s]);
    }
}

mil_status mil_cpu_rope_write(mil_context *context, const mil_rope_write_args *args)
{
    const mil_cpu_kernels *kernels = mil_cpu_kernels_of(context);
    rope_job job = {args, args->kv->dtype == MIL_DTYPE_F16 ? kernels->rope_f16 : kernels->rope};
    int64_t width = (args->n_heads + 2 * args->kv->n_kv_heads) * args->kv->head_dim;
    mil_cpu_run_sized(context, rope_share, &job, args->batch->header->n_tokens * width);
    return MIL_OK;
}
