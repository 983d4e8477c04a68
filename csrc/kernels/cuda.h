/* What the CUDA backend's files share on the host: a rank's queue, launches, errors.
 *
 * One queue is one rank's place on one device: a stream that every op runs on, one for work beside
 * it and one for what comes to the device, handles, and what was read off it. Ops never allocate,
 * never wait, and launch so that they can be captured in a graph. Errors of a launch are read and
 * cleared at once; a fault inside a kernel surfaces at the step's fence and is final. */
#pragma once

#include "ops/backend.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Which kernels run: `x.cu` anywhere, `x_sm90.cu` on Hopper alone where an op has one.
 * MILPY_CUDA_PATH=portable forces the first. */
typedef enum mil_cuda_path { MIL_CUDA_PORTABLE = 0, MIL_CUDA_SM90 } mil_cuda_path;

struct mil_cublas; /* cublas.h: cuBLASLt's handle, workspace and table of algorithms */

typedef struct mil_queue {
    int32_t ordinal;
    mil_cuda_path path;
    int32_t n_sms;
    size_t n_free_at_open; /* device memory, before the queue took any */
    char label[288];       /* "cuda:0 (NVIDIA H200)", for messages */
    cudaStream_t stream;
    cudaStream_t side;   /* joins stream again before an op returns */
    cudaStream_t copies; /* waits for no op: what comes to the device */
    cudaEvent_t fork, join;
    cudaEvent_t fences[MIL_N_FENCES];
    struct mil_cublas *cublas;
    void *context;                   /* the device's primary one */
    void *get_context, *set_context; /* cuCtxGetCurrent, cuCtxSetCurrent: driver.c's */
    void *encode_tiled;              /* tensor_map.h: the driver's, on the Hopper path */
    bool has_pdl;  /* programmatic dependent launch, MILPY_CUDA_PDL=0 turns it off */
    bool has_side; /* work beside the stream, MILPY_CUDA_SIDE=0 turns it off */
} mil_queue;

/* MIL_OK, or a status whose message says what was tried and what CUDA answered. Clears the error.
 */
mil_status mil_cuda_status(cudaError_t error, const char *what) MIL_WARN_UNUSED;

#define MIL_CUDA_TRY(call) MIL_TRY(mil_cuda_status((call), #call))

/* ---- ops, one file each; the table is backend.c's ---- */

mil_status mil_cuda_begin(mil_context *, const mil_begin_args *);
mil_status mil_cuda_embed(mil_context *, const mil_embed_args *);
mil_status mil_cuda_norm(mil_context *, const mil_norm_args *);
mil_status mil_cuda_linear(mil_context *, const mil_linear_args *);
mil_status mil_cuda_lora_shrink(mil_context *, const mil_lora_shrink_args *);
mil_status mil_cuda_lora_expand(mil_context *, const mil_lora_expand_args *);
mil_status mil_cuda_linear_lora(mil_context *, const mil_linear_args *, const mil_lora_args *lora);
mil_status mil_cuda_rope_write(mil_context *, const mil_rope_write_args *);
mil_status mil_cuda_attention(mil_context *, const mil_attention_args *);
mil_status mil_cuda_act(mil_context *, const mil_act_args *);
mil_status mil_cuda_sample(mil_context *, const mil_sample_args *);

/* Parts of workspace and of step_data that an op needs; backend.c takes the largest workspace and
 * lays the parts of step_data side by side. Each is a multiple of 256 bytes. */
size_t mil_cuda_linear_workspace(const mil_maxima *maxima);
size_t mil_cuda_attention_workspace(const mil_maxima *maxima);
size_t mil_cuda_sample_workspace(const mil_maxima *maxima);
size_t
mil_cuda_attention_step_bytes(const mil_maxima *maxima); /* its list of work, made once a step */

/* Queue what attention plans for a step, after the plan's copy; called by mil_cuda_begin. Reads the
 * batch's counts and lengths on the device and writes step_data. */
mil_status mil_cuda_attention_plan(mil_context *, const mil_begin_args *);

#ifdef __cplusplus
}
#endif
