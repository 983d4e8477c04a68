"""An engine on the demo model under requests of every kind, run on a thread of its own."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from milpy import _C, demo
from milpy.adapters import read_adapter
from milpy.checkpoint import open_checkpoint
from milpy.config import read_model_config
from milpy.memory import MemoryReport

N_REQUESTS = 48
# Newcomers leave a page for each that runs: only answers over two page borders make pages run out.
LONGER = 130


class MixedLoad:
    """Prompts of many lengths, greedy and sampled, with logprobs, with each adapter and the base.

    They are submitted when it is made; run() takes the first step. Pages are so few that requests
    are preempted, and prompts come in chunks beside rows that decode.
    """

    def __init__(self, device: str, **options: Any) -> None:
        config = read_model_config(demo.BASE)
        checkpoint = open_checkpoint(demo.BASE, config)
        self._model = _C.Model(config, checkpoint, max_position=1024, device=device, n_threads=2)
        self._engine = _C.Engine(
            self._model, max_num_seqs=12, max_num_batched_tokens=192, kv_cache_bytes=2 << 20,
            **options,
        )  # fmt: skip
        contents = [
            self._model.add_adapter(read_adapter(path, config)) for path in demo.ADAPTERS.values()
        ]
        self._submit([-1, *contents])

    def _submit(self, contents: list[int]) -> None:
        rng = np.random.default_rng(3)
        for i in range(N_REQUESTS):
            self._engine.submit(
                rng.integers(3, 400, int(rng.integers(1, 200))).astype(np.int32),
                max_tokens=int(rng.integers(1, 60)) + (0, 0, 0, LONGER)[i % 4],
                adapter=contents[i % len(contents)],
                temperature=float(i % 3) / 2,
                top_k=(0, 5)[i % 2],
                top_p=(1.0, 0.9)[i // 2 % 2],
                n_logprobs=(-1, 0, 20)[i % 3],
                seed=i,
            )

    def run(self) -> int:
        """Until every answer has ended; the number of polls that took."""
        loop = threading.Thread(target=self._engine.run)
        loop.start()
        n_open, n_polls = N_REQUESTS, 0
        while n_open:
            n_open -= sum(finish != _C.FINISH_NONE for _, finish, _ in self._engine.poll(-1))
            n_polls += 1
        self._engine.stop()
        loop.join()
        return n_polls

    def stats(self) -> dict[str, Any]:
        return dict(self._engine.stats())

    def memory(self) -> MemoryReport:
        return MemoryReport(**self._engine.memory())

    def close(self) -> None:
        self._engine.free()
        self._model.close()


def check_steps_allocate_nothing(device: str, **options: Any) -> None:
    """Not on the host; on a device neither by our calls nor by the driver's or a library's."""
    load = MixedLoad(device, **options)
    before, calls = load.memory(), _C.memory_calls()
    n_polls = load.run()
    assert _C.memory_calls() - calls == n_polls  # each takes a buffer for what it returns
    stats = load.stats()
    assert stats["n_steps"] >= 100 and stats["n_preemptions"] > 0
    assert stats["n_prompt_tokens"] > 3000 and stats["n_generated_tokens"] > 800
    after = load.memory()
    assert device == "cpu" or after == before
    load.close()
