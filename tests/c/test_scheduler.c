/* The scheduler against a device that runs its plans by the letter (fake_device.h): answers must
 * equal those of each request alone, under preemption, cancel and overshoot, with one or two steps
 * in flight; no plan may name a page, slot or adapter slot that a step in flight still names for
 * another; and a deterministic one's hold no piece of one token of what is longer. */
#include "test.h"

#include "base/memory.h"
#include "fake_device.h"
#include "scheduler/blocks.h"
#include "scheduler/scheduler.h"

#define VOCAB 24
#define STOP_TOKEN 7
#define MAX_OPEN 64
#define MAX_PROMPT 96
#define MAX_LENGTH 128

typedef struct client {
    mil_request *request; /* NULL: this entry is free */
    int32_t prompt[MAX_PROMPT];
    int32_t expected[MAX_LENGTH], n_expected;
    mil_finish expected_finish;
    int32_t n_seen;
    bool has_ended, is_cancelled;
} client;

typedef struct world {
    mil_scheduler_options options;
    mil_scheduler *scheduler;
    fake_device device;
    int32_t depth;
    mil_plan *plans[MIL_STEPS_IN_FLIGHT];
    int32_t n_in_flight;
    uint64_t step, retired;
    /* What each thing was last named by, and who owns each page. */
    uint64_t page_named[512], slot_named[16], adapter_named[16];
    int32_t page_owner[512]; /* slot, or -1 */
    int32_t n_owned;
    client clients[MAX_OPEN]; /* in order of arrival, free entries between them */
    int32_t first_free;
    uint64_t random, next_id;
    int64_t n_overshoot, n_finished;
} world;

static uint32_t draw(world *w, uint32_t n)
{
    w->random = mil_mix64(w->random);
    return (uint32_t)(w->random >> 33) % n;
}

static void page_is_free(void *context, int32_t page)
{
    world *w = context;
    CHECK(w->page_named[page] <= w->retired || w->page_named[page] == 0);
    CHECK(w->page_owner[page] >= 0);
    w->page_owner[page] = -1;
    w->n_owned--;
    fake_device_poison(&w->device, page);
}

static void open_world(world *w, const mil_scheduler_options *options, int32_t depth, uint64_t seed)
{
    memset(w, 0, sizeof *w);
    w->options = *options;
    w->options.on_page_free = page_is_free;
    w->options.context = w;
    w->depth = depth;
    w->random = seed;
    for (int32_t i = 0; i < options->n_pages; i++)
        w->page_owner[i] = -1;
    mil_plan_limits limits = mil_scheduler_limits(&w->options);
    CHECK_INT(mil_scheduler_create(&w->scheduler, &w->options), MIL_OK);
    fake_device_init(&w->device, &limits, options->n_pages, options->page_size, VOCAB);
    for (int32_t i = 0; i < MIL_STEPS_IN_FLIGHT; i++)
        w->plans[i] = mil_alloc(1, mil_plan_bytes(&limits));
}

static void close_world(world *w)
{
    mil_scheduler_free(w->scheduler);
    fake_device_deinit(&w->device);
    for (int32_t i = 0; i < MIL_STEPS_IN_FLIGHT; i++)
        mil_free(w->plans[i]);
}

/* ---- clients ---- */

static client *find_client(world *w, uint64_t id)
{
    for (int32_t i = 0; i < MAX_OPEN; i++)
        if (w->clients[i].request != NULL && w->clients[i].request->id == id)
            return &w->clients[i];
    return NULL;
}

static client *submit(world *w, int32_t n_prompt, int32_t max_new, int32_t adapter, uint64_t seed,
                      bool has_stop)
{
    int32_t at = 0;
    while (at < MAX_OPEN && w->clients[at].request != NULL)
        at++;
    if (at == MAX_OPEN)
        return NULL;
    client *c = &w->clients[at];
    memset(c, 0, sizeof *c);
    for (int32_t i = 0; i < n_prompt; i++)
        c->prompt[i] = (int32_t)draw(w, VOCAB);
    int32_t stop = STOP_TOKEN;
    mil_request_options options = {.tokens = c->prompt,
                                   .n_tokens = n_prompt,
                                   .stop_tokens = &stop,
                                   .n_stop_tokens = has_stop,
                                   .adapter = adapter,
                                   .sampling = {.seed = seed}};
    CHECK_INT(mil_request_create(&c->request, &options, max_new), MIL_OK);
    c->request->id = ++w->next_id;
    c->n_expected = fake_answer(c->prompt, n_prompt, max_new, adapter, seed, has_stop ? stop : -1,
                                VOCAB, c->expected, &c->expected_finish);
    mil_scheduler_add(w->scheduler, c->request);
    return c;
}

