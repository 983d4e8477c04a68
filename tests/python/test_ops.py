"""milpy.ops on NumPy arrays and host tensors: against float64, and every refusal."""

from __future__ import annotations

import ctypes as ct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from milpy import ops
from milpy.errors import RequestError
from milpy.ops import bfloat16, from_bfloat16

Array = NDArray[Any]
EPS = 2.0**-8


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def wide(bits: Array) -> Array:
    return from_bfloat16(bits).astype(np.float64)


def close(got: Array, want: Array, relative: float = 1.02 * EPS, absolute: float = 1e-6) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=relative, atol=absolute)


# ---- bfloat16 ----


def test_bfloat16_rounds_as_ml_dtypes_does(rng: np.random.Generator) -> None:
    bits = rng.integers(0, 2**32, 10_000, dtype=np.uint32)
    x = np.append(bits.view(np.float32), np.float32([0, -0.0, np.inf, -np.inf, 3.4e38]))
    with np.errstate(invalid="ignore"):
        want = x.astype(ml_dtypes.bfloat16)
    assert np.array_equal(bfloat16(x)[~np.isnan(x)], want.view(np.uint16)[~np.isnan(x)])
    assert np.isnan(from_bfloat16(bfloat16(x))[np.isnan(x)]).all()
    assert np.array_equal(from_bfloat16(want[~np.isnan(x)]), want[~np.isnan(x)].astype(np.float32))


# ---- against float64 ----


def norm_of(x: Array, weight: Array, eps: float) -> Array:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(1, keepdims=True) + eps) * weight


@pytest.mark.parametrize("T, H", [(0, 8), (1, 1), (3, 5), (7, 64), (2, 4096)])
def test_rms_norm(rng: np.random.Generator, T: int, H: int) -> None:
    x, weight = normal(rng, T, H), normal(rng, H)
    before = x.copy()
    got = ops.rms_norm(x, weight, 1e-5)
    close(wide(got), norm_of(x, weight, 1e-5))
    assert got.dtype == np.uint16 and np.array_equal(x, before)


@pytest.mark.parametrize("kind", ["float32", "uint16", "bfloat16"])
def test_rms_norm_adds_its_residual_to_x(rng: np.random.Generator, kind: str) -> None:
    x, weight, bits = normal(rng, 3, 16), normal(rng, 16), bfloat16(normal(rng, 3, 16))
    residual = {
        "float32": from_bfloat16(bits),
        "uint16": bits,
        "bfloat16": bits.view(ml_dtypes.bfloat16),
    }[kind]
    summed = x + from_bfloat16(bits)
    got = ops.rms_norm(x, weight, 1e-5, residual)
    assert np.array_equal(x, summed)
    close(wide(got), norm_of(summed, weight, 1e-5))


