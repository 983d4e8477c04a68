/* How much workspace the ops need: they run one after another, so the largest need decides. */
#include "cpu/cpu.h"

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

size_t mil_cpu_workspace_bytes(const mil_maxima *maxima)
{
    size_t attention_width = (size_t)maxima->n_heads * (size_t)maxima->head_dim;
    size_t widest_input =
        larger(larger((size_t)maxima->hidden, (size_t)maxima->ffn), attention_width);
    size_t need =
        mil_cpu_linear_workspace(maxima->max_tokens, (int32_t)widest_input, maxima->n_threads);
    need = larger(need, mil_cpu_attention_workspace(maxima));
    return larger(need, mil_cpu_sample_workspace(maxima));
}
