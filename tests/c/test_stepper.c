/* The stepper with a fake device behind model/runner.h, which hashes what each row sees: any row
 * that is out of order, on a wrong page or under a foreign adapter gives another token. */
#include "test.h"

#include "fake_runner.h"

static const mil_stepper_options OPTIONS = {
    .n_pages = 40, .page_size = 16, .max_seqs = 4, .max_tokens = 48, .max_pages_per_seq = 6};
static const mil_sampling PLAIN = {.top_p = 1.0f, .n_logprobs = -1, .seed = 1};

static mil_model model;
static mil_stepper *stepper;
static int32_t last_n_page_sets, last_n_adapter_sets, last_n_slot_sets, last_n_decode;

static void look(void *context, mil_plan *plan)
{
    (void)context;
    mil_batch batch;
    mil_plan_view(plan, &batch);
    last_n_page_sets = batch.header->n_page_sets;
    last_n_adapter_sets = batch.header->n_adapter_sets;
    last_n_slot_sets = batch.header->n_slot_sets;
    last_n_decode = batch.header->n_decode;
}

static void open_stepper(void)
{
    model = FAKE_MODEL;
    for (int32_t i = 0; i < 4; i++)
        model.n_held[i] = 1;
    model.on_step = look;
    CHECK_INT(mil_stepper_create(&stepper, &model, &OPTIONS), MIL_OK);
}

static void close_stepper(void)
{
    mil_stepper_free(stepper);
    for (int32_t i = 0; i < 4; i++)
        CHECK_INT(model.n_held[i], 1);
    CHECK_INT(model.n_entered, 0);
}

static mil_seq *create(int32_t adapter, uint64_t seed)
{
    mil_sampling sampling = PLAIN;
    sampling.seed = seed;
    mil_seq *seq = NULL;
    CHECK_INT(mil_seq_create(&seq, stepper, &sampling, adapter), MIL_OK);
    return seq;
}

/* The token after `n` tokens. */
static int32_t next_token(const int32_t *tokens, int32_t n, int32_t adapter, uint64_t seed)
{
    int32_t answer[1];
    mil_finish finish;
    return fake_answer(tokens, n, 1, adapter, seed, -1, FAKE_VOCAB, answer, &finish) == 1
               ? answer[0]
               : -1;
}

static bool says(const char *text)
{
    if (strstr(mil_status_message(), text) != NULL)
        return true;
    printf("message: %s\nlacks: %s\n", mil_status_message(), text);
    return false;
}

static const int32_t TEXT[40] = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4,
                                 6, 2, 6, 4, 3, 3, 8, 3, 2, 7, 9, 5, 0, 2, 8, 8, 4, 1, 9, 7};
static const int32_t PAGES_A[6] = {0, 39, 5, 7, 8, 9};
static const int32_t PAGES_B[6] = {11, 12, 13, 14, 15, 16};
static const int32_t PAGES_C[6] = {21, 22, 23, 24, 25, 26};

static mil_step_item chunk(mil_seq *seq, const int32_t *tokens, int32_t n_tokens, int32_t n_past,
                           const int32_t *pages)
{
    return (mil_step_item){.seq = seq,
                           .tokens = tokens,
                           .n_tokens = n_tokens,
                           .n_past = n_past,
                           .pages = pages,
                           .n_pages = 6};
}

static mil_step_item decode(mil_seq *seq, int32_t n_past, const int32_t *pages)
{
    return chunk(seq, NULL, 1, n_past, pages);
}

static int32_t step_one(mil_step_item item)
{
    mil_sample sample[48];
    CHECK_INT(mil_stepper_step(stepper, &item, 1, sample, NULL), MIL_OK);
    return sample[0].token;
}

/* ---- results ---- */

TEST(chunks_and_decode_steps_give_what_one_sequence_gives)
{
    open_stepper();
    mil_seq *seq = create(2, 5);
    int32_t tokens[60];
    memcpy(tokens, TEXT, sizeof TEXT);
    (void)step_one(chunk(seq, tokens, 17, 0, PAGES_A));
    int32_t n = 40;
    tokens[n] = step_one(chunk(seq, tokens + 17, 23, 17, PAGES_A));
    for (; n < 55; n++) {
        CHECK_INT(tokens[n], next_token(tokens, n, 2, 5));
        tokens[n + 1] = step_one(decode(seq, n, PAGES_A));
    }
    close_stepper();
}

