#define _GNU_SOURCE
#include "roofs.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_THREADS 256
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#define AVX512BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define AVX2 __attribute__((target("avx2,fma")))

/* Results of loops go here, so that no loop is dropped. */
static volatile float sink;

typedef struct share {
    void (*work)(struct share *);
    const char *from;
    char *to;
    size_t n_bytes;
    long n_rounds;
    int cpu;
    pthread_barrier_t *start;
    double seconds;
} share;

EXPORT double roof_clock_s(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void *run_share(void *argument)
{
    share *mine = argument;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(mine->cpu, &set);
    sched_setaffinity(0, sizeof set, &set);
    pthread_barrier_wait(mine->start);
    double begin = roof_clock_s();
    mine->work(mine);
    mine->seconds = roof_clock_s() - begin;
    return NULL;
}

/* Seconds of the slowest thread over equal shares. */
static double run(void (*work)(share *), const char *from, char *to, size_t n_bytes, long n_rounds,
                  int n_threads, const int *cpus)
{
    pthread_t threads[MAX_THREADS];
    share shares[MAX_THREADS];
    pthread_barrier_t start;
    pthread_barrier_init(&start, NULL, (unsigned)n_threads);
    size_t each = n_bytes / (size_t)n_threads / 4096 * 4096;
    for (int i = 0; i < n_threads; i++) {
        shares[i] = (share){.work = work,
                            .from = from == NULL ? NULL : from + (size_t)i * each,
                            .to = to == NULL ? NULL : to + (size_t)i * each,
                            .n_bytes = each,
                            .n_rounds = n_rounds,
                            .cpu = cpus[i],
                            .start = &start};
        pthread_create(&threads[i], NULL, run_share, &shares[i]);
    }
    double slowest = 0;
    for (int i = 0; i < n_threads; i++) {
        pthread_join(threads[i], NULL);
        if (shares[i].seconds > slowest)
            slowest = shares[i].seconds;
    }
    pthread_barrier_destroy(&start);
    return slowest;
}

/* ---- read ---- */

AVX512 static void read_zmm(share *mine)
{
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (size_t i = 0; i < mine->n_bytes; i += 256) {
        const char *p = mine->from + i;
        a = _mm512_xor_si512(a, _mm512_load_si512(p));
        b = _mm512_xor_si512(b, _mm512_load_si512(p + 64));
        c = _mm512_xor_si512(c, _mm512_load_si512(p + 128));
        d = _mm512_xor_si512(d, _mm512_load_si512(p + 192));
    }
    a = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
    sink = (float)_mm512_reduce_add_epi32(a);
}

AVX512 static void read_zmm_prefetch(share *mine)
{
    __m512i a = _mm512_setzero_si512(), b = a;
    for (size_t i = 0; i < mine->n_bytes; i += 128) {
        const char *p = mine->from + i;
        _mm_prefetch(p + 2048, _MM_HINT_T0);
        _mm_prefetch(p + 2112, _MM_HINT_T0);
        a = _mm512_xor_si512(a, _mm512_load_si512(p));
        b = _mm512_xor_si512(b, _mm512_load_si512(p + 64));
    }
    sink = (float)_mm512_reduce_add_epi32(_mm512_xor_si512(a, b));
}

AVX512 static void read_two_streams(share *mine)
{
    __m512i a = _mm512_setzero_si512(), b = a;
    size_t half = mine->n_bytes / 2;
    for (size_t i = 0; i < half; i += 128) {
        const char *p = mine->from + i;
        a = _mm512_xor_si512(a, _mm512_load_si512(p));
        a = _mm512_xor_si512(a, _mm512_load_si512(p + 64));
        b = _mm512_xor_si512(b, _mm512_load_si512(p + half));
        b = _mm512_xor_si512(b, _mm512_load_si512(p + half + 64));
    }
    sink = (float)_mm512_reduce_add_epi32(_mm512_xor_si512(a, b));
}

AVX2 static void read_ymm(share *mine)
{
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (size_t i = 0; i < mine->n_bytes; i += 128) {
        const __m256i *p = (const __m256i *)(mine->from + i);
        a = _mm256_xor_si256(a, _mm256_load_si256(p));
        b = _mm256_xor_si256(b, _mm256_load_si256(p + 1));
        c = _mm256_xor_si256(c, _mm256_load_si256(p + 2));
        d = _mm256_xor_si256(d, _mm256_load_si256(p + 3));
    }
    a = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
    sink = (float)_mm256_extract_epi32(a, 0);
}

EXPORT double roof_read_gbs(const void *buffer, size_t n_bytes, int n_threads, const int *cpus)
{
    void (*const wide[])(share *) = {read_zmm, read_zmm_prefetch, read_two_streams, read_ymm};
    size_t first = __builtin_cpu_supports("avx512bw") ? 0 : 3;
    double best = 0;
    for (size_t i = first; i < sizeof wide / sizeof wide[0]; i++) {
        double rate =
            (double)n_bytes / 1e9 / run(wide[i], buffer, NULL, n_bytes, 0, n_threads, cpus);
        if (rate > best)
            best = rate;
    }
    return best;
}

static void copy(share *mine)
{
    memcpy(mine->to, mine->from, mine->n_bytes);
}

EXPORT double roof_copy_gbs(void *to, const void *from, size_t n_bytes, int n_threads,
                            const int *cpus)
{
    return (double)n_bytes / 1e9 / run(copy, from, to, n_bytes, 0, n_threads, cpus);
}

/* ---- arithmetic: twelve independent chains hide the latency of any of these units ---- */

#define CHAINS 12

/* Every loop over acc is unrolled, the short ones too: gcc 12 keeps the array in memory otherwise,
 * and the roof is then a third of what it is. The empty asm at the end takes the results, so that
 * no chain is dropped. */
#define CHAIN_LOOP(name, TARGET, vector, SET, STEP)                                                \
    TARGET static void name(share *mine)                                                           \
    {                                                                                              \
        vector acc[CHAINS];                                                                        \
        _Pragma("GCC unroll 12") for (int i = 0; i < CHAINS; i++) acc[i] = SET(1e-3f * (float)i);  \
        for (long r = 0; r < mine->n_rounds; r++) {                                                \
            _Pragma("GCC unroll 12") for (int i = 0; i < CHAINS; i++) acc[i] = STEP(acc[i]);       \
            __asm__ volatile("" ::: "memory");                                                     \
        }                                                                                          \
        _Pragma("GCC unroll 12") for (int i = 0; i < CHAINS; i++)                                  \
        {                                                                                          \
            __asm__ volatile("" ::"v"(acc[i]));                                                    \
        }                                                                                          \
    }

#define PAIRS ((__m512bh)_mm512_set1_epi32(0x3c003c01))
#define DOT_BF16(sum) _mm512_dpbf16_ps(sum, PAIRS, PAIRS)
#define FMA_ZMM(sum) _mm512_fmadd_ps(sum, _mm512_set1_ps(0.99f), _mm512_set1_ps(0.99f))
#define FMA_YMM(sum) _mm256_fmadd_ps(sum, _mm256_set1_ps(0.99f), _mm256_set1_ps(0.99f))

CHAIN_LOOP(dot_bf16, AVX512BF16, __m512, _mm512_set1_ps, DOT_BF16)
CHAIN_LOOP(fma_zmm, AVX512, __m512, _mm512_set1_ps, FMA_ZMM)
CHAIN_LOOP(fma_ymm, AVX2, __m256, _mm256_set1_ps, FMA_YMM)

static double gflops(void (*work)(share *), double flops_per_chain, int n_threads, const int *cpus)
{
    const long n_rounds = 4000000;
    double seconds = run(work, NULL, NULL, 0, n_rounds, n_threads, cpus);
    return flops_per_chain * CHAINS * (double)n_rounds * n_threads / 1e9 / seconds;
}

EXPORT double roof_fp32_avx2_gflops(int n_threads, const int *cpus)
{
    return gflops(fma_ymm, 16, n_threads, cpus);
}

EXPORT double roof_bf16_gflops(int n_threads, const int *cpus)
{
    double best = __builtin_cpu_supports("avx512bw") ? gflops(fma_zmm, 32, n_threads, cpus)
                                                     : roof_fp32_avx2_gflops(n_threads, cpus);
    if (__builtin_cpu_supports("avx512bf16")) {
        double dot = gflops(dot_bf16, 64, n_threads, cpus);
        if (dot > best)
            best = dot;
    }
    return best;
}

EXPORT void *roof_buffer(size_t n_bytes)
{
    void *buffer = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffer == MAP_FAILED)
        return NULL;
    (void)madvise(buffer, n_bytes, MADV_HUGEPAGE);
    uint64_t state = 88172645463325252u;
    for (size_t i = 0; i < n_bytes / 8; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((uint64_t *)buffer)[i] = state;
    }
    return buffer;
}
