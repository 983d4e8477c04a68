"""End to end on a GPU, Llama-3-8B's shape with dummy weights, by the method of the peer's figures.

Decode: tokens over time while every row decodes and none has finished, prompts of 1,024 tokens, 256
new ones; a row is run twice and then until --rounds or 5 s are reached, the median counts. TTFT:
one request on an idle engine, the median of 7. Beside each figure stand vLLM 0.26's on an H200
(vllm_h200.py) and what the roof alone would take: bytes at 4.55 TB/s, for prompts also flops at
790 TFLOP/s, both an H200's. "x vLLM" is above 1 where we are quicker.

    python -m benchmarks.bench_engine --device cuda [--rows start,decode,ttft,lora,d1,gap]

Rows: start, decode, ttft, lora, d1 (the price of deterministic=True) and gap, which take some 190 s
together. With --rows all, or by name, a minute each: queue, 512 requests at once, and zipf, 500
adapters. d1, queue and zipf have a model of their own. gap uses the profiler of torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import detokenizing, vllm_h200
from benchmarks.adapter_folder import write_adapter
from benchmarks.gpu_model import EngineChoice, GpuModel
from benchmarks.h200 import (
    NEW,
    PROMPT,
    RANK,
    decode_bytes,
    decode_roof_ms,
    prompt_roof_ms,
    show_floors,
)
from benchmarks.markdown import Table, number, ratio
from benchmarks.shapes import SHAPES, dummy_adapter
from benchmarks.traffic import Decoding
from milpy.adapters import read_adapter

ROWS = ("start", "decode", "ttft", "lora", "d1", "gap")
MORE_ROWS = ("queue", "zipf")
LORA_BATCH = 64
GAP_BATCHES, FLOOR_GAP_BATCH = (64, 1), 64
N_ADAPTERS = 64
ENOUGH_S = 5.0  # of one row
N_TTFT = 7
QUEUE = (512, 1000, 1000)  # requests, in, out
ZIPF = (1000, 512, 128)
ZIPF_ADAPTERS, ZIPF_RANK, ZIPF_MEMORY = 500, 8, 0.7
NOT_BUILT = "not built"  # a row of the peer's: adapters that wait in host memory, or come from disk
GIB = 1 << 30


# ---- rows ----


class Bench:
    """One model and engine; found: what was measured so far of the floors, and what it adds."""

    def __init__(
        self,
        options: argparse.Namespace,
        folder: Path,
        found: dict[str, float],
        changed: dict[str, Any],
    ) -> None:
        self.shape = SHAPES[options.shape]
        self.options = options
        self.folder = folder
        self.found = found
        choice = {
            "device": options.device,
            "max_num_seqs": max(*options.batches, LORA_BATCH),
            "deterministic": options.deterministic,
            "enforce_eager": options.eager,
        }
        self.gpu = GpuModel(self.shape, folder, EngineChoice(**(choice | changed)))
        self._off: dict[int, list[Decoding]] = {}

    def decode(self, n_seqs: int, adapters: list[int]) -> list[Decoding]:
        begin = time.perf_counter()
        runs: list[Decoding] = []
        while len(runs) < min(2, self.options.rounds) or (
            len(runs) < self.options.rounds and time.perf_counter() - begin < ENOUGH_S
        ):
            runs.append(self.gpu.traffic.decode(n_seqs, adapters, PROMPT, NEW))
        return runs

    def decode_off(self, n_seqs: int) -> list[Decoding]:
        """Without LoRA, measured once, before any adapter is loaded."""
        if n_seqs not in self._off:
            self._off[n_seqs] = self.decode(n_seqs, [-1])
        return self._off[n_seqs]

    def ttft_ms(self, length: int, adapter: int) -> float:
        return self.median_ms(lambda: self.gpu.traffic.first_token_s(length, adapter))

    @staticmethod
    def median_ms(run_s: Callable[[], float]) -> float:
        run_s()  # what is chosen and loaded at first use
        return 1e3 * statistics.median(run_s() for _ in range(N_TTFT))


@contextmanager
def open_bench(
    options: argparse.Namespace, found: dict[str, float], **changed: Any
) -> Iterator[Bench]:
    """changed: fields of EngineChoice."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder), found, changed)
        try:
            yield bench
        finally:
            bench.gpu.close()


