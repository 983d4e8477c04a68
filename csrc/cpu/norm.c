/* RMSNorm with the residual's sum before it; the formula is norm_simd.c's. Rows are shared out. */
#include "cpu/cpu.h"

typedef struct norm_job {
    const mil_norm_args *args;
    const mil_cpu_norm_kernels *kernels;
} norm_job;

static void norm_share(void *argument, int32_t thread, int32_t n_threads)
{
    const norm_job *job = argument;
    const mil_norm_args *args = job->args;
    const float *residual = args->residual;
    int64_t begin, end;
    mil_cpu_share(args->n_rows, thread, n_threads, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        int64_t row = args->rows == NULL ? i : args->rows[i];
        float *x = args->x + row * args->hidden;
        if (residual != NULL)
            job->kernels->add(x, residual + row * args->hidden, args->hidden);
        if (args->out != NULL)
            job->kernels->norm(args->out + i * args->hidden, x, args->weight, args->hidden,
                               args->eps, args->weight_offset);
    }
}

mil_status mil_cpu_norm(mil_context *context, const mil_norm_args *args)
{
    norm_job job = {args, mil_cpu_kernels_of(context)->norm};
    mil_cpu_run_sized(context, norm_share, &job, (int64_t)args->n_rows * args->hidden);
    return MIL_OK;
}
