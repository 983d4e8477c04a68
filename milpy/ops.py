"""milpy's ops on your arrays: NumPy's on the CPU, or those of any DLPack library in place on a GPU.

An array is a `numpy.ndarray`, or anything with `__dlpack__` (PyTorch, CuPy): NumPy arrays and host
tensors run on the CPU; with `device="cuda"` or `"cuda:N"` they are copied to the GPU and back.
Device arrays are used in place. All arrays of a call lie on one device; they are contiguous in C
order, begin at a multiple of 16 bytes, and what an op writes overlaps nothing else.

bfloat16: NumPy has none, so it is given as its bits in `uint16` (`bfloat16()`, `from_bfloat16()`),
or as `ml_dtypes.bfloat16`. What one product hands to the next op (`residual`, `gate_up`, `qkv`,
`y`) is bfloat16; on the CPU it may be float32 as well, and is then not rounded. A KV cache may be
float16 instead; then the q beside it and attention's result are float16 too.

`out=None` allocates for NumPy arrays; other arrays need `out`. Each op returns what it wrote.

Streams: device work is queued on `stream` (a handle, or a stream object of PyTorch, CuPy or
cuda.core), by default on the producer's current stream where its type tells it (DLPack's exchange
API; PyTorch and CuPy of any age), else on the legacy default stream. No call waits for it: order
other streams yourself, and keep the arrays alive as you would for a kernel of your own. Host arrays
are the exception, on the CPU or copied to a GPU: their call returns when the results are there, and
refuses a stream. A stream of another device is refused where CUDA tells it (12.8 or newer, and the
stream's first op is not captured). The current device is left as it was. Each (device, stream) has
a workspace, kept for good and locked while an op is queued, so threads may share it; the first
`linear` that is not deterministic adds cuBLASLt's 32 MiB. The workspace is known by the stream's
handle: destroy a stream once what ops queued there has run, not before.

Graphs: an op may be captured, and be called while another thread captures. It allocates in the
first call of its shapes on a stream only, and never in the graph. Graphs captured on one stream
share its workspace, so do not run them at the same time.

Errors: `RequestError` (a ValueError) says what was found and what was expected: a dtype, a shape,
arrays that are read-only where they are written, not contiguous, badly aligned, of two devices, or
masked (`numpy.ma`): no op looks at a mask.
`EngineError` and `OutOfMemoryError` tell what a device lacks. Scalars are checked: any number of
Python's or NumPy's will do, but no NaN or infinity, and True is no number nor 1 a flag. Indices,
parameters and scales in host arrays are checked. Those on a GPU are not, since that would wait: a
bad one reaches nothing outside the arrays and no other row, as each op says.

Letters: T tokens, S sequences, H hidden size, F ffn width, V vocabulary, N query heads, K kv heads,
D head size, P rows of a page, E adapters, R LoRA rank, G segments; in `linear` and `lora` N and K
are a weight's rows and columns, M the rows of x.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from numbers import Number
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from milpy import _C, wheels
from milpy.errors import RequestError
from milpy.scalars import (
    MAX_INT32,
    MAX_UINT64,
    check_flag,
    check_integer,
    check_real,
    kind_of_argument,
    refuse,
)

__all__ = [
    "Sampled",
    "attention",
    "bfloat16",
    "embedding",
    "from_bfloat16",
    "linear",
    "lora",
    "lora_expand",
    "lora_shrink",
    "rms_norm",
    "rope",
    "rope_and_cache",
    "rope_tables",
    "sample",
    "sample_logprobs",
    "sampling_params",
    "silu_and_mul",
]

# A NumPy array, or an array of another library that speaks DLPack.
Array: TypeAlias = Any
Stream: TypeAlias = Any

_DLPACK_CPU, _DLPACK_CUDA_HOST = 1, 3
_NO_SYNC = -1  # to __dlpack__: the op runs on the producer's own stream, or the caller orders it
_LEAST_FLOAT32 = float(np.finfo(np.float32).smallest_subnormal)
_MOST_FLOAT32 = float(np.finfo(np.float32).max)


# ---- bfloat16 in NumPy ----


def bfloat16(x: ArrayLike) -> NDArray[np.uint16]:
    """The bits of x rounded to bfloat16, nearest even: a new uint16 array of x's shape.

    x: a real number (an integer has 64 bits at most), or an array of them of any shape, of NumPy's
    types or ml_dtypes.bfloat16; it becomes float32 first. NaN stays NaN, what is too large becomes
    infinite. RequestError for text, None, booleans, complex numbers and masked arrays.
    """
    found = _host_array("bfloat16: x", x, "real numbers")
    if found.dtype.kind not in "iuf" and found.dtype.name != "bfloat16":
        _refuse_array("bfloat16: x", found, "real numbers")
    # Of one dimension at least: NumPy warns where a scalar wraps around.
    with np.errstate(over="ignore"):
        bits = np.ascontiguousarray(found, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, bits >> 16 | 0x40, rounded).astype(np.uint16).reshape(found.shape)


def from_bfloat16(bits: NDArray[Any]) -> NDArray[np.float32]:
    """The values of bfloat16 bits, exactly: a new float32 array of their shape.

    bits: uint16 or ml_dtypes.bfloat16, of any shape; RequestError for another dtype.
    """
    found = _host_array("from_bfloat16: bits", bits, "uint16 or bfloat16")
    if found.dtype.name not in ("uint16", "bfloat16"):
        _refuse_array("from_bfloat16: bits", found, "uint16 or bfloat16")
    plain = found.view(np.uint16) if found.dtype.name == "bfloat16" else found
    wide = np.ascontiguousarray(plain, np.uint32) << 16
    return wide.view(np.float32).reshape(found.shape)


def _host_array(name: str, x: ArrayLike, expected: str) -> NDArray[Any]:
    """x as NumPy reads it."""
    if isinstance(x, np.ma.MaskedArray):
        raise RequestError(f"{name} is a masked array, expected {expected} without a mask")
    try:
        return np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as problem:  # lists of two lengths, a GPU's array
        raise RequestError(f"{name} is {kind_of_argument(x)}, expected {expected}") from problem


def _refuse_array(name: str, found: NDArray[Any], expected: str) -> NoReturn:
    raise RequestError(f"{name} is {found.dtype} of shape {found.shape}, expected {expected}")


# ---- arrays and streams ----


def _operand(op: str, x: Array) -> Any:
    """What the core reads: a NumPy array as it is, a fresh capsule of any other."""
    if x is None or type(x) is np.ndarray:
        return x
    if isinstance(x, np.ndarray) or not hasattr(x, "__dlpack__"):
        if isinstance(x, np.ma.MaskedArray):
            raise RequestError(f"{op}: found a masked array, expected arrays without a mask")
        return x
    is_on_device = _device_of(x) is not None
    arguments = {"stream": _NO_SYNC} if is_on_device else {}
    with _device_made_current(x) if is_on_device else nullcontext():
        try:
            return x.__dlpack__(max_version=(1, 0), **arguments)
        except TypeError:  # a producer from before DLPack 1.0
            return x.__dlpack__(**arguments)


def _device_of(x: Array) -> tuple[int, int] | None:
    """DLPack's (type, number) of the device that x lies on; None for a host's array."""
    if isinstance(x, np.ndarray) or not hasattr(x, "__dlpack_device__"):
        return None
    kind, ordinal = x.__dlpack_device__()
    return None if kind in (_DLPACK_CPU, _DLPACK_CUDA_HOST) else (int(kind), int(ordinal))


def _device_made_current(x: Array) -> AbstractContextManager[object]:
    """As x's library wants it for an export: torch refuses an array of another device than its
    current one."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(x, torch.Tensor) and x.is_cuda:
        device: AbstractContextManager[object] = torch.cuda.device(x.device)
        return device
    if cupy is not None and isinstance(x, cupy.ndarray):
        device = x.device
        return device
    return nullcontext()