def median_rate(runs: list[Decoding]) -> float:
    return statistics.median(run.rate for run in runs)


def rows_start(bench: Bench) -> None:
    """capture is a part of engine: all graphs, those of the dry run too."""
    start = bench.gpu.start
    least, most = vllm_h200.START_S
    capture = bench.gpu.engine.stats()["capture_ns"] / 1e9
    table = Table("start, s", "weights", "engine", "capture", "first token", "total", "vLLM")
    table.row(
        "dummy weights to first token",
        *(f"{s:.2f}" for s in (start.weights, start.engine, capture)),
        *(f"{s:.2f}" for s in (start.first_token, start.total)),
        f"{least:.0f}-{most:.0f}",
    )
    bench.found["start"] = start.total
    if not bench.options.eager:
        bench.found["capture"] = capture
    memory = bench.gpu.engine.memory()
    table = Table(f"memory of {memory['device']}, GiB", "GiB")
    for name in "weight kv adapter workspace graph other free total".split():
        table.row(name, f"{memory[f'{name}_bytes'] / GIB:.2f}")  # type: ignore[literal-required]


def rows_decode(bench: Bench) -> None:
    table = Table(
        f"decode, {PROMPT} in / {NEW} out",
        "tok/s", "vLLM", "x vLLM", "step ms", "bytes ms", "of roof", "host ms", "runs",
    )  # fmt: skip
    for n in bench.options.batches:
        runs = bench.decode_off(n)
        rate = median_rate(runs)
        step_ms, roof_ms = 1e3 * n / rate, decode_roof_ms(bench.shape, n)
        peer = vllm_h200.DECODE.get(n)
        table.row(
            f"batch {n}", number(rate, 1), number(peer, 1), number(ratio(rate, peer), 3),
            number(step_ms, 3), number(roof_ms, 2), number(roof_ms / step_ms, 3),
            number(statistics.median(run.work_ms for run in runs), 3), str(len(runs)),
        )  # fmt: skip
        bench.found[f"decode {n}"] = rate


def rows_ttft(bench: Bench) -> None:
    table = Table("time to first token", "ms", "vLLM", "x vLLM", "roof ms", "of roof")
    for length in bench.options.prompts:
        ms = bench.ttft_ms(length, -1)
        peer, roof_ms = vllm_h200.TTFT_MS.get(length), prompt_roof_ms(bench.shape, length)
        table.row(
            f"prompt {length}", number(ms, 2), number(peer, 1),
            number(ratio(peer, ms), 3),
            number(roof_ms, 2), number(roof_ms / ms, 3),
        )  # fmt: skip
        bench.found[f"ttft {length}"] = ms


def rows_lora(bench: Bench) -> None:
    """With 64 adapters on the GPU, each row beside the same batch before any was loaded."""
    off = {n: median_rate(bench.decode_off(n)) for n in (LORA_BATCH, 1)}
    gpu = bench.gpu
    ids = [
        gpu.model.add_adapter(dummy_adapter(gpu.config, RANK), dummy_seed=100 + i)
        for i in range(N_ADAPTERS)
    ]
    table = Table(
        f"LoRA r={RANK}, {N_ADAPTERS} resident",
        "tok/s", "of off", "bytes alone", "vLLM best", "x vLLM", "64 slots", "8 slots", "best mode",
    )  # fmt: skip
    traffic = {
        (LORA_BATCH, "base only"): [-1],
        (LORA_BATCH, "one adapter"): ids[:1],
        (LORA_BATCH, "8 in turn"): ids[:8],
        (LORA_BATCH, "64 distinct"): ids,
        (1, "one adapter"): ids[:1],
    }
    for (n, name), adapters in traffic.items():
        rate = median_rate(bench.decode(n, adapters))
        n_used = sum(adapter >= 0 for adapter in adapters)
        roof = decode_bytes(bench.shape, n) / decode_bytes(bench.shape, n, n_used)
        peer = vllm_h200.LORA_RATE[n, name]
        best = max(figure for figure in peer if figure is not None)
        shares = (ratio(figure, vllm_h200.DECODE[n]) for figure in peer)
        table.row(
            f"batch {n}, {name}", number(rate, 1), number(rate / off[n], 3), number(roof, 3),
            number(best, 1), number(rate / best, 3), *(number(share, 3) for share in shares),
        )  # fmt: skip
        if n == LORA_BATCH:
            bench.found[name] = rate / off[n]
    rows_lora_ttft(bench, ids[0])


