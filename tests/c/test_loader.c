#include "loader/loader.h"

#include "fake_backend.h"
#include "loader/progress.h"

/* Row-major [N, K] bf16 with the parts' rows as given. */
static mil_weight make_weight(int32_t K, int32_t n_parts, const int32_t *rows, int32_t interleave)
{
    mil_weight weight = {
        .format = MIL_WEIGHT_BF16_ROWS, .K = K, .n_parts = n_parts, .interleave = interleave};
    for (int32_t p = 0; p < n_parts; p++) {
        weight.part_rows[p] = rows[p];
        weight.N += rows[p];
    }
    weight.data = calloc(fake_packed_bytes(weight.N, K), 1);
    CHECK(weight.data != NULL);
    return weight;
}

/* Part `part` of weight holds the slice of tensor `index` of c, each element rounded to bf16. */
static void check_part(const mil_weight *weight, int32_t part, const checkpoint *c, int32_t index,
                       const mil_slice *slice)
{
    const mil_tensor_info *tensor = &c->tensors[index];
    size_t element = mil_dtype_bytes(tensor->dtype);
    const uint16_t *data = weight->data;
    for (int64_t row = 0; row < slice->n_rows; row++) {
        int32_t packed = mil_weight_row(weight, part, (int32_t)row);
        for (int64_t col = 0; col < slice->n_cols; col++) {
            int64_t at = (slice->row_begin + row) * slice->full_cols + slice->col_begin + col;
            double value =
                test_double_of(c->bytes + tensor->begin + (size_t)at * element, tensor->dtype);
            CHECK_INT(data[packed * slice->n_cols + col], test_bf16_of(value));
        }
    }
}

typedef struct rig {
    checkpoint files;
    mil_source *source;
    mil_progress *progress;
    mil_loader *loader;
} rig;

static void rig_open(rig *r, int32_t n_threads)
{
    checkpoint_write(&r->files);
    CHECK_INT(mil_source_open(&r->source, &r->files.info), MIL_OK);
    CHECK_INT(mil_progress_create(&r->progress), MIL_OK);
    CHECK_INT(mil_loader_create(&r->loader, r->source, &fake_backend, n_threads, r->progress),
              MIL_OK);
}

static void rig_close(rig *r)
{
    mil_loader_free(r->loader);
    mil_progress_free(r->progress);
    mil_source_close(r->source);
    checkpoint_free(&r->files);
}

static void add(rig *r, const char *name, mil_dtype dtype, int64_t rows, int64_t cols)
{
    test_fill(checkpoint_add(&r->files, name, dtype, rows, cols), dtype,
              rows * (cols == 0 ? 1 : cols), (uint64_t)rows);
}

static const mil_dtype float_dtypes[] = {MIL_DTYPE_F32, MIL_DTYPE_BF16, MIL_DTYPE_F16};

/* ---- weights ---- */

/* 2,100 rows of 300 or 600 bytes and more are several windows, the last one short. */
TEST(slices_of_every_dtype_land_rounded_on_any_number_of_threads)
{
    static const mil_slice slices[] = {
        {2100, 300, 0, 2100, 0, 300},  /* whole */
        {2100, 300, 700, 777, 0, 300}, /* column-parallel: rows */
        {2100, 300, 0, 2100, 101, 99}, /* row-parallel: columns */
    };
    for (int d = 0; d < 3; d++) {
        for (int32_t n_threads = 1; n_threads <= 3; n_threads += 2) {
            rig r = {0};
            checkpoint_init(&r.files);
            add(&r, "w", float_dtypes[d], 2100, 300);
            rig_open(&r, n_threads);
            for (size_t s = 0; s < sizeof slices / sizeof *slices; s++) {
                int32_t rows = (int32_t)slices[s].n_rows;
                mil_weight weight = make_weight((int32_t)slices[s].n_cols, 1, &rows, 0);
                CHECK_INT(mil_loader_weight(r.loader, &weight, 0, "w", &slices[s]), MIL_OK);
                check_part(&weight, 0, &r.files, 0, &slices[s]);
                free(weight.data);
            }
            rig_close(&r);
        }
    }
}