static void reap(world *w)
{
    mil_request *request;
    while ((request = mil_scheduler_reap(w->scheduler)) != NULL) {
        client *c = find_client(w, request->id);
        CHECK(c != NULL && c->has_ended);
        CHECK_INT(request->slot, -1);
        c->request = NULL;
        w->n_finished++;
        mil_request_free(request);
    }
}

static void cancel(world *w, client *c)
{
    CHECK(mil_scheduler_end(w->scheduler, c->request) == !c->has_ended);
    c->is_cancelled = !c->has_ended;
    c->has_ended = true;
}

static void receive(world *w, const mil_event *event)
{
    client *c = find_client(w, event->id);
    CHECK(c != NULL);
    CHECK(!c->has_ended);
    if (event->has_sample) {
        CHECK(c->n_seen < c->n_expected);
        CHECK_INT(event->sample.token, c->expected[c->n_seen]);
        c->n_seen++;
    }
    if (event->finish != MIL_FINISH_NONE) {
        CHECK_INT(event->finish, c->expected_finish);
        CHECK_INT(c->n_seen, c->n_expected);
        c->has_ended = true;
    }
}

/* ---- steps and what must hold in each ---- */

static void check_fences(world *w, const mil_batch *batch)
{
    const mil_plan_header *header = batch->header;
    for (int32_t i = 0; i < header->n_adapter_sets; i++)
        CHECK(w->adapter_named[batch->adapter_sets[i].adapter_slot] <= w->retired);
    for (int32_t i = 0; i < header->n_slot_sets; i++)
        CHECK(w->slot_named[batch->slot_sets[i].slot] <= w->retired);
    for (int32_t i = 0; i < header->n_page_sets; i++) {
        const mil_page_set *set = &batch->page_sets[i];
        CHECK(set->page > 0);
        CHECK_INT(w->page_owner[set->page], -1);
        CHECK(w->page_named[set->page] <= w->retired);
        w->page_owner[set->page] = set->slot;
        w->page_named[set->page] = header->step;
        w->n_owned++;
    }
    for (int32_t page = 0; page < w->options.n_pages; page++)
        for (int32_t s = 0; s < header->n_seqs && w->page_owner[page] >= 0; s++)
            if (batch->seq_slot[s] == w->page_owner[page])
                w->page_named[page] = header->step;
    for (int32_t s = 0; s < header->n_seqs; s++)
        w->slot_named[batch->seq_slot[s]] = header->step;
    for (int32_t g = 0; g < header->n_segments; g++)
        w->adapter_named[batch->segment_adapter[g]] = header->step;
}

static int by_id(const void *a, const void *b)
{
    const mil_request *const *x = a, *const *y = b;
    return (*x)->id < (*y)->id ? -1 : 1;
}

/* First come, first served: those that run are the oldest of all that are open. */
static void check_order(world *w)
{
    mil_request *open[MAX_OPEN];
    size_t n = 0;
    for (int32_t i = 0; i < MAX_OPEN; i++)
        if (w->clients[i].request != NULL && !w->clients[i].has_ended)
            open[n++] = w->clients[i].request;
    qsort(open, n, sizeof *open, by_id);
    for (size_t i = 1; i < n; i++)
        CHECK(open[i - 1]->state == MIL_REQUEST_RUNNING || open[i]->state == MIL_REQUEST_WAITING);
}

/* The deterministic promise: a query that is alone in its step is a whole prompt, or decodes. */
static void check_pieces(world *w, const mil_batch *batch)
{
    const mil_plan_header *header = batch->header;
    for (int32_t s = header->n_decode; s < header->n_seqs && w->options.is_deterministic; s++)
        for (int32_t i = 0; i < MAX_OPEN; i++) {
            const mil_request *request = w->clients[i].request;
            if (request != NULL && request->slot == batch->seq_slot[s] && request->n_prefill > 1)
                CHECK(batch->query_indptr[s + 1] - batch->query_indptr[s] > 1);
        }
}

