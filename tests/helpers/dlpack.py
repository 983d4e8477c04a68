"""A DLPack producer made by hand, which can tell what no library can be talked into."""

from __future__ import annotations

import ctypes as ct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

CPU, CUDA = 1, 2
READ_ONLY = 1
CODES = {"i": 0, "u": 1, "f": 2}  # of NumPy's kinds; uint16 stands for bfloat16


class _Tensor(ct.Structure):
    _fields_ = [
        ("data", ct.c_void_p), ("device_type", ct.c_int32), ("device_id", ct.c_int32),
        ("n_dims", ct.c_int32), ("code", ct.c_uint8), ("bits", ct.c_uint8),
        ("lanes", ct.c_uint16), ("shape", ct.c_void_p), ("strides", ct.c_void_p),
        ("byte_offset", ct.c_uint64),
    ]  # fmt: skip


class _Unversioned(ct.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ct.c_void_p), ("deleter", ct.c_void_p)]


class _Versioned(ct.Structure):
    _fields_ = [
        ("major", ct.c_uint32), ("minor", ct.c_uint32), ("context", ct.c_void_p),
        ("deleter", ct.c_void_p), ("flags", ct.c_uint64), ("tensor", _Tensor),
    ]  # fmt: skip


class _Exchange(ct.Structure):
    _fields_ = [
        ("major", ct.c_uint32), ("minor", ct.c_uint32), ("older", ct.c_void_p),
        ("conversions", ct.c_void_p * 4), ("current_work_stream", ct.c_void_p),
    ]  # fmt: skip


_DELETER = ct.CFUNCTYPE(None, ct.c_void_p)
_STREAM_OF = ct.CFUNCTYPE(ct.c_int, ct.c_int32, ct.c_int32, ct.POINTER(ct.c_void_p))


def _capsule(address: int, name: bytes) -> Any:
    new = ct.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ct.py_object, [ct.c_void_p, ct.c_char_p, ct.c_void_p]
    return new(address, name, None)


class Producer:
    """An array at an address. strides: in elements, None for NULL; flags and major: of a versioned
    tensor; told_dtype: DLPack's (code, bits, lanes). Counts how often a tensor of its was given
    back."""

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        *,
        device: tuple[int, int] = (CPU, 0),
        strides: tuple[int, ...] | None = None,
        byte_offset: int = 0,
        flags: int = 0,
        major: int = 1,
        is_versioned: bool = True,
        told_dtype: tuple[int, int, int] | None = None,
    ) -> None:
        self.address, self.shape, self.dtype, self.device = address, shape, dtype, device
        self.is_versioned, self.flags, self.major = is_versioned, flags, major
        self.byte_offset, self.n_deleted = byte_offset, 0
        self.told_dtype = told_dtype or (CODES[dtype.kind], 8 * dtype.itemsize, 1)
        self._sizes = (ct.c_int64 * len(shape))(*shape)
        self._strides = None if strides is None else (ct.c_int64 * len(strides))(*strides)
        self._deleter = _DELETER(self._delete)

    @classmethod
    def of(cls, array: NDArray[Any], **told: Any) -> Producer:
        """Over a NumPy array, which it keeps."""
        producer = cls(array.ctypes.data, array.shape, array.dtype, **told)
        producer.array = array  # type: ignore[attr-defined]
        return producer

    def _delete(self, _: int) -> None:
        self.n_deleted += 1

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(
        self, *, stream: int | None = None, max_version: tuple[int, int] | None = None
    ) -> Any:
        tensor = _Tensor(
            self.address, *self.device, len(self.shape), *self.told_dtype,
            ct.cast(self._sizes, ct.c_void_p),
            None if self._strides is None else ct.cast(self._strides, ct.c_void_p),
            self.byte_offset,
        )  # fmt: skip
        deleter = ct.cast(self._deleter, ct.c_void_p)
        if self.is_versioned:
            self._managed: Any = _Versioned(self.major, 0, None, deleter, self.flags, tensor)
            return _capsule(ct.addressof(self._managed), b"dltensor_versioned")
        self._managed = _Unversioned(tensor, None, deleter)
        return _capsule(ct.addressof(self._managed), b"dltensor")


class OldProducer(Producer):
    """Of the time before DLPack 1.0: it knows no version, and says nothing of read-only memory."""

    def __dlpack__(self, *, stream: int | None = None) -> Any:  # type: ignore[override]
        self.is_versioned = False
        return super().__dlpack__(stream=stream)


def exchange_api(
    current_stream: Callable[[int, int], int] | None, *, major: int = 1, older: Any = None
) -> Any:
    """The capsule that a producer's type shows as __dlpack_c_exchange_api__, for its streams only.
    current_stream: of (device type, number), -1 for a failure that sets no exception; None for
    NULL, as all other functions are. Lives with the process."""

    def answer(device_type: int, device_id: int, out: Any) -> int:
        assert current_stream is not None
        stream = current_stream(device_type, device_id)
        out[0] = max(stream, 0)
        return 0 if stream >= 0 else -1

    function = _STREAM_OF(answer)
    address = None
    if older is not None:
        get = ct.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ct.c_void_p, [ct.py_object, ct.c_char_p]
        address = get(older, b"dlpack_exchange_api")
    api = _Exchange(major, 0, address)
    if current_stream is not None:
        api.current_work_stream = ct.cast(function, ct.c_void_p)
    _KEPT.extend([function, api])
    return _capsule(ct.addressof(api), b"dlpack_exchange_api")


_KEPT: list[Any] = []
