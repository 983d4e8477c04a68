"""End to end on dummy models: share of the machine's roofs, by wall time, and LoRA's price.

Each figure is judged in its own round: roofs just before and just after, the better of the two
kept, the round thrown away where the ratio is above 1.05 (a read loop that a model beats is no
roof). The medians of the rounds are printed beside the bars and beside llama.cpp's shares of its
own roofs (measured 2026-11-22 on 2 vCPUs of a Zen 5, shared/facts/cpu-backend.md section 9).

    python -m benchmarks.bench_engine [--shapes 0.5B 1B] [--rounds 5] [--only decode|prefill|lora]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.roofs import Machine, Roofs
from benchmarks.shapes import SHAPES, Shape, dummy_adapter
from milpy import _C
from milpy.config import read_model_config

PROMPT = 128
NEW = 64
PREFILL = 512
RANK = 16
LLAMA_CPP = {
    ("0.5B", "decode 1"): "0.87",
    ("1B", "decode 1"): "0.99",
    ("0.5B", "8 seqs x"): "3.6",
    ("1B", "8 seqs x"): "5.2",
    ("0.5B", "decode 32"): "0.24",
    ("1B", "decode 32"): "0.37",
    ("0.5B", "prefill 512"): "0.34",
    ("1B", "prefill 512"): "0.48",
    ("0.5B", "LoRA prefill"): "0.52",
    ("1B", "LoRA prefill"): "0.57",
    ("0.5B", "LoRA decode 1"): "0.81",
    ("1B", "LoRA decode 1"): "0.94",
    ("0.5B", "LoRA 8 distinct"): "0.21",
}


@dataclass(frozen=True, slots=True)
class Bars:
    """What the issue asks of a shape."""

    lora_distinct: float


BARS = {"0.5B": Bars(0.75), "1B": Bars(0.84), "tiny": Bars(0.0)}


class Bench:
    """One dummy model with an engine and its roofs."""

    def __init__(self, shape: Shape, folder: Path, n_threads: int) -> None:
        self.shape = shape
        config = read_model_config(shape.write_config(folder / shape.name))
        self.model = _C.Model(config, None, max_position=4096, n_threads=n_threads, dummy_seed=1)
        self.n_threads = self.model.report()["n_threads"]
        self.isa = self.model.report()["isa"]
        self.machine = Machine(self.n_threads)
        self.adapters = [
            self.model.add_adapter(dummy_adapter(config, RANK), dummy_seed=100 + i)
            for i in range(8)
        ]
        self.engine = _C.Engine(self.model, max_model_len=1024, max_num_seqs=32)
        self._loop = threading.Thread(target=self.engine.run, daemon=True)
        self._loop.start()
        self._random = np.random.default_rng(7)

    def close(self) -> None:
        self.engine.stop()
        self._loop.join()
        self.engine.free()
        self.model.close()

    def _submit(self, length: int, max_tokens: int, adapter: int) -> int:
        tokens = self._random.integers(3, self.shape.vocab, length).astype(np.int32)
        return self.engine.submit(tokens, max_tokens=max_tokens, adapter=adapter, temperature=0.0)

    def decode(self, n_seqs: int, adapters: list[int]) -> float:
        """Tokens a second while all n_seqs decode: last one's first token to the first end."""
        ids = [self._submit(PROMPT, NEW, adapters[i % len(adapters)]) for i in range(n_seqs)]
        seen = dict.fromkeys(ids, 0)
        started: float | None = None
        counted = 0
        n_open = n_seqs
        ended: float | None = None
        while n_open:
            events = self.engine.poll(timeout_ms=60000)
            now = time.perf_counter()
            for request, finish, sample in events:
                seen[request] += sample is not None
                if finish:
                    n_open -= 1
                    assert finish == 2, f"request ended with {finish}, expected its length"
            if started is None and all(seen.values()):
                started, counted = now, sum(seen.values())
            elif started is not None and ended is None and n_open < n_seqs:
                ended, counted = now, sum(seen.values()) - counted
        assert started is not None and ended is not None
        return counted / (ended - started)

    def prefill(self, adapter: int) -> float:
        """Seconds from submit to the first token of a prompt of 512."""
        begin = time.perf_counter()
        self._submit(PREFILL, 1, adapter)
        while not self.engine.poll(timeout_ms=60000):
            pass
        return time.perf_counter() - begin


def judged(
    machine: Machine, run: Callable[[], float], ratio: Callable[[float, Roofs], float], rounds: int
) -> tuple[float, float]:
    """(median figure, median ratio) over rounds, each between two measurements of the roofs."""
    figures: list[float] = []
    ratios: list[float] = []
    for _ in range(4 * rounds):
        before = machine.measure()
        figure = run()
        after = machine.measure()
        roofs = Roofs(
            max(before.read_gbs, after.read_gbs), max(before.bf16_gflops, after.bf16_gflops)
        )
        share = ratio(figure, roofs)
        if share <= 1.05:
            figures.append(figure)
            ratios.append(share)
        if len(ratios) == rounds:
            break
    if not ratios:
        return float("nan"), float("nan")
    return statistics.median(figures), statistics.median(ratios)


