"""Every bar of this machine's kind, one table after the other: `make bench`.

python -m benchmarks [cpu] [attention] [engine] [load] [start]     (none named: all)
"""

from __future__ import annotations

import subprocess
import sys

PARTS = {
    "cpu": ["benchmarks.bench_cpu"],
    "attention": ["benchmarks.bench_attention"],
    "engine": ["benchmarks.bench_engine"],
    "load": ["benchmarks.bench_load"],
    "start": ["benchmarks.bench_start", "--install"],
}


def main(names: list[str]) -> int:
    """Run the parts in processes of their own, so that none inherits another's memory."""
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"benchmarks: found {unknown[0]!r}, expected some of {', '.join(PARTS)}")
        return 2
    for name in names or list(PARTS):
        module, *arguments = PARTS[name]
        print(f"== python -m {module} {' '.join(arguments)}".rstrip(), flush=True)
        # A missed bar is in the table and is no failure of the command.
        subprocess.run([sys.executable, "-m", module, *arguments], check=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
