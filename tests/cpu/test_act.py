"""act: silu(gate) * up, in both layouts of gate and up."""

import numpy as np
import pytest
from cpu.tolerance import assert_close
from helpers.cpu_shim import Shim, ShimError, from_bf16, isas


def silu(x: np.ndarray) -> np.ndarray:
    # e^-x may overflow to inf, which is the right limit: x / inf = -0.
    with np.errstate(over="ignore"):
        return x / (1.0 + np.exp(-x))


def merged(gate: np.ndarray, up: np.ndarray, interleave: int) -> np.ndarray:
    if interleave == 0:
        return np.concatenate([gate, up], 1)
    n = len(gate)
    parts = [part.reshape(n, -1, 1, interleave) for part in (gate, up)]
    return np.concatenate(parts, 2).reshape(n, -1)


@pytest.mark.parametrize(
    ("T", "F", "interleave"),
    [(1, 1, 0), (3, 17, 0), (2, 640, 0), (1, 16, 16), (5, 4096, 16), (2, 24, 8), (1, 96, 32)],
)
def test_act_is_the_formula(isa: str, T: int, F: int, interleave: int) -> None:
    rng = np.random.default_rng(F)
    gate, up = rng.standard_normal((2, T, F)).astype(np.float32) * 6
    with Shim(isa, n_threads=2) as shim:
        out = shim.act(merged(gate, up, interleave), interleave)
    assert_close("act", from_bf16(out), silu(gate.astype(np.float64)) * up)


def test_act_over_the_whole_range_of_exp(isa: str) -> None:
    gate = np.linspace(-86, 200, 65536, dtype=np.float32)[None]
    up = np.ones_like(gate)
    with Shim(isa) as shim:
        out = shim.act(merged(gate, up, 0), 0)
        far = shim.act(merged(float(-1000) * up, up, 0), 0)
    assert_close("act", from_bf16(out), silu(gate.astype(np.float64)))
    assert np.abs(from_bf16(far)).max() < 1e-34


def test_nan_stays_nan_and_in_its_place(isa: str) -> None:
    gate = np.ones((1, 33), np.float32)
    gate[0, 20] = np.nan
    with Shim(isa) as shim:
        out = from_bf16(shim.act(merged(gate, gate, 0), 0))
    assert np.flatnonzero(np.isnan(out[0])).tolist() == [20]


def test_bits_depend_on_neither_set_nor_threads() -> None:
    gate_up = np.random.default_rng(3).standard_normal((37, 1024)).astype(np.float32) * 20
    gate_up[0] *= 1e-38
    results = []
    for isa in isas():
        for n_threads in (1, 2):
            with Shim(isa, n_threads) as shim:
                results += [shim.act(gate_up, 16)]
    assert all(np.array_equal(r, results[0]) for r in results)


def test_unknown_kind_is_refused(isa: str) -> None:
    with Shim(isa) as shim, pytest.raises(ShimError, match="act: kind is 3, expected 0"):
        shim.act(np.zeros((1, 2), np.float32), 0, kind=3)
