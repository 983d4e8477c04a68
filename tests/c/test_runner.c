/* Steps over a tiny dummy model: same bits whoever shares the batch and however a prompt is cut,
 * the same logits from one rank and from several, and nothing allocated on the way. */
#include "model/runner.h"

#include "base/memory.h"
#include "dummy_model.h"

#include <math.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    PAGE = 16,
    PAGES_PER_SEQ = 16,
    MAX_SEQS = 6,
    MAX_TOKENS = 160,
    MAX_ADAPTERS = 4,
    VOCAB = 301,
};

/* A runner with its model, and what one step gave. */
typedef struct rig {
    mil_model *model;
    mil_runner *runner;
    mil_sample samples[MAX_TOKENS];
    float *logits; /* [MAX_TOKENS, VOCAB] */
} rig;

/* A sequence owns slot `slot` and the pages slot * PAGES_PER_SEQ onwards. */
typedef struct seq {
    int32_t slot;
    int32_t adapter_slot;
    int32_t n_past;
    bool is_set;
    mil_sampling sampling;
} seq;

typedef struct item {
    seq *seq;
    const int32_t *tokens; /* NULL: one decode row, whose token is in the slot */
    int32_t n_tokens;
    bool all_logits;
} item;

static void rig_open(rig *r, const mil_config *config, int32_t world, bool poison)
{
    const mil_runner_options options = {
        .limits = {.max_seqs = MAX_SEQS,
                   .max_tokens = MAX_TOKENS,
                   .max_logit_rows = MAX_TOKENS,
                   .max_pages_per_seq = PAGES_PER_SEQ,
                   .max_page_sets = MAX_SEQS * PAGES_PER_SEQ,
                   .max_adapter_slots = MAX_ADAPTERS},
        .n_pages = MAX_SEQS * PAGES_PER_SEQ,
        .page_size = PAGE,
        .poison = poison,
    };
    r->logits = malloc(sizeof(float) * MAX_TOKENS * VOCAB);
    CHECK(r->logits != NULL);
    CHECK_INT(config->vocab, VOCAB);
    CHECK_INT(dummy_open(&r->model, config, world, world), MIL_OK);
    CHECK_INT(mil_runner_create(&r->runner, r->model, &options), MIL_OK);
    CHECK_INT(mil_runner_enter(r->runner), MIL_OK);
}

static void rig_close(rig *r)
{
    mil_runner_leave(r->runner);
    mil_runner_free(r->runner);
    mil_model_free(r->model);
    free(r->logits);
}

static seq new_seq(int32_t slot, int32_t adapter_slot)
{
    return (seq){
        .slot = slot, .adapter_slot = adapter_slot, .sampling = {.top_p = 1.0f, .n_logprobs = -1}};
}

/* ---- plans ---- */

static void set_up(mil_batch *b, seq *s)
{
    if (s->is_set)
        return;
    s->is_set = true;
    b->slot_sets[b->header->n_slot_sets++] =
        (mil_slot_set){.slot = s->slot, .adapter_slot = s->adapter_slot, .sampling = s->sampling};
    for (int32_t i = 0; i < PAGES_PER_SEQ; i++)
        b->page_sets[b->header->n_page_sets++] =
            (mil_page_set){.slot = s->slot, .index = i, .page = s->slot * PAGES_PER_SEQ + i};
}

static void add_item(mil_batch *b, const item *it)
{
    seq *s = it->seq;
    int32_t n = it->tokens != NULL ? it->n_tokens : 1;
    int32_t begin = b->header->n_tokens;
    set_up(b, s);
    for (int32_t i = 0; i < n; i++) {
        b->tokens[begin + i] = it->tokens != NULL ? it->tokens[i] : -1;
        b->positions[begin + i] = s->n_past + i;
        if (!it->all_logits && i < n - 1)
            continue;
        int32_t row = b->header->n_logit_rows++;
        b->logit_rows[row] = begin + i;
        b->logit_slots[row] = s->slot;
        b->logit_feeds[row] = i == n - 1;
    }
    s->n_past += n;
    b->seq_slot[b->header->n_seqs] = s->slot;
    b->kv_lengths[b->header->n_seqs] = s->n_past;
    b->header->n_seqs++;
    b->header->n_decode += it->tokens == NULL;
    b->header->n_tokens += n;
    b->query_indptr[b->header->n_seqs] = b->header->n_tokens;
}

