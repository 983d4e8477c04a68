#include "loader/loader.h"

#include "fake_backend.h"
#include "loader/progress.h"

#include <pthread.h>

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
    CHECK_INT(mil_loader_create(&r->loader, r->source, &fake_backend, NULL, n_threads, r->progress),
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

static struct {
    pthread_mutex_t lock;
    pthread_cond_t second;
    int32_t n_entered;
} meeting = {.lock = PTHREAD_MUTEX_INITIALIZER, .second = PTHREAD_COND_INITIALIZER};

/* As a device's copy that takes until another window has been read and is on its way too. */
static mil_status slow_pack(struct mil_queue *queue, mil_weight *weight, int32_t part, int32_t row,
                            int32_t n_rows, void *src, mil_dtype dtype, int64_t src_stride)
{
    pthread_mutex_lock(&meeting.lock);
    meeting.n_entered++;
    pthread_cond_broadcast(&meeting.second);
    while (meeting.n_entered < 2)
        pthread_cond_wait(&meeting.second, &meeting.lock);
    pthread_mutex_unlock(&meeting.lock);
    return fake_pack(queue, weight, part, row, n_rows, src, dtype, src_stride);
}

/* One after the other they would wait for ever. */
TEST(a_window_is_read_while_another_is_converted_and_copied)
{
    rig r = {0};
    mil_backend backend = fake_backend;
    static const mil_slice whole = {8192, 512, 0, 8192, 0, 512};
    checkpoint_init(&r.files);
    add(&r, "w", MIL_DTYPE_F32, 8192, 512);
    rig_open(&r, 2);
    mil_loader_free(r.loader);
    backend.pack = slow_pack;
    CHECK_INT(mil_loader_create(&r.loader, r.source, &backend, NULL, 2, NULL), MIL_OK);
    mil_weight weight = make_weight(512, 1, (int32_t[]){8192}, 0);
    CHECK_INT(mil_loader_weight(r.loader, &weight, 0, "w", &whole), MIL_OK);
    check_part(&weight, 0, &r.files, 0, &whole);
    free(weight.data);
    rig_close(&r);
}

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
    CHECK_INT(mil_loader_create(&loader, source, &fake_backend, NULL, 1, NULL), MIL_OK);
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
    CHECK_INT(mil_loader_create(&loader, source, &fake_backend, NULL, 2, NULL), MIL_OK);
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

/* ---- the queue ---- */

/* What a model asks for, in small: parts that alternate and parts that do not, a vector between
 * them, an empty slice, and a part alone of a weight whose others never come. */
typedef struct wish {
    mil_weight merged, pairs, alone, empty;
    float vector[700];
} wish;

static const mil_slice wish_q = {2000, 301, 0, 2000, 0, 301}, wish_k = {700, 301, 0, 700, 0, 301},
                       wish_half = {3000, 301, 1496, 1504, 0, 301},
                       wish_none = {700, 301, 700, 0, 0, 301};
#define WISH_BYTES (2 * (301 * (2000 + 700 + 4 * 1504) + 700))

static void add_wish(checkpoint *c)
{
    static const struct {
        const char *name;
        mil_dtype dtype;
        int64_t rows, cols;
    } tensors[] = {{"q", MIL_DTYPE_BF16, 2000, 301},
                   {"k", MIL_DTYPE_F32, 700, 301},
                   {"v", MIL_DTYPE_F32, 700, 0},
                   {"gate", MIL_DTYPE_BF16, 3000, 301},
                   {"up", MIL_DTYPE_F32, 3000, 301}};
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++)
        test_fill(
            checkpoint_add(c, tensors[i].name, tensors[i].dtype, tensors[i].rows, tensors[i].cols),
            tensors[i].dtype, tensors[i].rows * (tensors[i].cols == 0 ? 1 : tensors[i].cols), i);
}

static void make_wish(wish *w)
{
    w->merged = make_weight(301, 2, (int32_t[]){2000, 700}, 0);
    w->pairs = make_weight(301, 2, (int32_t[]){1504, 1504}, 16);
    w->alone = make_weight(301, 2, (int32_t[]){1504, 1504}, 16);
    w->empty = make_weight(301, 1, (int32_t[]){0}, 0);
}

