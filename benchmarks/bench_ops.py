"""Each op of the CUDA backend on Llama-3-8B's shapes, beside the roof and torch on the same GPU.

us: one call, the median of graph replays (bench_ops.c says how). MB is what the op must read and
write once; of LoRA the A or B of the adapters in use ("joined": both, beside the product's), of
decode attention the KV; of begin, a step's start, nothing is counted: its plan's few KB come from
host memory. Weights, adapters and KV are in rotation past the L2; activations and logits lie where
a step leaves them, so that those of embed, norm, act and sample are in L2 as far as they fit.

The roof is those bytes at 4.55 TB/s on an H200, elsewhere by a read loop of the same run, or the
flops at the speed of cuBLAS in the same run (gate_up, 8,192 rows), whichever takes longer; without
torch at the 790 TFLOP/s that an H200's products reach in short runs. Peers are torch's: cuBLAS
(torch.mm) for products, cuDNN for attention, argmax for greedy; "x peer" is their time over ours.
"own" products are those of deterministic contexts. A row that fails says why.

    python -m benchmarks.bench_ops [--ops attention,"product own"] [--quick] [--no-peers]

--ops: rows whose names begin so. All rows take about a minute, peers included.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.driver import build_for_cuda
from milpy.wheels import library_dirs

try:
    from benchmarks import peer_cuda
except ImportError:
    peer_cuda = None  # type: ignore[assignment]

H200_READ_TBS, H200_TFLOPS = 4.55, 790.0
LONGEST_ROW_S = 120.0  # a kernel that hangs
HIDDEN, FFN, VOCAB, HEADS, KV_HEADS = 4096, 14336, 128256, 32, 8
LINEARS = {  # N, K, rows of the parts
    "qkv": (6144, HIDDEN, [4096, 1024, 1024]),
    "o": (HIDDEN, 4096, [HIDDEN]),
    "gate_up": (2 * FFN, HIDDEN, [FFN, FFN]),
    "down": (HIDDEN, FFN, [HIDDEN]),
}
RANK = 16
FLOPS_PER_BYTE = 170  # about where bytes stop to be what counts, on any of these devices
Peer = Callable[[], float]


@dataclass(frozen=True)
class Roof:
    """What a device can do."""

    read_tbs: float
    tflops: float | None


@dataclass(frozen=True)
class Row:
    """What to ask the driver for, and what the op must move and compute."""

    name: str
    ask: str
    n_bytes: float
    flops: float = 0.0
    peer: Peer | None = None

    def roof_us(self, roof: Roof) -> float | None:
        """None: nothing to count, or it is bound by flops, and this device's are not known."""
        if self.n_bytes == 0:
            return None
        bytes_us = self.n_bytes / roof.read_tbs / 1e6
        if roof.tflops is not None:
            return max(bytes_us, self.flops / roof.tflops / 1e6)
        return bytes_us if self.flops < FLOPS_PER_BYTE * self.n_bytes else None


# ---- rows ----


def small_rows(quick: bool) -> Iterator[Row]:
    tokens = (64, 8192) if quick else (1, 64, 8192)
    for T in tokens:
        yield Row(f"embed T={T}", f"embed {T}", T * HIDDEN * (2 + 4))
    for T in tokens:
        yield Row(f"norm T={T}", f"norm {T}", T * HIDDEN * (4 + 4 + 2 + 2))
    for T in tokens:
        ask = "rope 1 8192 8192" if T == 8192 else f"rope {T} 1 1024"
        yield Row(f"rope_write T={T}", ask, T * 128 * 2 * 2 * (HEADS + 2 * KV_HEADS))
    for S, query, keys in ((1, 1, 1024), (64, 1, 1024), (1, 8192, 8192)):
        yield Row(f"begin {S}x{query} of {keys}", f"begin {S} {query} {keys}", 0)
    for T in tokens:
        yield Row(f"act T={T}", f"act {T}", T * FFN * 2 * 3)


