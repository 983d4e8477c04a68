"""A model driven for tests: step by step with its logits kept, or whole requests by an engine whose
schedule is the same each time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from milpy import _C
from milpy.checkpoint import open_checkpoint
from milpy.config import read_model_config

Logits = NDArray[np.float32]
# token, logprob, 1-based rank, and the best tokens with their logprobs
Sample = tuple[int, float, int, list[tuple[int, float]]]


def open_model(folder: Path, device: str) -> _C.Model:
    config = read_model_config(folder)
    return _C.Model(
        config,
        open_checkpoint(folder, config),
        max_position=config.max_context_length,
        device=device,
    )


# ---- step by step ----


@dataclass
class Text:
    """A sequence: its tokens, of which the first n_past are computed, and the logits kept."""

    seq: _C.Seq
    tokens: list[int]
    n_past: int = 0
    pages: list[int] = field(default_factory=list)
    rows: dict[int, Logits] = field(default_factory=dict)  # by position

    def logits(self) -> Logits:
        """[n_rows, V], by position."""
        return np.stack([self.rows[position] for position in sorted(self.rows)])


class Stepped:
    """A model under a Stepper that deals out pages in no order, as a long life of one would."""

    def __init__(
        self,
        model: _C.Model,
        *,
        n_pages: int,
        page_size: int,
        max_tokens: int,
        max_position: int,
        max_seqs: int = 8,
    ) -> None:
        self._page_size = page_size
        self._free = np.random.default_rng(n_pages).permutation(n_pages).tolist()
        self._stepper = _C.Stepper(
            model,
            n_pages=n_pages,
            page_size=page_size,
            max_seqs=max_seqs,
            max_tokens=max_tokens,
            max_pages_per_seq=min(n_pages, -(-max_position // page_size)),
        )

    def add(self, tokens: Sequence[int], adapter: int = -1) -> Text:
        return Text(self._stepper.create_seq(adapter=adapter), list(tokens))

    def step(self, *work: tuple[Text, int], keep: bool = True) -> None:
        """The next n tokens of each text, or with n = 0 a decode of the token sampled last. Greedy:
        what is sampled after all known tokens is one more of them. Rows are kept, or thrown away.
        """
        items = [self._item(text, n, keep) for text, n in work]
        samples, logits = self._stepper.step(items, logits=keep)
        row = 0
        for text, n in work:
            n_new = max(n, 1)
            for i in range(n_new if keep else 0):
                assert logits is not None
                text.rows[text.n_past + i] = logits[row + i]
            row += n_new if keep else 1
            text.n_past += n_new
            if text.n_past == len(text.tokens):
                text.tokens.append(samples[row - 1][0])

    def _item(self, text: Text, n: int, keep: bool) -> Any:
        end = text.n_past + max(n, 1)
        while len(text.pages) * self._page_size < end:
            text.pages.append(self._free.pop())
        assert end <= len(text.tokens)
        tokens = text.tokens[text.n_past : end] if n > 0 else None
        return text.seq, tokens, text.n_past, text.pages, keep


# ---- whole requests ----


@dataclass(frozen=True)
class Request:
    tokens: Sequence[int]
    max_tokens: int
    adapter: int = -1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def serve(
    model: _C.Model, requests: Sequence[Request], *, n_logprobs: int = 5, **options: Any
) -> tuple[list[list[Sample]], dict[str, int]]:
    """Each request's samples, and what the engine counted.

    All are queued before the loop begins, so that who shares a step with whom follows from the
    requests and options alone. Freed pages are NaN.
    """
    engine = _C.Engine(model, poison=True, **options)
    answers: dict[int, list[Sample]] = {}
    for request in requests:
        id = engine.submit(
            request.tokens,
            max_tokens=request.max_tokens,
            adapter=request.adapter,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            n_logprobs=n_logprobs,
            seed=request.seed,
        )
        answers[id] = []
    problems: list[Exception] = []

    def run() -> None:
        try:
            engine.run()
        except Exception as problem:
            problems.append(problem)

    loop = threading.Thread(target=run)
    loop.start()
    try:
        n_open = len(requests)
        while n_open:
            for id, finish, sample in engine.poll():
                if sample is not None:
                    answers[id].append(sample)
                n_open -= finish != _C.FINISH_NONE
                # An engine that dies says why below.
                assert finish in (_C.FINISH_NONE, _C.FINISH_LENGTH, _C.FINISH_ERROR), (
                    f"request {list(answers).index(id)}, {len(answers[id])} tokens: {finish=}"
                )
        stats = engine.stats()
    finally:
        engine.stop()
        loop.join()
        engine.free()
    if problems:
        raise problems.pop()
    counts = ("n_steps", "n_preemptions", "n_prompt_tokens", "n_generated_tokens")
    return list(answers.values()), {name: stats[name] for name in counts}
