"""Every kernel of attention at its smallest: what compute-sanitizer's tools look at."""

from __future__ import annotations

import pytest
from cpu.test_attention import sequence
from kernels.test_attention import check

pytestmark = [pytest.mark.gpu, pytest.mark.sanitize]

# D, P: each instance of the portable path, whose pages may be of 16 rows; the Hopper path's two.
SHAPES = [(40, 16), (80, 16), (96, 16), (128, 16), (256, 16), (64, 64), (128, 64)]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(("D", "P"), SHAPES)
def test_a_row_a_split_row_a_tile_and_its_tail(path: str, D: int, P: int, captured: bool) -> None:
    cases = [(1, 0), (600, 599), (70, 69), (90, 60), (80, 0)]
    check(path, [(sequence(n, 4, 2, D), first, n) for n, first in cases], P, captured=captured)


@pytest.mark.parametrize(("D", "P"), SHAPES)
def test_blocks_go_on_to_another_item(path: str, D: int, P: int) -> None:
    """More tiles of chunks than an H200 has SMs, and two rows for each block of decode rows, split
    ones among them."""
    rows = [(600, 599)] * 3 + [(1 + 7 * i % 70, 7 * i % 70) for i in range(297)]
    chunks = [(3 + 5 * i % 66, 1 + 5 * i % 66) for i in range(70)]
    cases = [*rows, *chunks]
    check(path, [(sequence(n, 4, 2, D, seed=i), first, n) for i, (n, first) in enumerate(cases)], P)