static void add_segments(mil_batch *b, const item *items, int32_t n_items)
{
    mil_plan_header *header = b->header;
    for (int32_t adapter = 0; adapter < MAX_ADAPTERS; adapter++) {
        int32_t before = header->n_lora_rows;
        for (int32_t i = 0; i < n_items; i++)
            for (int32_t t = b->query_indptr[i]; t < b->query_indptr[i + 1]; t++)
                if (items[i].seq->adapter_slot == adapter)
                    b->lora_rows[header->n_lora_rows++] = t;
        if (header->n_lora_rows == before)
            continue;
        b->segment_adapter[header->n_segments++] = adapter;
        b->segment_indptr[header->n_segments] = header->n_lora_rows;
    }
}

static void fill(mil_batch *b, const item *items, int32_t n_items)
{
    for (int32_t i = 0; i < n_items; i++)
        add_item(b, &items[i]);
    add_segments(b, items, n_items);
}

/* One step, decode rows first in items. */
static void step(rig *r, const item *items, int32_t n_items)
{
    mil_batch b;
    mil_plan_view(mil_runner_plan(r->runner), &b);
    fill(&b, items, n_items);
    mil_status status = mil_runner_step(r->runner, r->samples, r->logits);
    if (status != MIL_OK)
        printf("%s\n", mil_status_message());
    CHECK_INT(status, MIL_OK);
}

/* A step of no rows that puts a content into an adapter slot. */
static void put_adapter(rig *r, int32_t adapter_slot, int32_t content)
{
    mil_batch b;
    mil_plan_view(mil_runner_plan(r->runner), &b);
    b.adapter_sets[b.header->n_adapter_sets++] =
        (mil_adapter_set){.adapter_slot = adapter_slot, .content = content};
    CHECK_INT(mil_runner_step(r->runner, NULL, NULL), MIL_OK);
}

static int32_t load_adapter(rig *r, const mil_config *config, int32_t adapter_slot, int32_t rank)
{
    int32_t content;
    CHECK_INT(dummy_add_adapter(r->model, config, rank, (uint64_t)rank, &content), MIL_OK);
    put_adapter(r, adapter_slot, content);
    return content;
}

static void make_tokens(int32_t *tokens, int32_t n, uint32_t seed)
{
    for (int32_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        tokens[i] = (int32_t)((seed >> 8) % VOCAB);
    }
}

static const float *row_of(const rig *r, int32_t row)
{
    return r->logits + (size_t)row * VOCAB;
}

static bool same_bits(const float *a, const float *b)
{
    return memcmp(a, b, VOCAB * sizeof(float)) == 0;
}

static double largest_difference(const float *a, const float *b)
{
    double largest = 0;
    for (int32_t i = 0; i < VOCAB; i++) {
        double difference = fabs((double)a[i] - (double)b[i]);
        largest = difference > largest || isnan(difference) ? difference : largest;
    }
    return largest;
}

static double spread(const float *a)
{
    double low = (double)a[0], high = (double)a[0];
    for (int32_t i = 1; i < VOCAB; i++) {
        low = fmin(low, (double)a[i]);
        high = fmax(high, (double)a[i]);
    }
    return high - low;
}

/* Logits of the last of n tokens, run alone and whole in slot 0. */
static void run_alone(rig *r, float *logits, const int32_t *tokens, int32_t n, int32_t adapter_slot)
{
    seq s = new_seq(0, adapter_slot);
    step(r, &(item){.seq = &s, .tokens = tokens, .n_tokens = n}, 1);
    memcpy(logits, r->logits, VOCAB * sizeof(float));
}

/* ---- same bits ---- */

