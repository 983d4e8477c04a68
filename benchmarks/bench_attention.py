"""Attention over paged KV: prefill against the bf16 peak, decode against read bandwidth.

KV pages of 16 tokens lie shuffled, layers in rotation over 1 GiB, so that none is in a cache. The
flops counted are those of the keys that are seen. Medians of the rounds are printed; no bar is set:
beside the products, attention of 512 tokens at 0.5 B is 3.3 % of the flops.

    python -m benchmarks.bench_attention [--rounds 5] [--threads 0] [--only PART-OF-A-NAME]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
from collections import defaultdict

from benchmarks.driver import HERE, build


def shape_names() -> list[str]:
    """Of the table in C."""
    return re.findall(r'^    \{"([^"]+)", \d', (HERE / "bench_attention.c").read_text(), re.M)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: all that a model would use")
    parser.add_argument("--only", default="", metavar="PART", help="shapes whose name holds it")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, expected at least 1")
    names = shape_names()
    if not any(options.only in name for name in names):
        parser.error(f"--only is {options.only!r}, expected a part of one of {', '.join(names)}")
    command = [
        str(build("bench_attention")),
        str(options.rounds),
        str(options.threads),
        options.only,
    ]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    rounds: dict[str, list[dict[str, float]]] = defaultdict(list)
    for record in map(json.loads, out.splitlines()):
        rounds[record["shape"]].append(record)
    print("shape                              us   GFLOP/s  of peak     GB/s  of read")
    for shape, records in rounds.items():
        us, gflops, of_peak, gbs, of_read = (
            statistics.median(record[key] for record in records)
            for key in ("us", "gflops", "of_peak", "gbs", "of_read")
        )
        print(f"{shape:28} {us:8.0f} {gflops:9.1f} {of_peak:8.3f} {gbs:8.1f} {of_read:8.3f}")


if __name__ == "__main__":
    main()
