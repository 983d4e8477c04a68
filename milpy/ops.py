"""milpy's ops on your arrays: NumPy's on the CPU, or those of any DLPack library in place on a GPU.

An array is a `numpy.ndarray`, or anything with `__dlpack__` (PyTorch, CuPy): NumPy arrays and host
tensors run on the CPU; with `device="cuda"` or `"cuda:N"` they are copied to the GPU and back.
Device arrays are used in place. All arrays of a call lie on one device; they are contiguous in C
order, begin at a multiple of 16 bytes, and what an op writes overlaps nothing else.

bfloat16: NumPy has none, so it is given as its bits in `uint16` (`bfloat16()`, `from_bfloat16()`),
or as `ml_dtypes.bfloat16`. What one product hands to the next op (`residual`, `gate_up`, `qkv`,
`y`) is bfloat16; on the CPU it may be float32 as well, and is then not rounded.

`out=None` allocates for NumPy arrays; other arrays need `out`. Each op returns what it wrote.

Streams: device work is queued on `stream` (a handle, or a stream object of PyTorch or CuPy), by
default on the producer's current stream where its type tells it (PyTorch, CuPy), else on the legacy
default stream. Nothing waits: order other streams yourself, and keep the arrays alive as you would
for a kernel of your own. Each (device, stream) has a workspace, kept for good and locked while an
op is queued, so threads may share it. After one call of the same shapes on the stream an op
allocates and waits for nothing and may be captured in a CUDA graph; graphs captured on one stream
share its workspace, so do not run them at the same time.

Errors: `RequestError` (a ValueError) says what was found and what was expected. Indices in host
arrays are checked; those on a GPU are not, and a bad one gives an unspecified result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from milpy import _C, wheels
from milpy.errors import RequestError

__all__ = [
    "bfloat16",
    "embedding",
    "from_bfloat16",
    "linear",
    "rms_norm",
    "sample",
    "sampling_params",
    "silu_and_mul",
]

# A NumPy array, or an array of another library that speaks DLPack.
Array: TypeAlias = Any
Stream: TypeAlias = Any

_DLPACK_CPU = 1
_NO_SYNC = -1  # to __dlpack__: the op runs on the producer's own stream, or the caller orders it


# ---- bfloat16 in NumPy ----


def bfloat16(x: ArrayLike) -> NDArray[np.uint16]:
    """The bits of x rounded to bfloat16, nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, bits >> 16 | 0x40, rounded).astype(np.uint16)


def from_bfloat16(bits: NDArray[Any]) -> NDArray[np.float32]:
    """float32 of bfloat16 bits (uint16, or ml_dtypes.bfloat16)."""
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


# ---- arrays and streams ----


def _operand(x: Array) -> Any:
    """What the core reads: a NumPy array as it is, a fresh capsule of any other."""
    if x is None or isinstance(x, np.ndarray) or not hasattr(x, "__dlpack__"):
        return x
    on_device = x.__dlpack_device__()[0] != _DLPACK_CPU
    arguments = {"stream": _NO_SYNC} if on_device else {}
    try:
        return x.__dlpack__(max_version=(1, 0), **arguments)
    except TypeError:  # a producer from before DLPack 1.0
        return x.__dlpack__(**arguments)


