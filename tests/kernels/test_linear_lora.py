"""linear_lora on a GPU, as every layer calls it: a product, shrink beside it on a second stream,
and expand behind both. Its parts run apart give the same bits, and float64 judges them."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pytest
from helpers.cpu_shim import Shim, bf16, from_bf16
from helpers.linear_shim import (
    Adapter,
    Array,
    Segments,
    Weight,
    linear_lora,
    linear_lora_late,
    random_adapter,
)
from kernels.judge import judge, rounded
from kernels.test_linear import sample
from kernels.test_lora import RANKS, both, whole

pytestmark = [pytest.mark.gpu, pytest.mark.punica_test]

# test_lora.py's, and rows as long as Llama's of few columns.
SHAPES = [
    ((48, 24, 8), 0, 520), ((48, 48), 8, 4096), ((33,), 0, 530), ((4096,), 0, 14336),
    ((48, 24, 8), 0, 4096), ((24, 24), 8, 14336),
]  # fmt: skip
ROWS = (1, 16, 640)  # of the last, 534 have an adapter: shrink's kernel for many rows

modes = pytest.mark.parametrize("deterministic", [False, True])


@functools.cache
def inputs(part_rows: tuple[int, ...], K: int) -> tuple[list[Array], Array, list[Adapter]]:
    rng = np.random.default_rng([K, *part_rows])
    wide = [rng.standard_normal((rows, K), np.float32) for rows in part_rows]
    adapters = [random_adapter(rng, ranks[: len(wide)], K, list(part_rows)) for ranks in RANKS]
    x = rng.standard_normal((max(ROWS), K), np.float32)
    return [bf16(part / np.float32(K**0.5)) for part in wide], bf16(x), adapters


def rows_of(n_rows: int) -> list[list[int]]:
    return [[*range(0, n_rows, 3)], [*range(1, n_rows, 3)], [*range(2, n_rows, 6)]]


def shims(
    path: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Shim, str]]:
    """With the second stream and without, in a graph and not; and what to say of each."""
    for captured in (False, True):
        for side in ("1", "0"):
            monkeypatch.setenv("MILPY_CUDA_SIDE", side)  # read where a queue is opened
            with Shim(path, deterministic=deterministic, captured=captured) as shim:
                yield shim, f"captured: {captured}, MILPY_CUDA_SIDE={side}"


def judge_composed(
    y: Array, weight: Weight, x: Array, adapters: list[Adapter], rows: list[list[int]]
) -> None:
    """Plain rounds the product, then its sum with what the adapter adds; some columns of many."""
    columns = sample(weight.N, 160)
    product = from_bf16(x) @ from_bf16(weight.rows()[columns]).T
    delta = whole(weight, x, adapters, rows, np.zeros(1))[:, columns]
    plain = rounded(rounded(product) + delta)
    judge("y", y[:, columns].astype(np.float64), product + delta, plain)


def check(
    path: str, deterministic: bool, part_rows: tuple[int, ...], interleave: int, K: int,
    n_rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    parts, x, adapters = inputs(part_rows, K)
    want = []
    with Shim(path, deterministic=deterministic) as shim:
        weight = Weight(shim, parts, interleave)
        for n in n_rows:
            product = weight.linear(x[:n])
            segments = Segments(weight, adapters, rows_of(n), n)
            want.append(both(weight, x[:n], segments, product))
            none = np.setdiff1d(np.arange(n), sum(rows_of(n), []))
            assert np.array_equal(want[-1][none], product[none])
            judge_composed(want[-1], weight, x[:n], adapters, rows_of(n))
    for shim, mode in shims(path, deterministic, monkeypatch):
        weight.shim = shim  # any queue's rows lie the same way
        for n, y in zip(n_rows, want, strict=True):
            # New ones: v of the parts must not be there.
            segments = Segments(weight, adapters, rows_of(n), n)
            assert np.array_equal(linear_lora(weight, x[:n], segments, True), y), (mode, n)


@modes
@pytest.mark.parametrize(("part_rows", "interleave", "K"), SHAPES)
def test_it_is_its_parts(
    path: str, deterministic: bool, part_rows: tuple[int, ...], interleave: int, K: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    check(path, deterministic, part_rows, interleave, K, ROWS, monkeypatch)


@pytest.mark.sanitize
def test_it_is_its_parts_at_its_smallest(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By kernels of our own: the sanitizers need not look into cuBLASLt."""
    check(path, True, (48, 24, 8), 0, 520, (16,), monkeypatch)


@modes
def test_shrink_waits_for_x_and_expand_for_shrink(
    path: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x is NaN until long after the host has queued all of it, and shrink at the largest rank takes
    far longer than the product of 8 columns, so that what does not wait reads NaN."""
    rng = np.random.default_rng(5)
    K, n, word = 4096, 640, 0x3FC0
    adapters, rows = [random_adapter(rng, [512], K, [8])], [[*range(2, n)]]
    x = np.full((n, K), word, np.uint16)
    with Shim(path, deterministic=deterministic) as shim:
        weight = Weight(shim, [bf16(rng.standard_normal((8, K)) / K**0.5)])
        want = both(weight, x, Segments(weight, adapters, rows, n), weight.linear(x))
    assert np.isfinite(want).all()
    for shim, mode in shims(path, deterministic, monkeypatch):
        weight.shim = shim
        segments = Segments(weight, adapters, rows, n)
        assert np.array_equal(linear_lora_late(weight, word, n, segments), want), mode
