/* Opening and closing models, adapter contents by reference, rope tables, and teams of ranks. */
#include "model/model.h"
#include "model/runner.h"

#include "base/memory.h"
#include "dummy_model.h"

#include <math.h>

/* ---- open ---- */

TEST(a_model_reports_what_it_holds_and_gives_it_back)
{
    mil_config config = dummy_config();
    for (int32_t world = 1; world <= 4; world *= 2) {
        size_t held = mil_memory_held_bytes();
        mil_model *model;
        mil_model_report report;
        CHECK_INT(dummy_open(&model, &config, world, world), MIL_OK);
        mil_model_report_get(model, &report);
        CHECK_INT(report.world, world);
        CHECK_INT(report.n_threads, world);
        CHECK_INT(report.n_adapters, 0);
        CHECK(report.weight_bytes > 300000);
        CHECK(strcmp(report.device, "cpu") == 0);
        mil_model_free(model);
        CHECK(mil_memory_held_bytes() == held);
    }
}

TEST(an_indivisible_world_is_refused_with_both_numbers)
{
    mil_config config = dummy_config();
    mil_model *model;
    CHECK_INT(dummy_open(&model, &config, 3, 1), MIL_ERR_ARGUMENT);
    CHECK(strstr(mil_status_message(), "4") != NULL && strstr(mil_status_message(), "3") != NULL);
    CHECK_INT(dummy_open(&model, &config, 0, 1), MIL_ERR_ARGUMENT);
}

TEST(an_unknown_device_is_refused_with_what_is_served)
{
    static const char *const names[] = {"tpu", "cuda:+1", "cuda:01", "cpu:3"};
    mil_config config = dummy_config();
    mil_checkpoint_info checkpoint = {.is_dummy = true};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        mil_model_options options = {.device = names[i], .tensor_parallel = 1};
        mil_model *model;
        CHECK_INT(mil_model_open(&model, &config, &checkpoint, &options), MIL_ERR_ARGUMENT);
        CHECK(strstr(mil_status_message(), names[i]) != NULL);
        CHECK(strstr(mil_status_message(), "'cpu'") != NULL);
    }
}

TEST(weights_beyond_memory_are_refused_with_both_figures_before_they_are_taken)
{
    mil_config config = dummy_config();
    config.hidden = 1 << 20;
    config.vocab = 1 << 24;
    size_t held = mil_memory_held_bytes();
    mil_model *model;
    CHECK_INT(dummy_open(&model, &config, 1, 1), MIL_ERR_MEMORY);
    /* Embedding and head alone are 64 TiB. */
    CHECK(strstr(mil_status_message(), "model: weights need 64.0") != NULL);
    CHECK(strstr(mil_status_message(), "cpu has ") != NULL);
    CHECK(strstr(mil_status_message(), " too few") != NULL);
    CHECK(mil_memory_held_bytes() == held);
}

TEST(a_missing_tensor_is_named_before_memory_is_taken)
{
    mil_config config = dummy_config();
    mil_checkpoint_info checkpoint = {.n_tensors = 0};
    mil_model_options options = {.device = "auto", .tensor_parallel = 1};
    mil_model *model;
    size_t held = mil_memory_held_bytes();
    CHECK_INT(mil_model_open(&model, &config, &checkpoint, &options), MIL_ERR_FILE);
    CHECK(strstr(mil_status_message(), "model.embed_tokens.weight") != NULL);
    CHECK(mil_memory_held_bytes() == held);
}

TEST(a_cancelled_open_is_closed_and_gives_all_back)
{
    mil_config config = dummy_config();
    mil_checkpoint_info checkpoint = {.is_dummy = true};
    mil_model_options options = {.device = "cpu", .tensor_parallel = 2};
    mil_model *model;
    uint64_t n_done, n_total;
    CHECK_INT(mil_progress_create(&options.progress), MIL_OK);
    size_t held = mil_memory_held_bytes();
    CHECK_INT(mil_model_open(&model, &config, &checkpoint, &options), MIL_OK);
    mil_progress_read(options.progress, &n_done, &n_total);
    CHECK(n_total > 300000);
    CHECK_INT(n_done, n_total);
    mil_model_free(model);
    mil_progress_cancel(options.progress);
    CHECK_INT(mil_model_open(&model, &config, &checkpoint, &options), MIL_ERR_CLOSED);
    CHECK(mil_memory_held_bytes() == held);
    mil_progress_free(options.progress);
}