TEST(parts_of_a_merged_weight_keep_their_rows)
{
    rig r = {0};
    checkpoint_init(&r.files);
    add(&r, "q", MIL_DTYPE_BF16, 48, 20);
    add(&r, "k", MIL_DTYPE_F32, 16, 20);
    add(&r, "gate", MIL_DTYPE_BF16, 64, 20);
    add(&r, "up", MIL_DTYPE_F16, 64, 20);
    rig_open(&r, 2);
    static const mil_slice q = {48, 20, 0, 48, 0, 20}, k = {16, 20, 0, 16, 0, 20};
    static const mil_slice half = {64, 20, 32, 32, 0, 20};

    mil_weight merged = make_weight(20, 2, (int32_t[]){48, 16}, 0);
    CHECK_INT(mil_loader_weight(r.loader, &merged, 0, "q", &q), MIL_OK);
    CHECK_INT(mil_loader_weight(r.loader, &merged, 1, "k", &k), MIL_OK);
    check_part(&merged, 0, &r.files, 0, &q);
    check_part(&merged, 1, &r.files, 1, &k);
    free(merged.data);

    mil_weight pairs = make_weight(20, 2, (int32_t[]){32, 32}, 16);
    CHECK_INT(mil_loader_weight(r.loader, &pairs, 0, "gate", &half), MIL_OK);
    CHECK_INT(mil_loader_weight(r.loader, &pairs, 1, "up", &half), MIL_OK);
    check_part(&pairs, 0, &r.files, 2, &half);
    check_part(&pairs, 1, &r.files, 3, &half);
    free(pairs.data);
    rig_close(&r);
}

TEST(rows_longer_than_a_small_window_are_served)
{
    rig r = {0};
    checkpoint_init(&r.files);
    add(&r, "w", MIL_DTYPE_F32, 3, 1000000);
    rig_open(&r, 2);
    static const mil_slice slice = {3, 1000000, 0, 3, 999000, 1000};
    mil_weight weight = make_weight(1000, 1, (int32_t[]){3}, 0);
    CHECK_INT(mil_loader_weight(r.loader, &weight, 0, "w", &slice), MIL_OK);
    check_part(&weight, 0, &r.files, 0, &slice);
    free(weight.data);
    rig_close(&r);
}

TEST(a_row_beyond_the_largest_window_is_refused_by_name)
{
    mil_checkpoint_info info = {.is_dummy = true};
    mil_source *source;
    mil_loader *loader;
    CHECK_INT(mil_source_open(&source, &info), MIL_OK);
    CHECK_INT(mil_loader_create(&loader, source, &fake_backend, 1, NULL), MIL_OK);
    static const mil_slice slice = {2, 5000000, 0, 2, 0, 8};
    mil_weight weight = make_weight(8, 1, (int32_t[]){2}, 0);
    CHECK_INT(mil_loader_weight(loader, &weight, 0, "wide", &slice), MIL_ERR_UNSUPPORTED);
    CHECK(strstr(mil_status_message(), "'wide' has 10000000 bytes, expected at most 8388608"));
    free(weight.data);
    mil_loader_free(loader);
    mil_source_close(source);
}

TEST(a_slice_that_is_not_its_part_is_an_error_of_ours)
{
    rig r = {0};
    checkpoint_init(&r.files);
    add(&r, "w", MIL_DTYPE_BF16, 8, 4);
    rig_open(&r, 1);
    static const mil_slice slices[] = {
        {8, 4, 0, 7, 0, 4}, {8, 4, 0, 8, 0, 3}, {8, 4, 1, 8, 0, 4}, {8, 4, -1, 8, 0, 4}};
    mil_weight weight = make_weight(4, 1, (int32_t[]){8}, 0);
    for (size_t s = 0; s < sizeof slices / sizeof *slices; s++)
        CHECK_INT(mil_loader_weight(r.loader, &weight, 0, "w", &slices[s]), MIL_ERR_INTERNAL);
    free(weight.data);
    rig_close(&r);
}

