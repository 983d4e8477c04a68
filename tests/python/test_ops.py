"""milpy.ops on NumPy arrays and host tensors: against float64, and every refusal."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import logprobs
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


def test_bfloat16_keeps_the_shape_and_takes_any_real_numbers() -> None:
    for value in (
        1.5,
        np.float64(1.5),
        np.array(1.5),
        np.array(1.5, "f2"),
        ml_dtypes.bfloat16(1.5),
    ):
        bits = bfloat16(value)
        assert isinstance(bits, np.ndarray) and bits.shape == () and bits.dtype == BITS
        assert bits == 0x3FC0
        back = from_bfloat16(bits)
        assert isinstance(back, np.ndarray) and back.shape == () and back == 1.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(from_bfloat16(bfloat16(np.uint32(0xFFFFFFFF).view(F32))))
    assert bfloat16([[1, 2, 3]]).tolist() == [[0x3F80, 0x4000, 0x4040]]
    assert bfloat16(np.ones((0, 3))).shape == from_bfloat16(np.ones((0, 3), BITS)).shape == (0, 3)
    columns = np.arange(6, dtype=F32).reshape(2, 3).T
    assert np.array_equal(from_bfloat16(bfloat16(columns)), columns)
    assert np.array_equal(from_bfloat16(bfloat16(columns).astype(">u2")), columns)


@pytest.mark.parametrize(
    ("x", "found"),
    [
        ("a", "<U1 of shape ()"),
        (None, "object of shape ()"),
        (1j, "complex128 of shape ()"),
        (np.ones(2, np.complex64), "complex64 of shape (2,)"),
        ([True, False], "bool of shape (2,)"),
        ([10**400], "object of shape (1,)"),
        ([[1], [1, 2]], "a list"),
        (np.ma.masked_array([1.0]), "a masked array"),
    ],
)
def test_what_has_no_bfloat16_is_refused(x: Any, found: str) -> None:
    """It was an error of NumPy's, NaN, or half of the number."""
    with pytest.raises(RequestError, match=rf"^bfloat16: x is {re.escape(found)}, expected real "):
        bfloat16(x)
    with pytest.raises(RequestError, match="^from_bfloat16: bits is .*, expected uint16 or bfloat"):
        from_bfloat16(x)


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


@pytest.mark.parametrize("vocab", logprobs.VOCABS)
def test_logprobs_are_those_of_log_softmax(vocab: int) -> None:
    logits, params = logprobs.rows_of(vocab)
    got = ops.sample_logprobs(logits, params)
    assert got.tokens.tolist() == ops.sample(logits, params).tolist()
    assert got.top_tokens.shape == got.top_logprobs.shape == (len(params), 20)
    logprobs.check(logits, logprobs.ASKED, list(got))


@pytest.mark.parametrize("columns", [0, 3])
def test_logprobs_take_the_room_that_is_given(columns: int) -> None:
    logits, params = logprobs.rows_of(100)
    logits[1, 7] = np.nan
    n = len(params)
    top_tokens = np.full((n, columns), 99, np.int32)
    top_logprobs = np.full((n, columns), np.nan, np.float32)
    got = ops.sample_logprobs(logits, params, top_tokens=top_tokens, top_logprobs=top_logprobs)
    assert got.top_tokens is top_tokens and got.top_logprobs is top_logprobs
    assert got.tokens[1] == -1
    logprobs.check(logits, logprobs.ASKED, list(got))


def test_rows_without_logprobs_need_no_room() -> None:
    got = ops.sample_logprobs(np.zeros((2, 9), np.float32), ops.sampling_params(2))
    assert got.top_tokens.shape == (2, 0)
    assert not got.logprobs.any() and not got.ranks.any()
    none = ops.sample_logprobs(np.zeros((0, 9), np.float32), ops.sampling_params(0))
    assert [len(x) for x in none] == [0] * 5


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
        ({"device": "cuda:+1"}, r'device is "cuda:\+1", expected'),
        ({"device": "cuda: 1"}, 'device is "cuda: 1", expected'),
        ({"device": "cuda:01"}, 'device is "cuda:01", expected'),
    ],
)
def test_what_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"^rms_norm: .*{message}"):
        norm_call(**changed)


def embedding_with(**changed: Any) -> Array:
    return ops.embedding(**{"tokens": int32(0, 2), "weight": np.ones((3, 8), BITS), **changed})


def linear_of(**changed: Any) -> Array:
    return ops.linear(**{"x": np.ones((2, 8), BITS), "weight": np.ones((3, 8), BITS), **changed})


def sample_of(**changed: Any) -> Array:
    return ops.sample(**{"logits": np.ones((2, 9), F32), "params": params_with(3, 0), **changed})


