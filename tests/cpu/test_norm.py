"""norm against Hugging Face's LlamaRMSNorm formula in float64, and the same bits everywhere."""

import numpy as np
import pytest
from cpu.tolerance import assert_close
from helpers.cpu_shim import Shim, from_bf16, isas

SHAPES = [(1, 1), (1, 16), (3, 17), (7, 100), (5, 1024), (64, 333)]


def reference(x: np.ndarray, weight: np.ndarray, eps: float, offset: float) -> np.ndarray:
    x = x.astype(np.float64)
    scale = 1.0 / np.sqrt((x**2).mean(-1, keepdims=True) + np.float64(np.float32(eps)))
    return (offset + weight.astype(np.float64)) * (x * scale)


def case(T: int, H: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(T * 1000 + H)
    x, residual = rng.standard_normal((2, T, H)).astype(np.float32) * 3
    return x, residual, rng.standard_normal(H).astype(np.float32)


@pytest.mark.parametrize(("T", "H"), SHAPES)
@pytest.mark.parametrize(("eps", "offset"), [(1e-5, 0.0), (1e-6, 1.0)])
def test_norm_is_the_formula(isa: str, T: int, H: int, eps: float, offset: float) -> None:
    x, _, weight = case(T, H)
    with Shim(isa) as shim:
        out, kept = shim.norm(x, weight, eps=eps, offset=offset)
    assert_close("norm", from_bf16(out), reference(x, weight, eps, offset))
    assert np.array_equal(kept, x)


@pytest.mark.parametrize(("T", "H"), SHAPES)
def test_residual_is_added_to_x_first(isa: str, T: int, H: int) -> None:
    x, residual, weight = case(T, H)
    with Shim(isa, n_threads=2) as shim:
        out, kept = shim.norm(x, weight, residual=residual)
        none, only_added = shim.norm(x, weight, residual=residual, wants_out=False)
    assert np.array_equal(kept, x + residual)
    assert none is None
    assert np.array_equal(only_added, kept)
    assert_close("norm", from_bf16(out), reference(x + residual, weight, 1e-5, 0.0))


def test_rows_pick_and_leave_the_others_alone(isa: str) -> None:
    x, residual, weight = case(9, 48)
    rows = np.array([0, 4, 8])
    with Shim(isa) as shim:
        out, kept = shim.norm(x, weight, residual=residual, rows=rows)
    want = x.copy()
    want[rows] += residual[rows]
    assert np.array_equal(kept, want)
    assert_close("norm", from_bf16(out), reference(want[rows], weight, 1e-5, 0.0))


@pytest.mark.parametrize(("T", "H"), SHAPES)
def test_bits_depend_on_neither_set_nor_threads_nor_batch(T: int, H: int) -> None:
    x, residual, weight = case(T, H)
    x[0] *= 1e-30  # near what flushes to zero
    residual[0] *= 1e-30
    results = []
    for isa in isas():
        for n_threads in (1, 2):
            with Shim(isa, n_threads) as shim:
                whole, _ = shim.norm(x, weight, residual=residual)
                last, _ = shim.norm(x[-1:], weight, residual=residual[-1:])
            assert np.array_equal(last[0], whole[-1])
            results.append(whole)
    assert all(np.array_equal(r, results[0]) for r in results)
