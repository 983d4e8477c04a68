#include "loader/source.h"

#include "base/file.h"
#include "checkpoint.h"

#include <sys/stat.h>

static mil_source *open_source(const checkpoint *c)
{
    mil_source *source = NULL;
    CHECK_INT(mil_source_open(&source, &c->info), MIL_OK);
    return source;
}

/* Two tensors, in one file: "a" float32 [3, 5] and "b" bfloat16 [7]. */
static void small_checkpoint(checkpoint *c)
{
    checkpoint_init(c);
    test_fill(checkpoint_add(c, "b", MIL_DTYPE_BF16, 7, 0), MIL_DTYPE_BF16, 7, 1);
    test_fill(checkpoint_add(c, "a", MIL_DTYPE_F32, 3, 5), MIL_DTYPE_F32, 15, 2);
    checkpoint_write(c);
}

/* Opening fails with status and a message that has both texts; nothing stays held. */
static void check_refused(const checkpoint *c, mil_status status, const char *a, const char *b)
{
    size_t held = mil_memory_held_bytes();
    mil_source *source = NULL;
    mil_status found = mil_source_open(&source, &c->info);
    if (strstr(mil_status_message(), a) == NULL || strstr(mil_status_message(), b) == NULL)
        printf("message: %s\n", mil_status_message());
    CHECK_INT(found, status);
    CHECK(strstr(mil_status_message(), a) != NULL);
    CHECK(strstr(mil_status_message(), b) != NULL);
    CHECK(source == NULL);
    CHECK_INT(mil_memory_held_bytes(), held);
}

/* ---- files ---- */

TEST(rows_come_as_they_lie_in_the_file)
{
    checkpoint c;
    small_checkpoint(&c);
    mil_source *source = open_source(&c);
    mil_source_tensor a, b;
    CHECK_INT(mil_source_find(source, "a", 3, 5, &a), MIL_OK);
    CHECK_INT(mil_source_find(source, "b", 7, 1, &b), MIL_OK);
    CHECK_INT(a.dtype, MIL_DTYPE_F32);
    CHECK_INT(b.dtype, MIL_DTYPE_BF16);
    CHECK_INT(a.row_bytes, 20);

    unsigned char out[64];
    CHECK_INT(mil_source_read_rows(source, &a, out, 1, 2), MIL_OK);
    CHECK(memcmp(out, c.bytes + c.tensors[1].begin + 20, 40) == 0);
    CHECK_INT(mil_source_read_rows(source, &b, out, 0, 7), MIL_OK);
    CHECK(memcmp(out, c.bytes + c.tensors[0].begin, 14) == 0);
    CHECK_INT(mil_source_read_rows(source, &b, out, 7, 0), MIL_OK);
    mil_source_close(source);
    checkpoint_free(&c);
}

TEST(rows_beyond_the_tensor_are_not_read)
{
    checkpoint c;
    small_checkpoint(&c);
    mil_source *source = open_source(&c);
    mil_source_tensor a;
    unsigned char out[128];
    CHECK_INT(mil_source_find(source, "a", 3, 5, &a), MIL_OK);
    CHECK_INT(mil_source_read_rows(source, &a, out, 2, 2), MIL_ERR_INTERNAL);
    CHECK_INT(mil_source_read_rows(source, &a, out, -1, 1), MIL_ERR_INTERNAL);
    CHECK_INT(mil_source_read_rows(source, &a, out, 1, INT64_MAX), MIL_ERR_INTERNAL);
    mil_source_close(source);
    checkpoint_free(&c);
}

TEST(callers_structs_are_not_needed_after_open)
{
    checkpoint c;
    small_checkpoint(&c);
    char name[] = "a";
    c.tensors[1].name = name;
    mil_source *source = open_source(&c);
    name[0] = 'x';
    memset(c.tensors, 0xff, sizeof c.tensors);
    mil_source_tensor a;
    CHECK_INT(mil_source_find(source, "a", 3, 5, &a), MIL_OK);
    mil_source_close(source);
    checkpoint_free(&c);
}