TEST(bad_sizes_are_refused_by_field)
{
    struct {
        const char *field;
        size_t offset;
        int32_t value;
    } const cases[] = {
        {"hidden", offsetof(mil_config, hidden), 0},
        {"vocab", offsetof(mil_config, vocab), -5},
        {"head_dim", offsetof(mil_config, head_dim), 36},
        {"head_dim", offsetof(mil_config, head_dim), 264},
        {"n_kv_heads", offsetof(mil_config, n_kv_heads), 3},
        {"n_layers", offsetof(mil_config, n_layers), 1 << 20},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        mil_config config = dummy_config();
        mil_model *model;
        memcpy((char *)&config + cases[i].offset, &cases[i].value, sizeof(int32_t));
        CHECK(dummy_open(&model, &config, 1, 1) != MIL_OK);
        CHECK(strstr(mil_status_message(), cases[i].field) != NULL);
    }
}

TEST(every_failed_allocation_of_an_open_gives_all_back)
{
    mil_config config = dummy_config();
    config.attention_bias = true;
    config.tie_embeddings = true;
    size_t held = mil_memory_held_bytes();
    mil_status status = MIL_ERR_MEMORY;
    uint64_t k = 0;
    while (status != MIL_OK) {
        mil_model *model;
        mil_memory_fail_at(++k);
        status = dummy_open(&model, &config, 2, 2);
        mil_memory_fail_at(0);
        if (status == MIL_OK)
            mil_model_free(model);
        else
            CHECK_INT(status, MIL_ERR_MEMORY);
        CHECK(mil_memory_held_bytes() == held);
    }
    CHECK(k > 10);
}

/* ---- adapters ---- */

TEST(a_content_lives_until_its_last_reference)
{
    mil_config config = dummy_config();
    mil_model *model;
    mil_model_report report;
    int32_t first, second, third;
    CHECK_INT(dummy_open(&model, &config, 2, 2), MIL_OK);
    size_t held = mil_memory_held_bytes();
    CHECK_INT(dummy_add_adapter(model, &config, 8, 1, &first), MIL_OK);
    CHECK_INT(dummy_add_adapter(model, &config, 16, 2, &second), MIL_OK);
    CHECK(first >= 0 && second != first);
    CHECK_INT(mil_model_hold_adapter(model, first), MIL_OK);
    CHECK_INT(mil_model_release_adapter(model, first), MIL_OK);
    mil_model_report_get(model, &report);
    CHECK_INT(report.n_adapters, 2);
    CHECK(report.adapter_bytes > 0);

    CHECK_INT(mil_model_release_adapter(model, first), MIL_OK);
    CHECK_INT(mil_model_release_adapter(model, first), MIL_ERR_NOT_FOUND);
    CHECK_INT(mil_model_hold_adapter(model, first), MIL_ERR_NOT_FOUND);
    CHECK_INT(mil_model_hold_adapter(model, -1), MIL_ERR_NOT_FOUND);
    CHECK_INT(dummy_add_adapter(model, &config, 4, 3, &third), MIL_OK);
    CHECK(third != first && third != second);
    CHECK_INT(mil_model_release_adapter(model, second), MIL_OK);
    CHECK_INT(mil_model_release_adapter(model, third), MIL_OK);
    mil_model_report_get(model, &report);
    CHECK_INT(report.n_adapters, 0);
    CHECK_INT(report.adapter_bytes, 0);
    /* The list itself stays: one block of 16 pointers with its header and alignment. */
    CHECK(mil_memory_held_bytes() - held < 1024);
    mil_model_free(model);
}

static int64_t n_clean; /* 16-bit words of freed slabs that are not NaN */

static void free_counting(struct mil_queue *queue, mil_slab *slab)
{
    const uint16_t *words = slab->data;
    (void)queue;
    for (size_t i = 0; i < slab->n_bytes / sizeof *words; i++)
        n_clean += words[i] != 0xffff;
    mil_slab_deinit(slab);
}

