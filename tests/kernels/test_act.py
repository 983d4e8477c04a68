"""act on a GPU: silu(gate) * up, whatever the layout of gate and up."""

from __future__ import annotations

import numpy as np
import pytest
from cpu.tolerance import assert_close
from helpers.cpu_shim import Array, Shim, ShimError, bf16, from_bf16
from helpers.marks import small
from kernels.judge import judge_rounded

pytestmark = pytest.mark.gpu

SHAPES = [
    (1, 8, 8), (3, 24, 8), small(7, 640, 8), (5, 4104, 8), (65, 14336, 8),
    (1, 1, 0), small(3, 17, 0), (2, 640, 0), (1, 16, 16), (1, 96, 32), (33, 1001, 0),
]  # fmt: skip


def silu(x: Array) -> Array:
    # e^-x may overflow to inf, which is the right limit: x / inf = -0.
    with np.errstate(over="ignore"):
        return x / (1.0 + np.exp(-x))


def merged(gate: Array, up: Array, interleave: int) -> Array:
    if interleave == 0:
        return np.concatenate([gate, up], 1)
    n = len(gate)
    parts = [part.reshape(n, -1, 1, interleave) for part in (gate, up)]
    return np.concatenate(parts, 2).reshape(n, -1)


def held(x: Array) -> Array:
    """As the products hold it: what the op is given, exactly."""
    return from_bf16(bf16(x)).astype(np.float32)


def assert_act(out: Array, want: Array) -> None:
    """Each element by itself, and all of them as the plain formula."""
    assert_close("act", from_bf16(out), want)
    judge_rounded("act", out, want)


@pytest.mark.parametrize(("T", "F", "interleave"), SHAPES)
@pytest.mark.parametrize("captured", [False, True])
def test_act_is_the_formula(path: str, T: int, F: int, interleave: int, captured: bool) -> None:
    rng = np.random.default_rng(F)
    gate, up = held(rng.standard_normal((2, T, F)) * 6)
    with Shim(path, captured=captured) as shim:
        out = shim.act(merged(gate, up, interleave), interleave)
    assert_act(out, silu(gate.astype(np.float64)) * up)


@pytest.mark.parametrize("interleave", [0, 8])
def test_act_over_the_whole_range_of_exp(path: str, interleave: int) -> None:
    """Every bfloat16 from -86 to 200, and one far below."""
    bits = np.arange(65536, dtype=np.uint32)
    values = from_bf16(bits[bits & 0x7F80 != 0x7F80].astype(np.uint16))
    gate = values[(values >= -86) & (values <= 200)].astype(np.float32)
    gate = np.resize(gate, (1, len(gate) // 8 * 8))
    up = np.ones_like(gate)
    with Shim(path) as shim:
        out = shim.act(merged(gate, up, interleave), interleave)
        far = shim.act(merged(float(-1000) * up, up, interleave), interleave)
    assert_act(out, silu(gate.astype(np.float64)))
    assert np.abs(from_bf16(far)).max() < 1e-34


@pytest.mark.parametrize(("F", "interleave", "at"), [(33, 0, 20), (32, 8, 20), (32, 8, 13)])
def test_nan_stays_nan_and_in_its_place(path: str, F: int, interleave: int, at: int) -> None:
    ones = np.ones((1, F), np.float32)
    spoilt = ones.copy()
    spoilt[0, at] = np.nan
    with Shim(path) as shim:
        of_gate = from_bf16(shim.act(merged(spoilt, ones, interleave), interleave))
        of_up = from_bf16(shim.act(merged(ones, spoilt, interleave), interleave))
    assert np.flatnonzero(np.isnan(of_gate[0])).tolist() == [at]
    assert np.flatnonzero(np.isnan(of_up[0])).tolist() == [at]


def test_bits_do_not_depend_on_the_batch(path: str) -> None:
    gate_up = np.random.default_rng(3).standard_normal((37, 1040), np.float32) * 20
    with Shim(path) as shim:
        whole = shim.act(gate_up, 8)
        alone = shim.act(gate_up[21:22], 8)
    assert np.array_equal(alone[0], whole[21])


@pytest.mark.parametrize("interleave", [0, 8])
def test_no_rows_is_no_work(path: str, interleave: int) -> None:
    with Shim(path) as shim:
        assert shim.act(np.empty((0, 64), np.float32), interleave).shape == (0, 32)


def test_unknown_kind_is_refused(path: str) -> None:
    with Shim(path) as shim, pytest.raises(ShimError, match="act: kind is 3, expected 0"):
        shim.act(np.zeros((1, 2), np.float32), 0, kind=3)
