"""linear and packing, against float64 and the layout that weight.h writes down."""

import ml_dtypes
import numpy as np
import pytest
from helpers.cpu_shim import Shim, bf16, from_bf16, isas
from helpers.linear_shim import Weight

SHAPES = [(1, 1, 1), (1, 32, 2), (3, 33, 37), (8, 96, 512), (13, 64, 513), (16, 70, 1100)]


def chain_bound(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What K roundings of one float32 chain may sum up to: K/2 ulp of the sum of magnitudes."""
    return (x.shape[1] + 2) * 2.0**-24 * (np.abs(x) @ np.abs(w).T) + 1e-37


@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_linear_is_the_product(isa: str, M: int, N: int, K: int) -> None:
    rng = np.random.default_rng(N * K)
    x, w = bf16(rng.standard_normal((M, K))), bf16(rng.standard_normal((N, K)))
    with Shim(isa, n_threads=2, max_tokens=M, hidden=K) as shim:
        y = Weight(shim, [w]).linear(x)
    want = from_bf16(x) @ from_bf16(w).T
    assert (np.abs(y - want) <= chain_bound(from_bf16(x), from_bf16(w))).all()


def test_rows_may_be_wider_than_the_product(isa: str) -> None:
    rng = np.random.default_rng(5)
    x, w = bf16(rng.standard_normal((5, 40))), bf16(rng.standard_normal((33, 40)))
    with Shim(isa) as shim:
        weight = Weight(shim, [w])
        plain, wide = weight.linear(x), weight.linear(x, ldx=48, ldy=50)
    assert np.array_equal(wide[:, :33], plain)
    assert (wide[:, 33:] == 12345.0).all()


def test_bias_is_added_after_the_chain(isa: str) -> None:
    rng = np.random.default_rng(6)
    x, w = bf16(rng.standard_normal((4, 64))), bf16(rng.standard_normal((50, 64)))
    bias = rng.standard_normal(50).astype(np.float32)
    with Shim(isa) as shim:
        without, with_bias = Weight(shim, [w]).linear(x), Weight(shim, [w], bias=bias).linear(x)
    assert np.array_equal(with_bias, without + bias)


@pytest.mark.parametrize("interleave", [0, 16])
def test_parts_lie_where_the_header_says(isa: str, interleave: int) -> None:
    rng = np.random.default_rng(7)
    x = bf16(rng.standard_normal((2, 24)))
    parts = [bf16(rng.standard_normal((48, 24))) for _ in range(2)]
    with Shim(isa) as shim:
        weight = Weight(shim, parts, interleave)
        y, stacked = weight.linear(x), Weight(shim, [np.concatenate(parts)]).linear(x)
    assert np.array_equal(y, stacked[:, weight.order()])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_packing_rounds_to_nearest_even(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(8)
    values = rng.standard_normal((50, 70)).astype(dtype) * 10
    values[0, :4] = [np.inf, -np.inf, 0.0, -0.0]
    values[1, :4] = np.array([6e-8, -6e-5, 1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8], dtype)
    rounded = values.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    with Shim(isa) as shim:
        assert np.array_equal(Weight(shim, [values]).panels, Weight(shim, [rounded]).panels)


def test_nan_in_a_weight_stays_a_nan(isa: str) -> None:
    values = np.zeros((32, 32), np.float32)
    values[7, 3] = np.nan
    with Shim(isa) as shim:
        y = Weight(shim, [values]).linear(bf16(np.ones((1, 32))))
    assert np.flatnonzero(np.isnan(y[0])).tolist() == [7]


def test_bits_depend_on_neither_set_threads_nor_batch() -> None:
    rng = np.random.default_rng(9)
    x, w = bf16(rng.standard_normal((40, 700))), bf16(rng.standard_normal((96, 700)))
    results = []
    for isa in isas():
        for n_threads in (1, 2):
            with Shim(isa, n_threads, max_tokens=64, hidden=700) as shim:
                weight = Weight(shim, [w])
                whole = weight.linear(x)
                assert all(
                    np.array_equal(weight.linear(x[i : i + n])[0], whole[i])
                    for i, n in ((0, 1), (3, 5), (7, 13), (9, 26))
                )
                results.append(whole)
    assert all(np.array_equal(r, results[0]) for r in results)