/* Each call only queues. */
static void ask_all(rig *r, wish *w)
{
    CHECK_INT(mil_loader_weight(r->loader, &w->merged, 0, "q", &wish_q), MIL_OK);
    CHECK_INT(mil_loader_vector(r->loader, w->vector, "v", 700, 0, 700), MIL_OK);
    CHECK_INT(mil_loader_weight(r->loader, &w->merged, 1, "k", &wish_k), MIL_OK);
    CHECK_INT(mil_loader_weight(r->loader, &w->alone, 1, "up", &wish_half), MIL_OK);
    CHECK_INT(mil_loader_weight(r->loader, &w->empty, 0, "k", &wish_none), MIL_OK);
    CHECK_INT(mil_loader_weight(r->loader, &w->pairs, 0, "gate", &wish_half), MIL_OK);
    CHECK_INT(mil_loader_weight(r->loader, &w->pairs, 1, "up", &wish_half), MIL_OK);
    CHECK_INT(mil_loader_weight(r->loader, &w->alone, 0, "gate", &wish_half), MIL_OK);
}

static void free_wish(wish *w)
{
    free(w->merged.data);
    free(w->pairs.data);
    free(w->alone.data);
    free(w->empty.data);
}

TEST(what_is_queued_is_loaded_at_the_end)
{
    for (int32_t n_threads = 1; n_threads <= 3; n_threads++) {
        rig r = {0};
        wish w = {0};
        uint64_t done, total;
        checkpoint_init(&r.files);
        add_wish(&r.files);
        rig_open(&r, n_threads);
        make_wish(&w);
        mil_loader_begin(r.loader, WISH_BYTES);
        ask_all(&r, &w);
        mil_progress_read(r.progress, &done, &total);
        CHECK_INT(done, 0);
        CHECK_INT(mil_loader_finish(r.loader), MIL_OK);
        mil_progress_read(r.progress, &done, &total);
        CHECK_INT(done, WISH_BYTES);
        check_part(&w.merged, 0, &r.files, 0, &wish_q);
        check_part(&w.merged, 1, &r.files, 1, &wish_k);
        check_part(&w.pairs, 0, &r.files, 3, &wish_half);
        check_part(&w.pairs, 1, &r.files, 4, &wish_half);
        check_part(&w.alone, 0, &r.files, 3, &wish_half);
        check_part(&w.alone, 1, &r.files, 4, &wish_half);
        CHECK(memcmp(w.vector, r.files.bytes + r.files.tensors[2].begin, sizeof w.vector) == 0);
        free_wish(&w);
        rig_close(&r);
    }
}

/* Windows of parts read in turn have equal rows, as many as the longer of them allow. */
TEST(alternating_parts_of_different_dtypes_share_the_largest_window)
{
    enum { K = 130000 };
    static const mil_slice slice = {32, K, 0, 32, K - 8, 8};
    rig r = {0};
    checkpoint_init(&r.files);
    add(&r, "gate", MIL_DTYPE_BF16, 32, K);
    add(&r, "up", MIL_DTYPE_F32, 32, K);
    rig_open(&r, 1);
    mil_weight weight = make_weight(8, 2, (int32_t[]){32, 32}, 16);
    mil_loader_begin(r.loader, 2 * 2 * 32 * 8);
    CHECK_INT(mil_loader_weight(r.loader, &weight, 0, "gate", &slice), MIL_OK);
    CHECK_INT(mil_loader_weight(r.loader, &weight, 1, "up", &slice), MIL_OK);
    CHECK_INT(mil_loader_finish(r.loader), MIL_OK);
    check_part(&weight, 0, &r.files, 0, &slice);
    check_part(&weight, 1, &r.files, 1, &slice);
    free(weight.data);
    rig_close(&r);
}