def _stream_of(x: Array, device: tuple[int, int]) -> int | None:
    """The stream that x's library now works on, where its type tells it. Imports nothing."""
    api = getattr(type(x), "__dlpack_c_exchange_api__", None)
    told = None if api is None else _C.dlpack_stream(api, *device)
    if told is not None:
        return told
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(x, torch.Tensor):  # of an age that has no such table
        return int(torch.cuda.current_stream(x.device).cuda_stream)
    if cupy is not None and isinstance(x, cupy.ndarray):
        with x.device:
            return int(cupy.cuda.get_current_stream().ptr)
    return None


def _current_stream(arrays: Sequence[Array]) -> int:
    """Of the first array that tells one; else the legacy default stream."""
    for x in arrays:
        device = _device_of(x)
        stream = None if device is None else _stream_of(x, device)
        if stream is not None:
            return stream
    return 0


def _handle(op: str, stream: Stream, arrays: Sequence[Array]) -> int:
    # torch.cuda.Stream, cupy.cuda.Stream
    handle: Any = getattr(stream, "cuda_stream", getattr(stream, "ptr", stream))
    if handle is stream and hasattr(stream, "__cuda_stream__"):
        handle = stream.__cuda_stream__()[1]
    # int() opens the handles of cuda.bindings; of a number it would cut a fraction off.
    if hasattr(handle, "__int__") and not isinstance(handle, Number | np.generic | np.ndarray):
        with suppress(TypeError, ValueError, OverflowError):
            handle = int(handle)
    number = check_integer(f"{op}: stream", handle, 0, MAX_UINT64)
    if all(_device_of(x) is None for x in arrays):
        refuse(f"{op}: stream", number, "None beside host arrays")
    return number


