#include "loader/adapter.h"

#include "fake_backend.h"
#include "loader/source.h"

/* hidden 96, 4 query heads and 2 KV heads of 8, ffn 64. */
static const mil_config config = {.hidden = 96,
                                  .ffn = 64,
                                  .n_layers = 3,
                                  .n_heads = 4,
                                  .n_kv_heads = 2,
                                  .head_dim = 8,
                                  .vocab = 50,
                                  .max_position = 64};

#define MAX_MODULES 8

typedef struct rig {
    checkpoint files;
    mil_adapter_module_info modules[MAX_MODULES];
    mil_adapter_info info;
} rig;

static const char *tensor_name(int32_t layer, mil_projection projection, char matrix)
{
    static char names[3][MIL_N_PROJECTIONS][2][32];
    char *name = names[layer][projection][matrix == 'B'];
    snprintf(name, 32, "%d.%s.lora_%c", layer, mil_projection_name(projection), matrix);
    return name;
}

static void add(rig *r, int32_t layer, mil_projection projection, int32_t rank, mil_dtype dtype)
{
    mil_shard full;
    CHECK_INT(mil_shard_init(&full, &config, 0, 1), MIL_OK);
    int64_t in = full.projections[projection].full_cols;
    int64_t out = full.projections[projection].full_rows;
    uint64_t seed = (uint64_t)(layer * 100 + projection * 10);
    const char *a = tensor_name(layer, projection, 'A'), *b = tensor_name(layer, projection, 'B');
    test_fill(checkpoint_add(&r->files, a, dtype, rank, in), dtype, rank * in, seed);
    test_fill(checkpoint_add(&r->files, b, dtype, out, rank), dtype, out * rank, seed + 1);
    r->modules[r->info.n_modules++] =
        (mil_adapter_module_info){.layer = layer,
                                  .projection = projection,
                                  .rank = rank,
                                  .scale = 0.5f * (float)rank,
                                  .a = r->files.tensors[r->files.info.n_tensors - 2],
                                  .b = r->files.tensors[r->files.info.n_tensors - 1]};
}

static void rig_init(rig *r)
{
    memset(r, 0, sizeof *r);
    checkpoint_init(&r->files);
    add(r, 2, MIL_PROJECTION_DOWN, 5, MIL_DTYPE_F32);
    add(r, 0, MIL_PROJECTION_V, 16, MIL_DTYPE_BF16);
    add(r, 0, MIL_PROJECTION_Q, 4, MIL_DTYPE_F16);
    add(r, 2, MIL_PROJECTION_O, 17, MIL_DTYPE_BF16);
    add(r, 0, MIL_PROJECTION_GATE, 1, MIL_DTYPE_F32);
    checkpoint_write(&r->files);
    r->info.files = &r->files.file;
    r->info.n_files = 1;
    r->info.modules = r->modules;
}

static mil_status init_on(mil_adapter *adapter, const rig *r, int32_t rank, int32_t world)
{
    mil_shard shard;
    CHECK_INT(mil_shard_init(&shard, &config, rank, world), MIL_OK);
    return mil_adapter_init(adapter, &r->info, &config, &shard, &fake_backend, NULL);
}

/* Element (row, col) of one of the files' tensors as bf16. */
static uint16_t element_of(const rig *r, const mil_tensor_info *tensor, int64_t row, int64_t col)
{
    size_t at = (size_t)(row * tensor->shape[1] + col) * mil_dtype_bytes(tensor->dtype);
    return test_bf16_of(test_double_of(r->files.bytes + tensor->begin + at, tensor->dtype));
}

