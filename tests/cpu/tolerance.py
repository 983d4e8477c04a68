"""The one table of tolerances: how far each op may be from its float64 reference, and why.

An error is judged as |got - want| <= absolute + relative * |want|, elementwise. EPS_BF16 is half a
unit in the last place of bfloat16 (8 bits of significand), EPS_F32 that of float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

EPS_BF16 = 2.0**-8
EPS_F32 = 2.0**-24


class Tolerance(NamedTuple):
    relative: float
    absolute: float


TOLERANCE = {
    # A copy: bfloat16 to float32 and one product by the scale.
    "embed": Tolerance(EPS_F32, 0.0),
    # One rounding to bfloat16 of a float32 result that is off by some EPS_F32.
    "norm": Tolerance(1.02 * EPS_BF16, 1e-30),
    "act": Tolerance(1.02 * EPS_BF16, 1e-30),
    # As act; gate and up are off by the products' chains, K EPS_F32 of magnitudes of some units.
    "gate_up_act": Tolerance(1.02 * EPS_BF16, 1e-4),
    # As norm; a' = a cos - b sin can cancel: float32's error counts against |a| + |b|, <= 8 here.
    "rope": Tolerance(1.02 * EPS_BF16, 8 * 4 * EPS_F32),
    # The result's own rounding, and that of p: each weight is off by up to EPS_BF16 of itself, so
    # the sum by up to EPS_BF16 * max |v| (4 here) were all errors of one sign; they are not: half.
    # The plain formula in bfloat16 has the same two roundings.
    "attention": Tolerance(1.1 * EPS_BF16, 2 * EPS_BF16),
    # log softmax: x - max is off by EPS_F32 of itself, the sum by a few EPS_F32 of its chains.
    "logprob": Tolerance(4 * EPS_F32, 2e-6),
}


def assert_close(op: str, got: NDArray[Any], want: NDArray[Any]) -> None:
    relative, absolute = TOLERANCE[op]
    got = np.asarray(got, np.float64)
    excess = np.abs(got - want) - (absolute + relative * np.abs(want))
    assert np.isfinite(got).all(), f"{op}: found {np.count_nonzero(~np.isfinite(got))} not finite"
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[worst] <= 0, f"{op}: at {worst} found {got[worst]}, expected {want[worst]}"