static void check_mates(int32_t world)
{
    mil_config config = dummy_config();
    rig r;
    int32_t tokens[4][40];
    float alone[4][VOCAB];
    const int32_t lengths[4] = {40, 7, 1, 33};
    const int32_t adapters[4] = {0, MIL_NO_ADAPTER, 1, 2};
    rig_open(&r, &config, world, true);
    (void)load_adapter(&r, &config, 0, 8);
    (void)load_adapter(&r, &config, 1, 16);
    (void)load_adapter(&r, &config, 2, 40);
    for (int32_t i = 0; i < 4; i++) {
        make_tokens(tokens[i], lengths[i], (uint32_t)i + 1);
        run_alone(&r, alone[i], tokens[i], lengths[i], adapters[i]);
        CHECK(spread(alone[i]) > 0.1);
    }
    seq seqs[4];
    item items[4];
    for (int32_t i = 0; i < 4; i++) {
        seqs[i] = new_seq(i + 1, adapters[i]);
        items[i] = (item){.seq = &seqs[i], .tokens = tokens[i], .n_tokens = lengths[i]};
    }
    step(&r, items, 4);
    for (int32_t i = 0; i < 4; i++)
        CHECK(same_bits(row_of(&r, i), alone[i]));
    rig_close(&r);
}

TEST(a_row_has_the_same_bits_alone_and_among_rows_of_other_adapters)
{
    check_mates(1);
    check_mates(2);
}

static void check_chunks(int32_t adapter_rank)
{
    mil_config config = dummy_config();
    rig r;
    int32_t tokens[150];
    float whole[VOCAB];
    const int32_t cuts[][5] = {{150}, {64, 86}, {1, 1, 148}, {17, 63, 70}, {149, 1}};
    int32_t adapter_slot = adapter_rank > 0 ? 0 : MIL_NO_ADAPTER;
    rig_open(&r, &config, 1, true);
    if (adapter_rank > 0)
        (void)load_adapter(&r, &config, 0, adapter_rank);
    make_tokens(tokens, 150, 5);
    run_alone(&r, whole, tokens, 150, adapter_slot);
    for (size_t i = 1; i < sizeof cuts / sizeof cuts[0]; i++) {
        seq s = new_seq(1 + (int32_t)i % 4, adapter_slot);
        for (int32_t at = 0, c = 0; at < 150; at += cuts[i][c++])
            step(&r, &(item){.seq = &s, .tokens = tokens + at, .n_tokens = cuts[i][c]}, 1);
        CHECK(same_bits(r.logits, whole));
    }
    rig_close(&r);
}

TEST(a_prompt_has_the_same_bits_however_it_is_cut)
{
    check_chunks(0);
    check_chunks(12);
}

TEST(a_decoded_answer_has_the_bits_of_its_tokens_run_as_one_prompt)
{
    mil_config config = dummy_config();
    rig r;
    int32_t tokens[60];
    float last[VOCAB], whole[VOCAB];
    rig_open(&r, &config, 1, true);
    make_tokens(tokens, 20, 9);
    seq s = new_seq(1, MIL_NO_ADAPTER);
    step(&r, &(item){.seq = &s, .tokens = tokens, .n_tokens = 20}, 1);
    for (int32_t i = 20; i < 60; i++) {
        tokens[i] = r.samples[0].token;
        step(&r, &(item){.seq = &s}, 1);
    }
    memcpy(last, r.logits, sizeof last);
    run_alone(&r, whole, tokens, 60, MIL_NO_ADAPTER);
    CHECK(same_bits(last, whole));
    rig_close(&r);
}

TEST(logits_of_all_rows_are_those_of_each_row_last)
{
    mil_config config = dummy_config();
    rig r;
    int32_t tokens[100];
    float *all = malloc(sizeof(float) * 100 * VOCAB);
    rig_open(&r, &config, 1, true);
    make_tokens(tokens, 100, 3);
    seq s = new_seq(1, MIL_NO_ADAPTER);
    /* More rows than one block of the head. */
    step(&r, &(item){.seq = &s, .tokens = tokens, .n_tokens = 100, .all_logits = true}, 1);
    memcpy(all, r.logits, sizeof(float) * 100 * VOCAB);
    for (int32_t n = 1; n <= 100; n += 11) {
        float last[VOCAB];
        run_alone(&r, last, tokens, n, MIL_NO_ADAPTER);
        CHECK(same_bits(all + (size_t)(n - 1) * VOCAB, last));
    }
    free(all);
    rig_close(&r);
}

