"""A trace's kernels are cut into steps, and every microsecond of a step is somewhere once."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.kernel_trace import (
    MIN_STEPS,
    SETTLING_STEPS,
    Trace,
    decode_steps,
    leads_us,
    read_trace,
    short_name,
    spent,
    steps_of,
)

PERIOD_US = 100.0


def kernel(name: str, ts: float, dur: float, launch: int, stream: int = 7) -> dict[str, Any]:
    return {
        "cat": "kernel",
        "name": f"{name}(params)",
        "ts": ts,
        "dur": dur,
        "args": {"stream": stream, "correlation": launch, "grid": [8, 1, 1]},
    }


def step_at(ts: float, launch: int) -> list[dict[str, Any]]:
    """A plan's kernel, a graph with an overlap and a hole in it, and the tokens' copy."""
    return [
        kernel("copy_kernel", ts, 4.0, launch),
        kernel("product<int>", ts + 10, 20.0, launch + 1),
        kernel("shrink", ts + 12, 6.0, launch + 1, stream=8),
        kernel("norm", ts + 25, 15.0, launch + 1),
        kernel("product<int>", ts + 45, 35.0, launch + 1),
        {
            "cat": "gpu_memcpy",
            "name": "Memcpy DtoH (Device -> Pinned)",
            "ts": ts + 82,
            "dur": 2.0,
            "args": {"stream": 7, "correlation": launch + 2},
        },
        {"cat": "cuda_runtime", "name": "l", "ts": ts - 50, "args": {"correlation": launch}},
        {"cat": "cuda_driver", "name": "l", "ts": ts - 49, "args": {"correlation": launch}},
        {"cat": "cuda_runtime", "name": "g", "ts": ts - 20, "args": {"correlation": launch + 1}},
    ]


def trace_of(n_steps: int) -> Trace:
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "args": {}}]
    events += [kernel("dummy", 0.0, 5.0, 1)]
    for i in range(n_steps):
        events += step_at(1000.0 + i * PERIOD_US, 10 + 3 * i)
    return read_trace(events)


def test_names_lose_parameters_and_keep_templates() -> None:
    name = "void attention<(int)128, 64>(attention_job, int (*)(int))"
    assert short_name(name) == "attention<(int)128, 64>"
    assert short_name("nvjet_hsh_64x8_64x16_4x1_v_bz_TNN") == "nvjet_hsh_64x8_64x16_4x1_v_bz_TNN"


def test_a_gap_is_from_the_last_kernel_to_the_next_step_with_the_copy_in_it() -> None:
    steps = steps_of(trace_of(3))
    assert [len(step.activities) for step in steps] == [6, 6, 6]
    assert [step.gap_us for step in steps[:2]] == [20.0, 20.0]
    assert steps[2].gap_us == 4.0  # nothing follows: to the end of its copy


def test_every_microsecond_of_a_step_is_somewhere_once() -> None:
    total = spent(steps_of(trace_of(3))[:2])
    assert (total.n_steps, total.n_kernels, total.step_us) == (2, 10, 2 * PERIOD_US)
    assert total.inside_us == 2 * 5  # norm to product
    assert total.between_us == 2 * (6 + 2)  # plan to graph, graph to copy
    assert total.after_us == 2 * 16
    assert sum(row.alone_us for row in total.rows) == total.busy_us
    idle_us = total.inside_us + total.between_us + total.after_us
    assert total.busy_us + idle_us == total.step_us
    alone = {(row.name, row.n_calls): row.alone_us for row in total.rows}
    assert alone["shrink", 2] == 0.0  # beside the product all the while
    assert alone["norm", 2] == 2 * 10.0  # its first 5 us are the product's


def test_one_kernel_after_two_others_is_two_rows() -> None:
    rows = spent(steps_of(trace_of(2))).rows
    assert [row.name for row in rows].count("product<int>") == 2


def test_the_host_is_ahead_by_its_latest_call() -> None:
    trace = trace_of(2)
    assert leads_us(trace, steps_of(trace)) == [30.0, 30.0]  # the graph's, 10 us after the plan's


def test_decode_steps_are_the_longest_run_alike() -> None:
    n = MIN_STEPS + 20
    steps = steps_of(trace_of(n))
    assert decode_steps(steps, 64) == steps[SETTLING_STEPS:]
    assert decode_steps(steps, 4) == steps[SETTLING_STEPS : SETTLING_STEPS + 4]
    with pytest.raises(ValueError, match=f"found {MIN_STEPS - 1} steps alike"):
        decode_steps(steps[: MIN_STEPS - 1], 64)


def test_a_trace_without_steps_says_what_was_looked_for() -> None:
    with pytest.raises(ValueError, match="saw no kernel"):
        read_trace([])
    with pytest.raises(ValueError, match="no kernel named copy_kernel"):
        steps_of(read_trace([kernel("dummy", 0.0, 1.0, 1)]))
