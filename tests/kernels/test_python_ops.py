"""milpy.ops on a GPU: in place on the arrays of any DLPack library, and copied for NumPy's.

The results of an op are judged elsewhere; here the CPU's are near enough, and places, streams,
graphs and threads are what is tried.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import logprobs
from helpers.cuda_arrays import DeviceArray, capture, make_stream, synchronize
from helpers.dlpack import READ_ONLY, OldProducer, exchange_api
from helpers.marks import small
from helpers.op_cases import (
    NAMES,
    Array,
    Cupy,
    Driver,
    Torch,
    case,
    copied,
    near,
    normal,
    on_cpu,
    put,
)

from milpy import _C, ops
from milpy.errors import RequestError
from milpy.ops import bfloat16, from_bfloat16

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture(params=[small(Driver), Torch, Cupy])
def library(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.mark.parametrize("name", NAMES)
def test_an_op_works_in_place(library: Any, name: str, rng: np.random.Generator) -> None:
    arrays, written, call = case(name, rng)
    want = on_cpu(arrays, written, call)
    there = put(arrays, library.put)
    result = call(**there)
    first = result[0] if isinstance(result, tuple) else result
    assert first is there["out" if "out" in there else "y"]
    for key, expected in zip(written, want, strict=True):
        near(library.get(there[key]), expected)


class OldArray(OldProducer, DeviceArray):
    """As a library from before DLPack 1.0 gives it."""


def test_an_array_of_an_old_library_is_used_in_place(rng: np.random.Generator) -> None:
    arrays, written, call = case("attention", rng)
    there = put(arrays, OldArray)
    call(**there)
    near(there["out"].get(), on_cpu(arrays, written, call)[0])
    assert [x.n_deleted for x in there.values()] == [1] * len(there)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_numpy_arrays_are_copied_there_and_back(
    name: str, device: str, rng: np.random.Generator
) -> None:
    arrays, written, call = case(name, rng)
    want = on_cpu(arrays, written, call)
    here = copied(arrays)
    call(**here, device=device)
    for key, expected in zip(written, want, strict=True):
        near(here[key], expected)


def test_float32_of_a_product_is_for_the_cpu_alone() -> None:
    gate_up = np.ones((2, 16), np.float32)
    with pytest.raises(RequestError, match="gate_up is float32 .*, expected bfloat16"):
        ops.silu_and_mul(gate_up, device="cuda")
    with pytest.raises(RequestError, match="gate_up is float32 .*, expected bfloat16"):
        ops.silu_and_mul(DeviceArray(gate_up), out=DeviceArray(np.zeros((2, 8), np.uint16)))


# ---- logprobs ----


@pytest.mark.parametrize("made", [Driver, Torch, Cupy])
@pytest.mark.parametrize("vocab", logprobs.VOCABS)
@pytest.mark.parametrize("columns", [0, 3, 20])
def test_logprobs_are_those_of_log_softmax(made: Any, vocab: int, columns: int) -> None:
    library = made()
    logits, params = logprobs.rows_of(vocab)
    n = len(params)
    written = [np.full(n, 99, dtype) for dtype in (np.int32, np.float32, np.int32)]
    written += [np.full((n, columns), 99, dtype) for dtype in (np.int32, np.float32)]
    out, *more = map(library.put, written)
    names = ["logprobs", "ranks", "top_tokens", "top_logprobs"]
    given = [library.put(x) for x in (logits, params, np.zeros(n, np.int32))]
    got = ops.sample_logprobs(*given, out=out, **dict(zip(names, more, strict=True)))
    assert all(a is b for a, b in zip(got, [out, *more], strict=True))
    logprobs.check(logits, logprobs.ASKED, [library.get(x) for x in got])


def test_logprobs_of_numpy_arrays_come_from_the_gpu() -> None:
    logits, params = logprobs.rows_of(1000)
    got = ops.sample_logprobs(logits, params, device="cuda")
    assert got.tokens.tolist() == ops.sample(logits, params, device="cuda").tolist()
    logprobs.check(logits, logprobs.ASKED, list(got))
    params = ops.sampling_params(2)
    params[1, 3] = 21  # n_logprobs: a host's are looked at before they are copied
    with pytest.raises(RequestError, match="row 1 of params has n_logprobs 21, expected -1 to 20"):
        ops.sample(logits[:2], params, device="cuda")


# ---- refusals ----


def test_a_slice_off_by_one_element_is_refused(library: Any) -> None:
    flat = library.put(np.ones(17, np.uint16)) if not isinstance(library, Driver) else None
    x = (
        DeviceArray(np.ones((1, 16), np.uint16), offset=2)
        if flat is None
        else flat[1:].reshape(1, 16)
    )
    out = library.put(np.zeros((1, 8), np.uint16))
    with pytest.raises(RequestError, match="gate_up begins 2 bytes past a multiple of 16"):
        ops.silu_and_mul(x, out=out)


def test_what_is_written_must_be_writable_and_given() -> None:
    gate_up = DeviceArray(np.ones((2, 16), np.uint16), flags=READ_ONLY)
    out = DeviceArray(np.zeros((2, 8), np.uint16))
    assert ops.silu_and_mul(gate_up, out=out) is out
    with pytest.raises(RequestError, match="out is read-only, expected a writable array"):
        ops.silu_and_mul(gate_up, out=DeviceArray(np.zeros((2, 8), np.uint16), flags=READ_ONLY))
    with pytest.raises(RequestError, match="out is None, expected an array"):
        ops.silu_and_mul(gate_up)
    with pytest.raises(RequestError, match="out lies on cpu:0|lies on cuda:0, expected cpu:0"):
        ops.silu_and_mul(gate_up, out=np.zeros((2, 8), np.uint16))
    assert gate_up.n_deleted == 3


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(Exception, match="cuda:99: found .* expected cuda:0"):
        ops.silu_and_mul(np.ones((2, 16), np.uint16), device="cuda:99")


WITHOUT_CUBLASLT = """
import numpy as np
from milpy import ops
x = ops.bfloat16(np.ones((8, 64), np.float32))
ops.rms_norm(np.ones((8, 64), np.float32), np.ones(64, np.float32), 1e-5, device="cuda")
print(ops.linear(x, x, deterministic=True, device="cuda")[0, 0])
ops.linear(x, x, device="cuda")
"""


def test_only_a_product_that_needs_cublaslt_asks_for_it() -> None:
    """In a process of its own: this one's queues have it."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_CUBLASLT],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "MILPY_CUBLASLT": "/nonexistent/lt.so",
        },
        capture_output=True,
        text=True,
    )
    assert done.stdout == "64.0\n", done.stderr
    last = done.stderr.splitlines()[-1]
    assert "EngineError" in last and 'MILPY_CUBLASLT is "/nonexistent/lt.so"' in last


