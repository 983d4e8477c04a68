"""What milpy.ops.sample_logprobs must give, by NumPy in float64: of any backend."""

from __future__ import annotations

from typing import Any

import numpy as np
from cpu.tolerance import TOLERANCE
from numpy.typing import NDArray

from milpy import ops

Array = NDArray[Any]

# Of a row: none, the token's, more than there is room for or ids in a vocabulary of one.
ASKED = [-1, 0, 1, 5, 20, 20]
VOCABS = [1, 7, 2049, 128256]


def rows_of(vocab: int) -> tuple[Array, Array]:
    """Logits with ties and minus infinity, and params: greedy, drawn, filtered."""
    rng = np.random.default_rng([11, vocab])
    logits = (3 * rng.standard_normal((len(ASKED), vocab))).astype(np.float32)
    logits[3] = np.round(logits[3])
    logits[4, 1::2] = -np.inf
    params = ops.sampling_params(
        len(ASKED),
        temperature=[0, 1, 1, 0.7, 0, 2],
        top_k=[0, 0, 5, 0, 0, 0],
        top_p=[1, 1, 1, 0.9, 1, 1],
        seed=np.arange(len(ASKED)),
        n_logprobs=ASKED,
    )
    return logits, params


def check(logits: Array, asked: list[int], found: list[Array]) -> None:
    """found: tokens, logprobs, ranks, top_tokens, top_logprobs."""
    tokens, logprobs, ranks, top_tokens, top_logprobs = found
    relative, absolute = TOLERANCE["logprob"]
    n_columns = top_tokens.shape[1]
    for i, x in enumerate(logits.astype(np.float64)):
        if asked[i] < 0 or tokens[i] < 0:
            assert (logprobs[i], ranks[i]) == (0, 0)
            assert (top_tokens[i] == -1).all() and not top_logprobs[i].any()
            continue
        want = x - np.logaddexp.reduce(x)
        order = np.argsort(-x, kind="stable")
        n = min(asked[i], n_columns, len(x))
        assert order[ranks[i] - 1] == tokens[i]
        np.testing.assert_allclose(logprobs[i], want[tokens[i]], relative, absolute)
        assert top_tokens[i].tolist() == order[:n].tolist() + [-1] * (n_columns - n)
        np.testing.assert_allclose(top_logprobs[i, :n], want[order[:n]], relative, absolute)
        assert not top_logprobs[i, n:].any()