TEST(poisoned_pages_do_not_reach_a_result)
{
    mil_config config = dummy_config();
    rig r;
    int32_t tokens[50];
    float clean[VOCAB], after[VOCAB];
    rig_open(&r, &config, 2, true);
    make_tokens(tokens, 50, 8);
    run_alone(&r, clean, tokens, 50, MIL_NO_ADAPTER);
    for (int32_t page = 0; page < MAX_SEQS * PAGES_PER_SEQ; page++)
        mil_runner_poison_page(r.runner, page);
    run_alone(&r, after, tokens, 50, MIL_NO_ADAPTER);
    CHECK(same_bits(clean, after));

    /* And that poison is poison: a decode over pages that lost their keys is not a number. */
    seq s = new_seq(1, MIL_NO_ADAPTER);
    step(&r, &(item){.seq = &s, .tokens = tokens, .n_tokens = 50}, 1);
    mil_runner_poison_page(r.runner, PAGES_PER_SEQ);
    step(&r, &(item){.seq = &s}, 1);
    CHECK(isnan(r.logits[0]));
    rig_close(&r);
}

TEST(a_plan_given_out_again_holds_nothing_of_its_last_step)
{
    mil_config config = dummy_config();
    rig r;
    int32_t tokens[8];
    float row[VOCAB];
    mil_batch batch;
    make_tokens(tokens, 8, 8);
    rig_open(&r, &config, 1, true);
    for (int32_t i = 0; i < 4; i++) {
        mil_plan_view(mil_runner_plan(r.runner), &batch);
        CHECK_INT(batch.header->n_tokens, 0);
        CHECK_INT(batch.tokens[0], -1);
        CHECK_INT(batch.kv_lengths[0], -1);
        run_alone(&r, row, tokens, 8, MIL_NO_ADAPTER);
    }
    rig_close(&r);
}

/* ---- ranks ---- */

static void compare_worlds(const mil_config *config, int32_t world, double tolerance)
{
    rig one, many;
    int32_t tokens[3][30];
    const int32_t adapters[3] = {MIL_NO_ADAPTER, 0, 1};
    rig_open(&one, config, 1, true);
    rig_open(&many, config, world, true);
    rig *rigs[2] = {&one, &many};
    for (int32_t i = 0; i < 3; i++)
        make_tokens(tokens[i], 30, (uint32_t)i + 20);
    for (int32_t which = 0; which < 2; which++) {
        seq seqs[3];
        item items[3];
        (void)load_adapter(rigs[which], config, 0, 8);
        (void)load_adapter(rigs[which], config, 1, 24);
        for (int32_t i = 0; i < 3; i++) {
            seqs[i] = new_seq(i, adapters[i]);
            items[i] = (item){.seq = &seqs[i], .tokens = tokens[i], .n_tokens = 30};
        }
        step(rigs[which], items, 3);
    }
    for (int32_t i = 0; i < 3; i++) {
        double size = spread(row_of(&one, i));
        CHECK(size > 0.1);
        CHECK(largest_difference(row_of(&one, i), row_of(&many, i)) <= tolerance * size);
    }
    /* The adapters are not decoration. */
    CHECK(largest_difference(row_of(&one, 1), row_of(&one, 0)) > 0.01);
    rig_close(&many);
    rig_close(&one);
}

TEST(several_ranks_give_the_logits_of_one_to_the_rounding_of_split_sums)
{
    /* A sum split over ranks may round h or K to the neighbouring bfloat16 value, a step of 2^-8.
     */
    const double tolerance = 0.02;
    mil_config config = dummy_config();
    compare_worlds(&config, 2, tolerance);
    compare_worlds(&config, 4, tolerance);
    config.attention_bias = true;
    config.tie_embeddings = true;
    compare_worlds(&config, 2, tolerance);
    compare_worlds(&config, 4, tolerance);
}

TEST(a_rank_beyond_the_vocabulary_takes_part)
{
    /* 301 rows in blocks of 64 leave nothing for ranks 5 to 7. */
    mil_config config = dummy_config();
    config.n_heads = 8;
    config.ffn = 256;
    compare_worlds(&config, 8, 0.02);
}

TEST(every_rank_feeds_the_token_that_was_chosen)
{
    mil_config config = dummy_config();
    rig r;
    int32_t tokens[40];
    float whole[VOCAB], last[VOCAB];
    rig_open(&r, &config, 4, true);
    make_tokens(tokens, 10, 2);
    seq s = new_seq(1, MIL_NO_ADAPTER);
    s.sampling = (mil_sampling){.temperature = 1.0f, .top_p = 1.0f, .n_logprobs = 3, .seed = 11};
    step(&r, &(item){.seq = &s, .tokens = tokens, .n_tokens = 10}, 1);
    for (int32_t i = 10; i < 40; i++) {
        CHECK_INT(r.samples[0].n_top, 3);
        tokens[i] = r.samples[0].token;
        step(&r, &(item){.seq = &s}, 1);
    }
    memcpy(last, r.logits, sizeof last);
    run_alone(&r, whole, tokens, 40, MIL_NO_ADAPTER);
    CHECK(same_bits(last, whole));
    rig_close(&r);
}