static void check_module(const rig *r, const mil_adapter *adapter, const mil_shard *shard,
                         const mil_adapter_module_info *info)
{
    const mil_lora_module *module =
        &adapter->modules[info->layer * MIL_N_PROJECTIONS + (int)info->projection];
    const mil_slice *slice = &shard->projections[info->projection];
    CHECK_INT(module->rank, info->rank);
    CHECK_INT(module->padded_rank, (info->rank + 15) / 16 * 16);
    CHECK_INT(module->in, slice->n_cols);
    CHECK_INT(module->out, slice->n_rows);
    CHECK(module->scale == info->scale);
    CHECK_INT((uintptr_t)module->a % MIL_ALIGN, 0);
    CHECK_INT((uintptr_t)module->b % MIL_ALIGN, 0);

    const uint16_t *a = module->a, *b = module->b;
    CHECK_INT(*a++, info->rank);
    CHECK_INT(*b++, info->rank);
    for (int64_t row = 0; row < info->rank; row++)
        for (int64_t col = 0; col < slice->n_cols; col++)
            CHECK_INT(*a++, element_of(r, &info->a, row, slice->col_begin + col));
    for (int64_t row = 0; row < slice->n_rows; row++)
        for (int64_t col = 0; col < info->rank; col++)
            CHECK_INT(*b++, element_of(r, &info->b, slice->row_begin + row, col));
}

/* ---- what is loaded ---- */

TEST(every_rank_gets_the_slices_of_its_base_weights)
{
    rig r;
    rig_init(&r);
    for (int32_t world = 1; world <= 4; world *= 2) {
        for (int32_t rank = 0; rank < world; rank++) {
            mil_adapter adapter;
            mil_shard shard;
            CHECK_INT(mil_shard_init(&shard, &config, rank, world), MIL_OK);
            CHECK_INT(init_on(&adapter, &r, rank, world), MIL_OK);
            CHECK_INT(adapter.max_padded_rank, 32);
            for (int32_t m = 0; m < r.info.n_modules; m++)
                check_module(&r, &adapter, &shard, &r.modules[m]);
            mil_adapter_deinit(&adapter);
            CHECK(adapter.modules == NULL && adapter.slab.data == NULL);
        }
    }
    checkpoint_free(&r.files);
}

TEST(modules_that_the_adapter_does_not_touch_have_rank_0)
{
    rig r;
    rig_init(&r);
    mil_adapter adapter;
    CHECK_INT(init_on(&adapter, &r, 0, 1), MIL_OK);
    int n = 0;
    for (int i = 0; i < config.n_layers * MIL_N_PROJECTIONS; i++)
        n += adapter.modules[i].rank != 0;
    CHECK_INT(n, r.info.n_modules);
    CHECK_INT(adapter.modules[MIL_N_PROJECTIONS + MIL_PROJECTION_Q].rank, 0);
    mil_adapter_deinit(&adapter);
    checkpoint_free(&r.files);
}

TEST(a_layer_is_one_block_with_a_before_b)
{
    rig r;
    rig_init(&r);
    mil_adapter adapter;
    CHECK_INT(init_on(&adapter, &r, 0, 1), MIL_OK);
    const char *next = adapter.slab.data;
    for (int i = 0; i < config.n_layers * MIL_N_PROJECTIONS; i++) {
        const mil_lora_module *m = &adapter.modules[i];
        if (m->rank == 0)
            continue;
        CHECK(m->a == next);
        next += mil_round_up(fake_lora_a_bytes(m->rank, m->in), MIL_ALIGN);
        CHECK(m->b == next);
        next += mil_round_up(fake_lora_b_bytes(m->out, m->rank), MIL_ALIGN);
    }
    mil_adapter_deinit(&adapter);
    checkpoint_free(&r.files);
}

/* ---- what is refused ---- */

static void check_refused(const rig *r, mil_status status, const char *a, const char *b)
{
    size_t held = mil_memory_held_bytes();
    mil_adapter adapter;
    mil_status found = init_on(&adapter, r, 0, 1);
    if (strstr(mil_status_message(), a) == NULL || strstr(mil_status_message(), b) == NULL)
        printf("message: %s\n", mil_status_message());
    CHECK_INT(found, status);
    CHECK(strstr(mil_status_message(), a) != NULL);
    CHECK(strstr(mil_status_message(), b) != NULL);
    CHECK_INT(mil_memory_held_bytes(), held);
    CHECK(adapter.modules == NULL && adapter.slab.data == NULL && adapter.n_layers == 0);
}