TEST(results_come_in_the_callers_order)
{
    open_stepper();
    mil_seq *a = create(0, 4), *b = create(MIL_NO_ADAPTER, 2), *c = create(0, 8);
    int32_t after_a = step_one(chunk(a, TEXT, 10, 0, PAGES_A));
    int32_t after_c = step_one(chunk(c, TEXT, 20, 0, PAGES_C));
    /* Chunk first: in the plan the decode rows go before it. */
    mil_step_item items[3] = {chunk(b, TEXT, 5, 0, PAGES_B), decode(c, 20, PAGES_C),
                              decode(a, 10, PAGES_A)};
    items[0].all_logits = true;
    mil_sample samples[7];
    float logits[7 * FAKE_VOCAB];
    CHECK_INT(mil_stepper_step(stepper, items, 3, samples, logits), MIL_OK);
    CHECK_INT(last_n_decode, 2);
    int32_t tokens[41];
    for (int32_t i = 0; i < 5; i++)
        CHECK_INT(samples[i].token, next_token(TEXT, i + 1, MIL_NO_ADAPTER, 2));
    memcpy(tokens, TEXT, sizeof TEXT);
    tokens[20] = after_c;
    CHECK_INT(samples[5].token, next_token(tokens, 21, 0, 8));
    tokens[10] = after_a;
    CHECK_INT(samples[6].token, next_token(tokens, 11, 0, 4));
    /* The fake device marks a row's token with the row's place in the plan. */
    const float marks[7] = {3, 4, 5, 6, 7, 1, 2};
    for (int32_t i = 0; i < 7; i++)
        CHECK(logits[i * FAKE_VOCAB + samples[i].token] == marks[i]);
    close_stepper();
}

TEST(a_row_of_all_logits_feeds_only_at_its_end)
{
    open_stepper();
    mil_seq *seq = create(MIL_NO_ADAPTER, 5);
    mil_step_item item = chunk(seq, TEXT, 6, 0, PAGES_A);
    item.all_logits = true;
    mil_sample samples[6];
    CHECK_INT(mil_stepper_step(stepper, &item, 1, samples, NULL), MIL_OK);
    int32_t tokens[7];
    memcpy(tokens, TEXT, 6 * sizeof *tokens);
    tokens[6] = samples[5].token;
    CHECK_INT(step_one(decode(seq, 6, PAGES_A)), next_token(tokens, 7, MIL_NO_ADAPTER, 5));
    close_stepper();
}

TEST(one_given_token_is_a_chunk_of_one)
{
    open_stepper();
    mil_seq *seq = create(MIL_NO_ADAPTER, 5);
    (void)step_one(chunk(seq, TEXT, 6, 0, PAGES_A));
    CHECK_INT(step_one(chunk(seq, TEXT + 6, 1, 6, PAGES_A)),
              next_token(TEXT, 7, MIL_NO_ADAPTER, 5));
    CHECK_INT(last_n_decode, 0);
    close_stepper();
}

/* ---- pages ---- */

TEST(sequences_share_pages)
{
    open_stepper();
    mil_seq *a = create(MIL_NO_ADAPTER, 5), *b = create(MIL_NO_ADAPTER, 9);
    (void)step_one(chunk(a, TEXT, 32, 0, PAGES_A));
    const int32_t shared[3] = {PAGES_A[0], PAGES_A[1], 30};
    mil_step_item item = chunk(b, TEXT + 32, 4, 32, shared);
    item.n_pages = 3;
    CHECK_INT(step_one(item), next_token(TEXT, 36, MIL_NO_ADAPTER, 9));
    close_stepper();
}

TEST(only_page_entries_that_changed_are_sent)
{
    open_stepper();
    mil_seq *seq = create(MIL_NO_ADAPTER, 5);
    (void)step_one(chunk(seq, TEXT, 20, 0, PAGES_A));
    CHECK_INT(last_n_page_sets, 2); /* the list is longer than needed */
    (void)step_one(chunk(seq, TEXT + 20, 10, 20, PAGES_A));
    CHECK_INT(last_n_page_sets, 0);
    (void)step_one(chunk(seq, TEXT + 30, 5, 30, PAGES_A));
    CHECK_INT(last_n_page_sets, 1);
    /* Elsewhere, from the start: the same tokens on other pages. */
    CHECK_INT(step_one(chunk(seq, TEXT, 20, 0, PAGES_B)), next_token(TEXT, 20, MIL_NO_ADAPTER, 5));
    CHECK_INT(last_n_page_sets, 2);
    close_stepper();
}