TEST(a_draw_depends_on_its_place_in_the_sequence_alone)
{
    mil_config config = dummy_config();
    rig r;
    int32_t tokens[50];
    rig_open(&r, &config, 1, true);
    make_tokens(tokens, 10, 2);
    const mil_sampling sampling = {
        .temperature = 5.0f, .top_p = 1.0f, .n_logprobs = -1, .seed = 11};
    seq s = new_seq(1, MIL_NO_ADAPTER);
    s.sampling = sampling;
    step(&r, &(item){.seq = &s, .tokens = tokens, .n_tokens = 10}, 1);
    for (int32_t i = 10; i < 50; i++) {
        tokens[i] = r.samples[0].token;
        step(&r, &(item){.seq = &s}, 1);
    }
    /* A preempted request computes its tokens again as a prompt, in chunks, behind another one. */
    for (int32_t n = 10; n < 50; n += 13) {
        seq other = new_seq(2, MIL_NO_ADAPTER), again = new_seq(3, MIL_NO_ADAPTER);
        again.sampling = sampling;
        step(&r, &(item){.seq = &again, .tokens = tokens, .n_tokens = n - 4}, 1);
        const item items[] = {{.seq = &other, .tokens = tokens, .n_tokens = 9},
                              {.seq = &again, .tokens = tokens + n - 4, .n_tokens = 4}};
        step(&r, items, 2);
        CHECK_INT(r.samples[1].token, tokens[n]);
    }
    rig_close(&r);
}

/* ---- adapters ---- */

TEST(a_cleared_adapter_slot_gives_the_base_model_again)
{
    mil_config config = dummy_config();
    rig r;
    int32_t tokens[12];
    float base[VOCAB], adapted[VOCAB], cleared[VOCAB];
    rig_open(&r, &config, 1, true);
    make_tokens(tokens, 12, 4);
    run_alone(&r, base, tokens, 12, MIL_NO_ADAPTER);
    int32_t content = load_adapter(&r, &config, 3, 16);
    run_alone(&r, adapted, tokens, 12, 3);
    put_adapter(&r, 3, MIL_NO_ADAPTER);
    CHECK_INT(mil_model_release_adapter(r.model, content), MIL_OK);
    run_alone(&r, cleared, tokens, 12, 3);
    CHECK(!same_bits(base, adapted));
    CHECK(same_bits(base, cleared));
    rig_close(&r);
}

TEST(a_plan_that_names_a_lost_content_is_an_error_and_the_runner_is_dead)
{
    mil_config config = dummy_config();
    rig r;
    mil_batch b;
    rig_open(&r, &config, 1, true);
    mil_plan_view(mil_runner_plan(r.runner), &b);
    b.adapter_sets[b.header->n_adapter_sets++] =
        (mil_adapter_set){.adapter_slot = 0, .content = 99};
    CHECK_INT(mil_runner_step(r.runner, NULL, NULL), MIL_ERR_NOT_FOUND);
    CHECK(strstr(mil_status_message(), "99") != NULL);
    (void)mil_runner_plan(r.runner);
    CHECK_INT(mil_runner_step(r.runner, NULL, NULL), MIL_ERR_CLOSED);
    rig_close(&r);
}

/* ---- checks and memory ---- */

TEST(a_checked_runner_refuses_positions_past_its_tables)
{
    mil_config config = dummy_config();
    rig r;
    mil_batch b;
    int32_t token = 1;
    rig_open(&r, &config, 1, true);
    seq s = new_seq(0, MIL_NO_ADAPTER);
    mil_plan_view(mil_runner_plan(r.runner), &b);
    fill(&b, &(item){.seq = &s, .tokens = &token, .n_tokens = 1}, 1);
    b.positions[0] = PAGE * PAGES_PER_SEQ;
    CHECK_INT(mil_runner_step(r.runner, NULL, NULL), MIL_ERR_INTERNAL);
    CHECK(strstr(mil_status_message(), "positions[0] is 256, expected < 256") != NULL);
    rig_close(&r);
}