@pytest.mark.parametrize("interleave", [0, 1, 8, 16])
def test_silu_and_mul(rng: np.random.Generator, interleave: int) -> None:
    gate, up = bfloat16(normal(rng, 5, 48)), bfloat16(normal(rng, 5, 48))
    if interleave == 0:
        packed = np.concatenate([gate, up], 1)
    else:
        pair = [x.reshape(5, -1, 1, interleave) for x in (gate, up)]
        packed = np.ascontiguousarray(np.concatenate(pair, 2).reshape(5, 96))
    g, u = wide(gate), wide(up)
    want = g / (1 + np.exp(-g)) * u
    close(wide(ops.silu_and_mul(packed, interleave)), want)
    close(wide(ops.silu_and_mul(from_bfloat16(packed), interleave)), want)
    got = ops.silu_and_mul(packed.view(ml_dtypes.bfloat16), interleave)
    assert got.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("M, N, K", [(0, 3, 4), (1, 1, 1), (3, 33, 7), (5, 64, 130), (40, 96, 64)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(rng: np.random.Generator, M: int, N: int, K: int, has_bias: bool) -> None:
    x, weight = bfloat16(normal(rng, M, K)), bfloat16(normal(rng, N, K))
    bias = normal(rng, N) if has_bias else None
    want = wide(x) @ wide(weight).T + (0 if bias is None else bias.astype(np.float64))
    scale = np.abs(wide(x)) @ np.abs(wide(weight)).T + 1
    got = ops.linear(x, weight, bias)
    assert got.dtype == np.float32
    assert (np.abs(got - want) <= (K + 2) * 2.0**-24 * scale).all()
    narrow = np.empty((M, N), np.uint16)
    assert ops.linear(x, weight, bias, out=narrow) is narrow
    assert np.array_equal(narrow, bfloat16(got))


def test_embedding_gives_zeros_for_tokens_that_are_not_there(rng: np.random.Generator) -> None:
    weight = bfloat16(normal(rng, 37, 11))
    tokens = np.array([0, 36, 5, -1, 37, 2**31 - 1, 5], np.int32)
    got = ops.embedding(tokens, weight)
    is_there = (tokens >= 0) & (tokens < 37)
    assert np.array_equal(got[is_there], from_bfloat16(weight)[tokens[is_there]])
    assert not got[~is_there].any()


def test_sample_greedy_takes_the_lowest_id_of_the_largest(rng: np.random.Generator) -> None:
    logits = normal(rng, 4, 1000)
    logits[1, [30, 700]] = 50.0
    logits[2, 3] = np.nan
    got = ops.sample(logits, ops.sampling_params(4))
    assert got.tolist() == [logits[0].argmax(), 30, -1, logits[3].argmax()]


def test_sample_draws_from_the_filtered_distribution() -> None:
    p = np.array([0.5, 0.3, 0.15, 0.05])
    n = 20_000
    logits = np.tile(np.log(p).astype(np.float32), (n, 1))
    params = ops.sampling_params(n, temperature=1.0, top_k=3, top_p=0.9, seed=np.arange(n))
    got = ops.sample(logits, params)
    kept = p[:3] / p[:3].sum()
    close(np.bincount(got, minlength=4) / n, np.append(kept, 0), 0, 5 * np.sqrt(0.25 / n))
    again = ops.sample(logits, params)
    assert np.array_equal(got, again)
    later = ops.sample(logits, params, np.ones(n, np.int32))
    assert not np.array_equal(got, later)


# ---- refusals ----


def norm_call(**changed: Any) -> Any:
    arrays: dict[str, Any] = {
        "x": np.ones((2, 8), np.float32),
        "weight": np.ones(8, np.float32),
        "eps": 1e-5,
        "residual": np.ones((2, 8), np.float32),
        "out": np.empty((2, 8), np.uint16),
    }
    arrays.update(changed)
    return ops.rms_norm(**arrays)


def read_only(x: Array) -> Array:
    x.flags.writeable = False
    return x


def off_by(n_bytes: int, shape: tuple[int, ...], dtype: Any) -> Array:
    n = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(n + 64, np.uint8)
    start = -memory.ctypes.data % 16 + n_bytes
    return memory[start : start + n].view(dtype).reshape(shape)


F32, BITS = np.float32, np.uint16


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": np.ones((2, 8))}, "x is .*float64.*, expected float32"),
        ({"x": np.ones((2, 8), np.float16)}, r"x is float16 \[2, 8\], expected float32 \[\?, \?\]"),
        ({"x": np.ones(8, F32)}, r"x is float32 \[8\], expected float32 \[\?, \?\]"),
        ({"x": np.ones((2, 8), ">f4")}, "x is byte-swapped, expected native"),
        ({"x": np.ones((2, 16), F32)[:, ::2]}, "x is not contiguous, expected"),
        ({"x": np.ones((8, 2), F32).T}, "x is not contiguous, expected"),
        ({"x": off_by(4, (2, 8), F32)}, "x begins 4 bytes past a multiple of 16, expected 0"),
        ({"x": read_only(np.ones((2, 8), F32))}, "x is read-only, expected a writable array"),
        ({"x": [[1.0] * 8] * 2}, "x is a list, expected a NumPy or a DLPack array"),
        ({"x": np.ones((2, 0), F32)}, "row length is 0, expected 1 to"),
        ({"weight": np.ones(7, F32)}, r"weight is float32 \[7\], expected float32 \[8\]"),
        ({"weight": None}, "weight is a NoneType, expected"),
        ({"residual": np.ones((3, 8), F32)}, r"residual is float32 \[3, 8\], expected .* \[2, 8\]"),
        ({"out": np.empty((2, 8), F32)}, r"out is float32 \[2, 8\], expected bfloat16 \[2, 8\]"),
        ({"out": read_only(np.empty((2, 8), BITS))}, "out is read-only"),
        ({"out": off_by(2, (2, 8), BITS)}, "out begins 2 bytes past"),
        ({"device": "tpu"}, 'device is "tpu", expected "cpu", "cuda" or "cuda:N"'),
        ({"device": "cuda:x"}, 'device is "cuda:x", expected'),
    ],
)
def test_what_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"^rms_norm: .*{message}"):
        norm_call(**changed)


