"""milpy.ops beside torch: its streams, its captures, its current device; and beside the engine.

A wrong stream is made to show: what the op reads is written late, after products that take long.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from helpers.cuda_arrays import DeviceArray, make_stream
from helpers.op_cases import NAMES, Array, Torch, case, near, on_cpu, put

from milpy import _C, LLM, SamplingParams, demo, ops
from milpy.errors import RequestError

pytestmark = pytest.mark.gpu

EPS = 2.0**-8


@pytest.fixture
def library() -> Torch:
    return Torch()


@pytest.fixture
def torch(library: Torch) -> Any:
    return library.torch


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def silu(x: float) -> float:
    """silu_and_mul of a row whose gate and up are x."""
    return x * x / (1 + float(np.exp(-x)))


def is_silu(out: Any, x: float) -> None:
    np.testing.assert_allclose(out.float().cpu(), silu(x), rtol=2 * EPS)


# ---- streams ----


class Late:
    """Twos for silu_and_mul that come late: a stream that does not wait for them reads zeros."""

    def __init__(self, torch: Any, device: str = "cuda") -> None:
        self.big = torch.randn(8192, 8192, device=device)
        self.gate_up = torch.zeros(4, 64, dtype=torch.bfloat16, device=device)
        self.out = torch.empty(4, 32, dtype=torch.bfloat16, device=device)
        self.big @ self.big
        ops.silu_and_mul(self.gate_up, out=self.out)  # what is first about it is over
        torch.cuda.synchronize(device)

    def write(self, value: float = 2.0) -> None:
        """On the current stream."""
        for _ in range(10):
            self.big @ self.big
        self.gate_up.fill_(value)


@pytest.mark.parametrize("has_exchange_api", [True, False])
def test_ops_run_on_torchs_current_stream(
    torch: Any, has_exchange_api: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "__dlpack_c_exchange_api__"
    if has_exchange_api and not hasattr(torch.Tensor, name):
        pytest.skip(f"torch {torch.__version__} has no {name}")
    if not has_exchange_api:
        monkeypatch.delattr(torch.Tensor, name, raising=False)
    late, stream = Late(torch), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late.write()
        ops.silu_and_mul(late.gate_up, out=late.out)
        doubled = late.out * 2
    stream.synchronize()
    is_silu(late.out, 2.0)
    is_silu(doubled / 2, 2.0)


def test_a_stream_that_is_given_is_taken(torch: Any) -> None:
    late, stream = Late(torch), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late.write()
    ops.silu_and_mul(late.gate_up, out=late.out, stream=stream)
    stream.synchronize()
    is_silu(late.out, 2.0)


def test_two_threads_have_a_stream_each(torch: Any) -> None:
    """The streams that torch's threads work on are their own; each reads what it wrote."""
    n_threads = 2
    lates = [Late(torch) for _ in range(n_threads)]
    together = threading.Barrier(n_threads)

    def work(index: int) -> Any:
        late, stream, results = lates[index], torch.cuda.Stream(), []
        together.wait()
        with torch.cuda.stream(stream):
            for turn in range(3):
                late.write(1.0 + index + n_threads * turn)
                ops.silu_and_mul(late.gate_up, out=late.out)
                results.append(late.out.clone())
        stream.synchronize()
        return results

    with ThreadPoolExecutor(n_threads) as pool:
        found = list(pool.map(work, range(n_threads)))
    for index, results in enumerate(found):
        for turn, result in enumerate(results):
            is_silu(result, 1.0 + index + n_threads * turn)


# ---- captures ----


def replays(graph: Any, library: Torch, there: dict[str, Any], name: str, seeds: list[int]) -> None:
    """The graph of a case's op over other arrays, against the CPU."""
    for seed in seeds:
        arrays, written, call = case(name, np.random.default_rng(seed))
        for key, value in arrays.items():
            if isinstance(value, np.ndarray):
                there[key].copy_(library.put(value))
        library.torch.cuda.synchronize()
        graph.replay()
        for key, want in zip(written, on_cpu(arrays, written, call), strict=True):
            near(library.get(there[key]), want)


@pytest.mark.parametrize("name", NAMES)
def test_torch_captures_an_op_in_its_graph(
    library: Torch, torch: Any, name: str, rng: np.random.Generator
) -> None:
    """As torch's notes say it: once on a side stream, then captured on a stream of torch's own."""
    arrays, _, call = case(name, rng)
    there = put(arrays, library.put)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call(**there)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(**there)
    replays(graph, library, there, name, [8, 9])


def test_an_op_between_torchs_in_one_graph(torch: Any) -> None:
    gate_up = torch.zeros(4, 64, dtype=torch.bfloat16, device="cuda")
    out = torch.empty(4, 32, dtype=torch.bfloat16, device="cuda")
    ops.silu_and_mul(gate_up, out=out)
    torch.cuda.synchronize()
    graph, x = torch.cuda.CUDAGraph(), torch.zeros_like(gate_up)
    with torch.cuda.graph(graph):
        gate_up.copy_(x + 1)
        ops.silu_and_mul(gate_up, out=out)
        doubled = out * 2
    for value in (1.0, 2.0):
        x.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        is_silu(doubled / 2, value + 1)


