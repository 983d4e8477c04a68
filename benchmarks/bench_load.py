"""Loading a checkpoint from the page cache, beside a plain copy of as many bytes in the same round.

Two copies are measured on the same threads, before and after each load, the better of each kept:
- warm: memcpy between buffers that exist already (the roof that the bar names);
- fresh: memcpy into memory just taken from the kernel, as every load's weights are. The kernel
  clears those pages first, which no loader can avoid; what remains is the loader's own.

The ceiling is the same threads reading the same file straight into fresh memory: pread and the
clearing of pages, with nothing packed. A loader that never maps its files cannot pass it.

Each timed load comes right after one that is not: it fills the page cache, and leaves behind free
memory that the host of a virtual machine still backs. Memory that the host first had to find was
cleared at 0.3 GB/s instead of 9 (2026-11-23), and that is not the loader's.

    python -m benchmarks.bench_load [--shape 0.5B] [--dtype bf16|f16|f32] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import statistics
import struct
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.roofs import Machine
from benchmarks.shapes import SHAPES, Shape
from milpy import _C
from milpy.checkpoint import Checkpoint, expected_tensors, open_checkpoint
from milpy.config import ModelConfig, read_model_config

BAR = 0.4
DTYPES = {"bf16": ("BF16", np.uint16), "f16": ("F16", np.float16), "f32": ("F32", np.float32)}
FRESH_BYTES = 1 << 29
READ_BYTES = 1 << 20
HUGE_PAGE_BYTES = 2 << 20


def write_checkpoint(config: ModelConfig, folder: Path, dtype: str) -> int:
    """One model.safetensors of random values in (-1, 1); its bytes."""
    name, numpy_dtype = DTYPES[dtype]
    shapes = expected_tensors(config)
    header: dict[str, object] = {}
    end = 0
    for tensor, shape in shapes.items():
        begin = end
        end += math.prod(shape) * np.dtype(numpy_dtype).itemsize
        header[tensor] = {"dtype": name, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(1)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            values = random.uniform(-1, 1, math.prod(shape)).astype(np.float32)
            halves = values.view(np.uint32) >> 16 if dtype == "bf16" else values
            file.write(np.asarray(halves.astype(numpy_dtype)).tobytes())
    return end


def fresh_copy_gbs(source: NDArray[np.uint8], n_threads: int) -> float:
    """Bytes copied a second into memory that no page stands behind yet."""
    memory = mmap.mmap(-1, source.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    target = np.frombuffer(memory, dtype=np.uint8)
    with ThreadPoolExecutor(n_threads) as pool:
        shares = list(zip(np.split(target, n_threads), np.split(source, n_threads), strict=True))
        begin = time.perf_counter()
        list(pool.map(lambda share: np.copyto(*share), shares))
        seconds = time.perf_counter() - begin
    return source.size / 1e9 / seconds


def ceiling_gbs(path: Path, n_threads: int) -> float:
    """Bytes read a second from the page cache into memory that no page stands behind yet."""
    n_bytes = path.stat().st_size
    share = -(-n_bytes // n_threads // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    memory = mmap.mmap(-1, share * n_threads, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    target = memoryview(memory)

    def read_share(file: int, thread: int) -> None:
        for at in range(thread * share, min((thread + 1) * share, n_bytes), READ_BYTES):
            os.preadv(file, [target[at : at + READ_BYTES]], at)

    with path.open("rb") as file, ThreadPoolExecutor(n_threads) as pool:
        begin = time.perf_counter()
        list(pool.map(lambda thread: read_share(file.fileno(), thread), range(n_threads)))
        seconds = time.perf_counter() - begin
    return n_bytes / 1e9 / seconds


def load_seconds(config: ModelConfig, checkpoint: Checkpoint, n_threads: int) -> float:
    begin = time.perf_counter()
    model = _C.Model(config, checkpoint, max_position=4096, device="cpu", n_threads=n_threads)
    seconds = time.perf_counter() - begin
    model.close()
    return seconds


def bench(shape: Shape, folder: Path, dtype: str, n_threads: int, rounds: int) -> bool:
    """Print the table; whether the bar was met."""
    config = read_model_config(shape.write_config(folder))
    n_bytes = write_checkpoint(config, folder, dtype)
    checkpoint = open_checkpoint(folder, config)
    path = folder / "model.safetensors"
    machine = Machine(n_threads)
    source = np.ones(FRESH_BYTES // n_threads * n_threads, dtype=np.uint8)
    rates: list[float] = []
    warm_ratios: list[float] = []
    fresh_ratios: list[float] = []
    ceilings: list[float] = []
    ceiling_ratios: list[float] = []
    for _ in range(rounds):
        warm, fresh = machine.copy_gbs(), fresh_copy_gbs(source, n_threads)
        ceiling = ceiling_gbs(path, n_threads)
        load_seconds(config, checkpoint, n_threads)
        rate = n_bytes / 1e9 / load_seconds(config, checkpoint, n_threads)
        fresh_copy_gbs(source, n_threads)
        warm = max(warm, machine.copy_gbs())
        fresh = max(fresh, fresh_copy_gbs(source, n_threads))
        ceiling = max(ceiling, ceiling_gbs(path, n_threads))
        rates.append(rate)
        warm_ratios.append(rate / warm)
        fresh_ratios.append(rate / fresh)
        ceilings.append(ceiling / warm)
        ceiling_ratios.append(rate / ceiling)
        print(
            f"  {rate:6.2f} GB/s, copy warm {warm:6.2f}, fresh {fresh:6.2f}, "
            f"ceiling {ceiling:6.2f}",
            flush=True,
        )
    ratio = statistics.median(warm_ratios)
    print(
        f"load {shape.name} {dtype} ({n_bytes / 1e9:.2f} GB, {n_threads} threads): "
        f"{statistics.median(rates):.2f} GB/s, {ratio:.3f} of a warm copy (bar {BAR}), "
        f"{statistics.median(fresh_ratios):.3f} of a copy into fresh memory, "
        f"{statistics.median(ceiling_ratios):.3f} of the ceiling, which is "
        f"{statistics.median(ceilings):.3f} of a warm copy"
        f"{'' if ratio >= BAR else '  below'}"
    )
    return ratio >= BAR


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the result is how many bars were missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="0.5B", choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--folder", help="where the checkpoint is written for the time of the run")
    options = parser.parse_args(arguments)
    n_threads = options.threads or _C.machine_report()["n_threads"]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        met = bench(SHAPES[options.shape], Path(folder), options.dtype, n_threads, options.rounds)
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