@pytest.mark.parametrize(
    ("call", "changed", "message"),
    [
        (embedding_with, {"tokens": np.zeros(3, np.int64)}, "int64 [3], expected int32 [?]"),
        (embedding_with, {"tokens": np.zeros(3, bool)}, "bool [3], expected int32 [?]"),
        (embedding_with, {"tokens": np.zeros(3, object)}, "object_ [3], expected int32 [?]"),
        (
            embedding_with,
            {"weight": np.ones((3, 8))},
            "float64 [3, 8], expected bfloat16 [?, ?] (bfloat16 as its bits in uint16)",
        ),
        (
            linear_of,
            {"weight": np.ones((3, 8), F32)},
            "float32 [3, 8], expected bfloat16 [?, 8] (bfloat16 as its bits in uint16)",
        ),
        (
            linear_of,
            {"out": np.ones((2, 3))},
            "float64 [2, 3], expected float32 or bfloat16 [2, 3] (bfloat16 as its bits in uint16)",
        ),
        (
            linear_of,
            {"out": np.ones((2, 4), BITS)},
            "bfloat16 [2, 4], expected float32 or bfloat16 [2, 3]",
        ),
        (linear_of, {"bias": np.ones(3, np.float16)}, "float16 [3], expected float32 [3]"),
        (sample_of, {"positions": np.zeros(2, np.int64)}, "int64 [2], expected int32 [2]"),
        (sample_of, {"params": np.zeros((2, 6), "u4")}, "uint32 [2, 6], expected int32 [2, 6]"),
        (sample_of, {"logits": np.ones((2, 9))}, "float64 [2, 9], expected float32 [?, ?]"),
    ],
)
def test_a_dtype_is_told_beside_what_its_operand_wants(
    call: Callable[..., Array], changed: dict[str, Any], message: str
) -> None:
    """Where no op takes the dtype, all said "expected float32, bfloat16, float16 or int32"."""
    (name,) = changed
    call()
    with pytest.raises(RequestError, match=rf": {name} is {re.escape(message)}$"):
        call(**changed)


def test_what_comes_from_a_product_may_be_float32_on_the_cpu_alone() -> None:
    wanted = r"gate_up is float64 \[2, 8\], expected bfloat16 or float32 \[\?, \?\]"
    for device in (None, "cpu"):
        with pytest.raises(RequestError, match=wanted):
            ops.silu_and_mul(np.ones((2, 8)), device=device)
    for dtype in (np.float32, np.float64):
        with pytest.raises(RequestError, match=r"gate_up is .* \[2, 8\], expected bfloat16 \[\?, "):
            ops.silu_and_mul(np.ones((2, 8), dtype), device="cuda:0")


def test_a_read_only_input_is_fine_where_nothing_is_written(rng: np.random.Generator) -> None:
    x = read_only(normal(rng, 2, 8))
    close(wide(ops.rms_norm(x, np.ones(8, np.float32), 1e-5)), norm_of(x, np.ones(8), 1e-5))


@pytest.mark.parametrize("name", ["x", "weight", "residual", "out"])
def test_a_mask_is_not_ignored(name: str) -> None:
    arrays = {"x": np.ones((2, 8), F32), "weight": np.ones(8, F32)}
    arrays["residual"] = np.ones((2, 8), F32)
    arrays["out"] = np.empty((2, 8), BITS)
    arrays[name] = np.ma.masked_array(arrays[name])
    with pytest.raises(RequestError, match="^rms_norm: found a masked array, expected arrays with"):
        ops.rms_norm(**arrays, eps=1e-5)
    with pytest.raises(RequestError, match="^sampling_params: top_k is a masked array, expected"):
        ops.sampling_params(2, top_k=np.ma.masked_array([1, 2]))


def test_an_out_that_overlaps_an_input_is_refused() -> None:
    memory = np.ones(64, np.uint16)
    with pytest.raises(RequestError, match="out overlaps gate_up, expected memory of its own"):
        ops.silu_and_mul(memory[:32].reshape(2, 16), out=memory[16:32].reshape(2, 8))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("n_logprobs", 2.7, "n_logprobs is float64 of shape \\(\\), expected integers"),
        ("top_k", [1, 2], "top_k is int64 of shape \\(2,\\), expected integers, .* each of 3 rows"),
        ("top_k", 2**40, "top_k is 1099511627776, expected 0 to 2147483647"),
        ("top_k", [0, 1, -1], "top_k is -1, expected 0 to 2147483647"),
        ("top_k", True, "top_k is bool of shape"),
        ("n_logprobs", [20, 21, -1], "n_logprobs is 21, expected -1 to 20"),
        ("n_logprobs", np.int8(-2), "n_logprobs is -2, expected -1 to 20"),
        ("seed", -1, "seed is -1, expected 0 to 18446744073709551615"),
        ("seed", 2**64, "seed is object of shape"),
        ("temperature", None, "temperature is object of shape .*, expected numbers"),
        ("temperature", np.nan, "temperature is nan, expected 0 to 1e30"),
        ("temperature", [1, np.nan, 2], "temperature is nan, expected 0 to 1e30"),
        ("temperature", np.float32(np.inf), "temperature is inf, expected 0 to 1e30"),
        ("temperature", -0.5, "temperature is -0.5, expected 0 to 1e30"),
        ("temperature", 1e300, "temperature is 1e\\+300, expected 0 to 1e30"),
        ("temperature", True, "temperature is bool of shape"),
        ("top_p", "0.5", "top_p is <U3 of shape"),
        ("top_p", 0, "top_p is 0, expected above 0 and up to 1"),
        ("top_p", 1e-60, "top_p is 1e-60, expected above 0 and up to 1"),
        ("top_p", [0.5, 1.5, 1], "top_p is 1.5, expected above 0 and up to 1"),
        ("top_p", np.nan, "top_p is nan, expected above 0 and up to 1"),
    ],
)
def test_parameters_that_no_row_can_hold_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=f"sampling_params: {message}"):
        ops.sampling_params(3, **{name: value})