TEST(absent_misshapen_and_integer_tensors_are_named)
{
    checkpoint c;
    small_checkpoint(&c);
    checkpoint_add(&c, "n", MIL_DTYPE_I32, 2, 2);
    checkpoint_write(&c);
    mil_source *source = open_source(&c);
    mil_source_tensor out;
    CHECK_INT(mil_source_find(source, "lost", 4, 2, &out), MIL_ERR_FILE);
    CHECK(strstr(mil_status_message(), "no tensor 'lost' among 3, expected one of shape [4, 2]"));
    CHECK_INT(mil_source_find(source, "a", 5, 3, &out), MIL_ERR_SHAPE);
    CHECK(strstr(mil_status_message(), "'a' has shape [3, 5], expected [5, 3]"));
    CHECK_INT(mil_source_find(source, "b", 8, 1, &out), MIL_ERR_SHAPE);
    CHECK(strstr(mil_status_message(), "'b' has shape [7], expected [8]"));
    CHECK_INT(mil_source_find(source, "n", 2, 2, &out), MIL_ERR_SHAPE);
    CHECK(strstr(mil_status_message(), "'n' has dtype int32"));
    mil_source_close(source);
    checkpoint_free(&c);
}

TEST(files_that_are_not_what_the_header_reader_saw_are_refused)
{
    checkpoint c;
    small_checkpoint(&c);
    CHECK_INT(truncate(c.path, (off_t)c.file.n_bytes - 1), 0);
    char found[32], expected[32];
    snprintf(found, sizeof found, "found %d bytes", (int)c.file.n_bytes - 1);
    snprintf(expected, sizeof expected, "expected %d", (int)c.file.n_bytes);
    check_refused(&c, MIL_ERR_FILE, found, expected);
    CHECK_INT(truncate(c.path, (off_t)c.file.n_bytes + 1), 0);
    check_refused(&c, MIL_ERR_FILE, c.path, expected);

    CHECK_INT(unlink(c.path), 0);
    check_refused(&c, MIL_ERR_FILE, c.path, "No such file");
    CHECK_INT(mkfifo(c.path, 0600), 0);
    check_refused(&c, MIL_ERR_FILE, c.path, "expected a regular file");
    c.file.path = "/tmp";
    check_refused(&c, MIL_ERR_FILE, "/tmp", "expected a regular file");
    checkpoint_free(&c);
}

TEST(a_file_that_shrinks_while_open_is_an_error)
{
    checkpoint c;
    small_checkpoint(&c);
    mil_source *source = open_source(&c);
    mil_source_tensor a;
    unsigned char out[64];
    CHECK_INT(mil_source_find(source, "a", 3, 5, &a), MIL_OK);
    CHECK_INT(truncate(c.path, (off_t)c.file.n_bytes - 8), 0);
    CHECK_INT(mil_source_read_rows(source, &a, out, 0, 1), MIL_OK);
    CHECK_INT(mil_source_read_rows(source, &a, out, 0, 3), MIL_ERR_FILE);
    CHECK(strstr(mil_status_message(), "shrank"));
    mil_source_close(source);
    checkpoint_free(&c);
}

/* ---- what the header reader says ---- */

TEST(byte_ranges_outside_their_file_are_refused)
{
    checkpoint c;
    small_checkpoint(&c);
    mil_tensor_info good = c.tensors[1], *a = &c.tensors[1];
    a->end = c.file.n_bytes + 1;
    a->begin = a->end - 60;
    check_refused(&c, MIL_ERR_FILE, "'a' has bytes", "within the file's");
    *a = good;
    a->begin = a->end + 1;
    check_refused(&c, MIL_ERR_FILE, "'a' has bytes", "within the file's");
    *a = good;
    a->begin = UINT64_MAX - 10;
    a->end = UINT64_MAX;
    check_refused(&c, MIL_ERR_FILE, "18446744073709551615", "within the file's");
    *a = good;
    a->begin++;
    check_refused(&c, MIL_ERR_FILE, "has 59 bytes", "expected 60 for [3, 5] of float32");
    a->begin = good.begin - 1;
    check_refused(&c, MIL_ERR_FILE, "has 61 bytes", "expected 60 for [3, 5] of float32");
    *a = good;
    a->file = 1;
    check_refused(&c, MIL_ERR_FILE, "in file 1", "expected 0..0");
    a->file = -1;
    check_refused(&c, MIL_ERR_FILE, "in file -1", "expected 0..0");
    checkpoint_free(&c);
}

