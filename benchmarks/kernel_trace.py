"""What a GPU ran and when, kernel by kernel, cut into the engine's steps.

From a Chrome trace as torch's profiler writes it (kernel_recorder.py). A step begins with the
kernel that reads its plan (csrc/kernels/begin.cu).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

FIRST_KERNEL = "copy_kernel"
PLAN_KERNELS = (FIRST_KERNEL, "apply_kernel")  # whose grids follow the commands of each plan
MIN_STEPS = 16  # alike and one after the other: then they are decode steps
SETTLING_STEPS = 8  # of them that are left out, while the last prompts' rows join


@dataclass(frozen=True, slots=True)
class Activity:
    """A kernel, or a copy, on the GPU."""

    name: str
    begin_us: float
    end_us: float
    stream: int
    launch: int  # one number for all that one call launched: a graph's kernels share theirs
    grid: tuple[int, ...]  # () for a copy

    @property
    def is_kernel(self) -> bool:
        return bool(self.grid)


@dataclass(frozen=True, slots=True)
class Trace:
    """Activities by begin, and when the host made the call that launched them."""

    activities: list[Activity]
    called_us: dict[int, float]


@dataclass(frozen=True, slots=True)
class Step:
    activities: list[Activity]
    next_us: float  # when the first kernel of the step after it began

    @property
    def begin_us(self) -> float:
        return self.activities[0].begin_us

    @property
    def end_us(self) -> float:
        """When its last kernel ended; the copy of its tokens to the host comes after that."""
        return max(a.end_us for a in self.activities if a.is_kernel)

    @property
    def gap_us(self) -> float:
        """Between its last kernel and the first of the next step."""
        return self.next_us - self.end_us


# ---- reading ----


def short_name(name: str) -> str:
    """Without return type and parameters; template arguments stay."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:at]
    return name


def read_trace(events: Iterable[dict[str, Any]]) -> Trace:
    """From the events of a Chrome trace, as kineto writes them."""
    activities = []
    called_us = {}
    for event in events:
        kind = event.get("cat")
        if kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            about = event["args"]
            activities.append(
                Activity(
                    short_name(event["name"]),
                    event["ts"],
                    event["ts"] + event["dur"],
                    about["stream"],
                    about["correlation"],
                    tuple(about["grid"]) if kind == "kernel" else (),
                )
            )
        elif kind in ("cuda_runtime", "cuda_driver"):
            # The driver's call is made within the runtime's, with a number of its own or the same.
            correlation = event["args"].get("correlation", 0)
            called_us[correlation] = min(event["ts"], called_us.get(correlation, event["ts"]))
    if not any(a.is_kernel for a in activities):
        raise ValueError("the profiler saw no kernel, expected CUPTI to be usable by torch")
    activities.sort(key=lambda a: a.begin_us)
    return Trace(activities, called_us)


# ---- steps ----


def steps_of(trace: Trace) -> list[Step]:
    """All steps; the last one ends with the last activity."""
    activities = trace.activities
    firsts = [i for i, a in enumerate(activities) if a.name == FIRST_KERNEL]
    if not firsts:
        raise ValueError(f"found no kernel named {FIRST_KERNEL}, expected one to begin each step")
    steps = []
    for first, end in pairwise([*firsts, len(activities)]):
        inside = activities[first:end]
        is_last = end == len(activities)
        next_us = max(a.end_us for a in inside) if is_last else activities[end].begin_us
        steps.append(Step(inside, next_us))
    return steps


def decode_steps(steps: list[Step], most: int) -> list[Step]:
    """Up to `most` of the longest run of steps that launch the same kernels."""
    runs: list[list[Step]] = []
    last = None
    for step in steps:
        kernels = Counter(a.name for a in step.activities)
        if kernels != last:
            runs.append([])
        runs[-1].append(step)
        last = kernels
    longest = max(runs, key=len)
    if len(longest) < MIN_STEPS:
        raise ValueError(
            f"found {len(longest)} steps alike in a row among {len(steps)}, expected {MIN_STEPS}"
        )
    return longest[SETTLING_STEPS : SETTLING_STEPS + most]


# ---- what a step spends ----


@dataclass(slots=True)
class KernelRow:
    """One place in a step, or as many as launch the same kernel after the same one."""

    name: str
    grid: tuple[int, ...]
    n_calls: int = 0
    us: float = 0.0  # begin to end, summed
    alone_us: float = 0.0  # by how much the step got longer: overlap counts for who came first
    gap_us: float = 0.0  # nothing ran before it


@dataclass(slots=True)
class Spent:
    """Sums over steps; divide by n_steps."""

    n_steps: int = 0
    n_kernels: int = 0
    step_us: float = 0.0
    busy_us: float = 0.0  # something ran
    inside_us: float = 0.0  # idle between two kernels that one call launched: a graph's
    between_us: float = 0.0  # idle between two launches of a step
    after_us: float = 0.0  # idle between a step's last activity and the next step's first
    rows: list[KernelRow] = field(default_factory=list)


def spent(steps: list[Step]) -> Spent:
    """Where the time of these steps went. Rows come in the order of a step."""
    total = Spent()
    rows: dict[tuple[object, ...], KernelRow] = {}
    for step in steps:
        _add_step(total, rows, step)
    total.rows = list(rows.values())
    return total


def _add_step(total: Spent, rows: dict[tuple[object, ...], KernelRow], step: Step) -> None:
    reached = step.begin_us  # all before this has ended
    before: dict[int, str] = {}  # of each stream, what ran last
    launch = step.activities[0].launch
    for a in step.activities:
        grid = () if a.name in PLAN_KERNELS else a.grid
        key = (a.name, grid, before.get(a.stream, ""))
        row = rows.setdefault(key, KernelRow(a.name, a.grid))
        gap_us = max(0.0, a.begin_us - reached)
        row.n_calls += 1
        row.us += a.end_us - a.begin_us
        row.gap_us += gap_us
        row.alone_us += max(0.0, a.end_us - max(a.begin_us, reached))
        if a.launch == launch:
            total.inside_us += gap_us
        else:
            total.between_us += gap_us
        total.n_kernels += a.is_kernel
        reached = max(reached, a.end_us)
        before[a.stream], launch = a.name, a.launch
    total.n_steps += 1
    total.step_us += step.next_us - step.begin_us
    total.after_us += max(0.0, step.next_us - reached)
    total.busy_us = total.step_us - total.inside_us - total.between_us - total.after_us


def leads_us(trace: Trace, steps: list[Step]) -> list[float]:
    """Of each step, by how much at least the host's calls came before what they launched began."""
    leads = []
    for step in steps:
        first_of = {a.launch: a.begin_us for a in reversed(step.activities)}
        known = [
            begin_us - trace.called_us[launch]
            for launch, begin_us in first_of.items()
            if launch in trace.called_us
        ]
        if known:
            leads.append(min(known))
    return leads
