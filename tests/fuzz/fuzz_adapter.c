/* Adapters whose modules, shapes, values and files were mutated, on every rank of small groups,
 * packed by the CPU backend. What loads must be exactly what a second reading of the rules accepts,
 * and an adapter that is refused must leave nothing behind. */
#include "loader/adapter.h"

#include "fuzz.h"

#include <math.h>
#include <string.h>
#include <unistd.h>

#define N_MODULES 4
#define FILE_BYTES 65536

static const mil_config config = {.hidden = 96,
                                  .ffn = 64,
                                  .n_layers = 3,
                                  .n_heads = 4,
                                  .n_kv_heads = 2,
                                  .head_dim = 8,
                                  .vocab = 50,
                                  .max_position = 64};
static const int64_t in_of[MIL_N_PROJECTIONS] = {96, 96, 96, 32, 96, 96, 64};
static const int64_t out_of[MIL_N_PROJECTIONS] = {32, 16, 16, 96, 64, 64, 96};

typedef struct sample {
    char path[64];
    unsigned char bytes[FILE_BYTES];
    mil_file_info file;
    char names[2 * N_MODULES][16];
    mil_adapter_module_info modules[N_MODULES];
    mil_adapter_info info;
} sample;

static uint64_t n_bytes_of(const mil_tensor_info *t)
{
    return (uint64_t)(t->shape[0] * t->shape[1]) * (t->dtype == MIL_DTYPE_F32 ? 4 : 2);
}

static void place(mil_tensor_info *t, fuzz *f, char *name, mil_dtype dtype, int64_t rows,
                  int64_t cols)
{
    *t = (mil_tensor_info){.name = name, .dtype = dtype, .rank = 2, .shape = {rows, cols}};
    t->begin = (uint64_t)fuzz_below(f, FILE_BYTES - (int)n_bytes_of(t));
    t->end = t->begin + n_bytes_of(t);
}

/* Four valid modules. The file's bytes have no exponent of ones in any dtype, at any offset. */
static void describe(sample *s, fuzz *f)
{
    for (int i = 0; i < FILE_BYTES; i++)
        s->bytes[i] = (unsigned char)(fuzz_bits(f) & 0xb7);
    int first = fuzz_below(f, MIL_N_PROJECTIONS);
    for (int i = 0; i < N_MODULES; i++) {
        mil_adapter_module_info *m = &s->modules[i];
        int p = (first + i) % MIL_N_PROJECTIONS;
        *m = (mil_adapter_module_info){.layer = fuzz_below(f, 3),
                                       .projection = (mil_projection)p,
                                       .rank = 1 + fuzz_below(f, 40),
                                       .scale = 0.5f};
        static const mil_dtype dtypes[] = {MIL_DTYPE_F32, MIL_DTYPE_BF16, MIL_DTYPE_F16};
        mil_dtype dtype = dtypes[fuzz_below(f, 3)];
        (void)snprintf(s->names[2 * i], sizeof s->names[0], "%d.A", i);
        (void)snprintf(s->names[2 * i + 1], sizeof s->names[0], "%d.B", i);
        place(&m->a, f, s->names[2 * i], dtype, m->rank, in_of[p]);
        place(&m->b, f, s->names[2 * i + 1], dtype, out_of[p], m->rank);
    }
    s->file = (mil_file_info){s->path, FILE_BYTES};
    s->info = (mil_adapter_info){&s->file, 1, s->modules, N_MODULES, false, 0};
}

static void mutate(sample *s, fuzz *f)
{
    mil_adapter_module_info *m = &s->modules[fuzz_below(f, N_MODULES)];
    mil_tensor_info *t = fuzz_below(f, 2) ? &m->a : &m->b;
    switch (fuzz_below(f, 10)) {
    case 0:
        m->layer = (int32_t)fuzz_integer(f);
        break;
    case 1:
        m->projection = (mil_projection)fuzz_below(f, MIL_N_PROJECTIONS + 2);
        break;
    case 2:
        m->rank = (int32_t)fuzz_integer(f);
        break;
    case 3: { /* a rank that its tensors follow */
        m->rank = 1 + fuzz_below(f, 60);
        int p = (int)m->projection % MIL_N_PROJECTIONS;
        place(&m->a, f, (char *)m->a.name, m->a.dtype, m->rank, in_of[p]);
        place(&m->b, f, (char *)m->b.name, m->b.dtype, out_of[p], m->rank);
        break;
    }
    case 4: {
        static const float scales[] = {0.0f, -1.0f, INFINITY, -INFINITY, NAN, 1e38f};
        m->scale = scales[fuzz_below(f, 6)];
        break;
    }
    case 5:
        t->shape[fuzz_below(f, 2)] = (int64_t)fuzz_integer(f);
        break;
    case 6: { /* transposed: the same bytes */
        int64_t rows = t->shape[0];
        t->shape[0] = t->shape[1];
        t->shape[1] = rows;
        break;
    }
    case 7:
        *m = s->modules[fuzz_below(f, N_MODULES)];
        break;
    case 8: /* bytes that may be of a tensor, and may make it infinite */
        memset(s->bytes + fuzz_below(f, FILE_BYTES - 8), fuzz_below(f, 2) ? 0x7f : 0xff, 8);
        break;
    default:
        t->begin += (uint64_t)fuzz_below(f, 5) - 2;
        t->end += (uint64_t)fuzz_below(f, 5) - 2;
        break;
    }
}