static void check_pages(world *w)
{
    mil_scheduler_counts counts;
    mil_scheduler_counts_get(w->scheduler, &counts);
    CHECK_INT(counts.n_pages, w->options.n_pages - 1);
    CHECK_INT(counts.n_free_pages + w->n_owned, counts.n_pages);
}

static bool fill(world *w)
{
    mil_plan *plan = w->plans[w->n_in_flight];
    mil_plan_limits limits = mil_scheduler_limits(&w->options);
    mil_plan_reset(plan, &limits, w->step + 1);
    mil_batch batch;
    mil_plan_view(plan, &batch);
    if (!mil_scheduler_fill(w->scheduler, plan)) {
        CHECK(batch.header->n_adapter_sets + batch.header->n_slot_sets +
                  batch.header->n_page_sets ==
              0);
        return false;
    }
    CHECK(batch.header->n_seqs > 0);
    w->step++;
    CHECK_INT(mil_plan_check(plan, w->options.n_pages, VOCAB), MIL_OK);
    check_fences(w, &batch);
    check_order(w);
    check_pieces(w, &batch);
    check_pages(w);
    w->n_in_flight++;
    return true;
}

/* The device runs the oldest step as late as it may: just before it retires. */
static void retire(world *w)
{
    mil_plan *plan = w->plans[0];
    mil_batch batch;
    mil_plan_view(plan, &batch);
    mil_sample samples[16];
    mil_event events[16];
    fake_device_run(&w->device, plan, samples, NULL);
    w->retired = batch.header->step;
    int32_t n = mil_scheduler_retire(w->scheduler, batch.header->step, samples, events);
    w->n_overshoot += batch.header->n_logit_rows - n;
    for (int32_t i = 0; i < n; i++)
        receive(w, &events[i]);
    w->plans[0] = w->plans[1];
    w->plans[1] = plan;
    w->n_in_flight--;
    reap(w);
    check_pages(w);
}

static bool step(world *w)
{
    bool has_filled = w->n_in_flight < w->depth && fill(w);
    if (w->n_in_flight == w->depth || !has_filled) {
        if (w->n_in_flight == 0)
            return false;
        retire(w);
    }
    return true;
}

/* Run until nothing is open, then check that all is given back. */
static void drain(world *w)
{
    while (step(w)) {
    }
    reap(w);
    for (int32_t i = 0; i < MAX_OPEN; i++)
        CHECK(w->clients[i].request == NULL);
    mil_scheduler_counts counts;
    mil_scheduler_counts_get(w->scheduler, &counts);
    CHECK_INT(counts.n_waiting + counts.n_running + counts.n_in_flight, 0);
    CHECK_INT(counts.n_free_pages, counts.n_pages);
    CHECK_INT(counts.n_pins, 0);
}

/* ---- random traffic ---- */

/* Deterministic ones have the tightest budgets. */
static mil_scheduler_options draw_options(world *w, bool is_deterministic)
{
    mil_scheduler_options options = {.max_seqs = 1 + (int32_t)draw(w, 8)};
    options.max_tokens = options.max_seqs + (int32_t)draw(w, is_deterministic ? 5 : 24);
    options.page_size = 1 + (int32_t)draw(w, 5);
    options.is_deterministic = is_deterministic;
    if (is_deterministic && options.max_tokens < MIL_PROMPT_ROOM)
        options.max_tokens = MIL_PROMPT_ROOM;
    if (is_deterministic)
        options.page_size += MIL_PROMPT_ROOM - 1;
    options.max_model_len = 8 + (int32_t)draw(w, 56);
    int32_t least = (options.max_model_len - 1) / options.page_size + 2;
    options.n_pages = least + (int32_t)draw(w, 3) * (int32_t)draw(w, (uint32_t)least);
    return options;
}

