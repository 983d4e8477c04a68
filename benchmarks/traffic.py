"""Requests of random tokens on an engine that runs, and what is timed of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from milpy import _C

FINISHED_BY_LENGTH = 2
HOST_PARTS = ("fill", "submit", "wait", "retire")  # of the engine's thread, by its stats
WAIT_MS = 60000


class _Moment(NamedTuple):
    seconds: float
    n_tokens: int
    stats: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Decoding:
    """Rows that all decode, none of them finished."""

    rate: float  # tokens a second
    host_ms: dict[str, float]  # of one step, by HOST_PARTS

    @property
    def work_ms(self) -> float:
        """What the engine's thread does for a step while another one runs."""
        return sum(ms for part, ms in self.host_ms.items() if part != "wait")

    @classmethod
    def between(cls, begin: _Moment, end: _Moment) -> Decoding:
        n_steps = max(end.stats["n_steps"] - begin.stats["n_steps"], 1)
        spent = {
            part: (end.stats[f"{part}_ns"] - begin.stats[f"{part}_ns"]) / n_steps / 1e6
            for part in HOST_PARTS
        }
        return cls((end.n_tokens - begin.n_tokens) / (end.seconds - begin.seconds), spent)


class Traffic:
    """Runs `engine` on a thread of its own until close(), which frees it."""

    def __init__(self, engine: _C.Engine, vocab: int) -> None:
        self._engine = engine
        self._vocab = vocab
        self._random = np.random.default_rng(7)
        self._loop = threading.Thread(target=engine.run, daemon=True)
        self._loop.start()

    def close(self) -> None:
        self._engine.stop()
        self._loop.join()
        self._engine.free()

    def _submit(self, length: int, max_tokens: int, adapter: int) -> int:
        tokens = self._random.integers(3, self._vocab, length).astype(np.int32)
        return self._engine.submit(tokens, max_tokens=max_tokens, adapter=adapter, temperature=0.0)

    def decode(self, n_seqs: int, adapters: list[int], prompt: int, new: int) -> Decoding:
        """All n_seqs decode: from the last one's first token to the first end."""
        ids = [self._submit(prompt, new, adapters[i % len(adapters)]) for i in range(n_seqs)]
        seen = dict.fromkeys(ids, 0)
        begin: _Moment | None = None
        end: _Moment | None = None
        n_open = n_seqs
        while n_open:
            events = self._engine.poll(timeout_ms=WAIT_MS)
            now = time.perf_counter()
            for request, finish, sample in events:
                seen[request] += sample is not None
                if finish:
                    n_open -= 1
                    assert finish == FINISHED_BY_LENGTH, f"found finish {finish}, expected length"
            if begin is None and all(seen.values()):
                begin = _Moment(now, sum(seen.values()), self._engine.stats())
            elif begin is not None and end is None and n_open < n_seqs:
                end = _Moment(now, sum(seen.values()), self._engine.stats())
        assert begin is not None and end is not None, "found no time at which all rows decode"
        return Decoding.between(begin, end)

    def serve_s(self, adapters: Sequence[int], prompt: int, new: int) -> float:
        """Seconds until all are answered: one request for each of `adapters`, queued at once."""
        begin = time.perf_counter()
        for adapter in adapters:
            self._submit(prompt, new, adapter)
        n_open = len(adapters)
        while n_open:
            n_open -= sum(finish != 0 for _, finish, _ in self._engine.poll(timeout_ms=WAIT_MS))
        return time.perf_counter() - begin

    def first_token_s(self, length: int, adapter: int) -> float:
        """Seconds from submitting a prompt to its first token."""
        begin = time.perf_counter()
        self._submit(length, 1, adapter)
        while not self._engine.poll(timeout_ms=WAIT_MS):
            pass
        return time.perf_counter() - begin
