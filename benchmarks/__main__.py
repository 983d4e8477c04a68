"""Every bar of this machine's kind, one table after the other: `make bench`.

    python -m benchmarks [cpu] [attention] [engine] [load] [start] [ops] [device]

None named: all, and the last two, which need a GPU, only where the CUDA backend can use one. Each
name is bench_NAME.py, but that `device` is bench_engine.py --device cuda; options are each one's
own: python -m benchmarks.bench_cpu --help.
"""

from __future__ import annotations

import subprocess
import sys

from milpy import _C, errors
from milpy.wheels import add_library_dirs

PARTS = {
    "cpu": ["benchmarks.bench_cpu"],
    "attention": ["benchmarks.bench_attention"],
    "engine": ["benchmarks.bench_engine"],
    "load": ["benchmarks.bench_load"],
    "start": ["benchmarks.bench_start", "--install"],
    "ops": ["benchmarks.bench_ops"],
    "device": ["benchmarks.bench_engine", "--device", "cuda"],
}
NEED_GPU = ("ops", "device")


def why_no_gpu() -> str:
    """Nothing where the CUDA backend can use one."""
    add_library_dirs(_C.add_library_dir)
    try:
        return _C.gpu_reports()[0]["problem"]
    except errors.MilpyError as problem:
        return str(problem)


def usable_parts(names: list[str]) -> list[str]:
    """Of these, or of all: without those that need a GPU where none can be used; says why."""
    wanted = names or list(PARTS)
    lost = [name for name in wanted if name in NEED_GPU]
    problem = why_no_gpu() if lost else ""
    if problem:
        print(f"== {', '.join(lost)}: left out: {problem}", flush=True)
        return [name for name in wanted if name not in lost]
    return wanted


def main(names: list[str]) -> int:
    """Run the parts in processes of their own, so that none inherits another's memory."""
    if "--help" in names or "-h" in names:
        print(__doc__)
        return 0
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"benchmarks: found {unknown[0]!r}, expected some of {', '.join(PARTS)}")
        return 2
    usable = usable_parts(names)
    for name in usable:
        module, *arguments = PARTS[name]
        print(f"== python -m {module} {' '.join(arguments)}".rstrip(), flush=True)
        # A missed bar is in the table and is no failure of the command.
        subprocess.run([sys.executable, "-m", module, *arguments], check=False)
    # What was asked for by name and could not run is one.
    return 1 if names and len(usable) < len(names) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
