"""send_out: bytes of the device in host memory, and nothing behind them."""

import numpy as np
import pytest
from helpers.cpu_shim import Shim, isas

# Nothing, a word, a block of the GPU's kernel, a word more, and many blocks with a tail.
SIZES = [0, 4, 1024, 1028, (1 << 20) + 12]


def check(shim: Shim, n_bytes: int) -> None:
    sent = np.random.default_rng(n_bytes).integers(0, 256, n_bytes, np.uint8)
    before = np.full(n_bytes + 256, 0xA5, np.uint8)
    after = shim.send_out(sent, before)
    assert np.array_equal(after[:n_bytes], sent)
    assert np.array_equal(after[n_bytes:], before[n_bytes:]), "wrote behind what was sent"


@pytest.mark.parametrize("n_bytes", SIZES)
def test_what_is_sent_arrives_and_nothing_else(n_bytes: int) -> None:
    with Shim(isas()[0]) as shim:
        check(shim, n_bytes)