def _run(
    op: str,
    call: Callable[..., None],
    arrays: Sequence[Array],
    *rest: object,
    device: str | None,
    stream: Stream | None,
) -> None:
    # Printable: what no device's name has would not get as far as the core's own check.
    if device is not None and not (isinstance(device, str) and device.isprintable()):
        refuse(f"{op}: device", device, '"cpu", "cuda" or "cuda:N"')
    wheels.add_library_dirs(_C.add_library_dir)
    where = _current_stream(arrays) if stream is None else _handle(op, stream, arrays)
    call(device, where, *[_operand(op, x) for x in arrays], *rest)


def _sizes(op: str, name: str, x: Array, n_dims: int) -> tuple[int, ...]:
    shape = getattr(x, "shape", None)
    if shape is None or len(shape) != n_dims:
        found = f"is a {type(x).__name__}" if shape is None else f"has shape {tuple(shape)}"
        raise RequestError(f"{op}: {name} {found}, expected an array of {n_dims} dimensions")
    return tuple(int(size) for size in shape)


def _empty(
    op: str, beside: Array, shape: Sequence[int], dtype: object, name: str = "out"
) -> NDArray[Any]:
    """An array of that name beside a NumPy array."""
    if not isinstance(beside, np.ndarray):
        raise RequestError(
            f"{op}: {name} is None, expected an array: they are made beside NumPy arrays only"
        )
    return np.empty(shape, np.dtype(dtype))  # type: ignore[call-overload]


def _bfloat16_like(x: Array) -> object:
    """x's bfloat16 where it is one, else uint16."""
    return x.dtype if getattr(x.dtype, "name", "") == "bfloat16" else np.uint16


def _cached_like(x: Array) -> object:
    """float16 where x is, else its bfloat16."""
    return np.float16 if x.dtype == np.float16 else _bfloat16_like(x)


# ---- scalars ----


def _float32(name: str, value: object, least: float, expected: str) -> float:
    """A number from `least` on that is finite as the float32 that the core holds."""
    number = check_real(name, value, expected)
    if not least <= number <= _MOST_FLOAT32:
        refuse(name, number, expected)
    return number


# ---- ops without a batch ----


def rms_norm(
    x: Array,
    weight: Array,
    eps: float,
    residual: Array | None = None,
    *,
    out: Array | None = None,
    device: str | None = None,
    stream: Stream | None = None,
) -> Array:
    """out = x / sqrt(mean(x^2) + eps) * weight, rounded to bfloat16 once.

    x [T, H] float32, H at least 1; weight [H] float32; residual [T, H] bfloat16 (float32 too on the
    CPU); eps, finite and at least 0, added to the mean of squares (with 0, a row of zeros gives
    NaN); out [T, H] bfloat16. With a residual, x += residual comes first and is written to x, which
    must be writable then. RMSNorm: Zhang and Sennrich 2019, in float32 as Hugging Face's
    LlamaRMSNorm. Device, stream, errors: see this module.
    """
    eps = _float32("rms_norm: eps", eps, 0.0, "a finite float32 of at least 0")
    if out is None:
        out = _empty("rms_norm", x, _sizes("rms_norm", "x", x, 2), np.uint16)
    arrays = [out, x, weight, residual]
    _run("rms_norm", _C.op_rms_norm, arrays, eps, device=device, stream=stream)
    return out


