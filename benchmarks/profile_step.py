"""Where one step's time goes on a GPU, kernel by kernel: Llama-3-8B's shape with dummy weights.

A decode step of --batch rows (prompts of --prompt tokens), or the step of one prompt of --prefill
tokens. One line for each place in a step: a kernel by its name, its grid and what ran before it, in
a step's order. Figures are means of a step over the steps that were traced.

    us        begin to end, calls summed
    alone us  by how much the step got longer: where two overlap, the first one's
    gap us    nothing ran before it

Below: what was idle, and the host gap, from a step's last kernel to the first of the next one, with
the copy of its tokens in it. All of it is by the GPU's own stamps (kernel_trace.py), under the
profiler; the step without it is measured first, and the host's part of that with it.

    python -m benchmarks.profile_step [--batch 64] [--adapters 64]
    python -m benchmarks.profile_step --prefill 8192
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu_model import EngineChoice, GpuModel
from benchmarks.kernel_trace import (
    KernelRow,
    Spent,
    Step,
    Trace,
    decode_steps,
    leads_us,
    spent,
    steps_of,
)
from benchmarks.shapes import SHAPES, dummy_adapter
from benchmarks.traffic import HOST_PARTS

try:
    from benchmarks import kernel_recorder
except ImportError:
    kernel_recorder = None  # type: ignore[assignment]

N_STEPS = 64
NEW = 128
RANK = 16
N_PREFILLS = 3
NAME_WIDTH = 52


@dataclass(frozen=True, slots=True)
class Gap:
    """Between the steps of a batch; what bench_engine asks for."""

    batch: int
    step_ms: float  # without the profiler
    traced_step_ms: float
    gap_us: float  # median
    worst_gap_us: float
    idle_us: float  # in a step, the gap included
    least_lead_us: float  # of the host's calls before what they launched began; NaN: not seen
    host_ms: dict[str, float]


# ---- running ----


def run_decode(model: GpuModel, options: argparse.Namespace) -> tuple[float, dict[str, float]]:
    """Milliseconds of a step, and the host's part of them."""
    adapters = [
        model.model.add_adapter(dummy_adapter(model.config, RANK), dummy_seed=100 + i)
        for i in range(options.adapters)
    ]
    run = model.traffic.decode(options.batch, adapters or [-1], options.prompt, NEW)
    return 1e3 * options.batch / run.rate, run.host_ms


def run_prefill(model: GpuModel, options: argparse.Namespace) -> tuple[float, dict[str, float]]:
    """Milliseconds of the last prompt: what is chosen and loaded at first use is there by then."""
    runs = [model.traffic.first_token_s(options.prefill, -1) for _ in range(N_PREFILLS)]
    return 1e3 * runs[-1], {}


def choice_of(options: argparse.Namespace) -> EngineChoice:
    return EngineChoice(
        device=options.device,
        max_num_seqs=options.max_num_seqs or max(options.batch, 1),
        max_num_batched_tokens=max(8192, options.prefill),
        deterministic=options.deterministic,
        enforce_eager=options.eager,
    )


# ---- printing ----


def head() -> str:
    return (
        f"{'kernel':{NAME_WIDTH}} {'grid':>14} {'calls':>6} {'us each':>8} {'us':>9} "
        f"{'alone us':>9} {'share':>6} {'gap us':>7}"
    )


def line(row: KernelRow, total: Spent) -> str:
    n = total.n_steps
    name = row.name if len(row.name) <= NAME_WIDTH else row.name[: NAME_WIDTH - 2] + ".."
    grid = "x".join(map(str, row.grid)) or "copy"
    return (
        f"{name:{NAME_WIDTH}} {grid:>14} {row.n_calls / n:6.4g} {row.us / row.n_calls:8.2f} "
        f"{row.us / n:9.1f} {row.alone_us / n:9.1f} {row.alone_us / total.step_us:6.1%} "
        f"{row.gap_us / n:7.1f}"
    )


def show_spent(total: Spent) -> None:
    """A step's kernels, and what was idle in it."""
    n = total.n_steps
    print(head())
    for row in total.rows:
        print(line(row, total))
    print(f"{'all':{NAME_WIDTH}} {'':14} {total.n_kernels / n:6.4g} {'':8} "
          f"{sum(row.us for row in total.rows) / n:9.1f} {total.busy_us / n:9.1f} "
          f"{total.busy_us / total.step_us:6.1%}")  # fmt: skip
    for what, us in (
        ("idle between kernels of one launch (a graph)", total.inside_us),
        ("idle between launches of a step", total.between_us),
        ("idle from the last activity to the next step", total.after_us),
    ):
        print(f"{what:{NAME_WIDTH}} {'':14} {'':6} {'':8} {'':9} {us / n:9.1f} "
              f"{us / total.step_us:6.1%}")  # fmt: skip


