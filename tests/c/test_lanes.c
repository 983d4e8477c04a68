/* The polynomials and roundings of cpu/lanes.h against libm and base/bf16.h, on the portable
 * section: that the others return the same bits is tests/cpu's business. */
#include "cpu/lanes.h"

#include "base/bf16.h"
#include "test.h"

#include <math.h>

static float first(mil_lanes a)
{
    float all[MIL_LANES];
    lanes_store(all, a);
    return all[0];
}

static double relative(double found, double expected)
{
    return fabs(found - expected) / fabs(expected);
}

TEST(exp_is_good_to_a_ten_millionth)
{
    for (float x = -86.9f; x < 88.0f; x += 0.0037f)
        CHECK(relative(first(lanes_exp(lanes_set(x))), exp((double)x)) < 1e-7);
}

TEST(coarse_exp_is_good_to_four_millionths)
{
    for (float x = -86.9f; x <= 0.0f; x += 0.0037f)
        CHECK(relative(first(lanes_exp_coarse(lanes_set(x))), exp((double)x)) < 4e-6);
}

TEST(exp_ends_as_softmax_needs_it)
{
    CHECK(first(lanes_exp(lanes_set(0.0f))) == 1.0f);
    CHECK(first(lanes_exp_coarse(lanes_set(0.0f))) == 1.0f);
    CHECK(lane_bits(first(lanes_exp(lanes_set(-INFINITY)))) == 0);
    CHECK(lane_bits(first(lanes_exp_coarse(lanes_set(-INFINITY)))) == 0);
    CHECK(isnan(first(lanes_exp(lanes_set(NAN)))));
    CHECK(isnan(first(lanes_exp_coarse(lanes_set(NAN)))));
    CHECK(isfinite(first(lanes_exp(lanes_set(INFINITY)))));
}

TEST(log_is_good_to_two_ten_millionths)
{
    for (float x = 1e-35f; x < 1e35f; x *= 1.0037f)
        CHECK(relative(first(lanes_log(lanes_set(x))), log((double)x)) < 2e-7);
    for (float x = 0.9f; x < 1.1f; x += 0.00013f)
        CHECK(relative(first(lanes_log(lanes_set(x))), log((double)x)) < 2e-7);
    CHECK(first(lanes_log(lanes_set(1.0f))) == 0.0f);
}

TEST(tanh_is_good_to_two_ten_millionths_absolute)
{
    for (float x = -50.0f; x < 50.0f; x += 0.0017f)
        CHECK(fabs(first(lanes_tanh(lanes_set(x))) - tanh((double)x)) < 2e-7);
}

TEST(bf16_rounding_is_the_cores)
{
    for (uint32_t bits = 0; bits < 0xfffff000u; bits += 0xfef) {
        uint16_t rounded;
        lanes_store_bf16_n(&rounded, lanes_set(lane_of_bits(bits)), 1);
        CHECK_INT(rounded, mil_bf16_from_float(lane_of_bits(bits)));
    }
}

TEST(rounding_away_differs_from_even_only_at_halves)
{
    for (uint32_t bits = 0x00800000u; bits < 0x7f000000u; bits += 0xfef) {
        float x = lane_of_bits(bits);
        uint32_t away = lane_bits(first(lanes_round_bf16_away(lanes_set(x)))) >> 16;
        if ((bits & 0xffffu) == 0x8000u)
            CHECK_INT(away, (bits >> 16) + 1);
        else
            CHECK_INT(away, mil_bf16_from_float(x));
    }
}

TEST(sums_follow_the_tree)
{
    /* 2^24 + 1 is not a float32: only i with i + 8 first gives every 1 a partner that it survives.
     */
    float x[MIL_LANES] = {0};
    x[0] = 16777216.0f;
    x[8] = -16777216.0f;
    x[1] = x[9] = x[4] = 1.0f;
    CHECK(lanes_sum(lanes_load(x)) == 3.0f);
    float tail[3] = {1.0f, 2.0f, 4.0f};
    CHECK(lanes_sum(lanes_load_n(tail, 3)) == 7.0f);
}

TEST(transpose_keeps_bits)
{
    uint32_t bits[MIL_LANES][MIL_LANES];
    mil_lanes m[MIL_LANES];
    for (uint32_t i = 0; i < MIL_LANES; i++)
        for (uint32_t j = 0; j < MIL_LANES; j++)
            bits[i][j] = 0x7f800001u + 16 * i + j; /* signalling NaNs among them */
    memcpy(m, bits, sizeof m);
    lanes_transpose(m);
    for (int i = 0; i < MIL_LANES; i++)
        for (int j = 0; j < MIL_LANES; j++)
            CHECK(memcmp(&m[i].v[j], &bits[j][i], sizeof(float)) == 0);
}

TEST_MAIN()
