"""milpy.ops on streams that come and go, and on one of another GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.cuda_arrays import DeviceArray, destroy_stream, make_stream
from helpers.op_cases import Torch, case, near, on_cpu, put

from milpy import ops
from milpy.errors import RequestError

pytestmark = pytest.mark.gpu


def test_streams_that_come_and_go_under_one_handle() -> None:
    """What an op keeps for a stream is not the next one's that has its handle."""
    handles = []
    for seed in range(12):
        arrays, written, call = case("linear", np.random.default_rng(seed))
        there, stream = put(arrays, DeviceArray), make_stream()
        call(**there, stream=stream)
        destroy_stream(stream)  # its work may not have ended
        handles.append(stream)
        for key, want in zip(written, on_cpu(arrays, written, call), strict=True):
            near(there[key].get(), want)
    assert len(set(handles)) < len(handles), "no handle came twice: nothing was tested"


@pytest.mark.multigpu
def test_a_stream_of_another_gpu_is_refused() -> None:
    torch: Any = Torch().torch
    x = torch.ones(4, 64, dtype=torch.bfloat16, device="cuda:1")
    out = torch.empty(4, 32, dtype=torch.bfloat16, device="cuda:1")
    stream = torch.cuda.Stream("cuda:0")
    for _ in range(2):  # the first one makes nothing that the second would find
        with pytest.raises(RequestError, match="is of cuda:0, expected one of cuda:1"):
            ops.silu_and_mul(x, out=out, stream=stream)
    ops.silu_and_mul(x, out=out)
    torch.cuda.synchronize("cuda:1")