def gap_of(
    trace: Trace, steps: list[Step], batch: int, step_ms: float, host_ms: dict[str, float]
) -> Gap:
    total = spent(steps)
    gaps = [step.gap_us for step in steps]
    return Gap(
        batch=batch,
        step_ms=step_ms,
        traced_step_ms=total.step_us / total.n_steps / 1e3,
        gap_us=statistics.median(gaps),
        worst_gap_us=max(gaps),
        idle_us=(total.step_us - total.busy_us) / total.n_steps,
        least_lead_us=min(leads_us(trace, steps), default=float("nan")),
        host_ms=host_ms,
    )


def show_gap(gap: Gap) -> None:
    print(
        f"host gap, a step's last kernel to the next one's first: median {gap.gap_us:.1f} us, "
        f"worst {gap.worst_gap_us:.1f} us\n"
        f"the host's calls came {gap.least_lead_us:.0f} us or more before what they launched began"
    )
    parts = ", ".join(f"{part} {gap.host_ms[part]:.3f}" for part in HOST_PARTS)
    work_ms = sum(gap.host_ms[part] for part in HOST_PARTS if part != "wait")
    print(f"the engine's thread, ms a step without the profiler: {parts}; "
          f"work {work_ms:.3f} of {gap.step_ms:.3f}")  # fmt: skip


def show(
    options: argparse.Namespace, trace: Trace, step_ms: float, host_ms: dict[str, float]
) -> None:
    steps = steps_of(trace)
    if options.prefill:
        last = steps[-1:]
        print(
            f"prompt of {options.prefill}: {last[0].next_us - last[0].begin_us:.0f} us traced; "
            f"first token after {step_ms:.2f} ms without the profiler"
        )
        show_spent(spent(last))
        return
    chosen = decode_steps(steps, N_STEPS)
    gap = gap_of(trace, chosen, options.batch, step_ms, host_ms)
    if options.json:
        print(json.dumps(asdict(gap)))
        return
    print(
        f"batch {options.batch}, prompts of {options.prompt}: {len(chosen)} steps of "
        f"{gap.traced_step_ms:.3f} ms traced, {gap.step_ms:.3f} without the profiler"
    )
    show_spent(spent(chosen))
    show_gap(gap)


# ---- the command ----


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--shape", default="8B", choices=sorted(SHAPES))
    made.add_argument("--device", default="cuda")
    made.add_argument("--batch", type=int, default=64)
    made.add_argument("--prompt", type=int, default=1024)
    made.add_argument("--prefill", type=int, default=0, help="a prompt's step in place of decode")
    made.add_argument("--adapters", type=int, default=0, help="rows take these in turn, rank 16")
    made.add_argument("--max-num-seqs", type=int, default=0, help="the batch, if not given")
    made.add_argument("--deterministic", action="store_true")
    made.add_argument("--eager", action="store_true", help="no graphs")
    made.add_argument("--trace", type=Path, help="keep the Chrome trace there, gzipped")
    made.add_argument("--json", action="store_true", help="the gap's figures alone, as one object")
    return made


def measure(options: argparse.Namespace) -> tuple[Trace, float, dict[str, float]]:
    """What was traced, then milliseconds of a step without the profiler and the host's part."""
    shape = SHAPES[options.shape]
    run = run_prefill if options.prefill else run_decode
    with tempfile.TemporaryDirectory() as folder:
        with GpuModel(shape, Path(folder), choice_of(options)) as model:
            step_ms, host_ms = run(model, options)
        with (
            kernel_recorder.Recorder(options.trace) as recorder,
            GpuModel(shape, Path(folder), choice_of(options)) as model,
        ):
            run(model, options)
    return recorder.trace, step_ms, host_ms


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if kernel_recorder is None or not kernel_recorder.is_usable():
        print("profile_step: found no torch that sees a GPU, and its profiler is what records")
        return 1
    try:
        show(options, *measure(options))
    except ValueError as problem:
        print(f"profile_step: {problem}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
