"""milpy.ops on a GPU: in place on the arrays of any DLPack library, and copied for NumPy's.

The results of an op are judged elsewhere; here the CPU's are near enough, and places, streams,
graphs and threads are what is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from helpers.cuda_arrays import READ_ONLY, DeviceArray, capture, make_stream, synchronize
from numpy.typing import NDArray

from milpy import _C, ops
from milpy.errors import RequestError
from milpy.ops import bfloat16, from_bfloat16

pytestmark = pytest.mark.gpu

Array = NDArray[Any]
EPS = 2.0**-8


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def int32(*values: int) -> Array:
    return np.array(values, np.int32)


def near(got: Array, want: Array) -> None:
    """Both may be bits of bfloat16; two roundings apart, sums a little more."""
    wide = [from_bfloat16(x) if x.dtype == np.uint16 else x for x in (got, want)]
    np.testing.assert_allclose(wide[0], wide[1], rtol=3 * EPS, atol=2e-2)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


# ---- every op: (arrays by name, the written ones, the call) ----

Case = tuple[dict[str, Any], list[str], Callable[..., Any]]


def batch(rng: np.random.Generator, K: int, P: int, D: int) -> dict[str, Array]:
    return {
        "k_cache": bfloat16(normal(rng, 8, K, P, D)),
        "v_cache": bfloat16(normal(rng, 8, K, P, D)),
        "page_table": rng.permutation(8).astype(np.int32)[:6].reshape(2, 3),
        "query_indptr": int32(0, 1, 6),
        "kv_lengths": int32(2 * P + 3, P + 5),
    }


def case(name: str, rng: np.random.Generator) -> Case:
    T, H, F, N, K, P, D, V = 6, 256, 64, 4, 2, 64, 64, 1000
    segments = {
        "segment_indptr": int32(0, 2, 5),
        "segment_adapter": int32(1, 0),
        "rows": int32(4, 0, 1, 5, 2),
        "scale": normal(rng, 2),
    }
    x, a, b = (bfloat16(normal(rng, *s)) for s in [(T, 2048), (2, 16, 2048), (2, H, 16)])
    cos, sin = ops.rope_tables(512, D)
    angles = {"positions": np.arange(T, dtype=np.int32), "cos": cos, "sin": sin}
    bits = np.uint16
    cases: dict[str, Case] = {
        "rms_norm": (
            {"x": normal(rng, T, H), "weight": normal(rng, H), "eps": 1e-5,
             "residual": bfloat16(normal(rng, T, H)), "out": np.zeros((T, H), bits)},
            ["x", "out"], ops.rms_norm),
        "silu_and_mul": (
            {"gate_up": bfloat16(normal(rng, T, 2 * F)), "interleave": 8,
             "out": np.zeros((T, F), bits)}, ["out"], ops.silu_and_mul),
        "linear": (
            {"x": x, "weight": bfloat16(normal(rng, H, 2048) / 40), "bias": normal(rng, H),
             "out": np.zeros((T, H), np.float32)}, ["out"], ops.linear),
        "linear_bf16": (
            {"x": x, "weight": bfloat16(normal(rng, H, 2048) / 40),
             "out": np.zeros((T, H), bits), "deterministic": True}, ["out"], ops.linear),
        "embedding": (
            {"tokens": int32(5, -1, V, 0), "weight": bfloat16(normal(rng, V, H)),
             "out": np.zeros((4, H), np.float32)}, ["out"], ops.embedding),
        "sample": (
            {"logits": normal(rng, T, V), "params": ops.sampling_params(T, top_k=3),
             "positions": np.zeros(T, np.int32), "out": np.zeros(T, np.int32)},
            ["out"], ops.sample),
        "rope": (
            {"x": bfloat16(normal(rng, T, N, D)), **angles, "out": np.zeros((T, N, D), bits)},
            ["out"], ops.rope),
        "rope_and_cache": (
            {"qkv": bfloat16(normal(rng, T, (N + 2 * K) * D)), **angles, **batch(rng, K, P, D),
             "out": np.zeros((T, N, D), bits)}, ["out", "k_cache", "v_cache"], ops.rope_and_cache),
        "attention": (
            {"q": bfloat16(normal(rng, T, N, D)), **batch(rng, K, P, D),
             "out": np.zeros((T, N, D), bits)}, ["out"], ops.attention),
        "lora": (
            {"y": bfloat16(normal(rng, T, H)), "x": x, "a": bfloat16(from_bfloat16(a) / 40), "b": b,
             **segments}, ["y"], ops.lora),
        "lora_shrink": (
            {"x": x, "a": bfloat16(from_bfloat16(a) / 40), **segments,
             "out": np.zeros((5, 16), np.float32)}, ["out"], ops.lora_shrink),
        "lora_expand": (
            {"y": bfloat16(normal(rng, T, H)), "v": normal(rng, 5, 16), "b": b,
             **{k: v for k, v in segments.items() if k != "scale"}}, ["y"], ops.lora_expand),
    }  # fmt: skip
    return cases[name]


NAMES = (
    "rms_norm silu_and_mul linear linear_bf16 embedding sample rope rope_and_cache attention "
    "lora lora_shrink lora_expand"
).split()


def copied(arrays: dict[str, Any]) -> dict[str, Any]:
    return {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in arrays.items()}


def on_cpu(arrays: dict[str, Any], written: list[str], call: Callable[..., Any]) -> list[Array]:
    arrays = copied(arrays)
    call(**arrays)
    return [arrays[name] for name in written]


def put(arrays: dict[str, Any], make: Callable[[Array], Any]) -> dict[str, Any]:
    return {k: make(v) if isinstance(v, np.ndarray) else v for k, v in arrays.items()}


# ---- libraries ----


class Driver:
    put = DeviceArray

    @staticmethod
    def get(x: DeviceArray) -> Array:
        return x.get()


class Torch:
    def __init__(self) -> None:
        self.torch = pytest.importorskip("torch")
        if not self.torch.cuda.is_available():
            pytest.skip("this torch has no CUDA")

    def put(self, x: Array) -> Any:
        if x.dtype == np.uint16:
            return self.torch.from_numpy(x.view(np.int16)).view(self.torch.bfloat16).cuda()
        return self.torch.from_numpy(x).cuda()

    def get(self, x: Any) -> Array:
        self.torch.cuda.synchronize()
        if x.dtype == self.torch.bfloat16:
            return np.asarray(x.view(self.torch.int16).cpu().numpy().view(np.uint16))
        return np.asarray(x.cpu().numpy())


class Cupy:
    def __init__(self) -> None:
        self.cupy = pytest.importorskip("cupy")

    def put(self, x: Array) -> Any:
        return self.cupy.asarray(x)

    def get(self, x: Any) -> Array:
        synchronize()
        return np.asarray(self.cupy.asnumpy(x))


@pytest.fixture(params=[Driver, Torch, Cupy])
def library(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.mark.parametrize("name", NAMES)
def test_an_op_works_in_place(library: Any, name: str, rng: np.random.Generator) -> None:
    arrays, written, call = case(name, rng)
    want = on_cpu(arrays, written, call)
    there = put(arrays, library.put)
    result = call(**there)
    assert result is there["out" if "out" in there else "y"]
    for key, expected in zip(written, want, strict=True):
        near(library.get(there[key]), expected)


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


# ---- torch ----


@pytest.fixture
def torch() -> Iterator[Any]:
    yield Torch().torch


def test_ops_run_on_torchs_current_stream(torch: Any) -> None:
    """A long product ahead on a non-blocking stream: another stream's op would read zeros."""
    stream = torch.cuda.Stream()
    big = torch.randn(8192, 8192, device="cuda")
    gate_up = torch.zeros(4, 64, dtype=torch.bfloat16, device="cuda")
    out = torch.empty(4, 32, dtype=torch.bfloat16, device="cuda")
    ops.silu_and_mul(gate_up, out=out)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(10):
            big @ big
        gate_up.fill_(2.0)
        ops.silu_and_mul(gate_up, out=out)
        doubled = out * 2
    stream.synchronize()
    want = 4 / (1 + np.exp(-2.0))
    np.testing.assert_allclose(out.float().cpu(), want, rtol=2 * EPS)
    np.testing.assert_allclose(doubled.float().cpu(), 2 * want, rtol=2 * EPS)