static void submit_random(world *w)
{
    int32_t longest = w->options.max_model_len - 1;
    int32_t n_prompt = 1 + (int32_t)draw(w, (uint32_t)longest);
    int32_t max_new = 1 + (int32_t)draw(w, (uint32_t)(w->options.max_model_len - n_prompt));
    int32_t adapter = (int32_t)draw(w, 5) - 1;
    (void)submit(w, n_prompt, max_new, adapter, draw(w, 1000), draw(w, 2) == 0);
}

static void run_traffic(int32_t depth, uint64_t seed, bool is_deterministic,
                        mil_scheduler_counts *total, int64_t *n_overshoot)
{
    static world w;
    memset(total, 0, sizeof *total);
    *n_overshoot = 0;
    for (int32_t round = 0; round < 250; round++) {
        w.random = seed + (uint64_t)round;
        mil_scheduler_options options = draw_options(&w, is_deterministic);
        open_world(&w, &options, depth, w.random);
        for (int32_t op = 0; op < 300; op++) {
            uint32_t kind = draw(&w, 100);
            client *c = &w.clients[draw(&w, MAX_OPEN)];
            if (kind < 12)
                submit_random(&w);
            else if (kind < 14 && c->request != NULL)
                cancel(&w, c);
            else
                (void)step(&w);
            reap(&w);
        }
        drain(&w);
        mil_scheduler_counts counts;
        mil_scheduler_counts_get(w.scheduler, &counts);
        total->n_preemptions += counts.n_preemptions;
        total->n_generated_tokens += counts.n_generated_tokens;
        *n_overshoot += w.n_overshoot;
        close_world(&w);
    }
}

TEST(random_traffic_gives_each_request_its_own_answer_with_one_step_in_flight)
{
    mil_scheduler_counts total;
    int64_t n_overshoot;
    size_t held = mil_memory_held_bytes();
    run_traffic(1, 1000, false, &total, &n_overshoot);
    CHECK(total.n_preemptions > 200 && total.n_generated_tokens > 20000);
    CHECK_INT(n_overshoot, 0);
    CHECK_INT(mil_memory_held_bytes(), held);
}

TEST(random_traffic_gives_each_request_its_own_answer_with_two_steps_in_flight)
{
    mil_scheduler_counts total;
    int64_t n_overshoot;
    run_traffic(2, 5000, false, &total, &n_overshoot);
    CHECK(total.n_preemptions > 200 && total.n_generated_tokens > 20000);
    CHECK(n_overshoot > 100);
}

TEST(random_traffic_leaves_no_piece_of_one_token_where_that_is_promised)
{
    mil_scheduler_counts total;
    int64_t n_overshoot;
    for (int32_t depth = 1; depth <= MIL_STEPS_IN_FLIGHT; depth++) {
        run_traffic(depth, 9000, true, &total, &n_overshoot);
        CHECK(total.n_preemptions > 200 && total.n_generated_tokens > 20000);
    }
}

/* ---- single behaviours ---- */

static const mil_scheduler_options ROOMY = {
    .max_seqs = 4, .max_tokens = 16, .max_model_len = 64, .page_size = 4, .n_pages = 65};

TEST(a_long_prompt_is_cut_in_chunks_and_decode_rows_go_first)
{
    static world w;
    open_world(&w, &ROOMY, 1, 1);
    CHECK(submit(&w, 3, 20, MIL_NO_ADAPTER, 1, false) != NULL);
    CHECK(step(&w));
    client *c = submit(&w, 40, 2, MIL_NO_ADAPTER, 2, false);
    CHECK(fill(&w));
    mil_batch batch;
    mil_plan_view(w.plans[0], &batch);
    CHECK_INT(batch.header->n_decode, 1);
    CHECK_INT(batch.header->n_seqs, 2);
    CHECK_INT(batch.header->n_tokens, 16);
    CHECK_INT(batch.header->n_logit_rows, 1); /* the chunk does not end its prompt */
    CHECK_INT(c->request->n_computed, 15);
    retire(&w);
    drain(&w);
    close_world(&w);
}