TEST(modules_outside_the_model_are_refused)
{
    rig r;
    rig_init(&r);
    mil_adapter_module_info good = r.modules[3], *m = &r.modules[3];
    m->layer = 3;
    check_refused(&r, MIL_ERR_ARGUMENT, "2.o_proj.lora_A", "layer 3, expected 0..2");
    m->layer = -1;
    check_refused(&r, MIL_ERR_ARGUMENT, "2.o_proj.lora_A", "layer -1, expected 0..2");
    *m = good;
    m->projection = MIL_N_PROJECTIONS;
    check_refused(&r, MIL_ERR_ARGUMENT, "2.o_proj.lora_A", "projection 7, expected 0..6");
    *m = good;
    m->layer = 0;
    m->projection = MIL_PROJECTION_V;
    check_refused(&r, MIL_ERR_ARGUMENT, "layer 0 v_proj is there twice", "expected once");
    *m = good;
    r.info.n_modules = 0;
    check_refused(&r, MIL_ERR_ARGUMENT, "found 0 modules", "at least 1");
    checkpoint_free(&r.files);
}

TEST(ranks_scales_and_shapes_that_do_not_fit_are_refused)
{
    rig r;
    rig_init(&r);
    mil_adapter_module_info good = r.modules[3], *m = &r.modules[3];
    m->rank = 0;
    check_refused(&r, MIL_ERR_ARGUMENT, "layer 2 o_proj has rank 0", "expected 1..512");
    m->rank = 513;
    check_refused(&r, MIL_ERR_ARGUMENT, "rank 513", "expected 1..512");
    m->rank = 16;
    check_refused(&r, MIL_ERR_SHAPE, "'2.o_proj.lora_A' has shape [17, 32]", "expected [16, 32]");
    *m = good;
    m->scale = INFINITY;
    check_refused(&r, MIL_ERR_ARGUMENT, "layer 2 o_proj has scale inf", "expected a finite");
    m->scale = NAN;
    check_refused(&r, MIL_ERR_ARGUMENT, "scale", "expected a finite");
    *m = good;
    m->b.shape[0] = 48;
    m->b.shape[1] = 34;
    check_refused(&r, MIL_ERR_SHAPE, "'2.o_proj.lora_B' has shape [48, 34]", "expected [96, 17]");
    *m = good;
    m->a.end = m->a.begin;
    check_refused(&r, MIL_ERR_FILE, "'2.o_proj.lora_A' has 0 bytes", "expected 1088");
    checkpoint_free(&r.files);
}

TEST(an_adapter_of_another_base_is_refused_whole)
{
    rig r;
    rig_init(&r);
    mil_config other = config;
    other.hidden = 128;
    mil_shard shard;
    mil_adapter adapter;
    CHECK_INT(mil_shard_init(&shard, &other, 0, 1), MIL_OK);
    CHECK_INT(mil_adapter_init(&adapter, &r.info, &other, &shard, &fake_backend, NULL),
              MIL_ERR_SHAPE);
    CHECK(
        strstr(mil_status_message(), "'2.down_proj.lora_B' has shape [96, 5], expected [128, 5]"));
    checkpoint_free(&r.files);
}

TEST(values_that_are_not_finite_as_bfloat16_are_named)
{
    /* 3.4e38 is finite as float32 and rounds to infinity as bfloat16; the others are not finite. */
    static const float bad[] = {3.4e38f, -INFINITY, NAN};
    for (size_t i = 0; i < 3; i++) {
        rig r;
        rig_init(&r);
        memcpy(r.files.bytes + r.modules[0].b.begin + (95 * 5 + 3) * 4, &bad[i], 4);
        checkpoint_write(&r.files);
        check_refused(&r, MIL_ERR_NUMERICS, "'2.down_proj.lora_B'",
                      "at [95, 3], expected a finite");
        checkpoint_free(&r.files);
    }
    static const uint16_t halves[] = {0x7c00, 0xfe01, 0x7f80,
                                      0xffc0}; /* two float16, two bfloat16 */
    for (int i = 0; i < 4; i++) {
        rig r;
        rig_init(&r);
        const mil_tensor_info *tensor = &r.modules[i < 2 ? 2 : 1].a;
        memcpy(r.files.bytes + tensor->begin + (1 * 96 + 7) * 2, &halves[i], 2);
        checkpoint_write(&r.files);
        check_refused(&r, MIL_ERR_NUMERICS, tensor->name, "at [1, 7], expected a finite");
        checkpoint_free(&r.files);
    }
}

