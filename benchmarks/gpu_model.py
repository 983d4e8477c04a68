"""A dummy model on a GPU with an engine and traffic: what the figures of a GPU are taken from."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shapes import Shape
from benchmarks.traffic import Traffic
from milpy import _C
from milpy.config import read_model_config
from milpy.wheels import add_library_dirs


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """What a figure's engine is made with."""

    device: str = "cuda"
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 0  # 0, here and below: the engine's own
    gpu_memory_utilization: float = 0.0
    deterministic: bool = False
    enforce_eager: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds from nothing to the first token."""

    weights: float
    engine: float
    first_token: float

    @property
    def total(self) -> float:
        return self.weights + self.engine + self.first_token


class GpuModel:
    """Close it, or its memory stays."""

    def __init__(self, shape: Shape, folder: Path, choice: EngineChoice) -> None:
        add_library_dirs(_C.add_library_dir)
        self.shape = shape
        self.config = read_model_config(shape.write_config(folder / shape.name))
        begin = time.perf_counter()
        self.model = _C.Model(
            self.config, None, max_position=shape.max_position, device=choice.device, dummy_seed=1
        )
        loaded = time.perf_counter()
        self.engine = _C.Engine(
            self.model,
            max_model_len=shape.max_position,
            max_num_seqs=choice.max_num_seqs,
            max_num_batched_tokens=choice.max_num_batched_tokens,
            gpu_memory_utilization=choice.gpu_memory_utilization,
            deterministic=choice.deterministic,
            enforce_eager=choice.enforce_eager,
        )
        self.traffic = Traffic(self.engine, shape.vocab)
        ready = time.perf_counter()
        self.traffic.first_token_s(16, -1)
        first = time.perf_counter()
        self.start = Start(loaded - begin, ready - loaded, first - ready)

    def close(self) -> None:
        self.traffic.close()
        self.model.close()

    def __enter__(self) -> GpuModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
