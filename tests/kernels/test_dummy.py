"""Dummy weights made on a GPU: bit for bit those of loader/source.h, in the rows asked for."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.cpu_shim import Array, Shim, bf16
from helpers.linear_shim import Weight
from helpers.marks import small

pytestmark = pytest.mark.gpu

STREAM = 0x9E3779B97F4A7C15
BEFORE = 1234  # bits of the weight's other rows


def mix64(z: Array) -> Array:
    """base/hash.h's; uint64 wraps."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def dummy(index: Array) -> Array:
    """Whole numbers from -65535 to 65535, of 2^-21."""
    upper = mix64(np.uint64(STREAM) ^ index.astype(np.uint64)) >> np.uint64(48)
    return bf16((2 * upper.astype(np.int64) - 65535) * 2.0**-21)


# More rows than the launch has blocks, more columns than a block has threads.
@pytest.mark.parametrize(
    ("part_rows", "interleave", "K", "part", "row", "n_rows"),
    [
        small([40, 24, 8], 0, 300, 1, 0, 24),
        small([40, 40], 8, 64, 1, 3, 21),
        ([3000, 100], 0, 257, 0, 500, 2400),
        ([2400, 2400], 8, 33, 0, 0, 2400),
        ([16], 0, 8, 0, 4, 0),
    ],
)
def test_rows_are_made_where_they_lie(
    path: str, part_rows: list[int], interleave: int, K: int, part: int, row: int, n_rows: int
) -> None:
    """Columns of a wider tensor that begins far on: a shard's."""
    begin, stride = 2**33 + 5, K + 7
    parts = [np.full((rows, K), BEFORE, np.uint16) for rows in part_rows]
    with Shim(path) as shim:
        weight = Weight(shim, parts, interleave)
        weight.pack_dummy(part, row, n_rows, STREAM, begin, stride)
    index = begin + np.arange(n_rows)[:, None] * stride + np.arange(K)
    parts[part][row : row + n_rows] = dummy(index)
    assert np.array_equal(weight.rows(), np.concatenate(parts)[weight.order()])