TEST(shapes_and_dtypes_that_make_no_sense_are_refused)
{
    checkpoint c;
    small_checkpoint(&c);
    mil_tensor_info good = c.tensors[1], *a = &c.tensors[1];
    a->rank = 3;
    check_refused(&c, MIL_ERR_SHAPE, "rank 3", "expected 1 or 2");
    a->rank = 0;
    check_refused(&c, MIL_ERR_SHAPE, "rank 0", "expected 1 or 2");
    *a = good;
    a->shape[0] = 0;
    check_refused(&c, MIL_ERR_SHAPE, "[0, 5]", "expected 1..2^40");
    a->shape[0] = -3;
    check_refused(&c, MIL_ERR_SHAPE, "[-3, 5]", "expected 1..2^40");
    a->shape[0] = ((int64_t)1 << 40) + 1;
    check_refused(&c, MIL_ERR_SHAPE, "[1099511627777, 5]", "expected 1..2^40");
    a->shape[0] = a->shape[1] = (int64_t)1 << 40;
    check_refused(&c, MIL_ERR_SHAPE, "[1099511627776, 1099511627776]", "overflow");
    /* 2^40 * 2^22 * 4 wraps to 0 bytes. */
    a->shape[1] = (int64_t)1 << 22;
    a->end = a->begin;
    check_refused(&c, MIL_ERR_SHAPE, "'a'", "overflow");
    *a = good;
    a->rank = 1;
    check_refused(&c, MIL_ERR_SHAPE, "rank 1 has shape [3, 5]", "second 1");
    *a = good;
    a->dtype = (mil_dtype)9;
    check_refused(&c, MIL_ERR_SHAPE, "'a' has dtype 9", "expected");
    checkpoint_free(&c);
}

TEST(names_are_there_once_and_of_sane_length)
{
    checkpoint c;
    small_checkpoint(&c);
    c.tensors[1].name = "b";
    check_refused(&c, MIL_ERR_FILE, "'b' is there twice", "expected once");
    c.tensors[1].name = "";
    check_refused(&c, MIL_ERR_FILE, "tensor 1 has a name of 0 bytes", "expected 1..512");
    c.tensors[1].name = NULL;
    check_refused(&c, MIL_ERR_FILE, "tensor 1", "expected 1..512");
    char name[600];
    memset(name, 'n', sizeof name);
    c.tensors[1].name = name;
    check_refused(&c, MIL_ERR_FILE, "513 bytes or more", "expected 1..512");
    c.info.n_tensors = -1;
    check_refused(&c, MIL_ERR_ARGUMENT, "-1 tensors", "expected");
    checkpoint_free(&c);
}

TEST(no_allocation_that_fails_leaks)
{
    checkpoint c;
    small_checkpoint(&c);
    size_t held = mil_memory_held_bytes();
    for (uint64_t k = 1;; k++) {
        mil_source *source = NULL;
        mil_memory_fail_at(k);
        mil_status status = mil_source_open(&source, &c.info);
        mil_memory_fail_at(0);
        mil_source_close(source);
        CHECK_INT(mil_memory_held_bytes(), held);
        if (status == MIL_OK) {
            CHECK(k > 3);
            break;
        }
        CHECK_INT(status, MIL_ERR_MEMORY);
        CHECK(source == NULL);
    }
    checkpoint_free(&c);
}

/* ---- dummy ---- */

static mil_source *open_dummy(uint64_t seed)
{
    mil_checkpoint_info info = {.is_dummy = true, .dummy_seed = seed};
    mil_source *source = NULL;
    CHECK_INT(mil_source_open(&source, &info), MIL_OK);
    return source;
}