@pytest.mark.parametrize("n", [-1, 2.0, True, "3", 2**40])
def test_a_number_of_rows_is_an_integer_from_0_on(n: Any) -> None:
    with pytest.raises(RequestError, match="sampling_params: n is .*, expected an integer in 0"):
        ops.sampling_params(n)


def test_parameters_reach_their_limits() -> None:
    given = {"temperature": [0, 1e30], "top_k": [0, 2**31 - 1], "top_p": [1e-37, 1]}
    counts = {"seed": np.uint64(2**64 - 1), "n_logprobs": np.array([-1, 20], np.int8)}
    params = ops.sampling_params(np.int64(2), **given, **counts)
    assert ops.sample(np.eye(2, 9, dtype=F32), params).tolist()[0] == 0


def params_with(column: int, value: int) -> Array:
    """Of two rows, the second with these bits: as they come when sampling_params made none."""
    params = ops.sampling_params(2)
    params[1, column] = value
    return params


def test_logprobs_have_the_columns_of_the_one_array_that_is_given() -> None:
    logits, params = np.ones((2, 9), F32), ops.sampling_params(2, n_logprobs=1)
    got = ops.sample_logprobs(logits, params, top_logprobs=np.zeros((2, 3), F32))
    assert got.top_tokens.tolist() == [[0, -1, -1]] * 2


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: ops.silu_and_mul(np.ones((2, 7), BITS)),
            "gate_up has 7 columns, expected an even",
        ),
        (lambda: ops.silu_and_mul(np.ones((2, 8), BITS), 3), "interleave is 3, expected a divisor"),
        (
            lambda: ops.silu_and_mul(np.ones((2, 8), BITS), -1),
            "interleave is -1, expected an integer",
        ),
        (lambda: ops.silu_and_mul(np.ones((2, 8), BITS), 5), "interleave is 5, expected 0 to 4"),
        (lambda: ops.linear(np.ones((2, 4), BITS), np.ones((3, 5), BITS)), r"\[3, 5\], expected"),
        (lambda: ops.linear(np.ones((2, 4), F32), np.ones((3, 4), BITS)), "x is float32"),
        (lambda: ops.linear(np.ones(4, BITS), np.ones((3, 4), BITS)), "x has shape"),
        (lambda: ops.embedding(np.ones(3, np.int64), np.ones((3, 4), BITS)), "tokens is .*int64"),
        (
            lambda: ops.sample(np.ones((2, 9), F32), params_with(3, 21)),
            "row 1 of params has n_logprobs 21, expected -1 to 20",
        ),
        (
            lambda: ops.sample_logprobs(np.ones((2, 9), F32), params_with(3, -2)),
            "row 1 of params has n_logprobs -2, expected -1 to 20",
        ),
        (
            lambda: ops.sample_logprobs(
                np.ones((2, 9), F32), ops.sampling_params(2), top_tokens=np.zeros((2, 21), np.int32)
            ),
            "sample_logprobs: top_tokens' columns is 21, expected 0 to 20",
        ),
        (
            lambda: ops.sample_logprobs(
                np.ones((2, 9), F32),
                ops.sampling_params(2),
                top_tokens=np.zeros((2, 2), np.int32),
                top_logprobs=np.zeros((2, 1), F32),
            ),
            r"top_logprobs is float32 \[2, 1\], expected float32 \[2, 2\]",
        ),
        (
            lambda: ops.sample_logprobs(
                np.ones((2, 9), F32), ops.sampling_params(2), ranks=np.zeros(2, F32)
            ),
            "ranks is float32 .*, expected int32",
        ),
        (
            lambda: ops.sample_logprobs(np.ones((2, 9), F32), np.full((2, 6), NAN)),
            r"params is float64 \[2, 6\], expected int32 \[2, 6\]",
        ),
        (
            lambda: ops.sample(np.ones((2, 9), F32), params_with(2, 0)),
            "row 1 of params has top_p 0, expected above 0, up to 1",
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


# ---- over a batch ----


def turned(x: Array, positions: Array, rotary_dim: int, interleaved: bool) -> Array:
    x = x.astype(np.float64).copy()
    frequency = 10_000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    angle = (positions[:, None] * frequency)[:, None]
    half = rotary_dim // 2
    first = slice(0, rotary_dim, 2) if interleaved else slice(0, half)
    second = slice(1, rotary_dim, 2) if interleaved else slice(half, rotary_dim)
    a, b = x[..., first].copy(), x[..., second].copy()
    x[..., first] = a * np.cos(angle) - b * np.sin(angle)
    x[..., second] = b * np.cos(angle) + a * np.sin(angle)
    return x


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("T, N, D, rotary_dim", [(1, 1, 8, 8), (5, 3, 64, 32), (4, 2, 80, 80)])
def test_rope(
    rng: np.random.Generator, T: int, N: int, D: int, rotary_dim: int, interleaved: bool
) -> None:
    x, positions = bfloat16(normal(rng, T, N, D)), rng.integers(0, 100, T).astype(np.int32)
    tables = ops.rope_tables(100, rotary_dim)
    got = ops.rope(x, positions, *tables, interleaved=interleaved)
    close(wide(got), turned(wide(x), positions, rotary_dim, interleaved), absolute=1e-5)


class Batch:
    """Chunks over pages in random order."""

    def __init__(self, rng: np.random.Generator, lengths: list[tuple[int, int]], P: int) -> None:
        self.lengths, self.P = lengths, P
        self.indptr = np.cumsum([0, *(n for n, _ in lengths)]).astype(np.int32)
        self.kv_lengths = np.array([kv for _, kv in lengths], np.int32)
        max_pages = max(-(-kv // P) for _, kv in lengths)
        self.n_pages = max_pages * len(lengths) + 3
        pages = rng.permutation(self.n_pages)[: max_pages * len(lengths)]
        self.page_table = pages.astype(np.int32).reshape(len(lengths), max_pages)

    @property
    def arrays(self) -> tuple[Array, Array, Array]:
        return self.page_table, self.indptr, self.kv_lengths

    def keys(self, cache: Array, s: int) -> Array:
        """[kv_length, K, D] of sequence s."""
        n = self.kv_lengths[s]
        pages = cache[self.page_table[s, : -(-n // self.P)]]
        return pages.transpose(0, 2, 1, 3).reshape(-1, *pages.shape[1::2])[:n]


LENGTHS = [(1, 1), (1, 40), (5, 5), (3, 70), (1, 33)]


def test_rope_and_cache_writes_the_rows_of_its_pages_and_no_other(
    rng: np.random.Generator,
) -> None:
    N, K, D, P = 4, 2, 32, 16
    batch = Batch(rng, LENGTHS, P)
    T = int(batch.indptr[-1])
    qkv = bfloat16(normal(rng, T, (N + 2 * K) * D))
    k_cache = bfloat16(normal(rng, batch.n_pages, K, P, D))
    v_cache = k_cache.copy()
    before = k_cache.copy()
    first = [kv - n for n, kv in LENGTHS]
    positions = np.concatenate(
        [np.arange(f, kv) for f, (_, kv) in zip(first, LENGTHS, strict=True)]
    )
    positions = positions.astype(np.int32)
    q = ops.rope_and_cache(
        qkv, positions, *ops.rope_tables(128, D), k_cache, v_cache, *batch.arrays
    )
    heads = wide(qkv).reshape(T, N + 2 * K, D)
    want = turned(heads, positions, D, False)
    close(wide(q), want[:, :N], absolute=1e-5)
    untouched = np.ones(before.shape[0::2][:2], bool)
    for s, (n, kv) in enumerate(LENGTHS):
        rows = slice(batch.indptr[s], batch.indptr[s + 1])
        close(wide(batch.keys(k_cache, s)[kv - n :]), want[rows, N : N + K], absolute=1e-5)
        assert np.array_equal(wide(batch.keys(v_cache, s)[kv - n :]), heads[rows, N + K :])
        for at in range(kv - n, kv):
            untouched[batch.page_table[s, at // P], at % P] = False
    for cache in (k_cache, v_cache):
        same = cache.transpose(0, 2, 1, 3)[untouched] == before.transpose(0, 2, 1, 3)[untouched]
        assert same.all()


def attended(
    q: Array, k: Array, v: Array, past: int, scale: float, window: int, softcap: float
) -> Array:
    """q [n, N, D], k and v [kv, K, D], in float64."""
    n, N, D = q.shape
    group = N // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = np.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    at, key = past + np.arange(n)[:, None], np.arange(len(k))
    hidden = (key > at) | ((key <= at - window) if window else False)
    scores = np.where(hidden, -np.inf, scores)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("N, K, D, P", [(1, 1, 64, 16), (8, 2, 32, 64), (7, 1, 80, 16)])
@pytest.mark.parametrize("window, softcap", [(0, 0.0), (7, 0.0), (0, 3.0)])
def test_attention(
    rng: np.random.Generator, N: int, K: int, D: int, P: int, window: int, softcap: float
) -> None:
    batch = Batch(rng, LENGTHS, P)
    k_cache, v_cache = (bfloat16(normal(rng, batch.n_pages, K, P, D)) for _ in range(2))
    q = bfloat16(normal(rng, int(batch.indptr[-1]), N, D))
    got = wide(ops.attention(q, k_cache, v_cache, *batch.arrays, window=window, softcap=softcap))
    for s, (n, kv) in enumerate(LENGTHS):
        rows = slice(batch.indptr[s], batch.indptr[s + 1])
        k, v = wide(batch.keys(k_cache, s)), wide(batch.keys(v_cache, s))
        want = attended(wide(q[rows]), k, v, kv - n, D**-0.5, window, softcap)
        close(got[rows], want, 1.1 * EPS, 2 * EPS)


def bad_batch(**changed: Any) -> None:
    arrays: dict[str, Any] = {
        "q": np.zeros((3, 2, 32), BITS),
        "k_cache": np.zeros((4, 1, 16, 32), BITS),
        "v_cache": np.zeros((4, 1, 16, 32), BITS),
        "page_table": np.array([[0, 1], [2, 3]], np.int32),
        "query_indptr": np.array([0, 1, 3], np.int32),
        "kv_lengths": np.array([20, 3], np.int32),
    }
    arrays.update(changed)
    ops.attention(**arrays)


def int32(*values: int) -> Array:
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"query_indptr": int32(1, 1, 3)}, r"query_indptr\[0\] is 1, expected 0$"),
        ({"query_indptr": int32(0, 4, 3)}, r"query_indptr\[1\] is 4, expected 0 to 3"),
        ({"query_indptr": int32(0, 1, 2)}, r"query_indptr\[2\] is 2, expected 3$"),
        ({"query_indptr": int32(0, 3)}, r"query_indptr is int32 \[2\], expected int32 \[3\]"),
        ({"kv_lengths": int32(20, 1)}, r"kv_lengths\[1\] is 1, expected 2 to 32"),
        ({"kv_lengths": int32(33, 3)}, r"kv_lengths\[0\] is 33, expected 1 to 32"),
        ({"page_table": int32(0, 4, 2, 3).reshape(2, 2)}, r"page_table\[0\]\[1\] is 4, expected 0"),
        (
            {"page_table": int32(0, -1, 2, 3).reshape(2, 2)},
            r"page_table\[0\]\[1\] is -1, expected 0",
        ),
        ({"q": np.zeros((3, 2, 24), BITS)}, r"q is bfloat16 \[3, 2, 24\], expected .*, 32\]"),
        ({"v_cache": np.zeros((4, 1, 16, 24), BITS)}, "v_cache is bfloat16"),
        (
            {"k_cache": np.zeros((4, 1, 16, 32))},
            "k_cache is float64 .*, expected bfloat16 or float16",
        ),
        ({"kv_lengths": np.array([20, 3])}, r"kv_lengths is int64 \[2\], expected int32 \[2\]"),
        ({"page_table": np.zeros((2, 0), np.int32)}, "page_table's columns is 0, expected 1 to"),
        (
            {
                "page_table": np.zeros((0, 2), np.int32),
                "query_indptr": int32(0),
                "kv_lengths": int32(),
            },
            "the number of sequences is 0, expected 1 to",
        ),
    ],
)
def test_what_attention_refuses(changed: dict[str, Any], message: str) -> None:
    bad_batch()
    with pytest.raises(RequestError, match=message):
        bad_batch(**changed)


def test_rope_wants_a_row_of_angles() -> None:
    x, none = np.zeros((1, 1, 8), BITS), np.zeros((0, 4), np.float32)
    with pytest.raises(RequestError, match="cos' rows is 0, expected 1 to"):
        ops.rope(x, int32(0), none, none)


# ---- LoRA ----


@pytest.mark.parametrize("T, K, N, R", [(1, 8, 3, 1), (9, 40, 33, 8), (70, 64, 48, 24)])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_lora(rng: np.random.Generator, T: int, K: int, N: int, R: int, kind: str) -> None:
    E = 3
    x, y0 = bfloat16(normal(rng, T, K)), bfloat16(normal(rng, T, N))
    a, b = bfloat16(normal(rng, E, R, K)), bfloat16(normal(rng, E, N, R))
    scale = normal(rng, E)
    rows = rng.permutation(T)[: max(T - 2, 1)].astype(np.int32)
    cut = len(rows) // 2
    indptr, adapter = int32(0, cut, len(rows)), int32(2, 0)
    which = np.repeat(adapter, np.diff(indptr))
    want_v = np.stack(
        [scale[e] * (wide(a)[e] @ wide(x)[row]) for e, row in zip(which, rows, strict=True)]
    )
    delta = np.zeros((T, N))
    for v, e, row in zip(want_v, which, rows, strict=True):
        delta[row] += wide(b)[e] @ v
    v = ops.lora_shrink(x, a, indptr, adapter, rows, scale)
    close(v, want_v, 1e-5, 1e-4)
    y = from_bfloat16(y0) if kind == "float32" else y0.copy()
    assert ops.lora(y, x, a, b, indptr, adapter, rows, scale) is y
    again = from_bfloat16(y0) if kind == "float32" else y0.copy()
    ops.lora_expand(again, v, b, indptr, adapter, rows)
    assert np.array_equal(y, again)
    got = y.astype(np.float64) if kind == "float32" else wide(y)
    close(got, wide(y0) + delta, 1e-4 if kind == "float32" else 1.02 * EPS, 1e-2)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"segment_indptr": int32(0, 3)}, r"segment_indptr\[1\] is 3, expected 0 to 2"),
        ({"segment_indptr": int32(0, 1)}, r"segment_indptr\[1\] is 1, expected 2$"),
        ({"segment_adapter": int32(2)}, r"segment_adapter\[0\] is 2, expected 0 to 1"),
        ({"rows": np.array([0, 3])}, r"rows is int64 \[2\], expected int32 \[\?\]"),
        ({"rows": int32(0, 4)}, r"rows\[1\] is 4, expected 0 to 3"),
        ({"b": np.zeros((2, 6, 8), BITS)}, r"b is bfloat16 \[2, 6, 8\], expected .* \[2, 5, 8\]"),
        ({"scale": np.ones(3, np.float32)}, r"scale is float32 \[3\], expected float32 \[2\]"),
        ({"scale": np.ones(2)}, "scale is .*float64.*, expected float32"),
        ({"scale": np.array([1, np.nan], F32)}, r"scale\[1\] is nan, expected a finite one"),
        ({"scale": np.array([-np.inf, 1], F32)}, r"scale\[0\] is -inf, expected a finite one"),
    ],
)
def test_what_lora_refuses(changed: dict[str, Any], message: str) -> None:
    arrays: dict[str, Any] = {
        "y": np.zeros((4, 5), BITS),
        "x": np.zeros((4, 16), BITS),
        "a": np.zeros((2, 8, 16), BITS),
        "b": np.zeros((2, 5, 8), BITS),
        "segment_indptr": int32(0, 2),
        "segment_adapter": int32(1),
        "rows": int32(0, 3),
    }
    ops.lora(**arrays)
    with pytest.raises(RequestError, match=message):
        ops.lora(**{**arrays, **changed})


