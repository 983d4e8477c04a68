/* Sampling's passes over a row of logits: maxima of fixed blocks, sums of exponentials of fixed
 * segments, the ids at or above a threshold, a rank. What is chosen is sample.c's. */
#include "cpu/cpu.h"
#include "cpu/lanes.h"

#include <math.h>

static int width_at(int32_t i, int32_t n)
{
    return n - i < MIL_LANES ? n - i : MIL_LANES;
}

/* Lanes past the row's end take no part. */
static mil_lanes load_or_low(const float *x, int32_t i, int32_t n)
{
    int width = width_at(i, n);
    return lanes_keep(lanes_load_n(x + i, width), 0, width, lanes_set(-INFINITY));
}

static float maxima(float *block_max, const float *x, int32_t n)
{
    mil_lanes all = lanes_set(-INFINITY);
    uint32_t nan = 0;
    for (int32_t block = 0; block < n; block += MIL_CPU_SAMPLE_BLOCK) {
        int32_t end = block + MIL_CPU_SAMPLE_BLOCK < n ? block + MIL_CPU_SAMPLE_BLOCK : n;
        mil_lanes top = lanes_set(-INFINITY);
        for (int32_t i = block; i < end; i += MIL_LANES) {
            mil_lanes v = load_or_low(x, i, end);
            nan |= lanes_is_nan(v);
            top = lanes_max(v, top);
        }
        block_max[block / MIL_CPU_SAMPLE_BLOCK] = lanes_top(top);
        all = lanes_max(top, all);
    }
    return nan != 0 ? NAN : lanes_top(all);
}

static mil_lanes weight(mil_lanes x, float top, float factor)
{
    return lanes_exp(lanes_mul(lanes_sub(x, lanes_set(top)), lanes_set(factor)));
}

static float sum_weights(const float *x, int32_t n, float top, float factor)
{
    mil_lanes sum = lanes_zero();
    for (int32_t i = 0; i < n; i += MIL_LANES) {
        mil_lanes w = weight(lanes_load_n(x + i, width_at(i, n)), top, factor);
        sum = lanes_add(sum, lanes_keep(w, 0, width_at(i, n), lanes_zero()));
    }
    return lanes_sum(sum);
}

static void weights(float *out, const float *x, int32_t n, float top, float factor)
{
    for (int32_t i = 0; i < n; i += MIL_LANES)
        lanes_store_n(out + i, weight(lanes_load_n(x + i, width_at(i, n)), top, factor),
                      width_at(i, n));
}

static int32_t collect(int32_t *ids, const float *x, int32_t n, const float *block_max,
                       float threshold)
{
    int32_t n_ids = 0;
    for (int32_t block = 0; block < n; block += MIL_CPU_SAMPLE_BLOCK) {
        if (!(block_max[block / MIL_CPU_SAMPLE_BLOCK] >= threshold))
            continue;
        int32_t end = block + MIL_CPU_SAMPLE_BLOCK < n ? block + MIL_CPU_SAMPLE_BLOCK : n;
        for (int32_t i = block; i < end; i += MIL_LANES) {
            mil_lanes v = lanes_load_n(x + i, width_at(i, end));
            uint32_t mask = lanes_not_less(v, lanes_set(threshold));
            mask &= (1u << width_at(i, end)) - 1u;
            for (; mask != 0; mask &= mask - 1)
                ids[n_ids++] = i + __builtin_ctz(mask);
        }
    }
    return n_ids;
}

static int32_t count_before(const float *x, int32_t n, int32_t id)
{
    int32_t count = 0;
    mil_lanes value = lanes_set(x[id]);
    for (int32_t i = 0; i < n; i += MIL_LANES) {
        int width = width_at(i, n);
        mil_lanes v = lanes_load_n(x + i, width);
        uint32_t earlier = id <= i ? 0 : id - i < width ? (1u << (id - i)) - 1u : 0xffffu;
        uint32_t mask = lanes_greater(v, value) | (lanes_equal(v, value) & earlier);
        count += __builtin_popcount(mask & ((1u << width) - 1u));
    }
    return count;
}

static float log_of(float x)
{
    float all[MIL_LANES];
    lanes_store(all, lanes_log(lanes_set(x)));
    return all[0];
}

const mil_cpu_sample_kernels MIL_CPU_NAME(mil_cpu_sample_kernels) = {
    .maxima = maxima,
    .sum_weights = sum_weights,
    .weights = weights,
    .collect = collect,
    .count_before = count_before,
    .log = log_of,
};