/* Words that are not NaN when an adapter of two ranks goes. */
static int64_t count_clean(bool poisons)
{
    mil_config config = dummy_config();
    mil_model *model;
    int32_t content;
    CHECK_INT(dummy_open(&model, &config, 2, 2), MIL_OK);
    const mil_backend *real = model->backend;
    mil_backend backend = *real;
    mil_device device = *real->device;
    device.free = free_counting;
    backend.device = &device;
    model->backend = &backend;
    if (poisons)
        mil_contents_poison(&model->contents);
    CHECK_INT(dummy_add_adapter(model, &config, 8, 1, &content), MIL_OK);
    n_clean = 0;
    CHECK_INT(mil_model_release_adapter(model, content), MIL_OK);
    model->backend = real;
    mil_model_free(model);
    return n_clean;
}

TEST(a_freed_content_is_poisoned_on_every_rank)
{
    CHECK(count_clean(false) > 1000);
    CHECK_INT(count_clean(true), 0);
}

TEST(contents_found_while_others_come_do_not_move)
{
    mil_config config = dummy_config();
    mil_model *model;
    const mil_content *before;
    const mil_content *after;
    int32_t first, other;
    CHECK_INT(dummy_open(&model, &config, 1, 1), MIL_OK);
    CHECK_INT(dummy_add_adapter(model, &config, 4, 1, &first), MIL_OK);
    CHECK_INT(mil_contents_find(&model->contents, first, &before), MIL_OK);
    const mil_lora_module *modules = before->adapters[0].modules;
    for (int32_t i = 0; i < 40; i++)
        CHECK_INT(dummy_add_adapter(model, &config, 4, 2, &other), MIL_OK);
    CHECK_INT(mil_contents_find(&model->contents, first, &after), MIL_OK);
    CHECK(before == after && after->adapters[0].modules == modules);
    mil_model_free(model);
}

TEST(a_failed_adapter_leaves_nothing)
{
    mil_config config = dummy_config();
    mil_model *model;
    int32_t content;
    CHECK_INT(dummy_open(&model, &config, 2, 2), MIL_OK);
    size_t held = mil_memory_held_bytes();
    mil_status status = MIL_ERR_MEMORY;
    for (uint64_t k = 1; status != MIL_OK; k++) {
        mil_memory_fail_at(k);
        status = dummy_add_adapter(model, &config, 8, 1, &content);
        mil_memory_fail_at(0);
        if (status == MIL_OK)
            break;
        mil_model_report report;
        mil_model_report_get(model, &report);
        CHECK_INT(status, MIL_ERR_MEMORY);
        CHECK_INT(report.n_adapters, 0);
        CHECK(mil_memory_held_bytes() - held < 1024);
    }
    mil_model_free(model);
}

/* ---- rope ---- */

typedef struct rope_golden {
    mil_rope_config rope;
    float cosines[4][4], sines[4][4];
} rope_golden;

static const int32_t golden_positions[4] = {1, 17, 4095, 99999};
static const int32_t golden_pairs[4] = {0, 9, 17, 31};

/* transformers 5.23.0, LlamaRotaryEmbedding of head_dim 64, at golden_positions and golden_pairs.
 */
static const rope_golden goldens[] = {
    {.rope = {.kind = MIL_ROPE_DEFAULT, .theta = 10000.0},
     .cosines = {{0.540302336f, 0.997189581f, 0.999971867f, 1.0f},
                 {-0.275163352f, 0.291673779f, 0.991885185f, 0.999997437f},
                 {-0.0659759939f, 0.70070225f, 0.759821057f, 0.854568422f},
                 {-0.509875357f, -0.993398786f, -0.578485608f, 0.718807101f}},
     .sines = {{0.841470957f, 0.0749191493f, 0.007498872f, 0.00013335215f},
               {-0.961397469f, 0.956517875f, 0.127137005f, 0.00226698467f},
               {-0.997821212f, -0.713453829f, -0.650132298f, 0.519338846f},
               {0.860248268f, 0.114711821f, 0.815692604f, 0.695209563f}}},
    {.rope = {.kind = MIL_ROPE_LINEAR, .theta = 10000.0, .factor = 4.0},
     .cosines = {{0.968912423f, 0.999824286f, 0.999998271f, 1.0f},
                 {-0.44608748f, 0.949642003f, 0.999492168f, 0.999999821f},
                 {0.917437375f, 0.197300717f, 0.176017806f, 0.990695715f},
                 {0.502475023f, -0.68649441f, 0.520056248f, -0.981590629f}},
     .sines = {{0.247403964f, 0.018746255f, 0.00187473453f, 3.33380376e-05f},
               {-0.894989371f, 0.313337058f, 0.0318651125f, 0.000566746574f},
               {-0.397880167f, 0.980343044f, 0.984386981f, 0.136095598f},
               {-0.864591718f, 0.727135062f, -0.854131997f, -0.190997109f}}},
    {.rope = {.kind = MIL_ROPE_LLAMA3,
              .theta = 500000.0,
              .factor = 32.0,
              .low_freq_factor = 1.0,
              .high_freq_factor = 4.0,
              .original_max_position = 8192},
     .cosines = {{0.540302336f, 0.999688625f, 1.0f, 1.0f},
                 {-0.275163352f, 0.911351025f, 0.999998629f, 1.0f},
                 {-0.0659759939f, -0.0905127823f, 0.92201066f, 0.99999994f},
                 {-0.509875357f, 0.461330414f, -0.960107207f, 0.999955654f}},
     .sines = {{0.841470957f, 0.0249528177f, 9.70828623e-05f, 9.41830649e-08f},
               {-0.961397469f, 0.411630064f, 0.00165040791f, 1.6011121e-06f},
               {-0.997821212f, 0.995895267f, 0.387164563f, 0.000385679654f},
               {0.860248268f, 0.887228429f, -0.279632241f, 0.00941807218f}}},
};