@pytest.mark.parametrize("n_tokens", [1, 31, 32, 33, 5000])
def test_a_row_that_a_sum_goes_to_comes_once(n_tokens: int) -> None:
    """One that came twice passed, and lost a sum where two threads met."""
    rows = np.random.default_rng(5).permutation(n_tokens).astype(np.int32)
    a, b = np.zeros((2, 8, 16), BITS), np.zeros((2, 5, 8), BITS)
    x, y, v = np.zeros((n_tokens, 16), BITS), np.zeros((n_tokens, 5), BITS), np.zeros((1, 8), F32)
    ops.lora(y, x, a, b, int32(0, n_tokens), int32(1), rows)
    if n_tokens == 1:
        return
    cut = int32(0, n_tokens // 2, n_tokens)  # in another segment, too, it is the same row
    rows[-1] = rows[0]
    message = f"rows[{n_tokens - 1}] is {rows[0]} as one before it, expected distinct rows"
    with pytest.raises(RequestError, match=f"^lora: {re.escape(message)}"):
        ops.lora(y, x, a, b, cut, int32(1, 0), rows)
    with pytest.raises(RequestError, match=f"^lora_expand: {re.escape(message)}"):
        ops.lora_expand(y, np.repeat(v, n_tokens, 0), b, cut, int32(1, 0), rows)


def test_a_row_that_is_only_read_may_come_twice(rng: np.random.Generator) -> None:
    x, a = bfloat16(normal(rng, 4, 16)), bfloat16(normal(rng, 1, 8, 16))
    v = ops.lora_shrink(x, a, int32(0, 4), int32(0), int32(2, 3, 3, 2))
    close(v, wide(x)[[2, 3, 3, 2]] @ wide(a)[0].T, 1e-5, 1e-4)


# ---- scalars ----


def norm_with(eps: Any, **rest: Any) -> Array:
    x = np.linspace(-2, 3, 32, dtype=F32).reshape(2, 16)
    return ops.rms_norm(x, np.ones(16, F32), eps, **rest)


def silu_with(interleave: Any) -> Array:
    return ops.silu_and_mul(bfloat16(np.linspace(-2, 3, 64).reshape(2, 32)), interleave)


def linear_with(deterministic: Any) -> Array:
    return ops.linear(np.ones((2, 8), BITS), np.ones((3, 8), BITS), deterministic=deterministic)


def attention_with(**scalars: Any) -> Array:
    rng = np.random.default_rng(3)
    k_cache, v_cache = (bfloat16(normal(rng, 2, 1, 16, 32)) for _ in range(2))
    q, pages = bfloat16(normal(rng, 1, 2, 32)), np.array([[1, 0]], np.int32)
    return ops.attention(q, k_cache, v_cache, pages, int32(0, 1), int32(20), **scalars)


def rope_with(interleaved: Any) -> Array:
    x = bfloat16(np.linspace(-2, 3, 32).reshape(2, 1, 16))
    return ops.rope(x, int32(3, 1), *ops.rope_tables(4, 16), interleaved=interleaved)


def cache_with(interleaved: Any) -> Array:
    caches = [np.zeros((2, 1, 16, 32), BITS) for _ in range(2)]
    qkv, pages = bfloat16(np.linspace(-2, 3, 128).reshape(1, 128)), np.array([[1, 0]], np.int32)
    where = [*caches, pages, int32(0, 1), int32(20)]
    angles = [int32(19), *ops.rope_tables(20, 32)]
    return ops.rope_and_cache(qkv, *angles, *where, interleaved=interleaved)


def lora_with(scale: Any) -> Array:
    a, b = bfloat16(np.ones((2, 8, 16))), bfloat16(np.ones((2, 5, 8)))
    y, x = np.zeros((1, 5), BITS), bfloat16(np.ones((1, 16)))
    return ops.lora(y, x, a, b, int32(0, 1), int32(1), int32(0), scale)


def shrink_with(scale: Any) -> Array:
    x, a = bfloat16(np.ones((1, 16))), bfloat16(np.ones((2, 8, 16)))
    return ops.lora_shrink(x, a, int32(0, 1), int32(1), int32(0), scale)


NAN, INF = float("nan"), float("inf")
NO_NUMBERS = [NAN, INF, -INF, np.float32(NAN), np.float64(INF), True, np.True_, "1", 1e39, 10**400]
NO_NUMBERS += [[1.0], 1j, np.complex64(1)]
NO_FLAGS = [0, 1, 1.0, "no", None, np.int8(1)]
NO_COUNTS = [-1, 2**31, 2**70, 8.0, NAN, True, np.True_, "8", None, np.float32(8), np.int64(-1)]
FINITE, POSITIVE = "a finite float32", "a finite float32 above 0"


@pytest.mark.parametrize(
    ("call", "op", "name", "expected", "values"),
    [
        (norm_with, "rms_norm", "eps", f"{FINITE} of at least 0", [*NO_NUMBERS, -1e-9, None]),
        (silu_with, "silu_and_mul", "interleave", "an integer in 0..2147483647", NO_COUNTS),
        (linear_with, "linear", "deterministic", "True or False", NO_FLAGS),
        (attention_with, "attention", "scale", POSITIVE, [*NO_NUMBERS, 0, -0.0, -0.5, 1e-60]),
        (attention_with, "attention", "softcap", f"0, or {POSITIVE}", [*NO_NUMBERS, -1, 1e-60]),
        (attention_with, "attention", "window", "an integer in 0..2147483647", NO_COUNTS),
        (rope_with, "rope", "interleaved", "True or False", NO_FLAGS),
        (cache_with, "rope_and_cache", "interleaved", "True or False", NO_FLAGS),
        (lora_with, "lora", "scale", f"{FINITE}, or an array", [*NO_NUMBERS, None]),
        (shrink_with, "lora_shrink", "scale", f"{FINITE}, or an array", [*NO_NUMBERS, None]),
    ],
)
def test_a_scalar_out_of_range_is_named_with_found_and_expected(
    call: Callable[..., Array], op: str, name: str, expected: str, values: list[Any]
) -> None:
    for value in values:
        message = re.escape(f"{op}: {name} is ") + f".*, expected {re.escape(expected)}"
        with pytest.raises(RequestError, match=f"^{message}"):
            call(**{name: value})


@pytest.mark.parametrize(
    ("call", "name", "plain", "others"),
    [
        (norm_with, "eps", 1.0, [1, np.float32(1), np.float64(1), np.int8(1), np.array(1.0)]),
        (norm_with, "eps", 0.0, [0, -0.0, np.float16(0), 1e-60]),
        (silu_with, "interleave", 8, [np.int64(8), np.uint8(8), np.array(8)]),
        (linear_with, "deterministic", True, [np.True_]),
        (attention_with, "scale", 0.25, [np.float32(0.25), ml_dtypes.bfloat16(0.25)]),
        (attention_with, "scale", 32**-0.5, [None]),
        (attention_with, "scale", 2.0, [2, np.int32(2), np.array(2.0)]),
        (attention_with, "softcap", 30.0, [30, np.float16(30), np.int64(30)]),
        (attention_with, "softcap", 0.0, [0, -0.0, np.float32(0), np.uint8(0)]),
        (attention_with, "window", 7, [np.int64(7), np.uint8(7), np.array(7)]),
        (attention_with, "window", 0, [2**31 - 1]),
        (rope_with, "interleaved", True, [np.True_]),
        (cache_with, "interleaved", False, [np.False_]),
        (lora_with, "scale", -2.0, [-2, np.float32(-2), np.int8(-2), np.array(-2.0)]),
        (lora_with, "scale", 0.0, [0, 1e-60, np.zeros(2, F32)]),
        (shrink_with, "scale", 0.5, [np.float16(0.5), np.full(2, 0.5, F32)]),
    ],
)
def test_a_scalar_is_any_number_of_pythons_or_numpys(
    call: Callable[..., Array], name: str, plain: Any, others: list[Any]
) -> None:
    want = call(**{name: plain})
    for other in others:
        assert np.array_equal(call(**{name: other}), want), other


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        *[({"n_positions": v}, "n_positions is .*, expected an integer in 0") for v in NO_COUNTS],
        *[({"rotary_dim": v}, "rotary_dim is .*, expected an integer in 2") for v in NO_COUNTS],
        ({"rotary_dim": 0}, "rotary_dim is 0, expected an integer in 2"),
        ({"rotary_dim": 7}, "rotary_dim is 7, expected an even number"),
        *[
            ({"theta": v}, r"theta is .*, expected a number in 1e-30\.\.1e30")
            for v in [*NO_NUMBERS, 0, -1e4, 1e-300, 1e31, None]
        ],
    ],
    ids=str,
)
def test_what_rope_tables_refuse(changed: dict[str, Any], message: str) -> None:
    given = {"n_positions": 4, "rotary_dim": 8, "theta": 1e4}
    with pytest.raises(RequestError, match=f"^rope_tables: {message}"):
        ops.rope_tables(**{**given, **changed})