def paired(plain: Callable[[], float], other: Callable[[], float], rounds: int) -> float:
    """Median of other / plain, the order alternating so that drift cancels."""
    ratios = []
    for i in range(rounds):
        if i % 2:
            b = other()
            ratios.append(b / plain())
        else:
            a = plain()
            ratios.append(other() / a)
    return statistics.median(ratios)


class Table:
    def __init__(self) -> None:
        self.n_missed = 0
        print(f"{'shape':6} {'what':18} {'figure':>16} {'ratio':>7} {'bar':>6}  {'llama.cpp':9}")

    def row(self, shape: Shape, what: str, figure: str, ratio: float, bar: float) -> None:
        mark = "" if ratio >= bar else "  below"
        self.n_missed += ratio < bar
        peer = LLAMA_CPP.get((shape.name, what), "-")
        print(
            f"{shape.name:6} {what:18} {figure:>16} {ratio:7.3f} {bar:6.2f}  {peer:9}{mark}",
            flush=True,
        )


def bench_decode(bench: Bench, table: Table, rounds: int) -> None:
    shape = bench.shape
    context = PROMPT + NEW / 2
    step_bytes = shape.bytes_per_step + context * shape.kv_bytes_per_token
    flops = 2 * (shape.linear_weights + shape.head_weights)
    base = [-1]

    figure, share = judged(
        bench.machine,
        lambda: bench.decode(1, base),
        lambda rate, roofs: rate * step_bytes / 1e9 / roofs.read_gbs,
        rounds,
    )
    table.row(shape, "decode 1", f"{figure:.1f} tok/s", share, 0.85)
    gain = paired(lambda: bench.decode(1, base), lambda: bench.decode(8, base), rounds)
    table.row(shape, "8 seqs x", f"{gain:.2f} x one", gain, 5.0)
    figure, share = judged(
        bench.machine,
        lambda: bench.decode(32, base),
        lambda rate, roofs: rate * flops / 1e9 / roofs.bf16_gflops,
        rounds,
    )
    table.row(shape, "decode 32", f"{figure:.1f} tok/s", share, 0.60)


def bench_prefill(bench: Bench, table: Table, rounds: int) -> None:
    shape = bench.shape
    flops = 2 * (PREFILL * shape.linear_weights + shape.head_weights)
    figure, share = judged(
        bench.machine,
        lambda: bench.prefill(-1),
        lambda seconds, roofs: flops / seconds / 1e9 / roofs.bf16_gflops,
        rounds,
    )
    table.row(shape, "prefill 512", f"{PREFILL / figure:.0f} tok/s", share, 0.75)


def bench_lora(bench: Bench, table: Table, rounds: int) -> None:
    shape = bench.shape
    one = bench.adapters[:1]
    base = [-1]
    ratio = 1 / paired(lambda: bench.prefill(-1), lambda: bench.prefill(one[0]), rounds)
    table.row(shape, "LoRA prefill", "of without", ratio, 0.93)
    ratio = paired(lambda: bench.decode(1, base), lambda: bench.decode(1, one), rounds)
    table.row(shape, "LoRA decode 1", "of without", ratio, 0.95)
    ratio = paired(lambda: bench.decode(8, base), lambda: bench.decode(8, bench.adapters), rounds)
    table.row(shape, "LoRA 8 distinct", "of without", ratio, BARS[shape.name].lora_distinct)
    ratio = paired(lambda: bench.decode(8, base), lambda: bench.decode(8, one), rounds)
    table.row(shape, "LoRA 8 shared", "of without", ratio, 0.0)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the result is how many bars were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["0.5B", "1B"], choices=sorted(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--only", choices=("decode", "prefill", "lora"))
    options = parser.parse_args(arguments)
    parts = {"decode": bench_decode, "prefill": bench_prefill, "lora": bench_lora}
    chosen = [parts[options.only]] if options.only else list(parts.values())
    table: Table | None = None
    with tempfile.TemporaryDirectory() as folder:
        for name in options.shapes:
            bench = Bench(SHAPES[name], Path(folder), options.threads)
            try:
                if table is None:
                    roofs = bench.machine.measure()
                    print(
                        f"{bench.n_threads} threads, {bench.isa}; read {roofs.read_gbs:.1f} GB/s, "
                        f"bf16 peak {roofs.bf16_gflops:.0f} GFLOP/s; "
                        f"buffer {bench.machine.n_bytes >> 20} MiB"
                    )
                    table = Table()
                for part in chosen:
                    part(bench, table, options.rounds)
            finally:
                bench.close()
    return table.n_missed if table is not None else 0


if __name__ == "__main__":
    raise SystemExit(min(main(), 125))