TEST(a_new_sequence_in_a_used_slot_starts_afresh)
{
    open_stepper();
    mil_seq *old = create(1, 5);
    (void)step_one(chunk(old, TEXT, 20, 0, PAGES_A));
    mil_seq_free(old);
    mil_seq *seq = create(MIL_NO_ADAPTER, 9);
    mil_step_item item = decode(seq, 20, PAGES_A);
    CHECK_INT(mil_stepper_step(stepper, &item, 1, NULL, NULL), MIL_ERR_ARGUMENT);
    CHECK(says("item 0 gives no token"));
    CHECK_INT(step_one(chunk(seq, TEXT, 20, 0, PAGES_A)), next_token(TEXT, 20, MIL_NO_ADAPTER, 9));
    CHECK_INT(last_n_slot_sets, 1);
    CHECK_INT(last_n_page_sets, 2);
    close_stepper();
}

/* ---- adapters ---- */

TEST(an_adapter_is_sent_when_its_slot_changes_only)
{
    open_stepper();
    mil_seq *a = create(3, 5), *b = create(3, 5);
    CHECK_INT(model.n_held[3], 3);
    (void)step_one(chunk(a, TEXT, 5, 0, PAGES_A));
    CHECK_INT(last_n_adapter_sets, 1);
    CHECK_INT(step_one(chunk(b, TEXT, 5, 0, PAGES_B)), next_token(TEXT, 5, 3, 5));
    CHECK_INT(last_n_adapter_sets, 0);
    mil_seq_free(a);
    mil_seq_free(b);
    CHECK_INT(model.n_held[3], 1);
    mil_seq *c = create(2, 5), *gone = create(1, 5);
    mil_seq_free(gone);
    CHECK_INT(step_one(chunk(c, TEXT, 5, 0, PAGES_C)), next_token(TEXT, 5, 2, 5));
    CHECK_INT(last_n_adapter_sets, 1);
    close_stepper();
}

TEST(an_adapter_that_is_not_held_is_an_error)
{
    open_stepper();
    mil_seq *seq = NULL;
    CHECK_INT(mil_seq_create(&seq, stepper, &PLAIN, 8), MIL_ERR_NOT_FOUND);
    CHECK_INT(mil_seq_create(&seq, stepper, &PLAIN, -2), MIL_ERR_ARGUMENT);
    CHECK(seq == NULL);
    close_stepper();
}

/* ---- what bad input gets ---- */

TEST(a_bad_item_is_an_error_and_changes_nothing)
{
    open_stepper();
    mil_seq *a = create(0, 4), *b = create(1, 4), *never = create(MIL_NO_ADAPTER, 4);
    (void)step_one(chunk(a, TEXT, 10, 0, PAGES_A));
    const int32_t bad_tokens[2] = {1, FAKE_VOCAB}, bad_pages[2] = {3, 40};
    struct {
        mil_step_item item;
        const char *text;
    } bad[] = {
        {chunk(NULL, TEXT, 2, 0, PAGES_B), "no sequence"},
        {chunk(a, TEXT, 2, 0, PAGES_B), "item 1 names its sequence again"},
        {chunk(b, TEXT, 0, 0, PAGES_B), "0 tokens, expected at least 1"},
        {chunk(b, NULL, 2, 0, PAGES_B), "2 tokens without giving them, expected 1"},
        {chunk(never, NULL, 1, 5, PAGES_B), "item 1 gives no token"},
        {chunk(b, bad_tokens, 2, 0, PAGES_B), "token 1 is 24, expected 0..23"},
        {chunk(b, TEXT, 2, -1, PAGES_B), "-1 past tokens"},
        {chunk(b, TEXT, 2, INT32_MAX, PAGES_B), "expected 0..96 together"},
        {chunk(b, TEXT, 2, 0, NULL), "lists 0 pages, expected 1..6"},
        {chunk(b, TEXT, 2, 0, bad_pages), "page 1 is 40, expected 0..39"},
        {chunk(b, TEXT, 17, 0, PAGES_B), "lists 1 pages, expected 2..6"},
        {chunk(b, TEXT, 2, 0, PAGES_B), "lists 7 pages"},
        {chunk(b, TEXT, 40, 0, PAGES_B), "49 tokens, expected at most 48"},
    };
    bad[9].item.n_pages = 2;
    bad[10].item.n_pages = 1;
    bad[11].item.n_pages = 7;
    int32_t n_plans = model.n_plans;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        mil_step_item items[2] = {chunk(a, TEXT, 9, 10, PAGES_A), bad[i].item};
        CHECK_INT(mil_stepper_step(stepper, items, 2, NULL, NULL), MIL_ERR_ARGUMENT);
        CHECK(says("step: ") && says(bad[i].text));
    }
    CHECK_INT(mil_stepper_step(stepper, NULL, 5, NULL, NULL), MIL_ERR_ARGUMENT);
    CHECK_INT(model.n_plans, n_plans);
    CHECK_INT(step_one(chunk(a, TEXT + 10, 9, 10, PAGES_A)), next_token(TEXT, 19, 0, 4));
    close_stepper();
}

