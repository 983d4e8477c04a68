/* Sources over mutated descriptions and changing files. What opens must be exactly what a second
 * reading of the rules, in 128-bit arithmetic, accepts; what is read must stay inside its buffer.
 */
#include "loader/source.h"

#include "fuzz.h"

#include <string.h>
#include <unistd.h>

#define N_FILES 2
#define N_TENSORS 5
#define FILE_BYTES 4096

typedef struct sample {
    char paths[N_FILES][64];
    mil_file_info files[N_FILES];
    mil_tensor_info tensors[N_TENSORS];
    mil_checkpoint_info info;
} sample;

static void write_file(const char *path, fuzz *f)
{
    unsigned char bytes[FILE_BYTES];
    for (int i = 0; i < FILE_BYTES; i++)
        bytes[i] = (unsigned char)fuzz_bits(f);
    FILE *file = fopen(path, "wb");
    FUZZ_CHECK(f, file != NULL);
    FUZZ_CHECK(f, fwrite(bytes, 1, FILE_BYTES, file) == FILE_BYTES);
    (void)fclose(file);
}

static int element_bytes(mil_dtype dtype)
{
    return dtype == MIL_DTYPE_BF16 || dtype == MIL_DTYPE_F16 ? 2 : 4;
}

/* The seed of every round: five tensors, valid, at random places. */
static void describe(sample *s, fuzz *f)
{
    static const char *const names[N_TENSORS] = {"a", "b", "model.norm.weight", "d", "e"};
    for (int i = 0; i < N_FILES; i++)
        s->files[i] = (mil_file_info){s->paths[i], FILE_BYTES};
    for (int i = 0; i < N_TENSORS; i++) {
        mil_tensor_info *t = &s->tensors[i];
        *t = (mil_tensor_info){.name = names[i], .rank = 1 + fuzz_below(f, 2)};
        t->dtype = (mil_dtype)fuzz_below(f, 4);
        t->shape[0] = 1 + fuzz_below(f, 20);
        t->shape[1] = t->rank == 1 ? 1 : 1 + fuzz_below(f, 20);
        t->file = fuzz_below(f, N_FILES);
        t->begin = (uint64_t)fuzz_below(f, 2000);
        t->end = t->begin + (uint64_t)(t->shape[0] * t->shape[1] * element_bytes(t->dtype));
    }
    s->info = (mil_checkpoint_info){s->files, N_FILES, s->tensors, N_TENSORS, false, 0};
}

static void mutate(sample *s, fuzz *f)
{
    mil_tensor_info *t = &s->tensors[fuzz_below(f, N_TENSORS)];
    switch (fuzz_below(f, 11)) {
    case 0:
        t->begin = fuzz_integer(f);
        break;
    case 1:
        t->end = fuzz_integer(f);
        break;
    case 2: { /* a range of the right length that may lie anywhere */
        uint64_t length = t->end - t->begin;
        t->begin =
            fuzz_below(f, 2) ? fuzz_integer(f) : FILE_BYTES - length + (uint64_t)fuzz_below(f, 3);
        t->end = t->begin + length;
        break;
    }
    case 3:
        t->shape[fuzz_below(f, 2)] = (int64_t)fuzz_integer(f);
        break;
    case 4: /* sizes that agree after they wrapped */
        t->shape[0] = (int64_t)1 << (20 + fuzz_below(f, 21));
        t->shape[1] = (int64_t)1 << (20 + fuzz_below(f, 21));
        t->rank = 2;
        t->end = t->begin +
                 (uint64_t)t->shape[0] * (uint64_t)t->shape[1] * (uint64_t)element_bytes(t->dtype);
        break;
    case 5:
        t->rank = (int32_t)fuzz_integer(f);
        break;
    case 6:
        t->dtype = (mil_dtype)fuzz_below(f, 6);
        break;
    case 7:
        t->file = (int32_t)fuzz_integer(f);
        break;
    case 8:
        t->name = fuzz_below(f, 2) ? s->tensors[fuzz_below(f, N_TENSORS)].name : "";
        break;
    case 9:
        s->files[fuzz_below(f, N_FILES)].n_bytes = fuzz_integer(f);
        break;
    default: /* truncated arrays */
        s->info.n_files = fuzz_below(f, N_FILES + 1);
        s->info.n_tensors = fuzz_below(f, N_TENSORS + 2) - 1;
        break;
    }
}

