"""Builds the drivers in C, linked with the core as it is now."""

from __future__ import annotations

import os
import subprocess
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
