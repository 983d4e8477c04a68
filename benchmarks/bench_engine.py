"""End to end on dummy models, each figure beside its roof and its peers.

    python -m benchmarks.bench_engine [--device cpu] ...     the CPU's tables
    python -m benchmarks.bench_engine --device cuda ...      a GPU's, also of cuda:N

Each has options of its own: --help lists both, after a device that one's alone.
"""

from __future__ import annotations

import argparse
import re
import sys

from benchmarks import engine_cpu, engine_cuda
from milpy.errors import MilpyError


def main(arguments: list[str]) -> int:
    """Print the tables; the result is how many bars were missed."""
    parser = argparse.ArgumentParser(prog="bench_engine", add_help=False, allow_abbrev=False)
    parser.add_argument("--device")
    options, rest = parser.parse_known_args(arguments)
    if options.device is None and {"-h", "--help"} & set(rest):
        helps = [module.parser().format_help() for module in (engine_cpu, engine_cuda)]
        print(__doc__, *helps, sep="\n")
        return 0
    if not re.fullmatch(r"cpu|cuda(:\d+)?", options.device or "cpu"):
        parser.error(f"--device is {options.device!r}, expected cpu, cuda or cuda:N")
    if options.device in (None, "cpu"):
        return engine_cpu.main(rest)
    try:
        return engine_cuda.main(rest, options.device)
    except MilpyError as problem:
        raise SystemExit(f"bench_engine: {problem}") from None


if __name__ == "__main__":
    raise SystemExit(min(main(sys.argv[1:]), 125))
