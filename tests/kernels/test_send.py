"""send_out on a GPU: words of the device in pinned host memory, and nothing behind them."""

import pytest
from cpu.test_send import SIZES, check
from helpers.cpu_shim import Shim

pytestmark = [pytest.mark.gpu, pytest.mark.sanitize]


@pytest.mark.parametrize("n_bytes", SIZES)
def test_what_is_sent_arrives_and_nothing_else(path: str, n_bytes: int) -> None:
    with Shim(path) as shim:
        check(shim, n_bytes)
