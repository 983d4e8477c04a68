"""Everything that needs a GPU, in stages, and a table of what ran. `make test-gpu` builds what this
tests; so does `make test-gpu-here`, for the Python as it is.

    python tools/test_gpu.py [--only STAGE,STAGE] [pytest's options, -k attention say]

kernels    tests/kernels, a process for each file
models     every other test on a GPU, one after another: they measure the GPU's memory
ptx        tests/kernels with what `make ptx` built: the portable kernels as PTX alone, which the
           driver compiles here as it does on a GPU after Hopper (a Python that a test starts itself
           has the ordinary build)
portable   tests/model on the portable path
sanitize   tools/sanitize.sh: compute-sanitizer over every kernel; it takes none of the options

As many processes at a time as JOBS in the environment says, where more than one may run (half as
many as cores, at most 8), 30 minutes for each. Where there is a GPU, what milpy needs and is
lacking is a failure (MILPY_TEST_GPU=1), and so is a stage that passes nothing. torch, CuPy and a
second GPU may be lacking: their tests skip by name. Options may leave nothing of a stage, but
something of one. Without a GPU each test skips with its reason.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers.devices import gpu_count  # noqa: E402 - found by the line above

MARKS = "gpu or multigpu"
PORTABLE = {"MILPY_CUDA_PATH": "portable"}
NO_TESTS = 5  # pytest's status where none was selected
CANNOT_RUN = 77  # tools/sanitize.sh's
MOST_SHOWN = 20  # of a stage's problems, and of its reasons to skip
LIMIT_S = 1800.0  # for one process
TAKES_NO_OPTIONS = "sanitize"
# pytest's options whose value is the next word: a path there is no path to test.
WITH_VALUE = (
    "-k -m -p -o -c -W -r -n --deselect --ignore --ignore-glob --rootdir --basetemp --confcutdir "
    "--maxfail --tb --durations --color --capture --override-ini --junitxml"
).split()
# What `make ptx` built. Not CUDA_FORCE_PTX_JIT=1: cuBLASLt and torch cannot start under it.
PTX = {
    "MILPY_SHIM": ROOT / "build/ptx/tests/libshim.so",
    "MILPY_EXTENSION": ROOT / f"build/ptx/milpy/_C{sysconfig.get_config_var('EXT_SUFFIX')}",
}


@dataclass
class Outcome:
    """Of a process, or of a stage."""

    n_passed: int = 0
    n_failed: int = 0
    skips: Counter[str] = field(default_factory=Counter)  # by reason
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: Outcome) -> None:
        self.n_passed += other.n_passed
        self.n_failed += other.n_failed
        self.skips += other.skips
        self.problems += other.problems


# ---- pytest ----


def read_report(path: Path) -> Outcome:
    """pytest's own JUnit file."""
    outcome = Outcome()
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.n_failed += 1
            outcome.problems.append(f"{case.get('classname')}::{case.get('name')}")
        elif skipped is not None:
            outcome.skips[skipped.get("message", "")] += 1
        else:
            outcome.n_passed += 1
    return outcome


def wait(process: subprocess.Popen[bytes]) -> int | None:
    """Its status; None where it took too long and was ended."""
    try:
        return process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # on which pytest says where it was
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return None


def run_pytest(
    paths: list[str], options: list[str], env: dict[str, str], *, is_shown: bool
) -> Outcome:
    """One process. Its output is shown as it comes, or once it has failed."""
    name, began = " ".join(paths), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # A file and no pipe, which a process that outlives pytest would hold open.
        report, log = Path(folder, "report.xml"), Path(folder, "log")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += [f"--junitxml={report}", *paths, *options]
        with log.open("wb") as file:
            stdout = None if is_shown else file
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=stdout, stderr=subprocess.STDOUT
            )
            try:
                status = wait(process)
            finally:  # whoever interrupts this leaves nothing on the GPU
                process.kill()
        outcome = read_report(report) if report.exists() else Outcome()
        said = "" if status in (0, NO_TESTS) else log.read_text(errors="replace")
    if status is None:
        outcome.problems.append(f"{name}: ended after {LIMIT_S:.0f} s")
    elif status not in (0, NO_TESTS):
        outcome.problems.append(f"{name}: pytest ended with {status}")
    if not is_shown:
        counts = f"{outcome.n_passed} passed, {outcome.n_failed} failed"
        print(f"{said}{name}: {counts} in {time.monotonic() - began:.0f} s", flush=True)
    return outcome


