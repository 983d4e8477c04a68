"""What a newcomer pays before the first token: import time, the CLI's start, and bytes on disk.

    python -m benchmarks.bench_start [--install]

--install makes a fresh virtual environment in a temporary folder and weighs what `pip install .`
puts there beside NumPy.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
N_RUNS = 9
# pip and setuptools come with the environment, not with milpy; the bar is beside NumPy.
NOT_OURS = ("numpy", "numpy.libs", "pip", "setuptools", "pkg_resources", "_distutils_hack")


def seconds_of(*command: str) -> float:
    """Median wall time of a Python process, less that of one that does nothing."""

    def once(arguments: tuple[str, ...]) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        return time.perf_counter() - begin

    pairs = [(once(command), once(("-c", "pass"))) for _ in range(N_RUNS)]
    return statistics.median(with_it - without for with_it, without in pairs)


def is_ours(name: str) -> bool:
    return name not in NOT_OURS and not name.startswith(("numpy-", "pip-", "setuptools-"))


def installed_megabytes() -> float:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--no-compile", str(ROOT)], check=True
        )
        (site,) = Path(folder).glob("lib/python*/site-packages")
        files = (
            path for top in site.iterdir() if is_ours(top.name) for path in [top, *top.rglob("*")]
        )
        return sum(path.stat().st_size for path in files if path.is_file()) / 1e6


def main(arguments: list[str] | None = None) -> int:
    """Print the figures beside their bars; the result is how many were missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", action="store_true")
    options = parser.parse_args(arguments)
    rows = [
        ("import milpy", seconds_of("-c", "import milpy"), 0.3, "s"),
        ("import milpy; LLM", seconds_of("-c", "from milpy import LLM"), 0.3, "s"),
        ("milpy --help", seconds_of("-m", "milpy.cli", "--help"), 0.2, "s"),
    ]
    if options.install:
        rows.append(("install beside NumPy", installed_megabytes(), 70.0, "MB"))
    for what, found, bar, unit in rows:
        mark = "" if found <= bar else "  above"
        print(f"{what:22} {found:8.3f} {unit:2}  (bar {bar:g}){mark}", flush=True)
    return sum(found > bar for _, found, bar, _ in rows)


if __name__ == "__main__":
    raise SystemExit(main())