TEST(an_empty_slice_loads_nothing_but_still_checks_the_tensor)
{
    rig r = {0};
    checkpoint_init(&r.files);
    add(&r, "w", MIL_DTYPE_BF16, 8, 4);
    rig_open(&r, 2);
    mil_slice slice = {8, 4, 8, 0, 0, 4};
    mil_weight weight = make_weight(4, 1, (int32_t[]){0}, 0);
    CHECK_INT(mil_loader_weight(r.loader, &weight, 0, "w", &slice), MIL_OK);
    slice.full_rows = 9;
    CHECK_INT(mil_loader_weight(r.loader, &weight, 0, "w", &slice), MIL_ERR_SHAPE);
    free(weight.data);
    rig_close(&r);
}

TEST(dummy_weights_are_the_same_whatever_the_slice)
{
    mil_checkpoint_info info = {.is_dummy = true, .dummy_seed = 11};
    mil_source *source;
    mil_loader *loader;
    CHECK_INT(mil_source_open(&source, &info), MIL_OK);
    CHECK_INT(mil_loader_create(&loader, source, &fake_backend, 2, NULL), MIL_OK);
    static const mil_slice all = {1500, 800, 0, 1500, 0, 800},
                           some = {1500, 800, 500, 900, 300, 77};
    mil_weight whole = make_weight(800, 1, (int32_t[]){1500}, 0);
    mil_weight part = make_weight(77, 1, (int32_t[]){900}, 0);
    CHECK_INT(mil_loader_weight(loader, &whole, 0, "w", &all), MIL_OK);
    CHECK_INT(mil_loader_weight(loader, &part, 0, "w", &some), MIL_OK);
    const uint16_t *w = whole.data, *p = part.data;
    for (int row = 0; row < 900; row++)
        CHECK(memcmp(p + row * 77, w + (row + 500) * 800 + 300, 154) == 0);
    free(whole.data);
    free(part.data);
    mil_loader_free(loader);
    mil_source_close(source);
}

/* ---- vectors ---- */

TEST(vectors_of_every_dtype_become_float32_exactly)
{
    for (int d = 0; d < 3; d++) {
        rig r = {0};
        checkpoint_init(&r.files);
        add(&r, "v", float_dtypes[d], 1000, 0);
        rig_open(&r, 1);
        float out[500];
        CHECK_INT(mil_loader_vector(r.loader, out, "v", 1000, 250, 500), MIL_OK);
        size_t element = mil_dtype_bytes(float_dtypes[d]);
        for (size_t i = 0; i < 500; i++) {
            const void *at = r.files.bytes + r.files.tensors[0].begin + (i + 250) * element;
            CHECK((double)out[i] == test_double_of(at, float_dtypes[d]));
        }
        CHECK_INT(mil_loader_vector(r.loader, out, "v", 999, 0, 1), MIL_ERR_SHAPE);
        rig_close(&r);
    }
}

TEST(every_half_widens_exactly)
{
    rig r = {0};
    checkpoint_init(&r.files);
    uint16_t *halves = malloc(65536 * sizeof *halves);
    float *out = malloc(65536 * sizeof *out);
    CHECK(halves != NULL && out != NULL);
    for (int i = 0; i < 65536; i++)
        halves[i] = (uint16_t)i;
    memcpy(checkpoint_add(&r.files, "v", MIL_DTYPE_F16, 65536, 0), halves, 131072);
    rig_open(&r, 1);
    CHECK_INT(mil_loader_vector(r.loader, out, "v", 65536, 0, 65536), MIL_OK);
    for (int i = 0; i < 65536; i++) {
        double expected = test_double_of(&halves[i], MIL_DTYPE_F16);
        CHECK(isnan(expected)
                  ? isnan(out[i])
                  : (double)out[i] == expected && !signbit(out[i]) == !signbit(expected));
    }
    free(halves);
    free(out);
    rig_close(&r);
}

/* ---- progress ---- */