def run_files(paths: Iterable[Path], options: list[str], env: dict[str, str]) -> Outcome:
    """A process each, JOBS at a time, the largest files first."""
    jobs = int(os.environ.get("JOBS") or min(8, max(1, (os.cpu_count() or 2) // 2)))
    names = sorted(paths, key=lambda path: -path.stat().st_size)
    run = partial(run_pytest, options=options, env=env, is_shown=False)
    total = Outcome()
    with ThreadPoolExecutor(jobs) as pool:
        for outcome in pool.map(run, [[str(path.relative_to(ROOT))] for path in names]):
            total.add(outcome)
    return total


# ---- stages ----

KERNEL_TESTS = sorted((ROOT / "tests/kernels").glob("test_*.py"))


def kernels(options: list[str], env: dict[str, str]) -> Outcome:
    return run_files(KERNEL_TESTS, options, env)


def models(options: list[str], env: dict[str, str]) -> Outcome:
    rest = ["tests", "--ignore=tests/kernels", "-m", MARKS]
    return run_pytest(rest, options, env, is_shown=True)


def ptx(options: list[str], env: dict[str, str]) -> Outcome:
    lacking = [str(path) for path in PTX.values() if not path.exists()]
    if lacking:
        return Outcome(problems=[f"found no {', '.join(lacking)}: make ptx"])
    built = {name: str(path) for name, path in PTX.items()}
    return run_files(KERNEL_TESTS, options, {**env, **PORTABLE, **built})


def portable(options: list[str], env: dict[str, str]) -> Outcome:
    return run_pytest(["tests/model", "-m", MARKS], options, {**env, **PORTABLE}, is_shown=True)


def sanitize(options: list[str], env: dict[str, str]) -> Outcome:
    """The script chooses its tests itself."""
    outcome, line, n_rows = Outcome(), "", 0
    env = {**env, "PYTHON": sys.executable}
    command = ["sh", "tools/sanitize.sh"]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            # A line of its table: tool, file, ok or FAILED (status), seconds, what was said.
            row = re.match(r"(\w+ +\w+) +(ok|FAILED \(\d+\)) +\d+s ", line)
            if row is None:
                continue
            n_rows += 1
            outcome.n_passed += sum(map(int, re.findall(r"(\d+) passed", line)))
            if row[2] != "ok":
                outcome.n_failed += 1
                outcome.problems.append(f"{row[1]}: {row[2]}")
    if process.returncode == CANNOT_RUN:
        outcome.skips[line.strip()] += 1
    elif process.returncode != 0:
        why = "" if n_rows else f": {line.strip()}"
        outcome.problems.append(f"tools/sanitize.sh ended with {process.returncode}{why}")
    return outcome


Stage = Callable[[list[str], dict[str, str]], Outcome]
STAGES: dict[str, Stage] = {
    "kernels": kernels,
    "models": models,
    "ptx": ptx,
    "portable": portable,
    "sanitize": sanitize,
}


def run_stages(names: list[str], options: list[str]) -> dict[str, Outcome]:
    env = {**os.environ, "MILPY_TEST_GPU": "1"}
    found: dict[str, Outcome] = {}
    for name in names:
        print(f"== {name}", flush=True)
        began = time.monotonic()
        outcome = found[name] = STAGES[name](options, env)
        outcome.seconds = time.monotonic() - began
        takes_options = name != TAKES_NO_OPTIONS
        # Options may leave nothing of a stage, and a sanitizer may be unable to run here.
        may_be_empty = bool(options) if takes_options else bool(outcome.skips)
        if outcome.n_passed == 0 and not may_be_empty:
            outcome.problems.append("no test passed")
    asked = [found[name] for name in names if name != TAKES_NO_OPTIONS]
    if options and asked and not any(outcome.n_passed for outcome in asked):
        asked[0].problems.append(f"no test passed in any stage with {' '.join(options)}")
    return found


def skip_all(options: list[str]) -> dict[str, Outcome]:
    began = time.monotonic()
    outcome = run_pytest(["tests", "-m", MARKS], options, dict(os.environ), is_shown=True)
    outcome.seconds = time.monotonic() - began
    if not outcome.skips:
        outcome.problems.append("no test was found")
    return {"all": outcome}


# ---- what is printed ----


def show_machine() -> None:
    query = ["--query-gpu=name,driver_version,memory.free,memory.total", "--format=csv,noheader"]
    try:
        subprocess.run(["nvidia-smi", *query], check=False)
    except OSError:
        print("found no nvidia-smi")
    print(f"python {sys.version.split()[0]} in {sys.executable}", flush=True)


def show_list(title: str, lines: list[str]) -> None:
    for line in lines[:MOST_SHOWN]:
        print(f"{title}: {line}")
    if len(lines) > MOST_SHOWN:
        print(f"{title}: ... and {len(lines) - MOST_SHOWN} more")


def show_table(found: dict[str, Outcome]) -> None:
    """Last, below what it sums up."""
    print()
    for name, it in found.items():
        show_list(f"skipped {name}", [f"{n} x {why}" for why, n in it.skips.most_common()])
    for name, it in found.items():
        show_list(f"FAILED {name}", it.problems)
    print(f"\n{'stage':10} {'passed':>7} {'failed':>7} {'skipped':>7} {'seconds':>8}")
    for name, it in found.items():
        counts = f"{it.n_passed:7} {it.n_failed:7} {it.skips.total():7} {it.seconds:8.0f}"
        print(f"{name:10} {counts}" + ("  FAILED" if it.problems else ""))


def paths_in(options: list[str]) -> list[str]:
    """Which of pytest's words are files or folders to test."""
    before = ["", *options]
    return [
        word
        for word, last in zip(options, before, strict=False)
        if last not in WITH_VALUE and not word.startswith("-")
        if (ROOT / word.split("::")[0]).exists()
    ]


def main() -> int:
    usage, _, text = (__doc__ or "").partition("kernels  ")
    parser = argparse.ArgumentParser(
        usage="python tools/test_gpu.py [--only STAGE,STAGE] [pytest's options]",
        description=usage.split("\n\n")[0],
        epilog=f"kernels  {text}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--only", default=",".join(STAGES), metavar="STAGE,STAGE", help=f"of {', '.join(STAGES)}"
    )
    arguments, options = parser.parse_known_args()
    names = arguments.only.split(",")
    unknown = sorted(set(names) - set(STAGES))
    if unknown:
        parser.error(f"--only has {', '.join(unknown)}, expected of {', '.join(STAGES)}")
    if paths := paths_in(options):
        parser.error(
            f"found the path {', '.join(paths)}, expected options alone: a stage has its own "
            "files, and -k takes a part of them"
        )
    show_machine()
    found = run_stages(names, options) if gpu_count() > 0 else skip_all(options)
    show_table(found)
    return any(outcome.problems for outcome in found.values())


if __name__ == "__main__":
    sys.exit(main())
