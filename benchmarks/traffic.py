"""Requests of random tokens on an engine that runs, and what is timed of them."""

from __future__ import annotations

import threading
import time

import numpy as np

from milpy import _C

FINISHED_BY_LENGTH = 2


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

    def decode(self, n_seqs: int, adapters: list[int], prompt: int, new: int) -> float:
        """Tokens a second while all n_seqs decode: last one's first token to the first end."""
        ids = [self._submit(prompt, new, adapters[i % len(adapters)]) for i in range(n_seqs)]
        seen = dict.fromkeys(ids, 0)
        started: float | None = None
        counted = 0
        n_open = n_seqs
        ended: float | None = None
        while n_open:
            events = self._engine.poll(timeout_ms=60000)
            now = time.perf_counter()
            for request, finish, sample in events:
                seen[request] += sample is not None
                if finish:
                    n_open -= 1
                    assert finish == FINISHED_BY_LENGTH, f"found finish {finish}, expected length"
            if started is None and all(seen.values()):
                started, counted = now, sum(seen.values())
            elif started is not None and ended is None and n_open < n_seqs:
                ended, counted = now, sum(seen.values()) - counted
        assert started is not None and ended is not None
        return counted / (ended - started)

    def first_token_s(self, length: int, adapter: int) -> float:
        """Seconds from submitting a prompt to its first token."""
        begin = time.perf_counter()
        self._submit(length, 1, adapter)
        while not self._engine.poll(timeout_ms=60000):
            pass
        return time.perf_counter() - begin
