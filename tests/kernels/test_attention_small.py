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