def rows_lora_ttft(bench: Bench, adapter: int) -> None:
    gpu = bench.gpu
    folder = write_adapter(bench.folder / "adapter", gpu.config, RANK)

    def from_disk_s() -> float:
        """Its files, in the page cache, to the first token."""
        begin = time.perf_counter()
        content = gpu.model.add_adapter(read_adapter(folder, gpu.config))
        gpu.traffic.first_token_s(128, content)
        seconds = time.perf_counter() - begin
        gpu.model.release_adapter(content)
        return seconds

    table = Table("time to first token", "ms", "64 slots", "8 slots", "x vLLM")
    ours: dict[tuple[int, str], float | None] = {
        (2048, "base"): bench.ttft_ms(2048, -1),
        (2048, "adapter"): bench.ttft_ms(2048, adapter),
        (128, "resident"): bench.ttft_ms(128, adapter),
        (128, "from host memory"): None,
        (128, "from disk"): bench.median_ms(from_disk_s),
    }
    for (length, name), ms in ours.items():
        peer = vllm_h200.LORA_TTFT_MS[length, name]
        best = min(figure for figure in peer if figure is not None)
        table.row(
            f"prompt {length}, {name}", NOT_BUILT if ms is None else number(ms, 2),
            number(peer.slots_64, 1),
            number(peer.slots_8, 1), number(ratio(best, ms), 3),
        )  # fmt: skip


def rows_queue(bench: Bench) -> None:
    n, prompt, new = QUEUE
    rate = n * new / bench.gpu.traffic.serve_s([-1] * n, prompt, new)
    least, most = vllm_h200.QUEUE_RATE
    table = Table(f"{n} x {prompt} in / {new} out", "tok/s", "vLLM", "x vLLM")
    table.row("all at once", number(rate, 0), f"{least:.0f}-{most:.0f}", number(rate / most, 3))


def rows_zipf(bench: Bench) -> None:
    """All adapters are on the GPU; vLLM had 32 there, the rest in host memory or on disk."""
    n, prompt, new = ZIPF
    gpu = bench.gpu
    ids = np.array(
        [
            gpu.model.add_adapter(dummy_adapter(gpu.config, ZIPF_RANK), dummy_seed=1000 + i)
            for i in range(ZIPF_ADAPTERS)
        ]
    )
    shares = 1.0 / np.arange(1, ZIPF_ADAPTERS + 1)
    drawn = np.random.default_rng(7).choice(ids, n, p=shares / shares.sum())
    table = Table(
        f"{n} x {prompt} in / {new} out, r={ZIPF_RANK}",
        "requests/s", "on the GPU", "vLLM", "on its GPU", "x vLLM",
    )  # fmt: skip
    traffic = {
        "base only": [-1] * n,
        "one adapter": [int(ids[0])] * n,
        "zipf s=1": drawn.tolist(),
        "zipf s=1, from disk": None,
    }
    for name, adapters in traffic.items():
        rate = None if adapters is None else n / gpu.traffic.serve_s(adapters, prompt, new)
        peer = vllm_h200.MANY_ADAPTERS[name]
        table.row(
            name, NOT_BUILT if rate is None else number(rate, 1), str(ZIPF_ADAPTERS),
            number(peer, 1), str(vllm_h200.MANY_SLOTS), number(ratio(rate, peer), 3),
        )  # fmt: skip


def rows_d1(bench: Bench) -> None:
    """The price of bits that batch mates do not change; shares where the default's rows ran."""
    found = bench.found
    table = Table("deterministic=True", "tok/s", "ms", "of default")
    for n in (1, LORA_BATCH):
        rate = median_rate(bench.decode(n, [-1]))
        share = ratio(rate, found.get(f"decode {n}"))
        table.row(f"batch {n}", number(rate, 1), number(1e3 * n / rate, 3), number(share, 3))
    for length in bench.options.prompts:
        ms = bench.ttft_ms(length, -1)
        share = ratio(found.get(f"ttft {length}"), ms)
        table.row(f"prompt {length}", "", number(ms, 2), number(share, 3))


