#include "cpu/cpu.h"

#include "checkpoint.h"

#define MAX_K 101
#define MAX_STRIDE (MAX_K + 3)

typedef struct table {
    const char *name;
    const mil_cpu_pack_kernels *kernels;
} table;

/* The instruction sets that this machine runs. */
static int tables(table *out)
{
    const table all[] = {
        {"scalar", &mil_cpu_pack_kernels_scalar},
#ifdef __x86_64__
        {"avx2", &mil_cpu_pack_kernels_avx2},
        {"avx512", &mil_cpu_pack_kernels_avx512},
        {"avx512bf16", &mil_cpu_pack_kernels_avx512bf16},
#endif
    };
    const char *in_use, *available;
    int n = 0;
    CHECK_INT(mil_cpu_isa(&in_use, &available), MIL_OK);
    /* avx512 is also found in avx512bf16, which includes it. */
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (strstr(available, all[i].name) != NULL)
            out[n++] = all[i];
    return n;
}

/* Random bits: every kind of number, NaN and infinity among them. */
static void fill_bits(unsigned char *at, size_t n_bytes, uint64_t seed)
{
    uint64_t state = seed * 2654435761u + 1;
    for (size_t i = 0; i < n_bytes; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        at[i] = (unsigned char)(state >> 56);
    }
}

static void check_element(uint16_t found, const void *at, mil_dtype dtype)
{
    double value = test_double_of(at, dtype), widened = test_double_of(&found, MIL_DTYPE_BF16);
    uint16_t bits;
    memcpy(&bits, at, sizeof bits);
    if (isnan(value))
        CHECK(isnan(widened));
    else if (dtype == MIL_DTYPE_BF16)
        CHECK_INT(found, bits);
    else if (isinf(value) || fabs(value) < 0x1p-126)
        CHECK(isinf(value) ? widened == value : fabs(widened - value) <= 0x1p-134);
    else if (fabs(value) >= 0x1.ffp127) /* half way to the next power of two: infinity */
        CHECK(isinf(widened) && (widened > 0) == (value > 0));
    else
        CHECK_INT(found, test_bf16_of(value));
}

static void check_rows(const table *isa, mil_dtype dtype, int32_t width, int32_t column,
                       int32_t n_rows, int32_t n)
{
    static unsigned char src[16 * MAX_STRIDE * 4 + 1];
    static uint16_t panel[(MAX_K + 1) / 2 * 32 * 2];
    size_t element = mil_dtype_bytes(dtype);
    int64_t stride = n + 3;
    fill_bits(src, sizeof src, (uint64_t)n);
    memset(panel, 0x5a, sizeof panel);
    isa->kernels->rows(panel, width, column, src, dtype, stride, n_rows, n);
    for (int32_t k = 0; k < (MAX_K + 1) / 2 * 2; k++) {
        for (int32_t c = 0; c < width; c++) {
            uint16_t found = panel[(k / 2 * width + c) * 2 + k % 2];
            int32_t row = c - column;
            if (k >= n || row < 0 || row >= n_rows)
                CHECK_INT(found, 0x5a5a);
            else
                check_element(found, src + (size_t)(row * stride + k) * element, dtype);
        }
    }
}

TEST(rows_lie_pairwise_in_their_columns_and_touch_no_others)
{
    static const mil_dtype dtypes[] = {MIL_DTYPE_F32, MIL_DTYPE_BF16, MIL_DTYPE_F16};
    static const int32_t lengths[] = {1, 2, 15, 16, 17, 31, 32, 33, 64, 96, 101};
    static const int32_t places[][3] = {{32, 0, 16}, {32, 16, 16}, {16, 0, 16},
                                        {32, 0, 1},  {32, 21, 11}, {16, 3, 13}};
    table isas[4];
    int n_isas = tables(isas);
    CHECK(n_isas >= 1);
    for (int i = 0; i < n_isas; i++)
        for (int d = 0; d < 3; d++)
            for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++)
                for (size_t p = 0; p < sizeof places / sizeof *places; p++)
                    check_rows(&isas[i], dtypes[d], places[p][0], places[p][1], places[p][2],
                               lengths[l]);
}

/* NaN payloads too: a weight file gives the same packed bytes on every machine. */
TEST(every_instruction_set_packs_the_same_bits)
{
    static unsigned char src[16 * 96 * 4];
    static uint16_t first[48 * 16 * 2], next[48 * 16 * 2];
    table isas[4];
    int n_isas = tables(isas);
    for (uint64_t seed = 0; seed < 300; seed++) {
        mil_dtype dtype = (mil_dtype)(seed % 3);
        fill_bits(src, sizeof src, seed);
        if (dtype != MIL_DTYPE_BF16) /* exponents of ones, so that half of them are NaN */
            for (size_t i = seed % 7; i < sizeof src; i += 7)
                src[i] |= 0x7f;
        isas[0].kernels->rows(first, 16, 0, src, dtype, 96, 16, 96);
        for (int i = 1; i < n_isas; i++) {
            isas[i].kernels->rows(next, 16, 0, src, dtype, 96, 16, 96);
            CHECK(memcmp(first, next, sizeof first) == 0);
        }
    }
}

TEST_MAIN()