def test_a_read_only_input_is_fine_where_nothing_is_written(rng: np.random.Generator) -> None:
    x = read_only(normal(rng, 2, 8))
    close(wide(ops.rms_norm(x, np.ones(8, np.float32), 1e-5)), norm_of(x, np.ones(8), 1e-5))


def test_an_out_that_overlaps_an_input_is_refused() -> None:
    memory = np.ones(64, np.uint16)
    with pytest.raises(RequestError, match="out overlaps gate_up, expected memory of its own"):
        ops.silu_and_mul(memory[:32].reshape(2, 16), out=memory[16:32].reshape(2, 8))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: ops.silu_and_mul(np.ones((2, 7), BITS)),
            "gate_up has 7 columns, expected an even",
        ),
        (lambda: ops.silu_and_mul(np.ones((2, 8), BITS), 3), "interleave is 3, expected a divisor"),
        (lambda: ops.silu_and_mul(np.ones((2, 8), BITS), -1), "interleave is -1, expected 0 to 4"),
        (lambda: ops.linear(np.ones((2, 4), BITS), np.ones((3, 5), BITS)), r"\[3, 5\], expected"),
        (lambda: ops.linear(np.ones((2, 4), F32), np.ones((3, 4), BITS)), "x is float32"),
        (lambda: ops.linear(np.ones(4, BITS), np.ones((3, 4), BITS)), "x has shape"),
        (lambda: ops.embedding(np.ones(3, np.int64), np.ones((3, 4), BITS)), "tokens is .*int64"),
        (
            lambda: ops.sample(np.ones((2, 9), F32), ops.sampling_params(2, top_p=0.0)),
            "row 0 of params has temperature 0, top_k 0 and top_p 0, expected",
        ),
        (
            lambda: ops.sample(np.ones((2, 9), F32), ops.sampling_params(3)),
            r"params is int32 \[3, 6\], expected int32 \[2, 6\]",
        ),
    ],
)
def test_what_other_ops_refuse(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        call()


# ---- DLPack on the host ----


class Capsules:
    """A DLPack producer over a NumPy array, with what a real one cannot be talked into."""

    class Tensor(ct.Structure):
        _fields_ = [
            ("data", ct.c_void_p), ("device_type", ct.c_int32), ("device_id", ct.c_int32),
            ("n_dims", ct.c_int32), ("code", ct.c_uint8), ("bits", ct.c_uint8),
            ("lanes", ct.c_uint16), ("shape", ct.c_void_p), ("strides", ct.c_void_p),
            ("byte_offset", ct.c_uint64),
        ]  # fmt: skip

    def __init__(self, array: Array, *, flags: int = 0, major: int = 1, device: int = 1) -> None:
        class Versioned(ct.Structure):
            _fields_ = [
                ("major", ct.c_uint32), ("minor", ct.c_uint32), ("context", ct.c_void_p),
                ("deleter", ct.c_void_p), ("flags", ct.c_uint64), ("tensor", self.Tensor),
            ]  # fmt: skip

        self.array, self.n_deleted = array, 0
        deleter = ct.CFUNCTYPE(None, ct.c_void_p)
        self.deleter = deleter(self.delete)
        self.shape = array.shape
        self.sizes = (ct.c_int64 * array.ndim)(*array.shape)
        code = {"f": 2, "i": 0, "u": 1}[array.dtype.kind]
        tensor = self.Tensor(
            array.ctypes.data, device, 0, array.ndim, code, 8 * array.itemsize, 1,
            ct.cast(self.sizes, ct.c_void_p), None, 0,
        )  # fmt: skip
        self.managed = Versioned(major, 0, None, ct.cast(self.deleter, ct.c_void_p), flags, tensor)

    def delete(self, _: int) -> None:
        self.n_deleted += 1

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **_: Any) -> Any:
        new = ct.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ct.py_object, [ct.c_void_p, ct.c_char_p, ct.c_void_p]
        return new(ct.addressof(self.managed), b"dltensor_versioned", None)


