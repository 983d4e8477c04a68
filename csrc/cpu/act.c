/* SwiGLU's elementwise half; the formula is act_simd.c's. Rows are shared out. */
#include "cpu/cpu.h"

typedef struct act_job {
    const mil_act_args *args;
    const mil_cpu_act_kernels *kernels;
} act_job;

static void act_share(void *argument, int32_t thread, int32_t n_threads)
{
    const act_job *job = argument;
    const mil_act_args *args = job->args;
    const float *gate_up = args->gate_up;
    int64_t begin, end;
    mil_cpu_share(args->n_tokens, thread, n_threads, &begin, &end);
    for (int64_t t = begin; t < end; t++)
        job->kernels->silu_mul(args->out + t * args->ffn, gate_up + t * 2 * args->ffn, args->ffn,
                               args->interleave);
}

mil_status mil_cpu_act(mil_context *context, const mil_act_args *args)
{
    if (args->kind != MIL_ACTIVATION_SILU)
        return mil_fail(MIL_ERR_UNSUPPORTED, "act: kind is %d, expected %d (silu)", (int)args->kind,
                        (int)MIL_ACTIVATION_SILU);
    act_job job = {args, mil_cpu_kernels_of(context)->act};
    mil_cpu_run_sized(context, act_share, &job, (int64_t)args->n_tokens * args->ffn);
    return MIL_OK;
}
