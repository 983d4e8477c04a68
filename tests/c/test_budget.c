/* Shares of memory, and the table of what it went to, as numbers. */
#include "engine/budget.h"

#include "test.h"

#define MIB ((uint64_t)1 << 20)

static const mil_model_memory DEVICE = {
    .device = "gpu", .is_device = true, .n_free = 800 * MIB, .n_total = 1000 * MIB};

static uint64_t left(double share, const mil_model_memory *memory, size_t to_take)
{
    const mil_engine_options options = {.gpu_memory_utilization = share};
    return mil_budget_left(&options, memory, to_take);
}

TEST(a_device_gives_its_share_less_what_anyone_uses)
{
    CHECK_INT(left(0.5, &DEVICE, 0), 300 * MIB);
    CHECK_INT(left(0.5, &DEVICE, 100 * MIB), 200 * MIB);
    CHECK_INT(left(1.0, &DEVICE, 0), 800 * MIB);
    CHECK_INT(left(0.2, &DEVICE, 0), 0);
    CHECK_INT(left(0.1, &DEVICE, 0), 0);
    CHECK_INT(left(0.5, &DEVICE, 301 * MIB), 0);
}

TEST(a_devices_share_is_rounded_down_for_the_driver_to_round_up)
{
    CHECK_INT(left(0.5, &DEVICE, 1), 298 * MIB);
    CHECK_INT(left(0.5, &DEVICE, 2 * MIB + 1), 296 * MIB);
}

TEST(a_host_gives_half_of_what_is_free)
{
    const mil_model_memory host = {.device = "cpu", .n_free = 801, .n_total = 1000};
    CHECK_INT(left(0.9, &host, 1), 400);
    CHECK_INT(left(0.9, &host, 801), 0);
    CHECK_INT(left(0.9, &host, 900), 0);
}

static uint64_t sum_of(const mil_memory_report *report)
{
    return report->weight_bytes + report->kv_bytes + report->adapter_bytes +
           report->workspace_bytes + report->graph_bytes + report->other_bytes + report->free_bytes;
}

TEST(rows_sum_up_to_the_total_whatever_was_measured)
{
    const mil_runner_memory runner = {.kv_bytes = 50 * MIB, .workspace_bytes = 20 * MIB};
    for (uint64_t graphs = 0; graphs <= 200 * MIB; graphs += 40 * MIB) {
        mil_model_memory memory = DEVICE;
        mil_runner_memory taken = runner;
        mil_memory_report report;
        memory.weight_bytes = 60 * MIB;
        memory.library_bytes = 10 * MIB;
        taken.graph_bytes = graphs;
        mil_budget_report(&report, &memory, &taken);
        CHECK_INT(sum_of(&report), 1000 * MIB);
        /* 70 MiB are neither slabs nor free: what was measured cannot have been more. */
        uint64_t measured = graphs + 10 * MIB;
        CHECK_INT(report.graph_bytes, measured < 70 * MIB ? measured : 70 * MIB);
        CHECK_INT(report.other_bytes, 70 * MIB - report.graph_bytes);
    }
}

TEST(a_hosts_untouched_pages_are_not_free)
{
    const mil_model_memory memory = {
        .device = "cpu", .n_free = 500, .n_total = 1000, .weight_bytes = 200};
    const mil_runner_memory runner = {
        .kv_bytes = 300, .workspace_bytes = 40, .untouched_bytes = 260};
    mil_memory_report report;
    mil_budget_report(&report, &memory, &runner);
    CHECK_INT(report.free_bytes, 240);
    CHECK_INT(report.graph_bytes, 0);
    /* 500 in use, 280 of it ours. */
    CHECK_INT(report.other_bytes, 220);
    CHECK_INT(sum_of(&report), 1000);
}

TEST_MAIN()