TEST(a_sequence_of_another_stepper_is_refused)
{
    open_stepper();
    mil_stepper *other;
    CHECK_INT(mil_stepper_create(&other, &model, &OPTIONS), MIL_OK);
    mil_seq *stranger;
    CHECK_INT(mil_seq_create(&stranger, other, &PLAIN, MIL_NO_ADAPTER), MIL_OK);
    mil_step_item item = chunk(stranger, TEXT, 2, 0, PAGES_A);
    CHECK_INT(mil_stepper_step(stepper, &item, 1, NULL, NULL), MIL_ERR_ARGUMENT);
    CHECK(says("a sequence of another stepper"));
    mil_stepper_free(other);
    close_stepper();
}

TEST(nothing_to_do_is_no_step)
{
    open_stepper();
    CHECK_INT(mil_stepper_step(stepper, NULL, 0, NULL, NULL), MIL_OK);
    CHECK_INT(model.n_plans, 0);
    close_stepper();
}

TEST(slots_run_out_with_an_error)
{
    open_stepper();
    for (int32_t i = 0; i < OPTIONS.max_seqs; i++)
        (void)create(3, 1);
    mil_seq *seq = NULL;
    CHECK_INT(mil_seq_create(&seq, stepper, &PLAIN, 3), MIL_ERR_BUSY);
    CHECK(says("all 4 slots are taken"));
    CHECK_INT(model.n_held[3], 5);
    close_stepper();
}

TEST(a_device_that_failed_is_not_asked_again)
{
    open_stepper();
    mil_seq *seq = create(MIL_NO_ADAPTER, 4);
    model.fail_at = 1;
    mil_step_item item = chunk(seq, TEXT, 2, 0, PAGES_A);
    CHECK_INT(mil_stepper_step(stepper, &item, 1, NULL, NULL), MIL_ERR_DEVICE);
    CHECK_INT(mil_stepper_step(stepper, &item, 1, NULL, NULL), MIL_ERR_CLOSED);
    CHECK(says("dead: fake device: step 1 caught fire"));
    close_stepper();
}

TEST(options_out_of_range_are_errors)
{
    model = FAKE_MODEL;
    mil_stepper *none = NULL;
    mil_stepper_options options = OPTIONS;
    options.n_pages = 0;
    CHECK_INT(mil_stepper_create(&none, &model, &options), MIL_ERR_ARGUMENT);
    CHECK(says("n_pages is 0, expected 1.."));
    options = OPTIONS;
    options.max_seqs = 1000;
    options.max_pages_per_seq = 1 << 24;
    CHECK_INT(mil_stepper_create(&none, &model, &options), MIL_ERR_ARGUMENT);
    CHECK(says("page entries"));
    CHECK(none == NULL);
}

/* ---- memory ---- */

TEST(steps_do_not_allocate)
{
    open_stepper();
    mil_seq *seq = create(2, 5);
    (void)step_one(chunk(seq, TEXT, 20, 0, PAGES_A));
    uint64_t before = mil_memory_calls();
    for (int32_t n = 20; n < 90; n++)
        (void)step_one(decode(seq, n, PAGES_A));
    CHECK_INT(mil_memory_calls(), before);
    close_stepper();
}

TEST(a_failed_allocation_is_an_error_and_holds_nothing)
{
    model = FAKE_MODEL;
    model.n_held[1] = 1;
    size_t held = mil_memory_held_bytes();
    mil_status status = MIL_ERR_MEMORY;
    uint64_t k = 1;
    for (; status != MIL_OK; k++) {
        mil_stepper *made = NULL;
        mil_seq *seq = NULL;
        mil_memory_fail_at(k);
        status = mil_stepper_create(&made, &model, &OPTIONS);
        if (status == MIL_OK)
            status = mil_seq_create(&seq, made, &PLAIN, 1);
        mil_memory_fail_at(0);
        CHECK(status == MIL_OK || status == MIL_ERR_MEMORY);
        mil_stepper_free(made);
        CHECK_INT(mil_memory_held_bytes(), held);
        CHECK_INT(model.n_held[1], 1);
    }
    CHECK(k > 12);
}

TEST_MAIN()
