"""Shrink and expand on a GPU: rows of different adapters, ranks and none, against float64."""

import numpy as np
import pytest
from helpers.cpu_shim import Shim, bf16, from_bf16
from helpers.linear_shim import (
    Adapter,
    Array,
    Segments,
    Weight,
    lora_expand,
    lora_shrink,
    random_adapter,
)
from helpers.marks import small
from kernels.judge import judge, judge_rounded, product

pytestmark = [pytest.mark.gpu, pytest.mark.punica_test]

V_PART = 512
# Ranks of three adapters for each part.
RANKS = [[8, 16, 1], [24, 3, 16], [0, 0, 64]]
ROWS_OF = [[4], [5, 6, 7, 8, 9, 10], [0, 2, 3, 12, 14, 13]]
T = 16
SHAPES = [
    small([48, 24, 8], 0, 520), ([48, 48], 8, 4096), small([33], 0, 530), ([4096], 0, 14336),
]  # fmt: skip


def make(
    shim: Shim, part_rows: list[int], interleave: int, K: int, n_rows: int = T
) -> tuple[Weight, Array, list[Adapter]]:
    rng = np.random.default_rng(K + n_rows)
    parts = [bf16(rng.standard_normal((rows, K)) / K**0.5) for rows in part_rows]
    adapters = [random_adapter(rng, ranks[: len(parts)], K, part_rows) for ranks in RANKS]
    return Weight(shim, parts, interleave), bf16(rng.standard_normal((n_rows, K))), adapters