def test_rope_tables_take_numpys_scalars_and_are_finite_at_their_limits() -> None:
    want = ops.rope_tables(4, 8, 500_000.0)
    got = ops.rope_tables(np.int64(4), np.uint8(8), np.int32(500_000))
    assert all(map(np.array_equal, got, want))
    for theta in (1e-30, 1e30):
        assert all(np.isfinite(table).all() for table in ops.rope_tables(999, 256, theta))
    assert ops.rope_tables(0, 2)[0].shape == (0, 1)


class Closed:
    def __int__(self) -> int:
        raise ValueError("this stream is closed")


NO_HANDLES = [Decimal("7.5"), Decimal("nan"), Fraction(15, 2), Closed()]


@pytest.mark.parametrize(
    "stream", [*[-1, 2**64, 1.5, NAN, True, "7", np.array(1.5), b"7"], *NO_HANDLES]
)
def test_a_stream_is_a_handle(stream: Any) -> None:
    with pytest.raises(RequestError, match="^rms_norm: stream is .*, expected an integer in 0"):
        norm_with(1.0, stream=stream)


@pytest.mark.parametrize("device", [None, "cpu", "cuda"])
def test_host_arrays_have_no_stream(device: str | None) -> None:
    """It was taken and ignored."""

    class Handle:
        def __int__(self) -> int:
            return 7

    for stream in (Handle(), np.uint64(7), 7):
        message = "^rms_norm: stream is 7, expected None beside host arrays$"
        with pytest.raises(RequestError, match=message):
            norm_with(1.0, stream=stream, device=device)


