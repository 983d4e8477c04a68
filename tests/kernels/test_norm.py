"""norm on a GPU against LlamaRMSNorm's formula in float64; a row's bits are its own alone."""

from __future__ import annotations

import numpy as np
import pytest
from cpu.tolerance import assert_close
from helpers.cpu_shim import Array, Shim, bf16, from_bf16
from helpers.marks import small
from kernels.judge import judge_rounded

pytestmark = pytest.mark.gpu

# H that no vector divides; one vector; one warp and its edges; where threads take four vectors, not
# all of them whole; the longest row in registers and the first that is not.
SHAPES = [
    (1, 1), small(3, 17), (64, 333), (2, 4), small(7, 100), (5, 128), (5, 132), (3, 1024),
    small(3, 1028),    (300, 4096), (2, 5120), (3, 8200), (2, 16384), (2, 16388), (1, 20001),
]  # fmt: skip


def reference(x: Array, weight: Array, eps: float, offset: float) -> Array:
    x = x.astype(np.float64)
    scale = 1.0 / np.sqrt((x**2).mean(-1, keepdims=True) + np.float64(np.float32(eps)))
    return (offset + weight.astype(np.float64)) * (x * scale)


def assert_norm(out: Array | None, want: Array) -> None:
    """Each element by itself, and all of them as the plain formula."""
    assert out is not None
    assert_close("norm", from_bf16(out), want)
    judge_rounded("norm", out, want)


def case(T: int, H: int) -> tuple[Array, Array, Array]:
    """x, a residual that bfloat16 holds, and a weight."""
    rng = np.random.default_rng([T, H])
    x, residual = rng.standard_normal((2, T, H)).astype(np.float32) * 3
    return x, from_bf16(bf16(residual)).astype(np.float32), rng.standard_normal(H, np.float32)


@pytest.mark.parametrize(("T", "H"), SHAPES)
@pytest.mark.parametrize(("eps", "offset"), [(1e-5, 0.0), (1e-6, 1.0)])
def test_norm_is_the_formula(path: str, T: int, H: int, eps: float, offset: float) -> None:
    x, _, weight = case(T, H)
    with Shim(path) as shim:
        out, kept = shim.norm(x, weight, eps=eps, offset=offset)
    assert_norm(out, reference(x, weight, eps, offset))
    assert np.array_equal(kept, x)


@pytest.mark.parametrize(("T", "H"), SHAPES)
@pytest.mark.parametrize("captured", [False, True])
def test_residual_is_added_to_x_first(path: str, T: int, H: int, captured: bool) -> None:
    x, residual, weight = case(T, H)
    with Shim(path, captured=captured) as shim:
        out, kept = shim.norm(x, weight, residual=residual)
        none, only_added = shim.norm(x, weight, residual=residual, wants_out=False)
    assert np.array_equal(kept, x + residual)
    assert none is None
    assert np.array_equal(only_added, kept)
    assert_norm(out, reference(x + residual, weight, 1e-5, 0.0))


@pytest.mark.parametrize("H", [33, 4096])
def test_no_rows_is_no_work(path: str, H: int) -> None:
    x, residual, weight = case(3, H)
    with Shim(path) as shim:
        out, _ = shim.norm(x[:0], weight, residual=residual[:0])
        none, kept = shim.norm(x, weight, residual=residual, rows=np.empty(0))
    assert out is not None and none is not None
    assert out.shape == none.shape == (0, H)
    assert np.array_equal(kept, x)


@pytest.mark.parametrize("H", [33, 48, 4096])
def test_rows_pick_and_leave_the_others_alone(path: str, H: int) -> None:
    x, residual, weight = case(9, H)
    rows = np.array([0, 4, 8])
    with Shim(path) as shim:
        out, kept = shim.norm(x, weight, residual=residual, rows=rows)
    want = x.copy()
    want[rows] += residual[rows]
    assert np.array_equal(kept, want)
    assert_norm(out, reference(want[rows], weight, 1e-5, 0.0))


@pytest.mark.parametrize("H", [33, 4096])
@pytest.mark.parametrize("rows", [small([0, 2, 5]), [3], [1, 5]])
def test_padding_rows_add_no_residual_again(path: str, H: int, rows: list[int]) -> None:
    """A bucket's rows past the count are 0 in the plan; row 0 may be wanted as well."""
    x, residual, weight = case(6, H)
    padded = np.array([*rows, *[0] * 29])
    with Shim(path) as shim:
        alone, want = shim.norm(x, weight, residual=residual, rows=np.array(rows))
        out, kept = shim.norm(x, weight, residual=residual, rows=padded)
    assert alone is not None and out is not None
    assert np.array_equal(out[: len(rows)], alone)
    assert np.array_equal(kept, want)


@pytest.mark.parametrize(("T", "H"), [(64, 333), (300, 1024), (300, 4096), (20, 16384)])
def test_bits_do_not_depend_on_the_batch(path: str, T: int, H: int) -> None:
    x, residual, weight = case(T, H)
    x[0], residual[0] = x[0] * 1e-30, 0  # its squares are under the smallest float
    with Shim(path) as shim:
        whole, _ = shim.norm(x, weight, residual=residual)
        again, _ = shim.norm(x, weight, residual=residual)
        assert whole is not None and np.array_equal(whole, again)
        for row in (0, T // 2, T - 1):
            alone, _ = shim.norm(x[row : row + 1], weight, residual=residual[row : row + 1])
            assert alone is not None and np.array_equal(alone[0], whole[row])


@pytest.mark.parametrize("H", [33, 128, 4096])
def test_a_row_that_is_not_finite_spoils_no_other(path: str, H: int) -> None:
    x, _, weight = case(5, H)
    x[1, H // 2], x[3, 0] = np.nan, np.inf
    with Shim(path) as shim:
        out, _ = shim.norm(x, weight)
    assert out is not None
    good = [0, 2, 4]
    assert np.isnan(from_bf16(out)[1]).all()
    assert_norm(out[good], reference(x[good], weight, 1e-5, 0.0))
