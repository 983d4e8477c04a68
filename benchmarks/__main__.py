"""Every bar of this machine's kind, one table after the other: `make bench`.

python -m benchmarks [cpu] [attention] [engine] [load] [start] [ops] [device]

None named: all, and the last two, which need a GPU, only where the CUDA backend can use one.
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


def usable_parts() -> list[str]:
    """All parts, without those that need a GPU where none can be used; says why."""
    add_library_dirs(_C.add_library_dir)
    try:
        _C.device_report("cuda")
    except errors.MilpyError as problem:
        print(f"== {', '.join(NEED_GPU)}: left out: {problem}", flush=True)
        return [name for name in PARTS if name not in NEED_GPU]
    return list(PARTS)


def main(names: list[str]) -> int:
    """Run the parts in processes of their own, so that none inherits another's memory."""
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"benchmarks: found {unknown[0]!r}, expected some of {', '.join(PARTS)}")
        return 2
    for name in names or usable_parts():
        module, *arguments = PARTS[name]
        print(f"== python -m {module} {' '.join(arguments)}".rstrip(), flush=True)
        # A missed bar is in the table and is no failure of the command.
        subprocess.run([sys.executable, "-m", module, *arguments], check=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