def _current_stream(arrays: Sequence[Array]) -> int:
    """The producer's current stream, where one of the arrays says whose it is. Imports nothing."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    for x in arrays:
        if torch is not None and isinstance(x, torch.Tensor) and x.is_cuda:
            return int(torch.cuda.current_stream(x.device).cuda_stream)
        if cupy is not None and isinstance(x, cupy.ndarray):
            with x.device:
                return int(cupy.cuda.get_current_stream().ptr)
    return 0


def _handle(stream: Stream) -> int:
    for name in ("cuda_stream", "ptr"):  # torch.cuda.Stream, cupy.cuda.Stream
        if hasattr(stream, name):
            return int(getattr(stream, name))
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    return int(stream)


def _run(
    op: Callable[..., None],
    arrays: Sequence[Array],
    *rest: object,
    device: str | None,
    stream: Stream | None,
) -> None:
    wheels.add_library_dirs()
    where = _current_stream(arrays) if stream is None else _handle(stream)
    op(device, where, *map(_operand, arrays), *rest)


def _sizes(op: str, name: str, x: Array, n_dims: int) -> tuple[int, ...]:
    shape = getattr(x, "shape", None)
    if shape is None or len(shape) != n_dims:
        found = type(x).__name__ if shape is None else f"shape {tuple(shape)}"
        raise RequestError(f"{op}: {name} has {found}, expected {n_dims} dimensions")
    return tuple(int(size) for size in shape)


def _empty(op: str, beside: Array, shape: Sequence[int], dtype: object) -> NDArray[Any]:
    """A result beside a NumPy array."""
    if not isinstance(beside, np.ndarray):
        raise RequestError(
            f"{op}: out is None, expected an array: results are allocated for NumPy arrays only"
        )
    return np.empty(shape, np.dtype(dtype))  # type: ignore[call-overload]


def _bfloat16_like(x: Array) -> object:
    """x's bfloat16 where it is one, else uint16."""
    return x.dtype if getattr(x.dtype, "name", "") == "bfloat16" else np.uint16


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

    x [T, H] float32; weight [H] float32; residual [T, H] bfloat16 (float32 too on the CPU); out
    [T, H] bfloat16. With a residual, x += residual comes first and is written to x. RMSNorm: Zhang
    and Sennrich 2019, in float32 as Hugging Face's LlamaRMSNorm.
    """
    if out is None:
        out = _empty("rms_norm", x, _sizes("rms_norm", "x", x, 2), np.uint16)
    _run(_C.op_rms_norm, [out, x, weight, residual], eps, device=device, stream=stream)
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
    quickest on a GPU, 16 on the CPU). SwiGLU: Shazeer 2020.
    """
    if out is None:
        T, width = _sizes("silu_and_mul", "gate_up", gate_up, 2)
        out = _empty("silu_and_mul", gate_up, (T, width // 2), _bfloat16_like(gate_up))
    _run(_C.op_silu_and_mul, [out, gate_up], interleave, device=device, stream=stream)
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
    the weight is packed anew in each call.
    """
    if out is None:
        shape = _sizes("linear", "x", x, 2)[0], _sizes("linear", "weight", weight, 2)[0]
        out = _empty("linear", x, shape, np.float32)
    _run(_C.op_linear, [out, x, weight, bias], deterministic, device=device, stream=stream)
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

    tokens [T] int32; weight [V, H] bfloat16; out [T, H] float32.
    """
    if out is None:
        shape = (
            _sizes("embedding", "tokens", tokens, 1)[0],
            _sizes("embedding", "weight", weight, 2)[1],
        )
        out = _empty("embedding", tokens, shape, np.float32)
    _run(_C.op_embedding, [out, tokens, weight], device=device, stream=stream)
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


def sampling_params(
    n: int,
    *,
    temperature: ArrayLike = 0.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
    seed: ArrayLike = 0,
) -> NDArray[np.int32]:
    """The parameters of n rows as `sample` reads them: [n, 6] int32, one value or one for each row.

    temperature 0: greedy; top_k 0 and top_p 1: off. For a GPU, copy the result there.
    """
    params = np.zeros(n, _SAMPLING)
    for name, value in [("temperature", temperature), ("top_k", top_k), ("top_p", top_p)]:
        params[name] = value
    params["n_logprobs"] = -1
    params["seed"] = np.asarray(seed, np.uint64)
    return params.view(np.int32).reshape(n, -1)


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
    the lowest id. A draw is a pure function of (seed, position) and of the logits.
    """
    n = _sizes("sample", "logits", logits, 2)[0]
    if positions is None:
        positions = _empty("sample", logits, (n,), np.int32)
        positions[:] = 0
    if out is None:
        out = _empty("sample", logits, (n,), np.int32)
    _run(_C.op_sample, [out, logits, params, positions], device=device, stream=stream)
    return out
