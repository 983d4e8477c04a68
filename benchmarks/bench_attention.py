"""Attention over paged KV: prefill against the bf16 peak, decode against read bandwidth.

KV pages of 16 tokens lie shuffled, layers in rotation over 1 GiB, so that none is in a cache. The
flops counted are those of the keys that are seen. Medians of the rounds are printed; no bar is set:
beside the products, attention of 512 tokens at 0.5 B is 3.3 % of the flops.

    python -m benchmarks.bench_attention [--rounds 5] [--threads 0] [--only PART-OF-A-NAME]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections import defaultdict

from benchmarks.driver import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
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