def silu_and_mul(
    gate_up: Array,
    interleave: int = 0,
    *,
    out: Array | None = None,
    device: str | None = None,
    stream: Stream | None = None,
) -> Array:
    """out = silu(gate) * up, silu(g) = g / (1 + e^-g), rounded to bfloat16 once.

    gate_up [T, 2 F] bfloat16 (float32 too on the CPU); out [T, F] bfloat16. interleave 0: a row is
    gate's F columns, then up's; g: g columns of gate and g of up by turns (g divides F; 8 is
    quickest on a GPU, 16 on the CPU); other g, and rows of an odd length, are refused. SwiGLU:
    Shazeer 2020. Device, stream, errors: see this module.
    """
    interleave = check_integer("silu_and_mul: interleave", interleave, 0, MAX_INT32)
    if out is None:
        T, width = _sizes("silu_and_mul", "gate_up", gate_up, 2)
        out = _empty("silu_and_mul", gate_up, (T, width // 2), _bfloat16_like(gate_up))
    arrays = [out, gate_up]
    _run("silu_and_mul", _C.op_silu_and_mul, arrays, interleave, device=device, stream=stream)
    return out


def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    out: Array | None = None,
    deterministic: bool = False,
    device: str | None = None,
    stream: Stream | None = None,
) -> Array:
    """out = x weight^T (+ bias), accumulated in float32 and rounded to out's dtype once.

    x [M, K] bfloat16; weight [N, K] bfloat16; bias [N] float32; out [M, N] float32 or bfloat16
    (float32 where it is allocated). On a GPU, `deterministic` keeps a row's bits from depending on
    the other rows, and K is quickest as a multiple of 8; on the CPU they never depend on them, and
    the weight is packed anew in each call. The formula of torch.nn.Linear; docs/numerics.md has the
    order of its sums. Device, stream, errors: see this module.
    """
    deterministic = check_flag("linear: deterministic", deterministic)
    if out is None:
        shape = _sizes("linear", "x", x, 2)[0], _sizes("linear", "weight", weight, 2)[0]
        out = _empty("linear", x, shape, np.float32)
    arrays = [out, x, weight, bias]
    _run("linear", _C.op_linear, arrays, deterministic, device=device, stream=stream)
    return out


def embedding(
    tokens: Array,
    weight: Array,
    *,
    out: Array | None = None,
    device: str | None = None,
    stream: Stream | None = None,
) -> Array:
    """out[t] = weight[tokens[t]] as float32; zeros for a token outside 0 .. V - 1.

    tokens [T] int32; weight [V, H] bfloat16; out [T, H] float32. A row of torch.nn.Embedding,
    widened. Device, stream, errors: see this module.
    """
    if out is None:
        shape = (
            _sizes("embedding", "tokens", tokens, 1)[0],
            _sizes("embedding", "weight", weight, 2)[1],
        )
        out = _empty("embedding", tokens, shape, np.float32)
    _run("embedding", _C.op_embedding, [out, tokens, weight], device=device, stream=stream)
    return out


# ---- sampling ----

_SAMPLING = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("n_logprobs", np.int32),
        ("seed", np.uint64),
    ]
)


# As the core's check of params, which sees those of a host alone.
_LIMITS: dict[str, tuple[float, float, str]] = {
    "temperature": (0, 1e30, "0 to 1e30"),
    "top_k": (0, MAX_INT32, f"0 to {MAX_INT32}"),
    "top_p": (_LEAST_FLOAT32, 1, "above 0 and up to 1"),
    "n_logprobs": (-1, _C.MAX_LOGPROBS, f"-1 to {_C.MAX_LOGPROBS}"),
    "seed": (0, MAX_UINT64, f"0 to {MAX_UINT64}"),
}