TEST(progress_counts_two_bytes_for_each_element_of_a_slice)
{
    rig r = {0};
    checkpoint_init(&r.files);
    add(&r, "w", MIL_DTYPE_F32, 900, 700);
    add(&r, "v", MIL_DTYPE_BF16, 64, 0);
    rig_open(&r, 2);
    static const mil_slice slice = {900, 700, 0, 900, 10, 100};
    mil_weight weight = make_weight(100, 1, (int32_t[]){900}, 0);
    float out[64];
    uint64_t done, total;
    mil_loader_set_total(r.loader, 180128);
    CHECK_INT(mil_loader_weight(r.loader, &weight, 0, "w", &slice), MIL_OK);
    mil_progress_read(r.progress, &done, &total);
    CHECK_INT(done, 180000);
    CHECK_INT(mil_loader_vector(r.loader, out, "v", 64, 0, 64), MIL_OK);
    mil_progress_read(r.progress, &done, &total);
    CHECK_INT(done, 180128);
    CHECK_INT(total, 180128);
    free(weight.data);
    rig_close(&r);
}

TEST(a_cancelled_load_stops_with_closed)
{
    rig r = {0};
    checkpoint_init(&r.files);
    add(&r, "w", MIL_DTYPE_BF16, 3000, 400);
    add(&r, "v", MIL_DTYPE_BF16, 64, 0);
    rig_open(&r, 2);
    static const mil_slice slice = {3000, 400, 0, 3000, 0, 400};
    mil_weight weight = make_weight(400, 1, (int32_t[]){3000}, 0);
    float out[64];
    mil_progress_cancel(r.progress);
    CHECK_INT(mil_loader_weight(r.loader, &weight, 0, "w", &slice), MIL_ERR_CLOSED);
    CHECK(strstr(mil_status_message(), "cancelled"));
    CHECK_INT(mil_loader_vector(r.loader, out, "v", 64, 0, 64), MIL_ERR_CLOSED);
    free(weight.data);
    rig_close(&r);
}

/* ---- failure ---- */

TEST(a_file_that_shrinks_under_the_readers_is_named_by_whichever_met_it)
{
    rig r = {0};
    checkpoint_init(&r.files);
    add(&r, "w", MIL_DTYPE_BF16, 8000, 400);
    rig_open(&r, 3);
    CHECK_INT(truncate(r.files.path, 4000000), 0);
    static const mil_slice slice = {8000, 400, 0, 8000, 0, 400};
    mil_weight weight = make_weight(400, 1, (int32_t[]){8000}, 0);
    CHECK_INT(mil_loader_weight(r.loader, &weight, 0, "w", &slice), MIL_ERR_FILE);
    CHECK(strstr(mil_status_message(), r.files.path));
    CHECK(strstr(mil_status_message(), "shrank while it was read: found 4000000 bytes"));
    free(weight.data);
    rig_close(&r);
}

TEST(no_allocation_that_fails_leaks)
{
    mil_checkpoint_info info = {.is_dummy = true};
    mil_source *source;
    CHECK_INT(mil_source_open(&source, &info), MIL_OK);
    size_t held = mil_memory_held_bytes();
    for (uint64_t k = 1;; k++) {
        mil_loader *loader = NULL;
        mil_memory_fail_at(k);
        mil_status status = mil_loader_create(&loader, source, &fake_backend, 3, NULL);
        mil_memory_fail_at(0);
        mil_loader_free(loader);
        CHECK_INT(mil_memory_held_bytes(), held);
        if (status == MIL_OK) {
            CHECK(k > 2);
            break;
        }
        CHECK_INT(status, MIL_ERR_MEMORY);
        CHECK(loader == NULL);
    }
    mil_source_close(source);
}

TEST(progress_is_optional_to_the_loader_and_refused_without_memory)
{
    mil_progress *progress = NULL;
    mil_memory_fail_at(1);
    CHECK_INT(mil_progress_create(&progress), MIL_ERR_MEMORY);
    CHECK(progress == NULL);
    mil_progress_free(NULL);
    CHECK(!mil_progress_is_cancelled(NULL));
}

TEST_MAIN()