TEST(the_newest_is_preempted_and_keeps_its_place_in_line)
{
    static world w;
    mil_scheduler_options options = ROOMY;
    options.max_model_len = 32;
    options.n_pages = 9; /* 32 tokens in all */
    open_world(&w, &options, 1, 2);
    client *oldest = submit(&w, 8, 24, MIL_NO_ADAPTER, 1, false);
    client *newest = submit(&w, 8, 24, MIL_NO_ADAPTER, 2, false);
    while (newest->request->n_preemptions == 0)
        CHECK(step(&w));
    client *later = submit(&w, 4, 2, MIL_NO_ADAPTER, 4, false);
    CHECK_INT(oldest->request->n_preemptions, 0);
    CHECK(newest->n_seen > 0 && newest->request->state == MIL_REQUEST_WAITING);
    while (!newest->has_ended) {
        CHECK(step(&w));
        CHECK(!later->has_ended || newest->has_ended || newest->request->slot >= 0);
    }
    drain(&w);
    mil_scheduler_counts counts;
    mil_scheduler_counts_get(w.scheduler, &counts);
    CHECK(counts.n_prompt_tokens > 20); /* the newest one's were computed twice */
    CHECK_INT(counts.n_generated_tokens, 24 + 24 + 2);
    close_world(&w);
}

TEST(a_newcomer_leaves_a_page_for_each_that_runs)
{
    static world w;
    mil_scheduler_options options = ROOMY;
    options.max_model_len = 24;
    options.n_pages = 1 + 2 * 2 + 2; /* two run on two pages each; two are free */
    open_world(&w, &options, 1, 8);
    CHECK(submit(&w, 5, 12, MIL_NO_ADAPTER, 1, false) != NULL);
    CHECK(submit(&w, 5, 12, MIL_NO_ADAPTER, 1, false) != NULL);
    CHECK(step(&w));
    client *newcomer = submit(&w, 3, 2, MIL_NO_ADAPTER, 1, false);
    CHECK(step(&w));
    CHECK_INT(newcomer->request->state, MIL_REQUEST_WAITING);
    drain(&w);
    mil_scheduler_counts counts;
    mil_scheduler_counts_get(w.scheduler, &counts);
    CHECK_INT(counts.n_preemptions, 1); /* the two need eight pages in the end, and there are six */
    close_world(&w);
}

TEST(max_tokens_never_overshoots_with_two_steps_in_flight)
{
    static world w;
    open_world(&w, &ROOMY, 2, 3);
    CHECK(submit(&w, 5, 6, MIL_NO_ADAPTER, 1, false) != NULL);
    CHECK(submit(&w, 5, 1, MIL_NO_ADAPTER, 1, false) != NULL);
    drain(&w);
    CHECK_INT(w.n_overshoot, 0);
    close_world(&w);
}

TEST(a_cancelled_request_lets_go_after_the_steps_that_name_it)
{
    static world w;
    open_world(&w, &ROOMY, 2, 4);
    client *c = submit(&w, 9, 20, 2, 1, false);
    CHECK(fill(&w));
    CHECK(fill(&w));
    cancel(&w, c);
    mil_scheduler_counts counts;
    mil_scheduler_counts_get(w.scheduler, &counts);
    CHECK_INT(counts.n_free_pages, 64 - 3);
    CHECK_INT(counts.n_pins, 1);
    CHECK(mil_scheduler_reap(w.scheduler) == NULL);
    retire(&w);
    CHECK(c->request != NULL);
    retire(&w);
    CHECK(c->request == NULL);
    drain(&w);
    close_world(&w);
}

TEST(rows_of_one_adapter_share_a_segment_and_base_rows_are_in_none)
{
    static world w;
    open_world(&w, &ROOMY, 1, 5);
    const int32_t adapters[4] = {9, MIL_NO_ADAPTER, 5, 9};
    for (int32_t i = 0; i < 4; i++)
        CHECK(submit(&w, 3, 3, adapters[i], (uint64_t)i, false) != NULL);
    CHECK(fill(&w));
    mil_batch batch;
    mil_plan_view(w.plans[0], &batch);
    CHECK_INT(batch.header->n_adapter_sets, 2);
    CHECK_INT(batch.header->n_segments, 2);
    CHECK_INT(batch.header->n_lora_rows, 9);
    const int32_t rows[9] = {0, 1, 2, 9, 10, 11, 6, 7, 8};
    for (int32_t i = 0; i < 9; i++)
        CHECK_INT(batch.lora_rows[i], rows[i]);
    retire(&w);
    CHECK(fill(&w));
    mil_plan_view(w.plans[0], &batch);
    CHECK_INT(batch.header->n_adapter_sets, 0);
    retire(&w);
    drain(&w);
    close_world(&w);
}

