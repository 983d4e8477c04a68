/* Counts launches that the order tests are to reach, so that a switch that is on does something and
 * the traffic meets what shares the workspace. Calls come by here at link time (--wrap): nothing
 * else of the build knows of it. What a graph replays was counted when it was captured. */
#include "chaos.h"

#include "kernels/cuda.h"

#include <string.h>

cudaError_t __real_cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel,
                                       void **args);
cudaError_t __wrap_cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel,
                                       void **args);
mil_status __real_mil_cuda_lora_shrink(mil_context *context, const mil_lora_shrink_args *args)
    MIL_WARN_UNUSED;
mil_status __wrap_mil_cuda_lora_shrink(mil_context *context, const mil_lora_shrink_args *args)
    MIL_WARN_UNUSED;
mil_status __real_mil_cuda_status(cudaError_t error, const char *what) MIL_WARN_UNUSED;
mil_status __wrap_mil_cuda_status(cudaError_t error, const char *what) MIL_WARN_UNUSED;

cudaError_t __wrap_cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel,
                                       void **args)
{
    for (unsigned i = 0; i < config->numAttrs; i++) {
        const cudaLaunchAttribute *attribute = &config->attrs[i];
        if (attribute->id == cudaLaunchAttributeProgrammaticStreamSerialization &&
            attribute->val.programmaticStreamSerializationAllowed)
            mil_chaos_count(MIL_CHAOS_PDL);
    }
    return __real_cudaLaunchKernelExC(config, kernel, args);
}

mil_status __wrap_mil_cuda_lora_shrink(mil_context *context, const mil_lora_shrink_args *args)
{
    if (context->queue->stream == context->queue->side)
        mil_chaos_count(MIL_CHAOS_SIDE);
    return __real_mil_cuda_lora_shrink(context, args);
}

/* Every launch ends here, by its name. */
mil_status __wrap_mil_cuda_status(cudaError_t error, const char *what)
{
    if (strcmp(what, "product's splits") == 0)
        mil_chaos_count(MIL_CHAOS_SPLITS);
    if (strcmp(what, "bias of a product") == 0)
        mil_chaos_count(MIL_CHAOS_BIAS);
    return __real_mil_cuda_status(error, what);
}
