"""Builds the drivers in C, linked with the core as it is now; for a GPU with its backend too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent


def build(name: str) -> Path:
    """The program of benchmarks/NAME.c."""
    subprocess.run(["make", "-s", "lib"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    program = ROOT / "build" / "bench" / name
    program.parent.mkdir(parents=True, exist_ok=True)
    sources = [str(HERE / f"{name}.c"), str(HERE / "roofs.c")]
    flags = ["-O2", "-std=c11", "-D_GNU_SOURCE=", "-pthread", f"-I{ROOT / 'csrc'}"]
    library = str(ROOT / "build" / "cpu" / "libmilpy.a")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, *flags, *sources, library, "-lm", "-o", str(program)], check=True)
    return program


def build_for_cuda(name: str) -> Path:
    """As build, by the Makefile's rule, which knows nvcc and the CUDA objects."""
    program = Path("build") / "bench" / name
    jobs = f"-j{len(os.sched_getaffinity(0))}"
    command = ["make", "-s", jobs, "MILPY_CUDA=1", str(program)]
    print(f"building {program}", file=sys.stderr, flush=True)
    done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
    if done.returncode != 0:
        raise SystemExit(f"found no {program}: make failed, see above")
    return ROOT / program
