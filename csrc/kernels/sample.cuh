/* What sampling's kernels share: a row with its scratch, logits as integers that sort, weights as
 * integers that add in any order, and how a block reads a row, scans, and takes a least value.
 *
 * A weight e^((x - top) * factor) is at most 1 and is held as a multiple of 2^-44, its mass. Sums
 * of masses are exact, so neither the order of threads nor that of blocks can change a bit; a mass
 * of 0 (weights under 2^-45) is never drawn: 2^19 such ids weigh less than 2^-26 of the best one.
 */
#pragma once

#include "kernels/common.cuh"

#include <float.h>
#include <math.h>

#define SEGMENT 4096 /* ids that one block of the passes reads; so V alone shapes them */
#define GROUP 64     /* ids that share one stored maximum: half a warp's 16-byte loads */
#define MASS_BITS 44
#define MAX_VOCAB (1 << 19) /* so that masses sum to at most 2^63 */

#define WORST_KEY 0xff800000u /* of -infinity, the last key that a logit can have */

struct sample_job {
    mil_sample *out;
    const float *logits; /* [n_rows, ld] */
    int64_t ld;
    const mil_plan_header *counts;
    const int32_t *logit_slots, *logit_feeds, *logit_positions;
    const mil_sampling *sampling; /* [n_slots] */
    int32_t *last_token;          /* [n_slots] */
    char *workspace;
    int64_t row_bytes;
    int32_t n_slots, first_row, vocab, n_segments, n_groups;
};

/* One row of logits and what the passes leave of it. */
struct sample_row {
    const float *x; /* [V] */
    bool is_aligned;
    int32_t vocab, n_segments, n_groups;
    uint64_t *raw;      /* [n_segments] masses, factor 1; where logprobs are asked for */
    uint64_t *tempered; /* [n_segments] masses, factor 1 / temperature; where top-k does not cut */
    float *segment_max; /* [n_segments]; NaN where the segment holds one */
    float *group_max;   /* [n_groups]; NaN where the group holds one */
};

static inline int64_t sample_row_bytes(int64_t n_segments, int64_t n_groups)
{
    int64_t n_bytes = n_segments * (2 * (int64_t)sizeof(uint64_t) + (int64_t)sizeof(float)) +
                      n_groups * (int64_t)sizeof(float);
    return (n_bytes + 15) / 16 * 16;
}

static __device__ __forceinline__ sample_row row_of(const sample_job &job, int32_t index)
{
    sample_row row;
    row.x = job.logits + index * job.ld;
    row.is_aligned = (uintptr_t)row.x % 16 == 0;
    row.vocab = job.vocab;
    row.n_segments = job.n_segments;
    row.n_groups = job.n_groups;
    row.raw = (uint64_t *)(job.workspace + index * job.row_bytes);
    row.tempered = row.raw + job.n_segments;
    row.segment_max = (float *)(row.tempered + job.n_segments);
    row.group_max = row.segment_max + job.n_segments;
    return row;
}

/* at: a logit row of the batch. */
static __device__ __forceinline__ int32_t slot_of(const sample_job &job, int32_t at)
{
    return min(max(job.logit_slots[at], 0), job.n_slots - 1);
}

static __device__ __forceinline__ bool cuts_by_k(const mil_sampling &sampling, int32_t vocab)
{
    return sampling.top_k > 0 && sampling.top_k < vocab;
}

/* Finite and not 0, so that the best logit's weight is 1 whatever the temperature. */
static __device__ __forceinline__ float factor_of(const mil_sampling &sampling)
{
    return fmaxf(fminf(1.0f / sampling.temperature, FLT_MAX), FLT_MIN);
}

/* ---- values ---- */

/* -0 and denormals become +0: equal logits have equal bits. */
static __device__ __forceinline__ float clean(float x)
{
    float out;
    asm("add.ftz.f32 %0, %1, 0f00000000;" : "=f"(out) : "f"(x));
    return out;
}

