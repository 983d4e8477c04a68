#include "model/rope.h"

#include <math.h>
#include <string.h>

#define TWO_PI 6.283185307179586476925286766559

/* _compute_llama3_parameters: high frequencies stay, low ones are divided, a band between is mixed.
 */
static double llama3_frequency(const mil_rope_config *rope, double frequency)
{
    double original = (double)rope->original_max_position;
    double wavelength = TWO_PI / frequency;
    if (wavelength > original / rope->low_freq_factor)
        return frequency / rope->factor;
    if (wavelength < original / rope->high_freq_factor)
        return frequency;
    double smooth = (original / wavelength - rope->low_freq_factor) /
                    (rope->high_freq_factor - rope->low_freq_factor);
    return (1.0 - smooth) * frequency / rope->factor + smooth * frequency;
}

static double frequency_of(const mil_rope_config *rope, int32_t pair, int32_t rotary_dim)
{
    /* Rounded here as well because transformers scales what it has rounded. */
    double frequency = (float)(1.0 / pow(rope->theta, (double)(2 * pair) / (double)rotary_dim));
    switch (rope->kind) {
    case MIL_ROPE_LINEAR:
        return frequency / rope->factor;
    case MIL_ROPE_LLAMA3:
        return llama3_frequency(rope, frequency);
    case MIL_ROPE_DEFAULT:
        break;
    }
    return frequency;
}

mil_status mil_rope_init(mil_rope *rope, const mil_config *config)
{
    memset(rope, 0, sizeof *rope);
    rope->n_pairs = config->head_dim / 2;
    rope->max_position = config->max_position;
    size_t table = mil_round_up((size_t)config->max_position * (size_t)rope->n_pairs, 16);
    MIL_TRY(mil_slab_init(&rope->slab, 2 * table * sizeof(float), "rope tables"));
    rope->cos_table = rope->slab.data;
    rope->sin_table = rope->cos_table + table;
    for (int32_t pair = 0; pair < rope->n_pairs; pair++)
        rope->frequencies[pair] = (float)frequency_of(&config->rope, pair, config->head_dim);
    return MIL_OK;
}

void mil_rope_deinit(mil_rope *rope)
{
    mil_slab_deinit(&rope->slab);
    memset(rope, 0, sizeof *rope);
}

void mil_rope_reach(mil_rope *rope, int32_t n_positions)
{
    int32_t end = n_positions < rope->max_position ? n_positions : rope->max_position;
    for (int32_t position = rope->n_ready; position < end; position++) {
        size_t row = (size_t)position * (size_t)rope->n_pairs;
        for (int32_t pair = 0; pair < rope->n_pairs; pair++) {
            double angle = (float)position * rope->frequencies[pair];
            rope->cos_table[row + (size_t)pair] = (float)cos(angle);
            rope->sin_table[row + (size_t)pair] = (float)sin(angle);
        }
    }
    if (end > rope->n_ready)
        rope->n_ready = end;
}