def test_ops_run_in_a_thread_while_torch_captures_in_another(
    library: Torch, torch: Any, rng: np.random.Generator
) -> None:
    """torch captures in global mode: what is unsafe then in any thread would spoil the graph."""
    cases = [case(name, rng) for name in NAMES]
    there = [put(arrays, library.put) for arrays, _, _ in cases]
    others = [make_stream() for _ in range(2)]
    x, stream, graph = torch.ones(1024, device="cuda"), torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def work(other: int) -> None:
        for (_, _, call), arrays in zip(cases, there, strict=True):
            call(**arrays, stream=other)

    work(others[0])
    torch.cuda.synchronize()
    for (arrays, _, _), tensors in zip(cases, there, strict=True):
        for key, value in arrays.items():
            if isinstance(value, np.ndarray):
                tensors[key].copy_(library.put(value))
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool, torch.cuda.graph(graph, stream=stream):
        y = x + 1
        pool.submit(work, others[1]).result()  # a new place: it allocates
        y += 1
    graph.replay()
    torch.cuda.synchronize()
    assert bool((y == 3).all())
    for (arrays, written, call), tensors in zip(cases, there, strict=True):
        for key, want in zip(written, on_cpu(arrays, written, call), strict=True):
            near(library.get(tensors[key]), want)


def test_numpy_arrays_go_to_the_gpu_while_torch_captures_in_another_thread(
    torch: Any, rng: np.random.Generator
) -> None:
    """Memory is taken and given back meanwhile, and the op is waited for."""
    arrays, written, call = case("attention", rng)
    want = on_cpu(arrays, written, call)[0]
    x, graph = torch.ones(1024, device="cuda"), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool, torch.cuda.graph(graph):
        y = x + 1
        pool.submit(lambda: call(**arrays, device="cuda")).result()
        y += 1
    graph.replay()
    torch.cuda.synchronize()
    assert bool((y == 3).all())
    near(arrays["out"], want)


FIRST = """
import sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import torch
from helpers.op_cases import NAMES, Torch, case, near, on_cpu, put

library, graph, stream = Torch(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
cases = [case(name, np.random.default_rng(7)) for name in NAMES]
there = [put(arrays, library.put) for arrays, _, _ in cases]
x = torch.ones(8, device="cuda") + 1
torch.cuda.synchronize()

def work(stream):
    for (_, _, call), arrays in zip(cases, there, strict=True):
        call(**arrays, stream=stream)

with ThreadPoolExecutor(1) as pool, torch.cuda.graph(graph):
    y = x + 1
    if sys.argv[1] == "beside":
        pool.submit(work, stream).result()
    else:
        work(None)
    y += 1
graph.replay()
torch.cuda.synchronize()
assert bool((y == 4).all())
for (arrays, written, call), tensors in zip(cases, there, strict=True):
    for key, want in zip(written, on_cpu(arrays, written, call), strict=True):
        near(library.get(tensors[key]), want)
"""


@pytest.mark.parametrize("where", ["inside", "beside"])
def test_the_first_call_of_a_process_may_meet_a_capture(torch: Any, where: str) -> None:
    """Nothing is loaded, no workspace is there: what a capture forbids is done all the same."""
    arguments = [sys.executable, "-c", FIRST, where]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


LLM_BESIDE = """
from concurrent.futures import ThreadPoolExecutor
import torch
from milpy import LLM, SamplingParams, demo

def answer():
    with LLM(demo.BASE, adapters=demo.ADAPTERS, device="cuda", progress=False,
             kv_cache_bytes=32 << 20) as llm:
        params = SamplingParams(temperature=0, max_tokens=8)
        (output,) = llm.generate([[5, 6, 7]], params, adapter=[next(iter(demo.ADAPTERS))],
                                use_tqdm=False)
        return list(output.outputs[0].token_ids)

x, graph = torch.ones(8, device="cuda") + 1, torch.cuda.CUDAGraph()
torch.cuda.synchronize()
with ThreadPoolExecutor(1) as pool, torch.cuda.graph(graph):
    y = x + 1
    found = pool.submit(answer).result()
    y += 1
graph.replay()
torch.cuda.synchronize()
assert bool((y == 4).all())
assert found == answer(), found
"""