static void check_rope(const rope_golden *golden)
{
    mil_config config = dummy_config();
    mil_rope rope;
    config.head_dim = 64;
    config.max_position = 131072;
    config.rope = golden->rope;
    CHECK_INT(mil_rope_init(&rope, &config), MIL_OK);
    mil_rope_reach(&rope, 100);
    mil_rope_reach(&rope, 100000);
    for (int32_t i = 0; i < 4; i++)
        for (int32_t j = 0; j < 4; j++) {
            size_t at = (size_t)golden_positions[i] * 32 + (size_t)golden_pairs[j];
            /* torch's pow may differ by an ulp of the frequency, which the position multiplies. */
            double angle = golden_positions[i] * (double)rope.frequencies[golden_pairs[j]];
            double most = 2e-7 + angle * 1.2e-7;
            CHECK(fabs((double)rope.cos_table[at] - (double)golden->cosines[i][j]) <= most);
            CHECK(fabs((double)rope.sin_table[at] - (double)golden->sines[i][j]) <= most);
        }
    mil_rope_deinit(&rope);
}

TEST(rope_tables_are_those_of_transformers)
{
    for (size_t i = 0; i < sizeof goldens / sizeof goldens[0]; i++)
        check_rope(&goldens[i]);
}

/* ---- team ---- */

static mil_status fail_on_rank_one(void *argument, int32_t rank)
{
    mil_comm **comms = argument;
    float data[4] = {0};
    if (rank == 1)
        return mil_fail(MIL_ERR_NUMERICS, "rank one met a NaN");
    return comms[rank]->ops->all_reduce(comms[rank], data, 4);
}

TEST(a_rank_that_fails_wakes_the_others_and_its_message_is_kept)
{
    mil_config config = dummy_config();
    mil_model *model;
    mil_thread_state saved;
    CHECK_INT(dummy_open(&model, &config, 2, 2), MIL_OK);
    CHECK_INT(mil_pool_enter(model->pools[0], &saved), MIL_OK);
    CHECK_INT(mil_team_run(model->team, fail_on_rank_one, model->comms), MIL_ERR_NUMERICS);
    CHECK(strstr(mil_status_message(), "rank 1: rank one met a NaN") != NULL);
    mil_pool_leave(model->pools[0], &saved);
    mil_model_free(model);
}

TEST(names_of_dtypes_and_projections)
{
    CHECK(strcmp(mil_dtype_name(MIL_DTYPE_BF16), "bfloat16") == 0);
    CHECK(strcmp(mil_dtype_name(MIL_DTYPE_F32), "float32") == 0);
    CHECK_INT(mil_dtype_bytes(MIL_DTYPE_F16), 2);
    CHECK_INT(mil_dtype_bytes(MIL_DTYPE_I32), 4);
    CHECK(strcmp(mil_projection_name(MIL_PROJECTION_GATE), "gate_proj") == 0);
    CHECK(strcmp(mil_projection_name(MIL_PROJECTION_DOWN), "down_proj") == 0);
}

TEST_MAIN()
