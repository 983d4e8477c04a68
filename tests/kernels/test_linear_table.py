"""cuBLASLt's table on a GPU: a number of rows has one algorithm, whatever ran before."""

import numpy as np
import pytest
from helpers.cpu_shim import Shim, bf16
from helpers.linear_shim import Weight

pytestmark = pytest.mark.gpu

# In buckets of several numbers of rows, their ends and what is odd between.
ROWS = (1, 3, 15, 17, 31, 33, 63, 64, 65, 97, 129, 150, 200, 257, 333, 500, 513, 700, 1000)


@pytest.mark.parametrize(("N", "K"), [(200, 1032), (4096, 4096), (6144, 512)])
def test_what_ran_before_changes_no_bits(path: str, N: int, K: int) -> None:
    """An algorithm that refuses some rows of its bucket serves the others all the same."""
    rng = np.random.default_rng(N)
    x, w = (bf16(rng.standard_normal((rows, K), np.float32)) for rows in (max(ROWS), N))
    results = []
    for rows in (ROWS, ROWS[::-1]):
        with Shim(path) as shim:
            weight = Weight(shim, [w])
            results.append({M: weight.linear(x[:M]) for M in rows})
    for M in ROWS:
        assert np.array_equal(results[0][M], results[1][M]), M