def test_torch_captures_ops_in_its_graph(torch: Any, rng: np.random.Generator) -> None:
    arrays, written, call = case("attention", rng)
    library = Torch()
    there = put(arrays, library.put)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call(**there)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call(**there)
        doubled = there["out"] * 2
    there["out"].zero_()
    graph.replay()
    torch.cuda.synchronize()
    want = on_cpu(arrays, written, call)[0]
    near(library.get(there["out"]), want)
    near(library.get(doubled), bfloat16(2 * from_bfloat16(want)))


def test_a_first_call_beside_torchs_capture_leaves_it_whole(torch: Any) -> None:
    """torch captures in global mode: what another thread may not do then, a new place does."""
    x = torch.ones(1024, device="cuda")
    stream, other = torch.cuda.Stream(), make_stream()
    gate_up = DeviceArray(bfloat16(np.ones((4, 64), np.float32)))
    out = DeviceArray(np.zeros((4, 32), np.uint16))
    ops.silu_and_mul(gate_up, out=out, stream=make_stream())  # the kernel is loaded
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with ThreadPoolExecutor(1) as pool, torch.cuda.graph(graph, stream=stream):
        y = x + 1
        pool.submit(lambda: ops.silu_and_mul(gate_up, out=out, stream=other)).result()
        y += 1
    graph.replay()
    torch.cuda.synchronize()
    assert bool((y == 3).all())
    np.testing.assert_allclose(from_bfloat16(out.get()), 1 / (1 + np.exp(-1.0)), rtol=2 * EPS)


@pytest.mark.multigpu
def test_the_current_device_stays_what_it_was(torch: Any) -> None:
    gate_up = torch.ones(4, 64, dtype=torch.bfloat16, device="cuda:1")
    out = torch.empty(4, 32, dtype=torch.bfloat16, device="cuda:1")
    torch.cuda.set_device(0)
    ops.silu_and_mul(gate_up, out=out)
    assert torch.cuda.current_device() == 0
    assert torch.zeros(1, device="cuda").device.index == 0
    torch.cuda.synchronize(1)
    np.testing.assert_allclose(out.float().cpu(), 1 / (1 + np.exp(-1.0)), rtol=2 * EPS)
    with pytest.raises(RequestError, match="out lies on cuda:0|gate_up lies on cuda:1"):
        ops.silu_and_mul(gate_up, out=out.to("cuda:0"))