def _column(name: str, value: ArrayLike, n: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The value, or one for each row, within its limits."""
    what = "numbers" if dtype.kind == "f" else "integers"
    what += f", one or one for each of {n} rows"
    found = _host_array(f"sampling_params: {name}", value, what)
    kinds = "iuf" if dtype.kind == "f" else "iu"
    if found.dtype.kind not in kinds or found.shape not in ((), (n,)):
        _refuse_array(f"sampling_params: {name}", found, what)
    low, high, expected = _LIMITS[name]
    for number in (found.min().item(), found.max().item()) if found.size > 0 else ():
        if not low <= number <= high:
            refuse(f"sampling_params: {name}", number, expected)
    return found


def sampling_params(
    n: int,
    *,
    temperature: ArrayLike = 0.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
    seed: ArrayLike = 0,
    n_logprobs: ArrayLike = -1,
) -> NDArray[np.int32]:
    """The parameters of n rows as `sample` reads them: a new [n, 6] int32 array of NumPy's.

    n from 0 on. Each parameter is one number, or n of them, [n], of any integer dtype, for
    temperature and top_p of any float dtype too. temperature 0 to 1e30, 0: greedy; top_k from 0 on,
    0: off; top_p above 0 and up to 1, 1: off; seed, any 64 bits. n_logprobs, for `sample_logprobs`:
    -1 none, 0 the token's, up to 20 that many of the best tokens' as well. RequestError names the
    one that is of another dtype or shape, or out of its range. For a GPU, copy the result there:
    `sample` does not look at it.
    """
    n = check_integer("sampling_params: n", n, 0, MAX_INT32)
    params = np.zeros(n, _SAMPLING)
    given = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "n_logprobs": n_logprobs,
        "seed": seed,
    }
    for name, value in given.items():
        params[name] = _column(name, value, n, _SAMPLING[name])
    return params.view(np.int32).reshape(n, _SAMPLING.itemsize // 4)


def sample(
    logits: Array,
    params: Array,
    positions: Array | None = None,
    *,
    out: Array | None = None,
    device: str | None = None,
    stream: Stream | None = None,
) -> Array:
    """A token for each row: temperature, then top-k, then top-p, then one draw.

    logits [n, V] float32, kept; params [n, 6] int32, from `sampling_params`; positions [n] int32,
    the counter of each row's draw (the index of the token to choose, say), zeros where NumPy's are
    left out; out [n] int32, -1 for a row with a NaN or without a finite maximum. Greedy and ties:
    the lowest id. A draw is a pure function of (seed, position) and of the logits. Params in a host
    array must be such as `sampling_params` takes; on a GPU others choose some token. V is at most
    524,288 on a GPU. Top-k: Fan et al. 2018; top-p: Holtzman et al. 2020; docs/numerics.md has the
    definition. Device, stream, errors: see this module.
    """
    arrays = _sample_arrays("sample", logits, params, positions, out)
    given = [*arrays, None, None, None, None]
    _run("sample", _C.op_sample, given, device=device, stream=stream)
    return arrays[0]


def _sample_arrays(
    op: str, logits: Array, params: Array, positions: Array | None, out: Array | None
) -> list[Array]:
    n = _sizes(op, "logits", logits, 2)[0]
    if positions is None:
        positions = _empty(op, logits, (n,), np.int32, "positions")
        positions[:] = 0
    if out is None:
        out = _empty(op, logits, (n,), np.int32)
    return [out, logits, params, positions]


class Sampled(NamedTuple):
    """What `sample_logprobs` wrote, arrays of the logits' kind: tokens [n] int32, logprobs [n]
    float32, ranks [n] int32, top_tokens [n, c] int32, top_logprobs [n, c] float32; it says what
    each holds and what c is."""

    tokens: Array  # [n] int32
    logprobs: Array  # [n] float32
    ranks: Array  # [n] int32
    top_tokens: Array  # [n, c] int32
    top_logprobs: Array  # [n, c] float32


def _n_columns(params: Array) -> int:
    """Room for the most that a row asks for; what is no such number is refused later."""
    if not isinstance(params, np.ndarray) or params.ndim != 2 or params.size == 0:
        return 0
    if params.dtype != np.int32:
        return 0
    column = list(_SAMPLING.names or ()).index("n_logprobs")
    asked = params[:, column].max() if params.shape[1] > column else 0
    return int(min(max(asked, 0), _C.MAX_LOGPROBS))


def sample_logprobs(
    logits: Array,
    params: Array,
    positions: Array | None = None,
    *,
    out: Array | None = None,
    logprobs: Array | None = None,
    ranks: Array | None = None,
    top_tokens: Array | None = None,
    top_logprobs: Array | None = None,
    device: str | None = None,
    stream: Stream | None = None,
) -> Sampled:
    """`sample`, and for rows with n_logprobs >= 0 how likely its token was, and which were best.

    logprob = (x - max) - log(sum exp(x - max)), x the row's logits before temperature and filters.
    logits, params, positions and out as in `sample`, the same tokens; logprobs [n] float32, of the
    token; ranks [n] int32, 1 plus how many logits come before the token's (larger, or equal at a
    lower id); top_tokens [n, c] int32 and top_logprobs [n, c] float32, c <= 20: the row's
    n_logprobs best, best first, cut to c; -1 and 0 where there are fewer (c is that of the one that
    is given, else what the rows of params ask for). A row with n_logprobs -1 or token -1 has
    logprob 0, rank 0. On a GPU n_logprobs above 20 counts as 20, below 0 as -1. log_softmax of
    torch.nn.functional, in float32. Device, stream, errors: see this module.
    """
    op = "sample_logprobs"
    arrays = _sample_arrays(op, logits, params, positions, out)
    n = _sizes(op, "logits", logits, 2)[0]
    if logprobs is None:
        logprobs = _empty(op, logits, (n,), np.float32, "logprobs")
    if ranks is None:
        ranks = _empty(op, logits, (n,), np.int32, "ranks")
    # As many columns as the one that is given.
    if top_tokens is None:
        columns = (
            _n_columns(params)
            if top_logprobs is None
            else _sizes(op, "top_logprobs", top_logprobs, 2)[1]
        )
        top_tokens = _empty(op, logits, (n, columns), np.int32, "top_tokens")
    if top_logprobs is None:
        columns = _sizes(op, "top_tokens", top_tokens, 2)[1]
        top_logprobs = _empty(op, logits, (n, columns), np.float32, "top_logprobs")
    arrays += [logprobs, ranks, top_tokens, top_logprobs]
    _run(op, _C.op_sample, arrays, device=device, stream=stream)
    return Sampled(arrays[0], logprobs, ranks, top_tokens, top_logprobs)


# ---- rotary embedding ----


def rope_tables(
    n_positions: int, rotary_dim: int, theta: float = 10_000.0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of plain RoPE, of p * theta^(-2 i / rotary_dim) for position p and pair i.

    Two new NumPy arrays, [n_positions, rotary_dim / 2] float32. n_positions is from 0 on;
    rotary_dim even and at least 2; theta, above 0, in 1e-30..1e30 as in a model's config;
    RequestError for others. Su et al. 2021; computed in float64. Other kinds (Llama 3's) differ in
    these tables alone.
    """
    op, expected = "rope_tables", "a number in 1e-30..1e30"
    n_positions = check_integer(f"{op}: n_positions", n_positions, 0, MAX_INT32)
    rotary_dim = check_integer(f"{op}: rotary_dim", rotary_dim, 2, MAX_INT32)
    if rotary_dim % 2 != 0:
        refuse(f"{op}: rotary_dim", rotary_dim, "an even number")
    theta = check_real(f"{op}: theta", theta, expected)
    if not 1e-30 <= theta <= 1e30:
        refuse(f"{op}: theta", theta, expected)
    frequencies = theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    angles = np.arange(n_positions, dtype=np.float64)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rope(
    x: Array,
    positions: Array,
    cos: Array,
    sin: Array,
    *,
    interleaved: bool = False,
    out: Array | None = None,
    device: str | None = None,
    stream: Stream | None = None,
) -> Array:
    """out = x with each head's pairs (a, b) turned: (a cos - b sin, b cos + a sin), rounded once.

    x [T, N, D] bfloat16 (float32 too on the CPU), D at most 256; positions [T] int32; cos, sin
    [n_positions, rotary_dim / 2] float32, rotary_dim <= D (columns from there on are copied); out
    [T, N, D] bfloat16. Pairs are (d, d + rotary_dim / 2) as Hugging Face lays them out, or (2 i,
    2 i + 1) where interleaved. A position outside the tables is refused; on a GPU it counts as 0.
    RoPE: Su et al. 2021. Device, stream, errors: see this module.
    """
    interleaved = check_flag("rope: interleaved", interleaved)
    if out is None:
        out = _empty("rope", x, _sizes("rope", "x", x, 3), _bfloat16_like(x))
    arrays = [out, x, positions, cos, sin]
    _run("rope", _C.op_rope, arrays, interleaved, device=device, stream=stream)
    return out