TEST(no_step_allocates)
{
    mil_config config = dummy_config();
    for (int32_t world = 1; world <= 2; world++) {
        rig r;
        int32_t tokens[2][30];
        rig_open(&r, &config, world, false);
        (void)load_adapter(&r, &config, 0, 16);
        make_tokens(tokens[0], 30, 1);
        make_tokens(tokens[1], 30, 2);
        seq a = new_seq(0, 0), b = new_seq(1, MIL_NO_ADAPTER);
        uint64_t before = mil_memory_calls();
        step(&r, &(item){.seq = &a, .tokens = tokens[0], .n_tokens = 30}, 1);
        const item mixed[] = {{.seq = &a}, {.seq = &b, .tokens = tokens[1], .n_tokens = 30}};
        step(&r, mixed, 2);
        const item decode[] = {{.seq = &a}, {.seq = &b}};
        for (int32_t i = 0; i < 100; i++)
            step(&r, decode, 2);
        CHECK_INT(mil_memory_calls() - before, 0);
        rig_close(&r);
    }
}

TEST(sizes_told_beforehand_are_sizes_taken_and_all_comes_back)
{
    mil_config config = dummy_config();
    mil_model *model;
    mil_runner_options options = {
        .limits = {.max_seqs = 4,
                   .max_tokens = 32,
                   .max_logit_rows = 4,
                   .max_pages_per_seq = 8,
                   .max_page_sets = 16,
                   .max_adapter_slots = 2},
        .n_pages = 64,
        .page_size = 32,
    };
    CHECK_INT(dummy_open(&model, &config, 2, 2), MIL_OK);
    /* Layers x (K and V) x kv heads x rows x head_dim x bf16. */
    CHECK_INT(mil_runner_page_bytes(model, 32), 3 * 2 * 2 * 32 * 32 * 2);
    CHECK(mil_runner_workspace_bytes(model, &options.limits, 32) > 32 * 128 * 10);
    size_t held = mil_memory_held_bytes();
    mil_status status = MIL_ERR_MEMORY;
    for (uint64_t k = 1; status != MIL_OK; k++) {
        mil_runner *runner;
        mil_memory_fail_at(k);
        status = mil_runner_create(&runner, model, &options);
        mil_memory_fail_at(0);
        if (status == MIL_OK)
            mil_runner_free(runner);
        CHECK(status == MIL_OK || status == MIL_ERR_MEMORY);
        CHECK(mil_memory_held_bytes() == held);
    }
    mil_runner *runner;
    options.n_pages = INT32_MAX;
    CHECK_INT(mil_runner_create(&runner, model, &options), MIL_ERR_MEMORY);
    CHECK(strstr(mil_status_message(), "engine: needs 48.00 TiB of KV pages") != NULL);
    CHECK(strstr(mil_status_message(), "too few") != NULL);
    options.n_pages = 64;
    options.page_size = 24;
    CHECK_INT(mil_runner_create(&runner, model, &options), MIL_ERR_ARGUMENT);
    CHECK(strstr(mil_status_message(), "24") != NULL);
    mil_model_free(model);
}