TEST(an_abandoned_scheduler_gives_everything_back)
{
    static world w;
    open_world(&w, &ROOMY, 2, 6);
    client *c = submit(&w, 9, 20, 1, 1, false);
    CHECK(fill(&w));
    CHECK(fill(&w));
    w.retired = w.step; /* the device is dead: nothing names anything any more */
    mil_scheduler_abandon(w.scheduler);
    CHECK(mil_scheduler_first(w.scheduler) == c->request);
    cancel(&w, c);
    w.n_in_flight = 0;
    drain(&w);
    close_world(&w);
}

TEST(plans_never_lack_room_for_page_entries)
{
    for (int32_t page = 1; page < 20; page++) {
        for (int32_t seqs = 1; seqs < 6; seqs++) {
            for (int32_t tokens = seqs; tokens < 40; tokens++) {
                mil_scheduler_options options = {.max_seqs = seqs,
                                                 .max_tokens = tokens,
                                                 .max_model_len = 100,
                                                 .page_size = page};
                /* The worst: all but one sequence gain a page with one token, the last takes the
                 * other tokens from a page's start. */
                int32_t most = seqs - 1 + (tokens - seqs + page) / page;
                CHECK(mil_scheduler_limits(&options).max_page_sets >= most);
            }
        }
    }
}

TEST(steps_do_not_allocate)
{
    static world w;
    open_world(&w, &ROOMY, 2, 7);
    for (int32_t i = 0; i < 4; i++)
        CHECK(submit(&w, 8, 50, i - 1, (uint64_t)i * 16, false) != NULL);
    uint64_t before = mil_memory_calls();
    for (int32_t i = 0; i < 40; i++)
        CHECK(step(&w));
    CHECK_INT(mil_memory_calls(), before);
    drain(&w);
    close_world(&w);
}

TEST(a_failed_allocation_is_an_error_and_holds_nothing)
{
    size_t held = mil_memory_held_bytes();
    mil_status status = MIL_ERR_MEMORY;
    int32_t k = 1;
    for (; status != MIL_OK; k++) {
        mil_scheduler *scheduler = NULL;
        mil_memory_fail_at((uint64_t)k);
        status = mil_scheduler_create(&scheduler, &ROOMY);
        mil_memory_fail_at(0);
        CHECK(status == MIL_OK || status == MIL_ERR_MEMORY);
        if (status == MIL_OK)
            mil_scheduler_free(scheduler);
        CHECK_INT(mil_memory_held_bytes(), held);
    }
    CHECK(k > 10);
    int32_t token = 1;
    mil_request_options options = {.tokens = &token, .n_tokens = 1};
    mil_request *request = NULL;
    mil_memory_fail_at(1);
    CHECK_INT(mil_request_create(&request, &options, 1), MIL_ERR_MEMORY);
    CHECK(request == NULL);
}

/* ---- pieces of one token ----
 * Under deterministic a prompt once had bits that hung on its mates: where they left one token of a
 * step, a piece of one went by attention's path for decode rows. */

/* Run until the prompt is computed; the pieces of what it lacks must be these. */
static void expect_pieces(world *w, const client *c, int32_t n, const int32_t *pieces)
{
    const mil_request *request = c->request;
    for (int32_t i = 0, before = request->n_computed; before < request->n_prompt;) {
        CHECK(step(w));
        if (request->n_computed == before)
            continue;
        CHECK(i < n);
        CHECK_INT(request->n_computed - before, pieces[i]);
        before = request->n_computed;
        i++;
    }
}

static void expect_pieces_alone(int32_t max_tokens, bool is_deterministic, int32_t n_prompt,
                                int32_t n, const int32_t *pieces)
{
    static world w;
    mil_scheduler_options options = ROOMY;
    options.max_seqs = 1;
    options.max_tokens = max_tokens;
    options.is_deterministic = is_deterministic;
    open_world(&w, &options, 1, 11);
    client *c = submit(&w, n_prompt, 2, MIL_NO_ADAPTER, 1, false);
    expect_pieces(&w, c, n, pieces);
    drain(&w);
    close_world(&w);
}