/* ---- the rules, read again ---- */

static bool is_valid_tensor(const mil_tensor_info *t, int64_t rows, int64_t cols)
{
    return t->shape[0] == rows && t->shape[1] == cols && t->begin <= t->end &&
           t->end <= FILE_BYTES && t->end - t->begin == n_bytes_of(t);
}

static bool is_valid_module(const sample *s, int i)
{
    const mil_adapter_module_info *m = &s->modules[i];
    if (m->layer < 0 || m->layer >= 3 || (int)m->projection >= MIL_N_PROJECTIONS || m->rank < 1 ||
        m->rank > 512 || !isfinite(m->scale))
        return false;
    for (int j = 0; j < i; j++)
        if ((s->modules[j].layer == m->layer && s->modules[j].projection == m->projection) ||
            strcmp(s->modules[j].a.name, m->a.name) == 0)
            return false;
    return is_valid_tensor(&m->a, m->rank, in_of[m->projection]) &&
           is_valid_tensor(&m->b, out_of[m->projection], m->rank);
}

/* As bfloat16; ties cannot round a finite float16 to infinity. */
static bool is_finite_at(const unsigned char *at, mil_dtype dtype)
{
    uint16_t half;
    uint32_t word;
    memcpy(&half, at, sizeof half);
    memcpy(&word, at, dtype == MIL_DTYPE_F32 ? 4 : 2);
    if (dtype == MIL_DTYPE_F16)
        return (half & 0x7c00) != 0x7c00;
    if (dtype == MIL_DTYPE_BF16)
        return (half & 0x7f80) != 0x7f80;
    return (word & 0x7fffffff) < 0x7f7f8000;
}

/* Of the rows and columns that the rank reads. */
static bool is_finite_slice(const sample *s, const mil_tensor_info *t, int64_t row_begin,
                            int64_t n_rows, int64_t col_begin, int64_t n_cols)
{
    uint64_t element = t->dtype == MIL_DTYPE_F32 ? 4 : 2;
    for (int64_t row = row_begin; row < row_begin + n_rows; row++)
        for (int64_t col = col_begin; col < col_begin + n_cols; col++)
            if (!is_finite_at(s->bytes + t->begin + (uint64_t)(row * t->shape[1] + col) * element,
                              t->dtype))
                return false;
    return true;
}

static mil_status expected(const sample *s, const mil_shard *shard)
{
    for (int i = 0; i < N_MODULES; i++)
        if (!is_valid_module(s, i))
            return MIL_ERR_ARGUMENT;
    for (int i = 0; i < N_MODULES; i++) {
        const mil_adapter_module_info *m = &s->modules[i];
        const mil_slice *slice = &shard->projections[m->projection];
        if (!is_finite_slice(s, &m->a, 0, m->rank, slice->col_begin, slice->n_cols) ||
            !is_finite_slice(s, &m->b, slice->row_begin, slice->n_rows, 0, m->rank))
            return MIL_ERR_NUMERICS;
    }
    return MIL_OK;
}

static void write_file(const sample *s, fuzz *f)
{
    FILE *file = fopen(s->path, "wb");
    FUZZ_CHECK(f, file != NULL);
    FUZZ_CHECK(f, fwrite(s->bytes, 1, FILE_BYTES, file) == FILE_BYTES);
    (void)fclose(file);
}

static bool round_once(sample *s, const mil_backend *backend, fuzz *f)
{
    describe(s, f);
    for (int n = fuzz_below(f, 3); n > 0; n--)
        mutate(s, f);
    write_file(s, f);
    int32_t world = 1 << fuzz_below(f, 3);
    mil_shard shard;
    FUZZ_CHECK(f, mil_shard_init(&shard, &config, fuzz_below(f, world), world) == MIL_OK);

    mil_adapter adapter;
    mil_status status = mil_adapter_init(&adapter, &s->info, &config, &shard, backend, NULL);
    mil_status wanted = expected(s, &shard);
    FUZZ_CHECK(f, (status == MIL_OK) == (wanted == MIL_OK));
    FUZZ_CHECK(f, (status == MIL_ERR_NUMERICS) == (wanted == MIL_ERR_NUMERICS));
    FUZZ_CHECK(f, (status == MIL_OK) == (adapter.slab.data != NULL));
    mil_adapter_deinit(&adapter);
    FUZZ_CHECK(f, mil_memory_held_bytes() == 0);
    return status == MIL_OK;
}

int main(int argc, char **argv)
{
    fuzz f = fuzz_begin(argc, argv);
    static sample s;
    (void)strcpy(s.path, "/tmp/milpy-fuzz-adapter-XXXXXX");
    int fd = mkstemp(s.path);
    FUZZ_CHECK(&f, fd >= 0);
    (void)close(fd);
    const mil_backend *backend = NULL;
    FUZZ_CHECK(&f, mil_backend_find(&backend, "cpu") == MIL_OK);
    uint64_t n_loaded = 0;
    while (fuzz_next(&f))
        n_loaded += round_once(&s, backend, &f);
    (void)unlink(s.path);
    printf("%" PRIu64 " rounds, %" PRIu64 " loaded\n", f.n_rounds, n_loaded);
    return 0;
}