TEST(a_runner_reports_the_slabs_it_holds_and_how_much_of_them_is_untouched)
{
    mil_config config = dummy_config();
    for (int32_t world = 1; world <= 2; world++) {
        rig r;
        int32_t token = 1;
        mil_runner_memory memory;
        mil_model_memory model;
        rig_open(&r, &config, world, false);
        mil_runner_leave(r.runner);
        size_t held = mil_memory_held_bytes();
        mil_runner_memory_get(r.runner, &memory);
        const mil_runner_options options = {
            .limits = {.max_seqs = MAX_SEQS,
                       .max_tokens = MAX_TOKENS,
                       .max_logit_rows = MAX_TOKENS,
                       .max_pages_per_seq = PAGES_PER_SEQ,
                       .max_page_sets = MAX_SEQS * PAGES_PER_SEQ,
                       .max_adapter_slots = MAX_ADAPTERS},
        };
        size_t asked = mil_runner_workspace_bytes(r.model, &options.limits, PAGE);
        /* Slabs are rounded up to pages, two of each rank and the plans'. */
        CHECK(memory.workspace_bytes >= asked && memory.workspace_bytes < asked + (5u << 21));
        CHECK(memory.kv_bytes >= MAX_SEQS * PAGES_PER_SEQ * mil_runner_page_bytes(r.model, PAGE));
        CHECK_INT(memory.graph_bytes, 0);
        CHECK_INT(memory.pinned_bytes, 0);
        size_t untouched = memory.untouched_bytes;
        CHECK(untouched > 0 && untouched <= memory.kv_bytes + memory.workspace_bytes);
        CHECK_INT(mil_runner_enter(r.runner), MIL_OK);
        seq s = new_seq(0, MIL_NO_ADAPTER);
        step(&r, &(item){.seq = &s, .tokens = &token, .n_tokens = 1}, 1);
        mil_runner_leave(r.runner);
        mil_runner_memory_get(r.runner, &memory);
        CHECK(memory.untouched_bytes < untouched);
        CHECK_INT(mil_model_memory_get(r.model, &model), MIL_OK);
        CHECK_INT(model.adapter_bytes, 0);
        CHECK(strcmp(model.device, "cpu") == 0 && !model.is_device);
        mil_runner_free(r.runner);
        CHECK(held - mil_memory_held_bytes() >= memory.kv_bytes + memory.workspace_bytes);
        CHECK(held - mil_memory_held_bytes() <
              memory.kv_bytes + memory.workspace_bytes + (1 << 20));
        mil_model_free(r.model);
        free(r.logits);
    }
}

TEST(pages_taken_anew_are_as_many_as_asked_and_serve)
{
    mil_config config = dummy_config();
    rig r;
    int32_t tokens[20];
    float before[VOCAB], after[VOCAB];
    mil_runner_memory memory;
    make_tokens(tokens, 20, 5);
    rig_open(&r, &config, 2, true);
    run_alone(&r, before, tokens, 20, MIL_NO_ADAPTER);
    mil_runner_leave(r.runner);
    size_t held = mil_memory_held_bytes();
    CHECK_INT(mil_runner_take_pages(r.runner, 3 * MAX_SEQS * PAGES_PER_SEQ), MIL_OK);
    mil_runner_memory_get(r.runner, &memory);
    CHECK(memory.kv_bytes >= 3 * MAX_SEQS * PAGES_PER_SEQ * mil_runner_page_bytes(r.model, PAGE));
    CHECK_INT(mil_runner_take_pages(r.runner, MAX_SEQS * PAGES_PER_SEQ), MIL_OK);
    CHECK_INT(mil_memory_held_bytes(), held);
    CHECK_INT(mil_runner_enter(r.runner), MIL_OK);
    run_alone(&r, after, tokens, 20, MIL_NO_ADAPTER);
    CHECK(same_bits(before, after));
    rig_close(&r);
}

TEST(two_models_in_one_process_do_not_disturb_each_other)
{
    mil_config config = dummy_config();
    rig a, b;
    int32_t tokens[25];
    float first[VOCAB], second[VOCAB];
    make_tokens(tokens, 25, 6);
    rig_open(&a, &config, 2, true);
    run_alone(&a, first, tokens, 25, MIL_NO_ADAPTER);
    rig_open(&b, &config, 2, true);
    run_alone(&b, second, tokens, 25, MIL_NO_ADAPTER);
    CHECK(same_bits(first, second));
    rig_close(&a);
    run_alone(&b, second, tokens, 25, MIL_NO_ADAPTER);
    CHECK(same_bits(first, second));
    rig_close(&b);
}

TEST(a_forked_child_is_refused_and_can_still_free)
{
    mil_config config = dummy_config();
    rig r;
    rig_open(&r, &config, 2, true);
    mil_runner_leave(r.runner);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        bool is_refused = mil_runner_enter(r.runner) == MIL_ERR_DEVICE;
        mil_runner_free(r.runner);
        mil_model_free(r.model);
        _exit(is_refused ? 0 : 1);
    }
    int state;
    CHECK(waitpid(child, &state, 0) == child);
    CHECK(WIFEXITED(state));
    CHECK_INT(WEXITSTATUS(state), 0);
    CHECK_INT(mil_runner_enter(r.runner), MIL_OK);
    rig_close(&r);
}

TEST_MAIN()
