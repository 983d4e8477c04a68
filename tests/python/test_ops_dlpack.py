"""How milpy.ops take other libraries' arrays: capsules old and new, and the streams they tell."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.dlpack import CUDA, OldProducer, Producer, exchange_api
from numpy.typing import NDArray

from milpy import _C, ops
from milpy.errors import RequestError
from milpy.ops import from_bfloat16

Array = NDArray[Any]


def norm(x: Any, **changed: Any) -> Array:
    """rms_norm of x [2, 8] with a residual of ones: x is read and written."""
    arrays: dict[str, Any] = {
        "weight": np.ones(8, np.float32),
        "eps": 1e-5,
        "residual": np.ones((2, 8), np.float32),
        "out": np.empty((2, 8), np.uint16),
    }
    return ops.rms_norm(x, **{**arrays, **changed})


def ones(*shape: int) -> Array:
    return np.ones(shape, np.float32)


# ---- capsules ----


@pytest.mark.parametrize("kind", [Producer, OldProducer])
def test_a_tensor_is_used_in_place_and_given_back_once(kind: type[Producer]) -> None:
    array = ones(2, 8)
    x = kind.of(array)
    for n in range(1, 3):
        norm(x)
        assert x.n_deleted == n and (array == 1 + n).all()
    with pytest.raises(RequestError):
        norm(x, weight=ones(7))
    assert x.n_deleted == 3


def test_a_hosts_producer_need_know_no_arguments() -> None:
    class Bare(OldProducer):
        def __dlpack__(self) -> Any:  # type: ignore[override]
            return super().__dlpack__()

    array = ones(2, 8)
    norm(Bare.of(array))
    assert (array == 2).all()


def test_an_unversioned_tensor_comes_from_a_new_producer_too() -> None:
    array = ones(2, 8)
    x = Producer.of(array, is_versioned=False)
    norm(x)
    assert x.n_deleted == 1 and (array == 2).all()


@pytest.mark.parametrize("strides", [None, (8, 1)])
@pytest.mark.parametrize("byte_offset", [0, 16, 64])
def test_strides_may_be_left_out_and_data_may_begin_later(
    strides: tuple[int, ...] | None, byte_offset: int
) -> None:
    memory = np.zeros(64, np.float32)
    start = -memory.ctypes.data % 16  # of the aligned part, from which the offset counts
    at = (start + byte_offset) // 4
    memory[at : at + 16] = 1
    x = Producer(
        memory.ctypes.data + start, (2, 8), memory.dtype, strides=strides, byte_offset=byte_offset
    )
    norm(x)
    assert (memory[at : at + 16] == 2).all() and memory.sum() == 32


def test_the_stride_of_a_dimension_of_one_means_nothing() -> None:
    array = ones(1, 8)
    x = Producer.of(array, strides=(99, 1))
    norm(x, residual=ones(1, 8), out=np.empty((1, 8), np.uint16))
    assert (array == 2).all()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"strides": (16, 1)}, "x is not contiguous, expected"),
        ({"strides": (1, 2)}, "x is not contiguous, expected"),
        ({"byte_offset": 4}, "x begins 4 bytes past a multiple of 16, expected 0"),
        ({"flags": 1}, "x is read-only, expected a writable array"),
        ({"major": 2}, r"x is of DLPack 2.0, expected 1.x"),
        ({"device": (7, 0)}, "x lies on DLPack device type 7, expected 1 .CPU. or 2 .CUDA."),
        ({"device": (CUDA, 0)}, "lies on cpu:0, expected cuda:0 as x"),
    ],
)
def test_what_a_capsule_may_not_say(told: dict[str, Any], message: str) -> None:
    memory = np.zeros(64, np.float32)
    x = Producer(memory.ctypes.data + -memory.ctypes.data % 16, (2, 8), memory.dtype, **told)
    with pytest.raises(RequestError, match=message):
        norm(x)
    assert x.n_deleted == 1


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ((0, 64, 1), "int64"), ((1, 8, 1), "uint8"), ((2, 64, 1), "float64"), ((6, 8, 1), "bool"),
        ((5, 64, 1), "complex64"), ((2, 32, 4), "DLPack's 2:32:4"), ((17, 4, 1), "DLPack's 17:4:1"),
    ],
)  # fmt: skip
def test_a_capsules_dtype_is_told_by_name(dtype: tuple[int, int, int], name: str) -> None:
    tokens = Producer(1 << 20, (3,), np.dtype(np.int32), told_dtype=dtype)
    with pytest.raises(RequestError, match=rf"tokens is {name} \[3\], expected int32 \[\?\]$"):
        ops.embedding(tokens, bits(4, 8), out=ones(3, 8))
    assert tokens.n_deleted == 1


def test_a_read_only_tensor_may_be_read() -> None:
    residual = Producer.of(ones(2, 8), flags=1)
    norm(ones(2, 8), residual=residual)
    assert residual.n_deleted == 1


def test_a_used_capsule_is_refused() -> None:
    producer = Producer.of(ones(2, 8))
    capsule, out = producer.__dlpack__(), np.empty((2, 8), np.uint16)
    with pytest.raises(RequestError, match="weight is a used DLPack capsule, expected a fresh one"):
        _C.op_rms_norm(None, 0, out, capsule, capsule, None, 1e-5)
    assert producer.n_deleted == 1


def test_results_are_allocated_for_numpy_alone() -> None:
    with pytest.raises(RequestError, match="out is None, expected an array"):
        ops.rms_norm(Producer.of(ones(2, 8)), ones(8), 1e-5)


def test_arrays_of_two_gpus_are_refused() -> None:
    gate_up = Producer.of(np.ones((2, 16), np.uint16), device=(CUDA, 1))
    out = Producer.of(np.ones((2, 8), np.uint16), device=(CUDA, 0))
    with pytest.raises(RequestError, match="out lies on cuda:0, expected cuda:1 as gate_up"):
        ops.silu_and_mul(gate_up, out=out)


def far(*shape: int) -> Producer:
    """Of int32 on a GPU: at an address that the host cannot read."""
    return Producer(1 << 20, shape, np.dtype(np.int32), device=(CUDA, 0))


def bits(*shape: int) -> Array:
    return np.zeros(shape, np.uint16)


def int32(*values: int) -> Array:
    return np.array(values, np.int32)


CACHES = bits(4, 1, 16, 32), bits(4, 1, 16, 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.lora(
                bits(4, 5), bits(4, 16), bits(2, 8, 16), bits(2, 5, 8), far(2), int32(1),
                int32(0, 3),
            ),
            "lora: segment_indptr lies on cuda:0, expected cpu:0 as x",
        ),
        (
            lambda: ops.attention(
                bits(1, 2, 32), *CACHES, np.zeros((1, 2), np.int32), far(2), int32(1)
            ),
            "attention: query_indptr lies on cuda:0, expected cpu:0 as q",
        ),
        (
            lambda: ops.rope(bits(2, 1, 32), far(2), *ops.rope_tables(4, 32)),
            "rope: positions lies on cuda:0, expected cpu:0 as x",
        ),
    ],
)  # fmt: skip
def test_an_index_on_a_gpu_is_not_read_beside_arrays_of_the_host(
    call: Callable[[], Any], message: str
) -> None:
    """It was, and the process died, where another array of the host asked for the look."""
    with pytest.raises(RequestError, match=message):
        call()


@pytest.mark.ref
def test_host_tensors_of_torch_are_used_in_place() -> None:
    import torch  # noqa: PLC0415

    rng = np.random.default_rng(5)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 32), 32))
    out = torch.empty(3, 32, dtype=torch.bfloat16)
    assert ops.rms_norm(torch.from_numpy(x), torch.from_numpy(weight), 1e-5, out=out) is out
    want = from_bfloat16(ops.rms_norm(x, weight, 1e-5))
    assert np.array_equal(out.float().numpy(), want)
    flat = torch.ones(33)
    with pytest.raises(RequestError, match="x begins 4 bytes past a multiple of 16"):
        ops.rms_norm(flat[1:].view(1, 32), torch.from_numpy(weight), 1e-5, out=out[:1])


# ---- streams ----


PER_THREAD = 2  # the handle of the per-thread default stream


def silu_on_a_gpu(kind: type[Producer], **options: Any) -> None:
    """Refused before a device is looked for where the stream is the per-thread one."""
    gate_up, out = (kind.of(np.ones((2, n), np.uint16), device=(CUDA, 3)) for n in (16, 8))
    ops.silu_and_mul(gate_up, out=out, **options)


class Handle:
    def __int__(self) -> int:
        return PER_THREAD


@pytest.mark.parametrize(
    "stream",
    [
        PER_THREAD,
        np.uint64(PER_THREAD),
        SimpleNamespace(cuda_stream=PER_THREAD),  # as torch's
        SimpleNamespace(ptr=PER_THREAD),  # as CuPy's
        SimpleNamespace(__cuda_stream__=lambda: (0, PER_THREAD)),  # cuda.core's protocol
        Handle(),  # cuda.bindings'
    ],
)
def test_the_per_thread_default_stream_is_refused_whatever_tells_it(stream: Any) -> None:
    with pytest.raises(RequestError, match=r"stream is 2 .*, expected any other"):
        silu_on_a_gpu(Producer, stream=stream)


def test_an_op_asks_its_arrays_type_for_the_current_stream() -> None:
    asked = []

    def current(kind: int, ordinal: int) -> int:
        asked.append((kind, ordinal))
        return PER_THREAD

    class Telling(Producer):
        __dlpack_c_exchange_api__ = exchange_api(current)

    with pytest.raises(RequestError, match=r"stream is 2 .*, expected any other"):
        silu_on_a_gpu(Telling)
    assert asked == [(CUDA, 3)]


def test_a_type_whose_table_has_no_function_for_it_tells_no_stream() -> None:
    """DLPack wants the function to be there; one that left it out ended the process."""
    assert _C.dlpack_stream(exchange_api(None), CUDA, 3) is None
    ours = exchange_api(lambda kind, ordinal: PER_THREAD)
    assert _C.dlpack_stream(exchange_api(None, major=2, older=ours), CUDA, 3) == PER_THREAD
    assert _C.dlpack_stream(exchange_api(None, major=2, older=exchange_api(None)), CUDA, 3) is None

    class Silent(Producer):
        __dlpack_c_exchange_api__ = exchange_api(None)

    class Telling(Producer):
        __dlpack_c_exchange_api__ = ours

    gate_up, out = (np.ones((2, n), np.uint16) for n in (16, 8))
    silent, telling = Silent.of(gate_up, device=(CUDA, 3)), Telling.of(out, device=(CUDA, 3))
    with pytest.raises(RequestError, match=r"stream is 2 .*, expected any other"):
        ops.silu_and_mul(silent, out=telling)  # the next array is asked
    assert ops._current_stream([silent]) == 0  # none tells one: the legacy default stream


def test_a_stream_that_is_given_is_not_asked_for() -> None:
    class Telling(Producer):
        __dlpack_c_exchange_api__ = exchange_api(lambda kind, ordinal: 1 // 0)

    with pytest.raises(RequestError, match=r"stream is 2 .*, expected any other"):
        silu_on_a_gpu(Telling, stream=PER_THREAD)


def test_a_host_arrays_type_is_not_asked() -> None:
    class Telling(Producer):
        __dlpack_c_exchange_api__ = exchange_api(lambda kind, ordinal: 1 // 0)

    array = ones(2, 8)
    norm(Telling.of(array))
    assert (array == 2).all()


def test_the_exchange_api_that_is_understood_is_asked() -> None:
    ours = exchange_api(lambda kind, ordinal: 1000 * kind + ordinal)
    assert _C.dlpack_stream(ours, CUDA, 3) == 2003
    newer = exchange_api(lambda kind, ordinal: 7, major=2, older=ours)
    assert _C.dlpack_stream(newer, CUDA, 3) == 2003
    with pytest.raises(BufferError, match="exchange API is of DLPack 2, expected 1"):
        _C.dlpack_stream(exchange_api(lambda kind, ordinal: 7, major=2), CUDA, 3)
    with pytest.raises(BufferError, match="tells no current stream of device 2:3, nor why"):
        _C.dlpack_stream(exchange_api(lambda kind, ordinal: -1), CUDA, 3)
    with pytest.raises(ValueError, match="invalid PyCapsule"):
        _C.dlpack_stream(7, CUDA, 3)