def test_a_vocabulary_beyond_the_devices_is_refused() -> None:
    logits = np.zeros((1, (1 << 19) + 1), np.float32)
    with pytest.raises(RequestError, match="logits' columns is 524289, expected 1 to 524288"):
        ops.sample(logits, ops.sampling_params(1), device="cuda")


def test_a_rank_that_needs_padding_is_refused(rng: np.random.Generator) -> None:
    arrays, _, call = case("lora", rng)
    arrays |= {"a": arrays["a"][:, :12].copy(), "b": arrays["b"][:, :, :12].copy()}
    with pytest.raises(RequestError, match="the rank is 12, expected a multiple of 8"):
        call(**put(arrays, DeviceArray))


# ---- streams, graphs, threads ----


@pytest.mark.parametrize("name", NAMES)
def test_a_captured_op_replays_over_new_content(name: str, rng: np.random.Generator) -> None:
    arrays, written, call = case(name, rng)
    stream = make_stream()
    there = put(arrays, DeviceArray)
    call(**there, stream=stream)  # loads, sizes and chooses
    synchronize()
    calls = _C.memory_calls()
    launch = capture(stream, lambda: call(**there, stream=stream))
    assert _C.memory_calls() == calls
    other, _, _ = case(name, np.random.default_rng(8))
    for content in (other, arrays):
        for key, value in content.items():
            if isinstance(value, np.ndarray):
                there[key].set(value)
        launch()
        for key, expected in zip(written, on_cpu(content, written, call), strict=True):
            near(there[key].get(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_larger_shapes_leave_a_graph_whole(name: str, rng: np.random.Generator) -> None:
    """Scratch that grows after a capture must not move under it."""
    arrays, written, call = case(name, rng)
    stream = make_stream()
    there = put(arrays, DeviceArray)
    call(**there, stream=stream)
    launch = capture(stream, lambda: call(**there, stream=stream))
    logits = DeviceArray(normal(rng, 300, 32_000))
    params = DeviceArray(ops.sampling_params(300))
    tokens = DeviceArray(np.zeros(300, np.int32))
    ops.sample(logits, params, DeviceArray(np.zeros(300, np.int32)), out=tokens, stream=stream)
    synchronize()
    for key, value in arrays.items():
        if isinstance(value, np.ndarray):
            there[key].set(value)
    launch()
    for key, expected in zip(written, on_cpu(arrays, written, call), strict=True):
        near(there[key].get(), expected)


def test_an_op_runs_on_the_stream_that_its_arrays_type_tells() -> None:
    """What was queued there tells it: a capture holds the op, and nothing has run."""
    stream = make_stream()

    class Telling(DeviceArray):
        __dlpack_c_exchange_api__ = exchange_api(lambda kind, ordinal: stream)

    gate_up = Telling(bfloat16(np.ones((2, 16), np.float32)))
    out = Telling(np.zeros((2, 8), np.uint16))
    ops.silu_and_mul(gate_up, out=out)
    synchronize()
    out.set(np.zeros((2, 8), np.uint16))
    launch = capture(stream, lambda: ops.silu_and_mul(gate_up, out=out))
    assert not out.get().any()
    launch()
    np.testing.assert_allclose(from_bfloat16(out.get()), 1 / (1 + np.exp(-1.0)), rtol=2**-7)


@pytest.mark.parametrize("share_a_stream", [False, True])
def test_threads_do_not_disturb_each_other(share_a_stream: bool, rng: np.random.Generator) -> None:
    """Products, LoRA and attention from four threads, their workspaces shared or not."""
    shared = make_stream()
    names = ["linear", "lora", "attention", "sample"]
    cases = [case(name, rng) for name in names]

    def work(index: int) -> list[list[Array]]:
        arrays, written, call = cases[index]
        stream = shared if share_a_stream else make_stream()
        runs = []
        for _ in range(20):
            there = put(arrays, DeviceArray)
            call(**there, stream=stream)
            runs.append([there[key].get() for key in written])
        return runs

    with ThreadPoolExecutor(len(names)) as pool:
        found = list(pool.map(work, range(len(names))))
    for (arrays, written, call), runs in zip(cases, found, strict=True):
        want = on_cpu(arrays, written, call)
        for run in runs:
            for got, first, expected in zip(run, runs[0], want, strict=True):
                assert np.array_equal(got, first)
                near(got, expected)