def attention_rows(quick: bool) -> Iterator[Row]:
    for D in (128, 64):
        for T in (1024, 8192) if quick else (512, 1024, 2048, 4096, 8192):
            yield Row(
                f"attention prefill D={D} {T}",
                f"attention 1 {T} {T} {D}",
                2 * T * D * (2 * HEADS + 2 * KV_HEADS),
                2.0 * HEADS * D * T * (T + 1),
                peer_of("attention_us", 1, T, T, D),
            )
    for S, keys in (
        ((1, 8192), (64, 1024))
        if quick
        else ((1, 8192), (8, 4096), (32, 2048), (64, 1024), (128, 1024))
    ):
        yield Row(
            f"attention decode {S}x{keys}",
            f"attention {S} 1 {keys} 128",
            2 * 2 * S * keys * KV_HEADS * 128,
            peer=peer_of("attention_us", S, 1, keys, 128),
        )


def product_rows(quick: bool) -> Iterator[Row]:
    shapes = {name: (N, K) for name, (N, K, _) in LINEARS.items()} | {"head": (VOCAB, HIDDEN)}
    for name, (N, K) in shapes.items():
        for M in (1, 64, 8192) if quick else (1, 8, 16, 64, 128, 1024, 8192):
            out = 4 if name == "head" else 2
            peer = peer_of("product_us", N, K, M)
            for path in ("lt", "own"):
                yield Row(
                    f"product {path} {name} M={M}",
                    f"product {N} {K} {M} {int(name == 'head')} {int(path == 'own')}",
                    2 * N * K + 2 * M * K + out * M * N,
                    2.0 * M * N * K,
                    peer,
                )


def lora_rows(quick: bool) -> Iterator[Row]:
    for op in ("shrink", "expand"):
        for i, (name, (_, K, parts)) in enumerate(LINEARS.items()):
            for T, adapters in (
                ((64, 64), (1, 1)) if quick else ((64, 64), (64, 8), (64, 1), (1, 1))
            ):
                columns = len(parts) * K if op == "shrink" else sum(parts)
                yield Row(
                    f"lora {op} {name} {T} of {adapters}",
                    f"{op} {T} {adapters} {i}",
                    2 * RANK * columns * adapters,
                    2.0 * RANK * columns * T,
                )
    T = adapters = 64
    for i, (name, (N, K, parts)) in enumerate(LINEARS.items()):
        if name in ("qkv", "gate_up"):
            columns = len(parts) * K + N
            yield Row(
                f"lora joined {name} {T} of {adapters}",
                f"joined {T} {adapters} {i}",
                2 * N * K + 2 * RANK * columns * adapters + 2 * T * (K + N),
                2.0 * T * N * K + 2.0 * RANK * columns * T,
            )


def sample_rows(quick: bool) -> Iterator[Row]:
    for i, kind in enumerate(("greedy", "top-p 0.9", "top-k 50", "top-p 0.9 T 0.25")):
        for n in (64,) if quick else (1, 64):
            peer = peer_of("argmax_us", n, VOCAB) if kind == "greedy" else None
            yield Row(f"sample {kind} batch={n}", f"sample {n} {i} -1", 4 * n * VOCAB, peer=peer)
    for n_logprobs in (0, 20):
        for n in (64,) if quick else (1, 64):
            name = f"sample greedy {n_logprobs} logprobs batch={n}"
            yield Row(name, f"sample {n} 0 {n_logprobs}", 4 * n * VOCAB)


def all_rows(quick: bool) -> Iterator[Row]:
    for part in (small_rows, attention_rows, product_rows, lora_rows, sample_rows):
        yield from part(quick)


# ---- peers ----

_peer_figures: dict[tuple[str, tuple[int, ...]], float | str] = {}


def _figure(name: str, numbers: tuple[int, ...]) -> float:
    """Once for both products of a shape; a failure is remembered too."""
    key = (name, numbers)
    if key not in _peer_figures:
        try:
            _peer_figures[key] = getattr(peer_cuda, name)(*numbers)
        except RuntimeError as problem:
            _peer_figures[key] = str(problem).strip().splitlines()[0]
        peer_cuda.forget()
    found = _peer_figures[key]
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def peer_of(name: str, *numbers: int) -> Peer:
    return partial(_figure, name, numbers)


def cublas_tflops() -> float:
    """In this run, of the product with the most flops."""
    (N, K, _), M = LINEARS["gate_up"], 8192
    return 2.0 * M * N * K / _figure("product_us", (N, K, M)) / 1e6


# ---- ours ----