TEST(a_prompt_is_cut_so_that_no_single_token_is_left)
{
    expect_pieces_alone(16, false, 17, 2, (int32_t[]){16, 1});
    expect_pieces_alone(16, true, 17, 2, (int32_t[]){15, 2});
    expect_pieces_alone(16, true, 33, 3, (int32_t[]){16, 15, 2});
    expect_pieces_alone(16, true, 18, 2, (int32_t[]){16, 2});
    expect_pieces_alone(16, true, 16, 1, (int32_t[]){16});
    expect_pieces_alone(16, true, 1, 1, (int32_t[]){1}); /* one token alone in any batch */
}

TEST(the_smallest_budget_serves_every_prompt)
{
    expect_pieces_alone(3, true, 1, 1, (int32_t[]){1});
    expect_pieces_alone(3, true, 2, 1, (int32_t[]){2});
    expect_pieces_alone(3, true, 3, 1, (int32_t[]){3});
    expect_pieces_alone(3, true, 4, 2, (int32_t[]){2, 2});
    expect_pieces_alone(3, true, 5, 2, (int32_t[]){3, 2});
    expect_pieces_alone(3, true, 7, 3, (int32_t[]){3, 2, 2});
    expect_pieces_alone(4, true, 5, 2, (int32_t[]){3, 2});
}

TEST(mates_that_would_leave_one_token_leave_three)
{
    static world w;
    mil_scheduler_options options = ROOMY;
    options.max_tokens = 4; /* three mates and one */
    options.is_deterministic = true;
    open_world(&w, &options, 1, 12);
    for (int32_t i = 0; i < 3; i++)
        CHECK(submit(&w, 2, 10 + 10 * i, MIL_NO_ADAPTER, 1, false) != NULL);
    client *c = submit(&w, 13, 2, MIL_NO_ADAPTER, 2, false);
    while (c->request->n_computed == 0)
        CHECK(step(&w));
    mil_scheduler_counts counts;
    mil_scheduler_counts_get(w.scheduler, &counts);
    CHECK_INT(counts.n_running, 2); /* a second mate would leave it two tokens */
    CHECK_INT(c->request->n_computed, 3);
    expect_pieces(&w, c, 4, (int32_t[]){3, 3, 2, 2});
    drain(&w);
    close_world(&w);
}

TEST(a_page_with_room_for_one_token_more_is_no_piece)
{
    static world w;
    mil_scheduler_options options = ROOMY;
    options.max_tokens = 8;
    options.max_model_len = 16;
    options.n_pages = 5;
    options.is_deterministic = true;
    open_world(&w, &options, 1, 13);
    CHECK(submit(&w, 3, 5, MIL_NO_ADAPTER, 1, false) != NULL);
    CHECK(step(&w));
    client *c = submit(&w, 12, 2, MIL_NO_ADAPTER, 2, false);
    /* Seven tokens on two pages beside the mate's row. Then that takes the last page. */
    expect_pieces(&w, c, 2, (int32_t[]){7, 5});
    CHECK_INT(c->request->n_preemptions, 0);
    drain(&w);
    close_world(&w);
}

TEST(a_long_prompt_goes_on_beside_mates_and_newcomers)
{
    static world w;
    mil_scheduler_options options = ROOMY;
    options.max_tokens = 4;
    options.is_deterministic = true;
    open_world(&w, &options, 1, 14);
    for (int32_t i = 0; i < 3; i++)
        CHECK(submit(&w, 2, i == 0 ? 20 : 60, MIL_NO_ADAPTER, 1, false) != NULL);
    client *c = submit(&w, 41, 2, MIL_NO_ADAPTER, 2, false);
    mil_request *request = c->request;
    for (int32_t i = 0; request->n_computed < 41; i++) {
        CHECK(i < 60 + 2 + 14);
        if (i % 4 == 0)
            CHECK(submit(&w, 1 + i % 3, 4, MIL_NO_ADAPTER, 1, false) != NULL);
        int32_t before = request->n_computed;
        CHECK(step(&w));
        CHECK(before == 0 || request->n_computed > before);
    }
    drain(&w);
    close_world(&w);
}

TEST_MAIN()