def measure_gap(options: argparse.Namespace, n_seqs: int) -> dict[str, Any] | str:
    """In a process of its own, under torch's profiler; why not, where it could not."""
    command = [sys.executable, "-m", "benchmarks.profile_step", "--json", "--device"]
    command += [options.device, "--shape", options.shape, "--batch", str(n_seqs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        return lines[-1] if lines else f"ended, {done.returncode}"
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def rows_gap(options: argparse.Namespace, found: dict[str, float]) -> None:
    """After the models above are closed."""
    gaps = {}
    for n_seqs in GAP_BATCHES:
        gap = measure_gap(options, n_seqs)
        if isinstance(gap, str):
            print(f"\nhost gap, batch {n_seqs}: not measured: {gap}")
        else:
            gaps[n_seqs] = gap
    if not gaps:
        return
    table = Table("host gap, last kernel to next step's", "median us", "worst us", "idle us",
                  "lead us", "step ms", "traced ms", "vLLM us")  # fmt: skip
    for n_seqs, gap in gaps.items():
        us = ("gap_us", "worst_gap_us", "idle_us", "least_lead_us")
        table.row(
            f"batch {n_seqs}",
            *(number(gap[key], 1) for key in us),
            *(number(gap[key], 3) for key in ("step_ms", "traced_step_ms")),
            number(1e3 * vllm_h200.HOST_GAP_MS[n_seqs], 0),
        )
    if FLOOR_GAP_BATCH not in gaps:
        return
    gap = gaps[FLOOR_GAP_BATCH]
    host = gap["host_ms"]
    table = Table("host, ms a step", *host, "detokenise")
    table.row("engine's thread; the pump's", *(number(ms, 3) for ms in host.values()),
              number(detokenizing.step_ms(FLOOR_GAP_BATCH), 3))  # fmt: skip
    found["gap"] = gap["gap_us"] / 1e3
    found["worst gap"] = gap["worst_gap_us"] / 1e3


# ---- the command ----

ON_ONE_MODEL: dict[str, Callable[[Bench], None]] = {
    "start": rows_start,
    "decode": rows_decode,
    "ttft": rows_ttft,
    "lora": rows_lora,
}
ON_ITS_OWN: dict[str, tuple[Callable[[Bench], None], dict[str, Any]]] = {
    "queue": (rows_queue, {"max_num_seqs": QUEUE[0]}),
    "zipf": (rows_zipf, {"gpu_memory_utilization": ZIPF_MEMORY}),
    "d1": (rows_d1, {"deterministic": True}),
}


def names(text: str) -> list[str]:
    """Rows, as a list with commas."""
    found = list(ROWS + MORE_ROWS) if text == "all" else text.split(",")
    for name in found:
        if name not in ROWS + MORE_ROWS:
            expected = ", ".join(ROWS + MORE_ROWS) + ", or all"
            raise argparse.ArgumentTypeError(f"found {name!r}, expected some of {expected}")
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="bench_engine --device cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--shape", default="8B", choices=sorted(SHAPES), help="vLLM's figures and floors are 8B's"
    )
    made.add_argument("--rows", type=names, default=list(ROWS), metavar="NAME,NAME")
    made.add_argument("--batches", type=int, nargs="+", default=list(vllm_h200.DECODE))
    made.add_argument("--prompts", type=int, nargs="+", default=list(vllm_h200.TTFT_MS))
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--eager", action="store_true", help="no graphs")
    made.add_argument("--deterministic", action="store_true")
    return made


def main(arguments: list[str], device: str) -> int:
    """Print the tables; the result is how many floors were missed."""
    options = parser().parse_args(arguments)
    options.device = device
    begin = time.perf_counter()
    found: dict[str, float] = {}
    if any(name in ON_ONE_MODEL for name in options.rows):
        with open_bench(options, found) as bench:
            for name, rows in ON_ONE_MODEL.items():
                if name in options.rows:
                    rows(bench)
    for name, (rows, changed) in ON_ITS_OWN.items():
        if name in options.rows:
            with open_bench(options, found, **changed) as bench:
                rows(bench)
    if "gap" in options.rows:
        rows_gap(options, found)
    n_missed = show_floors(found)
    print(f"\n{time.perf_counter() - begin:.0f} s")
    return n_missed
