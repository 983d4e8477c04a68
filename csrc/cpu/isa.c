/* Which instruction set runs: what the processor and the system offer, one fixed preference, and
 * MILPY_CPU_ISA to force another.
 *
 * AMX is not used: its tiles sum a product in another order than one chain per output, so its bits
 * would differ from every other path's. */
#include "cpu/cpu.h"

#include <stdlib.h>
#include <string.h>

#ifdef __x86_64__
#include <cpuid.h>
#endif

/* ---- the table of kernels ---- */

#define KERNELS(isa)                                                                               \
    const mil_cpu_kernels mil_cpu_kernels_##isa = {                                                \
        .name = #isa,                                                                              \
        .linear = &mil_cpu_linear_kernels_##isa,                                                   \
        .lora = &mil_cpu_lora_kernels_##isa,                                                       \
        .pack = &mil_cpu_pack_kernels_##isa,                                                       \
        .norm = &mil_cpu_norm_kernels_##isa,                                                       \
        .rope = &mil_cpu_rope_kernels_##isa,                                                       \
        .rope_f16 = &mil_cpu_rope_f16_kernels_##isa,                                               \
        .act = &mil_cpu_act_kernels_##isa,                                                         \
        .attention = &mil_cpu_attention_kernels_##isa,                                             \
        .attention_f16 = &mil_cpu_attention_f16_kernels_##isa,                                     \
        .sample = &mil_cpu_sample_kernels_##isa,                                                   \
    }

KERNELS(scalar);
#ifdef __x86_64__
KERNELS(avx2);
KERNELS(avx512);
KERNELS(avx512bf16);
#endif

/* ---- what this machine has ---- */

static const char *const isa_names[MIL_CPU_N_ISAS] = {"scalar", "avx2", "avx512", "avx512bf16"};

#ifdef __x86_64__

/* State that the system saves on a switch: without it the instructions fault. */
static uint64_t enabled_state(void)
{
    uint32_t low;
    uint32_t high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((uint64_t)high << 32) | low;
}

static bool has_bits(uint64_t value, uint64_t bits)
{
    return (value & bits) == bits;
}

static mil_cpu_isa_id widest(void)
{
    const uint32_t osxsave = 1u << 27, avx = 1u << 28, fma = 1u << 12, f16c = 1u << 29;
    const uint32_t avx2 = 1u << 5, avx512f = 1u << 16, avx512dq = 1u << 17, avx512bw = 1u << 30;
    const uint32_t avx512vl = 1u << 31, avx512_bf16 = 1u << 5;
    const uint64_t ymm_state = 0x6, zmm_state = 0xe6;
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has_bits(c, osxsave | avx | fma | f16c))
        return MIL_CPU_SCALAR;
    uint64_t state = enabled_state();
    uint32_t b7;
    if (!has_bits(state, ymm_state) || !__get_cpuid_count(7, 0, &a, &b7, &c, &d) ||
        !has_bits(b7, avx2))
        return MIL_CPU_SCALAR;
    if (!has_bits(state, zmm_state) || !has_bits(b7, avx512f | avx512dq | avx512bw | avx512vl))
        return MIL_CPU_AVX2;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !has_bits(a, avx512_bf16))
        return MIL_CPU_AVX512;
    return MIL_CPU_AVX512BF16;
}

/* vdpbf16ps runs at twice the rate of fp32 FMA on AMD (Zen 4 and 5), but at half of it on Intel
 * (107 against 214 GFLOP/s a core, 2026-11-23, benchmarks/bench_linear.c). */
static bool is_bf16_faster(void)
{
    uint32_t a, b, c, d;
    char vendor[12];
    if (!__get_cpuid(0, &a, &b, &c, &d))
        return false;
    memcpy(vendor, &b, 4);
    memcpy(vendor + 4, &d, 4);
    memcpy(vendor + 8, &c, 4);
    return memcmp(vendor, "AuthenticAMD", 12) == 0 || memcmp(vendor, "HygonGenuine", 12) == 0;
}

#else

static mil_cpu_isa_id widest(void)
{
    return MIL_CPU_SCALAR;
}

static bool is_bf16_faster(void)
{
    return false;
}

#endif

/* ---- the choice ---- */

static const char *available_on(mil_cpu_isa_id has, bool bf16_faster)
{
    switch (has) {
    case MIL_CPU_AVX512BF16:
        return bf16_faster ? "avx512bf16 avx512 avx2 scalar" : "avx512 avx512bf16 avx2 scalar";
    case MIL_CPU_AVX512:
        return "avx512 avx2 scalar";
    case MIL_CPU_AVX2:
        return "avx2 scalar";
    default:
        return "scalar";
    }
}

mil_status mil_cpu_isa_choose(mil_cpu_isa_id *chosen, const char **available)
{
    mil_cpu_isa_id has = widest();
    bool bf16_faster = is_bf16_faster();
    *available = available_on(has, bf16_faster);
    const char *forced = getenv("MILPY_CPU_ISA");
    if (forced == NULL || forced[0] == '\0') {
        *chosen = has == MIL_CPU_AVX512BF16 && !bf16_faster ? MIL_CPU_AVX512 : has;
        return MIL_OK;
    }
    for (int32_t i = 0; i <= (int32_t)has; i++) {
        if (strcmp(forced, isa_names[i]) == 0) {
            *chosen = (mil_cpu_isa_id)i;
            return MIL_OK;
        }
    }
    return mil_fail(MIL_ERR_ARGUMENT,
                    "MILPY_CPU_ISA is \"%s\", expected one that this machine has: %s", forced,
                    *available);
}

mil_status mil_cpu_isa(const char **in_use, const char **available)
{
    mil_cpu_isa_id chosen;
    MIL_TRY(mil_cpu_isa_choose(&chosen, available));
    *in_use = isa_names[chosen];
    return MIL_OK;
}
