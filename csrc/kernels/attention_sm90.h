/* Attention's Hopper path, called by attention.cu where mil_attention_is_sm90 says so. */
#pragma once

#include "kernels/attention.cuh"

/* Queue the chunks at the front of the step's list; bucket_chunks > 0. */
extern "C" mil_status mil_cuda_attention_sm90(mil_context *, const mil_attention_args *,
                                              const mil_attention_places *);
