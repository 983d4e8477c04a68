"""Products, LoRA beside them and the pool, each against the roofs of its own round.

- products: y[M, 4096] = x W^T, K = 4096, over 1 GiB of weights in rotation, against
  min(bf16 peak, M FLOP/B x read bandwidth); the AVX2 path against read bandwidth and fp32 peak.
- LoRA: the products of a whole model with adapters of rank 16 on all seven projections, of the
  same without. Attention and the rest are left out, so this is harder than bench_engine's bar.
- pool: one empty region, in microseconds.

Roofs are measured just before and just after each figure, the better kept; a round whose ratio is
above 1.05 is thrown away (a read loop that a product beats is no roof). Medians are printed.

    python -m benchmarks.bench_cpu [--rounds 15] [--threads 0] [--only gemm|avx2|lora|pool]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Iterator

from benchmarks.driver import build

LARGEST_HONEST_RATIO = 1.05
GEMM_BARS = {1: 0.90, 4: 0.80, 16: 0.80, 128: 0.85}
LORA_BARS = {
    ("0.5B", "decode 1"): 0.95,
    ("0.5B", "decode 8, 8 adapters"): 0.75,
    ("0.5B", "prefill 512"): 0.93,
    ("1B", "decode 1"): 0.95,
    ("1B", "decode 8, 8 adapters"): 0.84,
    ("1B", "prefill 512"): 0.93,
}
FORK_JOIN_BAR_US = 3.0

Record = dict[str, float | str]


def run(bench: str, rounds: int, threads: int, isa: str | None = None) -> Iterator[Record]:
    environment = dict(os.environ)
    if isa is not None:
        environment["MILPY_CPU_ISA"] = isa
    command = [str(build("bench_linear")), bench, str(rounds), str(threads)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode != 0:
        raise SystemExit(f"bench_cpu: {' '.join(command)} ended with {process.returncode}")


def print_row(name: str, ratios: list[float], bar: float, note: str) -> None:
    kept = [ratio for ratio in ratios if ratio <= LARGEST_HONEST_RATIO]
    if not kept:
        print(f"{name:32} no round of {len(ratios)} was below {LARGEST_HONEST_RATIO}")
        return
    median = statistics.median(kept)
    verdict = "ok" if median >= bar else "MISSED"
    spread = f"{min(kept):.2f}..{max(kept):.2f}"
    print(f"{name:32} {median:6.3f}  bar {bar:.2f}  {verdict:6}  {spread}  "
          f"{len(kept)}/{len(ratios)} rounds  {note}")  # fmt: skip


def roofs_note(records: list[Record]) -> str:
    read, peak, got = (
        statistics.median(float(record[key]) for record in records)
        for key in ("read_gbs", "bf16_gflops", "gflops")
    )
    return f"{got:.0f} GFLOP/s; read {read:.1f} GB/s, peak {peak:.0f} GFLOP/s"


def bench_gemm(rounds: int, threads: int) -> None:
    by_rows: dict[int, list[Record]] = defaultdict(list)
    for record in run("gemm", rounds, threads):
        by_rows[int(record["M"])].append(record)
    for rows, records in by_rows.items():
        ratios = [
            float(r["gflops"]) / min(float(r["bf16_gflops"]), rows * float(r["read_gbs"]))
            for r in records
        ]
        print_row(f"product M={rows}, of its roof", ratios, GEMM_BARS[rows], roofs_note(records))


def bench_avx2(rounds: int, threads: int) -> None:
    by_rows: dict[int, list[Record]] = defaultdict(list)
    for record in run("gemm", rounds, threads, "avx2"):
        by_rows[int(record["M"])].append(record)
    read = [float(r["gflops"]) / float(r["read_gbs"]) for r in by_rows[1]]
    print_row("AVX2 M=1, of read bandwidth", read, 0.90, roofs_note(by_rows[1]))
    peak = [float(r["gflops"]) / float(r["fp32_avx2_gflops"]) for r in by_rows[128]]
    print_row("AVX2 M=128, of fp32 peak", peak, 0.65, roofs_note(by_rows[128]))


def bench_lora(rounds: int, threads: int) -> None:
    by_case: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in run("lora", rounds, threads):
        by_case[str(record["shape"]), str(record["case"])].append(record)
    for (shape, case), records in by_case.items():
        ratios = [float(r["without_ms"]) / float(r["with_ms"]) for r in records]
        without = statistics.median(float(r["without_ms"]) for r in records)
        print_row(f"LoRA {shape} {case}, of without", ratios, LORA_BARS[shape, case],
                  f"{without:.1f} ms without")  # fmt: skip


def bench_pool(rounds: int, threads: int) -> None:
    times = [float(record["fork_join_us"]) for record in run("pool", rounds, threads)]
    median = statistics.median(times)
    verdict = "ok" if median <= FORK_JOIN_BAR_US else "MISSED"
    print(f"{'fork and join':32} {median:6.2f} us, bar {FORK_JOIN_BAR_US} us  {verdict}")


BENCHES = {"gemm": bench_gemm, "avx2": bench_avx2, "lora": bench_lora, "pool": bench_pool}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="0: all that a model would use")
    parser.add_argument("--only", choices=BENCHES)
    options = parser.parse_args()
    for name in [options.only] if options.only else BENCHES:
        BENCHES[name](options.rounds, options.threads)


if __name__ == "__main__":
    main()