/* NaN where either is. */
static __device__ __forceinline__ float max_or_nan(float a, float b)
{
    float out;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
    return out;
}

/* Ascends as x descends, over clean values. */
static __device__ __forceinline__ uint32_t key_of(float x)
{
    uint32_t bits = __float_as_uint(x);
    return (bits & 0x80000000u) != 0 ? bits : ~(bits | 0x80000000u);
}

static __device__ __forceinline__ float value_of(uint32_t key)
{
    return __uint_as_float((key & 0x80000000u) != 0 ? key : ~key & 0x7fffffffu);
}

/* A function of its arguments alone, so that sums of different kernels agree: no contraction. */
static __device__ __forceinline__ uint64_t mass_of(float x, float top, float factor)
{
    float weight = expf(__fmul_rn(__fsub_rn(x, top), factor));
    return __float2ull_rn(__fmul_rn(weight, (float)(1ull << MASS_BITS)));
}

/* ---- reading ---- */

/* Clean logits id .. id + 3, id a multiple of 4; -infinity past the row's end. */
static __device__ __forceinline__ void load4(float *out, const sample_row &row, int32_t id)
{
    if (row.is_aligned && id + 4 <= row.vocab) {
        float4 v = *(const float4 *)(row.x + id);
        out[0] = clean(v.x);
        out[1] = clean(v.y);
        out[2] = clean(v.z);
        out[3] = clean(v.w);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        out[i] = id + i < row.vocab ? clean(row.x[id + i]) : -INFINITY;
}

/* The row's largest logit, for every thread of a warp. */
static __device__ __forceinline__ float top_of(const sample_row &row)
{
    float top = -INFINITY;
    for (int32_t i = threadIdx.x % MIL_WARP; i < row.n_segments; i += MIL_WARP)
        top = max_or_nan(top, row.segment_max[i]);
#pragma unroll
    for (int offset = MIL_WARP / 2; offset > 0; offset /= 2)
        top = max_or_nan(top, __shfl_xor_sync(0xffffffffu, top, offset));
    return top;
}

/* ---- a block of n_warps warps ---- */

template <int n_warps>
struct sample_scratch {
    uint64_t sums[n_warps];
    int32_t least[n_warps];
};

static __device__ __forceinline__ uint64_t warp_sum(uint64_t x)
{
#pragma unroll
    for (int offset = MIL_WARP / 2; offset > 0; offset /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

/* The sum over the threads before this one, and over all. */
template <int n_warps>
static __device__ __forceinline__ uint64_t block_scan(sample_scratch<n_warps> &scratch, uint64_t x,
                                                      uint64_t *total)
{
    int lane = threadIdx.x % MIL_WARP, warp = threadIdx.x / MIL_WARP;
    uint64_t sum = x;
#pragma unroll
    for (int offset = 1; offset < MIL_WARP; offset *= 2) {
        uint64_t before = __shfl_up_sync(0xffffffffu, sum, offset);
        sum += lane >= offset ? before : 0;
    }
    __syncthreads(); /* whoever still reads the scan before */
    if (lane == MIL_WARP - 1)
        scratch.sums[warp] = sum;
    __syncthreads();
    uint64_t base = 0, all = 0;
#pragma unroll
    for (int i = 0; i < n_warps; i++) {
        base += i < warp ? scratch.sums[i] : 0;
        all += scratch.sums[i];
    }
    *total = all;
    return base + sum - x;
}

template <int n_warps>
static __device__ __forceinline__ int32_t block_min(sample_scratch<n_warps> &scratch, int32_t x)
{
    int32_t least = __reduce_min_sync(0xffffffffu, x);
    __syncthreads();
    if (threadIdx.x % MIL_WARP == 0)
        scratch.least[threadIdx.x / MIL_WARP] = least;
    __syncthreads();
    for (int i = 0; i < n_warps; i++)
        least = min(least, scratch.least[i]);
    return least;
}