static bool is_valid_tensor(const sample *s, const mil_tensor_info *t)
{
    const __int128 dim_max = (__int128)1 << 40;
    if (t->name[0] == '\0' || (int)t->dtype < 0 || (int)t->dtype > 3 || t->rank < 1 || t->rank > 2)
        return false;
    __int128 rows = t->shape[0], cols = t->shape[1];
    if (rows < 1 || rows > dim_max || cols < 1 || cols > dim_max || (t->rank == 1 && cols != 1))
        return false;
    if (t->file < 0 || t->file >= s->info.n_files)
        return false;
    __int128 begin = t->begin, end = t->end, n_bytes = rows * cols * element_bytes(t->dtype);
    return end <= (__int128)s->files[t->file].n_bytes && end - begin == n_bytes;
}

static bool is_valid(const sample *s)
{
    if (s->info.n_tensors < 0)
        return false;
    for (int i = 0; i < s->info.n_files; i++)
        if (s->files[i].n_bytes != FILE_BYTES)
            return false;
    for (int i = 0; i < s->info.n_tensors; i++) {
        if (!is_valid_tensor(s, &s->tensors[i]))
            return false;
        for (int j = 0; j < i; j++)
            if (strcmp(s->tensors[i].name, s->tensors[j].name) == 0)
                return false;
    }
    return true;
}

/* Read some rows of t into a block of exactly their size. */
static void read_some(mil_source *source, const mil_tensor_info *t, fuzz *f, bool is_whole)
{
    mil_source_tensor found;
    mil_status status = mil_source_find(source, t->name, t->shape[0], t->shape[1], &found);
    FUZZ_CHECK(f, status == (t->dtype == MIL_DTYPE_I32 ? MIL_ERR_SHAPE : MIL_OK));
    if (status != MIL_OK)
        return;
    int64_t row = fuzz_below(f, (int)t->shape[0] + 1);
    int64_t n = fuzz_below(f, (int)(t->shape[0] - row) + 1);
    void *out = malloc((size_t)n * found.row_bytes + 1);
    FUZZ_CHECK(f, out != NULL);
    status = mil_source_read_rows(source, &found, out, row, n);
    FUZZ_CHECK(f, status == MIL_OK || (!is_whole && status == MIL_ERR_FILE));
    FUZZ_CHECK(f,
               mil_source_read_rows(source, &found, out, row, t->shape[0] + 1) == MIL_ERR_INTERNAL);
    FUZZ_CHECK(f, mil_source_find(source, t->name, t->shape[0] + 1, t->shape[1], &found) ==
                      MIL_ERR_SHAPE);
    free(out);
}

static bool round_once(sample *s, fuzz *f)
{
    describe(s, f);
    for (int n = fuzz_below(f, 4); n > 0; n--)
        mutate(s, f);
    mil_source *source = NULL;
    mil_status status = mil_source_open(&source, &s->info);
    FUZZ_CHECK(f, (status == MIL_OK) == is_valid(s));
    FUZZ_CHECK(f, (status == MIL_OK) == (source != NULL));
    if (status != MIL_OK)
        return false;
    int changed = fuzz_below(f, N_FILES + 6);
    if (changed < N_FILES && truncate(s->paths[changed], fuzz_below(f, FILE_BYTES)) != 0)
        abort();
    for (int i = 0; i < s->info.n_tensors; i++)
        read_some(source, &s->tensors[i], f, changed >= N_FILES);
    mil_source_close(source);
    if (changed < N_FILES)
        write_file(s->paths[changed], f);
    return true;
}

int main(int argc, char **argv)
{
    fuzz f = fuzz_begin(argc, argv);
    sample s = {0};
    for (int i = 0; i < N_FILES; i++) {
        (void)snprintf(s.paths[i], sizeof s.paths[i], "/tmp/milpy-fuzz-%d-XXXXXX", i);
        int fd = mkstemp(s.paths[i]);
        FUZZ_CHECK(&f, fd >= 0);
        (void)close(fd);
        write_file(s.paths[i], &f);
    }
    uint64_t n_opened = 0;
    while (fuzz_next(&f))
        n_opened += round_once(&s, &f);
    for (int i = 0; i < N_FILES; i++)
        (void)unlink(s.paths[i]);
    size_t held = mil_memory_held_bytes();
    FUZZ_CHECK(&f, held == 0);
    printf("%" PRIu64 " rounds, %" PRIu64 " opened\n", f.n_rounds, n_opened);
    return 0;
}