class Driver:
    """bench_ops, started again after a row that ended it."""

    def __init__(self, with_peers: bool) -> None:
        self._command = [str(build_for_cuda("bench_ops")), *library_dirs()]
        self._environment = dict(os.environ)
        library = peer_cuda.cublaslt_path() if with_peers else None
        if library is not None:
            self._environment.setdefault("MILPY_CUBLASLT", library)
        self.library = self._environment.get("MILPY_CUBLASLT", "as the core finds it")
        self._process: subprocess.Popen[str] | None = None

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def start(self) -> str:
        """The device's name."""
        self._process = subprocess.Popen(
            self._command, env=self._environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        return str(self._read()["device"])

    def _read(self) -> dict[str, float]:
        assert self._process is not None and self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], LONGEST_ROW_S)[0]:
            self.close()
            raise RuntimeError(f"no answer in {LONGEST_ROW_S:.0f} s")
        line = self._process.stdout.readline()
        if line:
            found: dict[str, float] = json.loads(line)
            return found
        _, message = self._process.communicate()
        code, self._process = self._process.returncode, None
        raise RuntimeError(message.strip() or f"ended with {code}")

    def measure(self, ask: str) -> dict[str, float]:
        if self._process is None:
            self.start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(ask + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # _read says why
        return self._read()


# ---- the table ----

HEAD = (
    f"{'op':34} {'us':>9} {'spread':>7} {'MB':>8} {'TB/s':>6} {'TFLOP/s':>8} {'roof us':>9} "
    f"{'of roof':>7} {'peer us':>9} {'x peer':>6}"
)


def show(row: Row, driver: Driver, roof: Roof, with_peers: bool) -> bool:
    """Print the row; false where it failed."""
    try:
        found = driver.measure(row.ask)
    except RuntimeError as problem:
        print(f"{row.name:34} FAILED: {problem}", flush=True)
        return False
    us = found["us"]
    spread = f"{100 * (found['high_us'] / found['low_us'] - 1):.1f}%"
    tflops = f"{row.flops / us / 1e6:8.1f}" if row.flops else f"{'-':>8}"
    roof_us = row.roof_us(roof)
    of_roof = f"{'-':>9} {'-':>7}" if roof_us is None else f"{roof_us:9.2f} {roof_us / us:7.3f}"
    megabytes = row.n_bytes / 1e6
    text = (
        f"{row.name:34} {us:9.2f} {spread:>7} {megabytes:8.2f} {megabytes / us:6.2f} {tflops} "
        f"{of_roof}"
    )
    if with_peers and row.peer is not None:
        try:
            peer_us = row.peer()
            text += f" {peer_us:9.2f} {peer_us / us:6.2f}"
        except RuntimeError as problem:
            text += f"   peer failed: {problem}"
    print(text, flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--ops", type=lambda text: tuple(text.split(",")), default="", help="rows that begin so"
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    options = parser.parse_args()
    with_peers = peer_cuda is not None and peer_cuda.is_usable() and not options.no_peers
    rows = [row for row in all_rows(options.quick) if row.name.startswith(options.ops)]
    driver = Driver(with_peers)
    try:
        device = driver.start()
        measured = 2 * 2**30 / driver.measure("read")["us"] / 1e6
    except RuntimeError as problem:
        print(f"bench_ops: {problem}")
        return 1
    is_h200 = "H200" in device
    roof = Roof(H200_READ_TBS, H200_TFLOPS) if is_h200 else Roof(measured, None)
    flops = "none for flops" if roof.tflops is None else f"{roof.tflops:.0f} TFLOP/s"
    if with_peers:
        try:
            roof = replace(roof, tflops=cublas_tflops())
            flops = f"{roof.tflops:.0f} TFLOP/s, cuBLAS in this run"
        except RuntimeError as problem:
            flops += f" (cuBLAS failed: {problem})"
    print(
        f"{device}; read loop of this run {measured:.2f} TB/s\n"
        f"roof: {roof.read_tbs:.2f} TB/s, {flops}\n"
        f"cuBLASLt: {driver.library}\n"
        f"peers: {peer_cuda.versions() if with_peers else 'none'}\n{HEAD}",
        flush=True,
    )
    n_failed = sum(not show(row, driver, roof, with_peers) for row in rows)
    driver.close()
    print(f"{len(rows)} rows, {n_failed} failed")
    return 1 if n_failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