def rope_and_cache(
    qkv: Array,
    positions: Array,
    cos: Array,
    sin: Array,
    k_cache: Array,
    v_cache: Array,
    page_table: Array,
    query_indptr: Array,
    kv_lengths: Array,
    *,
    interleaved: bool = False,
    out: Array | None = None,
    device: str | None = None,
    stream: Stream | None = None,
) -> Array:
    """out = `rope` of q; `rope` of k and v itself go to the rows of their pages, rounded once.

    qkv [T, (N + 2 K) D] bfloat16 (float32 too on the CPU), q then k then v; positions, cos, sin and
    interleaved as in `rope`; k_cache, v_cache [n_pages, K, P, D] bfloat16 or float16, written, P a
    power of two from 16 to 256, D a multiple of 8 up to 256; page_table [S, max_pages] int32;
    query_indptr [S + 1] int32, the sequences' first rows of T, from 0 to T; kv_lengths [S] int32,
    these tokens included: token i of a sequence's n goes to row kv_length - n + i of its pages; out
    [T, N, D] of the caches' dtype. Float16 cannot hold 65520 and more: such values become infinite;
    on a GPU it has no more than qkv's bfloat16 bits.

    On a GPU a token whose page or length is bad is not written to the cache, and a start outside
    0 .. T is that of the sequence before. Pages as in PagedAttention (Kwon et al. 2023). Device,
    stream, errors: see this module.
    """
    op = "rope_and_cache"
    interleaved = check_flag(f"{op}: interleaved", interleaved)
    if out is None:
        T, width = _sizes(op, "qkv", qkv, 2)
        _, K, _, D = _sizes(op, "k_cache", k_cache, 4)
        N = max(width // max(D, 1) - 2 * K, 0)
        out = _empty(op, qkv, (T, N, D), _cached_like(k_cache))
    arrays = [out, qkv, positions, cos, sin]
    arrays += [k_cache, v_cache, page_table, query_indptr, kv_lengths]
    _run(op, _C.op_rope_and_cache, arrays, interleaved, device=device, stream=stream)
    return out


# ---- attention ----


def attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    page_table: Array,
    query_indptr: Array,
    kv_lengths: Array,
    scale: float | None = None,
    *,
    window: int = 0,
    softcap: float = 0.0,
    out: Array | None = None,
    device: str | None = None,
    stream: Stream | None = None,
) -> Array:
    """Causal attention of each sequence's queries over its pages: softmax(scale q k^T) v.

    q [T, N, D], N a multiple of K; k_cache, v_cache, page_table, query_indptr and kv_lengths as in
    `rope_and_cache`; out [T, N, D]; q, the caches and out all bfloat16 or all float16. Query i of a
    sequence's n sees keys below kv_length - n + i + 1, of those the last `window` (0: all). scale,
    finite and above 0: 1 / sqrt(D) if None. softcap c, finite: 0 is off, above it scores become
    c tanh(score / c). Online softmax in float32 (Dao 2023, FlashAttention-2), grouped heads. A V
    that is not finite may reach, as NaN, earlier queries of its tile, which weigh it with 0; which
    those are depends on how the queries were cut into calls. On a GPU a bad page or length gives
    the rows of its sequence some value, a bad start those of two. Device, stream, errors: see this
    module.
    """
    op = "attention"
    if scale is None:
        scale = float(max(_sizes(op, "q", q, 3)[2], 1)) ** -0.5
    scale = _float32(f"{op}: scale", scale, _LEAST_FLOAT32, "a finite float32 above 0")
    window = check_integer(f"{op}: window", window, 0, MAX_INT32)
    softcap = _softcap(softcap)
    if out is None:
        out = _empty(op, q, _sizes(op, "q", q, 3), _cached_like(q))
    arrays = [out, q, k_cache, v_cache, page_table, query_indptr, kv_lengths]
    _run(op, _C.op_attention, arrays, scale, window, softcap, device=device, stream=stream)
    return out