@pytest.mark.parametrize("device", [0, True, b"cuda", ("cuda", 0), "cpu\0", "\ud800"])
def test_a_device_is_a_string(device: Any) -> None:
    with pytest.raises(RequestError, match='^rms_norm: device is .*, expected "cpu", "cuda" or'):
        norm_with(1.0, device=device)


# ---- docstrings ----


@pytest.mark.parametrize("name", ops.__all__)
def test_a_docstring_tells_every_argument(name: str) -> None:
    """Those of all ops are the module's to tell; a formula has a source."""
    function = getattr(ops, name)
    parameters = set(inspect.signature(function).parameters)
    told = set(re.findall(r"\w+", function.__doc__))
    assert parameters - {"device", "stream"} <= told
    if "stream" in parameters:
        assert "stream, errors: see this module" in " ".join(function.__doc__.split())
        assert re.search(r"\d{4}|torch\.nn", function.__doc__), "no source"


# ---- threads ----


def test_two_threads_share_the_ops(rng: np.random.Generator) -> None:
    x, weight = bfloat16(normal(rng, 9, 96)), bfloat16(normal(rng, 64, 96))
    want = ops.linear(x, weight)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: ops.linear(x, weight), range(64)):
            assert np.array_equal(got, want)


FORKS = """
import os
import numpy as np
from milpy import ops
x, weight = np.full((64, 512), 0x3F80, np.uint16), np.full((96, 512), 0x3F80, np.uint16)
assert (ops.linear(x, weight) == 512).all()
child = os.fork()
if child == 0:
    os._exit(0 if (ops.linear(x, weight) == 512).all() else 1)
assert os.waitpid(child, 0)[1] == 0
assert (ops.linear(x, weight) == 512).all()
"""


def test_a_forked_child_has_threads_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_bits_of_another_dtype_are_refused() -> None:
    """float32, say, which a product gives where it allocates: read as bits it would be zeros."""
    with pytest.raises(RequestError, match="bits is float32 of .*, expected uint16 or"):
        ops.from_bfloat16(np.ones(4, np.float32))
    assert ops.from_bfloat16(ops.bfloat16(np.ones(2, np.float32))).tolist() == [1.0, 1.0]