def test_an_llm_is_made_and_answers_while_torch_captures_in_another_thread(torch: Any) -> None:
    """The first of its process: weights are copied, kernels loaded, graphs captured meanwhile."""
    if not demo.BASE.is_dir():
        pytest.skip(f"no demo model in {demo.BASE}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", LLM_BESIDE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


# ---- the current device ----


def test_a_refusal_leaves_the_current_device(torch: Any) -> None:
    device = torch.cuda.current_device()
    with pytest.raises(Exception, match="cuda:99"):
        ops.silu_and_mul(np.ones((2, 16), np.uint16), device="cuda:99")
    assert torch.cuda.current_device() == device


@pytest.mark.multigpu
def test_the_current_device_stays_what_it_was(torch: Any) -> None:
    """And the op ran on the current stream of the device that the arrays lie on."""
    late, stream = Late(torch, "cuda:1"), torch.cuda.Stream("cuda:1")
    with torch.cuda.stream(stream):
        late.write()
        torch.cuda.set_device(0)
        ops.silu_and_mul(late.gate_up, out=late.out)
        assert torch.cuda.current_device() == 0
    torch.cuda.set_device(0)
    stream.synchronize()
    is_silu(late.out, 2.0)
    with pytest.raises(RequestError, match="out lies on cuda:0|gate_up lies on cuda:1"):
        ops.silu_and_mul(late.gate_up, out=late.out.to("cuda:0"))
    assert torch.cuda.current_device() == 0
    assert torch.zeros(1, device="cuda").device.index == 0


@pytest.mark.multigpu
@pytest.mark.parametrize("name", NAMES)
def test_an_op_runs_where_its_arrays_lie(torch: Any, name: str, rng: np.random.Generator) -> None:
    """All that it launches, and its workspace, are the other device's."""
    library = Torch("cuda:1")
    torch.cuda.set_device(0)
    arrays, written, call = case(name, rng)
    want, there = on_cpu(arrays, written, call), put(arrays, library.put)
    call(**there)
    assert torch.cuda.current_device() == 0
    assert torch.zeros(1, device="cuda").device.index == 0
    for key, expected in zip(written, want, strict=True):
        assert there[key].device.index == 1
        near(library.get(there[key]), expected)


@pytest.mark.multigpu
def test_a_stream_of_another_gpu_is_refused(torch: Any) -> None:
    report = _C.gpu_reports()[0]
    oldest = min(report["driver_cuda"], report["build_cuda"])
    if oldest < 12080:
        pytest.skip(f"CUDA {oldest // 1000}.{oldest % 1000 // 10} tells no stream's device")
    x = torch.ones(4, 64, dtype=torch.bfloat16, device="cuda:1")
    out = torch.empty(4, 32, dtype=torch.bfloat16, device="cuda:1")
    stream = torch.cuda.Stream("cuda:0")
    for _ in range(2):  # the first one makes nothing that the second would find
        with pytest.raises(RequestError, match="is of cuda:0, expected one of cuda:1"):
            ops.silu_and_mul(x, out=out, stream=stream)
    ops.silu_and_mul(x, out=out)
    torch.cuda.synchronize("cuda:1")
    is_silu(out, 1.0)


@pytest.mark.multigpu
def test_an_op_that_fails_on_its_device_leaves_the_current_one(torch: Any) -> None:
    V = (1 << 19) + 8  # more than the device's sample takes
    torch.cuda.set_device(0)
    logits = torch.zeros(1, V, device="cuda:1")
    params, positions, out = (
        torch.zeros(shape, dtype=torch.int32, device="cuda:1") for shape in ((1, 6), 1, 1)
    )
    with pytest.raises(RequestError, match="columns is 524296, expected 1 to 524288"):
        ops.sample(logits, params, positions, out=out)
    assert torch.cuda.current_device() == 0


# ---- the engine ----


def rounds_of(
    rng: np.random.Generator,
) -> tuple[list[Callable[[], list[Array]]], list[list[Array]]]:
    """Every op on a stream of its own, as a function that gives its results; the CPU's results."""

    def round_of(name: str) -> tuple[Callable[[], list[Array]], list[Array]]:
        arrays, written, call = case(name, rng)
        there, stream = put(arrays, DeviceArray), make_stream()

        def run() -> list[Array]:
            for key in written:
                there[key].set(arrays[key])
            call(**there, stream=stream)
            return [there[key].get() for key in written]

        return run, on_cpu(arrays, written, call)

    runs, wants = zip(*(round_of(name) for name in NAMES), strict=True)
    return list(runs), list(wants)


def test_the_engine_runs_beside_ops(rng: np.random.Generator) -> None:
    """Both go on until each has seen the other; neither's bits change."""
    if not demo.BASE.is_dir():
        pytest.skip(f"no demo model in {demo.BASE}")
    prompt = demo.format_request(demo.requests()[0]["text"])
    greedy = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    runs, wants = rounds_of(rng)
    first = [run() for run in runs]
    for results, want in zip(first, wants, strict=True):
        for got, expected in zip(results, want, strict=True):
            near(got, expected)

    with LLM(demo.BASE, device="cuda", progress=False, kv_cache_bytes=32 << 20) as llm:

        def answer() -> list[int]:
            output = llm.generate([prompt], greedy, use_tqdm=False)[0]
            return list(output.outputs[0].token_ids)

        alone = answer()
        with ThreadPoolExecutor(1) as pool:
            for _ in range(5):
                beside = pool.submit(answer)
                n_rounds = 0
                while n_rounds == 0 or not beside.done():
                    for run, results in zip(runs, first, strict=True):
                        for got, expected in zip(run(), results, strict=True):
                            assert np.array_equal(got, expected)
                    n_rounds += 1
                assert beside.result() == alone
    assert len(alone) == 64