def pad(rank: int) -> int:
    return -(-rank // 8) * 8


def summed(v: Array, rank: int, K: int) -> Array:
    """Partial sums of a part, [rows, splits, padded_rank], added."""
    splits = min(-(-K // 1024), V_PART // pad(rank))
    return v[:, : splits * pad(rank)].reshape(len(v), splits, -1).astype(np.float64).sum(1)


@pytest.mark.parametrize(("part_rows", "interleave", "K"), SHAPES)
def test_shrink_is_the_product_with_each_rows_own_a(
    path: str, part_rows: list[int], interleave: int, K: int
) -> None:
    with Shim(path) as shim:
        weight, x, adapters = make(shim, part_rows, interleave, K)
        v = lora_shrink(weight, x, Segments(weight, adapters, ROWS_OF, T))
    assert_shrunk(v, x, adapters, ROWS_OF)


def assert_shrunk(v: Array, x: Array, adapters: list[Adapter], rows_of: list[list[int]]) -> None:
    """v of all rows in segments, in their order: what no adapter has is NaN still, padding is 0."""
    begin, found = 0, []
    for adapter, rows in zip(adapters, rows_of, strict=True):
        mine = v[begin : begin + len(rows)]
        begin += len(rows)
        for part, a in enumerate(adapter.a):
            if a is None:
                assert np.isnan(mine[:, part]).all()
            elif rows:
                got = summed(mine[:, part], len(a), x.shape[1])
                assert (got[:, len(a) :] == 0).all()
                found.append((got[:, : len(a)], *product(from_bf16(x[rows]), a)))
    got, exact, plain, size = (np.concatenate([f[i].ravel() for f in found]) for i in range(4))
    judge("v", got, exact, plain, 0.0, size)


def whole(
    weight: Weight, x: Array, adapters: list[Adapter], rows_of: list[list[int]], base: Array
) -> Array:
    """base + scale (x A^T) B^T in float64, packed order."""
    exact = from_bf16(x)
    parts = []
    for index, rows in enumerate(weight.parts):
        y = np.zeros((len(x), len(rows)))
        for adapter, at in zip(adapters, rows_of, strict=True):
            if at:
                y[at] += adapter.delta(exact[at], index)
        parts.append(y)
    return base + np.concatenate(parts, 1)[:, weight.order()]


def both(weight: Weight, x: Array, segments: Segments, y: Array) -> Array:
    lora_shrink(weight, x, segments)
    return lora_expand(weight, x, segments, y)


@pytest.mark.parametrize(("part_rows", "interleave", "K"), SHAPES)
def test_both_together_add_each_rows_adapter(
    path: str, part_rows: list[int], interleave: int, K: int
) -> None:
    with Shim(path) as shim:
        weight, x, adapters = make(shim, part_rows, interleave, K)
        rng = np.random.default_rng(1)
        base = from_bf16(bf16(rng.standard_normal((T, weight.N)))).astype(np.float32)
        y = both(weight, x, Segments(weight, adapters, ROWS_OF, T), base)
    assert_expanded(y, weight, x, adapters, ROWS_OF, base)


def assert_expanded(
    y: Array, weight: Weight, x: Array, adapters: list[Adapter], rows_of: list[list[int]],
    base: Array,
) -> None:  # fmt: skip
    """Each row against its own adapter; rows of none keep their bits."""
    want = whole(weight, x, adapters, rows_of, base.astype(np.float64))
    # One rounding to bfloat16, and v's two halves.
    assert (np.abs(y - want) <= 1.02 * 2.0**-8 * np.abs(want) + 1e-3).all()
    some = np.unique([row for rows in rows_of for row in rows]).astype(int)
    none = np.setdiff1d(np.arange(len(x)), some)
    judge_rounded("y", bf16(y[some]), want[some])
    assert np.array_equal(y[none], base[none])


@pytest.mark.parametrize("n_rows", [1, 15, 17, 64, small(640)])
def test_a_row_keeps_its_bits_in_any_batch(path: str, n_rows: int) -> None:
    """534 rows of 640 have an adapter and take the kernel for many rows; one row that for few."""
    with Shim(path, max_tokens=n_rows) as shim:
        weight, x, adapters = make(shim, [48, 24, 8], 0, 2080, n_rows)
        base = np.zeros((n_rows, weight.N), np.float32)
        rows_of = [[*range(0, n_rows, 3)], [*range(1, n_rows, 3)], [*range(2, n_rows, 6)]]
        y = both(weight, x, Segments(weight, adapters, rows_of, n_rows), base)
        assert_expanded(y, weight, x, adapters, rows_of, base)
        for index, rows in enumerate(rows_of):
            for row in rows[:2] + rows[-1:]:
                alone: list[list[int]] = [[], [], []]
                alone[index] = [0]
                segments = Segments(weight, adapters, alone, 1)
                assert np.array_equal(both(weight, x[[row]], segments, base[:1])[0], y[row])


def test_every_rank_up_to_the_largest(path: str) -> None:
    K, rows = 1100, [40]
    with Shim(path) as shim:
        rng = np.random.default_rng(3)
        for rank in (1, 8, 9, 31, 100, 128, 511, 512):
            weight = Weight(shim, [bf16(rng.standard_normal((rows[0], K)) / K**0.5)], 0)
            adapters = [random_adapter(rng, [rank], K, rows)]
            x = bf16(rng.standard_normal((5, K)))
            base = np.zeros((5, rows[0]), np.float32)
            y = both(weight, x, Segments(weight, adapters, [[0, 1, 4]], 5), base)
            want = whole(weight, x, adapters, [[0, 1, 4]], base.astype(np.float64))
            assert (np.abs(y - want) <= 1.02 * 2.0**-8 * np.abs(want) + 2e-3).all()
            judge_rounded("y", bf16(y[[0, 1, 4]]), want[[0, 1, 4]])


# ---- many adapters ----


def random_ranks(rng: np.random.Generator, n_parts: int) -> list[int]:
    """1 to 64, odd ones among them; a part in five, and now and then all, have none."""
    ranks = [int(rank) for rank in rng.integers(1, 65, n_parts)]
    return [0 if rng.random() < 0.2 else rank for rank in ranks]


@pytest.mark.parametrize(
    ("n_adapters", "n_rows"), [(33, 80), (64, 64), small(100, 150), (100, 700)]
)
def test_many_adapters_of_any_ranks_in_one_batch(path: str, n_adapters: int, n_rows: int) -> None:
    """Tiles are found 32 segments at a time. 64 rows of 64 adapters; some rows have none."""
    rng = np.random.default_rng(n_adapters + n_rows)
    K, part_rows = 1100, [48, 24, 8]
    ranks = [random_ranks(rng, 3) for _ in range(n_adapters - 2)] + [[0, 0, 0], [1, 64, 63]]
    adapters = [random_adapter(rng, each, K, part_rows) for each in ranks]
    x = bf16(rng.standard_normal((n_rows, K)))
    rows = rng.permutation(n_rows).tolist()
    rows_of = [[row] for row in rows[:n_adapters]]
    for row in rows[n_adapters : n_rows - n_rows // 10]:
        rows_of[int(rng.integers(n_adapters))].append(row)
    with Shim(path, max_tokens=n_rows) as shim:
        weight = Weight(shim, [bf16(rng.standard_normal((n, K)) / K**0.5) for n in part_rows])
        base = from_bf16(bf16(rng.standard_normal((n_rows, weight.N)))).astype(np.float32)
        segments = Segments(weight, adapters, rows_of, n_rows)
        v = lora_shrink(weight, x, segments)
        y = lora_expand(weight, x, segments, base)
    assert_shrunk(v, x, adapters, rows_of)
    assert_expanded(y, weight, x, adapters, rows_of, base)


def test_no_rows_and_no_segments_are_no_work(path: str) -> None:
    with Shim(path) as shim:
        weight, x, adapters = make(shim, [48, 24, 8], 0, 520)
        base = np.ones((T, weight.N), np.float32)
        none = Segments(weight, adapters, [[], [], []], T)
        assert np.isnan(lora_shrink(weight, x, none)).all()
        assert np.array_equal(lora_expand(weight, x, none, base), base)
        empty = Segments(weight, adapters, [[], [], []], 0)
        assert both(weight, x[:0], empty, base[:0]).size == 0
