#include "model/config.h"

#include <math.h>

static mil_status check_sizes(const mil_config *config)
{
    /* A bound that keeps products of any two in an int64_t and rows of any one in an int32_t. */
    const int32_t most = 1 << 24;
    const struct {
        const char *name;
        int32_t value, most;
    } sizes[] = {
        {"hidden", config->hidden, most},
        {"ffn", config->ffn, most},
        {"n_layers", config->n_layers, 4096},
        {"n_heads", config->n_heads, 1 << 16},
        {"n_kv_heads", config->n_kv_heads, 1 << 16},
        {"vocab", config->vocab, most},
        {"max_position", config->max_position, INT32_MAX},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        if (sizes[i].value < 1 || sizes[i].value > sizes[i].most)
            return mil_fail(MIL_ERR_ARGUMENT, "config: %s is %d, expected 1..%d", sizes[i].name,
                            sizes[i].value, sizes[i].most);
    if (config->n_heads % config->n_kv_heads != 0)
        return mil_fail(MIL_ERR_ARGUMENT,
                        "config: n_heads is %d, expected a multiple of n_kv_heads, %d",
                        config->n_heads, config->n_kv_heads);
    if (config->head_dim < 32 || config->head_dim > 256 || config->head_dim % 8 != 0)
        return mil_fail(MIL_ERR_UNSUPPORTED,
                        "config: head_dim is %d, expected a multiple of 8 in 32..256",
                        config->head_dim);
    return MIL_OK;
}

static mil_status check_rope(const mil_rope_config *rope)
{
    if (!isfinite(rope->theta) || rope->theta <= 0)
        return mil_fail(MIL_ERR_ARGUMENT, "config: rope theta is %g, expected > 0", rope->theta);
    if (rope->kind == MIL_ROPE_DEFAULT)
        return MIL_OK;
    if (rope->kind != MIL_ROPE_LINEAR && rope->kind != MIL_ROPE_LLAMA3)
        return mil_fail(MIL_ERR_UNSUPPORTED,
                        "config: rope kind is %d, expected default, linear or llama3",
                        (int)rope->kind);
    if (!isfinite(rope->factor) || rope->factor < 1)
        return mil_fail(MIL_ERR_ARGUMENT, "config: rope factor is %g, expected >= 1", rope->factor);
    if (rope->kind == MIL_ROPE_LINEAR)
        return MIL_OK;
    if (!(rope->low_freq_factor > 0) || !(rope->high_freq_factor > rope->low_freq_factor) ||
        !isfinite(rope->high_freq_factor) || rope->original_max_position < 1)
        return mil_fail(
            MIL_ERR_ARGUMENT,
            "config: llama3 rope has low_freq_factor %g, high_freq_factor %g and original "
            "length %lld, expected 0 < low < high and a length >= 1",
            rope->low_freq_factor, rope->high_freq_factor, (long long)rope->original_max_position);
    return MIL_OK;
}

mil_status mil_config_check(const mil_config *config)
{
    MIL_TRY(check_sizes(config));
    if (!isfinite(config->rms_eps) || config->rms_eps <= 0)
        return mil_fail(MIL_ERR_ARGUMENT, "config: rms_eps is %g, expected > 0",
                        (double)config->rms_eps);
    return check_rope(&config->rope);
}