TEST(missing_and_shrunk_files_are_refused)
{
    rig r;
    rig_init(&r);
    CHECK_INT(truncate(r.files.path, 100), 0);
    check_refused(&r, MIL_ERR_FILE, r.files.path, "found 100 bytes");
    CHECK_INT(unlink(r.files.path), 0);
    check_refused(&r, MIL_ERR_FILE, r.files.path, "No such file");
    checkpoint_free(&r.files);
}

TEST(no_allocation_that_fails_leaks)
{
    rig r;
    rig_init(&r);
    size_t held = mil_memory_held_bytes();
    for (uint64_t k = 1;; k++) {
        mil_adapter adapter;
        mil_memory_fail_at(k);
        mil_status status = init_on(&adapter, &r, 1, 2);
        mil_memory_fail_at(0);
        mil_adapter_deinit(&adapter);
        CHECK_INT(mil_memory_held_bytes(), held);
        if (status == MIL_OK) {
            CHECK(k > 6);
            break;
        }
        CHECK_INT(status, MIL_ERR_MEMORY);
    }
    checkpoint_free(&r.files);
}

TEST(an_adapter_that_does_not_fit_says_by_how_much_and_takes_nothing)
{
    rig r;
    mil_adapter adapter;
    size_t held;
    rig_init(&r);
    held = mil_memory_held_bytes();
    fake_free_bytes = 1024;
    CHECK_INT(init_on(&adapter, &r, 1, 2), MIL_ERR_MEMORY);
    fake_free_bytes = UINT64_MAX;
    CHECK(strstr(mil_status_message(), "adapter: needs ") != NULL);
    CHECK(strstr(mil_status_message(), ", fake has 1.00 KiB free") != NULL);
    CHECK(strstr(mil_status_message(), " too few") != NULL);
    CHECK_INT(mil_memory_held_bytes(), held);
    CHECK_INT(init_on(&adapter, &r, 1, 2), MIL_OK);
    mil_adapter_deinit(&adapter);
    checkpoint_free(&r.files);
}

/* ---- dummy ---- */

TEST(dummy_adapters_are_seeded_and_need_no_files)
{
    rig r;
    rig_init(&r);
    r.info.is_dummy = true;
    r.info.dummy_seed = 5;
    r.info.n_files = 0;
    r.modules[0].a.name = r.modules[0].b.name = NULL;
    mil_adapter adapter;
    CHECK_INT(init_on(&adapter, &r, 1, 2), MIL_OK);

    mil_checkpoint_info info = {.is_dummy = true, .dummy_seed = 5};
    mil_source *source;
    mil_source_tensor tensor;
    uint16_t a[5 * 64];
    CHECK_INT(mil_source_open(&source, &info), MIL_OK);
    CHECK_INT(mil_source_find(source, "layers.2.down_proj.lora_A", 5, 64, &tensor), MIL_OK);
    CHECK_INT(mil_source_read_rows(source, &tensor, a, 0, 5), MIL_OK);
    const uint16_t *packed = adapter.modules[2 * MIL_N_PROJECTIONS + MIL_PROJECTION_DOWN].a;
    for (int row = 0; row < 5; row++)
        CHECK(memcmp(packed + 1 + row * 32, a + row * 64 + 32, 64) == 0);
    mil_source_close(source);
    mil_adapter_deinit(&adapter);
    checkpoint_free(&r.files);
}

TEST_MAIN()
