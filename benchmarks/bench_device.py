"""End to end on a GPU, Llama-3-8B's shape with dummy weights, by the method of the peers' figures.

Decode: tokens over time while every row decodes and none has finished, prompts of 1,024 tokens, 256
new ones. TTFT: one request on an idle engine, median. Beside each figure stand vLLM 0.26 on an H200
(measured 2026-11-22, shared/facts/vllm-h200.md) and what reading the bytes alone would take.

    python -m benchmarks.bench_device [--batches 1 8 64] [--prompts 128 8192] [--lora] [--eager]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.shapes import SHAPES, Shape, dummy_adapter
from benchmarks.traffic import Traffic
from milpy import _C
from milpy.config import read_model_config

READ_TBS = 4.55  # an H200's read roof
PROMPT, NEW, RANK = 1024, 256, 16
VLLM_DECODE = {1: 203.2, 8: 1514.0, 32: 5020.0, 64: 8256.0, 128: 11783.0, 256: 13993.0}
VLLM_TTFT_MS = {128: 9.5, 1024: 27.7, 2048: 52.3, 8192: 217.4}
VLLM_LORA = {"base only": 0.999, "one adapter": 0.824, "64 distinct": 0.224}


class Bench:
    """One dummy model on a device with an engine."""

    def __init__(
        self, shape: Shape, folder: Path, device: str, n_seqs: int, eager: bool, exact: bool
    ) -> None:
        self.shape = shape
        config = read_model_config(shape.write_config(folder / shape.name))
        begin = time.perf_counter()
        self.model = _C.Model(
            config, None, max_position=shape.max_position, device=device, dummy_seed=1
        )
        loaded = time.perf_counter()
        self.config = config
        self.engine = _C.Engine(
            self.model,
            max_model_len=shape.max_position,
            max_num_seqs=n_seqs,
            enforce_eager=eager,
            deterministic=exact,
        )
        self._traffic = Traffic(self.engine, shape.vocab)
        ready = time.perf_counter()
        self.ttft(16)
        first = time.perf_counter()
        print(
            f"start: weights {loaded - begin:.2f} s, engine {ready - loaded:.2f} s, first token "
            f"{first - ready:.2f} s; total {first - begin:.2f} s (floor 5)",
            flush=True,
        )

    def close(self) -> None:
        self._traffic.close()
        self.model.close()

    def decode(self, n_seqs: int, adapters: list[int]) -> float:
        """Tokens a second while all n_seqs decode."""
        return self._traffic.decode(n_seqs, adapters, PROMPT, NEW).rate

    def ttft(self, length: int, adapter: int = -1) -> float:
        return self._traffic.first_token_s(length, adapter)


def bytes_ms(shape: Shape, n_seqs: int) -> float:
    context = PROMPT + NEW / 2
    n = shape.bytes_per_step + n_seqs * context * shape.kv_bytes_per_token
    return n / READ_TBS / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="8B", choices=list(SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--prompts", type=int, nargs="*", default=[128, 1024, 2048, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--deterministic", action="store_true")
    arguments = parser.parse_args()
    most = max([*arguments.batches, 64])
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            SHAPES[arguments.shape],
            Path(folder),
            arguments.device,
            most,
            arguments.eager,
            arguments.deterministic,
        )
        print(bench.model.report(), bench.engine.stats(), flush=True)
        print("batch   tok/s     step ms  bytes alone ms   vLLM tok/s  ours/vLLM")
        for n in arguments.batches:
            rate = statistics.median(bench.decode(n, [-1]) for _ in range(arguments.rounds))
            peer = VLLM_DECODE.get(n, float("nan"))
            print(
                f"{n:5} {rate:8.1f} {1e3 * n / rate:10.3f} {bytes_ms(bench.shape, n):12.2f} "
                f"{peer:14.0f} {rate / peer:10.3f}",
                flush=True,
            )
        for length in arguments.prompts:
            bench.ttft(length)
            ms = 1e3 * statistics.median(bench.ttft(length) for _ in range(5))
            peer = VLLM_TTFT_MS.get(length, float("nan"))
            print(f"TTFT {length:5}: {ms:7.2f} ms, vLLM {peer}, theirs/ours {peer / ms:.3f}")
        if arguments.lora:
            lora(bench)
        bench.close()
    return 0


def lora(bench: Bench) -> None:
    """Batch 64 with adapters, as shares of the same batch before any was loaded."""
    off = bench.decode(64, [-1])
    ids = [
        bench.model.add_adapter(dummy_adapter(bench.config, RANK), dummy_seed=100 + i)
        for i in range(64)
    ]
    traffic = {"base only": [-1], "one adapter": ids[:1], "8 in turn": ids[:8], "64 distinct": ids}
    for name, adapters in traffic.items():
        rate = bench.decode(64, adapters)
        peer = VLLM_LORA.get(name, float("nan"))
        print(
            f"LoRA, batch 64, {name:12}: {rate:8.1f} tok/s, {rate / off:.3f} of off (vLLM {peer})"
        )


if __name__ == "__main__":
    raise SystemExit(main())