def test_a_capsule_is_given_back_by_its_deleter_once() -> None:
    x = Capsules(np.ones((2, 8), np.float32))
    for n in range(1, 3):
        norm_call(x=x)
        assert x.n_deleted == n
    with pytest.raises(RequestError):
        norm_call(x=x, weight=np.ones(7, np.float32))
    assert x.n_deleted == 3


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"flags": 1}, "x is read-only, expected a writable array"),
        ({"major": 2}, r"x is of DLPack 2.0, expected 1.x"),
        ({"device": 7}, "x lies on DLPack device type 7, expected 1 .CPU. or 2 .CUDA."),
        ({"device": 2}, "lies on cpu:0, expected cuda:0 as x"),
    ],
)
def test_what_a_capsule_may_not_say(changed: dict[str, int], message: str) -> None:
    x = Capsules(np.ones((2, 8), np.float32), **changed)
    with pytest.raises(RequestError, match=message):
        norm_call(x=x)
    assert x.n_deleted == 1


def test_a_used_capsule_is_refused() -> None:
    from milpy import _C  # noqa: PLC0415

    producer = Capsules(np.ones((2, 8), np.float32))
    capsule, out = producer.__dlpack__(), np.empty((2, 8), np.uint16)
    with pytest.raises(RequestError, match="weight is a used DLPack capsule, expected a fresh one"):
        _C.op_rms_norm(None, 0, out, capsule, capsule, None, 1e-5)
    assert producer.n_deleted == 1


def test_results_are_allocated_for_numpy_alone() -> None:
    x = Capsules(np.ones((2, 8), np.float32))
    with pytest.raises(RequestError, match="out is None, expected an array"):
        ops.rms_norm(x, np.ones(8, np.float32), 1e-5)


def test_host_tensors_of_torch_are_used_in_place(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    x, weight = normal(rng, 3, 32), normal(rng, 32)
    out = torch.empty(3, 32, dtype=torch.bfloat16)
    assert ops.rms_norm(torch.from_numpy(x), torch.from_numpy(weight), 1e-5, out=out) is out
    close(out.double().numpy(), norm_of(x, weight, 1e-5))
    flat = torch.ones(33)
    with pytest.raises(RequestError, match="x begins 4 bytes past a multiple of 16"):
        ops.rms_norm(flat[1:].view(1, 32), torch.from_numpy(weight), 1e-5, out=out[:1])


# ---- threads ----


def test_two_threads_share_the_ops(rng: np.random.Generator) -> None:
    x, weight = bfloat16(normal(rng, 9, 96)), bfloat16(normal(rng, 64, 96))
    want = ops.linear(x, weight)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: ops.linear(x, weight), range(64)):
            assert np.array_equal(got, want)