def _softcap(value: object) -> float:
    name, expected = "attention: softcap", "0, or a finite float32 above 0"
    number = check_real(name, value, expected)
    # What float32 would round to 0 is no wish to have it off.
    return 0.0 if number == 0 else _float32(name, number, _LEAST_FLOAT32, expected)


# ---- LoRA ----


def _run_lora(
    op: str, y: Array, x: Array, a: Array, v: Array, b: Array,
    segments: Sequence[Array], scale: Array | float, device: str | None, stream: Stream | None,
) -> None:  # fmt: skip
    scales, factor = scale, 1.0
    if not hasattr(scale, "__dlpack__") or getattr(scale, "shape", None) == ():
        expected = "a finite float32, or an array of one for each adapter"
        scales, factor = None, _float32(f"{op}: scale", scale, -_MOST_FLOAT32, expected)
    arrays = [y, x, a, v, b, *segments, scales]
    _run(op, _C.op_lora, arrays, factor, device=device, stream=stream)


def lora(
    y: Array,
    x: Array,
    a: Array,
    b: Array,
    segment_indptr: Array,
    segment_adapter: Array,
    rows: Array,
    scale: Array | float = 1.0,
    *,
    device: str | None = None,
    stream: Stream | None = None,
) -> Array:
    """y[row] += scale (x[row] A^T) B^T for the rows of each segment, in float32, rounded once.

    y [T, N] bfloat16 (float32 too on the CPU), written; x [T, K] bfloat16; a [E, R, K] and b
    [E, N, R] bfloat16, E adapters of one rank R <= 512 (a multiple of 8 on a GPU; pad with zeros);
    rows [n] int32, distinct rows of T, n <= T; segment_indptr [G + 1] int32, from 0 to n, cuts rows
    into segments; segment_adapter [G] int32, the adapter of each; scale: one, or [E] float32,
    finite. On a GPU a row or an adapter that is not there changes nothing, a row that comes twice
    may lose all but one of its sums, and an array's scales are not looked at. Hu et al. 2021;
    segments as in Punica's SGMV (Chen et al. 2023). Device, stream, errors: see this module.
    """
    segments = [segment_indptr, segment_adapter, rows]
    _run_lora("lora", y, x, a, None, b, segments, scale, device, stream)
    return y


