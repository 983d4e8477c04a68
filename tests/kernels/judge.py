"""The rule by which a GPU's results are judged: at most twice the error of the plain formula.

Plain is float64 arithmetic whose values are rounded to bfloat16 exactly where docs/numerics.md says
that the op rounds, so that its error is what bfloat16 costs anyone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from cpu.tolerance import EPS_BF16, EPS_F32
from helpers.cpu_shim import Array, bf16, from_bf16

TIMES = 2.0
# Products that a tensor core adds up at once at the least: m16n8k8's.
AT_ONCE = 8


def rounded(x: Array) -> Array:
    """To bfloat16, once: the plain result of an op that rounds nothing but that."""
    return from_bf16(bf16(x))


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


def worst(x: Array) -> float:
    return float(np.abs(x).max(initial=0.0))


def judge(
    what: str,
    got: Array,
    exact: Array,
    plain: Array,
    unit: float = EPS_BF16,
    size: Array | None = None,
) -> None:
    """The error's root mean square is the strict rule. The worst of few elements is luck, plain's
    too, so there half a unit of the largest element's rounding counts as plain's at least.

    unit: half a unit of the result's rounding, 0 where it is float32. size: of what was summed, if
    larger than the result: where plain has no error (a copy, one key, whole numbers), some units of
    float32 of it are not one either."""
    assert got.shape == exact.shape == plain.shape, (got.shape, exact.shape, plain.shape)
    assert np.isfinite(got).all(), f"{what}: found {np.count_nonzero(~np.isfinite(got))} not finite"
    floor = 8 * EPS_F32 * worst(exact if size is None else size) + 1e-30
    error, allowed = got - exact, plain - exact
    found, expected = rms(error), TIMES * rms(allowed) + floor
    assert found <= expected, f"{what}: rms error is {found:.3g}, expected at most {expected:.3g}"
    most = TIMES * max(worst(allowed), unit * worst(exact)) + floor
    if worst(error) > most:
        at = np.unravel_index(np.argmax(np.abs(error)), error.shape)
        raise AssertionError(
            f"{what}: at {tuple(map(int, at))} found {got[at]}, expected {exact[at]} to {most:.3g}"
        )


def judge_rounded(what: str, got: Array, exact: Array) -> None:
    """Of an op that rounds its result to bfloat16 and nothing before it. got: bits."""
    judge(what, from_bf16(got), exact, rounded(exact))


# ---- attention ----


def attention(
    q: Array,
    k: Array,
    v: Array,
    first: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    round_weights: Callable[[Array], Array] = rounded,
    round_result: Callable[[Array], Array] = rounded,
) -> tuple[Array, Array]:
    """Exact and plain results of queries first .. of a sequence, [n, N, D]. q: [n, N, D], k and v:
    [L, K, D]. Plain rounds the weights p, exp(score - maximum), sums them so, and rounds o."""
    n, N, D = q.shape
    L, K, _ = k.shape
    own, key = np.repeat(np.arange(first, first + n), N // K)[:, None], np.arange(L)
    seen = (key <= own) & (key > own - window if window else key >= 0)
    exact, plain = (np.empty((n, K, N // K, D)) for _ in range(2))
    for head in range(K):
        queries = q.reshape(n, K, -1, D)[:, head].reshape(-1, D)
        scores = queries @ k[:, head].T * scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        scores[~seen] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        for result, weights in ((exact, p), (plain, round_weights(p))):
            o = weights @ v[:, head] / weights.sum(-1, keepdims=True)
            result[:, head] = o.reshape(n, -1, D)
    return exact.reshape(n, N, D), round_result(plain.reshape(n, N, D))


def judge_rows(what: str, got: Array, exact: Array, plain: Array) -> None:
    """16 rows at a time: the fewer keys a row sees, the larger its values, and their errors must
    not cover up those of others."""
    for begin in range(0, len(got), 16):
        rows = slice(begin, begin + 16)
        judge(f"{what}, rows from {begin}", got[rows], exact[rows], plain[rows])


# ---- products in float32 ----


def product(x: Array, w: Array, bias: Array | None = None) -> tuple[Array, Array, Array]:
    """Exact and plain x W^T (+ bias) in float32, and the size of their sums.

    Plain adds AT_ONCE products at a time, as tensor cores do, which cut what float32 cannot hold
    where an fma would round it: a chain of roundings to nearest would be no measure for them."""
    exact, sums = x @ w.T, np.zeros((len(x), len(w)))
    for k in range(0, x.shape[1], AT_ONCE):
        sums = cut(sums + x[:, k : k + AT_ONCE] @ w[:, k : k + AT_ONCE].T)
    size = np.sqrt(np.square(x) @ np.square(w).T)
    if bias is None:
        return exact, sums, size
    return exact + bias, (sums + bias).astype(np.float32).astype(np.float64), size + np.abs(bias)


def cut(x: Array) -> Array:
    """To float32, towards zero."""
    near = x.astype(np.float32)
    below = np.nextafter(near, np.float32(0))
    return np.where(np.abs(near.astype(np.float64)) > np.abs(x), below, near).astype(np.float64)