/* Values computed by Python integers and ml_dtypes from the formula in source.h. */
TEST(dummy_elements_are_those_of_the_formula)
{
    mil_source *source = open_dummy(42);
    mil_source_tensor up, bias;
    static uint16_t out[128 * 64];
    CHECK_INT(mil_source_find(source, "model.layers.0.mlp.up_proj.weight", 128, 64, &up), MIL_OK);
    CHECK_INT(up.dtype, MIL_DTYPE_BF16);
    CHECK_INT(mil_source_read_rows(source, &up, out, 0, 128), MIL_OK);
    CHECK_INT(out[0], 0xbbdb);
    CHECK_INT(out[1], 0xbc96);
    CHECK_INT(out[5 * 64 + 7], 0x3ce4);
    CHECK_INT(out[100 * 64 + 63], 0xbc82);

    float values[4];
    CHECK_INT(mil_source_find(source, "model.layers.0.self_attn.q_proj.bias", 4, 1, &bias), MIL_OK);
    CHECK_INT(bias.dtype, MIL_DTYPE_F32);
    CHECK_INT(mil_source_read_rows(source, &bias, values, 0, 4), MIL_OK);
    CHECK(values[3] == -42359 * 0x1p-24f);
    mil_source_close(source);
}

TEST(dummy_elements_do_not_depend_on_how_they_are_read)
{
    mil_source *source = open_dummy(7);
    mil_source_tensor tensor;
    static uint16_t whole[50 * 33], rows[50 * 33];
    CHECK_INT(mil_source_find(source, "w", 50, 33, &tensor), MIL_OK);
    CHECK_INT(mil_source_read_rows(source, &tensor, whole, 0, 50), MIL_OK);
    for (int64_t row = 0; row < 50; row++)
        CHECK_INT(mil_source_read_rows(source, &tensor, rows + row * 33, row, 1), MIL_OK);
    CHECK(memcmp(whole, rows, sizeof whole) == 0);
    mil_source_close(source);
}

TEST(dummy_tensors_differ_by_name_and_seed)
{
    uint16_t out[3][64];
    static const char *const names[3] = {"w", "v", "w"};
    for (int i = 0; i < 3; i++) {
        mil_source *source = open_dummy(i < 2 ? 1 : 2);
        mil_source_tensor tensor;
        CHECK_INT(mil_source_find(source, names[i], 8, 8, &tensor), MIL_OK);
        CHECK_INT(mil_source_read_rows(source, &tensor, out[i], 0, 8), MIL_OK);
        mil_source_close(source);
    }
    CHECK(memcmp(out[0], out[1], sizeof out[0]) != 0);
    CHECK(memcmp(out[0], out[2], sizeof out[0]) != 0);
}

TEST(dummy_weights_are_spread_evenly_and_norms_are_one)
{
    mil_source *source = open_dummy(3);
    mil_source_tensor tensor;
    static uint16_t out[1000 * 100];
    CHECK_INT(mil_source_find(source, "w", 1000, 100, &tensor), MIL_OK);
    CHECK_INT(mil_source_read_rows(source, &tensor, out, 0, 1000), MIL_OK);
    double sum = 0, squares = 0;
    for (int i = 0; i < 100000; i++) {
        double value = test_double_of(&out[i], MIL_DTYPE_BF16);
        CHECK(fabs(value) <= 1.0 / 32);
        sum += value;
        squares += value * value;
    }
    /* Uniform: mean 0 and deviation 1/32/sqrt(3); five standard errors of 10^5 draws. */
    double deviation = sqrt(1.0 / 3) / 32;
    CHECK(fabs(sum / 1e5) < 5 * deviation / sqrt(1e5));
    CHECK(fabs(sqrt(squares / 1e5) / deviation - 1) < 5 * sqrt(0.2 / 1e5));

    float ones[9];
    CHECK_INT(mil_source_find(source, "model.norm.weight", 9, 1, &tensor), MIL_OK);
    CHECK_INT(tensor.dtype, MIL_DTYPE_F32);
    CHECK_INT(mil_source_read_rows(source, &tensor, ones, 0, 9), MIL_OK);
    for (int i = 0; i < 9; i++)
        CHECK(ones[i] == 1.0f);
    mil_source_close(source);
}

TEST_MAIN()
