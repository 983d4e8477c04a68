"""LoRA on a GPU over more tiles of rows than a grid has in y, against float64."""

import numpy as np
import pytest
from kernels.judge import judge_rounded

from milpy import ops
from milpy.ops import bfloat16, from_bfloat16

pytestmark = [pytest.mark.gpu, pytest.mark.punica_test]


def test_more_tiles_than_a_grid_has_in_y() -> None:
    """Every row is a segment, so a tile, of its own; many segments share an adapter."""
    T, K, N, R, E = 65_600, 16, 8, 8, 3
    rng = np.random.default_rng(1)
    x, a, b, y = (
        bfloat16(rng.standard_normal(shape).astype(np.float32))
        for shape in [(T, K), (E, R, K), (E, N, R), (T, N)]
    )
    adapter = rng.integers(0, E, T).astype(np.int32)
    rows = rng.permutation(T).astype(np.int32)
    want = from_bfloat16(y).astype(np.float64)
    for e in range(E):
        mine = rows[adapter == e]
        wide_x, wide_a, wide_b = (
            from_bfloat16(z).astype(np.float64) for z in (x[mine], a[e], b[e])
        )
        want[mine] += wide_x @ wide_a.T @ wide_b.T
    ops.lora(y, x, a, b, np.arange(T + 1, dtype=np.int32), adapter, rows, device="cuda")
    # One rounding to bfloat16, and v's two halves.
    assert (np.abs(from_bfloat16(y) - want) <= 1.02 * 2.0**-8 * np.abs(want) + 1e-3).all()
    judge_rounded("y", y, want)