def lora_shrink(
    x: Array,
    a: Array,
    segment_indptr: Array,
    segment_adapter: Array,
    rows: Array,
    scale: Array | float = 1.0,
    *,
    out: Array | None = None,
    device: str | None = None,
    stream: Stream | None = None,
) -> Array:
    """out[i] = scale x[rows[i]] A^T, A of the row's segment, in float32: the first half of `lora`.

    x [T, K] bfloat16; a [E, R, K] bfloat16; out [n, R] float32; segment_indptr, segment_adapter,
    rows and scale as in `lora`, but that a row may come twice. On a GPU a row or an adapter that is
    not there gives zeros. Hu et al. 2021. Device, stream, errors: see this module.
    """
    if out is None:
        n, R = _sizes("lora_shrink", "rows", rows, 1)[0], _sizes("lora_shrink", "a", a, 3)[1]
        out = _empty("lora_shrink", x, (n, R), np.float32)
    segments = [segment_indptr, segment_adapter, rows]
    _run_lora("lora_shrink", None, x, a, out, None, segments, scale, device, stream)
    return out


def lora_expand(
    y: Array,
    v: Array,
    b: Array,
    segment_indptr: Array,
    segment_adapter: Array,
    rows: Array,
    *,
    device: str | None = None,
    stream: Stream | None = None,
) -> Array:
    """y[rows[i]] += v[i] B^T, B of the row's segment, rounded once: the second half of `lora`.

    y [T, N] bfloat16 (float32 too on the CPU), written; v [n, R] float32, scaled already; b
    [E, N, R] bfloat16; segment_indptr, segment_adapter and rows as in `lora`, on a GPU too. Hu et
    al. 2021. Device, stream, errors: see this module.
    """
    segments = [segment_indptr, segment_adapter, rows]
    _run_lora("lora_expand", y, None, None, v, b, segments, 1.0, device, stream)
    return y