TEST(a_queued_load_that_fails_is_reported_at_the_end)
{
    rig r = {0};
    wish w = {0};
    checkpoint_init(&r.files);
    add_wish(&r.files);
    rig_open(&r, 2);
    make_wish(&w);
    mil_loader_begin(r.loader, WISH_BYTES);
    ask_all(&r, &w);
    CHECK_INT(truncate(r.files.path, 100000), 0);
    CHECK_INT(mil_loader_finish(r.loader), MIL_ERR_FILE);
    CHECK(strstr(mil_status_message(), "shrank while it was read: found 100000 bytes"));
    free_wish(&w);
    rig_close(&r);
}

TEST(a_load_given_up_while_queued_writes_nothing)
{
    rig r = {0};
    wish w = {0};
    checkpoint_init(&r.files);
    add_wish(&r.files);
    rig_open(&r, 2);
    make_wish(&w);
    mil_loader_begin(r.loader, WISH_BYTES);
    ask_all(&r, &w);
    CHECK_INT(mil_loader_weight(r.loader, &w.alone, 0, "absent", &wish_half), MIL_ERR_FILE);
    rig_close(&r);
    CHECK_INT(((uint16_t *)w.merged.data)[0], 0);
    free_wish(&w);
}

/* More than the queue first has room for; its growth may fail. */
TEST(a_long_queue_grows_or_says_that_it_cannot)
{
    static float out[1000];
    rig r = {0};
    checkpoint_init(&r.files);
    add(&r, "v", MIL_DTYPE_F32, 1000, 0);
    for (int failing = 0; failing < 2; failing++) {
        mil_status status = MIL_OK;
        size_t held = mil_memory_held_bytes();
        rig_open(&r, 2);
        memset(out, 0, sizeof out);
        mil_loader_begin(r.loader, 2 * 1000);
        mil_memory_fail_at((uint64_t)failing);
        for (int i = 0; i < 1000 && status == MIL_OK; i++)
            status = mil_loader_vector(r.loader, &out[i], "v", 1000, i, 1);
        if (status == MIL_OK)
            status = mil_loader_finish(r.loader);
        mil_memory_fail_at(0);
        CHECK_INT(status, failing ? MIL_ERR_MEMORY : MIL_OK);
        if (!failing)
            CHECK(memcmp(out, r.files.bytes + r.files.tensors[0].begin, sizeof out) == 0);
        mil_loader_free(r.loader);
        mil_progress_free(r.progress);
        mil_source_close(r.source);
        CHECK_INT(mil_memory_held_bytes(), held);
    }
    checkpoint_free(&r.files);
}

/* Windows are shifted by where in a page the file's bytes lie, up to the end of the largest one. */
TEST(a_row_as_long_as_the_largest_window_is_served_from_any_offset)
{
    enum { K = 8 << 18 };
    static const mil_slice slice = {2, K, 0, 2, K - 8, 8};
    for (int n_filler = 0; n_filler < 64; n_filler += 21) {
        rig r = {0};
        checkpoint_init(&r.files);
        add(&r, "filler", MIL_DTYPE_F32, 1000 + n_filler / 4, 0);
        add(&r, "w", MIL_DTYPE_F32, 2, K);
        rig_open(&r, 1);
        mil_weight weight = make_weight(8, 1, (int32_t[]){2}, 0);
        CHECK_INT(mil_loader_weight(r.loader, &weight, 0, "w", &slice), MIL_OK);
        check_part(&weight, 0, &r.files, 1, &slice);
        free(weight.data);
        rig_close(&r);
    }
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
    mil_loader_begin(r.loader, 180128);
    CHECK_INT(mil_loader_weight(r.loader, &weight, 0, "w", &slice), MIL_OK);
    mil_progress_read(r.progress, &done, &total);
    CHECK_INT(done, 0);
    CHECK_INT(mil_loader_vector(r.loader, out, "v", 64, 0, 64), MIL_OK);
    CHECK_INT(mil_loader_finish(r.loader), MIL_OK);
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
        mil_status status = mil_loader_create(&loader, source, &fake_backend, NULL, 3, NULL);
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
